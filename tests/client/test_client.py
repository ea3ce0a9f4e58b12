# SPDX-License-Identifier: Apache-2.0
"""Both clients against a server that says what it was told: requests, replies, errors, streams."""

import asyncio
import gc
import inspect
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import xinference.client
from tests.fakes.http import DEADLINE_SECONDS, Reply, Script, events, serving
from xinference.client import (
    AsyncChatModelHandle,
    AsyncClient,
    AsyncEmbeddingModelHandle,
    AsyncGenerateModelHandle,
    AsyncRerankModelHandle,
    BadRequest,
    ChatModelHandle,
    Client,
    ClientError,
    Conflict,
    ConnectionFailed,
    ConnectionLost,
    EmbeddingModelHandle,
    GenerateModelHandle,
    LaunchCancelled,
    NotFound,
    ReplyTimeout,
    RerankModelHandle,
    ServerFault,
    StreamFailed,
    Unauthorized,
    Unavailable,
    operations,
)

CHAT_MODEL = {"id": "m", "model_type": "LLM", "model_ability": ["generate", "chat"]}
MESSAGES = [{"role": "user", "content": "hi"}]
FINISHED = {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}]}
STARTED = {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serving(script) as address:
        yield script, address


@pytest.fixture
def script(server: tuple[Script, str]) -> Script:
    server[0].reset({"GET /v1/models/m": Reply(json=CHAT_MODEL)})
    return server[0]


@pytest.fixture
def endpoint(server: tuple[Script, str]) -> str:
    return server[1]


class Awaited:
    """`AsyncClient` as a plain one, so that each test runs on both."""

    def __init__(self, endpoint: str, api_key: str | None = None) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(endpoint, api_key)

    def __getattr__(self, name: str) -> Any:
        return self._waiting(getattr(self._client, name))

    def _waiting(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            async def whole() -> Any:
                result = await method(*args, **kwargs)
                return [item async for item in result] if hasattr(result, "__anext__") else result

            result = self._runner.run(whole())
            return AwaitedModel(result, self) if hasattr(result, "model_uid") else result

        return call

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


class AwaitedModel:
    def __init__(self, handle: Any, client: Awaited) -> None:
        self.handle = handle
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return self._client._waiting(getattr(self.handle, name))


@pytest.fixture(params=[Client, Awaited])
def client(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Any]:
    made = request.param(endpoint, "the key")
    yield made
    made.close()


def refused_endpoint() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("plain", "awaited"),
    [
        (Client, AsyncClient),
        (GenerateModelHandle, AsyncGenerateModelHandle),
        (ChatModelHandle, AsyncChatModelHandle),
        (EmbeddingModelHandle, AsyncEmbeddingModelHandle),
        (RerankModelHandle, AsyncRerankModelHandle),
    ],
)
def test_plain_and_awaited_have_the_same_methods_and_signatures(plain: type, awaited: type) -> None:
    def methods(cls: type) -> dict[str, list[str]]:
        return {
            name: [str(one) for one in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(plain) == methods(awaited)
    for name in methods(awaited):
        assert inspect.iscoroutinefunction(getattr(awaited, name)), name
        assert inspect.getdoc(getattr(awaited, name)), name


def test_every_operation_is_a_method() -> None:
    described = {
        name
        for name, function in inspect.getmembers(operations, inspect.isfunction)
        if "Operation" in str(inspect.signature(function).return_annotation)
        and not name.startswith("_")
    }

    handles = (ChatModelHandle, EmbeddingModelHandle, RerankModelHandle)
    methods = [name for kind in (Client, *handles) for name in dir(kind)]

    assert described <= set(methods)


def test_the_page_tells_of_every_method_and_error() -> None:
    page = (Path(__file__).parents[2] / "doc" / "client.md").read_text()
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction)}
    plumbing = {"send", "stream", "close"}
    errors = {error.__name__ for error in ClientError.__subclasses__()}

    told = {name for name in methods | errors if f"`{name}" in page}

    assert {name for name in methods - plumbing if not name.startswith("_")} | errors <= told


def test_the_public_names_are_what_can_be_imported() -> None:
    assert xinference.client.__all__ == sorted(xinference.client.__all__)
    assert all(hasattr(xinference.client, name) for name in xinference.client.__all__)
    assert xinference.client.RESTfulClient is Client
    assert xinference.client.AsyncRESTfulClient is AsyncClient
    from xinference.client.handlers import AsyncRESTfulChatModelHandle, RESTfulGenerateModelHandle

    assert AsyncRESTfulChatModelHandle is AsyncChatModelHandle
    assert RESTfulGenerateModelHandle is GenerateModelHandle


def test_making_a_client_asks_nobody() -> None:
    Client(refused_endpoint()).close()
    AsyncClient(refused_endpoint())


@pytest.mark.parametrize("address", ["localhost:9997", "", "ftp://host", "http://"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_address_is_refused_at_once(kind: type, address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        kind(address)


def test_the_running_models_come_by_uid(client: Any, script: Script) -> None:
    script.replies["GET /v1/models"] = Reply(json={"object": "list", "data": [CHAT_MODEL]})

    assert client.list_models() == {"m": CHAT_MODEL}
    assert script.asked[0].headers["authorization"] == "Bearer the key"


def test_a_launch_sends_what_was_given_and_waits(client: Any, script: Script) -> None:
    script.replies["POST /v1/models"] = Reply(json={"model_uid": "m"})

    uid = client.launch_model(
        model_engine="transformers",
        model_name="qwen1.5-chat",
        model_format="pytorch",
        model_size_in_billions=4,
        quantization="none",
        n_gpu=None,
        max_num_seqs=8,
    )

    assert uid == "m"
    (asked,) = script.asked
    assert asked.query == "wait_ready=true"
    assert asked.body == {
        "model_engine": "transformers",
        "model_name": "qwen1.5-chat",
        "model_type": "LLM",
        "model_format": "pytorch",
        "model_size_in_billions": 4,
        "quantization": "none",
        "replica": 1,
        "n_worker": 1,
        "n_gpu": None,
        "max_num_seqs": 8,
    }


@pytest.mark.parametrize(("given", "sent"), [(1.8, "1_8"), (7.0, 7), ("0_5", "0_5")])
def test_sizes_are_spelled_as_families_spell_them(given: object, sent: object) -> None:
    operation = operations.launch_model("m", model_size_in_billions=given)  # type: ignore[arg-type]

    assert operation.request.body is not None
    assert operation.request.body["model_size_in_billions"] == sent


def test_only_a_launch_that_waits_may_take_forever() -> None:
    waiting = operations.launch_model("m")
    watched = operations.launch_model("m", wait_ready=False)

    assert waiting.request.timeout_seconds is None
    assert watched.request.timeout_seconds == operations.QUICK_SECONDS
    assert watched.request.query == {"wait_ready": False}


def test_names_that_are_no_path_are_escaped(client: Any, script: Script) -> None:
    script.replies["DELETE /v1/models/a%2Fb%20c"] = Reply(json=None)

    assert client.terminate_model("a/b c") is None


def test_calls_go_to_their_routes(client: Any, script: Script) -> None:
    script.replies |= {
        "POST /v1/models/m/requests/r/abort": Reply(json={"msg": "DONE"}),
        "POST /v1/models/m/cancel": Reply(json=None),
        "GET /v1/models/m/progress": Reply(json={"progress": 0.5, "stage": "loading"}),
        "GET /v1/models/instances": Reply(json=[]),
        "GET /status": Reply(json={"uptime": 1, "workers": {}}),
        "GET /v1/models/m/events": Reply(json=[]),
        "GET /v1/models/m/replicas": Reply(json=[{"replica_id": 0}]),
        "POST /v1/models/m/replicas": Reply(json={"replica_id": 1}),
        "DELETE /v1/models/m/replicas/1": Reply(json={"remaining_replicas": 2}),
        "POST /v1/model_registrations/LLM": Reply(json=None),
        "DELETE /v1/model_registrations/LLM/mine": Reply(json=None),
        "GET /v1/model_registrations/LLM": Reply(json=[{"model_name": "mine"}]),
        "GET /v1/model_registrations/LLM/mine": Reply(json={"model_name": "mine"}),
        "GET /v1/engines/LLM/mine": Reply(json={"Transformers": []}),
        "GET /v1/models/vllm-supported": Reply(json={"chat": ["mine"], "generate": []}),
        "DELETE /v1/clusters": Reply(json={"result": True}),
        "GET /v1/cache/models": Reply(json={"list": [{"model_version": "v"}], "unanswered": ["w"]}),
        "POST /v1/cache/models": Reply(json={"cache_uid": "v"}),
        "DELETE /v1/cache/models": Reply(json={"result": True, "freed_bytes": 1}),
        "GET /v1/cache/models/files": Reply(json={"paths": ["/a"]}),
        "GET /v1/cache/models/v/progress": Reply(json={"stage": "completed"}),
        "POST /v1/cache/models/v/cancel": Reply(json=None),
    }

    assert client.abort_request("m", "r", block_duration=0) == {"msg": "DONE"}
    assert script.asked[-1].body == {"block_duration": 0}
    assert client.cancel_launch_model("m") is None
    assert client.get_launch_model_progress("m")["stage"] == "loading"
    assert client.get_instance_info(model_uid="m") == []
    assert script.asked[-1].query == "model_uid=m"
    assert client.get_status()["uptime"] == 1
    assert client.get_model_events("m") == []
    assert client.get_model_replicas("m") == [{"replica_id": 0}]
    assert client.add_model_replica("m", n_gpu=None) == {"replica_id": 1}
    assert script.asked[-1].body == {"model_engine": None, "n_gpu": None, "replica": 1}
    client.add_model_replica("m", {"devices": [{"gpu_idx": 1}]})
    assert script.asked[-1].body["replica_config"] == {"devices": [{"gpu_idx": 1}]}
    assert client.terminate_model_replica("m", 1) == 2
    assert client.register_model("LLM", "{}", persist=True) is None
    assert script.asked[-1].body == {"model": "{}", "persist": True, "worker_ip": None}
    assert client.unregister_model("LLM", "mine") is None
    assert client.list_model_registrations("LLM", detailed=True) == [{"model_name": "mine"}]
    assert script.asked[-1].query == "detailed=true"
    assert client.get_model_registration("LLM", "mine") == {"model_name": "mine"}
    assert client.query_engine_by_model_name("mine") == {"Transformers": []}
    assert client.vllm_models() == {"chat": ["mine"], "generate": []}
    assert client.abort_cluster() == {"result": True}
    cached = client.list_cached_models("qwen")
    assert (cached, cached.unanswered) == ([{"model_version": "v"}], ["w"])
    assert script.asked[-1].query == "model_name=qwen"
    assert client.list_deletable_models("v") == {"paths": ["/a"]}
    assert client.confirm_and_remove_model("v", "10.0.0.7") is True
    assert script.asked[-1].query == "model_version=v&worker_ip=10.0.0.7&force=false"
    assert client.download_model("qwen", model_size_in_billions=0.5) == "v"
    assert script.asked[-1].body == {
        "model_name": "qwen",
        "model_type": "LLM",
        "model_size_in_billions": "0_5",
    }
    assert client.get_download_progress("v") == {"stage": "completed"}
    assert client.cancel_download("v") is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (409, Conflict),
        (422, BadRequest),
        (429, Unavailable),
        (499, LaunchCancelled),
        (507, Unavailable),
        (500, ServerFault),
        (502, ServerFault),
        (503, Unavailable),
    ],
)
def test_a_status_becomes_an_error_of_its_own(
    client: Any, script: Script, status: int, kind: type[ClientError]
) -> None:
    body = {"error": {"message": "no", "code": "some_code"}, "detail": "no, because"}
    script.replies["GET /v1/models"] = Reply(status=status, json=body)

    with pytest.raises(RuntimeError) as caught:
        client.list_models()

    assert type(caught.value) is kind
    assert str(caught.value) == "Failed to list the models, detail: no, because"
    assert (caught.value.status, caught.value.code) == (status, "some_code")


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([b'{"detail": "plain"}'], "plain"),
        ([b'{"error": {"message": "openai"}}'], "openai"),
        ([b'{"detail": [{"loc": ["body"]}]}'], '[{"loc": ["body"]}]'),
        ([b"Bad Gateway"], "Bad Gateway"),
        ([b"[1]"], "[1]"),
        ([b" "], "HTTP status 502"),
    ],
)
def test_an_error_body_of_any_shape_is_shown(
    client: Any, script: Script, pieces: list[bytes], said: str
) -> None:
    script.replies["GET /v1/models"] = Reply(status=502, pieces=pieces)

    with pytest.raises(ServerFault) as caught:
        client.list_models()

    assert caught.value.detail == said


