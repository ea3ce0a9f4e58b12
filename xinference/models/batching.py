# SPDX-License-Identifier: Apache-2.0
"""Which waiting texts are computed together, and when. Pure: no I/O, no clock, no torch.

Texts of all callers wait in one queue, sorted by length. A batch is built around one text of the
caller whose turn it is, and takes in the texts of anyone that are nearest in length, as long as
the batch stays within its limits and its padding is small. So every caller gets on in every
round, short texts do not pay for long ones, and nobody's texts are computed one by one.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

FREE_PADDING_TOKENS = 256
"""Padding that costs less than a batch of its own would: a forward has a fixed price."""
MAX_PADDING_SHARE = 0.2
"""Of a batch's tokens, beyond what is free."""
MAX_ANSWER_BYTES = 4 * 2**20
"""Of one batch: half of what a connection may have unsent."""
CROWD_SECONDS = 0.5
"""How long two callers at once are remembered."""
MAX_INTERVALS = 4
"""The first text of a batch waits at most so many intervals, however many follow it."""

BATCH_SECONDS = 2.0
"""About so long a batch may take: others wait for it, and an abort takes effect after it."""
FIRST_BATCH_TOKENS = 2048
MIN_BATCH_TOKENS = 256
MEMORY = 0.8
"""What a batch leaves of the weight of those before it."""

