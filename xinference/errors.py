# SPDX-License-Identifier: Apache-2.0
"""Every error that is raised on purpose; decided by type, never by text.

    XinferenceError
    ├── RequestError              the caller can fix it                         400
    │   ├── InvalidRequest          a field is wrong, missing or unsupported    400
    │   ├── ContextLengthExceeded   prompt and answer do not fit                400
    │   ├── AbilityMissing          this model cannot do that                   400
    │   ├── UnsupportedVariant      no such format, size, engine of a family    400
    │   ├── InvalidApiKey           no API key, or one that is none             401
    │   ├── NotAllowed              the API key is not for this                 403
    │   ├── RequestAborted          stopped on somebody's order                 409
    │   ├── RequestCrashesModel     it was there when two replicas crashed      422
    │   ├── DuplicateRequest        a live request has this id                  409
    │   ├── CacheInUse              models run from the files to be removed     409
    │   ├── EnvironmentInUse        models run in the environment to be removed 409
    │   ├── ModelNotFound           no model has this uid                       404
    │   ├── FamilyNotFound          no such model in the catalogue              404
    │   ├── ApiKeyNotFound          no API key has this id                      404
    │   ├── ObjectNotFound          no such stored answer, file or batch        404
    │   └── ModelAlreadyExists      the uid or name is taken                    400
    ├── CapacityError             the same request may succeed later            503
    │   ├── ModelNotReady           it is still loading, or being restarted     503
    │   ├── ModelOverloaded         its queue is full; nothing was enqueued     429
    │   ├── DeadlinePassed          it was not there when its caller gave up    504
    │   ├── RateLimitReached        the API key's limit is used up for now      429
    │   ├── StoreUnavailable        what is to be kept cannot be written        503
    │   ├── StateUnwritable         what should run cannot be written           507
    │   └── InsufficientResources   no node can hold it now                     503
    ├── LaunchError               the model could not be brought up             503
    │   ├── LoadFailed              its files do not load                       503
    │   ├── DownloadFailed          its files do not arrive from a hub          503
    │   │   └── RepositoryNotFound  no hub has them                             404
    │   ├── DownloadUnavailable     no hub may be asked for its files           503
    │   ├── DiskFull                its files do not fit on the disk            507
    │   └── LaunchCancelled         somebody cancelled the launch               499
    ├── ClusterError              part of the cluster is gone                   503
    │   ├── PeerUnreachable         a control process does not answer           503
    │   ├── NodeLost                the machine of a replica is gone            503
    │   └── ReplicaLost             its process died; the machine lives         503
    ├── InvalidSetting            a process cannot start as configured     exit 2
    ├── ProtocolError             a peer broke the written protocol             500
    └── InternalError             our bug; the message says what to report      500

An error holds fields and writes its own message. It crosses a process boundary as
`to_wire()`, a dictionary of builtins, and comes back by `from_wire()`; both planes use the
same pair. HTTP statuses live in `api/errors.py`, not here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar


def _rebuild(cls: "type[XinferenceError]", state: dict[str, object]) -> "XinferenceError":
    error = cls.__new__(cls)
    vars(error).update(state)
    return error


class XinferenceError(Exception):
    """Base of every error raised on purpose. Subclasses are `@dataclass(eq=False)`."""

    code: ClassVar[str] = "xinference_error"
    """Stable and documented; API users and the wire see it."""

    def __reduce__(
        self,
    ) -> "tuple[Callable[..., XinferenceError], tuple[type[XinferenceError], dict[str, object]]]":
        # Why: the default replays `cls(*args)`, which loses keyword-only fields.
        return _rebuild, (type(self), dict(vars(self)))

    def to_wire(self) -> dict[str, Any]:
        """Return the code and the fields as builtins; the inverse of `from_wire`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # every concrete subclass is a dataclass
        return {"code": self.code, "fields": named}


class RequestError(XinferenceError):
    """The caller can fix it. Nothing was started."""


class CapacityError(XinferenceError):
    """The same request may succeed later."""


class LaunchError(XinferenceError):
    """A model could not be brought up."""


class ClusterError(XinferenceError):
    """A part of the cluster is gone."""


