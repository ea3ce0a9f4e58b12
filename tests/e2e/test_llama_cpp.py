# SPDX-License-Identifier: Apache-2.0
"""A GGUF on llama.cpp through the whole platform: ask, abort, kill its server, terminate."""

import json
import signal
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from tests.e2e.platform import Platform, command_of, started, wait_until
from tests.gguf_tiny import NAME, registration, save_gguf

SERVER = "llama_cpp_server.py"
CONTEXT = 8192
SHORT = {"max_tokens": 12, "temperature": 0.0, "seed": 3}
TEXT = {"logit_bias": {str(code): 50 for code in b"abcdefghij"}}
"""Answers are text: random weights like bytes of no character."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    home = tmp_path_factory.mktemp("g")
    family = registration(save_gguf(home / "tiny.gguf", context_length=CONTEXT))
    (home / "family.json").write_text(json.dumps(family))
    with started(home) as running:
        done = running.command("register", "-f", str(home / "family.json"), "-t", "LLM")
        assert done.returncode == 0, done.stderr
        yield running


@pytest.fixture(scope="module")
def launched(platform: Platform) -> Platform:
    words = ("-n", NAME, "-en", "llama.cpp", "--max_num_seqs", "2")
    done = platform.command("launch", *words, "--context_length", str(CONTEXT))
    assert done.returncode == 0, done.stderr
    return platform


@pytest.fixture
def client(launched: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{launched.endpoint}/v1", api_key="none") as client:
        yield client


def servers(platform: Platform) -> list[psutil.Process]:
    """Return the processes of engines: a leash and a server for each."""
    below = psutil.Process(platform.process.pid).children(recursive=True)
    return [one for one in below if any(word.endswith(SERVER) for word in command_of(one))]


def test_it_answers_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], **SHORT, **TEXT}

    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = [*stream]

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) == 12
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert whole.choices[0].finish_reason == "length"


def test_a_structure_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }

    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Which?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "colour", "schema": schema, "strict": True},
        },
        max_tokens=400,
    )

    assert json.loads(answer.choices[0].message.content or "")["colour"] in {"red", "blue"}


def test_what_the_engine_cannot_do_is_a_400_with_its_name(launched: Platform) -> None:
    body = {"model": NAME, "prompt": "a", "bad_words": ["no"]}

    answer = httpx.post(f"{launched.endpoint}/v1/completions", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "bad_words"


def test_an_abort_by_id_ends_the_answer_in_the_server(launched: Platform) -> None:
    body = {"model": NAME, "prompt": "a", "max_tokens": CONTEXT - 10, "ignore_eos": True}
    body |= {"stream": True, "request_id": "mine", **TEXT}
    url = f"{launched.endpoint}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")

        aborted = httpx.post(f"{launched.endpoint}/v1/models/{NAME}/requests/mine/abort", json={})
        rest = "\n".join(lines)

    assert aborted.json() == {"msg": "DONE"}
    assert "request_aborted" in rest or "abort" in rest
    wait_until(
        "the server has nothing to do", lambda: num_running(launched) == 0, timeout_seconds=10
    )


def num_running(platform: Platform) -> float:
    page = httpx.get(f"{platform.endpoint}/metrics").text
    lines = [
        line for line in page.splitlines() if line.startswith("xinference:engine_num_running{")
    ]
    assert lines, page
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_its_server_is_killed_and_comes_back_and_a_stream_goes_on(launched: Platform) -> None:
    _, before = servers(launched)
    body = {"model": NAME, "prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **TEXT}
    url = f"{launched.endpoint}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=90) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        chunks = [json.loads(next(lines)[6:]) for _ in range(3)]

        before.send_signal(signal.SIGKILL)

        chunks += [json.loads(line[6:]) for line in lines]

    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert len(text) == 3000
    assert chunks[-1]["usage"]["completion_tokens"] == 3000
    _, after = servers(launched)
    assert after.pid != before.pid
    events = httpx.get(f"{launched.endpoint}/v1/models/{NAME}/events").json()
    assert any("SIGKILL" in event["event_content"] for event in events), events


def test_what_it_says_is_in_the_log_of_its_replica(launched: Platform) -> None:
    log = (launched.home / "logs" / f"{NAME}-rep0.log").read_text()

    assert "llama.cpp starts" in log
    assert "llama.cpp listens on http://127.0.0.1:" in log


def test_the_engines_that_can_run_it_here_are_told_and_why_others_cannot(
    platform: Platform,
) -> None:
    of_gguf = httpx.get(f"{platform.endpoint}/v1/engines/{NAME}").json()
    of_guide = httpx.get(f"{platform.endpoint}/v1/engines/xinference-guide").json()

    assert of_gguf["llama.cpp"][0]["model_format"] == "ggufv2"
    assert "is not for vLLM" in of_gguf["vLLM"]
    assert "vllm is not installed; run pip install vllm" in of_guide["vLLM"]
    assert of_guide["Transformers"][0]["model_format"] == "pytorch"


def test_an_engine_that_is_not_there_is_refused_with_what_to_install(platform: Platform) -> None:
    done = platform.command("launch", "-n", "xinference-guide", "-en", "vllm", "-u", "none")

    assert done.returncode == 1
    assert "run pip install vllm" in done.stderr


def test_options_that_are_not_its_own_are_refused_before_anything_starts(
    platform: Platform,
) -> None:
    body = {"model_name": NAME, "model_engine": "llama.cpp", "model_uid": "other"}
    url = f"{platform.endpoint}/v1/models"

    refused = httpx.post(url, json={**body, "dtype": "float16"}, timeout=60)
    reserved = httpx.post(url, json={**body, "port": 80}, timeout=60)
    unknown = httpx.post(url, json={**body, "n_gpu_layer": 3}, timeout=60)

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dtype")
    assert (reserved.status_code, reserved.json()["error"]["param"]) == (400, "port")
    assert unknown.status_code == 503
    assert "did you mean n_gpu_layers" in unknown.json()["detail"]


def test_nothing_is_left_of_it_when_it_is_terminated(launched: Platform) -> None:
    assert servers(launched)

    done = launched.command("terminate", "--model-uid", NAME)

    assert done.returncode == 0, done.stderr
    assert not servers(launched)
    assert not launched.replicas
