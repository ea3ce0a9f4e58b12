# SPDX-License-Identifier: Apache-2.0
"""The clients that people have: OpenAI's, and Xinference's published one."""

import asyncio
import json
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import openai
import pydantic
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.protocol.generation import ChatPrompt, Delta, ToolCallArguments, ToolCallStart

from .conftest import ANSWER, MESSAGES
from .test_registrations import FAMILY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from xinference_client import RESTfulClient

T = TypeVar("T")


async def with_openai(port: int, use: Callable[[openai.OpenAI], T]) -> T:
    """Use the blocking client in a thread; the server runs in this one."""

    def run() -> T:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        ) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def with_xinference(port: int, use: Callable[[RESTfulClient], T]) -> T:
    def run() -> T:
        client = RESTfulClient(f"http://127.0.0.1:{port}")
        try:
            return use(client)
        finally:
            client.close()

    return await asyncio.to_thread(run)


async def test_openais_client_chats_streamed_and_not(port: int) -> None:
    def use(client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(model="guide", messages=MESSAGES)
        chunks = list(
            client.chat.completions.create(
                model="guide",
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
            )
        )

        assert whole.choices[0].message.content == ANSWER
        assert whole.choices[0].finish_reason == "stop"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == ANSWER
        assert chunks[-1].usage == whole.usage

    await with_openai(port, use)


async def test_openais_client_completes_streamed_and_not(port: int) -> None:
    def use(client: openai.OpenAI) -> None:
        prompt = MESSAGES[0]["content"]
        whole = client.completions.create(model="guide", prompt=prompt, max_tokens=3)
        chunks = list(
            client.completions.create(model="guide", prompt=prompt, max_tokens=3, stream=True)
        )

        assert whole.choices[0].text == "You said: What "
        assert whole.choices[0].finish_reason == "length"
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "length"

    await with_openai(port, use)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
async def test_openais_client_sends_back_what_it_has_parsed(
    port: int, cluster: FakeCluster
) -> None:
    class City(pydantic.BaseModel):
        name: str

    def words(_: object) -> list[str | Delta]:
        arguments = '{"name":"Rome"}'
        start = ToolCallStart(index=0, call_id="call_a", name="City")
        return [arguments, start, ToolCallArguments(index=0, text=arguments)]

    cluster.words = words

    def use(client: openai.OpenAI) -> None:
        tools = [openai.pydantic_function_tool(City)]
        answer = client.chat.completions.parse(
            model="guide", messages=MESSAGES, tools=tools, response_format=City
        )
        turn = answer.choices[0].message
        result = {"role": "tool", "tool_call_id": "call_a", "content": "20 °C"}
        assert turn.parsed == City(name="Rome")
        client.chat.completions.create(model="guide", messages=[*MESSAGES, turn, result])  # type: ignore[list-item]

        response = client.responses.parse(
            model="guide", input="Where?", tools=tools, text_format=City
        )
        output = [item.model_dump() for item in response.output]
        client.responses.create(model="guide", input=output)  # type: ignore[arg-type]

    await with_openai(port, use)
    for request in cluster.requests[1::2]:
        assert isinstance(request.prompt, ChatPrompt)
        (turn,) = (one for one in request.prompt.messages if one.role == "assistant")
        assert turn.content == turn.tool_calls[0].arguments == '{"name":"Rome"}'


async def test_openais_async_client_chats_and_completes(port: int) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        chat = await client.chat.completions.create(model="guide", messages=MESSAGES)
        stream = await client.chat.completions.create(model="guide", messages=MESSAGES, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        completion = await client.completions.create(model="guide", prompt=MESSAGES[0]["content"])

    assert chat.choices[0].message.content == "".join(texts) == ANSWER
    assert completion.choices[0].text == ANSWER


async def test_openais_client_lists_and_finds_models(port: int) -> None:
    def use(client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["guide"]
        assert client.models.retrieve("guide").owned_by == "xinference"

    await with_openai(port, use)


async def test_openais_client_raises_its_own_errors(port: int, cluster: FakeCluster) -> None:
    def ask(client: openai.OpenAI, **fields: Any) -> Any:
        return client.chat.completions.create(**{"model": "guide", "messages": MESSAGES, **fields})

    def use(client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as unknown:
            ask(client, model="nope")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, n=0)
        assert refused.value.param == "n"
        cluster.queue_is_full = True
        with pytest.raises(openai.RateLimitError):
            ask(client, stream=True)

    await with_openai(port, use)


async def test_openais_client_raises_when_a_stream_fails(port: int, cluster: FakeCluster) -> None:
    def dies(request: object) -> Any:
        yield "Half "
        cluster.lose_replica("guide")
        yield "never"

    cluster.words = dies
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.chat.completions.create(model="guide", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="gone"):
            async for _ in stream:
                pass


async def test_openais_client_that_closes_a_stream_aborts_the_request(
    port: int, cluster: FakeCluster
) -> None:
    cluster.allow(2)
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model="guide", messages=MESSAGES, stream=True, extra_body={"request_id": "mine"}
        )
        await anext(aiter(stream))
        await stream.close()
        await cluster.wait_until(lambda: cluster.aborted)

    assert cluster.aborted == ["mine"]


async def test_xinferences_client_launches_chats_and_terminates(port: int) -> None:
    def use(client: RESTfulClient) -> None:
        uid = client.launch_model(
            model_name="xinference-guide",
            model_engine="transformers",
            model_size_in_billions=0.01,
            max_num_seqs=4,
        )
        assert set(client.list_models()) == {"guide", uid}
        model = client.get_model(uid)
        whole = model.chat(MESSAGES, generate_config={"max_tokens": 512, "request_id": "mine"})
        chunks = list(model.chat(MESSAGES, generate_config={"stream": True}))
        plain = model.generate("Hello", generate_config={"max_tokens": 2})

        assert whole["choices"][0]["message"]["content"] == ANSWER
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert plain["choices"][0]["text"] == "You said: "
        assert client.abort_request(uid, "mine") == {"msg": "NO_OP"}
        model.close()
        client.terminate_model(uid)
        assert set(client.list_models()) == {"guide"}

    await with_xinference(port, use)


async def test_xinferences_client_watches_and_cancels_a_launch(
    port: int, cluster: FakeCluster
) -> None:
    def use(client: RESTfulClient) -> None:
        uid = client.launch_model(
            model_name="xinference-guide", model_engine="transformers", wait_ready=False
        )
        assert client.get_launch_model_progress(uid)["stage"] == "loading"
        (instance,) = client.get_instance_info("xinference-guide", uid)
        assert instance["status"] == "LOADING"
        client.cancel_launch_model(uid)
        assert client.get_instance_info("xinference-guide", uid) == []

    cluster.holds_launches = True
    await with_xinference(port, use)


async def test_xinferences_client_uses_the_catalogue_and_the_cluster(port: int) -> None:
    def use(client: RESTfulClient) -> None:
        client.register_model("LLM", json.dumps(FAMILY), persist=False)
        assert client.get_model_registration("LLM", "mine")["context_length"] == 256
        names = [model["model_name"] for model in client.list_model_registrations("LLM")]
        assert names == ["mine", "xinference-guide"]
        assert "transformers" in client.query_engine_by_model_name("mine")
        client.unregister_model("LLM", "mine")
        assert client.get_workers_info()[0]["work-ip"]
        assert client.get_supervisor_info()
        assert client.abort_cluster() == {"result": True}

    await with_xinference(port, use)


async def test_xinferences_client_shows_our_reason(port: int) -> None:
    def use(client: RESTfulClient) -> None:
        with pytest.raises(RuntimeError, match="Model not found: nope"):
            client.describe_model("nope")
        with pytest.raises(RuntimeError, match="max_num_seq: is not an option"):
            client.launch_model(
                model_name="xinference-guide", model_engine="transformers", max_num_seq=1
            )

    await with_xinference(port, use)


async def test_xinferences_client_is_told_what_to_do_instead_of_what_is_not_here(
    port: int,
) -> None:
    def use(client: RESTfulClient) -> None:
        with pytest.raises(RuntimeError, match="another POST /v1/models"):
            client.reload_model("guide", {"max_num_seqs": 8})
        with pytest.raises(RuntimeError, match="comes back by itself"):
            client.relaunch_supervisor()
        with pytest.raises(RuntimeError, match="comes back by itself"):
            client.list_worker_relaunches()
        with pytest.raises(RuntimeError, match="images, sound and video are not served"):
            client.get_progress("drawing")

    await with_xinference(port, use)


@pytest.mark.parametrize(
    ("method", "path", "status", "instead"),
    [
        ("POST", "/v1/images/generations", 404, "images"),
        ("POST", "/v1/audio/speech", 404, "sound"),
        ("POST", "/v1/convert_ids_to_tokens", 404, "AutoTokenizer"),
        ("POST", "/v1/admin/users", 404, "/v1/admin/keys"),
        ("GET", "/v1/token_routers", 404, "token router"),
        ("POST", "/v1/models/recommend", 405, "fits=true"),
        ("POST", "/v1/models/update_type", 405, "/v1/model_registrations/"),
        ("GET", "/v1/downloads", 404, "/v1/cache/models"),
        ("GET", "/v1/nonsense", 404, "/docs lists"),
    ],
)
async def test_a_route_that_is_not_here_says_what_to_do_instead(
    http: httpx.AsyncClient, method: str, path: str, status: int, instead: str
) -> None:
    answer = await http.request(method, path, json={})

    assert answer.status_code == status
    assert instead in answer.json()["detail"]
