# SPDX-License-Identifier: Apache-2.0
"""Which loader makes a model of which kind. Loading one imports torch."""

from collections.abc import Mapping
from importlib import import_module

from xinference.protocol.deployment import ReplicaSpec

from .base import Loader, Model, ModelKind, OnProgress

LOADERS: Mapping[ModelKind, tuple[str, str]] = {
    ModelKind.LANGUAGE: ("language", "load_language_model"),
    ModelKind.EMBEDDING: ("embedding", "load_embedding_model"),
    ModelKind.RERANK: ("rerank", "load_rerank_model"),
}
"""Module of this package and function. Imported by name: each kind has its own libraries."""


SERVER_LOADER = ("servers.loading", "load_served_model")
"""Of language models whose engine is a server of its own."""


def loader_of(kind: ModelKind, *, is_served: bool = False) -> Loader:
    """Return what loads a model of this kind, on an engine that is a server or on ours."""
    module, function = SERVER_LOADER if is_served else LOADERS[kind]
    loader: Loader = getattr(import_module(f"xinference.models.{module}"), function)
    return loader


def load_model(spec: ReplicaSpec, *, on_progress: OnProgress) -> Model:
    """Load the model of a replica, ready to be started.

    Raises:
        LoadFailed: its files do not load.
        InvalidRequest: an option asks for what this model or machine cannot do.
    """
    loader = loader_of(ModelKind(spec.model_type), is_served=spec.server_options is not None)
    return loader(spec, on_progress=on_progress)
