"""The conformance kit finds owners that break a promise: each here breaks one."""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from ksi.actors import testing
from ksi.actors.declarations.registry import Beat, RegistryTables
from ksi.actors.declarations.sessions import (
    Append,
    Close,
    EntryAppended,
    Ownership,
    SessionCreated,
    SessionTables,
)
from ksi.actors.owner import Announcement, Decision, Given, Line, Reply, Sender
from ksi.actors.owners.registry import Registry
from ksi.actors.owners.sessions import Sessions
from ksi.actors.testing import Asked, Twin, check_owner, work_of
from ksi.transport.errors import Forbidden, Internal, Quota

NOTE = {"session_id": "s", "event": "note", "data": {}}


def choose(chance: random.Random) -> Asked:
    """Draw every operation of the sessions, on one session of one agent."""
    alice, bob = Sender("alice", "agent"), Sender("bob", "agent")
    one = {"session_id": "s"}
    return chance.choice(
        [
            *[Asked(alice, "session:create", {**one, "invited": ["bob"], "lease_s": 5.0})] * 3,
            Asked(bob, "session:create", {}),
            Asked(bob, "session:archived", {}),
            Asked(alice, "session:append", NOTE),
            *[
                Asked(Sender("op", "operator"), f"session:{order}", {"session_ids": ["s"]})
                for order in ("archive", "unarchive")
            ],
            Asked(bob, "session:fork", one),
            Asked(alice, "session:append_many", {**one, "entries": [{"event": "note"}]}),
            Asked(bob, "session:contribute", NOTE),
            Asked(alice, "session:transfer", {**one, "to_agent": "alice"}),
            Asked(bob, "session:transfer", {**one, "to_agent": "alice"}),
            Asked(bob, "session:claim", one),
            Asked(alice, "session:close", one) if chance.random() < 0.2 else Asked(
                Sender("registry", "owner"), "session:heartbeat", {"agent_id": "alice"}
            ),
            *[
                Asked(bob, f"session:{query}", one)
                for query in ("get", "history", "participants")
            ],
            Asked(bob, "session:list", {}),
            Asked(Sender("completion", "owner"), "session:record", {
                **one, "request_id": "r", "agent_id": "bob", "event": "completion:request",
                "data": {},
            }),
        ]
    )  # fmt: skip


def check(owner: Sessions) -> None:
    check_owner(owner, choose, seeds=range(10))


def test_sessions_as_they_are_pass() -> None:
    check(Sessions())


class DecideWrites(Sessions):
    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        tables.owned.put(("nobody", "nothing"), b"")
        return super().decide(command, sender, tables, given)


class AnswerWrites(Sessions):
    def answer(self, query: Any, tables: SessionTables) -> Reply:
        tables.owned.delete(("alice", "s"))
        return super().answer(query, tables)


class ApplyRemembers(Sessions):
    applied = 0

    def apply(self, event: Any, tables: SessionTables) -> None:
        super().apply(event, tables)
        self.applied += 1
        if isinstance(event, EntryAppended):
            tables.owned.put(("count", str(self.applied)), b"")


class ApplyChangesTheEvent(Sessions):
    def apply(self, event: Any, tables: SessionTables) -> None:
        super().apply(event, tables)
        if isinstance(event, SessionCreated):
            event.invited.append("mallory")


class LinesLeaveAGap(Sessions):
    def lines(self, event: Any) -> Iterable[Line]:
        return [
            Line(line.key, line.offset + (line.offset > 500), line.content)
            for line in super().lines(event)
        ]


class LogsLie(Sessions):
    def logs(self, tables: SessionTables, after: str) -> Iterator[tuple[str, int]]:
        return ((key, size + 1) for key, size in super().logs(tables, after))


class RefusesWhatItDoesNotDeclare(Sessions):
    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        if isinstance(command, Close):
            raise Quota("too many closed sessions")
        return super().decide(command, sender, tables, given)


class RepliesSomethingElse(Sessions):
    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        decision = super().decide(command, sender, tables, given)
        if isinstance(command, Append):
            return Decision(decision.events, Ownership(session_id="s", owner="alice", epoch=1))
        return decision


class AnnouncesUnderAnothersName(Sessions):
    def announce(self, event: Any) -> Iterable[Announcement]:
        return [Announcement("agent.alice.active", {})]


class Fails(Sessions):
    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        if isinstance(command, Append):
            raise KeyError("a defect")
        return super().decide(command, sender, tables, given)


@pytest.mark.parametrize(
    ("owner", "finding"),
    [
        (DecideWrites(), "writes a table"),
        (AnswerWrites(), "writes a table"),
        (ApplyRemembers(), "the journal applied to empty tables"),
        (ApplyChangesTheEvent(), "changed the event"),
        (LinesLeaveAGap(), "a gap in the log"),
        (LogsLie(), "`logs`"),
        (RefusesWhatItDoesNotDeclare(), "session:close refuses Quota"),
        (RepliesSomethingElse(), "missing required field `seq`"),
        (AnnouncesUnderAnothersName(), "agent.alice.active"),
        (Fails(), "KeyError.*a defect"),
    ],
)
def test_an_owner_that_breaks_a_promise_is_found_and_the_seed_is_told(
    owner: Sessions, finding: str
) -> None:
    with pytest.raises(AssertionError, match=rf"sessions, seed \d(.|\n)*{finding}"):
        check(owner)


def test_an_operation_that_is_never_carried_out_is_no_success() -> None:
    def without_close(chance: random.Random) -> Asked:
        asked = choose(chance)
        return asked if asked.operation != "session:close" else without_close(chance)

    with pytest.raises(AssertionError, match="session:close"):
        check_owner(Sessions(), without_close, seeds=range(10))


class RefusalLeavesATrace(Registry):
    def decide(
        self, command: Any, sender: Sender, tables: RegistryTables, given: Given
    ) -> Decision:
        if isinstance(command, Beat):
            agent = tables.agents.get(sender.name)
            assert agent is not None
            agent.capabilities.append("stolen")
            raise Forbidden("and yet it changed")
        return super().decide(command, sender, tables, given)


def test_a_refusal_that_changes_what_is_in_a_row_is_found() -> None:
    twin = Twin(RefusalLeavesATrace())
    twin.ask("alice", "agent:register", capabilities=["search"])
    with pytest.raises(Internal):
        twin.ask("alice", "agent:heartbeat")
    assert "a row of agents was changed: alice" in twin.errors[0]


def test_a_batch_without_room_in_which_nothing_is_to_be_committed_is_no_fault() -> None:
    run = testing._Run(Sessions(), choose, seed=1)
    gap = work_of(Sender("alice", "agent"), "session:create", {}, 7)
    run._run_without_room([gap])  # is told to send again from 1
    assert run.twin.store.journal == []
