# SPDX-License-Identifier: Apache-2.0
"""The Responses API: whole and streamed, stored and gone on from, and refused by name."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import TypeAdapter

from tests.fakes.cluster import FakeCluster, endless
from xinference.api.app import create_app
from xinference.api.openai.responses.schema import InputTokensRequest, ResponseRequest
from xinference.api.store.answers import AnswerKind
from xinference.api.store.page import Page
from xinference.api.store.store import Store
from xinference.errors import ReplicaLost
from xinference.protocol.generation import (
    ChatPrompt,
    GrammarKind,
    Message,
    SamplingParams,
    ToolCall,
    ToolChoice,
)

from .conftest import ANSWER, serving
from .test_clients import with_openai
from .test_parameters import refused
from .test_tools import CALLS, SCHEMA, answers

RESPONSES = "/v1/responses"
QUESTION = "What is a replica?"
TOOL: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": SCHEMA}

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def asked(**fields: Any) -> dict[str, Any]:
    """Return a body."""
    return {"model": "guide", "input": QUESTION, **fields}


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, in the framing that OpenAI's streams have."""
    assert text.endswith("\n\n")
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def streamed(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await http.post(RESPONSES, json=asked(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


async def whole(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post(RESPONSES, json=asked(**fields))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """Return what two answers to one question must have in common."""
    own = ("id", "created_at", "completed_at", "store")
    kept = {name: value for name, value in response.items() if name not in own}
    kept["output"] = [item | {"id": ""} for item in response["output"]]
    return kept


async def test_a_text_is_answered_in_openais_form(http: httpx.AsyncClient) -> None:
    response = await whole(http)

    (item,) = response.pop("output")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}],
    }
    assert response.pop("id").startswith("resp_")
    assert response.pop("created_at") <= response.pop("completed_at")
    assert response == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "guide",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 6,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 11,
        },
        "user": None,
    }


async def test_a_stream_tells_of_each_item_from_added_to_done(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS

    events = await streamed(http, tools=[TOOL])

    kinds = [event["type"].removeprefix("response.") for event in events]
    item = ["output_item.added", "content_part.added"]
    ends = ["content_part.done", "output_item.done"]
    arguments = "function_call_arguments"
    assert kinds == [
        "created",
        "in_progress",
        *item,
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        *ends,
        *item,
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        *ends,
        "output_item.added",
        f"{arguments}.delta",
        f"{arguments}.delta",
        f"{arguments}.done",
        "output_item.done",
        "output_item.added",
        f"{arguments}.delta",
        f"{arguments}.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    thought, said, first, second = events[-1]["response"]["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "I must look."}]
    assert said["content"][0]["text"] == "Let me look."
    assert (first["call_id"], first["name"]) == ("call_a", "get_weather")
    assert (first["arguments"], second["arguments"]) == ('{"city": "Paris"}', "{}")
    for event in events:
        EVENT.validate_python(event)


