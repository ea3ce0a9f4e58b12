# SPDX-License-Identifier: Apache-2.0
"""The bounds of the HTTP server, tried with bare sockets."""

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop

from tests.e2e.platform import wait_until
from xinference.cli import http_server

TLS = Path(__file__).parent / "tls"
DEADLINE_SECONDS = 10.0
QUICK_SECONDS = 0.2
GET = b"GET /body HTTP/1.1\r\nhost: x\r\n\r\n"


class Application:
    """Answers with the length of the body; `/endless` streams until nobody reads."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/endless":
            await self._endless(receive, send)
            return
        if scope["path"] == "/wait":
            self.started.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
            return
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.set()
                return
            num_bytes += len(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % num_bytes})

    async def _endless(self, receive: Any, send: Any) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                # Why: to somebody who left one writes without waiting.
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        self.started.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        self.left.set()


@contextmanager
def served(app: Any, **options: Any) -> Iterator[int]:
    """Serve an application in a thread; give its port."""
    with serving(app, **options) as (_, port):
        yield port


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[tuple[uvicorn.Server, int]]:
    """As `served`; give the server, too."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = http_server.server_of(app, **({"keep_alive_seconds": 5.0} | options))
    thread = threading.Thread(target=lambda: uvloop.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def app() -> Application:
    return Application()


@pytest.fixture
def port(app: Application) -> Iterator[int]:
    with served(app) as port:
        yield port


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)
    connection.settimeout(DEADLINE_SECONDS)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def refusal(received: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    told = json.loads(body)
    assert told["error"]["message"] == told["detail"]
    return int(head.split()[1]), told


def test_a_good_request_is_answered_and_its_connection_kept(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        for num_bytes in (0, 1, 10_000_000):
            assert http.post("/body", content=b"x" * num_bytes).text == str(num_bytes)
        pieces = (b"y" for _ in range(10_000))
        assert http.post("/body", content=pieces).text == "10000"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /body HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 400_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 400_000,
        b"GET /body HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(50_000)),
        b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
        + b"".join(b"x-%d: y\r\n" % n for n in range(50_000)),
    ],
    ids=["one long field", "a long path", "many fields", "many trailers"],
)
def test_a_head_without_end_is_refused(port: int, head: bytes) -> None:
    with connect(port) as connection:
        with contextlib.suppress(OSError):  # refused before all of it was sent
            connection.sendall(head)
        received = read_to_end(connection)

    # A refusal that overtakes what is still being sent may be lost to a reset.
    if received:
        assert refusal(received)[0] == 431


@pytest.mark.parametrize(
    "words",
    [
        b"\x16\x03\x01 this is TLS\r\n\r\n",
        b"BREW\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_a_400_in_our_shape(port: int, words: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(words)
        status, told = refusal(read_to_end(connection))

    assert status == 400
    assert told["error"]["code"] == "bad_request"


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET /bo", GET[:-4], GET + b"GET /bo"])
def test_a_head_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, app: Application, begun: bytes
) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", QUICK_SECONDS)
    with served(app, keep_alive_seconds=60.0) as port, connect(port) as connection:
        connection.sendall(begun)
        received = read_to_end(connection)

    assert refusal(received[received.rindex(b"HTTP/1.1") :])[0] == 408


def test_a_body_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, app: Application
) -> None:
    monkeypatch.setattr(http_server, "BODY_SECONDS", QUICK_SECONDS)
    with served(app) as port, connect(port) as connection:
        connection.sendall(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf")

        assert refusal(read_to_end(connection))[0] == 408
        assert app.left.wait(DEADLINE_SECONDS)


def test_a_request_that_has_come_may_take_longer_than_one_that_has_not(
    monkeypatch: pytest.MonkeyPatch, app: Application
) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", QUICK_SECONDS)
    monkeypatch.setattr(http_server, "BODY_SECONDS", QUICK_SECONDS)
    with served(app) as port, connect(port) as patient, connect(port) as slow:
        patient.sendall(GET + GET.replace(b"/body", b"/wait"))
        assert app.started.wait(DEADLINE_SECONDS)
        slow.sendall(b"GET /bo")
        assert refusal(read_to_end(slow))[0] == 408

        # By now every deadline of the first has passed as well.
        assert not app.left.is_set()
        patient.setblocking(False)
        received = patient.recv(65536)
        assert received.count(b"HTTP/1.1") == 1
        with pytest.raises(BlockingIOError):
            patient.recv(1)


@pytest.mark.parametrize(
    "begun", [b"POST /bo", b"POST /body HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"]
)
def test_a_request_that_is_cut_short_is_refused(port: int, begun: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(begun)
        connection.shutdown(socket.SHUT_WR)

        assert refusal(read_to_end(connection))[0] == 400


def test_a_client_that_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, app: Application
) -> None:
    monkeypatch.setattr(http_server, "WRITE_SECONDS", QUICK_SECONDS)
    with served(app) as port, connect(port) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")

        assert app.left.wait(DEADLINE_SECONDS)


def test_a_client_that_reads_slowly_is_not(
    monkeypatch: pytest.MonkeyPatch, app: Application
) -> None:
    monkeypatch.setattr(http_server, "WRITE_SECONDS", 1.0)
    with served(app) as port, connect(port) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(4):
            assert not app.left.wait(0.4)
            for _ in range(100):
                assert connection.recv(65536)


def test_an_idle_connection_is_closed(app: Application) -> None:
    with served(app, keep_alive_seconds=QUICK_SECONDS) as port, connect(port) as connection:
        connection.sendall(GET)

        assert read_to_end(connection).startswith(b"HTTP/1.1 200")


def test_one_connection_too_many_is_told_so_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, app: Application
) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)
    with served(app) as port, connect(port) as one, connect(port) as two:
        for connection in (one, two):
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with connect(port) as third:
            received = read_to_end(third)
        assert refusal(received)[0] == 503
        assert b"retry-after: 5" in received
        one.sendall(GET)
        assert one.recv(65536).startswith(b"HTTP/1.1 200")


