# SPDX-License-Identifier: Apache-2.0
"""Whether a replica that is there gets anywhere. Pure: what it says of itself in, a verdict out."""

from collections.abc import Mapping

UNRESPONSIVE_SECONDS = 10.0
"""A ready replica that answers nothing for so long is replaced."""
STUCK_SECONDS = 30.0
"""So is one that has work and whose engine finishes no step for so long."""


class Liveness:
    """What is known of one ready replica.

    Liveness is progress: an engine with work whose steps end is alive, however long they take
    together; one whose steps do not is dead, however fast its process answers.
    """

    def __init__(self, *, now: float) -> None:
        """Begin with a replica that has just become ready."""
        self._answered_at = now
        self._moved_at = now
        self._progress = -1.0

    def observe(
        self, counters: Mapping[str, float] | None, *, is_stopped: bool, now: float
    ) -> str | None:
        """Take in an answer, or that there was none; return why to replace it, or None.

        Args:
            counters: the engine's; None if it did not answer.
            is_stopped: whether the system says that its process does not run.
            now: monotonic.
        """
        if is_stopped:
            return "its process was stopped by a signal"
        if counters is None:
            silence = now - self._answered_at
            if silence < UNRESPONSIVE_SECONDS:
                return None
            return f"it has answered nothing for {silence:.0f} s"
        self._answered_at = now
        progress = counters.get("progress", 0.0)
        has_work = counters.get("num_running", 0.0) + counters.get("num_waiting", 0.0) > 0
        if not has_work or progress != self._progress:
            self._progress, self._moved_at = progress, now
            return None
        if now - self._moved_at < STUCK_SECONDS:
            return None
        return f"its engine has work, but finished no step for {now - self._moved_at:.0f} s"
