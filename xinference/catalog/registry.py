# SPDX-License-Identifier: Apache-2.0
"""`Catalog`: every family this cluster knows, and what becomes of a launch that names one.

Families come with the package (`builtin_families`) or are registered by users, and the kept ones
are read again at the next start. `resolve` turns a caller's `LaunchSpec` into files, abilities
and a description, or says why not. It downloads nothing and starts nothing.
"""

import itertools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Self

from xinference.errors import (
    DownloadUnavailable,
    FamilyNotFound,
    InvalidRequest,
    UnsupportedVariant,
)
from xinference.identifiers import family_name, new_model_uid
from xinference.protocol.deployment import (
    EngineOptions,
    LaunchSpec,
    ModelDescription,
    ModelSource,
)
from xinference.protocol.downloads import HUBS, DownloadRequest, HubSource
from xinference.protocol.repositories import (
    CAUSAL,
    CLASSIFIER,
    ENCODER,
    CardRequest,
    RepositoryCard,
)
from xinference.protocol.servers import LLAMA_CPP_CONTEXT, ServerEngine

from .builtin_families import builtin_encoders, builtin_families
from .encoder_family import (
    EMBEDDING,
    ENCODER_TYPES,
    RERANK,
    EncoderFamily,
    parse_encoder_family,
)
from .encoder_matching import encoder_engine_named, encoder_engines, match_encoder
from .family import (
    DEFAULT_CONTEXT_LENGTH,
    ModelFamily,
    Variant,
    size_text,
)
from .file_family import encoder_family, language_family
from .gguf_head import gguf_file
from .launch_memory import least_memory_bytes, what_fits
from .matching import (
    ENGINES,
    OTHER_ENGINES,
    Wish,
    engine_named,
    match,
    parameter_objects,
)
from .model_files import CardFiles, DirectoryFiles, GgufFiles, ModelFiles
from .packages import PREFIX, packaged_directory
from .registrations import Registrations
from .runnable import TRANSFORMERS, refusal, refusal_of_library
from .schema import did_you_mean, inherit, parse_family
from .shelf import Shelf, virtual_env_of
from .sources import GGUF, download_of

logger = logging.getLogger(__name__)

LANGUAGE = "LLM"
LATER_TYPES = ("image", "audio", "video", "flexible")

MAX_SEEN_FILES = 1000
"""Of a directory that a launch names, what is looked at; the caller's event loop waits for it."""

_USES = {LANGUAGE: CAUSAL, EMBEDDING: ENCODER, RERANK: CLASSIFIER}
"""What a model of a type has to be for the models library."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Where `config.json` says how many tokens a model takes; it depends on the architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a launch comes to."""

    description: ModelDescription
    """`model_uid` is the caller's, or the family's name for the supervisor to make unique."""
    source: ModelSource
    abilities: tuple[str, ...]


def directory_of(path: str) -> Path:
    """Return the directory that `ModelSource.path` names on this machine; it may not exist."""
    if path.startswith(PREFIX):
        return packaged_directory(path) or Path(path)
    return Path(path)


