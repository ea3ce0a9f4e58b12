# SPDX-License-Identifier: Apache-2.0
"""However the bytes of a stream are cut, the same events come out."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.http import events
from xinference.client import StreamFailed
from xinference.client.sse import ChunkDecoder, EventParser

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\r\n")


def parts_of(text: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(edges)]


def data_of(parts: list[bytes]) -> list[str]:
    parser = EventParser()
    return [data for part in parts for data in parser.feed(part)]


@given(
    line_end=st.sampled_from([b"\n", b"\r", b"\r\n"]),
    texts=st.lists(st.text(CHARACTERS, min_size=1), max_size=4),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_the_cuts_between_packets_change_nothing(
    line_end: bytes, texts: list[str], cuts: list[int]
) -> None:
    stream = b"".join(
        b": a comment" + line_end + b"data: " + text.encode() + line_end + line_end
        for text in texts
    )

    assert data_of(parts_of(stream, cuts)) == texts


def test_the_lines_of_one_event_are_joined_and_other_fields_left_out() -> None:
    stream = b"event: x\nid: 1\ndata:one\ndata: two\n\ndata: three"

    assert data_of([stream]) == ["one\ntwo"]


def chunk(text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def decoded(stream: bytes) -> list[str]:
    decoder = ChunkDecoder("chat")
    texts = [one["choices"][0]["text"] for one in decoder.feed(stream)]
    decoder.end()
    return texts


@pytest.mark.parametrize("end", ["[DONE]", None])
def test_a_whole_answer_ends_with_done_or_a_finish_reason(end: str | None) -> None:
    stream = events(chunk("Hel"), chunk("lo", "stop"), *([end] if end else []))

    assert decoded(stream) == ["Hel", "lo"]


@pytest.mark.parametrize("stream", [b"", events(chunk("Hel")), b"data: {"])
def test_an_answer_that_stops_early_is_an_error(stream: bytes) -> None:
    with pytest.raises(StreamFailed, match="before it was whole"):
        decoded(stream)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"error": {"message": "the process died", "code": "replica_lost"}}, "replica_lost"),
        ({"error": "the process died"}, None),
    ],
)
def test_an_error_chunk_is_raised_after_the_chunks_before_it(
    error: dict[str, object], code: str | None
) -> None:
    decoder = ChunkDecoder("chat")
    stream = decoder.feed(events(chunk("Hel"), error))

    assert next(stream) == chunk("Hel")
    with pytest.raises(StreamFailed, match="the process died") as caught:
        next(stream)
    assert caught.value.code == code


def test_what_is_no_json_object_is_an_error() -> None:
    for odd in ("<html>", json.dumps([1])):
        with pytest.raises(StreamFailed, match="not a JSON object"):
            list(ChunkDecoder("chat").feed(events(odd)))
