# SPDX-License-Identifier: Apache-2.0
"""The last hour of the cluster."""

import httpx

from tests.fakes.cluster import FakeCluster
from xinference.api.history import INTERVAL_SECONDS, MAX_SAMPLES, History
from xinference.identifiers import ModelUid

GUIDE = ModelUid("guide")


async def looked(history: History, cluster: FakeCluster, *tokens: float) -> None:
    """Take a sample every ten seconds, with so many tokens counted by then."""
    info = await cluster.info()
    for n, counted in enumerate(tokens):
        stats = {
            GUIDE: {"num_generated_tokens": counted, "num_blocks": 10.0, "num_blocks_used": 4.0}
        }
        seconds = INTERVAL_SECONDS * n
        history.take(info, stats, unix=1000.0 + seconds, monotonic=50.0 + seconds)


def speeds(history: History) -> list[float]:
    data = history.as_item(since=0)["data"]
    assert isinstance(data, list)
    return [sample.models["guide"].tokens_per_second for sample in data]


async def test_speed_is_what_was_made_between_two_looks(cluster: FakeCluster) -> None:
    history = History()

    # The last is of a replica that began anew.
    await looked(history, cluster, 500, 700, 1700, 20)

    assert speeds(history) == [0, 20, 100, 0]


async def test_only_what_is_newer_is_told_and_only_an_hour_is_kept(cluster: FakeCluster) -> None:
    history = History()

    await looked(history, cluster, *range(MAX_SAMPLES + 5))

    assert len(speeds(history)) == MAX_SAMPLES
    last = 1000.0 + INTERVAL_SECONDS * (MAX_SAMPLES + 4)
    item = history.as_item(since=last - INTERVAL_SECONDS)
    assert [sample.time for sample in item["data"]] == [last]  # type: ignore[attr-defined]
    assert history.as_item(since=last)["data"] == []


async def test_a_worker_is_seen_with_its_shares(cluster: FakeCluster) -> None:
    history = History()
    await looked(history, cluster, 1)
    (worker,) = history.as_item(since=0)["data"][0].workers.values()  # type: ignore[index]
    resources = (await cluster.info()).workers[0].resources

    share = resources.memory_used_bytes / resources.memory_total_bytes
    assert worker.memory_share == share
    assert 0 <= worker.cpu_utilization <= 1
    assert (worker.gpu_utilization is None) == (not resources.devices)


async def test_the_route_refuses_a_time_that_is_none(http: httpx.AsyncClient) -> None:
    told = (await http.get("/v1/cluster/history")).json()
    assert told == {"interval_seconds": INTERVAL_SECONDS, "data": []}
    answer = await http.get("/v1/cluster/history", params={"since": "yesterday"})

    assert answer.status_code == 400
    assert "since" in answer.json()["error"]["message"]