Caller = TypeVar("Caller", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What a batch may be. One text alone is a batch, whatever it has."""

    max_items: int
    max_tokens: int
    """Rows times the longest of them."""
    max_bytes: int
    bytes_per_token: int
    """Of memory that a forward takes for each token, padding included."""
    bytes_per_pair: int
    """Beside that, for each pair of tokens of a row: masks and attention weights."""
    has_pairs_alone: bool = True
    """Whether that holds for one row by itself, which has no padding to mask."""
    max_pair_bytes: int | None = None
    """Of rows that are together for no other reason than that they may be. None: no such limit."""
    bytes_per_row: int = 0
    """Whatever its length: the logits of one token."""

    def num_bytes(self, num_rows: int, longest: int) -> int:
        """Return the memory that a batch of this shape takes."""
        has_pairs = num_rows > 1 or self.has_pairs_alone
        of_token = self.bytes_per_token + (self.bytes_per_pair * longest if has_pairs else 0)
        return num_rows * (longest * of_token + self.bytes_per_row)

    def longest_alone(self) -> int:
        """Return how many tokens a text may have that fits the memory by itself."""
        fits, too_many = 0, 1
        while self.num_bytes(1, too_many) <= self.max_bytes:
            fits, too_many = too_many, too_many * 2
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.num_bytes(1, middle) <= self.max_bytes:
                fits = middle
            else:
                too_many = middle
        return fits

    def paced(self, max_tokens: int) -> "BatchLimits":
        """Return these limits with no more tokens than that."""
        return replace(self, max_tokens=min(self.max_tokens, max_tokens))

    def allow(self, num_rows: int, longest: int, num_tokens: int) -> bool:
        """Return whether a batch of this shape is within every limit.

        Args:
            num_tokens: of all rows together, without padding.
        """
        padded = num_rows * longest
        padding = padded - num_tokens
        pair_bytes = padded * longest * self.bytes_per_pair
        if self.max_pair_bytes is not None and pair_bytes > self.max_pair_bytes:
            return False
        return (
            num_rows <= self.max_items
            and padded <= self.max_tokens
            and self.num_bytes(num_rows, longest) <= self.max_bytes
            and (padding <= FREE_PADDING_TOKENS or padding <= MAX_PADDING_SHARE * padded)
        )


class BatchPace:
    """How many tokens take about `BATCH_SECONDS`, by how long batches have lately taken."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    def max_tokens(self) -> int:
        """Return how many tokens the next batch may have, its padding included."""
        if self._seconds <= 0:
            return FIRST_BATCH_TOKENS
        return max(MIN_BATCH_TOKENS, int(BATCH_SECONDS * self._num_tokens / self._seconds))

    def observe(self, *, num_tokens: int, seconds: float) -> None:
        """Learn from a batch, its padding included."""
        self._num_tokens = MEMORY * self._num_tokens + num_tokens
        self._seconds = MEMORY * self._seconds + seconds


@dataclass(slots=True, eq=False)
class _Text(Generic[Caller]):
    """One text that waits."""

    caller: Caller
    index: int
    num_tokens: int
    num_answer_bytes: int
    key: tuple[int, int]
    """Its length, and a number that no other has."""
    is_taken: bool = False


def _key(text: "_Text[Caller]") -> tuple[int, int]:
    return text.key


class BatchQueue(Generic[Caller]):
    """The waiting texts of all callers. Times are seconds of any clock that does not go back.

    Invariant: every text that is added is in exactly one batch, unless its caller is removed.
    """

    def __init__(self, limits: BatchLimits, *, interval_seconds: float) -> None:
        self._limits = limits
        self._interval_seconds = interval_seconds
        self._sorted: list[_Text[Caller]] = []
        """All that wait, shortest first."""
        self._turns: OrderedDict[Caller, list[_Text[Caller]]] = OrderedDict()
        """Callers with texts that wait, the next one first; each with its texts, longest last."""
        self._num_texts_added = 0
        self._num_tokens = 0
        self._oldest_at = 0.0
        self._newest_at = 0.0
        self._crowd_until = float("-inf")

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def num_tokens(self) -> int:
        """How many tokens wait."""
        return self._num_tokens

    def add(
        self,
        caller: Caller,
        lengths: Sequence[int],
        *,
        answer_bytes: Sequence[int],
        now: float,
        is_crowd: bool,
    ) -> None:
        """Let the texts of a caller wait.

        Args:
            lengths: of its texts, in tokens; not empty.
            answer_bytes: how large the answer to each will be.
            is_crowd: whether others are being served at the same time.
        """
        assert caller not in self._turns, f"{caller} waits already"
        texts = []
        for index, (length, num_bytes) in enumerate(zip(lengths, answer_bytes, strict=True)):
            key = (length, self._num_texts_added)
            texts.append(_Text(caller, index, length, num_bytes, key))
            self._num_texts_added += 1
        if not self._sorted:
            self._oldest_at = now
        if len(texts) == 1:
            insort(self._sorted, texts[0], key=_key)
        else:
            self._sorted = sorted([*self._sorted, *texts], key=_key)
        self._turns[caller] = sorted(texts, key=_key)
        self._num_tokens += sum(lengths)
        self._newest_at = now
        if is_crowd:
            self._crowd_until = now + CROWD_SECONDS

    def note_answers(self, *, now: float) -> None:
        """Wait anew for those who were just answered: in a crowd they ask again at once.

        Why: else whoever came while the last batch was computed is the next batch, alone.
        """
        self._oldest_at = self._newest_at = now

    def remove(self, caller: Caller) -> None:
        """Forget the texts of a caller that wait; it may have none."""
        if self._turns.pop(caller, None) is not None:
            self._sorted = [text for text in self._sorted if text.caller != caller]
            self._num_tokens = sum(text.num_tokens for text in self._sorted)

    def seconds_to_wait(self, now: float) -> float | None:
        """Return how long to wait for more texts before `take`; 0: take now; None: none waits."""
        if not self._sorted:
            return None
        if now >= self._crowd_until or len(self._sorted) >= self._limits.max_items:
            return 0.0
        until = min(
            self._newest_at + self._interval_seconds,
            self._oldest_at + MAX_INTERVALS * self._interval_seconds,
        )
        return max(0.0, until - now)

    def take(self, *, now: float, max_tokens: int | None = None) -> list[tuple[Caller, int]]:
        """Return the next batch: callers and the indices of their texts. At least one waits.

        Args:
            max_tokens: of this batch, where that is less than the limit of all.
        """
        limits = self._limits if max_tokens is None else self._limits.paced(max_tokens)
        caller, own = next(iter(self._turns.items()))
        while own[-1].is_taken:
            own.pop()
        anchor = own[-1]
        first, end = self._around(bisect_left(self._sorted, anchor.key, key=_key), limits)
        batch = self._sorted[first:end]
        del self._sorted[first:end]
        for text in batch:
            text.is_taken = True
            self._num_tokens -= text.num_tokens
        self._turns.move_to_end(caller)
        for one in {text.caller for text in batch}:
            if all(text.is_taken for text in self._turns[one]):
                del self._turns[one]
        self._oldest_at = now
        return [(text.caller, text.index) for text in batch]

    def _around(self, place: int, limits: BatchLimits) -> tuple[int, int]:
        """Return the slice of the sorted texts to compute with the one at `place`."""
        texts = self._sorted
        first, end = place, place + 1
        num_tokens, answer = texts[place].num_tokens, texts[place].num_answer_bytes
        while True:
            longest = texts[end - 1].num_tokens
            candidates = []
            if first > 0:
                shorter = texts[first - 1]
                candidates.append((longest - shorter.num_tokens, first - 1, longest))
            if end < len(texts):
                longer = texts[end]
                waste = (end - first) * (longer.num_tokens - longest)
                candidates.append((waste, end, longer.num_tokens))
            for _, candidate, new_longest in sorted(candidates):
                text = texts[candidate]
                if answer + text.num_answer_bytes <= MAX_ANSWER_BYTES and limits.allow(
                    end - first + 1, new_longest, num_tokens + text.num_tokens
                ):
                    break
            else:
                return first, end
            first, end = min(first, candidate), max(end, candidate + 1)
            num_tokens += text.num_tokens
            answer += text.num_answer_bytes