def assembled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put items together of what the events say, and check that they agree with each other."""
    items: list[dict[str, Any]] = []
    for event in events:
        if "output_index" not in event:
            continue
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append({"text": "", "id": event["item"]["id"]})
        item = items[event["output_index"]]
        assert event["output_index"] == len(items) - 1
        assert event.get("item_id", item["id"]) == item["id"]
        if kind.endswith(".delta"):
            item["text"] += event["delta"]
        elif kind.endswith(("text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == item["text"]
        elif kind == "output_item.done":
            parts = event["item"].get("content", [{"text": event["item"].get("arguments")}])
            assert "".join(part["text"] for part in parts) == item["text"]
            items[-1] = event["item"]
    return items


@settings(max_examples=60, deadline=None)
@given(said=answers(), max_tokens=...)
def test_a_stream_and_a_whole_answer_say_the_same_whatever_it_is(
    said: list[Any], max_tokens: bool
) -> None:
    async def ask() -> None:
        cluster = await FakeCluster.running(words=lambda _: said)
        transport = httpx.ASGITransport(app=create_app(cluster))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            fields = {"tools": [TOOL], "max_output_tokens": 3 if max_tokens else None}
            one = await whole(http, **fields, store=False)
            *_, last = events = await streamed(http, **fields, store=False)
        assert without_ids(last["response"]) == without_ids(one)
        assert assembled(events) == last["response"]["output"]
        assert last["type"] == f"response.{one['status']}"

    asyncio.run(ask())


async def test_with_obfuscation_sizes_tell_nothing(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS

    events = await streamed(http, stream_options={"include_obfuscation": True})
    plain = await streamed(http)

    deltas = [event for event in events if "delta" in event]
    assert {len(event["delta"] + event["obfuscation"]) % 32 for event in deltas} == {0}
    assert all("obfuscation" not in event for event in plain)
    assert [event["delta"] for event in deltas] == [
        event["delta"] for event in plain if "delta" in event
    ]


async def test_a_prompt_is_counted_without_an_answer(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    first = await whole(http)
    body = {"model": "guide", "input": "And?", "previous_response_id": first["id"]}

    counted = await http.post(f"{RESPONSES}/input_tokens", json=body)
    answered = await whole(http, **body)
    wrong = await http.post(f"{RESPONSES}/input_tokens", json=body | {"personality": "friendly"})

    assert counted.json() == {
        "object": "response.input_tokens",
        "input_tokens": answered["usage"]["input_tokens"],
    }
    assert cluster.requests[1].count_only
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "personality")


async def test_an_answer_that_is_cut_short_is_incomplete(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    response = await whole(http, max_output_tokens=2)
    *_, last = await streamed(http, max_output_tokens=2)

    assert cluster.requests[0].sampling.max_tokens == 2
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert response["output"][0]["status"] == "incomplete"
    assert last["type"] == "response.incomplete"
    assert without_ids(last["response"]) == without_ids(response)


async def test_items_of_a_conversation_reach_the_model_as_messages(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await whole(
        http,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "In French."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "summary": [], "content": [reasoning("I must look.")]},
            {"type": "message", "role": "assistant", "content": "Let me look."},
            call("call_a"),
            call("call_b"),
            {"type": "function_call_output", "call_id": "call_a", "output": "12 °C"},
            {
                "type": "function_call_output",
                "call_id": "call_b",
                "output": [{"type": "input_text", "text": "?"}],
            },
            {"type": "reasoning", "summary": [], "content": [reasoning("Hm.")]},
            {"role": "user", "content": "And?"},
        ],
        tools=[TOOL],
        tool_choice={"type": "function", "name": "get_weather"},
        parallel_tool_calls=False,
        enable_thinking=True,
        reasoning={"effort": "high"},
    )

    calls = tuple(
        ToolCall(call_id=one, name="get_weather", arguments="{}") for one in ("call_a", "call_b")
    )
    assert cluster.requests[0].prompt == ChatPrompt(
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="system", content="In French."),
            Message(role="user", content="Weather?"),
            Message(
                role="assistant",
                content="Let me look.",
                reasoning_content="I must look.",
                tool_calls=calls,
            ),
            Message(role="tool", content="12 °C", tool_call_id="call_a", name="get_weather"),
            Message(role="tool", content="?", tool_call_id="call_b", name="get_weather"),
            Message(role="assistant", content="", reasoning_content="Hm."),
            Message(role="user", content="And?"),
        ),
        tools=({"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},),
        tool_choice=ToolChoice.REQUIRED,
        tool_name="get_weather",
        parallel_tool_calls=False,
        enable_thinking=True,
        reasoning_effort="high",
    )


async def test_allowed_and_strict_functions_reach_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    only = {"type": "function", "name": "get_weather"}
    await whole(
        http,
        tools=[{**TOOL, "strict": True}],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [only]},
    )

    prompt = cluster.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert (prompt.tool_choice, prompt.allowed_tools) == (ToolChoice.REQUIRED, ("get_weather",))
    assert prompt.tools[0]["function"]["strict"] is True


def reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def call(call_id: str) -> dict[str, Any]:
    about = {"name": "get_weather", "arguments": "{}"}
    return {"type": "function_call", "call_id": call_id, **about}


async def test_an_answer_may_be_sent_back_as_it_came(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS
    first = await whole(http, tools=[TOOL], store=False)
    sealed = await whole(http, tools=[TOOL], store=False, include=["reasoning.encrypted_content"])
    for item in sealed["output"]:
        if item["type"] == "reasoning":
            del item["content"]
    results = [
        {"type": "function_call_output", "call_id": one, "output": "?"}
        for one in ("call_a", "call_b")
    ]

    for answer in (first, sealed):
        begin = [{"role": "user", "content": QUESTION}]
        await whole(http, tools=[TOOL], input=[*begin, *answer["output"], *results])

    told, unsealed = (request.prompt for request in cluster.requests[-2:])
    assert isinstance(told, ChatPrompt)
    assert told == unsealed
    assert told.messages[1].reasoning_content == "I must look."
    assert [one.call_id for one in told.messages[1].tool_calls] == ["call_a", "call_b"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_goes_on_from_a_stored_one(
    http: httpx.AsyncClient, cluster: FakeCluster, stream: bool
) -> None:
    first = await whole(http, instructions="Be brief.")
    if stream:
        *_, last = await streamed(http, input="And?", previous_response_id=first["id"])
        second = last["response"]
    else:
        second = await whole(http, input="And?", previous_response_id=first["id"])
    await whole(http, input="Why?", previous_response_id=second["id"])

    prompt = cluster.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [(one.role, one.content) for one in prompt.messages] == [
        ("user", QUESTION),
        ("assistant", ANSWER),
        ("user", "And?"),
        ("assistant", "You said: And?"),
        ("user", "Why?"),
    ]
    assert second["previous_response_id"] == first["id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_stored_is_what_was_sent(http: httpx.AsyncClient, stream: bool) -> None:
    if stream:
        *_, last = await streamed(http, metadata={"k": "v"})
        sent = last["response"]
    else:
        sent = await whole(http, metadata={"k": "v"})

    stored = (await http.get(f"{RESPONSES}/{sent['id']}")).json()
    deleted = await http.delete(f"{RESPONSES}/{sent['id']}")
    gone = await http.get(f"{RESPONSES}/{sent['id']}")

    assert stored == sent
    assert stored["metadata"] == {"k": "v"}
    assert deleted.json() == {"id": sent["id"], "object": "response", "deleted": True}
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "object_not_found"


async def test_what_is_not_to_be_stored_is_not(http: httpx.AsyncClient) -> None:
    response = await whole(http, store=False)

    assert response["store"] is False
    assert (await http.get(f"{RESPONSES}/{response['id']}")).status_code == 404
    answer = await http.post(RESPONSES, json=asked(previous_response_id=response["id"]))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "previous_response_id"


async def test_nothing_goes_on_from_a_conversation_that_lost_a_turn(
    http: httpx.AsyncClient,
) -> None:
    first = await whole(http)
    second = await whole(http, previous_response_id=first["id"])
    await http.delete(f"{RESPONSES}/{first['id']}")

    answer = await http.post(RESPONSES, json=asked(previous_response_id=second["id"]))

    assert answer.status_code == 400
    assert first["id"] in answer.json()["detail"]


async def test_input_items_are_listed_a_page_at_a_time(http: httpx.AsyncClient) -> None:
    first = await whole(http)
    second = await whole(
        http,
        previous_response_id=first["id"],
        input=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    )
    items = f"{RESPONSES}/{second['id']}/input_items"

    listed = (await http.get(items, params={"order": "asc"})).json()
    page = (await http.get(items, params={"limit": 1})).json()
    rest = (await http.get(items, params={"after": page["last_id"]})).json()
    nowhere = await http.get(items, params={"after": "msg_0"})

    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == [QUESTION, ANSWER, "a", "b"]
    assert listed["has_more"] is False
    assert (page["has_more"], page["first_id"]) == (True, listed["data"][-1]["id"])
    assert rest["data"] == listed["data"][2::-1]
    assert nowhere.status_code == 404


async def test_a_stored_response_cannot_be_cancelled_or_streamed(http: httpx.AsyncClient) -> None:
    response = await whole(http)

    cancelled = await http.post(f"{RESPONSES}/{response['id']}/cancel")
    unknown = await http.post(f"{RESPONSES}/resp_0/cancel")
    replayed = await http.get(f"{RESPONSES}/{response['id']}", params={"stream": True})

    assert (cancelled.status_code, unknown.status_code, replayed.status_code) == (400, 404, 400)
    assert replayed.json()["error"]["param"] == "stream"


async def test_a_stream_that_fails_says_so_twice_and_raises_in_openais_client(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.allow(2)
    asking = asyncio.create_task(http.post(RESPONSES, json=asked(stream=True)))
    await cluster.wait_until(lambda: cluster.num_steps == 2)
    cluster.lose_replica("guide")
    *_, failed, error = events_of((await asking).text)

    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    assert failed["response"]["output"][0]["status"] == "incomplete"
    assert (error["type"], error["code"]) == ("error", ReplicaLost.code)
    assert error["error"]["message"] == error["message"]
    assert (await http.get(f"{RESPONSES}/{failed['response']['id']}")).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_aborts_the_request_and_stores_nothing(stream: bool, tmp_path: Path) -> None:
    cluster = await FakeCluster.running(words=endless)
    cluster.allow(3)
    async with serving(create_app(cluster, store=Store(tmp_path / "store.db"))) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            stayed = await whole(http, max_output_tokens=2)
        cluster.num_steps = 0
        body = json.dumps(asked(stream=stream, request_id="mine")).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {RESPONSES} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await cluster.wait_until(lambda: cluster.num_steps == 3)
        writer.transport.abort()
        await cluster.wait_until(lambda: cluster.aborted)
    store = Store(tmp_path / "store.db")  # the server has ended, so nothing more comes
    kept, _ = await store.answers.page(
        "", AnswerKind.RESPONSE, Page(limit=10), model=None, metadata={}
    )
    await store.aclose()

    assert cluster.aborted == ["mine"]
    assert [answer.id for answer in kept] == [stayed["id"]]


async def test_openais_client_makes_streams_and_retrieves(port: int, cluster: FakeCluster) -> None:
    cluster.words = lambda _: CALLS

    def use(client: openai.OpenAI) -> None:
        ask: Any = {"model": "guide", "input": QUESTION, "tools": [TOOL]}
        response = client.responses.create(**ask)
        with client.responses.stream(**ask) as stream:
            final = list(stream)[-1]
            assert final.type == "response.completed"
            streamed = stream.get_final_response()

        assert response.output_text == streamed.output_text == "Let me look."
        assert response.usage == streamed.usage
        stored = client.responses.retrieve(response.id)
        assert stored.output == response.output
        items = list(client.responses.input_items.list(response.id))
        assert [item.type for item in items] == ["message"]
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)

    await with_openai(port, use)


async def test_openais_client_raises_what_a_stream_says(port: int, cluster: FakeCluster) -> None:
    cluster.words = endless
    cluster.allow(2)

    def use(client: openai.OpenAI) -> None:
        stream = client.responses.create(model="guide", input=QUESTION, stream=True)
        events = iter(stream)
        for event in events:
            if event.type == "response.output_text.delta" and event.delta == "1 ":
                break
        loop.call_soon_threadsafe(cluster.lose_replica, "guide")
        with pytest.raises(openai.APIError, match="is gone"):
            list(events)

    loop = asyncio.get_running_loop()
    await with_openai(port, use)


# --- parameters

TEXT_FORMAT = {"type": "json_schema", "name": "answer", "schema": SCHEMA}

CHANGED: dict[str, Any] = {
    "input": "Hi",
    "instructions": "Be brief.",
    "store": False,
    "metadata": {"k": "v"},
    "max_output_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "seed": 5,
    "text": {"format": TEXT_FORMAT},
    "reasoning": {"effort": "low"},
    "tools": [TOOL],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "stream": True,
    "service_tier": "flex",
    "user": "someone",
    "request_id": "mine",
    "priority": -1,
    "cache_salt": "mine",
    "enable_thinking": False,
    "safety_identifier": "someone",
    "prompt_cache_key": "mine",
    "top_logprobs": 2,
}
"""A value of each honoured field that changes the request or the response."""
SHOWN_ELSEWHERE = {
    "model",
    "previous_response_id",  # test_a_response_goes_on_from_a_stored_one
    "include",  # test_an_answer_may_be_sent_back_as_it_came
    "stream_options",  # test_with_obfuscation_sizes_tell_nothing
}


def test_every_parameter_of_openais_api_is_known() -> None:
    assert ResponseCreateParamsBase.__annotations__.keys() <= ResponseRequest.model_fields.keys()
    assert InputTokenCountParams.__annotations__.keys() <= InputTokensRequest.model_fields.keys()


def test_every_parameter_is_tested() -> None:
    fields = ResponseRequest.model_fields.keys()

    assert fields == CHANGED.keys() | SHOWN_ELSEWHERE | refused(ResponseRequest).keys()


@pytest.mark.parametrize("name", sorted(CHANGED))
async def test_what_is_honoured_changes_something(
    http: httpx.AsyncClient, cluster: FakeCluster, name: str
) -> None:
    around: dict[str, Any] = {} if name == "request_id" else {"request_id": "r"}

    plain = await http.post(RESPONSES, json=asked(**around))
    changed = await http.post(RESPONSES, json=asked(**(around | {name: CHANGED[name]})))

    assert plain.status_code == changed.status_code == 200, changed.text
    first, second = cluster.requests
    if name == "stream":
        assert changed.headers["content-type"].startswith("text/event-stream")
    elif first == second:
        assert plain.json()[name] != changed.json()[name] == CHANGED[name]


@pytest.mark.parametrize("name", sorted(refused(ResponseRequest)))
async def test_what_is_not_honoured_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, name: str
) -> None:
    for value in (7, "x", {"a": 1}, [1]):
        answer = await http.post(RESPONSES, json=asked(**{name: value}))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
        assert answer.json()["detail"].startswith(f"{name}: is not supported")
    assert cluster.requests == []

    for neutral in (None, *refused(ResponseRequest)[name].neutral):
        answer = await http.post(RESPONSES, json=asked(**{name: neutral}))
        assert answer.status_code == 200, (neutral, answer.text)


async def test_a_format_holds_the_answer(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    await whole(http, text={"format": TEXT_FORMAT})
    await whole(http, text={"format": {"type": "json_object"}})
    await whole(http, text={"format": {"type": "text"}, "verbosity": "medium"})

    schema, any_object, none = (request.sampling.grammar for request in cluster.requests)
    assert schema is not None
    assert any_object is not None
    assert (schema.kind, json.loads(schema.text)) == (GrammarKind.JSON_SCHEMA, SCHEMA)
    assert json.loads(any_object.text) == {"type": "object"}
    assert none is None


async def test_a_tier_is_a_priority(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    tiers = {}
    for tier in ("auto", "default", "flex", "priority", "fast"):
        tiers[tier] = (await whole(http, service_tier=tier))["service_tier"]

    assert [request.priority for request in cluster.requests] == [0, 0, 1, -1, -1]
    assert tiers == {
        "auto": "default",
        "default": "default",
        "flex": "flex",
        "priority": "priority",
        "fast": "priority",
    }


async def test_sampling_parameters_reach_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await whole(http, max_output_tokens=9, temperature=0, top_p=0.5, top_k=4, seed=3)

    assert cluster.requests[0].sampling == SamplingParams(
        max_tokens=9, temperature=0, top_p=0.5, top_k=4, seed=3
    )


OUTPUT = {"type": "function_call_output", "call_id": "call_a", "output": "x"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x", "phase": "y"}]}, "input[0].phase"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [OUTPUT]}, "input[0].call_id"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "gAAAA-Bo_"}]},
            "input[0].encrypted_content",
        ),
        ({"instructions": 3}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "a lot"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"async": True}]}, "tools[0].async"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "f"}],
                }
            },
            "tool_choice",
        ),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(number): "v" for number in range(17)}}, "metadata"),
        ({"stream_options": {}}, "stream_options"),
        ({"service_tier": "ultrafast"}, "service_tier"),
        ({"service_tier": "flex", "priority": 3}, "priority"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"max_tokens": 3}, "max_tokens"),
    ],
)
async def test_a_bad_value_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, given: dict[str, Any], named: str
) -> None:
    answer = await http.post(RESPONSES, json=asked(**given))

    assert answer.status_code == 400, answer.text
    told = answer.json()["error"]["param"]
    assert told == named or told.startswith(named + "."), answer.text
    assert cluster.requests == []
