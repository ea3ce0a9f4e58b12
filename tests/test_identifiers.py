# SPDX-License-Identifier: Apache-2.0
"""Names are checked once, and print as they were read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xinference.errors import InvalidRequest
from xinference.identifiers import (
    MAX_UID_LEN,
    Address,
    ModelUid,
    ReplicaUid,
    family_name,
    model_uid,
    new_model_uid,
)


@pytest.mark.parametrize("text", ["qwen2.5", "a", "A_b-c.1", "x" * MAX_UID_LEN])
def test_a_plain_name_is_a_model_uid(text: str) -> None:
    assert model_uid(text) == text


@pytest.mark.parametrize(
    "text", ["", "-a", ".a", "a b", "a/b", "../x", "x" * (MAX_UID_LEN + 1), "m-rep0", "ü", "a\n"]
)
def test_what_cannot_be_a_model_uid_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        model_uid(text)

    assert refused.value.field == "model_uid"


@given(st.text(max_size=200), st.booleans())
def test_any_family_yields_a_uid_that_is_free(family: str, is_taken: bool) -> None:
    first = new_model_uid(family, taken=set())
    taken = {first} if is_taken else set()

    second = new_model_uid(family, taken=taken)

    assert model_uid(second) == second
    assert second not in taken


@given(st.integers(min_value=0, max_value=10**6))
def test_a_replica_uid_reads_what_it_prints(index: int) -> None:
    uid = ReplicaUid(ModelUid("some-model"), index)

    assert ReplicaUid.parse(str(uid)) == uid


@pytest.mark.parametrize("text", ["127.0.0.1:80", "host.example:65535", "[::1]:9997"])
def test_an_address_reads_what_it_prints(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:x", "host:65536", "host:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Address.parse(text)


@pytest.mark.parametrize("text", ["", ".", "..", "a b", "a/b", "a?b", "a\tb"])
def test_what_cannot_name_a_family_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        family_name(text)
