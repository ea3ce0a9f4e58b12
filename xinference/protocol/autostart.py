# SPDX-License-Identifier: Apache-2.0
"""The autostart list: models that are launched whenever the cluster runs and they do not."""

from dataclasses import dataclass

from xinference.errors import InvalidRequest
from xinference.identifiers import ModelUid

from .deployment import LaunchSpec

MAX_RETRIES = 1000
MAX_RETRY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AutostartEntry:
    """One model of the list."""

    launch: LaunchSpec
    """With a `model_uid`, by which the entry is known."""
    enabled: bool = True
    priority: int = 100
    """The lowest is launched first."""
    max_retries: int = 3
    """After the first attempt; then it is left alone until the entry changes or the supervisor
    starts again."""
    retry_interval_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.launch.model_uid is None:
            raise InvalidRequest(field="launch.model_uid", problem="is required in this list")
        if not 0 <= self.max_retries <= MAX_RETRIES:
            raise InvalidRequest(field="max_retries", problem=f"must be from 0 to {MAX_RETRIES}")
        if not 0 < self.retry_interval_seconds <= MAX_RETRY_SECONDS:
            raise InvalidRequest(
                field="retry_interval_seconds",
                problem=f"must be above 0 and at most {MAX_RETRY_SECONDS:.0f}",
            )

    @property
    def model_uid(self) -> ModelUid:
        """What the model is called."""
        assert self.launch.model_uid is not None
        return self.launch.model_uid


@dataclass(frozen=True, slots=True, kw_only=True)
class AutostartStatus:
    """An entry, and how far it is."""

    entry: AutostartEntry
    num_attempts: int = 0
    """Launches since the model last ran, the entry changed, or the supervisor started."""
    problem: str = ""
    """Why the last of them failed; empty if it has not."""
