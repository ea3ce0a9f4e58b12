# SPDX-License-Identifier: Apache-2.0
"""What some embedding models make of the hidden states beside one vector: bge-m3's two heads.

`sparse_linear.pt` gives each token a weight, `colbert_linear.pt` each token a vector. Both are
one linear layer on the last hidden states, in files of their own beside the model.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from .encoder_loop import TokenIds

SPARSE_FILE = "sparse_linear.pt"
MULTI_VECTOR_FILE = "colbert_linear.pt"

Floats = npt.NDArray[np.float32]


class SparseHead:
    """Weights of the tokens of the vocabulary that a text has."""

    def __init__(self, linear: torch.nn.Linear, *, unused_ids: frozenset[int]) -> None:
        """Take the layer; tokens of `unused_ids` have no weight."""
        self._linear = linear
        self._unused = np.array(sorted(unused_ids), dtype=np.int32)

    def weights(
        self, hidden: torch.Tensor, rows: Sequence[TokenIds], mask: torch.Tensor
    ) -> list[tuple[npt.NDArray[np.int32], Floats]]:
        """Return, for each row, its token ids and their weights; of a token the largest.

        Args:
            hidden: (rows, tokens, hidden size).
            rows: the token ids, without padding.
            mask: (rows, tokens); 1 where a token is.
        """
        weights = torch.relu(self._linear(hidden)).squeeze(-1).float().cpu().numpy()
        present = mask.bool().cpu().numpy()
        return [self._of_row(ids, weights[row][present[row]]) for row, ids in enumerate(rows)]

    def _of_row(self, ids: TokenIds, weights: Floats) -> tuple[npt.NDArray[np.int32], Floats]:
        counts = (weights > 0) & ~np.isin(ids, self._unused)
        unique, place = np.unique(ids[counts], return_inverse=True)
        largest = np.zeros(len(unique), dtype=np.float32)
        np.maximum.at(largest, place, weights[counts])
        return unique, largest


class MultiVectorHead:
    """A vector of unit length for each token of a text but its first."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self._linear = linear
        self.dimensions = linear.out_features

    def vectors(self, hidden: torch.Tensor, mask: torch.Tensor) -> list[Floats]:
        """Return the vectors of each row. Arguments as of `SparseHead.weights`."""
        vectors = functional.normalize(self._linear(hidden).float(), dim=-1).cpu().numpy()
        present = mask.bool().cpu().numpy()
        return [row[here][1:] for row, here in zip(vectors, present, strict=True)]


def load_heads(
    path: Path, *, device: torch.device, dtype: torch.dtype, unused_ids: frozenset[int]
) -> tuple[SparseHead | None, MultiVectorHead | None]:
    """Load those that a model's directory has.

    Raises:
        OSError, RuntimeError, ValueError: a file is there and does not load.
    """
    sparse = _linear(path / SPARSE_FILE, device, dtype)
    multi_vector = _linear(path / MULTI_VECTOR_FILE, device, dtype)
    return (
        None if sparse is None else SparseHead(sparse, unused_ids=unused_ids),
        None if multi_vector is None else MultiVectorHead(multi_vector),
    )


def _linear(file: Path, device: torch.device, dtype: torch.dtype) -> torch.nn.Linear | None:
    if not file.is_file():
        return None
    state = torch.load(file, map_location="cpu", weights_only=True)
    num_out, num_in = state["weight"].shape
    linear = torch.nn.Linear(num_in, num_out, bias="bias" in state)
    linear.load_state_dict(state)
    return linear.to(device=device, dtype=dtype).eval().requires_grad_(False)
