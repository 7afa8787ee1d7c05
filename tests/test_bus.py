"""The bus: what is passed on, what is kept and for whom, and what becomes of it."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from ksi.actors.declarations.registry import AgentPage, AgentView, Describe, DiscoverPeers
from ksi.actors.owner import Announcement, Query, Reply, Sender
from ksi.actors.owners import bus, load_all
from ksi.actors.owners.bus import OWNER, RESERVED
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.transport.errors import Conflict, Forbidden, Invalid, KsiError, NotFound, Quota

OPERATOR = Sender("op", "operator")
NAMES = ("alice", "bob", "carol")
TOPICS = ("news.today", "news.today.late", "jobs.1", "other")
PATTERNS = ("news.*", "news.>", "jobs.1", ">", "*.today")
REFUSED_TOPICS = (
    "", ".", "a..b", "a.", "a.*", "a.>", "a b", "a.\n", "a\0", "session.x", "inbox.bob",
    "x" * 513, "agent.bob.lost",
)  # fmt: skip


def choose(chance: random.Random) -> Asked:
    """Draw what a few agents say to each other, keep and acknowledge."""
    who = OPERATOR if chance.random() < 0.1 else Sender(chance.choice(NAMES), "agent")
    name, durable = chance.choice(NAMES), chance.choice(("d1", "d2", "inbox"))
    message = {"message": {"n": chance.randint(0, 9)}}
    request = {"request_id": chance.choice((None, None, "r1", "r2"))}
    pattern = "inbox" if durable == "inbox" else chance.choice(PATTERNS)
    numbers = [chance.randint(0, 60) for _ in range(chance.randint(1, 8))]
    answer = {"in_reply_to": chance.choice((None, None, 3))}
    choices: list[Asked] = [
        *[Asked(who, "message:publish", {"topic": chance.choice(TOPICS), **message})] * 5,
        Asked(who, "message:publish", {"topic": chance.choice(REFUSED_TOPICS), **message}),
        *[Asked(who, "message:subscribe", {"durable": durable, "pattern": pattern})] * 2,
        *[Asked(who, "message:ack", {"durable": durable, "message_ids": numbers})] * 3,
        Asked(who, "message:receive", {"durable": durable, "upto": chance.randint(0, 60)}),
        *[Asked(who, "agent:send_message", {"to_agent": name, **message, **answer, **request})] * 3,
        Asked(who, "agent:broadcast", {**message, **request}),
        Asked(who, "agent:route_task", {**message, "capabilities": ["search"], **request}),
        Asked(who, "message:waiting", {"agent_id": name, "durable": durable, "limit": 2}),
        Asked(who, "message:subscriptions", {"agent_id": chance.choice((None, name)), "limit": 2}),
        Asked(who, "message:stats", {}),
    ]
    if chance.random() < 0.05:
        named = {"agent_id": chance.choice((None, name))}
        return Asked(who, "message:unsubscribe", {"durable": durable, **named})
    return chance.choice(choices)


def test_the_bus_keeps_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose, facts=registry_of("alice", "bob"))


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def publish(twin: Twin, topic: str, n: int = 1, who: str = "alice") -> Any:
    return twin.ask(who, "message:publish", topic=topic, message={"n": n})


def waiting(twin: Twin, agent_id: str, durable: str, **fields: Any) -> list[Any]:
    """Return the messages that wait, without their wrapping."""
    page = twin.read("message:waiting", agent_id=agent_id, durable=durable, **fields)
    return [each.message.get("n") for each in page.messages]


def know(twin: Twin, *agents: str) -> None:
    """Let the registry know these agents, all of them capable of all things."""
    twin.facts = registry_of(*agents)


def registry_of(*agents: str) -> Any:
    """Return what answers as the registry would with these agents."""

    def answer(query: Query[Any]) -> Reply | KsiError | None:
        if isinstance(query, Describe):
            known = query.agent_id in agents
            return None if known else NotFound(f"there is no agent {query.agent_id}")
        assert isinstance(query, DiscoverPeers)
        found = [view(each) for each in agents if each not in query.exclude]
        more = found[query.limit - 1].agent_id if len(found) > query.limit else None
        return AgentPage(agents=found[: query.limit], next=more)

    return answer


def view(agent_id: str) -> AgentView:
    blank: dict[str, Any] = dict.fromkeys(AgentView.__struct_fields__)
    return AgentView(**{**blank, "agent_id": agent_id})


# Signals.


def test_what_nobody_wants_kept_is_passed_on_undecoded_and_written_nowhere(twin: Twin) -> None:
    before = twin.store.rows()
    assert publish(twin, "news.today", 7).message_id is None
    (said,) = twin.told
    assert (said.topic, said.sender) == ("news.today", "alice")
    assert isinstance(said.message, msgspec.Raw)
    assert msgspec.msgpack.decode(said.message) == {"n": 7}
    assert twin.store.rows() == before
    assert twin.store.journal == []


@pytest.mark.parametrize("topic", REFUSED_TOPICS)
def test_a_topic_that_is_none_or_is_anothers_is_refused(twin: Twin, topic: str) -> None:
    with pytest.raises(Invalid):
        publish(twin, topic)
    assert twin.told == []


@pytest.mark.parametrize("message", [1, [1], "text", None])
def test_a_message_that_is_no_map_is_refused_kept_or_not(twin: Twin, message: Any) -> None:
    for _ in range(2):
        with pytest.raises(Invalid, match=r"\$\.message"):
            twin.ask("alice", "message:publish", topic="news.today", message=message)
        twin.ask("bob", "message:subscribe", durable="d", pattern=">")


def test_every_word_that_an_owner_announces_under_is_reserved() -> None:
    assert {domain for owner in load_all().values() for domain in owner.domains} <= RESERVED


# Durable subscriptions.


def test_a_message_waits_once_for_each_who_wants_it_until_acknowledged(twin: Twin) -> None:
    for agent_id, pattern in (("bob", "news.>"), ("carol", "*.today"), ("carol", "jobs.>")):
        durable = pattern.split(".")[0].replace("*", "any")
        twin.ask(agent_id, "message:subscribe", durable=durable, pattern=pattern)
    reply = publish(twin, "news.today", 1)
    assert (reply.message_id, reply.kept_for) == (1, 2)
    assert waiting(twin, "bob", "news") == waiting(twin, "carol", "any") == [1]
    assert waiting(twin, "carol", "jobs") == []
    assert twin.read("message:stats").messages == 1

    twin.ask("bob", "message:ack", durable="news", message_ids=[1, 1, 99])
    assert (waiting(twin, "bob", "news"), waiting(twin, "carol", "any")) == ([], [1])
    twin.ask("carol", "message:ack", durable="any", message_ids=[1])
    assert (twin.read("message:stats").messages, twin.read("message:stats").waiting) == (0, 0)


def test_what_is_kept_is_heard_by_those_who_listen_now_and_the_waiting_are_rung(
    twin: Twin,
) -> None:
    twin.ask("bob", "message:subscribe", durable="d", pattern="news.>")
    publish(twin, "other.topic", 1)
    publish(twin, "news.today", 2)
    publish(twin, "other.topic", 3)
    topics = [said.topic for said in twin.told]
    assert topics == ["other.topic", "news.today", "message.bob.d", "other.topic"]


def test_what_was_handed_out_before_is_marked_when_it_comes_again(twin: Twin) -> None:
    twin.ask("bob", "message:subscribe", durable="d", pattern=">")
    for n in range(3):
        publish(twin, "a", n)

    def receive(upto: int) -> Any:
        return twin.ask("bob", "message:receive", durable="d", upto=upto)

    assert receive(2).redelivered == 0
    assert receive(3).redelivered == 2
    assert receive(1).redelivered == 3
    assert receive(10**6).redelivered == 3
    publish(twin, "a", 9)
    assert receive(4).redelivered == 3


def test_the_same_subscription_again_is_the_same_and_another_pattern_a_conflict(
    twin: Twin,
) -> None:
    twin.ask("bob", "message:subscribe", durable="d", pattern="a.>")
    publish(twin, "a.b", 5)
    assert twin.ask("bob", "message:subscribe", durable="d", pattern="a.>").waiting == 1
    with pytest.raises(Conflict, match=r"for a\.>"):
        twin.ask("bob", "message:subscribe", durable="d", pattern="b.>")
    assert waiting(twin, "bob", "d") == [5]


@pytest.mark.parametrize(
    "pattern", ["a..b", "a.>.b", "a*", "session.>", "message.bob.d", "inbox", "", ">.a", "a b"]
)
def test_a_pattern_that_cannot_be_kept_is_refused(twin: Twin, pattern: str) -> None:
    with pytest.raises(Invalid):
        twin.ask("bob", "message:subscribe", durable="d", pattern=pattern)


def test_a_number_that_is_no_message_ever_is_refused(twin: Twin) -> None:
    twin.ask("bob", "message:subscribe", durable="inbox", pattern="inbox")
    beyond = (1 << 64) - 1
    with pytest.raises(Invalid, match="after"):
        twin.read("message:waiting", agent_id="bob", durable="inbox", after=beyond)
    assert waiting(twin, "bob", "inbox", after=beyond >> 1) == []


def test_who_ends_a_subscription_drops_what_waits_in_it_alone(twin: Twin) -> None:
    for name in ("bob", "carol"):
        twin.ask(name, "message:subscribe", durable="d", pattern="a")
    publish(twin, "a", 1)
    with pytest.raises(Forbidden):
        twin.ask("carol", "message:unsubscribe", durable="d", agent_id="bob")
    twin.ask(OPERATOR, "message:unsubscribe", durable="d", agent_id="bob")
    with pytest.raises(NotFound):
        waiting(twin, "bob", "d")
    assert waiting(twin, "carol", "d") == [1]
    assert publish(twin, "a", 2).kept_for == 1


def test_a_full_subscription_refuses_the_message_and_names_who_does_not_read(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "WAITING_MAX", 3)
    twin.ask("bob", "message:subscribe", durable="d", pattern="a")
    for n in range(3):
        publish(twin, "a", n)
    with pytest.raises(Quota, match="wait in d of bob") as refused:
        publish(twin, "a", 3)
    assert refused.value.details["agent_id"] == "bob"
    assert waiting(twin, "bob", "d") == [0, 1, 2]
    twin.ask("bob", "message:ack", durable="d", message_ids=[2])
    assert publish(twin, "a", 3).kept_for == 1


def test_large_messages_fill_a_subscription_as_well(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "WAITING_BYTES_MAX", 1000)
    know(twin, "bob")
    large = {"text": "x" * 600}
    twin.ask("alice", "agent:send_message", to_agent="bob", message=large)
    with pytest.raises(Quota):
        twin.ask("alice", "agent:send_message", to_agent="bob", message=large)


def test_subscriptions_are_bounded_in_all_and_for_one_agent(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "DURABLES_MAX", 5)
    monkeypatch.setattr(bus, "DURABLES_OF_AGENT_MAX", 3)
    for n in range(3):
        twin.ask("bob", "message:subscribe", durable=f"d{n}", pattern="a")
    with pytest.raises(Quota, match="bob has 3"):
        twin.ask("bob", "message:subscribe", durable="d3", pattern="a")
    for n in range(2):
        twin.ask("carol", "message:subscribe", durable=f"d{n}", pattern="a")
    with pytest.raises(Quota, match="there are 5"):
        twin.ask("carol", "message:subscribe", durable="d3", pattern="a")
    twin.ask("bob", "message:subscribe", durable="inbox", pattern="inbox")  # has no pattern


def test_pages_go_on_where_the_last_one_ended(twin: Twin) -> None:
    twin.ask("bob", "message:subscribe", durable="d", pattern="a")
    for n in range(10):
        publish(twin, "a", n)
    found, after = [], 0
    while after is not None:
        page = twin.read("message:waiting", agent_id="bob", durable="d", after=after, limit=3)
        found += [each.message["n"] for each in page.messages]
        after = page.next
    assert found == list(range(10))


def test_durable_subscriptions_are_listed_in_pages(twin: Twin) -> None:
    made = [(agent, durable) for agent in ("a", "a.b", "ab") for durable in ("d", "d.x", "e")]
    for agent, durable in made:
        twin.ask(agent, "message:subscribe", durable=durable, pattern="x")
    for wanted, fields in ((made, {}), (made[3:6], {"agent_id": "a.b"})):
        found: list[tuple[str, str]] = []
        after = None
        while True:
            page = twin.read("message:subscriptions", limit=2, after=after, **fields)
            assert len(page.subscriptions) <= 2
            found += [(each.agent_id, each.durable) for each in page.subscriptions]
            after = page.next
            if after is None:
                break
        assert found == wanted


# Messages for one agent, for many, and tasks.


def test_a_direct_message_waits_in_the_inbox_and_nobody_else_hears_it(twin: Twin) -> None:
    know(twin, "bob")
    sent = twin.ask("alice", "agent:send_message", to_agent="bob", message={"n": 4})
    assert waiting(twin, "bob", "inbox") == [4]
    assert [said.topic for said in twin.told] == ["message.bob.inbox"]
    answered = {"to_agent": "alice", "message": {"n": 5}, "in_reply_to": sent.message_id}
    twin.ask("bob", "agent:send_message", **answered)  # the registry knows no alice
    assert waiting(twin, "alice", "inbox", in_reply_to=sent.message_id) == [5]
    assert waiting(twin, "alice", "inbox", in_reply_to=77) == []


def test_a_message_to_nobody_is_refused(twin: Twin) -> None:
    know(twin)
    with pytest.raises(NotFound, match="no agent ghost") as refused:
        twin.ask("alice", "agent:send_message", to_agent="ghost", message={})
    assert refused.value.hint == "it registers first: ksi --as ghost ask agent:register"
    with pytest.raises(NotFound, match="no active agent has fly"):
        twin.ask("alice", "agent:route_task", capabilities=["fly"], message={})
    nobody = twin.ask("alice", "agent:broadcast", message={})
    assert (nobody.message_id, nobody.agents, nobody.skipped) == (None, [], {})
    assert twin.events == []


def test_a_broadcast_reaches_all_but_its_sender_and_says_who_had_no_room(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "WAITING_MAX", 1)
    know(twin, "alice", "bob", "carol", "dave")
    twin.ask("bob", "agent:send_message", to_agent="carol", message={"n": 1})
    many = twin.ask("alice", "agent:broadcast", message={"n": 2}, exclude=["dave"])
    assert many.agents == ["bob"]
    assert "wait in inbox of carol" in many.skipped["carol"]
    assert (waiting(twin, "bob", "inbox"), waiting(twin, "carol", "inbox")) == ([2], [1])


def test_a_broadcast_to_more_than_it_can_reach_is_refused_as_a_whole(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "RECEIVERS_MAX", 2)
    know(twin, "a", "b", "c")
    with pytest.raises(Quota, match="more than 2"):
        twin.ask("alice", "agent:broadcast", message={})


def test_a_task_goes_to_the_one_with_least_waiting(twin: Twin) -> None:
    know(twin, "bob", "carol")
    route = {"capabilities": ["search"], "message": {"n": 1}}
    assert [twin.ask("alice", "agent:route_task", **route).to_agent for _ in range(4)] == [
        "bob", "carol", "bob", "carol",
    ]  # fmt: skip
    twin.ask("carol", "message:ack", durable="inbox", message_ids=[2, 4])
    assert twin.ask("alice", "agent:route_task", **route).to_agent == "carol"


def test_a_request_id_sends_once(twin: Twin) -> None:
    know(twin, "bob")
    fields = {"to_agent": "bob", "message": {"n": 1}, "request_id": "r"}
    assert len({twin.ask("alice", "agent:send_message", **fields).message_id for _ in "abc"}) == 1
    assert waiting(twin, "bob", "inbox") == [1]


def test_what_is_announced_of_a_kept_message_is_the_body_as_it_was_stored(twin: Twin) -> None:
    twin.ask("bob", "message:subscribe", durable="d", pattern="a")
    publish(twin, "a", 3)
    said = twin.told[0]
    assert said == Announcement("a", said.message, "alice")
    assert isinstance(said.message, msgspec.Raw)
    assert msgspec.msgpack.decode(said.message) == {"n": 3}
