# SPDX-License-Identifier: Apache-2.0
"""What server commands tell the guardian, and what they refuse. The guardian is faked."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.fakes.http import Reply, Script, events, serving
from xinference.api.keys.key import KeySpec, Scope
from xinference.api.keys.store import KeyStore
from xinference.cli.main import program
from xinference.cli.serve import local_command, supervisor_command, worker_command
from xinference.cluster import guardian
from xinference.cluster.configuration import (
    GatewayConfig,
    RoleConfig,
    SupervisorConfig,
    WorkerConfig,
)
from xinference.identifiers import Address

TLS = Path(__file__).parent / "tls"


class FakeGuardian:
    """Takes the configurations and says that all is ready."""

    def __init__(self) -> None:
        self.configs: dict[str, RoleConfig] = {}
        self.gateway: Script | None = None
        """What answers at the gateway's port."""

    def run(self, configs: Sequence[RoleConfig], *, on_ready: Callable[[], None]) -> int:
        self.configs = {config.name: config for config in configs}
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            if self.gateway is None:
                on_ready()
            else:
                config = self.configs["gateway"]
                assert isinstance(config, GatewayConfig)
                with serving(self.gateway, config.port):
                    on_ready()
        finally:
            signal.signal(signal.SIGTERM, before)
        return 0

    @property
    def gateway_config(self) -> GatewayConfig:
        config = self.configs["gateway"]
        assert isinstance(config, GatewayConfig)
        return config


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGuardian:
    made = FakeGuardian()
    monkeypatch.setattr(guardian, "run", made.run)
    monkeypatch.setattr("xinference.cli.serve.set_up_file_logging", lambda *_, **__: None)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    def invoke(command: Any, *words: str, **environ: str) -> Result:
        kept = dict.fromkeys(name for name in os.environ if name.startswith("XINFERENCE_"))
        home = {"XINFERENCE_HOME": str(tmp_path)}
        return CliRunner().invoke(command, list(words), env=kept | home | environ)

    return invoke


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_local_cluster_has_three_roles_and_one_key(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, tmp_path: Path
) -> None:
    done = run(local_command, "-p", str(free_port), "--log_level", "debug")

    assert done.exit_code == 0, done.stderr
    assert list(fake.configs) == ["supervisor", "worker", "gateway"]
    keys = {config.cluster_key for config in fake.configs.values()}
    assert keys == {(tmp_path / "cluster.key").read_text().strip()}
    assert {config.log_level for config in fake.configs.values()} == {"DEBUG"}
    assert (fake.gateway_config.host, fake.gateway_config.port) == ("127.0.0.1", free_port)
    supervisor = fake.configs["supervisor"]
    assert isinstance(supervisor, SupervisorConfig)
    assert supervisor.expected_workers == 1


