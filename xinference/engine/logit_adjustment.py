# SPDX-License-Identifier: Apache-2.0
"""What a request does to the logits before anything is drawn: biases, bans and penalties.

In this order, as transformers has it: `logit_bias`, `bad_words` and the end tokens that
`min_tokens` forbids; then `repetition_penalty`, `frequency_penalty` and `presence_penalty`.

A `LogitAdjustment` is the state of one sequence. It knows the tokens that were seen and never the
vocabulary, and belongs to the request and not to the slot, so preemption does not touch it. A
batch gathers the logits of these tokens, changes them, and puts them back.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xinference.protocol.generation import SamplingParams

_FIRST_CAPACITY = 64


class LogitAdjustment:
    """The biases, bans and penalties of one sequence. Owned by the engine's thread."""

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        prompt: npt.NDArray[np.int32],
        end_token_ids: frozenset[int],
        bad_words: Sequence[tuple[int, ...]],
    ) -> None:
        """Take the parameters, which must be complete, and the tokens of the bad words."""
        assert sampling.repetition_penalty is not None, sampling
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._end_ids = np.array(sorted(end_token_ids), np.int64)
        self._min_tokens = sampling.min_tokens
        self._banned_ids = np.array([word[0] for word in bad_words if len(word) == 1], np.int64)
        self._banned_words = [(word[:-1], word[-1]) for word in bad_words if len(word) > 1]
        self._num_tail = max((len(begin) for begin, _ in self._banned_words), default=0)
        self._tail: tuple[int, ...] = ()
        self._num_generated = 0
        self.penalties = (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        """Repetition, frequency, presence."""
        self.has_penalties = self.penalties != (1.0, 0.0, 0.0)
        # Why not always: of the prompt only the repetition penalty takes notice.
        with_prompt = sampling.repetition_penalty != 1.0
        seen = np.unique(prompt).astype(np.int64) if with_prompt else np.empty(0, np.int64)
        self._num_seen = len(seen)
        self._seen = np.resize(seen, max(_FIRST_CAPACITY, 2 * len(seen)))
        self._counts = np.zeros(len(self._seen), np.float32)
        self._places = dict(zip(seen.tolist(), range(len(seen)), strict=True))

    @property
    def seen(self) -> npt.NDArray[np.int64]:
        """The distinct tokens that penalties apply to."""
        return self._seen[: self._num_seen]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often the answer has each of `seen`."""
        return self._counts[: self._num_seen]

    def note(self, token_id: int) -> None:
        """Take notice of a token of the answer."""
        self._num_generated += 1
        if self._num_tail:
            self._tail = (*self._tail, token_id)[-self._num_tail :]
        if not self.has_penalties:
            return
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = self._num_seen
            if place == len(self._seen):
                self._seen = np.resize(self._seen, 2 * place)
                self._counts = np.concatenate((self._counts, np.zeros(place, np.float32)))
            self._seen[place] = token_id
            self._num_seen += 1
        self._counts[place] += 1

    def additions(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return token ids, which may repeat, and what the next step adds to their logits."""
        banned = [self._banned_ids]
        if self._num_generated < self._min_tokens:
            banned.append(self._end_ids)
        lasts = [last for begin, last in self._banned_words if self._ends_with(begin)]
        if lasts:
            banned.append(np.array(lasts, np.int64))
        ids = np.concatenate(banned)
        if not len(ids):
            return self._bias_ids, self._bias
        return (
            np.concatenate((self._bias_ids, ids)),
            np.concatenate((self._bias, np.full(len(ids), -np.inf, np.float32))),
        )

    def _ends_with(self, begin: tuple[int, ...]) -> bool:
        return self._tail[-len(begin) :] == begin


def needs_adjustment(sampling: SamplingParams) -> bool:
    """Return whether complete parameters change any logit."""
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sampling.bad_words
        or sampling.min_tokens
    )


def adjust(logits: Tensor, adjustments: Sequence[tuple[int, LogitAdjustment]]) -> Tensor:
    """Return the logits as the requests want them.

    Args:
        logits: (R, V), model dtype; not changed.
        adjustments: pairs of a row of them and what is done to it.

    Returns:
        (R, V) float32, a copy.
    """
    adjusted = logits.to(torch.float32, copy=True)
    _add(adjusted, adjustments)
    _penalize(adjusted, [pair for pair in adjustments if pair[1].has_penalties])
    return adjusted


def _add(logits: Tensor, adjustments: Sequence[tuple[int, LogitAdjustment]]) -> None:
    rows, ids, values = [], [], []
    for row, adjustment in adjustments:
        some_ids, some_values = adjustment.additions()
        if len(some_ids):
            rows.append(np.full(len(some_ids), row))
            ids.append(some_ids)
            values.append(some_values)
    if not rows:
        return
    where = _to(logits, np.concatenate(rows)), _to(logits, np.concatenate(ids))
    logits.index_put_(where, _to(logits, np.concatenate(values)), accumulate=True)


def _penalize(logits: Tensor, adjustments: Sequence[tuple[int, LogitAdjustment]]) -> None:
    if not adjustments:
        return
    lens = [len(adjustment.seen) for _, adjustment in adjustments]
    rows = np.repeat([row for row, _ in adjustments], lens)
    if not len(rows):
        return
    where = _to(logits, rows), _to(logits, np.concatenate([one.seen for _, one in adjustments]))
    counts = _to(logits, np.concatenate([one.counts for _, one in adjustments]))
    penalties = np.array([one.penalties for _, one in adjustments], np.float32)
    repetition, frequency, presence = _to(logits, np.repeat(penalties, lens, axis=0).T)
    values = logits[where]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= frequency * counts + presence * (counts > 0)
    logits.index_put_(where, values)


def _to(logits: Tensor, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(logits.device)
