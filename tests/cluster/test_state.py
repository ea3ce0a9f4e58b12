# SPDX-License-Identifier: Apache-2.0
"""What the supervisor decides, told as stories; then by a thousand random ones."""

from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.simulation import (
    GIB,
    SimulatedCluster,
    SimulatedWorker,
    description,
    desired,
    gpu,
)
from xinference.cluster.messages import DesiredReplica, InstanceState
from xinference.cluster.routing import ready_routes
from xinference.cluster.state.cluster_state import FIRST_WORKER_SECONDS, RECOVERY_SECONDS
from xinference.cluster.state.observation import LEASE_SECONDS
from xinference.cluster.state.records import Tell
from xinference.errors import (
    InsufficientResources,
    InvalidRequest,
    LaunchCancelled,
    LoadFailed,
    ModelAlreadyExists,
    ModelNotFound,
    ModelNotReady,
)
from xinference.identifiers import InstanceId, ModelUid
from xinference.protocol.deployment import LaunchSpec, ModelState, ReplicaState

QWEN = ModelUid("qwen")


@pytest.fixture
def cluster() -> SimulatedCluster:
    cluster = SimulatedCluster()
    cluster.report(cluster.add_worker())
    return cluster


def ready(cluster: SimulatedCluster, uid: str = "qwen") -> InstanceId:
    cluster.launch(uid)
    cluster.settle()
    cluster.finish_work()
    cluster.settle()
    instance = cluster.state.model(ModelUid(uid)).replicas[0].instance
    assert instance is not None
    return instance


def worker_of(cluster: SimulatedCluster) -> SimulatedWorker:
    (worker,) = cluster.workers.values()
    return worker


def state_of(cluster: SimulatedCluster, uid: str = "qwen") -> ModelState:
    return cluster.state.model(ModelUid(uid)).state


def die(cluster: SimulatedCluster, error: str = "signal 9") -> None:
    worker = worker_of(cluster)
    (report,) = worker.living()
    worker.move(report.instance, InstanceState.EXITED, error)
    cluster.settle()


def test_a_launch_becomes_ready_and_gets_a_route(cluster: SimulatedCluster) -> None:
    launch_id = cluster.launch()
    cluster.settle()
    assert state_of(cluster) is ModelState.CREATING
    assert not cluster.state.launch_outcome(QWEN, launch_id)

    worker = worker_of(cluster)
    (report,) = worker.living()
    worker.move(report.instance, InstanceState.LOADING)
    cluster.settle()
    assert state_of(cluster) is ModelState.LOADING
    with pytest.raises(ModelNotReady, match="loading"):
        ready_routes(cluster.state.routes, QWEN)

    cluster.finish_work()
    cluster.settle()

    assert state_of(cluster) is ModelState.READY
    assert cluster.state.launch_outcome(QWEN, launch_id)
    assert ready_routes(cluster.state.routes, QWEN)[0].instance == report.instance
    assert cluster.store[QWEN].has_been_ready
    assert cluster.state.launch_progress(QWEN).progress == 1.0


def test_a_lost_command_is_sent_again_and_starts_one_instance(cluster: SimulatedCluster) -> None:
    cluster.state.launch(desired(), now=cluster.clock())
    for _ in range(3):
        cluster.reconcile(deliver=lambda tell: False)

    cluster.settle()

    assert len(worker_of(cluster).instances) == 1


def test_a_launch_without_a_worker_is_refused() -> None:
    with pytest.raises(InsufficientResources):
        SimulatedCluster().launch()


def test_a_taken_uid_is_refused(cluster: SimulatedCluster) -> None:
    cluster.launch()

    with pytest.raises(ModelAlreadyExists):
        cluster.launch()


def test_an_unknown_worker_ip_is_refused_by_name(cluster: SimulatedCluster) -> None:
    spec = LaunchSpec(model_uid=QWEN, model_name="qwen", worker_ip="10.9.9.9")

    with pytest.raises(InvalidRequest, match="worker_ip"):
        cluster.state.check_launch(spec, description("qwen"), now=cluster.clock())


