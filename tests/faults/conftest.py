# SPDX-License-Identifier: Apache-2.0
"""What the tests of faults share."""

import pytest


@pytest.fixture
def long_only(is_long: bool) -> None:
    """For rows that CI has no time for."""
    if not is_long:
        pytest.skip("run by --long")
