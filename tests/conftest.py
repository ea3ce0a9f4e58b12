# SPDX-License-Identifier: Apache-2.0
"""What every test may use."""

import os
from pathlib import Path

import pytest

from tests.faults.table import FaultTable, RecordFault
from tests.faults.table import recorder as fault_recorder
from tests.long_runs import LongRuns, RecordLongRun, recorder

LONG_TIMEOUT_SECONDS = 1800
"""Of one test in the long run."""

# Why here: when Triton is first imported, it decides for good whether kernels are compiled, or run
# by its interpreter, over CPU tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="run the whole of each random history, soak and fault matrix, not its CI share",
    )

    parser.addoption(
        "--repeats", type=int, default=1, help="how often each test of a fault runs (with --long)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    num_repeats = metafunc.config.getoption("--repeats")
    if "record_fault" in metafunc.fixturenames and num_repeats > 1:
        metafunc.fixturenames.append("repeat")
        metafunc.parametrize("repeat", range(num_repeats))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(LongRuns())
        config.pluginmanager.register(FaultTable())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_SECONDS))


@pytest.fixture
def record_long_run(request: pytest.FixtureRequest) -> RecordLongRun:
    """What a test calls to have a row in the table of long runs."""
    return recorder(request)


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> RecordFault:
    """What a test calls to have a row in the table of faults."""
    return fault_recorder(request)


@pytest.fixture(scope="session")
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long run."""
    return bool(request.config.getoption("--long"))
