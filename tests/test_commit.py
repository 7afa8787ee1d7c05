"""The commit loop: numbers, stored answers, request ids, refusals, defects, outbox, eviction."""

from typing import Any

import msgspec
import pytest

from ksi.actors import commit, delivery
from ksi.actors.declarations.registry import Describe
from ksi.actors.declarations.sessions import Append, SessionTables
from ksi.actors.delivery import EVICTED, GOODBYE, SENT, Record
from ksi.actors.owner import Decision, Given, Reply, Send, Sender, Tick
from ksi.actors.owners import bus, registry
from ksi.actors.owners.registry import Registry
from ksi.actors.owners.sessions import Sessions
from ksi.actors.testing import Twin, reply_of, work_of
from ksi.transport import wire
from ksi.transport.errors import (
    Busy,
    Conflict,
    Evicted,
    Expired,
    Forbidden,
    Internal,
    Invalid,
    KsiError,
    NotFound,
    NotOwner,
    StorageFull,
    TooLarge,
    UnknownOperation,
    from_wire,
)
from ksi.transport.limits import CLIENT_IDLE_S_MAX, REQUEST_ID_S_MAX
from ksi.transport.wire import Kind

ALICE = Sender("alice", "agent")
SUPERVISOR = Sender("supervisor", "owner")
DAY_S = 86_400.0


@pytest.fixture
def twin() -> Twin:
    """Sessions with one session, `s`, of alice; her client instance has sent number 1."""
    twin = Twin(Sessions())
    say(twin, work(1, "session:create", session_id="s"))
    return twin


def work(number: int, operation: str = "session:append", **fields: Any) -> commit.Work:
    """Return a command of alice; by default it appends its number to `s`."""
    how = {
        name: fields.pop(name)
        for name in ("sender", "instance", "acked", "again", "expires_s")
        if name in fields
    }
    if operation == "session:append":
        fields = {"session_id": "s", "event": "note", "data": {"n": number}, **fields}
    return work_of(how.pop("sender", ALICE), operation, fields, number, **how)


def answers(twin: Twin, *works: commit.Work, **more: Any) -> list[tuple[int, Any]]:
    """Carry out a batch; return each number with its reply or the class of its refusal."""
    said: list[tuple[int, Any]] = []
    for _route, kind, answer in twin.run(works, **more).answers:
        if kind is Kind.RESEND_FROM:
            said.append((answer, "resend"))
            continue
        decoded = msgspec.msgpack.decode(bytes(answer), type=wire.Answer)
        if decoded.error is not None:
            said.append((decoded.number, type(from_wire(decoded.error))))
        else:
            said.append((decoded.number, msgspec.msgpack.decode(decoded.body or b"")))
    return said


def say(twin: Twin, *works: commit.Work, **more: Any) -> list[tuple[int, Any]]:
    """The same, with "done" for every reply."""
    said = answers(twin, *works, **more)
    return [(number, "done" if isinstance(what, dict) else what) for number, what in said]


def numbers(twin: Twin, session_id: str = "s") -> list[int]:
    """Return what was appended, in order."""
    page = twin.read("session:history", session_id=session_id, after=0)
    return [entry["data"]["n"] for entry in page.entries]


# Numbers.


def test_a_batch_is_carried_out_in_order_with_one_commit(twin: Twin) -> None:
    before = len(twin.store.journal)
    said = answers(twin, *(work(number) for number in range(2, 10)))
    assert [(number, reply["seq"]) for number, reply in said] == [(n, n - 1) for n in range(2, 10)]
    assert numbers(twin) == [*range(2, 10)]
    assert len(twin.store.journal) == before + 1


def test_a_number_seen_before_gets_its_first_answer_and_happens_once(twin: Twin) -> None:
    first = twin.run([work(2)]).answers
    say(twin, work(3))
    before = len(twin.store.journal)
    assert twin.run([work(2, again=True)]).answers == first
    assert twin.run([work(2), work(2)]).answers == first * 2
    assert numbers(twin) == [2, 3]
    assert len(twin.store.journal) == before


def test_first_answers_survive_a_restart_and_a_replay_of_the_journal(twin: Twin) -> None:
    first = twin.run([work(2), work(3, session_id="ghost"), work(4)]).answers
    again = [work(2, again=True), work(3, again=True), work(4, again=True)]
    twin.restart()
    assert twin.run(again).answers == first
    assert twin.recovered().run(again).answers == first


