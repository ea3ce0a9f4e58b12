# SPDX-License-Identifier: Apache-2.0
"""`launch`, `list`, `terminate`, `stop-cluster`: what is sent, what is printed, how it ends."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.cli.conftest import Run
from tests.fakes.http import DEADLINE_SECONDS, Reply, Script
from xinference.cli.models import engine_options

MODEL = {
    "id": "a-model-with-a-rather-long-name-that-no-table-may-cut",
    "model_type": "LLM",
    "model_name": "qwen",
    "model_format": "pytorch",
    "model_size_in_billions": 4,
    "quantization": "none",
}
LAUNCH = ["launch", "--model-engine", "transformers", "-n", "qwen"]
LAUNCHED = {
    "POST /v1/models": Reply(json={"model_uid": "m"}),
    "GET /v1/models/instances": Reply(json=[{"model_uid": "m"}]),
    "GET /v1/models/m/progress": [
        Reply(json={"progress": 0.0, "stage": "pending"}),
        Reply(status=503, json={"detail": "the supervisor is away"}),
        Reply(json={"progress": 0.8, "stage": "loading"}),
        Reply(json={"progress": 1.0, "stage": "completed"}),
    ],
}


def test_a_launch_waits_until_the_model_answers(script: Script, run: Run) -> None:
    script.replies |= LAUNCHED

    done = run(*LAUNCH, "-s", "4", "-f", "pytorch", "-q", "none")

    assert done.exit_code == 0, done.stderr
    assert done.stdout == "Model uid: m\n"
    assert "loading" in done.stderr
    launch = script.asked[0]
    assert launch.query == "wait_ready=false"
    assert launch.body == {
        "model_name": "qwen",
        "model_type": "LLM",
        "model_engine": "transformers",
        "model_size_in_billions": "4",
        "model_format": "pytorch",
        "quantization": "none",
        "replica": 1,
        "n_worker": 1,
        "n_gpu": "auto",
    }


def test_every_word_of_a_launch_reaches_the_server(script: Script, run: Run) -> None:
    script.replies |= LAUNCHED

    done = run(
        *LAUNCH,
        *("--model_uid", "m", "--context_length", "512", "--n-gpu", "none", "--gpu-idx", "0,1"),
        *("--env", "A", "0", "--env", "B", "1", "--trust-remote-code", "true"),
        *("--model-path", "/files", "--worker-ip", "10.0.0.1", "--replica", "2"),
        *("--enable-thinking", "--lora-modules", "l", "/l", "--disable-virtual-env"),
        *("-qc", "load_in_4bit", "true", "-vp", "numpy", "--json"),
        *("--min-replicas", "1", "--max-replicas", "4", "--idle-timeout", "600"),
        "--autoload",
        *("--max_num_seqs", "8", "--dtype=float32", "--kv-cache-bytes", "-1"),
    )

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"model_uid": "m"}
    sent = script.asked[0].body
    assert {
        "model_uid": "m",
        "context_length": 512,
        "n_gpu": None,
        "gpu_idx": [0, 1],
        "envs": {"A": "0", "B": "1"},
        "trust_remote_code": True,
        "model_path": "/files",
        "worker_ip": "10.0.0.1",
        "replica": 2,
        "min_replicas": 1,
        "max_replicas": 4,
        "idle_timeout": 600.0,
        "autoload": True,
        "enable_thinking": True,
        "enable_virtual_env": False,
        "quantization_config": {"load_in_4bit": True},
        "virtual_env_packages": ["numpy"],
        "max_num_seqs": 8,
        "dtype": "float32",
        "kv_cache_bytes": -1,
    }.items() <= sent.items()
    assert sent["peft_model_config"]["lora_list"] == [{"lora_name": "l", "local_path": "/l"}]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--a", "None", "--b", "true", "--c", "1.5"], {"a": None, "b": True, "c": 1.5}),
        (["--a", '{"x": [1]}', "--b", "text", "--c="], {"a": {"x": [1]}, "b": "text", "c": ""}),
        ([], {}),
    ],
)
def test_engine_options_are_read_as_values(words: list[str], options: dict[str, object]) -> None:
    assert engine_options(words) == options


@pytest.mark.parametrize(
    "words",
    [
        ["launch", "--model-engine", "transformers"],
        [*LAUNCH, "--max_num_seqs"],
        [*LAUNCH, "--a", "--b", "1"],
        [*LAUNCH, "stray"],
        [*LAUNCH, "--n-gpu", "many"],
        [*LAUNCH, "--gpu-idx", "a"],
        [*LAUNCH, "--replica-config", "{"],
        [*LAUNCH, "--wait-ready", "false"],
        ["list", "-e", "localhost:9997"],
        ["no-such-command"],
    ],
)
def test_wrong_words_end_with_2_before_anything_is_sent(
    script: Script, run: Run, words: list[str]
) -> None:
    done = run(*words)

    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert script.asked == []


def test_a_malformed_setting_ends_with_2_and_an_unknown_one_is_a_warning(
    script: Script, run: Run
) -> None:
    script.replies["GET /v1/models"] = Reply(json={"data": []})

    malformed = run("list", XINFERENCE_DISABLE_METRICS="maybe")
    unknown = run("list", XINFERENCE_HOMES="/x")

    assert malformed.exit_code == 2
    assert "XINFERENCE_DISABLE_METRICS" in malformed.stderr
    assert unknown.exit_code == 0
    assert "XINFERENCE_HOME?" in unknown.stderr


def test_a_launch_that_fails_prints_the_cause_and_ends_with_1(script: Script, run: Run) -> None:
    script.replies |= LAUNCHED | {
        "GET /v1/models/m/progress": Reply(json={"progress": 0.8, "stage": "error"}),
        "GET /v1/models/instances": Reply(
            json=[{"model_uid": "m", "replica_statuses": [{"error_message": "no config.json"}]}]
        ),
    }

    done = run(*LAUNCH)

    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "Error: m could not be launched: no config.json"


@pytest.mark.parametrize(
    ("stage", "instances"), [("cancelled", [{"model_uid": "m"}]), ("pending", [])]
)
def test_a_launch_that_somebody_else_cancels_ends_with_1(
    script: Script, run: Run, stage: str, instances: list[object]
) -> None:
    script.replies |= LAUNCHED | {
        "GET /v1/models/m/progress": Reply(json={"progress": 0.0, "stage": stage}),
        "GET /v1/models/instances": Reply(json=instances),
    }

    done = run(*LAUNCH)

    assert done.exit_code == 1
    assert "cancelled" in done.stderr


def test_a_refused_launch_is_one_line(script: Script, run: Run) -> None:
    script.replies["POST /v1/models"] = Reply(
        status=400, json={"detail": "enable_thinking: no model of this version has it"}
    )

    done = run(*LAUNCH, "--enable-thinking")

    assert done.exit_code == 1
    assert done.stderr == (
        "Error: Failed to launch qwen, detail: enable_thinking: no model of this version has it\n"
    )


@pytest.mark.parametrize(
    ("cancel", "said"),
    [
        (Reply(json=None), "is cancelled"),
        (Reply(status=404, json={"detail": "gone"}), "is cancelled"),
        (Reply(status=400, json={"detail": "ready"}), "xinference terminate --model-uid m"),
    ],
)
def test_ctrl_c_cancels_a_launch_and_ends_with_130(
    script: Script, endpoint: str, cancel: Reply, said: str
) -> None:
    script.replies |= LAUNCHED | {
        "GET /v1/models/m/progress": Reply(hang=True),
        "POST /v1/models/m/cancel": cancel,
    }

    process = command(endpoint, *LAUNCH)
    wait_for(script, "/v1/models/m/progress")
    process.send_signal(signal.SIGINT)
    printed, chatter = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 130, chatter
    assert printed == ""
    assert said in chatter
    assert "Traceback" not in chatter
    assert script.asked[-1].path == "/v1/models/m/cancel"


def test_ctrl_c_before_the_uid_is_known_still_cancels(script: Script, endpoint: str) -> None:
    script.replies |= LAUNCHED | {
        "POST /v1/models": Reply(json={"model_uid": "m"}, hold=True),
        "POST /v1/models/m/cancel": Reply(json=None),
    }

    process = command(endpoint, *LAUNCH)
    wait_for(script, "/v1/models")
    process.send_signal(signal.SIGINT)
    script.release()
    _, chatter = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 130, chatter
    assert script.asked[-1].path == "/v1/models/m/cancel"


def command(endpoint: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "xinference", *words],
        env=os.environ | {"XINFERENCE_ENDPOINT": endpoint},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(script: Script, path: str) -> None:
    while script.asked_paths.get(timeout=DEADLINE_SECONDS) != path:
        pass


def test_the_running_models_are_a_table_or_json(script: Script, run: Run) -> None:
    script.replies["GET /v1/models"] = Reply(json={"data": [MODEL]})

    table = run("list")
    as_json = run("list", "--json")

    assert table.exit_code == 0
    for shown in ("UID", "Size (in billions)", MODEL["id"], "pytorch"):
        assert str(shown) in table.stdout
    assert json.loads(as_json.stdout) == [MODEL]


def test_an_empty_list_says_so_but_prints_nothing(script: Script, run: Run) -> None:
    script.replies["GET /v1/models"] = Reply(json={"data": []})

    done = run("list")

    assert (done.exit_code, done.stdout) == (0, "")
    assert "No model is running" in done.stderr


STATUS = {
    "uptime": 3725,
    "workers": {
        "10.0.0.1:9": {
            "update_time": 1,
            "state": "suspect",
            "num_replicas": 2,
            "status": {
                "cpu": {"usage": 0.5, "memory_used": 2**30, "memory_total": 2**32},
                "0": {"mem_used": 2**31, "mem_total": 2**33, "quarantine": "GPU 0 is held"},
            },
        }
    },
}
INSTANCE = {
    "model_uid": "m",
    "status": "READY",
    "replica_statuses": [
        {
            "replica_id": 1,
            "state": "backing off",
            "worker_address": "10.0.0.1:9",
            "gpu_idx": [0],
            "num_restarts": 7,
            "error_message": "signal SIGKILL",
        }
    ],
}
EVENT = {"event_type": "WARNING", "event_ts": 5, "event_content": "It died."}


def test_the_status_shows_nodes_replicas_and_events(script: Script, run: Run) -> None:
    script.replies |= {
        "GET /status": Reply(json=STATUS),
        "GET /v1/models/instances": Reply(json=[INSTANCE]),
        "GET /v1/models/m/events": Reply(json=[EVENT]),
    }

    tables = run("status")
    as_json = run("status", "--json")

    assert tables.exit_code == 0, tables.stderr
    assert "1:02:05" in tables.stderr
    for shown in ("suspect", "50%", "1.0 of 4.0 GiB", "0: 2.0 of 8.0 GiB", "backing off", "7",
                  "GPU 0 is held", "signal SIGKILL", "It died."):  # fmt: skip
        assert shown in tables.stdout
    said = json.loads(as_json.stdout)
    assert said["nodes"][0]["address"] == "10.0.0.1:9"
    assert said["models"] == [INSTANCE]
    assert said["events"] == [{"model_uid": "m", **EVENT}]


def replicas(*ids: int) -> Reply:
    return Reply(json=[{"replica_id": one, "status": "READY"} for one in ids])


def test_scale_adds_what_is_missing(script: Script, run: Run) -> None:
    script.replies |= {
        "GET /v1/models/m/replicas": [replicas(0), replicas(0, 1, 2)],
        "POST /v1/models/m/replicas": Reply(json={"replica": 2, "replicas": []}),
    }

    done = run("scale", "-u", "m", "-r", "3")

    assert (done.exit_code, done.stdout) == (0, "m has 3 replicas.\n"), done.stderr
    (added,) = [asked for asked in script.asked if asked.method == "POST"]
    assert added.body["replica"] == 2


def test_scale_removes_what_is_too_much_and_leaves_what_is_going_alone(
    script: Script, run: Run
) -> None:
    going = {"replica_id": 3, "status": "TERMINATING"}
    there = [*replicas(0, 1, 2).json, going]
    script.replies |= {
        "GET /v1/models/m/replicas": [Reply(json=there), replicas(0)],
        "DELETE /v1/models/m/replicas/1": Reply(json={"remaining_replicas": 2}),
        "DELETE /v1/models/m/replicas/2": Reply(json={"remaining_replicas": 1}),
    }

    done = run("scale", "-u", "m", "-r", "1", "--json")

    assert json.loads(done.stdout) == {"model_uid": "m", "replicas": [0]}
    removed = [asked.path for asked in script.asked if asked.method == "DELETE"]
    assert removed == ["/v1/models/m/replicas/1", "/v1/models/m/replicas/2"]


def test_terminate_is_quiet_and_names_what_is_unknown(script: Script, run: Run) -> None:
    script.replies["DELETE /v1/models/m"] = Reply(json=None)
    script.replies["DELETE /v1/models/n"] = Reply(
        status=404, json={"detail": "Model not found: n."}
    )

    known = run("terminate", "--model-uid", "m")
    unknown = run("terminate", "--model-uid", "n")

    assert (known.exit_code, known.stdout, known.stderr) == (0, "", "")
    assert unknown.exit_code == 1
    assert unknown.stderr == "Error: Failed to terminate n, detail: Model not found: n.\n"


def test_no_cluster_is_one_line_that_says_how_to_start_one(run: Run) -> None:
    done = run("list", "-e", "http://127.0.0.1:1")

    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "http://127.0.0.1:1" in done.stderr
    assert "xinference-local" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "typed", "is_stopped"),
    [(["--check"], "", True), ([], "y\n", True), ([], "n\n", False), ([], "", False)],
)
def test_a_cluster_is_stopped_when_that_is_confirmed(
    script: Script, run: Run, words: list[str], typed: str, is_stopped: bool
) -> None:
    script.replies["GET /v1/models"] = Reply(json={"data": [MODEL]})
    script.replies["DELETE /v1/clusters"] = Reply(json={"result": True})

    done = run("stop-cluster", *words, typed=typed)

    assert (done.exit_code == 0) is is_stopped
    assert (done.stdout == "Cluster stopped: True\n") is is_stopped
    assert any(asked.method == "DELETE" for asked in script.asked) is is_stopped


def test_the_key_of_the_environment_is_sent(script: Script, run: Run) -> None:
    script.replies["GET /v1/models"] = Reply(json={"data": []})

    run("list", XINFERENCE_API_KEY="one")
    run("list", "-ak", "two", XINFERENCE_API_KEY="one")

    keys = [asked.headers["authorization"] for asked in script.asked]
    assert keys == ["Bearer one", "Bearer two"]
