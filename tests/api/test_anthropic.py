# SPDX-License-Identifier: Apache-2.0
"""The Messages API: what it asks of the model, how it answers, streamed and whole the same."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from anthropic import APIStatusError, AsyncAnthropic, beta_async_tool
from anthropic.types import Message as AnthropicMessage
from anthropic.types import message_count_tokens_params, message_create_params

from tests.fakes.cluster import FakeCluster, question_of
from xinference.api.anthropic.schema import CountTokensRequest, MessagesRequest
from xinference.api.app import create_app
from xinference.errors import InvalidRequest
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    GenerationRequest,
    GrammarKind,
    Message,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
)

from .conftest import ANSWER, MESSAGES, serving
from .test_parameters import PAGE, passing, refused, shown

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"name": "get_weather", "description": "Weather.", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "call_a", "name": "get_weather", "input": {"city": "Paris"}}

STORY: list[str | Delta] = [
    ReasoningDelta(text="I must "),
    TextDelta(text=""),
    ReasoningDelta(text="look."),
    "Let me ",
    "look.",
    ToolCallStart(index=0, call_id="call_a", name="get_weather"),
    TextDelta(text="", token_ids=(7,)),
    ToolCallArguments(index=0, text='{"city": '),
    ToolCallArguments(index=0, text='"Paris"}'),
    ToolCallStart(index=1, call_id="call_b", name="get_weather"),
    "Done.",
]
CONTENT: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "I must look.", "signature": ""},
    {"type": "text", "text": "Let me look."},
    USE,
    {"type": "tool_use", "id": "call_b", "name": "get_weather", "input": {}},
    {"type": "text", "text": "Done."},
]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "guide", "max_tokens": 100, "messages": MESSAGES, **fields}


def turn(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


async def asked(http: httpx.AsyncClient, cluster: FakeCluster, **fields: Any) -> ChatPrompt:
    """Return what the model was asked."""
    answer = await http.post(PATH, json=body(**fields))
    assert answer.status_code == 200, answer.text
    prompt = cluster.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def refusal(http: httpx.AsyncClient, path: str = PATH, **fields: Any) -> str:
    """Return why a body is refused."""
    answer = await http.post(path, json=body(**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    message: str = answer.json()["error"]["message"]
    return message


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[AsyncAnthropic]:
    """Anthropic's client at a real server."""
    async with serving(create_app(cluster)) as port:
        url = f"http://127.0.0.1:{port}"
        async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            yield client


# What comes back.