def test_a_number_too_high_is_not_carried_out_and_told_once_from_where_to_resend(
    twin: Twin,
) -> None:
    assert say(twin, work(4), work(5), work(6)) == [(2, "resend")]
    assert numbers(twin) == []
    assert say(twin, work(7)) == [(2, "resend")]
    say(twin, *(work(number, again=True) for number in range(2, 8)))
    assert numbers(twin) == [2, 3, 4, 5, 6, 7]


def test_what_follows_a_gap_in_one_batch_is_carried_out_in_order(twin: Twin) -> None:
    said = say(twin, work(3), work(2), work(3), work(5))
    assert said == [(2, "resend"), (2, "done"), (3, "done")]
    assert numbers(twin) == [2, 3]


def test_instances_and_identities_have_numbers_of_their_own(twin: Twin) -> None:
    other = b"j" * 16
    say(twin, work(1, instance=other), work(2), work(2, instance=other))
    bob = work(1, "session:contribute", session_id="s", event="n", data={"n": 0})
    say(twin, bob._replace(sender=Sender("bob", "agent")))
    assert numbers(twin) == [1, 2, 2, 0]


def test_acknowledged_answers_are_dropped_and_the_others_kept(twin: Twin) -> None:
    say(twin, *(work(number) for number in range(2, 8)))
    say(twin, work(8, acked=5))
    (row,) = [row for _, row in twin.store.tables["ksi.clients"].range()]
    assert (row.last, row.first, len(row.replies)) == (8, 6, 3)
    assert [number for number, _ in say(twin, *(work(n, again=True) for n in (6, 7, 8)))] == [
        6, 7, 8
    ]  # fmt: skip


def test_a_number_acknowledged_in_an_earlier_life_is_answered_and_does_not_happen_again(
    twin: Twin,
) -> None:
    """An outbox may end between acknowledging an answer and recording it: it asks again."""
    say(twin, work(2), work(3))
    say(twin, work(4, acked=3))
    assert answers(twin, work(2, again=True), work(3, again=True)) == [(2, {}), (3, {})]
    assert numbers(twin) == [2, 3, 4]


def test_a_client_the_owner_has_forgotten_goes_on_behind_what_it_has_acknowledged(
    twin: Twin,
) -> None:
    fresh = b"f" * 16
    assert say(twin, work(7, instance=fresh, acked=6)) == [(7, "done")]
    assert say(twin, work(6, instance=fresh, acked=3)) == [(6, "done")]
    assert numbers(twin) == [7]
    recovered = twin.recovered()
    recovered.restart()
    retried = say(recovered, work(7, instance=fresh), work(8, instance=fresh))
    assert retried == [(7, "done"), (8, "done")]
    assert numbers(recovered) == [7, 8]


def test_no_more_than_a_window_may_be_unacknowledged(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "WINDOW_COMMANDS_MAX", 4)
    monkeypatch.setattr(delivery, "WINDOW_COMMANDS_MAX", 4)
    assert say(twin, work(2), work(3), work(4)) == [(2, "done"), (3, "done"), (4, "done")]
    assert say(twin, work(5), work(6)) == [(5, Busy)]
    assert say(twin, work(5, acked=1), work(6, acked=2)) == [(5, "done"), (6, "done")]
    (row,) = [row for _, row in twin.store.tables["ksi.clients"].range()]
    assert len(row.replies) == 4
    recovered = twin.recovered()
    assert recovered.run([work(6, again=True)]).answers == twin.run([work(6, again=True)]).answers
    (row,) = [row for _, row in recovered.store.tables["ksi.clients"].range()]
    assert len(row.replies) == 4


# Refusals.


def test_a_conclusive_refusal_takes_its_number_and_is_stored(twin: Twin) -> None:
    (first,) = twin.run([work(2, session_id="ghost")]).answers
    with pytest.raises(NotFound):
        reply_of("session:append", first[2])
    say(twin, work(3, "session:create", session_id="ghost"))
    assert twin.run([work(2, session_id="ghost", again=True)]).answers == [first]
    assert twin.loop.refusals == 1


