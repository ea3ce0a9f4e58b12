# SPDX-License-Identifier: Apache-2.0
"""An answer that is held to a grammar keeps to it, whatever the model would rather say."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import PreTrainedTokenizer

from tests.engine.tiny_engines import Transcript, add, run_to_end, tiny_engine
from tests.json_schemas import BOUNDED, UNBOUNDED, Schema, record
from tests.long_runs import RecordLongRun
from tests.models_tiny import MAX_POSITIONS
from xinference.engine import Engine, EngineRequest, load_engine
from xinference.engine.grammar import Bits, GrammarCompiler
from xinference.errors import AbilityMissing, InternalError, InvalidRequest, ModelOverloaded
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    SamplingParams,
)

GUIDE = Path(__file__).parents[2] / "xinference" / "catalog" / "guide"
PROMPT = list(range(20, 45))
HOT = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}
NUM_SEEDS_OF_CI = 2
NUM_SEEDS = 10


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, of bytes."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)}


def a_grammar(kind: str, text: str) -> Grammar:
    return Grammar(kind=GrammarKind(kind), text=text)


def json_schema(schema: Any) -> Grammar:
    return a_grammar("json_schema", json.dumps(schema))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Random weights; `<|im_end|>` ends a turn."""
    engine = tiny_engine(max_model_len=MAX_POSITIONS, max_num_seqs=16, max_num_batched_tokens=128)
    engine.eos_token_ids = frozenset([engine.tokenizer.eos_token_id])
    return engine


@pytest.fixture(scope="module")
def guide() -> Engine:
    options = EngineOptions(max_num_seqs=16, max_model_len=512, dtype="float32", device="cpu")
    return load_engine(GUIDE, options)


def answers(
    engine: Engine, asked: dict[str, dict[str, Any]], prompt: Iterable[int] = PROMPT
) -> Transcript:
    """Answer these requests beside each other."""
    for name, sampling in asked.items():
        add(engine, name, prompt, **sampling)
    return run_to_end(engine)


def reason_of(transcript: Transcript, name: str) -> FinishReason:
    end = transcript.ends[name]
    assert isinstance(end, Finished), end
    return end.reason


def check_bounded(engine: Engine, schema: Schema, num_seeds: int) -> None:
    grammar = json_schema(schema)
    asked = {str(seed): {**HOT, "seed": seed, "grammar": grammar} for seed in range(num_seeds)}

    transcript = answers(engine, asked)

    for name in asked:
        assert reason_of(transcript, name) is FinishReason.STOP, transcript.texts[name]
        jsonschema.validate(
            json.loads(transcript.texts[name]),
            schema,
            format_checker=jsonschema.FormatChecker(),
        )


def check_unbounded(engine: Engine, schema: Schema, num_seeds: int) -> int:
    """Check answers of growing length; return how many were cut by it."""
    grammar = json_schema(schema)
    asked = {
        str(seed): {**HOT, "seed": seed, "grammar": grammar, "max_tokens": 3 + 5 * seed}
        for seed in range(num_seeds)
    }

    transcript = answers(engine, asked)

    reasons = {one: reason_of(transcript, one) for one in asked}
    for one, reason in reasons.items():
        token_ids = [
            token_id
            for token_id in transcript.token_ids[one]
            if token_id not in engine.eos_token_ids
        ]
        whole = completed(engine, grammar, token_ids)
        assert whole.startswith(transcript.texts[one].rstrip("\N{REPLACEMENT CHARACTER}"))
        jsonschema.validate(json.loads(whole), schema)
        if reason is FinishReason.STOP:
            assert whole == transcript.texts[one]
        else:
            assert reason is FinishReason.LENGTH
    return sum(reason is FinishReason.LENGTH for reason in reasons.values())


