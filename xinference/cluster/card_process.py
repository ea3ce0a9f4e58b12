# SPDX-License-Identifier: Apache-2.0
"""The process that reads what a repository says of its model.

In: one line of JSON on stdin, `{"request", "home", "settings", "log_format", "directory"}`. Out:
lines of JSON on stdout, the card as text in `{"piece"}`s and at last `{"ended": true}`, or
`{"error"}`. To cancel it, kill it.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from xinference.catalog.downloads.cache import ModelCache
from xinference.catalog.downloads.card import read_card
from xinference.catalog.downloads.child import end, read_order, say
from xinference.errors import InternalError, XinferenceError
from xinference.protocol.downloads import HubSource
from xinference.protocol.repositories import CardRequest, RepositoryCard
from xinference.settings import DownloadSettings

logger = logging.getLogger(__name__)

PIECE_CHARS = 4000
"""Of the card in a line: whoever reads it takes lines of a limited length, and a character of a
text in a text may become a dozen."""


def main() -> None:
    """Read the card that stdin asks for."""
    given = read_order()
    model_id = given["request"]["model_id"]
    try:
        card = _with_classes(
            read_card(
                _request_of(given["request"]),
                cache=ModelCache(Path(given["home"])),
                settings=DownloadSettings(**given["settings"]),
                directory=Path(given["directory"]),
            )
        )
    except XinferenceError as error:
        logger.error("%s: %s", model_id, error)
        say({"error": error.to_wire()})
    except Exception as error:
        logger.exception("%s cannot be read", model_id)
        say({"error": InternalError(where="repository", problem=repr(error)).to_wire()})
    else:
        text = card.to_json()
        for start in range(0, len(text), PIECE_CHARS):
            say({"piece": text[start : start + PIECE_CHARS]})
        say({"ended": True})
    end()


def _request_of(plain: dict[str, Any]) -> CardRequest:
    sources = tuple(HubSource(**source) for source in plain["sources"])
    return CardRequest(**{**plain, "sources": sources})


def _with_classes(card: RepositoryCard) -> RepositoryCard:
    # Why: the tables are all that is wanted, and torch takes seconds to be imported.
    sys.modules["torch"] = None  # type: ignore[assignment]  # the way to refuse an import
    from xinference.models.library_classes import classes_of

    model_type = card.documents.get("config.json", {}).get("model_type")
    if card.is_gguf or not isinstance(model_type, str):
        return card
    return replace(card, classes=classes_of(model_type))


if __name__ == "__main__":
    main()
