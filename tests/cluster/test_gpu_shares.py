# SPDX-License-Identifier: Apache-2.0
"""Servers of engines that share a GPU: what each is told to take, on simulated devices."""

from typing import Any

import pytest

from tests.cluster.simulation import SimulatedCluster, gpu
from xinference.cluster.state.records import Effect, Tell
from xinference.errors import InsufficientResources, InvalidRequest
from xinference.protocol.servers import ServerEngine, ServerOptions

VLLM, SGLANG = ServerEngine.VLLM, ServerEngine.SGLANG
UTILIZATION = "gpu_memory_utilization"


def server(engine: ServerEngine = VLLM, *given: str, **flags: Any) -> ServerOptions:
    return ServerOptions(engine=engine, given=given, flags=flags)


@pytest.fixture
def cluster() -> SimulatedCluster:
    cluster = SimulatedCluster()
    cluster.report(cluster.add_worker(devices=(gpu(0),)))
    return cluster


def started(cluster: SimulatedCluster, uid: str, **options: Any) -> list[dict[str, Any]]:
    """Launch a model; return the server's own options of each replica that is started."""
    told: list[Effect] = []

    reconcile = cluster.state.reconcile

    def noted(**arguments: Any) -> list[Effect]:
        effects = reconcile(**arguments)
        told.extend(effects)
        return effects

    cluster.state.reconcile = noted  # type: ignore[method-assign]  # to see what is told
    try:
        cluster.launch(uid, **options)
    finally:
        cluster.state.reconcile = reconcile  # type: ignore[method-assign]
    return [
        start.spec.server_options.flags
        for effect in told
        if isinstance(effect, Tell)
        for start in effect.command.start
        if start.spec.replica.model == uid and start.spec.server_options is not None
    ]


def test_a_server_that_is_alone_takes_what_it_does_by_itself(cluster: SimulatedCluster) -> None:
    assert started(cluster, "one", server_options=server()) == [{}]


@pytest.mark.parametrize(
    ("engine", "flag", "fraction"),
    [
        (VLLM, UTILIZATION, 0.46),
        (SGLANG, "mem_fraction_static", 0.414),
        (ServerEngine.TRT_LLM, "kv_cache_free_gpu_memory_fraction", 0.414),
    ],
)
def test_two_replicas_on_one_gpu_take_half_each(
    cluster: SimulatedCluster, engine: ServerEngine, flag: str, fraction: float
) -> None:
    assert started(cluster, "two", replica=2, server_options=server(engine)) == [
        {flag: fraction},
        {flag: fraction},
    ]


def test_llama_cpp_takes_what_it_needs_and_is_told_nothing(cluster: SimulatedCluster) -> None:
    options = server(ServerEngine.LLAMA_CPP)

    assert started(cluster, "two", replica=2, server_options=options) == [{}, {}]


def test_what_the_launch_says_is_left_as_it_is(cluster: SimulatedCluster) -> None:
    spelled = {"gpu-memory-utilization": "0.3"}
    own = ServerOptions(engine=VLLM, flags=spelled)

    assert started(cluster, "two", replica=2, server_options=own) == [spelled, spelled]
    assert started(cluster, "by bytes", server_options=server(VLLM, "kv_cache_bytes")) == [{}]


def test_what_others_claim_is_not_shared_out_again(cluster: SimulatedCluster) -> None:
    started(cluster, "claims", server_options=server(**{UTILIZATION: 0.5}))

    assert started(cluster, "rest", server_options=server()) == [{UTILIZATION: 0.42}]
    assert started(cluster, "more", server_options=server(SGLANG)) == [
        {"mem_fraction_static": 0.189}
    ]


def test_claims_that_are_more_than_a_gpu_are_refused_by_name(cluster: SimulatedCluster) -> None:
    started(cluster, "first", server_options=server(**{UTILIZATION: 0.6}))

    with pytest.raises(InvalidRequest, match=r"claims 0\.6 of GPU 0 .* 0\.6 is claimed there"):
        cluster.launch("second", server_options=server(**{UTILIZATION: 0.6}))
    with pytest.raises(InvalidRequest, match=r"mem_fraction_static: claims 0\.5"):
        cluster.launch("second", server_options=server(SGLANG, mem_fraction_static=0.5))
    cluster.launch("third", server_options=server(**{UTILIZATION: 0.4}))
    with pytest.raises(InsufficientResources, match=r"1 of GPU 0 .* is claimed by other"):
        cluster.launch("fourth", server_options=server())


def test_the_replicas_of_one_launch_cannot_claim_more_than_their_gpu(
    cluster: SimulatedCluster,
) -> None:
    with pytest.raises(InvalidRequest, match=r"for each of 2 replicas; together"):
        cluster.launch("both", replica=2, server_options=server(**{UTILIZATION: 0.9}))


def test_replicas_on_gpus_of_their_own_share_nothing() -> None:
    cluster = SimulatedCluster()
    cluster.report(cluster.add_worker(devices=(gpu(0), gpu(1))))
    full = server(**{UTILIZATION: 0.9})

    assert started(cluster, "two", replica=2, server_options=full) == [{UTILIZATION: 0.9}] * 2


def test_more_replicas_are_checked_as_a_launch_is(cluster: SimulatedCluster) -> None:
    cluster.launch("big", server_options=server(**{UTILIZATION: 0.6}))
    cluster.settle()
    cluster.finish_work()
    cluster.settle()

    with pytest.raises(InvalidRequest, match=UTILIZATION):
        cluster.add_replicas("big")


def test_what_is_no_number_is_for_the_server_to_refuse(cluster: SimulatedCluster) -> None:
    odd = {UTILIZATION: "plenty"}

    assert started(cluster, "odd", replica=2, server_options=server(**odd)) == [odd, odd]
