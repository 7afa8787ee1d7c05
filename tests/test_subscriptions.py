"""Fan-out: who hears what, in which order, how much is missed, and what is encoded how often."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.actors.owner import Announcement
from ksi.actors.subscriptions import Deliveries, Subscriptions
from ksi.transport import wire
from ksi.transport.errors import Invalid, Quota
from ksi.transport.limits import CREDIT_MAX, RUN_BYTES_MAX, SUBSCRIPTIONS_MAX

Heard = list[tuple[int, int, str, int]]  # seq, gap, topic, n


def told(*topics: str, sender: str = "alice", first: int = 1) -> list[Announcement]:
    return [Announcement(topic, {"n": n}, sender) for n, topic in enumerate(topics, first)]


def subscribe(
    subscriptions: Subscriptions, route: bytes, pattern: str, credit: int = 100, number: int = 1
) -> None:
    assert subscriptions.add(route, wire.Subscribe(number, pattern, credit)) is None


def heard(deliveries: Deliveries, route: bytes, number: int = 1) -> Heard:
    """Return what a connection hears on a subscription, as its client would take it."""
    found: Heard = []
    for decoded in sent(deliveries, route):
        if decoded.number != number:
            continue
        seq, gap = decoded.seq, decoded.gap
        for said in decoded.said:
            for body in said.bodies:
                found.append((seq, gap, said.topic, msgspec.msgpack.decode(body)["n"]))
                seq, gap = seq + 1, 0
        if not decoded.said:
            found.append((seq, gap, "", 0))
    return found


def sent(deliveries: Deliveries, route: bytes) -> list[wire.Run]:
    """Return the runs of a frame to a connection."""
    frame = wire.encode_runs("store", 0, deliveries.get(route, []))
    return msgspec.msgpack.decode(frame, type=wire.DeliveriesFrame).items


@pytest.fixture
def subscriptions() -> Subscriptions:
    return Subscriptions()


def test_each_hears_what_its_pattern_is_for_in_the_order_it_was_said(
    subscriptions: Subscriptions,
) -> None:
    patterns = {b"exact": "a.b", b"word": "a.*", b"rest": "a.>", b"all": ">", b"none": "b.*"}
    for route, pattern in patterns.items():
        subscribe(subscriptions, route, pattern)

    deliveries = subscriptions.deliver(told("a.b", "a.c", "a.b.c", "a", "a.b"))

    numbers = {route: [n for *_, n in heard(deliveries, route)] for route in patterns}
    assert numbers == {
        b"exact": [1, 5], b"word": [1, 2, 5], b"rest": [1, 2, 3, 5], b"all": [1, 2, 3, 4, 5],
        b"none": [],
    }  # fmt: skip
    assert [seq for seq, *_ in heard(deliveries, b"rest")] == [1, 2, 3, 4]


def test_all_who_share_a_pattern_share_the_bytes(subscriptions: Subscriptions) -> None:
    for number in range(10):
        subscribe(subscriptions, b"%d" % number, "a.>", number=number + 1)

    runs = [run for each in subscriptions.deliver(told("a.b", "a.c")).values() for run in each]

    assert [number for number, *_ in runs] == list(range(1, 11))
    assert len({id(said) for *_, said in runs}) == 1


def test_what_is_beyond_the_credit_is_counted_and_told_before_what_comes_next(
    subscriptions: Subscriptions,
) -> None:
    subscribe(subscriptions, b"slow", "a.>", credit=3)
    subscribe(subscriptions, b"quick", "a.>", credit=100)

    first = subscriptions.deliver(told(*["a.b"] * 5))
    assert [n for *_, n in heard(first, b"slow")] == [1, 2, 3]
    assert [n for *_, n in heard(first, b"quick")] == [1, 2, 3, 4, 5]
    second = subscriptions.deliver(told(*["a.b"] * 5, first=6))
    assert b"slow" not in second

    assert heard(subscriptions.grant(b"slow", 1, 5), b"slow") == [(10, 7, "", 0)]
    third = subscriptions.deliver(told(*["a.b"] * 3, first=11))
    assert heard(third, b"slow") == [(11, 0, "a.b", 11), (12, 0, "a.b", 12)]
    assert heard(subscriptions.grant(b"slow", 1, 6), b"slow") == [(13, 1, "", 0)]


def test_a_grant_is_never_taken_back_and_is_bounded(subscriptions: Subscriptions) -> None:
    subscribe(subscriptions, b"r", ">", credit=2)
    assert subscriptions.grant(b"r", 1, 1) == {}
    assert subscriptions.grant(b"r", 1, 10 * CREDIT_MAX) == {}
    deliveries = subscriptions.deliver(told(*["a"] * (CREDIT_MAX + 5)))
    assert len(heard(deliveries, b"r")) == CREDIT_MAX


def test_what_could_not_be_sent_counts_as_missed_and_not_against_the_credit(
    subscriptions: Subscriptions,
) -> None:
    subscribe(subscriptions, b"r", "a.>", credit=4)
    lost = subscriptions.deliver(told("a.b", "a.c", "a.d"))
    subscriptions.missed(b"r", lost[b"r"])

    assert heard(subscriptions.deliver(told(*["a.b"] * 5)), b"r")[0] == (4, 3, "a.b", 1)
    assert heard(subscriptions.grant(b"r", 1, 5), b"r") == [(8, 1, "", 0)]


def test_a_run_of_large_messages_is_cut_so_that_a_frame_can_hold_it(
    subscriptions: Subscriptions,
) -> None:
    subscribe(subscriptions, b"r", "a", credit=100)
    large = {"n": 0, "text": "x" * (RUN_BYTES_MAX // 3)}

    deliveries = subscriptions.deliver([Announcement("a", large, "alice")] * 10)

    assert [run.seq for run in sent(deliveries, b"r")] == [1, 3, 5, 7, 9]
    assert [seq for seq, *_ in heard(deliveries, b"r")] == list(range(1, 11))


def test_a_signal_is_passed_on_as_it_came_even_if_nobody_could_read_it(
    subscriptions: Subscriptions,
) -> None:
    subscribe(subscriptions, b"r", "a", credit=100)
    garbage = b"\xa2\xff\xff"  # a string that is no UTF-8

    deliveries = subscriptions.deliver([Announcement("a", msgspec.Raw(garbage), "eve")])

    ((said,),) = (run.said for run in sent(deliveries, b"r"))
    assert said == wire.Said("a", "eve", [garbage])


def test_nothing_is_kept_of_those_who_left_nor_of_their_patterns(
    subscriptions: Subscriptions,
) -> None:
    subscribe(subscriptions, b"one", "a.*")
    subscribe(subscriptions, b"one", "b.*", number=2)
    subscribe(subscriptions, b"two", "a.*")
    subscriptions.deliver(told("a.b", "b.c"))
    subscriptions.remove(b"one", 1)
    assert list(subscriptions.deliver(told("a.b"))) == [b"two"]
    subscriptions.drop(b"two")
    subscriptions.remove(b"one", 2)
    assert not subscriptions
    assert subscriptions.deliver(told("a.b", "b.c")) == {}
    kept: Any = subscriptions
    assert (kept._groups, kept._keys) == ({}, {})


def test_the_same_number_again_replaces_the_subscription(subscriptions: Subscriptions) -> None:
    subscribe(subscriptions, b"r", "a")
    subscribe(subscriptions, b"r", "b")
    assert heard(subscriptions.deliver(told("a", "b")), b"r") == [(1, 0, "b", 2)]


def test_topics_without_end_are_not_remembered_without_end(subscriptions: Subscriptions) -> None:
    subscribe(subscriptions, b"r", ">", credit=CREDIT_MAX)
    for start in range(0, 20_000, 100):
        subscriptions.deliver(told(*(f"topic.{n}" for n in range(start, start + 100))))
    remembered: Any = subscriptions
    assert len(remembered._topics) <= 4096


@pytest.mark.parametrize("pattern", ["", ".", "a..b", ".a", "a.", "a" * 513])
def test_a_pattern_that_is_none_is_refused(subscriptions: Subscriptions, pattern: str) -> None:
    refused = subscriptions.add(b"r", wire.Subscribe(1, pattern, 1))
    assert isinstance(refused, Invalid)


def test_one_pattern_too_many_is_refused(subscriptions: Subscriptions) -> None:
    for number in range(1, SUBSCRIPTIONS_MAX + 1):
        subscribe(subscriptions, b"r", "a", number=number)
    assert isinstance(subscriptions.add(b"r", wire.Subscribe(999, "a", 1)), Quota)
    assert subscriptions.add(b"r", wire.Subscribe(1, "b", 1)) is None
