# SPDX-License-Identifier: Apache-2.0
"""`EnvironmentShelf`: the virtual environments of a worker's host, each made once.

In: what an environment is to be. Out: the interpreter that a replica's process runs. Its directory
is named after its model, its engine, the version of Python and all that it depends on, so that the
same is found again and another is another. It appears whole, or not at all. Nothing outside the
shelf's own directory is touched. Everything that takes long is a command; whoever asks runs it, and
may end it.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import platform
import shutil
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xinference.errors import EnvironmentInUse, InvalidRequest, LoadFailed
from xinference.identifiers import InstanceId
from xinference.protocol.environments import EnvironmentSpec, VirtualEnvironment

from . import host
from .pip_config import READ_PIP_CONFIG, options_of

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[str], Mapping[str, str]], Awaitable[bytes]]
"""Runs a command, with variables beside the worker's own; returns the first line that it said.

Raises LoadFailed if it fails or takes too long. When it returns or raises, no process is left."""
Tell = Callable[[str], None]
"""Takes a line about what is being done."""

OPTIONS = ("--no-config", "--no-progress", "--no-python-downloads")
"""Of every command of uv."""
STALE_SECONDS = 2 * 3600.0
LABEL = "environment.json"
PARTIAL = ".partial"
FINGERPRINT_LEN = 12
_CHECK = """
import importlib.metadata, importlib.util, json, sys, sysconfig
torch = importlib.util.find_spec("torch")
own = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
print(json.dumps({
    "torch": None if torch is None else torch.origin,
    "packages": {one.metadata["Name"]: one.version for one in own},
}))
"""
"""What an environment's interpreter says of itself, on one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentPolicy:
    """How a worker makes environments."""

    skips_installed: bool = True
    """What the host has, and is as required, is not installed once more."""
    is_offline: bool = False
    """Nothing is fetched."""
    find_links_roots: tuple[Path, ...] = ()
    """Below these, and nowhere else, packages may be looked for on this host."""


