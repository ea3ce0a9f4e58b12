# SPDX-License-Identifier: Apache-2.0
"""What was told in confidence is not found again: in logs, metrics, errors or descriptions."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform, started

PROMPT = "canary-prompt-7c1f"
ENVIRONMENT = "canary-environment-2b9e"
LAUNCH = "canary-launch-91ad"
HEADER = "canary-header-44f0"
ABOUT = (
    "/status",
    "/metrics",
    "/v1/models",
    "/v1/models/instances",
    f"/v1/models/{GUIDE}",
    f"/v1/models/{GUIDE}/events",
    f"/v1/models/{GUIDE}/replicas",
    "/v1/models/broken/events",
    "/v1/workers",
    "/v1/cluster/info?detailed=true",
    "/v1/admin/keys",
    "/v1/usage",
)


def test_s06_no_secret_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT)
    with started(tmp_path, "--log-level", "DEBUG") as platform:
        made = platform.command("keys", "create", "-n", "admin", "-s", "admin", "--json")
        key = json.loads(made.stdout)["key"]
        secret = key.rpartition("-")[2]
        with httpx.Client(
            base_url=platform.endpoint, headers={"Authorization": f"Bearer {key}"}, timeout=90
        ) as http:
            launch(http, envs={"SOME_TOKEN": LAUNCH})
            told = list(everything_that_is_said(platform, http))

        for text, where in told:
            for canary in (PROMPT, ENVIRONMENT, LAUNCH, HEADER, secret):
                assert canary not in text, f"{canary} in {where}"
        (replica,) = platform.replicas
        assert key not in replica.environ().values()

    for log in (*sorted(tmp_path.rglob("*.log")), tmp_path / "output.txt"):
        text = log.read_text()
        assert text
        for canary in (PROMPT, ENVIRONMENT, LAUNCH, HEADER, secret):
            assert canary not in text, f"{canary} in {log}"


def launch(http: httpx.Client, **fields: object) -> None:
    body = {"model_name": GUIDE, "model_engine": "transformers", **fields}
    http.post("/v1/models", json=body).raise_for_status()
    broken = {**body, "model_uid": "broken", "model_path": "/nowhere"}
    assert http.post("/v1/models", json=broken).status_code >= 400


def everything_that_is_said(platform: Platform, http: httpx.Client) -> Iterator[tuple[str, str]]:
    """Ask well and badly; yield what is said that should hold no secret, and where."""
    messages = [{"role": "user", "content": PROMPT}]
    good = {"model": GUIDE, "messages": messages, "max_tokens": 3}
    assert http.post("/v1/chat/completions", json=good).status_code == 200
    assert http.post("/v1/chat/completions", json={**good, "stream": True}).status_code == 200
    for bad in (
        {**good, "model": "nobody"},
        {**good, "temperature": "hot"},
        {**good, "max_tokens": 10**9},
        {**good, "messages": messages * 500},
    ):
        answer = http.post("/v1/chat/completions", json=bad)
        assert answer.status_code >= 400
        yield answer.text, f"the answer to {sorted(bad)}"
    for headers in ({"Authorization": f"Bearer {HEADER}"}, {"x-api-key": HEADER}):
        answer = httpx.post(f"{platform.endpoint}/v1/chat/completions", json=good, headers=headers)
        assert answer.status_code == 401
        yield answer.text, "a 401"
    for path in ABOUT:
        yield http.get(path).text, path
    http.delete(f"/v1/models/{GUIDE}/replicas/99")
    launch_again = http.post(
        "/v1/models", json={"model_name": GUIDE, "model_uid": GUIDE, "envs": {"A": LAUNCH}}
    )
    assert launch_again.status_code >= 400
    yield launch_again.text, "a refused launch"
