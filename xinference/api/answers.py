# SPDX-License-Identifier: Apache-2.0
"""JSON answers of routes that do not stream."""

from typing import Any

import orjson
from starlette.responses import Response


def json_answer(content: Any, *, status: int = 200) -> Response:
    """Return `content` as JSON; dataclasses and string enums are written as they are."""
    return Response(orjson.dumps(content), status, media_type="application/json")
