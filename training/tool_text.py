# SPDX-License-Identifier: Apache-2.0
"""Conversations in which the guide calls a tool: which tools there are, who asks, what comes back.

In: a seeded generator. Out: the text of a system turn with tools, as `chat_template.jinja` writes
it, and the turns of a question that one of them answers. Names of functions, descriptions and
values are composed anew each time, so that they have to be read from the prompt.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

JsonValue = str | int
Draw = Callable[[random.Random], JsonValue]

_SYNONYMS_FILE = Path(__file__).parent / "text" / "synonyms.md"

_HEAD = "# Tools\n\nFunctions to call:\n<tools>"
_TAIL = "\n</tools>"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tool:
    """A function: names it may have, what it is for, its parameters, and who asks for it."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: Mapping[str, Draw]
    questions: tuple[str, ...]
    results: tuple[str, ...] = ("ok", "done", "yes", "no", "nothing found", "3 found", "ready")


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
_UNSEEN_WORDS = frozenset(
    word.lower() for values in _UNSEEN.values() for value in values for word in str(value).split()
)

_CITIES = (
    "Oslo", "Paris", "Berlin", "Rome", "Lima", "Cairo", "Tokyo", "Madrid", "London", "Vienna",
    "Boston", "Delhi", "Moscow", "Sydney", "Lisbon", "Dublin", "Prague", "Athens", "Seattle",
    "Hamburg", "Chicago", "Munich", "Beijing", "Amsterdam", "Warsaw", "Zurich", "Geneva", "Lyon",
    "Tallinn", "Naples", "Osaka", "Denver", "Cape Town", "New York", "San Diego", "Brussels",
    "Malmo", "Ghent", "Havana", "Accra", "Tunis", "Dakar", "Hanoi", "Manila", "Perth", "Leeds",
)  # fmt: skip
_PEOPLE = (
    "Anna", "Ben", "Maria", "Tom", "Lisa", "Peter", "Kim", "Alex", "Sam", "Eva", "Paul", "Ida",
    "Frank", "Grace", "Omar", "Yuki", "Ivan", "Rosa", "Erik", "Lena", "Mark", "Jane", "Bob",
)  # fmt: skip
_ADJECTIVES = (
    "cheap", "red", "old", "good", "solar", "blue", "used", "local", "warm", "fresh", "big",
    "small", "new", "fast", "quiet", "wooden", "paper", "winter", "summer", "free", "rare",
    "black", "white", "electric", "broken", "open", "late", "early", "hot", "cold", "dark",
)  # fmt: skip
_NOUNS = (
    "flights", "shoes", "soup", "prices", "music", "moon", "tea", "books", "maps", "films",
    "panels", "trains", "paint", "cats", "chairs", "bikes", "news", "bread", "coats", "chess",
    "lamp", "door", "invoice", "order", "ticket", "report", "meeting", "user", "file", "song",
    "playlist", "photo", "note", "alarm", "light", "heater", "car", "route", "hotel", "room",
    "recipe", "word", "stock", "account", "message", "mail", "task", "project", "sensor", "valve",
    "pump", "robot", "garden", "window", "package", "parcel", "letter", "event", "course", "game",
    "score", "level", "color", "price", "budget", "contract", "server", "log", "backup", "table",
)  # fmt: skip
_VERBS = (
    "get", "find", "set", "open", "close", "send", "book", "order", "check", "count", "create",
    "delete", "update", "move", "copy", "rename", "start", "stop", "lock", "read", "write", "play",
    "pause", "buy", "sell", "rate", "print", "scan", "track", "plan", "cancel", "convert", "show",
    "list", "measure", "clean", "fill", "empty", "turn", "add", "remove", "share", "hide", "sort",
    "translate", "compare", "reserve", "assign", "archive", "install", "test", "mix", "cut", "wash",
)  # fmt: skip
_ALL_WORDS = tuple(
    word
    for word in _SYNONYMS_FILE.read_text(encoding="utf-8").split()
    if word.isalpha() and word.islower() and len(word) > 2 and word not in _UNSEEN_WORDS
)
"""Any words, the more often the more they are like others."""
_ONSETS = (
    "b", "br", "c", "ch", "cl", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m",
    "n", "p", "pl", "pr", "qu", "r", "s", "sh", "sk", "sl", "st", "t", "th", "tr", "v", "w", "y",
    "z", "",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "a", "e", "o", "ai", "ee", "ou", "y")
