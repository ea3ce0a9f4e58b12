# SPDX-License-Identifier: Apache-2.0
"""Vectors are those of `sentence_transformers`, whoever asks for them together with whom."""

import logging
import random
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.encoders_tiny import HIDDEN, MAX_TOKENS, encoder_spec, save_embedder
from tests.models.encoder_calls import Calls, rows_of, started
from xinference.errors import AbilityMissing, InvalidRequest, LoadFailed
from xinference.identifiers import RequestId
from xinference.models.base import Model
from xinference.models.embedding import load_embedding_model
from xinference.protocol.deployment import EngineOptions, ModelSource
from xinference.protocol.encoding import EncoderOptions
from xinference.protocol.generation import GenerationRequest, TextPrompt
from xinference.protocol.vectors import (
    CUT_TO_MODEL,
    EmbeddingRequest,
    InputType,
    SparseVector,
    TokenVectors,
    VectorKind,
)

TOLERANCE = 1e-5
PROMPTS = {"query": "find: ", "document": "keep: ", "odd": "odd one: "}
WORDS = ("the weather is nice and the answer is on the table", "how are you", "hello", "world")
_ids = count()


def load(path: Path, **changes: Any) -> Model:
    return load_embedding_model(
        encoder_spec(path, "embedding", **changes), on_progress=lambda *_: None
    )


def request(*inputs: str | tuple[int, ...], **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(request_id=RequestId(f"r{next(_ids)}"), inputs=inputs, **fields)


def texts(number: int, *, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, 3))) for _ in range(number)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"), prompts=PROMPTS, heads=True)


@pytest.fixture(scope="module")
def calls(path: Path) -> Iterator[Calls]:
    with started(load(path)) as calls:
        yield calls


