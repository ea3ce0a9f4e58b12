# SPDX-License-Identifier: Apache-2.0
"""Virtual environments that are really made, of packages that the tests make."""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import xinference
from tests.wheels import save_wheel
from xinference.cluster.environments import EnvironmentPolicy, EnvironmentShelf
from xinference.cluster.environments.shelf import PARTIAL
from xinference.errors import EnvironmentInUse, InvalidRequest, LoadFailed
from xinference.identifiers import InstanceId
from xinference.protocol.environments import EnvironmentSpec

HOSTS = "iniconfig"
"""A package that the host has, and that no replica imports."""
OLD = "0.0.1"
FIRST, SECOND = InstanceId("first"), InstanceId("second")


class Host:
    """A shelf, a directory of wheels, and what was run."""

    def __init__(self, path: Path) -> None:
        self.wheels = path / "wheels"
        self.root = path / "virtualenv"
        policy = EnvironmentPolicy(is_offline=True, find_links_roots=(self.wheels,))
        self.shelf = EnvironmentShelf(self.root, policy, worker_ip="10.0.0.1")
        self.commands: list[Sequence[str]] = []
        self.told: list[str] = []
        self.blocked = asyncio.Event()
        self.blocks = False
        save_wheel(self.wheels, HOSTS, OLD)

    async def run(self, argv: Sequence[str], variables: Mapping[str, str]) -> bytes:
        self.commands.append(argv)
        if self.blocks and "install" in argv:
            self.blocked.set()
            await asyncio.Event().wait()
        process = await asyncio.create_subprocess_exec(
            *argv, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        said, complaints = await process.communicate()
        if process.returncode:
            raise LoadFailed(model="m", problem=complaints.decode())
        return said

    async def python_for(self, *packages: str, user: InstanceId = FIRST, **words: Any) -> Path:
        spec = EnvironmentSpec(
            model_name="m",
            model_engine="transformers",
            requirements=packages,
            find_links=(str(self.wheels),),
            **{"inherit_pip_config": False, **words},
        )
        return await self.shelf.python_for(
            spec, user=user, name=f"m-rep{user}", run=self.run, tell=self.told.append
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def says(python: Path, code: str) -> Any:
    """Return what an interpreter prints, which is JSON."""
    done = subprocess.run(
        [str(python), "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


async def test_a_package_has_another_version_inside_and_torch_is_the_hosts(host: Host) -> None:
    python = await host.python_for(f"{HOSTS}=={OLD}")

    inside = says(
        python,
        "import importlib.metadata as m, importlib.util as u, sys, iniconfig, xinference;"
        "print(json.dumps([iniconfig.__version__, m.version('iniconfig'), m.version('torch'),"
        "u.find_spec('torch').origin, sys.prefix, xinference.__file__]))",
    )

    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert inside[:2] == [OLD, OLD]
    assert importlib.metadata.version(HOSTS) != OLD
    assert inside[2:4] == [importlib.metadata.version("torch"), torch.origin]
    assert inside[4:] == [str(python.parents[1]), xinference.__file__]
    assert any(HOSTS in line for line in host.told)


async def test_packages_are_looked_for_where_the_hosts_pip_looks(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_wheel(tmp_path / "elsewhere", "only-there", "1.0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "elsewhere"))

    with pytest.raises(LoadFailed, match="only-there"):
        await host.python_for("only-there")
    python = await host.python_for("only-there", inherit_pip_config=True)

    version = "import importlib.metadata as m; print(json.dumps(m.version('only-there')))"
    assert says(python, version) == "1.0"


async def test_torch_is_not_resolved_anew_whatever_wants_it(host: Host) -> None:
    save_wheel(host.wheels, "torch", "99.0")
    save_wheel(host.wheels, "wants-torch", "1.0", requires=["torch>=2", "triton"])
    save_wheel(host.wheels, "triton", "99.0")

    python = await host.python_for("wants-torch")

    (found,) = await host.shelf.found()
    own = [path.name for path in (python.parents[1] / "lib").glob("python*/site-packages/*")]
    assert "wants-torch" in found.packages
    assert "torch" not in found.packages
    assert not any(name.startswith("torch") for name in own)


@pytest.mark.parametrize("package", ["needs-old-torch", "torch==1.0"])
async def test_what_does_not_go_with_the_hosts_torch_is_refused_and_leaves_nothing(
    host: Host, package: str
) -> None:
    save_wheel(host.wheels, "torch", "1.0")
    save_wheel(host.wheels, "needs-old-torch", "1.0", requires=["torch<2"])

    with pytest.raises(LoadFailed, match=f"torch=={importlib.metadata.version('torch')[:3]}"):
        await host.python_for(package)

    assert await host.shelf.found() == []
    assert not [path for path in host.root.rglob("*") if path.is_file()]


async def test_what_the_host_has_is_not_installed_once_more(host: Host) -> None:
    save_wheel(host.wheels, "wants-hosts", "1.0", requires=[HOSTS])

    await host.python_for("wants-hosts")

    (found,) = await host.shelf.found()
    assert found.packages == {"wants-hosts": "1.0"}


async def test_the_same_is_found_again_and_another_is_another(host: Host) -> None:
    first = await host.python_for(f"{HOSTS}=={OLD}")
    num_commands = len(host.commands)

    again = await host.python_for(f"{HOSTS}=={OLD}", user=SECOND)
    assert (again, len(host.commands)) == (first, num_commands)

    save_wheel(host.wheels, HOSTS, "0.0.2")
    other = await host.python_for(f"{HOSTS}==0.0.2", user=SECOND)
    assert other != first
    assert says(other, "import iniconfig; print(json.dumps(iniconfig.__version__))") == "0.0.2"


async def test_two_who_want_the_same_at_once_make_it_once(host: Host) -> None:
    first, second = await asyncio.gather(
        host.python_for(f"{HOSTS}=={OLD}"), host.python_for(f"{HOSTS}=={OLD}", user=SECOND)
    )

    assert first == second
    assert sum("install" in command for command in host.commands) == 1


async def test_who_cancels_leaves_nothing_and_who_waited_makes_it(host: Host) -> None:
    host.blocks = True
    making = asyncio.create_task(host.python_for(f"{HOSTS}=={OLD}"))
    await asyncio.wait_for(host.blocked.wait(), 30)
    waiting = asyncio.create_task(host.python_for(f"{HOSTS}=={OLD}", user=SECOND))
    await asyncio.sleep(0)

    host.blocks = False
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    host.shelf.release(FIRST)
    python = await asyncio.wait_for(waiting, 30)

    assert python.exists()
    assert [path.name for path in python.parents[2].iterdir()] == [python.parents[1].name]


async def test_what_runs_in_it_is_listed_and_keeps_it(host: Host) -> None:
    python = await host.python_for(f"{HOSTS}=={OLD}")
    host.shelf.hold(str(python), user=SECOND, name="m-rep1")

    (found,) = await host.shelf.found()
    assert found.model_name == "m"
    assert found.path == str(python.parents[1])
    assert found.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert found.users == ("m-rep1", "m-repfirst")
    with pytest.raises(EnvironmentInUse, match="m-rep1"):
        await host.shelf.remove("m")

    host.shelf.release(FIRST)
    host.shelf.release(SECOND)
    assert await host.shelf.remove("other") == 0
    assert await host.shelf.remove("m", model_engine="vllm") == 0
    assert await host.shelf.remove("m", model_engine="transformers") == 1
    assert await host.shelf.found() == []
    assert list(host.root.iterdir()) == []


async def test_packages_are_looked_for_below_the_roots_alone(host: Host, tmp_path: Path) -> None:
    host.wheels = tmp_path / "elsewhere"

    with pytest.raises(InvalidRequest, match="virtual_env_find_links"):
        await host.python_for(HOSTS)

    assert host.commands == []


async def test_what_a_worker_left_half_made_is_swept_away_when_it_is_old(host: Host) -> None:
    python = await host.python_for()
    old, new = (python.parents[2] / f"{name}{PARTIAL}" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))

    host.shelf.sweep()

    assert not old.exists()
    assert new.exists()
    assert python.exists()
