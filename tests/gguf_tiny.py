# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama in one GGUF file: random weights, and a vocabulary of bytes, so any text is fine."""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.models_tiny import CHAT_TEMPLATE

NAME = "tiny-gguf"
START, END = "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 256 + 2
END_TOKEN = 257
DIM, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HIDDEN = 64, 2, 4, 2, 128


def byte_tokens() -> list[str]:
    """Return the 256 tokens of one byte each, as GPT-2's tokenizer writes them, by their byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in plain]
    names = dict(zip(plain, map(chr, plain), strict=True))
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def save_gguf(path: Path, *, context_length: int = 512, seed: int = 0) -> Path:
    """Write the file and return its path."""
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> npt.NDArray[np.float32]:
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context_length)
    writer.add_embedding_length(DIM)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // NUM_HEADS)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_tokens(), START, END])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["\u0120 t"])
    writer.add_eos_token_id(END_TOKEN)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    kv_dim = DIM // NUM_HEADS * NUM_KV_HEADS
    ones = np.ones(DIM, np.float32)
    tensors = {"token_embd": drawn(VOCAB_SIZE, DIM), "output_norm": ones}
    tensors["output"] = drawn(VOCAB_SIZE, DIM)
    for layer in range(NUM_LAYERS):
        tensors |= {
            f"blk.{layer}.{name}": weights
            for name, weights in {
                "attn_norm": ones,
                "attn_q": drawn(DIM, DIM),
                "attn_k": drawn(kv_dim, DIM),
                "attn_v": drawn(kv_dim, DIM),
                "attn_output": drawn(DIM, DIM),
                "ffn_norm": ones,
                "ffn_gate": drawn(HIDDEN, DIM),
                "ffn_up": drawn(HIDDEN, DIM),
                "ffn_down": drawn(DIM, HIDDEN),
            }.items()
        }
    for name, weights in tensors.items():
        writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def registration(path: Path) -> dict[str, object]:
    """Return the family of the file, to be registered."""
    return {
        "version": 2,
        "model_name": NAME,
        "context_length": 65536,
        "model_lang": ["en"],
        "model_ability": ["chat", "generate"],
        "model_specs": [
            {
                "model_format": "ggufv2",
                "model_size_in_billions": "0_01",
                "quantization": "none",
                "model_uri": str(path),
            }
        ],
    }
