# SPDX-License-Identifier: Apache-2.0
"""Thousands of hostile bodies: each is a 4xx, and neither time nor memory is lost by them."""

import collections
import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.gateway import GatewayProcess, running
from tests.long_runs import RecordLongRun

from .conftest import chat, completion

NUM_BODIES, NUM_LONG = 300, 5000
LARGE = 10_000_000
LARGE_SHARE = 1 / 30
DEADLINE_SECONDS = 60.0
MEMORY_MIB = 48.0
"""What the allocator may keep of bodies of 10 MB."""
SLOWER = 1.5
NUM_MOMENTS, NUM_GOOD = 5, 50

MESSAGE = [{"role": "user", "content": "Hello"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(),
    "/v1/completions": completion(),
    "/v1/responses": {"model": "guide", "input": "Hello"},
    "/v1/messages": {"model": "guide", "max_tokens": 5, "messages": MESSAGE},
    "/v1/messages/count_tokens": {"model": "guide", "messages": MESSAGE},
    "/v1/models": {"model_name": "xinference-guide", "model_engine": "transformers"},
    "/v1/model_registrations/LLM": {"model": "{}", "persist": False},
    "/v1/admin/keys": {"name": "admin", "scopes": ["admin"]},
    "/token": {"username": "admin", "password": "none"},
}
"""Each route, and a good body; all of its fields that are named here are checked for their type."""

Make = Callable[[random.Random, dict[str, Any]], bytes]


def with_value(chance: random.Random, body: dict[str, Any], raw: bytes) -> bytes:
    """Return the body with one more field, or another value of one."""
    name = chance.choice([*body, "max_tokens", "temperature", "stop", "metadata", "x"])
    rest = {key: value for key, value in body.items() if key != name}
    head = json.dumps(rest)[:-1].encode() + (b"," if rest else b"")
    return head + json.dumps(name).encode() + b":" + raw + b"}"


def deep(chance: random.Random, body: dict[str, Any]) -> bytes:
    depth = chance.choice([2_000, 20_000, 200_000])
    opened, closed = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    end = closed * depth if chance.random() < 0.5 else b""
    raw = opened * depth + b"0" + end
    return raw if chance.random() < 0.3 else with_value(chance, body, raw)


def no_json_number(chance: random.Random, body: dict[str, Any]) -> bytes:
    words = [b"NaN", b"Infinity", b"-Infinity", b"0x10", b"01", b"1.", b".5", b"+1", b"1e", b"--1"]
    return with_value(chance, body, chance.choice(words))


def huge_number(chance: random.Random, body: dict[str, Any]) -> bytes:
    digits = b"9" * chance.choice([30, 400, 5_000, 100_000])
    raw = chance.choice([digits, b"-" + digits, b"1e" + digits[:6], b"0." + digits + b"e9999"])
    wrong = {**body, next(iter(body)): None}
    name = next(iter(wrong))
    return (
        json.dumps(wrong)
        .encode()
        .replace(json.dumps({name: None})[1:-1].encode(), json.dumps(name).encode() + b": " + raw)
    )


def no_text(chance: random.Random, body: dict[str, Any]) -> bytes:
    raw = [b'"\\ud800"', b'"a\\udfff"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\x00"', b'"\\x"', b'"']
    return with_value(chance, body, chance.choice(raw))


def wrong_type(chance: random.Random, body: dict[str, Any]) -> bytes:
    name = chance.choice(list(body))
    others = [[], {}, 1, 1.5, True, "x", [[]], [{}], [None], {"a": 1}, [1, "x"]]
    wrong = [one for one in others if type(one) is not type(body[name])]
    return json.dumps({**body, name: chance.choice(wrong)}).encode()


def no_object(chance: random.Random, body: dict[str, Any]) -> bytes:
    return chance.choice([b"", b" ", b"null", b"[]", b"1", b'"x"', b"true", b"{}x", b"{]", b"\x00"])


def truncated(chance: random.Random, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    return raw[: chance.randrange(len(raw))]


def noise(chance: random.Random, body: dict[str, Any]) -> bytes:
    return b"\x1f" + chance.randbytes(chance.randrange(2_000))


def flood(chance: random.Random, body: dict[str, Any]) -> bytes:
    count = chance.choice([100, 10_000])
    return json.dumps({**body, **{f"unknown{n}": n for n in range(count)}}).encode()


def large_text(chance: random.Random, body: dict[str, Any]) -> bytes:
    name = next(iter(body))
    text = chance.choice(["a", "\\u0000", "ü", '\\"'])
    long = ('"' + text * (LARGE // len(text.encode())) + '"').encode()
    if chance.random() < 0.5:  # an unknown field
        return b"{" + long + b":1," + json.dumps(body).encode()[1:]
    return json.dumps({**body, name: 0}).encode().replace(b": 0", b": " + long, 1)


KINDS: list[Make] = [
    *(deep, no_json_number, huge_number, no_text, wrong_type, no_object, truncated, noise, flood)
]


def ask(port: int, route: str, raw: bytes, *, cut: int = 0) -> tuple[int, bytes]:
    """Send a body, without its last bytes if so told; return status and body of the answer."""
    head = (
        f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection:
        connection.sendall(head.encode() + raw[: len(raw) - cut])
        if cut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    head_received, _, body = received.partition(b"\r\n\r\n")
    return int(head_received.split()[1]), body


def seconds_of(gateway: GatewayProcess) -> float:
    """Return how long the gateway computes for a good request, in a good moment of some."""
    raw, seconds = json.dumps(chat(max_tokens=1)).encode(), []
    for _ in range(NUM_MOMENTS):
        started = gateway.cpu_seconds()
        for _ in range(NUM_GOOD):
            assert ask(gateway.port, "/v1/chat/completions", raw)[0] == 200
        seconds.append((gateway.cpu_seconds() - started) / NUM_GOOD)
    return min(seconds)


@pytest.mark.timeout(900)
def test_hostile_bodies_are_refused_and_leave_nothing_behind(
    is_long: bool, record_long_run: RecordLongRun
) -> None:
    chance = random.Random(4)
    num_bodies = NUM_LONG if is_long else NUM_BODIES
    statuses: collections.Counter[int] = collections.Counter()
    with running() as gateway:
        before = seconds_of(gateway)
        memory = 0.0
        for number in range(num_bodies):
            route = chance.choice(list(ROUTES))
            is_large = chance.random() < LARGE_SHARE
            make = large_text if is_large else chance.choice(KINDS)
            raw = make(chance, ROUTES[route])
            cut = chance.randrange(1, len(raw)) if len(raw) > 1 and chance.random() < 0.1 else 0

            status, body = ask(gateway.port, route, raw, cut=cut)

            shown = (number, make.__name__, route, cut, raw[:200], body[:500])
            assert 400 <= status < 500, shown
            assert isinstance(json.loads(body)["error"], dict), shown
            assert len(body) < 30_000, shown
            statuses[status] += 1
            if number == num_bodies // 4:
                memory = gateway.memory_mib()
        grown = gateway.memory_mib() - memory
        after, until = seconds_of(gateway), time.monotonic() + DEADLINE_SECONDS
        # Why again: beside other tests the processor itself is slow for seconds on end, which
        # passes; what hostile bodies have slowed down stays slow.
        while after >= SLOWER * before and time.monotonic() < until:
            after = min(after, seconds_of(gateway))

    assert grown < MEMORY_MIB
    assert after < SLOWER * before
    record_long_run(
        "Hostile bodies",
        bodies=num_bodies,
        largest_memory_growth_mib=max(grown, 0.0),
        largest_slowdown=after / before,
    )
