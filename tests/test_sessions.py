"""Sessions: one writer, epochs, leases, admission, order, history, patterns and roles."""

import json
import random
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from ksi.actors.declarations.sessions import ENTRIES_MAX
from ksi.actors.owner import Sender
from ksi.actors.owners import sessions
from ksi.actors.owners.sessions import OWNER, detect_pattern, detect_role
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.transport.errors import (
    Conflict,
    Forbidden,
    Invalid,
    KsiError,
    NotFound,
    NotOwner,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import FRAME_BYTES_MAX

OPERATOR = Sender("op", "operator")
REGISTRY = Sender("registry", "owner")
COMPLETION = Sender("completion", "owner")
NAMES = ("alice", "alice", "alice", "bob", "carol")
IDS = ("s1", "s2")
DATA: tuple[dict[str, Any], ...] = (
    {"text": "hello"},
    {"text": "Grüße \u2028 \x85 \U0001f600", "to_agent": "bob"},
    {"role": "lead", "team_id": "t"},
    {"context": {"role_transition": {"from": "a", "to": "b", "duration": "task_scoped"}}},
    {},
)


def choose(chance: random.Random) -> Asked:
    """Draw what a few agents and an operator ask about a few sessions."""
    name, other = chance.choice(NAMES), chance.choice(NAMES)
    who = OPERATOR if chance.random() < 0.1 else Sender(name, "agent")
    session = {"session_id": chance.choice(IDS)}
    epoch = {"epoch": chance.choice((None, None, None, None, 1, chance.randint(1, 5)))}
    entry = {"event": "note", "data": chance.choice(DATA)}
    request = {"request_id": chance.choice((None, None, "r1", "r2"))}
    lease_s = chance.choice((None, 1.0, 5.0))
    admission = chance.choice(("open", "invited", "closed"))
    several = [entry, {"event": "more", "correlation_id": "c1"}] * chance.randint(1, 40)
    create = {"admission": admission, "invited": [other], "lease_s": lease_s}
    several_ids = {"session_ids": chance.choice((["s1"], ["s1", "s2", "s1"]))}
    choices: list[Asked] = [
        *[Asked(OPERATOR, "session:archive", several_ids)] * 2,
        Asked(OPERATOR, "session:unarchive", several_ids),
        Asked(who, "session:archived", {"limit": 1, "after": chance.choice((None, "s1"))}),
        *[Asked(who, "session:create", {**session, **create})] * 3,
        Asked(who, "session:create", {**create, **request}),
        *[Asked(who, "session:append", {**session, **entry, **epoch, **request})] * 6,
        *[Asked(who, "session:append_many", {**session, "entries": several, **epoch})] * 3,
        *[Asked(who, "session:contribute", {**session, **entry, **request})] * 2,
        Asked(who, "session:fork", {**session, "at": chance.choice((None, 0, 1)), **request}),
        Asked(who, "session:transfer", {**session, "to_agent": other, **epoch}),
        Asked(who, "session:claim", session),
        Asked(REGISTRY, "session:heartbeat", {"agent_id": name}),
        *[Asked(COMPLETION, "session:record", {**session, **record_of(chance, name)})] * 4,
        Asked(who, "session:get", session),
        Asked(who, "session:history", {**session, "after": chance.choice((None, 0, 63, 64, 70))}),
        Asked(who, "session:participants", session),
        Asked(who, "session:list", {"owner": chance.choice((None, other)), "limit": 2}),
    ]
    if chance.random() < 0.03:
        return Asked(who, "session:close", {**session, **epoch})
    return chance.choice(choices)


def record_of(chance: random.Random, name: str) -> dict[str, Any]:
    event = chance.choice(("completion:request", "completion:request", "completion:result"))
    request_id = f"r{chance.randint(1, 3)}"
    return {"request_id": request_id, "agent_id": name, "event": event, "data": {"prompt": "x"}}


def test_the_sessions_keep_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose)


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def create(twin: Twin, owner: str = "alice", **fields: Any) -> str:
    created: str = twin.ask(owner, "session:create", **fields).session_id
    return created


def append(twin: Twin, session_id: str, who: Any = "alice", **fields: Any) -> int:
    fields = {"event": "note", "data": {"text": "x"}, **fields}
    seq: int = twin.ask(who, "session:append", session_id=session_id, **fields).seq
    return seq


def lines(twin: Twin, session_id: str) -> list[dict[str, Any]]:
    content = twin.log.content.get(session_id, b"")
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


# The archive.


