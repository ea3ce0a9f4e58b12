# SPDX-License-Identifier: Apache-2.0
"""Streamed text is decoded text, and ends before the first stop string, however it is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.models_tiny import make_tokenizer
from xinference.engine.detokenizer import TextStream, find_stop

TOKENIZER = make_tokenizer()
TEXTS = (
    "hello world",
    "naïve café — déjà vu",
    "世界你好，今天天气很好。",
    "👩‍👩‍👧 family, 🇨🇳 flag, e\u0301 combining",
    "مرحبا हिन्दी ไทย",
    "\ttabs\n\nand   spaces ",
)


class SlowTokenizer:
    """A tokenizer that only decodes whole lists, as the slow ones do."""

    is_fast = False

    def decode(self, token_ids: list[int], **_: object) -> str:
        return decode(token_ids)


def decode(token_ids: list[int]) -> str:
    text = TOKENIZER.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def byte_tokens(text: str) -> list[int]:
    """One token per byte: the finest cut there is."""
    alphabet = {token: index for token, index in TOKENIZER.get_vocab().items() if len(token) == 1}
    pieces = [TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [alphabet[char] for piece in pieces for word, _ in piece for char in word]


def stream(
    token_ids: list[int], stop: tuple[str, ...] = (), *, slow: bool = False
) -> tuple[list[str], bool]:
    """Return the pieces of text, and whether a stop string ended it."""
    text = TextStream(SlowTokenizer() if slow else TOKENIZER, [5, 6, 7], stop)  # type: ignore[arg-type]
    pieces = []
    for token_id in token_ids:
        pieces.append(text.push(token_id))
        if text.is_stopped:
            return pieces, True
    pieces.append(text.flush())
    return pieces, text.is_stopped


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_every_way_to_cut_a_text_into_tokens_streams_the_text(text: str, slow: bool) -> None:
    for token_ids in (byte_tokens(text), TOKENIZER.encode(text)):
        pieces, _ = stream(token_ids, slow=slow)

        assert "".join(pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("slow", [False, True])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(token_ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_any_tokens_stream_as_they_decode(slow: bool, token_ids: list[int]) -> None:
    pieces, _ = stream(token_ids, slow=slow)

    assert "".join(pieces) == decode(token_ids)


def test_a_character_is_shown_with_its_last_byte() -> None:
    pieces, _ = stream(byte_tokens("a世b"))

    assert pieces[:5] == ["a", "", "", "世", "b"]


@pytest.mark.parametrize("slow", [False, True])
def test_an_unfinished_character_at_the_end_decodes_as_usual(slow: bool) -> None:
    token_ids = byte_tokens("ok 世")[:-1]

    assert "".join(stream(token_ids, slow=slow)[0]) == decode(token_ids)


def test_half_a_character_at_the_end_of_the_prompt_is_not_repeated() -> None:
    half = byte_tokens("a世")[:-1]
    text = TextStream(TOKENIZER, half)

    assert "a" not in text.push(byte_tokens("世")[-1]) + text.push(byte_tokens("x")[0])


def test_a_word_keeps_the_space_that_parts_it_from_the_prompt() -> None:
    pieces = Tokenizer(models.BPE(vocab={"<unk>": 0, "▁one": 1, "▁two": 2}, merges=[]))
    pieces.normalizer = normalizers.Prepend("▁")
    pieces.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")

    text = TextStream(tokenizer, [1])

    assert text.push(2) + text.flush() == " two"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text("ab世", max_size=24),
    stop=st.lists(st.text("ab世", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
def test_a_stop_string_ends_the_text_at_the_same_place_however_it_is_cut(
    text: str, stop: tuple[str, ...]
) -> None:
    ends = sorted(
        (text.find(string) + len(string), text.find(string)) for string in stop if string in text
    )
    expected = text[: ends[0][1]] if ends else text

    for token_ids in (byte_tokens(text), TOKENIZER.encode(text)):
        pieces, is_stopped = stream(token_ids, stop)

        assert "".join(pieces) == expected
        assert is_stopped == bool(ends)


def test_the_stop_string_that_came_up_is_told() -> None:
    text = TextStream(TOKENIZER, [], ("never", "b世"))
    for token_id in byte_tokens("ab世"):
        text.push(token_id)

    assert text.stop_string == "b世"
    assert TextStream(TOKENIZER, [], ("b",)).stop_string is None


def test_no_more_is_held_back_than_a_stop_string_could_begin_with() -> None:
    pieces, _ = stream(byte_tokens("ab<sto ab<stop> cd"), ("<stop>",))

    assert pieces[:3] == ["a", "b", ""]
    assert "".join(pieces[:7]) == "ab<sto "
    assert "".join(pieces) == "ab<sto ab"


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert find_stop("xabc", ("abc", "b")) == range(2, 3)
    assert find_stop("xabc", ("bc", "abc")) == range(1, 4)
    assert find_stop("x", ("abc",)) is None


@pytest.mark.parametrize("slow", [False, True])
def test_special_tokens_are_left_out_but_those_that_are_to_be_kept(slow: bool) -> None:
    kept, left_out = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    half, rest = byte_tokens("é")
    token_ids = [*byte_tokens("a b"), kept, left_out, *byte_tokens(" é"), half, kept, rest, kept]

    class Slow(SlowTokenizer):
        def convert_ids_to_tokens(self, token_id: int) -> str:
            return str(TOKENIZER.convert_ids_to_tokens(token_id))

    text = TextStream(
        Slow() if slow else TOKENIZER,  # type: ignore[arg-type]
        [5, 6, 7],
        kept_token_ids=frozenset([kept]),
    )
    pieces = "".join([text.push(token_id) for token_id in token_ids]) + text.flush()

    half_a_character = "\N{REPLACEMENT CHARACTER}"
    assert pieces == (
        f"a b<|im_start|> é{half_a_character}<|im_start|>{half_a_character}<|im_start|>"
    )
