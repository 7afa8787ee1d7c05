"""Starts children: forked from a clean fork server, bound to the supervisor's life.

    supervisor ── starts, main thread ──▶ fork server ── forks ──▶ child
        └──── kill -9 ──▶ PDEATHSIG kills it ──▶ PDEATHSIG kills it

1. The fork server (`forking.py`) is an interpreter of its own, started by the supervisor's main
   thread before anything heavy is imported. A child costs a fork, not an interpreter.
2. A child sits in a session of its own, with umask 077, standard output and error in
   `var/logs/ksi/<name>.out`, and nothing of the supervisor's open files.
3. It waits to be told what to become: when it is, the supervisor holds its pidfd, so that signals
   and the news of its end can never concern another process. One may be kept waiting as a spare:
   whoever is restarted then need not wait for a fork.
4. A command line is started in the same way and then replaces the child by exec. What keeps it
   from running is the answer of `spawn`, not a crash loop.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from ksi.actors import log
from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.forking import Order
from ksi.transport.errors import Invalid

EXEC_S_MAX: Final = 5.0  # From fork to a running program; more, and the machine is on its knees.
ANSWER_S_MAX: Final = 20.0  # To load all takes half a second, a cold disk ten; more, and it hangs.
EXIT_CODE_S_MAX: Final = 1.0  # From a signal that kills to the end of a process.

_MAIN: Final = "from ksi.actors.supervision.forking import serve; serve()"
_ANSWER_BYTES_MAX: Final = 1 << 14  # A fault is a thousand characters.


class _Server:
    """One process of the fork server. All of it raises OSError once it has ended.

    One that does not answer, being stopped or hanging, is killed: nobody could be started again.
    """

    def __init__(self, modules: str) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(ANSWER_S_MAX)
        with theirs:
            # -P: what lies in the current directory is not imported by mistake.
            command = [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [*command, modules], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fault(self) -> str:
        """Return what keeps it from loading its modules, and where, or nothing."""
        return self._ask("fault").decode()

    def forked(self, place: int, like: int | None) -> int:
        """Return the pid of a new child, which has the descriptor `place`."""
        pid = int(self._ask(f"fork {like or ''}", [place]))
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def reaped(self, pid: int) -> int:
        """Return the exit code of its child, which has ended or is about to."""
        return int(self._ask(f"reap {pid}"))

    def end(self) -> None:
        """Kill it, and so its children."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, request: str, descriptors: Sequence[int] = ()) -> bytes:
        try:
            socket.send_fds(self._channel, [request.encode()], descriptors)
            answer = self._channel.recv(_ANSWER_BYTES_MAX)
        except TimeoutError:
            self._process.kill()
            self._channel.shutdown(socket.SHUT_RDWR)  # What it may yet have answered is nothing.
            raise ConnectionAbortedError("the fork server did not answer") from None
        if not answer:
            raise ConnectionResetError("the fork server has ended")
        return answer[1:]


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that `server` has forked. `pidfd` is readable from its end on."""

    server: _Server
    pid: int
    pidfd: int

    def signal(self, number: int) -> None:
        """Send a signal to this very process; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reaped(self) -> int | None:
        """Forget it, which has ended or is about to; return its exit code, None if it is lost."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        try:
            return self.server.reaped(self.pid) if poll.poll(EXIT_CODE_S_MAX * 1000) else None
        except OSError:
            return None
        finally:
            os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class Running(_Child):
    """A child process, running or ended."""

    spec: ChildSpec
    started_s: float

    def ended(self) -> int | None:
        """Clear up after the end of the child: what it left running goes, too.

        Returns:
            Its exit code (-n: signal n), or None if that is lost.
        """
        if (
            self.spec.kind == "agent"
        ):  # Its pid is its own, and that of its group, until it is reaped.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        return self.reaped()


@dataclass(frozen=True, slots=True)
class _Waiting(_Child):
    """A child that waits to be told, through `channel`, what to become."""

    channel: socket.socket

    def told(self, order: Order) -> bool:
        """Tell it; return False if it has ended, or is about to, since its server has."""
        try:
            if _parent_of(self.pid) != self.server.pid:
                return False
            self.channel.sendall(msgspec.msgpack.encode(order))
            self.channel.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        return True

    def end(self) -> None:
        """Kill it, which is to become nothing."""
        self.channel.close()
        self.signal(signal.SIGKILL)
        self.reaped()


class ForkServer:
    """The fork server of a supervisor, started anew if it dies (its children die with it).

    It loads `modules`: each `module`, or `module:function` to be called.

    Use it from the supervisor's main thread only: when that thread ends, all children do.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = ",".join(modules)
        self._server: _Server | None = None
        self._spare: _Waiting | None = None

    def start(self) -> None:
        """Start the server if it does not run; it loads its modules while the caller goes on."""
        if self._server is None:
            self._server = _Server(self._modules)

    def fault(self) -> str | None:
        """Return what keeps the server from loading its modules, and where; None: nothing."""
        self.start()
        assert self._server is not None
        try:
            return self._server.fault() or None
        except OSError:
            return "the fork server loads nothing"

    def spawn(self, spec: ChildSpec, var: Path, environment: Mapping[str, str]) -> Running:
        """Start a child and return it; an agent's program runs when this returns.

        `environment` is set on top of the supervisor's own.

        Raises:
            Invalid: the program of an agent cannot be run; the text says why.
            OSError: no process can be started.
        """
        log.make_directory(var)  # Here its want is that of all children together.
        output = str(log.output(var, spec.name))
        order = Order(output, dict(environment), spec.arguments, spec.function, spec.cwd)
        waiting, self._spare = self._spare, None
        if waiting is not None and not waiting.told(order):
            waiting.end()
            waiting = None
        if waiting is None:
            waiting = self._forked()
            waiting.told(order)  # If it has ended, its pidfd says so like that of any child.
        with waiting.channel as channel:
            server, pid, pidfd = waiting.server, waiting.pid, waiting.pidfd
            running = Running(server, pid, pidfd, spec, time.monotonic())
            if spec.kind == "agent" and (fault := _fault(channel)):
                running.signal(signal.SIGKILL)
                running.ended()
                raise Invalid(f"agent {spec.name} cannot be started: {fault}"[:1000])
            return running

    def keep_spare(self, like: int | None) -> None:
        """Have a child wait for the next `spawn`, if there is none yet: a fork less to wait for.

        It has copied already the pages that `like`, another child, has written to.
        """
        if self._spare is None:
            with contextlib.suppress(OSError):  # The server is dying: another time.
                self._spare = self._forked(like)

    def end(self) -> None:
        """End the server and the spare, and with them all children."""
        if self._spare is not None:
            self._spare.channel.close()
            os.close(self._spare.pidfd)
            self._spare = None
        if self._server is not None:
            self._server.end()
            self._server = None

    def _forked(self, like: int | None = None) -> _Waiting:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                server, pid = self._fork(theirs.fileno(), like)
                return _Waiting(server, pid, os.pidfd_open(pid), ours)
            except BaseException:
                ours.close()
                raise

    def _fork(self, place: int, like: int | None) -> tuple[_Server, int]:
        """Have a child forked, by another server if the one there was has ended."""
        self.start()
        assert self._server is not None
        try:
            return self._server, self._server.forked(place, like)
        except ConnectionError:
            self._server.end()
            self._server = _Server(self._modules)
            return self._server, self._server.forked(place, like)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _fault(channel: socket.socket) -> str | None:
    """Return why exec failed, or None: the channel closes when it succeeds."""
    channel.settimeout(EXEC_S_MAX)
    try:
        return channel.recv(_ANSWER_BYTES_MAX).decode() or None
    except TimeoutError:
        return f"it does not run after {EXEC_S_MAX:.0f} s"
    except OSError:
        return None
