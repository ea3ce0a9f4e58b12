# SPDX-License-Identifier: Apache-2.0
"""Where a replica listens, and who may connect."""

import contextlib
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xinference.cluster.dataplane.address import (
    TcpAddress,
    UnixAddress,
    listening_socket,
    parse_address,
)
from xinference.errors import InsufficientResources, InvalidRequest, InvalidSetting
from xinference.identifiers import Address


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="xi-"))
    yield path
    shutil.rmtree(path)


def test_addresses_read_and_print() -> None:
    assert parse_address("unix:/run/x/a.sock") == UnixAddress(Path("/run/x/a.sock"))
    assert parse_address("tcp:[::1]:80") == TcpAddress(Address("::1", 80))
    assert parse_address("tls:h:80") == TcpAddress(Address("h", 80), is_encrypted=True)
    for text in ("unix:/run/x/a.sock", "tcp:[::1]:80", "tcp:host:80", "tls:[::1]:80"):
        assert str(parse_address(text)) == text


@pytest.mark.parametrize("text", ["", "unix:", "tcp:host", "http://host:80", "tcp:host:high"])
def test_other_texts_are_no_addresses(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_address(text)


def test_a_unix_socket_is_for_its_owner_only(folder: Path) -> None:
    path = folder / "new" / "s.sock"

    listener, address = listening_socket(f"unix:{path}")

    with contextlib.closing(listener):
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_socket_that_was_left_behind_is_replaced(folder: Path) -> None:
    for _ in range(2):
        listener, _ = listening_socket(f"unix:{folder}/s.sock")
        listener.close()

    assert (folder / "s.sock").is_socket()


def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    (folder / "s.sock").write_text("precious")

    with pytest.raises(OSError, match="in use"):
        listening_socket(f"unix:{folder}/s.sock")

    assert (folder / "s.sock").read_text() == "precious"


def test_a_directory_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o755)

    with pytest.raises(InvalidSetting, match="0700"):
        listening_socket(f"unix:{folder}/s.sock")


def test_a_path_that_is_too_long_for_a_socket_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidSetting, match="107 bytes"):
        listening_socket(f"unix:{folder}/{'long' * 30}/s.sock")


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InsufficientResources, match=str(port)):
            listening_socket(f"tcp:127.0.0.1:{port}-{port}")
        listener, address = listening_socket(f"tcp:127.0.0.1:{port}-{min(port + 50, 65535)}")

    with contextlib.closing(listener):
        found = parse_address(address)
        assert isinstance(found, TcpAddress)
        assert port < found.address.port <= port + 50


@pytest.mark.parametrize("listen", ["tcp:127.0.0.1", "tcp:127.0.0.1:a-b", "udp:h:1", "unix:"])
def test_a_malformed_listener_is_refused(listen: str) -> None:
    with pytest.raises(InvalidSetting):
        listening_socket(listen)
