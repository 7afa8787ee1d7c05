"""The client's half of delivery: numbers, what goes again, what is settled, and with what."""

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from ksi.transport import wire
from ksi.transport.errors import (
    Busy,
    Conflict,
    Evicted,
    KsiError,
    NotFound,
    Restored,
    StorageFull,
)
from ksi.transport.limits import FRAME_BYTES_MAX, WINDOW_BYTES_MAX, WINDOW_COMMANDS_MAX
from ksi.transport.window import Window
from ksi.transport.wire import Kind

STORE = "store-1"


@pytest.fixture
def window() -> Window:
    return Window()


def add(window: Window, count: int = 1, body: bytes = b"body", **how: Any) -> list[int]:
    """Add commands; return their numbers."""
    deadline_s = how.pop("deadline_s", None)
    return [window.add_command("session:append", body, deadline_s).number for _ in range(count)]


def sent(window: Window, now_s: float = 0.0) -> list[tuple[Kind, list[int], int, bool]]:
    """Take what the window sends: kind, numbers, acked and again of each frame."""
    frames = [
        msgspec.msgpack.decode(frame, type=wire.CommandsFrame) for frame in window.frames(now_s)
    ]
    for frame in frames:
        assert (frame.version, frame.instance, frame.store) == (1, window.instance, window.store)
    return [
        (Kind(frame.kind), [each.number for each in frame.items], frame.acked, frame.again)
        for frame in frames
    ]


def from_owner(kind: Kind, items: Iterable[Any], store: str = STORE, cut: int = 0) -> bytes:
    return wire.encode(wire.OwnerFrame(wire.VERSION, kind, store, cut, [*items]))


def replies(*numbers: int, **how: Any) -> bytes:
    return from_owner(Kind.REPLIES, [wire.Answer(n, b"reply %d" % n) for n in numbers], **how)


def refusal(number: int, error: KsiError, kind: Kind = Kind.REPLIES) -> bytes:
    return from_owner(kind, [wire.Answer(number, None, error.to_wire())])


def settled(window: Window, frame: bytes, now_s: float = 0.0) -> list[tuple[int, Any]]:
    """Let a frame arrive; return what it settles: number and reply, or class of the error."""
    return [
        (pending.number, type(error) if error else body)
        for pending, body, error in window.receive(frame, now_s)
    ]


# Numbers and acknowledgement.


def test_commands_are_numbered_and_go_in_one_frame(window: Window) -> None:
    assert add(window, 3) == [1, 2, 3]
    assert sent(window) == [(Kind.COMMANDS, [1, 2, 3], 0, False)]
    assert sent(window) == []
    assert add(window) == [4]
    assert sent(window) == [(Kind.COMMANDS, [4], 0, False)]


def test_a_reply_settles_its_command_once(window: Window) -> None:
    add(window, 2)
    sent(window)
    assert settled(window, replies(2)) == [(2, b"reply 2")]
    assert settled(window, replies(2, 1)) == [(1, b"reply 1")]
    assert settled(window, replies(1, 2, 99)) == []
    assert not window.waiting()


def test_acked_is_the_number_up_to_which_all_are_answered(window: Window) -> None:
    assert window.acked == 0
    add(window, 4)
    sent(window)
    for frame, acked in ((replies(2), 0), (replies(1), 2), (replies(4), 2), (replies(3), 4)):
        settled(window, frame)
        assert window.acked == acked
    add(window)
    assert sent(window) == [(Kind.COMMANDS, [5], 4, False)]


