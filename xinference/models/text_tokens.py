# SPDX-License-Identifier: Apache-2.0
"""Texts → token ids for models that embed and rerank, without the model's thread.

It works on the tokenizer's own fast form, which neither truncates nor pads here and lets go of
the interpreter's lock, so that several threads may use it at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from xinference.errors import LoadFailed

from .encoder_loop import TokenIds

SLICE_CHARS = 128 * 1024
"""Encoded at a time: an encoding takes about a hundred times the memory of its token ids."""


class TextTokens:
    """A model's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, model_name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise LoadFailed(
                model=model_name,
                problem=f"its tokenizer, {type(tokenizer).__name__}, has no fast form",
            )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pads_left = tokenizer.padding_side == "left"
        self._pad_token_id: int = tokenizer.pad_token_id or 0
        self._has_type_ids = "token_type_ids" in tokenizer.model_input_names
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.vocab_size = len(tokenizer)

    def num_special(self, *, of_pair: bool) -> int:
        """Return how many tokens the tokenizer adds to a text, or to a pair of texts."""
        return int(self._backend.num_special_tokens_to_add(of_pair))

    def encodings(self, texts: Sequence[str], *, special: bool) -> Iterator[Encoding]:
        """Yield the encoding of each text, uncut; hold few of them at a time.

        Args:
            special: with the tokens that the tokenizer adds.
        """
        for some in _slices(texts):
            yield from self._backend.encode_batch_fast(some, add_special_tokens=special)

    def finish(self, first: Encoding, second: Encoding | None = None) -> Encoding:
        """Return encodings made without special tokens as the model wants to see them."""
        finished: Encoding = self._backend.post_process(first, second, True)
        return finished

    def features(
        self, rows: Sequence[TokenIds], type_ids: Sequence[TokenIds] | None, device: torch.device
    ) -> dict[str, Any]:
        """Return a batch as a model of `transformers` takes it: padded, with its mask.

        Args:
            rows: token ids, one array for each text.
            type_ids: of the same shapes; None: 0 everywhere.
        """
        shape = (len(rows), max(map(len, rows)))
        input_ids = np.full(shape, self._pad_token_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            place = slice(shape[1] - len(row), None) if self._pads_left else slice(len(row))
            input_ids[index, place] = row
            mask[index, place] = 1
            if type_ids is not None:
                types[index, place] = type_ids[index]
        features = {
            "input_ids": torch.from_numpy(input_ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
        }
        if self._has_type_ids:
            features["token_type_ids"] = torch.from_numpy(types).to(device)
        return features


def ids_of(encoding: Encoding) -> TokenIds:
    """Return the token ids of an encoding."""
    return np.asarray(encoding.ids, dtype=np.int32)


def _slices(texts: Sequence[str]) -> Iterator[list[str]]:
    some: list[str] = []
    num_chars = 0
    for text in texts:
        some.append(text)
        num_chars += len(text)
        if num_chars >= SLICE_CHARS:
            yield some
            some, num_chars = [], 0
    if some:
        yield some