@dataclass(eq=False)
class InvalidRequest(RequestError):
    """A field is wrong, missing, or asks for something this version refuses."""

    field: str
    problem: str
    code: ClassVar[str] = "invalid_request"

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


@dataclass(eq=False)
class ContextLengthExceeded(RequestError):
    """The prompt, or the prompt and the tokens asked for, do not fit the model's context."""

    num_prompt_tokens: int
    max_tokens: int
    max_model_len: int
    code: ClassVar[str] = "context_length_exceeded"

    def __str__(self) -> str:
        # Why these words: by the first six of them clients tell this error from others.
        return (
            f"This model's maximum context length is {self.max_model_len} tokens, but the prompt "
            f"has {self.num_prompt_tokens} and {self.max_tokens} more were asked for. "
            "Shorten the prompt or lower max_tokens."
        )


@dataclass(eq=False)
class AbilityMissing(RequestError):
    """The model runs, but cannot do this."""

    model: str
    ability: str
    code: ClassVar[str] = "ability_missing"

    def __str__(self) -> str:
        return f"Model {self.model} cannot {self.ability}."


@dataclass(eq=False)
class UnsupportedVariant(RequestError):
    """The family exists, but not in the format, size, quantization or engine asked for."""

    family: str
    problem: str
    suggestions: list[str]
    code: ClassVar[str] = "unsupported_variant"

    def __str__(self) -> str:
        hint = f" Available: {', '.join(self.suggestions)}." if self.suggestions else ""
        return f"{self.family}: {self.problem}.{hint}"


@dataclass(eq=False)
class InvalidApiKey(RequestError):
    """The gateway asks for an API key, and there was none, or one that is unknown or has ended."""

    problem: str
    code: ClassVar[str] = "invalid_api_key"

    def __str__(self) -> str:
        return self.problem


@dataclass(eq=False)
class NotAllowed(RequestError):
    """The API key is good, but not for this."""

    problem: str
    code: ClassVar[str] = "not_allowed"

    def __str__(self) -> str:
        return self.problem


@dataclass(eq=False)
class EnvironmentInUse(RequestError):
    """A virtual environment that is to be removed is being used."""

    model_name: str
    users: list[str]
    """Replicas."""
    code: ClassVar[str] = "environment_in_use"

    def __str__(self) -> str:
        return (
            f"The virtual environment of {self.model_name} is used by {', '.join(self.users)}. "
            "Terminate that first."
        )


@dataclass(eq=False)
class CacheInUse(RequestError):
    """What is to be removed is being used: models run from it, or it is being downloaded."""

    model_version: str
    users: list[str]
    code: ClassVar[str] = "cache_in_use"

    def __str__(self) -> str:
        return (
            f"{self.model_version} is used by {', '.join(self.users)}. End that first; what a "
            "model runs from can be removed with force."
        )


@dataclass(eq=False)
class RequestAborted(RequestError):
    """The request was stopped on somebody's order before it had ended."""

    request_id: str
    code: ClassVar[str] = "request_aborted"

    def __str__(self) -> str:
        return f"Request {self.request_id} was aborted."


@dataclass(eq=False)
class RequestCrashesModel(RequestError):
    """The request was on two replicas that crashed, so it is not tried on a third."""

    model: str
    request_id: str
    code: ClassVar[str] = "request_crashes_model"

    def __str__(self) -> str:
        return (
            f"Two processes of model {self.model} ended while they worked on request "
            f"{self.request_id}, so it is not tried again."
        )


@dataclass(eq=False)
class DuplicateRequest(RequestError):
    """A live request already carries this id. Nothing was enqueued."""

    request_id: str
    code: ClassVar[str] = "duplicate_request"

    def __str__(self) -> str:
        return f"A request with the id {self.request_id} is already running; choose another."


@dataclass(eq=False)
class ModelNotFound(RequestError):
    """No model is running, or is meant to run, under this uid."""

    model: str
    running: list[str]
    code: ClassVar[str] = "model_not_found"

    def __str__(self) -> str:
        known = f" Running: {', '.join(self.running)}." if self.running else " No model is running."
        return f"Model not found: {self.model}.{known}"


