# SPDX-License-Identifier: Apache-2.0
"""JSON → `ModelFamily`, or an error that names the field and what it should be.

One schema serves the data of this package, which lists hubs in `model_src`, and registrations,
whose specs name one repository or path each. A key is understood, carried as it stands
(`CARRIED_*`), or refused with the nearest known one: a misspelt `context_lenght` must not
silently give a model of 2048 tokens. Knows nothing of files and of what else is registered.
"""

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from xinference.errors import InvalidRequest
from xinference.identifiers import family_name

from .family import GUIDE_URI, ModelFamily, Variant, parse_size
from .old_form import PROMPT_STYLE, converted

MAX_JSON_CHARS = 1_000_000
MAX_INT_DIGITS = 15
"""Every JSON reader keeps such a number exactly."""
MAX_NAME_BYTES = 200
"""A registration is a file of this name, and file systems end at 255 bytes."""

FORMATS = ("pytorch", "gptq", "awq", "fp4", "fp8", "bnb", "ggufv2", "mlx")
ABILITIES = ("generate", "chat", "tools", "reasoning", "hybrid", "vision", "audio", "omni")
LATER_ABILITIES = ("embed",)
TOOL_PARSERS = (
    "qwen",
    "hermes",
    "llama3",
    "mistral",
    "harmony",
    "glm4",
    "glm4.5",
    "glm5",
    "gemma",
    "deepseek-r1",
    "deepseek-v3",
    "deepseek-v3.1",
    "deepseek-v3.2",
    "deepseek-v4",
    "deepseek-v4.1",
    "kimi-k3",
    "minicpm5",
    "minimax",
    "minimax_m3",
)
HUBS = ("huggingface", "modelscope", "openmind_hub", "csghub")
NO_HUBS = ("local", "package")
"""In the place of a hub: the files are on the worker, or inside this package."""

FIELDS = (
    "version",
    "model_name",
    "model_description",
    "context_length",
    "model_lang",
    "model_ability",
    "license",
    "model_family",
    "architectures",
    "chat_template",
    "stop_token_ids",
    "stop",
    "reasoning_start_tag",
    "reasoning_end_tag",
    "tool_parser",
    "model_specs",
)
CARRIED_FIELDS = ("updated_at", "featured", "virtualenv", "cache_config")
DROPPED_FIELDS = ("model_type", "is_builtin", "download_hubs")
"""What the server adds to a family it shows; there when somebody registers a copy of that."""

SPEC_FIELDS = (
    "model_format",
    "model_size_in_billions",
    "activated_size_in_billions",
    "quantization",
    "quantizations",
    "model_hub",
    "model_id",
    "model_revision",
    "model_uri",
    "model_src",
)
SOURCE_FIELDS = ("model_id", "model_revision", "quantizations")
CARRIED_SPEC_FIELDS = (
    "model_file_name_template",
    "model_file_name_split_template",
    "quantization_parts",
    "multimodal_projectors",
    "draft_model_id",
    "draft_quantizations",
    "draft_model_file_name_template",
    "model_metadata",
    "model_metadata_by_quantization",
)
DROPPED_SPEC_FIELDS = ("cache_status", "draft_cache_status", "fits", "memory_bytes")

_PACKAGE_URI = re.compile(r"package:[A-Za-z_]\w*/[A-Za-z_][\w-]*", re.ASCII)
"""A folder of another Python package."""

_OLD_FORMATS = {
    "ggmlv3": "is of an older form that nothing reads any more; convert the file with llama.cpp "
    'and say "model_format": "ggufv2", with the new name in model_file_name_template'
}
"""Formats of old registrations, and what takes their place."""


