# SPDX-License-Identifier: Apache-2.0
"""What a replica's process finds in its environment, before torch is loaded."""

import sys

from xinference.cluster.replica_environment import num_usable_cores, replica_environment
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec


def a_spec(*, num_threads: int | None = None, envs: dict[str, str] | None = None) -> ReplicaSpec:
    return ReplicaSpec(
        replica=ReplicaUid(ModelUid("m"), 0),
        instance=InstanceId("i"),
        source=ModelSource(path="package:guide"),
        abilities=("chat",),
        engine_options=EngineOptions(num_threads=num_threads),
        python_executable=sys.executable,
        envs=envs or {},
    )


def test_threads_that_wait_spin_for_a_bounded_time() -> None:
    environment = replica_environment(a_spec(), {})

    assert int(environment["GOMP_SPINCOUNT"]) <= 20_000
    assert "OMP_WAIT_POLICY" not in environment
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["OMP_NUM_THREADS"] == str(num_usable_cores())


def test_what_the_launch_says_wins() -> None:
    base = {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "0", "PATH": "/bin"}

    kept = replica_environment(a_spec(), base)
    counted = replica_environment(a_spec(num_threads=3), base)
    named = replica_environment(a_spec(num_threads=3, envs={"OMP_NUM_THREADS": "5"}), base)

    assert (kept["OMP_NUM_THREADS"], kept["GOMP_SPINCOUNT"]) == ("7", "0")
    assert counted["OMP_NUM_THREADS"] == "3"
    assert named["OMP_NUM_THREADS"] == "5"
    assert kept["PATH"] == "/bin"


def test_no_secret_of_the_cluster_reaches_a_model() -> None:
    base = {
        "XINFERENCE_CLUSTER_KEY": "secret",
        "XINFERENCE_API_KEY": "secret",
        "XOSCAR_AUTH_KEY": "secret",
    }

    assert "secret" not in replica_environment(a_spec(), base).values()


def test_it_leaves_what_it_was_given_alone() -> None:
    base: dict[str, str] = {}

    replica_environment(a_spec(), base)

    assert base == {}


def test_there_is_a_core_to_use() -> None:
    assert num_usable_cores() >= 1