@pytest.mark.parametrize(
    ("operation", "fields", "refusal"),
    [
        ("session:apend", {}, UnknownOperation),
        ("agent:register", {}, UnknownOperation),
        ("session:get", {"session_id": "s"}, Invalid),
        ("session:append", {"session_id": "s", "event": 7}, Invalid),
        ("session:append", {"more": 1}, Invalid),
        ("session:heartbeat", {"agent_id": "alice"}, Forbidden),
        ("x" * 100_000, {}, UnknownOperation),
    ],
)
def test_what_is_no_command_for_this_sender_is_refused_for_good(
    twin: Twin, operation: str, fields: dict[str, Any], refusal: type[KsiError]
) -> None:
    assert say(twin, work(2, operation, **fields), work(3)) == [(2, refusal), (3, "done")]
    assert numbers(twin) == [3]


@pytest.mark.parametrize("operation", sorted(delivery.HOST_RECORDS))
def test_a_client_cannot_speak_as_the_host(twin: Twin, operation: str) -> None:
    say(twin, work(2, request_id="r"))
    before = twin.store.rows()
    for each in (twin, twin.recovered()):
        assert say(each, work(2**60, operation, acked=2**60 - 1)) == [(2**60, UnknownOperation)]
        assert say(each, work(2**60 + 1)) == [(2**60 + 1, "done")]
        for table in ("ksi.requests", "ksi.request_ages", "ksi.counters"):
            assert each.store.rows()[table] == before[table]


def test_garbage_for_a_body_is_invalid(twin: Twin) -> None:
    for number, body in enumerate((b"", b"\xc1", b"\x80" * 3, b"\x91" * 100_000), 2):
        assert say(twin, work_of(ALICE, "session:append", body, number)) == [(number, Invalid)]


def test_a_command_whose_time_ran_out_is_settled_as_expired_and_never_happens(twin: Twin) -> None:
    twin.pass_time(5)
    late, soon = work(2, expires_s=5.0), work(3, expires_s=5.1)
    assert [said for _, said in say(twin, late)] == [Expired]
    say(twin, soon)
    assert numbers(twin) == [3]
    assert say(twin, late._replace(again=True, expires_s=None)) == [(2, Expired)]
    # What was carried out in time keeps its answer, however late it is asked again.
    assert say(twin, soon._replace(again=True, expires_s=0.0)) == [(3, "done")]


# Transient refusals: nothing of that number or any later one has happened.


def test_a_transient_refusal_takes_no_number_and_holds_up_what_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Twin(Registry())
    say(twin, work(1, "agent:register"))
    monkeypatch.setattr(commit, "OUTBOX_ROWS_MAX", 1)
    spawn = [work(number, "agent:spawn", argv=["run"]) for number in (2, 3, 4)]
    assert say(twin, *spawn) == [(2, "done"), (3, Busy)]
    assert len(twin.sends) == 1
    sent = Record[Any]("supervisor", b"", 1, SENT, b"", [], [])
    twin.run([], [sent])
    assert say(twin, spawn[2]) == [(3, "resend")]
    assert say(twin, spawn[1]._replace(again=True)) == [(3, "done")]
    assert len(twin.sends) == 2


def test_without_room_nothing_changes_and_the_same_numbers_go_through_later(twin: Twin) -> None:
    before, batches = twin.store.rows(), len(twin.store.journal)
    twin.store.full = True
    goodbye = Record[Any]("alice", b"i" * 16, 0, GOODBYE, b"", [], [])
    assert say(twin, work(2), work(3), ours=[goodbye], tick=True) == [
        (2, StorageFull),
        (3, StorageFull),
    ]
    assert (twin.store.rows(), len(twin.store.journal)) == (before, batches)
    twin.store.full = False
    say(twin, work(2, again=True), work(3, again=True))
    assert numbers(twin) == [2, 3]


def test_a_journal_that_finds_no_room_undoes_the_batch(twin: Twin) -> None:
    before = twin.store.rows()
    twin.store.fails = StorageFull("no room")
    assert say(twin, work(2), work(3, acked=1)) == [(2, StorageFull), (3, StorageFull)]
    assert twin.store.rows() == before
    assert say(twin, work(2, again=True), work(3, again=True)) == [(2, "done"), (3, "done")]
    assert numbers(twin) == [2, 3]
    assert twin.recovered().store.rows()["sessions"] == twin.store.rows()["sessions"]


