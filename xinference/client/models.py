# SPDX-License-Identifier: Apache-2.0
"""Handles: a running model that can be asked, and the streams of its answers.

`Client.get_model` makes a `ChatModelHandle`, `GenerateModelHandle`, `EmbeddingModelHandle` or
`RerankModelHandle`, `AsyncClient.get_model` their awaited twins. A stream gives the chunks of an
answer in order; closing it early closes its connection, and the server stops generating.
"""

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
)
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

import httpx

from . import operations
from .errors import ClientError
from .operations import Json, Operation, StreamOperation, as_method
from .sse import ChunkDecoder
from .transport import translated

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Stream:
    """The chunks of one answer, each a JSON object; iterate once.

    It belongs to one thread. Leaving it before its end aborts the answer: call `close`, use it in
    `with`, or drop it.
    """

    def __init__(self, purpose: str, response: httpx.Response) -> None:
        self._response = response
        self._chunks = self._read(purpose)

    def _read(self, purpose: str) -> Generator[Json]:
        decoder = ChunkDecoder(purpose)
        with translated(purpose, self._response.request.url):
            for received in self._response.iter_bytes():
                yield from decoder.feed(received)
        decoder.end()

    def __iter__(self) -> Iterator[Json]:
        return self

    def __next__(self) -> Json:
        """Return the next chunk.

        Raises:
            StreamFailed: the server failed the answer, or ended it before it was whole.
            ConnectionLost, ReplyTimeout
        """
        try:
            return next(self._chunks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Abort the answer unless it is whole; may be called again."""
        self._chunks.close()
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStream:
    """The chunks of one answer, each a JSON object; iterate once.

    It belongs to one task. Leaving it before its end aborts the answer: call `aclose`, or use it
    in `async with`; a stream that is only dropped is closed by the event loop soon after.
    """

    def __init__(self, purpose: str, response: httpx.Response) -> None:
        self._response = response
        self._chunks = self._read(purpose)

    async def _read(self, purpose: str) -> AsyncGenerator[Json]:
        decoder = ChunkDecoder(purpose)
        try:
            with translated(purpose, self._response.request.url):
                async for received in self._response.aiter_bytes():
                    for chunk in decoder.feed(received):
                        yield chunk
            decoder.end()
        finally:
            await self._response.aclose()

    def __aiter__(self) -> AsyncIterator[Json]:
        return self

    async def __anext__(self) -> Json:
        """Return the next chunk.

        Raises:
            StreamFailed: the server failed the answer, or ended it before it was whole.
            ConnectionLost, ReplyTimeout
        """
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Abort the answer unless it is whole; may be called again."""
        await self._chunks.aclose()
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Sends(Protocol):
    """What a handle needs of `Client`."""

    def send(self, operation: Operation[Result]) -> Result:
        """Send and return the reply."""
        ...

    def stream(self, operation: StreamOperation) -> Stream:
        """Send and return the stream of the reply."""
        ...


class SendsAsync(Protocol):
    """What a handle needs of `AsyncClient`."""

    async def send(self, operation: Operation[Result]) -> Result:
        """Send and return the reply."""
        ...

    async def stream(self, operation: StreamOperation) -> AsyncStream:
        """Send and return the stream of the reply."""
        ...


class ModelHandle:
    """A running model."""

    def __init__(self, model_uid: str, client: Sends) -> None:
        self.model_uid = model_uid
        self._client = client

    def close(self) -> None:
        """Do nothing: its connections are those of the client, which closes them."""


class AsyncModelHandle:
    """A running model; awaited."""

    def __init__(self, model_uid: str, client: SendsAsync) -> None:
        self.model_uid = model_uid
        self._client = client

    async def close(self) -> None:
        """Do nothing: its connections are those of the client, which closes them."""


def _asks(
    describe: Callable[Concatenate[str, Parameters], Operation[Json] | StreamOperation],
) -> "Callable[Concatenate[GenerateModelHandle, Parameters], Json | Stream]":
    """Make the method of a handle that sends what `describe` returns for its model."""

    def method(
        self: "GenerateModelHandle", /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Json | Stream:
        operation = describe(self.model_uid, *args, **kwargs)
        if isinstance(operation, StreamOperation):
            return self._client.stream(operation)
        return self._client.send(operation)

    return as_method(method, describe, leave_out="model_uid")


def _asks_async(
    describe: Callable[Concatenate[str, Parameters], Operation[Json] | StreamOperation],
) -> "Callable[Concatenate[AsyncGenerateModelHandle, Parameters], Any]":
    """Make the awaited method of a handle that sends what `describe` returns for its model."""

    async def method(
        self: "AsyncGenerateModelHandle", /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Json | AsyncStream:
        operation = describe(self.model_uid, *args, **kwargs)
        if isinstance(operation, StreamOperation):
            return await self._client.stream(operation)
        return await self._client.send(operation)

    return as_method(method, describe, leave_out="model_uid")


def _computes(
    describe: Callable[Concatenate[str, Parameters], Operation[Json]],
) -> Callable[Concatenate[ModelHandle, Parameters], Json]:
    """Make the method of a handle that sends what `describe` returns for its model."""

    def method(self: ModelHandle, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Json:
        return self._client.send(describe(self.model_uid, *args, **kwargs))

    return as_method(method, describe, leave_out="model_uid")


def _computes_async(
    describe: Callable[Concatenate[str, Parameters], Operation[Json]],
) -> Callable[Concatenate[AsyncModelHandle, Parameters], Awaitable[Json]]:
    """Make the awaited method of a handle that sends what `describe` returns for its model."""

    async def method(
        self: AsyncModelHandle, /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Json:
        return await self._client.send(describe(self.model_uid, *args, **kwargs))

    return as_method(method, describe, leave_out="model_uid")


class EmbeddingModelHandle(ModelHandle):
    """A running model that turns texts into vectors."""

    create_embedding = _computes(operations.create_embedding)


class RerankModelHandle(ModelHandle):
    """A running model that sorts documents by their relevance."""

    rerank = _computes(operations.rerank)


class AsyncEmbeddingModelHandle(AsyncModelHandle):
    """A running model that turns texts into vectors; awaited."""

    create_embedding = _computes_async(operations.create_embedding)


class AsyncRerankModelHandle(AsyncModelHandle):
    """A running model that sorts documents by their relevance; awaited."""

    rerank = _computes_async(operations.rerank)


class GenerateModelHandle(ModelHandle):
    """A running model that goes on from a text."""

    generate = _asks(operations.generate)


class ChatModelHandle(GenerateModelHandle):
    """A running model that also answers conversations."""

    chat = _asks(operations.chat)


class AsyncGenerateModelHandle(AsyncModelHandle):
    """A running model that goes on from a text; awaited."""

    generate = _asks_async(operations.generate)


class AsyncChatModelHandle(AsyncGenerateModelHandle):
    """A running model that also answers conversations; awaited."""

    chat = _asks_async(operations.chat)


Handle = TypeVar("Handle")

HANDLES: dict[str, type[ModelHandle]] = {
    "chat": ChatModelHandle,
    "generate": GenerateModelHandle,
    "embedding": EmbeddingModelHandle,
    "rerank": RerankModelHandle,
}
ASYNC_HANDLES: dict[str, type[AsyncModelHandle]] = {
    "chat": AsyncChatModelHandle,
    "generate": AsyncGenerateModelHandle,
    "embedding": AsyncEmbeddingModelHandle,
    "rerank": AsyncRerankModelHandle,
}
"""By what a model is for."""


def handle_class(description: Json, handles: Mapping[str, Handle]) -> Handle:
    """Return which handle suits a model, by its type and abilities.

    Raises:
        ClientError: this version has no handle for such a model.
    """
    model_type = str(description.get("model_type"))
    abilities = description.get("model_ability") or []
    if model_type == "LLM":
        wanted = [ability for ability in ("chat", "generate") if ability in abilities]
    else:
        wanted = [model_type] if model_type in handles else []
    if not wanted:
        raise ClientError(
            "get the model",
            f"this client has no handle for a model of type {model_type} "
            f"with the abilities {', '.join(abilities) or 'none'}",
        )
    return handles[wanted[0]]