def test_unavailable_carries_the_advice_when_to_come_back(client: Any, script: Script) -> None:
    script.replies["GET /v1/models"] = Reply(
        status=503, json={"detail": "loading"}, headers={"retry-after": "30"}
    )

    with pytest.raises(Unavailable) as caught:
        client.list_models()

    assert caught.value.retry_after_seconds == 30


@pytest.mark.parametrize("pieces", [[b"<html>"], [b'{"object": "list"}'], [b"[]"]])
def test_a_reply_of_another_program_is_said_to_be_one(
    client: Any, script: Script, pieces: list[bytes]
) -> None:
    script.replies["GET /v1/models"] = Reply(pieces=pieces)

    with pytest.raises(ServerFault, match="did not reply as this software does"):
        client.list_models()


@pytest.mark.parametrize("kind", [Client, Awaited])
def test_a_refused_connection_names_the_endpoint_and_how_to_start_one(kind: type) -> None:
    endpoint = refused_endpoint()
    client = kind(endpoint)

    with pytest.raises(ConnectionFailed) as caught:
        client.list_models()

    client.close()
    assert endpoint in str(caught.value)
    assert "xinference-local" in str(caught.value)
    assert caught.value.status is None


@pytest.mark.parametrize("kind", [Client, Awaited])
def test_a_server_that_speaks_no_https_is_not_called_absent(
    server: tuple[Script, str], kind: type
) -> None:
    endpoint = server[1].replace("http://", "https://")
    client = kind(endpoint)

    with pytest.raises(ConnectionFailed, match=f"{endpoint} answers, but not in an HTTPS"):
        client.list_models()

    client.close()


