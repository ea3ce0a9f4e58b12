# SPDX-License-Identifier: Apache-2.0
"""What a request gets from the engine, step by step, and what it leaves behind."""

import random

import pytest
import torch

from tests.engine.tiny_engines import BLOCK_SIZE, MAX_MODEL_LEN, add, run_to_end, tiny_engine
from tests.models_tiny import VOCAB_SIZE
from xinference.engine import Engine, EngineRequest
from xinference.engine.batch import Batch
from xinference.engine.model_runner import ModelRunner
from xinference.errors import ContextLengthExceeded, InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Finished,
    FinishReason,
    SamplingParams,
    TextDelta,
    Usage,
)

PROMPT = list(range(20, 45))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def generate(
    engine: Engine, prompt: list[int], **sampling: object
) -> tuple[list[int], str, Finished]:
    add(engine, "alone", prompt, **sampling)
    transcript = run_to_end(engine)
    end = transcript.ends["alone"]
    assert isinstance(end, Finished)
    return transcript.token_ids["alone"], transcript.texts["alone"], end


def test_text_is_what_the_tokens_decode_to(engine: Engine) -> None:
    token_ids, text, end = generate(engine, PROMPT, max_tokens=40, temperature=1.0, seed=5)

    assert text == engine.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert end == Finished(
        reason=FinishReason.LENGTH,
        usage=Usage(num_prompt_tokens=len(PROMPT), num_completion_tokens=40),
    )


def test_tokens_that_were_there_are_told_and_counted_and_hold_no_blocks() -> None:
    engine = tiny_engine()
    source = random.Random(4)
    prompt = [source.randrange(VOCAB_SIZE) for _ in range(2 * BLOCK_SIZE + 3)]
    cold, _, first = generate(engine, prompt, max_tokens=4)
    used, kept = engine.num_blocks_used, engine.num_blocks_kept
    computed = engine.counters.num_prefill_tokens

    warm, _, second = generate(engine, prompt, max_tokens=4)

    assert warm == cold
    assert (first.usage.num_cached_tokens, second.usage.num_cached_tokens) == (0, 2 * BLOCK_SIZE)
    assert (used, kept) == (0, 2)
    assert engine.counters.num_prefill_tokens - computed == 3
    assert (engine.counters.num_cache_hits, engine.counters.num_cached_tokens) == (
        1,
        2 * BLOCK_SIZE,
    )


def test_an_answer_is_there_for_the_turn_that_follows_it() -> None:
    engine = tiny_engine()
    prompt = list(range(20, 30))
    answer, _, _ = generate(engine, prompt, max_tokens=30)

    _, _, end = generate(engine, [*prompt, *answer, 5, 6], max_tokens=2)

    assert end.usage.num_cached_tokens == (len(prompt) + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [("", "", True), ("mine", "mine", True), ("mine", "", False), ("mine", "yours", False)],
)
def test_only_one_salt_shares(first: str, second: str, is_shared: bool) -> None:
    engine = tiny_engine()
    prompt = list(range(20, 60))
    ends = []
    for name, salt in (("a", first), ("b", second)):
        add(engine, name, prompt, max_tokens=2, request={"cache_salt": salt})
        ends.append(run_to_end(engine).ends[name])

    cached = [end.usage.num_cached_tokens for end in ends if isinstance(end, Finished)]
    assert cached == [0, 2 * BLOCK_SIZE if is_shared else 0]


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine = tiny_engine(enable_prefix_caching=False)
    ends = [generate(engine, list(range(20, 60)), max_tokens=2)[2] for _ in range(2)]

    assert [end.usage.num_cached_tokens for end in ends] == [0, 0]
    assert engine.num_blocks_kept == 0


class Bomb:
    """A runner that raises when a certain token is computed."""

    def __init__(self, runner: ModelRunner, token_id: int) -> None:
        self._runner = runner
        self._token_id = token_id

    def forward(self, batch: Batch) -> torch.Tensor:
        if self._token_id in batch.token_ids:
            raise RuntimeError("boom")
        return self._runner.forward(batch)


def test_what_a_failed_step_wrote_is_never_found() -> None:
    engine = tiny_engine()
    runner = engine._runner
    engine._runner = Bomb(runner, 59)  # type: ignore[assignment]
    add(engine, "fails", range(20, 60))
    engine.step()
    engine._runner = runner

    _, _, end = generate(engine, list(range(20, 60)), max_tokens=2)

    assert end.usage.num_cached_tokens == 0


def test_without_max_tokens_an_answer_fills_the_context(engine: Engine) -> None:
    token_ids, _, end = generate(engine, PROMPT)

    assert len(token_ids) == MAX_MODEL_LEN - len(PROMPT)
    assert end.reason == FinishReason.LENGTH


