"""The owner of tool sessions: what a conversation knows, and when it is forgotten."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ksi.actors.declarations.mcp import Introduction
from ksi.actors.owner import Sender
from ksi.actors.owners import mcp
from ksi.actors.owners.mcp import OWNER
from ksi.actors.testing import Asked, Twin, check_owner, reply_of, work_of
from ksi.transport.errors import Forbidden, Invalid
from ksi.transport.limits import TOOL_SESSION_S, TOOLS_MAX

ONE, TWO = "1" * 64, "2" * 64
OPERATOR = Sender("op", "operator")
PEOPLE = (Sender("alice", "agent"), Sender("bob", "worker"), OPERATOR)


def choose(chance: random.Random) -> Asked:
    """Draw what servers, agents and an operator ask."""
    who = chance.choice(PEOPLE)
    one = {"conversation_id": chance.choice(("a", "b", "c"))}
    maybe = chance.choice(({}, one))
    return chance.choice(
        [
            Asked(who, "mcp:introduce", {**one, "digest": ONE, "tools": 2}),
            Asked(who, "mcp:introduce", {**one, "digest": TWO, "tools": 3}),
            *[Asked(who, "mcp:use", {**one, "tool": chance.choice(("t1", "t2"))})] * 3,
            Asked(who, "mcp:clear_sessions", {**maybe, "idle_s": chance.choice((0.0, 5.0))}),
            Asked(who, "mcp:clear_sessions", {**maybe, "agent_id": "alice"}),
            Asked(who, "mcp:status", {**maybe, "after": chance.choice((None, "alice a"))}),
        ]
    )  # fmt: skip


def test_the_tool_sessions_keep_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose, seeds=range(25))


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def introduce(
    twin: Twin, who: Sender | str = "alice", conversation: str = "c", of: str = ONE
) -> Any:
    return twin.ask(who, "mcp:introduce", conversation_id=conversation, digest=of, tools=2)


def names(twin: Twin, **fields: Any) -> list[tuple[str, str]]:
    page = twin.read("mcp:status", **fields)
    return [(each.agent_id, each.conversation_id) for each in page.sessions]


def test_a_conversation_knows_what_it_was_told_until_the_catalogue_is_another(twin: Twin) -> None:
    assert not introduce(twin).known
    assert introduce(twin) == Introduction(known=True, listed=2)
    assert not introduce(twin, conversation="d").known
    assert not introduce(twin, "bob").known
    assert introduce(twin, of=TWO) == Introduction(known=False, listed=1)
    assert introduce(twin, of=TWO).known
    assert not introduce(twin).known


def test_a_conversation_whose_agent_has_another_role_is_told_anew(twin: Twin) -> None:
    assert not introduce(twin).known
    fields = {"conversation_id": "c", "digest": ONE, "tools": 2}
    worker = Sender("alice", "worker")
    for number, known in ((1, False), (2, True)):
        work = work_of(worker, "mcp:introduce", fields, number, instance=b"w" * 16)
        ((_, _, answer),) = twin.run([work]).answers
        assert reply_of("mcp:introduce", answer).known is known


def test_uses_are_counted_by_tool_and_only_of_conversations_that_are_known(twin: Twin) -> None:
    introduce(twin)
    one = {"conversation_id": "c"}
    assert [twin.ask("alice", "mcp:use", **one, tool="t").count for _ in range(3)] == [1, 2, 3]
    assert twin.ask("alice", "mcp:use", **one, tool="u").count == 1
    assert twin.ask("bob", "mcp:use", **one, tool="t").count == 0
    introduce(twin, of=TWO)
    (view,) = twin.read("mcp:status").sessions
    assert view.uses == {"t": 3, "u": 1}
    assert (view.digest, view.listed, view.tools, view.role) == (TWO, 1, 2, "agent")


def test_no_more_tools_are_counted_than_a_catalogue_can_hold(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp, "TOOLS_MAX", 1)
    introduce(twin)
    one = {"conversation_id": "c"}
    assert twin.ask("alice", "mcp:use", **one, tool="t").count == 1
    assert twin.ask("alice", "mcp:use", **one, tool="u").count == 0
    assert twin.ask("alice", "mcp:use", **one, tool="t").count == 2


def test_an_idle_tool_session_goes_and_one_in_use_stays(twin: Twin) -> None:
    introduce(twin, conversation="idle")
    introduce(twin, conversation="used")
    twin.pass_time(TOOL_SESSION_S - 10)
    twin.ask("alice", "mcp:use", conversation_id="used", tool="t")
    assert len(names(twin)) == 2
    twin.pass_time(11)
    assert names(twin) == [("alice", "used")]
    assert not introduce(twin, conversation="idle").known


def test_of_many_idle_ones_some_go_in_each_tick(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp, "SWEPT_MAX", 2)
    for n in range(5):
        introduce(twin, conversation=f"c{n}")
    for left in (3, 1, 0):
        twin.pass_time(TOOL_SESSION_S)
        assert len(names(twin)) == left


def test_the_one_unused_for_longest_goes_where_there_are_too_many(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp, "TOOL_SESSIONS_MAX", 2)
    for name in ("old", "new"):
        introduce(twin, conversation=name)
        twin.pass_time(1)
    twin.ask("alice", "mcp:use", conversation_id="old", tool="t")
    introduce(twin, conversation="newest")
    assert names(twin) == [("alice", "newest"), ("alice", "old")]
    assert introduce(twin, conversation="old").known


def test_an_agent_clears_its_own_and_an_operator_any(twin: Twin) -> None:
    for who in ("alice", "bob"):
        introduce(twin, who, "c")
        introduce(twin, who, "d")
    with pytest.raises(Forbidden):
        twin.ask("alice", "mcp:clear_sessions", agent_id="bob")
    assert twin.ask("alice", "mcp:clear_sessions", conversation_id="c").cleared == 1
    assert names(twin) == [("alice", "d"), ("bob", "c"), ("bob", "d")]
    assert not introduce(twin, "alice", "c").known
    twin.pass_time(60)
    introduce(twin, "bob", "c")
    assert twin.ask(OPERATOR, "mcp:clear_sessions", agent_id="bob", idle_s=30).cleared == 1
    assert twin.ask(OPERATOR, "mcp:clear_sessions").cleared == 3
    assert names(twin) == []


def test_status_comes_in_pages_and_refuses_a_place_that_is_none(twin: Twin) -> None:
    for conversation in ("c", "c.1", "d"):
        introduce(twin, conversation=conversation)
    introduce(twin, "bob", "a")
    found: list[Any] = []
    after = None
    while True:
        page = twin.read("mcp:status", limit=1, after=after)
        assert page.total == 4
        assert len(found) < 4
        found += [(each.agent_id, each.conversation_id) for each in page.sessions]
        after = page.next
        if after is None:
            break
    assert found == names(twin)
    assert len(found) == 4
    assert names(twin, agent_id="bob") == [("bob", "a")]
    assert names(twin, conversation_id="d") == [("alice", "d")]
    with pytest.raises(Invalid):
        twin.read("mcp:status", after="nowhere")
    with pytest.raises(Invalid):
        twin.ask("alice", "mcp:introduce", conversation_id="c", digest="x", tools=1)
    with pytest.raises(Invalid):
        twin.ask("alice", "mcp:introduce", conversation_id="c", digest=ONE, tools=TOOLS_MAX + 1)
