# SPDX-License-Identifier: Apache-2.0
"""Which loader makes a model of which kind. Importing this imports torch."""

from collections.abc import Mapping

from xinference.protocol.deployment import ReplicaSpec

from .base import Generates, Loader, ModelKind, OnProgress
from .language import load_language_model

LOADERS: Mapping[ModelKind, Loader] = {
    ModelKind.LANGUAGE: load_language_model,
}


def load_model(spec: ReplicaSpec, *, on_progress: OnProgress) -> Generates:
    """Load the model of a replica, ready to be started.

    Raises:
        LoadFailed: its files do not load.
        InvalidRequest: an option asks for what this model or machine cannot do.
    """
    return LOADERS[ModelKind.LANGUAGE](spec, on_progress=on_progress)
