# SPDX-License-Identifier: Apache-2.0
"""How fast steps and requests have lately been, and what follows from that. Pure: no clock.

`StepPace` says how many prompt tokens fit a step beside running streams; `EndRate` says when a
refused caller may try again. Both are told seconds and measure nothing themselves.
"""

import math
from collections import deque

MIN_PROMPT_TOKENS = 16
"""A step beside streams computes so many, however slow: a prompt must get on. Measured on CPU,
they cost about what one costs, since the weights are read once."""
STREAM_MEMORY = 0.8
"""What a step of streams alone leaves of the weight of those before it."""
PROMPT_MEMORY = 0.5
"""What one with a prompt leaves. Why less: tokens of a long prompt cost more with each step, as
they look back on more."""

RATE_SECONDS = 60.0
"""How far back the rate at which requests end looks."""
MAX_ENDS = 256
UNKNOWN_RETRY_SECONDS = 5
MAX_RETRY_SECONDS = 60


class StepPace:
    """Keeps steps that streams wait for below a target, in seconds.

    A step is taken to cost what a step of streams alone costs, plus a price per prompt token. Both
    are averages in which the past fades, the price one over tokens and not over steps, so that
    small chunks, which mostly cost what any step costs, do not drive it up.
    """

    def __init__(self, max_step_seconds: float) -> None:
        self._max_step_seconds = max_step_seconds
        self._stream_seconds = 0.0
        self._prompt_seconds = 0.0
        self._num_prompt_tokens = 0.0

    def max_prompt_tokens(self) -> int:
        """Return how many prompt tokens the next step may compute beside running streams."""
        spare_seconds = self._max_step_seconds - self._stream_seconds
        if spare_seconds <= 0 or self._prompt_seconds <= 0:
            return MIN_PROMPT_TOKENS
        tokens_per_second = self._num_prompt_tokens / self._prompt_seconds
        return max(MIN_PROMPT_TOKENS, int(spare_seconds * tokens_per_second))

    def observe(self, *, num_stream_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if num_prompt_tokens == 0:
            known = self._stream_seconds
            mixed = STREAM_MEMORY * known + (1 - STREAM_MEMORY) * seconds
            self._stream_seconds = mixed if known else seconds
            return
        if num_stream_tokens:
            seconds = max(seconds - self._stream_seconds, 0.0)
        self._prompt_seconds = PROMPT_MEMORY * self._prompt_seconds + seconds
        kept = PROMPT_MEMORY * self._num_prompt_tokens
        self._num_prompt_tokens = kept + num_prompt_tokens


class EndRate:
    """At what rate requests have lately ended. Times are of any clock that does not go back."""

    def __init__(self) -> None:
        self._ended_at: deque[float] = deque(maxlen=MAX_ENDS)

    def note(self, num_ended: int, *, now: float) -> None:
        """Note that so many ended just now."""
        self._ended_at.extend([now] * min(num_ended, MAX_ENDS))

    def retry_after_seconds(self, num_waiting: int, *, now: float) -> int:
        """Return after how many whole seconds those who wait now will most likely have begun."""
        # Why only the last minute: an idle hour before it says nothing of how fast it goes now.
        while self._ended_at and self._ended_at[0] < now - RATE_SECONDS:
            self._ended_at.popleft()
        if len(self._ended_at) < 2:
            return UNKNOWN_RETRY_SECONDS
        seconds_per_end = (now - self._ended_at[0]) / len(self._ended_at)
        return min(max(math.ceil(num_waiting * seconds_per_end), 1), MAX_RETRY_SECONDS)
