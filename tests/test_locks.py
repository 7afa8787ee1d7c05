"""Locks on conversations, without a process: who has them, who waits, and when they are over."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_editing import choose as choose_of_edits
from test_editing import folder_of_forks

from ksi.actors.owner import Sender
from ksi.actors.owners.library import OWNER
from ksi.actors.owners.sessions import OWNER as SESSIONS
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    Invalid,
    KsiError,
    NotFound,
    NotOwner,
    Quota,
    StaleEpoch,
)
from ksi.transport.limits import LOCK_EXPIRED_S

OPERATOR = Sender("operator", "operator")
AGENTS = ("alice", "bob", "carol")
CONVERSATIONS = ("c1", "c2", "c3")
REQUESTS = ("r1", "r2")


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def acquire(twin: Twin, agent: str, request: str = "r1", **more: Any) -> Any:
    return twin.ask(
        agent, "conversation:acquire_lock", conversation_id="c1", request_id=request, **more
    )


def status(twin: Twin) -> Any:
    return twin.read("conversation:lock_status", conversation_id="c1")


def test_the_library_keeps_what_every_owner_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksi.actors.owners.editing.EDITS_MAX", 10_000)
    choosers = (choose, choose, choose_of_edits)

    def either(chance: random.Random) -> Asked:
        return chance.choice(choosers)(chance)

    check_owner(OWNER, either, seeds=range(15), facts=folder_of_forks)


def choose(chance: random.Random) -> Asked:
    sender = Sender(chance.choice(AGENTS), "agent")
    conversation, request = chance.choice(CONVERSATIONS), chance.choice(REQUESTS)
    lock = {"conversation_id": conversation, "request_id": request}
    epoch = chance.choice((None, None, chance.randrange(1, 30)))
    if chance.random() < 0.2:
        operation, fields = chance.choice(ORDERS)
        return Asked(OPERATOR, operation, fields)
    if chance.random() < 0.3:
        return Asked(sender, *chance.choice(QUERIES))
    forks = {"expected_conversation_id": conversation, "request_id": request, "epoch": epoch}
    asked: tuple[tuple[str, dict[str, Any]], ...] = (
        (
            "conversation:acquire_lock",
            {
                **lock,
                "ttl_s": chance.choice((0.5, 2.0, 300.0)),
                "queue": chance.random() < 0.9,
                "metadata": {"why": "x" * chance.choice((1, 2000))},
            },
        ),
        ("conversation:acquire_lock", lock),
        ("conversation:release_lock", {"request_id": request, "epoch": epoch}),
        ("conversation:release_lock", {"request_id": request, "agent_id": "bob"}),
        ("conversation:renew_lock", {**lock, "epoch": epoch}),
        (
            "conversation:fork_detected",
            {**forks, "actual_conversation_id": chance.choice(CONVERSATIONS)},
        ),
    )
    operation, fields = chance.choice(asked)
    is_operator = "agent_id" in fields and chance.random() < 0.5
    return Asked(OPERATOR if is_operator else sender, operation, fields)


ORDERS: list[tuple[str, dict[str, Any]]] = [
    ("composition:rebuild_index", {}),
    ("conversation:rebuild_index", {}),
    ("conversation:import", {"path": "/logs/one"}),
    ("conversation:import", {"path": "logs/../two"}),
    ("conversation:forget", {"path": "/logs/one"}),
]
QUERIES: list[tuple[str, dict[str, Any]]] = [
    ("conversation:lock_status", {"conversation_id": "c1"}),
    ("conversation:locks", {"limit": 2}),
    ("conversation:locks", {"after": "c1"}),
    ("conversation:imports", {}),
    ("conversation:list", {}),
    ("conversation:get", {"session_id": "known"}),
    ("conversation:search", {"query": "words"}),
    ("conversation:export", {"session_id": "known"}),
    ("conversation:stats", {}),
    ("conversation:active", {}),
    ("conversation:problems", {"after": "3 /logs/one"}),
    ("conversation:problems", {"after": "three"}),
    ("conversation:status", {}),
    ("composition:list", {}),
    ("composition:discover", {"include_metadata": True}),
    ("composition:get", {"name": "known"}),
    ("composition:render", {"name": "known"}),
    ("composition:render_component", {"name": "known", "include_metadata": True}),
    ("composition:get", {"name": "other"}),
    ("composition:problems", {}),
    ("composition:status", {}),
]


def test_a_lock_is_given_to_one_and_the_others_wait_in_order(twin: Twin) -> None:
    first = acquire(twin, "alice")
    assert (first.acquired, first.state, first.epoch) == (True, "locked", 1)
    second, third = acquire(twin, "bob"), acquire(twin, "carol")
    assert (second.acquired, second.state, second.position) == (False, "queued", 1)
    assert (third.position, third.holder, third.epoch) == (2, "alice", None)
    assert acquire(twin, "carol").position == 2, "said again, it says how it is"

    released = twin.ask("alice", "conversation:release_lock", request_id="r1")
    assert (released.released, released.next_holder) == (True, "bob")
    now = status(twin)
    assert (now.holder, now.epoch, now.queue) == ("bob", 2, [["carol", "r1"]])
    assert [each.topic for each in twin.told][-2:] == [
        "conversation.c1.unlocked",
        "conversation.c1.lock_transferred",
    ]


def test_a_lock_of_a_silent_holder_expires_and_the_next_has_a_higher_epoch(twin: Twin) -> None:
    """Owner time alone counts: a stopped owner lets no lock expire."""
    epoch = acquire(twin, "alice", ttl_s=10.0).epoch
    acquire(twin, "bob", ttl_s=10.0)
    twin.now += 1000  # wall time is nothing to it
    twin.run([], tick=True)
    assert status(twin).holder == "alice"

    twin.pass_time(10.1)
    now = status(twin)
    assert (now.state, now.holder) == ("locked", "bob")
    assert now.epoch > epoch
    for operation in ("conversation:renew_lock", "conversation:fork_detected"):
        named = {"conversation_id": "c1"}
        if operation.endswith("detected"):
            named = {"expected_conversation_id": "c1", "actual_conversation_id": "c2"}
        with pytest.raises(StaleEpoch) as refused:
            twin.ask("alice", operation, request_id="r1", epoch=epoch, **named)
        assert refused.value.details == {"owner": "bob", "epoch": now.epoch}
    with pytest.raises(StaleEpoch):
        twin.ask("alice", "conversation:release_lock", request_id="r1", epoch=epoch)


def test_what_has_expired_without_a_queue_is_known_as_expired_for_a_while(twin: Twin) -> None:
    acquire(twin, "alice", ttl_s=1.0)
    twin.pass_time(1.5)
    assert (status(twin).state, status(twin).locked) == ("expired", False)
    assert acquire(twin, "bob", ttl_s=1.0).epoch == 2
    twin.pass_time(1.5)
    twin.pass_time(LOCK_EXPIRED_S + 1)
    assert status(twin).state == "unlocked"
    assert acquire(twin, "alice").epoch == 3, "an epoch never comes again"


def test_a_lock_that_is_renewed_goes_on(twin: Twin) -> None:
    epoch = acquire(twin, "alice", ttl_s=10.0).epoch
    for _ in range(5):
        twin.pass_time(9.0)
        lock = {"conversation_id": "c1", "request_id": "r1"}
        twin.ask("alice", "conversation:renew_lock", epoch=epoch, **lock)
    assert status(twin).holder == "alice"
    with pytest.raises(NotOwner):
        twin.ask("bob", "conversation:renew_lock", conversation_id="c1", request_id="r1")


def test_a_detected_fork_is_on_record_and_the_request_goes_on_with_the_child(twin: Twin) -> None:
    acquire(twin, "alice")
    acquire(twin, "bob")
    fork = {
        "request_id": "r1",
        "expected_conversation_id": "c1",
        "actual_conversation_id": "c1_fork",
    }
    with pytest.raises(NotOwner):
        twin.ask("carol", "conversation:fork_detected", **fork)

    found = twin.ask("alice", "conversation:fork_detected", **fork)
    assert (found.total_forks, found.child_conversation) == (1, "c1_fork")
    child = twin.read("conversation:lock_status", conversation_id="c1_fork")
    assert (child.holder, child.epoch, child.parent_conversation) == ("alice", found.epoch, "c1")
    parent = status(twin)
    assert (parent.holder, parent.child_conversations) == ("bob", ["c1_fork"])
    assert parent.epoch != child.epoch
    twin.ask("bob", "conversation:release_lock", request_id="r1")
    assert status(twin).state == "forked"
    assert "has forked: c1_fork" in acquire(twin, "carol").fork_warning


def test_a_place_in_the_queue_can_be_left(twin: Twin) -> None:
    acquire(twin, "alice")
    acquire(twin, "bob")
    acquire(twin, "carol")
    left = twin.ask("bob", "conversation:release_lock", request_id="r1")
    assert not left.released
    assert status(twin).queue == [["carol", "r1"]]
    with pytest.raises(NotFound):
        twin.ask("bob", "conversation:release_lock", request_id="r1")


def test_one_who_does_not_want_to_wait_is_told_whose_it_is(twin: Twin) -> None:
    acquire(twin, "alice")
    with pytest.raises(Conflict) as refused:
        acquire(twin, "bob", queue=False)
    assert refused.value.details == {"owner": "alice", "epoch": 1}
    with pytest.raises(Conflict, match="has conversation c1"):
        twin.ask("alice", "conversation:acquire_lock", conversation_id="c2", request_id="r1")


def test_only_an_operator_releases_what_another_holds(twin: Twin) -> None:
    acquire(twin, "alice")
    with pytest.raises(Forbidden):
        twin.ask("bob", "conversation:release_lock", request_id="r1", agent_id="alice")
    twin.ask(OPERATOR, "conversation:release_lock", request_id="r1", agent_id="alice")
    assert status(twin).state == "unlocked"


def test_bounds_are_named(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksi.actors.owners import locks

    with pytest.raises(Quota, match="1024 bytes"):
        acquire(twin, "alice", metadata={"why": "x" * 2000})
    monkeypatch.setattr(locks, "LOCK_QUEUE_MAX", 1)
    acquire(twin, "alice")
    acquire(twin, "bob")
    with pytest.raises(Conflict, match="1 requests waiting"):
        acquire(twin, "carol")
    monkeypatch.setattr(locks, "LOCKS_MAX", 1)
    with pytest.raises(Busy):
        twin.ask("dave", "conversation:acquire_lock", conversation_id="c2", request_id="r1")
    with pytest.raises(Invalid, match="no absolute path"):
        twin.ask(OPERATOR, "conversation:import", path="logs")


def test_an_append_under_a_lock_that_is_over_is_refused(twin: Twin) -> None:
    """What the sessions are given is the committed state of the locks, as in a running system."""
    sessions = Twin(SESSIONS)

    def fact(query: Any) -> Any:
        try:
            return twin.read("conversation:lock_status", conversation_id=query.conversation_id)
        except KsiError as refusal:
            return refusal

    sessions.facts = fact
    sessions.ask("alice", "session:create", session_id="c1")
    entry = {"session_id": "c1", "event": "note"}
    first = acquire(twin, "alice", ttl_s=5.0).epoch
    sessions.ask("alice", "session:append", lock_epoch=first, **entry)
    acquire(twin, "bob", "r2", ttl_s=5.0)
    twin.pass_time(5.1)
    with pytest.raises(StaleEpoch) as refused:
        sessions.ask("alice", "session:append", lock_epoch=first, **entry)
    second = status(twin).epoch
    assert refused.value.details == {"owner": "bob", "epoch": second}
    sessions.ask("bob", "session:contribute", lock_epoch=second, **entry)
    with pytest.raises(StaleEpoch):
        sessions.ask("carol", "session:contribute", lock_epoch=second, **entry)
    sessions.facts = lambda _query: None
    with pytest.raises(Busy):
        sessions.ask("bob", "session:contribute", lock_epoch=second, **entry)
    assert sessions.read("session:get", session_id="c1").seq == 2