def test_a_session_is_archived_because_it_is_closed_and_not_for_what_it_says(twin: Twin) -> None:
    talk, done = create(twin, session_id="a"), create(twin, session_id="b")
    append(twin, talk, data={"text": "this session is closed"})
    append(twin, done)
    with pytest.raises(Conflict, match="b is not closed"):
        twin.ask(OPERATOR, "session:archive", session_ids=[done])
    twin.ask("alice", "session:close", session_id=done)
    with pytest.raises(Conflict, match="a is not closed"):
        twin.ask(OPERATOR, "session:archive", session_ids=[done, talk])
    assert twin.read("session:archived").sessions == []

    twin.ask(OPERATOR, "session:archive", session_ids=[done, done])
    (listed,) = twin.read("session:archived").sessions
    assert (listed.session_id, listed.archived_by) == (done, "op")
    assert listed.size_bytes == len(twin.log.content[done])
    twin.ask(OPERATOR, "session:unarchive", session_ids=[done])
    twin.ask(OPERATOR, "session:unarchive", session_ids=[talk])  # It is where it should be.
    assert twin.read("session:archived").sessions == []


def test_what_is_archived_is_listed_a_page_at_a_time(twin: Twin) -> None:
    names = [create(twin, session_id=f"s{number}") for number in range(5)]
    for name in names:
        twin.ask("alice", "session:close", session_id=name)
    twin.ask(OPERATOR, "session:archive", session_ids=names)
    found: list[str] = []
    after = None
    while True:
        page = twin.read("session:archived", limit=2, after=after)
        found += [each.session_id for each in page.sessions]
        if (after := page.next) is None:
            break
    assert found == names


# Ownership and epochs.


def test_only_the_owner_appends_and_others_are_told_who_it_is(twin: Twin) -> None:
    session_id = create(twin)
    assert session_id.startswith("sess_")
    assert [append(twin, session_id) for _ in range(3)] == [1, 2, 3]
    for who in ("bob", OPERATOR):
        with pytest.raises(NotOwner, match="written by alice") as refused:
            append(twin, session_id, who)
        assert refused.value.details == {"owner": "alice", "epoch": 1}
    assert append(twin, session_id) == 4


def test_a_former_epoch_is_refused_before_a_wrong_name(twin: Twin) -> None:
    session_id = create(twin)
    twin.ask("alice", "session:transfer", session_id=session_id, to_agent="bob")
    with pytest.raises(StaleEpoch) as refused:
        append(twin, session_id, epoch=1)
    assert refused.value.details == {"owner": "bob", "epoch": 2}
    with pytest.raises(NotOwner):
        append(twin, session_id)
    with pytest.raises(NotOwner):
        append(twin, session_id, epoch=2)
    twin.ask("bob", "session:transfer", session_id=session_id, to_agent="alice")
    with pytest.raises(StaleEpoch):  # the name fits again, what it sent long ago does not
        append(twin, session_id, epoch=1)
    assert append(twin, session_id, epoch=3) == 1


@pytest.mark.parametrize("operation", ["append", "append_many", "transfer", "close"])
def test_every_write_checks_name_and_epoch(twin: Twin, operation: str) -> None:
    session_id = create(twin)
    needed: dict[str, dict[str, Any]] = {
        "append": {"event": "note"},
        "append_many": {"entries": [{"event": "note"}]},
        "transfer": {"to_agent": "carol"},
        "close": {},
    }
    fields = needed[operation]
    for who, epoch, refusal in (("bob", None, NotOwner), ("alice", 7, StaleEpoch)):
        with pytest.raises(refusal):
            twin.ask(who, f"session:{operation}", session_id=session_id, epoch=epoch, **fields)
    with pytest.raises(NotFound, match="ghost"):
        twin.ask("alice", f"session:{operation}", session_id="ghost", **fields)
    twin.ask("alice", f"session:{operation}", session_id=session_id, epoch=1, **fields)


def test_a_transfer_raises_the_epoch_and_makes_the_new_owner_a_participant(twin: Twin) -> None:
    session_id = create(twin)
    given = twin.ask("alice", "session:transfer", session_id=session_id, to_agent="bob", epoch=1)
    assert (given.owner, given.epoch) == ("bob", 2)
    assert append(twin, session_id, "bob") == 1
    people = twin.read("session:participants", session_id=session_id).participants
    assert [each.agent_id for each in people] == ["alice", "bob"]
    owned = [twin.read("session:list", owner=name).sessions for name in ("alice", "bob")]
    assert [[each.session_id for each in listed] for listed in owned] == [[], [session_id]]
    with pytest.raises(Conflict, match="bob owns"):
        twin.ask("bob", "session:transfer", session_id=session_id, to_agent="bob")


def test_an_operator_transfers_what_is_not_its_own(twin: Twin) -> None:
    session_id = create(twin)
    assert twin.ask(OPERATOR, "session:transfer", session_id=session_id, to_agent="bob").epoch == 2


