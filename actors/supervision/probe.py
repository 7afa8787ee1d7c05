"""Whether a child that was started is ready: asked again and again, never waited for.

A follower is ready when its stat file says `running`. An owner has to answer: a HELLO over a
connection like any client's. What counts in both is the pid: a predecessor's word is not its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ksi.actors.stat import read_stat
from ksi.transport import wire
from ksi.transport.mailbox import read_monitor
from ksi.transport.wire import Kind

Connect = Callable[[], tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]

_decode_frame = msgspec.msgpack.Decoder(wire.OwnerFrame).decode


class Probe:
    """Asks one child.

    Args:
        stat: the child's stat file.
        connect: makes a connection to an owner; None for a follower.
    """

    def __init__(self, stat: Path, connect: Connect | None) -> None:
        self._stat = stat
        self._connect = connect
        self._sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]] | None = None

    def is_ready(self, pid: int) -> bool:
        """Return whether the process `pid` is ready by now."""
        if self._sockets is None:
            stat = read_stat(self._stat)
            if stat is None or stat.pid != pid or stat.state != "running":
                return False  # Nor is it disturbed by a connection before it can answer.
            if self._connect is None:
                return True
            self._sockets = self._connect()
        return self._answers(*self._sockets, pid)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._sockets is not None:
            dealer, monitor = self._sockets
            dealer.disable_monitor()
            monitor.close(0)
            dealer.close(0)
            self._sockets = None

    def _answers(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes], pid: int) -> bool:
        try:
            for change in read_monitor(monitor):
                if change == "up":
                    dealer.send(_hello(), zmq.DONTWAIT)
                elif change == "denied":
                    self.close()  # ZeroMQ would go on asking; the next call asks once
                    return False
            while _pid_of(dealer.recv(zmq.DONTWAIT)) != pid:
                pass
        except zmq.Again:
            return False
        return True


def _hello() -> bytes:
    frame: Any = wire.Frame(wire.VERSION, Kind.HELLO, "", 0, os.urandom(16), 0, False, [])
    return wire.encode(frame)


def _pid_of(payload: bytes) -> int | None:
    """Return the pid in a WELCOME, or None if the frame is none."""
    try:
        frame = _decode_frame(payload)
        if frame.kind != Kind.WELCOME:
            return None
        return msgspec.convert(frame.items[0], wire.Welcome).pid
    except (msgspec.MsgspecError, ValueError, IndexError):
        return None
