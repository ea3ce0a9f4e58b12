# SPDX-License-Identifier: Apache-2.0
"""Models on the real llama.cpp: a tiny file with random weights, and every way to ask it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.gguf_tiny import END_TOKEN, VOCAB_SIZE, save_gguf
from xinference.catalog.gguf_head import gguf_file
from xinference.errors import (
    AbilityMissing,
    ContextLengthExceeded,
    DuplicateRequest,
    InvalidRequest,
    LoadFailed,
    ModelOverloaded,
)
from xinference.identifiers import RequestId
from xinference.models.loading import load_model
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)

from .served import Running, chat, spec, text_of

CONTEXT = 20_000
FOREVER = {"ignore_eos": True, "max_tokens": 15_000, "temperature": 0.0}
GREEDY = {"temperature": 0.0, "max_tokens": 12}
PROMPT = TextPrompt(text="hello")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", context_length=CONTEXT)


@pytest.fixture(scope="module")
def running(file: Path) -> Iterator[Running]:
    served = Running(spec(file, max_num_seqs=2, max_model_len=CONTEXT, max_queue_size=2))
    yield served
    served.stop()


def test_a_chat_is_rendered_here_and_counted_as_the_file_counts(running: Running) -> None:
    deltas, end = running.ask(chat("hi"), **GREEDY)

    # Byte for byte, and two special tokens around each turn.
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    special = rendered.count("<|")
    num_bytes = len(rendered.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    assert end.usage.num_prompt_tokens == num_bytes + special
    assert end.usage.num_completion_tokens == 12
    assert end.reason is FinishReason.LENGTH
    assert text_of(deltas)


def test_a_prompt_is_the_same_as_text_and_as_tokens(running: Running) -> None:
    as_text, _ = running.ask(PROMPT, **GREEDY)
    as_tokens, end = running.ask(TokenPrompt(token_ids=tuple(b"hello")), **GREEDY)

    assert text_of(as_text) == text_of(as_tokens)
    assert end.usage.num_prompt_tokens == 5
    assert end.usage.num_cached_tokens > 0, "the second finds the first in the cache"


def test_an_answer_that_was_begun_elsewhere_goes_on_as_it_would_have(running: Running) -> None:
    allowed = dict.fromkeys(b"abcdefghij", 50.0)  # text, not bytes of no character
    whole, end = running.ask(PROMPT, **GREEDY, logit_bias=allowed)
    ids = [one for delta in whole if isinstance(delta, TextDelta) for one in delta.token_ids]
    assert len(ids) == end.usage.num_completion_tokens == 12

    resumed, end = running.ask(
        PROMPT, **GREEDY, logit_bias=allowed, resume_token_ids=tuple(ids[:7])
    )

    assert text_of(resumed) == text_of(whole)
    assert isinstance(resumed[0], TextDelta)
    assert resumed[0].token_ids == tuple(ids[:7])
    assert end.usage.num_completion_tokens == 12


def test_the_answers_of_one_request_come_side_by_side(running: Running) -> None:
    deltas, end = running.ask(PROMPT, max_tokens=6, seed=5, n=2)
    again, _ = running.ask(PROMPT, max_tokens=6, seed=6)

    assert end.usage.num_completion_tokens == 12
    assert end.usage.num_prompt_tokens == 5
    reasons = {
        delta.choice_index: delta.reason
        for delta in deltas
        if isinstance(delta, TextDelta) and delta.reason
    }
    assert set(reasons) == {0, 1}
    # The second answer draws with the next seed.
    assert text_of(deltas, 1) == text_of(again)


def test_an_answer_ends_where_its_stop_text_begins(running: Running) -> None:
    only_e = {"logit_bias": {ord("e"): 100.0}, "temperature": 0.0, "max_tokens": 9}

    deltas, end = running.ask(PROMPT, **only_e, stop=("eeee",))
    assert (text_of(deltas), end.reason, end.stop_string) == ("", FinishReason.STOP, "eeee")

    deltas, end = running.ask(PROMPT, **only_e, stop=("eeee",), include_stop_str_in_output=True)
    assert text_of(deltas) == "eeee"
    assert end.usage.num_completion_tokens == 4


def test_the_token_that_ends_a_turn_is_counted_and_not_told(running: Running) -> None:
    deltas, end = running.ask(
        PROMPT, logit_bias={END_TOKEN: 100.0}, max_tokens=9, temperature=0.0, logprobs=1
    )

    assert (text_of(deltas), end.reason) == ("", FinishReason.STOP)
    assert end.usage.num_completion_tokens == 1
    assert not any(delta.logprobs for delta in deltas if isinstance(delta, TextDelta))


def test_logprobs_are_told_with_the_text_that_they_are_of(running: Running) -> None:
    allowed = dict.fromkeys(b"abcdefghij", 50.0)
    deltas, _ = running.ask(PROMPT, **GREEDY, logit_bias=allowed, logprobs=3)

    told = [one for delta in deltas if isinstance(delta, TextDelta) for one in delta.logprobs]
    assert b"".join(one.token for one in told).decode() == text_of(deltas)
    assert [one.text_offset for one in told] == [*range(12)]
    assert all(len(one.top) == 3 and one.logprob is not None for one in told)


@pytest.mark.parametrize(
    ("kind", "grammar", "allowed"),
    [
        (GrammarKind.CHOICE, json.dumps(["yes", 'n"o\n']), {"yes", 'n"o\n'}),
        (GrammarKind.GRAMMAR, 'root ::= "a" "b" | "c"', {"ab", "c"}),
    ],
)
def test_an_answer_keeps_to_its_grammar(
    running: Running, kind: GrammarKind, grammar: str, allowed: set[str]
) -> None:
    deltas, end = running.ask(chat(), grammar=Grammar(kind=kind, text=grammar), max_tokens=20)

    assert text_of(deltas) in allowed
    assert end.reason is FinishReason.STOP


def test_an_answer_keeps_to_its_schema(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))

    deltas, _ = running.ask(chat(), grammar=grammar, max_tokens=400)

    assert json.loads(text_of(deltas))["colour"] in {"red", "blue"}


def test_what_only_the_server_finds_out_fails_the_request_and_no_other(running: Running) -> None:
    running.submit(chat(), grammar=Grammar(kind=GrammarKind.GRAMMAR, text="root ::= missing"))
    _, end = running.rest()

    assert isinstance(end, Failed)
    assert isinstance(end.error, InvalidRequest)
    assert "grammar" in str(end.error)
    assert running.ask(chat(), **GREEDY)


@pytest.mark.parametrize(
    ("named", "sampling"),
    [
        ("min_tokens", {"min_tokens": 2, "max_tokens": 4}),
        ("bad_words", {"bad_words": ("no",)}),
        ("stop_token_ids", {"stop_token_ids": (3,)}),
        ("best_of", {"best_of": 2}),
        ("logprobs", {"logprobs": 1, "echo": True}),
        (
            "guided_regex",
            {"grammar": Grammar(kind=GrammarKind.REGEX, text="a", field="guided_regex")},
        ),
        (
            "guided_grammar",
            {
                "grammar": Grammar(
                    kind=GrammarKind.GRAMMAR, text='start: "a"', field="guided_grammar"
                )
            },
        ),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_by_name(
    running: Running, named: str, sampling: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        running.submit(PROMPT, **sampling)

    assert refused.value.field == named


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("thinking_budget", {"thinking_budget": 5}),
        ("call tools", {"tools": ({"type": "function", "function": {"name": "f"}},)}),
        ("think", {"enable_thinking": True}),
    ],
)
def test_what_the_model_cannot_do_is_refused_as_on_any_engine(
    running: Running, named: str, fields: dict[str, object]
) -> None:
    with pytest.raises((InvalidRequest, AbilityMissing), match=named):
        running.submit(chat(**fields))


def test_tools_that_an_answer_would_have_to_call_are_refused(file: Path, running: Running) -> None:
    from xinference.models.conversation import Conversation

    tools = ({"type": "function", "function": {"name": "f"}},)
    template = "{{ messages[0].content }}{{ tools }}"
    launched = spec(
        file,
        abilities=("chat", "tools"),
        source={"tool_parser": "hermes", "chat_template": template},
    )
    kept, running.model._conversation = (
        running.model._conversation,
        Conversation(launched, running.model._tokens),
    )
    try:
        with pytest.raises(InvalidRequest, match="tool_choice"):
            running.submit(chat(tools=tools, tool_choice=ToolChoice.REQUIRED))
        deltas, _ = running.ask(chat(tools=tools), **GREEDY)
        assert text_of(deltas)
    finally:
        running.model._conversation = kept


def test_prompts_that_do_not_fit_are_refused_before_anything_is_asked(running: Running) -> None:
    with pytest.raises(ContextLengthExceeded) as refused:
        running.submit(TextPrompt(text="x" * CONTEXT))
    assert refused.value.num_prompt_tokens == CONTEXT

    with pytest.raises(InvalidRequest, match="prompt"):
        running.submit(TokenPrompt(token_ids=(VOCAB_SIZE,)))


def test_an_abort_ends_the_answer_at_once_in_the_server_too(running: Running) -> None:
    running.submit(chat(), **FOREVER)
    while not isinstance(running.next()[1], TextDelta):
        pass
    began = time.monotonic()

    assert running.model.abort(RequestId("r"))
    _, end = running.rest()

    assert time.monotonic() - began < 5
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.ABORT
    assert end.usage.num_completion_tokens > 0
    assert not running.model.abort(RequestId("r"))
    # Both slots are free again, long before the answer would have ended.
    for name in "ab":
        running.submit(PROMPT, **GREEDY, request_id=name)
    assert {type(running.rest()[1]) for _ in "ab"} == {Finished}


def test_more_requests_than_may_wait_are_refused_and_the_others_take_turns(
    running: Running,
) -> None:
    for name in ("one", "two"):
        running.submit(PROMPT, **FOREVER, request_id=name)
    running.submit(PROMPT, **GREEDY, request_id="late", priority=1)
    running.submit(PROMPT, **GREEDY, request_id="early")
    with pytest.raises(ModelOverloaded):
        running.submit(PROMPT, request_id="too many")
    with pytest.raises(DuplicateRequest):
        running.submit(PROMPT, request_id="one")
    assert running.model.counters()["num_waiting"] >= 2

    running.model.abort(RequestId("one"))
    ended: list[str] = []
    while len(ended) < 3:
        request_id, event = running.next()
        if isinstance(event, Finished):
            ended.append(request_id)
    running.model.abort(RequestId("two"))
    running.rest()

    assert ended == ["one", "early", "late"]


def test_what_the_server_counts_is_counted_here(running: Running) -> None:
    running.ask(PROMPT, **GREEDY)
    deadline = time.monotonic() + 30
    while running.model.counters().get("num_generated_tokens", 0) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    counters = running.model.counters()

    assert counters["num_prefill_tokens"] > 0
    assert counters["num_steps"] > 0
    assert counters["num_aborts"] >= 1
    assert (counters["num_running"], counters["num_waiting"]) == (0, 0)


def test_a_server_that_dies_takes_the_model_with_it_and_says_how(file: Path) -> None:
    running = Running(spec(file, max_num_seqs=1, max_model_len=CONTEXT))
    leash = running.model._process._popen.pid
    (server,) = psutil.Process(leash).children()
    running.submit(PROMPT, **FOREVER)
    running.next()

    os.kill(server.pid, signal.SIGKILL)

    assert running.model._process.wait(20)
    assert not running.model.is_alive
    assert "SIGKILL" in running.model._process.describe_end()
    running.stop()
    _, end = running.rest()
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.ABORT, "nobody is left waiting"


def test_a_server_ends_with_its_model(file: Path) -> None:
    running = Running(spec(file, max_num_seqs=1))
    tree = psutil.Process(running.model._process._popen.pid)
    below = [tree, *tree.children(recursive=True)]

    running.stop()

    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"n_gpu_layer": 1}, "did you mean n_gpu_layers"),
        ({"cache_type_k": "q9"}, "GGML_TYPE_Q8_0"),
        ({"n_ubatch": "many"}, "n_ubatch"),
    ],
)
def test_an_option_that_llama_cpp_does_not_have_fails_the_launch_with_its_name(
    file: Path, flags: dict[str, object], told: str
) -> None:
    with pytest.raises(LoadFailed, match=told):
        load_model(spec(file, flags=flags), on_progress=lambda *_: None)


def test_its_own_options_reach_llama_cpp(file: Path) -> None:
    running = Running(
        spec(file, max_num_seqs=1, flags={"cache_type_k": "f32", "sampling.temp": 0.0})
    )
    try:
        # With its own default at 0, a request that says nothing draws nothing.
        first, _ = running.ask(PROMPT, max_tokens=10, seed=1)
        second, _ = running.ask(PROMPT, max_tokens=10, seed=2)
    finally:
        running.stop()
    assert text_of(first) == text_of(second)


def test_files_that_are_no_model_fail_the_launch_with_the_server_s_words(
    tmp_path: Path, file: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:150_000])

    with pytest.raises(LoadFailed, match="corrupted or incomplete"):
        load_model(spec(broken), on_progress=lambda *_: None)


def test_the_file_is_found_in_its_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        gguf_file(tmp_path)
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf"):
        (tmp_path / name).touch()
    assert gguf_file(tmp_path).name == "m-00001-of-00002.gguf"

    (tmp_path / "other.gguf").touch()
    with pytest.raises(ValueError, match="several models"):
        gguf_file(tmp_path)