def test_an_error_of_the_journal_passes_through_for_its_outcome_is_unknown(twin: Twin) -> None:
    twin.store.fails = OSError("sync failed")
    with pytest.raises(OSError, match="sync failed"):
        twin.run([work(2)])


# Request ids.


def test_a_request_id_makes_a_command_happen_once_for_any_instance(twin: Twin) -> None:
    ((_, first),) = answers(twin, work(2, request_id="r"))
    other = b"j" * 16
    assert answers(twin, work(1, request_id="r", instance=other)) == [(1, first)]
    recovered = twin.recovered()
    assert answers(recovered, work(2, request_id="r", instance=other)) == [(2, first)]
    assert numbers(twin) == [2]


def test_request_ids_are_of_one_identity_and_one_operation(twin: Twin) -> None:
    say(twin, work(2, request_id="r"))
    contribute = {"session_id": "s", "event": "n", "data": {"n": 3}, "request_id": "r"}
    say(twin, work_of(ALICE, "session:contribute", contribute, 3))
    contribute["data"] = {"n": 4}
    say(twin, work_of(Sender("bob", "agent"), "session:contribute", contribute, 1))
    assert numbers(twin) == [2, 3, 4]


def test_a_request_id_that_names_something_else_is_not_the_commands(twin: Twin) -> None:
    completion = Sender("completion", "owner")
    fields = {"session_id": "s", "request_id": "r1", "agent_id": "alice", "data": {}}
    named = ("completion:request", "completion:result")
    works = [
        work(number, "session:record", sender=completion, **fields, event=name)
        for number, name in enumerate(named, 1)
    ]
    twin.run(works)
    assert twin.log.content["s"].count(b"\n") == 2


def test_a_refusal_is_not_remembered_under_its_request_id(twin: Twin) -> None:
    assert say(twin, work(2, session_id="t", request_id="r")) == [(2, NotFound)]
    say(twin, work(3, "session:create", session_id="t"))
    say(twin, work(4, session_id="t", request_id="r"))
    assert numbers(twin, "t") == [4]


def test_request_ids_are_forgotten_after_their_time(twin: Twin) -> None:
    say(twin, work(2, request_id="old"))
    twin.pass_time(DAY_S)
    say(twin, work(3, request_id="new"))
    twin.pass_time(REQUEST_ID_S_MAX - DAY_S + 1)
    assert [key[2] for key, _ in twin.store.tables["ksi.requests"].range()] == ["new"]
    assert twin.store.tables["ksi.request_ages"].count() == 1
    assert twin.recovered().store.rows() == twin.store.rows()


# Defects.


class Brittle(Sessions):
    """Sessions with defects: an event of these names sets them off."""

    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        if isinstance(command, Append) and command.event == "decide":
            raise ZeroDivisionError("a defect in decide")
        decision = super().decide(command, sender, tables, given)
        if isinstance(command, Append) and command.event == "reply":
            return msgspec.structs.replace(decision, reply=Strange(what=object()))
        if isinstance(command, Append) and command.event == "send":
            far_too_large = Append(session_id="s", event="n", data={"text": "x" * (1 << 20)})
            sends = (Send("registry", "session:append", far_too_large),)
            return msgspec.structs.replace(decision, sends=sends)
        return decision

    def apply(self, event: Any, tables: SessionTables) -> None:
        super().apply(event, tables)
        if getattr(event, "line", b"").startswith(b'{"event":"apply"'):
            raise ZeroDivisionError("a defect in apply, with half of it written")


class Strange(Reply, frozen=True, kw_only=True):
    """A reply that has no form on the wire."""

    what: object


@pytest.mark.parametrize("where", ["decide", "apply", "reply", "send"])
def test_a_defect_undoes_one_command_alone_and_is_logged(where: str) -> None:
    twin = Twin(Brittle())
    say(twin, work(1, "session:create", session_id="s"))
    other = b"j" * 16
    said = say(twin, work(2), work(3, event=where), work(4), work(1, instance=other))
    assert [what for _, what in said] == ["done", Internal, "done", "done"]
    assert numbers(twin) == [2, 4, 1]
    assert [entry["metadata"]["seq"] for entry in _entries(twin)] == [1, 2, 3]
    (error,) = twin.errors
    assert error.startswith("a command failed: ")
    assert twin.loop.internal_errors == 1
    assert say(twin, work(3, event=where, again=True)) == [(3, Internal)]
    assert say(twin.recovered(), work(3, event=where, again=True)) == [(3, Internal)]
    assert numbers(twin.recovered()) == [2, 4, 1]


