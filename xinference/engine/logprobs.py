# SPDX-License-Identifier: Apache-2.0
"""How likely the model found tokens: its own distribution, before a request shapes it.

A logprob is a logit less the logarithm of the sum over the vocabulary; that, and a gather, is all
that is computed. The matrix of all logprobs never exists, and rows go through in pieces, so that
what is needed besides the logits is bounded.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xinference.protocol.generation import TokenCandidate, TokenLogprob

from .batch import Batch, IntArray
from .detokenizer import TextStream
from .sampler import highest, highest_logits, weight_sums
from .token_bytes import TokenBytes

MIN_LOGPROB = -9999.0
"""Of what cannot be; JSON has no infinity."""
_NUM_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogprobs:
    """Of R rows, each with one token."""

    token: npt.NDArray[np.float32]
    """(R,) of the token itself."""
    top_ids: npt.NDArray[np.int64]
    """(R, K) the likeliest, best first."""
    top: npt.NDArray[np.float32]
    """(R, K)"""


def row_logprobs(logits: Tensor, token_ids: npt.NDArray[np.int64], num_top: int) -> RowLogprobs:
    """Return the logprobs of one token per row and of the `num_top` likeliest.

    Args:
        logits: (R, V), model dtype; not changed.
        token_ids: (R,)
        num_top: K; 0 is none.
    """
    num_top = min(num_top, logits.shape[1])
    tokens = torch.from_numpy(token_ids).to(logits.device).unsqueeze(1)
    of_token, ids, values = [], [], []
    for start in range(0, len(logits), _NUM_ROWS):
        rows = logits[start : start + _NUM_ROWS]
        top = highest_logits(rows)
        sums = weight_sums(rows, torch.ones_like(top, dtype=torch.float32), top)
        total = (top + sums.sum(1).log()).float().unsqueeze(1)
        of_token.append((rows.gather(1, tokens[start : start + _NUM_ROWS]) - total).squeeze(1))
        if num_top:
            best, best_ids = highest(rows, num_top)
            values.append(best - total)
            ids.append(best_ids)
    shape = (len(logits), num_top)
    return RowLogprobs(
        token=torch.cat(of_token).clamp_(min=MIN_LOGPROB).cpu().numpy(),
        top_ids=torch.cat(ids).cpu().numpy() if ids else np.empty(shape, np.int64),
        top=torch.cat(values).clamp_(min=MIN_LOGPROB).cpu().numpy()
        if values
        else np.empty(shape, np.float32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """One row of `RowLogprobs`, as Python numbers."""

    token: float
    top_ids: list[int]
    top: list[float]

    def told(self, token_id: int, text_offset: int, token_bytes: TokenBytes) -> TokenLogprob:
        """Return it in the words of the protocol."""
        top = tuple(
            TokenCandidate(token_id=one, token=token_bytes.of(one), logprob=logprob)
            for one, logprob in zip(self.top_ids, self.top, strict=True)
        )
        return TokenLogprob(
            token_id=token_id,
            token=token_bytes.of(token_id),
            logprob=self.token,
            text_offset=text_offset,
            top=top,
        )


def logprobs_of_rows(
    logits: Tensor, token_ids: IntArray, num_wanted: IntArray
) -> dict[int, TokenLogprobs]:
    """Return the logprobs of those rows that want them.

    Args:
        logits: (R, V); not changed.
        token_ids: (R,)
        num_wanted: (R,) how many of the likeliest; -1 for a row that wants nothing.
    """
    rows = np.flatnonzero(num_wanted >= 0)
    if not rows.size:
        return {}
    if len(rows) < len(logits):
        logits = logits[torch.from_numpy(rows).to(logits.device)]
    found = row_logprobs(logits, token_ids[rows], int(num_wanted.max()))
    return {
        row: TokenLogprobs(token=token, top_ids=ids[:count], top=top[:count])
        for row, count, token, ids, top in zip(
            rows.tolist(),
            num_wanted[rows].tolist(),
            found.token.tolist(),
            found.top_ids.tolist(),
            found.top.tolist(),
            strict=True,
        )
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """Tokens of one row of a step whose logits tell of a prompt."""

    row: int
    first: int
    """Counted from the first token of the row in this step."""
    count: int


def with_prompt_rows(batch: Batch, rows: list[PromptRows]) -> IntArray:
    """Return the batch's `sample_tokens` with these behind them."""
    wanted = [np.arange(row.count) + batch.query_starts[row.row] + row.first for row in rows]
    return np.concatenate((batch.sample_tokens, *wanted))


class PromptLogprobs:
    """The tokens of one prompt, and how far what is known of them was told."""

    def __init__(
        self, token_ids: npt.NDArray[np.int32], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._token_ids = token_ids.astype(np.int64)
        self._text = TextStream(tokenizer, ())
        self.num_told = 0
        """Positions whose logits were used; each is of the token after it."""

    @property
    def num_to_tell(self) -> int:
        """Positions in all; what the last token says is of the answer."""
        return len(self._token_ids) - 1

    def next_ids(self, count: int) -> IntArray:
        """Return the next tokens to tell of."""
        return self._token_ids[self.num_told + 1 : self.num_told + 1 + count]

    def first(self, token_bytes: TokenBytes) -> TokenLogprob:
        """Return what is said of the first token. Call it before `tell`, once."""
        token_id = int(self._token_ids[0])
        self._text.push(token_id)
        return TokenLogprob(
            token_id=token_id, token=token_bytes.of(token_id), logprob=None, text_offset=0
        )

    def tell(self, found: RowLogprobs, token_bytes: TokenBytes) -> tuple[TokenLogprob, ...]:
        """Return what is said of the next tokens, as many as there are rows."""
        told = []
        token_ids = self.next_ids(len(found.token)).tolist()
        rows = zip(
            token_ids, found.token.tolist(), found.top_ids.tolist(), found.top.tolist(), strict=True
        )
        for token_id, logprob, top_ids, top in rows:
            one = TokenLogprobs(token=logprob, top_ids=top_ids, top=top)
            told.append(one.told(token_id, self._text.num_chars, token_bytes))
            self._text.push(token_id)
        self.num_told += len(token_ids)
        return tuple(told)