@dataclass(eq=False)
class FamilyNotFound(RequestError):
    """The catalogue has no model of this name."""

    family: str
    suggestions: list[str]
    code: ClassVar[str] = "family_not_found"

    def __str__(self) -> str:
        hint = "`xinference registrations` lists those there are."
        if self.suggestions:
            hint = f"Did you mean {', '.join(self.suggestions)}?"
        return f"Unknown model name: {self.family}. {hint}"


@dataclass(eq=False)
class ApiKeyNotFound(RequestError):
    """There is no API key of this id."""

    key_id: str
    code: ClassVar[str] = "api_key_not_found"

    def __str__(self) -> str:
        return f"There is no API key with the id {self.key_id}."


@dataclass(eq=False)
class ObjectNotFound(RequestError):
    """Nothing of this kind is stored under this id, for this caller."""

    kind: str
    id: str
    code: ClassVar[str] = "object_not_found"

    def __str__(self) -> str:
        return f"There is no {self.kind} {self.id}."


@dataclass(eq=False)
class ModelAlreadyExists(RequestError):
    """The uid of a launch, or the name of a registration, is taken."""

    name: str
    code: ClassVar[str] = "model_already_exists"

    def __str__(self) -> str:
        return f"{self.name} already exists. Choose another name, or remove that one first."


@dataclass(eq=False)
class ModelNotReady(CapacityError):
    """The model is known, but cannot answer yet. The same request may succeed later."""

    model: str
    state: str
    retry_after_seconds: int
    code: ClassVar[str] = "model_not_ready"

    def __str__(self) -> str:
        return f"Model {self.model} is {self.state}; try again in {self.retry_after_seconds} s."


@dataclass(eq=False)
class ModelOverloaded(CapacityError):
    """The model's queue is full, or it has as many requests as its launch allows. Nothing was
    enqueued; retrying is safe."""

    model: str
    num_waiting: int
    retry_after_seconds: int
    code: ClassVar[str] = "model_overloaded"

    def __str__(self) -> str:
        return (
            f"Model {self.model} already has {self.num_waiting} requests waiting for their "
            "answers; try again later."
        )


@dataclass(eq=False)
class DeadlinePassed(CapacityError):
    """The answer was not there when its caller would wait no longer. The request is aborted."""

    model: str
    seconds: float
    code: ClassVar[str] = "deadline_passed"

    def __str__(self) -> str:
        return (
            f"Model {self.model} has not answered within {self.seconds:g} s, which is as long as "
            "this request may wait; it was aborted."
        )


@dataclass(eq=False)
class RateLimitReached(CapacityError):
    """The API key has used up its requests or tokens per minute. Nothing was enqueued."""

    key_name: str
    retry_after_seconds: int
    code: ClassVar[str] = "rate_limit_reached"

    def __str__(self) -> str:
        return (
            f"Rate limit reached for the API key {self.key_name}; "
            f"try again in {self.retry_after_seconds} s."
        )


@dataclass(eq=False)
class StoreUnavailable(CapacityError):
    """What callers want kept cannot be read or written now."""

    problem: str
    code: ClassVar[str] = "store_unavailable"

    def __str__(self) -> str:
        return f"What is to be kept cannot be read or written: {self.problem}."


@dataclass(eq=False)
class StateUnwritable(CapacityError):
    """What should run cannot be written down now, so nothing was begun. What runs goes on."""

    problem: str
    code: ClassVar[str] = "state_unwritable"

    def __str__(self) -> str:
        return (
            f"What should run cannot be written down: {self.problem}. Nothing was changed; what "
            "runs goes on."
        )


@dataclass(eq=False)
class InsufficientResources(CapacityError):
    """No node of the cluster can hold the model now."""

    problem: str
    code: ClassVar[str] = "insufficient_resources"

    def __str__(self) -> str:
        return self.problem


@dataclass(eq=False)
class LoadFailed(LaunchError):
    """The model's files could not be loaded, or its process ended while loading."""

    model: str
    problem: str
    code: ClassVar[str] = "load_failed"

    def __str__(self) -> str:
        return f"Model {self.model} could not be loaded: {self.problem}"


