# SPDX-License-Identifier: Apache-2.0
"""What a repository of a hub says of its model, read before anything large is downloaded."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from .downloads import HubSource

CAUSAL, ENCODER, CLASSIFIER = "causal", "encoder", "classifier"
"""What the models library makes of a type of model: one that goes on from a text, one that turns
it into vectors, one that scores it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRequest:
    """A repository that a launch names and the catalogue does not know."""

    model_id: str
    sources: tuple[HubSource, ...]
    """Where it may be, the preferred one first."""
    quantization: str | None = None
    """Of GGUF files: the one that is wanted. None: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryCard:
    """The small files of a repository, and the names of the others."""

    source: HubSource
    """Where it was found."""
    documents: dict[str, dict[str, Any]]
    """JSON files by path, as far as they say what a model is."""
    chat_template: str | None = None
    """`chat_template.jinja`."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that a launch downloads, by path."""
    is_gguf: bool = False
    """The model comes as GGUF files, and the documents are what the head of one of them says."""
    classes: dict[str, tuple[str, ...]] | None = None
    """What the worker's models library has for this type of model: names of classes by `CAUSAL`
    and its like. None: that is not known."""

    def to_json(self) -> str:
        """Return it as `from_json` reads it.

        Why JSON and nothing narrower: files of tokenizers have numbers of thirty digits.
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        plain = json.loads(text)
        classes = plain["classes"]
        return cls(
            **{
                **plain,
                "source": HubSource(**plain["source"]),
                "classes": classes and {use: tuple(names) for use, names in classes.items()},
            }
        )
