# SPDX-License-Identifier: Apache-2.0
"""What a request can ask of sampling, by OpenAI's client over HTTP, of a real engine."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import torch

from tests.api.conftest import serving
from tests.fakes.cluster import FakeCluster, QueueStream
from tests.models_tiny import CHAT_TEMPLATE, make_model, make_tokenizer
from xinference.api.app import create_app
from xinference.engine.config import Placement
from xinference.engine.loading import make_engine
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models.language import LanguageModel
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.generation import (
    GenerationEvent,
    GenerationRequest,
)

EOS = 2
TOKENIZER = make_tokenizer()
TEXT = "Wörld, hello 世界! and more of it"
ROUTES = ("chat", "completions")


class EngineCluster(FakeCluster):
    """A cluster whose model is a real one, in this process."""

    def begin(self, model: LanguageModel) -> None:
        self._real = model
        self._queues: dict[RequestId, asyncio.Queue[GenerationEvent]] = {}
        loop = asyncio.get_running_loop()

        def tell(events: list[tuple[RequestId, GenerationEvent]]) -> None:
            for request_id, event in events:
                loop.call_soon_threadsafe(self._queues[request_id].put_nowait, event)

        model.start(tell)

    async def generate(self, model: ModelUid, request: GenerationRequest) -> Any:
        events = self._queues[request.request_id] = asyncio.Queue()
        accepted = await asyncio.to_thread(self._real.submit, request)
        return QueueStream(accepted, events)


@pytest.fixture
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    stock = make_model("llama")
    stock.generation_config.eos_token_id = [EOS]
    engine = make_engine(
        stock,
        TOKENIZER,
        # Why no cache: a prompt that is found there is computed in other shapes, and rounds so.
        EngineOptions(block_size=16, max_num_seqs=8, enable_prefix_caching=False),
        placement=Placement(device=torch.device("cpu"), dtype=torch.float32),
        name="tiny",
        report=lambda _: None,
    )
    model = LanguageModel(
        engine,
        ReplicaSpec(
            replica=ReplicaUid(ModelUid("guide"), 0),
            instance=InstanceId("i"),
            source=ModelSource(path="nowhere", chat_template=CHAT_TEMPLATE),
            abilities=("chat", "generate"),
            engine_options=EngineOptions(),
            python_executable=sys.executable,
        ),
    )
    cluster = await EngineCluster.running()
    cluster.begin(model)
    async with (
        serving(create_app(cluster)) as port,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        ) as asking,
    ):
        yield asking
    model.stop(10.0)


async def ask(client: openai.AsyncOpenAI, route: str, **given: Any) -> Any:
    """Return the answer, or the stream, of one question; fields that are not OpenAI's too."""
    own = {name: given.pop(name) for name in [*given] if name in NOT_OPENAIS}
    given = {"model": "guide", "max_tokens": 12, "temperature": 1.0, "seed": 3, **given}
    if route == "chat":
        given.setdefault("messages", [{"role": "user", "content": TEXT}])
        return await client.chat.completions.create(**given, extra_body=own)
    given.setdefault("prompt", TEXT)
    return await client.completions.create(**given, extra_body=own)


NOT_OPENAIS = {
    *("top_k", "min_p", "typical_p", "repetition_penalty", "bad_words", "min_tokens"),
    *("ignore_eos", "include_stop_str_in_output", "stop_token_ids"),
}


def whole(answer: Any) -> dict[int, tuple[str, Any, str]]:
    """Return text, logprobs and finish reason of each choice."""
    return {
        one.index: (
            one.text if hasattr(one, "text") else one.message.content,
            logprobs_of(one),
            one.finish_reason,
        )
        for one in answer.choices
    }


def logprobs_of(choice: Any) -> list[Any]:
    told = choice.logprobs
    if told is None:
        return []
    if hasattr(told, "content"):
        return [one.model_dump() for one in told.content or ()]
    return [
        *zip(told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True)
    ]


