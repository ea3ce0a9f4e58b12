# SPDX-License-Identifier: Apache-2.0
"""`chat` and `generate`, with lines piped in and on a terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.cli.conftest import Run
from tests.fakes.http import DEADLINE_SECONDS, Reply, Script, events

MODEL = {"id": "m", "model_type": "LLM", "model_ability": ["generate", "chat"]}


def chat_chunk(text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def answer(*texts: str) -> Reply:
    chunks = [chat_chunk(text) for text in texts]
    return Reply(pieces=[events(*chunks, chat_chunk("", "stop"), "[DONE]")])


def whole(text: str) -> Reply:
    return Reply(json={"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture(autouse=True)
def _model(script: Script) -> None:
    script.replies["GET /v1/models/m"] = Reply(json=MODEL)


@pytest.mark.parametrize("stream", [True, False])
def test_each_line_piped_in_is_a_turn_and_what_was_said_is_kept(
    script: Script, run: Run, stream: bool
) -> None:
    replies = [answer("Hel", "lo"), answer("Bye")] if stream else [whole("Hello"), whole("Bye")]
    script.replies["POST /v1/chat/completions"] = replies

    done = run(
        *("chat", "--model-uid", "m", "--stream", str(stream), "--max_tokens", "9"),
        typed="hi\n\nsee you\n",
    )

    assert (done.exit_code, done.stdout) == (0, "Hello\nBye\n"), done.stderr
    last = script.asked[-1].body
    assert last["max_tokens"] == 9
    assert last["stream"] is stream
    assert last["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "see you"},
    ]


def test_each_text_to_go_on_from_stands_alone(script: Script, run: Run) -> None:
    chunk = {"choices": [{"index": 0, "text": "upon a time", "finish_reason": "length"}]}
    script.replies["POST /v1/completions"] = Reply(pieces=[events(chunk, "[DONE]")])

    done = run("generate", "--model-uid", "m", typed="Once\n")

    assert (done.exit_code, done.stdout) == (0, "upon a time\n"), done.stderr
    assert script.asked[-1].body == {
        "model": "m",
        "prompt": "Once",
        "max_tokens": 512,
        "stream": True,
    }


def test_a_model_that_cannot_chat_says_what_to_use(script: Script, run: Run) -> None:
    script.replies["GET /v1/models/m"] = Reply(json=MODEL | {"model_ability": ["generate"]})

    done = run("chat", "--model-uid", "m", typed="hi\n")

    assert done.exit_code == 1
    assert "xinference generate --model-uid m" in done.stderr


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=503, json={"detail": "still loading"}),
        Reply(pieces=[events(chat_chunk("Hel"), {"error": {"message": "still loading"}})]),
    ],
)
def test_a_turn_that_fails_ends_a_script_with_1(script: Script, run: Run, reply: Reply) -> None:
    script.replies["POST /v1/chat/completions"] = reply

    done = run("chat", "--model-uid", "m", typed="hi\nagain\n")

    assert done.exit_code == 1
    assert "still loading" in done.stderr.splitlines()[-1]
    assert sum(asked.method == "POST" for asked in script.asked) == 1


class Terminal:
    """The other end of a terminal on which the program runs."""

    def __init__(self, descriptor: int, process: "subprocess.Popen[bytes]") -> None:
        self._descriptor = descriptor
        self.process = process
        self.shown = b""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` is shown after what was waited for last."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text.encode() not in self.shown:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._descriptor], [], [], max(left, 0))
            assert ready, f"{text!r} was not shown, but {self.shown!r}"
            self.shown += os.read(self._descriptor, 4096)
        _, self.shown = self.shown.split(text.encode(), 1)

    def end(self) -> int:
        """Read what is left; return the exit code."""
        code = self.process.wait(DEADLINE_SECONDS)
        with suppress(OSError):
            while piece := os.read(self._descriptor, 4096):
                self.shown += piece
        return code

    def interrupt_until_it_ends(self) -> None:
        """Press Ctrl-C; again where it fell into the moment before readline listens for it."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)


@contextmanager
def terminal(endpoint: str, *words: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "xinference", *words],
        env=os.environ | {"XINFERENCE_ENDPOINT": endpoint, "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(DEADLINE_SECONDS)
        os.close(ours)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(script: Script, endpoint: str) -> None:
    script.replies["POST /v1/chat/completions"] = [
        Reply(pieces=[events(chat_chunk("a long story"))], hang=True),
        answer("short"),
    ]

    with terminal(endpoint, "chat", "--model-uid", "m") as screen:
        screen.wait_for("User: ")
        screen.type("tell me\n")
        screen.wait_for("a long story")
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for("[stopped]")
        assert script.has_left.wait(DEADLINE_SECONDS)
        screen.wait_for("User: ")
        screen.type("and?\n")
        screen.wait_for("short")
        screen.wait_for("User: ")
        screen.type("\n")
        assert screen.end() == 0, screen.shown

    assert [turn["content"] for turn in script.asked[-1].body["messages"]] == [
        "tell me",
        "a long story",
        "and?",
    ]


def test_on_a_terminal_a_turn_that_fails_is_shown_and_the_chat_goes_on(
    script: Script, endpoint: str
) -> None:
    script.replies["POST /v1/chat/completions"] = [
        Reply(status=503, json={"detail": "still loading"}),
        answer("here"),
    ]

    with terminal(endpoint, "chat", "--model-uid", "m") as screen:
        screen.wait_for("User: ")
        screen.type("hi\n")
        screen.wait_for("still loading")
        screen.wait_for("User: ")
        screen.type("hi again\n")
        screen.wait_for("here")
        screen.wait_for("User: ")
        screen.type("\x04")
        assert screen.end() == 0, screen.shown

    assert [turn["content"] for turn in script.asked[-1].body["messages"]] == ["hi again"]


def test_ctrl_c_where_nothing_is_said_ends_with_130(endpoint: str) -> None:
    with terminal(endpoint, "chat", "--model-uid", "m") as screen:
        screen.wait_for("User: ")
        screen.interrupt_until_it_ends()
        assert screen.end() == 130, screen.shown

    assert b"Traceback" not in screen.shown
