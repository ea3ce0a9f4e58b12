# SPDX-License-Identifier: Apache-2.0
"""Which host and port a server listens on, how safely, and which address others are told."""

import ipaddress
import socket
import ssl

import click

from xinference.identifiers import Address, is_wildcard

from .output import say

_DOCUMENTATION_HOST = "192.0.2.1"
"""An address that no network has (RFC 5737); asked for a route only, never sent to."""


def port_to_listen_on(host: str, port: int, *, is_chosen: bool) -> int:
    """Return `port` if it is free, else, unless the user chose it, another one, and say so.

    A port 0 that was chosen is any, and stays 0.

    Raises:
        click.ClickException: nobody can listen there.
    """
    try:
        _bound_port(host, port)
    except OSError as error:
        if is_chosen or not _can_listen(host):
            where = Address(host, port) if port else host
            raise click.ClickException(f"cannot listen on {where}: {error.strerror}") from error
        free = _bound_port(host, 0)
        say(f"Warning: port {port} is in use; listening on port {free} instead.")
        return free
    return port


def _can_listen(host: str) -> bool:
    try:
        _bound_port(host, 0)
    except OSError:
        return False
    return True


def _bound_port(host: str, port: int) -> int:
    """Listen for a moment; return the port."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
        return int(listener.getsockname()[1])


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def advertised_host(host: str, *, towards: str = _DOCUMENTATION_HOST) -> str:
    """Return the address by which `towards` reaches what listens on `host`.

    Raises:
        click.ClickException: `host` is every address, and none of them is known to lead there.
    """
    if not is_wildcard(host):
        return host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as route:
            route.connect(address)
            return str(route.getsockname()[0])
    except OSError as error:
        raise click.ClickException(
            f"no address of this machine leads to {towards}: {error.strerror}. "
            "Give the one that the others reach with --host."
        ) from error


def url_of(host: str, port: int, *, is_tls: bool = False) -> str:
    """Return the endpoint of a gateway, as this machine reaches it."""
    reached = ("::1" if ":" in host else "127.0.0.1") if is_wildcard(host) else host
    return f"{'https' if is_tls else 'http'}://{Address(reached, port)}"


def check_tls(certfile: str, keyfile: str | None) -> None:
    """Refuse a certificate and a key that a server could not use.

    Raises:
        click.ClickException
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = certfile if keyfile is None else f"{certfile} and {keyfile}"
        raise click.ClickException(f"HTTPS cannot use {files}: {error}") from error