def test_a_broken_connection_is_an_error_of_its_own(client: Any, script: Script) -> None:
    script.replies["GET /v1/models"] = Reply(pieces=[b'{"data"'], cut=True)

    with pytest.raises(ConnectionLost):
        client.list_models()


def test_silence_has_an_end(endpoint: str, script: Script) -> None:
    script.replies["GET /v1/models"] = Reply(hang=True)
    request = operations.Request(
        purpose="wait", method="GET", path="/v1/models", timeout_seconds=0.05
    )

    with Client(endpoint) as client, pytest.raises(ReplyTimeout, match="in time"):
        client.send(operations.Operation(request, lambda reply: reply))


def test_errors_travel_between_processes() -> None:
    error = NotFound("list", "gone", status=404, code="model_not_found")

    again = pickle.loads(pickle.dumps(error))

    assert (type(again), str(again), again.status, again.code) == (
        NotFound,
        str(error),
        404,
        "model_not_found",
    )


def test_a_model_that_chats_gets_a_handle_that_chats(client: Any, script: Script) -> None:
    script.replies["POST /v1/chat/completions"] = Reply(json={"choices": []})

    model = client.get_model("m")
    answer = model.chat(
        MESSAGES, generate_config={"max_tokens": 3, "request_id": "mine"}, enable_thinking=False
    )

    assert answer == {"choices": []}
    assert script.asked[-1].body == {
        "model": "m",
        "messages": MESSAGES,
        "max_tokens": 3,
        "request_id": "mine",
        "enable_thinking": False,
    }


