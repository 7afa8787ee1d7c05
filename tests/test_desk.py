"""Requests to the supervisor are carried out effectively once, in order, by those who may."""

import time
from typing import Any

import msgspec
import pytest

from ksi.actors.owner import Sender
from ksi.actors.supervision.desk import CLIENTS_MAX, Desk
from ksi.actors.supervision.system import Done, StartChild, Status, Stop, StopChild, SystemStatus
from ksi.transport import wire
from ksi.transport.errors import Draining, NotFound
from ksi.transport.message import Message
from ksi.transport.wire import Kind

OPERATOR = Sender("op", "operator")
INSTANCE = b"i" * 16
STOP_X = ("child:stop", {"name": "x"})


class Log:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def exception(self, event: str, **_fields: Any) -> None:
        self.lines.append(event)


class Counter:
    """Behind the desk: counts what it carries out, and answers with the count."""

    def __init__(self) -> None:
        self.carried: list[Message] = []
        self.draining = False

    def carry(self, message: Message, _sender: Sender) -> Done | SystemStatus:
        if self.draining:
            raise Draining("stopping")
        self.carried.append(message)
        match message:
            case StopChild(name="missing"):
                raise NotFound("no such child")
            case Stop():
                raise ZeroDivisionError
            case Status():
                return SystemStatus(
                    pid=1, started_at=0.0, stopping=False, phase="ready", children=[]
                )
        return Done(name="x", pid=len(self.carried))


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def desk(counter: Counter) -> Desk:
    return Desk("supervisor", counter.carry, Log())


Asked = tuple[int, str, Any]


def frame(kind: Kind, *asked: Asked, acked: int = 0, instance: bytes = INSTANCE) -> bytes:
    requests: list[Any] = [
        wire.Request(number, operation, msgspec.msgpack.encode(fields))
        for number, operation, fields in asked
    ]
    return wire.encode(wire.Frame(wire.VERSION, kind, "", 0, instance, acked, False, requests))


def commands(desk: Desk, *asked: Asked, acked: int = 0, **named: Any) -> Any:
    """Return what comes back: numbers to outcomes, or the kind and items of another frame."""
    payload = frame(Kind.COMMANDS, *asked, acked=acked, **named)
    return [
        (kind, outcomes(items)) for kind, items in desk.take(payload, OPERATOR, time.monotonic())
    ]


def outcomes(items: list[Any]) -> Any:
    return {
        each.number: each.error[0] if each.error else msgspec.msgpack.decode(each.body or b"")
        for each in items
        if isinstance(each, wire.Answer)
    } or items


def test_a_frame_of_commands_is_carried_out_in_order_and_answered_in_one(desk: Desk) -> None:
    answered = commands(desk, (1, *STOP_X), (2, *STOP_X))

    assert answered == [(Kind.REPLIES, {1: {"name": "x", "pid": 1}, 2: {"name": "x", "pid": 2}})]


def test_a_command_that_comes_again_gets_its_first_reply(desk: Desk, counter: Counter) -> None:
    first = commands(desk, (1, *STOP_X), (2, "child:stop", {"name": "missing"}))
    again = commands(desk, (1, *STOP_X), (2, "child:stop", {"name": "missing"}), (3, *STOP_X))

    assert again[0][1] == first[0][1] | {3: {"name": "x", "pid": 3}}
    assert len(counter.carried) == 3


def test_a_command_ahead_of_a_lost_one_is_not_carried_out(desk: Desk, counter: Counter) -> None:
    assert commands(desk, (2, *STOP_X)) == [(Kind.RESEND_FROM, [1])]
    assert commands(desk, (1, *STOP_X), (3, *STOP_X))[1] == (Kind.RESEND_FROM, [2])
    assert len(counter.carried) == 1


def test_what_is_acknowledged_is_forgotten_and_not_done_again(desk: Desk, counter: Counter) -> None:
    commands(desk, (1, *STOP_X))
    commands(desk, (2, *STOP_X), acked=1)

    assert commands(desk, (1, *STOP_X), acked=1) == [(Kind.REPLIES, {1: {}})]
    assert len(counter.carried) == 2


def test_a_client_that_knew_a_former_supervisor_goes_on_with_its_next_number(desk: Desk) -> None:
    assert commands(desk, (41, *STOP_X), acked=40)[0][1] == {41: {"name": "x", "pid": 1}}


def test_nothing_behind_a_transient_refusal_has_happened(desk: Desk, counter: Counter) -> None:
    counter.draining = True
    assert commands(desk, (1, *STOP_X), (2, *STOP_X)) == [(Kind.REPLIES, {1: "draining"})]
    counter.draining = False

    assert commands(desk, (1, *STOP_X), (2, *STOP_X))[0][1][2] == {"name": "x", "pid": 2}


