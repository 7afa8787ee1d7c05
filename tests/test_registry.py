"""The registry: who may do what, epochs, leases, selectors, supervision, identities."""

import random
from typing import Any

import msgspec
import pytest

import ksi.actors.owners.sessions  # noqa: F401 - declares what the registry sends there
from ksi.actors.declarations.registry import LAUNCH_BYTES_MAX
from ksi.actors.owner import Sender
from ksi.actors.owners import registry
from ksi.actors.owners.registry import OWNER, REPORT_S
from ksi.actors.supervision.system import StartChild, StopChild
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.transport.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Quota,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.message import CATALOGUE

OPERATOR = Sender("op", "operator")
SUPERVISOR = Sender("supervisor", "owner")
NAMES = ("alice", "bob", "scout-1", "scout-2")
WORDS = ("search", "plan", "write")


def choose(chance: random.Random) -> Asked:
    """Draw what agents, an operator and the supervisor ask of a registry."""
    name = chance.choice(NAMES)
    agent = Sender(chance.choice(NAMES), "agent")
    who = OPERATOR if chance.random() < 0.2 else agent
    maybe = chance.choice((None, None, name))
    epoch = chance.choice((None, None, None, chance.randint(1, 9)))
    words = chance.sample(WORDS, chance.randint(0, 2))
    lease_s = chance.choice((None, 0.5, 3.0))
    plain = {"n": chance.randint(0, 9), "word": chance.choice((None, "ü"))}
    selector = chance.choice(
        (
            {"agent_id": name},
            {"agent_ids": chance.sample(NAMES, 2)},
            {"pattern": "scout-*"},
            {"kind": "agent", "older_than_s": 1.0},
            {"all": True},
            {},
        )
    )
    flags = {"dry_run": chance.random() < 0.3, "force": chance.random() < 0.3}
    spawn = {"argv": ["run", name], "restart": chance.choice(("permanent", "transient"))}
    state = chance.choice(("started", "exited", "failed"))
    report = {"agent_id": name, "state": state, "pid": 7, "again": chance.random() < 0.3}
    request_id = chance.choice((None, "r1", "r2"))
    choices: list[Asked] = [
        Asked(
            who,
            "agent:register",
            {"agent_id": maybe, "capabilities": words, "lease_s": lease_s, "metadata": plain},
        ),
        Asked(who, "agent:unregister", {"agent_id": maybe, "epoch": epoch}),
        Asked(who, "agent:heartbeat", {"agent_id": maybe, "epoch": epoch}),
        Asked(agent, "agent:heartbeat", {}),
        Asked(who, "agent:spawn", {**spawn, "agent_id": maybe, "request_id": request_id}),
        Asked(who, "agent:spawn", {**spawn, "lease_s": lease_s, "dry_run": flags["dry_run"]}),
        Asked(who, "agent:terminate", {**selector, **flags}),
        Asked(who, "agent:restart", {**selector, **flags}),
        Asked(SUPERVISOR, "agent:report", report),
        Asked(SUPERVISOR, "agent:report", report),
        Asked(SUPERVISOR, "agent:muster", {"running": chance.sample(NAMES, 2)}),
        Asked(who, "agent:create_identity", {"agent_id": maybe, "identity": plain}),
        Asked(who, "agent:update_identity", {"agent_id": maybe, "updates": plain}),
        Asked(
            who,
            "agent:update_identity",
            {"updates": plain, "revision": epoch, "request_id": request_id},
        ),
        Asked(who, "agent:remove_identity", {"agent_id": maybe}),
        Asked(who, "agent:list", {"capability": chance.choice((None, *WORDS)), "limit": 3}),
        Asked(who, "agent:info", {"agent_id": name, "include": ["identity", "command"]}),
        Asked(who, "agent:discover_peers", {"capabilities": words, "exclude": [name]}),
        Asked(who, "agent:list_identities", {}),
    ]
    return chance.choice(choices)


def test_the_registry_keeps_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose)


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def topics(twin: Twin) -> list[str]:
    told, twin.told = twin.told, []
    return [each.topic for each in told]


def sent(twin: Twin, *owners: str) -> list[tuple[str, dict[str, Any]]]:
    """Return what was sent to these owners since the last call: operation and fields."""
    sends, twin.sends = twin.sends, []
    return [
        (operation, msgspec.msgpack.decode(body))
        for owner, _, operation, body in sends
        if owner in owners
    ]


def status(twin: Twin, agent_id: str) -> str:
    found: str = twin.read("agent:info", agent_id=agent_id).status
    return found


def spawn(twin: Twin, agent_id: str = "scout", by: Any = OPERATOR, **fields: Any) -> None:
    """Spawn an agent and let the supervisor say that it runs."""
    twin.ask(by, "agent:spawn", agent_id=agent_id, argv=["run"], **fields)
    twin.ask(SUPERVISOR, "agent:report", agent_id=agent_id, state="started", pid=7)
    topics(twin)
    sent(twin)