async def streamed(stream: Any) -> tuple[dict[int, tuple[str, Any, str]], Any]:
    """Put a stream together; return the same as `whole`, and the usage."""
    texts: dict[int, str] = {}
    logprobs: dict[int, list[Any]] = {}
    reasons: dict[int, str] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for one in chunk.choices:
            assert one.index not in reasons, "a choice that has ended goes on"
            text = one.text if hasattr(one, "text") else one.delta.content
            texts[one.index] = texts.get(one.index, "") + (text or "")
            logprobs.setdefault(one.index, []).extend(logprobs_of(one))
            if one.finish_reason:
                reasons[one.index] = one.finish_reason
    return {index: (texts[index], logprobs[index], reasons[index]) for index in texts}, usage


CASES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.7},
    {"top_p": 0.5},
    {"top_k": 5},
    {"min_p": 0.1},
    {"typical_p": 0.4},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.5},
    {"logit_bias": {"40": 5, "41": -100}},
    {"bad_words": ["e", "th"]},
    {"min_tokens": 4, "logit_bias": {str(EOS): 30}},
    {"ignore_eos": True, "logit_bias": {str(EOS): 4}},
    {"stop": ["e", "a", "o"]},
    {"stop": ["e", "a", "o"], "include_stop_str_in_output": True},
    {"stop_token_ids": [*range(30, 130)]},
    {"n": 3},
    {"n": 3, "logit_bias": {str(EOS): 3}, "stop": ["e"]},
    {
        "n": 2,
        "top_p": 0.9,
        "top_k": 100,
        "min_p": 0.001,
        "typical_p": 0.99,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"40": 2},
        "bad_words": ["e"],
        "min_tokens": 3,
        "stop": ["q"],
    },
]


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_logprobs(route: str) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": 3} if route == "chat" else {"logprobs": 3}


async def test_streamed_and_whole_are_the_same_whatever_is_asked(
    client: openai.AsyncOpenAI, route: str
) -> None:
    plain = whole(await ask(client, route))
    for case in CASES:
        for extra in ({}, with_logprobs(route)):
            answer = await ask(client, route, **case, **extra)
            stream = await ask(
                client,
                route,
                **case,
                **extra,
                stream=True,
                stream_options={"include_usage": True},
            )

            expected = whole(answer)
            found, usage = await streamed(stream)

            assert found == expected, case
            assert usage.model_dump(exclude={"prompt_tokens_details"}) == answer.usage.model_dump(
                exclude={"prompt_tokens_details"}
            )
            assert len(expected) == case.get("n", 1)
            for text, logprobs, _ in expected.values():
                # An empty answer may have had tokens, before a stop string took their text.
                assert bool(logprobs) == bool(extra) or not text, case
                assert extra or not logprobs, case
        assert expected[0][0] != plain[0][0] or case.keys() & {"n", "bad_words", "stop"}, case


async def test_each_of_several_answers_is_that_of_its_seed_and_all_are_counted(
    client: openai.AsyncOpenAI, route: str
) -> None:
    given = {"logit_bias": {str(EOS): 4}, **with_logprobs(route)}
    alone = [await ask(client, route, **{**given, "seed": 3 + index}) for index in range(5)]

    together = await ask(client, route, n=5, **given)

    told = [whole(together)[index] for index in range(5)]
    expected = [whole(one)[0] for one in alone]
    assert [(text, reason) for text, _, reason in told] == [
        (text, reason) for text, _, reason in expected
    ]
    assert [len(logprobs) for _, logprobs, _ in told] == [
        len(logprobs) for _, logprobs, _ in expected
    ]
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert {one.finish_reason for one in together.choices} == {"stop", "length"}


async def test_the_best_answers_are_those_of_the_highest_mean_logprob(
    client: openai.AsyncOpenAI,
) -> None:
    alone = [await ask(client, "completions", seed=3 + index, logprobs=0) for index in range(6)]

    def mean(answer: Any) -> float:
        told = answer.choices[0].logprobs.token_logprobs
        return float(sum(told) / len(told))

    best = sorted(alone, key=mean, reverse=True)
    answer = await ask(client, "completions", n=2, best_of=6)

    assert [one.text for one in answer.choices] == [one.choices[0].text for one in best[:2]]
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        await ask(client, "completions", n=2, best_of=6, stream=True)


