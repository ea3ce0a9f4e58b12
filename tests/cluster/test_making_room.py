# SPDX-License-Identifier: Apache-2.0
"""Models that sleep to make room for others: the least recently used that allow it."""

import pytest

from tests.cluster.simulation import GIB, SimulatedCluster
from xinference.cluster.messages import InstanceLoad, InstanceState
from xinference.cluster.state.room import MIN_AWAKE_SECONDS
from xinference.errors import InsufficientResources
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import ModelState

FIRST, SECOND = "127.0.0.1:1", "127.0.0.1:2"


@pytest.fixture
def cluster() -> SimulatedCluster:
    """A host with room for two models."""
    made = SimulatedCluster()
    add_worker(made, FIRST)
    return made


def add_worker(cluster: SimulatedCluster, name: str) -> None:
    worker = cluster.add_worker(name)
    worker.instance_bytes = 4 * GIB
    cluster.report(worker)


def launch(cluster: SimulatedCluster, uid: str, *, autoload: bool = True, at: str = FIRST) -> None:
    """Launch a model, and let some time pass after it is ready."""
    cluster.launch(uid, autoload=autoload, worker_ip=at)
    cluster.run_to_rest()
    use(cluster, uid)


def use(cluster: SimulatedCluster, uid: str, *, outstanding: int = 0) -> None:
    """Let a model have a request, and some time pass."""
    for worker in cluster.workers.values():
        for one in worker.living():
            before = worker.loads.get(one.instance, InstanceLoad(num_outstanding=0, progress=0.0))
            if one.replica.model == uid:
                worker.loads[one.instance] = InstanceLoad(
                    num_outstanding=outstanding, progress=before.progress + 1.0
                )
    cluster.settle()
    cluster.adapt()
    for _ in range(int(MIN_AWAKE_SECONDS) + 1):
        cluster.clock.advance(1.0)
        cluster.adapt()


def states(cluster: SimulatedCluster) -> dict[str, str]:
    return {one.model_uid: str(one.state) for one in cluster.state.models()}


def test_the_least_recently_used_model_makes_room_for_a_launch(cluster: SimulatedCluster) -> None:
    launch(cluster, "a")
    launch(cluster, "b")
    use(cluster, "a")

    cluster.launch("c")
    cluster.settle()

    running = [one for worker in cluster.workers.values() for one in worker.living()]
    stopping = [one for one in running if one.state is InstanceState.STOPPING]
    assert [one.replica.model for one in stopping] == ["b"]
    assert "c" not in {one.replica.model for one in running}, "it waits until the memory is free"
    cluster.run_to_rest()
    assert states(cluster) == {"a": "READY", "b": "ASLEEP", "c": "READY"}
    assert cluster.store[ModelUid("b")].is_asleep


def test_a_model_that_is_woken_makes_another_one_sleep(cluster: SimulatedCluster) -> None:
    launch(cluster, "a")
    launch(cluster, "b")
    launch(cluster, "c")
    assert states(cluster) == {"a": "ASLEEP", "b": "READY", "c": "READY"}

    cluster.wake("a")
    cluster.run_to_rest()

    assert states(cluster) == {"a": "READY", "b": "ASLEEP", "c": "READY"}


def test_only_models_that_allow_it_and_have_nothing_to_do_make_room(
    cluster: SimulatedCluster,
) -> None:
    launch(cluster, "a", autoload=False)
    launch(cluster, "b")
    use(cluster, "b", outstanding=1)

    with pytest.raises(InsufficientResources):
        cluster.launch("c")
    assert states(cluster) == {"a": "READY", "b": "READY"}

    use(cluster, "b")
    cluster.launch("c")
    cluster.run_to_rest()
    assert states(cluster) == {"a": "READY", "b": "ASLEEP", "c": "READY"}


def test_a_model_that_was_just_asked_stays(cluster: SimulatedCluster) -> None:
    launch(cluster, "a", autoload=False)
    cluster.launch("b", autoload=True)
    cluster.run_to_rest()
    for worker in cluster.workers.values():
        (instance,) = [one.instance for one in worker.living() if one.replica.model == "b"]
        worker.loads[instance] = InstanceLoad(num_outstanding=0, progress=5.0)
    cluster.adapt()

    with pytest.raises(InsufficientResources):
        cluster.launch("c")


def test_what_would_not_help_stays_awake(cluster: SimulatedCluster) -> None:
    add_worker(cluster, SECOND)
    launch(cluster, "elsewhere", at=SECOND)
    launch(cluster, "a")
    launch(cluster, "b")

    cluster.launch("c", worker_ip=FIRST)
    cluster.run_to_rest()

    assert states(cluster) == {"elsewhere": "READY", "a": "ASLEEP", "b": "READY", "c": "READY"}


def test_a_model_that_fits_nowhere_stays_asleep_and_says_so(cluster: SimulatedCluster) -> None:
    launch(cluster, "a")
    launch(cluster, "b", autoload=False)
    launch(cluster, "c", autoload=False)
    assert states(cluster)["a"] == ModelState.ASLEEP

    with pytest.raises(InsufficientResources, match="needs about"):
        cluster.wake("a")

    assert states(cluster)["a"] == ModelState.ASLEEP
