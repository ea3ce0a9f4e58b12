# SPDX-License-Identifier: Apache-2.0
"""Every parameter is honoured or refused by name; `doc/api.md` says which."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from tests.fakes.cluster import FakeCluster
from xinference.api.admin.schema import LaunchRequest
from xinference.api.fields import Body, Only
from xinference.api.openai.responses.schema import ResponseRequest
from xinference.api.openai.schema import ChatMessage, ChatRequest, CompletionRequest

from .conftest import chat, completion

PAGE = Path(__file__).parents[2] / "doc" / "api.md"

STORED = {"store", "metadata", "prompt_cache_key"}
"""What shows in what is kept: see `test_stored_chats.py`."""

CHANGED: dict[str, Any] = {
    "model": "guide",
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Hi",
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "stop": ["replica"],
    "stop_token_ids": [3],
    "seed": 5,
    "stream": True,
    "stream_options": {"include_usage": True},
    "request_id": "mine",
    "chat_template_kwargs": {"a": 1},
    "user": "someone",
    "safety_identifier": "someone",
    "priority": -1,
    "service_tier": "flex",
    "cache_salt": "mine",
    "enable_thinking": False,
    "thinking_budget": 5,
    "thinking_token_budget": 5,
    "reasoning_effort": "low",
    "extra_body": {"guided_regex": "a+"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_object"},
    "guided_json": {"type": "integer"},
    "guided_json_object": True,
    "guided_regex": "a+",
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'start: "a"',
    "n": 2,
    "best_of": 2,
    "min_p": 0.1,
    "typical_p": 0.5,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"3": -1},
    "bad_words": ["replica"],
    "min_tokens": 1,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "echo": True,
    "logprobs": True,
    "top_logprobs": 2,
}
"""A value of each honoured field that changes what the caller gets or the model is asked."""


def refused(schema: type[Body]) -> dict[str, Only]:
    """Return the fields that are marked, with their marks."""
    return {
        name: mark
        for name, field in schema.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Only)
    }


ROUTES = {
    "/v1/chat/completions": (ChatRequest, chat),
    "/v1/completions": (CompletionRequest, completion),
}
MARKED = [(route, name) for route, (schema, _) in ROUTES.items() for name in refused(schema)]
HONOURED = [
    (route, name)
    for route, (schema, _) in ROUTES.items()
    for name in schema.model_fields.keys() - refused(schema).keys() - STORED
]


def test_every_parameter_of_openais_apis_is_known() -> None:
    of_chat = chat_create_params.CompletionCreateParamsBase.__annotations__
    of_completion = completion_create_params.CompletionCreateParamsBase.__annotations__

    assert of_chat.keys() <= ChatRequest.model_fields.keys()
    assert of_completion.keys() <= CompletionRequest.model_fields.keys()


@pytest.mark.parametrize(("route", "name"), MARKED)
@pytest.mark.parametrize("given", [7, "x", {"a": 1}, [1]])
async def test_what_is_not_honoured_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, route: str, name: str, given: Any
) -> None:
    answer = await http.post(route, json=ROUTES[route][1](**{name: given}))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["detail"].startswith(f"{name}: is not supported")
    assert cluster.requests == []


@pytest.mark.parametrize(("route", "name"), MARKED)
async def test_the_values_that_ask_for_nothing_pass(
    http: httpx.AsyncClient, route: str, name: str
) -> None:
    schema, body = ROUTES[route]

    for neutral in (None, *refused(schema)[name].neutral):
        answer = await http.post(route, json=body(**{name: neutral}))
        assert answer.status_code == 200, (neutral, answer.text)


@pytest.mark.parametrize(("route", "name"), sorted(HONOURED))
async def test_what_is_honoured_changes_something(
    http: httpx.AsyncClient, cluster: FakeCluster, route: str, name: str
) -> None:
    schema, body = ROUTES[route]
    around = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}.get(name, {})
    changed_value = 2 if (schema, name) == (CompletionRequest, "logprobs") else CHANGED[name]

    plain = await http.post(
        route, json=body(**around, **({} if name == "request_id" else {"request_id": "r"}))
    )
    changed = await http.post(
        route, json=body(**({"request_id": "r"} | around | {name: changed_value}))
    )

    assert plain.status_code == changed.status_code == 200
    first, second = cluster.requests
    assert (first, plain.text) != (second, changed.text) or name == "model"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temprature": 1}, "temprature"),
        ({"messages": [{"role": "user", "content": "x", "contents": 1}]}, "messages[0].contents"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ],
)
async def test_an_unknown_field_is_named_with_the_nearest_one(
    http: httpx.AsyncClient, given: dict[str, Any], named: str
) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(**given))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == named
    assert "did you mean" in answer.json()["detail"]


async def test_null_asks_for_nothing_of_a_field_that_is_not_known_either(
    http: httpx.AsyncClient,
) -> None:
    # As clients send it that are newer than this server, or dump what they know of a turn.
    turn = {"role": "user", "content": "x", "images": None}

    for path in ("/v1/chat/completions", "/v1/messages"):
        body = {"model": "guide", "max_tokens": 5, "novelty": None, "messages": [turn]}
        assert (await http.post(path, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"min_p": 1.1}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {"three": 1}}, "logit_bias"),
        ({"logit_bias": [[3, 1]]}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": "x"}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**64)}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "a\n"}, "request_id"),
        ({"request_id": "a" * 129}, "request_id"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": "m" * 300}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]},
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
            "messages[0].reasoning_content",
        ),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
            "tools[0].function.strict",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "f"}}],
                    },
                }
            },
            "tool_choice",
        ),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        (
            {"enable_thinking": True, "extra_body": {"enable_thinking": False}},
            "extra_body.enable_thinking",
        ),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": 5, "thinking_token_budget": 6}, "thinking_token_budget"),
        (
            {"thinking_budget": 5, "extra_body": {"thinking_budget": 6}},
            "extra_body.thinking_budget",
        ),
        (
            {"chat_template_kwargs": {"thinking_budget": "short"}},
            "chat_template_kwargs.thinking_budget",
        ),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"extra_body": {"n": 2}}, "extra_body.n"),
        ({"messages": [{"role": "user", "content": "x", "name": ""}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"user": 3}, "user"),
    ],
)
async def test_a_bad_value_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, given: dict[str, Any], named: str
) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(**given))

    body = answer.json()
    assert answer.status_code == 400
    assert body["error"]["param"] == named
    assert body["error"]["type"] == "invalid_request_error"
    assert body["detail"] == body["error"]["message"]
    assert cluster.requests == []


def section_of_page(heading: str) -> str:
    """Return what stands under a heading of the page."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in sections if part.startswith(heading + "\n")]
    return text


