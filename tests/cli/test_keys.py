# SPDX-License-Identifier: Apache-2.0
"""`keys`, `usage` and `login`: what is sent, kept and printed."""

import json
import stat
from pathlib import Path

from tests.cli.conftest import Run
from tests.fakes.http import Reply, Script

KEY = {
    "id": "0123",
    "name": "app",
    "status": "active",
    "scopes": ["invoke"],
    "models": ["guide"],
    "requests_per_minute": 60,
    "tokens_per_minute": None,
    "created_at": 1767225600,
    "expires_at": None,
    "revoked_at": None,
}


def test_a_key_is_made_and_only_it_goes_to_stdout(script: Script, run: Run) -> None:
    script.replies["POST /v1/admin/keys"] = Reply(json=KEY | {"key": "xin-0123-secret"})

    done = run(
        *("keys", "create", "-n", "app", "-m", "guide", "--expires", "30d"),
        *("--requests-per-minute", "60"),
    )

    assert (done.exit_code, done.stdout) == (0, "xin-0123-secret\n")
    assert script.asked[0].body == {
        "name": "app",
        "models": ["guide"],
        "expires_in_seconds": 30 * 86400,
        "requests_per_minute": 60,
    }


def test_a_time_must_have_a_unit(run: Run) -> None:
    done = run("keys", "create", "-n", "app", "--expires", "30")

    assert done.exit_code == 2
    assert "30d" in done.stderr


def test_keys_are_a_table_or_json(script: Script, run: Run) -> None:
    script.replies["GET /v1/admin/keys?ended=false"] = Reply(json={"data": [KEY]})
    script.replies["GET /v1/admin/keys"] = Reply(json={"data": [KEY]})

    table, as_json = run("keys", "list"), run("keys", "list", "--json")

    for shown in ("0123", "app", "active", "invoke", "guide", "60"):
        assert shown in table.stdout
    assert json.loads(as_json.stdout) == [KEY]


def test_a_key_is_revoked_by_its_id(script: Script, run: Run) -> None:
    script.replies["DELETE /v1/admin/keys/0123"] = Reply(json=KEY | {"status": "revoked"})

    done = run("keys", "revoke", "0123")

    assert (done.exit_code, done.stdout) == (0, "Revoked: app\n")


def test_keys_are_made_listed_and_revoked_without_a_server(
    script: Script, run: Run, tmp_path: Path
) -> None:
    home = {"XINFERENCE_HOME": str(tmp_path)}
    refused = run("keys", "create", "-n", "app", "--offline", **home)
    made = run("keys", "create", "-n", "admin", "-s", "admin", "--offline", "--json", **home)
    key = json.loads(made.stdout)
    listed = run("keys", "list", "--offline", "--json", **home)
    revoked = run("keys", "revoke", key["id"], "--offline", **home)
    left = run("keys", "list", "--offline", "--json", **home)
    unknown = run("keys", "revoke", "none", "--offline", **home)

    assert refused.exit_code == 1
    assert "admin" in refused.stderr
    assert key["key"].startswith(f"xin-{key['id']}-")
    assert [one["name"] for one in json.loads(listed.stdout)] == ["admin"]
    assert revoked.exit_code == 0
    assert json.loads(left.stdout) == []
    assert unknown.exit_code == 1
    assert script.asked == []


def test_usage_is_a_table_or_json(script: Script, run: Run) -> None:
    row = {
        "key_id": "0123",
        "key_name": "app",
        "model": "guide",
        "requests": 2,
        "prompt_tokens": 11,
        "completion_tokens": 22,
        "cached_tokens": 3,
        "reasoning_tokens": 4,
        "total_tokens": 33,
    }
    script.replies["GET /v1/usage"] = Reply(json={"data": [row]})

    table, as_json = run("usage", "--since", "2026-01-01"), run("usage", "--json")

    assert script.asked[0].query == "since=2026-01-01"
    for shown in ("app", "guide", "11", "22"):
        assert shown in table.stdout
    assert json.loads(as_json.stdout) == [row]


def test_a_login_is_kept_for_its_endpoint_alone(script: Script, run: Run, tmp_path: Path) -> None:
    home = {"XINFERENCE_HOME": str(tmp_path)}
    script.replies["GET /v1/cluster/auth"] = Reply(json={"auth": True})
    script.replies["POST /token"] = Reply(json={"access_token": "k", "token_type": "bearer"})
    script.replies["GET /v1/models"] = Reply(json={"object": "list", "data": []})

    done = run("login", "--username", "app", "--password", "k", **home)
    run("list", **home)
    run("list", "-ak", "other", **home)

    assert done.exit_code == 0
    (login,) = [one.body for one in script.asked if one.path == "/token"]
    assert login == {"username": "app", "password": "k"}
    sent = [one.headers.get("authorization") for one in script.asked if one.path == "/v1/models"]
    assert sent == ["Bearer k", "Bearer other"]
    (kept,) = (tmp_path / "auth").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_an_open_server_needs_no_login(script: Script, run: Run, tmp_path: Path) -> None:
    script.replies["GET /v1/cluster/auth"] = Reply(json={"auth": False})

    done = run("login", "--username", "a", "--password", "b", XINFERENCE_HOME=str(tmp_path))

    assert done.exit_code == 0
    assert "no API keys" in done.stderr
    assert list(tmp_path.iterdir()) == []
