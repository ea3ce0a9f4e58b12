# SPDX-License-Identifier: Apache-2.0
"""The process of a replica: how it starts, answers as `transformers` does, and ends."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.replica import HANGS
from tests.replica_process import FAKE, REAL, ReplicaProcess, replica_process
from xinference.cluster.dataplane.client import ReplicaConnection, ReplicaStream
from xinference.cluster.dataplane.handshake import instance_key
from xinference.cluster.replica import EXIT_BAD_START, Bootstrap
from xinference.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    InvalidSetting,
    LoadFailed,
    ModelNotReady,
    ReplicaLost,
    RequestAborted,
)
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    ChatPrompt,
    Finished,
    GenerationRequest,
    Message,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)

SECONDS = 20.0
LOAD_SECONDS = 90.0
LONG = 3000
INSTANCE = InstanceId("77aa")
KEY = instance_key(b"cluster", INSTANCE)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="xi-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def model_path(folder: Path) -> Path:
    from tests.models_tiny import CONFIGS, save_model

    config = CONFIGS["qwen2"]()
    config.max_position_embeddings = 4096
    return save_model(folder / "model", config=config)


@pytest.fixture
def bootstrap(folder: Path) -> Bootstrap:
    return Bootstrap(
        instance=INSTANCE,
        key=KEY,
        listen=f"unix:{folder}/run/s.sock",
        model_uid=ModelUid("tiny"),
    )


def a_spec(path: str, **options: int) -> ReplicaSpec:
    return ReplicaSpec(
        replica=ReplicaUid(ModelUid("tiny"), 0),
        instance=INSTANCE,
        source=ModelSource(path=path),
        abilities=("chat", "generate"),
        engine_options=EngineOptions(max_num_seqs=8, block_size=16, **options),
        python_executable=sys.executable,
    )


@pytest.fixture(scope="module")
def loaded(folder: Path, model_path: Path) -> Iterator[ReplicaProcess]:
    bootstrap = Bootstrap(
        instance=INSTANCE, key=KEY, listen=f"unix:{folder}/m/s.sock", model_uid=ModelUid("tiny")
    )
    with replica_process(REAL, bootstrap) as process:
        asyncio.run(load(process, a_spec(str(model_path))))
        yield process


async def opened(process: ReplicaProcess) -> ReplicaConnection:
    return await ReplicaConnection.open(
        process.address, instance=INSTANCE, key=KEY, role="actor", timeout_seconds=SECONDS
    )


async def load(process: ReplicaProcess, spec: ReplicaSpec) -> list[float]:
    told: list[float] = []
    async with contextlib.aclosing(await opened(process)) as actor:
        await actor.load(
            spec,
            on_progress=lambda progress, stage, info: told.append(progress),
            timeout_seconds=LOAD_SECONDS,
        )
    return told


def a_request(request_id: str, text: str = "hello", *, max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId(request_id),
        prompt=TextPrompt(text=text),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


async def tokens_of(stream: ReplicaStream) -> list[int]:
    return [
        token_id
        async for event in stream
        if isinstance(event, TextDelta)
        for token_id in event.token_ids
    ]


# --- answers


async def test_greedy_answers_under_load_are_those_of_transformers(
    loaded: ReplicaProcess, model_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [f"question {index}: " + "why? " * index for index in range(8)]
    chats = [ChatPrompt(messages=(Message(role="user", content=text),)) for text in texts[:4]]
    prompts = [*(TextPrompt(text=text) for text in texts[4:]), *chats]
    expected = []
    for prompt in prompts:
        if isinstance(prompt, ChatPrompt):
            messages = [{"role": "user", "content": prompt.messages[0].content}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            text = prompt.text
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.inference_mode():
            answer = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected.append(answer[0, ids.shape[1] :].tolist())

    async with contextlib.aclosing(await opened(loaded)) as connection:
        streams = [
            await connection.generate(
                replace(a_request(f"r{index}", max_tokens=24), prompt=prompt),
                timeout_seconds=SECONDS,
            )
            for index, prompt in enumerate(prompts)
        ]
        async with asyncio.timeout(SECONDS):
            answers = await asyncio.gather(*[tokens_of(stream) for stream in streams])

    assert list(answers) == expected


async def test_what_was_there_of_a_prompt_is_told_with_the_end(loaded: ReplicaProcess) -> None:
    prompt = TokenPrompt(token_ids=tuple(range(100, 150)))
    plain = replace(a_request("a", max_tokens=2), prompt=prompt)
    cached = []
    async with contextlib.aclosing(await opened(loaded)) as connection:
        before = (await connection.ping(SECONDS)).counters["num_cached_tokens"]
        for request_id, salt in (("a", ""), ("b", ""), ("c", "mine")):
            stream = await connection.generate(
                replace(plain, request_id=RequestId(request_id), cache_salt=salt),
                timeout_seconds=SECONDS,
            )
            end = await last_event(stream)
            assert isinstance(end, Finished)
            cached.append(end.usage.num_cached_tokens)
        after = (await connection.ping(SECONDS)).counters["num_cached_tokens"]

    assert cached == [0, 48, 0]
    assert after - before == 48


async def test_requests_are_counted_with_their_tokens_and_times(loaded: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(loaded)) as connection:
        before = (await connection.ping(SECONDS)).counters
        stream = await connection.generate(a_request("a", max_tokens=3), timeout_seconds=SECONDS)
        end = await last_event(stream)
        with pytest.raises(InvalidRequest):
            await connection.generate(
                replace(a_request("b"), prompt=TokenPrompt(token_ids=())), timeout_seconds=SECONDS
            )
        after = (await connection.ping(SECONDS)).counters

    grown = {name: after[name] - before[name] for name in after}
    assert isinstance(end, Finished)
    assert grown["requests"] == grown["request_seconds:+Inf"] == 2
    assert grown["request_errors"] == 1
    assert grown["request_first_token_seconds:+Inf"] == grown["queue_seconds:+Inf"] == 1
    assert grown["request_token_seconds:+Inf"] == 1
    assert grown["request_token_seconds:sum"] == pytest.approx(grown["decode_seconds:sum"] / 2)
    assert grown["request_input_tokens"] == end.usage.num_prompt_tokens
    assert grown["request_output_tokens"] == 3


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=30, temperature=0.0),
        SamplingParams(max_tokens=30, temperature=1.0, seed=1, stop=("e", "th", "00", "1")),
        SamplingParams(max_tokens=30, temperature=1.0, seed=2, n=3),
        SamplingParams(max_tokens=30, temperature=1.5, seed=3, logprobs=2, stop=("a",)),
        SamplingParams(max_tokens=1, temperature=0.0),
    ],
    ids=["plain", "stop strings", "three answers", "logprobs", "one token"],
)
async def test_usage_counts_each_token_that_was_delivered_once(
    loaded: ReplicaProcess, sampling: SamplingParams
) -> None:
    chat = ChatPrompt(messages=(Message(role="user", content="count"),))
    request = replace(a_request("u"), prompt=chat, sampling=sampling)
    async with contextlib.aclosing(await opened(loaded)) as connection:
        stream = await connection.generate(request, timeout_seconds=SECONDS)
        num_prompt_tokens = stream.accepted.num_prompt_tokens
        events = [event async for event in stream]

    num_delivered = sum(len(event.token_ids) for event in events if isinstance(event, TextDelta))
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.num_prompt_tokens == num_prompt_tokens
    assert end.usage.num_completion_tokens == num_delivered


async def test_a_disconnect_stops_the_engine(loaded: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(loaded)) as watcher:
        connection = await opened(loaded)
        streams = [
            await connection.generate(
                a_request(f"r{index}", max_tokens=LONG), timeout_seconds=SECONDS
            )
            for index in range(12)
        ]
        for stream in streams[:8]:
            await anext(stream)
        before = (await watcher.ping(SECONDS)).counters

        await connection.aclose()
        async with asyncio.timeout(SECONDS):
            while (counters := (await watcher.ping(SECONDS)).counters)["num_blocks_used"]:
                pass
        after = (await watcher.ping(SECONDS)).counters

    assert before["num_running"] == 8
    assert counters["num_running"] == counters["num_waiting"] == 0
    assert after["num_steps"] == counters["num_steps"]
    assert after["num_aborts"] == before["num_aborts"] + 12


LONG_TEXT = "so many words " * 3500
"""Far too many tokens, which is known when they have been counted."""


async def test_pings_and_streams_go_on_while_long_prompts_become_tokens(
    loaded: ReplicaProcess,
) -> None:
    async with contextlib.aclosing(await opened(loaded)) as connection:
        stream = await connection.generate(
            a_request("short", max_tokens=LONG), timeout_seconds=SECONDS
        )
        long = asyncio.gather(
            *[
                connection.generate(a_request(f"long{index}", LONG_TEXT), timeout_seconds=SECONDS)
                for index in range(10)
            ],
            return_exceptions=True,
        )
        num_pings = num_events = 0
        while not long.done():
            await connection.ping(SECONDS)
            num_pings += 1
            await anext(stream)
            num_events += 1
        await stream.aclose()
        refusals = await long

    assert {type(refusal) for refusal in refusals} == {ContextLengthExceeded}
    assert num_pings > 10
    assert num_events > 10


async def test_an_abort_overtakes_a_prompt_that_is_not_tokens_yet(loaded: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(loaded)) as connection:
        requests = [a_request(f"long{index}", LONG_TEXT) for index in range(10)]
        starting = [
            asyncio.ensure_future(connection.generate(request, timeout_seconds=SECONDS))
            for request in requests
        ]
        await connection.ping(SECONDS)
        await connection.abort_request(
            requests[-1].request_id, block_seconds=0.0, timeout_seconds=SECONDS
        )

        with pytest.raises(RequestAborted):
            await starting[-1]
        num_left = sum(not each.done() for each in starting)
        await asyncio.gather(*starting, return_exceptions=True)

    assert num_left > 0


async def test_token_ids_outside_the_vocabulary_are_refused(loaded: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(loaded)) as connection:
        with pytest.raises(InvalidRequest, match="100000"):
            await connection.generate(
                replace(a_request("a"), prompt=TokenPrompt(token_ids=(1, 100_000))),
                timeout_seconds=SECONDS,
            )


# --- loading


async def test_it_answers_while_it_loads_and_says_how_far_it_is(
    bootstrap: Bootstrap, model_path: Path
) -> None:
    with replica_process(REAL, bootstrap) as process:
        started = time.monotonic()
        async with contextlib.aclosing(await opened(process)) as watcher:
            loading = asyncio.ensure_future(load(process, a_spec(str(model_path))))
            states = set()
            while not loading.done():
                states.add((await watcher.ping(SECONDS)).state)
            states.add((await watcher.ping(SECONDS)).state)
            told = await loading
        print(f"loaded in {time.monotonic() - started:.1f} s")  # noqa: T201  # shown on failure

    assert {ReplicaState.LOADING, ReplicaState.READY} <= states
    assert told == sorted(told)
    assert 0.0 < told[0] < told[-1] <= 1.0


async def test_files_that_do_not_load_are_a_load_failed(bootstrap: Bootstrap) -> None:
    with (
        replica_process(REAL, bootstrap) as process,
        pytest.raises(LoadFailed, match="is not a directory"),
    ):
        await load(process, a_spec("no/such/model"))


# --- starting


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"not json\n", b'{"key": "secret"}\n'])
def test_a_bad_first_line_ends_it_at_once(line: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", REAL], input=line, capture_output=True, check=False, timeout=SECONDS
    )

    assert done.returncode == EXIT_BAD_START
    assert b"one line of JSON" in done.stderr
    assert b"secret" not in done.stderr
    assert done.stdout == b""


def test_an_address_that_cannot_be_used_ends_it(bootstrap: Bootstrap, folder: Path) -> None:
    (folder / "open").mkdir(mode=0o755)
    with (
        pytest.raises(AssertionError, match="0700"),
        replica_process(REAL, replace(bootstrap, listen=f"unix:{folder}/open/s.sock")),
    ):
        pass


def test_the_key_is_not_printed_with_the_rest(bootstrap: Bootstrap) -> None:
    assert repr(KEY)[2:10] not in repr(bootstrap)
    assert Bootstrap.from_line(bootstrap.to_line()) == bootstrap
    with pytest.raises(InvalidSetting):
        Bootstrap.from_line(b"[]")


def test_it_listens_before_torch_is_imported() -> None:
    heavy = {"torch", "transformers", "xoscar", "pandas", "numpy"}
    program = f"import sys, {REAL}; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == []


# --- ending


@pytest.fixture
def counting(bootstrap: Bootstrap) -> Iterator[ReplicaProcess]:
    with replica_process(FAKE, bootstrap) as process:
        yield process


async def a_running_stream(connection: ReplicaConnection) -> ReplicaStream:
    await connection.load(a_spec("counting"), on_progress=lambda *_: None, timeout_seconds=SECONDS)
    return await connection.generate(a_request("a", max_tokens=900_000), timeout_seconds=SECONDS)


async def last_event(stream: ReplicaStream) -> TextDelta | Finished:
    async with asyncio.timeout(SECONDS):
        *_, last = [event async for event in stream]
    return last


def end_its_stdin(process: ReplicaProcess) -> None:
    assert process.popen.stdin is not None
    process.popen.stdin.close()


@pytest.mark.parametrize(
    "end", [end_its_stdin, lambda process: os.kill(process.pid, signal.SIGTERM)]
)
async def test_it_ends_its_streams_and_itself(
    counting: ReplicaProcess, end: object, folder: Path
) -> None:
    async with contextlib.aclosing(await opened(counting)) as connection:
        stream = await a_running_stream(connection)

        end(counting)  # type: ignore[operator]

        with pytest.raises(ReplicaLost):
            await last_event(stream)
        async with asyncio.timeout(SECONDS):
            await connection.closed.wait()
        assert connection.has_said_goodbye
    assert await asyncio.to_thread(counting.wait) == 0
    assert not (folder / "run" / "s.sock").exists()
    if counting.popen.stdin is not None and counting.popen.stdin.closed:
        counting.popen.stdin = None


async def test_ctrl_c_in_its_terminal_is_not_meant_for_it(counting: ReplicaProcess) -> None:
    os.kill(counting.pid, signal.SIGINT)

    async with contextlib.aclosing(await opened(counting)) as connection:
        assert (await connection.ping(SECONDS)).state is ReplicaState.STARTING


async def test_it_can_be_stopped_while_it_loads(counting: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(counting)) as connection:
        loading = asyncio.ensure_future(
            connection.load(a_spec(HANGS), on_progress=lambda *_: None, timeout_seconds=SECONDS)
        )
        while (await connection.ping(SECONDS)).state is not ReplicaState.LOADING:
            pass
        await connection.stop()
        with pytest.raises(ReplicaLost):
            await loading

    assert await asyncio.to_thread(counting.wait) == 0


async def test_told_to_stop_it_finishes_what_it_has_and_takes_nothing_new(
    counting: ReplicaProcess,
) -> None:
    async with contextlib.aclosing(await opened(counting)) as connection:
        await connection.load(
            a_spec("counting"), on_progress=lambda *_: None, timeout_seconds=SECONDS
        )
        request = a_request("a", max_tokens=200)
        stream = await connection.generate(request, timeout_seconds=SECONDS)
        await connection.stop(grace_seconds=SECONDS)
        await connection.ping(SECONDS)

        with pytest.raises(ModelNotReady):
            await connection.generate(a_request("b", max_tokens=1), timeout_seconds=SECONDS)
        last = await last_event(stream)

        assert isinstance(last, Finished)
        assert last.usage.num_completion_tokens == 200
    assert await asyncio.to_thread(counting.wait) == 0


async def test_what_does_not_end_in_time_can_go_on_elsewhere(counting: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(counting)) as connection:
        stream = await a_running_stream(connection)
        await connection.stop(grace_seconds=0.1)

        with pytest.raises(ReplicaLost):
            await last_event(stream)
    assert await asyncio.to_thread(counting.wait) == 0


async def test_a_killed_replica_is_lost_to_all_its_streams(counting: ReplicaProcess) -> None:
    async with contextlib.aclosing(await opened(counting)) as connection:
        stream = await a_running_stream(connection)
        killed = time.monotonic()

        os.kill(counting.pid, signal.SIGKILL)

        with pytest.raises(ReplicaLost):
            await last_event(stream)
        assert time.monotonic() - killed < 5.0