def test_a_session_is_created_once(twin: Twin) -> None:
    create(twin, session_id="s1")
    with pytest.raises(Conflict) as refused:
        create(twin, "bob", session_id="s1")
    assert refused.value.details == {"owner": "alice", "epoch": 1}


def test_sessions_are_told_apart_by_fresh_ids(twin: Twin) -> None:
    assert len({create(twin) for _ in range(20)}) == 20


def test_a_fork_goes_on_from_an_entry_and_names_its_parent(twin: Twin) -> None:
    parent = create(twin, pattern="team", title="the plan")
    for _ in range(5):
        append(twin, parent)
    before = lines(twin, parent)
    fork = twin.ask("bob", "session:fork", session_id=parent, at=3, fork_id="again")
    view = twin.read("session:get", session_id="again")

    assert (fork.session_id, fork.owner, fork.epoch) == ("again", "bob", 1)
    assert (fork.parent, fork.parent_seq) == (view.parent, view.parent_seq) == (parent, 3)
    assert (view.owner, view.pattern, view.title, view.seq) == ("bob", "team", "the plan", 1)
    assert lines(twin, "again")[0]["data"] == {"parent": parent, "seq": 3}
    assert lines(twin, parent) == before
    assert append(twin, "again", "bob") == 2
    assert twin.read("session:get", session_id=parent).parent is None


def test_a_fork_is_from_the_newest_entry_also_of_a_closed_session(twin: Twin) -> None:
    parent = create(twin)
    append(twin, parent)
    twin.ask("alice", "session:close", session_id=parent)
    fork = twin.ask("bob", "session:fork", session_id=parent)

    assert (fork.parent_seq, append(twin, fork.session_id, "bob")) == (1, 2)


def test_a_fork_from_nowhere_or_onto_another_session_is_refused(twin: Twin) -> None:
    parent = create(twin)
    append(twin, parent)
    with pytest.raises(NotFound, match="has 1 entries, not 2") as refused:
        twin.ask("bob", "session:fork", session_id=parent, at=2)
    assert refused.value.details == {"seq": 1}
    with pytest.raises(NotFound):
        twin.ask("bob", "session:fork", session_id="nobody")
    with pytest.raises(Conflict):
        twin.ask("bob", "session:fork", session_id=parent, fork_id=parent)


@pytest.mark.parametrize("session_id", ["../etc", "a/b", "", "a\0b", "x" * 129, ".hidden", "a\n"])
def test_an_id_that_is_no_file_name_is_refused(twin: Twin, session_id: str) -> None:
    with pytest.raises(Invalid):
        create(twin, session_id=session_id)


# Leases.


def test_a_session_without_a_lease_is_claimed_by_nobody_but_an_operator(twin: Twin) -> None:
    session_id = create(twin)
    twin.pass_time(1e6)
    with pytest.raises(NotOwner, match="has no lease"):
        twin.ask("bob", "session:claim", session_id=session_id)
    assert twin.ask(OPERATOR, "session:claim", session_id=session_id).epoch == 2


def test_a_lease_lapses_to_the_moment_and_the_claim_fences_the_former_owner(twin: Twin) -> None:
    session_id = create(twin, lease_s=2)
    twin.pass_time(1.5)
    with pytest.raises(NotOwner) as refused:
        twin.ask("bob", "session:claim", session_id=session_id)
    assert refused.value.details["lease_left_s"] == pytest.approx(0.5)
    twin.pass_time(0.5)
    assert twin.ask("bob", "session:claim", session_id=session_id).epoch == 2
    with pytest.raises(StaleEpoch):
        append(twin, session_id, epoch=1)
    with pytest.raises(NotOwner, match="has a lease"):
        twin.ask("alice", "session:claim", session_id=session_id)


def test_a_lease_runs_in_owner_time(twin: Twin) -> None:
    session_id = create(twin, lease_s=2)
    twin.now += 3600
    twin.restart()
    with pytest.raises(NotOwner, match="has a lease"):
        twin.ask("bob", "session:claim", session_id=session_id)


@pytest.mark.parametrize("renewal", ["append", "append_many", "heartbeat", "claim"])
def test_commands_of_its_owner_and_heartbeats_renew_a_lease(twin: Twin, renewal: str) -> None:
    session_id = create(twin, lease_s=2)
    twin.pass_time(1.9)
    if renewal == "heartbeat":
        twin.ask(REGISTRY, "session:heartbeat", agent_id="alice")
    else:
        fields: dict[str, Any] = {"append": {"event": "n"}, "claim": {}}.get(
            renewal, {"entries": [{"event": "n"}]}
        )
        twin.ask("alice", f"session:{renewal}", session_id=session_id, **fields)
    twin.pass_time(1.9)
    with pytest.raises(NotOwner):
        twin.ask("bob", "session:claim", session_id=session_id)
    twin.pass_time(0.1)
    twin.ask("bob", "session:claim", session_id=session_id)


