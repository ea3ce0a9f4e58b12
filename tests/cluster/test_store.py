# SPDX-License-Identifier: Apache-2.0
"""What is written down survives, and only its owner reads it."""

import re
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.simulation import desired
from xinference.cluster.cluster_key import (
    check_cluster_key,
    key_refused,
    make_cluster_key,
    read_cluster_key,
)
from xinference.cluster.configuration import (
    CONFIGS,
    GatewayConfig,
    SupervisorConfig,
    WorkerConfig,
    advertised_address,
    config_from_line,
    make_run_directory,
    private_directory,
)
from xinference.cluster.store import DesiredStore
from xinference.errors import InvalidSetting
from xinference.identifiers import ModelUid

NO_DATABASE = "something else entirely, and long enough to be looked at"


def test_models_are_there_after_a_restart(tmp_path: Path) -> None:
    store = DesiredStore.open(tmp_path / "s")
    store.save(desired("b"))
    store.save(desired("a"))
    store.save(desired("a", has_been_ready=True))
    store.save(desired("c"))
    store.forget(ModelUid("c"))
    store.forget(ModelUid("unknown"))
    store.close()

    store = DesiredStore.open(tmp_path / "s")

    assert store.models() == [desired("a", has_been_ready=True), desired("b")]
    store.close()