@pytest.fixture(scope="module")
def alone(path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu")


def test_its_layers_are_laid_out_for_the_cpu(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(path)

    assert "linear layers are packed for the CPU" in caplog.text


def assert_close(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < TOLERANCE


def test_vectors_are_those_of_sentence_transformers_in_any_mix_of_callers(
    calls: Calls, alone: SentenceTransformer
) -> None:
    asked = [texts(number, seed=number) for number in (1, 1, 1, 7, 1, 30, 2, 1, 12)]
    found: dict[int, npt.NDArray[np.float32]] = {}

    def ask(caller: int) -> None:
        pieces, _ = calls.ask(request(*asked[caller]))
        found[caller] = rows_of(pieces)

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for caller, given in enumerate(asked):
        assert_close(found[caller], alone.encode(given))


@pytest.mark.parametrize("changes", [{"pooling": "cls"}, {"decoder": True, "pooling": "lasttoken"}])
def test_other_architectures_give_the_same_vectors_too(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = save_embedder(tmp_path / "model", **changes)
    given = texts(9)

    with started(load(path)) as calls:
        pieces, _ = calls.ask(request(*given))

    assert_close(rows_of(pieces), SentenceTransformer(str(path), device="cpu").encode(given))


def test_a_prompt_that_pooling_leaves_out_is_left_out_of_each_text_by_itself(
    tmp_path: Path,
) -> None:
    path = save_embedder(tmp_path / "model", include_prompt=False, prompts=PROMPTS)
    alone = SentenceTransformer(str(path), device="cpu")
    given = texts(5)
    found: dict[str, Any] = {}

    with started(load(path)) as calls:

        def ask(prompt: str) -> None:
            found[prompt] = rows_of(calls.ask(request(*given, prompt=prompt))[0])

        threads = [threading.Thread(target=ask, args=(one,)) for one in ("a: ", "longer one: ")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for prompt, rows in found.items():
        assert_close(rows, alone.encode(given, prompt=prompt))


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, ""),
        ({"prompt": "just so: "}, "just so: "),
        ({"prompt_name": "odd"}, "odd one: "),
        ({"input_type": InputType.QUERY}, "find: "),
        ({"input_type": InputType.DOCUMENT}, "keep: "),
    ],
)
def test_prompts_and_input_types_go_before_the_text(
    calls: Calls, alone: SentenceTransformer, fields: dict[str, Any], prompt: str
) -> None:
    given = texts(3)

    pieces, _ = calls.ask(request(*given, **fields))

    assert_close(rows_of(pieces), alone.encode(given, prompt=prompt))


def test_an_input_type_that_a_model_does_not_tell_apart_changes_nothing(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model")

    with started(load(path)) as calls:
        plain, _ = calls.ask(request("hello world"))
        query, _ = calls.ask(request("hello world", input_type=InputType.QUERY))

    assert_close(rows_of(query), rows_of(plain))


def test_the_catalogue_gives_prompts_where_the_files_have_none(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model")
    source = ModelSource(path="", prompts={"query": "find: "})

    with started(load(path, source=source)) as calls:
        pieces, _ = calls.ask(request("hello", input_type=InputType.QUERY))
        plain, _ = calls.ask(request("find: hello"))

    assert_close(rows_of(pieces), rows_of(plain))


def test_an_unknown_prompt_is_refused_with_those_there_are(calls: Calls) -> None:
    with pytest.raises(InvalidRequest, match="document, odd, query") as caught:
        calls.ask(request("hello", prompt_name="nope"))

    assert caught.value.field == "prompt_name"


def test_token_ids_are_taken_as_they_stand(calls: Calls, alone: SentenceTransformer) -> None:
    ids: list[int] = alone.tokenizer("hello world")["input_ids"]  # type: ignore[operator]

    pieces, end = calls.ask(request(tuple(ids)))

    assert_close(rows_of(pieces), alone.encode(["hello world"]))
    assert end.usage.num_prompt_tokens == len(ids)


def test_ids_that_are_no_tokens_are_refused(calls: Calls) -> None:
    with pytest.raises(InvalidRequest, match="none of the model's") as caught:
        calls.ask(request((1, 2), (5, 10**6)))

    assert caught.value.field == "input.1"


def test_vectors_that_are_cut_short_have_unit_length_again(
    calls: Calls, alone: SentenceTransformer
) -> None:
    given = texts(3)

    pieces, _ = calls.ask(request(*given, dimensions=5))

    expected = alone.encode(given, truncate_dim=5, normalize_embeddings=True)
    assert_close(rows_of(pieces), expected)


def test_more_dimensions_than_there_are_are_refused(calls: Calls) -> None:
    with pytest.raises(InvalidRequest, match=f"at most the {HIDDEN}"):
        calls.ask(request("hello", dimensions=HIDDEN + 1))


def test_a_text_that_is_too_long_is_refused_with_both_numbers(calls: Calls) -> None:
    with pytest.raises(InvalidRequest) as caught:
        calls.ask(request("fine", "x " * 100))

    assert caught.value.field == "input.1"
    assert "202 tokens" in caught.value.problem
    assert f"the {MAX_TOKENS} that" in caught.value.problem


@pytest.mark.parametrize(("truncate_to", "num_tokens"), [(CUT_TO_MODEL, MAX_TOKENS), (10, 10)])
def test_a_text_is_cut_when_that_is_asked_for(
    calls: Calls, alone: SentenceTransformer, truncate_to: int, num_tokens: int
) -> None:
    pieces, end = calls.ask(request("x " * 100, truncate_to=truncate_to))

    cut = alone.encode(["x " * 100], processing_kwargs={"text": {"max_length": num_tokens}})
    assert_close(rows_of(pieces), cut)
    assert end.usage.num_prompt_tokens == num_tokens


@pytest.mark.parametrize("truncate_to", [2, MAX_TOKENS + 1])
def test_a_cut_that_makes_no_sense_is_refused(calls: Calls, truncate_to: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        calls.ask(request("hello", truncate_to=truncate_to))

    assert caught.value.field == "truncate_prompt_tokens"


def hidden_of(alone: SentenceTransformer, text: str) -> torch.Tensor:
    with torch.inference_mode():
        features = alone[0](alone.preprocess([text]))
    hidden: torch.Tensor = features["token_embeddings"][0]
    return hidden


def test_a_sparse_vector_has_the_largest_weight_of_each_token(
    calls: Calls, alone: SentenceTransformer, path: Path
) -> None:
    text = "the answer is the answer"
    pieces, _ = calls.ask(request("hello", text, kinds=(VectorKind.SPARSE,)))

    head = torch.load(path / "sparse_linear.pt")
    weights = torch.relu(hidden_of(alone, text) @ head["weight"].T + head["bias"])[:, 0]
    ids: list[int] = alone.tokenizer(text)["input_ids"]  # type: ignore[operator]
    special = set(alone.tokenizer.all_special_ids)
    expected: dict[int, float] = {}
    for token_id, weight in zip(ids, weights.tolist(), strict=True):
        if token_id not in special and weight > 0:
            expected[token_id] = max(weight, expected.get(token_id, 0.0))
    (found,) = [one for one in pieces if isinstance(one, SparseVector) and one.index == 1]
    numbers = np.frombuffer(found.weights, dtype="<f4").tolist()
    assert dict(zip(found.token_ids, numbers, strict=True)) == pytest.approx(expected, abs=1e-5)


def test_a_multi_vector_has_a_unit_vector_for_each_token_but_the_first(
    calls: Calls, alone: SentenceTransformer, path: Path
) -> None:
    text = "the answer is on the table"
    kinds = (VectorKind.DENSE, VectorKind.MULTI_VECTOR)
    pieces, _ = calls.ask(request("hi", text, kinds=kinds))

    head = torch.load(path / "colbert_linear.pt")
    vectors = hidden_of(alone, text)[1:] @ head["weight"].T + head["bias"]
    expected = torch.nn.functional.normalize(vectors, dim=1).numpy()
    rows = [
        np.frombuffer(one.data, dtype="<f4").reshape(-1, one.dimensions)
        for one in pieces
        if isinstance(one, TokenVectors) and one.index == 1
    ]
    assert_close(np.concatenate(rows), expected)
    assert_close(rows_of(pieces), alone.encode(["hi", text]))


def test_more_vectors_than_an_answer_holds_are_refused(calls: Calls) -> None:
    many = ["the answer"] * 10_000

    with pytest.raises(InvalidRequest) as caught:
        calls.ask(request(*many, kinds=(VectorKind.MULTI_VECTOR,)))

    assert caught.value.field == "return_multi_vector"


def test_a_kind_that_a_model_has_not_is_refused(tmp_path: Path) -> None:
    with (
        started(load(save_embedder(tmp_path / "model"))) as calls,
        pytest.raises(AbilityMissing, match="sparse"),
    ):
        calls.ask(request("hello", kinds=(VectorKind.SPARSE,)))


def test_a_request_for_text_is_refused(calls: Calls) -> None:
    asked = GenerationRequest(request_id=RequestId("t"), prompt=TextPrompt(text="hello"))

    with pytest.raises(AbilityMissing, match="generate text"):
        calls.model.submit(asked)


def test_vectors_keep_the_length_that_the_files_give_where_the_launch_says_so(
    tmp_path: Path,
) -> None:
    path = save_embedder(tmp_path / "model")
    with started(load(path, options=EncoderOptions(normalize_embeddings=False))) as calls:
        pieces, _ = calls.ask(request("hello", dimensions=5))

    expected = SentenceTransformer(str(path), device="cpu").encode(["hello"], truncate_dim=5)
    assert_close(rows_of(pieces), expected)


def test_the_memory_of_a_batch_bounds_the_texts(path: Path) -> None:
    model = load(path, options=EncoderOptions(max_batch_bytes=64 * 1024))

    assert 0 < model.context_length < MAX_TOKENS
    with pytest.raises(InvalidRequest, match="the memory holds"):
        load(
            path,
            options=EncoderOptions(max_batch_bytes=64 * 1024),
            engine_options=EngineOptions(max_model_len=MAX_TOKENS),
        )


def test_a_launch_may_take_shorter_texts_than_the_model(path: Path) -> None:
    assert load(path, engine_options=EngineOptions(max_model_len=16)).context_length == 16


def test_files_that_are_no_embedding_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadFailed):
        load(tmp_path)
    with pytest.raises(LoadFailed, match="is not a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(LoadFailed, match="pip install no-such-package"):
        load("package:no_such_package/model")  # type: ignore[arg-type]


def test_what_was_chosen_is_told(calls: Calls) -> None:
    about = calls.model.description()

    assert about["dimensions"] == HIDDEN
    assert about["max_tokens"] == MAX_TOKENS
    assert about["kinds"] == "dense, sparse, multi_vector"
    assert about["batch_size"] == 8
