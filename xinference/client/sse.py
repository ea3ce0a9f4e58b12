# SPDX-License-Identifier: Apache-2.0
"""Bytes of a streamed answer to its chunks; pure.

In: bytes as they arrive, cut anywhere, also inside a character or a line end. Out: the data of
server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), and of
those the JSON objects of a completion. Knows no connection.
"""

import json
from collections.abc import Iterator
from typing import Any

from .errors import StreamFailed, explanation_of

DONE = "[DONE]"


class EventParser:
    """Collects bytes of one stream; gives out the data of each event when it is whole."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[str] = []
        self._after_cr = False

    def feed(self, received: bytes) -> Iterator[str]:
        """Yield the data of every event that `received` completes; must be used up."""
        if self._after_cr and received:
            # Invariant: a CR ended the last line; the LF of a CRLF cut in two is no line.
            received = received.removeprefix(b"\n")
            self._after_cr = False
        if not received:
            return
        self._after_cr = received.endswith(b"\r")
        text = (self._tail + received).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = text.split(b"\n")
        for line in lines:
            if not line:
                if self._data:
                    yield "\n".join(self._data)
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode(errors="replace"))


class ChunkDecoder:
    """The chunks of one streamed completion.

    It is whole when `[DONE]` came, or every choice that came has its `finish_reason`.
    """

    def __init__(self, purpose: str) -> None:
        self._purpose = purpose
        self._events = EventParser()
        self._is_done = False
        self._open_choices: set[int] = set()
        self._has_finished_choice = False

    def feed(self, received: bytes) -> Iterator[dict[str, Any]]:
        """Yield the chunks that `received` completes; must be used up.

        Raises:
            StreamFailed: the server sent an error in place of the rest.
        """
        for data in self._events.feed(received):
            if self._is_done:
                return
            if data == DONE:
                self._is_done = True
                return
            chunk = self._read(data)
            for choice in chunk.get("choices") or ():
                index = choice.get("index", 0)
                if choice.get("finish_reason") is None:
                    self._open_choices.add(index)
                else:
                    self._open_choices.discard(index)
                    self._has_finished_choice = True
            yield chunk

    def end(self) -> None:
        """Tell that no bytes are left.

        Raises:
            StreamFailed: the answer is not whole.
        """
        if not self._is_done and (self._open_choices or not self._has_finished_choice):
            raise StreamFailed(self._purpose, "the answer ended before it was whole")

    def _read(self, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise StreamFailed(self._purpose, f"not a JSON object: {data[:200]}") from error
        if not isinstance(chunk, dict):
            raise StreamFailed(self._purpose, f"not a JSON object: {data[:200]}")
        if chunk.get("error") is not None:
            detail, code = explanation_of(chunk)
            raise StreamFailed(self._purpose, detail, code=code)
        return chunk
