# SPDX-License-Identifier: Apache-2.0
"""A real engine over a tiny model that writes what it is told: calls and thoughts come out."""

import asyncio
import queue
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.api.conftest import serving
from tests.fakes.cluster import FakeCluster, QueueStream
from tests.models_tiny import make_model
from xinference.api.app import create_app
from xinference.engine import Engine
from xinference.engine.batch import Batch
from xinference.engine.config import Placement
from xinference.engine.loading import make_engine
from xinference.errors import AbilityMissing, InvalidRequest
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models.answer import AnswerReader, AnswerReaders
from xinference.models.language import LanguageModel
from xinference.models.parsing.reader import AnswerParser
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Message,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
    Usage,
)

from .parsing.test_grammars import WRITTEN, cut, parser_of

END = "<|im_end|>"
SPECIAL = [END, "<|im_start|>", "[TOOL_CALLS]", "<|python_tag|>", "<|channel|>", "<|message|>"]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.reasoning_content or '' }}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.id }}{{ call.function | tojson }}{% endfor %}"
    "{{ m.tool_call_id or '' }}{{ m.name or '' }}{% endfor %}"
    "[assistant]{% if enable_thinking and thinking %}<think>\n{% endif %}"
)
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "get_time")
)
ASK = ChatPrompt(messages=(Message(role="user", content="hi"),), tools=TOOLS)
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "é☃𝄞"}}\n</tool_call>'


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte and the special ones of some grammars."""
    alphabet = {char: one for one, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


class ScriptedRunner:
    """In the place of the engine's runner: the logits of a text that was written before.

    One request at a time; the first position that is asked for is the prompt's last.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._script: list[int] = []
        self._first: int | None = None

    def say(self, token_ids: list[int]) -> None:
        self._script, self._first = token_ids, None

    def forward(self, batch: Batch) -> torch.Tensor:
        positions = np.asarray(batch.positions)[np.asarray(batch.sample_tokens)]
        logits = torch.zeros(len(positions), self._vocab_size)
        for row, position in enumerate(positions.tolist()):
            self._first = position if self._first is None else self._first
            logits[row, self._script[position - self._first]] = 1e4
        return logits


class Scripted:
    """A started language model, and what it says next."""

    def __init__(self, **source: Any) -> None:
        self.tokenizer = byte_tokenizer()
        model = make_model("llama")
        model.generation_config.eos_token_id = []
        engine: Engine = make_engine(
            model,
            self.tokenizer,
            EngineOptions(block_size=16, max_num_seqs=2),
            placement=Placement(device=torch.device("cpu"), dtype=torch.float32),
            name="scripted",
            report=lambda _: None,
        )
        self.runner = ScriptedRunner(engine.vocab_size)
        engine._runner = self.runner  # type: ignore[assignment]
        self.engine = engine
        self.told: queue.Queue[GenerationEvent] = queue.Queue()
        self.model = self.variant(**source)
        self.model.start(lambda events: [self.told.put(event) for _, event in events] and None)

    def variant(self, *, abilities: tuple[str, ...] = (), **source: Any) -> LanguageModel:
        end = self.tokenizer.convert_tokens_to_ids(END)
        given = {"chat_template": TEMPLATE, "stop_token_ids": (end,), "tool_parser": "hermes"}
        return LanguageModel(
            self.engine,
            ReplicaSpec(
                replica=ReplicaUid(ModelUid("scripted"), 0),
                instance=InstanceId("i"),
                source=ModelSource(path="nowhere", **(given | source)),
                abilities=abilities or ("chat", "tools", "reasoning", "hybrid"),
                engine_options=EngineOptions(),
                python_executable=sys.executable,
            ),
        )

    def script(self, text: str) -> int:
        """Say this next; return how many tokens it is, the one that ends the turn included."""
        (token_ids,) = self.tokenizer([text + END], add_special_tokens=False)["input_ids"]
        self.runner.say(list(token_ids))
        return len(token_ids)

    def answer(
        self, text: str, prompt: ChatPrompt = ASK, **sampling: Any
    ) -> tuple[list[GenerationEvent], int]:
        """Return the events of an answer, and how many tokens the whole script is."""
        num_tokens = self.script(text)
        self.model.submit(asked(prompt, **sampling))
        events = [self.told.get(timeout=20)]
        while not isinstance(events[-1], Finished | Failed):
            events.append(self.told.get(timeout=20))
        return events, num_tokens