# Registration and epochs.


def test_an_agent_registers_as_itself_and_is_listed(twin: Twin) -> None:
    reply = twin.ask(
        "alice", "agent:register", kind="analyst", capabilities=["plan", "search", "plan"], pid=9
    )
    assert (reply.agent_id, reply.epoch, reply.status, reply.lease_s) == (
        "alice", 1, "active", None
    )  # fmt: skip
    (view,) = twin.read("agent:list").agents
    assert (view.agent_id, view.kind, view.capabilities, view.pid, view.supervised) == (
        "alice", "analyst", ["plan", "search"], 9, False
    )  # fmt: skip
    assert view.registered_at == view.seen_at == twin.now
    assert topics(twin) == ["agent.alice.registered"]


def test_only_an_operator_speaks_for_another_agent(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    for operation in ("agent:register", "agent:unregister", "agent:heartbeat"):
        with pytest.raises(Forbidden, match="bob may not speak for alice"):
            twin.ask("bob", operation, agent_id="alice")
    assert twin.ask(OPERATOR, "agent:heartbeat", agent_id="alice").agent_id == "alice"
    assert twin.ask(OPERATOR, "agent:register", agent_id="dave").agent_id == "dave"
    assert twin.ask("alice", "agent:unregister", agent_id="alice").status == "unregistered"


def test_every_registration_has_an_epoch_of_its_own_and_ends_the_former(twin: Twin) -> None:
    first = twin.ask("alice", "agent:register").epoch
    other = twin.ask("bob", "agent:register").epoch
    second = twin.ask("alice", "agent:register").epoch
    assert first < other < second
    with pytest.raises(StaleEpoch) as refused:
        twin.ask("alice", "agent:heartbeat", epoch=first)
    assert refused.value.details["epoch"] == second
    with pytest.raises(StaleEpoch):
        twin.ask("alice", "agent:unregister", epoch=first)
    assert twin.ask("alice", "agent:heartbeat", epoch=second).status == "active"


def test_an_epoch_is_never_given_out_twice_even_if_the_agent_was_forgotten(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "GONE_MAX", 0)
    first = twin.ask("alice", "agent:register").epoch
    twin.ask("alice", "agent:unregister")
    twin.pass_time(1)
    with pytest.raises(NotFound):
        twin.read("agent:info", agent_id="alice")
    assert twin.ask("alice", "agent:register").epoch > first


def test_a_spawned_agent_has_an_epoch_of_its_own_before_it_registers(twin: Twin) -> None:
    epochs = [
        twin.ask("alice", "agent:register").epoch,
        twin.ask(OPERATOR, "agent:spawn", agent_id="one", argv=["run"]).epoch,
        twin.ask(OPERATOR, "agent:spawn", agent_id="two", argv=["run"]).epoch,
        twin.ask("one", "agent:register").epoch,
    ]
    assert epochs == sorted({*epochs})


def test_what_registers_again_is_what_the_new_process_says(twin: Twin) -> None:
    twin.ask("alice", "agent:register", kind="old", capabilities=["plan"], metadata={"a": 1})
    twin.ask("alice", "agent:register", capabilities=["write"])
    info = twin.read("agent:info", agent_id="alice", include=["metadata"])
    assert (info.kind, info.capabilities, info.metadata) == ("agent", ["write"], {})
    assert twin.read("agent:list", capability="plan").agents == []
    assert [key for key, _ in twin.store.tables["capable"].range()] == [("write", "alice")]
    twin.ask("alice", "agent:unregister")
    assert twin.store.tables["capable"].count() == 0


def test_an_agent_that_has_left_neither_beats_nor_leaves_again(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    twin.ask("alice", "agent:unregister")
    assert topics(twin) == ["agent.alice.registered", "agent.alice.unregistered"]
    for operation in ("agent:heartbeat", "agent:unregister"):
        with pytest.raises(NotFound, match="unregistered"):
            twin.ask("alice", operation)
        with pytest.raises(NotFound, match="there is no agent bob"):
            twin.ask("bob", operation)


def test_an_agent_that_has_come_back_is_not_forgotten(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "GONE_MAX", 0)
    twin.ask("alice", "agent:register")
    twin.ask("alice", "agent:unregister")
    twin.ask("alice", "agent:register")
    twin.ask("bob", "agent:register", lease_s=1)
    monkeypatch.undo()
    twin.pass_time(1)
    twin.pass_time(1)
    assert status(twin, "bob") == "lost"
    twin.ask("bob", "agent:heartbeat")
    monkeypatch.setattr(registry, "GONE_MAX", 0)
    twin.pass_time(0.5)
    assert [each.agent_id for each in twin.read("agent:list").agents] == ["alice", "bob"]


# Leases.


def test_a_silent_agent_is_suspect_then_lost_and_each_is_told_once(twin: Twin) -> None:
    twin.ask("alice", "agent:register", lease_s=2)
    topics(twin)
    twin.pass_time(1.99)
    assert topics(twin) == []
    twin.pass_time(0.01)
    assert (status(twin, "alice"), topics(twin)) == ("suspect", ["agent.alice.suspect"])
    twin.pass_time(1.99)
    assert topics(twin) == []
    twin.pass_time(0.01)
    assert (status(twin, "alice"), topics(twin)) == ("lost", ["agent.alice.lost"])
    for _ in range(5):
        twin.pass_time(60)
    assert topics(twin) == []


@pytest.mark.parametrize("silent_s", [2.0, 4.0])
def test_a_beat_brings_a_silent_agent_back(twin: Twin, silent_s: float) -> None:
    twin.ask("alice", "agent:register", lease_s=2, capabilities=["plan"])
    twin.pass_time(2)
    twin.pass_time(silent_s - 2)
    assert status(twin, "alice") == ("suspect" if silent_s == 2.0 else "lost")
    topics(twin)
    assert twin.ask("alice", "agent:heartbeat").status == "active"
    assert topics(twin) == ["agent.alice.active"]
    assert [each.agent_id for each in twin.read("agent:list", capability="plan").agents]
    twin.pass_time(1.99)
    assert status(twin, "alice") == "active"
    twin.pass_time(0.01)
    assert topics(twin) == ["agent.alice.suspect"]


def test_beats_keep_an_agent_active_and_say_nothing(twin: Twin) -> None:
    twin.ask("alice", "agent:register", lease_s=1)
    topics(twin)
    for _ in range(20):
        twin.pass_time(0.9)
        twin.ask("alice", "agent:heartbeat")
    assert topics(twin) == []
    assert twin.read("agent:info", agent_id="alice").seen_at == twin.now
    assert twin.store.tables["deadlines"].count() == 1


def test_a_lease_runs_in_owner_time_and_not_while_the_owner_is_down(twin: Twin) -> None:
    twin.ask("alice", "agent:register", lease_s=2)
    twin.now += 3600
    twin.restart()
    twin.pass_time(1)
    assert status(twin, "alice") == "active"


def test_without_a_lease_an_agent_is_never_suspect(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    twin.pass_time(1e6)
    assert status(twin, "alice") == "active"


def test_beats_are_passed_on_to_the_sessions(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    twin.ask("alice", "agent:heartbeat")
    ((operation, fields),) = sent(twin, "sessions")
    assert (operation, fields) == ("session:heartbeat", {"agent_id": "alice"})
    CATALOGUE[operation].decode(msgspec.msgpack.encode(fields))


def test_a_tick_looks_at_a_bounded_number_of_agents(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "DUE_MAX", 3)
    for number in range(5):
        twin.ask(f"a{number}", "agent:register", lease_s=1)
    topics(twin)
    twin.pass_time(1)
    assert len(topics(twin)) == 3
    twin.pass_time(0)
    assert len(topics(twin)) == 2


# Supervised agents.


def test_spawning_records_the_agent_and_asks_the_supervisor(twin: Twin) -> None:
    reply = twin.ask(
        "alice",
        "agent:spawn",
        agent_id="scout",
        argv=["claude", "-p", "look"],
        env={"MODEL": "opus"},
        cwd="/tmp",
        restart="permanent",
        kind="explorer",
        capabilities=["search"],
        lease_s=5,
        metadata={"team": 1},
    )
    assert (reply.agent_id, reply.status, reply.lease_s) == ("scout", "starting", 5)
    ((operation, fields),) = sent(twin, "supervisor")
    assert operation == "child:start"
    assert CATALOGUE[operation].decode(msgspec.msgpack.encode(fields)) == StartChild(
        name="scout",
        argv=["claude", "-p", "look"],
        env={"MODEL": "opus"},
        cwd="/tmp",
        restart="permanent",
        identity="scout",
    )
    info = twin.read("agent:info", agent_id="scout", include=["command", "metadata"])
    assert (info.spawned_by, info.supervised, info.kind) == ("alice", True, "explorer")
    assert info.metadata == {"team": 1}
    assert info.command == {
        "argv": ["claude", "-p", "look"],
        "env": ["MODEL"],
        "cwd": "/tmp",
        "restart": "permanent",
    }
    assert topics(twin) == ["agent.scout.state"]


def test_a_spawned_agent_needs_no_name(twin: Twin) -> None:
    first = twin.ask("alice", "agent:spawn", argv=["run"])
    second = twin.ask("alice", "agent:spawn", argv=["run"])
    assert first.agent_id.startswith("agent_")
    assert first.agent_id != second.agent_id


def test_the_supervisor_says_what_becomes_of_a_spawned_agent(twin: Twin) -> None:
    twin.ask("alice", "agent:spawn", agent_id="scout", argv=["run"])
    topics(twin)

    def report(**fields: Any) -> tuple[str, int | None, str | None, list[str]]:
        twin.ask(SUPERVISOR, "agent:report", agent_id="scout", **fields)
        info = twin.read("agent:info", agent_id="scout")
        return info.status, info.pid, info.exit, topics(twin)

    state = ["agent.scout.state"]
    assert report(state="started", pid=7) == ("active", 7, None, ["agent.scout.active"])
    assert report(state="started", pid=7) == ("active", 7, None, [])
    again = {"state": "exited", "pid": 7, "exit": "exit code 1", "again": True}
    sent(twin)
    assert report(**again) == ("starting", None, "exit code 1", state)
    assert sent(twin, "supervisor") == []  # it starts it by itself
    assert report(state="started", pid=8)[:2] == ("active", 8)
    assert report(state="exited", exit="exit code 0") == ("exited", None, "exit code 0", state)
    assert report(state="exited", exit="again?")[2:] == ("exit code 0", [])


def test_a_report_on_an_unknown_agent_is_ignored(twin: Twin) -> None:
    assert twin.ask(SUPERVISOR, "agent:report", agent_id="ghost", state="failed") is None
    assert twin.events == []


def test_only_owners_report(twin: Twin) -> None:
    for operation in ("agent:report", "agent:muster"):
        with pytest.raises(Forbidden):
            twin.ask(OPERATOR, operation, agent_id="scout", state="failed")


def test_a_spawned_agent_that_registers_keeps_what_it_was_spawned_with(twin: Twin) -> None:
    spawn(twin, kind="explorer", capabilities=["search"], lease_s=5, metadata={"team": 1})
    reply = twin.ask("scout", "agent:register", pid=999)
    info = twin.read("agent:info", agent_id="scout", include=["metadata", "command"])
    assert (reply.lease_s, info.kind, info.capabilities) == (5, "explorer", ["search"])
    assert (info.pid, info.supervised, info.spawned_by) == (7, True, "op")
    assert info.metadata == {"team": 1}
    assert info.command is not None


def test_a_process_that_registers_while_it_is_stopped_is_still_stopping(twin: Twin) -> None:
    spawn(twin)
    twin.ask(OPERATOR, "agent:terminate", agent_id="scout")
    assert twin.ask("scout", "agent:register").status == "stopping"
    assert twin.ask("scout", "agent:heartbeat").status == "stopping"
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="exited")
    assert status(twin, "scout") == "terminated"


def test_who_spawned_an_agent_has_no_authority_over_what_comes_after_it(twin: Twin) -> None:
    spawn(twin, by="alice")
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="exited")
    twin.ask("scout", "agent:register")
    info = twin.read("agent:info", agent_id="scout", include=["command"])
    assert (info.supervised, info.spawned_by, info.command) == (False, None, None)
    with pytest.raises(Forbidden):
        twin.ask("alice", "agent:terminate", agent_id="scout")


def test_what_a_spawned_agent_says_of_itself_goes_before_what_it_was_spawned_with(
    twin: Twin,
) -> None:
    spawn(twin, kind="explorer", capabilities=["search"], lease_s=5, metadata={"team": 1})
    said = {"kind": "lead", "capabilities": [], "lease_s": 9, "metadata": {"team": 2}}
    assert twin.ask("scout", "agent:register", **said).lease_s == 9
    info = twin.read("agent:info", agent_id="scout", include=["metadata"])
    assert (info.kind, info.capabilities, info.metadata) == ("lead", [], {"team": 2})


def test_a_spawned_agent_the_supervisor_says_nothing_of_has_failed(twin: Twin) -> None:
    twin.ask("alice", "agent:spawn", agent_id="scout", argv=["run"])
    twin.pass_time(REPORT_S - 0.1)
    assert status(twin, "scout") == "starting"
    twin.pass_time(0.2)
    assert status(twin, "scout") == "failed"
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="started", pid=7)
    assert status(twin, "scout") == "active"


def test_an_agent_that_is_here_is_not_spawned_again(twin: Twin) -> None:
    spawn(twin)
    with pytest.raises(Conflict) as refused:
        twin.ask(OPERATOR, "agent:spawn", agent_id="scout", argv=["run"])
    assert refused.value.details["status"] == "active"


def test_an_agent_does_not_spawn_under_a_name_that_is_known_and_not_its_own(twin: Twin) -> None:
    twin.ask("bob", "agent:register")
    twin.ask("bob", "agent:unregister")
    twin.ask("carol", "agent:create_identity", identity={})
    for name in ("bob", "carol"):
        with pytest.raises(Forbidden):
            twin.ask("mallory", "agent:spawn", agent_id=name, argv=["run"])
    assert twin.ask(OPERATOR, "agent:spawn", agent_id="bob", argv=["run"]).agent_id == "bob"
    assert twin.ask("carol", "agent:spawn", agent_id="carol", argv=["run"]).agent_id == "carol"


def test_workers_do_not_spawn_or_terminate(twin: Twin) -> None:
    worker = Sender("w", "worker")
    twin.ask(worker, "agent:register")
    for operation in ("agent:spawn", "agent:terminate", "agent:restart"):
        with pytest.raises(Forbidden):
            twin.ask(worker, operation, argv=["run"])


def test_a_supervised_agent_that_leaves_is_stopping_until_its_process_has_ended(twin: Twin) -> None:
    spawn(twin)
    assert twin.ask("scout", "agent:unregister").status == "stopping"
    assert topics(twin) == ["agent.scout.unregistered"]
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="exited", exit="exit code 0")
    assert status(twin, "scout") == "exited"


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"argv": ["x" * 70_000, "y" * 70_000]}, LAUNCH_BYTES_MAX),
        ({"argv": ["x"], "metadata": {"text": "x" * 20_000}}, registry.PLAIN_BYTES_MAX),
    ],
)
def test_what_is_too_long_to_keep_is_refused(
    twin: Twin, fields: dict[str, Any], limit: int
) -> None:
    with pytest.raises(TooLarge) as refused:
        twin.ask("alice", "agent:spawn", **fields)
    assert refused.value.details["limit_bytes"] == limit


