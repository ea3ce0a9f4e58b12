# SPDX-License-Identifier: Apache-2.0
"""What the host's interpreter has, and how an environment gets to see it.

An environment is made without the host's packages. While it is filled, the installer is shown
distributions of the host as if they were installed in it, and held to their versions of torch: so
torch is never resolved anew, and what does not go with the host's is refused. Afterwards they are
taken away again, and a `.pth` file puts the host's directories behind the environment's own: what
is not in it is the host's, the very same files.
"""

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

OF_TORCH = frozenset({"torch", "torchaudio", "torchvision", "triton", "pytorch-triton"})
"""Held to the host's version wherever the host has them: one process can load one torch only."""
_OF_TORCH_PREFIXES = ("nvidia-",)
_MARK = "xinference"
"""As the installer of what is shown only."""
_PTH = "_xinference_host.pth"
_OWN_DIRECTORY = Path(__file__).parents[3]
"""What this package is imported from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPackage:
    """A distribution of the host."""

    name: str
    """Written as any index would."""
    version: str
    metadata: str


def host_packages() -> list[HostPackage]:
    """Return the distributions of this interpreter, each name once, as it imports them."""
    found: dict[str, HostPackage] = {}
    for one in importlib.metadata.distributions():
        metadata = one.read_text("METADATA") or one.read_text("PKG-INFO")
        name = plain_name(one.metadata["Name"] or "")
        if metadata and name and name not in found:
            found[name] = HostPackage(name=name, version=one.version, metadata=metadata)
    return list(found.values())


def plain_name(name: str) -> str:
    """Return a distribution's name as any index would write it."""
    return re.sub(r"[-_.]+", "-", name).casefold()


def is_of_torch(name: str) -> bool:
    """Return whether a distribution, named plainly, is of one build with torch."""
    return name in OF_TORCH or name.startswith(_OF_TORCH_PREFIXES)


def pinned(packages: Iterable[HostPackage], names: Iterable[str]) -> list[HostPackage]:
    """Return those of the host's that an environment may not have otherwise.

    Args:
        names: of more than what belongs to torch.
    """
    wanted = set(map(plain_name, names))
    return [one for one in packages if is_of_torch(one.name) or one.name in wanted]


def show(packages: Iterable[HostPackage], site_packages: Path) -> None:
    """Let an installer see distributions of the host as installed in an environment."""
    for one in packages:
        shown = site_packages / f"{one.name.replace('-', '_')}-{one.version}.dist-info"
        shown.mkdir()
        (shown / "METADATA").write_text(one.metadata)
        (shown / "INSTALLER").write_text(f"{_MARK}\n")
        names = ("METADATA", "INSTALLER", "RECORD")
        (shown / "RECORD").write_text("".join(f"{shown.name}/{name},,\n" for name in names))


def unshow(site_packages: Path) -> None:
    """Take away what `show` put there, as far as the installer has left it."""
    for shown in site_packages.glob("*.dist-info"):
        installer = shown / "INSTALLER"
        if installer.exists() and installer.read_text().strip() == _MARK:
            shutil.rmtree(shown)


def put_behind(site_packages: Path) -> None:
    """Let an environment import what it lacks from the host."""
    lines = [
        # Why not the plain path: the host's own .pth files, of editable packages, count as well.
        *(f"import site; site.addsitedir({str(path)!r})" for path in _site_directories()),
        # Why last: where this package is not installed, the replica runs the one that is here.
        str(_OWN_DIRECTORY),
    ]
    (site_packages / _PTH).write_text("\n".join(lines) + "\n")


def torch_file() -> Path | None:
    """Return where the host's torch begins; None if it has none."""
    try:
        found = importlib.metadata.distribution("torch").locate_file("torch/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(found))
    return path if path.exists() else None


def _site_directories() -> Iterator[str]:
    for path in sys.path:
        if Path(path).name in ("site-packages", "dist-packages"):
            yield str(Path(path).absolute())
