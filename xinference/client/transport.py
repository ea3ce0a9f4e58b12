# SPDX-License-Identifier: Apache-2.0
"""How requests travel: the settings of httpx for an endpoint, and its errors in our words.

Shared by `Client` and `AsyncClient`; holds no connection itself.
"""

import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from .errors import (
    ClientError,
    ConnectionFailed,
    ConnectionLost,
    ReplyTimeout,
    ServerFault,
    error_of_reply,
)
from .operations import Operation, Request

Result = TypeVar("Result")

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 3.0
"""Below the server's 5 s, so that no request meets a connection that is just being closed."""


def httpx_settings(base_url: str, api_key: str | None) -> dict[str, Any]:
    """Return the arguments of `httpx.Client` or `httpx.AsyncClient` for an endpoint.

    Raises:
        ValueError: `base_url` is not an http:// or https:// address.
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"{base_url!r} is not an http:// or https:// address")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        # Why: loading the certificates takes 20 ms, which plain HTTP never needs. And why not True:
        # without trust_env, httpx would not look at SSL_CERT_FILE for a certificate of one's own.
        "verify": httpx.create_ssl_context() if url.scheme == "https" else False,
        # Why: a proxy of the environment cannot reach this machine's own addresses.
        "trust_env": not _is_loopback(url.host),
        "limits": httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS),
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def httpx_request(request: Request) -> dict[str, Any]:
    """Return the arguments of `build_request` for what is to be sent."""
    return {
        "method": request.method,
        "url": request.path,
        "params": dict(request.query),
        "json": request.body,
        "timeout": httpx.Timeout(request.timeout_seconds, connect=CONNECT_SECONDS),
    }


@contextmanager
def translated(purpose: str, url: httpx.URL) -> Iterator[None]:
    """Turn what httpx raises inside into a `ClientError` of this purpose."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        where = f"{url.scheme}://{url.netloc.decode()}"
        problem = (
            f"nothing answers at {where}. Start a cluster with `xinference-local`, or name the "
            "endpoint of one that runs."
        )
        if _is_of_tls(error):
            problem = (
                f"{where} answers, but not in an HTTPS to be trusted: {error}. It is an http:// "
                "address, or SSL_CERT_FILE has to name its certificate."
            )
        raise ConnectionFailed(purpose, problem) from error
    except httpx.TimeoutException as error:
        raise ReplyTimeout(purpose, f"{url} did not reply in time") from error
    except httpx.TransportError as error:
        raise ConnectionLost(purpose, f"the connection to {url} broke: {error}") from error
    except httpx.HTTPError as error:
        raise ClientError(purpose, str(error)) from error


def _is_of_tls(error: BaseException | None) -> bool:
    """Return whether somebody is there, and the two do not agree on encryption."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def parsed(operation: Operation[Result], response: httpx.Response) -> Result:
    """Return the result of a whole reply.

    Raises:
        ClientError: the reply is an error, or is not what it should be.
    """
    purpose = operation.request.purpose
    if response.is_error:
        raise error_of_reply(purpose, response.status_code, response.headers, response.content)
    try:
        return operation.parse(response.json())
    except (ValueError, KeyError, TypeError) as error:
        raise ServerFault(
            purpose,
            f"{response.url} did not reply as this software does: {response.text[:200]!r}",
            status=response.status_code,
        ) from error
