# SPDX-License-Identifier: Apache-2.0
"""Python packages made on the spot, so that installing needs no network."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def save_wheel(
    directory: Path, name: str, version: str, *, requires: Sequence[str] = (), module: str = ""
) -> Path:
    """Write a wheel of one module, which is called as the package and says its version."""
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    files = {
        f"{plain}/__init__.py": f"__version__ = {version!r}\n{module}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {one}\n" for one in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / f"{plain}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def save_endless_sdist(directory: Path, name: str, told: Path) -> Path:
    """Write a source package whose build never ends; it writes its process id to `told`."""
    backend = (
        "import os, pathlib, threading\n"
        "def build_wheel(*_, **__):\n"
        f"    pathlib.Path({str(told)!r}).write_text(str(os.getpid()))\n"
        "    threading.Event().wait()\n"
        "prepare_metadata_for_build_wheel = build_wheel\n"
    )
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
        f'backend-path = ["."]\n[project]\nname = "{name}"\nversion = "1.0"\n',
        "backend.py": backend,
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    }
    directory.mkdir(parents=True, exist_ok=True)
    sdist = directory / f"{name}-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{name}-1.0/{path}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return sdist