def test_instances_are_apart_and_one_that_says_goodbye_is_forgotten(desk: Desk) -> None:
    commands(desk, (1, *STOP_X))
    assert commands(desk, (1, *STOP_X), instance=b"j" * 16)[0][1][1]["pid"] == 2

    farewell = list(desk.take(frame(Kind.GOODBYE), OPERATOR, 0.0))
    assert farewell == [(Kind.FAREWELL, [])]
    assert commands(desk, (1, *STOP_X))[0][1][1]["pid"] == 3


def test_clients_beyond_the_bound_push_out_the_longest_silent(desk: Desk) -> None:
    for number in range(CLIENTS_MAX + 1):
        commands(desk, (1, *STOP_X), instance=number.to_bytes(16, "big"))

    assert len(desk._clients) == CLIENTS_MAX
    assert ("op", (0).to_bytes(16, "big")) not in desk._clients


@pytest.mark.parametrize(
    ("sender", "operation", "fields", "code"),
    [
        (Sender("alice", "agent"), *STOP_X, "forbidden"),
        (Sender("alice", "worker"), "system:stop", {}, "forbidden"),
        (Sender("registry", "owner"), "system:stop", {}, "forbidden"),
        (None, *STOP_X, "forbidden"),
        (OPERATOR, "child:stap", {}, "unknown_operation"),
        (OPERATOR, "session:append", {}, "unknown_operation"),
        (OPERATOR, "system:status", {}, "invalid"),  # a query is no command
        (OPERATOR, "child:stop", {}, "invalid"),
        (OPERATOR, "child:stop", {"name": "../x"}, "invalid"),
        (OPERATOR, "child:stop", {"name": "x", "more": 1}, "invalid"),
        (OPERATOR, "child:stop", {"name": "missing"}, "not_found"),
        (OPERATOR, "system:stop", {}, "internal"),
    ],
)
def test_what_may_not_or_cannot_be_done_is_refused_by_code(
    desk: Desk, sender: Sender | None, operation: str, fields: Any, code: str
) -> None:
    answers = list(
        desk.take(frame(Kind.COMMANDS, (1, operation, fields)), sender, time.monotonic())
    )

    assert [(kind, outcomes(items)) for kind, items in answers] == [(Kind.REPLIES, {1: code})]


def test_an_owner_may_start_children(desk: Desk, counter: Counter) -> None:
    asked = (1, "child:start", {"name": "alice", "argv": ["true"]})
    list(desk.take(frame(Kind.COMMANDS, asked), Sender("registry", "owner"), time.monotonic()))

    assert counter.carried == [StartChild(name="alice", argv=["true"])]


def test_a_request_whose_time_has_run_out_is_not_carried_out(desk: Desk, counter: Counter) -> None:
    body = msgspec.msgpack.encode({"name": "x"})
    late: list[Any] = [wire.Request(1, "child:stop", body, remaining_ms=5)]
    payload = wire.encode(wire.Frame(wire.VERSION, Kind.COMMANDS, "", 0, INSTANCE, 0, False, late))

    answers = list(desk.take(payload, OPERATOR, time.monotonic() - 1.0))
    assert outcomes(answers[0][1]) == {1: "expired"}
    assert counter.carried == []


def test_queries_are_answered_beside_commands(desk: Desk) -> None:
    payload = frame(Kind.QUERIES, (9, "system:status", {}), (10, *STOP_X))
    answers = list(desk.take(payload, OPERATOR, time.monotonic()))

    assert [kind for kind, _items in answers] == [Kind.ANSWERS]
    found = outcomes(answers[0][1])
    assert (found[9]["pid"], found[10]) == (1, "invalid")


def test_hello_is_answered_with_who_is_there(desk: Desk) -> None:
    [(kind, [welcome])] = desk.take(frame(Kind.HELLO), OPERATOR, 0.0)

    assert (kind, welcome.owner) == (Kind.WELCOME, "supervisor")
    assert list(desk.take(frame(Kind.HELLO), None, 0.0)) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        b"\xff" * 100,
        msgspec.msgpack.encode({"kind": 2}),
        msgspec.msgpack.encode([1, 2, "", 0, INSTANCE, 0, False, ["no request"]]),
        msgspec.msgpack.encode([1, 2, "", 0, INSTANCE, 0, False, [[2**64 - 1, "x", b""]] * 3])[:-4],
        msgspec.msgpack.encode([1, 99, "", 0, INSTANCE, 0, False, []]),
    ],
)
def test_garbage_has_no_answer(desk: Desk, payload: bytes) -> None:
    assert list(desk.take(payload, OPERATOR, time.monotonic())) == []


def test_a_command_is_no_query_and_a_query_no_command(desk: Desk) -> None:
    asked = frame(Kind.QUERIES, (1, *STOP_X))
    ((_, (answer,)),) = desk.take(asked, OPERATOR, time.monotonic())
    assert answer.error[:2] == ["invalid", "child:stop is a command, not a query"]
    asked = frame(Kind.COMMANDS, (1, "system:status", {}))
    ((_, (answer,)),) = desk.take(asked, OPERATOR, time.monotonic())
    assert answer.error[:2] == ["invalid", "system:status is a query, not a command"]