def test_an_answer_may_end_on_the_very_last_token_of_the_context(engine: Engine) -> None:
    token_ids, _, _ = generate(engine, [7] * (MAX_MODEL_LEN - 1), max_tokens=1)

    assert len(token_ids) == 1


def test_a_stop_token_ends_the_answer_and_is_counted_but_not_shown(engine: Engine) -> None:
    plain, _, _ = generate(engine, PROMPT, max_tokens=12)
    stop_token = plain[5]
    first = plain.index(stop_token)

    token_ids, text, end = generate(engine, PROMPT, max_tokens=12, stop_token_ids=(stop_token,))

    assert token_ids == plain[: first + 1]
    assert text == engine.tokenizer.decode(plain[:first], skip_special_tokens=True)
    assert end.reason == FinishReason.STOP
    assert end.usage.num_completion_tokens == first + 1


def test_the_models_own_end_of_turn_ends_the_answer() -> None:
    engine = tiny_engine()
    plain, _, _ = generate(engine, PROMPT, max_tokens=12)
    engine.eos_token_ids = frozenset([plain[3]])

    token_ids, _, end = generate(engine, PROMPT, max_tokens=12)

    assert token_ids == plain[: plain.index(plain[3]) + 1]
    assert end.reason == FinishReason.STOP


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    _, plain, _ = generate(engine, PROMPT, max_tokens=40, temperature=1.0, seed=5)
    stop = plain[6:9]

    _, text, end = generate(engine, PROMPT, max_tokens=40, temperature=1.0, seed=5, stop=(stop,))

    assert text == plain[: plain.index(stop)]
    assert (end.reason, end.stop_string) == (FinishReason.STOP, stop)
    assert end.usage.num_completion_tokens < 40


def test_a_seed_gives_the_same_answer_alone_in_a_crowd_and_when_preempted() -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_tokens": 30}
    alone, _, _ = generate(tiny_engine(), PROMPT, **sampling)
    crowded = tiny_engine(num_blocks=8, max_num_batched_tokens=7)
    source = random.Random(0)
    for index in range(6):
        prompt = [source.randrange(VOCAB_SIZE) for _ in range(20)]
        add(crowded, f"other {index}", prompt, max_tokens=30, temperature=index % 2)
        if index == 3:
            add(crowded, "alone", PROMPT, **sampling)

    transcript = run_to_end(crowded)

    assert crowded.counters.num_preemptions > 0
    assert transcript.token_ids["alone"] == alone


def test_other_seeds_give_other_answers(engine: Engine) -> None:
    answers = {
        tuple(generate(engine, PROMPT, temperature=1.0, max_tokens=10, seed=seed)[0])
        for seed in (1, 2, -1, 2**64 - 2, None)
    }

    assert len(answers) == 5


def test_a_top_p_of_zero_keeps_the_likeliest_token_alone(engine: Engine) -> None:
    greedy, _, _ = generate(engine, PROMPT, max_tokens=10)

    token_ids, _, _ = generate(engine, PROMPT, max_tokens=10, temperature=2.0, top_p=0.0, seed=1)

    assert token_ids == greedy


def test_open_sampling_follows_the_models_defaults() -> None:
    engine = tiny_engine()
    greedy, _, _ = generate(engine, PROMPT, max_tokens=10)
    defaults = SamplingParams(temperature=1.3, top_p=1.0, top_k=1)
    engine._checker.generation_defaults = defaults

    token_ids, _, _ = generate(engine, PROMPT, max_tokens=10, temperature=None)

    assert token_ids == greedy, "top_k 1 leaves only the best token"


@pytest.mark.parametrize("steps_before", [0, 1, 2, 6])
def test_an_abort_frees_everything_at_once_and_ends_the_request_once(steps_before: int) -> None:
    engine = tiny_engine(max_num_seqs=1, max_num_batched_tokens=8)
    add(engine, "first", PROMPT, max_tokens=30)
    add(engine, "waiting", PROMPT, max_tokens=30)
    for _ in range(steps_before):
        engine.step()

    events = engine.abort(RequestId("first")) + engine.abort(RequestId("waiting"))

    assert [(name, event.reason) for name, event in events if isinstance(event, Finished)] == [
        ("first", FinishReason.ABORT),
        ("waiting", FinishReason.ABORT),
    ]
    assert len(events) == 2
    assert (engine.num_running, engine.num_waiting, engine.num_blocks_used) == (0, 0, 0)
    assert engine.abort(RequestId("first")) == []
    assert not engine.has_work
    engine.check_invariants()


