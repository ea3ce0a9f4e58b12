# SPDX-License-Identifier: Apache-2.0
"""Keys differ by instance, proofs by everything that was said."""

from dataclasses import replace

import pytest

from tests.raw_data_plane import proof
from xinference.cluster.dataplane.handshake import Transcript, instance_key
from xinference.identifiers import InstanceId

SAID = Transcript(version=1, instance="i", role="actor", challenge=b"c" * 32, nonce=b"n" * 32)
KEY = instance_key(b"cluster", InstanceId("i"))


def test_every_instance_and_every_cluster_has_a_key_of_its_own() -> None:
    keys = {
        instance_key(cluster, InstanceId(instance))
        for cluster in (b"one", b"two")
        for instance in ("i", "j")
    }

    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}


@pytest.mark.parametrize(
    "other",
    [
        replace(SAID, version=2),
        replace(SAID, instance="j"),
        replace(SAID, role="gateway"),
        replace(SAID, challenge=b"d" * 32),
        replace(SAID, nonce=b"m" * 32),
        replace(SAID, certificate=b"d" * 32),
        replace(SAID, challenge=SAID.nonce, nonce=SAID.challenge),
        replace(SAID, instance="ia", role="ctor"),
    ],
)
def test_a_proof_holds_for_what_was_said_only(other: Transcript) -> None:
    assert other.client_proof(KEY) != SAID.client_proof(KEY)
    assert other.server_proof(KEY) != SAID.server_proof(KEY)


def test_a_proof_cannot_be_sent_back() -> None:
    assert SAID.client_proof(KEY) != SAID.server_proof(KEY)


def test_the_proof_is_that_of_the_written_protocol() -> None:
    written = proof(b"client", KEY, "i", "actor", b"c" * 32, b"n" * 32)

    assert SAID.client_proof(KEY) == written