@pytest.mark.parametrize(
    "fields",
    [
        {"argv": []},
        {"argv": ["a\0b"]},
        {"argv": ["a"], "env": {"A=B": "c"}},
        {"argv": ["a"], "env": {"A": "\0"}},
        {"argv": ["a"], "agent_id": "../x"},
        {"argv": ["a"], "capabilities": ["two words"]},
        {"argv": ["a"], "capabilities": [f"c{n}" for n in range(65)]},
        {"argv": ["a"], "lease_s": 0},
        {"argv": ["a"], "restart": "sometimes"},
    ],
)
def test_what_no_process_could_be_started_with_is_refused(
    twin: Twin, fields: dict[str, Any]
) -> None:
    with pytest.raises(Invalid):
        twin.ask("alice", "agent:spawn", **fields)


# Selectors.


def test_terminating_a_supervised_agent_stops_its_process(twin: Twin) -> None:
    spawn(twin)
    reply = twin.ask(OPERATOR, "agent:terminate", agent_id="scout", force=True)
    assert (reply.agent_ids, reply.skipped, reply.more) == (["scout"], {}, False)
    ((operation, fields),) = sent(twin, "supervisor")
    decoded = CATALOGUE[operation].decode(msgspec.msgpack.encode(fields))
    assert decoded == StopChild(name="scout", force=True)
    assert status(twin, "scout") == "stopping"
    again = {"agent_id": "scout", "state": "exited", "exit": "signal 9", "again": True}
    twin.ask(SUPERVISOR, "agent:report", **again)  # of an end before ours; it is not the last
    assert status(twin, "scout") == "stopping"
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="exited", exit="signal 15")
    assert status(twin, "scout") == "terminated"
    assert topics(twin) == ["agent.scout.state", "agent.scout.state"]


