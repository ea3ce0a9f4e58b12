# SPDX-License-Identifier: Apache-2.0
"""Where a replica listens: "unix:<path>", "tcp:host:port", or "tls:host:port" for an encrypted
connection, and how that becomes a socket.

A TCP listener takes the first free port of a range, "tls:host:first-last"; "tls:host:0" takes
any. A unix socket is of mode 0600 in a directory of mode 0700.
"""

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from xinference.errors import InsufficientResources, InvalidRequest, InvalidSetting
from xinference.identifiers import Address

MAX_UNIX_PATH_BYTES = 107
"""What the kernel's address structure holds."""
BACKLOG = 128


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system of this host."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and a port."""

    address: Address
    is_encrypted: bool = False

    def __str__(self) -> str:
        return f"{'tls' if self.is_encrypted else 'tcp'}:{self.address}"


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Read the address of a replica.

    Raises:
        InvalidRequest: it is none of "unix:<path>", "tcp:host:port" and "tls:host:port".
    """
    kind, _, where = text.partition(":")
    if kind == "unix" and where:
        return UnixAddress(Path(where))
    if kind in {"tcp", "tls"}:
        return TcpAddress(Address.parse(where), is_encrypted=kind == "tls")
    raise InvalidRequest(
        field="address",
        problem=f"{text!r} is none of unix:<path>, tcp:host:port and tls:host:port",
    )


def listening_socket(listen: str) -> tuple[socket.socket, str]:
    """Return a socket that listens, and the address that reaches it.

    Raises:
        InvalidSetting: `listen` is malformed, or others may enter the socket's directory.
        InsufficientResources: no port of the range is free.
        OSError: the host or the directory cannot be used.
    """
    kind, _, where = listen.partition(":")
    if kind == "unix" and where:
        return _listen_unix(Path(where)), listen
    host, _, ports = where.rpartition(":")
    first, _, last = ports.partition("-")
    last = last or first
    is_tcp = kind in {"tcp", "tls"}
    if not is_tcp or not host or not (first.isdecimal() and last.isdecimal()):
        raise InvalidSetting(
            name="listen",
            value=listen,
            expected="unix:<path>, tcp:host:first-last or tls:host:first-last",
        )
    bare_host = host.removeprefix("[").removesuffix("]")
    listener = _listen_tcp(bare_host, range(int(first), int(last) + 1))
    address = Address(bare_host, listener.getsockname()[1])
    return listener, str(TcpAddress(address, is_encrypted=kind == "tls"))


def _listen_unix(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise InvalidSetting(
            name="listen", value=str(path), expected=f"at most {MAX_UNIX_PATH_BYTES} bytes"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = path.parent.stat()
    if folder.st_uid != os.geteuid() or stat.S_IMODE(folder.st_mode) & 0o077:
        raise InvalidSetting(
            name="listen", value=str(path), expected="a directory of ours, of mode 0700"
        )
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()  # left behind by a process that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_tcp(host: str, ports: range) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
    raise InsufficientResources(
        problem=f"No port from {ports.start} to {ports.stop - 1} is free on {host}."
    )
