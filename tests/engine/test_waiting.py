# SPDX-License-Identifier: Apache-2.0
"""Priorities are strict, keys take turns, the preempted go first."""

import random

from xinference.engine.scheduler import Sequence
from xinference.engine.waiting import WaitingQueue
from xinference.identifiers import RequestId


def sequence(name: str, *, priority: int = 0, key: str = "") -> Sequence:
    return Sequence(
        request_id=RequestId(name),
        num_prompt_tokens=1,
        num_tokens=1,
        max_num_tokens=2,
        priority=priority,
        fairness_key=key,
    )


def drained(queue: WaitingQueue) -> list[str]:
    return [queue.pop().request_id for _ in range(len(queue))]


def test_without_keys_and_priorities_it_is_first_come_first_served() -> None:
    queue = WaitingQueue()
    for name in "abc":
        queue.add(sequence(name))

    assert drained(queue) == ["a", "b", "c"]
    assert queue.peek() is None


def test_keys_take_turns_and_keep_their_own_order() -> None:
    queue = WaitingQueue()
    for name in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.add(sequence(name, key=name[0]))

    assert drained(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_key_that_comes_back_waits_for_the_others() -> None:
    queue = WaitingQueue()
    for name in ("a1", "b1", "b2"):
        queue.add(sequence(name, key=name[0]))
    first = queue.pop().request_id
    queue.add(sequence("a2", key="a"))

    assert [first, *drained(queue)] == ["a1", "b1", "a2", "b2"]


def test_what_was_preempted_is_first_of_its_own_priority_only() -> None:
    queue = WaitingQueue()
    queue.add(sequence("urgent", priority=-5))
    queue.add(sequence("new"))
    for name in ("younger", "older"):  # the youngest is preempted first
        queue.put_back(sequence(name))

    assert drained(queue) == ["urgent", "older", "younger", "new"]


def test_it_yields_in_the_order_of_admission_and_forgets_what_is_removed() -> None:
    source = random.Random(1)
    queue = WaitingQueue()
    for number in range(500):
        made = sequence(
            str(number), priority=source.choice([-3, 0, 0, 7]), key=source.choice("abc")
        )
        (queue.put_back if source.random() < 0.1 else queue.add)(made)
        if source.random() < 0.4:
            gone = RequestId(str(source.randrange(number + 1)))
            was_there = gone in queue
            assert (queue.remove(gone) is not None) == was_there
            assert gone not in queue
        if source.random() < 0.2 and queue:
            expected = next(iter(queue))
            assert queue.peek() is queue.pop() is expected or queue.peek() is not expected
    expected_order = [one.request_id for one in queue]

    assert expected_order
    assert drained(queue) == expected_order
