# SPDX-License-Identifier: Apache-2.0
"""An answer that goes on after tokens of another engine is the answer that one would have given."""

from typing import Any

import pytest

from tests.engine.tiny_engines import Transcript, run_to_end, tiny_engine
from xinference.engine import Engine, EngineRequest
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    SamplingParams,
    TextDelta,
)

PROMPT = list(range(20, 40))
CONTEXT = 32


def ask(
    engine: Engine, resumed: list[int] | None = None, **sampling: Any
) -> tuple[list[int], str, Finished]:
    """Return tokens, text and end of an answer, which may be given its beginning."""
    given = {"temperature": 0.0, "max_tokens": 9, "seed": 7, **sampling}
    events = engine.add(
        engine.validate(
            EngineRequest(
                request_id=RequestId("r"),
                prompt_token_ids=PROMPT,
                sampling=SamplingParams(**given),
                resume_token_ids=tuple(resumed or ()),
            )
        )
    )
    engine.check_invariants()
    repeated = [event.token_ids for _, event in events if isinstance(event, TextDelta)]
    assert repeated == [(token,) for token in resumed or ()]
    transcript = Transcript()
    transcript.take(events)
    run_to_end(engine, transcript)
    end = transcript.ends["r"]
    assert isinstance(end, Finished)
    return transcript.token_ids["r"], transcript.texts["r"], end


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.0, "max_tokens": CONTEXT - len(PROMPT)},
        {
            "temperature": 1.0,
            "grammar": Grammar(kind=GrammarKind.REGEX, text="[a-f]{3,12}"),
        },
        {"temperature": 1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "min_tokens": 9},
    ],
    ids=[
        "greedy",
        "drawn",
        "filtered",
        "to the end of the context",
        "held to a grammar",
        "penalized",
    ],
)
def test_wherever_it_is_cut_the_answer_is_the_same(sampling: dict[str, Any]) -> None:
    engine = tiny_engine(num_blocks=8, max_model_len=CONTEXT)
    tokens, text, end = ask(engine, **sampling)
    assert len(tokens) >= 3

    for cut in {1, 2, len(tokens) // 2, len(tokens) - 1, len(tokens)}:
        *answer, resumed = ask(engine, tokens[:cut], **sampling)
        assert answer == [tokens, text], cut
        assert resumed.reason is end.reason
        assert resumed.usage.num_completion_tokens == end.usage.num_completion_tokens
        assert resumed.usage.num_prompt_tokens == len(PROMPT)


def test_text_that_was_held_back_comes_and_a_stop_string_across_the_cut_is_found() -> None:
    engine = tiny_engine()
    _, text, _ = ask(engine, temperature=1.0)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = ask(engine, temperature=1.0, stop=(stop,))
    assert stopped[1] == text[: text.find(stop)]

    for cut in range(1, len(stopped[0]) + 1):
        resumed = ask(engine, stopped[0][:cut], temperature=1.0, stop=(stop,))
        assert resumed[1] == stopped[1]
        assert resumed[2].reason is FinishReason.STOP


def test_an_answer_that_had_ended_ends_without_a_step() -> None:
    engine = tiny_engine()
    tokens, _, _ = ask(engine, max_tokens=6)
    num_steps = engine.counters.num_steps

    by_length = ask(engine, tokens, max_tokens=6)
    by_token = ask(engine, tokens[:3], stop_token_ids=(tokens[2],))

    assert by_length[2].reason is FinishReason.LENGTH
    assert by_token[2].reason is FinishReason.STOP
    assert engine.counters.num_steps == num_steps


def test_a_resumed_answer_shares_the_engine_with_others_and_survives_preemption() -> None:
    engine = tiny_engine(num_blocks=6)
    tokens, text, _ = ask(engine, temperature=1.0, max_tokens=30)
    for name in ("one", "two", "three"):
        engine.add(
            engine.validate(
                EngineRequest(
                    request_id=RequestId(name),
                    prompt_token_ids=PROMPT[::-1],
                    sampling=SamplingParams(max_tokens=20, temperature=0.0),
                )
            )
        )

    assert ask(engine, tokens[:15], temperature=1.0, max_tokens=30)[:2] == (tokens, text)
    assert engine.counters.num_preemptions > 0


def test_several_answers_have_no_one_beginning() -> None:
    with pytest.raises(InvalidRequest, match="resume_token_ids"):
        ask(tiny_engine(), [1], n=2)


@pytest.mark.parametrize("resumed", [[-1], [10**6], [1, 2, 3]])
def test_what_cannot_be_the_beginning_is_refused(resumed: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="resume_token_ids"):
        ask(tiny_engine(), resumed, max_tokens=2)
