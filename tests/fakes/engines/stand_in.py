# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for engines that need a GPU: their commands, routes and streams, and no model.

This folder goes on the path of a test, where `vllm`, `sglang` and `tensorrt_llm` are then found.
Each refuses flags that the engine does not have. The answer to every prompt is `STAND_IN_ANSWER`, a
JSON list of pieces, of which each byte is a token. What was asked is written to `STAND_IN_LOG`.
"""

import json
import os
import threading
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REFUSES, FAILS_LATER, BREAKS = "666", "667", "668"
"""Tokens whose bias makes a request go wrong: at once, in the stream, without a word."""
ABORTED = "aborted"


@dataclass(frozen=True)
class StandIn:
    """One engine's ways."""

    key: str
    """Asked of callers; empty: none."""
    prefix: str
    """Of its metrics."""
    stop_name: str
    """What its answers call the text or token that ended them."""
    max_model_len: int | None
    """None: its list of models does not say."""
    tells_token_ids: bool


def parser(flags: dict[str, str], dash: str) -> ArgumentParser:
    """Return what reads a command line of these flags and no others."""
    words = ArgumentParser(allow_abbrev=False)
    for name, kind in flags.items():
        flag = "--" + name.replace("_", dash)
        if kind == "switch":
            words.add_argument(flag, dest=name, action="store_true")
        elif kind == "either":
            words.add_argument(flag, dest=name, action=BooleanOptionalAction)
        else:
            words.add_argument(flag, dest=name, nargs="+" if kind == "list" else None)
    return words


def note(what: dict[str, Any]) -> None:
    """Write something down for the test."""
    path = os.environ.get("STAND_IN_LOG")
    if path:
        with Path(path).open("a") as log:
            log.write(json.dumps(what) + "\n")


def serve(options: Namespace, ways: StandIn) -> None:
    """Answer until killed."""
    note({"options": {k: v for k, v in vars(options).items() if v not in (None, False)}})
    if os.environ.get("STAND_IN_ENDS"):
        raise SystemExit(os.environ["STAND_IN_ENDS"])
    began = time.monotonic()
    counts = {"prompt_tokens_total": 0, "generation_tokens_total": 0}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/health":
                wait = float(os.environ.get("STAND_IN_LOADS_SECONDS", "0"))
                self.answer(200 if time.monotonic() - began >= wait else 503, b"")
            elif self.path == "/metrics":
                lines = [f'{ways.prefix}{name}{{model="m"}} {n}' for name, n in counts.items()]
                self.answer(200, "\n".join(["# HELP", *lines, ""]).encode(), "text/plain")
            elif self.is_known() and self.path == "/v1/models":
                about = {"id": "model", "max_model_len": ways.max_model_len}
                self.answer(200, json.dumps({"object": "list", "data": [about]}).encode())

        def is_known(self) -> bool:
            if not ways.key or self.headers.get("Authorization") == f"Bearer {ways.key}":
                return True
            self.answer(401, b'{"error": "Unauthorized"}')
            return False

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.is_known():
                return
            note({"asked": asked})
            biased = asked.get("logit_bias", {})
            if REFUSES in biased:
                error = {"message": "the stand-in refuses", "type": "BadRequestError", "code": 400}
                self.answer(400, json.dumps({"error": error}).encode())
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                self.stream(asked, biased)
            except OSError:
                note({ABORTED: True})

        def stream(self, asked: dict[str, Any], biased: dict[str, Any]) -> None:
            assert asked["stream_options"]["include_usage"]
            pieces = json.loads(os.environ.get("STAND_IN_ANSWER", '["Hi"]'))
            delay = float(os.environ.get("STAND_IN_DELAY", "0"))
            num_prompt, num_generated, text = len(asked["prompt"]), 0, ""
            reason, stopped_by = "stop", None

            def usage() -> dict[str, Any]:
                return {
                    "prompt_tokens": num_prompt,
                    "completion_tokens": num_generated,
                    "prompt_tokens_details": {"cached_tokens": 1},
                }

            def write(choices: list[dict[str, Any]]) -> None:
                chunk = {"object": "text_completion", "choices": choices, "usage": usage()}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()

            with lock:
                counts["prompt_tokens_total"] += num_prompt
            for piece in pieces:
                time.sleep(delay)
                room = asked["max_tokens"] - num_generated
                told = piece.encode()[:room].decode(errors="ignore")
                stops = [stop for stop in asked.get("stop", []) if stop in text + told]
                if stops:
                    told = (text + told).split(stops[0])[0][len(text) :]
                    stopped_by = stops[0]
                num_generated += len(told.encode()) + (len(stops[0].encode()) if stops else 0)
                text += told
                with lock:
                    counts["generation_tokens_total"] += len(told.encode())
                choice: dict[str, Any] = {"index": 0, "text": told, "finish_reason": None}
                if ways.tells_token_ids and asked.get("return_token_ids"):
                    choice["token_ids"] = [*told.encode()]
                write([choice])
                if FAILS_LATER in biased:
                    error = {"error": {"message": "the stand-in fails", "code": 500}}
                    self.wfile.write(f"data: {json.dumps(error)}\n\n".encode())
                    return
                if BREAKS in biased:
                    return
                if stops:
                    break
                if num_generated >= asked["max_tokens"]:
                    reason = "length"
                    break
            last = {"index": 0, "text": "", "finish_reason": reason, ways.stop_name: stopped_by}
            write([last])
            write([])
            self.wfile.write(b"data: [DONE]\n\n")

    ThreadingHTTPServer((options.host, int(options.port)), Handler).serve_forever()
