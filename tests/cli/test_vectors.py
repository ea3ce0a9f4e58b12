# SPDX-License-Identifier: Apache-2.0
"""`embed` and `rerank`."""

import json

import pytest

from tests.cli.conftest import Run
from tests.fakes.http import Reply, Script

EMBEDDED = {
    "object": "list",
    "model": "m",
    "data": [
        {"index": 0, "object": "embedding", "embedding": [0.5] * 9},
        {"index": 1, "object": "embedding", "embedding": [0.25] * 9},
    ],
    "usage": {"prompt_tokens": 4, "total_tokens": 4},
}
RANKED = {
    "id": "r",
    "model": "m",
    "results": [
        {"index": 1, "relevance_score": 0.9, "document": None},
        {"index": 0, "relevance_score": 0.1, "document": None},
    ],
    "meta": {},
    "usage": {},
}


@pytest.fixture
def embedder(script: Script) -> Script:
    script.replies["GET /v1/models/m"] = Reply(json={"model_type": "embedding"})
    script.replies["POST /v1/embeddings"] = Reply(json=EMBEDDED)
    return script


@pytest.fixture
def reranker(script: Script) -> Script:
    script.replies["GET /v1/models/m"] = Reply(json={"model_type": "rerank"})
    script.replies["POST /v1/rerank"] = Reply(json=RANKED)
    return script


def test_texts_become_vectors_of_which_the_beginning_is_shown(embedder: Script, run: Run) -> None:
    options = ("--dimensions", "9", "--input-type", "query", "--truncate")
    done = run("embed", "--model-uid", "m", *options, "hello", "world")

    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("hello: 9 numbers [0.5000, 0.5000")
    assert embedder.asked[-1].body == {
        "model": "m",
        "input": ["hello", "world"],
        "dimensions": 9,
        "input_type": "query",
        "truncate_prompt_tokens": -1,
    }


def test_lines_piped_in_are_texts_and_json_is_the_whole_answer(embedder: Script, run: Run) -> None:
    done = run("embed", "-u", "m", "--json", typed="hello\n\nworld\n")

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == EMBEDDED
    assert embedder.asked[-1].body == {"model": "m", "input": ["hello", "world"]}


def test_documents_are_shown_with_their_scores_best_first(reranker: Script, run: Run) -> None:
    done = run("rerank", "-u", "m", "--query", "who", "--top-n", "2", "first", "second")

    assert done.exit_code == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "0." in line]
    assert "0.9000" in rows[0]
    assert "second" in rows[0]
    assert "first" in rows[1]
    assert reranker.asked[-1].body == {
        "model": "m",
        "documents": ["first", "second"],
        "query": "who",
        "top_n": 2,
    }


def test_an_instruction_goes_along(reranker: Script, run: Run) -> None:
    done = run(
        "rerank", "-u", "m", "-q", "who", "--instruction", "be strict", "--json", typed="a\n"
    )

    assert json.loads(done.stdout) == RANKED
    assert reranker.asked[-1].body["instruction"] == "be strict"


@pytest.mark.parametrize("command", [("embed",), ("rerank", "-q", "who")])
def test_a_model_of_another_kind_is_refused(
    script: Script, run: Run, command: tuple[str, ...]
) -> None:
    script.replies["GET /v1/models/m"] = Reply(
        json={"model_type": "LLM", "model_ability": ["generate"]}
    )

    done = run(*command, "-u", "m", "hello")

    assert done.exit_code == 1
    assert f"m does not {command[0]}" in done.stderr


def test_without_a_text_the_command_says_what_it_wants(embedder: Script, run: Run) -> None:
    done = run("embed", "-u", "m", typed="")

    assert done.exit_code == 2
    assert "TEXT" in done.stderr
