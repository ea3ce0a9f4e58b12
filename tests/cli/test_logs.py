# SPDX-License-Identifier: Apache-2.0
"""`logs`: what is asked, and how lines are printed."""

import json

import pytest

from tests.cli.conftest import Run
from tests.fakes.http import Reply, Script, events

LINE = {
    "time": 1.25,
    "level": "ERROR",
    "node": "10.0.0.7:9001",
    "replica": "qwen-rep1",
    "process": "replica[7]",
    "logger": "xinference.engine",
    "request_id": "req-1",
    "message": "it failed\nTraceback: \x1b[31mwhy\x1b]0;title\x07",
}
BATCH = {"lines": [LINE], "silent": [], "cursor": "c1"}
SILENT = [{"node": "10.0.0.9:9001", "problem": "no answer within 3 s"}]
OF_MODEL = "GET /v1/models/qwen/logs"


def test_lines_are_printed_with_their_replica(script: Script, run: Run) -> None:
    script.replies |= {OF_MODEL: Reply(json=BATCH)}

    done = run("logs", "qwen", "--lines", "5", "--replica", "1", "--level", "warning")

    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith(
        ".250 ERROR   qwen-rep1 xinference.engine [req-1]: it failed\nTraceback: why]0;title\n"
    )
    assert script.asked[-1].query == "lines=5&replica=1&level=WARNING"


def test_lines_are_json_for_scripts(script: Script, run: Run) -> None:
    script.replies |= {OF_MODEL: Reply(json=BATCH)}

    assert json.loads(run("logs", "--model-uid", "qwen", "--json").stdout) == LINE


def test_a_host_that_does_not_answer_is_named(script: Script, run: Run) -> None:
    script.replies |= {OF_MODEL: Reply(json={**BATCH, "silent": SILENT})}

    done = run("logs", "qwen")

    assert done.stderr.strip() == "No lines of 10.0.0.9:9001: no answer within 3 s"
    assert "it failed" in done.stdout


def test_a_hosts_own_log_is_asked_for_by_its_name(script: Script, run: Run) -> None:
    own = {**LINE, "replica": None, "request_id": None, "process": "worker[4]", "message": "hi"}
    script.replies |= {"GET /v1/cluster/logs": Reply(json={**BATCH, "lines": [own]})}

    done = run("logs", "--node", "10.0.0.7")

    assert done.stdout.endswith("ERROR   10.0.0.7:9001 worker[4] xinference.engine: hi\n")
    assert "node=10.0.0.7" in script.asked[-1].query


def test_following_goes_on_where_the_server_ended_a_stream(script: Script, run: Run) -> None:
    more = {**BATCH, "lines": [{**LINE, "message": "later"}], "cursor": "c2"}
    gone = Reply(status=404, json={"error": {"message": "There is no model qwen."}})
    script.replies |= {
        OF_MODEL: [
            Reply(pieces=[events(BATCH, "[DONE]")]),
            Reply(pieces=[events(more, "[DONE]")]),
            gone,
        ]
    }

    done = run("logs", "qwen", "-f", "--json")

    printed = [json.loads(one)["message"] for one in done.stdout.splitlines()]
    assert printed == [LINE["message"], "later"]
    assert [one.query.partition("cursor=")[2] for one in script.asked] == [
        "",
        "c1&follow=true",
        "c2&follow=true",
    ]
    assert done.exit_code == 1
    assert "There is no model qwen" in done.stderr


@pytest.mark.parametrize(
    "words", [(), ("qwen", "--node", "10.0.0.7"), ("--node", "10.0.0.7", "--replica", "0")]
)
def test_words_that_make_no_sense_are_refused(run: Run, words: tuple[str, ...]) -> None:
    done = run("logs", *words)

    assert done.exit_code == 2
