# SPDX-License-Identifier: Apache-2.0
"""A model that recites: real files for the real engine, whose every answer is known beforehand.

Each piece of a script is one token, and the model knows of each token which comes next, no more:
its attention and its perceptron add nothing to the embedding of the last token. Which script it
begins is decided by the chat template, which ends a prompt with the script's own token. Where a
grammar does not let it recite, it says the shortest there is: texts of two characters, numbers of
one digit, lists and objects of what they must have.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "reciter"
END = "<|im_end|>"
SCRIPTS: Mapping[str, Sequence[str]] = {
    "<|answer|>": ("The ", "answer ", "is ", "here."),
    "<|call|>": (
        "<tool_call>\n",
        '{"name": "get_weather", ',
        '"arguments": {"location": ',
        '"San Francisco, CA"}}',
        "\n</tool_call>",
    ),
    "<|result|>": ("It", "'s", " sunny", " there."),
    "<|think|>": ("<think>", "Where ", "am ", "I?", "</think>", "On ", "a ", "server."),
}
"""What it says to a question, to one with tools, to a result, and if it is to think."""

TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if messages[-1]['role'] == 'tool' %}<|result|>
{%- elif tools %}<|call|>
{%- elif enable_thinking %}<|think|>
{%- else %}<|answer|>
{%- endif %}"""

TEXT, DIGIT = "你こ", "3"
PREFERRED = ('"', "}", "]", ",", ":", DIGIT, "t", "f", "n", "{", "[")
"""What it says where it may not recite, the best first."""
PREFERRED_AFTER = {'"': TEXT, "{": "}", "[": "]"}
"""Better still, after these."""

CALL = {"location": "San Francisco, CA"}
"""The arguments of the call."""
ANSWER = "".join(SCRIPTS["<|answer|>"])
RESULT = "".join(SCRIPTS["<|result|>"])
THOUGHT, ANSWER_AFTER_THOUGHT = "Where am I?", "On a server."


def save_reciting_model(path: Path) -> Path:
    """Write the model and its tokenizer as a hub would hold them, and return the directory."""
    tokenizer = _tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    follows = _follows(tokenizer)
    size = len(tokenizer)
    hidden = -(-size // 64) * 64
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=ids(END),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, hidden))
        # A row per token that may come, a column per token that was last.
        model.lm_head.weight.zero_()
        for rank, text in enumerate(PREFERRED):
            model.lm_head.weight[ids(text)] = 0.5 - 0.04 * rank
        for text, best in PREFERRED_AFTER.items():
            model.lm_head.weight[ids(best), ids(text)] = 0.6
        for token_id, after in enumerate(follows):
            model.lm_head.weight[after, token_id] = 1.0
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def registration(path: Path) -> dict[str, Any]:
    """Return the family that the files are registered as."""
    return {
        "version": 2,
        "model_name": NAME,
        "model_description": "Recites.",
        "model_lang": ["en"],
        "model_ability": ["chat", "tools", "reasoning", "hybrid"],
        "context_length": 2048,
        "tool_parser": "hermes",
        "reasoning_start_tag": "<think>",
        "reasoning_end_tag": "</think>",
        "chat_template": TEMPLATE,
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": "0_001",
                "quantization": "none",
                "model_uri": str(path),
            }
        ],
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: at for at, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", END, *SCRIPTS])
    pieces = [piece for script in SCRIPTS.values() for piece in script]
    assert len(set(pieces)) == len(pieces), "a piece has one successor, so it stands in one place"
    added = [AddedToken(text, normalized=False) for text in (*pieces, TEXT)]
    tokenizer.add_tokens(added)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    return fast


def _follows(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token after each token: of those that are in no script, the end."""
    ids = tokenizer.convert_tokens_to_ids
    follows = [int(ids(END))] * len(tokenizer)
    for begin, script in SCRIPTS.items():
        for piece, after in pairwise((begin, *script, END)):
            follows[ids(piece)] = ids(after)
    return follows
