# SPDX-License-Identifier: Apache-2.0
"""Clients in an environment of their own: each suite of `foreign/` runs there, to its last test.

The suites see the platform through their client alone. What they need is in
`foreign/requirements.txt`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import GUIDE
from tests.e2e.foreign_environment import INSTALL_SECONDS, python_with
from tests.e2e.platform import Platform
from tests.e2e.reciting_model import ANSWER, CALL, NAME, RESULT

FOREIGN = Path(__file__).parent / "foreign"
SUITES = sorted(path.name for path in FOREIGN.glob("suite_*.py"))
SUITE_SECONDS = 300.0


@pytest.mark.timeout(INSTALL_SECONDS + SUITE_SECONDS)
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_of_a_client_passes(guide: Platform, reciter: Platform, suite: str) -> None:
    python = python_with(FOREIGN / "requirements.txt")
    told = {
        "CLIENTS_ENDPOINT": guide.endpoint,
        "CLIENTS_GUIDE": GUIDE,
        "CLIENTS_RECITER": NAME,
        "CLIENTS_ANSWER": ANSWER,
        "CLIENTS_CALL": json.dumps(CALL),
        "CLIENTS_RESULT": RESULT,
        # LiteLLM would ask the network for prices otherwise.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    # Why without ours: the suites must find their own packages and no other.
    ours = ("PYTHON", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    done = subprocess.run(
        [python, "-m", "pytest", "-c", "pytest.ini", "--rootdir", ".", "--confcutdir", ".", suite],
        cwd=FOREIGN,
        env=kept | told,
        capture_output=True,
        text=True,
        timeout=SUITE_SECONDS,
        check=False,
    )

    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