def test_the_banner_says_where_it_is_and_how_to_use_it(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    done = run(local_command, "-p", str(free_port))

    endpoint = f"http://127.0.0.1:{free_port}"
    for shown in (
        f"{endpoint}/docs",
        f"xinference launch -e {endpoint} --model-engine transformers -n xinference-guide",
        f"xinference chat -e {endpoint} --model-uid xinference-guide",
        "from xinference.client import Client",
        f"curl {endpoint}/v1/chat/completions",
        "Ctrl-C",
    ):
        assert shown in done.stdout
    assert done.stderr == ""


def test_settings_reach_the_processes(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    done = run(
        local_command,
        "-p",
        str(free_port),
        XINFERENCE_CLUSTER_KEY="0123456789abcdef",
        XINFERENCE_DISABLE_METRICS="1",
        XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT="2",
        XINFERENCE_HTTP_TIMEOUT_KEEP_ALIVE="9",
    )

    assert done.exit_code == 0, done.stderr
    supervisor = fake.configs["supervisor"]
    assert isinstance(supervisor, SupervisorConfig)
    assert supervisor.restart_limit == 2
    assert supervisor.cluster_key == "0123456789abcdef"
    assert fake.gateway_config.disable_metrics
    assert fake.gateway_config.http_keep_alive_seconds == 9


def test_a_busy_port_that_was_chosen_stops_the_start(
    fake: FakeGuardian, run: Callable[..., Result], busy_port: int
) -> None:
    done = run(local_command, "-p", str(busy_port))

    assert done.exit_code == 1
    assert done.stderr.startswith("Error: cannot listen on")
    assert fake.configs == {}


def test_a_worker_has_no_page_of_its_own_unless_it_is_asked_for(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    assert run(local_command, "-p", str(free_port)).exit_code == 0

    worker = fake.configs["worker"]
    assert isinstance(worker, WorkerConfig)
    assert worker.exporter_port is None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_worker_is_told_where_its_own_page_is(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, host: str
) -> None:
    key = {"XINFERENCE_CLUSTER_KEY": "0123456789abcdef"}
    words = ["-e", "http://127.0.0.1:9997", "-mp", str(free_port)]
    if host != "127.0.0.1":
        words += ["-MH", host]

    done = run(worker_command, *words, **key)

    assert done.exit_code == 0, done.stderr
    worker = fake.configs["worker"]
    assert isinstance(worker, WorkerConfig)
    assert (worker.exporter_host, worker.exporter_port) == (host, free_port)


def test_a_worker_whose_page_has_no_port_says_so(
    fake: FakeGuardian, run: Callable[..., Result], busy_port: int, free_port: int
) -> None:
    done = run(local_command, "-p", str(free_port), "-mp", str(busy_port))

    assert done.exit_code == 1
    assert "--metrics-exporter-port: cannot listen on" in done.stderr
    assert str(busy_port) in done.stderr
    assert fake.configs == {}


def test_words_about_the_page_that_contradict_each_other_are_refused(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    port = str(free_port)
    refused = (
        run(local_command, "-MH", "127.0.0.1"),
        run(local_command, "-p", port, "-mp", port),
        run(local_command, "-mp", port, XINFERENCE_DISABLE_METRICS="1"),
    )

    for done, named in zip(
        refused,
        ("--metrics-exporter-host", "port of HTTP", "XINFERENCE_DISABLE_METRICS"),
        strict=True,
    ):
        assert done.exit_code == 2
        assert named in done.stderr
    assert fake.configs == {}


def test_several_gateway_processes_share_the_port_and_have_names(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    done = run(local_command, "-p", str(free_port), "--api-workers", "2")

    assert done.exit_code == 0, done.stderr
    assert list(fake.configs) == ["supervisor", "worker", "gateway-1", "gateway-2"]
    assert {config.role for config in fake.configs.values()} == {"supervisor", "worker", "gateway"}
    ports = {one.port for one in fake.configs.values() if isinstance(one, GatewayConfig)}
    assert ports == {free_port}


def test_a_certificate_makes_the_endpoint_https(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    certificate, key = TLS / "certificate.pem", TLS / "key.pem"

    done = run(
        *(local_command, "-p", str(free_port)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
    )

    assert done.exit_code == 0, done.stderr
    assert f"https://127.0.0.1:{free_port}" in done.stdout
    assert fake.gateway_config.ssl_certfile == str(certificate)
    assert fake.gateway_config.ssl_keyfile == str(key)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ssl-certfile", str(TLS / "key.pem")], "HTTPS cannot use"),
        (["--ssl-keyfile", str(TLS / "key.pem")], "--ssl-certfile"),
        (["--ssl-certfile", "/none.pem"], "does not exist"),
        (["--api-workers", "0"], "--api-workers"),
    ],
)
def test_a_gateway_that_could_not_run_as_told_is_not_started(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, words: list[str], told: str
) -> None:
    done = run(local_command, "-p", str(free_port), *words)

    assert done.exit_code in (1, 2)
    assert told in done.stderr
    assert fake.configs == {}


def test_a_server_with_api_keys_is_not_called_open(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, tmp_path: Path
) -> None:
    store = KeyStore.open(tmp_path)
    store.create(KeySpec(name="admin", scopes=frozenset({Scope.ADMIN})))
    store.close()

    done = run(local_command, "-H", "0.0.0.0", "-p", str(free_port))

    assert done.exit_code == 0
    assert "Warning" not in done.stderr


def test_listening_on_more_than_loopback_is_said_loudly(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    done = run(local_command, "-H", "0.0.0.0", "-p", str(free_port))

    assert done.exit_code == 0
    assert "without API keys" in done.stderr
    assert fake.gateway_config.host == "0.0.0.0"
    worker = fake.configs["worker"]
    assert isinstance(worker, WorkerConfig)
    assert Address.parse(worker.listen).host == "127.0.0.1"


def test_a_supervisor_says_how_workers_join(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, tmp_path: Path
) -> None:
    done = run(
        supervisor_command, "-H", "127.0.0.1", "-p", str(free_port), "--supervisor-port", "5005"
    )

    assert done.exit_code == 0, done.stderr
    assert list(fake.configs) == ["supervisor", "gateway"]
    supervisor = fake.configs["supervisor"]
    assert isinstance(supervisor, SupervisorConfig)
    assert supervisor.listen == "127.0.0.1:5005"
    assert f"xinference-worker -e http://127.0.0.1:{free_port}" in done.stdout
    assert str(tmp_path / "cluster.key") in done.stdout


def test_a_worker_joins_by_the_key_and_endpoint_it_is_given(
    fake: FakeGuardian, run: Callable[..., Result]
) -> None:
    done = run(
        worker_command,
        *("-e", "http://127.0.0.1:9997/", "-H", "127.0.0.1", "--worker-port", "5006"),
        XINFERENCE_CLUSTER_KEY="0123456789abcdef",
        XINFERENCE_REPLICA_PORTS="40000-40009",
        XINFERENCE_ENCRYPT_DATA_PLANE="0",
    )

    assert done.exit_code == 0, done.stderr
    (worker,) = fake.configs.values()
    assert isinstance(worker, WorkerConfig)
    assert worker.endpoint == "http://127.0.0.1:9997"
    assert worker.listen == "127.0.0.1:5006"
    assert worker.replica_ports == (40000, 40009)
    assert not worker.encrypts


def test_a_worker_on_every_address_tells_the_one_that_leads_to_the_gateway(
    fake: FakeGuardian, run: Callable[..., Result]
) -> None:
    done = run(
        worker_command, "-e", "http://127.0.0.1:1", XINFERENCE_CLUSTER_KEY="0123456789abcdef"
    )

    assert done.exit_code == 0, done.stderr
    (worker,) = fake.configs.values()
    assert isinstance(worker, WorkerConfig)
    assert worker.advertised_host == "127.0.0.1"
    assert worker.encrypts


def test_a_worker_without_the_key_says_how_to_join(
    fake: FakeGuardian, run: Callable[..., Result]
) -> None:
    done = run(worker_command, "-e", "http://127.0.0.1:9997")

    assert done.exit_code == 1
    assert "cluster.key" in done.stderr
    assert "xinference-worker -e http://127.0.0.1:9997" in done.stderr
    assert fake.configs == {}


@pytest.mark.parametrize(
    "words",
    [
        ["-e", "somewhere"],
        ["-e", "http://[::1"],
        ["-e", "http://127.0.0.1:99999"],
        ["-e", "http://127.0.0.1:port"],
        ["-p", "1"],
    ],
)
def test_a_worker_without_an_address_to_join_is_refused(
    fake: FakeGuardian, run: Callable[..., Result], words: list[str]
) -> None:
    done = run(worker_command, *words)

    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert fake.configs == {}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40])
def test_a_cluster_key_that_is_none_is_refused_by_the_name_of_its_file(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "cluster.key"
    file.write_bytes(content)

    for done in (
        run(local_command, "-p", str(free_port)),
        run(worker_command, "-e", "http://127.0.0.1:9997"),
    ):
        assert done.exit_code == 1
        assert done.stderr.startswith(f"Error: {file}=")
    assert fake.configs == {}


def test_a_home_that_a_worker_cannot_read_ends_it_with_one_line(
    fake: FakeGuardian, run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "cluster.key").mkdir()

    done = run(worker_command, "-e", "http://127.0.0.1:9997")

    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {tmp_path} cannot be used: ")


def test_a_home_without_a_place_for_sockets_ends_the_start_with_one_line(free_port: int) -> None:
    # Why a process: a guardian changes the log and the environment of the one that it is in.
    start = "from xinference.cli.main import local; local()"
    plain = {name: value for name, value in os.environ.items() if "XINFERENCE" not in name}
    with tempfile.TemporaryDirectory() as home:  # of a short name, as sockets want
        (Path(home) / "run").write_text("in the way")

        done = subprocess.run(
            [sys.executable, "-c", start, "-p", str(free_port)],
            env=plain | {"XINFERENCE_HOME": home},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode == 1
    assert f"Error: XINFERENCE_HOME={home!r}: expected a directory" in done.stderr
    assert f"{home}/run" in done.stderr


def test_actors_that_could_not_listen_are_not_started(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int, busy_port: int
) -> None:
    key = {"XINFERENCE_CLUSTER_KEY": "0123456789abcdef"}
    joining = ["-e", "http://127.0.0.1:9997", "-H"]
    http = ["-H", "127.0.0.1", "-p", str(free_port)]

    elsewhere = run(worker_command, *joining, "192.0.2.1", **key)
    worker = run(worker_command, *joining, "127.0.0.1", "--worker-port", str(busy_port), **key)
    supervisor = run(supervisor_command, *http, "--supervisor-port", str(busy_port))

    assert elsewhere.stderr.startswith("Error: --host: cannot listen on 192.0.2.1: ")
    assert worker.stderr.startswith(f"Error: --worker-port: cannot listen on 127.0.0.1:{busy_port}")
    assert f"Error: --supervisor-port: cannot listen on 127.0.0.1:{busy_port}" in supervisor.stderr
    assert {done.exit_code for done in (elsewhere, worker, supervisor)} == {1}
    assert fake.configs == {}


def chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def gateway(answer: Reply) -> Script:
    guide = {"id": "xinference-guide", "model_type": "LLM", "model_ability": ["chat"]}
    return Script(
        {
            "GET /v1/models": Reply(json={"data": []}),
            "POST /v1/models": Reply(json={"model_uid": "xinference-guide"}),
            "GET /v1/models/xinference-guide/progress": Reply(
                json={"progress": 1.0, "stage": "completed"}
            ),
            "GET /v1/models/xinference-guide": Reply(json=guide),
            "POST /v1/chat/completions": answer,
        }
    )


def test_quickstart_launches_asks_streams_and_tells_the_ways_on(
    fake: FakeGuardian, run: Callable[..., Result], free_port: int
) -> None:
    fake.gateway = gateway(
        Reply(pieces=[events(chunk("A platform"), chunk(".", "stop"), "[DONE]")])
    )

    done = run(program, "quickstart", "-p", str(free_port), "--question", "What is it?", "--exit")

    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("A platform.\n")
    assert f"http://127.0.0.1:{free_port}/docs" in done.stdout
    asked = fake.gateway.asked[-1]
    assert asked.path == "/v1/chat/completions"
    assert asked.body["messages"] == [{"role": "user", "content": "What is it?"}]


@pytest.mark.parametrize(
    "answer",
    [
        Reply(status=503, json={"detail": "its process died"}),
        Reply(pieces=[events(chunk("A"), {"error": {"message": "its process died"}})]),
    ],
)
@pytest.mark.parametrize("words", [["--exit"], []])
def test_quickstart_that_fails_says_why_and_ends_with_1(
    fake: FakeGuardian,
    run: Callable[..., Result],
    free_port: int,
    answer: Reply,
    words: list[str],
) -> None:
    fake.gateway = gateway(answer)

    done = run(program, "quickstart", "-p", str(free_port), *words)

    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "Error: Failed to chat, detail: its process died"
    assert "Xinference is ready" not in done.stdout
