# SPDX-License-Identifier: Apache-2.0
"""Registrations for the tests, as users write them, and what comes of a call."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from xinference.errors import XinferenceError

Result = TypeVar("Result")


def outcome_of(call: Callable[[], Result]) -> Result | XinferenceError:
    """Return what the call returns, or the error it raises on purpose."""
    try:
        return call()
    except XinferenceError as error:
        return error


def registration(**changes: Any) -> dict[str, Any]:
    """Return a small valid registration, with fields changed, or left out where None."""
    given = {
        "version": 2,
        "model_name": "my-model",
        "model_lang": ["en"],
        "model_ability": ["chat"],
        "model_family": "qwen2.5-instruct",
        "context_length": 4096,
        "model_specs": [spec()],
        **changes,
    }
    return {key: value for key, value in given.items() if value is not None}


def spec(**changes: Any) -> dict[str, Any]:
    """Return a valid spec of a local directory, with fields changed, or left out where None."""
    given = {
        "model_format": "pytorch",
        "model_size_in_billions": 7,
        "quantization": "none",
        "model_uri": "file:///models/mine",
        **changes,
    }
    return {key: value for key, value in given.items() if value is not None}


def text_of(**changes: Any) -> str:
    """Return `registration` as JSON text."""
    return json.dumps(registration(**changes))