def parse_family(text: str, *, is_builtin: bool) -> ModelFamily:
    """Read one family.

    Raises:
        InvalidRequest: naming the field, by its path from the top.
    """
    top = family_json(text)
    if PROMPT_STYLE in top.given:
        top = Reader(converted(top.given), "")
    top.check_keys((*FIELDS, *CARRIED_FIELDS, *DROPPED_FIELDS))
    top.one_of("version", (1, 2), default=2)
    top.one_of("tool_parser", TOOL_PARSERS, default="")
    name = family_name_of(top)
    return ModelFamily(
        model_name=name,
        model_description=top.optional_text("model_description") or "",
        context_length=top.optional_count("context_length"),
        model_lang=top.texts("model_lang") or ("en",),
        model_ability=_abilities(top),
        license=top.optional_text("license"),
        model_family=top.optional_text("model_family") or name,
        architectures=top.texts("architectures"),
        chat_template=top.optional_text("chat_template"),
        stop_token_ids=top.token_ids("stop_token_ids"),
        stop=top.texts("stop"),
        reasoning_start_tag=top.optional_text("reasoning_start_tag"),
        reasoning_end_tag=top.optional_text("reasoning_end_tag"),
        tool_parser=top.optional_text("tool_parser"),
        variants=variants_of(top),
        is_builtin=is_builtin,
        carried=top.carried(CARRIED_FIELDS),
    )


def family_json(text: str) -> "Reader":
    """Return the JSON object of a family, to be read.

    Raises:
        InvalidRequest: it is too long, or no JSON object.
    """
    if len(text) > MAX_JSON_CHARS:
        refuse("model", f"is longer than {MAX_JSON_CHARS} characters")
    try:
        given = json.loads(text, parse_int=_json_int)
        # Why encode again: NaN and half of a surrogate pair read well and print as no JSON.
        json.dumps(given, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field="model", problem=f"is not JSON: {error}") from error
    if not isinstance(given, dict):
        refuse("model", "must be a JSON object")
    return Reader(given, "")


def variants_of(top: "Reader", *, needs_size: bool = True) -> tuple[Variant, ...]:
    """Return the variants that `model_specs` lists, at least one.

    Args:
        needs_size: whether each has to say how many parameters it has; else 0 is unknown.
    """
    specs = top.objects("model_specs")
    if not specs:
        refuse("model_specs", "must have at least one entry")
    return tuple(variant for spec in specs for variant in _variants(spec, needs_size))


