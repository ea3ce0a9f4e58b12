# SPDX-License-Identifier: Apache-2.0
"""Whatever arrives as a body, the answer is a 4xx in one shape, or the body was fine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.api.body import MAX_BODY_BYTES

from .conftest import chat, completion

ROUTES = {
    "/v1/chat/completions": chat(),
    "/v1/completions": completion(),
    "/v1/models": {"model_name": "xinference-guide", "model_engine": "transformers"},
    "/v1/model_registrations/LLM": {"model": "{}", "persist": False},
    "/v1/models/guide/requests/r/abort": {"block_duration": 1},
}

HOSTILE = {
    "nothing": b"",
    "spaces": b"  \n",
    "not json": b"{",
    "half": json.dumps(chat()).encode()[:-5],
    "an array": b"[]",
    "a number": b"1",
    "null": b"null",
    "NaN": b'{"model":"guide","prompt":"x","temperature":NaN}',
    "infinity": b'{"model":"guide","prompt":"x","temperature":-Infinity}',
    "a lone surrogate": b'{"model":"\\ud800","prompt":"x"}',
    "bytes that are no text": b'{"model":"\xff\xfe"}',
    "a deep array": b"[" * 100_000,
    "a deep object": b'{"a":' * 100_000,
    "a huge number": b'{"model":"guide","prompt":"x","max_tokens":' + b"9" * 100_000 + b"}",
    "a huge exponent": b'{"model":"guide","prompt":"x","temperature":1e999999}',
    "a form": b"model=guide&prompt=x",
    "many unknown fields": json.dumps({f"f{n}": 0 for n in range(100_000)}).encode(),
    "a field with a long name": json.dumps({"x" * 1_000_000: 1}).encode(),
    "many bad items": b'{"model":"guide","messages":[' + b"0," * 1_000_000 + b"0]}",
    "a name of NUL": b'{"model":"\\u0000","prompt":"x"}',
}


def assert_refused(answer: httpx.Response) -> None:
    body = answer.json()
    assert 400 <= answer.status_code < 500
    assert body.keys() == {"error", "detail"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["detail"] == body["error"]["message"]
    assert len(answer.content) < 8000


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", [*list(ROUTES)[:4]])
async def test_a_hostile_body_is_refused(http: httpx.AsyncClient, route: str, name: str) -> None:
    answer = await http.post(
        route, content=HOSTILE[name], headers={"content-type": "application/json"}
    )

    assert_refused(answer)


async def test_of_a_key_that_comes_twice_the_last_counts(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    body = json.dumps(completion())[:-1] + ', "seed": 1, "seed": 2}'

    answer = await http.post("/v1/completions", content=body)

    assert answer.status_code == 200
    assert cluster.requests[0].sampling.seed == 2


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json; charset=utf-8",
        "text/plain",
        "application/x-www-form-urlencoded",
        "\xff",
    ],
)
async def test_the_content_type_does_not_matter(
    http: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type.encode("latin-1")}

    answer = await http.post("/v1/completions", content=json.dumps(completion()), headers=headers)

    assert answer.status_code == 200


@pytest.mark.parametrize("is_announced", [True, False])
async def test_a_body_that_is_too_large_is_a_413(
    http: httpx.AsyncClient, is_announced: bool
) -> None:
    taken = 0

    async def megabytes() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(2 * MAX_BODY_BYTES // 2**20):
            taken += 1
            yield b" " * 2**20

    length = {"content-length": str(2 * MAX_BODY_BYTES)} if is_announced else {}
    answer = await http.post("/v1/completions", content=megabytes(), headers=length)

    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert taken <= MAX_BODY_BYTES // 2**20 + 1


async def test_an_abort_needs_no_body(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/models/guide/requests/r/abort")

    assert answer.json() == {"msg": "NOT_FOUND"}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["guide", "user", "text", "auto", "", "x" * 500]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


OTHER_FIELDS = [
    *("n", "stop", "tools", "stream", "stream_options", "request_id", "seed"),
    *("replica", "n_gpu", "envs", "worker_ip", "model_size_in_billions"),
    *("max_num_seqs", "device", "dtype"),
]


@st.composite
def spoiled(draw: Callable[..., Any]) -> tuple[str, bytes]:
    """A route, and a good body for it in which something was changed."""
    route = draw(st.sampled_from(list(ROUTES)))
    body: dict[str, Any] = dict(ROUTES[route])
    names = st.sampled_from([*body, *OTHER_FIELDS]) | st.text(max_size=8)
    for name in draw(st.lists(names, max_size=3)):
        body[name] = draw(JSON)
    raw = json.dumps(body).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 3)) :]
    return route, raw


def test_a_spoiled_body_is_never_our_fault(is_long: bool) -> None:
    @settings(
        max_examples=5000 if is_long else 300,
        deadline=None,
        derandomize=not is_long,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled())
    def check(case: tuple[str, bytes]) -> None:
        answer = runner.run(send(*case))
        if answer.status_code != 200:
            assert_refused(answer)

    async def send(route: str, raw: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.post(route, content=raw)

    with asyncio.Runner() as runner:
        app = create_app(runner.run(FakeCluster.running()))
        check()
