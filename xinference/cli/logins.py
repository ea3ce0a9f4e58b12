# SPDX-License-Identifier: Apache-2.0
"""Tokens of `xinference login`, one file for each endpoint, readable by their owner alone."""

import hashlib
import os
from pathlib import Path


def save_login(home: Path, endpoint: str, token: str) -> Path:
    """Keep the token that commands send to an endpoint from now on; return its file."""
    path = _path(home, endpoint)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    # Why not write_text and chmod: between the two anybody could read it.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    new.replace(path)
    return path


def saved_login(home: Path, endpoint: str) -> str | None:
    """Return the token for an endpoint; None without a login."""
    try:
        return _path(home, endpoint).read_text().strip() or None
    except OSError:
        return None


def _path(home: Path, endpoint: str) -> Path:
    return home / "auth" / hashlib.sha256(endpoint.rstrip("/").encode()).hexdigest()
