"""One client's subscriptions at one owner: what is taken, what is granted, and what was missed."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest
import zmq

from ksi.transport import wire
from ksi.transport.errors import Invalid
from ksi.transport.link import CREDIT, Link, Subscribed
from ksi.transport.wire import Kind


class Socket:
    """Stands for a DEALER that is up, and for its silent monitor."""

    def __init__(self) -> None:
        self.arriving: deque[bytes] = deque()
        self.sent: list[wire.Frame] = []

    def getsockopt(self, _option: int) -> int:
        return int(zmq.POLLIN) if self.arriving else 0

    def recv(self, _flags: int) -> bytes:
        return self.arriving.popleft()

    def send(self, frame: bytes, _flags: int) -> None:
        self.sent.append(msgspec.msgpack.decode(frame, type=wire.Frame))


class Owner:
    """The other end of a link."""

    def __init__(self) -> None:
        self.socket = Socket()
        silent: Any = Socket()
        dealer: Any = self.socket
        self.link = Link("bus", dealer, silent)
        self.link.up = True

    def says(self, *runs: wire.Run) -> None:
        frame = wire.OwnerFrame(wire.VERSION, Kind.DELIVERIES, "store", 0, list(runs))
        self.socket.arriving.append(wire.encode(frame))
        self.link.take(0.0)

    def granted(self) -> list[Any]:
        """Return the totals of credit it was given."""
        frames = [frame for frame in self.socket.sent if frame.kind == Kind.CREDIT]
        return [total for frame in frames for _number, total in frame.items]


def run(number: int, seq: int, gap: int, *bodies: int) -> wire.Run:
    said = [wire.Said("a", "alice", [wire.encode({"n": n}) for n in bodies])] if bodies else []
    return wire.Run(number, seq, gap, said)


def all_of(owner: Owner, subscribed: Subscribed) -> list[tuple[int, int, Any]]:
    taken = owner.link.all_deliveries(subscribed)
    return [(each.seq, each.gap, each.message and each.message["n"]) for each in taken]


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_a_gap_is_of_the_first_message_of_a_run_and_the_others_follow(owner: Owner) -> None:
    news = owner.link.subscribe("a")
    owner.says(run(1, 1, 0, 10, 11), run(1, 8, 5, 17, 18))
    assert all_of(owner, news) == [(1, 0, 10), (2, 0, 11), (8, 5, 17), (9, 0, 18)]


def test_a_notice_of_a_gap_has_no_message_and_uses_no_credit(owner: Owner) -> None:
    news = owner.link.subscribe("a", credit=2)
    owner.says(run(1, 1, 0, 10), run(1, 9, 8))
    assert all_of(owner, news) == [(1, 0, 10), (9, 8, None)]
    assert owner.granted() == [3]
    owner.says(run(1, 12, 3))
    (notice,) = owner.link.all_deliveries(news)
    assert (notice.topic, notice.sender, notice.message) == ("", "", None)
    assert owner.granted() == [3]


def test_every_message_announced_is_either_taken_or_in_a_gap(owner: Owner) -> None:
    news = owner.link.subscribe("a", credit=4)
    owner.says(run(1, 1, 0, 1, 2, 3, 4))
    owner.says(run(1, 20, 16))
    owner.says(run(1, 23, 2, 23))
    taken = all_of(owner, news)
    assert sum(gap + (n is not None) for _, gap, n in taken) == 23


def test_what_is_not_taken_and_what_may_come_are_the_credit_together(owner: Owner) -> None:
    news = owner.link.subscribe("a")
    owner.says(run(1, 1, 0, *range(CREDIT)))
    for taken in range(1, CREDIT + 1):
        owner.link.next_delivery(news)
        assert owner.granted() == [
            CREDIT + CREDIT // 2 * n for n in range(1, taken * 2 // CREDIT + 1)
        ]


def test_what_was_for_a_subscription_that_ended_reaches_no_other(owner: Owner) -> None:
    former = owner.link.subscribe("a")
    owner.link.unsubscribe(former)
    news = owner.link.subscribe("a")
    owner.says(run(1, 1, 0, 10), run(2, 1, 0, 20))
    assert all_of(owner, news) == [(1, 0, 20)]
    assert not former.arrived


def test_a_message_that_is_none_is_refused_when_it_is_looked_at_and_harms_no_other(
    owner: Owner,
) -> None:
    news = owner.link.subscribe("a")
    bodies = [b"\xa2\xff\xff", wire.encode({"n": 2})]
    owner.says(wire.Run(1, 1, 0, [wire.Said("a", "eve", bodies)]))
    bad, good = owner.link.all_deliveries(news)
    with pytest.raises(Invalid, match="eve sent what is no message"):
        _ = bad.message
    assert good.message == {"n": 2}
