"""What goes wrong on purpose: paused owners, killed owners, peers that follow no rule."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq
from system import System

from ksi.actors.owners import OWNERS
from ksi.actors.reading import reader_of
from ksi.actors.supervision.lock import holder
from ksi.transport.identity import Certificate, Directory, KeyRing

WAIT_S = 10.0
pack = msgspec.msgpack.encode
unpack = msgspec.msgpack.decode


def until(true: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """Wait until something holds, and return it."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)  # This is what polls conditions.
    return found


@contextmanager
def paused(system: System, name: str = "sessions") -> Iterator[int]:
    """Stop a child in its tracks, as a debugger or a starved machine would; then let it go on."""
    pid = living(system, name)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def paused_supervisor(system: System) -> Iterator[int]:
    """Stop the supervisor: nothing is restarted meanwhile."""
    held = holder(system.var)
    assert held is not None
    os.kill(held.pid, signal.SIGSTOP)
    try:
        yield held.pid
    finally:
        os.kill(held.pid, signal.SIGCONT)


def kill(system: System, name: str = "sessions") -> None:
    """Kill a child that runs, and wait until the kernel has it gone."""
    pid = living(system, name)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not _is_alive(pid))


def kill_all(system: System) -> None:
    """Kill the supervisor, and wait until all its children are gone with it."""
    pids = [living(system, name) for name in (*OWNERS, "files")]
    held = holder(system.var)
    assert held is not None
    os.kill(held.pid, signal.SIGKILL)
    until(lambda: not any(_is_alive(pid) for pid in (held.pid, *pids)))


def living(system: System, name: str = "sessions") -> int:
    """Return the process of a child, waiting for it if it is being restarted."""

    def find() -> int | None:
        pid = system.pid_of(name)
        return pid if _is_alive(pid) else None

    pid: int = until(find)
    return pid


def _is_alive(pid: int | None) -> bool:
    try:
        return pid is not None and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def entries(system: System, session_id: str) -> list[dict[str, Any]]:
    """Return all of a session, as it is on disk."""
    with system.client("reader") as reader:
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            page = reader.read("session:history", session_id=session_id, after=after, limit=1000)
            found += page["entries"]
            after = page["next"]
        return found


def rows(system: System, owner: str, table: str, prefix: tuple[str, ...] = ()) -> list[Any]:
    """Return the keys of a table in an owner's committed state."""
    reader = reader_of(owner, system.var).reader
    return reader.read(lambda tables, _: [key for key, _ in tables[table].range(prefix=prefix)])


def rss_mb(pid: int | None) -> float:
    return float(psutil.Process(pid).memory_info().rss) / (1 << 20)


HELLO, COMMANDS, QUERIES, SUBSCRIBE, UNSUBSCRIBE, CREDIT, GOODBYE = range(1, 8)
WELCOME, REPLIES, ANSWERS, DELIVERIES, RESEND_FROM, FAREWELL = range(65, 71)
CREATE: list[Any] = [1, "session:create", pack({})]


class Stranger:
    """A peer with a key that sends whatever a test wants."""

    def __init__(self, var: Path, name: str, owner: str = "sessions") -> None:
        self.place = Directory.read(var).owners[owner]
        self.certificate: Certificate = KeyRing(var).enroll(name)
        self.instance = os.urandom(16)
        self.store = ""
        self._context: Any = zmq.Context()
        self.socket = self.connected(self.certificate.public, self.certificate.secret)

    def connected(self, public: bytes | None, secret: bytes | None) -> Any:
        """Return a new connection, proving this key pair or none."""
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = 1
        socket.reconnect_ivl, socket.reconnect_ivl_max = 1, 16
        socket.sndtimeo = socket.rcvtimeo = int(WAIT_S * 1000)
        if public is not None:
            socket.curve_serverkey = self.place.key.encode()
            socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.connect(self.place.endpoint)
        return socket

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._context.destroy(linger=0)

    def frame(self, kind: int, items: list[Any], **header: Any) -> bytes:
        """Return a frame; `header` replaces parts of its head."""
        parts: dict[str, Any] = {
            "version": 1, "kind": kind, "store": self.store, "cut": 0, "instance": self.instance,
            "acked": 0, "again": False,
        }  # fmt: skip
        return pack([*(parts | header).values(), items])

    def send(self, kind: int, items: list[Any], **header: Any) -> None:
        self.socket.send(self.frame(kind, items, **header))

    def receive(self) -> tuple[int, list[Any]]:
        """Return kind and items of the next frame."""
        _version, kind, self.store, _cut, items = unpack(self.socket.recv())
        return kind, items

    def ask(self, kind: int, items: list[Any], **header: Any) -> tuple[int, list[Any]]:
        self.send(kind, items, **header)
        return self.receive()

    def error(self, number: int, operation: str, body: bytes) -> list[Any]:
        """Send one command, all before it being answered, and return how it is refused."""
        _, [answer] = self.ask(COMMANDS, [[number, operation, body]], acked=number - 1)
        assert answer[:2] == [number, None], answer
        refusal: list[Any] = answer[2]
        return refusal

    def is_served(self) -> bool:
        """Whether the owner answers on this very connection."""
        return self.ask(HELLO, [])[0] == WELCOME

    def silent(self, wait_s: float = 0.1) -> bool:
        """Whether nothing comes."""
        return not self.socket.poll(int(wait_s * 1000))
