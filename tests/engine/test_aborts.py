# SPDX-License-Identifier: Apache-2.0
"""Aborts at any time, of any request, many of them: nothing is left, and nobody else notices."""

import random
import threading
from typing import Any

from tests.engine.tiny_engines import Transcript, add, run_to_end, tiny_engine
from tests.long_runs import RecordLongRun
from tests.models_tiny import VOCAB_SIZE
from xinference.engine import Engine, EngineLoop, EngineRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    SamplingParams,
)

NUM_WANTED = 12
"""Requests that are there at any time: three times the slots."""
DEADLINE_SECONDS = 60


def small_engine() -> Engine:
    """Return one where requests wait, are cut into chunks, preempted and find prefixes."""
    return tiny_engine(num_blocks=7, max_num_batched_tokens=16, max_num_seqs=4)


def draw_prompt(source: random.Random) -> list[int]:
    stem = source.choice([3, 200])
    return [stem] * source.randint(0, 40) + [source.randrange(VOCAB_SIZE)]


def answers_of(engine: Engine) -> dict[str, list[int]]:
    """Ask for enough at once to use every slot, and return the tokens."""
    for index in range(8):
        sampling: dict[str, Any] = {"temperature": float(index % 2), "seed": index}
        add(engine, f"after {index}", [40 + index] * 5, max_tokens=12, **sampling)
    return run_to_end(engine).token_ids


def assert_nothing_is_left(engine: Engine) -> None:
    engine.check_invariants()
    assert not engine.has_work
    assert engine.num_blocks_used == 0
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_ten_thousand_aborts_under_load_leave_every_block_and_slot_free(
    is_long: bool, record_long_run: RecordLongRun
) -> None:
    num_aborts = 10_000 if is_long else 150
    engine = small_engine()
    source = random.Random(1)
    transcript = Transcript()
    live: list[str] = []
    num_asked = 0
    while engine.counters.num_aborts < num_aborts:
        live = [name for name in live if name not in transcript.ends]
        while len(live) < NUM_WANTED:
            live.append(str(num_asked))
            sampling: dict[str, Any] = {"temperature": source.choice([0.0, 1.0]), "seed": 1}
            prompt = draw_prompt(source)
            add(engine, live[-1], prompt, max_tokens=source.randint(1, 50), **sampling)
            num_asked += 1
        transcript.take(engine.step())
        engine.check_invariants()
        # Why in bursts: between them contexts grow, and some must be preempted.
        if source.random() < 0.1:
            for name in source.sample(live, source.randint(1, NUM_WANTED)):
                transcript.take(engine.abort(RequestId(name)))
                engine.check_invariants()
    num_preempted = engine.counters.num_preemptions
    record_long_run(
        "Aborts under load, step by step",
        aborts=engine.counters.num_aborts,
        requests=num_asked,
        steps=engine.counters.num_steps,
        preemptions=num_preempted,
        cache_hits=engine.counters.num_cache_hits,
    )
    transcript.take(event for name in live for event in engine.abort(RequestId(name)))

    assert_nothing_is_left(engine)
    assert len(transcript.ends) == num_asked, "each has had its end"
    assert num_preempted > num_aborts / 100
    assert answers_of(engine) == answers_of(small_engine()), "and every slot is as new"


class Ends:
    """A sink that counts the ends of requests."""

    def __init__(self) -> None:
        self._heard = threading.Condition()
        self._ends: dict[RequestId, GenerationEvent] = {}
        self.num_events = 0

    def __call__(self, events: list[tuple[RequestId, GenerationEvent]]) -> None:
        with self._heard:
            for request_id, event in events:
                self.num_events += 1
                assert request_id not in self._ends, (request_id, event)
                if isinstance(event, Finished | Failed):
                    self._ends[request_id] = event
            self._heard.notify_all()

    def wait_for(self, num_ends: int) -> list[GenerationEvent]:
        """Wait until so many requests have ended; return all ends."""
        with self._heard:
            assert self._heard.wait_for(
                lambda: len(self._ends) >= num_ends, timeout=DEADLINE_SECONDS
            ), (len(self._ends), num_ends)
            return list(self._ends.values())


def test_a_storm_of_aborts_from_other_threads_leaves_nothing(
    is_long: bool, record_long_run: RecordLongRun
) -> None:
    num_clients, num_each = 4, 2500 if is_long else 50
    engine, ends = small_engine(), Ends()
    loop = EngineLoop(engine, ends)
    loop.start()
    failures: list[BaseException] = []

    def ask_and_leave(client: int) -> None:
        source = random.Random(client)
        try:
            for index in range(num_each):
                name = RequestId(f"{client} {index}")
                sampling = SamplingParams(max_tokens=50, temperature=0.0)
                prompt = draw_prompt(source)
                loop.submit(
                    EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)
                )
                # Why events: others have had tokens, so time has passed for the engine.
                ends.wait_for(max(0, client + num_clients * (index - source.randint(1, 4))))
                loop.abort(name)
        except BaseException as error:  # noqa: BLE001  # shown by the test's thread
            failures.append(error)

    clients = [threading.Thread(target=ask_and_leave, args=[one]) for one in range(num_clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not failures
    told = ends.wait_for(num_clients * num_each)
    loop.stop(timeout_seconds=DEADLINE_SECONDS)
    num_aborted = sum(end.reason is FinishReason.ABORT for end in told if isinstance(end, Finished))
    record_long_run("Aborts under load, four clients", aborts=num_aborted, requests=len(told))

    assert len(told) == num_clients * num_each
    assert not any(isinstance(end, Failed) for end in told)
    assert num_aborted > len(told) / 2
    assert_nothing_is_left(engine)
