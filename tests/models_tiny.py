# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, made on the spot: real architectures, no files, no network.

Every model has two layers and a vocabulary of `VOCAB_SIZE`; the tokenizer is byte-level, so any
text is fine. Weights are drawn wide enough that the best token is rarely a near-tie, which lets
tests compare greedy tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB_SIZE = 288
MAX_POSITIONS = 512
WINDOW = 7
"""Of the models that slide: smaller than every text a test should use."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "phi3": lambda: Phi3Config(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=MAX_POSITIONS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
}
"""By name; each call makes a fresh config."""


def make_model(
    name: str = "llama", *, seed: int = 0, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Return a model of `CONFIGS[name]`, or of `config`, in float32 with random weights."""
    config = CONFIGS[name]() if config is None else config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # Biases, norms and sinks start at constants; make them count.
                if parameter.ndim == 1 or "sinks" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `VOCAB_SIZE` tokens with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["hello world, how are you? the weather is nice and the answer is on the table"],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_model(
    path: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    config: PreTrainedConfig | None = None,
    ends: bool = False,
    **generation: Any,
) -> Path:
    """Write a model and the tokenizer as a hub would hold them, and return the directory.

    Args:
        path: made if it is not there.
        name: of the architecture, a key of `CONFIGS`.
        seed: of the weights.
        config: used instead of the name's.
        ends: whether `<|im_end|>` ends a turn; otherwise answers run to their `max_tokens`.
        generation: fields of the generation config, `do_sample=False` say.
    """
    model = make_model(name, seed=seed, config=config)
    tokenizer = make_tokenizer()
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>") if ends else []
    model.generation_config.eos_token_id = eos
    for field, value in generation.items():
        setattr(model.generation_config, field, value)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
