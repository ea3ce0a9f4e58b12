# SPDX-License-Identifier: Apache-2.0
"""Debian packages that tests need: there, or installed by whoever may."""

import os
import shutil
import subprocess

INSTALL_SECONDS = 600


def need_command(command: str, *, package: str) -> str:
    """Return where a command is; as root, its package is installed first if it is missing.

    Raises:
        AssertionError: it is missing and cannot be installed; says what to type.
    """
    found = shutil.which(command)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        # Why the lock: other tests may be installing something, too.
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", package]):
            subprocess.run(
                [*apt, *words],
                env=quiet,
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=INSTALL_SECONDS,
            )
        found = shutil.which(command)
    assert found, f"{command} is missing; type: sudo apt-get install {package}"
    return found
