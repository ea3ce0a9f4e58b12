# SPDX-License-Identifier: Apache-2.0
"""How a process that works for a worker's downloads is asked and answers, a line of JSON each."""

import json
import logging
import os
import sys
from typing import Any, NoReturn

from xinference.protocol.logs import LogFormat, set_up_logging


def read_order() -> dict[str, Any]:
    """Return what stdin asks for, and log to stderr as it says."""
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    # Hazard: httpx tells of every request, with addresses that are keys to files for some minutes;
    # it is among those that are kept quiet.
    handlers = (logging.StreamHandler(sys.stderr),)
    log_format = given.get("log_format", LogFormat.TEXT)
    set_up_logging(handlers, role="download", level="INFO", log_format=log_format)
    return given


def say(line: dict[str, Any]) -> None:
    """Write a line to stdout; ends the process if nobody reads it any more."""
    try:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)


def end() -> NoReturn:
    """End the process."""
    logging.shutdown()
    # Why not `sys.exit`: where it has failed, threads may still wait for bytes.
    os._exit(0)