class EnvironmentShelf:
    """The environments of one host. Belongs to one event loop."""

    def __init__(self, root: Path, policy: EnvironmentPolicy, *, worker_ip: str = "") -> None:
        """Know where they are.

        Args:
            root: nothing else is in it.
            worker_ip: what this host is called in lists.
        """
        self._root = root
        self._policy = policy
        self._worker_ip = worker_ip
        self._locks: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: defaultdict[Path, dict[InstanceId, str]] = defaultdict(dict)
        """Whose processes run in an environment, or will, and what they are called."""

    async def python_for(
        self, spec: EnvironmentSpec, *, user: InstanceId, name: str, run: Run, tell: Tell
    ) -> Path:
        """Return the interpreter of an environment; it is made if there is none yet.

        Until `release`, it is kept for the user. If this is cancelled, nothing is left of it.

        Args:
            name: what lists call the user.

        Raises:
            InvalidRequest: packages may not be looked for there.
            LoadFailed: it cannot be made; the message says why.
        """
        self._check_find_links(spec.find_links)
        packages = await asyncio.to_thread(host.host_packages)
        path = self._path_of(spec, packages)
        self._users[path][user] = name
        async with self._locks[path]:
            if not (path / LABEL).exists():
                tell("making a virtual environment")
                await self._make(spec, path, packages, user=user, run=run, tell=tell)
        return path / "bin" / "python"

    def hold(self, python: str, *, user: InstanceId, name: str) -> None:
        """Keep the environment of an interpreter for a user; it may be none of these."""
        path = Path(python).parent.parent
        if path.is_relative_to(self._root):
            self._users[path][user] = name

    def release(self, user: InstanceId) -> None:
        """Keep nothing for a user any longer; it may have had nothing."""
        for path in [path for path, users in self._users.items() if user in users]:
            del self._users[path][user]
            if not self._users[path]:
                del self._users[path]

    async def found(self) -> list[VirtualEnvironment]:
        """Return every environment that there is, sorted by path."""
        labels = await asyncio.to_thread(lambda: sorted(self._root.glob(f"*/*/*/*/{LABEL}")))
        whole = [one for one in labels if not one.parent.name.endswith(PARTIAL)]
        read = [self._read(label) for label in whole]
        return [one for one in read if one is not None]

    async def remove(
        self, model_name: str, *, model_engine: str | None = None, python_version: str | None = None
    ) -> int:
        """Remove a model's environments; return how many there were.

        Args:
            model_engine: of this engine alone.
            python_version: of this version alone, such as "3.11".

        Raises:
            EnvironmentInUse: a process runs in one of them, or will; that one is there still.
        """
        wanted = [
            Path(one.path)
            for one in await self.found()
            if one.model_name == model_name
            and model_engine in (None, one.model_engine)
            and python_version in (None, one.python_version)
        ]
        self._check_unused(model_name, wanted)
        for path in wanted:
            async with self._locks[path]:
                self._check_unused(model_name, [path])
                # Why the label first: what is half removed is no environment.
                (path / LABEL).unlink(missing_ok=True)
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
                _remove_empty(path.parent, self._root)
        return len(wanted)

    def sweep(self) -> None:
        """Remove what was never finished, and by its age is not being made."""
        for path in self._root.glob(f"*/*/*/*{PARTIAL}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path)

    def _read(self, label: Path) -> VirtualEnvironment | None:
        path = label.parent
        try:
            told = json.loads(label.read_text())
            return VirtualEnvironment(
                model_name=str(told["model_name"]),
                model_engine=str(told["model_engine"]),
                path=str(path),
                real_path=str(path.resolve()),
                python_version=path.parent.name,
                packages=dict(told["packages"]),
                worker_ip=self._worker_ip,
                users=self._users_of([path]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("%s is no environment: %s", path, error)
            return None

    def _users_of(self, paths: Iterable[Path]) -> tuple[str, ...]:
        return tuple(sorted({n for path in paths for n in self._users.get(path, {}).values()}))

    def _check_unused(self, model_name: str, paths: Iterable[Path]) -> None:
        users = self._users_of(paths)
        if users:
            raise EnvironmentInUse(model_name=model_name, users=list(users))

    def _check_find_links(self, places: Iterable[str]) -> None:
        for place in places:
            if "://" in place:
                continue
            path = Path(place).expanduser().resolve()
            roots = [root.expanduser().resolve() for root in self._policy.find_links_roots]
            if not any(path.is_relative_to(root) for root in roots):
                raise InvalidRequest(
                    field="virtual_env_find_links",
                    problem=f"{place} is not below {' or '.join(map(str, roots)) or 'any root'}, "
                    "which XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS names on the worker",
                )

    def _path_of(self, spec: EnvironmentSpec, packages: Sequence[host.HostPackage]) -> Path:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        pins = host.pinned(packages, spec.of_host)
        depends_on = {
            "spec": asdict(spec),
            "python": [platform.python_version(), sys.prefix, sysconfig.get_platform()],
            "pins": sorted(f"{one.name}=={one.version}" for one in pins),
            "skips_installed": self._policy.skips_installed,
        }
        text = json.dumps(depends_on, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LEN]
        return self._root / spec.model_name / spec.model_engine / version / fingerprint

    async def _make(
        self,
        spec: EnvironmentSpec,
        path: Path,
        packages: Sequence[host.HostPackage],
        *,
        user: InstanceId,
        run: Run,
        tell: Tell,
    ) -> None:
        partial = path.with_name(f"{path.name}-{user}{PARTIAL}")
        try:
            uv = _find_uv(spec.model_name)
            partial.parent.mkdir(parents=True, exist_ok=True)
            made = ("--relocatable", "--python", sys.executable, str(partial))
            await run([uv, "venv", *OPTIONS, *made], {})
            python = partial / "bin" / "python"
            (site_packages,) = partial.glob("lib/python*/site-packages")
            if spec.requirements:
                tell(f"installing {', '.join(spec.requirements)}")
                await self._install(spec, partial, site_packages, packages, uv=uv, run=run)
            await asyncio.to_thread(host.put_behind, site_packages)
            told = json.loads(await run([str(python), "-c", _CHECK], {}))
            _check_torch(told["torch"], spec.model_name)
            label = {
                "model_name": spec.model_name,
                "model_engine": spec.model_engine,
                "requirements": spec.requirements,
                "packages": told["packages"],
            }
            (partial / LABEL).write_text(json.dumps(label, indent=1))
            self._put(partial, path)
        except OSError as error:
            raise LoadFailed(
                model=spec.model_name,
                problem=f"its virtual environment cannot be written: {error}",
            ) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)

    async def _install(
        self,
        spec: EnvironmentSpec,
        partial: Path,
        site_packages: Path,
        packages: Sequence[host.HostPackage],
        *,
        uv: str,
        run: Run,
    ) -> None:
        pins = host.pinned(packages, spec.of_host)
        shown = packages if self._policy.skips_installed else pins
        await asyncio.to_thread(host.show, shown, site_packages)
        requirements, constraints = partial / "requirements.txt", partial / "constraints.txt"
        requirements.write_text("".join(f"{one}\n" for one in spec.requirements))
        constraints.write_text("".join(f"{one.name}=={one.version}\n" for one in pins))
        options, variables = await self._options(spec, run)
        files = ("-r", str(requirements), "-c", str(constraints))
        python = str(partial / "bin" / "python")
        await run([uv, "pip", "install", *OPTIONS, "--python", python, *options, *files], variables)
        await asyncio.to_thread(host.unshow, site_packages)

    async def _options(self, spec: EnvironmentSpec, run: Run) -> tuple[list[str], dict[str, str]]:
        """Return where uv is to look for packages, and how."""
        options: list[str] = []
        variables: dict[str, str] = {}
        if spec.inherit_pip_config:
            listing = await run([sys.executable, "-c", READ_PIP_CONFIG], {})
            options, variables = options_of(json.loads(listing))
        if spec.index_url is not None:
            # Why here: the family's own index stands for the one that pip would take.
            if "--default-index" in options:
                options[options.index("--default-index") + 1] = spec.index_url
            else:
                options += ["--default-index", spec.index_url]
        for flag, values in (
            ("--index", spec.extra_index_url),
            ("--find-links", spec.find_links),
            ("--allow-insecure-host", spec.trusted_host),
        ):
            for value in values:
                options += [flag, value]
        if spec.index_strategy is not None:
            options += ["--index-strategy", spec.index_strategy]
        if spec.no_build_isolation:
            options.append("--no-build-isolation")
        if self._policy.is_offline:
            options.append("--offline")
        return options, variables

    def _put(self, partial: Path, path: Path) -> None:
        try:
            partial.rename(path)
        except OSError:
            # Another worker of this host has made the same one meanwhile.
            if not (path / LABEL).exists():
                raise


def _find_uv(model: str) -> str:
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise LoadFailed(
            model=model,
            problem="its virtual environment needs uv, which is not on the worker: pip install uv",
        )
    return found


def _check_torch(found: str | None, model: str) -> None:
    """Refuse an environment that would load another torch than the host's."""
    expected = host.torch_file()
    if expected is None or (found is not None and Path(found).samefile(expected)):
        return
    raise LoadFailed(
        model=model,
        problem=f"its virtual environment would import torch from {found}, not the host's from "
        f"{expected}",
    )


def _remove_empty(path: Path, root: Path) -> None:
    while path != root and path.is_relative_to(root):
        try:
            path.rmdir()
        except OSError:
            return
        path = path.parent
