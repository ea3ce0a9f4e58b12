# SPDX-License-Identifier: Apache-2.0
"""`embed` and `rerank`: ask a model for vectors and for scores."""

import sys
from typing import Any

import click

from .connection import connected, endpoint_options
from .output import show, show_json, show_table

SHOWN_NUMBERS = 8
"""Of a vector, where a person reads it."""


@click.command("embed", short_help="Turn texts into vectors.")
@endpoint_options
@click.option("--model-uid", "-u", required=True)
@click.option("--dimensions", type=int, help="Of each vector; the model's own by default.")
@click.option(
    "--input-type", type=click.Choice(["query", "document"]), help="What the texts are for."
)
@click.option("--truncate", is_flag=True, help="Cut texts that are too long for the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer, as JSON.")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
def embed_command(
    endpoint: str | None,
    api_key: str | None,
    model_uid: str,
    dimensions: int | None,
    input_type: str | None,
    truncate: bool,
    as_json: bool,
    texts: tuple[str, ...],
) -> None:
    """Turn texts into vectors. Without TEXT, each line of the input is one."""
    given = _given(texts, "TEXT")
    fields: dict[str, Any] = {
        "dimensions": dimensions,
        "input_type": input_type,
        "truncate_prompt_tokens": -1 if truncate else None,
    }
    with connected(endpoint, api_key) as client:
        model = _handle(client, model_uid, "EmbeddingModelHandle", "embed")
        answer = model.create_embedding(
            given, **{name: value for name, value in fields.items() if value is not None}
        )
    if as_json:
        show_json(answer)
        return
    for item in answer["data"]:
        vector = item["embedding"]
        numbers = ", ".join(f"{number:.4f}" for number in vector[:SHOWN_NUMBERS])
        more = ", …" if len(vector) > SHOWN_NUMBERS else ""
        show(f"{given[item['index']]}: {len(vector)} numbers [{numbers}{more}]")


@click.command("rerank", short_help="Sort documents by their relevance to a query.")
@endpoint_options
@click.option("--model-uid", "-u", required=True)
@click.option("--query", "-q", required=True)
@click.option("--top-n", type=int, help="So many of the best; all by default.")
@click.option("--instruction", help="Of models that take one: what makes a document relevant.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer, as JSON.")
@click.argument("documents", nargs=-1, metavar="[DOCUMENT]...")
def rerank_command(
    endpoint: str | None,
    api_key: str | None,
    model_uid: str,
    query: str,
    top_n: int | None,
    instruction: str | None,
    as_json: bool,
    documents: tuple[str, ...],
) -> None:
    """Sort documents by their relevance. Without DOCUMENT, each line of the input is one."""
    given = _given(documents, "DOCUMENT")
    fields = {} if instruction is None else {"instruction": instruction}
    with connected(endpoint, api_key) as client:
        model = _handle(client, model_uid, "RerankModelHandle", "rerank")
        answer = model.rerank(given, query, top_n=top_n, **fields)
    if as_json:
        show_json(answer)
        return
    rows = [
        [f"{item['relevance_score']:.4f}", item["index"], given[item["index"]]]
        for item in answer["results"]
    ]
    show_table("", ["Score", "Index", "Document"], rows)


def _given(words: tuple[str, ...], what: str) -> list[str]:
    texts = list(words)
    if not texts and not sys.stdin.isatty():
        texts = [line for line in (line.rstrip("\n") for line in sys.stdin) if line.strip()]
    if not texts:
        raise click.UsageError(f"Give at least one {what}, or lines on the input.")
    return texts


def _handle(client: Any, model_uid: str, name: str, verb: str) -> Any:
    """Return the handle of a model, which must be of this class."""
    import xinference.client

    model = client.get_model(model_uid)
    if not isinstance(model, getattr(xinference.client, name)):
        raise click.ClickException(f"{model_uid} does not {verb}")
    return model