def test_f38_connections_leave_descriptors_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, app: Application
) -> None:
    num_files = http_server.NUM_OTHER_FILES + 1
    monkeypatch.setattr(resource, "getrlimit", lambda _: (num_files, num_files))
    with served(app) as port, connect(port) as one:
        one.sendall(GET)
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        with connect(port) as second:
            assert refusal(read_to_end(second))[0] == 503
        one.sendall(GET)
        assert one.recv(65536).startswith(b"HTTP/1.1 200")


def test_too_many_requests_at_once_on_one_connection_are_refused(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(GET.replace(b"/body", b"/wait") + GET * 1000)

        assert refusal(read_to_end(connection))[0] == 400


def test_a_few_requests_at_once_are_answered_in_order(port: int) -> None:
    posts = [
        b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (n, b"x" * n)
        for n in range(9)
    ]
    with connect(port) as connection:
        connection.sendall(b"".join(posts))
        received = b""
        while received.count(b"HTTP/1.1 200") < 9 or not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65536)

    assert [int(part.split(b"\r\n")[1]) for part in received.split(b"\r\n\r\n")[1::2]] == list(
        range(9)
    )


def test_a_request_behind_another_does_not_hide_that_the_client_left(
    port: int, app: Application
) -> None:
    with connect(port) as connection:
        connection.sendall(GET.replace(b"/body", b"/wait") + GET)
        assert app.started.wait(DEADLINE_SECONDS)

    assert app.left.wait(DEADLINE_SECONDS)


@contextmanager
def told_to_end(app: Application) -> Iterator[socket.socket]:
    """Give a connection that has asked nothing yet, to a server that listens no more."""
    with serving(app) as (server, port), connect(port) as connection:
        wait_until(
            "the connection is taken",
            lambda: len(server.server_state.connections) == 1,
            timeout_seconds=DEADLINE_SECONDS,
        )
        server.should_exit = True
        wait_until("nobody listens", lambda: is_refused(port), timeout_seconds=DEADLINE_SECONDS)
        yield connection


def is_refused(port: int) -> bool:
    try:
        connect(port).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


def test_who_has_just_connected_is_answered_by_a_server_that_ends(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "FIRST_REQUEST_SECONDS", DEADLINE_SECONDS)
    with told_to_end(app) as connection:
        connection.sendall(GET)
        received = read_to_end(connection)

    assert received.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in received


def test_a_server_that_ends_does_not_wait_long_for_a_first_request(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "FIRST_REQUEST_SECONDS", QUICK_SECONDS)
    with told_to_end(app) as connection:
        assert read_to_end(connection) == b""


def test_a_certificate_makes_it_https(app: Application) -> None:
    certificate, key = TLS / "certificate.pem", TLS / "key.pem"
    with served(app, ssl_certfile=str(certificate), ssl_keyfile=str(key)) as port:
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted) as http:
            assert http.post("/body", content=b"abc").text == "3"
        with connect(port) as plain:
            plain.sendall(GET)
            assert b"200" not in read_to_end(plain)