@dataclass(eq=False)
class DownloadUnavailable(LaunchError):
    """The model's files are not on the machine, and no hub may be asked, or none has them."""

    family: str
    model_id: str
    problem: str
    code: ClassVar[str] = "download_unavailable"

    def __str__(self) -> str:
        return (
            f"{self.family} would have to be downloaded ({self.model_id}), but {self.problem}. "
            "Put its files on the worker and launch with model_path."
        )


@dataclass(eq=False)
class DownloadFailed(LaunchError):
    """The model's files do not arrive from a hub. What did arrive is kept."""

    model: str
    problem: str
    code: ClassVar[str] = "download_failed"

    def __str__(self) -> str:
        return f"{self.model} cannot be downloaded: {self.problem}"


@dataclass(eq=False)
class RepositoryNotFound(DownloadFailed):
    """Every hub that may have the model's files has said that it does not, or not in public."""

    code: ClassVar[str] = "repository_not_found"


@dataclass(eq=False)
class DiskFull(LaunchError):
    """The model's files do not fit on the disk."""

    model: str
    directory: str
    required_bytes: int
    available_bytes: int
    code: ClassVar[str] = "insufficient_storage"

    def __str__(self) -> str:
        return (
            f"{self.model} cannot be downloaded: {self.required_bytes:,} more bytes are needed, "
            f"and {self.directory} has {self.available_bytes:,} free. Remove a cached model "
            "(xinference cached, xinference remove-cache), or set XINFERENCE_HOME to a larger disk."
        )


@dataclass(eq=False)
class LaunchCancelled(LaunchError):
    """Somebody cancelled the launch; nothing of it is left."""

    model: str
    code: ClassVar[str] = "launch_cancelled"

    def __str__(self) -> str:
        return f"The launch of {self.model} was cancelled."


@dataclass(eq=False)
class PeerUnreachable(ClusterError):
    """A control process does not answer. What it was asked may or may not have happened."""

    peer: str
    problem: str
    code: ClassVar[str] = "peer_unreachable"

    def __str__(self) -> str:
        return f"The {self.peer} cannot be reached: {self.problem}"


@dataclass(eq=False)
class NodeLost(ClusterError):
    """The machine of a replica is gone, and its processes with it."""

    node: str
    code: ClassVar[str] = "node_lost"

    def __str__(self) -> str:
        return f"Node {self.node} is lost."


@dataclass(eq=False)
class ReplicaLost(ClusterError):
    """The process of a replica died, or hung, on a machine that lives."""

    model: str
    problem: str
    code: ClassVar[str] = "replica_lost"

    def __str__(self) -> str:
        return f"The process of model {self.model} is gone: {self.problem}. It is being restarted."


@dataclass(eq=False)
class InvalidSetting(XinferenceError):
    """A process cannot start as it is configured."""

    name: str
    value: str
    expected: str
    code: ClassVar[str] = "invalid_setting"

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}: expected {self.expected}."


@dataclass(eq=False)
class ProtocolError(XinferenceError):
    """A peer sent something the written protocol does not allow. The connection is closed."""

    problem: str
    code: ClassVar[str] = "protocol_error"

    def __str__(self) -> str:
        return f"Protocol error: {self.problem}"


@dataclass(eq=False)
class InternalError(XinferenceError):
    """Our bug. `where` says which part to name in a report."""

    where: str
    problem: str
    code: ClassVar[str] = "internal_error"

    def __str__(self) -> str:
        return f"Internal error in {self.where}: {self.problem}"


def concrete_errors(
    cls: type[XinferenceError] = XinferenceError,
) -> Iterator[type[XinferenceError]]:
    """Yield every error class that is raised: those with fields, not the bases for catching."""
    for child in cls.__subclasses__():
        if "code" in vars(child):
            yield child
        yield from concrete_errors(child)


def from_wire(wire: Mapping[str, Any]) -> XinferenceError:
    """Rebuild the error that `to_wire` described; an unknown one becomes an `InternalError`.

    Raises:
        KeyError: if `wire` has no "code".
    """
    named = dict(wire.get("fields") or {})
    for cls in concrete_errors():
        if cls.code == wire["code"] and {field.name for field in fields(cls)} == set(named):  # type: ignore[arg-type]  # every concrete subclass is a dataclass
            return cls(**named)
    return InternalError(where="a peer", problem=f"{wire['code']} {named}")