def test_terminating_an_agent_nobody_runs_ends_it_at_once(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    twin.ask(OPERATOR, "agent:terminate", agent_id="alice")
    assert status(twin, "alice") == "terminated"
    with pytest.raises(NotFound):
        twin.ask("alice", "agent:heartbeat")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"agent_id": "a1"}, ["a1"]),
        ({"agent_ids": ["a2", "a1", "a2"]}, ["a2", "a1"]),
        ({"pattern": "a*"}, ["a1", "a2"]),
        ({"pattern": "?1"}, ["a1", "b1"]),
        ({"pattern": "a1", "kind": "other"}, []),
        ({"kind": "other"}, ["b1"]),
        ({"older_than_s": 5}, ["a1"]),
        ({"all": True}, ["a1", "a2", "b1"]),
        ({"all": True, "kind": "agent"}, ["a1", "a2"]),
        ({"pattern": "A*"}, []),
    ],
)
def test_selectors_mean_what_they_say_and_a_dry_run_changes_nothing(
    twin: Twin, selector: dict[str, Any], expected: list[str]
) -> None:
    twin.ask("a1", "agent:register")
    twin.pass_time(10)
    twin.ask("a2", "agent:register")
    twin.ask("b1", "agent:register", kind="other")
    before = [msgspec.msgpack.encode(event) for event in twin.events]
    dry = twin.ask(OPERATOR, "agent:terminate", **selector, dry_run=True)
    assert (dry.agent_ids, dry.dry_run) == (expected, True)
    assert [msgspec.msgpack.encode(event) for event in twin.events] == before
    assert twin.ask(OPERATOR, "agent:terminate", **selector).agent_ids == expected
    gone = [each.agent_id for each in twin.read("agent:list", status="terminated").agents]
    assert gone == sorted(expected)


