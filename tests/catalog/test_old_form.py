# SPDX-License-Identifier: Apache-2.0
"""Registrations as they were written years ago become today's, or say what to write."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.models_tiny import make_tokenizer
from xinference.catalog.encoder_family import parse_encoder_family
from xinference.catalog.family import ModelFamily
from xinference.catalog.schema import inherit, parse_family
from xinference.errors import InvalidRequest

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
VICUNA = {
    "style_name": "ADD_COLON_TWO",
    "system_prompt": "A chat.",
    "roles": ["USER", "ASSISTANT"],
    "intra_message_sep": " ",
    "inter_message_sep": "</s>",
}
LLAMA2 = {
    "style_name": "LLAMA2",
    "system_prompt": "<s>[INST] <<SYS>>\nBe \"kind\".\n<</SYS>>\n\n",
    "roles": ["[INST]", "[/INST]"],
    "intra_message_sep": " ",
    "inter_message_sep": " </s><s>",
    "stop_token_ids": [2],
    "stop": ["</s>"],
}  # fmt: skip
QWEN = {
    "style_name": "QWEN",
    "system_prompt": "You are a helpful assistant.",
    "roles": ["user", "assistant"],
    "intra_message_sep": "\n",
    "stop_token_ids": [151643, 151644, 151645],
    "stop": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}


def old(style: dict[str, Any] | None, **changes: Any) -> str:
    """Return a registration as the documentation of those days had it."""
    return json.dumps(
        {
            "version": 1,
            "context_length": 2048,
            "model_name": "custom-llama-2",
            "model_lang": ["en"],
            "model_ability": ["chat"],
            "model_family": "other",
            "model_specs": [
                {
                    "model_format": "pytorch",
                    "model_size_in_billions": 7,
                    "quantizations": ["4-bit", "8-bit", "none"],
                    "model_id": "meta-llama/Llama-2-7b",
                    "model_uri": "file:///path/to/llama-2-7b",
                }
            ],
            "prompt_style": style,
            **changes,
        }
    )


def converted(style: dict[str, Any] | None, **changes: Any) -> ModelFamily:
    return inherit(parse_family(old(style, **changes), is_builtin=False), {})


def prompt_of(family: ModelFamily, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.apply_chat_template(
        MESSAGES, chat_template=family.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize(
    ("style", "prompt"),
    [
        (VICUNA, "A chat. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:"),
        (
            VICUNA | {"style_name": "ADD_COLON_SINGLE", "intra_message_sep": "\n"},
            "A chat.\nUSER: Hi\nASSISTANT: Hello\nUSER: Bye\nASSISTANT:",
        ),
        (
            VICUNA | {"style_name": "NO_COLON_TWO", "system_prompt": "", "roles": ["<u>", "<a>"]},
            "<u>Hi <a>Hello</s><u>Bye <a>",
        ),
        (
            LLAMA2,
            '<s>[INST] <<SYS>>\nBe "kind".\n<</SYS>>\n\nHi[/INST] Hello </s><s>[INST] Bye [/INST]',
        ),
        (
            QWEN,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi"
            "<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            {"style_name": "LLAMA3", "system_prompt": "S", "roles": ["user", "assistant"]},
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            {"style_name": "gemma", "roles": ["user", "model"]},
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            {"style_name": "PHI3", "roles": ["user", "assistant"]},
            "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
        ),
    ],
    ids=lambda one: one.get("style_name") if isinstance(one, dict) else "",
)
def test_a_known_style_becomes_a_template_that_writes_the_same_prompt(
    style: dict[str, Any], prompt: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert prompt_of(converted(style), tokenizer) == prompt


def test_the_stop_marks_of_a_style_stay_and_the_unknown_family_goes() -> None:
    family = converted(LLAMA2)

    assert (family.stop, family.stop_token_ids) == (("</s>",), (2,))
    assert family.model_family == "custom-llama-2"
    assert [one.quantization for one in family.variants] == ["4-bit", "8-bit", "none"]
    assert family.to_json()["version"] == 2


def test_no_style_means_the_template_of_the_files() -> None:
    assert converted(None, model_ability=["generate"]).chat_template is None


def test_a_template_beside_a_style_is_kept() -> None:
    family = converted(LLAMA2, chat_template="{{ messages }}")

    assert family.chat_template == "{{ messages }}"
    assert family.stop == ("</s>",)


def test_an_unknown_style_is_refused_with_the_rest_converted() -> None:
    with pytest.raises(InvalidRequest) as refused:
        converted({"style_name": "CHATGLM3", "stop": ["<|user|>"]})

    assert refused.value.field == "prompt_style"
    assert '"chat_template": "…"' in refused.value.problem
    assert '"stop": ["<|user|>"]' in refused.value.problem
    assert "model_family" not in refused.value.problem


def test_a_ggml_file_is_refused_with_what_takes_its_place() -> None:
    spec = {
        "model_format": "ggmlv3",
        "model_size_in_billions": 7,
        "quantizations": ["q4_0", "q8_0"],
        "model_id": "TheBloke/Llama-2-7B-GGML",
        "model_file_name_template": "llama-2-7b.ggmlv3.{quantization}.bin",
    }

    with pytest.raises(InvalidRequest) as refused:
        converted(LLAMA2, model_specs=[spec])

    assert refused.value.field == "model_specs[0].model_format"
    assert '"model_format": "ggufv2"' in refused.value.problem


@pytest.mark.parametrize(
    ("model_type", "about"),
    [("embedding", {"dimensions": 384, "max_tokens": 256}), ("rerank", {"type": "unknown"})],
)
def test_a_model_with_its_files_beside_its_name_has_them_as_its_spec(
    model_type: str, about: dict[str, Any]
) -> None:
    given = {
        "model_name": "custom-bge",
        "language": ["en", "zh"],
        "model_id": "BAAI/bge-base-en-v1.5",
        "model_uri": "file:///models/custom-bge",
        **about,
    }

    family = parse_encoder_family(json.dumps(given), model_type, is_builtin=False)

    (variant,) = family.variants
    assert (variant.path, variant.model_id) == ("/models/custom-bge", "BAAI/bge-base-en-v1.5")
    assert (variant.model_format, variant.quantization) == ("pytorch", "none")
    assert family.max_tokens == about.get("max_tokens", 512)
    assert family.rerank_type == ("normal" if model_type == "rerank" else None)
