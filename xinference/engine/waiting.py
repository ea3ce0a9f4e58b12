# SPDX-License-Identifier: Apache-2.0
"""Who is admitted next: strict priorities, and turns between fairness keys inside each.

In: sequences, with a priority (lower is earlier) and a fairness key. Out: one at a time. A caller
with a thousand requests gets one turn, as a caller with one does; inside a key it is first come,
first served. What was preempted goes before everything of its own priority. Knows no blocks,
slots or budgets.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

from xinference.identifiers import RequestId


class Waits(Protocol):
    """What may wait: a sequence, say."""

    @property
    def request_id(self) -> RequestId:
        """Its own among all that wait."""
        ...

    @property
    def priority(self) -> int:
        """Lower is earlier."""
        ...

    @property
    def fairness_key(self) -> str:
        """Whose turn it takes."""
        ...


Sequence = TypeVar("Sequence", bound=Waits)


class _PriorityClass(Generic[Sequence]):
    """The waiting sequences of one priority.

    Invariant: no key has an empty queue, so the first key always has the next turn.
    """

    def __init__(self) -> None:
        self.preempted: OrderedDict[RequestId, Sequence] = OrderedDict()
        self.by_key: OrderedDict[str, OrderedDict[RequestId, Sequence]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self.preempted or self.by_key)

    def next(self) -> Sequence:
        queue = self.preempted or next(iter(self.by_key.values()))
        return next(iter(queue.values()))

    def remove(self, sequence: Sequence) -> None:
        if self.preempted.pop(sequence.request_id, None) is None:
            queue = self.by_key[sequence.fairness_key]
            del queue[sequence.request_id]
            if not queue:
                del self.by_key[sequence.fairness_key]


class WaitingQueue(Generic[Sequence]):
    """Sequences that wait for a slot. Every operation but iterating is O(1) in their number.

    Invariant: `_heap` has every priority of `_classes` exactly once, and others only until they
    come up.
    """

    def __init__(self) -> None:
        self._sequences: dict[RequestId, Sequence] = {}
        self._classes: dict[int, _PriorityClass[Sequence]] = {}
        self._heap: list[int] = []
        self._in_heap: set[int] = set()

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        """Yield all, in the order in which they would be admitted."""
        for priority in sorted(self._classes):
            waiting = self._classes[priority]
            yield from waiting.preempted.values()
            queues = deque(iter(queue.values()) for queue in waiting.by_key.values())
            while queues:
                queue = queues.popleft()
                sequence = next(queue, None)
                if sequence is not None:
                    yield sequence
                    queues.append(queue)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence behind those of its key."""
        of_key = self._class_of(sequence).by_key.setdefault(sequence.fairness_key, OrderedDict())
        of_key[sequence.request_id] = sequence

    def put_back(self, sequence: Sequence) -> None:
        """Put a preempted sequence before everything of its priority."""
        preempted = self._class_of(sequence).preempted
        preempted[sequence.request_id] = sequence
        preempted.move_to_end(sequence.request_id, last=False)

    def peek(self) -> Sequence | None:
        """Return who is next; None if nobody waits."""
        while self._heap and self._heap[0] not in self._classes:
            self._in_heap.discard(heappop(self._heap))
        return self._classes[self._heap[0]].next() if self._heap else None

    def pop(self) -> Sequence:
        """Take out who is next; that key's next turn comes after all others'."""
        sequence = self.peek()
        assert sequence is not None, "nobody waits"
        by_key = self._classes[sequence.priority].by_key
        if sequence.request_id in by_key.get(sequence.fairness_key, ()):
            by_key.move_to_end(sequence.fairness_key)
        self.remove(sequence.request_id)
        return sequence

    def remove(self, request_id: RequestId) -> Sequence | None:
        """Take out a sequence wherever it stands; None if it does not wait."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            waiting = self._classes[sequence.priority]
            waiting.remove(sequence)
            if not waiting:
                del self._classes[sequence.priority]
        return sequence

    def _class_of(self, sequence: Sequence) -> _PriorityClass[Sequence]:
        assert sequence.request_id not in self._sequences, sequence.request_id
        self._sequences[sequence.request_id] = sequence
        priority = sequence.priority
        if priority not in self._in_heap:
            heappush(self._heap, priority)
            self._in_heap.add(priority)
        return self._classes.setdefault(priority, _PriorityClass())