@pytest.mark.parametrize("who", ["bob", "registry"])
def test_what_others_do_renews_no_lease(twin: Twin, who: str) -> None:
    session_id = create(twin, lease_s=2)
    twin.pass_time(1.9)
    if who == "registry":
        twin.ask(REGISTRY, "session:heartbeat", agent_id="bob")
    else:
        twin.ask(who, "session:contribute", session_id=session_id, event="note")
    twin.pass_time(0.1)
    twin.ask("carol", "session:claim", session_id=session_id)


def test_a_heartbeat_of_an_agent_without_leased_sessions_leaves_no_trace(twin: Twin) -> None:
    create(twin)
    leased = create(twin, lease_s=2)
    twin.ask("alice", "session:close", session_id=leased)
    events = len(twin.events)
    for name in ("alice", "bob"):
        twin.ask(REGISTRY, "session:heartbeat", agent_id=name)
    assert len(twin.events) == events


def test_a_heartbeat_before_a_transfer_does_not_carry_over_to_the_next_owner(twin: Twin) -> None:
    session_id = create(twin, lease_s=2)
    twin.ask("alice", "session:transfer", session_id=session_id, to_agent="bob")
    twin.pass_time(1.9)
    twin.ask(REGISTRY, "session:heartbeat", agent_id="alice")
    twin.pass_time(0.1)
    twin.ask("carol", "session:claim", session_id=session_id)


def test_only_owners_send_session_heartbeats(twin: Twin) -> None:
    with pytest.raises(Forbidden):
        twin.ask("alice", "session:heartbeat", agent_id="alice")


# Admission and participants.


@pytest.mark.parametrize(
    ("admission", "admitted"),
    [("open", {"alice", "bob", "carol"}), ("invited", {"alice", "bob"}), ("closed", {"alice"})],
)
def test_a_session_admits_whom_it_says(twin: Twin, admission: str, admitted: set[str]) -> None:
    session_id = create(twin, admission=admission, invited=["bob"])
    assert twin.read("session:get", session_id=session_id).admits is None
    for name in ("alice", "bob", "carol"):
        view = twin.read("session:get", session_id=session_id, agent_id=name)
        assert view.admits == (name == "alice" or name in admitted)
    for name in ("alice", "bob", "carol"):
        if name in admitted:
            twin.ask(name, "session:contribute", session_id=session_id, event="note")
        else:
            with pytest.raises(Forbidden) as refused:
                twin.ask(name, "session:contribute", session_id=session_id, event="note")
            assert refused.value.details == {"owner": "alice"}
    people = twin.read("session:participants", session_id=session_id).participants
    assert {each.agent_id for each in people} == admitted
    assert {line["metadata"]["agent_id"] for line in lines(twin, session_id)} == admitted


def test_entries_of_all_have_one_order(twin: Twin) -> None:
    session_id = create(twin)
    for number in range(10):
        if number % 2:
            append(twin, session_id, data={"n": number})
        else:
            twin.ask(
                "bob", "session:contribute", session_id=session_id, event="n", data={"n": number}
            )
    written = lines(twin, session_id)
    assert [line["data"]["n"] for line in written] == [*range(10)]
    assert [line["metadata"]["seq"] for line in written] == [*range(1, 11)]


# Closing.


def test_a_closed_session_is_read_and_no_longer_written(twin: Twin) -> None:
    session_id = create(twin, lease_s=1)
    append(twin, session_id)
    twin.ask("alice", "session:close", session_id=session_id)
    twin.pass_time(5)
    entry: dict[str, Any] = {"event": "note"}
    for who, operation, fields in (
        ("alice", "append", entry),
        ("alice", "append_many", {"entries": [entry]}),
        ("bob", "contribute", entry),
        ("alice", "transfer", {"to_agent": "bob"}),
        ("bob", "claim", {}),
        (OPERATOR, "claim", {}),
        ("alice", "close", {}),
    ):
        with pytest.raises(Conflict, match="closed"):
            twin.ask(who, f"session:{operation}", session_id=session_id, **fields)
    assert len(twin.read("session:history", session_id=session_id).entries) == 1
    assert twin.read("session:get", session_id=session_id).status == "closed"


def test_an_operator_closes_what_is_not_its_own(twin: Twin) -> None:
    session_id = create(twin)
    with pytest.raises(NotOwner):
        twin.ask("bob", "session:close", session_id=session_id)
    twin.ask(OPERATOR, "session:close", session_id=session_id)


# Lines, history, lists.


