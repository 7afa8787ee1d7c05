"""Starts children: forked from a clean fork server, bound to the supervisor's life.

    supervisor ── starts, main thread ──▶ fork server ── forks ──▶ child
        └──── kill -9 ──▶ PDEATHSIG kills it ──▶ PDEATHSIG kills it

1. The fork server (`multiprocessing`) is started by the supervisor's main thread before anything
   heavy is imported. It loads what children need (`preload.py`), has one thread, and never a
   ZeroMQ context or an LMDB environment. A child costs a fork, not an interpreter.
2. A child sits in a session of its own, with umask 077, standard output and error in
   `var/logs/ksi/<name>.out`, and nothing of the supervisor's open files.
3. It waits to be told what to become: when it is, the supervisor holds its pidfd, so that signals
   and the news of its end can never concern another process. One may be kept waiting as a spare:
   whoever is restarted then need not wait for a fork.
4. A command line is started in the same way and then replaces the child by exec. What keeps it
   from running is the answer of `spawn`, not a crash loop.

The supervisor must run with a `__main__` that is cheap to import, best none at all (`python -c`):
Python 3.11 imports it again in every child.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

from ksi.actors import log
from ksi.actors.memory import copy_as
from ksi.actors.supervision import preload
from ksi.actors.supervision.child import ChildSpec
from ksi.transport.errors import Invalid
from ksi.transport.limits import SOCKET_PATH_BYTES_MAX

EXEC_S_MAX: Final = 5.0  # From fork to a running program; more, and the machine is on its knees.
EXIT_CODE_S_MAX: Final = 1.0  # The code follows the end of a child through the fork server.
EXIT_NOT_RUN: Final = 127  # What shells say of a program that cannot be run.
_SOCKET_NAME_BYTES: Final = 32  # The server's socket in the temporary directory: /pymp-…/listener-…

_context = multiprocessing.get_context("forkserver")


@dataclass(slots=True)
class Running:
    """A child process, running or ended. `pidfd` is readable from its end on."""

    spec: ChildSpec
    pid: int
    pidfd: int
    started_s: float
    process: ForkServerProcess

    def signal(self, number: int) -> None:
        """Send a signal to this very process; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def ended(self) -> int | None:
        """Clear up after the end of the child: what it left running goes, too.

        Returns:
            Its exit code (-n: signal n), or None if that is lost.
        """
        self.process.join(EXIT_CODE_S_MAX)
        code = self.process.exitcode
        if self.spec.kind == "agent":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        os.close(self.pidfd)
        if code is not None:
            self.process.close()
        return code


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A child of `server` that waits to be told, through `channel`, what to become."""

    pid: int
    pidfd: int
    server: int
    process: ForkServerProcess
    channel: Connection

    def told(self, order: tuple[ChildSpec, Path, dict[str, str]]) -> bool:
        """Tell it; return False if it has ended, or is about to, since its server has."""
        try:
            if _parent_of(self.pid) != self.server:
                return False
            self.channel.send(order)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of it."""
        self.channel.close()
        os.close(self.pidfd)