async def test_a_message_is_answered_in_anthropics_form(http: httpx.AsyncClient) -> None:
    answer = await http.post(PATH, json=body(), headers={"anthropic-version": "2023-06-01"})

    assert answer.status_code == 200
    assert answer.json() == {
        "id": f"msg_{answer.headers['x-request-id']}",
        "type": "message",
        "role": "assistant",
        "model": "guide",
        "content": [{"type": "text", "text": ANSWER}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 6,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_the_path_that_xinference_has_answers_and_refuses_in_anthropics_form(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.post(f"/anthropic{PATH}", json=body())
    count = await http.post(
        f"/anthropic{PATH}/count_tokens", json={k: body()[k] for k in ("model", "messages")}
    )
    refused = await http.post(f"/anthropic{PATH}", json={**body(), "model": "nobody"})

    assert answer.json()["content"] == [{"type": "text", "text": ANSWER}]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert count.json() == {"input_tokens": 5}
    assert refused.json()["error"]["type"] == "not_found_error"


async def test_a_stream_is_the_events_that_anthropic_documents(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda request: iter(STORY)

    answer = await http.post(PATH, json=body(stream=True))

    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\ndata: ")
        events.append(json.loads(data))
        assert name == f"event: {events[-1]['type']}"
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [event for event in events if event["type"].startswith("content_block")]
    for index in range(len(CONTENT)):
        kinds = [event["type"] for event in blocks if event["index"] == index]
        assert kinds[0] == "content_block_start"
        assert kinds[-1] == "content_block_stop"
        assert set(kinds[1:-1]) <= {"content_block_delta"}
    assert [event["index"] for event in blocks] == sorted(event["index"] for event in blocks)
    assert events[0]["message"]["usage"]["input_tokens"] == 5


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (None, {}),
        (None, {"max_tokens": 3}),
        (None, {"stop_sequences": ["a replica", "never"]}),
        (STORY, {}),
        (STORY, {"max_tokens": 8}),
        (STORY, {"max_tokens": 2}),
        ([], {}),
        (["é☃𝄞", "\u2028\r\n\n"], {}),
    ],
    ids=["text", "cut", "stop", "story", "cut in a call", "cut in a thought", "empty", "unicode"],
)
async def test_a_stream_and_a_whole_answer_say_the_same(
    client: AsyncAnthropic,
    cluster: FakeCluster,
    words: list[str | Delta] | None,
    fields: dict[str, Any],
) -> None:
    if words is not None:
        cluster.words = lambda request: iter(words)

    whole = await client.messages.create(**body(**fields))
    async with client.messages.stream(**body(**fields)) as stream:
        streamed = await stream.get_final_message()

    assert isinstance(whole, AnthropicMessage)
    kept = {"content", "stop_reason", "stop_sequence", "usage", "role", "model"}
    assert _plain(whole, kept) == _plain(streamed, kept)


def _plain(message: Any, kept: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = message.model_dump(include=kept, exclude_none=True)
    for block in found["content"]:
        block.pop("parsed_output", None)
    return found


async def test_the_content_is_the_blocks_in_their_order(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda request: iter(STORY)

    answer = (await http.post(PATH, json=body())).json()

    assert answer["content"] == CONTENT
    assert answer["stop_reason"] == "tool_use"


async def test_a_call_that_is_cut_is_told_as_far_as_it_goes(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda request: iter(STORY[5:8])

    answer = (await http.post(PATH, json=body(max_tokens=3))).json()

    assert answer["content"] == [USE | {"input": {}}]
    assert answer["stop_reason"] == "max_tokens"


async def test_the_stop_sequence_that_came_up_is_told(http: httpx.AsyncClient) -> None:
    answer = (await http.post(PATH, json=body(stop_sequences=["never", "replica"]))).json()

    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "replica")
    assert answer["content"][0]["text"] == "You said: What is a "


async def test_a_silent_stream_pings(cluster: FakeCluster) -> None:
    cluster.allow(1)
    async with (
        serving(create_app(cluster, keep_alive_seconds=0.05)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        http.stream("POST", PATH, json=body(stream=True)) as answer,
    ):
        lines = []
        async for line in answer.aiter_lines():
            lines.append(line)
            if lines.count("event: ping") == 2:
                cluster.allow(None)

    assert "event: message_stop" in lines


async def test_a_prompt_is_counted_and_not_answered(
    client: AsyncAnthropic, cluster: FakeCluster
) -> None:
    count = await client.messages.count_tokens(model="guide", messages=MESSAGES, system="Be brief.")  # type: ignore[arg-type]

    assert count.input_tokens == 5 + 3
    assert cluster.num_steps == 0
    assert cluster.aborted == []


# What the model is asked.


async def test_every_sampling_parameter_reaches_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await asked(
        http,
        cluster,
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        top_k=3,
        stop_sequences=["x"],
        metadata={"user_id": "someone"},
    )

    assert cluster.requests[-1].sampling == SamplingParams(
        max_tokens=9, temperature=0.0, top_p=0.5, top_k=3, stop=("x",)
    )
    assert cluster.requests[-1].fairness_key == "someone"


async def test_an_output_format_holds_the_answer_to_its_schema(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await asked(http, cluster, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})

    grammar = cluster.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(grammar.text) == SCHEMA
    assert grammar.field == "output_config.format.schema"


@pytest.mark.parametrize("system", ["Be brief.", [text("Be "), text("brief.")]])
async def test_the_system_speaks_first(
    http: httpx.AsyncClient, cluster: FakeCluster, system: Any
) -> None:
    prompt = await asked(http, cluster, system=system)

    assert prompt.messages[0] == Message(role="system", content="Be brief.")
    assert len(prompt.messages) == 2


async def test_a_conversation_with_thoughts_calls_and_results_is_passed_on(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "abc"}
    other = USE | {"id": "call_b", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "call_a", "content": [text("20"), text("°C")]}
    failed = {"type": "tool_result", "tool_use_id": "call_b", "content": "none", "is_error": True}

    prompt = await asked(
        http,
        cluster,
        tools=[TOOL],
        messages=[
            *MESSAGES,
            turn("assistant", thought, text("Let me look."), USE, other),
            turn("user", result, failed, text("So?")),
        ],
    )

    assert prompt.messages[1:] == (
        Message(
            role="assistant",
            content="Let me look.",
            reasoning_content="Hm.",
            tool_calls=(
                ToolCall(call_id="call_a", name="get_weather", arguments='{"city":"Paris"}'),
                ToolCall(call_id="call_b", name="get_weather", arguments="{}"),
            ),
        ),
        Message(role="tool", content="20°C", tool_call_id="call_a", name="get_weather"),
        Message(role="tool", content="Error: none", tool_call_id="call_b", name="get_weather"),
        Message(role="user", content="So?"),
    )
    assert prompt.tools == (
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA},
        },
    )


async def test_neighbours_of_one_role_are_one_turn(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    thought = {"type": "thinking", "thinking": "Hm."}
    prompt = await asked(
        http,
        cluster,
        tools=[TOOL],
        messages=[
            {"role": "user", "content": "a"},
            turn("user", text("b"), text("c")),
            turn("assistant", thought, text("d")),
            turn("assistant", USE),
            turn("user", {"type": "tool_result", "tool_use_id": "call_a"}),
            {"role": "user", "content": "e"},
        ],
    )

    assert [(one.role, one.content) for one in prompt.messages] == [
        ("user", "a\n\nbc"),
        ("assistant", "d"),
        ("tool", ""),
        ("user", "e"),
    ]
    assert prompt.messages[1].reasoning_content == "Hm."
    assert len(prompt.messages[1].tool_calls) == 1


async def test_a_system_turn_may_stand_between_others(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    prompt = await asked(
        http, cluster, messages=[*MESSAGES, {"role": "system", "content": "Now be brief."}]
    )

    assert prompt.messages[-1] == Message(role="system", content="Now be brief.")


async def test_an_answer_can_be_sent_back_as_it_came(
    client: AsyncAnthropic, cluster: FakeCluster
) -> None:
    cluster.words = lambda request: iter(STORY)
    first = await client.messages.create(**body(tools=[TOOL]))
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "20 °C"}
        for block in first.content
        if block.type == "tool_use"
    ]
    turns = [*MESSAGES, {"role": "assistant", "content": first.content}]

    await client.messages.create(
        **body(messages=[*turns, {"role": "user", "content": results}], tools=[TOOL])
    )

    prompt = cluster.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [one.role for one in prompt.messages] == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize(
    ("given", "choice", "name", "parallel"),
    [
        (None, ToolChoice.AUTO, None, True),
        ({"type": "auto"}, ToolChoice.AUTO, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice.AUTO, None, False),
        ({"type": "none"}, ToolChoice.NONE, None, True),
        ({"type": "any"}, ToolChoice.REQUIRED, None, True),
        ({"type": "tool", "name": "get_weather"}, ToolChoice.REQUIRED, "get_weather", True),
    ],
)
async def test_the_choice_of_tools_is_passed_on(
    http: httpx.AsyncClient,
    cluster: FakeCluster,
    given: Any,
    choice: ToolChoice,
    name: str | None,
    parallel: bool,
) -> None:
    prompt = await asked(http, cluster, tools=[TOOL], tool_choice=given)

    assert (prompt.tool_choice, prompt.tool_name) == (choice, name)
    assert prompt.parallel_tool_calls is parallel


@pytest.mark.parametrize(
    ("given", "enable", "budget"),
    [
        (None, None, None),
        ({"type": "disabled"}, False, None),
        ({"type": "adaptive"}, None, None),
        ({"type": "enabled", "budget_tokens": 1024}, True, 1024),
    ],
)
async def test_thinking_is_passed_on(
    http: httpx.AsyncClient,
    cluster: FakeCluster,
    given: Any,
    enable: bool | None,
    budget: int | None,
) -> None:
    prompt = await asked(http, cluster, thinking=given)

    assert (prompt.enable_thinking, prompt.thinking_budget) == (enable, budget)


async def test_strict_tools_are_passed_on(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    prompt = await asked(http, cluster, tools=[{**TOOL, "strict": True}])

    assert prompt.tools[0]["function"]["strict"] is True


async def test_the_effort_is_passed_on(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    prompt = await asked(http, cluster, output_config={"effort": "low"})

    assert prompt.reasoning_effort == "low"


async def test_hints_for_caching_are_taken(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    hint = {"cache_control": {"type": "ephemeral"}}

    await asked(
        http,
        cluster,
        system=[text("Be brief.") | hint],
        messages=[turn("user", text("Hi") | hint)],
        tools=[TOOL | hint],
        **hint,
    )


# What is refused.


RESULT = {"type": "tool_result", "tool_use_id": "nobody's"}
DEEP = json.loads('{"a":' * 70 + "1" + "}" * 70)


@pytest.mark.parametrize(
    ("role", "blocks", "problem"),
    [
        ("user", [{"type": "image", "source": {}}], "[0].type: must be one of 'text', "),
        ("user", [{"type": "document"}], "[0].type: must be one of 'text', "),
        ("user", [{"text": "x"}], "[0].type: is required"),
        ("user", ["x"], "[0]: must be an object"),
        ("user", [], ": must have more items"),
        ("user", [USE], "[0].type: must be one of text, tool_result in a turn of the role user"),
        ("assistant", [RESULT], "[0].type: must be one of text, thinking, tool_use in a turn of"),
        ("system", [USE], "[0].type: must be one of text in a turn of the role system"),
        ("user", [text("x"), RESULT], "[1]: results come before a turn's text"),
        ("user", [RESULT], "[0].tool_use_id: is the id of no tool_use of an earlier turn"),
        ("assistant", [USE | {"input": DEEP}], "[0].input: must be at most 64 levels deep"),
    ],
)
async def test_a_block_that_cannot_be_read_is_refused_by_its_place(
    http: httpx.AsyncClient, role: str, blocks: list[Any], problem: str
) -> None:
    message = await refusal(http, messages=[{"role": role, "content": blocks}, *MESSAGES])

    assert message.startswith(f"messages[0].content{problem}")


async def test_a_block_of_another_kind_is_named(http: httpx.AsyncClient) -> None:
    assert 'got "image"' in await refusal(http, messages=[turn("user", {"type": "image"})])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": [{"role": "assistant", "content": "It is"}]}, "messages: must not end with"),
        ({"messages": []}, "messages: must have more items"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages[0].role: must be"),
        ({"system": [{"type": "image"}]}, "system[0].type: must be 'text'"),
        ({"system": [{"type": "image", "source": {}}]}, "system[0].type: must be 'text'"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": None}, "max_tokens: "),
        ({"temperature": 2.5}, "temperature: "),
        ({"top_p": -0.1}, "top_p: "),
        ({"stop_sequences": [""]}, "stop_sequences: must be a list of up to 16 texts"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: "),
        ({"tools": [{"type": "bash_20250124", "max_uses": 1}]}, "tools[0].type: must be 'custom'"),
        ({"tools": [TOOL, TOOL]}, "tools: must have a name each"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name: goes with"),
        ({"tool_choice": {"type": "auto", "name": "x"}}, "tool_choice.name: goes with"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: 'x' is none of"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: must be"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: goes with"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 1024}}, "thinking.budget_tokens: goes"),
        ({"output_config": {"effort": "none"}}, "output_config.effort: must be"),
        ({"container": "x"}, "container: is not supported"),
        ({"mcp_servers": [{}]}, "mcp_servers: is not supported"),
        ({"tempreature": 1}, "tempreature: is not a field of this request; did you mean temp"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any], problem: str
) -> None:
    assert (await refusal(http, **fields)).startswith(problem)
    assert cluster.requests == []


async def test_what_the_model_refuses_is_named_in_anthropics_words(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.failure = InvalidRequest(field="enable_thinking", problem="this model cannot think")

    for path, given in ((PATH, body()), (COUNT, {"model": "guide", "messages": MESSAGES})):
        answer = await http.post(path, json=given)
        assert answer.json()["error"]["message"] == "thinking.type: this model cannot think"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("told", "status", "kind"),
    [("missing", 404, "not_found_error"), ("full", 429, "rate_limit_error")],
)
async def test_refusals_have_anthropics_shape_and_status(
    http: httpx.AsyncClient,
    cluster: FakeCluster,
    stream: bool,
    told: str,
    status: int,
    kind: str,
) -> None:
    cluster.queue_is_full = told == "full"
    model = "nobody" if told == "missing" else "guide"

    answer = await http.post(
        PATH, json=body(stream=stream, model=model), headers={"X-Request-Id": "mine"}
    )

    assert answer.status_code == status
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == kind
    assert answer.json()["request_id"] == "mine"
    assert (answer.headers.get("retry-after") == "7") is (told == "full")


async def test_anthropics_tool_runner_does_without_the_thread_that_is_refused(
    client: AsyncAnthropic, cluster: FakeCluster
) -> None:
    @beta_async_tool
    async def get_weather(city: str) -> str:
        """Say what the weather is in a city."""
        return f"20 °C in {city}"

    def words(request: GenerationRequest) -> list[str | Delta]:
        said = question_of(request)
        if said.startswith("20"):
            return [f"It is {said}."]
        start = ToolCallStart(index=0, call_id="call_a", name="get_weather")
        return [start, ToolCallArguments(index=0, text='{"city":"Rome"}')]

    cluster.words = words
    runner = client.beta.messages.tool_runner(**body(), tools=[get_weather])

    last = await runner.until_done()

    assert [block.text for block in last.content if block.type == "text"] == [
        "It is 20 °C in Rome."
    ]
    assert len(cluster.requests) == 2


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(
    http: httpx.AsyncClient,
) -> None:
    message = await refusal(http, max_tokens=5000)

    assert "1024" in message
    assert "5000" in message


async def test_a_stream_that_fails_ends_in_an_error_that_anthropics_client_raises(
    client: AsyncAnthropic, cluster: FakeCluster
) -> None:
    cluster.allow(2)

    async def read() -> None:
        async with client.messages.stream(**body()) as stream:
            async for _ in stream.text_stream:
                cluster.lose_replica("guide")

    with pytest.raises(APIStatusError, match="overloaded_error") as raised:
        await read()
    assert raised.value.body["error"]["message"].startswith("The process of model guide is gone")  # type: ignore[index]


def test_the_page_says_which_values_pass() -> None:
    page = PAGE.with_name("anthropic.md").read_text()

    assert passing(page, None) == shown(refused(MessagesRequest))


def test_the_page_names_every_honoured_field() -> None:
    page = PAGE.with_name("anthropic.md").read_text()
    honoured = MessagesRequest.model_fields.keys() - refused(MessagesRequest).keys()

    assert all(f"| `{name}`" in page or f", `{name}`" in page for name in honoured)


def test_every_parameter_of_anthropics_api_is_known() -> None:
    of_header = {"workspace_id"}
    create = message_create_params.MessageCreateParamsBase.__annotations__.keys() - of_header
    count = message_count_tokens_params.MessageCountTokensParams.__annotations__.keys() - of_header

    assert create | {"stream"} <= MessagesRequest.model_fields.keys()
    assert count <= CountTokensRequest.model_fields.keys()
