# SPDX-License-Identifier: Apache-2.0
"""A whole cluster of real processes with the fake replica, on one host or several, and a client.

A host is a guardian and all below it, with a home, a directory for temporary files and a log of
its own. The first has the supervisor, a gateway and a worker; `add_host` starts one more, with a
worker alone. The client is the test's own process. A test takes the fixture `guarded`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from tests.fakes.catalog import FAMILY
from xinference.cluster.remote import RemoteCluster
from xinference.cluster.supervision import INSTANCE_VARIABLE, PLATFORM, descendants_of
from xinference.errors import XinferenceError
from xinference.identifiers import ModelUid, new_request_id
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.generation import (
    Finished,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
)

KEY = "the cluster key of these tests"
ROOT = Path(__file__).parents[2]
MODEL = ModelUid("counting")
TIMEOUT_SECONDS = 20.0
REPLICA_MODULE = "tests.fakes.replica"


def spec(path: str | None = None, *, uid: str = MODEL, replica: int = 1) -> LaunchSpec:
    """Return a launch of a model that counts; the path says how it loads."""
    return LaunchSpec(model_uid=ModelUid(uid), model_name=FAMILY, model_path=path, replica=replica)


async def until(
    condition: Callable[[], object], what: str, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds:.0f} s: {what}"
        await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, reaped or not."""
    try:
        return b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True


