# SPDX-License-Identifier: Apache-2.0
"""vLLM, SGLang and TensorRT-LLM by the adapter, against stand-ins with their flags and routes."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models_tiny import MAX_POSITIONS, make_tokenizer
from xinference.errors import InternalError, InvalidRequest, LoadFailed
from xinference.identifiers import RequestId
from xinference.models.loading import load_model
from xinference.models.servers import availability, loop
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    ToolCallArguments,
    ToolCallStart,
)
from xinference.protocol.servers import ServerEngine

from .served import Running, chat, spec, text_of

STAND_INS = Path(__file__).parents[2] / "fakes" / "engines"
ENGINES = (ServerEngine.VLLM, ServerEngine.SGLANG, ServerEngine.TRT_LLM)
PROMPT = TextPrompt(text="hello")
REFUSES, FAILS_LATER, BREAKS = {666: 1.0}, {667: 1.0}, {668: 1.0}
FAMILY = {
    "tool_parser": "hermes",
    "reasoning_start_tag": "<think>",
    "reasoning_end_tag": "</think>",
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}",
    "stop": ("<END>",),
    "stop_token_ids": (2,),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_POSITIONS}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class StandIn:
    """Launches stand-ins, and reads what they wrote down."""

    def __init__(self, files: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._files = files
        self._log = log
        self._patch = monkeypatch
        self._started: list[Running] = []
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS), prepend=":")
        monkeypatch.syspath_prepend(str(STAND_INS))
        monkeypatch.setattr(availability, "GPU_FILES", (str(log.parent),))
        monkeypatch.setenv("STAND_IN_LOG", str(log))

    def launch(self, engine: ServerEngine, *answer: str, delay: float = 0, **given: Any) -> Running:
        self._patch.setenv("STAND_IN_ANSWER", json.dumps(answer or ["Hi", " there"]))
        self._patch.setenv("STAND_IN_DELAY", str(delay))
        running = Running(spec(self._files, engine, **given))
        self._started.append(running)
        return running

    def noted(self, name: str) -> list[Any]:
        lines = map(json.loads, self._log.read_text().splitlines())
        return [line[name] for line in lines if name in line]

    def stop(self) -> None:
        for running in self._started:
            running.stop()


@pytest.fixture
def stand_in(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    launcher = StandIn(files, tmp_path / "log.jsonl", monkeypatch)
    yield launcher
    launcher.stop()


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("engine", ENGINES)
def test_thoughts_calls_and_usage_are_told_as_on_our_own_engine(
    stand_in: StandIn, engine: ServerEngine
) -> None:
    call = '{"name": "look", "arguments": {"at": "sky"}}'
    running = stand_in.launch(
        engine,
        *("<think>", "well", "</think>", "I look. ", "<tool_call>", call, "</tool_call>"),
        abilities=("chat", "tools", "hybrid"),
        source=FAMILY,
    )
    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)

    deltas, end = running.ask(chat("Look!", tools=tools), top_p=0.0)

    assert "".join(one.text for one in deltas if isinstance(one, ReasoningDelta)) == "well"
    assert text_of(deltas).strip() == "I look."
    assert [one.name for one in deltas if isinstance(one, ToolCallStart)] == ["look"]
    arguments = "".join(one.text for one in deltas if isinstance(one, ToolCallArguments))
    assert json.loads(arguments) == {"at": "sky"}
    assert end.reason is FinishReason.TOOL_CALLS
    assert end.usage.num_completion_tokens == len(
        f"<think>well</think>I look. <tool_call>{call}</tool_call>"
    )
    assert end.usage.num_reasoning_tokens == len("<think>well</think>")
    assert end.usage.num_cached_tokens == 1
    (asked,) = stand_in.noted("asked")
    assert asked["skip_special_tokens"] is False
    assert asked["stop"] == ["<END>"]
    assert asked["stop_token_ids"] == [2]
    assert asked["top_p"] > 0
    assert len(asked["prompt"]) == end.usage.num_prompt_tokens


def test_launch_options_become_the_flags_of_vllm(stand_in: StandIn) -> None:
    running = stand_in.launch(
        ServerEngine.VLLM,
        max_num_seqs=3,
        max_model_len=256,
        dtype="float16",
        trust_remote_code=True,
        enable_prefix_caching=False,
        flags={
            "tensor_parallel_size": 2,
            "enforce-eager": True,
            "enable_chunked_prefill": False,
            "hf_overrides": {"a": 1},
            "middleware": ["x", "y"],
        },
    )

    (options,) = stand_in.noted("options")

    assert options["max_num_seqs"] == "3"
    assert options["max_model_len"] == "256"
    assert options["dtype"] == "float16"
    assert options["trust_remote_code"] is True
    assert "enable_prefix_caching" not in options
    assert options["tensor_parallel_size"] == "2"
    assert options["enforce_eager"] is True
    assert json.loads(options["hf_overrides"]) == {"a": 1}
    assert options["middleware"] == ["x", "y"]
    assert options["host"] == "127.0.0.1"
    assert options["max_log_len"] == "0"  # no prompt in the log
    assert (running.model.context_length, running.model.max_num_seqs) == (256, 3)


@pytest.mark.parametrize(
    ("engine", "flags", "expected"),
    [
        (
            ServerEngine.SGLANG,
            {"tp_size": 2},
            {"max_running_requests": "3", "context_length": "256", "tp_size": "2"},
        ),
        (
            ServerEngine.TRT_LLM,
            {"kv_cache_free_gpu_memory_fraction": 0.5},
            {
                "max_batch_size": "3",
                "max_seq_len": "256",
                "kv_cache_free_gpu_memory_fraction": "0.5",
            },
        ),
    ],
)
def test_launch_options_become_the_flags_of_the_others(
    stand_in: StandIn, engine: ServerEngine, flags: dict[str, Any], expected: dict[str, str]
) -> None:
    running = stand_in.launch(engine, max_num_seqs=3, max_model_len=256, flags=flags)

    (options,) = stand_in.noted("options")

    assert expected.items() <= options.items()
    assert running.model.context_length == 256


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_ends_at_its_stop_text_or_its_length(
    stand_in: StandIn, engine: ServerEngine
) -> None:
    running = stand_in.launch(engine, "one ", "two ", "three")

    deltas, end = running.ask(PROMPT, stop=("tw",))
    assert (text_of(deltas), end.stop_string) == ("one ", "tw")
    assert end.reason is FinishReason.STOP

    deltas, end = running.ask(PROMPT, max_tokens=6)
    assert (text_of(deltas), end.reason) == ("one tw", FinishReason.LENGTH)
    assert end.usage.num_completion_tokens == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_an_abort_closes_the_stream_of_the_server(stand_in: StandIn, engine: ServerEngine) -> None:
    running = stand_in.launch(engine, *["on and on "] * 40, delay=0.05)
    running.submit(PROMPT, max_tokens=480)
    running.next()

    running.model.abort(RequestId("r"))

    _, end = running.rest()
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.ABORT
    wait_until(lambda: stand_in.noted("aborted"))


def test_what_goes_wrong_in_the_server_ends_the_request_and_no_other(stand_in: StandIn) -> None:
    running = stand_in.launch(ServerEngine.VLLM)
    errors = []
    for bias in (REFUSES, FAILS_LATER, BREAKS):
        running.submit(PROMPT, logit_bias=bias)
        _, end = running.rest()
        assert isinstance(end, Failed)
        errors.append(end.error)

    assert [type(error) for error in errors] == [InvalidRequest, InternalError, InternalError]
    assert "the stand-in refuses" in str(errors[0])
    assert "the stand-in fails" in str(errors[1])
    assert text_of(running.ask(PROMPT)[0]) == "Hi there"


@pytest.mark.parametrize(
    ("engine", "kind", "text", "passed"),
    [
        (ServerEngine.VLLM, GrammarKind.JSON_SCHEMA, "{}", {"structured_outputs": {"json": {}}}),
        (ServerEngine.VLLM, GrammarKind.REGEX, "a+", {"structured_outputs": {"regex": "a+"}}),
        (ServerEngine.VLLM, GrammarKind.CHOICE, '["a"]', {"structured_outputs": {"choice": ["a"]}}),
        (ServerEngine.SGLANG, GrammarKind.JSON_SCHEMA, "{}", {"json_schema": "{}"}),
        (ServerEngine.SGLANG, GrammarKind.CHOICE, '["a.", "b"]', {"regex": "(a\\.)|(b)"}),
        (ServerEngine.SGLANG, GrammarKind.GRAMMAR, 'root ::= "a"', {"ebnf": 'root ::= "a"'}),
    ],
)
def test_a_structure_is_passed_in_the_engine_s_own_words(
    stand_in: StandIn, engine: ServerEngine, kind: GrammarKind, text: str, passed: dict[str, Any]
) -> None:
    running = stand_in.launch(engine)

    running.ask(PROMPT, grammar=Grammar(kind=kind, text=text))

    (asked,) = stand_in.noted("asked")
    assert passed.items() <= asked.items()


def test_tensorrt_llm_refuses_what_is_not_passed_on(stand_in: StandIn) -> None:
    running = stand_in.launch(ServerEngine.TRT_LLM)

    for named, sampling in {
        "guided_regex": {
            "grammar": Grammar(kind=GrammarKind.REGEX, text="a", field="guided_regex")
        },
        "logprobs": {"logprobs": 1},
        "bad_words": {"bad_words": ("a",)},
        "typical_p": {"typical_p": 0.5},
    }.items():
        with pytest.raises(InvalidRequest) as refused:
            running.submit(PROMPT, **sampling)
        assert refused.value.field == named


def test_tokens_are_told_for_a_stream_that_may_go_on_elsewhere(stand_in: StandIn) -> None:
    for engine in (ServerEngine.VLLM, ServerEngine.SGLANG):
        deltas, _ = stand_in.launch(engine, "Hi").ask(PROMPT)
        told = [delta for delta in deltas if isinstance(delta, TextDelta) and delta.text]
        # The one tells them itself; of the other they are what its tokenizer makes of the text.
        assert all(delta.token_ids for delta in told)


def test_what_the_server_counts_is_counted_here(stand_in: StandIn) -> None:
    running = stand_in.launch(ServerEngine.SGLANG)
    _, end = running.ask(PROMPT)

    wait_until(lambda: running.model.counters().get("num_generated_tokens") == len("Hi there"))

    assert running.model.counters()["num_prefill_tokens"] == end.usage.num_prompt_tokens


def test_a_server_that_takes_long_says_so_and_one_that_ends_says_why(
    stand_in: StandIn, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LOADS_SECONDS", "1.5")
    told: list[str] = []
    model = load_model(
        spec(files, ServerEngine.SGLANG), on_progress=lambda _, __, info: told.append(info)
    )
    model.stop(5.0)
    assert any("SGLang loads the model, 1 s" in info for info in told), told

    monkeypatch.setenv("STAND_IN_ENDS", "CUDA is out of memory")
    with pytest.raises(LoadFailed, match="CUDA is out of memory"):
        stand_in.launch(ServerEngine.VLLM)
    monkeypatch.delenv("STAND_IN_ENDS")
    with pytest.raises(LoadFailed, match="unrecognized arguments: --tensor-paralel-size 2"):
        stand_in.launch(ServerEngine.VLLM, flags={"tensor_paralel_size": 2})


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_not_there_says_what_to_install(
    files: Path, engine: ServerEngine
) -> None:
    with pytest.raises(LoadFailed, match="is not installed; run pip install"):
        load_model(spec(files, engine), on_progress=lambda *_: None)


def test_an_engine_without_its_gpu_says_so(
    stand_in: StandIn, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "GPU_FILES", ())

    with pytest.raises(LoadFailed, match="there is no GPU"):
        load_model(spec(files, ServerEngine.VLLM), on_progress=lambda *_: None)
    assert availability.engines_here()["vLLM"] == "there is no GPU"
    assert text_of(stand_in.launch(ServerEngine.VLLM, device="cpu").ask(PROMPT)[0]) == "Hi there"


@pytest.mark.parametrize("engine", [ServerEngine.SGLANG, ServerEngine.TRT_LLM])
def test_a_server_that_counts_no_steps_gets_on_while_it_is_well(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, engine: ServerEngine
) -> None:
    monkeypatch.setattr(loop, "WATCH_SECONDS", 0.05)
    running = stand_in.launch(engine, delay=3.0)
    running.submit(PROMPT)

    wait_until(lambda: running.model.counters()["progress"] > 8.0)

    deltas, _ = running.rest()
    assert text_of(deltas) == "Hi there"


@pytest.mark.parametrize(
    ("engine", "quiet_seconds"), [(ServerEngine.TRT_LLM, 0.0), (ServerEngine.VLLM, 300.0)]
)
def test_one_that_counts_steps_or_is_quiet_for_too_long_does_not(
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    engine: ServerEngine,
    quiet_seconds: float,
) -> None:
    monkeypatch.setattr(loop, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(loop, "QUIET_SECONDS", quiet_seconds)
    running = stand_in.launch(engine, delay=1.0)

    running.ask(PROMPT)

    assert running.model.counters()["progress"] < 8.0
