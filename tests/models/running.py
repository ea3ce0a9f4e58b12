# SPDX-License-Identifier: Apache-2.0
"""Language models that run in a test, and all that they tell of one request after another."""

import queue
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.models_tiny import make_model
from xinference.engine.config import Placement
from xinference.engine.loading import make_engine
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models.language import LanguageModel, load_language_model
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)

SECONDS = 60.0
ABILITIES = ("chat", "tools", "reasoning", "hybrid")


class Choice:
    """One answer, put together from its deltas."""

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: list[tuple[str, str]] = []
        self.reason: str | None = None

    def take(self, delta: Delta) -> None:
        match delta:
            case TextDelta(text=text, reason=reason):
                self.content += text
                self.reason = reason or self.reason
            case ReasoningDelta(text=text):
                self.reasoning += text
            case ToolCallStart(index=index, name=name):
                assert index == len(self.calls)
                self.calls.append((name, ""))
            case ToolCallArguments(index=index, text=text):
                self.calls[index] = (self.calls[index][0], self.calls[index][1] + text)


class Running:
    """A started language model. Answers one request at a time; end it with `stop`."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._told: queue.Queue[Delta | Finished | Failed] = queue.Queue()
        model.start(lambda events: [self._told.put(event) for _, event in events] and None)

    def stop(self) -> None:
        self.model.stop(10.0)

    def request(self, prompt: ChatPrompt, **sampling: Any) -> GenerationRequest:
        return GenerationRequest(
            request_id=RequestId("r"), prompt=prompt, sampling=SamplingParams(**sampling)
        )

    def deltas(self, request: GenerationRequest) -> tuple[list[Delta], Finished]:
        """Return all that is told of a request."""
        self.model.submit(request)
        deltas: list[Delta] = []
        while True:
            event = self._told.get(timeout=SECONDS)
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                return deltas, event
            deltas.append(event)

    def ask(self, prompt: ChatPrompt, **sampling: Any) -> tuple[list[Choice], Finished]:
        """Return the answers to a chat and how they ended."""
        request = self.request(prompt, **sampling)
        deltas, finished = self.deltas(request)
        choices = [Choice() for _ in range(request.sampling.n)]
        for delta in deltas:
            choices[delta.choice_index].take(delta)
        if len(choices) == 1:
            choices[0].reason = finished.reason
        return choices, finished


def replica_spec(path: str, *, options: EngineOptions | None = None, **source: Any) -> ReplicaSpec:
    """Return what a replica is told of a model that chats, calls and thinks."""
    return ReplicaSpec(
        replica=ReplicaUid(ModelUid("running"), 0),
        instance=InstanceId("i"),
        source=ModelSource(path=path, **source),
        abilities=ABILITIES,
        engine_options=options or EngineOptions(),
        python_executable=sys.executable,
    )


def random_weights(
    make_tokenizer: Callable[[], Any], *, options: EngineOptions | None = None, **source: Any
) -> Running:
    """Return a tiny model whose answers are noise, over this tokenizer."""
    tokenizer = make_tokenizer()
    model = make_model("llama")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    engine = make_engine(
        model,
        tokenizer,
        EngineOptions(block_size=16, max_num_seqs=8),
        placement=Placement(device=torch.device("cpu"), dtype=torch.float32),
        name="noise",
        report=lambda _: None,
    )
    return Running(LanguageModel(engine, replica_spec("nowhere", options=options, **source)))


def guide(**source: Any) -> Running:
    """Return the packaged model."""
    options = EngineOptions(max_num_seqs=8, max_model_len=1024, device="cpu")
    given = {"tool_parser": "hermes"} | source
    spec = replica_spec("package:guide", options=options, **given)
    return Running(load_language_model(spec, on_progress=lambda *_: None))