def test_an_abort_changes_no_other_answer() -> None:
    engine = tiny_engine()
    alone, _, _ = generate(engine, PROMPT, max_tokens=20)
    add(engine, "stays", PROMPT, max_tokens=20)
    add(engine, "goes", [3, 4, 5], max_tokens=20)
    for _ in range(4):
        engine.step()
    before = engine.abort(RequestId("goes"))

    transcript = run_to_end(engine)

    assert len(before) == 1
    assert transcript.token_ids["stays"] == alone[4:]


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], {}, "prompt"),
        ([1, VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    engine: Engine, prompt: list[int], sampling: dict[str, object], field: str
) -> None:
    request = EngineRequest(
        request_id=RequestId("r"),
        prompt_token_ids=prompt,
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
    )

    with pytest.raises(InvalidRequest) as refused:
        engine.validate(request)

    assert refused.value.field == field


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens"), [(MAX_MODEL_LEN, None), (90, 7), (500, 1)]
)
def test_what_does_not_fit_the_context_is_refused(
    engine: Engine, num_prompt_tokens: int, max_tokens: int | None
) -> None:
    request = EngineRequest(
        request_id=RequestId("r"),
        prompt_token_ids=[1] * num_prompt_tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
    )

    with pytest.raises(ContextLengthExceeded) as refused:
        engine.validate(request)

    assert refused.value.max_model_len == MAX_MODEL_LEN


def test_a_pool_smaller_than_the_context_shortens_the_context() -> None:
    engine = tiny_engine(num_blocks=3, max_model_len=None)

    token_ids, _, _ = generate(engine, [5])

    assert engine.config.max_model_len == 3 * BLOCK_SIZE
    assert len(token_ids) == 3 * BLOCK_SIZE - 1


def test_the_counters_tell_prompt_from_decoded_tokens() -> None:
    engine = tiny_engine(max_num_batched_tokens=10)
    add(engine, "r", PROMPT, max_tokens=4)

    transcript = run_to_end(engine)

    counters = engine.counters
    assert len(transcript.token_ids["r"]) == 4
    assert counters.num_prefill_tokens == len(PROMPT)
    assert counters.num_decode_tokens == 3
    assert counters.num_generated_tokens == 4
    assert counters.num_steps == 3 + 3
    assert counters.last_step_seconds > 0


def test_a_request_ends_with_when_it_came_how_far() -> None:
    engine = tiny_engine(max_num_seqs=1)
    for name in ("first", "second"):
        add(engine, name, PROMPT, max_tokens=4)

    ends = run_to_end(engine).ends

    for end in ends.values():
        assert end.phases is not None
        phases = end.phases
        assert phases.admitted_at is not None
        assert phases.first_token_at is not None
        times = (phases.arrived_at, phases.admitted_at, phases.first_token_at, phases.ended_at)
        assert list(times) == sorted(times)
    first, second = ends["first"].phases, ends["second"].phases
    assert first is not None
    assert second is not None
    assert second.admitted_at is not None
    assert second.admitted_at >= first.ended_at, "there is one slot"
    histograms = engine.counters.histograms()
    for name in ("queue_seconds", "prefill_seconds", "decode_seconds"):
        assert histograms[f"{name}:+Inf"] == 2
    assert histograms["queue_seconds:sum"] >= second.admitted_at - first.admitted_at  # type: ignore[operator]
    assert histograms["batch_size:1.0"] == engine.counters.num_steps
    assert engine.counters.num_admissions == 2


def test_several_answers_end_with_the_times_of_the_first_and_the_last() -> None:
    engine = tiny_engine()
    add(engine, "r", PROMPT, max_tokens=4, n=3, temperature=1.0, seed=1)

    (end,) = run_to_end(engine).ends.values()

    assert end.phases is not None
    assert end.phases.admitted_at is not None
    assert end.phases.first_token_at is not None
    assert end.phases.admitted_at < end.phases.first_token_at < end.phases.ended_at
    assert engine.counters.histograms()["queue_seconds:+Inf"] == 3


def test_what_is_aborted_in_the_queue_was_never_admitted() -> None:
    engine = tiny_engine()
    add(engine, "r", PROMPT, max_tokens=4)

    ((_, end),) = engine.abort(RequestId("r"))

    assert isinstance(end, Finished)
    assert end.phases is not None
    assert end.phases.admitted_at is None
    assert engine.counters.histograms()["queue_seconds:+Inf"] == 0


def test_every_generated_token_is_told_once() -> None:
    engine = tiny_engine()
    add(engine, "r", PROMPT, max_tokens=6)
    deltas = []
    while engine.has_work:
        deltas += [event for _, event in engine.step() if isinstance(event, TextDelta)]

    assert [len(delta.token_ids) for delta in deltas] == [1] * 6
