# SPDX-License-Identifier: Apache-2.0
"""Where requests go."""

import time

import pytest

from xinference.cluster.messages import ModelRoutes, Route, RoutesVersion, RoutingTable
from xinference.cluster.routing import (
    EJECTION_SECONDS,
    SOFT_FAILURES,
    STALL_SECONDS,
    Balancer,
    RequestCost,
    RetryBudget,
    cost_of,
    ready_routes,
    routes_of,
)
from xinference.errors import LoadFailed, ModelNotFound, ModelNotReady
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.protocol.deployment import ModelState
from xinference.protocol.generation import (
    ChatPrompt,
    GenerationRequest,
    Message,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)

QWEN = ModelUid("qwen")
ROUTE = Route(replica=ReplicaUid(QWEN, 0), instance=InstanceId("i"), address="unix:s")


def table(**models: ModelRoutes) -> RoutingTable:
    return RoutingTable(
        version=RoutesVersion(supervisor_epoch=1, number=1),
        models={ModelUid(uid): routes for uid, routes in models.items()},
    )


def test_a_ready_model_has_a_route() -> None:
    ready = ModelRoutes(state=ModelState.READY, retry_after_seconds=5, routes=(ROUTE,))

    assert ready_routes(table(qwen=ready), QWEN) == (ROUTE,)


def test_an_unknown_model_is_not_found_and_the_others_are_named() -> None:
    ready = ModelRoutes(state=ModelState.READY, retry_after_seconds=5, routes=(ROUTE,))

    with pytest.raises(ModelNotFound, match="Running: qwen"):
        ready_routes(table(qwen=ready), ModelUid("other"))


def test_a_model_that_is_not_ready_says_when_to_try_again() -> None:
    loading = ModelRoutes(state=ModelState.LOADING, retry_after_seconds=6)

    with pytest.raises(ModelNotReady, match="is loading; try again in 6 s"):
        ready_routes(table(qwen=loading), QWEN)
    assert routes_of(table(qwen=loading), QWEN) == ()


def test_a_model_that_was_given_up_says_why() -> None:
    failed = ModelRoutes(state=ModelState.ERROR, retry_after_seconds=5, problem="no such file")

    with pytest.raises(LoadFailed, match="no such file"):
        ready_routes(table(qwen=failed), QWEN)


def test_versions_grow_over_restarts_of_the_supervisor() -> None:
    late = RoutesVersion(supervisor_epoch=1, number=900)

    assert RoutesVersion() < late < RoutesVersion(supervisor_epoch=2, number=1)


def route(index: int) -> Route:
    instance = InstanceId(f"i{index}")
    return Route(replica=ReplicaUid(QWEN, index), instance=instance, address=f"unix:{index}")


TWO = (route(0), route(1))
THREE = (*TWO, route(2))
SMALL = RequestCost(10, 20, ())
PROMPT = "An operator reads this manual before anything else. " * 40


def cost(text: str = "hello", *, max_tokens: int | None = None, salt: str = "") -> RequestCost:
    request = GenerationRequest(
        request_id=RequestId("r"),
        prompt=TextPrompt(text=text),
        sampling=SamplingParams(max_tokens=max_tokens),
        cache_salt=salt,
    )
    return cost_of(QWEN, request)


def chosen(balancer: Balancer, routes: tuple[Route, ...] = TWO, what: RequestCost = SMALL) -> int:
    found = balancer.choose(routes, what)
    assert found is not None
    return found.replica.index


def test_equals_take_turns() -> None:
    balancer = Balancer()

    assert sorted(chosen(balancer, THREE) for _ in range(3)) == [0, 1, 2]


def test_the_least_outstanding_tokens_win_not_the_fewest_requests() -> None:
    balancer = Balancer()
    balancer.begin(TWO[0], RequestCost(4000, 100, ()))
    for _ in range(3):
        balancer.begin(TWO[1], SMALL)

    assert [chosen(balancer) for _ in range(3)] == [1, 1, 1]


def test_work_that_is_done_counts_no_longer() -> None:
    balancer = Balancer()
    first = balancer.begin(TWO[0], RequestCost(500, 100, ()))
    balancer.begin(TWO[1], RequestCost(50, 100, ()))
    assert chosen(balancer) == 1

    balancer.progress(first, 1)  # its prompt is computed
    assert chosen(balancer) == 0
    for _ in range(5):
        balancer.progress(first, 100)
    balancer.end(first, is_good=True)
    balancer.end(first)

    assert chosen(balancer) == 0


