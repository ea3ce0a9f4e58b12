# SPDX-License-Identifier: Apache-2.0
"""`python -m tests`: format, lint, types, then every test; stops at the first that fails.

    python -m tests            what CI runs
    python -m tests --fast     without the end-to-end tests
    python -m tests --fix      formats and mends what the linter can, first
    python -m tests --long     the whole of each random history, soak and fault matrix; writes
                               doc/experiments/long-runs.md

Anything else is handed to pytest.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Why: test processes run beside each other, so an OpenMP team in each would only spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


def run(title: str, *command: str) -> None:
    """Run one step in the checkout; leave with its exit status if it fails."""
    print(f"== {title}", flush=True)
    started = time.monotonic()
    status = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
    print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)
    if status:
        sys.exit(status)


def main() -> None:
    """Run the steps in order."""
    os.environ.update(ENVIRONMENT)
    # Why: a shell starts background jobs with Ctrl-C ignored, children inherit that, and some tests
    # are about Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = sys.argv[1:]
    own = {"--fast", "--fix"}
    code = ["xinference", "tests", "benchmarks", "training"]
    if "--fix" in given:
        run("format", "ruff", "format", *code)
        run("mend", "ruff", "check", "--fix", *code)
    run("format", "ruff", "format", "--check", *code)
    run("lint", "ruff", "check", *code)
    run("types", "mypy")
    chosen = [word for word in given if word not in own]
    if "--fast" in given:
        chosen.append("--ignore=tests/e2e")
    # Why loadfile: a file's tests share a model or a cluster that is costly to start.
    run("tests", "pytest", "-q", "-n", "2", "--dist", "loadfile", *chosen)


main()
