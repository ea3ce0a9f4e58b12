# SPDX-License-Identifier: Apache-2.0
"""Tiny models that embed and rerank, with random weights, as a hub would hold them.

The tokenizer is the byte-level one of `models_tiny`, with a mark before and after each text, or
around both texts of a pair.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

from tests.models_tiny import VOCAB_SIZE, make_tokenizer, save_model
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.encoding import EncoderOptions, RerankTemplate

HIDDEN = 32
MAX_TOKENS = 64

_BERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
TEMPLATE = RerankTemplate(
    prefix="<|im_start|>judge\n",
    query="{instruction} {query}\n",
    document="on {document}\n",
    suffix="<|im_end|>",
    yes="y",
    no="n",
    instruction="is it about",
)


def make_marking_tokenizer(*, max_tokens: int = MAX_TOKENS) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks where texts begin and end, as BERT's does."""
    tokenizer = make_tokenizer()
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", begin), ("<|im_end|>", end)],
    )
    tokenizer.cls_token, tokenizer.sep_token = "<|im_start|>", "<|im_end|>"
    tokenizer.model_max_length = max_tokens
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.chat_template = None
    return tokenizer


def _seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def save_embedder(
    path: Path,
    *,
    max_tokens: int = MAX_TOKENS,
    pooling: str = "mean",
    include_prompt: bool = True,
    prompts: dict[str, str] | None = None,
    decoder: bool = False,
    heads: bool = False,
    **shape: int,
) -> Path:
    """Write an embedding model in the form of `sentence_transformers`.

    Args:
        pooling: mean, cls or lasttoken.
        prompts: that the files bring.
        decoder: of Qwen3's architecture, padded on the left, and not of BERT's.
        heads: with a sparse and a multi-vector head, as bge-m3 has them.
        shape: fields of BERT's config, instead of those that are usual here.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    backbone = path / "backbone"
    tokenizer = make_marking_tokenizer(max_tokens=max_tokens)
    if decoder:
        tokenizer.padding_side = "left"
        config: Any = Qwen3Config(
            vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.3,
            max_position_embeddings=max_tokens, pad_token_id=0, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        _seeded(lambda: Qwen3Model(config)).save_pretrained(backbone)
    else:
        config = BertConfig(**{**_BERT, **shape}, max_position_embeddings=max_tokens)
        _seeded(lambda: BertModel(config)).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    modules = [
        Transformer(str(backbone), max_seq_length=max_tokens),
        Pooling(config.hidden_size, pooling, include_prompt=include_prompt),
        Normalize(),
    ]
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(
        str(path), create_model_card=False
    )
    if heads:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for name, num_out in (("sparse_linear.pt", 1), ("colbert_linear.pt", HIDDEN)):
                torch.save(torch.nn.Linear(HIDDEN, num_out).state_dict(), path / name)
    return path


def save_cross_encoder(path: Path, *, max_tokens: int = MAX_TOKENS, num_labels: int = 1) -> Path:
    """Write a reranker: a classifier over pairs of texts."""
    config = BertConfig(**_BERT, max_position_embeddings=max_tokens, num_labels=num_labels)
    _seeded(lambda: BertForSequenceClassification(config)).save_pretrained(path)
    make_marking_tokenizer(max_tokens=max_tokens).save_pretrained(path)
    return path


def save_language_reranker(path: Path) -> Path:
    """Write a language model that can be asked with `TEMPLATE`."""
    return save_model(path, "qwen3")


def encoder_spec(
    path: Path | str,
    model_type: str,
    *,
    options: EncoderOptions | None = None,
    engine_options: EngineOptions | None = None,
    source: ModelSource | None = None,
) -> ReplicaSpec:
    """Return what a replica of such a model is told, its process's defaults filled in."""
    return ReplicaSpec(
        replica=ReplicaUid(ModelUid("tiny"), 0),
        instance=InstanceId("1"),
        source=replace(source or ModelSource(path=""), path=str(path)),
        abilities=("embed",),
        engine_options=engine_options or EngineOptions(),
        python_executable="",
        model_type=model_type,
        encoder_options=(options or EncoderOptions()).completed(batch_size=8, batch_interval=0.001),
    )
