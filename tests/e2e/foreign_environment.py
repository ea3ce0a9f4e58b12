# SPDX-License-Identifier: Apache-2.0
"""A virtual environment beside ours, for clients whose requirements collide with ours.

It is made when it is first needed, kept in the checkout, and made anew when its requirements
change. Several test processes may ask for it at once.
"""

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL_SECONDS = 480.0


def python_with(requirements: Path) -> Path:
    """Return the interpreter of the environment that has these requirements.

    Raises:
        AssertionError: they cannot be installed; the message says why.
    """
    named = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    path = ROOT / f".venv-{requirements.parent.name}-{named}"
    python, finished = path / "bin" / "python", path / "finished"
    with (ROOT / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            _run(sys.executable, "-m", "venv", "--clear", str(path))
            _run(str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements))
            finished.touch()
    return python


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