class ForkServer:
    """The fork server of a supervisor, started anew if it dies (its children die with it).

    It loads `modules`: each `module`, or `module:function` to be called.

    Use it from the supervisor's main thread only: when that thread ends, all children do.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._spare: _Waiting | None = None
        self._modules = ",".join(("ksi.actors.supervision.forkserver", *modules))
        multiprocessing.set_forkserver_preload(["ksi.actors.supervision.preload"])
        atexit.register(self._end_spare)
        _track_nothing()

    def start(self) -> None:
        """Start the server if it does not run; it loads its modules while the caller goes on."""
        temporary = os.fsencode(tempfile.gettempdir())
        if len(temporary) + _SOCKET_NAME_BYTES > SOCKET_PATH_BYTES_MAX:
            tempfile.tempdir = "/tmp"  # Of this process alone: what it starts keeps its TMPDIR.
        with self._ordered():
            multiprocessing.forkserver.ensure_running()

    @contextlib.contextmanager
    def _ordered(self) -> Iterator[None]:
        """Whoever starts the server meanwhile tells it what to be; nobody else does."""
        os.environ[preload.SUPERVISOR_PID] = str(os.getpid())
        os.environ[preload.MODULES] = self._modules
        try:
            yield
        finally:
            del os.environ[preload.SUPERVISOR_PID], os.environ[preload.MODULES]

    def fault(self) -> str | None:
        """Return what keeps the server from loading its modules, and where; None: nothing."""
        self.start()
        ours, theirs = _context.Pipe()
        with ours, theirs:
            process = _context.Process(target=_tell_fault, args=(self._modules, theirs))
            process.start()
            theirs.close()
            try:
                said = ours.recv_bytes().decode()
            except EOFError:
                said = "the fork server loads nothing"
            process.join()
        return said or None

    def spawn(self, spec: ChildSpec, var: Path, environment: Mapping[str, str]) -> Running:
        """Start a child and return it; an agent's program runs when this returns.

        `environment` is set on top of the supervisor's own.

        Raises:
            Invalid: the program of an agent cannot be run; the text says why.
            OSError: no process can be started.
        """
        order = spec, var, dict(environment)
        waiting, self._spare = self._spare, None
        if waiting is not None and not waiting.told(order):
            waiting.close()
            waiting = None
        if waiting is None:
            waiting = self._forked()
            waiting.told(order)  # If it has ended, its pidfd says so like that of any child.
        with waiting.channel:
            running = Running(spec, waiting.pid, waiting.pidfd, time.monotonic(), waiting.process)
            if spec.kind == "agent" and (fault := _fault(waiting.channel)):
                running.signal(signal.SIGKILL)
                running.ended()
                raise Invalid(f"agent {spec.name} cannot be started: {fault}"[:1000])
            return running

    def keep_spare(self, like: int | None) -> None:
        """Have a child wait for the next `spawn`, if there is none yet: a fork less to wait for.

        It has copied already the pages that `like`, another child, has written to.
        """
        if self._spare is None:
            with contextlib.suppress(OSError, EOFError):  # The server is dying: another time.
                self._spare = self._forked(like)

    def _end_spare(self) -> None:
        """Kill the spare: at the end `multiprocessing` waits for all children, and it for us."""
        if self._spare is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._spare.pidfd, signal.SIGKILL)
            self._spare.close()
            self._spare = None

    def _forked(self, like: int | None = None) -> _Waiting:
        self.start()
        ours, theirs = _context.Pipe()
        with theirs:
            process = _context.Process(target=_child, args=(theirs, like), daemon=True)
            try:
                with self._ordered():  # It may have ended just now: then this starts another.
                    process.start()
                assert process.pid is not None
                server = _parent_of(process.pid)
                return _Waiting(process.pid, os.pidfd_open(process.pid), server, process, ours)
            except BaseException:
                ours.close()
                raise


def _track_nothing() -> None:
    """Keep `multiprocessing` from starting its tracker of semaphores and shared memory: there are
    none, and it is an interpreter of 7 MB. As in whom it has spawned, a descriptor is given."""
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    if tracker._fd is None:
        tracker._fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _tell_fault(modules: str, channel: Connection) -> None:
    """Run in a child: what the server has loaded is here, what has failed fails again."""
    said = ""
    try:
        for place in modules.split(","):
            preload.load(place)
    except Exception as error:
        said = preload.where(error)
    channel.send_bytes(said.encode(errors="replace"))


def _fault(channel: Connection) -> str | None:
    """Return why exec failed, or None: the channel closes when it succeeds."""
    if not channel.poll(EXEC_S_MAX):
        return f"it does not run after {EXEC_S_MAX:.0f} s"
    try:
        return channel.recv_bytes().decode()
    except (EOFError, OSError):
        return None


def _child(channel: Connection, like: int | None) -> None:
    """Run in the child: wait for what to become, and end with it."""
    preload.die_with(preload.server_pid)
    os.setsid()
    os.umask(0o077)
    if like is not None:
        copy_as(like)
    try:
        spec, var, environment = channel.recv()
    except (EOFError, OSError):
        return  # the supervisor has ended
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    log.redirect(log.output(var, spec.name))
    os.environ.update(environment)
    if spec.kind == "agent":
        _exec(spec, channel)
    else:
        _call(spec, channel)


def _call(spec: ChildSpec, channel: Connection) -> None:
    channel.close()
    faulthandler.enable()
    module, _, function = spec.function.partition(":")
    getattr(importlib.import_module(module), function)(*spec.arguments)


def _exec(spec: ChildSpec, channel: Connection) -> None:
    try:
        if spec.cwd is not None:
            os.chdir(spec.cwd)
        for number in (
            signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ,
        ):  # fmt: skip
            signal.signal(number, signal.SIG_DFL)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:
                with contextlib.suppress(OSError):
                    os.set_inheritable(descriptor, False)
        os.execvpe(spec.arguments[0], spec.arguments, os.environ)
    except OSError as error:
        channel.send_bytes(f"{spec.arguments[0]}: {error.strerror}".encode(errors="replace"))
        os._exit(EXIT_NOT_RUN)
