# SPDX-License-Identifier: Apache-2.0
"""Runs a server for as long as the process that asked for it: `python leash.py COMMAND…`.

Standard library only; run as a file, in no package. The server gets a process group of its own.
At the end of stdin, which comes with the end of whoever holds the other end of it, however that
ended, the whole group is killed. When the server ends by itself, what it has left of its group is
killed, and this process ends as the server did: with its status, or by its signal.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _kill_at_end_of_stdin(group: int) -> None:
    while os.read(0, 4096):
        pass
    _kill(group)


def main(argv: list[str]) -> int:
    """Run a command to its end; return its status."""
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    # Who asks for an end in order has the server end; this process then follows.
    signal.signal(signal.SIGTERM, lambda number, _: server.send_signal(number))
    watcher = threading.Thread(target=_kill_at_end_of_stdin, args=(server.pid,), daemon=True)
    watcher.start()
    # Why not reaped at once: until then nobody else can get the number of its group.
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    _kill(server.pid)
    status = server.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
