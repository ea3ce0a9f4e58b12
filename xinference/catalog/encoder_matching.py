# SPDX-License-Identifier: Apache-2.0
"""Which variant of a model that embeds or reranks is launched, by which engine, or why not.

Pure, as `matching.py`.
"""

from xinference.errors import InvalidRequest, UnsupportedVariant

from .encoder_family import LAYERWISE, EncoderFamily
from .family import Variant, size_text
from .matching import Wish, missing_words
from .schema import did_you_mean

SENTENCE_TRANSFORMERS = "sentence_transformers"
_LANGUAGE_ONLY = f"is not served for such models; use {SENTENCE_TRANSFORMERS}"
OTHER_ENGINES = {
    "flag": f"is not served; use {SENTENCE_TRANSFORMERS}, which gives the same vectors",
    "vllm": _LANGUAGE_ONLY,
    "llama.cpp": _LANGUAGE_ONLY,
}
"""Engines that users know by name, and why this version does not offer them."""


def encoder_engine_named(name: str | None) -> str:
    """Return the engine's name as it is written; None asks for the default one.

    Raises:
        InvalidRequest: there is none of this name, or this version does not serve it.
    """
    if name is None or name.casefold().replace("-", "_") == SENTENCE_TRANSFORMERS:
        return SENTENCE_TRANSFORMERS
    for other, reason in OTHER_ENGINES.items():
        if name.casefold() == other.casefold():
            raise InvalidRequest(field="model_engine", problem=f"{other} {reason}")
    raise InvalidRequest(
        field="model_engine",
        problem=f"{name!r} is not an engine for such models"
        + did_you_mean(name, (SENTENCE_TRANSFORMERS, *OTHER_ENGINES)),
    )


def refusal(family: EncoderFamily, variant: Variant) -> str | None:
    """Say why the engine cannot run a variant; None if it can."""
    if family.rerank_type == LAYERWISE:
        return f"{family.model_name} scores layer by layer, which this version does not do"
    if variant.model_format != "pytorch":
        return f"{variant} is not for {SENTENCE_TRANSFORMERS}, which reads pytorch"
    if variant.quantization != "none":
        return f"{variant} is not what {SENTENCE_TRANSFORMERS} loads here; only none is"
    return None


def match_encoder(family: EncoderFamily, wish: Wish) -> Variant:
    """Choose the variant to launch.

    Raises:
        UnsupportedVariant: none fits the wish, or none that fits can run.
    """
    runnable = [one for one in family.variants if refusal(family, one) is None]
    suggestions = list(dict.fromkeys(map(str, runnable)))
    fitting = [one for one in family.variants if wish.num_misses(one) == 0]
    if not fitting:
        raise UnsupportedVariant(
            family=family.model_name,
            problem="there is no variant " + missing_words(family.variants, wish),
            suggestions=suggestions,
        )
    for variant in fitting:
        if refusal(family, variant) is None:
            return variant
    raise UnsupportedVariant(
        family=family.model_name,
        problem=refusal(family, fitting[0]) or "",
        suggestions=suggestions,
    )


def encoder_engines(family: EncoderFamily) -> dict[str, list[dict[str, object]] | str]:
    """Return what `GET /v1/engines` shows: parameter objects, or why an engine cannot run it."""
    objects: list[dict[str, object]] = []
    for variant in family.variants:
        if refusal(family, variant) is None:
            about: dict[str, object] = {
                "model_name": family.model_name,
                "model_format": variant.model_format,
                "model_size_in_billions": size_text(variant.size),
                "quantization": variant.quantization,
            }
            if family.dimensions is not None:
                about |= {"dimensions": family.dimensions, "max_tokens": family.max_tokens}
            if about not in objects:
                objects.append(about)
    own: list[dict[str, object]] | str = objects or refusal(family, family.variants[0]) or ""
    reasons = {engine: f"{engine} {reason}" for engine, reason in OTHER_ENGINES.items()}
    return {SENTENCE_TRANSFORMERS: own, **reasons}
