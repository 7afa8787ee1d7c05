"""Messages from owner to owner over real sockets: once, in order, and out of the outbox then."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from ksi.actors.commit import Work
from ksi.actors.delivery import EVICTED, Record
from ksi.actors.outbox import Outbox
from ksi.actors.owner import Sender
from ksi.actors.owners.registry import Registry
from ksi.actors.owners.sessions import Sessions
from ksi.actors.testing import Twin
from ksi.transport import wire
from ksi.transport.errors import Forbidden
from ksi.transport.identity import KeyRing, endpoint, make_run_directory
from ksi.transport.link import SILENCE_S
from ksi.transport.mailbox import Mailbox, Post, connect

PATIENCE_S = 10.0  # A test that waits longer has failed.


class Wire:
    """A registry with its outbox, and the sessions it writes to, each in memory."""

    def __init__(self, var: Path) -> None:
        make_run_directory(var)
        keys = KeyRing(var)
        self._ours = keys.enroll("registry", "owner")
        self._theirs = keys.enroll("sessions", "owner")
        self._place = endpoint(var, "sessions")
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.mailbox = Mailbox(self.context, self._place, self._theirs, keys)
        self.mailbox.timeout_s = 0.01
        self.registry, self.sessions = Twin(Registry()), Twin(Sessions())
        self.beats = 0
        self.warnings: list[dict[str, Any]] = []
        self.outbox = self.new_outbox()
        self.sent = 0  # how many of the registry's messages were given to the outbox
        self.answers_arrive = True
        self.refused: list[str] = []  # what the sessions have refused
        self.late_s = 0.0  # by how much the clock of the outbox is ahead

    def new_outbox(self) -> Outbox:
        def to_sessions(_owner: str) -> Any:
            return connect(self.context, self._place, self._theirs.public, self._ours)

        return Outbox("the store", to_sessions, self)

    def restart(self) -> None:
        """The registry's process ends; the next takes up what is in its rows."""
        self.outbox.close()
        self.outbox = self.new_outbox()
        for (owner, number), row in self.rows().range():
            self.outbox.push(owner, number, row.operation, row.body, again=True)

    def warning(self, _event: str, **fields: Any) -> None:
        self.warnings.append(fields)

    def rows(self) -> Any:
        return self.registry.store.tables["ksi.outbox"]

    def beat(self, count: int) -> None:
        """Let so many agents beat that have not yet; each is a message to the sessions."""
        for _ in range(count):
            self.beats += 1
            agent_id = f"agent-{self.beats}"
            self.registry.ask(agent_id, "agent:register")
            self.sessions.ask(agent_id, "session:create", lease_s=60)
            self.registry.ask(agent_id, "agent:heartbeat")
        for owner, number, operation, body in self.registry.sends[self.sent :]:
            self.outbox.push(owner, number, operation, body)
        self.sent = len(self.registry.sends)

    def seen(self) -> int:
        """Return how many beats have reached the sessions."""
        return sum(type(event).__name__ == "OwnerSeen" for event in self.sessions.events)

    def turn(self, *, recorded: bool = True) -> None:
        """Both take a turn; what was answered is recorded, or the process ends before it is."""
        records = self.outbox.turn(time.monotonic() + self.late_s)
        if records and recorded:
            self.registry.run([], records)
            for record in records:
                self.outbox.recorded(record.sender, record.number)
        post = self.mailbox.get().message
        assert isinstance(post, Post)
        for letter in post.letters:
            frame = msgspec.msgpack.decode(letter.payload, type=wire.CommandsFrame)
            who = Sender("registry", "owner")
            works = [
                Work(letter.route, who, frame.instance, frame.acked, frame.again, request, None)
                for request in frame.items
            ]
            frames: dict[tuple[bytes, wire.Kind], list[Any]] = {}
            for route, kind, answer in self.sessions.run(works).answers:
                frames.setdefault((route, kind), []).append(answer)
                self.refused += _code(kind, answer)
            for (route, kind), items in frames.items():
                said = wire.OwnerFrame(wire.VERSION, kind, "their store", 0, items)
                if self.answers_arrive:
                    self.mailbox.send(route, wire.encode(said))

    def until(self, done: Callable[[], bool], **how: bool) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline_s, "it never happened"
            self.turn(**how)

    def delivered(self) -> bool:
        return not [*self.rows().range()]

    def forget_registry(self) -> None:
        """The sessions forget every client instance."""
        for sender, instance in [
            key for key, _ in self.sessions.store.tables["ksi.clients"].range()
        ]:
            record = Record[Any](sender, bytes.fromhex(instance), 0, EVICTED, b"", [], [])
            self.sessions.run([], [record])