def _entries(twin: Twin) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = twin.read("session:history", session_id="s").entries
    return entries


def test_a_defect_that_finds_no_room_to_be_stored_takes_no_number() -> None:
    twin = Twin(Brittle())
    say(twin, work(1, "session:create", session_id="s"))
    twin.store.fails = StorageFull("no room")
    assert say(twin, work(2, event="decide")) == [(2, StorageFull)]
    assert say(twin, work(2, event="decide", again=True)) == [(2, Internal)]
    assert say(twin, work(3)) == [(3, "done")]


def test_a_defect_in_a_tick_is_logged_and_holds_up_no_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Twin(Registry())

    def fail(*_: Any) -> Decision:
        raise ZeroDivisionError

    monkeypatch.setattr(registry, "_tick", fail)
    assert say(twin, work(1, "agent:register"), tick=True) == [(1, "done")]
    assert twin.errors == ["a tick, or what followed from an answer, failed: ZeroDivisionError()"]
    assert twin.read("agent:list").agents


def test_a_batch_too_large_for_the_journal_is_written_in_parts(twin: Twin) -> None:
    twin.store.fails = TooLarge("the record is over the limit")
    say(twin, work(2), work(3), tick=True)
    assert numbers(twin) == [2, 3]
    assert twin.errors == []


# The outbox.


def test_messages_to_other_owners_are_numbered_an_owner_and_kept_until_they_are_sent() -> None:
    twin = Twin(Registry())
    say(twin, work(1, "agent:register"))
    say(twin, *(work(number, "agent:spawn", argv=["run"]) for number in (2, 3)))
    say(twin, work(4, "agent:heartbeat"))
    twin.restart()
    say(twin, work(5, "agent:spawn", argv=["run"]))
    assert [(owner, number, operation) for owner, number, operation, _ in twin.sends] == [
        ("supervisor", 1, "child:start"),
        ("supervisor", 2, "child:start"),
        ("sessions", 1, "session:heartbeat"),
        ("supervisor", 3, "child:start"),
    ]
    outbox = twin.store.tables["ksi.outbox"]
    waiting = [("sessions", 1), ("supervisor", 1), ("supervisor", 2), ("supervisor", 3)]
    assert [key for key, _ in outbox.range()] == waiting
    twin.run([], [Record("supervisor", b"", 2, SENT, b"", [], [])])
    assert [key for key, _ in outbox.range()] == [waiting[0], waiting[3]]
    assert twin.recovered().store.rows()["ksi.outbox"] == twin.store.rows()["ksi.outbox"]


def test_a_message_is_left_out_while_an_equal_one_waits() -> None:
    """However long the sessions are down, as many beats wait for them as there are agents."""
    twin = Twin(Registry())
    outbox = twin.store.tables["ksi.outbox"]
    say(twin, work(1, "agent:register"))
    bob = Sender("bob", "agent")
    say(twin, work(1, "agent:register", sender=bob))
    for number in range(2, 200):
        beats = [work(number, "agent:heartbeat", sender=who) for who in (ALICE, bob)]
        assert say(twin, *beats) == [(number, "done")] * 2
        if number == 100:
            twin.restart()  # What waits is in rows.
    assert [key for key, _ in outbox.range()] == [("sessions", 1), ("sessions", 2)]
    twin.run([], [Record("sessions", b"", 1, SENT, b"", [], [])])
    say(twin, work(200, "agent:heartbeat"), work(200, "agent:heartbeat", sender=bob))
    assert [key for key, _ in outbox.range()] == [("sessions", 2), ("sessions", 3)]
    assert twin.recovered().store.rows()["ksi.outbox"] == twin.store.rows()["ksi.outbox"]