def inherit(family: ModelFamily, builtin: Mapping[str, ModelFamily]) -> ModelFamily:
    """Complete a registration from the built-in family it belongs to.

    Without a template of its own, or with the name of a built-in family in its place, it takes
    that family's template, and its stop tokens, tags and tool parser where it gives none.

    Raises:
        InvalidRequest: `chat_template` is neither a template nor a name, or tools are claimed
            and nothing says how their calls are written.
    """
    template = family.chat_template
    parent = builtin.get(family.model_family if template is None else template)
    if parent is None and template is not None and "{" not in template:
        refuse(
            "chat_template",
            f"{template[:100]!r} is neither a Jinja template nor the name of a built-in model"
            + did_you_mean(template, builtin),
        )
    if parent is not None:
        has_stop = bool(family.stop or family.stop_token_ids)
        family = replace(
            family,
            chat_template=parent.chat_template,
            stop=family.stop if has_stop else parent.stop,
            stop_token_ids=family.stop_token_ids if has_stop else parent.stop_token_ids,
            reasoning_start_tag=family.reasoning_start_tag or parent.reasoning_start_tag,
            reasoning_end_tag=family.reasoning_end_tag or parent.reasoning_end_tag,
            tool_parser=family.tool_parser or parent.tool_parser,
        )
    if "tools" in family.model_ability and family.tool_parser is None:
        relative = builtin.get(family.model_family)
        if relative is None or relative.tool_parser is None:
            refuse(
                "tool_parser",
                "a model with tools must name its parser, or a built-in model with tools as its "
                "model_family",
            )
        family = replace(family, tool_parser=relative.tool_parser)
    return family


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return "; did you mean …?", or nothing where no known name is near."""
    near = near_names(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def near_names(name: str, known: Collection[str]) -> list[str]:
    """Return up to three known names that look like `name`, nearest first."""
    folded = {one.casefold(): one for one in sorted(known, reverse=True)}
    return [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, n=3)]


def refuse(field: str, problem: str) -> NoReturn:
    """Raise the complaint about a field, by its path from the top."""
    raise InvalidRequest(field=field, problem=problem)


def _json_int(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise ValueError(f"{digits[:MAX_INT_DIGITS]}… has too many digits")
    return int(digits)


def family_name_of(top: "Reader") -> str:
    """Return the checked name of a family."""
    name = family_name(top.text("model_name"))
    if not name.isprintable() or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        refuse(
            "model_name", f"must be printable and at most {MAX_NAME_BYTES} bytes, got {name[:50]!r}"
        )
    return name


def _abilities(top: "Reader") -> tuple[str, ...]:
    abilities = top.texts("model_ability")
    if not abilities:
        refuse("model_ability", f"is needed, one or more of {', '.join(ABILITIES)}")
    for ability in abilities:
        if ability in LATER_ABILITIES:
            refuse("model_ability", f"{ability} is not served by this version")
        if ability not in ABILITIES:
            refuse(
                "model_ability",
                f"{ability!r} is not one of {', '.join(ABILITIES)}"
                + did_you_mean(ability, ABILITIES),
            )
    if not {"chat", "generate"} & set(abilities):
        refuse("model_ability", "must have chat or generate")
    return abilities


def _variants(spec: "Reader", needs_size: bool) -> list[Variant]:
    spec.check_keys((*SPEC_FIELDS, *CARRIED_SPEC_FIELDS, *DROPPED_SPEC_FIELDS))
    model_format = spec.text("model_format")
    if model_format in _OLD_FORMATS:
        spec.refuse("model_format", f"{model_format} {_OLD_FORMATS[model_format]}")
    spec.one_of("model_format", FORMATS)
    size = spec.size("model_size_in_billions")
    if size is None and needs_size:
        spec.refuse("model_size_in_billions", "is needed")
    variant = Variant(
        model_format=model_format,
        size=size or Decimal(0),
        activated_size=spec.size("activated_size_in_billions"),
        quantization="none",
        model_hub="local",
        model_id=None,
        carried=spec.carried(CARRIED_SPEC_FIELDS),
    )
    if spec.given.get("model_src") is not None:
        return _published(spec, variant)
    path = _path(spec)
    model_id = spec.optional_text("model_id")
    if path is None and model_id is None:
        spec.refuse("model_uri", "is needed: where the files are on the worker")
    hub = spec.optional_text("model_hub") or ("huggingface" if path is None else "local")
    spec.one_of("model_hub", (*HUBS, *NO_HUBS), default=hub)
    located = replace(
        variant,
        model_hub=hub,
        model_id=model_id,
        model_revision=spec.optional_text("model_revision"),
        path=path,
    )
    return [replace(located, quantization=one) for one in _quantizations(spec, model_format)]


def _published(spec: "Reader", variant: Variant) -> list[Variant]:
    for field in ("quantization", "model_hub", "model_uri", *SOURCE_FIELDS):
        if spec.given.get(field) is not None:
            spec.refuse(field, "is said by model_src; give one of them")
    found: list[Variant] = []
    for hub, source in spec.named_objects("model_src"):
        if hub not in HUBS:
            spec.refuse("model_src", f"{hub!r} is not one of {', '.join(HUBS)}")
        source.check_keys((*SOURCE_FIELDS, *CARRIED_SPEC_FIELDS))
        on_hub = replace(
            variant,
            model_hub=hub,
            model_id=source.text("model_id"),
            model_revision=source.optional_text("model_revision"),
            carried={**variant.carried, **source.carried(CARRIED_SPEC_FIELDS)},
        )
        quantizations = _quantizations(source, variant.model_format)
        found += [
            replace(
                on_hub,
                quantization=quantization,
                model_id=str(on_hub.model_id).replace("{quantization}", quantization),
            )
            for quantization in quantizations
        ]
    if not found:
        spec.refuse("model_src", "must name at least one hub")
    return found


def _quantizations(spec: "Reader", model_format: str) -> tuple[str, ...]:
    # Why a list under the singular too: both spellings are in documents people copy from.
    given = spec.given.get("quantization")
    found = spec.texts("quantization") if isinstance(given, list) else ()
    if isinstance(given, str):
        found = (spec.text("quantization"),)
    found = found or spec.texts("quantizations")
    if not found and model_format == "pytorch":
        return ("none",)
    if not found:
        spec.refuse("quantization", f"is needed for the format {model_format}")
    return tuple("none" if one.casefold() == "none" else one for one in found)


def _path(spec: "Reader") -> str | None:
    uri = spec.optional_text("model_uri")
    if uri is None:
        return None
    if uri == GUIDE_URI or _PACKAGE_URI.fullmatch(uri):
        return uri
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    if not path.startswith("/") or "\0" in path:
        spec.refuse("model_uri", f"must be an absolute path or file:///…, got {uri[:200]!r}")
    return path


class Reader:
    """A JSON object that is read field by field; every complaint carries the field's path.

    JSON null, and a blank text where a text may be absent, count as absent: forms send them.
    """

    def __init__(self, given: dict[str, Any], where: str) -> None:
        self.given = given
        self._where = where

    def refuse(self, field: str, problem: str) -> NoReturn:
        refuse(self._where + field, problem)

    def check_keys(self, known: Collection[str]) -> None:
        for key in self.given:
            if key not in known:
                self.refuse(key[:100], "is not a known field" + did_you_mean(key, known))

    def carried(self, names: Collection[str]) -> dict[str, Any]:
        return {name: self.given[name] for name in names if self.given.get(name) is not None}

    def optional_text(self, field: str) -> str | None:
        value = self.given.get(field)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(field, f"must be a text, got {value!r}"[:300])
        return value if value.strip() else None

    def text(self, field: str) -> str:
        value = self.optional_text(field)
        if value is None:
            self.refuse(field, "is needed")
        return value

    def verbatim(self, field: str) -> str | None:
        """Return a text with its white space, which counts."""
        return self.given[field] if self.optional_text(field) is not None else None

    def text_map(self, field: str) -> dict[str, str]:
        """Return an object whose values are texts; empty if it is absent."""
        value = self.given.get(field)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            self.refuse(field, "must be an object of texts")
        return dict(value)

    def optional_object(self, field: str) -> "Reader | None":
        """Return an object to be read; None if it is absent."""
        value = self.given.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(field, "must be an object")
        return Reader(value, f"{self._where}{field}.")

    def optional_count(self, field: str) -> int | None:
        value = self.given.get(field)
        if value is None:
            return None
        if not _is_int(value) or value < 1:
            self.refuse(field, f"must be a whole number above 0, got {value!r}"[:300])
        return int(value)

    def one_of(self, field: str, allowed: Collection[Any], *, default: Any = None) -> None:
        value = self.given.get(field)
        if value in (None, "") and default is not None:
            return
        if isinstance(value, bool) or value not in allowed:
            choices = ", ".join(map(str, allowed))
            self.refuse(field, f"must be one of {choices}, got {value!r:.100}")

    def texts(self, field: str) -> tuple[str, ...]:
        return tuple(self._items(field, lambda one: isinstance(one, str) and bool(one), "texts"))

    def token_ids(self, field: str) -> tuple[int, ...]:
        return tuple(self._items(field, lambda one: _is_int(one) and one >= 0, "token ids"))

    def objects(self, field: str) -> list["Reader"]:
        items = self._items(field, lambda one: isinstance(one, dict), "objects")
        return [Reader(one, f"{self._where}{field}[{i}].") for i, one in enumerate(items)]

    def named_objects(self, field: str) -> list[tuple[str, "Reader"]]:
        value = self.given.get(field)
        if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
            self.refuse(field, "must be an object of objects, one for each hub")
        return [(key, Reader(one, f"{self._where}{field}.{key}.")) for key, one in value.items()]

    def size(self, field: str) -> Decimal | None:
        value = self.given.get(field)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        size = parse_size(str(value)) if is_number or isinstance(value, str) else None
        if size is None:
            self.refuse(field, f'must be billions as 7, "0_5" or "0.5", got {value!r}'[:300])
        return size

    def _items(self, field: str, is_valid: Callable[[Any], bool], kind: str) -> list[Any]:
        value = self.given.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(map(is_valid, value)):
            self.refuse(field, f"must be a list of {kind}")
        return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
