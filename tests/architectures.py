# SPDX-License-Identifier: Apache-2.0
"""Every architecture that is held to the stock model's tokens, as a tiny config, and how it runs.

`tests.models_tiny` has the few that most tests use. The table of `doc/engine.md` is these.
"""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tests.models_tiny import CONFIGS, MAX_POSITIONS, SHAPE, VOCAB_SIZE, WINDOW

Configs = dict[str, Callable[[], PreTrainedConfig]]

_WIDE = {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
_OLD = {"vocab_size": VOCAB_SIZE, **_WIDE}
_OLD_GPT = {**_OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_SLIDES_FIRST = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _config(name: str, **fields: Any) -> Callable[[], PreTrainedConfig]:
    """Return a maker of `transformers.<name>Config` with our shape, but for `fields`."""
    return lambda: getattr(transformers, f"{name}Config")(**{**SHAPE, **fields})


def _old(name: str, **fields: Any) -> Callable[[], PreTrainedConfig]:
    """Return a maker of a config whose class has other names for everything."""
    return lambda: getattr(transformers, f"{name}Config")(**{**_OLD, **fields})


PAGED: Configs = {
    **CONFIGS,
    "apertus": _config("Apertus"),
    "arcee": _config("Arcee"),
    "cohere": _config("Cohere"),
    "cohere2": _config("Cohere2", logit_scale=1.0, **_SLIDES_FIRST),
    "ernie4_5": _config("Ernie4_5"),
    "exaone4": _config("Exaone4", **_SLIDES_FIRST),
    "gemma": _config("Gemma", head_dim=16),
    "gemma3": _config(
        "Gemma3Text",
        head_dim=16,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
        **_SLIDES_FIRST,
    ),
    "glm": _config("Glm", head_dim=8),
    "glm4": _config("Glm4", head_dim=8),
    "glm4_moe": _config("Glm4Moe", head_dim=8, **_ROUTED),
    "gpt_bigcode": _old("GPTBigCode", **_OLD_GPT),
    "gpt_neox": _config("GPTNeoX"),
    "granite": _config(
        "Granite",
        attention_multiplier=0.3,
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
    ),
    "granitemoe": _config("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    "nemotron": _config("Nemotron"),
    "olmo": _config("Olmo"),
    "olmo2": _config("Olmo2"),
    "olmo3": _config("Olmo3", **_SLIDES_FIRST),
    "olmoe": _config("Olmoe", **_MOE),
    "opt": _old(
        "OPT",
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        init_std=0.3,
        pad_token_id=1,
    ),
    "phi": _config("Phi"),
    "phi4": _config("Phi3", partial_rotary_factor=0.75),
    "qwen2_moe": _config("Qwen2Moe", shared_expert_intermediate_size=32, **_MOE),
    "qwen3_moe": _config("Qwen3Moe", head_dim=16, **_MOE),
    "seed_oss": _config("SeedOss"),
    "smollm3": _config("SmolLM3"),
    "stablelm": _config("StableLm"),
    "starcoder2": _config("Starcoder2", sliding_window=WINDOW),
}
"""Our attention, over pages."""

PADDED: Configs = {
    "bloom": _old("Bloom", hidden_size=32, n_layer=2, n_head=4),
    "codegen": _old("CodeGen", **_OLD_GPT, n_ctx=MAX_POSITIONS, rotary_dim=4),
    "deepseek_v2": _config("DeepseekV2", n_shared_experts=1, **_LATENT, **_ROUTED),
    "deepseek_v3": _config("DeepseekV3", **_LATENT, **_ROUTED),
    "falcon": _old("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "falcon with alibi": _old(
        "Falcon",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
    ),
    "gemma3n": _config(
        "Gemma3nText",
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gpt_neo": _old(
        "GPTNeo",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "gptj": _old("GPTJ", **_OLD_GPT, rotary_dim=8),
    "llama4": _config(
        "Llama4Text",
        num_hidden_layers=4,
        head_dim=16,
        attention_chunk_size=2 * WINDOW,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
    ),
    "mpt": _old("Mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=MAX_POSITIONS),
    "xglm": _old(
        "XGLM",
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        init_std=0.3,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    ),
}
"""Their own attention, in padded batches."""

REFUSED: Configs = {
    "jamba": _config("Jamba", num_experts=4),
    "lfm2": _config("Lfm2", layer_types=["conv", "full_attention"]),
    "mamba": _old("Mamba", hidden_size=32, num_hidden_layers=2),
    "minimax": _config("MiniMax"),
    "qwen3_next": _config(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=16,
        **_MOE,
    ),
    "recurrent_gemma": _config("RecurrentGemma"),
}
"""They keep more of the past than keys and values."""