def test_what_was_answered_while_there_was_no_room_leaves_the_outbox_later() -> None:
    twin = Twin(Registry())
    outbox = twin.store.tables["ksi.outbox"]
    say(twin, work(1, "agent:register"), work(2, "agent:heartbeat"))
    say(twin, *(work(number, "agent:spawn", argv=["run"]) for number in (3, 4)))
    twin.store.full = True
    for owner, number in (("sessions", 1), ("supervisor", 1), ("supervisor", 2)):
        twin.run([], [Record(owner, b"", number, SENT, b"", [], [])])
    twin.store.full = False
    assert outbox.count() == 3
    twin.pass_time(1)
    assert outbox.count() == 0
    say(twin, work(5, "agent:heartbeat"))
    assert outbox.count() == 1
    assert twin.recovered().store.rows()["ksi.outbox"] == twin.store.rows()["ksi.outbox"]


def test_a_message_that_was_undone_does_not_wait() -> None:
    twin = Twin(Registry())
    say(twin, work(1, "agent:register"))
    say(twin, work(2, "agent:heartbeat"))
    twin.run([], [Record("sessions", b"", 1, SENT, b"", [], [])])
    twin.store.full = True
    say(twin, work(3, "agent:heartbeat"))
    twin.store.full = False
    twin.store.fails = StorageFull("there is no room for the journal")
    assert say(twin, work(3, "agent:heartbeat")) == [(3, StorageFull)]
    say(twin, work(3, "agent:heartbeat"))
    assert [key for key, _ in twin.store.tables["ksi.outbox"].range()] == [("sessions", 2)]


def test_a_tick_that_finds_the_outbox_full_waits_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = Twin(Registry())
    say(twin, work(1, "agent:spawn", agent_id="scout", argv=["run"]))
    say(twin, work(2, "agent:restart", agent_id="scout"))
    monkeypatch.setattr(commit, "OUTBOX_ROWS_MAX", 1)
    twin.pass_time(registry.REPORT_S + 1)
    assert twin.read("agent:info", agent_id="scout").status == "stopping"
    monkeypatch.undo()
    twin.pass_time(1)
    assert twin.read("agent:info", agent_id="scout").status == "starting"
    assert twin.errors == []


class Insistent(Sessions):
    """Ticks after an append, and once more after each of two ticks."""

    def __init__(self) -> None:
        self.ticks = 0

    def decide(self, command: Any, sender: Sender, tables: Any, given: Given) -> Decision:
        if isinstance(command, Tick):
            self.ticks += 1
            return Decision(tick=self.ticks % 3 != 0)
        decision = super().decide(command, sender, tables, given)
        return msgspec.structs.replace(decision, tick=True)


def test_a_tick_a_decision_asks_for_follows_its_batch_and_so_do_those_it_asks_for() -> None:
    owner = Insistent()
    twin = Twin(owner)
    twin.run([work(1, "session:create", session_id="s"), work(2), work(3)])
    assert owner.ticks == 3
    twin.run([work(3)])  # again: nothing is decided
    assert owner.ticks == 3


def test_a_tick_that_changes_nothing_writes_nothing(twin: Twin) -> None:
    before = len(twin.store.journal)
    twin.pass_time(1)
    assert len(twin.store.journal) == before


# Clients that leave, and those that are forgotten.


def test_a_client_that_says_goodbye_leaves_no_row(twin: Twin) -> None:
    say(twin, work(2), ours=[Record("alice", b"i" * 16, 0, GOODBYE, b"", [], [])])
    assert twin.store.tables["ksi.clients"].count() == 0
    assert twin.recovered().store.tables["ksi.clients"].count() == 0
    assert numbers(twin) == [2]


def test_an_idle_client_is_forgotten_and_told_that_the_outcome_is_unknown(twin: Twin) -> None:
    say(twin, work(2))
    twin.pass_time(CLIENT_IDLE_S_MAX - 1)
    assert twin.store.tables["ksi.clients"].count() == 1
    twin.pass_time(2)
    assert twin.store.tables["ksi.clients"].count() == 0
    for each in (twin, twin.recovered()):
        assert say(each, work(2, again=True, acked=1)) == [(2, Evicted)]
    assert numbers(twin) == [2]
    # What cannot have happened before is carried out: a new command, and a new client.
    say(twin, work(3, acked=2), work(1, instance=b"n" * 16))
    assert numbers(twin) == [2, 3, 1]