class Catalog:
    """The families of a cluster.

    It belongs to one thread, but for `resolve`, which reads the files that a launch names. Every
    other method is plain and short; `register` and `unregister` write one small file when they
    keep or forget.
    """

    def __init__(
        self,
        builtin: Mapping[str, ModelFamily],
        registrations: Registrations | None = None,
        encoders: Mapping[str, Shelf[EncoderFamily]] | None = None,
    ) -> None:
        self._language: Shelf[ModelFamily] = Shelf(
            builtin,
            lambda text: inherit(parse_family(text, is_builtin=False), builtin),
            registrations,
        )
        self._encoders = dict(encoders or {})

    @classmethod
    def load(cls, home: Path) -> Self:
        """Find the families of this package, and read the kept registrations under `home`.

        A registration that is broken, or whose file is not named after it, is logged and skipped;
        the file stays.
        """
        kept = home / "model" / "v2"
        encoders = {
            model_type: Shelf(
                builtin_encoders(model_type),
                partial(parse_encoder_family, model_type=model_type, is_builtin=False),
                Registrations(kept / model_type),
            )
            for model_type in ENCODER_TYPES
        }
        catalog = cls(builtin_families(), Registrations(kept / LANGUAGE.lower()), encoders)
        catalog._language.restore()
        for shelf in encoders.values():
            shelf.restore()
        return catalog

    def families(self, model_type: str) -> list[dict[str, Any]]:
        """Return every family of a type as its full JSON, sorted by name without letter case.

        Raises:
            InvalidRequest: the type is unknown.
        """
        shelf = self._shelf(type_named(model_type))
        if shelf is None:
            return []
        return [shelf.family(name).to_json() for name in sorted(shelf.names(), key=str.casefold)]

    def family(self, model_type: str, name: str) -> dict[str, Any]:
        """Return one family as its full JSON.

        Raises:
            InvalidRequest: the type is unknown. FamilyNotFound: with near names.
        """
        return self._family(model_type, name).to_json()

    def register(self, model_type: str, text: str, persist: bool) -> None:
        """Add a family given as JSON text; with `persist` it is there after a restart too.

        Raises:
            InvalidRequest: the type is not served, or the text is not a family of it.
            ModelAlreadyExists: a family has this name, whatever its letter case.
            InsufficientResources: it cannot be written; nothing was registered.
        """
        self._served_shelf(model_type).register(text, persist)

    def unregister(self, model_type: str, name: str) -> None:
        """Remove a registered family, and its file if it was kept.

        Raises:
            InvalidRequest: it is built in, or the type is unknown. FamilyNotFound: there is none.
            InsufficientResources: its file cannot be removed; it stays registered.
        """
        self._family(model_type, name)
        self._served_shelf(model_type).unregister(name)

    def engines(self, model_type: str, name: str) -> dict[str, list[dict[str, object]] | str]:
        """Return, per engine name, what it can run of a family, or why it cannot be used.

        Raises:
            InvalidRequest: the type is unknown. FamilyNotFound: with near names.
        """
        family = self._family(model_type, name)
        if isinstance(family, EncoderFamily):
            return encoder_engines(family)
        reasons = {engine: f"{engine} {reason}" for engine, reason in OTHER_ENGINES.items()}
        return {engine: parameter_objects(family, engine) for engine in ENGINES} | reasons

    def card_wanted(self, spec: LaunchSpec) -> CardRequest | None:
        """Return what to read before a launch is resolved that names an unknown repository.

        None: there is no need. Where the catalogue knows the repository, that says what it is.

        Raises:
            InvalidRequest: the type is not served, or the name is no id.
        """
        if not spec.names_repository:
            return None
        if _published_as(spec.model_name, self._served_shelf(spec.model_type)) is not None:
            return None
        hubs = HUBS if spec.download_hub is None else (spec.download_hub,)
        try:
            sources = tuple(HubSource(hub=hub, model_id=spec.model_name) for hub in hubs)
        except InvalidRequest as error:
            names = {"model_id": "model_name", "model_hub": "download_hub"}
            raise InvalidRequest(
                field=names.get(error.field, error.field), problem=error.problem
            ) from error
        return CardRequest(
            model_id=spec.model_name, sources=sources, quantization=spec.quantization
        )

    def resolve(self, spec: LaunchSpec, card: RepositoryCard | None = None) -> Resolved:
        """Decide what a launch runs: files, abilities and description.

        Where the files are visible from here, looks for their `config.json` and reads the context
        length from it. Files that are not visible are the worker's to find, or to miss.

        Args:
            card: what was read because of `card_wanted`.

        Raises:
            InvalidRequest: the type or engine is not served, a field is malformed, or the files
                are visible and no model.
            FamilyNotFound: with near names.
            UnsupportedVariant: no variant is as asked, or none such can run; with those that can.
            DownloadUnavailable: the files are on a hub that this version does not ask.
        """
        family, seen = self._wanted(spec, card)
        if isinstance(family, EncoderFamily):
            return _resolve_encoder(family, spec, card)
        engine = engine_named(spec.model_engine)
        wish = Wish.of(
            size=spec.model_size_in_billions,
            model_format=spec.model_format,
            quantization=spec.quantization,
        )
        trust = spec.engine_options.trust_remote_code
        variant = match(family, wish, engine, trust_remote_code=trust)
        if engine == TRANSFORMERS:
            _check_library(family, spec, card)
        _check_thinking(family, spec.engine_options)
        path, download = _files(family, variant, spec, card)
        if seen is None and path:
            seen = DirectoryFiles(directory_of(path))
        return Resolved(
            description=_description(family, variant, spec, engine, seen),
            source=ModelSource(
                path=path,
                download=download,
                chat_template=family.chat_template,
                stop=family.stop,
                stop_token_ids=family.stop_token_ids,
                tool_parser=family.tool_parser,
                reasoning_start_tag=family.reasoning_start_tag,
                reasoning_end_tag=family.reasoning_end_tag,
                virtual_env=virtual_env_of(family.carried),
            ),
            abilities=family.model_ability,
        )

    def fitting(self, spec: LaunchSpec, room_bytes: int) -> list[str]:
        """Return what of the family of a launch fits a room, in words, the largest first.

        Raises:
            InvalidRequest: the type is unknown. FamilyNotFound: with near names.
        """
        if self.card_wanted(spec) is not None:
            return []
        family, _ = self._wanted(spec)
        if isinstance(family, EncoderFamily):
            return []
        engine = engine_named(spec.model_engine)
        trust = spec.engine_options.trust_remote_code
        runnable = [
            one
            for one in family.variants
            if refusal(family, one, engine, trust_remote_code=trust) is None
        ]
        return what_fits(runnable, spec.engine_options, room_bytes)

    def _wanted(
        self, spec: LaunchSpec, card: RepositoryCard | None = None
    ) -> tuple[ModelFamily | EncoderFamily, ModelFiles | None]:
        """Return the family of a launch: by its name, by the id of a repository, or by files.

        With the files that it was read from, if it was.
        """
        shelf = self._served_shelf(spec.model_type)
        name = spec.model_name
        if spec.model_path is not None and (not name or "/" in name):
            path = Path(_checked_path(spec.model_path))
            files = _files_at(path)
            given = Path(name).name or path.name.removesuffix(".gguf")
            return _family_of_files(files, given, spec), files
        if "/" not in name:
            return shelf.family(name), None
        known = _published_as(name, shelf)
        if known is not None:
            return known, None
        if card is None:
            raise DownloadUnavailable(
                family=name,
                model_id=name,
                problem="the catalogue does not know it, and nobody has read its files",
            )
        read = CardFiles(card)
        return _family_of_files(read, Path(name).name, spec), read

    def _shelf(self, model_type: str) -> Shelf[ModelFamily] | Shelf[EncoderFamily] | None:
        return self._language if model_type == LANGUAGE else self._encoders.get(model_type)

    def _served_shelf(self, model_type: str) -> Shelf[ModelFamily] | Shelf[EncoderFamily]:
        known = type_named(model_type)
        shelf = self._shelf(known)
        if shelf is None:
            served = ", ".join((LANGUAGE, *self._encoders))
            raise InvalidRequest(
                field="model_type",
                problem=f"{known} is not served by this version; {served} are",
            )
        return shelf

    def _family(self, model_type: str, name: str) -> ModelFamily | EncoderFamily:
        shelf = self._shelf(type_named(model_type))
        if shelf is None:
            raise FamilyNotFound(family=name, suggestions=[])
        return shelf.family(name)


