# SPDX-License-Identifier: Apache-2.0
"""What the catalogue knows of a model that embeds or reranks, and how that is read from JSON.

One schema serves the data of this package and registrations, as for language models
(`schema.py`), and complains in the same way: a field is understood, carried, or refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xinference.protocol.encoding import RerankTemplate

from .family import Variant
from .old_form import with_specs
from .schema import (
    CARRIED_FIELDS,
    DROPPED_FIELDS,
    Reader,
    family_json,
    family_name_of,
    refuse,
    variants_of,
)

EMBEDDING, RERANK = "embedding", "rerank"
ENCODER_TYPES = (EMBEDDING, RERANK)

FIELDS = (
    "version",
    "model_name",
    "model_description",
    "max_tokens",
    "language",
    "model_ability",
    "model_specs",
    "license",
)
EMBEDDING_FIELDS = ("dimensions", "prompts")
RERANK_FIELDS = ("type", "template")
TEMPLATE_FIELDS = ("prefix", "query", "document", "suffix", "yes", "no", "instruction")

ABILITIES = {EMBEDDING: ("embed", "sparse", "multi_vector"), RERANK: ("rerank",)}
LATER_ABILITIES = ("embed_vision", "embed_video", "embed_audio", "rerank_vision")
NORMAL, LLM_BASED, LAYERWISE = "normal", "LLM-based", "LLM-based layerwise"
RERANK_TYPES = (NORMAL, LLM_BASED, LAYERWISE)
UNKNOWN_TYPE = "unknown"
"""What Xinference shows of a reranker that was registered without a type."""
DEFAULT_RERANK_TOKENS = 512
"""Of a reranker that does not say: as many as most take. The files decide when it is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFamily:
    """A published model that embeds or reranks. `variants` is never empty."""

    model_type: str
    """One of `ENCODER_TYPES`."""
    model_name: str
    model_description: str
    max_tokens: int
    """Of one text; of a reranker, of a query and a document together."""
    language: tuple[str, ...]
    model_ability: tuple[str, ...]
    license: str | None
    variants: tuple[Variant, ...]
    is_builtin: bool
    dimensions: int | None = None
    """Of a model that embeds."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Of a model that embeds, where its files do not bring them."""
    rerank_type: str | None = None
    template: RerankTemplate | None = None
    """Of a language model that reranks."""
    carried: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the whole family as registrations show it."""
        about: dict[str, Any] = {
            "version": 2,
            "model_name": self.model_name,
            "model_type": self.model_type,
            "model_description": self.model_description,
            "max_tokens": self.max_tokens,
            "language": list(self.language),
            "model_ability": list(self.model_ability),
            "license": self.license,
        }
        if self.model_type == EMBEDDING:
            about |= {"dimensions": self.dimensions, "prompts": dict(self.prompts)}
        else:
            template = self.template
            fields = {name: getattr(template, name) for name in TEMPLATE_FIELDS if template}
            about |= {"type": self.rerank_type, "template": fields or None}
        return {
            **about,
            **self.carried,
            "model_specs": [variant.to_json() for variant in self.variants],
            "is_builtin": self.is_builtin,
        }


def parse_encoder_family(text: str, model_type: str, *, is_builtin: bool) -> EncoderFamily:
    """Read one family of a type.

    Raises:
        InvalidRequest: naming the field, by its path from the top.
    """
    top = Reader(with_specs(family_json(text).given), "")
    own = EMBEDDING_FIELDS if model_type == EMBEDDING else RERANK_FIELDS
    top.check_keys((*FIELDS, *own, *CARRIED_FIELDS, *DROPPED_FIELDS))
    top.one_of("version", (1, 2), default=2)
    top.one_of("model_type", (model_type,), default=model_type)
    dimensions = top.optional_count("dimensions")
    if model_type == EMBEDDING and dimensions is None:
        refuse("dimensions", "is needed: how many numbers a vector has")
    max_tokens = top.optional_count("max_tokens")
    if model_type == EMBEDDING and max_tokens is None:
        refuse("max_tokens", "is needed: how many tokens the model takes")
    rerank_type = None
    if model_type == RERANK:
        top.one_of("type", (*RERANK_TYPES, UNKNOWN_TYPE), default=NORMAL)
        rerank_type = top.optional_text("type") or NORMAL
        if rerank_type == UNKNOWN_TYPE:
            rerank_type = NORMAL
    return EncoderFamily(
        model_type=model_type,
        model_name=family_name_of(top),
        model_description=top.optional_text("model_description") or "",
        max_tokens=max_tokens or DEFAULT_RERANK_TOKENS,
        language=top.texts("language") or ("en",),
        model_ability=_abilities(top, model_type),
        license=top.optional_text("license"),
        variants=variants_of(top, needs_size=False),
        is_builtin=is_builtin,
        dimensions=dimensions,
        prompts=top.text_map("prompts"),
        rerank_type=rerank_type,
        template=_template(top, rerank_type),
        carried=top.carried(CARRIED_FIELDS),
    )


def _abilities(top: Reader, model_type: str) -> tuple[str, ...]:
    known = ABILITIES[model_type]
    abilities = top.texts("model_ability") or known[:1]
    for ability in abilities:
        if ability in LATER_ABILITIES:
            refuse("model_ability", f"{ability} is not served by this version")
        if ability not in known:
            refuse("model_ability", f"{ability!r} is not one of {', '.join(known)}")
    if known[0] not in abilities:
        refuse("model_ability", f"must have {known[0]}")
    return abilities


def _template(top: Reader, rerank_type: str | None) -> RerankTemplate | None:
    given = top.optional_object("template")
    if given is None:
        if rerank_type == LLM_BASED:
            refuse("template", "is needed: how the model is asked, and which token is its yes")
        return None
    if rerank_type != LLM_BASED:
        refuse("template", f"is for the type {LLM_BASED}")
    given.check_keys(TEMPLATE_FIELDS)
    for name in ("query", "document"):
        if "{" + name + "}" not in given.text(name):
            given.refuse(name, f"must have {{{name}}} in it")
    return RerankTemplate(
        prefix=given.verbatim("prefix") or "",
        query=given.text("query"),
        document=given.text("document"),
        suffix=given.verbatim("suffix") or "",
        yes=given.text("yes"),
        no=given.optional_text("no"),
        instruction=given.optional_text("instruction"),
    )
