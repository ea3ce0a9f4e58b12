# SPDX-License-Identifier: Apache-2.0
"""Whatever a model writes that is held to calls is read as calls, and their arguments fit."""

import functools
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.json_schemas import BOUNDED, DIGIT, WORD, Schema, record
from xinference.engine import Frame
from xinference.engine.grammar import GrammarCompiler, Matcher
from xinference.errors import InvalidRequest
from xinference.models.parsing.grammars import GRAMMARS, AnswerFormat
from xinference.models.parsing.lark import Function, Lark
from xinference.protocol.generation import Grammar, GrammarKind

from .test_grammars import Answer, read

END = "<|im_end|>"
FORMS = [*dict.fromkeys(GRAMMARS[name] for name in GRAMMARS)]
NAMES = [next(name for name, form in GRAMMARS.items() if form is one) for one in FORMS]
"""A name for each form."""
MAX_TOKENS = 400


@functools.cache
def tokenizer(markers: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, and one for each of the markers."""
    alphabet = {char: one for one, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    # Why of both kinds: some files call their markers special, some do not.
    made.add_special_tokens(list(markers[::2]))
    made.add_tokens(list(markers[1::2]))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


class Walk:
    """Writes at random what a grammar allows."""

    def __init__(self, answers: AnswerFormat, *, spelled: bool) -> None:
        markers = () if spelled else answers.special_tokens
        self.tokenizer = tokenizer(markers)
        self.token_ids = {one: self.tokenizer.convert_tokens_to_ids(one) for one in markers}
        self.end = self.tokenizer.convert_tokens_to_ids(END)
        self.compiler = GrammarCompiler(
            self.tokenizer,
            vocab_size=len(self.tokenizer),
            eos_token_ids=frozenset([self.end]),
            model_name="walk",
        )
        self.words = [self.tokenizer.convert_tokens_to_ids(char) for char in "abc12"]

    def matcher(self, start: str, lark: Lark, grammar: Grammar | None = None) -> Matcher:
        return self.compiler.compile(grammar, Frame(text=lark.written(start), field="tools"))

    def text(self, matcher: Matcher, seed: int, max_tokens: int = MAX_TOKENS) -> str | None:
        """Return an answer, or None if it did not come to an end."""
        draw = random.Random(seed)
        token_ids: list[int] = []
        while not matcher.is_finished:
            bits = np.zeros(self.compiler.num_words, np.uint32)
            matcher.fill(bits)
            is_open = np.unpackbits(bits.view(np.uint8), bitorder="little")
            may = [int(one) for one in np.flatnonzero(is_open) if one < len(self.tokenizer)]
            if matcher.is_accepting and (draw.random() < 0.3 or may in ([], [self.end])):
                break
            may = [one for one in may if one != self.end]
            # Why not evenly: texts are to end, by a quote or by a marker.
            closers = [one for one in may if one == self.tokenizer.convert_tokens_to_ids('"')]
            closers += [one for one in self.token_ids.values() if one in may]
            few = [one for one in self.words if one in may]
            kind = draw.random()
            pool = closers if kind < 0.25 and closers else few if kind < 0.6 and few else may
            token_ids.append(draw.choice(pool))
            matcher.accept(token_ids[-1])
            if len(token_ids) == max_tokens:
                return None
        text: str = "".join(self.pieces(token_ids))
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        known = {token_id: marker for marker, token_id in self.token_ids.items()}
        found: list[str] = []
        for is_marker, group in itertools.groupby(token_ids, lambda one: one in known):
            ids = list(group)
            found += [known[one] for one in ids] if is_marker else [self.tokenizer.decode(ids)]
        return found


def read_calls(name: str, text: str, functions: Sequence[Function]) -> Answer:
    tools = {one.name: one.parameters for one in functions}
    parser = AnswerFormat(tool_parser=name).parser(
        prompt="", tools=tools, new_call_id=lambda: "0" * 24
    )
    assert parser is not None
    return read(parser, [text])


def strict(name: str, parameters: Schema) -> Function:
    return Function(name=name, parameters=parameters, strict=True)


OBJECTS = {
    name: schema
    for name, schema in BOUNDED.items()
    if schema.get("type") == "object" and "$ref" not in schema
}
NAMED: Mapping[str, Schema] = {
    "mixed": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["°C", "°F", ""]},
            "code": {"type": "string", "minLength": 2, "maxLength": 3},
            "days": {"type": "array", "items": DIGIT, "maxItems": 2},
            "at": record({"x": DIGIT, "name": WORD}),
            "sure": {"anyOf": [{"type": "boolean"}, {"type": "null"}, WORD]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "references": {
        "$defs": {
            "node": record(
                {"v": DIGIT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
            )
        },
        **record({"head": {"$ref": "#/$defs/node"}, "kind": {"type": ["string", "null"]}}),
    },
    "nothing": record({}),
}
SCHEMAS = {**OBJECTS, **NAMED}
NOT_QUOTING = ("glm4.5", "gemma")
UNSAYABLE = {"pattern", "format"}
"""Keywords that are refused where texts are not quoted."""


def says_a_text_by_more_than_its_length(schema: object) -> bool:
    if isinstance(schema, dict):
        return bool(UNSAYABLE & schema.keys()) or any(
            map(says_a_text_by_more_than_its_length, schema.values())
        )
    return isinstance(schema, list) and any(map(says_a_text_by_more_than_its_length, schema))


@pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "spelled"])
@pytest.mark.parametrize("name", NAMES)
def test_what_has_to_be_calls_is_read_as_calls_that_fit(
    name: str, spelled: bool, is_long: bool
) -> None:
    answers = AnswerFormat(tool_parser=name)
    form = answers.grammar
    assert form is not None
    walk = Walk(answers, spelled=spelled)
    seeds = itertools.count()
    num_read = 0
    for schema in SCHEMAS.values():
        functions = [strict("get_it", schema), strict("f-2.x", record({"n": DIGIT}))]
        lark = Lark(walk.token_ids)
        if name in NOT_QUOTING and says_a_text_by_more_than_its_length(schema):
            continue  # they are refused, as another test shows
        start = form.calls(lark, functions, several=True)
        for _ in range(30 if is_long else 1):
            text = walk.text(walk.matcher(start, lark), next(seeds))
            if text is None:
                continue
            answer = read_calls(name, text, functions)
            assert answer.content == "", text
            assert answer.calls, text
            assert answer.num_complete == len(answer.calls), text
            for called, arguments in answer.calls:
                parameters = {one.name: one.parameters for one in functions}[called]
                jsonschema.validate(json.loads(arguments), parameters)
            num_read += 1
    assert num_read >= 3


@pytest.mark.parametrize("name", NAMES)
def test_one_call_is_one_call(name: str) -> None:
    answers = AnswerFormat(tool_parser=name)
    form = answers.grammar
    assert form is not None
    walk = Walk(answers, spelled=False)
    functions = [strict("get_it", record({"n": DIGIT}))]
    for seed in range(10):
        lark = Lark(walk.token_ids)
        start = form.calls(lark, functions, several=False)
        text = walk.text(walk.matcher(start, lark), seed)
        assert text is not None
        assert len(read_calls(name, text, functions).calls) == 1


@pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "spelled"])
@pytest.mark.parametrize("name", NAMES)
def test_text_may_have_calls_in_it_and_they_fit(name: str, spelled: bool, is_long: bool) -> None:
    answers = AnswerFormat(tool_parser=name)
    form = answers.grammar
    assert form is not None
    walk = Walk(answers, spelled=spelled)
    functions = [strict("get_it", record({"n": DIGIT, "w": {"enum": ["a", "b"]}}))]
    num_calls = num_plain = 0
    for seed in range(40 if is_long else 16):
        lark = Lark(walk.token_ids)
        matcher = walk.matcher(form.mixed(lark, functions, several=True), lark)
        begin: str | None = ""
        if seed % 2:
            # Why: a walk of single characters spells no marker and no name by chance.
            lark = Lark(walk.token_ids)
            calls = form.calls(lark, functions, several=False)
            begin = walk.text(walk.matcher(calls, lark), seed)
        if begin is None:
            continue
        for token_id in walk.tokenizer(begin, add_special_tokens=False)["input_ids"]:
            matcher.accept(token_id)
        text = walk.text(matcher, seed)
        if text is None:
            continue
        answer = read_calls(name, begin + text, functions)
        assert answer.num_complete == len(answer.calls), text
        for called, arguments in answer.calls:
            assert called == "get_it"
            jsonschema.validate(json.loads(arguments), functions[0].parameters)
        num_calls += bool(answer.calls)
        num_plain += not answer.calls
    assert num_calls >= 3
    assert num_plain > 0 or spelled


def test_the_newer_mistral_form_is_for_tokenizers_that_have_it() -> None:
    answers = AnswerFormat(tool_parser="mistral")
    form = answers.grammar
    assert form is not None
    functions = [strict("get_it", record({}))]
    newer = Lark({"[TOOL_CALLS]": 1, "[ARGS]": 2})
    older = Lark({"[TOOL_CALLS]": 1})

    assert "<[2]>" in newer.written(form.calls(newer, functions, several=False))
    assert '\\"name\\"' in older.written(form.calls(older, functions, several=False))


@pytest.mark.parametrize("name", NOT_QUOTING)
@pytest.mark.parametrize(
    "text", [{"pattern": "^a$"}, {"format": "date"}], ids=lambda one: next(iter(one))
)
def test_a_strict_text_that_cannot_be_held_to_is_refused_and_any_other_passes(
    name: str, text: Schema
) -> None:
    form = AnswerFormat(tool_parser=name).grammar
    assert form is not None
    function = strict("get_it", record({"t": {"type": "string", **text}}))

    with pytest.raises(InvalidRequest, match=next(iter(text))) as refused:
        form.calls(Lark({}), [function], several=False)

    assert refused.value.field == "tools"
    assert form.calls(Lark({}), [replace(function, strict=False)], several=False)


# --- thoughts


@pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "spelled"])
@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
def test_a_structure_comes_after_the_thoughts(spelled: bool, is_open: bool) -> None:
    answers = AnswerFormat(reasoning_start_tag="<think>", reasoning_end_tag="</think>")
    walk = Walk(answers, spelled=spelled)
    prompt = "<think>\n" if is_open else "[assistant]"
    grammar = Grammar(kind=GrammarKind.CHOICE, text='["yes", "<no>"]')
    lark = Lark(walk.token_ids)
    start = f"{answers.thoughts(lark, prompt=prompt, may_begin=True)} @answer"
    num_thoughts = 0
    for seed in range(12):
        matcher = walk.matcher(start, lark, grammar)
        begin = "" if is_open or seed % 2 else "<think>"
        thought = f"{begin}Hm <no> {seed}</think>\n" if is_open or seed % 2 == 0 else ""
        for token_id in walk.tokenizer(thought, add_special_tokens=False)["input_ids"]:
            matcher.accept(token_id)
        text = walk.text(matcher, seed)
        if text is None:
            continue  # it began to think, and did not end
        parser = answers.parser(prompt=prompt, tools={}, new_call_id=str)
        assert parser is not None
        answer = read(parser, [thought + text])
        assert answer.content in ("yes", "<no>")
        num_thoughts += bool(answer.reasoning)
    assert num_thoughts >= 5


def test_closed_thoughts_do_not_open_again() -> None:
    answers = AnswerFormat(reasoning_start_tag="<think>", reasoning_end_tag="</think>")

    assert answers.thoughts(Lark({}), prompt="<think>\n\n</think>\n\n", may_begin=True) == ""
    assert answers.thoughts(Lark({}), prompt="[assistant]", may_begin=False) == ""
    assert AnswerFormat().thoughts(Lark({}), prompt="", may_begin=True) == ""
