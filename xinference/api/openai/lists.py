# SPDX-License-Identifier: Apache-2.0
"""Lists in OpenAI's form, which are read a page at a time."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Query
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.errors import ObjectNotFound

After = Annotated[str | None, Query(description="The id of the last one that is known.")]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def page_answer(shown: Sequence[Mapping[str, Any]], *, has_more: bool) -> Response:
    """Return one page, whose items have an id each."""
    return json_answer(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": has_more,
        }
    )


def page_of_items(
    items: Sequence[Mapping[str, Any]], *, kind: str, after: str | None, limit: int, order: Order
) -> Response:
    """Return one page of what is at hand, oldest first.

    Args:
        kind: what the items are called when `after` is none of them.

    Raises:
        ObjectNotFound: there is no item that the page could come after.
    """
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ObjectNotFound(kind=kind, id=after)
        items = items[places[0] + 1 :]
    return page_answer(items[:limit], has_more=len(items) > limit)