def completed(engine: Engine, grammar: Grammar, token_ids: list[int]) -> str:
    """Return the text of these tokens and the shortest rest that we find for it."""
    matcher = engine._grammars.compile(grammar)
    for token_id in token_ids:
        matcher.accept(token_id)
    vocabulary = engine.tokenizer.get_vocab()
    closers = [vocabulary[one] for one in ('"', "}", "]", ":", "0") if one in vocabulary]
    token_ids = list(token_ids)
    while not matcher.is_accepting:
        bits = np.zeros(engine._grammars.num_words, np.uint32)
        matcher.fill(bits)
        is_open = np.unpackbits(bits.view(np.uint8), bitorder="little")
        chosen = next((one for one in closers if is_open[one]), int(np.flatnonzero(is_open)[0]))
        matcher.accept(chosen)
        token_ids.append(chosen)
    return engine.tokenizer.decode(token_ids, skip_special_tokens=True)


# --- JSON


@pytest.mark.parametrize("name", BOUNDED)
def test_a_model_of_random_weights_answers_a_bounded_schema(
    engine: Engine, name: str, is_long: bool, record_long_run: RecordLongRun
) -> None:
    num_seeds = NUM_SEEDS if is_long else NUM_SEEDS_OF_CI
    check_bounded(engine, BOUNDED[name], num_seeds)
    record_long_run("Bounded schemas, random weights", schemas=1, answers=num_seeds)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_guide_answers_a_bounded_schema(
    guide: Engine, name: str, is_long: bool, record_long_run: RecordLongRun
) -> None:
    num_seeds = NUM_SEEDS if is_long else 1
    check_bounded(guide, BOUNDED[name], num_seeds)
    record_long_run("Bounded schemas, the guide", schemas=1, answers=num_seeds)


@pytest.mark.parametrize("model", ["engine", "guide"])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_an_answer_cut_by_max_tokens_is_the_beginning_of_a_valid_one(
    request: pytest.FixtureRequest,
    model: str,
    name: str,
    is_long: bool,
    record_long_run: RecordLongRun,
) -> None:
    num_seeds = NUM_SEEDS if is_long else 4
    num_cut = check_unbounded(request.getfixturevalue(model), UNBOUNDED[name], num_seeds)

    assert num_cut > 0
    record_long_run("Unbounded schemas", schemas=1, answers=num_seeds, cut=num_cut)


def test_white_space_is_bounded_so_that_every_object_ends(engine: Engine) -> None:
    grammar = json_schema(record({"a": {"type": "null"}}))
    space = tuple(engine.tokenizer.convert_tokens_to_ids(["Ġ", "Ċ"]))
    matcher = engine._grammars.compile(grammar)
    matcher.accept(engine.tokenizer.convert_tokens_to_ids("{"))
    num_spaces = 0
    while True:
        bits = np.zeros(engine._grammars.num_words, np.uint32)
        matcher.fill(bits)
        is_open = np.unpackbits(bits.view(np.uint8), bitorder="little")
        chosen = [one for one in reversed(space) if is_open[one]]
        if not chosen:
            break
        matcher.accept(chosen[0])
        num_spaces += 1

    assert 1 <= num_spaces <= 17


# --- the other kinds


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (a_grammar("regex", "[0-9]{3}-(foo|bar)"), "[0-9]{3}-(foo|bar)"),
        (a_grammar("regex", "(ä|ö|😀){2}"), "(ä|ö|😀){2}"),
        (a_grammar("choice", json.dumps(["yes", "no", 'it "is"\n', "nö"])), 'yes|no|it "is"\n|nö'),
        (a_grammar("grammar", 'start: "a" b\nb: "x" | "yy" b2\nb2: /[0-9]/'), "a(x|yy[0-9])"),
        (a_grammar("grammar", 'root ::= "<" inner ">"\ninner ::= [a-c] | "no"'), "<([a-c]|no)>"),
    ],
    ids=["regex", "unicode", "choice", "lark", "gbnf"],
)
def test_every_other_kind_of_grammar_is_kept_to(
    engine: Engine, grammar: Grammar, pattern: str
) -> None:
    asked = {str(seed): {**HOT, "seed": seed, "grammar": grammar} for seed in range(6)}

    transcript = answers(engine, asked)

    for name in asked:
        assert re.fullmatch(pattern, transcript.texts[name]), transcript.texts[name]
        assert reason_of(transcript, name) is FinishReason.STOP


