# SPDX-License-Identifier: Apache-2.0
"""Models on servers in a test: how they are launched, and all that they tell of a request."""

import queue
import sys
from pathlib import Path
from typing import Any

from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models.servers.loading import load_served_model
from xinference.models.servers.model import ServedModel
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Message,
    Prompt,
    SamplingParams,
    TextDelta,
)
from xinference.protocol.servers import ServerEngine, ServerOptions

SECONDS = 60.0


def chat(text: str = "Hello", **fields: Any) -> ChatPrompt:
    return ChatPrompt(messages=(Message(role="user", content=text),), **fields)


def spec(
    path: Path,
    engine: ServerEngine = ServerEngine.LLAMA_CPP,
    *,
    flags: dict[str, Any] | None = None,
    abilities: tuple[str, ...] = ("chat",),
    source: dict[str, Any] | None = None,
    envs: dict[str, str] | None = None,
    **options: Any,
) -> ReplicaSpec:
    return ReplicaSpec(
        replica=ReplicaUid(ModelUid("served"), 0),
        instance=InstanceId("i"),
        source=ModelSource(path=str(path), **(source or {})),
        abilities=abilities,
        engine_options=EngineOptions(**options),
        python_executable=sys.executable,
        envs=envs or {},
        server_options=ServerOptions(engine=engine, given=tuple(options), flags=flags or {}),
    )


class Running:
    """A started model on a server; end it with `stop`."""

    def __init__(self, launched: ReplicaSpec) -> None:
        self.model: ServedModel = load_served_model(launched, on_progress=lambda *_: None)
        self._told: queue.Queue[tuple[RequestId, GenerationEvent]] = queue.Queue()
        self.model.start(lambda events: [self._told.put(one) for one in events] and None)  # type: ignore[arg-type]  # text alone

    def stop(self) -> None:
        self.model.stop(5.0)

    def submit(self, prompt: Prompt, *, request_id: str = "r", **sampling: Any) -> None:
        fields = {
            name: sampling.pop(name)
            for name in ("resume_token_ids", "priority", "fairness_key", "more_prompts")
            if name in sampling
        }
        self.model.submit(
            GenerationRequest(
                request_id=RequestId(request_id),
                prompt=prompt,
                sampling=SamplingParams(**sampling),
                **fields,
            )
        )

    def next(self) -> tuple[RequestId, GenerationEvent]:
        return self._told.get(timeout=SECONDS)

    def rest(self) -> tuple[list[Delta], Finished | Failed]:
        """Return what is still told, up to the next end."""
        deltas: list[Delta] = []
        while True:
            _, event = self.next()
            if isinstance(event, Finished | Failed):
                return deltas, event
            deltas.append(event)

    def ask(self, prompt: Prompt, **sampling: Any) -> tuple[list[Delta], Finished]:
        self.submit(prompt, **sampling)
        deltas, end = self.rest()
        assert isinstance(end, Finished), end
        return deltas, end


def text_of(deltas: list[Delta], choice_index: int = 0) -> str:
    return "".join(
        delta.text
        for delta in deltas
        if isinstance(delta, TextDelta) and delta.choice_index == choice_index
    )
