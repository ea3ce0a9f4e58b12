# SPDX-License-Identifier: Apache-2.0
"""Hosts that go silent, in networks that the test makes: the rows F16 and F17 of the matrix.

It needs the command `ip`, and a kernel that lets anybody make namespaces.
"""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.cluster.guarded_cluster import ROOT
from tests.faults.harness import SLACK
from tests.faults.table import Outcome, RecordFault

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces")

TIMEOUT_SECONDS = 150.0
SLOWEST_SECONDS = 6.0
"""A host is asked every second, for 3 s and then for one more, before its requests move on."""


async def outcomes_of(home: Path, *scenarios: str) -> list[Outcome]:
    """Run scenarios in a network of their own; return what was seen."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "-rn", sys.executable, "-m", "tests.faults.network", str(home), *scenarios),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            said, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
    assert process.returncode == 0, log.decode()
    assert b"Traceback" not in log
    return [Outcome(**json.loads(line)) for line in said.splitlines()]


async def test_a_silent_host_costs_no_request_and_is_replaced_and_taken_back(
    tmp_path: Path, is_long: bool, record_fault: RecordFault
) -> None:
    cut, healed = await outcomes_of(tmp_path, "one")

    for outcome in (cut, healed):
        record_fault(outcome)
        assert outcome.failed == {}
        assert (outcome.num_hung, outcome.num_wrong, outcome.processes_left) == (0, 0, 0)
    # Of a link that heals a peer hears at once, however long it was cut.
    assert healed.is_within_bounds(SLACK)
    if is_long:
        assert cut.is_within_bounds()
        assert cut.slowest_seconds is not None
        assert cut.slowest_seconds < SLOWEST_SECONDS
        assert healed.is_within_bounds()


async def test_silent_hosts_do_not_slow_a_healthy_one_down(
    tmp_path: Path, is_long: bool, record_fault: RecordFault
) -> None:
    if not is_long:
        pytest.skip("run by --long")

    (outcome,) = await outcomes_of(tmp_path, "all-but-one")

    record_fault(outcome)
    assert (outcome.num_hung, outcome.num_wrong) == (0, 0)
    assert outcome.failed.keys() <= {"model_not_ready", "model_overloaded", "replica_lost"}
