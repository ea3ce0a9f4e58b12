# SPDX-License-Identifier: Apache-2.0
"""Replicas that come and go with the load, and models that sleep when nobody asks them."""

from dataclasses import replace

import pytest

from tests.cluster.simulation import SimulatedCluster
from xinference.cluster.messages import InstanceLoad, InstanceState
from xinference.cluster.routing import ready_routes
from xinference.cluster.state.scaling import DOWN_SECONDS, HOLD_OFF_SECONDS, UP_SECONDS
from xinference.errors import InvalidRequest, ModelNotFound, ModelNotReady
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import EngineOptions, ModelState, ReplicaState

QWEN = ModelUid("qwen")
FOUR_AT_ONCE = EngineOptions(max_num_seqs=4)


@pytest.fixture
def cluster() -> SimulatedCluster:
    made = SimulatedCluster()
    made.report(made.add_worker())
    return made


def launch(cluster: SimulatedCluster, *, replica: int = 1, max_replicas: int = 4) -> None:
    cluster.launch(replica=replica, max_replicas=max_replicas, engine_options=FOUR_AT_ONCE)
    cluster.run_to_rest()


def load(cluster: SimulatedCluster, outstanding: int, *, progress: float = 0.0) -> None:
    """Let the model have so much to do, spread over its replicas."""
    ready = [(worker, one) for worker in cluster.workers.values() for one in worker.living()]
    for worker in cluster.workers.values():
        worker.loads = {}
    for number, (worker, one) in enumerate(ready):
        share = outstanding // len(ready) + (number < outstanding % len(ready))
        worker.loads[one.instance] = InstanceLoad(num_outstanding=share, progress=progress)


def spend(cluster: SimulatedCluster, seconds: float, outstanding: int) -> list[int]:
    """Let time pass under a load, replicas starting at once; return how many there were."""
    numbers = []
    for _ in range(int(seconds)):
        load(cluster, outstanding)
        cluster.adapt()
        cluster.settle()
        cluster.finish_work()
        cluster.settle()
        cluster.clock.advance(1.0)
        numbers.append(num_replicas(cluster))
    return numbers


def num_replicas(cluster: SimulatedCluster) -> int:
    return len(cluster.state.model(QWEN).replicas)


def test_replicas_are_added_for_a_load_that_lasts(cluster: SimulatedCluster) -> None:
    launch(cluster)

    assert set(spend(cluster, UP_SECONDS, 6)) == {1}
    spend(cluster, 3, 6)

    # Six requests at once fill three replicas of four to a half, two to three quarters.
    assert num_replicas(cluster) == 3
    assert len(ready_routes(cluster.state.routes, QWEN)) == 3
    assert len(cluster.store[QWEN].replicas) == 3, "a restart would forget it"


def test_a_short_burst_changes_nothing(cluster: SimulatedCluster) -> None:
    launch(cluster)

    for _ in range(10):
        spend(cluster, UP_SECONDS - 1, 8)
        spend(cluster, 1, 0)

    assert num_replicas(cluster) == 1


def test_replicas_go_one_by_one_when_the_load_is_gone_for_long(cluster: SimulatedCluster) -> None:
    launch(cluster)
    spend(cluster, 10, 100)
    assert num_replicas(cluster) == 4, "never more than max_replicas"

    numbers = spend(cluster, 4 * DOWN_SECONDS, 0)

    assert numbers[int(DOWN_SECONDS) - 2] == 4
    assert sorted(set(numbers), reverse=True) == [4, 3, 2, 1]
    assert numbers[-1] == 1, "never fewer than min_replicas"
    assert len(cluster.workers[next(iter(cluster.workers))].living()) == 1


@pytest.mark.parametrize("outstanding", range(17))
def test_no_steady_load_makes_the_number_swing(cluster: SimulatedCluster, outstanding: int) -> None:
    launch(cluster)
    spend(cluster, 300, outstanding)
    settled = num_replicas(cluster)

    assert set(spend(cluster, 300, outstanding)) == {settled}


def test_what_an_engine_computes_at_once_is_for_the_engine_to_say(
    cluster: SimulatedCluster,
) -> None:
    cluster.launch(max_replicas=4)
    cluster.run_to_rest()
    (worker,) = cluster.workers.values()
    (one,) = worker.living()
    worker.instances[one.instance] = replace(one, max_num_seqs=2)
    worker.sequence += 1
    cluster.settle()

    spend(cluster, UP_SECONDS + 2, 2)

    assert num_replicas(cluster) > 1


