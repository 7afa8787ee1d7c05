"""Messages to other owners: written with the events, sent after commit, effectively once.

An owner is to another owner what any client is: a window of numbered commands under a key of its
own. What differs is that numbers and bodies are rows of its store and its instance is the same for
the life of the store and of all that are restored from it, so that after a restart, or a restore of
one cut of all owners, it goes on where it was. A row is removed by a record in the journal once the
other owner has answered.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from ksi.actors.delivery import SENT, Answered, Record
from ksi.transport.errors import KsiError
from ksi.transport.link import SILENCE_S
from ksi.transport.mailbox import read_monitor
from ksi.transport.window import Cut, Window

Connect = Callable[[str], tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]
Waiting = tuple[int, str, bytes, bool]  # number, operation, body, whether it was sent before


class Peer:
    """The way to one other owner."""

    def __init__(self, instance: bytes, cut: Cut, dealer: zmq.Socket[bytes], monitor: Any) -> None:
        self.window = Window(instance, cut)
        self.dealer = dealer
        self.monitor = monitor
        self.waiting: deque[Waiting] = deque()  # beyond what the window takes
        self.up = False
        self.heard_s = 0.0  # when something last came, or was first waited for
        self.sent_upto = 0  # answered, and not yet recorded

    def flush(self, now_s: float) -> None:
        """Send all that the window lets through."""
        window = self.window
        if not window.waiting():
            self.heard_s = now_s
        elif now_s - self.heard_s > SILENCE_S:
            self.heard_s = now_s
            window.lost()
        while self.waiting and not window.full():
            number, operation, body, again = self.waiting.popleft()
            window.resume(number, operation, body, again=again)
        if self.up:
            for frame in window.frames(now_s):
                self.dealer.send(frame, zmq.DONTWAIT)


class Outbox:
    """All peers of one owner. Driven by the host: `push` after commit, `turn` each turn.

    Attributes:
        cut: the highest checkpoint number that its owner or another has told.
        answers: what other owners have answered, for its owner to take.
    """

    def __init__(self, lineage: str, connect: Connect, log: Any) -> None:
        self._lineage = lineage
        self._connect = connect
        self._log = log
        self._peers: dict[str, Peer] = {}
        self.cut = Cut()
        self.answers: list[Answered] = []

    def push(
        self, owner: str, number: int, operation: str, body: bytes, *, again: bool = False
    ) -> list[zmq.Socket[bytes]]:
        """Take up a message whose row is on disk; return sockets to watch from now on, if any.

        `again`: it was there before this process, which may not be the first to send it.
        """
        opened: list[zmq.Socket[bytes]] = []
        peer = self._peers.get(owner)
        if peer is None:
            instance = hashlib.blake2b(f"{self._lineage}/{owner}".encode(), digest_size=16)
            peer = self._peers[owner] = Peer(instance.digest(), self.cut, *self._connect(owner))
            opened = [peer.dealer, peer.monitor]
        peer.waiting.append((number, operation, body, again))
        return opened

    def turn(self, now_s: float) -> list[Record[Any]]:
        """Send and receive what can be; return the records of what other owners have answered."""
        records: list[Record[Any]] = []
        for owner, peer in self._peers.items():
            for change in read_monitor(peer.monitor):
                peer.up = change == "up"
                peer.window.lost()
            self._receive(owner, peer, now_s)
            try:
                peer.flush(now_s)
            except zmq.Again:
                peer.window.lost()  # Not connected after all; the monitor will tell.
            if peer.sent_upto:
                records.append(Record(owner, b"", peer.sent_upto, SENT, b"", [], []))
                peer.sent_upto = 0
        return records

    def recorded(self, owner: str, number: int) -> None:
        """It is on disk that messages up to this number are answered: the answers may go."""
        peer = self._peers.get(owner)
        if peer is not None and peer.window.recorded is not None:
            peer.window.recorded = max(peer.window.recorded, number)

    def close(self) -> None:
        """Close the sockets; what was not answered stays in its rows."""
        for peer in self._peers.values():
            peer.dealer.close(0)
            peer.monitor.close(0)

    def _receive(self, owner: str, peer: Peer, now_s: float) -> None:
        while True:
            try:
                frame = peer.dealer.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            peer.heard_s = now_s
            again: list[Waiting] = []
            outcomes = peer.window.receive(frame, now_s)
            for pending, _body, error in outcomes:
                if error is not None and error.code in ("restored", "evicted"):
                    # Nobody knows whether it happened there. Twice is better than not at all.
                    again.append((pending.number, pending.operation, pending.body, False))
                    continue
                if error is not None:
                    self._refused(owner, pending.operation, error)
                self.answers.append(Answered(owner, pending.operation, pending.body, error))
            peer.waiting.extendleft(reversed(again))
            if outcomes:
                lowest = peer.waiting[0][0] if peer.waiting else peer.window.acked + 1
                peer.sent_upto = min(peer.window.acked, lowest - 1)

    def _refused(self, owner: str, operation: str, error: KsiError) -> None:
        self._log.warning(
            "another owner refused a message", owner=owner, operation=operation, error=str(error)
        )