def test_a_prompt_goes_where_its_beginning_is_known() -> None:
    balancer = Balancer()
    balancer.end(balancer.begin(TWO[1], cost(PROMPT)))
    same_beginning = cost(PROMPT + "And now?")

    assert [chosen(balancer, what=same_beginning) for _ in range(3)] == [1, 1, 1]
    assert {chosen(balancer, what=cost(PROMPT, salt="other")) for _ in range(2)} == {0, 1}


def test_a_replica_with_much_more_to_do_loses_a_prompt_that_it_knows() -> None:
    balancer = Balancer()
    balancer.begin(TWO[1], cost(PROMPT))
    for _ in range(20):
        balancer.begin(TWO[1], RequestCost(100, 100, ()))

    assert chosen(balancer, what=cost(PROMPT)) == 0


def test_work_of_other_gateways_counts() -> None:
    balancer = Balancer()
    balancer.begin(TWO[0], SMALL)
    balancer.begin(TWO[1], SMALL)
    balancer.observe(TWO[0].instance, {"num_running": 9.0, "progress": 1.0}, now=0.0)

    assert [chosen(balancer) for _ in range(2)] == [1, 1]


def test_a_lost_replica_is_ejected_and_let_back_one_request_at_a_time() -> None:
    balancer = Balancer()
    lost = TWO[0].instance
    balancer.failed(lost, now=100.0, is_lost=True)
    assert [chosen(balancer) for _ in range(3)] == [1, 1, 1]
    assert balancer.to_probe(TWO, now=100.5) == []

    later = 100.0 + EJECTION_SECONDS[0]
    assert balancer.to_probe(TWO, now=later) == [TWO[0]]
    balancer.observe(lost, {"progress": 5.0}, now=later)
    trial = balancer.begin(TWO[0], SMALL)
    assert [chosen(balancer) for _ in range(3)] == [1, 1, 1]

    balancer.end(trial, is_good=True)

    assert not balancer.is_ejected(lost)
    assert {chosen(balancer) for _ in range(2)} == {0, 1}


def test_a_replica_that_fails_its_trial_waits_twice_as_long() -> None:
    balancer = Balancer()
    lost = TWO[0].instance
    now = 0.0
    for seconds in EJECTION_SECONDS:
        balancer.failed(lost, now=now, is_lost=True)
        assert balancer.to_probe(TWO, now=now + seconds - 0.01) == []
        now += seconds
        assert balancer.to_probe(TWO, now=now) == [TWO[0]]
        balancer.observe(lost, {}, now=now)


def test_failed_requests_eject_only_in_a_row() -> None:
    balancer = Balancer()
    instance = TWO[0].instance
    for _ in range(SOFT_FAILURES - 1):
        balancer.failed(instance, now=0.0, is_lost=False)
    balancer.end(balancer.begin(TWO[0], SMALL), is_good=True)
    for _ in range(SOFT_FAILURES - 1):
        balancer.failed(instance, now=0.0, is_lost=False)
    assert not balancer.is_ejected(instance)

    balancer.failed(instance, now=0.0, is_lost=False)

    assert balancer.is_ejected(instance)


def test_the_last_replica_is_never_ejected() -> None:
    balancer = Balancer()
    for one in TWO:
        balancer.failed(one.instance, now=0.0, is_lost=True)

    assert chosen(balancer) in {0, 1}
    assert chosen(balancer, (TWO[0],)) == 0
    assert balancer.choose(TWO, SMALL, excluded={one.instance for one in TWO}) is None


def step(balancer: Balancer, one: Route, *, now: float, steps: float) -> None:
    balancer.observe(one.instance, {"num_running": 2.0, "progress": steps}, now=now)


def test_a_replica_that_is_far_slower_than_the_others_is_ejected() -> None:
    balancer = Balancer()
    for one in THREE:
        balancer.begin(one, SMALL)
        step(balancer, one, now=0.0, steps=10)
    for one, steps in zip(THREE, (30, 28, 11), strict=True):
        step(balancer, one, now=3.0, steps=steps)

    assert balancer.eject_slow(THREE, now=3.0) == [THREE[2]]
    assert {chosen(balancer, THREE) for _ in range(4)} == {0, 1}


