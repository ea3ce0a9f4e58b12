# SPDX-License-Identifier: Apache-2.0
"""Where a server listens: on the port that was chosen, or on a free one instead of the default."""

import socket
from collections.abc import Iterator

import click
import pytest

from xinference.cli.addresses import advertised_host, port_to_listen_on, url_of


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_free_port_is_taken_as_it_is() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    assert port_to_listen_on("127.0.0.1", port, is_chosen=True) == port


def test_a_busy_default_gives_way_to_a_free_port_loudly(
    busy_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    port = port_to_listen_on("127.0.0.1", busy_port, is_chosen=False)

    assert port != busy_port
    said = capsys.readouterr().err
    assert str(busy_port) in said
    assert str(port) in said


def test_a_busy_port_that_was_chosen_is_an_error(busy_port: int) -> None:
    with pytest.raises(click.ClickException, match=f"127.0.0.1:{busy_port}"):
        port_to_listen_on("127.0.0.1", busy_port, is_chosen=True)


def test_a_host_of_another_machine_is_an_error() -> None:
    with pytest.raises(click.ClickException, match=r"192\.0\.2\.1:9997"):
        port_to_listen_on("192.0.2.1", 9997, is_chosen=False)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("name", "http://name:80"),
    ],
)
def test_an_endpoint_is_one_that_this_machine_reaches(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def test_others_are_told_an_address_that_leads_here() -> None:
    assert advertised_host("10.1.2.3") == "10.1.2.3"
    assert advertised_host("0.0.0.0", towards="127.0.0.1") == "127.0.0.1"