def _code(kind: wire.Kind, answer: Any) -> list[str]:
    """Return the code of the refusal in an answer, if it is one."""
    if kind is not wire.Kind.REPLIES:
        return []
    error = msgspec.msgpack.decode(bytes(answer), type=wire.Answer).error
    return [error[0]] if error else []


@pytest.fixture
def between(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path / "var")
    yield made
    made.outbox.close()
    made.mailbox.close()
    made.context.term()


def test_messages_arrive_once_and_leave_the_outbox(between: Wire) -> None:
    between.beat(5)
    between.until(between.delivered)
    between.beat(1500)  # more than a window
    between.until(between.delivered)
    assert between.seen() == 1505
    assert between.warnings == []


def test_a_process_that_ends_before_it_has_recorded_the_answers_repeats_nothing(
    between: Wire,
) -> None:
    between.beat(5)
    between.until(lambda: between.seen() == 5, recorded=False)
    for _ in range(5):
        between.turn(recorded=False)  # the answers come, and are acknowledged with the next frame
    between.beat(1)
    between.until(lambda: between.seen() == 6, recorded=False)
    assert not between.delivered()
    between.restart()
    between.beat(1)
    between.until(between.delivered)
    assert between.seen() == 7


def test_a_process_that_ends_before_it_has_recorded_a_refusal_hears_it_again(between: Wire) -> None:
    closing = ("sessions", 1, "session:close", wire.encode({"session_id": "ghost"}))
    between.outbox.push(*closing)
    between.until(lambda: len(between.outbox.answers) == 1, recorded=False)
    between.outbox.push("sessions", 2, "session:heartbeat", wire.encode({"agent_id": "alice"}))
    between.until(lambda: len(between.outbox.answers) == 2, recorded=False)
    between.restart()
    between.outbox.push(*closing, again=True)
    between.until(lambda: bool(between.outbox.answers))
    (answer,) = between.outbox.answers
    assert (answer.operation, type(answer.refusal)) == ("session:close", Forbidden)


def test_messages_reach_an_owner_that_has_forgotten_clients_before(between: Wire) -> None:
    between.forget_registry()
    between.beat(3)
    between.until(between.delivered)
    assert between.seen() == 3


def test_messages_whose_outcome_was_forgotten_are_sent_again_and_none_is_left_out(
    between: Wire,
) -> None:
    between.beat(3)
    between.until(lambda: between.seen() == 3, recorded=False)
    between.forget_registry()
    between.restart()
    between.beat(2)
    between.until(between.delivered)
    assert 5 <= between.seen() <= 8
    between.beat(1)
    between.until(between.delivered)


def test_messages_whose_outcome_was_forgotten_stay_in_the_outbox_meanwhile(between: Wire) -> None:
    between.beat(3)
    between.until(lambda: between.seen() == 3, recorded=False)
    between.forget_registry()
    between.restart()
    between.until(lambda: "evicted" in between.refused)
    between.sessions.store.full = True
    for _ in range(20):
        between.turn()
    assert between.rows().count() == 3
    between.sessions.store.full = False
    between.until(between.delivered)


def test_messages_whose_answers_were_dropped_are_sent_again_after_a_silence(between: Wire) -> None:
    between.answers_arrive = False
    between.beat(3)
    between.until(lambda: between.seen() == 3)
    between.answers_arrive = True
    between.late_s = SILENCE_S + 1.0
    between.until(between.delivered)
    assert between.seen() == 3


def test_a_refused_message_is_logged_and_those_behind_it_arrive(between: Wire) -> None:
    between.sessions.ask("alice", "session:create", lease_s=60)
    between.outbox.push("sessions", 1, "session:close", wire.encode({"session_id": "ghost"}))
    between.outbox.push("sessions", 2, "session:heartbeat", wire.encode({"agent_id": "alice"}))
    between.until(lambda: between.seen() == 1)
    between.until(lambda: bool(between.warnings))
    (warning,) = between.warnings
    assert (warning["owner"], warning["operation"]) == ("sessions", "session:close")


def test_a_message_that_finds_no_room_waits_and_goes_again(between: Wire) -> None:
    between.beat(3)
    between.sessions.store.full = True
    for _ in range(20):
        between.turn()
    assert between.rows().count() == 3
    between.sessions.store.full = False
    between.until(between.delivered)
    assert between.seen() == 3
