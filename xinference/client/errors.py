# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a call, as the caller of the client sees it.

    ClientError (RuntimeError)
    ├── ConnectionFailed     nothing answers at the endpoint; nothing was sent
    ├── ConnectionLost       it broke before the reply was whole; the call may have taken effect
    ├── ReplyTimeout         the reply took too long; the call may have taken effect
    ├── BadRequest           400, 413, 415, 422: the call itself is wrong
    ├── Unauthorized         401, 403: the API key is missing or not enough
    ├── NotFound             404: no such model, family or route
    ├── Conflict             409: aborted on order, the request id is taken, or it is in use
    ├── Unavailable          429, 503, 507: the same call may succeed later
    ├── LaunchCancelled      499: somebody cancelled the launch
    ├── ServerFault          any other status: a fault of the server
    └── StreamFailed         an answer that had begun did not end well

The message is "Failed to <purpose>, detail: <what the server said>".
"""

import json
from collections.abc import Mapping


class ClientError(RuntimeError):
    """Base of every error of a call.

    `status` is the HTTP status, None where there was no reply. `code` is the server's stable
    name of the error (see `xinference.errors`), None where it gave none.
    """

    def __init__(
        self, purpose: str, detail: str, *, status: int | None = None, code: str | None = None
    ) -> None:
        super().__init__(purpose, detail)
        self.purpose = purpose
        self.detail = detail
        self.status = status
        self.code = code

    def __str__(self) -> str:
        return f"Failed to {self.purpose}, detail: {self.detail}"


class ConnectionFailed(ClientError):
    """Nothing answers at the endpoint. Nothing was sent."""


class ConnectionLost(ClientError):
    """The connection broke before the reply was whole. The call may have taken effect."""


class ReplyTimeout(ClientError):
    """The reply took longer than the call allows. The call may have taken effect."""


class BadRequest(ClientError):
    """A field is wrong, missing or refused by name."""


class Unauthorized(ClientError):
    """The API key is missing, unknown, or not enough for this call."""


class NotFound(ClientError):
    """The server has no model, family or route of this name."""


class Conflict(ClientError):
    """The request was aborted on somebody's order, or its id belongs to a live one."""


class Unavailable(ClientError):
    """The same call may succeed later. `retry_after_seconds` is the server's advice, if any."""

    retry_after_seconds: int | None = None


class LaunchCancelled(ClientError):
    """Somebody cancelled the launch; nothing of it is left."""


class ServerFault(ClientError):
    """The server failed in a way that is not the caller's fault."""


class StreamFailed(ClientError):
    """A streamed answer had begun, and then failed or ended before it was whole."""


BY_STATUS: Mapping[int, type[ClientError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    413: BadRequest,
    415: BadRequest,
    422: BadRequest,
    429: Unavailable,
    499: LaunchCancelled,
    503: Unavailable,
    507: Unavailable,
}


def error_of_reply(
    purpose: str, status: int, headers: Mapping[str, str], content: bytes
) -> ClientError:
    """Return the error that a reply with a status of 400 or more stands for."""
    detail, code = _explanation(content)
    error = BY_STATUS.get(status, ServerFault)(
        purpose, detail or f"HTTP status {status}", status=status, code=code
    )
    retry_after = headers.get("retry-after", "")
    if isinstance(error, Unavailable) and retry_after.isdecimal():
        error.retry_after_seconds = int(retry_after)
    return error


def _explanation(content: bytes) -> tuple[str, str | None]:
    """Return the text and the code of an error body, whatever its shape."""
    try:
        body = json.loads(content)
    except ValueError:
        return content.decode(errors="replace").strip(), None
    if not isinstance(body, dict):
        return str(body), None
    return explanation_of(body)


def explanation_of(body: Mapping[str, object]) -> tuple[str, str | None]:
    """Return the text and the code of an error object, with or without `detail` beside it."""
    error = body.get("error")
    code = None
    detail = body.get("detail")
    if isinstance(error, dict):
        detail = detail or error.get("message")
        code = error.get("code")
    elif error is not None:
        detail = detail or error
    if detail is not None and not isinstance(detail, str):
        detail = json.dumps(detail)
    return detail or "", str(code) if code is not None else None