def test_a_first_launch_that_fails_to_load_is_an_error_at_once(cluster: SimulatedCluster) -> None:
    launch_id = cluster.launch()
    cluster.settle()
    die(cluster, "no such file")

    assert state_of(cluster) is ModelState.ERROR
    assert QWEN not in cluster.store
    assert worker_of(cluster).instances == {}
    assert "no such file" in cluster.state.model(QWEN).replicas[0].error_message
    with pytest.raises(LoadFailed, match="no such file"):
        cluster.state.launch_outcome(QWEN, launch_id)
    assert cluster.state.launch_progress(QWEN).stage == "error"
    with pytest.raises(LoadFailed):
        ready_routes(cluster.state.routes, QWEN)


def test_the_uid_of_a_failed_launch_can_be_used_at_once(cluster: SimulatedCluster) -> None:
    cluster.launch()
    cluster.settle()
    die(cluster)

    ready(cluster)

    assert state_of(cluster) is ModelState.READY


def test_a_failed_model_can_be_terminated(cluster: SimulatedCluster) -> None:
    cluster.launch()
    cluster.settle()
    die(cluster)

    cluster.terminate()

    with pytest.raises(ModelNotFound):
        cluster.state.model(QWEN)


def test_a_dead_replica_is_started_again_after_a_delay_that_grows(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    delays = []
    for _ in range(4):
        die(cluster)
        assert cluster.state.model(QWEN).replicas[0].state is ReplicaState.BACKING_OFF
        due = cluster.state.next_due()
        assert due is not None
        delays.append(round(due - cluster.clock.monotonic, 3))
        cluster.clock.advance(delays[-1] - 0.01)
        cluster.settle()
        assert worker_of(cluster).living() == []
        cluster.clock.advance(0.02)
        cluster.settle()
        cluster.finish_work()
        cluster.settle()
        assert state_of(cluster) is ModelState.READY

    assert delays == [0.2, 1.0, 2.0, 4.0]
    assert cluster.state.model(QWEN).replicas[0].num_restarts == 4


def test_a_replica_that_dies_too_often_is_given_up_with_its_story(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    for _ in range(6):
        cluster.run_to_rest()
        die(cluster)
    cluster.run_to_rest()

    status = cluster.state.model(QWEN)
    assert status.state is ModelState.ERROR
    assert "signal 9" in status.replicas[0].error_message
    assert worker_of(cluster).instances == {}
    assert cluster.state.story(QWEN)[-1].event_type == "ERROR"
    ready(cluster)


def test_deaths_long_ago_are_forgiven(cluster: SimulatedCluster) -> None:
    ready(cluster)
    for _ in range(12):
        die(cluster)
        cluster.run_to_rest()
        cluster.clock.advance(100.0)
        cluster.settle()

    cluster.run_to_rest()

    assert state_of(cluster) is ModelState.READY


def test_terminate_ends_when_the_process_is_gone(cluster: SimulatedCluster) -> None:
    ready(cluster)

    launch_id = cluster.terminate()
    cluster.settle()
    assert state_of(cluster) is ModelState.TERMINATING
    assert QWEN not in cluster.store
    assert not cluster.state.is_ended(QWEN, launch_id)
    with pytest.raises(ModelNotReady):
        ready_routes(cluster.state.routes, QWEN)

    cluster.finish_work()
    cluster.settle()
    assert cluster.state.is_ended(QWEN, launch_id)
    assert worker_of(cluster).instances == {}
    with pytest.raises(ModelNotFound):
        ready_routes(cluster.state.routes, QWEN)


def test_a_cancelled_launch_leaves_nothing_and_its_waiter_is_told(
    cluster: SimulatedCluster,
) -> None:
    launch_id = cluster.launch()
    cluster.state.check_cancel(QWEN)
    cluster.terminate()
    cluster.settle()
    cluster.finish_work()
    cluster.settle()

    with pytest.raises(LaunchCancelled):
        cluster.state.launch_outcome(QWEN, launch_id)
    assert cluster.state.launch_progress(QWEN).stage == "cancelled"
    assert worker_of(cluster).instances == {}


def test_a_cancel_that_overtakes_the_start_wins(cluster: SimulatedCluster) -> None:
    lost: list[Tell] = []
    cluster.state.launch(desired(), now=cluster.clock())
    cluster.reconcile(deliver=lambda tell: bool(lost.append(tell)))
    cluster.terminate()
    cluster.settle()

    worker_of(cluster).apply(lost[0].command)
    cluster.settle()

    assert worker_of(cluster).living() == []
    assert cluster.state.uids() == set()


def test_a_ready_model_cannot_be_cancelled(cluster: SimulatedCluster) -> None:
    ready(cluster)

    with pytest.raises(InvalidRequest, match="terminate"):
        cluster.state.check_cancel(QWEN)


def test_a_killed_worker_that_comes_back_gets_its_models_again(cluster: SimulatedCluster) -> None:
    instance = ready(cluster)
    old = worker_of(cluster)
    cluster.state.node_lost(old.node, old.worker_epoch)
    cluster.reconcile()
    with pytest.raises(ModelNotReady):
        ready_routes(cluster.state.routes, QWEN)

    cluster.add_worker(old.node)
    cluster.run_to_rest()

    assert state_of(cluster) is ModelState.READY
    assert cluster.state.model(QWEN).replicas[0].instance != instance
    assert cluster.state.model(QWEN).replicas[0].num_restarts == 0


def test_a_worker_that_does_not_answer_keeps_its_routes_and_gets_nothing_new(
    cluster: SimulatedCluster,
) -> None:
    instance = ready(cluster)
    silent = worker_of(cluster)
    cluster.state.node_silent(silent.node, silent.worker_epoch)
    cluster.reconcile()

    assert ready_routes(cluster.state.routes, QWEN)[0].instance == instance
    with pytest.raises(InsufficientResources):
        cluster.launch("other")

    cluster.settle()  # it reports again
    cluster.launch("other")


def test_a_new_worker_that_adopted_what_ran_keeps_the_routes(cluster: SimulatedCluster) -> None:
    instance = ready(cluster)
    old = worker_of(cluster)
    cluster.state.node_silent(old.node, old.worker_epoch)
    version = cluster.state.routes.version
    new = cluster.add_worker(old.node)
    new.instances = dict(old.instances)

    cluster.settle()

    assert ready_routes(cluster.state.routes, QWEN)[0].instance == instance
    assert cluster.state.routes.version == version
    assert cluster.state.model(QWEN).replicas[0].num_restarts == 0
    assert "adopted" in cluster.state.story(QWEN)[-1].event_content


def leave(cluster: SimulatedCluster, worker: SimulatedWorker) -> None:
    """Let a worker say that it leaves, as at SIGTERM."""
    worker.is_leaving = True
    worker.sequence += 1
    cluster.settle()


def test_what_runs_on_a_worker_that_leaves_serves_until_it_is_ready_elsewhere(
    cluster: SimulatedCluster,
) -> None:
    instance = ready(cluster)
    first = worker_of(cluster)
    second = cluster.add_worker("127.0.0.1:2")
    cluster.report(second)

    leave(cluster, first)

    assert ready_routes(cluster.state.routes, QWEN)[0].instance == instance
    (new,) = second.living()
    second.move(new.instance, InstanceState.READY)
    cluster.settle()
    assert ready_routes(cluster.state.routes, QWEN)[0].instance == new.instance
    assert [report.state for report in first.living()] == [InstanceState.STOPPING]
    cluster.run_to_rest()
    assert first.instances == {}
    replica = cluster.state.model(QWEN).replicas[0]
    assert (replica.node, replica.num_restarts) == (second.node, 0)


def test_what_has_no_other_place_is_stopped_and_waits(cluster: SimulatedCluster) -> None:
    ready(cluster)
    worker = worker_of(cluster)

    leave(cluster, worker)

    assert [report.state for report in worker.living()] == [InstanceState.STOPPING]
    cluster.run_to_rest()
    assert state_of(cluster) is ModelState.LOADING
    del cluster.workers[worker.node]
    cluster.state.node_lost(worker.node, worker.worker_epoch)
    cluster.add_worker(worker.node)
    cluster.run_to_rest()
    assert state_of(cluster) is ModelState.READY


def test_a_model_that_is_terminated_while_it_moves_is_gone_from_both_nodes(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    first = worker_of(cluster)
    second = cluster.add_worker("127.0.0.1:2")
    cluster.report(second)
    leave(cluster, first)

    cluster.terminate()
    cluster.run_to_rest()

    assert cluster.state.uids() == set()
    assert first.instances == second.instances == {}


def test_a_rolling_restart_of_all_workers_costs_no_route(
    cluster: SimulatedCluster,
) -> None:
    first = worker_of(cluster)
    second = cluster.add_worker("127.0.0.1:2")
    cluster.report(second)
    cluster.launch(replica=2)
    cluster.run_to_rest()
    assert len(first.living()) == len(second.living()) == 1

    for worker in (first, second):
        leave(cluster, worker)
        assert len(cluster.state.routes.models[QWEN].routes) == 2
        while worker.living():
            cluster.finish_work()
            cluster.settle()
            assert len(cluster.state.routes.models[QWEN].routes) == 2
        cluster.state.node_lost(worker.node, worker.worker_epoch)
        cluster.add_worker(worker.node)
        cluster.run_to_rest()
        assert len(cluster.state.routes.models[QWEN].routes) == 2


def test_a_late_report_of_a_dead_worker_is_void(cluster: SimulatedCluster) -> None:
    ready(cluster)
    old = worker_of(cluster)
    new = cluster.add_worker(old.node)
    cluster.run_to_rest()

    assert not cluster.state.node_reported(old.report(), now=cluster.clock())
    cluster.reconcile()

    assert cluster.state.model(QWEN).replicas[0].instance in new.instances


def test_a_late_report_of_a_worker_that_left_is_void(cluster: SimulatedCluster) -> None:
    worker = cluster.workers.pop(worker_of(cluster).node)
    cluster.state.node_lost(worker.node, worker.report().worker_epoch)

    assert not cluster.state.node_reported(worker.report(), now=cluster.clock())

    assert cluster.state.nodes(now=cluster.clock()) == []


def test_a_silent_worker_is_lost_after_its_lease(cluster: SimulatedCluster) -> None:
    ready(cluster)
    worker = worker_of(cluster)
    cluster.clock.advance(LEASE_SECONDS - 0.1)
    assert cluster.state.node_beat(worker.beat(), now=cluster.clock())
    cluster.clock.advance(LEASE_SECONDS - 0.1)
    cluster.reconcile()
    assert state_of(cluster) is ModelState.READY

    cluster.clock.advance(0.2)
    cluster.reconcile()

    assert state_of(cluster) is not ModelState.READY
    assert cluster.state.nodes(now=cluster.clock()) == []
    assert not cluster.state.node_beat(worker.beat(), now=cluster.clock())


def test_a_worker_that_was_only_silent_keeps_its_replica(cluster: SimulatedCluster) -> None:
    instance = ready(cluster)
    cluster.clock.advance(LEASE_SECONDS + 1)
    cluster.reconcile()

    cluster.settle()

    assert ready_routes(cluster.state.routes, QWEN)[0].instance == instance
    assert len(worker_of(cluster).instances) == 1


def test_a_worker_that_returns_after_being_replaced_loses_its_surplus(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    first = worker_of(cluster)
    second = cluster.add_worker("127.0.0.1:2")
    del cluster.workers[first.node]
    cluster.clock.advance(LEASE_SECONDS + 1)
    cluster.run_to_rest()
    assert len(second.living()) == 1

    cluster.workers[first.node] = first
    cluster.run_to_rest()

    assert len(first.instances) + len(second.instances) == 1
    assert state_of(cluster) is ModelState.READY


def test_a_new_launch_waits_until_an_old_instance_of_its_uid_is_gone(
    cluster: SimulatedCluster,
) -> None:
    old = ready(cluster)
    first = worker_of(cluster)
    del cluster.workers[first.node]
    cluster.clock.advance(LEASE_SECONDS + 1)
    cluster.terminate()  # nothing of it is seen, so it is forgotten at once
    assert cluster.state.uids() == set()
    cluster.workers[first.node] = first
    cluster.report(first)

    cluster.launch()

    cluster.settle()
    assert [report.instance for report in first.living()] == [old]
    cluster.finish_work()
    cluster.settle()
    (new,) = first.living()
    assert new.instance != old


def test_a_restarted_supervisor_adopts_what_runs(cluster: SimulatedCluster) -> None:
    instance = ready(cluster)
    before = cluster.state.routes.version

    cluster.restart_supervisor()
    cluster.reconcile()
    assert state_of(cluster) is ModelState.LOADING
    cluster.settle()

    assert ready_routes(cluster.state.routes, QWEN)[0].instance == instance
    assert len(worker_of(cluster).instances) == 1
    assert cluster.state.routes.version > before


def test_a_restarted_supervisor_waits_for_reports_before_it_starts_anything(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    first = worker_of(cluster)
    second = cluster.add_worker("127.0.0.1:2")
    cluster.restart_supervisor()
    cluster.report(second)
    cluster.reconcile()
    assert second.instances == {}

    cluster.clock.advance(RECOVERY_SECONDS / 2)
    cluster.settle()

    assert second.instances == {}
    assert len(first.instances) == 1


def test_a_restarted_supervisor_that_has_heard_of_no_worker_waits_longer(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    cluster.restart_supervisor()

    cluster.clock.advance(FIRST_WORKER_SECONDS - 1.0)
    assert cluster.state.is_recovering(now=cluster.clock())
    cluster.report(worker_of(cluster))

    assert not cluster.state.is_recovering(now=cluster.clock())
    cluster.reconcile()
    assert len(ready_routes(cluster.state.routes, QWEN)) == 1


def test_after_a_power_cut_everything_comes_back(cluster: SimulatedCluster) -> None:
    ready(cluster, "one")
    ready(cluster, "two")
    cluster.workers.clear()
    cluster.restart_supervisor()
    cluster.add_worker("127.0.0.1:77")

    cluster.run_to_rest()

    assert [status.state for status in cluster.state.models()] == [ModelState.READY] * 2


def test_an_older_supervisor_is_not_obeyed(cluster: SimulatedCluster) -> None:
    ready(cluster)
    old = cluster.state
    cluster.restart_supervisor()
    cluster.settle()
    old.terminate(QWEN, now=cluster.clock())
    (tell,) = [e for e in old.reconcile(now=cluster.clock()) if isinstance(e, Tell)]
    worker = worker_of(cluster)
    worker.supervisor_epoch = cluster.epoch

    worker.apply(tell.command)

    assert len(worker.living()) == 1


def test_the_version_grows_only_when_routes_change(cluster: SimulatedCluster) -> None:
    ready(cluster)
    version = cluster.state.routes.version

    for _ in range(3):
        cluster.clock.advance(0.5)
        cluster.settle()

    assert cluster.state.routes.version == version


def test_a_launch_of_three_replicas_is_done_when_all_are_ready(cluster: SimulatedCluster) -> None:
    launch_id = cluster.launch(replica=3)
    cluster.settle()
    worker = worker_of(cluster)
    first, *others = worker.living()
    worker.move(first.instance, InstanceState.READY)
    cluster.settle()

    # It answers already, but the launch is not over.
    assert state_of(cluster) is ModelState.READY
    assert len(cluster.state.routes.models[QWEN].routes) == 1
    assert not cluster.state.launch_outcome(QWEN, launch_id)
    progress = cluster.state.launch_progress(QWEN)
    assert progress.progress < 1.0
    assert progress.replicas[0].stage == "completed"
    assert progress.progress == min(replica.progress for replica in progress.replicas)

    for report in others:
        worker.move(report.instance, InstanceState.READY)
    cluster.settle()
    assert cluster.state.launch_outcome(QWEN, launch_id)
    assert len(cluster.state.routes.models[QWEN].routes) == 3
    assert cluster.state.model(QWEN).description.replica == 3


def test_a_launch_of_which_one_replica_does_not_load_ends_as_a_whole(
    cluster: SimulatedCluster,
) -> None:
    launch_id = cluster.launch(replica=2)
    cluster.settle()
    worker = worker_of(cluster)
    first, second = worker.living()
    worker.move(first.instance, InstanceState.READY)
    worker.move(second.instance, InstanceState.EXITED, "out of memory")
    cluster.settle()
    assert not cluster.state.launch_outcome(QWEN, launch_id), "the first one still ends"

    cluster.finish_work()
    cluster.settle()

    with pytest.raises(LoadFailed, match="out of memory"):
        cluster.state.launch_outcome(QWEN, launch_id)
    assert worker.instances == {}
    assert QWEN not in cluster.store


def test_replicas_are_placed_on_gpus_and_told_which(cluster: SimulatedCluster) -> None:
    worker = cluster.add_worker("127.0.0.1:2", devices=(gpu(0), gpu(1)))
    cluster.report(worker)

    cluster.launch(replica=3)
    cluster.settle()

    given = sorted(str(one.gpu_idx) for one in cluster.state.model(QWEN).replicas)
    assert given == ["(0,)", "(0,)", "(1,)"]
    assert all(report.gpu_idx in {(0,), (1,)} for report in worker.living())


def test_replicas_that_share_a_gpu_share_its_memory() -> None:
    cluster = SimulatedCluster()
    cluster.report(cluster.add_worker(devices=(gpu(0, total_gib=80), gpu(1))))
    cluster.state.launch(
        desired(replicas=tuple(DesiredReplica(index=index) for index in range(3))),
        now=cluster.clock(),
    )
    (tell,) = [one for one in cluster.reconcile(lambda _: False) if isinstance(one, Tell)]

    options = {
        start.spec.replica.index: (start.spec.gpu_idx, start.spec.engine_options)
        for start in tell.command.start
    }
    assert [options[index][0] for index in range(3)] == [(0,), (1,), (0,)]
    assert [options[index][1].device_memory_bytes for index in range(3)] == [
        40 * GIB,
        None,
        40 * GIB,
    ]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"n_gpu": 1}, InvalidRequest, "n_gpu: no worker has a GPU"),
        ({"gpu_idx": (0,)}, InvalidRequest, "gpu_idx: there is no GPU"),
        ({"worker_ip": "10.9.9.9"}, InvalidRequest, "worker_ip"),
    ],
)
def test_a_place_that_is_not_there_is_refused_by_name(
    cluster: SimulatedCluster, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        cluster.launch(**options)


def test_more_gpus_than_there_are_are_refused() -> None:
    cluster = SimulatedCluster()
    cluster.report(cluster.add_worker(devices=(gpu(0),)))

    with pytest.raises(InvalidRequest, match="asks for 2 GPUs; 1 can be had"):
        cluster.launch(replica=2, n_gpu=2)


def test_without_sharing_the_third_replica_on_two_gpus_is_refused() -> None:
    cluster = SimulatedCluster(shares_gpus=False)
    cluster.report(cluster.add_worker(devices=(gpu(0), gpu(1))))

    with pytest.raises(InsufficientResources, match="XINFERENCE_ALLOW_MULTI_REPLICA_PER_GPU"):
        cluster.launch(replica=3)

    cluster.launch(replica=2)
    cluster.settle()
    assert [one.gpu_idx for one in cluster.state.model(QWEN).replicas] == [(0,), (1,)]


def test_a_model_that_fits_nowhere_is_refused_with_the_numbers(cluster: SimulatedCluster) -> None:
    huge = replace(description("qwen"), model_size_in_billions="70")
    spec = LaunchSpec(model_uid=QWEN, model_name="qwen")

    with pytest.raises(InsufficientResources, match=r"needs about 156\.5 GiB"):
        cluster.state.check_launch(spec, huge, now=cluster.clock())


def test_scaling_up_leaves_what_serves_alone(cluster: SimulatedCluster) -> None:
    instance = ready(cluster)

    ticket = cluster.add_replicas(count=2)
    cluster.settle()

    assert ticket.replicas == (1, 2)
    assert ready_routes(cluster.state.routes, QWEN)[0].instance == instance
    assert not cluster.state.replicas_outcome(ticket)
    cluster.finish_work()
    cluster.settle()
    assert cluster.state.replicas_outcome(ticket)
    assert len(cluster.state.routes.models[QWEN].routes) == 3
    assert len(cluster.store[QWEN].replicas) == 3


def test_an_added_replica_that_does_not_load_is_dropped_and_the_others_go_on(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    ticket = cluster.add_replicas()
    cluster.settle()
    worker = worker_of(cluster)
    (added,) = [one for one in worker.living() if one.replica.index == 1]

    worker.move(added.instance, InstanceState.EXITED, "out of memory")
    cluster.settle()

    with pytest.raises(LoadFailed, match="out of memory"):
        cluster.state.replicas_outcome(ticket)
    assert [one.replica.index for one in cluster.state.model(QWEN).replicas] == [0]
    assert len(cluster.store[QWEN].replicas) == 1
    assert state_of(cluster) is ModelState.READY
    assert "does not load" in cluster.state.story(QWEN)[-1].event_content


def test_an_added_replica_that_does_not_load_is_the_end_of_a_model_that_has_no_other(
    cluster: SimulatedCluster,
) -> None:
    ready(cluster)
    ticket = cluster.add_replicas()
    cluster.settle()
    worker = worker_of(cluster)
    (added,) = [one for one in worker.living() if one.replica.index == 1]
    cluster.remove_replica(0)

    worker.move(added.instance, InstanceState.EXITED, "out of memory")
    cluster.run_to_rest()

    with pytest.raises(LoadFailed, match="out of memory"):
        cluster.state.replicas_outcome(ticket)
    assert state_of(cluster) is ModelState.ERROR
    assert "out of memory" in cluster.state.launch_progress(QWEN).info
    assert QWEN not in cluster.store


def test_scaling_down_ends_one_replica_and_its_number_can_be_used_again(
    cluster: SimulatedCluster,
) -> None:
    cluster.launch(replica=3)
    cluster.run_to_rest()

    ticket = cluster.remove_replica(1)
    cluster.settle()

    assert len(cluster.state.routes.models[QWEN].routes) == 2
    assert not cluster.state.are_gone(ticket)
    cluster.finish_work()
    cluster.settle()
    assert cluster.state.are_gone(ticket)
    assert [one.replica.index for one in cluster.state.model(QWEN).replicas] == [0, 2]
    assert cluster.add_replicas().replicas == (1,)


def test_a_model_without_this_replica_or_not_ready_is_not_scaled(
    cluster: SimulatedCluster,
) -> None:
    cluster.launch()
    with pytest.raises(ModelNotReady):
        cluster.add_replicas()
    with pytest.raises(InvalidRequest, match="has no replica 7"):
        cluster.remove_replica(7)


def test_no_replica_is_removed_from_a_model_that_ends(cluster: SimulatedCluster) -> None:
    cluster.launch(replica=2)
    cluster.run_to_rest()
    cluster.terminate()

    with pytest.raises(InvalidRequest, match="is TERMINATING"):
        cluster.remove_replica(0)

    assert cluster.store == {}


def test_one_replica_that_dies_too_often_leaves_the_others_serving(
    cluster: SimulatedCluster,
) -> None:
    cluster.launch(replica=2)
    cluster.run_to_rest()
    worker = worker_of(cluster)
    for _ in range(6):
        (weak,) = [one for one in worker.living() if one.replica.index == 1]
        worker.move(weak.instance, InstanceState.EXITED, "signal 9")
        cluster.run_to_rest()

    first, second = cluster.state.model(QWEN).replicas
    assert (first.state, second.state) == (ReplicaState.READY, ReplicaState.FAILED)
    assert "ended 6 times" in second.error_message
    assert state_of(cluster) is ModelState.READY

    cluster.remove_replica(1)
    cluster.add_replicas()
    cluster.run_to_rest()
    assert len(cluster.state.routes.models[QWEN].routes) == 2


def test_a_restarted_supervisor_adopts_every_replica_with_its_gpu() -> None:
    cluster = SimulatedCluster()
    cluster.report(cluster.add_worker(devices=(gpu(0), gpu(1))))
    cluster.launch(replica=3)
    cluster.run_to_rest()
    before = cluster.state.model(QWEN).replicas

    cluster.restart_supervisor()
    cluster.settle()

    after = cluster.state.model(QWEN).replicas
    assert [one.instance for one in after] == [one.instance for one in before]
    assert [one.gpu_idx for one in after] == [one.gpu_idx for one in before]