def type_named(text: str) -> str:
    """Return a model type as it is written; letter case does not matter.

    Raises:
        InvalidRequest: there is none of this name.
    """
    types = (LANGUAGE, *ENCODER_TYPES, *LATER_TYPES)
    for model_type in types:
        if text.casefold() == model_type.casefold():
            return model_type
    raise InvalidRequest(
        field="model_type",
        problem=f"{text!r} is not a type of model" + did_you_mean(text, types),
    )


def _files_at(path: Path) -> ModelFiles:
    """Return the files of a path: a directory, a GGUF file, or a directory that has one.

    Raises:
        InvalidRequest: they are GGUF, and cannot be read, or are of several models.
    """
    try:
        is_gguf = path.is_file() or (
            path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))
        )
        return GgufFiles(gguf_file(path)) if is_gguf else DirectoryFiles(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest(field="model_path", problem=str(error)) from error


def _family_of_files(
    files: ModelFiles, given: str, spec: LaunchSpec
) -> ModelFamily | EncoderFamily:
    """Return what files say they are, named after the id or the directory."""
    name = family_name(re.sub(r"[+\\?%#&=\s]", "-", given) or "model")
    model_type = type_named(spec.model_type)
    if model_type == LANGUAGE:
        return language_family(files, name)
    return encoder_family(files, name, model_type)


def _published_as(
    model_id: str, shelf: Shelf[ModelFamily] | Shelf[EncoderFamily]
) -> ModelFamily | EncoderFamily | None:
    """Return the family that has a repository of this id, with the variants that are in it."""
    wanted = model_id.casefold()
    for name in sorted(shelf.names()):
        family = shelf.family(name)
        kinds = {
            _kind_of(one) for one in family.variants if (one.model_id or "").casefold() == wanted
        }
        if kinds:
            # Why by kind: the same files may be on another hub under another id.
            same = tuple(one for one in family.variants if _kind_of(one) in kinds)
            return replace(family, variants=same)
    return None


def _kind_of(variant: Variant) -> tuple[str, Decimal, str]:
    """Return what two variants share that differ in their hub alone."""
    return variant.model_format, variant.size, variant.quantization


def _checked_path(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise InvalidRequest(
            field="model_path", problem=f"must be an absolute path on the worker, got {text!r}"
        )
    return text


def _check_library(
    family: ModelFamily | EncoderFamily, spec: LaunchSpec, card: RepositoryCard | None
) -> None:
    """Refuse a repository whose class the workers' models library does not have.

    Raises:
        UnsupportedVariant
    """
    # Why not with packages of its own: among them may be a library that has it.
    if card is None or spec.virtual_env_packages:
        return
    uses = _USES[LANGUAGE if isinstance(family, ModelFamily) else family.model_type]
    trust = spec.engine_options.trust_remote_code
    reason = refusal_of_library(card, uses, trust_remote_code=trust)
    if reason is not None:
        raise UnsupportedVariant(family=str(card.source), problem=reason, suggestions=[])


def _check_thinking(family: ModelFamily, options: EngineOptions) -> None:
    """Refuse to switch what a family does not let one switch, and to limit what it does not do."""
    enable, always = options.enable_thinking, "reasoning" in family.model_ability
    is_hybrid = "hybrid" in family.model_ability
    if enable is not None and not is_hybrid and enable is not always:
        raise InvalidRequest(
            field="enable_thinking",
            problem=f"{family.model_name} {'always thinks' if always else 'cannot think'}",
        )
    if options.thinking_budget is not None and not (is_hybrid or always):
        raise InvalidRequest(field="thinking_budget", problem=f"{family.model_name} cannot think")


def _files(
    family: ModelFamily | EncoderFamily,
    variant: Variant,
    spec: LaunchSpec,
    card: RepositoryCard | None,
) -> tuple[str, DownloadRequest | None]:
    """Return where the files of a variant are on the worker, or what it has to download.

    Raises:
        InvalidRequest, UnsupportedVariant, DownloadUnavailable
    """
    path = variant.path if spec.model_path is None else _checked_path(spec.model_path)
    if path is None:
        request = download_of(
            variant,
            family.variants,
            model_version=_version_of(family, variant, card),
            model_name=family.model_name,
            model_type=LANGUAGE if isinstance(family, ModelFamily) else family.model_type,
            hub=spec.download_hub,
        )
        return "", request
    if spec.download_hub is not None:
        raise InvalidRequest(
            field="download_hub", problem="means nothing here: the files are not on a hub"
        )
    check = _check_visible_gguf if variant.model_format == GGUF else _check_visible
    check(path, "model_uri" if spec.model_path is None else "model_path")
    return path, None


def _version_of(
    family: ModelFamily | EncoderFamily, variant: Variant, card: RepositoryCard | None
) -> str:
    """Return the variant in one word, as users know it from lists and as removals take it."""
    # Why its whole id: the models of two makers may have one name, and that of a family.
    words = [family.model_name] if card is None else card.source.model_id.split("/")
    if isinstance(family, ModelFamily):
        words.append(f"{size_text(variant.size)}B")
    elif family.dimensions is not None:
        words += [str(family.max_tokens), str(family.dimensions)]
    return "--".join((*words, variant.model_format, variant.quantization))


def _check_visible(path: str, field: str) -> None:
    """Refuse files that are plainly no model. What is not visible from here is not judged."""
    directory = directory_of(path)
    try:
        if directory.exists() and not directory.is_dir():
            raise InvalidRequest(field=field, problem=f"{path} is not a directory")
        # Why not where it is empty: that is how a mount point of another host looks here.
        if any(directory.iterdir()) and not (directory / "config.json").exists():
            raise InvalidRequest(field=field, problem=f"{path} has no config.json")
    except OSError as error:
        logger.info("The files in %s cannot be looked at from here: %s", path, error)


def _check_visible_gguf(path: str, field: str) -> None:
    """Refuse what is plainly no GGUF, nor a directory with one, as `_check_visible`."""
    given = Path(path)
    try:
        if given.is_file() and given.suffix != ".gguf":
            raise InvalidRequest(field=field, problem=f"{path} is not a .gguf file")
        if given.is_dir() and any(given.iterdir()) and not _may_have_gguf(given):
            raise InvalidRequest(field=field, problem=f"{path} has no .gguf file")
    except OSError as error:
        logger.info("The files in %s cannot be looked at from here: %s", path, error)


def _may_have_gguf(directory: Path) -> bool:
    """Return whether there is a GGUF below a directory, or too much to look at all of it."""
    seen = list(itertools.islice(directory.rglob("*"), MAX_SEEN_FILES))
    return len(seen) == MAX_SEEN_FILES or any(one.suffix == ".gguf" for one in seen)


def _description(
    family: ModelFamily,
    variant: Variant,
    spec: LaunchSpec,
    engine: str,
    files: ModelFiles | None,
) -> ModelDescription:
    is_given = spec.model_path is not None
    wanted = spec.engine_options.max_model_len
    if wanted is None and engine == ServerEngine.LLAMA_CPP:
        wanted = LLAMA_CPP_CONTEXT
    limits = (family.context_length, _context_of(files), wanted)
    return ModelDescription(
        model_uid=spec.model_uid or new_model_uid(family.model_name, taken=set()),
        model_type=LANGUAGE,
        model_name=family.model_name,
        model_engine=engine,
        model_format=variant.model_format,
        model_size_in_billions=size_text(variant.size),
        quantization=variant.quantization,
        model_family=family.model_family,
        model_lang=family.model_lang,
        model_ability=family.model_ability,
        model_description=family.model_description,
        model_hub="local" if is_given else variant.model_hub,
        revision=None if is_given else variant.model_revision,
        context_length=min((one for one in limits if one), default=DEFAULT_CONTEXT_LENGTH),
        replica=spec.replica,
        memory_bytes=least_memory_bytes(variant, spec.engine_options, files),
    )


def _resolve_encoder(
    family: EncoderFamily, spec: LaunchSpec, card: RepositoryCard | None
) -> Resolved:
    engine = encoder_engine_named(spec.model_engine)
    wish = Wish.of(
        size=spec.model_size_in_billions,
        model_format=spec.model_format,
        quantization=spec.quantization,
    )
    variant = match_encoder(family, wish)
    _check_library(family, spec, card)
    path, download = _files(family, variant, spec, card)
    is_given = spec.model_path is not None
    limits = (family.max_tokens, spec.engine_options.max_model_len)
    description = ModelDescription(
        model_uid=spec.model_uid or new_model_uid(family.model_name, taken=set()),
        model_type=family.model_type,
        model_name=family.model_name,
        model_engine=engine,
        model_format=variant.model_format,
        model_size_in_billions=size_text(variant.size),
        quantization=variant.quantization,
        model_family=family.model_name,
        model_lang=family.language,
        model_ability=family.model_ability,
        model_description=family.model_description,
        model_hub="local" if is_given else variant.model_hub,
        revision=None if is_given else variant.model_revision,
        context_length=min(one for one in limits if one),
        replica=spec.replica,
        dimensions=family.dimensions,
        rerank_type=family.rerank_type,
    )
    source = ModelSource(
        path=path,
        download=download,
        prompts=dict(family.prompts),
        rerank_template=family.template,
        virtual_env=virtual_env_of(family.carried),
    )
    return Resolved(description=description, source=source, abilities=family.model_ability)


def _context_of(files: ModelFiles | None) -> int | None:
    """Return how many tokens the model's `config.json` says it takes; None if it is not here."""
    config = (files and files.document("config.json")) or {}
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    for key in _CONTEXT_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
