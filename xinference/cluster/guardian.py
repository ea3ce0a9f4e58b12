# SPDX-License-Identifier: Apache-2.0
"""The guardian: the first process. It starts the others, restarts what dies, leaves no orphan.

It is the process of `xinference-local` and its kin themselves, so it must not fail: standard
library only, one thread, no event loop, no state but its children. A child gets its
configuration as a line on stdin, says that it is ready by a line of JSON on stdout, and dies
when the guardian does. What a child leaves behind comes to the guardian, the subreaper, and is
killed; but for the replicas of a worker that died, which serve on until its successor adopts them.
What an earlier guardian of this home has left is killed at the start.

    exit status 0   the child was asked to end: everything ends, status 0
    exit status 2   it cannot run as configured: everything ends, status 2
    anything else   it is started again, later each time; before its first readiness all ends
"""

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from xinference.errors import InvalidSetting
from xinference.identifiers import Address

from .configuration import (
    GatewayConfig,
    RoleConfig,
    SupervisorConfig,
    WorkerConfig,
    advertised_address,
    make_run_directory,
)
from .supervision import (
    INSTANCE_VARIABLE,
    OWNER_VARIABLE,
    PLATFORM,
    describe_exit,
    kill_leftovers,
    kill_strays,
    kill_tree,
    launch_argv,
    owner_of,
    raise_descriptor_limit,
)

logger = logging.getLogger(__name__)