def test_a_line_has_the_documented_form(twin: Twin) -> None:
    session_id = create(twin)
    append(twin, session_id, event="completion:request", data={"prompt": "hi"}, correlation_id="r1")
    append(twin, session_id, data={"pattern": "swarm", "text": "a\u2028b\x85c ü"})
    assert lines(twin, session_id) == [
        {
            "event": "completion:request",
            "data": {"prompt": "hi"},
            "timestamp": twin.now,
            "metadata": {"session_id": session_id, "agent_id": "alice", "seq": 1, "epoch": 1},
            "correlation_id": "r1",
        },
        {
            "event": "note",
            "data": {"pattern": "swarm", "text": "a\u2028b\x85c ü"},
            "timestamp": twin.now,
            "metadata": {
                "session_id": session_id,
                "agent_id": "alice",
                "seq": 2,
                "epoch": 1,
                "pattern": "swarm",
            },
        },
    ]
    text = twin.log.content[session_id].decode()
    assert text.splitlines() == text.split("\n")[:-1]  # nothing in it looks like another line end


@pytest.fixture(scope="module")
def long() -> tuple[Twin, dict[int, str]]:
    """A twin with sessions of lengths around the anchors, by length."""
    twin = Twin(OWNER)
    made = {}
    for length in (0, 1, 63, 64, 65, 127, 128, 129, 200):
        made[length] = session_id = create(twin)
        left = [{"event": "n", "data": {"n": n, "pad": "ü" * (n % 7)}} for n in range(length)]
        while left:
            some, left = left[:50], left[50:]
            twin.ask("alice", "session:append_many", session_id=session_id, entries=some)
    return twin, made


def test_pages_of_history_are_exact_around_every_anchor(long: tuple[Twin, dict[int, str]]) -> None:
    twin, made = long
    for length, session_id in made.items():
        entries = lines(twin, session_id)
        for after in sorted({0, 1, 62, 63, 64, 65, 126, 127, 128, 129, 199, 200, 300}):
            for limit in (1, 2, 63, 64, 65, 1000):
                page = twin.read("session:history", session_id=session_id, after=after, limit=limit)
                where = (length, after, limit)
                assert page.entries == entries[after : after + limit], where
                assert (page.first_seq, page.seq) == (min(after, length) + 1, length), where
                upto = page.first_seq - 1 + len(page.entries)
                assert page.next == (upto if upto < length else None), where


def test_history_at_an_entry_or_a_time_is_what_it_was_then(twin: Twin) -> None:
    session_id = create(twin)
    times = []
    for n in range(131):
        twin.pass_time(10.0)
        times.append(twin.now)
        append(twin, session_id, data={"n": n})
    entries = lines(twin, session_id)
    for seq in (0, 1, 63, 64, 65, 128, 129, 131):
        then = twin.now if seq == 131 else times[seq] - 5
        for at in (seq, datetime.fromtimestamp(then, UTC).isoformat()):
            page = twin.read("session:history", session_id=session_id, at=at, limit=5)
            assert page.entries == entries[max(0, seq - 5) : seq], at
            assert (page.seq, page.next) == (seq, None), at
        page = twin.read("session:history", session_id=session_id, at=seq, after=60, limit=2)
        assert page.entries == entries[60:seq][:2]


def test_history_at_no_entry_or_time_there_is_is_refused(twin: Twin) -> None:
    session_id = create(twin)
    with pytest.raises(NotFound, match="has 0 entries, not 1"):
        twin.read("session:history", session_id=session_id, at=1)
    for at in ("yesterday", "2026-05-04T09:00:00"):
        with pytest.raises(Invalid, match="no time with its zone"):
            twin.read("session:history", session_id=session_id, at=at)


def test_without_after_history_is_the_newest(long: tuple[Twin, dict[int, str]]) -> None:
    twin, made = long
    for length, session_id in made.items():
        page = twin.read("session:history", session_id=session_id, limit=10)
        assert page.entries == lines(twin, session_id)[-10:]
        assert (page.first_seq, page.next) == (max(0, length - 10) + 1, None)


def test_a_page_of_history_fits_into_a_frame_and_the_pages_are_the_whole(twin: Twin) -> None:
    session_id = create(twin)
    for number in range(8):
        append(twin, session_id, data={"n": number, "text": "x" * 300_000})
    after, found = 0, []
    while after is not None:
        page = twin.read("session:history", session_id=session_id, after=after)
        assert 1 <= len(page.entries) <= 2
        found += [entry["data"]["n"] for entry in page.entries]
        after = page.next
    assert found == [*range(8)]


def test_only_every_64th_entry_has_a_row(twin: Twin) -> None:
    session_id = create(twin)
    entries = [{"event": "n"}] * 130
    twin.ask("alice", "session:append_many", session_id=session_id, entries=entries)
    anchors = [key for key, _ in twin.store.tables["anchors"].range()]
    assert anchors == [(session_id, 1), (session_id, 65), (session_id, 129)]


