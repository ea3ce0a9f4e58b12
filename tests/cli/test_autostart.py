# SPDX-License-Identifier: Apache-2.0
"""`autostart`: what is sent and printed."""

import json
from pathlib import Path

from tests.cli.conftest import Run
from tests.fakes.http import Reply, Script

SUMMARY = {
    "model_uid": "chat",
    "model_name": "qwen",
    "enabled": True,
    "priority": 5,
    "num_attempts": 2,
    "problem": "no such file",
    "status": "ERROR",
}


def test_the_list_is_a_table_or_json(script: Script, run: Run) -> None:
    script.replies["GET /v1/autostart/models/summary"] = Reply(json=[SUMMARY])
    script.replies["GET /v1/autostart/models"] = Reply(json={"models": [{"launch": {}}]})

    table, as_json = run("autostart", "list"), run("autostart", "list", "--json")

    for shown in ("chat", "qwen", "ERROR", "no such file"):
        assert shown in table.stdout
    assert json.loads(as_json.stdout) == [{"launch": {}}]


def test_an_entry_is_added_from_a_file_and_removed(
    script: Script, run: Run, tmp_path: Path
) -> None:
    entry = {"launch": {"model_uid": "chat", "model_name": "qwen"}, "priority": 5}
    file = tmp_path / "entry.json"
    file.write_text(json.dumps(entry))
    script.replies["POST /v1/autostart/models"] = Reply(json=SUMMARY)
    script.replies["DELETE /v1/autostart/models/chat"] = Reply(json=None)

    assert run("autostart", "add", str(file)).stdout == "chat starts by itself.\n"
    assert run("autostart", "remove", "chat").stdout == "chat starts by itself no more.\n"
    assert script.asked[0].body == entry


def test_a_file_that_is_not_json_is_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "entry.json"
    file.write_text("launch: x")

    done = run("autostart", "add", str(file))

    assert done.exit_code == 1
    assert "is not JSON" in done.stderr