def test_what_is_not_known_stays_so_however_often_it_is_asked(twin: Twin) -> None:
    say(twin, work(2), work(3))
    twin.run([], [Record("alice", b"i" * 16, 0, EVICTED, b"", [], [])])
    again = [work(number, again=True, acked=1) for number in (2, 3)]
    bob = work_of(Sender("bob", "agent"), "session:create", {}, 1)
    assert say(twin, *again, bob) == [(2, Evicted), (1, "done")]
    for each in (twin, twin.recovered()):
        each.restart()
        assert say(each, *again) == [(2, Evicted)]
    assert numbers(twin) == [2, 3]


def test_a_clock_that_is_set_makes_nobody_forget(twin: Twin) -> None:
    say(twin, work(2, request_id="r"))
    for number, years in enumerate((1, -2), 1):
        twin.now += years * 366 * DAY_S
        twin.pass_time(0.25)
        say(twin, work_of(Sender("bob", "agent"), "session:create", {}, number))
        twin.pass_time(0.25)
    assert twin.store.tables["ksi.clients"].count() == 2
    assert twin.store.tables["ksi.requests"].count() == 1
    ((_, first),) = answers(twin, work(2, acked=1))
    assert answers(twin, work(1, request_id="r", instance=b"j" * 16))[0][1] == first


def test_a_client_that_is_used_is_not_idle(twin: Twin) -> None:
    for number in range(2, 8):
        twin.pass_time(CLIENT_IDLE_S_MAX / 2)
        say(twin, work(number))
    assert twin.store.tables["ksi.clients"].count() == 1