def test_each_start_has_a_larger_epoch(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        store = DesiredStore.open(tmp_path / "s")
        epochs.append(store.next_epoch())
        store.close()

    assert epochs == [1, 2, 3]


def test_a_store_that_is_in_use_is_refused(tmp_path: Path) -> None:
    store = DesiredStore.open(tmp_path / "s")

    with pytest.raises(InvalidSetting, match="XINFERENCE_HOME"):
        DesiredStore.open(tmp_path / "s")

    store.close()
    DesiredStore.open(tmp_path / "s").close()


def test_the_store_is_synchronous_and_private(tmp_path: Path) -> None:
    store = DesiredStore.open(tmp_path / "home" / "s")

    assert stat.S_IMODE((tmp_path / "home" / "s").stat().st_mode) == 0o600
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    store.close()


def test_an_entry_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DesiredStore.open(tmp_path / "s")
    store.save(desired("a"))
    store._connection.execute("INSERT INTO model VALUES ('b', x'7b7d')")

    assert store.models() == [desired("a")]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.exc_info is None, "a traceback says nothing to whoever starts the cluster"
    assert "\n" not in record.getMessage()
    assert "Model b is not started" in record.getMessage()
    assert "Launch it again" in record.getMessage()
    store.close()


def test_a_store_that_cannot_be_opened_says_which(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()

    with pytest.raises(sqlite3.Error, match=re.escape(f"{tmp_path / 's'}: ")):
        DesiredStore.open(tmp_path / "s")


def test_a_file_that_is_damaged_and_has_no_copy_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text(NO_DATABASE)

    with pytest.raises(InvalidSetting, match="it is damaged, and there is no copy"):
        DesiredStore.open(tmp_path / "s")

    assert (tmp_path / "s").read_text() == NO_DATABASE


def damage_middle(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 :] = b"\xa5" * (len(whole) - len(whole) // 2)
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_text(NO_DATABASE), damage_middle], ids=["all", "half"]
)
def test_f37_a_damaged_file_is_put_aside_and_its_copy_takes_its_place(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    store = DesiredStore.open(tmp_path / "s")
    epoch = store.next_epoch()
    store.save(desired("a"))
    store.copy()
    store.save(desired("b"))
    store.close()
    damage(tmp_path / "s")

    store = DesiredStore.open(tmp_path / "s")

    assert store.models() == [desired("a")]
    assert store.next_epoch() > epoch
    assert (tmp_path / "s.damaged").exists()
    store.save(desired("c"))
    store.close()
    store = DesiredStore.open(tmp_path / "s")
    assert store.models() == [desired("a"), desired("c")]
    store.close()


def test_f37_a_copy_that_is_damaged_too_is_no_copy(tmp_path: Path) -> None:
    store = DesiredStore.open(tmp_path / "s")
    store.copy()
    store.close()
    for name in ("s", "s.copy"):
        (tmp_path / name).write_text(NO_DATABASE)

    with pytest.raises(InvalidSetting, match="there is no copy"):
        DesiredStore.open(tmp_path / "s")


def test_the_copy_is_made_when_something_has_changed_and_is_private(tmp_path: Path) -> None:
    store = DesiredStore.open(tmp_path / "s")
    store.copy()
    copy = tmp_path / "s.copy"
    first = copy.stat().st_ino
    store.copy()
    assert copy.stat().st_ino == first

    store.save(desired("a"))
    store.copy()

    assert copy.stat().st_ino != first
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    store.close()


def test_a_cluster_key_is_made_once_for_its_owner(tmp_path: Path) -> None:
    assert read_cluster_key(tmp_path / "home") is None

    key = make_cluster_key(tmp_path / "home")

    assert make_cluster_key(tmp_path / "home") == key == read_cluster_key(tmp_path / "home")
    assert len(key) == 64
    assert stat.S_IMODE((tmp_path / "home" / "cluster.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["cluster.key"]


def test_a_key_that_is_too_short_is_refused_unseen() -> None:
    with pytest.raises(InvalidSetting) as refused:
        check_cluster_key("hunter2")

    assert "hunter2" not in str(refused.value)


def test_a_worker_without_the_key_is_told_the_command_that_joins(tmp_path: Path) -> None:
    message = str(key_refused("http://10.0.0.1:9997", tmp_path))

    assert "xinference-worker -e http://10.0.0.1:9997" in message
    assert str(tmp_path / "cluster.key") in message


CONFIGURED = [
    SupervisorConfig(home=Path("/h"), cluster_key="k", expected_workers=1),
    WorkerConfig(home=Path("/h"), cluster_key="k", replica_ports=(1, 2), run_directory=Path("/r")),
    GatewayConfig(home=Path("/h"), cluster_key="k", port=1, supervisor_address="a:1"),
]


@pytest.mark.parametrize("config", CONFIGURED, ids=lambda config: config.role)
def test_a_configuration_survives_its_line(config: SupervisorConfig) -> None:
    line = config.to_json()

    assert "\n" not in line
    assert config_from_line(config.role, line) == config
    assert "cluster_key" not in repr(config)


def test_every_role_has_a_configuration() -> None:
    assert {config.role for config in CONFIGURED} == set(CONFIGS)


def test_what_peers_are_told_may_differ_from_where_one_listens() -> None:
    config = SupervisorConfig(home=Path("/h"), cluster_key="k", listen="0.0.0.0:7")

    assert advertised_address(config) == "0.0.0.0:7"
    told = SupervisorConfig(
        home=Path("/h"), cluster_key="k", listen="0.0.0.0:7", advertised_host="10.0.0.1"
    )
    assert advertised_address(told) == "10.0.0.1:7"


def test_run_directories_of_dead_processes_are_removed(tmp_path: Path) -> None:
    home = Path("/tmp") / tmp_path.name if len(str(tmp_path)) > 50 else tmp_path
    (home / "run" / "4194304").mkdir(parents=True)  # more than any pid

    mine = make_run_directory(home)
    again = private_directory(mine, "role")
    (again / "left").touch()
    again = private_directory(mine, "role")

    assert not (home / "run" / "4194304").exists()
    assert stat.S_IMODE(mine.stat().st_mode) == stat.S_IMODE(again.stat().st_mode) == 0o700
    assert list(again.iterdir()) == []


def test_a_long_home_does_not_make_sockets_unreachable(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 20)
    home.mkdir()

    made = make_run_directory(home)

    assert len(str(made)) < 60
    made.rmdir()