def asked(prompt: ChatPrompt, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId("a"),
        prompt=prompt,
        sampling=SamplingParams(temperature=0.0, **sampling),
    )


def of_choice(events: list[GenerationEvent], index: int) -> list[GenerationEvent]:
    """Return the deltas of one of several answers."""
    return [
        one
        for one in events
        if not isinstance(one, Finished | Failed) and one.choice_index == index
    ]


def put_together(events: list[GenerationEvent]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return content, reasoning, and the calls with their arguments."""
    content, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    for event in events:
        match event:
            case TextDelta(text=text):
                content += text
            case ReasoningDelta(text=text):
                reasoning += text
            case ToolCallStart(name=name):
                calls.append((name, ""))
            case ToolCallArguments(index=index, text=text):
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, reasoning, calls


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    made = Scripted(reasoning_start_tag="<think>", reasoning_end_tag="</think>")
    yield made
    made.model.stop(10.0)


def test_thoughts_text_and_calls_come_out_apart(scripted: Scripted) -> None:
    events, num_tokens = scripted.answer(f"<think>\nHm.\n</think>\n\nLook: {CALL}\n{CALL}")

    arguments = '{"zone": "é☃𝄞"}'
    assert put_together(events) == ("Look:", "Hm.", [("get_time", arguments)] * 2)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.TOOL_CALLS
    assert last.usage.num_completion_tokens == num_tokens
    tokens = [one.token_ids for one in events if isinstance(one, TextDelta | ReasoningDelta)]
    assert sum(map(len, tokens)) == num_tokens
    ids = [one.call_id for one in events if isinstance(one, ToolCallStart)]
    assert len(set(ids)) == 2


def test_every_truncation_ends_with_length(scripted: Scripted) -> None:
    for max_tokens in (1, 9, 30, 45, 60):
        events, num_tokens = scripted.answer(CALL, max_tokens=max_tokens)
        assert num_tokens > max_tokens
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.reason is FinishReason.LENGTH
        assert last.usage.num_completion_tokens == max_tokens


def test_without_parallel_calls_the_answer_ends_with_the_first(scripted: Scripted) -> None:
    prompt = ChatPrompt(messages=ASK.messages, tools=TOOLS, parallel_tool_calls=False)

    events, num_tokens = scripted.answer(f"{CALL}\n{CALL}", prompt)

    assert [name for name, _ in put_together(events)[2]] == ["get_time"]
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.TOOL_CALLS
    assert last.usage.num_completion_tokens < num_tokens * 0.6


def test_each_of_several_answers_is_read_by_itself(scripted: Scripted) -> None:
    text = f"<think>\nHm.\n</think>\n\nLook: {CALL}"

    events, num_tokens = scripted.answer(text, n=3, logprobs=1)

    arguments = '{"zone": "é☃𝄞"}'
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.usage.num_completion_tokens == 3 * num_tokens
    for index in range(3):
        told = of_choice(events, index)
        assert put_together(told) == ("Look:", "Hm.", [("get_time", arguments)])
        texts = [one for one in told if isinstance(one, TextDelta)]
        assert [one.reason for one in texts if one.reason] == [FinishReason.TOOL_CALLS]
        logprobs = [each for one in texts for each in one.logprobs]
        assert b"".join(each.token for each in logprobs).decode() == text
    ids = [one.call_id for one in events if isinstance(one, ToolCallStart)]
    assert len(set(ids)) == 3


def test_without_parallel_calls_each_of_several_answers_ends_with_its_first(
    scripted: Scripted,
) -> None:
    prompt = ChatPrompt(messages=ASK.messages, tools=TOOLS, parallel_tool_calls=False)

    events, num_tokens = scripted.answer(f"{CALL}\n{CALL}", prompt, n=2)

    last = events[-1]
    assert isinstance(last, Finished)
    assert last.usage.num_completion_tokens < 2 * num_tokens * 0.6
    for index in range(2):
        told = of_choice(events, index)
        assert [name for name, _ in put_together(told)[2]] == ["get_time"]
        reasons = [one.reason for one in told if isinstance(one, TextDelta) and one.reason]
        assert reasons == [FinishReason.TOOL_CALLS]


def test_an_aborted_request_for_several_answers_tells_what_was_held_back(
    scripted: Scripted,
) -> None:
    reader = AnswerReaders(
        [AnswerReader(parser_of("hermes", thinks=False), one_call=False) for _ in range(2)]
    )
    usage = Usage(num_prompt_tokens=1, num_completion_tokens=2)

    first = reader.read(TextDelta(text="a <tool", choice_index=1))
    last = reader.read(Finished(reason=FinishReason.ABORT, usage=usage))

    assert put_together(of_choice([*first, *last], 1))[0] == "a <tool"
    assert last[-1] == Finished(reason=FinishReason.ABORT, usage=usage)


def test_what_looks_like_a_call_is_content_where_there_are_no_tools(scripted: Scripted) -> None:
    for prompt in (
        ChatPrompt(messages=ASK.messages),
        ChatPrompt(messages=ASK.messages, tools=TOOLS, tool_choice=ToolChoice.NONE),
    ):
        events, _ = scripted.answer(CALL, prompt)
        assert put_together(events) == (CALL, "", [])
        assert isinstance(events[-1], Finished)
        assert events[-1].reason is FinishReason.STOP


def test_a_prompt_that_opens_the_thoughts_begins_with_them(scripted: Scripted) -> None:
    prompt = ChatPrompt(messages=ASK.messages, enable_thinking=True)

    events, _ = scripted.answer("Hm.\n</think>\n\nHi!", prompt)

    assert put_together(events) == ("Hi!", "Hm.", [])


def test_special_tokens_that_a_grammar_names_are_read_and_others_left_out() -> None:
    scripted = Scripted(tool_parser="mistral")
    try:
        events, _ = scripted.answer(
            'Look<|im_start|>.[TOOL_CALLS] [{"name": "get_time", "arguments": {}}]'
        )
    finally:
        scripted.model.stop(10.0)

    assert put_together(events) == ("Look.", "", [("get_time", "{}")])


def test_a_reader_that_breaks_gives_the_text_as_it_is() -> None:
    class Broken:
        num_complete_calls = 0
        is_thinking = False

        def push(self, text: str) -> list[Delta]:
            raise RuntimeError("a bug")

        def finish(self) -> list[Delta]:
            return []

    reader = AnswerReaders([AnswerReader(Broken(), one_call=False)])
    usage = Usage(num_prompt_tokens=1, num_completion_tokens=2)

    deltas = reader.read(TextDelta(text="a")) + reader.read(TextDelta(text="b"))
    (last,) = reader.read(Finished(reason=FinishReason.STOP, usage=usage))

    assert put_together(deltas)[0] == "ab"
    assert last == Finished(reason=FinishReason.STOP, usage=usage)


# --- prompts


def rendered(scripted: Scripted, prompt: ChatPrompt, **source: Any) -> str:
    request = scripted.variant(**source).prepare(asked(prompt)).request
    return str(scripted.tokenizer.decode(list(request.prompt_token_ids)))


def test_tools_calls_and_results_are_rendered_by_the_template(scripted: Scripted) -> None:
    history = (
        Message(role="user", content="hi"),
        Message(
            role="assistant",
            content=None,
            reasoning_content="Hm.",
            tool_calls=(ToolCall(call_id="c", name="f", arguments='{"a": 1}'),),
        ),
        Message(role="tool", content="12", tool_call_id="c", name="f"),
    )
    prompt = ChatPrompt(messages=history, tools=TOOLS[:1])

    as_object = rendered(scripted, prompt)
    as_text = rendered(scripted, prompt, tool_parser="deepseek-v3")

    assert '"get_weather"' in as_object
    assert '[assistant]Hm.c{"name": "f", "arguments": {"a": 1}}[tool]12cf[assistant]' in as_object
    assert '"arguments": "{\\"a\\": 1}"' in as_text


def test_thinking_is_as_the_request_says_or_else_the_launch(scripted: Scripted) -> None:
    def thinks(prompt: ChatPrompt, launched: bool | None) -> bool:
        model = scripted.variant()
        model.conversation.enable_thinking = launched
        ids = model.prepare(asked(prompt)).request.prompt_token_ids
        return str(scripted.tokenizer.decode(list(ids))).endswith("<think>\n")

    silent = ChatPrompt(messages=ASK.messages)
    off = ChatPrompt(messages=ASK.messages, enable_thinking=False)
    variable = ChatPrompt(messages=ASK.messages, template_options={"enable_thinking": True})

    assert [thinks(silent, launched) for launched in (None, True, False)] == [False, True, False]
    assert not thinks(off, True)
    assert thinks(variable, False)


@pytest.mark.parametrize(
    ("template", "default"),
    [
        (TEMPLATE, False),
        ("{% if enable_thinking is undefined or enable_thinking %}<think>{% endif %}", None),
        ("[assistant]{% if enable_thinking is false %}<think></think>{% endif %}", None),
        ("{{ messages[0].content }}", None),
    ],
    ids=["told to", "unless told not to", "as it likes", "never in the prompt"],
)
def test_nobody_thinks_unasked_where_the_template_waits_to_be_told(
    scripted: Scripted, template: str, default: bool | None
) -> None:
    tags = {"reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}

    model = scripted.variant(chat_template=template, **tags)

    assert model.conversation.enable_thinking is default


@pytest.mark.parametrize(
    "source",
    [
        {"tool_parser": None},
        {"tool_parser": "deepseek-v4"},
        {"abilities": ("chat",)},
        {"chat_template": "{{ messages[0].content }}"},
    ],
    ids=["no parser", "unread", "no ability", "template without tools"],
)
def test_a_model_that_has_no_tools_refuses_them(scripted: Scripted, source: Any) -> None:
    with pytest.raises(AbilityMissing, match="call tools"):
        scripted.variant(**source).prepare(asked(ASK))


def test_thinking_that_cannot_be_switched_is_refused_by_name(scripted: Scripted) -> None:
    for enable, abilities in ((True, ("chat",)), (False, ("chat", "reasoning"))):
        prompt = ChatPrompt(messages=ASK.messages, enable_thinking=enable)
        with pytest.raises(InvalidRequest) as refused:
            scripted.variant(abilities=abilities).prepare(asked(prompt))
        assert refused.value.field == "enable_thinking"


def test_how_much_to_think_reaches_a_template_that_has_it(scripted: Scripted) -> None:
    template = (
        "{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}{{ messages[0].content }}"
    )
    prompt = ChatPrompt(messages=ASK.messages, reasoning_effort="low")

    assert rendered(scripted, prompt, chat_template=template).startswith("[low]")


def test_no_effort_switches_the_thinking_of_a_hybrid_model_off(scripted: Scripted) -> None:
    model = scripted.variant(abilities=("chat", "tools", "hybrid"))
    model.conversation.enable_thinking = True
    prompt = ChatPrompt(messages=ASK.messages, reasoning_effort="none")

    ids = model.prepare(asked(prompt)).request.prompt_token_ids

    assert not str(scripted.tokenizer.decode(list(ids))).endswith("<think>\n")


@pytest.mark.parametrize(
    ("effort", "abilities", "enable_thinking"),
    [
        ("low", ("chat", "hybrid"), None),
        ("high", ("chat",), None),
        ("none", ("chat", "reasoning"), None),
        ("none", ("chat", "hybrid"), True),
    ],
)
def test_an_effort_that_a_model_cannot_be_told_is_refused_by_name(
    scripted: Scripted, effort: str, abilities: tuple[str, ...], enable_thinking: bool | None
) -> None:
    prompt = ChatPrompt(
        messages=ASK.messages, reasoning_effort=effort, enable_thinking=enable_thinking
    )

    with pytest.raises(InvalidRequest) as refused:
        scripted.variant(abilities=abilities).prepare(asked(prompt))

    assert refused.value.field == "reasoning_effort"


# --- one producer


def events_of(
    parser: AnswerParser, pieces: list[str], reason: FinishReason
) -> tuple[Any, FinishReason, int]:
    reader = AnswerReaders([AnswerReader(parser, one_call=False)])
    events: list[GenerationEvent] = []
    for piece in pieces:
        events += reader.read(TextDelta(text=piece, token_ids=(7,)))
    usage = Usage(num_prompt_tokens=3, num_completion_tokens=len(pieces))
    *rest, last = reader.read(Finished(reason=reason, usage=usage))
    assert isinstance(last, Finished)
    assert replace(last.usage, num_reasoning_tokens=0) == usage
    tokens = [one.token_ids for one in events if isinstance(one, TextDelta | ReasoningDelta)]
    return put_together([*events, *rest]), last.reason, sum(map(len, tokens)) - len(pieces)


@pytest.mark.parametrize("name", [*dict.fromkeys(name for name, _, _ in WRITTEN)])
@settings(max_examples=60, deadline=None)
@given(case=cut(), reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
def test_the_events_say_the_same_however_the_text_falls_into_tokens(
    name: str, case: tuple[str, list[str]], reason: FinishReason
) -> None:
    text, pieces = case

    whole, whole_reason, lost = events_of(parser_of(name, thinks=True), [text], reason)

    assert events_of(parser_of(name, thinks=True), pieces, reason) == (whole, whole_reason, 0)
    assert lost == 0
    assert reason is FinishReason.STOP or whole_reason is FinishReason.LENGTH
    assert whole_reason is not FinishReason.TOOL_CALLS or whole[2]


class ScriptedCluster(FakeCluster):
    """A cluster whose model is a scripted one."""

    scripted: Scripted
    text: str

    async def generate(self, model: ModelUid, request: GenerationRequest) -> Any:
        self.scripted.script(self.text)
        accepted = self.scripted.model.submit(request)
        events: asyncio.Queue[GenerationEvent] = asyncio.Queue()
        last: GenerationEvent | None = None
        while not isinstance(last, Finished | Failed):
            last = await asyncio.to_thread(self.scripted.told.get, timeout=20)
            events.put_nowait(last)
        return QueueStream(accepted, events)


async def test_openais_client_and_a_real_model_streamed_and_not(scripted: Scripted) -> None:
    cluster = await ScriptedCluster.running()
    cluster.scripted = scripted
    cluster.text = f"<think>\nHm.\n</think>\n\nLook: {CALL}\n{CALL}"

    def use(port: int) -> None:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        ) as client:
            tools: Any = list(TOOLS)
            for max_tokens in (None, 12, 60, 100):
                ask: Any = {"model": "guide", "messages": [{"role": "user", "content": "hi"}]}
                ask |= {"tools": tools, "max_tokens": max_tokens, "temperature": 0}
                whole = client.chat.completions.create(**ask)
                chunks = list(
                    client.chat.completions.create(
                        **ask, stream=True, stream_options={"include_usage": True}
                    )
                )
                choice = whole.choices[0]
                deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
                calls: list[str] = []
                for delta in deltas:
                    for piece in delta.tool_calls or ():
                        assert piece.function is not None
                        if piece.id is not None:
                            calls.append("")
                        calls[piece.index] += piece.function.arguments or ""
                reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
                thoughts = "".join(getattr(d, "reasoning_content", "") or "" for d in deltas)
                assert "".join(d.content or "" for d in deltas) == (choice.message.content or "")
                assert thoughts == getattr(choice.message, "reasoning_content", "")
                assert calls == [c.function.arguments for c in choice.message.tool_calls or ()]
                assert reasons[-1] == choice.finish_reason
                assert choice.finish_reason == ("length" if max_tokens else "tool_calls")
                assert chunks[-1].usage == whole.usage

    async with serving(create_app(cluster)) as port:
        await asyncio.to_thread(use, port)