@pytest.mark.parametrize("operation", ["agent:terminate", "agent:restart", "agent:spawn"])
def test_a_dry_run_sends_and_records_nothing(twin: Twin, operation: str) -> None:
    spawn(twin)
    fields: dict[str, Any] = {"agent_id": "scout"}
    if operation == "agent:spawn":
        fields = {"agent_id": "other", "argv": ["run"]}
    events = len(twin.events)
    twin.ask(OPERATOR, operation, **fields, dry_run=True)
    assert (len(twin.events), sent(twin, "supervisor"), topics(twin)) == (events, [], [])


def test_a_selection_that_says_nothing_is_refused(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    nothing: list[dict[str, Any]] = [{}, {"agent_ids": []}, {"force": True}]
    for fields in nothing:
        with pytest.raises(Invalid, match="which agents"):
            twin.ask(OPERATOR, "agent:terminate", **fields)


def test_naming_what_does_not_exist_ends_nobody(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    with pytest.raises(NotFound, match="ghost"):
        twin.ask(OPERATOR, "agent:terminate", agent_ids=["alice", "ghost"])
    assert status(twin, "alice") == "active"


def test_an_agent_ends_itself_and_what_it_has_spawned_and_no_others(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    twin.ask("bob", "agent:register")
    spawn(twin, "kid", by="alice")
    with pytest.raises(Forbidden):
        twin.ask("alice", "agent:terminate", agent_ids=["kid", "bob"])
    assert twin.ask("alice", "agent:terminate", all=True).agent_ids == ["alice", "kid"]
    assert status(twin, "bob") == "active"


def test_ending_what_has_ended_says_so(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    twin.ask("alice", "agent:unregister")
    reply = twin.ask(OPERATOR, "agent:terminate", agent_id="alice")
    assert (reply.agent_ids, reply.skipped) == ([], {"alice": "is unregistered already"})


def test_a_selection_is_bounded_and_says_that_there_are_more(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SELECTED_MAX", 2)
    for name in ("a", "b", "c"):
        twin.ask(name, "agent:register")
    reply = twin.ask(OPERATOR, "agent:terminate", all=True)
    assert (reply.agent_ids, reply.more) == (["a", "b"], True)
    reply = twin.ask(OPERATOR, "agent:terminate", all=True)
    assert (reply.agent_ids, reply.more) == (["c"], False)


def test_a_restart_stops_the_process_and_starts_the_same_command_line(twin: Twin) -> None:
    twin.ask(OPERATOR, "agent:spawn", agent_id="scout", argv=["run", "-v"], env={"A": "b"})
    ((_, first),) = sent(twin, "supervisor")
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="started", pid=7)
    assert twin.ask(OPERATOR, "agent:restart", agent_id="scout").agent_ids == ["scout"]
    assert sent(twin, "supervisor") == [("child:stop", {"name": "scout", "force": False})]
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="exited", exit="signal 15")
    assert sent(twin, "supervisor") == [("child:start", first)]
    assert status(twin, "scout") == "starting"


def test_a_restart_starts_what_has_ended_if_it_is_named(twin: Twin) -> None:
    spawn(twin)
    twin.ask(SUPERVISOR, "agent:report", agent_id="scout", state="failed", exit="no such file")
    assert twin.ask(OPERATOR, "agent:restart", all=True).agent_ids == []
    assert twin.ask(OPERATOR, "agent:restart", agent_id="scout").agent_ids == ["scout"]
    assert [operation for operation, _ in sent(twin, "supervisor")] == ["child:start"]


def test_command_lines_that_do_not_fit_into_one_record_wait(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c"]
    for name in names:
        spawn(twin, name, restart="permanent", env={"PAD": "x" * 1000})
    monkeypatch.setattr(registry, "SENDS_BYTES_MAX", 2500)
    twin.ask(SUPERVISOR, "agent:muster")
    assert [status(twin, name) for name in names] == ["starting", "starting", "failed"]
    for name in names:
        twin.ask(SUPERVISOR, "agent:report", agent_id=name, state="failed")
    reply = twin.ask(OPERATOR, "agent:restart", agent_ids=names)
    assert (reply.agent_ids, reply.more) == (["a", "b"], True)


def test_a_restart_skips_what_nobody_runs(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    reply = twin.ask(OPERATOR, "agent:restart", agent_id="alice")
    assert (reply.agent_ids, reply.skipped) == ([], {"alice": "is not supervised"})


def test_a_stop_the_supervisor_does_not_confirm_is_taken_as_done(twin: Twin) -> None:
    spawn(twin, "one")
    spawn(twin, "two")
    twin.ask(OPERATOR, "agent:terminate", agent_id="one")
    twin.ask(OPERATOR, "agent:restart", agent_id="two")
    sent(twin)
    twin.pass_time(REPORT_S + 0.1)
    assert (status(twin, "one"), status(twin, "two")) == ("terminated", "starting")
    assert [operation for operation, _ in sent(twin, "supervisor")] == ["child:start"]


def test_a_new_supervisor_gets_the_permanent_agents_again(twin: Twin) -> None:
    for name, restart in (("p", "permanent"), ("t", "transient"), ("here", "permanent")):
        spawn(twin, name, restart=restart)
    spawn(twin, "leaving", restart="permanent")
    twin.ask(OPERATOR, "agent:terminate", agent_id="leaving")
    twin.ask("alice", "agent:register")
    sent(twin)
    twin.ask(SUPERVISOR, "agent:muster", running=["here"])
    assert [(op, fields["name"]) for op, fields in sent(twin, "supervisor")] == [
        ("child:start", "p")
    ]
    found = {name: status(twin, name) for name in ("p", "t", "here", "leaving", "alice")}
    assert found == {
        "p": "starting",
        "t": "exited",
        "here": "active",
        "leaving": "terminated",
        "alice": "active",
    }


# Bounds.


def test_the_longest_gone_agents_are_forgotten_first(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "GONE_MAX", 2)
    for name in ("c", "a", "b", "d"):
        twin.ask(name, "agent:register", lease_s=1)
        if name != "b":
            twin.ask(name, "agent:unregister")
        twin.pass_time(0.01)
    twin.pass_time(1)
    twin.pass_time(1)  # b is lost by now
    twin.pass_time(0)
    names = [each.agent_id for each in twin.read("agent:list", include_gone=True).agents]
    assert names == ["b", "d"]
    for table in ("agents", "pulses", "details", "gone"):
        assert twin.store.tables[table].count() == 2, table
    assert twin.store.tables["deadlines"].count() == 0


def test_there_are_not_more_agents_than_the_limit(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "AGENTS_MAX", 2)
    twin.ask("a", "agent:register")
    twin.ask("b", "agent:register")
    with pytest.raises(Quota):
        twin.ask("c", "agent:register")
    with pytest.raises(Quota):
        twin.ask("a", "agent:spawn", argv=["run"])
    twin.ask("a", "agent:register")
    twin.ask("b", "agent:unregister")
    twin.ask("c", "agent:register")
    with pytest.raises(Quota):
        twin.ask("b", "agent:register")


# Queries.


def test_lists_are_filtered_and_come_in_pages(twin: Twin) -> None:
    twin.ask("a1", "agent:register", capabilities=["plan"], lease_s=1)
    twin.ask("a2", "agent:register", capabilities=["plan", "search"], kind="other")
    twin.ask("b1", "agent:register", capabilities=["search"])
    twin.ask("b2", "agent:register", capabilities=["fly"])
    twin.ask("b2", "agent:unregister")
    spawn(twin, "kid", by="a2", capabilities=["plan"])
    twin.pass_time(1)

    def names(**fields: Any) -> list[str]:
        return [each.agent_id for each in twin.read("agent:list", **fields).agents]

    assert names() == ["a1", "a2", "b1", "kid"]
    assert names(include_gone=True) == ["a1", "a2", "b1", "b2", "kid"]
    assert names(status="unregistered") == ["b2"]
    assert names(status="suspect") == ["a1"]
    assert names(capability="plan") == ["a1", "a2", "kid"]
    assert names(capability="plan", kind="other") == ["a2"]
    assert names(capability="fly") == []
    assert names(capability="fly", include_gone=True) == ["b2"]
    assert names(pattern="b*") == ["b1"]
    assert names(spawned_by="a2") == ["kid"]
    for fields in ({}, {"capability": "plan"}):
        page = twin.read("agent:list", limit=2, **fields)
        rest = twin.read("agent:list", limit=2, after=page.next, **fields)
        assert [each.agent_id for each in page.agents + rest.agents] == names(**fields)
        assert rest.next is None


def test_peers_have_all_capabilities_and_one_of_the_kinds(twin: Twin) -> None:
    twin.ask("alice", "agent:register", capabilities=["plan", "search"])
    twin.ask("bob", "agent:register", capabilities=["search", "plan"], kind="writer")
    twin.ask("carol", "agent:register", capabilities=["search"])
    twin.ask("dave", "agent:register", capabilities=["plan", "search"], lease_s=1)
    twin.ask("eve", "agent:register", capabilities=["plan", "search"])
    twin.ask("eve", "agent:unregister")
    twin.pass_time(1)

    def peers(**fields: Any) -> list[str]:
        return [each.agent_id for each in twin.read("agent:discover_peers", **fields).agents]

    assert peers(capabilities=["plan", "search"]) == ["alice", "bob"]
    assert peers(capabilities=["search", "plan"], exclude=["alice"]) == ["bob"]
    assert peers(capabilities=["plan"], kinds=["writer", "none"]) == ["bob"]
    assert peers(capabilities=["plan"], status=["suspect", "active"]) == ["alice", "bob", "dave"]
    assert peers(capabilities=["plan"], status=["unregistered"]) == ["eve"]
    assert peers() == ["alice", "bob", "carol"]
    assert peers(capabilities=["fly"]) == []


def test_a_lost_agent_is_no_peer_but_is_listed(twin: Twin) -> None:
    twin.ask("alice", "agent:register", capabilities=["plan"], lease_s=1)
    twin.pass_time(1)
    twin.pass_time(1)
    assert twin.read("agent:discover_peers", capabilities=["plan"]).agents == []
    assert [each.status for each in twin.read("agent:list").agents] == ["lost"]
    lost = twin.read("agent:discover_peers", capabilities=["plan"], status=["lost"])
    assert [each.agent_id for each in lost.agents] == ["alice"]


def test_a_query_looks_at_a_bounded_number_of_rows(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SCAN_ROWS_MAX", 2)
    for name in ("a", "b", "c"):
        twin.ask(name, "agent:register", kind="common")
    twin.ask("d", "agent:register", kind="rare")
    page = twin.read("agent:list", kind="rare")
    assert (page.agents, page.next) == ([], "b")
    page = twin.read("agent:list", kind="rare", after=page.next)
    assert [each.agent_id for each in page.agents] == ["d"]


# Identities.


def test_an_identity_is_kept_whatever_becomes_of_its_agent(twin: Twin) -> None:
    twin.ask("alice", "agent:register")
    made = twin.ask("alice", "agent:create_identity", identity={"role": "analyst"})
    twin.ask("alice", "agent:unregister")
    twin.restart()
    listed = twin.recovered().read("agent:list_identities").identities
    assert listed == {"alice": made}
    assert (made.revision, made.created_at, made.identity) == (1, twin.now, {"role": "analyst"})


def test_updates_change_some_fields_and_null_removes_one(twin: Twin) -> None:
    twin.ask("alice", "agent:create_identity", identity={"role": "analyst", "mood": "good"})
    twin.pass_time(5)
    changed = twin.ask(
        "alice", "agent:update_identity", updates={"mood": None, "team": ["x"]}, revision=1
    )
    assert changed.identity == {"role": "analyst", "team": ["x"]}
    assert (changed.revision, changed.updated_at - changed.created_at) == (2, 5)
    with pytest.raises(Conflict) as refused:
        twin.ask("alice", "agent:update_identity", updates={}, revision=1)
    assert refused.value.details["revision"] == 2


def test_an_identity_is_made_once_and_removed_once(twin: Twin) -> None:
    twin.ask("alice", "agent:create_identity", identity={"a": 1})
    with pytest.raises(Conflict):
        twin.ask("alice", "agent:create_identity", identity={"a": 2})
    assert twin.ask("alice", "agent:remove_identity").identity == {"a": 1}
    with pytest.raises(NotFound):
        twin.ask("alice", "agent:remove_identity")
    with pytest.raises(NotFound):
        twin.ask("alice", "agent:update_identity", updates={})


def test_nobody_else_changes_an_identity_but_who_spawned_the_agent_or_an_operator(
    twin: Twin,
) -> None:
    spawn(twin, "kid", by="alice")
    for who in ("bob", "alice2"):
        with pytest.raises(Forbidden):
            twin.ask(who, "agent:create_identity", agent_id="kid", identity={})
    twin.ask("alice", "agent:create_identity", agent_id="kid", identity={})
    with pytest.raises(Forbidden):
        twin.ask("bob", "agent:update_identity", agent_id="kid", updates={})
    with pytest.raises(Forbidden):
        twin.ask("bob", "agent:remove_identity", agent_id="kid")
    twin.ask(OPERATOR, "agent:update_identity", agent_id="kid", updates={"by": "op"})


def test_identities_are_listed_by_pattern_and_in_pages(twin: Twin) -> None:
    for name in ("b", "a2", "a1"):
        twin.ask(name, "agent:create_identity", identity={"name": name})
    assert [*twin.read("agent:list_identities").identities] == ["a1", "a2", "b"]
    assert [*twin.read("agent:list_identities", pattern="a*").identities] == ["a1", "a2"]
    page = twin.read("agent:list_identities", limit=2)
    assert ([*page.identities], page.next) == (["a1", "a2"], "a2")
    page = twin.read("agent:list_identities", limit=2, after="a2")
    assert ([*page.identities], page.next) == (["b"], None)


def test_an_identity_has_a_bound(twin: Twin) -> None:
    with pytest.raises(TooLarge):
        twin.ask("alice", "agent:create_identity", identity={"text": "x" * 20_000})
    twin.ask("alice", "agent:create_identity", identity={"text": "x" * 10_000})
    with pytest.raises(TooLarge):
        twin.ask("alice", "agent:update_identity", updates={"more": "x" * 10_000})


def test_info_of_an_unknown_agent_says_so(twin: Twin) -> None:
    with pytest.raises(NotFound, match="ghost"):
        twin.read("agent:info", agent_id="ghost")
