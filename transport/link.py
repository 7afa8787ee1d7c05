"""One client's connection to one owner: a window, a socket and its monitor. Never waits.

Both clients and nothing else are built on it: `flush` sends what is due, `take` receives what has
come and settles it. When the connection comes up again, all that is unanswered goes again and all
subscriptions are renewed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

import msgspec
import zmq

from ksi.transport.errors import Forbidden, Invalid, KsiError, from_wire
from ksi.transport.mailbox import read_monitor
from ksi.transport.window import Cut, Outcome, Pending, Window
from ksi.transport.wire import Kind, Subscribe

_EVENTS: Final = int(zmq.EVENTS)  # Enums would be converted on every call.
_POLLIN: Final = int(zmq.POLLIN)
_NOW: Final = int(zmq.DONTWAIT)
CREDIT: Final = 256  # Messages an owner may send ahead of their reader.
SILENCE_S: Final = 1.0  # After this long without an answer what is unanswered is sent again.
CROWDED_S: Final = 0.1  # An owner that takes nothing in is given this long before the next try.


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One message that was announced under `topic` by `sender`.

    `seq` numbers what was announced to a subscription from 1, for each connection; `gap` is how
    many were missed right before this one. A notice of a gap alone has `topic` "" and no message.
    """

    topic: str
    sender: str
    seq: int
    gap: int
    body: bytes
    redelivered: bool = False

    @property
    def message(self) -> Any:
        """The message; None of a notice of a gap.

        Raises:
            Invalid: its sender has sent what is no message.
        """
        try:
            return msgspec.msgpack.decode(self.body) if self.topic else None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Invalid(f"{self.sender} sent what is no message: {error}") from None


@dataclass(slots=True)
class Subscribed:
    """One subscription of this client: what has come and is not yet taken."""

    number: int
    pattern: str
    credit: int = CREDIT
    arrived: deque[Delivery] = field(default_factory=deque)
    received: int = 0  # since the connection came up
    granted: int = 0  # likewise
    error: KsiError | None = None
    ready: bool = False
    wake: Callable[[], None] = lambda: None

    def fail(self, error: KsiError) -> None:
        """Nothing more will come, and this is why."""
        self.error = error
        self.ready = True
        self.wake()


