# SPDX-License-Identifier: Apache-2.0
"""A replica is alive while it gets somewhere."""

from xinference.cluster.liveness import STUCK_SECONDS, UNRESPONSIVE_SECONDS, Liveness


def working(progress: float) -> dict[str, float]:
    return {"progress": progress, "num_running": 1.0, "num_waiting": 3.0}


def test_a_long_prefill_whose_chunks_end_is_alive() -> None:
    liveness = Liveness(now=0.0)

    for now in range(0, 600, 5):
        assert liveness.observe(working(now // 20), is_stopped=False, now=float(now)) is None


def test_an_engine_with_work_that_finishes_no_step_is_stuck() -> None:
    liveness = Liveness(now=0.0)
    assert liveness.observe(working(7), is_stopped=False, now=100.0) is None
    assert liveness.observe(working(7), is_stopped=False, now=99.9 + STUCK_SECONDS) is None

    problem = liveness.observe(working(7), is_stopped=False, now=100.0 + STUCK_SECONDS)

    assert problem == "its engine has work, but finished no step for 30 s"


def test_an_engine_without_work_may_rest_for_ever() -> None:
    liveness = Liveness(now=0.0)
    idle = {"progress": 7.0, "num_running": 0.0, "num_waiting": 0.0}

    for now in (1.0, 1e4, 1e5):
        assert liveness.observe(idle, is_stopped=False, now=now) is None
    assert liveness.observe(working(7), is_stopped=False, now=1e5 + 1.0) is None


def test_silence_is_forgiven_for_a_while() -> None:
    liveness = Liveness(now=0.0)
    assert liveness.observe(None, is_stopped=False, now=UNRESPONSIVE_SECONDS - 0.1) is None
    assert liveness.observe(working(1), is_stopped=False, now=UNRESPONSIVE_SECONDS) is None
    assert liveness.observe(None, is_stopped=False, now=2 * UNRESPONSIVE_SECONDS - 0.1) is None

    problem = liveness.observe(None, is_stopped=False, now=2 * UNRESPONSIVE_SECONDS)

    assert problem == "it has answered nothing for 10 s"


def test_a_stopped_process_is_found_at_once() -> None:
    problem = Liveness(now=0.0).observe(None, is_stopped=True, now=3.0)

    assert problem == "its process was stopped by a signal"