def words_of(pid: int) -> list[str]:
    """Return what a process was started with; nothing if there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def _is_replica(pid: int) -> bool:
    is_tagged = PLATFORM.variable_of(pid, INSTANCE_VARIABLE) is not None
    return is_tagged and words_of(pid)[-1:] in ([REPLICA_MODULE], ["xinference.cluster.replica"])


class Host:
    """A guardian and all below it."""

    def __init__(self, home: Path, *, within: Sequence[str] = ()) -> None:
        """Prepare; nothing runs yet.

        Args:
            within: words before the command that starts it, as those that enter a network.
        """
        self.home = home
        # Why not in the home: sockets have short names.
        self.temporary = Path(tempfile.mkdtemp(prefix="host-"))
        self._within = tuple(within)
        self._process: subprocess.Popen[str] | None = None

    async def start(self, **told: object) -> None:
        """Start it and wait until all of it is ready.

        Args:
            told: what `tests.cluster.guarded` is told besides the home and the key.
        """
        self.home.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # milliseconds
                [*self._within, sys.executable, "-m", "tests.cluster.guarded"],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(self.temporary)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        told = {
            "home": str(self.home),
            "key": KEY,
            "replica_command": ["-m", REPLICA_MODULE],
        } | told
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line == "ready\n", self.log.read_text()

    @property
    def is_running(self) -> bool:
        """Whether it was started, and was not stopped since."""
        return self._process is not None

    @property
    def log(self) -> Path:
        """Where all its processes but those of replicas write."""
        return self.home / "guardian.log"

    @property
    def guardian(self) -> int:
        """The pid of its first process."""
        assert self._process is not None
        return self._process.pid

    def role(self, name: str) -> int:
        """Return the pid of a role's process."""
        (pid,) = [
            pid for pid in PLATFORM.children_of(self.guardian) if words_of(pid)[-1:] == [name]
        ]
        return pid

    def find(self, name: str) -> int | None:
        """Return the pid of a role's process; None while there is none."""
        try:
            return self.role(name)
        except ValueError:
            return None

    def processes(self) -> list[int]:
        """Return the pids of the guardian and all below it."""
        if self._process is None:
            return []
        return [pid for pid in (self.guardian, *descendants_of(self.guardian)) if not is_gone(pid)]

    def replicas(self) -> list[int]:
        """Return the pids of the replicas' processes, whoever is their parent."""
        return list(filter(_is_replica, self.processes()))

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the guardian a signal; return its status when nothing below it is left."""
        assert self._process is not None
        below = descendants_of(self.guardian)
        self._process.send_signal(number)
        try:
            return await asyncio.to_thread(self._process.wait, TIMEOUT_SECONDS)
        finally:
            self._process.kill()  # if it has not ended
            self._process.wait()
            self._forget()
            await until(lambda: all(map(is_gone, below)), "everything below the guardian is gone")

    async def kill_all_but(self, *spared: int) -> None:
        """Kill every process but some, the guardian last: it could do nothing about it."""
        os.kill(self.guardian, signal.SIGSTOP)
        below = [pid for pid in descendants_of(self.guardian) if pid not in spared]
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await until(lambda: all(map(is_gone, below)), "they are gone")
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None


class GuardedCluster:
    """The hosts, and a client of them in this process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.hosts = [Host(home)]
        """The first has the supervisor."""
        self.cluster: RemoteCluster | None = None

    async def start(self, *, num_workers: int = 1) -> RemoteCluster:
        """Start the first host and, at the same time, as many as make the number of workers."""
        while len(self.hosts) < num_workers:
            self.hosts.append(Host(self.home / f"host-{len(self.hosts)}"))
        self._where.unlink(missing_ok=True)
        first = asyncio.create_task(self.hosts[0].start(expected_workers=num_workers))
        await until(
            lambda: first.done() or (self._where.exists() and self._where.read_text()),
            "it is known where the supervisor will be",
        )
        others = [self.start_host(number) for number in range(1, num_workers)]
        await asyncio.gather(first, *others)
        return await self.connect()

    async def start_host(self, number: int, **told: object) -> None:
        """Start a host that has a worker alone; the first must run, or be starting."""
        await self.hosts[number].start(supervisor_address=self._supervisor_address(), **told)

    async def connect(self) -> RemoteCluster:
        """Make the client."""
        sockets = self.home / f"client-{self.guardian}"
        sockets.mkdir()
        self.cluster = await RemoteCluster.connect(
            self._supervisor_address(), cluster_key=KEY, socket_directory=sockets
        )
        return self.cluster

    def _supervisor_address(self) -> str:
        return self._where.read_text()

    @property
    def _where(self) -> Path:
        return self.home / "supervisor.address"

    @property
    def guardian(self) -> int:
        """The pid of the first host's first process."""
        return self.hosts[0].guardian

    def role(self, name: str) -> int:
        """Return the pid of a role's process on the first host."""
        return self.hosts[0].role(name)

    def find(self, name: str) -> int | None:
        """Return the pid of a role's process on the first host; None while there is none."""
        return self.hosts[0].find(name)

    def processes(self) -> list[int]:
        """Return the pids of all processes of all hosts."""
        return [pid for host in self.hosts for pid in host.processes()]

    def replicas(self) -> list[int]:
        """Return the pids of the replicas' processes on all hosts."""
        return [pid for host in self.hosts for pid in host.replicas()]

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Send every guardian a signal, the first one's last; return the status of that."""
        await self._disconnect()
        status = 0
        for host in reversed(self.hosts):
            if host.is_running:
                status = await host.stop(number)
        return status

    async def kill_all_but(self, *spared: int) -> None:
        """Kill every process of every host but some."""
        for host in self.hosts:
            if host.is_running:
                await host.kill_all_but(*spared)
        await self._disconnect()

    async def _disconnect(self) -> None:
        if self.cluster is not None:
            await self.cluster.aclose()
            self.cluster = None

    async def clean_up(self) -> str:
        """Stop what runs; return what the hosts have logged."""
        try:
            await self.stop()
        finally:
            for host in self.hosts:
                shutil.rmtree(host.temporary, ignore_errors=True)
        # A host may not have been started.
        return "\n".join(host.log.read_text() for host in self.hosts if host.log.exists())


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[GuardedCluster]:
    """A cluster that a test starts; what it logged is shown when the test fails."""
    guarded = GuardedCluster(tmp_path)
    log = ""
    try:
        yield guarded
    finally:
        log = await guarded.clean_up()
        print(log)  # noqa: T201  # shown when a test fails
        assert "Traceback" not in log


async def ask(cluster: RemoteCluster, num_tokens: int = 3, *, model: str = MODEL) -> str:
    """Return the whole answer of a model that counts."""
    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text="count"),
        sampling=SamplingParams(max_tokens=num_tokens),
    )
    text = ""
    async for event in await cluster.generate(ModelUid(model), request):
        if isinstance(event, TextDelta):
            text += event.text
        else:
            assert isinstance(event, Finished)
    return text


async def until_answered(
    cluster: RemoteCluster, *, model: str = MODEL, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Ask until there is an answer, and it is right."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            assert await ask(cluster, model=model) == " 1 2 3"
            return
        except XinferenceError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


async def until_adopted(cluster: RemoteCluster, *, times: int = 1) -> None:
    """Ask until so many replicas have been adopted; each time there is an answer."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        story = [event.event_content for event in await cluster.events(MODEL)]
        if sum("adopted" in line for line in story) >= times:
            return
        assert time.monotonic() < deadline, story
        assert await ask(cluster) == " 1 2 3"