class Link:
    """The way to one owner."""

    def __init__(
        self,
        owner: str,
        dealer: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        cut: Cut | None = None,
    ) -> None:
        """`cut` is shared with the links to other owners."""
        self.owner = owner
        self.dealer = dealer
        self.monitor = monitor
        self.window = Window(cut=cut)
        self.up = False
        self.denied = False
        self.closed = False
        self._torn = b""  # the instance that a connection ended under
        self.failures = 0  # attempts to connect since it was up, over tcp
        self.subscribed: dict[int, Subscribed] = {}
        self.heard_s = 0.0  # when something last came, or was first waited for
        self.alone_s: float | None = None  # since when no supervisor has been seen
        self._numbers = count(1)  # Never used again: what was sent to one is for no other.
        self._unsent: deque[bytes] = deque()  # control frames there was no room for

    def flush(self, now_s: float) -> None:
        """Send all that is due and can be sent now."""
        if not self.up:
            return
        try:
            self._send_unsent()
            for frame in self.window.frames(now_s):
                self.dealer.send(frame, _NOW)
        except zmq.Again:
            self.window.lost()  # Part of it may have gone: the owner knows numbers it has seen.
            self.window.not_before_s = now_s + CROWDED_S

    def take(self, now_s: float) -> list[Outcome]:
        """Receive all that has come; return what it settles."""
        outcomes: list[Outcome] = []
        # Asked first: an exception for "nothing there" costs more than all else in here.
        if int(self.monitor.getsockopt(_EVENTS)) & _POLLIN:
            for change in read_monitor(self.monitor):
                self._changed(change, now_s, outcomes)
        receive, dealer = self.window.receive, self.dealer
        while int(dealer.getsockopt(_EVENTS)) & _POLLIN:
            self.heard_s = now_s
            outcomes += receive(dealer.recv(_NOW), now_s)
        if self.window.subscribed:
            self._answered()
        if self.window.deliveries:
            self._delivered()
        return outcomes

    def due(self, now_s: float) -> bool:
        """Whether there is something to send: after a refusal's pause, or after silence."""
        window = self.window
        if window.waiting() and now_s - self.heard_s > SILENCE_S:
            self.heard_s = now_s
            window.lost()
        return (window.unsent() or bool(self._unsent)) and now_s >= window.not_before_s

    def expired(self, now_s: float) -> list[Pending]:
        """Return the requests whose deadline has passed and whose caller still waits."""
        late = []
        for waiting in (self.window.commands, self.window.queries):
            for pending in waiting.values():
                deadline_s = pending.deadline_s
                if deadline_s and deadline_s <= now_s and pending.future is not None:
                    late.append(pending)
        return late

    def subscribe(self, pattern: str, credit: int = CREDIT) -> Subscribed:
        """Add a subscription; it is renewed whenever the connection comes up.

        `credit` is how many messages the owner may send ahead of their reader.
        """
        number = next(self._numbers)
        subscribed = self.subscribed[number] = Subscribed(number, pattern, credit)
        if self.up:
            self._ask(subscribed)
        return subscribed

    def unsubscribe(self, subscribed: Subscribed) -> None:
        """End a subscription."""
        self.subscribed.pop(subscribed.number, None)
        self._control(Kind.UNSUBSCRIBE, [subscribed.number])

    def next_delivery(self, subscribed: Subscribed) -> Delivery:
        """Take the next delivery that has arrived, and grant credit for more in time."""
        delivery = subscribed.arrived.popleft()
        self._grant(subscribed)
        return delivery

    def all_deliveries(self, subscribed: Subscribed) -> list[Delivery]:
        """Take all that have arrived, likewise."""
        deliveries = list(subscribed.arrived)
        subscribed.arrived.clear()
        self._grant(subscribed)
        return deliveries

    def descriptors(self) -> tuple[int, int]:
        """Return what to poll: they signal edges, so take until nothing is left."""
        return int(self.dealer.getsockopt(zmq.FD)), int(self.monitor.getsockopt(zmq.FD))

    def readable(self) -> bool:
        """Whether a frame waits."""
        return not self.closed and bool(int(self.dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def hello(self) -> None:
        """Ask who is there; `window.welcome` is the answer."""
        self._control(Kind.HELLO, [])

    def may_leave(self) -> bool:
        """Whether a goodbye would be the last word of this instance: all is answered, and came over
        this one connection. What a former one has not delivered yet may arrive behind it, and would
        be carried out again by an owner that has forgotten the instance.
        """
        window = self.window
        return self.up and not window.commands and window.instance != self._torn

    def goodbye(self) -> None:
        """Tell the owner that this instance is done; `window.farewell` is the answer."""
        self._control(Kind.GOODBYE, [])

    def close(self) -> None:
        """Close the sockets."""
        self.up, self.closed = False, True
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(0)

    def _changed(self, change: str, now_s: float, outcomes: list[Outcome]) -> None:
        if change == "up":
            self.up, self.denied, self.heard_s, self.failures = True, False, now_s, 0
            self.window.not_before_s = 0.0  # It was the former one that was to be given time.
            for subscribed in self.subscribed.values():
                self._ask(subscribed)
        elif change == "down":
            if self.up:
                self._torn = self.window.instance
            self.up = False
            self._unsent.clear()
            self.window.lost()
        elif change == "failed":
            self.failures += 1
        elif change == "denied":
            self.denied = True
            error = Forbidden(
                f"{self.owner} does not admit this key",
                hint="ksi agents list shows who is enrolled; ksi agents enroll NAME enrols",
            )
            outcomes += [(pending, None, error) for pending in self.window.give_up()]
            for subscribed in self.subscribed.values():
                subscribed.fail(error)

    def _grant(self, subscribed: Subscribed) -> None:
        # What has come and is not taken, and what may still come, are `credit` at the most.
        grant = subscribed.received + subscribed.credit - len(subscribed.arrived)
        if grant - subscribed.granted >= (subscribed.credit + 1) // 2:
            subscribed.granted = grant
            self._control(Kind.CREDIT, [(subscribed.number, grant)])

    def _ask(self, subscribed: Subscribed) -> None:
        subscribed.granted = max(0, subscribed.credit - len(subscribed.arrived))
        subscribed.received = 0
        asked = Subscribe(subscribed.number, subscribed.pattern, subscribed.granted)
        self._control(Kind.SUBSCRIBE, [asked])

    def _control(self, kind: Kind, items: list[Any]) -> None:
        if self.up:
            self._unsent.append(self.window.control(kind, items))
            with suppress(zmq.Again):
                self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent:
            self.dealer.send(self._unsent[0], zmq.DONTWAIT)
            self._unsent.popleft()

    def _answered(self) -> None:
        answers, self.window.subscribed = self.window.subscribed, []
        for answer in answers:
            subscribed = self.subscribed.get(-answer.number)
            if subscribed is not None:
                subscribed.ready = True
                subscribed.error = from_wire(answer.error) if answer.error else None
                subscribed.wake()

    def _delivered(self) -> None:
        runs, self.window.deliveries = self.window.deliveries, []
        for run in runs:
            subscribed = self.subscribed.get(run.number)
            if subscribed is None:
                continue
            arrive, seq, gap = subscribed.arrived.append, run.seq, run.gap
            if not run.said:
                arrive(Delivery("", "", seq, gap, b""))
            for said in run.said:
                for body in said.bodies:
                    arrive(Delivery(said.topic, said.sender, seq, gap, body))
                    seq, gap = seq + 1, 0
            subscribed.received += seq - run.seq
            subscribed.wake()