def test_a_replica_that_has_no_place_is_tried_again_later_and_told(
    cluster: SimulatedCluster,
) -> None:
    launch(cluster)
    node = next(iter(cluster.workers.values()))
    cluster.state.node_silent(node.node, node.worker_epoch)
    model = cluster.state._world.models[QWEN]
    (replica,) = model.wanted
    replica.load = InstanceLoad(num_outstanding=50, progress=1.0)
    for _ in range(int(HOLD_OFF_SECONDS)):
        cluster.clock.advance(0.05)
        model.pressure.high_since = cluster.clock.monotonic - UP_SECONDS
        assert cluster.state.adapted(now=cluster.clock()) == []

    told = [event.event_content for event in cluster.state.story(QWEN)]
    assert sum("More replicas are wanted" in line for line in told) == 1


def test_a_model_that_scales_is_not_scaled_out_of_its_bounds_by_hand(
    cluster: SimulatedCluster,
) -> None:
    launch(cluster, replica=2, max_replicas=3)

    with pytest.raises(InvalidRequest, match="max_replicas is 3"):
        cluster.add_replicas(count=2)
    with pytest.raises(InvalidRequest, match="keeps 2 by its min_replicas"):
        cluster.remove_replica(0)


def idle(cluster: SimulatedCluster) -> None:
    """Let a model that sleeps after 60 s be idle for that long."""
    cluster.launch(idle_timeout=60.0)
    cluster.run_to_rest()
    for _ in range(62):
        load(cluster, 0, progress=7.0)
        cluster.clock.advance(1.0)
        cluster.adapt()
    cluster.run_to_rest()


def test_a_model_that_nobody_asks_sleeps_and_nothing_of_it_runs(cluster: SimulatedCluster) -> None:
    idle(cluster)

    assert cluster.state.model(QWEN).state is ModelState.ASLEEP
    assert not any(worker.living() for worker in cluster.workers.values())
    with pytest.raises(ModelNotReady, match="asleep"):
        ready_routes(cluster.state.routes, QWEN)
    assert cluster.state.routes.models[QWEN].is_on_demand
    assert cluster.state.launch_progress(QWEN).stage == "completed", "its launch has succeeded"


def test_requests_keep_a_model_awake(cluster: SimulatedCluster) -> None:
    cluster.launch(idle_timeout=60.0)
    cluster.run_to_rest()

    for number in range(200):
        # One that is over between two looks shows in the progress alone.
        load(cluster, 0, progress=float(number // 50))
        cluster.clock.advance(1.0)
        cluster.adapt()
    assert cluster.state.model(QWEN).state is ModelState.READY

    for _ in range(100):
        load(cluster, 1, progress=4.0)
        cluster.clock.advance(1.0)
        cluster.adapt()
    assert cluster.state.model(QWEN).state is ModelState.READY


def test_a_model_that_sleeps_is_woken(cluster: SimulatedCluster) -> None:
    idle(cluster)

    cluster.wake()
    assert cluster.state.model(QWEN).state is ModelState.LOADING
    cluster.run_to_rest()

    assert cluster.state.model(QWEN).state is ModelState.READY
    assert cluster.state.awake(QWEN, now=cluster.clock()) == []
    with pytest.raises(ModelNotFound):
        cluster.wake("unknown")


def test_a_replica_that_was_given_up_is_tried_again_when_its_model_wakes(
    cluster: SimulatedCluster,
) -> None:
    cluster.launch(replica=2, autoload=True)
    cluster.run_to_rest()
    while cluster.state.model(QWEN).replicas[0].state is not ReplicaState.FAILED:
        instance = cluster.state.model(QWEN).replicas[0].instance
        (worker,) = cluster.workers.values()
        assert instance is not None
        worker.move(instance, InstanceState.EXITED, "it broke")
        cluster.run_to_rest()
    assert cluster.state.model(QWEN).state is ModelState.READY

    cluster.change(replace(cluster.store[QWEN], is_asleep=True))
    cluster.run_to_rest()
    cluster.wake()
    cluster.run_to_rest()

    states = [one.state for one in cluster.state.model(QWEN).replicas]
    assert states == [ReplicaState.READY] * 2


def test_a_model_sleeps_on_over_a_restart_and_can_be_terminated(cluster: SimulatedCluster) -> None:
    idle(cluster)

    cluster.restart_supervisor()
    cluster.run_to_rest()
    assert cluster.state.model(QWEN).state is ModelState.ASLEEP

    cluster.terminate()
    cluster.run_to_rest()
    assert cluster.state.uids() == set()


def test_a_model_that_is_woken_while_it_falls_asleep_has_one_replica(
    cluster: SimulatedCluster,
) -> None:
    cluster.launch(idle_timeout=60.0)
    cluster.run_to_rest()
    cluster.clock.advance(61.0)
    for worker in cluster.workers.values():
        cluster.report(worker)
    (asleep,) = cluster.state.adapted(now=cluster.clock())
    cluster.change(asleep)

    cluster.wake()
    cluster.run_to_rest()

    assert sum(len(worker.living()) for worker in cluster.workers.values()) == 1
    assert cluster.state.model(QWEN).state is ModelState.READY
