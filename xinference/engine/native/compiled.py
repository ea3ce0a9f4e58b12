# SPDX-License-Identifier: Apache-2.0
"""C functions, compiled on the machine they run on, with its own compiler and for its own CPU.

`compiled` gives a library for a source and some constants; the source may include headers that lie
beside it. The library is kept in the user's cache, under a name that is made of everything it
depends on. Its parallel loops run on PyTorch's OpenMP team: with a team of their own, each would
wait for the other's threads to stop spinning.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

COMPILE_SECONDS = 120.0
_FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math")


@functools.cache
def compiled(source: Path, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """Return a library of a C source.

    Args:
        constants: names that are defined in it, with their numbers.

    Raises:
        ValueError: it cannot be compiled here; says why.
    """
    team = _openmp_library()
    command = [_compiler(), *_FLAGS, *_flags_of_cpu()]
    definitions = [f"-D{name}={number}" for name, number in constants]
    version = _run([command[0], "--version"]).splitlines()[:1]
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    content = [*texts, *command, *definitions, *version, str(team), _cpu()]
    name = hashlib.sha256("\0".join(content).encode()).hexdigest()[:32] + ".so"
    path = _cache() / name
    if not path.exists():
        # Why two steps: told of OpenMP, the linker would take the compiler's own library for it.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            compiled_to, linked_to = Path(directory, "kernel.o"), Path(directory, name)
            _run([*command, "-fopenmp", *definitions, "-c", str(source), "-o", str(compiled_to)])
            parts = [str(compiled_to), str(team), "-lm"]
            _run([command[0], "-shared", *parts, "-o", str(linked_to)])
            linked_to.replace(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _compiler() -> str:
    wanted = os.environ.get("CC") or "cc"
    found = shutil.which(wanted)
    if found is None:
        raise ValueError(f"there is no C compiler, {wanted!r}; install one, such as gcc")
    return found


def _flags_of_cpu() -> list[str]:
    machine = platform.machine()
    if machine == "x86_64":
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"] if machine == "aarch64" else []


def _cpu() -> str:
    """Return what the compiler's "native" means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _openmp_library() -> Path:
    """Return the file of the OpenMP library that PyTorch has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    paths = {Path("/" + line.partition("/")[2]) for line in maps.splitlines() if "/" in line}
    found = sorted(path for path in paths if path.name.startswith("libgomp"))
    # Why the choice: other packages bring one of their own, with a team of its own.
    own = [path for path in found if Path(torch.__file__).parent in path.parents]
    if not found:
        raise ValueError("PyTorch has no OpenMP library here that others may use")
    return (own or found)[0]


def _cache() -> Path:
    """Return a directory that nobody else can write to: what is in it is run."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        path = Path(base).expanduser() / "xinference" / "kernels"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise ValueError(f"kernels cannot be kept below {base}: {error}") from error
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise ValueError(f"others may write to {path}, where kernels are kept")
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{command[0]} fails: {error.stderr.strip()[:500]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{command[0]} cannot be run: {error}") from error
    return done.stdout
