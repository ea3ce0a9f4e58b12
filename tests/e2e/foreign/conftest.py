# SPDX-License-Identifier: Apache-2.0
"""What the suites of this environment share: where the platform is, and what runs on it.

They know nothing of this repository but what the test that starts them says in the environment.
"""

import json
import os
from typing import Any

ENDPOINT = os.environ["CLIENTS_ENDPOINT"]
GUIDE = os.environ["CLIENTS_GUIDE"]
"""Answers questions, and keeps to structures."""
RECITER = os.environ["CLIENTS_RECITER"]
"""Says `ANSWER`; calls `get_weather` with `CALL` if it has tools; says `RESULT` to the result."""
ANSWER = os.environ["CLIENTS_ANSWER"]
CALL: dict[str, Any] = json.loads(os.environ["CLIENTS_CALL"])
RESULT = os.environ["CLIENTS_RESULT"]

QUESTION = "How do I launch a model?"
ASKED = "xinference launch"
"""Is in the guide's answer."""
WEATHER = "What is the weather in San Francisco, CA?"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather at a location.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}},
            "required": ["location"],
        },
    },
}