def test_a_model_that_only_generates_cannot_be_asked_to_chat(client: Any, script: Script) -> None:
    script.replies |= {
        "GET /v1/models/m": Reply(json=CHAT_MODEL | {"model_ability": ["generate"]}),
        "POST /v1/completions": Reply(json={"choices": []}),
    }

    model = client.get_model("m")

    assert model.generate("Once", generate_config={"stop": ["."]}) == {"choices": []}
    assert script.asked[-1].body == {"model": "m", "prompt": "Once", "stop": ["."]}
    assert type(getattr(model, "handle", model)) in {GenerateModelHandle, AsyncGenerateModelHandle}


def test_a_closed_handle_leaves_the_client_open(client: Any, script: Script) -> None:
    script.replies |= {"POST /v1/chat/completions": Reply(json={"choices": []})}
    model = client.get_model("m")

    model.close()
    model.close()

    assert client.get_model("m").chat(MESSAGES) == {"choices": []}


def test_a_model_that_embeds_gets_a_handle_that_embeds(client: Any, script: Script) -> None:
    script.replies |= {
        "GET /v1/models/m": Reply(json={"model_type": "embedding", "model_ability": ["embed"]}),
        "POST /v1/embeddings": Reply(json={"data": []}),
    }

    answer = client.get_model("m").create_embedding(["a", "b"], dimensions=3)

    assert answer == {"data": []}
    assert script.asked[-1].body == {"model": "m", "input": ["a", "b"], "dimensions": 3}


