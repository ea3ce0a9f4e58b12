# SPDX-License-Identifier: Apache-2.0
"""Two gateway processes on one port: one gateway, as its users see it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started, wait_until

NUM_CONNECTIONS = 12
"""The kernel spreads connections by their ports: all on one process once in two thousand times."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with started(tmp_path_factory.mktemp("home"), "--api-workers", "2") as running:
        launch_guide(running)
        yield running


@contextmanager
def connections(platform: Platform) -> Iterator[list[httpx.Client]]:
    """Give connections that, together, lead to every process."""
    clients = [httpx.Client(base_url=platform.endpoint, timeout=30) for _ in range(NUM_CONNECTIONS)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def ask(client: httpx.Client, key: str = "") -> httpx.Response:
    body = {"model": GUIDE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def num_requests(page: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "xinference:model_request_total"
    )


def test_both_serve_and_their_numbers_add_up(platform: Platform) -> None:
    before = num_requests(httpx.get(f"{platform.endpoint}/metrics").text)
    with connections(platform) as clients:
        assert {ask(client).status_code for client in clients} == {200}
        pages = [client.get("/metrics").text for client in clients]
    gateways = [
        one for one in platform.processes("xinference.cli.process") if "gateway" in one.cmdline()
    ]

    assert len(gateways) == 2
    assert {num_requests(page) - before for page in pages} == {NUM_CONNECTIONS}
    assert all(one.cpu_times().user > 0 for one in gateways)


def test_one_that_is_killed_comes_back_and_the_other_serves_meanwhile(platform: Platform) -> None:
    def gateways() -> list[int]:
        found = platform.processes("xinference.cli.process")
        return sorted(one.pid for one in found if "gateway" in one.cmdline())

    before = gateways()
    victim = next(
        one for one in platform.processes("xinference.cli.process") if one.pid == before[0]
    )
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)

    for _ in range(NUM_CONNECTIONS):
        with httpx.Client(base_url=platform.endpoint, timeout=30) as client:
            assert ask(client).status_code == 200
    wait_until("both run again", lambda: len(gateways()) == 2, timeout_seconds=30)
    assert before[1] in gateways()


def test_a_key_is_made_and_revoked_for_both_within_a_second(platform: Platform) -> None:
    made = platform.command("keys", "create", "-n", "admin", "-s", "admin")
    key = made.stdout.strip()
    key_id = key.split("-")[1]
    started_at = time.monotonic()
    with connections(platform) as clients:
        wait_until(
            "both ask for a key",
            lambda: all(ask(client).status_code == 401 for client in clients),
            timeout_seconds=5,
        )
        assert time.monotonic() - started_at < 1 + 1  # and what asking takes
        assert {ask(client, key).status_code for client in clients} == {200}
        wait_until(
            "what both counted is in one row",
            lambda: usage(clients[0], key) == [("admin", NUM_CONNECTIONS)],
            timeout_seconds=5,
        )

        platform.command("keys", "revoke", key_id, "-ak", key)
        wait_until(
            "both refuse it",
            lambda: all(ask(client, key).status_code == 401 for client in clients),
            timeout_seconds=1.5,
        )


def usage(client: httpx.Client, key: str) -> list[tuple[str, int]]:
    rows = client.get("/v1/usage", headers={"x-api-key": key}).json()["data"]
    return [(row["key_name"], row["requests"]) for row in rows if row["key_name"]]