def passing(text: str, where: str | None) -> dict[str, str]:
    """Return, per field of the tables that have a column "passes", what stands in it."""
    found: dict[str, str] = {}
    for table in re.findall(r"^\| field \|.*passes \|\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        for line in table.splitlines()[1:]:
            names, *among, values = [cell.strip() for cell in line.strip("|").split("|")]
            if among in ([[where], ["both"]] if where else [[]]):
                found |= dict.fromkeys(re.findall(r"`(\w+)`", names), values.replace("`", ""))
    return found


def shown(marks: dict[str, Only]) -> dict[str, str]:
    return {
        name: " ".join(json.dumps(value) for value in mark.neutral) for name, mark in marks.items()
    }


def test_the_page_says_which_values_pass() -> None:
    text = section_of_page("Chat completions and completions")
    launch = section_of_page("Launching a model")
    message = {name: value for name, value in passing(text, None).items() if value != "as above"}

    assert passing(text, "chat") == shown(refused(ChatRequest))
    assert passing(text, "completions") == shown(refused(CompletionRequest))
    assert message == shown(refused(ChatMessage))
    assert passing(section_of_page("Responses"), None) == shown(refused(ResponseRequest))
    assert passing(launch, None) == shown(refused(LaunchRequest))


def fields_of_page(heading: str) -> set[str]:
    """Return the names in the first column of the tables under a heading of the page."""
    text = section_of_page(heading)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}


def test_the_page_lists_every_parameter_and_no_other() -> None:
    known = (
        ChatRequest.model_fields.keys()
        | CompletionRequest.model_fields.keys()
        | ChatMessage.model_fields.keys()
    )

    assert fields_of_page("Chat completions and completions") == known
    assert fields_of_page("Responses") == ResponseRequest.model_fields.keys()
    assert fields_of_page("Launching a model") == LaunchRequest.model_fields.keys()