def test_a_model_that_reranks_gets_a_handle_that_reranks(client: Any, script: Script) -> None:
    script.replies |= {
        "GET /v1/models/m": Reply(json={"model_type": "rerank", "model_ability": ["rerank"]}),
        "POST /v1/rerank": Reply(json={"results": []}),
    }

    answer = client.get_model("m").rerank(["a", "b"], "q", top_n=1, instruction="be strict")

    assert answer == {"results": []}
    assert script.asked[-1].body == {
        "model": "m",
        "documents": ["a", "b"],
        "query": "q",
        "top_n": 1,
        "instruction": "be strict",
    }


@pytest.mark.parametrize(
    "description", [{"model_type": "image"}, {"model_type": "LLM", "model_ability": ["embed"]}]
)
def test_a_model_without_a_handle_is_refused_by_its_type(
    client: Any, script: Script, description: dict[str, Any]
) -> None:
    script.replies["GET /v1/models/m"] = Reply(json=description)

    with pytest.raises(ClientError, match=description["model_type"]):
        client.get_model("m")


def test_a_stream_gives_the_chunks_and_reuses_its_connection(client: Any, script: Script) -> None:
    script.replies["POST /v1/chat/completions"] = Reply(
        pieces=[events(STARTED), events(FINISHED), events("[DONE]")]
    )

    chunks = list(client.get_model("m").chat(MESSAGES, generate_config={"stream": True}))
    client.get_model("m")

    assert chunks == [STARTED, FINISHED]


def test_a_refused_stream_is_an_error_before_the_first_chunk(client: Any, script: Script) -> None:
    script.replies["POST /v1/chat/completions"] = Reply(status=429, json={"detail": "full"})

    with pytest.raises(Unavailable, match="full"):
        client.get_model("m").chat(MESSAGES, generate_config={"stream": True})


def test_a_stream_that_breaks_off_is_an_error(client: Any, script: Script) -> None:
    script.replies["POST /v1/chat/completions"] = [
        Reply(pieces=[events(STARTED)]),
        Reply(pieces=[events(STARTED)], cut=True),
    ]
    model = client.get_model("m")

    with pytest.raises(StreamFailed, match="before it was whole"):
        list(model.chat(MESSAGES, generate_config={"stream": True}))
    with pytest.raises(ConnectionLost):
        list(model.chat(MESSAGES, generate_config={"stream": True}))


@pytest.mark.parametrize("leave", ["close", "with", "drop", "break"])
def test_leaving_a_stream_early_closes_its_connection(
    endpoint: str, script: Script, leave: str
) -> None:
    script.replies["POST /v1/chat/completions"] = Reply(pieces=[events(STARTED)], hang=True)

    with Client(endpoint) as client:
        stream = client.get_model("m").chat(MESSAGES, generate_config={"stream": True})  # type: ignore[attr-defined]
        if leave == "with":
            with stream:
                next(stream)
        elif leave == "break":
            for _ in stream:
                break
        elif leave == "close":
            stream.close()
        if leave in {"drop", "break"}:
            del stream
            gc.collect()

        assert script.has_left.wait(DEADLINE_SECONDS)


@pytest.mark.parametrize("leave", ["aclose", "with", "cancel"])
def test_leaving_an_awaited_stream_early_closes_its_connection(
    endpoint: str, script: Script, leave: str
) -> None:
    script.replies["POST /v1/chat/completions"] = Reply(pieces=[events(STARTED)], hang=True)

    async def talk() -> None:
        async with AsyncClient(endpoint) as client:
            model: Any = await client.get_model("m")
            stream = await model.chat(MESSAGES, generate_config={"stream": True})
            if leave == "with":
                async with stream:
                    await anext(stream)
            elif leave == "aclose":
                await stream.aclose()
            else:

                async def read() -> list[Any]:
                    return [chunk async for chunk in stream]

                reading = asyncio.create_task(read())
                await asyncio.to_thread(script.has_asked.wait, DEADLINE_SECONDS)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            assert await asyncio.to_thread(script.has_left.wait, DEADLINE_SECONDS)

    asyncio.run(talk())


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    endpoint: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", refused_endpoint())
    script.replies["GET /v1/models"] = Reply(json={"data": []})

    with Client(endpoint) as client:
        assert client.list_models() == {}
