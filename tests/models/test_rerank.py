# SPDX-License-Identifier: Apache-2.0
"""Scores are those of the model alone, whoever asks for them together with whom."""

import logging
import random
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.encoders_tiny import (
    MAX_TOKENS,
    TEMPLATE,
    encoder_spec,
    save_cross_encoder,
    save_embedder,
    save_language_reranker,
)
from tests.models.encoder_calls import Calls, scores_of, started
from xinference.errors import AbilityMissing, InvalidRequest, LoadFailed
from xinference.identifiers import RequestId
from xinference.models.base import Model
from xinference.models.rerank import load_rerank_model
from xinference.protocol.deployment import ModelSource
from xinference.protocol.encoding import RerankTemplate
from xinference.protocol.vectors import EmbeddingRequest, RerankRequest

TOLERANCE = 1e-5
WORDS = ("the weather is nice and the answer is on the table", "how are you", "hello", "world")
QUERY = "how is it"
_ids = count()


def load(path: Path, template: RerankTemplate | None = None) -> Model:
    spec = encoder_spec(path, "rerank", source=ModelSource(path="", rerank_template=template))
    return load_rerank_model(spec, on_progress=lambda *_: None)


def request(query: str, *documents: str, **fields: Any) -> RerankRequest:
    request_id = RequestId(f"r{next(_ids)}")
    return RerankRequest(request_id=request_id, query=query, documents=documents, **fields)


def texts(number: int, *, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, 3))) for _ in range(number)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="module")
def calls(path: Path) -> Iterator[Calls]:
    with started(load(path)) as calls:
        yield calls


@pytest.fixture(scope="module")
def alone(path: Path) -> CrossEncoder:
    return CrossEncoder(str(path), device="cpu")


@pytest.fixture(scope="module")
def language_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_reranker(tmp_path_factory.mktemp("language"))