def test_slow_is_only_what_is_slower_than_others() -> None:
    balancer = Balancer()
    for one in TWO:
        balancer.begin(one, SMALL)
        step(balancer, one, now=0.0, steps=1)
        step(balancer, one, now=6.0, steps=2)

    assert balancer.eject_slow(TWO, now=6.0) == []
    assert balancer.eject_slow(TWO[:1], now=6.0) == []


def test_an_engine_with_work_that_finishes_no_step_gets_nothing_more() -> None:
    balancer = Balancer()
    balancer.begin(TWO[0], SMALL)
    for now in (0.0, 5.0, STALL_SECONDS + 0.1):
        assert not balancer.is_ejected(TWO[0].instance)
        step(balancer, TWO[0], now=now, steps=7)

    assert balancer.is_ejected(TWO[0].instance)
    assert chosen(balancer) == 1


def test_an_engine_in_a_long_prefill_that_moves_keeps_its_requests() -> None:
    balancer = Balancer()
    balancer.begin(TWO[0], SMALL)
    for now in range(0, 60, 5):
        step(balancer, TWO[0], now=float(now), steps=float(now))

    assert not balancer.is_ejected(TWO[0].instance)


def test_what_is_gone_is_forgotten_when_it_has_no_work_left() -> None:
    balancer = Balancer()
    busy = balancer.begin(TWO[0], SMALL)
    balancer.end(balancer.begin(TWO[1], SMALL))
    balancer.keep(set())
    assert TWO[0].instance in balancer._replicas
    assert TWO[1].instance not in balancer._replicas

    balancer.end(busy)
    balancer.keep(set())

    assert balancer._replicas == {}


def test_of_a_thousand_replicas_a_few_are_compared() -> None:
    balancer = Balancer()
    many = tuple(map(route, range(1000)))
    known = cost(PROMPT)
    balancer.end(balancer.begin(many[123], known))

    assert chosen(balancer, many, known) == 123
    assert len({chosen(balancer, many) for _ in range(100)}) > 50
    excluded = {one.instance for one in many[:-1]}
    assert balancer.choose(many, SMALL, excluded=excluded) == many[-1]


def test_the_cost_of_a_request_is_what_it_brings_and_what_it_asks_for() -> None:
    assert cost("x" * 400, max_tokens=5) == RequestCost(101, 5, cost("x" * 400).prefix)
    assert cost("x", max_tokens=100_000).answer_tokens == 128
    tokens = GenerationRequest(request_id=RequestId("r"), prompt=TokenPrompt(token_ids=(1,) * 50))
    assert cost_of(QWEN, tokens).prompt_tokens == 51
    turns = (Message(role="system", content=PROMPT), Message(role="user", content="Hi"))
    chat = GenerationRequest(request_id=RequestId("r"), prompt=ChatPrompt(messages=turns))
    longer = GenerationRequest(
        request_id=RequestId("r"),
        prompt=ChatPrompt(messages=(*turns, Message(role="assistant", content=PROMPT))),
    )
    known, more = cost_of(QWEN, chat).prefix, cost_of(QWEN, longer).prefix
    assert known
    assert more[: len(known)] == known


def test_a_decision_takes_less_than_fifty_microseconds() -> None:
    balancer = Balancer()
    text = PROMPT * 2
    request = GenerationRequest(request_id=RequestId("r"), prompt=TextPrompt(text=text))
    many = tuple(map(route, range(10)))

    def decide() -> None:
        what = cost_of(QWEN, request)
        found = balancer.choose(many, what)
        assert found is not None
        balancer.end(balancer.begin(found, what))

    fastest = min(_seconds(decide, times=100) for _ in range(20))

    # Why the fastest: the others say how busy this machine was.
    assert fastest / 100 < 50e-6


def _seconds(work: object, *, times: int) -> float:
    assert callable(work)
    began = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - began


def test_retries_are_a_tenth_of_the_requests_after_a_burst() -> None:
    budget = RetryBudget(now=0.0)
    taken = 0
    while budget.take(now=0.0):
        taken += 1
    assert taken == RetryBudget.BURST

    for _ in range(100):
        budget.note_request()
    assert sum(budget.take(now=0.0) for _ in range(100)) in {9, 10}
    assert sum(budget.take(now=2.0) for _ in range(100)) in {19, 20}