def test_many_entries_are_appended_all_or_none(twin: Twin) -> None:
    session_id = create(twin)
    many: dict[str, Any] = {"session_id": session_id, "entries": [{"event": "n"}] * 3}
    appended = twin.ask("alice", "session:append_many", **many)
    assert (appended.first_seq, appended.last_seq) == (1, 3)
    # As JSON it is six times as long as on the wire.
    long = {"event": "n", "data": {"text": "\x01" * (FRAME_BYTES_MAX // 10)}}
    with pytest.raises(TooLarge) as refused:
        twin.ask("alice", "session:append_many", **many | {"entries": [{"event": "n"}, long, long]})
    assert refused.value.details["limit_bytes"] == FRAME_BYTES_MAX
    assert len(lines(twin, session_id)) == 3
    for entries in ([], [{"event": "n"}] * (ENTRIES_MAX + 1)):
        with pytest.raises(Invalid):
            twin.ask("alice", "session:append_many", **many | {"entries": entries})
    assert append(twin, session_id) == 4


@pytest.mark.parametrize("operation", ["append", "contribute"])
def test_a_line_that_no_frame_could_carry_back_is_refused(twin: Twin, operation: str) -> None:
    session_id = create(twin)
    data = {"text": "\x01" * (FRAME_BYTES_MAX // 5)}
    with pytest.raises(TooLarge, match="as a line"):
        twin.ask("alice", f"session:{operation}", session_id=session_id, event="note", data=data)
    assert append(twin, session_id) == 1


@pytest.mark.parametrize(
    "data",
    [
        {"x": float("nan")},
        {"x": [float("inf")]},
        {"x": b"bytes"},
        {"x": {1: "a key that is no string"}},
        {"x": [0] * 10_001},
        "no map",
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_changes(twin: Twin, data: Any) -> None:
    session_id = create(twin)
    with pytest.raises((Invalid, TooLarge)):
        append(twin, session_id, data=data)
    assert append(twin, session_id) == 1


def test_sessions_are_listed_by_owner_status_and_pattern_in_pages(twin: Twin) -> None:
    for name, owner in (("a", "alice"), ("b", "bob"), ("c", "alice"), ("d", "alice")):
        create(twin, owner, session_id=name, pattern="team" if name == "d" else "general")
    twin.ask("alice", "session:close", session_id="c")

    def names(**fields: Any) -> list[str]:
        return [each.session_id for each in twin.read("session:list", **fields).sessions]

    assert names() == ["a", "b", "c", "d"]
    assert names(owner="alice") == ["a", "c", "d"]
    assert names(status="closed") == ["c"]
    assert names(pattern="team") == ["d"]
    assert names(owner="alice", status="active", pattern="general") == ["a"]
    for fields in ({}, {"owner": "alice"}):
        page = twin.read("session:list", limit=2, **fields)
        rest = twin.read("session:list", limit=2, after=page.next, **fields)
        assert [each.session_id for each in page.sessions + rest.sessions] == names(**fields)
        assert rest.next is None


def test_a_list_looks_at_a_bounded_number_of_rows(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SCAN_ROWS_MAX", 2)
    for name in ("a", "b", "c"):
        create(twin, session_id=name, pattern="team" if name == "c" else "general")
    page = twin.read("session:list", pattern="team")
    assert (page.sessions, page.next) == ([], "b")
    page = twin.read("session:list", pattern="team", after="b")
    assert [each.session_id for each in page.sessions] == ["c"]


def test_a_session_tells_its_size_and_times(twin: Twin) -> None:
    session_id = create(twin, title="plans")
    began = twin.now
    twin.pass_time(5)
    append(twin, session_id)
    view = twin.read("session:get", session_id=session_id)
    assert (view.title, view.seq, view.size_bytes) == (
        "plans",
        1,
        len(twin.log.content[session_id]),
    )
    assert (view.created_at, view.updated_at) == (began, began + 5)


def test_subscribers_are_told_what_happens_to_a_session(twin: Twin) -> None:
    create(twin, session_id="s")
    append(twin, "s")
    twin.ask("alice", "session:transfer", session_id="s", to_agent="bob")
    twin.ask("bob", "session:close", session_id="s")
    told = [(each.topic, each.sender) for each in twin.told]
    assert told == [
        ("session.s.created", "alice"),
        ("session.s.appended", "alice"),
        ("session.s.transferred", "bob"),
        ("session.s.closed", "bob"),
    ]


# Patterns and roles: every line of "KSI Dynamic Storage Architecture", in its order.

Role = tuple[str, str | None, str | None]
DOCUMENTED: list[tuple[dict[str, Any], str | None, Role | None]] = [
    (
        {
            "prompt": "Any agents interested in data analysis?",
            "pattern": "peer_discovery",
            "session_id": "sess_abc123",
            "agent_id": "agent_explorer",
        },
        "peer_discovery",
        None,
    ),
    (
        {
            "response": "I have data analysis capabilities",
            "agent_id": "agent_analyzer",
            "model": "claude-3-opus",
            "usage": {},
        },
        None,
        None,
    ),
    (
        {
            "prompt": "Let's collaborate on this dataset",
            "pattern": "peer_to_peer",
            "to_agent": "agent_analyzer",
        },
        "peer_to_peer",
        None,
    ),
    (
        {"response": "Agreed, I'll start with statistical analysis", "agent_id": "agent_explorer"},
        None,
        None,
    ),
    (
        {
            "prompt": "Looking for agents with NLP capabilities",
            "pattern": "peer_discovery",
            "broadcast": True,
        },
        "peer_discovery",
        None,
    ),
    (
        {
            "response": "I have NLP capabilities: sentiment analysis, entity extraction",
            "agent_id": "agent_nlp_1",
            "capabilities": ["sentiment", "ner"],
        },
        "peer_discovery",
        None,
    ),
    (
        {
            "response": "I specialize in text generation and summarization",
            "agent_id": "agent_nlp_2",
            "capabilities": ["generation", "summary"],
        },
        "peer_discovery",
        None,
    ),
    (
        {
            "prompt": "Forming team for customer analysis project",
            "pattern": "team_formation",
            "team_id": "team_customer_analysis",
        },
        "team_formation",
        None,
    ),
    (
        {
            "response": "Joining as data analyst",
            "agent_id": "agent_analyst",
            "role": "data_analyst",
            "team_id": "team_customer_analysis",
        },
        "team_formation",
        ("data_analyst", None, None),
    ),
    (
        {
            "response": "I'll handle visualization",
            "agent_id": "agent_viz",
            "role": "visualizer",
            "team_id": "team_customer_analysis",
        },
        "team_formation",
        ("visualizer", None, None),
    ),
    (
        {
            "prompt": "I'll coordinate the first phase",
            "pattern": "role_assumption",
            "previous_role": "peer",
            "new_role": "phase_coordinator",
        },
        "role_assumption",
        ("phase_coordinator", "peer", None),
    ),
    (
        {
            "prompt": "Taking lead on data pipeline",
            "context": {
                "role_transition": {
                    "from": "contributor",
                    "to": "pipeline_orchestrator",
                    "duration": "task_scoped",
                }
            },
        },
        "role_assumption",
        ("pipeline_orchestrator", "contributor", "task_scoped"),
    ),
    (
        {
            "prompt": "Pipeline complete, returning to peer role",
            "context": {"role_transition": {"from": "pipeline_orchestrator", "to": "peer"}},
        },
        "role_assumption",
        ("peer", "pipeline_orchestrator", None),
    ),
]
UNDECLARED: list[tuple[dict[str, Any], str | None]] = [
    ({"to_agent": "bob"}, "peer_to_peer"),
    ({"broadcast": True}, "broadcast"),
    ({"broadcast": False, "to_agent": "bob"}, "peer_to_peer"),
    ({"team_id": "t"}, "team"),
    ({"team_id": "t", "to_agent": "bob"}, "team"),
    ({"swarm_id": "s"}, "swarm"),
    ({"pattern": "no such pattern", "swarm_id": "s"}, "swarm"),
    ({"pattern": ["team"], "text": "x"}, None),
    ({"context": {"role_transition": "no map"}}, None),
    ({"context": "no map", "new_role": "lead"}, "role_assumption"),
    ({"text": "team_id"}, None),
]


@pytest.mark.parametrize(("data", "pattern", "role"), DOCUMENTED)
def test_every_documented_line_shows_its_pattern_and_role(
    twin: Twin, data: dict[str, Any], pattern: str | None, role: Role | None
) -> None:
    session_id = create(twin, pattern="general")
    append(twin, session_id, event="completion:request", data=data)
    (line,) = lines(twin, session_id)
    assert line["metadata"].get("pattern") == pattern
    assert twin.read("session:get", session_id=session_id).pattern == (pattern or "general")
    (alice,) = twin.read("session:participants", session_id=session_id).participants
    changes = [(each["role"], each["previous"], each["duration"]) for each in alice.roles]
    assert changes == ([role] if role else [])
    assert alice.role == (role[0] if role else None)


@pytest.mark.parametrize(("data", "pattern"), UNDECLARED)
def test_a_pattern_is_seen_where_none_is_declared(data: dict[str, Any], pattern: str) -> None:
    assert detect_pattern(data) == pattern


@pytest.mark.parametrize(
    "data", [{"role": ""}, {"role": 7}, {"new_role": None}, {"context": {"role_transition": {}}}]
)
def test_what_names_no_role_takes_none(data: dict[str, Any]) -> None:
    assert detect_role(data) is None


def test_the_roles_of_all_are_kept_in_the_order_they_were_taken(twin: Twin) -> None:
    session_id = create(twin)
    twin.ask("bob", "session:contribute", session_id=session_id, event="n", data={"role": "viewer"})
    append(twin, session_id, data={"role": "peer"})
    for change in (
        {"to": "lead", "duration": "task_scoped"},
        {"to": "peer", "from": "what it says"},
    ):
        append(twin, session_id, data={"context": {"role_transition": change}})
    alice, bob = twin.read("session:participants", session_id=session_id).participants
    assert [(each["seq"], each["role"], each["previous"]) for each in alice.roles] == [
        (2, "peer", None),
        (3, "lead", "peer"),
        (4, "peer", "what it says"),
    ]
    assert (alice.role, bob.role, len(bob.roles)) == ("peer", "viewer", 1)


def test_a_role_is_taken_by_the_participant_that_says_so_and_joins_it(twin: Twin) -> None:
    session_id = create(twin)
    twin.pass_time(3)
    twin.ask("bob", "session:contribute", session_id=session_id, event="n", data={"role": "x"})
    _, bob = twin.read("session:participants", session_id=session_id).participants
    assert (bob.role, bob.joined_at) == ("x", twin.now)


# Completions.


def record(twin: Twin, session_id: str, event: str, agent_id: str = "bob", **data: Any) -> None:
    fields = {"session_id": session_id, "request_id": "r1", "agent_id": agent_id, "data": data}
    twin.ask(COMPLETION, "session:record", event=f"completion:{event}", **fields)


def sent(twin: Twin) -> list[tuple[str, dict[str, Any]]]:
    return [(name, msgspec.msgpack.decode(body)) for _, _, name, body in twin.sends]


def test_a_request_and_its_result_are_written_once_each_in_the_documented_form(twin: Twin) -> None:
    session_id = create(twin)
    asked = {"prompt": "Let us", "to_agent": "model"}
    for _ in range(2):
        record(twin, session_id, "request", **asked)
    record(twin, session_id, "result", "model", response="Agreed", agent_id_of="x")
    record(twin, session_id, "result", "model", response="again")
    request, result = lines(twin, session_id)
    assert (request["event"], request["data"]) == ("completion:request", asked)
    assert (result["event"], result["data"]["response"]) == ("completion:result", "Agreed")
    assert [each["correlation_id"] for each in (request, result)] == ["r1", "r1"]
    assert [each["metadata"]["agent_id"] for each in (request, result)] == ["bob", "model"]
    joined = twin.read("session:participants", session_id=session_id).participants
    assert [each.agent_id for each in joined] == ["alice", "bob", "model"]
    assert twin.sends == []


@pytest.mark.parametrize(
    ("made", "refusal", "why"),
    [
        ({"admission": "closed"}, Forbidden, "session s1 admits nobody else, not bob"),
        (
            {"admission": "invited", "invited": ["carol"]},
            Forbidden,
            "session s1 admits those invited, not bob",
        ),
        ({"admission": "open", "closed": True}, Conflict, "session s1 is closed"),
        (None, NotFound, "there is no session s1"),
    ],
)
def test_a_request_that_is_not_recorded_is_refused_with_the_reason(
    twin: Twin, made: dict[str, Any] | None, refusal: type[KsiError], why: str
) -> None:
    if made is not None:
        closed = made.pop("closed", False)
        create(twin, session_id="s1", **made)
        if closed:
            twin.ask("alice", "session:close", session_id="s1")
    with pytest.raises(refusal, match=why):
        record(twin, "s1", "request")
    if refusal is Forbidden:  # It is known there that the request is not recorded.
        record(twin, "s1", "result", "model")
    assert lines(twin, "s1") == []


def test_a_request_outlives_a_transfer_of_its_session(twin: Twin) -> None:
    session_id = create(twin, admission="closed")
    record(twin, session_id, "request", "alice")
    twin.ask("alice", "session:transfer", session_id=session_id, to_agent="carol")
    record(twin, session_id, "result", "model")
    assert [each["event"] for each in lines(twin, session_id)] == [
        "completion:request", "completion:result",
    ]  # fmt: skip


def test_a_closed_session_tells_of_its_open_requests_and_only_then(twin: Twin) -> None:
    quiet, answered, open_ = create(twin), create(twin), create(twin)
    record(twin, answered, "request")
    record(twin, answered, "failed")
    record(twin, open_, "request")
    for session_id in (quiet, answered, open_):
        twin.ask("alice", "session:close", session_id=session_id)
    assert sent(twin) == [("completion:session_closed", {"session_id": open_})]
    with pytest.raises(Conflict, match="is closed"):
        record(twin, open_, "cancelled")
    assert len(lines(twin, open_)) == 1
    assert twin.store.rows()["open"] == {}
