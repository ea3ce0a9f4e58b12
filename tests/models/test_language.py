# SPDX-License-Identifier: Apache-2.0
"""Prompts become token ids, and a family's stops are added to the request's."""

import queue
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.models_tiny import make_tokenizer, save_model
from xinference.errors import (
    AbilityMissing,
    ContextLengthExceeded,
    InvalidRequest,
    LoadFailed,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models.base import ModelKind
from xinference.models.language import (
    LanguageModel,
    engine_options,
    load_language_model,
    model_directory,
)
from xinference.models.loading import LOADERS
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.generation import (
    ChatPrompt,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Grammar,
    GrammarKind,
    Message,
    Prompt,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)

HELLO = ChatPrompt(messages=(Message(role="user", content="hello"),))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReplicaSpec:
    return ReplicaSpec(
        replica=ReplicaUid(ModelUid("tiny"), 0),
        instance=InstanceId("i"),
        source=ModelSource(path=str(save_model(tmp_path_factory.mktemp("files") / "model"))),
        abilities=("chat", "generate"),
        engine_options=EngineOptions(max_num_seqs=2, block_size=16),
        python_executable=sys.executable,
    )


@pytest.fixture(scope="module")
def model(spec: ReplicaSpec) -> LanguageModel:
    """Loaded and not started."""
    return loaded(spec)


def loaded(spec: ReplicaSpec) -> LanguageModel:
    return load_language_model(spec, on_progress=lambda *_: None)


def variant(model: LanguageModel, spec: ReplicaSpec, **source: Any) -> LanguageModel:
    """Return a model of the same engine whose family says something else."""
    return LanguageModel(model._engine, replace(spec, source=replace(spec.source, **source)))


def asked(prompt: Prompt, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId("a"), prompt=prompt, sampling=SamplingParams(**sampling)
    )


def text_of(model: LanguageModel, prompt: Prompt) -> str:
    return make_tokenizer().decode(model.prepare(asked(prompt)).request.prompt_token_ids)


def test_every_kind_of_model_has_a_loader() -> None:
    assert LOADERS.keys() == set(ModelKind)


# --- prompts


def test_a_chat_is_rendered_by_the_tokenizers_own_template(model: LanguageModel) -> None:
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"

    assert text_of(model, HELLO) == expected


def test_a_familys_template_goes_before_the_tokenizers_own(
    model: LanguageModel, spec: ReplicaSpec
) -> None:
    of_family = variant(model, spec, chat_template="{{ messages[0].content }}{{ mood }}!")
    excited = replace(HELLO, template_options={"mood": "?"})

    assert text_of(of_family, HELLO) == "hello!"
    assert text_of(of_family, excited) == "hello?!"


def test_a_text_and_token_ids_go_in_as_they_stand(model: LanguageModel) -> None:
    assert text_of(model, TextPrompt(text="hello wörld")) == "hello wörld"
    assert list(model.prepare(asked(TokenPrompt(token_ids=(5, 6)))).request.prompt_token_ids) == [
        5,
        6,
    ]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (ChatPrompt(messages=()), "messages"),
        (replace(HELLO, template_options={"tokenize": True}), "chat_template_kwargs"),
        (replace(HELLO, template_options={"chat_template": "x"}), "chat_template_kwargs"),
        (TextPrompt(text=""), "prompt"),
        (TextPrompt(text="a" * 100_000), "prompt"),
    ],
    ids=["no messages", "steers", "replaces", "empty", "endless"],
)
def test_a_prompt_that_cannot_be_is_refused_by_name(
    model: LanguageModel, prompt: Prompt, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        model.prepare(asked(prompt))

    assert refused.value.field == field


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 + messages[0].content }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
    ],
    ids=["raises", "undefined", "types", "syntax", "escape"],
)
def test_what_a_template_does_not_take_is_the_callers_to_fix(
    model: LanguageModel, spec: ReplicaSpec, template: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        variant(model, spec, chat_template=template).prepare(asked(HELLO))

    assert refused.value.field == "messages"


def test_a_model_that_was_not_made_to_chat_says_so(
    model: LanguageModel, spec: ReplicaSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_generates = LanguageModel(model._engine, replace(spec, abilities=("generate",)))
    with pytest.raises(AbilityMissing, match="cannot chat"):
        only_generates.prepare(asked(HELLO))

    monkeypatch.setattr(model._tokenizer, "chat_template", None)
    with pytest.raises(AbilityMissing, match="cannot chat"):
        model.prepare(asked(HELLO))


# --- stops


def test_a_familys_stops_are_added_to_the_requests(model: LanguageModel, spec: ReplicaSpec) -> None:
    of_family = variant(model, spec, stop=("###", "END"), stop_token_ids=(2,))

    prepared = of_family.prepare(asked(HELLO, stop=("END", "."), stop_token_ids=(7,), max_tokens=3))

    sampling = prepared.request.sampling

    assert sampling.stop == ("END", ".", "###")
    assert sampling.stop_token_ids == (7, 2)
    assert sampling.max_tokens == 3


def test_too_many_stops_together_are_refused(model: LanguageModel, spec: ReplicaSpec) -> None:
    of_family = variant(model, spec, stop=("###",))
    stops = tuple(str(number) for number in range(16))

    with pytest.raises(InvalidRequest) as refused:
        of_family.prepare(asked(HELLO, stop=stops))

    assert refused.value.field == "stop"


# --- loading


def test_files_that_are_not_there_are_a_load_failed(spec: ReplicaSpec) -> None:
    with pytest.raises(LoadFailed, match="not a directory"):
        loaded(replace(spec, source=ModelSource(path="no/such/model")))


def test_a_packaged_model_lives_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadFailed, match=r"catalog.nothing"):
        model_directory("package:nothing", model_name="m")

    assert model_directory("package:builtin", model_name="m").name == "builtin"


def test_the_packaged_model_is_float32_unless_asked_otherwise(spec: ReplicaSpec) -> None:
    guide = replace(spec, source=ModelSource(path="package:guide"))
    bfloat16 = replace(guide, engine_options=replace(guide.engine_options, dtype="bfloat16"))

    assert engine_options(guide).dtype == "float32"
    assert engine_options(bfloat16).dtype == "bfloat16"
    assert engine_options(spec).dtype == "auto"


# --- answering


@pytest.fixture
def running(
    spec: ReplicaSpec,
) -> Iterator[tuple[LanguageModel, "queue.Queue[tuple[RequestId, GenerationEvent]]"]]:
    told: queue.Queue[tuple[RequestId, GenerationEvent]] = queue.Queue()

    def sink(events: list[tuple[RequestId, GenerationEvent]]) -> None:
        for event in events:
            told.put(event)

    model = loaded(spec)
    model.start(sink)
    yield model, told
    model.stop(10.0)
    assert not model.is_alive


def test_a_started_model_answers_and_counts(
    running: tuple[LanguageModel, "queue.Queue[tuple[RequestId, GenerationEvent]]"],
) -> None:
    model, told = running

    accepted = model.submit(asked(HELLO, max_tokens=4, temperature=0.0))

    events = [told.get(timeout=10.0)[1]]
    while isinstance(events[-1], TextDelta):
        events.append(told.get(timeout=10.0)[1])
    last = events[-1]
    assert model.is_alive
    assert accepted.num_prompt_tokens > 0
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.LENGTH
    assert model.counters()["num_generated_tokens"] == 4.0
    assert model.description()["dtype"] == "float32"
    assert (model.context_length, model.max_num_seqs) == (512, 2)


def test_a_prompt_of_any_length_is_counted_without_the_engine(
    running: tuple[LanguageModel, "queue.Queue[tuple[RequestId, GenerationEvent]]"],
) -> None:
    model, told = running
    prompt = TokenPrompt(token_ids=(1,) * 600)

    accepted = model.submit(replace(asked(prompt), count_only=True))

    assert accepted.num_prompt_tokens == 600
    usage = Usage(num_prompt_tokens=600, num_completion_tokens=0)
    end = Finished(reason=FinishReason.STOP, usage=usage)
    assert told.get(timeout=10.0) == (RequestId("a"), end)
    assert model.counters()["num_steps"] == 0.0


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 6), (4, 4), (100, 6)])
def test_an_answer_ends_where_the_total_does(
    model: LanguageModel, max_tokens: int | None, expected: int
) -> None:
    request = asked(TokenPrompt(token_ids=(1,) * 10), max_tokens=max_tokens)

    prepared = model.prepare(replace(request, max_total_tokens=16))

    assert prepared.request.sampling.max_tokens == expected