def test_the_layers_of_both_kinds_are_laid_out_for_the_cpu(
    path: Path, language_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for load_one in (lambda: load(path), lambda: load(language_path, TEMPLATE)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            load_one()
        assert "linear layers are packed for the CPU" in caplog.text


@pytest.fixture(scope="module")
def language(language_path: Path) -> Iterator[Calls]:
    with started(load(language_path, TEMPLATE)) as calls:
        yield calls


def asked_of_language_model(path: Path, prompt: str, *, has_no: bool = True) -> float:
    """Return the score of one prompt, computed by itself."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    yes, no = tokenizer("y")["input_ids"][0], tokenizer("n")["input_ids"][0]
    with torch.inference_mode():
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, -1]
    other = logits[no] if has_no else 0.0
    return float(torch.sigmoid(logits[yes] - other))


def test_scores_are_those_of_the_cross_encoder_in_any_mix_of_callers(
    calls: Calls, alone: CrossEncoder
) -> None:
    asked = [(f"{QUERY} {number}", texts(number, seed=number)) for number in (1, 1, 20, 3, 1, 9)]
    found: dict[int, list[float]] = {}

    def ask(caller: int) -> None:
        query, documents = asked[caller]
        found[caller] = scores_of(calls.ask(request(query, *documents))[0])

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for caller, (query, documents) in enumerate(asked):
        expected = alone.predict([(query, document) for document in documents])
        assert np.abs(np.array(found[caller]) - expected).max() < TOLERANCE


def test_a_document_that_is_too_long_has_the_score_of_its_best_chunk(
    calls: Calls, alone: CrossEncoder
) -> None:
    document = " ".join(texts(12, seed=3))
    tokenizer: Any = alone.tokenizer
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    left = MAX_TOKENS - 3 - len(tokenizer(QUERY, add_special_tokens=False)["input_ids"])
    step = left - left // 8
    starts = [
        start for start in range(0, len(ids), step) if start == 0 or start + left // 8 < len(ids)
    ]
    chunks = [tokenizer.decode(ids[start : start + left]) for start in starts]
    assert len(ids) > MAX_TOKENS
    expected = alone.predict([(QUERY, chunk) for chunk in chunks])

    whole = scores_of(calls.ask(request(QUERY, document))[0])
    first = scores_of(calls.ask(request(QUERY, document, max_chunks_per_doc=1))[0])

    assert whole == pytest.approx([expected.max()], abs=TOLERANCE)
    assert first == pytest.approx([expected[0]], abs=TOLERANCE)


def test_a_document_may_be_cut_first(calls: Calls, alone: CrossEncoder) -> None:
    tokenizer: Any = alone.tokenizer
    ids = tokenizer("hello world how are you", add_special_tokens=False)["input_ids"]

    scores = scores_of(calls.ask(request(QUERY, tokenizer.decode(ids), max_tokens_per_doc=3))[0])

    expected = alone.predict([(QUERY, tokenizer.decode(ids[:3]))])
    assert scores == pytest.approx(list(expected), abs=TOLERANCE)


def test_an_empty_document_has_a_score_too(calls: Calls, alone: CrossEncoder) -> None:
    scores = scores_of(calls.ask(request(QUERY, "", "hello"))[0])

    assert scores == pytest.approx(list(alone.predict([(QUERY, ""), (QUERY, "hello")])), abs=1e-5)


def test_a_query_that_leaves_no_room_is_refused_with_both_numbers(calls: Calls) -> None:
    with pytest.raises(InvalidRequest) as caught:
        calls.ask(request("x " * 50, "hello"))

    assert caught.value.field == "query"
    assert "takes 103 tokens" in caught.value.problem
    assert f"the {MAX_TOKENS} that" in caught.value.problem


def test_an_instruction_is_refused_where_the_model_takes_none(calls: Calls) -> None:
    with pytest.raises(InvalidRequest) as caught:
        calls.ask(request(QUERY, "hello", instruction="be strict"))

    assert caught.value.field == "instruction"


def test_the_tokens_that_were_read_are_counted(calls: Calls, alone: CrossEncoder) -> None:
    _, end = calls.ask(request(QUERY, "hello", "world"))

    tokenizer: Any = alone.tokenizer
    expected = sum(len(tokenizer(QUERY, one)["input_ids"]) for one in ("hello", "world"))
    assert end.usage.num_prompt_tokens == expected


@pytest.mark.parametrize("instruction", [None, "does it tell of"])
def test_a_language_model_scores_by_its_yes_and_no(
    language: Calls, language_path: Path, instruction: str | None
) -> None:
    documents = texts(6)

    scores = scores_of(language.ask(request(QUERY, *documents, instruction=instruction))[0])

    for document, score in zip(documents, scores, strict=True):
        prompt = (
            f"<|im_start|>judge\n{instruction or 'is it about'} {QUERY}\non {document}\n<|im_end|>"
        )
        assert score == pytest.approx(asked_of_language_model(language_path, prompt), abs=1e-5)


def test_a_language_model_may_be_scored_by_its_yes_alone(language_path: Path) -> None:
    template = RerankTemplate(query="A: {query}", document="\nB: {document}", suffix="\n?", yes="y")

    with started(load(language_path, template)) as calls:
        scores = scores_of(calls.ask(request(QUERY, "hello"))[0])

    prompt = f"A: {QUERY}\nB: hello\n?"
    expected = asked_of_language_model(language_path, prompt, has_no=False)
    assert scores == pytest.approx([expected], abs=1e-5)


def test_a_language_model_reads_a_long_document_chunk_by_chunk(language_path: Path) -> None:
    with started(load(language_path, TEMPLATE)) as calls:
        long = " ".join(texts(200))
        scores = scores_of(calls.ask(request(QUERY, "hello", long))[0])
        counters = calls.model.counters()

    assert all(0 <= score <= 1 for score in scores)
    assert counters["num_texts"] > 3


def test_the_token_that_says_yes_must_be_one(language_path: Path) -> None:
    template = RerankTemplate(query="{query}", document="{document}", yes="certainly")

    with pytest.raises(LoadFailed, match="'certainly' is"):
        load(language_path, template)


def test_a_request_for_vectors_is_refused(calls: Calls) -> None:
    with pytest.raises(AbilityMissing, match="embed"):
        calls.model.submit(EmbeddingRequest(request_id=RequestId("e"), inputs=("hello",)))


def test_a_classifier_of_several_labels_is_no_reranker(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="3 scores"):
        load(save_cross_encoder(tmp_path, num_labels=3))


def test_an_embedding_model_is_no_reranker(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model")

    with pytest.raises(LoadFailed, match="BertModel is no classifier"):
        load(path)
    with pytest.raises(LoadFailed, match="missing_keys"):
        load(path, TEMPLATE)