def test_a_greedy_answer_is_the_best_of_the_choices(engine: Engine) -> None:
    choice = a_grammar("choice", '["on", "off"]')

    first = answers(engine, {"r": {"grammar": choice}}).texts["r"]
    second = answers(engine, {"r": {"grammar": choice}}).texts["r"]

    assert first == second
    assert first in ("on", "off")


# --- ends


def test_a_turn_may_end_only_where_the_answer_is_whole(engine: Engine) -> None:
    twice = a_grammar("regex", "(ab){2,200}")
    bias = {"stop_token_ids": tuple(range(250, 254))}

    transcript = answers(
        engine, {str(s): {**HOT, "seed": s, "grammar": twice, **bias} for s in range(8)}
    )

    for name, text in transcript.texts.items():
        assert reason_of(transcript, name) is FinishReason.STOP
        assert re.fullmatch("(ab){2,}", text)


def test_each_of_several_tokens_that_end_a_turn_may_end_it() -> None:
    engine = tiny_engine(max_num_seqs=16)
    ends = frozenset(engine.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    engine.eos_token_ids = ends
    grammar = a_grammar("regex", "(a|b)*")

    transcript = answers(
        engine, {str(s): {**HOT, "seed": s, "grammar": grammar} for s in range(16)}, [5, 6]
    )

    lasts = {
        ids[-1]
        for name, ids in transcript.token_ids.items()
        if reason_of(transcript, name) is FinishReason.STOP
    }
    assert lasts == ends
    assert all(re.fullmatch("(a|b)*", text) for text in transcript.texts.values())


def test_a_finished_answer_ends_at_once_without_a_token_that_ends_turns(engine: Engine) -> None:
    transcript = answers(engine, {"r": {"grammar": a_grammar("choice", '["qz"]'), "max_tokens": 2}})

    end = transcript.ends["r"]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.num_completion_tokens) == (FinishReason.STOP, 2)


def test_a_stop_string_still_ends_an_answer(engine: Engine) -> None:
    transcript = answers(
        engine, {"r": {"grammar": a_grammar("choice", '["abcd"]'), "stop": ("c",)}}
    )

    assert transcript.texts["r"] == "ab"
    assert reason_of(transcript, "r") is FinishReason.STOP


# --- beside others


def test_plain_requests_beside_constrained_ones_get_the_same_tokens(engine: Engine) -> None:
    plain = {str(seed): {**HOT, "seed": seed, "max_tokens": 30} for seed in range(4)}
    alone = answers(engine, plain).token_ids
    constrained = {
        name: {**HOT, "seed": 3, "grammar": json_schema(schema), "max_tokens": 40}
        for name, schema in BOUNDED.items()
    }

    beside = answers(engine, constrained | plain).token_ids

    assert {name: beside[name] for name in plain} == alone


def test_a_preempted_answer_goes_on_where_it_was_in_its_grammar() -> None:
    schema = BOUNDED["tool call"]
    sampling = {**HOT, "grammar": json_schema(schema), "max_tokens": 60}
    asked = {str(seed): {**sampling, "seed": seed} for seed in range(5)}
    roomy = answers(tiny_engine(), asked).texts
    tight = tiny_engine(num_blocks=9, max_num_batched_tokens=16)

    crowded = answers(tight, asked).texts

    assert tight.counters.num_preemptions > 0
    assert crowded == roomy


# --- refusals and failures