def test_the_window_is_full_by_count_and_by_bytes_and_opens_with_answers(window: Window) -> None:
    add(window, WINDOW_COMMANDS_MAX - 1)
    assert not window.full()
    add(window)
    assert window.full()
    settled(window, replies(1))
    assert not window.full()

    window = Window()
    add(window, 3, b"x" * (WINDOW_BYTES_MAX // 4))
    assert not window.full()
    add(window, 1, b"x" * (WINDOW_BYTES_MAX // 4))
    assert window.full()
    settled(window, refusal(2, NotFound("gone")))
    assert not window.full()
    assert window.command_bytes == WINDOW_BYTES_MAX // 4 * 3


def test_frames_stay_below_their_limit_and_keep_the_order(window: Window) -> None:
    add(window, 10, b"x" * (FRAME_BYTES_MAX // 4))
    frames = [*window.frames(0.0)]
    assert len(frames) > 2
    assert all(len(frame) <= FRAME_BYTES_MAX for frame in frames)
    numbers = [
        request.number
        for frame in frames
        for request in msgspec.msgpack.decode(frame, type=wire.CommandsFrame).items
    ]
    assert numbers == [*range(1, 11)]


def test_a_command_carries_the_time_that_is_left_for_it(window: Window) -> None:
    for deadline_s in (None, 12.5, 9.0):
        add(window, deadline_s=deadline_s)
    (frame,) = window.frames(10.0)
    items = msgspec.msgpack.decode(frame, type=wire.CommandsFrame).items
    assert [request.remaining_ms for request in items] == [None, 2500, 0]


# What goes again.


def test_what_was_never_sent_does_not_go_as_sent_before(window: Window) -> None:
    window.lost()  # before the first connection is up
    settled(window, from_owner(Kind.RESEND_FROM, [1]))  # of a former instance
    add(window, 2)
    window.lost()
    assert sent(window) == [(Kind.COMMANDS, [1, 2], 0, False)]
    window.lost()
    assert sent(window) == [(Kind.COMMANDS, [1, 2], 0, True)]


def test_from_where_the_owner_asks_all_goes_again_in_order(window: Window) -> None:
    add(window, 5)
    sent(window)
    assert settled(window, from_owner(Kind.RESEND_FROM, [3])) == []
    add(window)
    assert sent(window) == [(Kind.COMMANDS, [3, 4, 5, 6], 0, True)]
    add(window)
    assert sent(window) == [(Kind.COMMANDS, [7], 0, False)]


def test_after_a_lost_connection_all_that_is_unanswered_goes_again(window: Window) -> None:
    add(window, 3)
    window.add_query("session:get", b"", None)
    sent(window)
    settled(window, replies(2))
    window.lost()
    assert sent(window) == [(Kind.COMMANDS, [1, 3], 0, True), (Kind.QUERIES, [1], 0, False)]


@pytest.mark.parametrize("stale", ["resend_from", "refusal"])
def test_what_arrives_late_takes_nothing_back_that_is_about_to_go_again(
    window: Window, stale: str
) -> None:
    """After a lost connection frames of the former one may still be read."""
    add(window, 4)
    sent(window)
    window.lost()
    late = from_owner(Kind.RESEND_FROM, [3]) if stale == "resend_from" else refusal(3, Busy("full"))
    settled(window, late)
    assert sent(window, 1.0) == [(Kind.COMMANDS, [1, 2, 3, 4], 0, True)]


@pytest.mark.parametrize(
    ("error", "pause_s"),
    [
        (Busy("full"), 0.02),
        (Busy("full", retry_after_s=0.5), 0.5),
        (StorageFull("no room"), 0.25),
    ],
)
def test_a_transient_refusal_settles_nothing_and_holds_up_all_behind_it(
    window: Window, error: KsiError, pause_s: float
) -> None:
    add(window, 4)
    sent(window)
    assert settled(window, refusal(2, error), now_s=10.0) == []
    assert window.commands[2].refused is not None
    assert window.unsent()
    assert sent(window, 10.0 + pause_s * 0.9) == []
    assert sent(window, 10.0 + pause_s) == [(Kind.COMMANDS, [2, 3, 4], 0, True)]
    assert window.commands[2].refused is None


def test_a_refused_command_is_not_tried_again_when_its_answer_would_be_late(
    window: Window,
) -> None:
    window.add_command("session:append", b"", 10.05)
    sent(window)
    assert settled(window, refusal(1, Busy("full")), now_s=10.0) == []
    assert sent(window, 10.05) == []
    assert window.commands[1].refused is not None  # What its caller is told at the end.
    assert sent(window, 10.05 + Busy.retry_s) == [(Kind.COMMANDS, [1], 0, True)]


def test_a_transient_refusal_of_a_query_settles_it(window: Window) -> None:
    window.add_query("session:get", b"", None)
    sent(window)
    assert settled(window, refusal(1, Busy("full"), Kind.ANSWERS)) == [(1, Busy)]


def test_a_conclusive_refusal_settles_its_command_alone(window: Window) -> None:
    add(window, 2)
    sent(window)
    assert settled(window, refusal(1, Conflict("exists"))) == [(1, Conflict)]
    assert settled(window, replies(2)) == [(2, b"reply 2")]


@pytest.mark.parametrize("again", [True, False])
def test_commands_that_are_numbered_already_keep_their_numbers(window: Window, again: bool) -> None:
    for number in (7, 8):
        window.resume(number, "session:heartbeat", b"", again=again)
    assert sent(window) == [(Kind.COMMANDS, [7, 8], 6, again)]
    settled(window, replies(7))
    assert window.acked == 7


# The end of an instance.


def test_another_store_settles_everything_and_nothing_goes_there(window: Window) -> None:
    add(window, 2)
    window.add_query("session:get", b"", None)
    sent(window)
    settled(window, replies(1))
    former = window.instance
    found = settled(window, replies(2, store="store-2"))
    assert found == [(2, Restored), (1, Restored)]
    assert sent(window) == []
    assert (window.instance != former, window.acked, window.store) == (True, 2, "")
    assert add(window) == [3]
    settled(window, from_owner(Kind.RESEND_FROM, [1], store="store-2"))
    assert window.store == "store-2"
    assert sent(window) == [(Kind.COMMANDS, [3], 2, False)]


def test_an_owner_that_has_forgotten_the_instance_settles_everything(window: Window) -> None:
    add(window, 3)
    sent(window)
    former = window.instance
    assert settled(window, refusal(2, Evicted("unknown"))) == [(n, Evicted) for n in (1, 2, 3)]
    assert window.instance != former
    assert add(window) == [4]
    assert sent(window) == [(Kind.COMMANDS, [4], 3, False)]


@pytest.mark.parametrize(
    "late", [replies(1, 2), refusal(1, Evicted("?")), refusal(2, Busy("full"))]
)
def test_a_late_answer_to_a_former_instance_is_none_to_this(window: Window, late: bytes) -> None:
    add(window, 2)
    window.add_query("session:get", b"", None)
    sent(window)
    settled(window, refusal(1, Evicted("unknown")))
    add(window, 2)
    window.add_query("session:get", b"", None)
    sent(window)
    former = window.instance
    assert settled(window, late) == []
    assert settled(window, from_owner(Kind.ANSWERS, [wire.Answer(1, b"old page")])) == []
    assert (window.instance, sent(window, 1.0), window.acked) == (former, [], 2)


def test_giving_up_returns_what_is_unanswered_and_starts_anew(window: Window) -> None:
    add(window, 2)
    query = window.add_query("session:get", b"", None)
    settled(window, replies(1))
    assert [each.number for each in window.give_up()] == [2, query.number]
    assert not window.waiting()
    assert not window.unsent()
    assert window.command_bytes == 0


# Everything else that arrives.


def test_queries_have_numbers_of_their_own(window: Window) -> None:
    add(window)
    assert window.add_query("session:get", b"", None).number == 1
    assert sent(window) == [(Kind.COMMANDS, [1], 0, False), (Kind.QUERIES, [1], 0, False)]
    assert settled(window, from_owner(Kind.ANSWERS, [wire.Answer(1, b"page")])) == [(1, b"page")]
    assert window.waiting()
    window.add_query("session:get", b"", None)
    window.drop_query(2)
    assert settled(window, from_owner(Kind.ANSWERS, [wire.Answer(2, b"late")])) == []


def test_answers_to_subscriptions_and_deliveries_are_kept_for_the_caller(window: Window) -> None:
    settled(window, from_owner(Kind.ANSWERS, [wire.Answer(-3, b"")]))
    run = wire.Run(3, 1, 0, [wire.Said("a.b", "alice", [b"body", b"more"])])
    settled(window, from_owner(Kind.DELIVERIES, [run]))
    assert [answer.number for answer in window.subscribed] == [-3]
    assert window.deliveries == [run]


def test_the_cut_only_grows_and_goes_with_every_frame(window: Window) -> None:
    for cut, known in ((3, 3), (2, 3), (5, 5)):
        settled(window, replies(cut=cut))
        assert window.cut.number == known
    frame = msgspec.msgpack.decode(window.control(Kind.HELLO, []), type=wire.Frame)
    assert (frame.kind, frame.cut, frame.store, frame.items) == (Kind.HELLO, 5, STORE, [])


def test_welcome_and_farewell_are_noted(window: Window) -> None:
    welcome = wire.Welcome("sessions", 7, 1, 1, 1024, 1 << 20)
    settled(window, from_owner(Kind.WELCOME, [welcome]))
    settled(window, from_owner(Kind.FAREWELL, []))
    assert (window.welcome, window.farewell) == (welcome, True)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x95\x01", b"hello", wire.encode([1, 66])])
def test_a_frame_of_another_protocol_raises_and_changes_nothing(
    window: Window, garbage: bytes
) -> None:
    add(window)
    sent(window)
    with pytest.raises(msgspec.MsgspecError):
        window.receive(garbage, 0.0)
    assert settled(window, replies(1)) == [(1, b"reply 1")]
