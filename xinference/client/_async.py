# SPDX-License-Identifier: Apache-2.0
"""`AsyncClient`: sends the operations of `Client`, awaited."""

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from . import operations
from .errors import error_of_reply
from .models import ASYNC_HANDLES, AsyncStream, handle_class
from .operations import Operation, StreamOperation, as_method
from .transport import httpx_request, httpx_settings, parsed, translated

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _sends(
    describe: Callable[Parameters, Operation[Result]],
) -> "Callable[Concatenate[AsyncClient, Parameters], Coroutine[Any, Any, Result]]":
    """Make the method that awaits the operation which `describe` returns for its arguments."""

    async def method(
        self: "AsyncClient", /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        return await self.send(describe(*args, **kwargs))

    return as_method(method, describe)


def _streams(
    describe: Callable[Parameters, StreamOperation],
) -> "Callable[Concatenate[AsyncClient, Parameters], Coroutine[Any, Any, AsyncStream]]":
    """Make the method that awaits the stream of the operation which `describe` returns."""

    async def method(
        self: "AsyncClient", /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> AsyncStream:
        return await self.stream(describe(*args, **kwargs))

    return as_method(method, describe)


class AsyncClient:
    """The calls of one endpoint, awaited. Close it, or use it in `async with`.

    Nothing is sent before the first call. It may be made anywhere, and belongs to the event loop
    of that first call.

    Args:
        base_url: Such as "http://127.0.0.1:9997".
        api_key: Sent as a bearer token.

    Raises:
        ValueError: `base_url` is not an http:// or https:// address.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx.AsyncClient(**httpx_settings(self.base_url, api_key))

    list_models = _sends(operations.list_models)
    launch_model = _sends(operations.launch_model)
    terminate_model = _sends(operations.terminate_model)
    describe_model = _sends(operations.describe_model)
    get_launch_model_progress = _sends(operations.get_launch_model_progress)
    cancel_launch_model = _sends(operations.cancel_launch_model)
    get_instance_info = _sends(operations.get_instance_info)
    get_status = _sends(operations.get_status)
    get_model_events = _sends(operations.get_model_events)
    get_model_logs = _sends(operations.get_model_logs)
    follow_model_logs = _streams(operations.follow_model_logs)
    get_node_logs = _sends(operations.get_node_logs)
    follow_node_logs = _streams(operations.follow_node_logs)
    get_model_replicas = _sends(operations.get_model_replicas)
    get_autostart_config = _sends(operations.get_autostart_config)
    get_autostart_model_summary = _sends(operations.get_autostart_model_summary)
    upsert_autostart_model = _sends(operations.upsert_autostart_model)
    remove_autostart_model = _sends(operations.remove_autostart_model)
    add_model_replica = _sends(operations.add_model_replica)
    terminate_model_replica = _sends(operations.terminate_model_replica)
    abort_request = _sends(operations.abort_request)
    register_model = _sends(operations.register_model)
    unregister_model = _sends(operations.unregister_model)
    list_model_registrations = _sends(operations.list_model_registrations)
    get_model_registration = _sends(operations.get_model_registration)
    query_engine_by_model_name = _sends(operations.query_engine_by_model_name)
    vllm_models = _sends(operations.vllm_models)
    list_cached_models = _sends(operations.list_cached_models)
    list_deletable_models = _sends(operations.list_deletable_models)
    confirm_and_remove_model = _sends(operations.confirm_and_remove_model)
    download_model = _sends(operations.download_model)
    get_download_progress = _sends(operations.get_download_progress)
    cancel_download = _sends(operations.cancel_download)
    get_supervisor_info = _sends(operations.get_supervisor_info)
    get_workers_info = _sends(operations.get_workers_info)
    abort_cluster = _sends(operations.abort_cluster)
    list_virtual_envs = _sends(operations.list_virtual_envs)
    remove_virtual_envs = _sends(operations.remove_virtual_envs)
    needs_api_key = _sends(operations.needs_api_key)
    create_api_key = _sends(operations.create_api_key)
    list_api_keys = _sends(operations.list_api_keys)
    revoke_api_key = _sends(operations.revoke_api_key)
    get_usage = _sends(operations.get_usage)

    async def get_model(self, model_uid: str) -> Any:
        """Return a handle of a running model, of the class in `models.ASYNC_HANDLES` that suits it.

        Raises:
            NotFound: no such model.
        """
        return handle_class(await self.describe_model(model_uid), ASYNC_HANDLES)(model_uid, self)

    async def login(self, username: str, password: str) -> None:
        """Send an API key from now on; nothing happens where the server asks for none.

        Args:
            username: the name or the id of the key.
            password: the key.

        Raises:
            Unauthorized: it is none of this server.
        """
        if await self.needs_api_key():
            token = await self.send(operations.login(username, password))
            self._http.headers["Authorization"] = f"Bearer {token}"

    async def send(self, operation: Operation[Result]) -> Result:
        """Send one operation and return its result."""
        request = operation.request
        with translated(request.purpose, self._http.base_url):
            response = await self._http.send(self._http.build_request(**httpx_request(request)))
        return parsed(operation, response)

    async def stream(self, operation: StreamOperation) -> AsyncStream:
        """Send one operation; return its stream when the server has accepted the request."""
        request = operation.request
        with translated(request.purpose, self._http.base_url):
            response = await self._http.send(
                self._http.build_request(**httpx_request(request)), stream=True
            )
            if response.is_error:
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
                raise error_of_reply(
                    request.purpose, response.status_code, response.headers, content
                )
        return AsyncStream(request.purpose, response)

    async def close(self) -> None:
        """Close the connections; may be called again."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
