# SPDX-License-Identifier: Apache-2.0
"""What the Transformers engine can run of a family, or why it cannot.

Pure: judges by format, ability and the name of the class, before anything is downloaded. What
it lets pass is judged again by the engine, on the files themselves. `transformers` is not asked:
the catalogue does without it, and a test compares the names here with those it has.
"""

from .family import ModelFamily, Variant

_FORMATS = {
    "gptq": "needs gptqmodel, which this version does not use",
    "awq": "needs gptqmodel, which this version does not use",
    "bnb": "needs bitsandbytes, which this version does not use",
    "fp8": "needs fp8 kernels, which this version does not have",
    "fp4": "needs fp4 kernels, which this version does not have",
    "ggufv2": "is for llama.cpp, which is not served by this version yet",
    "mlx": "is for MLX on Apple silicon, which this version does not serve",
}
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
    family: ModelFamily, variant: Variant, *, trust_remote_code: bool = False
) -> str | None:
    """Say why the Transformers engine cannot run the variant; None if it can.

    Args:
        trust_remote_code: whether code that comes with the files may run.
    """
    reason = _FORMATS.get(variant.model_format)
    if reason is None and variant.quantization != "none":
        reason = "needs bitsandbytes, which this version does not use"
    if reason is None and variant.weights == "fp8":
        reason = "is published in fp8, and needs kernels for that which this version does not have"
    if reason is not None:
        return f"{variant} {reason}"
    return _refusal_of_class(family, trust_remote_code)


def _refusal_of_class(family: ModelFamily, trust_remote_code: bool) -> str | None:
    senses = [what for ability, what in _SENSES.items() if ability in family.model_ability]
    if senses:
        return f"it takes {' and '.join(senses)}, and this version serves text alone"
    for name in family.architectures:
        if name in STATEFUL:
            return f"{name} keeps more of the past than keys and values, which is not served"
        if name in BRING_CODE and not trust_remote_code:
            return (
                f"{name} is not in transformers; its files bring the code, which runs only with "
                "trust_remote_code"
            )
    return None
