# SPDX-License-Identifier: Apache-2.0
"""What a replica counts of whole requests, whatever its model is made of.

In: each request once, when it ends. Out: counters that travel with those of the engine.
"""

from xinference.protocol.generation import Failed, Finished
from xinference.protocol.histograms import SECONDS, TOKEN_SECONDS, Histogram


class RequestCounters:
    """Of one replica, since it was loaded. Belongs to one thread."""

    def __init__(self) -> None:
        self._num_requests = 0
        self._num_errors = 0
        self._num_input_tokens = 0
        self._num_output_tokens = 0
        self._seconds = Histogram(SECONDS)
        self._first_token_seconds = Histogram(SECONDS)
        self._token_seconds = Histogram(TOKEN_SECONDS)

    def note_end(self, end: Finished | Failed, *, submitted_at: float, now: float) -> None:
        """Count a request.

        Args:
            end: its last event.
            submitted_at: when it came, by `time.monotonic`.
            now: by the same clock.
        """
        self._num_requests += 1
        self._num_errors += isinstance(end, Failed)
        self._seconds.observe(now - submitted_at)
        first_token_at = None if end.phases is None else end.phases.first_token_at
        if first_token_at is not None:
            self._first_token_seconds.observe(first_token_at - submitted_at)
        if isinstance(end, Finished):
            self._num_input_tokens += end.usage.num_prompt_tokens
            self._num_output_tokens += end.usage.num_completion_tokens
            num_later = end.usage.num_completion_tokens - 1
            if end.phases is not None and first_token_at is not None and num_later > 0:
                self._token_seconds.observe((end.phases.ended_at - first_token_at) / num_later)

    def counters(self) -> dict[str, float]:
        """Return them as they travel."""
        return {
            "requests": float(self._num_requests),
            "request_errors": float(self._num_errors),
            "request_input_tokens": float(self._num_input_tokens),
            "request_output_tokens": float(self._num_output_tokens),
            **self._seconds.counters("request_seconds"),
            **self._first_token_seconds.counters("request_first_token_seconds"),
            **self._token_seconds.counters("request_token_seconds"),
        }