EXIT_MISCONFIGURED = 2
START_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 30.0
"""For one child to end after SIGTERM, once its running requests have had their time: a worker's
twice, to be brought up elsewhere first, and then to end here."""
GONE_TIMEOUT_SECONDS = 5.0
BACK_OFF_SECONDS = (0.0, 0.2, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
STEADY_SECONDS = 60.0
"""A child that lived so long starts afresh in the back-off."""
MAX_LINE_BYTES = 64 * 1024
OOM_SCORES = {GatewayConfig.role: 100, WorkerConfig.role: -200, SupervisorConfig.role: -400}
"""Whom the kernel ends first when the host has no memory left; replicas have 500. Who may not lower
its own keeps that of whoever started the guardian, which is still less."""

OnReady = Callable[[], None]
"""Called once, in a thread of its own, when all are ready the first time. To end everything from
there, send this process SIGTERM; an exception ends it with status 1."""

ArgvOf = Callable[[RoleConfig], Sequence[str]]


def argv_of(config: RoleConfig) -> Sequence[str]:
    """Return what starts the process of a role."""
    return [sys.executable, "-m", "xinference.cli.process", config.role]


def run(
    configs: Sequence[RoleConfig], *, on_ready: OnReady | None = None, argv_of: ArgvOf = argv_of
) -> int:
    """Run a process of each role until told to end; return the exit status.

    SIGTERM, SIGINT and SIGHUP end the children in reverse order, each with a deadline; a second
    one kills them. It must run in the main thread, and no other code of the process may have
    children when a role ends: they would be taken for orphans.

    Args:
        configs: in the order to start. A port 0 becomes one that stays over restarts; where
            `supervisor_address` is None it becomes that of the supervisor among them.

    Raises:
        InvalidSetting: the home has no place for sockets; nothing was started.
    """
    home = configs[0].home
    if num_killed := kill_leftovers(str(home)):
        logger.warning("Killed %d processes that an earlier start has left", num_killed)
    os.environ[OWNER_VARIABLE] = owner_of(str(home))
    raise_descriptor_limit()
    try:
        run_directory = make_run_directory(home)
    except OSError as error:
        raise InvalidSetting(
            name="XINFERENCE_HOME",
            value=str(home),
            expected=f"a directory that can be written to: {error}",
        ) from error
    with contextlib.ExitStack() as resources:
        resources.callback(shutil.rmtree, run_directory, ignore_errors=True)
        # Nobody writes to it: whoever holds the other end sees this process end.
        lifeline, held = os.pipe()
        resources.callback(os.close, lifeline)
        resources.callback(os.close, held)
        reserved = [_with_fixed_port(config, resources) for config in configs]
        supervisor = next((one for one in reserved if isinstance(one, SupervisorConfig)), None)
        children = []
        for config in reserved:
            address = config.supervisor_address
            if address is None and supervisor is not None:
                address = advertised_address(supervisor)
            complete = dataclasses.replace(
                config, run_directory=run_directory, supervisor_address=address
            )
            if isinstance(complete, WorkerConfig):
                complete = dataclasses.replace(complete, lifeline=lifeline)
            children.append(_Child(complete, tuple(argv_of(complete))))
        return _Guardian(children, on_ready).run()


def _with_fixed_port(config: RoleConfig, resources: contextlib.ExitStack) -> RoleConfig:
    """Replace a port 0 by a free one that nobody else gets while this process lives."""
    if not isinstance(config, SupervisorConfig | WorkerConfig):
        return config
    listen = Address.parse(config.listen)
    if listen.port != 0:
        return config
    # A bound socket that does not listen keeps the port from everybody who does not ask for it
    # by number with SO_REUSEADDR, as the child does.
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    holder = resources.enter_context(socket.socket(family, socket.SOCK_STREAM))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((listen.host, 0))
    address = Address(listen.host, holder.getsockname()[1])
    return dataclasses.replace(config, listen=str(address))


@dataclass(eq=False, slots=True)
class _Child:
    config: RoleConfig
    argv: tuple[str, ...]
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    restart_at: float | None = None
    num_failures: int = 0
    facts: dict[str, Any] | None = None
    """What its last process said when it was ready; None until then."""
    was_ready: bool = False
    said: bytearray = field(default_factory=bytearray)

    @property
    def name(self) -> str:
        return self.config.name

    def start(self) -> int:
        """Start its process; return the file descriptor of its stdout."""
        self.process = subprocess.Popen(
            launch_argv(
                self.argv,
                signal_number=_parent_death_signal(self.config.role),
                oom_score_adj=OOM_SCORES.get(self.config.role, 0),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=self._inherited(),
            # Why: Ctrl-C in a terminal reaches the guardian alone, which ends them in order.
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(self.config.to_json().encode() + b"\n")
        self.started_at = time.monotonic()
        self.restart_at = None
        self.facts = None
        self.said.clear()
        os.set_blocking(self.process.stdout.fileno(), False)
        return self.process.stdout.fileno()

    def _inherited(self) -> tuple[int, ...]:
        config = self.config
        if isinstance(config, WorkerConfig) and config.lifeline is not None:
            return (config.lifeline,)
        return ()

    def hear(self, text: bytes) -> None:
        """Take in what it wrote; the first line of JSON with "ready" in it counts."""
        if self.facts is not None:
            return
        self.said += text
        *lines, rest = self.said.split(b"\n")
        self.said = rest[-MAX_LINE_BYTES:]
        for line in lines:
            with contextlib.suppress(ValueError):
                facts = json.loads(line)
                if isinstance(facts, dict) and facts.get("ready"):
                    self.facts, self.was_ready = facts, True
                    return


def _parent_death_signal(role: str) -> int:
    # Why not SIGKILL for a worker: it has to kill its tree first, which may hold grandchildren
    # in sessions of their own. It does so at SIGUSR2, which ends anything that does not handle it.
    return signal.SIGUSR2 if role == WorkerConfig.role else signal.SIGKILL


class _Guardian:
    """The loop over signals, the ends of children, and what they say."""

    def __init__(self, children: Sequence[_Child], on_ready: OnReady | None) -> None:
        self._children = children
        self._on_ready = on_ready
        self._selector = selectors.DefaultSelector()
        self._exit_status: int | None = None
        """Set once everything is to end."""
        self._num_signals = 0
        self._is_told = False
        self._orphans: set[int] = set()
        """Replicas whose worker died. They go on; the next worker adopts them."""

    def run(self) -> int:
        PLATFORM.become_subreaper()
        woken, waker = socket.socketpair()
        with woken, waker, self._selector, self._signals(waker):
            self._selector.register(woken, selectors.EVENT_READ)
            self._waker = waker
            woken.setblocking(False)
            try:
                for child in self._children:
                    self._start(child)
                while self._exit_status is None:
                    self._turn(woken)
                return self._exit_status
            finally:
                self._stop_all(woken)

    @contextlib.contextmanager
    def _signals(self, waker: socket.socket) -> Iterator[None]:
        """Let signals wake the loop; put things back afterwards."""
        waker.setblocking(False)
        old_fd = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            # Why: `nohup`, and a shell for its background jobs, ask us to ignore some.
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)

    def _on_signal(self, number: int, frame: object) -> None:
        self._num_signals += 1
        self._end(0)

    def _end(self, exit_status: int) -> None:
        if self._exit_status is None:
            self._exit_status = exit_status

    def _start(self, child: _Child) -> None:
        self._selector.register(child.start(), selectors.EVENT_READ, child)
        assert child.process is not None
        logger.debug("%s is process %d", child.name, child.process.pid)

    def _turn(self, woken: socket.socket) -> None:
        """Wait for one thing to happen and see to it."""
        self._listen(woken, self._seconds_until_due())
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._on_exit(child)
            elif child.restart_at is not None and time.monotonic() >= child.restart_at:
                self._start(child)
            elif self._is_overdue(child):
                logger.error("The %s is not ready after %.0f s", child.name, START_TIMEOUT_SECONDS)
                self._kill(child)
        self._reap_orphans()
        if not self._is_told and all(child.facts is not None for child in self._children):
            self._is_told = True
            self._tell_ready()

    def _listen(self, woken: socket.socket, timeout_seconds: float | None) -> None:
        for key, _ in self._selector.select(timeout_seconds):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
                continue
            child: _Child = key.data
            try:
                text = os.read(key.fd, MAX_LINE_BYTES)
            except BlockingIOError:
                continue
            if text:
                child.hear(text)
            else:
                self._selector.unregister(key.fd)
                assert child.process is not None
                assert child.process.stdout is not None
                child.process.stdout.close()

    def _seconds_until_due(self) -> float | None:
        due = [child.restart_at for child in self._children if child.restart_at is not None]
        due += [
            child.started_at + START_TIMEOUT_SECONDS
            for child in self._children
            if child.process is not None and child.facts is None
        ]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _is_overdue(self, child: _Child) -> bool:
        return (
            child.process is not None
            and child.facts is None
            and time.monotonic() - child.started_at > START_TIMEOUT_SECONDS
        )

    def _on_exit(self, child: _Child) -> None:
        """Clean up behind a child that ended, and decide what that means."""
        assert child.process is not None
        is_restarted = child.process.returncode not in {0, EXIT_MISCONFIGURED} and child.was_ready
        status = self._reap(child, spares_replicas=is_restarted and self._exit_status is None)
        if self._exit_status is not None:
            return
        if status in {0, EXIT_MISCONFIGURED}:
            logger.info("The %s ended with status %d; so does everything", child.name, status)
            self._end(status)
        elif not child.was_ready:
            logger.error("The %s could not start: %s", child.name, describe_exit(status))
            self._end(status if status > 0 else 1)
        else:
            if time.monotonic() - child.started_at > STEADY_SECONDS:
                child.num_failures = 0
            delay = BACK_OFF_SECONDS[min(child.num_failures, len(BACK_OFF_SECONDS) - 1)]
            child.num_failures += 1
            child.restart_at = time.monotonic() + delay
            logger.error(
                "The %s died (%s); starting it again in %.1f s",
                child.name,
                describe_exit(status),
                delay,
            )

    def _reap(self, child: _Child, *, spares_replicas: bool = False) -> int:
        """Take a child that has ended out of the books, with all it left; return its status.

        While there is a worker, replicas that it has adopted are left alone: it ends them in order.

        Args:
            spares_replicas: leave replicas alone in any case: they serve, and will be adopted.
        """
        assert child.process is not None
        status = child.process.wait()
        stdout = child.process.stdout
        if stdout is not None and not stdout.closed:
            self._selector.unregister(stdout.fileno())
            stdout.close()
        child.process = None
        child.facts = None
        spared: set[str] = set()
        if spares_replicas or self._has_worker:
            tags = {
                pid: PLATFORM.variable_of(pid, INSTANCE_VARIABLE)
                for pid in PLATFORM.children_of(os.getpid())
            }
            self._orphans |= {pid for pid, tag in tags.items() if tag is not None}
            spared = {tag for tag in tags.values() if tag is not None}
        deadline = time.monotonic() + GONE_TIMEOUT_SECONDS
        while (
            kill_strays(self._living(), tag=INSTANCE_VARIABLE, spared=spared)
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        return status

    def _reap_orphans(self) -> None:
        """Reap those that have ended; nobody else can, and whoever watches them has seen it."""
        for pid in list(self._orphans):
            try:
                has_ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
            except ChildProcessError:
                has_ended = True
            if has_ended:
                self._orphans.discard(pid)

    @property
    def _has_worker(self) -> bool:
        return any(
            isinstance(child.config, WorkerConfig) and child.process is not None
            for child in self._children
        )

    def _living(self) -> list[int]:
        return [child.process.pid for child in self._children if child.process is not None]

    def _kill(self, child: _Child) -> None:
        if child.process is not None and child.process.poll() is None:
            kill_tree(child.process.pid)

    def _tell_ready(self) -> None:
        """Call `on_ready` in a thread, so that children are watched meanwhile."""
        if self._on_ready is None:
            return
        on_ready = self._on_ready

        def tell() -> None:
            try:
                on_ready()
            except Exception:
                logger.exception("What follows readiness failed")
                self._end(1)
                self._waker.send(b"\0")

        threading.Thread(target=tell, name="on ready", daemon=True).start()

    def _stop_all(self, woken: socket.socket) -> None:
        """End the children in reverse order; at a further signal, kill what is left."""
        num_signals = max(self._num_signals, 1)
        for child in reversed(self._children):
            child.restart_at = None
            if child.process is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 2 * child.config.drain_seconds + STOP_TIMEOUT_SECONDS
            while child.process.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0 or self._num_signals > num_signals:
                    logger.warning("The %s is killed", child.name)
                    self._kill(child)
                    break
                self._listen(woken, left)
            self._reap(child)