@pytest.mark.parametrize(
    "grammar",
    [
        json_schema({"type": "frob"}),
        json_schema({"type": "object", "unevaluatedProperties": False}),
        json_schema({"$ref": "https://example.com/schema"}),
        json_schema({"$ref": "#"}),
        json_schema({"type": "string", "minLength": 5, "maxLength": 2}),
        a_grammar("json_schema", "{"),
        a_grammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        a_grammar("regex", "(a"),
        a_grammar("regex", "(?=a)b"),
        a_grammar("regex", "[^\\s\\S]"),
        a_grammar("regex", "(" * 50_000 + ")" * 50_000),
        a_grammar("choice", "[]"),
        a_grammar("choice", "7"),
        a_grammar("grammar", "start: nothing"),
        a_grammar("grammar", "start: start"),
        a_grammar("grammar", "start: " + "(" * 50_000),
    ],
    ids=lambda grammar: f"{grammar.kind} {grammar.text[:20]}",
)
def test_what_cannot_be_compiled_is_refused_by_name(engine: Engine, grammar: Grammar) -> None:
    request = EngineRequest(
        request_id=RequestId("r"),
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(grammar=replace(grammar, field="guided_thing")),
    )

    with pytest.raises(InvalidRequest) as refused:
        engine.validate(request)

    assert refused.value.field == "guided_thing"
    assert len(str(refused.value)) < 600


def test_without_llguidance_a_grammar_is_refused_and_the_rest_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = tiny_engine()

    with pytest.raises(AbilityMissing, match="llguidance is not installed"):
        add(engine, "held", PROMPT, grammar=json_schema({}))

    assert reason_of(answers(engine, {"plain": {"max_tokens": 3}}), "plain") is FinishReason.LENGTH


def test_a_tokenizer_that_cannot_be_held_to_a_grammar_is_said_to_be_so() -> None:
    compiler = GrammarCompiler(
        SlowTokenizer(),
        vocab_size=300,
        eos_token_ids=frozenset([1]),
        model_name="m",
    )

    with pytest.raises(AbilityMissing, match="slow one"):
        compiler.compile(json_schema({}))


def test_compiling_has_a_deadline() -> None:
    engine = tiny_engine()
    compiler = GrammarCompiler(
        engine.tokenizer,
        vocab_size=engine.vocab_size,
        eos_token_ids=frozenset([2]),
        model_name="m",
        compile_seconds=0.001,
    )
    properties = {f"property {index}": {"type": "string"} for index in range(1500)}

    with pytest.raises((InvalidRequest, ModelOverloaded)):
        compiler.compile(json_schema({"type": "object", "properties": properties}))


class Breaks:
    """A matcher that allows everything and then raises."""

    is_finished = False
    is_accepting = False

    def __init__(self, where: str, error: Exception) -> None:
        self._where = where
        self._error = error
        self._num_tokens = 0

    def fill(self, bits: Bits) -> None:
        bits[:] = 2**32 - 1
        if self._where == "fill" and self._num_tokens == 3:
            raise self._error

    def accept(self, token_id: int) -> None:
        self._num_tokens += 1
        if self._where == "accept" and self._num_tokens == 4:
            raise self._error


@pytest.mark.parametrize("where", ["fill", "accept"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("boom"), InternalError),
        (InvalidRequest(field="guided_json", problem="too complex"), InvalidRequest),
    ],
)
def test_a_grammar_that_breaks_fails_its_request_alone(
    engine: Engine, where: str, error: Exception, told: type[Exception]
) -> None:
    others = {
        "plain": {**HOT, "seed": 1, "max_tokens": 20},
        "held": {**HOT, "seed": 2, "grammar": json_schema(BOUNDED["tool call"])},
    }
    alone = answers(engine, others)
    culprit = engine.validate(
        EngineRequest(
            request_id=RequestId("culprit"),
            prompt_token_ids=PROMPT,
            # Why: a first token that ends the answer would leave the grammar nothing to break.
            sampling=SamplingParams(ignore_eos=True, max_tokens=20),
        )
    )
    engine.add(replace(culprit, matcher=Breaks(where, error)))

    beside = answers(engine, others)

    end = beside.ends["culprit"]
    assert isinstance(end, Failed)
    assert isinstance(end.error, told)
    assert len(beside.token_ids["culprit"]) == 3
    assert {name: beside.token_ids[name] for name in others} == alone.token_ids
    assert engine.num_blocks_used == 0