def test_a_total_that_cannot_be_is_refused(model: LanguageModel) -> None:
    request = asked(TokenPrompt(token_ids=(1,) * 10))

    with pytest.raises(InvalidRequest, match=r"max_total_tokens: .* 512, got 513"):
        model.prepare(replace(request, max_total_tokens=513))
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 10 tokens"):
        model.prepare(replace(request, max_total_tokens=10))


def test_a_refusal_of_the_engine_comes_out_of_submit(
    running: tuple[LanguageModel, "queue.Queue[tuple[RequestId, GenerationEvent]]"],
) -> None:
    model, told = running

    for prompt, error in (
        (TokenPrompt(token_ids=()), InvalidRequest),
        (TokenPrompt(token_ids=(1, -1)), InvalidRequest),
        (TokenPrompt(token_ids=(1,) * 600), ContextLengthExceeded),
    ):
        expected: type[XinferenceError] = error
        with pytest.raises(expected):
            model.submit(asked(prompt))

    assert told.empty()
    assert not model.abort(RequestId("never came"))


def test_a_grammar_that_cannot_be_compiled_refuses_its_request_alone(
    running: tuple[LanguageModel, "queue.Queue[tuple[RequestId, GenerationEvent]]"],
) -> None:
    model, told = running
    bad = Grammar(kind=GrammarKind.REGEX, text="(a", field="guided_regex")
    good = Grammar(kind=GrammarKind.CHOICE, text='["yes", "no"]')
    model.submit(replace(asked(HELLO, grammar=good, temperature=1.5), request_id=RequestId("b")))

    with pytest.raises(InvalidRequest) as refused:
        model.submit(asked(HELLO, grammar=bad))

    assert refused.value.field == "guided_regex"
    text, last = "", None
    while not isinstance(last, Finished):
        request_id, last = told.get(timeout=10.0)
        assert request_id == "b"
        text += last.text if isinstance(last, TextDelta) else ""
    assert text in ("yes", "no")
    assert last.reason is FinishReason.STOP
