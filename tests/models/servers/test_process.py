# SPDX-License-Identifier: Apache-2.0
"""The process of an engine's server: what is told of it."""

import logging
import os
import sys

import httpx
import pytest

from xinference.errors import ReplicaLost
from xinference.models.servers.process import ServerProcess
from xinference.models.servers.tokens import ServerTokens

KEY = "sesame-of-this-server"
TOKEN = "sesame-of-a-hub"
SECONDS = 20.0


def test_no_log_and_no_error_has_the_key_of_a_server(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    tells = "import sys; print('started with', sys.argv[1:]); sys.exit(3)"

    process = ServerProcess(
        "SGLang",
        [sys.executable, "-c", tells, "--api-key", KEY, "--hf-token", TOKEN],
        dict(os.environ),
        secrets=(KEY, TOKEN),
    )

    assert process.wait(SECONDS)
    process.stop(SECONDS)
    told = process.describe_end()
    assert "exit status 3" in told
    assert "started with" in told
    assert "SGLang starts" in caplog.text
    seen = told + caplog.text + capfd.readouterr().err
    assert KEY not in seen
    assert TOKEN not in seen


def test_a_long_prompt_has_longer_to_be_tokenized_than_a_question_has_to_be_answered() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.extensions["timeout"]["read"] < SECONDS:
            raise httpx.ReadTimeout("it takes twenty seconds", request=request)
        return httpx.Response(200, json={"tokens": [1, 2, 3]})

    with httpx.Client(
        base_url="http://server", transport=httpx.MockTransport(answer), timeout=1.0
    ) as client:
        tokens = ServerTokens(client, {}, model_name="m")
        assert tokens.encode("a very long text", special=True) == (1, 2, 3)


def test_a_server_that_answers_no_json_is_lost() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))

    with httpx.Client(base_url="http://server", transport=transport) as client:
        tokens = ServerTokens(client, {}, model_name="m")
        with pytest.raises(ReplicaLost, match="does not answer"):
            tokens.encode("a text", special=True)
