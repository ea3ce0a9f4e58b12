# SPDX-License-Identifier: Apache-2.0
"""Conversations in which the guide calls a tool: which tools there are, who asks, what comes back.

In: a seeded generator. Out: the text of a system turn with tools, as `chat_template.jinja` writes
it, and the turns of a question that one of them answers. The names of functions and values are
drawn anew, so that they have to be read from the prompt.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

JsonValue = str | int

_HEAD = "# Tools\n\nYou may call these functions, one JSON description a line:\n<tools>"
_TAIL = (
    "\n</tools>\n\nTo call one, answer with its name and arguments:\n<tool_call>\n"
    '{"name": NAME, "arguments": {}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tool:
    """A function: names it may have, what it is for, its parameters, and who asks for it."""

    names: tuple[str, ...]
    description: str
    parameters: Mapping[str, Sequence[JsonValue]]
    questions: tuple[str, ...]
    results: tuple[str, ...]


_CITIES = (
    "Oslo", "Paris", "Berlin", "Rome", "Lima", "Cairo", "Tokyo", "Madrid", "London", "Vienna",
    "Boston", "Delhi", "Moscow", "Sydney", "Lisbon", "Dublin", "Prague", "Athens", "Seattle",
    "Hamburg", "Chicago", "Munich", "Beijing", "Amsterdam", "Warsaw", "Zurich", "Geneva", "Lyon",
)  # fmt: skip
_NUMBERS = tuple(range(2, 100))
_WORDS = (
    "cheap flights", "red shoes", "tomato soup", "gpu prices", "jazz music", "the moon", "tea",
    "python books", "old maps", "good films", "solar panels", "train times", "blue paint", "cats",
    "garden chairs", "used bikes", "local news", "bread recipes", "warm coats", "chess rules",
)  # fmt: skip
_PEOPLE = (
    "Anna",
    "Ben",
    "Maria",
    "Tom",
    "Lisa",
    "Peter",
    "Kim",
    "Alex",
    "Sam",
    "Eva",
    "Paul",
    "Ida",
)
_UIDS = (
    "qwen3",
    "my-model",
    "chat",
    "llama-3",
    "test",
    "gemma",
    "bge-m3",
    "coder",
    "xinference-guide",
)

_UNSEEN: Mapping[str, Sequence[JsonValue]] = {
    "city": ("Bern", "Turin", "Kyoto", "Bergen", "Quito", "Sofia", "Riga", "Porto", "Nairobi"),
    "a": tuple(range(100, 200)),
    "b": tuple(range(100, 200)),
    "query": ("green hats", "cheap wine", "piano lessons", "snow tyres", "roman coins"),
    "name": ("Olga", "Hugo", "Nina", "Karl", "Zoe", "Ravi"),
    "uid": ("mistral-7b", "phi-3", "demo-2", "prod", "yi-34b"),
    "minutes": tuple(range(100, 200)),
}
"""Values for the examination, by parameter; training never draws them."""
_UNSEEN_PREFIX = "my_"
"""Before names of functions in the examination, likewise."""

_TOOLS = (
    _Tool(
        names=("get_weather", "weather", "get_current_weather", "forecast", "weather_of"),
        description="Weather of a city",
        parameters={"city": _CITIES},
        questions=("What is the weather in {city}?", "weather in {city}", "Is it cold in {city}?",
                   "How is the weather in {city} today?", "Does it rain in {city}?",
                   "Tell me the weather of {city}"),
        results=("rain, 8 degrees", "sunny", "snow", "cloudy and warm", "wind", "dry, 20 degrees"),
    ),
    _Tool(
        names=("get_time", "time_in", "local_time", "clock"),
        description="Local time of a city",
        parameters={"city": _CITIES},
        questions=("What time is it in {city}?", "How late is it in {city}?", "time in {city}",
                   "Tell me the local time of {city}"),
        results=("10:30", "23:05", "8 o'clock", "noon", "17:45"),
    ),
    _Tool(
        names=("add", "sum_of", "plus", "add_numbers"),
        description="Add two numbers",
        parameters={"a": _NUMBERS, "b": _NUMBERS},
        questions=("What is {a} plus {b}?", "add {a} and {b}", "How much is {a} + {b}?",
                   "Compute {a} + {b}"),
        results=("12", "90", "101", "64", "7"),
    ),
    _Tool(
        names=("search", "web_search", "find_pages", "lookup"),
        description="Search the web",
        parameters={"query": _WORDS},
        questions=("Search for {query}", "Find pages about {query}", "search the web for {query}",
                   "Can you look up {query}?"),
        results=("3 pages found", "nothing found", "see example.org", "12 results"),
    ),
    _Tool(
        names=("get_age", "age_of", "how_old"),
        description="Age of a person",
        parameters={"name": _PEOPLE},
        questions=("How old is {name}?", "What is the age of {name}?", "age of {name}"),
        results=("31", "42 years", "7", "65"),
    ),
    _Tool(
        names=("stop_model", "terminate", "end_model"),
        description="Stop a running model",
        parameters={"uid": _UIDS},
        questions=("Stop the model {uid}", "Please terminate {uid}", "stop {uid} for me"),
        results=("done", "stopped", "no such model"),
    ),
    _Tool(
        names=("set_timer", "timer", "start_timer"),
        description="Set a timer",
        parameters={"minutes": _NUMBERS},
        questions=("Set a timer of {minutes} minutes", "timer for {minutes} minutes please",
                   "Wake me in {minutes} minutes"),
        results=("ok", "timer set", "running"),
    ),
)  # fmt: skip


def tools_prompt(tools: Sequence[Mapping[str, object]]) -> str:
    """Return what the chat template writes into the system turn for these tools."""
    return _HEAD + "".join("\n" + json.dumps(tool) for tool in tools) + _TAIL


def draw_tools(rng: random.Random) -> list[dict[str, object]]:
    """Return one or two tools."""
    return [
        _describe(tool, rng.choice(tool.names))
        for tool in rng.sample(_TOOLS, rng.choice((1, 1, 2)))
    ]


def draw_tool_turns(
    rng: random.Random, *, is_examination: bool = False
) -> tuple[list[dict[str, object]], list[dict[str, str]]]:
    """Return tools, and a question that is answered by a call of one, or by its result.

    In an examination names and values are others than in training.
    """
    chosen = rng.sample(_TOOLS, rng.choice((1, 1, 2)))
    prefix = _UNSEEN_PREFIX if is_examination else ""
    names = [prefix + rng.choice(tool.names) for tool in chosen]
    at = rng.randrange(len(chosen))
    tool = chosen[at]
    known = _UNSEEN if is_examination else tool.parameters
    arguments = {name: rng.choice(known[name]) for name in tool.parameters}
    call = json.dumps({"name": names[at], "arguments": arguments})
    turns = [
        {"role": "user", "content": rng.choice(tool.questions).format(**arguments)},
        {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
    ]
    if rng.random() < 0.3:
        result = rng.choice(tool.results)
        turns += [
            {"role": "user", "content": f"<tool_response>\n{result}\n</tool_response>"},
            {"role": "assistant", "content": f"The tool says: {result}"},
        ]
    return [_describe(tool, name) for tool, name in zip(chosen, names, strict=True)], turns


def _describe(tool: _Tool, name: str) -> dict[str, object]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": tool.description,
            "parameters": {
                "type": "object",
                "properties": {
                    parameter: {"type": "integer" if isinstance(values[0], int) else "string"}
                    for parameter, values in tool.parameters.items()
                },
                "required": list(tool.parameters),
            },
        },
    }
