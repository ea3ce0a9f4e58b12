# SPDX-License-Identifier: Apache-2.0
"""The key that the processes of a cluster share: made once, in a file only its owner reads.

Whoever has it can run code on every host of the cluster, since actor ports trust it.
"""

import os
import secrets
from pathlib import Path

from xinference.errors import InvalidSetting

FILE_NAME = "cluster.key"
MIN_KEY_LEN = 16


def read_cluster_key(home: Path) -> str | None:
    """Return the key of the file under `home`, or None if there is no file.

    Raises:
        InvalidSetting: it is too short to be a key, or no text.
        OSError: the file cannot be read.
    """
    path = home / FILE_NAME
    try:
        key = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    return check_cluster_key(key, source=str(path))


def check_cluster_key(key: str, *, source: str = "XINFERENCE_CLUSTER_KEY") -> str:
    """Return `key`.

    Args:
        source: where it was found.

    Raises:
        InvalidSetting: it is too short to be a key.
    """
    if len(key) < MIN_KEY_LEN or not key.isascii():
        raise InvalidSetting(
            name=source,
            value=f"{len(key)} characters",
            expected=f"a secret of {MIN_KEY_LEN} ASCII characters or more",
        )
    return key


def make_cluster_key(home: Path) -> str:
    """Return the key of the file under `home`, which is made with mode 0600 if there is none."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / FILE_NAME
    # Why a link: two starts at once agree on one key, and nobody reads half of it.
    draft = home / f"{FILE_NAME}.{os.getpid()}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    key = read_cluster_key(home)
    assert key is not None, "the file was just made"
    return key


def join_command(endpoint: str) -> str:
    """Return what to type on a worker's host so that it joins the cluster of this gateway."""
    return f"XINFERENCE_CLUSTER_KEY=<the key> xinference-worker -e {endpoint}"


def key_refused(endpoint: str, home: Path) -> InvalidSetting:
    """Return the error of a worker that has no cluster key, or another one than its cluster.

    Args:
        endpoint: of the gateway it was to join.
        home: of the worker.
    """
    return InvalidSetting(
        name="XINFERENCE_CLUSTER_KEY",
        value="(none, or another cluster's)",
        expected=f"the key of the cluster at {endpoint}: the text in {FILE_NAME} of its "
        f"supervisor's XINFERENCE_HOME. Copy that file to {home / FILE_NAME}, or join with: "
        + join_command(endpoint),
    )