def test_of_too_many_clients_those_idle_longest_are_forgotten(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CLIENT_ROWS_MAX", 20)
    for number in range(60):
        say(twin, work(1, instance=number.to_bytes(16, "big")))
        twin.pass_time(0.25)
    rows = {key[1]: row for key, row in twin.store.tables["ksi.clients"].range()}
    assert 10 <= len(rows) <= 22
    assert f"{59:032x}" in rows
    assert f"{1:032x}" not in rows
    assert numbers(twin).count(1) == 60


def test_an_evicted_record_makes_retries_unknown_even_for_clients_never_seen(twin: Twin) -> None:
    fresh = b"f" * 16
    assert say(twin, work(1, instance=fresh, again=True)) == [(1, "done")]
    twin.run([], [Record("alice", fresh, 0, EVICTED, b"", [], [])])
    assert say(twin, work(1, instance=b"g" * 16, again=True)) == [(1, Evicted)]


# What a batch is, in the journal.


def test_a_replayed_batch_gives_back_owner_time_and_cut(twin: Twin) -> None:
    twin.pass_time(42)
    twin.loop.cut = 7
    say(twin, work(2))
    assert twin.store.time_s == 42
    fresh = Twin(Sessions())
    fresh.store.begin()
    for payload in twin.store.journal:
        time_s, extra = fresh.loop.replay(payload)
    assert (time_s, extra, fresh.loop.cut) == (42, twin.store.extra, 7)


def test_a_command_decided_on_what_another_of_its_batch_has_done(twin: Twin) -> None:
    said = say(
        twin,
        work(2, "session:transfer", session_id="s", to_agent="bob"),
        work(3),
        work(4, "session:create", session_id="s"),
    )
    assert said == [(2, "done"), (3, NotOwner), (4, Conflict)]


class Careful(Sessions):
    """An owner that looks at another owner's state before it takes an append."""

    def fact(self, command: Any, sender: Sender) -> Any:
        return Describe(agent_id=sender.name) if isinstance(command, Append) else None

    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        if isinstance(given.fact, KsiError):
            raise Forbidden(f"{sender.name}: {given.fact}")
        if isinstance(command, Append) and given.fact is None:
            raise Busy("the registry cannot be read")
        return super().decide(command, sender, tables, given)


def test_a_decision_is_given_the_fact_it_wants_of_another_owners_state() -> None:
    twin = Twin(Careful())
    asked: list[Any] = []
    facts: list[Any] = [None, NotFound("no such agent"), Reply()]

    def answer(query: Any) -> Any:
        asked.append(query)
        return facts.pop(0)

    twin.facts = answer
    say(twin, work(1, "session:create", session_id="s"))

    assert say(twin, work(2, event="a")) == [(2, Busy)]
    assert say(twin, work(2, event="a")) == [(2, Forbidden)]
    assert numbers(twin) == []
    assert say(twin, work(3, event="a")) == [(3, "done")]
    assert numbers(twin) == [3]
    assert asked == [Describe(agent_id="alice")] * 3


# Signals: numbered like commands, written nowhere.


@pytest.fixture
def relay() -> Twin:
    return Twin(bus.OWNER)


def signal(number: int, topic: str = "a", **how: Any) -> commit.Work:
    return work_of(
        ALICE, "message:publish", {"topic": topic, "message": {"n": number}}, number, **how
    )


def keep(number: int, durable: str = "d", pattern: str = "kept", **how: Any) -> commit.Work:
    fields = {"durable": durable, "pattern": pattern}
    return work_of(ALICE, "message:subscribe", fields, number, **how)


def heard(twin: Twin) -> list[str]:
    return [told.topic for told in twin.told]


def test_a_signal_is_answered_and_passed_on_in_the_order_of_numbers_and_once(relay: Twin) -> None:
    assert say(relay, signal(1), signal(2, "b")) == [(1, "done"), (2, "done")]
    assert say(relay, signal(4)) == [(3, "resend")]
    assert say(relay, signal(2, "b", again=True), signal(3, "c")) == [(2, "done"), (3, "done")]
    assert heard(relay) == ["a", "b", "c"]
    assert relay.store.journal == []


def test_signals_and_commands_of_one_sender_share_a_sequence(relay: Twin) -> None:
    works = [signal(1), keep(2), signal(3, "kept"), signal(4, "b")]
    assert say(relay, *works) == [(n, "done") for n in range(1, 5)]
    assert heard(relay) == ["a", "kept", "message.alice.d", "b"]
    assert say(relay, *(replace_again(each) for each in works)) == [
        (n, "done") for n in range(1, 5)
    ]
    assert len(heard(relay)) == 4


def replace_again(work: commit.Work) -> commit.Work:
    return work._replace(again=True)


def test_a_refused_signal_uses_up_its_number_as_a_refused_command_does(relay: Twin) -> None:
    assert say(relay, signal(1, "a..b"), signal(2)) == [(1, Invalid), (2, "done")]
    assert say(relay, signal(1, "a..b", again=True)) == [(1, Invalid)]
    assert say(relay, signal(3, expires_s=-1.0)) == [(3, Expired)]


def test_after_a_crash_signals_go_on_where_the_client_says_and_old_ones_are_answered(
    relay: Twin,
) -> None:
    say(relay, keep(1), signal(2), signal(3))
    relay.restart()
    # Number 3 was not acknowledged: it is passed on again, and what follows goes on.
    again = say(relay, signal(3, acked=2, again=True), keep(4, "e", acked=2), signal(5, acked=2))
    assert again == [(3, "done"), (4, "done"), (5, "done")]
    relay.restart()
    # The journal knows number 4, and so that all before it are done.
    assert say(relay.recovered(), signal(3, acked=2, again=True)) == [(3, "done")]


def test_a_full_disk_takes_back_no_signal_that_was_answered(relay: Twin) -> None:
    say(relay, signal(1), signal(2))
    relay.store.fails = StorageFull("no room")
    assert say(relay, signal(3), keep(4)) == [(3, StorageFull), (4, StorageFull)]
    assert heard(relay) == ["a", "a"]
    assert say(relay, signal(2, again=True), signal(3), keep(4)) == [
        (2, "done"), (3, "done"), (4, "done"),
    ]  # fmt: skip
    assert heard(relay) == ["a", "a", "a"]


def test_a_defect_beside_a_signal_passes_it_on_once(
    relay: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any) -> Decision:
        raise ZeroDivisionError

    monkeypatch.setattr(bus, "_subscribe", break_down)
    assert say(relay, signal(1)) == [(1, "done")]
    assert say(relay, signal(2), keep(3), signal(4, "b")) == [
        (2, "done"), (3, Internal), (4, "done"),
    ]  # fmt: skip
    assert heard(relay) == ["a", "a", "b"]


def test_a_signal_that_comes_again_is_not_evicted(relay: Twin) -> None:
    say(relay, keep(1, instance=b"j" * 16))
    relay.run([], [Record("alice", b"j" * 16, 0, EVICTED, b"", [], [])])
    assert say(relay, signal(9, acked=8, again=True)) == [(9, "done")]
    assert say(relay, keep(9, acked=8, again=True, instance=b"k" * 16)) == [(9, Evicted)]
