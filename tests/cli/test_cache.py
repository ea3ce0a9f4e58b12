# SPDX-License-Identifier: Apache-2.0
"""`cached`, `remove-cache`, `download`: what is sent, what is printed, how it ends."""

import json

from tests.cli.conftest import Run
from tests.fakes.http import Reply, Script

VERSION = "qwen--0_5B--pytorch--none"
MODEL = {
    "model_version": VERSION,
    "size_bytes": 1_500_000_000,
    "is_complete": True,
    "used_by": ["my-qwen"],
    "actor_ip_address": "10.0.0.7:9001",
    "path": "/home/cache/huggingface/Qwen--Qwen",
}
KEPT = {"GET /v1/cache/models": Reply(json={"list": [MODEL]})}
FILES = {"paths": ["/a/config.json"], "freed_bytes": 1_500_000_000, "used_by": []}
REMOVABLE = {
    "GET /v1/cache/models/files": Reply(json=FILES),
    "DELETE /v1/cache/models": Reply(json={"result": True, "freed_bytes": 1_500_000_000}),
}


def files(done: int) -> list[dict[str, object]]:
    name = "model.safetensors"
    return [{"file_name": name, "size_bytes": 2_000_000, "downloaded_bytes": done}]


DOWNLOADED = {
    "POST /v1/cache/models": Reply(json={"cache_uid": VERSION}),
    f"GET /v1/cache/models/{VERSION}/progress": [
        Reply(json={"stage": "downloading", "progress": 0.5, "download_files": files(1_000_000)}),
        Reply(json={"stage": "completed", "progress": 1.0, "download_files": files(2_000_000)}),
    ],
    **KEPT,
}


def test_what_is_kept_is_a_table(script: Script, run: Run) -> None:
    script.replies |= KEPT

    done = run("cached", "-n", "qwen", "--worker-ip", "10.0.0.7")

    assert done.exit_code == 0, done.stderr
    for word in ("cached_model:", VERSION, "1.5 GB", "yes", "my-qwen", MODEL["path"]):
        assert word in done.stdout
    assert script.asked[-1].query == "model_name=qwen&worker_ip=10.0.0.7"


def test_what_is_kept_is_json_for_scripts(script: Script, run: Run) -> None:
    script.replies |= KEPT

    assert json.loads(run("cached", "--json").stdout) == [MODEL]


def test_nothing_kept_says_so(script: Script, run: Run) -> None:
    script.replies |= {"GET /v1/cache/models": Reply(json={"list": []})}

    done = run("cached")

    assert (done.exit_code, done.stdout) == (0, "")
    assert "There are no cache files." in done.stderr


def test_what_is_kept_names_the_workers_that_do_not_answer(script: Script, run: Run) -> None:
    told = {"list": [MODEL], "unanswered": ["10.0.0.8:9001", "10.0.0.9:9001"]}
    script.replies |= {"GET /v1/cache/models": Reply(json=told)}

    table, for_scripts = run("cached"), run("cached", "--json")

    assert VERSION in table.stdout
    assert json.loads(for_scripts.stdout) == [MODEL]
    for done in (table, for_scripts):
        assert "10.0.0.8:9001, 10.0.0.9:9001" in done.stderr


def test_a_removal_shows_the_files_and_asks(script: Script, run: Run) -> None:
    script.replies |= REMOVABLE

    kept = run("remove-cache", "--model_version", VERSION, typed="n\n")
    removed = run("remove-cache", "-n", VERSION, typed="y\n")

    assert kept.exit_code == 1
    assert "/a/config.json" in kept.stderr
    assert "1.5 GB" in kept.stderr
    assert removed.exit_code == 0, removed.stderr
    assert f"{VERSION} is removed" in removed.stdout
    deletions = [asked for asked in script.asked if asked.method == "DELETE"]
    assert [asked.query for asked in deletions] == [f"model_version={VERSION}&force=false"]


def test_a_removal_names_the_workers_that_do_not_answer(script: Script, run: Run) -> None:
    told = {**FILES, "unanswered": ["10.0.0.8:9001"]}
    script.replies |= REMOVABLE | {"GET /v1/cache/models/files": Reply(json=told)}

    done = run("remove-cache", "-n", VERSION, "--check")

    assert done.exit_code == 0, done.stderr
    assert "10.0.0.8:9001, too, which does not answer" in done.stderr


def test_a_removal_asks_nothing_when_it_is_told_to(script: Script, run: Run) -> None:
    script.replies |= REMOVABLE

    done = run("remove-cache", "-n", VERSION, "--check", "--force", "--json")

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["result"] is True
    assert script.asked[-1].query.endswith("force=true")


def test_a_removal_of_what_is_used_ends_with_the_reason(script: Script, run: Run) -> None:
    refusal = {"detail": "it is used by my-qwen"}
    script.replies |= REMOVABLE | {"DELETE /v1/cache/models": Reply(status=409, json=refusal)}

    done = run("remove-cache", "-n", VERSION, "--check")

    assert done.exit_code == 1
    assert "used by my-qwen" in done.stderr


def test_a_download_tells_of_its_files_and_says_where_it_is(script: Script, run: Run) -> None:
    script.replies |= DOWNLOADED

    done = run("download", "-n", "qwen", "-s", "0.5", "--download-hub", "modelscope")

    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{MODEL['path']} on 10.0.0.7:9001: 1.5 GB\n"
    assert "downloading" in done.stderr
    assert "model.safetensors, 2.0 MB" in done.stderr
    assert script.asked[0].body == {
        "model_name": "qwen",
        "model_type": "LLM",
        "model_size_in_billions": "0.5",
        "download_hub": "modelscope",
    }


def test_a_download_that_fails_ends_with_the_reason(script: Script, run: Run) -> None:
    failed = {"stage": "error", "progress": 0.1, "info": "no such model", "download_files": []}
    script.replies |= DOWNLOADED | {
        f"GET /v1/cache/models/{VERSION}/progress": Reply(json=failed),
    }

    done = run("download", "-n", "qwen")

    assert done.exit_code == 1
    assert "no such model" in done.stderr
