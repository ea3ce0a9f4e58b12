# SPDX-License-Identifier: Apache-2.0
"""What an engine can run of a family, or why it cannot.

Pure: judges by format, ability and the name of the class, before anything is downloaded. What
it lets pass is judged again by the engine, on the files themselves. `transformers` is not asked:
the catalogue does without it, and a test compares the names here with those it has.
"""

from collections.abc import Mapping
from typing import Any

from xinference.protocol.repositories import CAUSAL, CLASSIFIER, ENCODER, RepositoryCard
from xinference.protocol.servers import SERVER_FORMATS, ServerEngine

from .family import ModelFamily, Variant

TRANSFORMERS = "Transformers"
_FORMATS = {
    "gptq": "needs gptqmodel, which this version does not use; vLLM and SGLang read gptq",
    "awq": "needs gptqmodel, which this version does not use; vLLM, SGLang and TRT-LLM read awq",
    "bnb": "needs bitsandbytes, which this version does not use; vLLM and SGLang read bnb",
    "fp8": "needs fp8 kernels, which this version does not have; vLLM, SGLang and TRT-LLM read fp8",
    "fp4": "needs fp4 kernels, which this version does not have; vLLM and TRT-LLM read fp4",
    "ggufv2": "is for the engine llama.cpp",
    "mlx": "is for MLX on Apple silicon, which this version does not serve",
}
_BRINGS_CODE = (
    "is not in transformers; its files bring the code, which runs only with trust_remote_code"
)
_AUTO_CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    ENCODER: "AutoModel",
    CLASSIFIER: "AutoModelForSequenceClassification",
}
"""As `auto_map` of a config names what its code is for."""
_WHAT = {CAUSAL: "goes on from a text", ENCODER: "makes vectors", CLASSIFIER: "scores"}
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_SENSES = {"vision": "pictures", "audio": "sound", "omni": "every kind of input"}

STATEFUL = frozenset(
    {
        "DeepseekV32ForCausalLM",
        "FalconH1ForCausalLM",
        "GlmMoeDsaForCausalLM",
        "JambaForCausalLM",
        "Lfm2ForCausalLM",
        "MambaForCausalLM",
        "MiniMaxForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "RecurrentGemmaForCausalLM",
    }
)
"""Classes that keep more of the past than keys and values, which the engine refuses at load."""

BRING_CODE = frozenset(
    {
        "BaichuanForCausalLM",
        "BailingMoeV2ForCausalLM",
        "ChatGLMModel",
        "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
        "MiMoForCausalLM",
        "MiniCPMForCausalLM",
        "OrionForCausalLM",
        "QWenLMHeadModel",
        "TelechatForCausalLM",
        "XverseForCausalLM",
    }
)
"""Classes that `transformers` does not have, and the files of the models do."""


def refusal(
    family: ModelFamily,
    variant: Variant,
    engine: str = TRANSFORMERS,
    *,
    trust_remote_code: bool = False,
) -> str | None:
    """Say why an engine cannot run the variant; None if it can.

    Args:
        family: of the variant.
        variant: to run.
        engine: as it is written.
        trust_remote_code: whether code that comes with the files may run.
    """
    if engine == TRANSFORMERS:
        reason = _refusal_of_format(variant)
        return reason or _refusal_of_class(family, trust_remote_code)
    formats = SERVER_FORMATS[ServerEngine(engine)]
    if variant.model_format not in formats:
        return f"{variant} is not for {engine}, which reads {', '.join(formats)}"
    if variant.model_format == "pytorch" and variant.quantization != "none":
        return f"{variant} needs bitsandbytes, which this version does not use"
    return _refusal_of_senses(family)


def refusal_of_library(card: RepositoryCard, use: str, *, trust_remote_code: bool) -> str | None:
    """Say why the models library cannot make of a repository what a launch wants; None if it can.

    Args:
        use: `CAUSAL` and its like.
    """
    config = card.documents.get("config.json", {})
    brought = config.get("auto_map")
    if isinstance(brought, Mapping) and _AUTO_CLASSES[use] in brought:
        is_known = card.classes is None or card.classes.get(use)
        return None if trust_remote_code or is_known else f"{_named(config)} {_BRINGS_CODE}"
    if card.classes is None:
        return None
    names = card.classes.get(use, ())
    if not names:
        return f"transformers has no {_named(config)} that {_WHAT[use]}"
    architectures = [one for one in config.get("architectures") or () if isinstance(one, str)]
    if use == CAUSAL and not any(
        one in names or one.endswith(_CAUSAL_ENDINGS) for one in architectures or names
    ):
        return f"{_named(config)} does not go on from a text"
    return None


def _named(config: Mapping[str, Any]) -> str:
    architectures = [one for one in config.get("architectures") or () if isinstance(one, str)]
    return ", ".join(architectures) or f"model of the type {config.get('model_type')!r}"


def _refusal_of_format(variant: Variant) -> str | None:
    reason = _FORMATS.get(variant.model_format)
    if reason is None and variant.quantization != "none":
        reason = "needs bitsandbytes, which this version does not use"
    if reason is None and variant.weights == "fp8":
        reason = "is published in fp8, and needs kernels for that which this version does not have"
    return reason and f"{variant} {reason}"


def _refusal_of_senses(family: ModelFamily) -> str | None:
    senses = [what for ability, what in _SENSES.items() if ability in family.model_ability]
    return (
        f"it takes {' and '.join(senses)}, and this version serves text alone" if senses else None
    )


def _refusal_of_class(family: ModelFamily, trust_remote_code: bool) -> str | None:
    reason = _refusal_of_senses(family)
    if reason is not None:
        return reason
    for name in family.architectures:
        if name in STATEFUL:
            return f"{name} keeps more of the past than keys and values, which is not served"
        if name in BRING_CODE and not trust_remote_code:
            return f"{name} {_BRINGS_CODE}"
    return None
