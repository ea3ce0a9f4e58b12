# SPDX-License-Identifier: Apache-2.0
"""Between hosts: what is said is not heard, and nobody can stand in between; and strangers."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.cluster.dataplane.test_connection import INSTANCE, KEY, SPEC, opened
from tests.fakes.replica import FakeReplica, serve_fake_replica
from tests.raw_data_plane import RawConnection
from tests.tcp_relay import relay_to
from xinference.cluster.dataplane import server as server_module
from xinference.cluster.dataplane.address import TcpAddress, parse_address
from xinference.cluster.dataplane.client import ReplicaConnection
from xinference.cluster.dataplane.tls import client_tls, new_server_tls
from xinference.errors import ProtocolError
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Finished,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
)

SECRET = "nobody-is-to-hear-this"
SECONDS = 10.0


@pytest.fixture
async def replica() -> AsyncIterator[FakeReplica]:
    async with serve_fake_replica(
        "tls:127.0.0.1:0", instance=INSTANCE, key=KEY, spec=SPEC, tokens_per_step=200
    ) as fake:
        yield fake


def port_of(replica: FakeReplica) -> int:
    where = parse_address(replica.address)
    assert isinstance(where, TcpAddress)
    assert where.is_encrypted
    return where.address.port


async def ask(connection: ReplicaConnection) -> list[object]:
    request = GenerationRequest(
        request_id=RequestId("a"),
        prompt=TextPrompt(text=SECRET),
        sampling=SamplingParams(max_tokens=3),
    )
    return [event async for event in await connection.generate(request, timeout_seconds=SECONDS)]


async def test_who_listens_on_the_way_hears_no_prompt_and_no_answer(replica: FakeReplica) -> None:
    async with relay_to("127.0.0.1", port_of(replica)) as relay:
        connection = await opened(f"tls:127.0.0.1:{relay.port}")
        assert isinstance((await ask(connection))[-1], Finished)
        await connection.aclose()

        assert len(relay.heard) > 1000
        for said in (SECRET.encode(), b"CHALLENGE", INSTANCE.encode(), b"CHUNK"):
            assert said not in relay.heard


async def test_who_stands_in_between_with_a_certificate_of_his_own_is_refused(
    replica: FakeReplica,
) -> None:
    async with relay_to(
        "127.0.0.1",
        port_of(replica),
        tls=new_server_tls().context,
        upstream_tls=client_tls(),
    ) as relay:
        with pytest.raises(ProtocolError, match="the proof is wrong"):
            await opened(f"tls:127.0.0.1:{relay.port}")

        assert b"CHALLENGE" in relay.heard  # he did hear that much
        assert b"WELCOME" not in relay.heard


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_connections_that_say_nothing_keep_nobody_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_STRANGERS", 4)
    async with serve_fake_replica(
        f"{kind}:127.0.0.1:0", instance=INSTANCE, key=KEY, spec=SPEC
    ) as fake:
        known = await opened(fake.address)
        plain = fake.address.replace("tls:", "tcp:")
        silent = [await RawConnection.connect(plain) for _ in range(20)]

        async with asyncio.timeout(SECONDS):
            assert all([await one.is_closed() for one in silent[:16]])
        late = await opened(fake.address)

        for connection in (known, late):
            assert isinstance((await ask(connection))[-1], Finished)
            await connection.aclose()
        for one in silent:
            await one.aclose()
