# SPDX-License-Identifier: Apache-2.0
"""`FakeHub`: a server on loopback that speaks Hugging Face's and ModelScope's interface.

It serves what a test puts into it, large files by a redirect to a storage address that expires, as
the real ones do. A test may let it cut connections, corrupt or hold bytes back, refuse, or leave
sizes out; every request is recorded. `tests/catalog/downloads/test_fake_hub.py` holds it to the
real client library.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_BYTES = 1024
"""Files of this size and more are in large-file storage."""
HOLD_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """A request for the bytes of a file."""

    path: str
    start: int
    token: str | None


@dataclass
class Repository:
    """One model. Its commit follows from its files."""

    files: dict[str, bytes]
    is_gated: bool = False
    tells_sizes: bool = True

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()


@dataclass
class Faults:
    """What goes wrong, by file."""

    cuts: dict[str, list[int]] = field(default_factory=dict)
    """The next answer ends after so many bytes, the one after it after the next number, …"""
    corrupts: dict[str, int] = field(default_factory=dict)
    """So many answers have a wrong byte."""
    holds: dict[str, list[int]] = field(default_factory=dict)
    """The next answer has so many bytes and then nothing more until `release`, …"""
    sizes: dict[str, int] = field(default_factory=dict)
    """What is told instead of the size."""
    status: int | None = None
    """Every request is answered so."""
    ignores_ranges: bool = False


class FakeHub:
    """The state of the server; a test changes it while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.asked: list[Asked] = []
        self.listed: list[str] = []
        self.endpoint = ""
        self.storage = ""
        """Another host, as far as a client can see."""
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._held = threading.Event()

    def add(self, model_id: str, files: dict[str, bytes], **about: Any) -> Repository:
        """Put a repository there; it replaces an earlier one."""
        self.repositories[model_id] = Repository(files, **about)
        return self.repositories[model_id]

    def add_directory(self, model_id: str, directory: Path) -> Repository:
        """Put the files of a directory there."""
        files = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        return self.add(model_id, files)

    def starts_of(self, path: str) -> list[int]:
        """Return where each answer with bytes of a file began."""
        return [one.start for one in self.asked if one.path == path]

    def wait_held(self, timeout_seconds: float = 20.0) -> None:
        """Return when a transfer is held."""
        assert self._held.wait(timeout_seconds), "nothing was held"

    def release(self) -> None:
        """Let what is held go on, and hold nothing from now on."""
        self._released.set()

    def start_afresh(self) -> None:
        """Forget what was asked and what went wrong; what is served stays."""
        self.release()
        self._released.clear()
        self._held.clear()
        self.faults = Faults()
        self.asked.clear()
        self.listed.clear()

    def environment(self) -> dict[str, str]:
        """Return the variables that lead to it, also where tests keep to what is there."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "MODELSCOPE_DOMAIN": self.endpoint,
        }

    def take(self, fault: dict[str, list[int]], path: str) -> int | None:
        """Return after how many bytes a fault happens to this answer; None: not at all."""
        with self._lock:
            left = fault.get(path)
            return left.pop(0) if left else None

    def take_corruption(self, path: str) -> bool:
        with self._lock:
            left = self.faults.corrupts.get(path, 0)
            self.faults.corrupts[path] = max(0, left - 1)
        return left > 0

    def hold(self) -> None:
        self._held.set()
        self._released.wait(HOLD_SECONDS)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self.hub.faults.status is not None:
            self._send(self.hub.faults.status, b"{}")
            return
        match parts:
            case ["api", "models", owner, name, "tree", revision]:
                self._list_tree(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, *revision]:
                wanted = revision[-1] if revision else "main"
                self._list_as_hugging_face(f"{owner}/{name}", wanted)
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self._list_as_model_scope(f"{owner}/{name}", query)
            case ["api", "v1", "models", owner, name, "repo"]:
                self._give(f"{owner}/{name}", query["FilePath"], {})
            case ["storage", owner, name, *path]:
                self._give(f"{owner}/{name}", "/".join(path), {})
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._refuse("EntryNotFound", 404)

    def _list_as_hugging_face(self, model_id: str, revision: str) -> None:
        repository = self._repository(model_id, revision)
        if repository is None:
            return
        self.hub.listed.append(f"huggingface:{model_id}")
        siblings = []
        for path, content in repository.files.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if repository.tells_sizes:
                sibling |= {"size": self._size(path, content), "blobId": git_name(content)}
                if len(content) >= LARGE_BYTES:
                    sibling["lfs"] = {
                        "sha256": sha256(content),
                        "size": self._size(path, content),
                        "pointerSize": 134,
                    }
            siblings.append(sibling)
        about = {"id": model_id, "modelId": model_id, "sha": repository.commit}
        self._send(200, json.dumps({**about, "siblings": siblings}).encode())

    def _list_tree(self, model_id: str, revision: str) -> None:
        """Answer the other form of list, which the hub's own library uses."""
        repository = self._repository(model_id, revision)
        if repository is None:
            return
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": git_name(content)}
            | (
                {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}}
                if len(content) >= LARGE_BYTES
                else {}
            )
            for path, content in repository.files.items()
        ]
        self._send(200, json.dumps(tree).encode())

    def _list_as_model_scope(self, model_id: str, query: dict[str, str]) -> None:
        repository = self.hub.repositories.get(model_id)
        if repository is None or query.get("Revision") not in ("master", "v1"):
            told = {"Code": 10010205001, "Success": False, "Message": "record not found"}
            self._send(404, json.dumps(told).encode())
            return
        self.hub.listed.append(f"modelscope:{model_id}")
        files: list[dict[str, Any]] = [
            {
                "Name": path.rpartition("/")[2],
                "Path": path,
                "Type": "blob",
                "Size": self._size(path, content),
                "Sha256": sha256(content),
            }
            for path, content in repository.files.items()
        ]
        folders = {path.rpartition("/")[0] for path in repository.files} - {""}
        files += [{"Name": one, "Path": one, "Type": "tree", "Size": 0} for one in folders]
        answer = {"Code": 200, "Success": True, "Data": {"Files": files}}
        self._send(200, json.dumps(answer).encode())

    def _resolve(self, model_id: str, revision: str, path: str) -> None:
        repository = self._repository(model_id, revision)
        if repository is None:
            return
        content = repository.files.get(path)
        if content is None:
            self._refuse("EntryNotFound", 404)
            return
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if len(content) < LARGE_BYTES:
            self._give(model_id, path, headers | {"ETag": f'"{git_name(content)}"'})
            return
        headers |= {
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{sha256(content)}"',
            "Location": f"{self.hub.storage}/storage/{model_id}/{quote(path)}?Expires=1",
        }
        self._send(302, b"", headers)

    def _give(self, model_id: str, path: str, headers: dict[str, str]) -> None:
        """Send a file, or the rest of it, as far as the faults let it."""
        faults = self.hub.faults
        content = self.hub.repositories[model_id].files.get(path)
        if content is None:
            self._refuse("EntryNotFound", 404)
            return
        start = 0
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and not faults.ignores_ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        if start >= len(content) > 0:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[start:]
        if self.command == "GET":
            token = self.headers.get("Authorization")
            self.hub.asked.append(Asked(path, start, token))
            if body and self.hub.take_corruption(path):
                body = bytes([body[0] ^ 1]) + body[1:]
        if start:
            last = len(content) - 1
            headers |= {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
        self._send(206 if start else 200, body, headers, path)

    def _repository(self, model_id: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(model_id)
        if repository is None:
            self._refuse("RepoNotFound", 401)
        elif revision not in ("main", "v1", repository.commit):
            self._refuse("RevisionNotFound", 404)
        elif repository.is_gated and not self.headers.get("Authorization"):
            self._refuse("GatedRepo", 401)
        else:
            return repository
        return None

    def _size(self, path: str, content: bytes) -> int:
        return self.hub.faults.sizes.get(path, len(content))

    def _refuse(self, code: str, status: int) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code}, it says."})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.take(self.hub.faults.cuts, path)
        held = self.hub.take(self.hub.faults.holds, path)
        try:
            if cut is not None:
                self.wfile.write(body[:cut])
                self.wfile.flush()
                self.close_connection = True
                return
            if held is not None:
                self.wfile.write(body[:held])
                self.wfile.flush()
                self.hub.hold()
                body = body[held:]
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # whoever asked has gone


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_name(content: bytes) -> str:
    """Return what git calls a content."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve a hub until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        hub.storage = f"http://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="fake hub")
        thread.start()
        try:
            yield hub
        finally:
            hub.release()
            server.shutdown()
            thread.join()
