# SPDX-License-Identifier: Apache-2.0
"""The server of llama.cpp as a process of its own: `python llama_cpp_server.py JSON`.

The wheel `xllamacpp` brings the server but no executable. In: {"params", "flags"}, attributes of
its `CommonParams` by dotted names, the platform's and a launch's. It serves until it is killed.
Needs nothing of this package.
"""

import difflib
import enum
import json
import os
import signal
import sys
from typing import Any


def settle(params: Any, name: str, value: Any) -> None:
    """Set an option; texts become what the option is made of.

    Raises:
        SystemExit: there is no such option, or it cannot be this.
    """
    *path, last = name.replace("-", "_").split(".")
    owner = params
    for part in path:
        owner = getattr(owner, part, None)
    if not hasattr(owner, last):
        known = [one for one in dir(owner) if not one.startswith("_")]
        near = difflib.get_close_matches(last, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        sys.exit(f"llama.cpp has no option {name!r}{hint}")
    current = getattr(owner, last)
    try:
        if isinstance(current, enum.Enum) and isinstance(value, str):
            value = member(type(current), value)
        setattr(owner, last, value)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        sys.exit(f"the option {name} of llama.cpp cannot be {value!r}: {error}")


def member(options: type[enum.Enum], text: str) -> enum.Enum:
    """Return the member whose name ends with a text: "q8_0" is GGML_TYPE_Q8_0.

    Raises:
        ValueError: there is none; names those that there are.
    """
    for one in options:
        if one.name.casefold() == text.casefold() or one.name.casefold().endswith(
            f"_{text.casefold()}"
        ):
            return one
    raise ValueError("it is one of " + ", ".join(one.name for one in options))


def main() -> None:
    """Load the model and serve it."""
    # Python's own handler would wait for the library to come back to it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import xllamacpp

    given = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    for name, value in (*given["params"].items(), *given["flags"].items()):
        settle(params, name, value)
    key = os.environ.pop("XINFERENCE_LLAMA_CPP_KEY", "")
    if key:
        params.api_keys = [key]
    try:
        server = xllamacpp.Server(params)  # returns when the model is loaded
    except RuntimeError as error:
        sys.exit(f"llama.cpp does not start: {error}")
    print(f"llama.cpp listens on {server.listening_address}", flush=True)  # noqa: T201  # its log
    signal.pause()


if __name__ == "__main__":
    main()