@pytest.mark.parametrize("kind", ["texts", "token ids"])
async def test_each_of_several_prompts_is_answered_as_if_it_were_alone(
    client: openai.AsyncOpenAI, kind: str
) -> None:
    texts = [TEXT, "another one", "x"]
    prompts: list[Any] = texts if kind == "texts" else TOKENIZER(texts)["input_ids"]
    given: dict[str, Any] = {"n": 2, "logprobs": 2, "echo": True}
    alone = [await ask(client, "completions", prompt=one, **given) for one in prompts]

    together = await ask(client, "completions", prompt=prompts, **given)
    found, _ = await streamed(
        await ask(client, "completions", prompt=prompts, **given, stream=True)
    )

    expected = [whole(one)[index] for one in alone for index in range(2)]
    for answers in (whole(together), found):
        assert [answers[index][0] for index in range(6)] == [one[0] for one in expected]
        assert [answers[index][2] for index in range(6)] == [one[2] for one in expected]
        assert [len(answers[index][1]) for index in range(6)] == [len(one[1]) for one in expected]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(together.usage, name) == sum(getattr(one.usage, name) for one in alone)


async def test_the_best_of_each_prompt_are_told(client: openai.AsyncOpenAI) -> None:
    prompts = [TEXT, "another one"]
    alone = [await ask(client, "completions", prompt=one, best_of=4) for one in prompts]

    together = await ask(client, "completions", prompt=prompts, best_of=4)

    assert [one.text for one in together.choices] == [one.choices[0].text for one in alone]
    assert [one.index for one in together.choices] == [0, 1]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
async def test_an_echoed_prompt_has_the_logprobs_of_a_stock_forward(
    client: openai.AsyncOpenAI, max_tokens: int
) -> None:
    token_ids = TOKENIZER(TEXT)["input_ids"]
    with torch.inference_mode():
        logits = make_model("llama")(torch.tensor([token_ids])).logits[0]
    expected = logits.log_softmax(-1)[range(len(token_ids) - 1), token_ids[1:]].tolist()

    answer = await ask(client, "completions", echo=True, logprobs=0, max_tokens=max_tokens)

    choice = answer.choices[0]
    told = choice.logprobs.token_logprobs
    assert choice.text.startswith(TEXT)
    assert (choice.text == TEXT) == (max_tokens == 0)
    assert told[0] is None
    assert told[1 : len(token_ids)] == pytest.approx(expected, abs=1e-4)
    assert len(told) == len(token_ids) + max_tokens
    assert answer.usage.completion_tokens == max_tokens
    assert choice.finish_reason == "length"


async def test_what_ends_an_answer_ends_it(client: openai.AsyncOpenAI, route: str) -> None:
    to_end = {"logit_bias": {str(EOS): 100}, "temperature": 0.0}

    at_once = await ask(client, route, **to_end)
    later = await ask(client, route, **to_end, min_tokens=5)
    never = await ask(client, route, **to_end, ignore_eos=True)

    ends = [(one.usage.completion_tokens, whole(one)[0][2]) for one in (at_once, later, never)]
    assert ends == [(1, "stop"), (6, "stop"), (12, "length")]


async def test_a_stop_text_is_left_out_or_kept(client: openai.AsyncOpenAI, route: str) -> None:
    text = whole(await ask(client, route))[0][0]
    stop = text[3:5]
    before = text[: text.index(stop)]

    without = whole(await ask(client, route, stop=stop))[0]
    kept = whole(await ask(client, route, stop=stop, include_stop_str_in_output=True))[0]

    assert (without[0], without[2]) == (before, "stop")
    assert (kept[0], kept[2]) == (before + stop, "stop")


async def test_a_bias_of_a_hundred_forces_a_token(client: openai.AsyncOpenAI, route: str) -> None:
    (token_id,) = TOKENIZER("z", add_special_tokens=False)["input_ids"]

    answer = await ask(client, route, logit_bias={str(token_id): 100})

    assert whole(answer)[0][0] == "z" * 12


async def test_bad_words_do_not_come(client: openai.AsyncOpenAI, route: str) -> None:
    async def tokens_of(**given: Any) -> set[str]:
        answer = await ask(client, route, **given, **with_logprobs(route), max_tokens=60)
        told = logprobs_of(answer.choices[0])
        return {one["token"] if route == "chat" else one[0] for one in told}

    words = {one for one in await tokens_of() if one.isascii() and one.isalpha()}

    assert words
    assert not words & await tokens_of(bad_words=sorted(words))
