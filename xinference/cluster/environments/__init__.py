# SPDX-License-Identifier: Apache-2.0
"""Virtual environments of models, on a worker's host: made, found again, listed, removed."""

from .shelf import EnvironmentPolicy, EnvironmentShelf, Run

__all__ = ["EnvironmentPolicy", "EnvironmentShelf", "Run"]