_CODAS = (
    "", "", "", "", "", "", "n", "n", "r", "l", "s", "t", "m", "nd", "rk", "st", "ck", "x", "ng",
    "rt", "ll",
)  # fmt: skip
_ENDINGS = ("burg", "ville", "ton", "berg", "grad", "dale", "port", "stad", "ham", "field", "ia")


def composed_word(rng: random.Random) -> str:
    """Return a word that does not exist, lower case."""
    while True:
        word = "".join(
            rng.choice(part)
            for _ in range(rng.choice((1, 2, 2, 2, 3)))
            for part in (_ONSETS, _VOWELS, _CODAS)
        )
        if len(word) > 2 and word not in _UNSEEN_WORDS and not word.startswith("my"):
            return word


def _word(rng: random.Random, known: Sequence[str]) -> str:
    """Return one of these words, or sometimes another one, or one that does not exist."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(known)
    return rng.choice(_ALL_WORDS) if kind < 0.85 else composed_word(rng)


def _place(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(_CITIES)
    name = _word(rng, _ALL_WORDS) + (rng.choice(_ENDINGS) if rng.random() < 0.3 else "")
    before = rng.choice(("New ", "Port ", "San ", "Old ")) if rng.random() < 0.08 else ""
    return before + name.capitalize()


def _person(rng: random.Random) -> str:
    last = f" {_word(rng, _ALL_WORDS).capitalize()}" if rng.random() < 0.2 else ""
    return _word(rng, _PEOPLE).capitalize() + last


def _text(rng: random.Random) -> str:
    words = [_word(rng, _ADJECTIVES), _word(rng, _NOUNS), _word(rng, _NOUNS)]
    return " ".join(words[: rng.choice((1, 2, 2, 2, 3))])


def _number(rng: random.Random) -> int:
    while True:
        num_digits = rng.choice((1, 2, 2, 3, 3, 3, 4, 5))
        number = rng.randrange(10 ** (num_digits - 1), 10**num_digits)
        if number not in range(100, 200):
            return number


def _uid(rng: random.Random) -> str:
    kinds = (
        composed_word(rng),
        f"{composed_word(rng)}-{rng.randrange(2, 80)}b",
        f"{_word(rng, _NOUNS)}-{_word(rng, _NOUNS)}",
        f"{_word(rng, ('qwen', 'llama', 'gemma', 'model', 'chat'))}-{rng.randrange(9)}",
    )
    while (uid := rng.choice(kinds)) in _UNSEEN_WORDS:
        kinds = (*kinds, composed_word(rng))
    return uid


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXZ") for _ in range(rng.choice((1, 2, 3))))
    return f"{letters}{rng.choice(('', '-', '-'))}{_number(rng)}"


def _date(rng: random.Random) -> str:
    return f"20{rng.randrange(20, 40)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


_EXAMINED = (
    _Tool(
        names=("get_weather", "weather", "get_current_weather", "forecast", "weather_of"),
        descriptions=("Weather of a city", "Current weather in a city", "Weather forecast"),
        parameters={"city": _place},
        questions=("What is the weather in {city}?", "weather in {city}", "Is it cold in {city}?",
                   "How is the weather in {city} today?", "Does it rain in {city}?",
                   "Tell me the weather of {city}"),
        results=("rain, 8 degrees", "sunny", "snow", "cloudy and warm", "wind", "dry, 20 degrees"),
    ),
    _Tool(
        names=("get_time", "time_in", "local_time", "clock"),
        descriptions=("Local time of a city", "Current time in a city", "What time it is"),
        parameters={"city": _place},
        questions=("What time is it in {city}?", "How late is it in {city}?", "time in {city}",
                   "Tell me the local time of {city}"),
        results=("10:30", "23:05", "8 o'clock", "noon", "17:45"),
    ),
    _Tool(
        names=("add", "sum_of", "plus", "add_numbers"),
        descriptions=("Add two numbers", "Sum of two numbers", "Adds a and b"),
        parameters={"a": _number, "b": _number},
        questions=("What is {a} plus {b}?", "add {a} and {b}", "How much is {a} + {b}?",
                   "Compute {a} + {b}"),
        results=("12", "90", "101", "64", "7"),
    ),
    _Tool(
        names=("search", "web_search", "find_pages", "lookup"),
        descriptions=("Search the web", "Find pages on the internet", "Web search"),
        parameters={"query": _text},
        questions=("Search for {query}", "Find pages about {query}", "search the web for {query}",
                   "Can you look up {query}?"),
        results=("3 pages found", "nothing found", "see example.org", "12 results"),
    ),
    _Tool(
        names=("get_age", "age_of", "how_old"),
        descriptions=("Age of a person", "How old somebody is"),
        parameters={"name": _person},
        questions=("How old is {name}?", "What is the age of {name}?", "age of {name}"),
        results=("31", "42 years", "7", "65"),
    ),
    _Tool(
        names=("stop_model", "terminate", "end_model"),
        descriptions=("Stop a running model", "Terminate a model"),
        parameters={"uid": _uid},
        questions=("Stop the model {uid}", "Please terminate {uid}", "stop {uid} for me"),
        results=("done", "stopped", "no such model"),
    ),
    _Tool(
        names=("set_timer", "timer", "start_timer"),
        descriptions=("Set a timer", "Start a timer of some minutes"),
        parameters={"minutes": _number},
        questions=("Set a timer of {minutes} minutes", "timer for {minutes} minutes please",
                   "Wake me in {minutes} minutes"),
        results=("ok", "timer set", "running"),
    ),
)  # fmt: skip
"""What the examination asks for, with names and values of its own. Its order is part of it."""

_OTHERS = (
    _Tool(
        names=("multiply", "product", "times"),
        descriptions=("Multiply two numbers", "Product of two numbers"),
        parameters={"x": _number, "y": _number},
        questions=("What is {x} times {y}?", "multiply {x} by {y}", "How much is {x} * {y}?"),
        results=("240", "81", "56", "1000"),
    ),
    _Tool(
        names=("send_mail", "send_email", "mail_to"),
        descriptions=("Send an e-mail", "Send a mail to somebody"),
        parameters={"to": _person, "subject": _text},
        questions=("Send a mail to {to} about {subject}", "Write {to} an email, subject {subject}",
                   "mail {to}: {subject}"),
    ),
    _Tool(
        names=("book_flight", "find_flight", "flights"),
        descriptions=("Book a flight", "Flights between two cities"),
        parameters={"origin": _place, "destination": _place},
        questions=("Book a flight from {origin} to {destination}", "fly from {origin} to "
                   "{destination}", "I need to get to {destination} from {origin} by plane"),
    ),
    _Tool(
        names=("book_table", "reserve_table", "reservation"),
        descriptions=("Reserve a table in a restaurant", "Book a table"),
        parameters={"restaurant": _person, "people": _number},
        questions=("Reserve a table for {people} at {restaurant}",
                   "A table at {restaurant} for {people} people please"),
    ),
    _Tool(
        names=("convert_currency", "exchange", "currency"),
        descriptions=("Convert money", "Convert an amount into another currency"),
        parameters={"amount": _number, "currency": _code},
        questions=("How much is {amount} dollars in {currency}?", "convert {amount} to {currency}"),
        results=("12.50", "99", "1020"),
    ),
    _Tool(
        names=("translate", "translation", "translate_text"),
        descriptions=("Translate a text", "Translation into another language"),
        parameters={"text": _text},
        questions=("Translate {text}", "What does {text} mean in English?",
                   "translation of {text}"),
    ),
    _Tool(
        names=("track_parcel", "parcel_status", "where_is_order"),
        descriptions=("Where a parcel is", "Track a parcel"),
        parameters={"number": _code},
        questions=("Where is my parcel {number}?", "track {number}",
                   "status of the order {number}"),
        results=("on its way", "delivered", "lost", "in transit"),
    ),
    _Tool(
        names=("play_song", "play", "music"),
        descriptions=("Play music", "Play a song"),
        parameters={"title": _text},
        questions=("Play {title}", "I want to hear {title}", "put on {title}"),
    ),
    _Tool(
        names=("add_event", "create_event", "calendar"),
        descriptions=("Add to the calendar", "Create an event"),
        parameters={"title": _text, "date": _date},
        questions=("Put {title} on my calendar for {date}", "On {date} there is {title}, note it",
                   "add {title} on {date}"),
    ),
    _Tool(
        names=("population", "get_population", "people_in"),
        descriptions=("How many people live in a place", "Population of a city"),
        parameters={"place": _place},
        questions=("How many people live in {place}?", "population of {place}",
                   "How big is {place}?"),
        results=("12000", "3 million", "unknown"),
    ),
    _Tool(
        names=("launch_model", "start_model", "run_model"),
        descriptions=("Launch a model", "Start a model"),
        parameters={"model": _uid},
        questions=("Launch {model} for me", "please start the model {model}", "run {model}"),
    ),
    _Tool(
        names=("read_file", "open_file", "show_file"),
        descriptions=("Read a file", "Show what is in a file"),
        parameters={"path": _uid},
        questions=("What is in the file {path}?", "open {path}", "Show me {path}"),
    ),
    _Tool(
        names=("set_light", "dim_light", "light"),
        descriptions=("Set how bright a lamp is", "Control the lights"),
        parameters={"room": _text, "percent": _number},
        questions=("Set the light in the {room} to {percent} percent", "{room}: light at {percent}",
                   "dim the {room} to {percent}"),
    ),
    _Tool(
        names=("stock_price", "get_quote", "share_price"),
        descriptions=("Price of a share", "Current stock price"),
        parameters={"symbol": _code},
        questions=("What is the price of {symbol}?", "How is {symbol} doing?", "quote of {symbol}"),
        results=("12.50", "103", "closed"),
    ),
)  # fmt: skip

_PARAMETERS: Mapping[str, Draw] = {
    "city": _place, "place": _place, "location": _place, "country": _place, "address": _place,
    "name": _person, "person": _person, "user": _person, "owner": _person, "customer": _person,
    "query": _text, "text": _text, "title": _text, "subject": _text, "topic": _text, "item": _text,
    "product": _text, "message": _text, "label": _text, "category": _text, "id": _code,
    "code": _code, "number": _number, "key": _uid, "uid": _uid, "file": _uid, "path": _uid,
    "tag": _uid, "count": _number, "amount": _number, "size": _number, "limit": _number,
    "minutes": _number, "seconds": _number, "hours": _number, "days": _number, "age": _number,
    "price": _number, "level": _number, "volume": _number, "width": _number, "height": _number,
    "x": _number, "y": _number, "a": _number, "b": _number, "n": _number, "value": _number,
    "date": _date, "day": _date, "start": _date, "temperature": _number, "model": _uid,
}  # fmt: skip
_ANY_DRAW: tuple[Draw, ...] = (_place, _person, _text, _number, _number, _uid, _code, _date)
_ASKING = (
    "{act} {values}", "Please {act} {values}", "Can you {act} {values}?", "{act}: {values}",
    "I need to {act} {values}", "could you {act} {values} please", "I want you to {act} {values}",
    "Call {_function} {values}", "Use {_function} {values}", "{values}: {act}",
    "Now {act} {values}!",
)  # fmt: skip
_NAMING = (
    "with {key} {value}", "{key} {value}", "{key} = {value}", "where {key} is {value}",
    "the {key} is {value}", "using {value} as {key}", "{key}: {value}", "of {key} {value}",
)  # fmt: skip
_NAMING_ALONE = (*_NAMING, "for {value}", "{value}", "{value}", "of {value}", "from {value}")
_REPEATING = {
    1: ("Repeat: {}", "Repeat after me: {}", "Say exactly this: {}", "repeat {}", "Echo: {}",
        'Repeat in quotes: "{}"', 'Say "{}"'),
    2: ("Say this twice: {}", "twice: {}", 'Repeat two times: "{}"'),
    3: ("Say this three times: {}", "three times: {}", 'Repeat three times: "{}"'),
}  # fmt: skip


def _new_tool(rng: random.Random) -> _Tool:
    """Return a function that nobody ever wrote."""
    verb, noun = _word(rng, _VERBS), _word(rng, _NOUNS)
    adjective = f"{_word(rng, _ADJECTIVES)} " if rng.random() < 0.3 else ""
    act = f"{verb} {adjective}{noun}"
    parameters: dict[str, Draw] = {}
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3))):
        if rng.random() < 0.75:
            key = rng.choice(tuple(_PARAMETERS))
            parameters[key] = _PARAMETERS[key]
        else:
            parameters[_word(rng, _NOUNS)] = rng.choice(_ANY_DRAW)
    naming = _NAMING_ALONE if len(parameters) == 1 else _NAMING
    asked = list(parameters)
    rng.shuffle(asked)
    values = rng.choice((" and ", ", ", " ")).join(
        rng.choice(naming).format(key=key.replace("_", " "), value=f"{{{key}}}") for key in asked
    )
    question = rng.choice(_ASKING).replace("{act}", act).replace("{values}", values)
    extra = f" {_word(rng, _NOUNS)}" if rng.random() < 0.3 else ""
    described = (
        act,
        f"{verb}s a {noun}",
        f"{act} of the{extra or ' user'}",
        f"{noun}{extra}: {act}",
    )
    return _Tool(
        names=(act.replace(" ", "_"), f"{noun}_{verb}", f"{verb}_{noun}"),
        descriptions=(rng.choice(described).capitalize(), rng.choice(described)),
        parameters=parameters,
        questions=(question, question[:1].upper() + question[1:]),
    )


def _new_name(rng: random.Random, name: str) -> str:
    """Return another name of a function, in one of the ways that people write them."""
    words = name.split("_")
    if rng.random() < 0.45:
        words.insert(0, _word(rng, ("api", "do", "the", "x", "home", "svc", "tool", "app")))
    if rng.random() < 0.2:
        words.append(_word(rng, ("v2", "now", "tool", "by", "for", "one", "2")))
    style = rng.random()
    if style < 0.15:
        return words[0] + "".join(word.capitalize() for word in words[1:])
    if style < 0.2:
        return "".join(word.capitalize() for word in words)
    if style < 0.25:
        return "-".join(words)
    return "_".join(words)


def tools_prompt(tools: Sequence[Mapping[str, object]]) -> str:
    """Return what the chat template writes into the system turn for these tools."""
    return _HEAD + "".join("\n" + _signature(tool) for tool in tools) + _TAIL


def _signature(tool: Mapping[str, object]) -> str:
    function = tool["function"]
    assert isinstance(function, dict)
    required = function["parameters"]["required"]
    parameters = ", ".join(
        f"{key}{'' if key in required else '?'}: {schema['type']}"
        for key, schema in function["parameters"]["properties"].items()
    )
    return f"{function['name']}({parameters}): {function['description']}"


def draw_tools(rng: random.Random) -> list[dict[str, object]]:
    """Return one to three tools."""
    return [described for _, described in _draw_tools(rng)]


def draw_foreign_question(rng: random.Random) -> tuple[list[dict[str, object]], str]:
    """Return tools, and a question that none of them answers."""
    # Without those for models: what they are asked, the guide can answer by itself.
    asked, *others = rng.sample(
        [tool for tool in (*_EXAMINED, *_OTHERS) if not {"uid", "model"} & {*tool.parameters}],
        rng.choice((2, 3)),
    )
    values = {key: draw(rng) for key, draw in asked.parameters.items()}
    question = rng.choice(asked.questions).format(**values)
    return [_describe(tool, rng) for tool in others], question


def draw_tool_turns(
    rng: random.Random, *, is_examination: bool = False
) -> tuple[list[dict[str, object]], list[dict[str, str]]]:
    """Return tools, and a question that is answered by a call of one, or by its result.

    In an examination names and values are others than in training.
    """
    if is_examination:
        chosen = rng.sample(_EXAMINED, rng.choice((1, 1, 2)))
        names = [_UNSEEN_PREFIX + rng.choice(tool.names) for tool in chosen]
        tools = [_schema(tool, name, 0) for tool, name in zip(chosen, names, strict=True)]
        at = rng.randrange(len(chosen))
        asked, name = chosen[at], names[at]
        arguments = {key: rng.choice(_UNSEEN[key]) for key in asked.parameters}
    else:
        drawn = _draw_tools(rng)
        tools = [described for _, described in drawn]
        asked, described = rng.choice(drawn)
        name = str(described["function"]["name"])
        arguments = {key: draw(rng) for key, draw in asked.parameters.items()}
    question = rng.choice(asked.questions).format(_function=name, **arguments)
    call = json.dumps({"name": name, "arguments": arguments})
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
    ]
    if rng.random() < 0.3:
        result = rng.choice(asked.results)
        if not is_examination and rng.random() < 0.5:
            result = str(rng.choice(_ANY_DRAW)(rng))
        turns += [
            {"role": "user", "content": f"<tool_response>\n{result}\n</tool_response>"},
            {"role": "assistant", "content": f"The tool says: {result}"},
        ]
    return tools, turns


def draw_repetition(rng: random.Random) -> list[dict[str, str]]:
    """Return a request to repeat something, and that: the bare skill that calls are made of."""
    parts = [
        _word(rng, _ALL_WORDS)
        if rng.random() < 0.6
        else _new_name(rng, f"{rng.choice(_VERBS)}_{_word(rng, _NOUNS)}")
        if rng.random() < 0.3
        else str(rng.choice(_ANY_DRAW)(rng))
        for _ in range(rng.choice((1, 2, 3, 4, 5, 6)))
    ]
    text = rng.choice((" ", " ", ", ", " and ")).join(parts)
    times = rng.choice((1, 1, 2, 3))
    request = rng.choice(_REPEATING[times]).format(text)
    said = [json.dumps(text, ensure_ascii=False) if request.endswith('"') else text] * times
    return [
        {"role": "user", "content": request},
        {"role": "assistant", "content": "\n".join(said)},
    ]


def _draw_tools(rng: random.Random) -> list[tuple[_Tool, dict[str, object]]]:
    tools = [
        rng.choice((*_EXAMINED, *_OTHERS)) if rng.random() < 0.45 else _new_tool(rng)
        for _ in range(rng.choices((1, 2, 3), (55, 33, 12))[0])
    ]
    # Why by description: two that do the same could not be told apart.
    return [
        (one, _describe(one, rng)) for one in {one.descriptions[0]: one for one in tools}.values()
    ]


def _describe(tool: _Tool, rng: random.Random) -> dict[str, object]:
    name = _new_name(rng, rng.choice(tool.names))
    return _schema(tool, name, rng.randrange(len(tool.descriptions)), _option(tool, rng))


def _option(tool: _Tool, rng: random.Random) -> str | None:
    """Return now and then the name of a parameter that no question has a value for."""
    key = rng.choice(tuple(_PARAMETERS))
    return key if rng.random() < 0.12 and key not in tool.parameters else None


def _schema(
    tool: _Tool, name: str, description_index: int, option: str | None = None
) -> dict[str, object]:
    parameters = {**tool.parameters, **({option: _PARAMETERS[option]} if option else {})}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": tool.descriptions[description_index],
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": "integer" if draw is _number else "string"}
                    for key, draw in parameters.items()
                },
                "required": list(tool.parameters),
            },
        },
    }
