# SPDX-License-Identifier: Apache-2.0
"""A server that says what a test told it, and the program run against it."""

from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

from tests.fakes.http import Script, serving
from xinference.cli.main import program

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serving(script) as endpoint:
        yield script, endpoint


@pytest.fixture
def script(server: tuple[Script, str]) -> Script:
    server[0].reset({})
    return server[0]


@pytest.fixture
def endpoint(server: tuple[Script, str]) -> str:
    return server[1]


@pytest.fixture
def run(endpoint: str) -> Run:
    """Run `xinference <words>` against the server, in this process."""

    def invoke(*words: str, typed: str = "", **environ: str) -> Result:
        return CliRunner().invoke(
            program, list(words), input=typed, env={"XINFERENCE_ENDPOINT": endpoint} | environ
        )

    return invoke
