"""Completion: one grant a session, order, leases, attempts, cancelling, bounds, records."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from ksi.actors.declarations.sessions import SessionView
from ksi.actors.owner import Query, Reply, Sender
from ksi.actors.owners import completion
from ksi.actors.owners.completion import OWNER
from ksi.actors.testing import Asked, Twin, TwinTable, check_owner
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    Internal,
    Invalid,
    KsiError,
    NotFound,
    NotOwner,
    Quota,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import (
    AGEING_S,
    DEAD_S,
    ENTRY_BYTES_MAX,
    FINISHED_S,
    ITEMS_MAX,
    LAPSES_MAX,
)

OPERATOR = Sender("op", "operator")
SESSIONS = Sender("sessions", "owner")
W1, W2 = Sender("w1", "worker"), Sender("w2", "worker")
LEASE_S = 15.0


def choose(chance: random.Random) -> Asked:
    """Draw what a few agents and workers ask about a few sessions."""
    agent = OPERATOR if chance.random() < 0.1 else Sender(chance.choice(("alice", "bob")), "agent")
    worker = chance.choice((W1, W1, W1, W2))
    session = {"session_id": chance.choice(("s1", "s2", "s3"))}
    request = {"request_id": f"r{chance.randint(1, 6)}"}
    held = {**request, "attempt": chance.choice((1, 1, 1, 1, 2, 3))}
    priority, requires = {"priority": chance.choice((1, 5, 9))}, chance.choice((None, "gpu"))
    prompt = {"prompt": chance.choice(("hi", "\u2028 \x85")), "requires": requires}
    lease = {"lease_s": chance.choice((1.0, 20.0)), "slots": chance.choice((0, 1, 3))}
    epoch = {"epoch": chance.randint(1, 8)}
    offers = {"capabilities": chance.choice(([], ["gpu"], ["gpu", "gpu", "cpu"]))}
    status = chance.choice(("queued", "active", "finished", "dead"))
    after = chance.choice((None, "x/1/2"))
    timeout = {"run_s": chance.choice((0.2, 300.0)), "retry_s": chance.choice((0.1, 2.0))}
    kind, provider = chance.choice((None, "timeout", "authentication")), {"provider": "gpu"}
    rest = {"retry_after_s": chance.choice((0.2, 0.5))}
    bound = chance.choice(({}, {"limit": 1}, {"rate": "2/s"}, {"limit": 2, "rate": "3/m"}))
    usage = {"usage": {"input_tokens": 30, "output_tokens": 10, "cost_usd": 0.5}}
    budget = chance.choice(({"tokens": 200}, {"cost_usd": 9.0, "restart": True}, {}, {}, {}))
    choices: list[Asked] = [
        *[Asked(agent, "completion:async", {**session, **prompt, **priority, **timeout})] * 3,
        *[Asked(agent, "completion:async", {**session, **prompt, **request})] * 24,
        *[Asked(worker, "worker:report", {**held, "result": {"response": "x"}})] * 10,
        *[Asked(worker, "worker:report", {**held, "error": "it broke", "kind": kind})] * 3,
        Asked(worker, "worker:report", {**held, "error": "wait", "kind": kind, **rest}),
        Asked(worker, "worker:report", {**held, "error": "no", **provider, **usage}),
        Asked(worker, "worker:report", {**held, **provider, **usage}),
        Asked(worker, "worker:unfit", {**provider, "reason": "no key"}),
        *[Asked(OPERATOR, "completion:retry", {**request, **chance.choice(({}, session))})] * 8,
        Asked(OPERATOR, "completion:budget", {"agent_id": "alice", **budget}),
        Asked(OPERATOR, "completion:budget", {**session, **budget}),
        *[Asked(worker, "worker:tokens", {**held, "start": 0, "text": "An"})] * 12,
        Asked(agent, "completion:retry_status", {}),
        Asked(agent, "completion:provider_status", {}),
        Asked(agent, "completion:token_usage", {}),
        Asked(agent, "completion:budgets", {}),
        *[Asked(worker, "worker:progress", {**held, "progress": {"tokens": 3}})] * 12,
        *[Asked(worker, "worker:register", {**offers, **lease})] * 10,
        *[Asked(worker, "worker:renew", {**epoch, "slots": chance.choice((None, 2))})] * 5,
        *[Asked(worker, "worker:leave", epoch)] * 3,
        Asked(agent, "completion:cancel", {**request, **chance.choice(({}, session))}),
        Asked(OPERATOR, "completion:limit", {"limit": chance.choice((0, 1, 2, 256))}),
        Asked(OPERATOR, "completion:limit", {**provider, **bound}),
        Asked(agent, "completion:status", request),
        Asked(agent, "completion:session_status", session),
        Asked(agent, "completion:list", {"status": status, "limit": 2, "after": after}),
        Asked(worker, "worker:grants", {"worker": worker.name}),
        Asked(agent, "worker:list", {}),
    ]
    if chance.random() < 0.05:
        return Asked(SESSIONS, "completion:session_closed", session)
    return chance.choice(choices)


def test_completion_keeps_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose)


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def view(session_id: str = "s1", **fields: Any) -> SessionView:
    usual: dict[str, Any] = {
        "session_id": session_id, "owner": "alice", "epoch": 1, "status": "active", "seq": 0,
        "size_bytes": 0, "created_at": 0.0, "updated_at": 0.0, "pattern": "general",
        "admission": "open", "lease_s": None, "title": "",
    }  # fmt: skip
    return SessionView(**{**usual, **fields})


def submit(twin: Twin, session_id: str = "s1", who: str = "alice", **fields: Any) -> str:
    fields = {"prompt": "hi", **fields}
    accepted = twin.ask(who, "completion:async", session_id=session_id, **fields)
    request_id: str = accepted.request_id
    return request_id


def register(twin: Twin, worker: Sender = W1, **fields: Any) -> int:
    epoch: int = twin.ask(worker, "worker:register", **{"lease_s": LEASE_S, **fields}).epoch
    return epoch


def held(twin: Twin, worker: Sender = W1) -> dict[str, int]:
    found = twin.read("worker:grants", worker=worker.name).grants
    return {each.request_id: each.attempt for each in found}


def report(twin: Twin, request_id: str, attempt: int = 1, worker: Sender = W1, **more: Any) -> Any:
    fields = more or {"result": {"response": "done"}}
    return twin.ask(worker, "worker:report", request_id=request_id, attempt=attempt, **fields)


def status(twin: Twin, request_id: str) -> Any:
    return twin.read("completion:status", request_id=request_id)


def drain(twin: Twin, worker: Sender = W1) -> list[str]:
    """Report whatever is granted until nothing is; return the order."""
    order = []
    while grants := held(twin, worker):
        for request_id, attempt in grants.items():
            order.append(request_id)
            report(twin, request_id, attempt, worker)
    return order


def told(twin: Twin, request_id: str, requester: str = "alice") -> list[str]:
    """Return what was announced of a request, in order."""
    start = f"completion.{requester}.{request_id}."
    return [each.topic.removeprefix(start) for each in twin.told if each.topic.startswith(start)]


def recorded(twin: Twin) -> list[tuple[str, str]]:
    """Return the entries the owner of sessions was told to write: name and request."""
    sent = [msgspec.msgpack.decode(body) for _, _, name, body in twin.sends if name]
    return [(each["event"], each["request_id"]) for each in sent]


# Order and grants.


def test_a_session_runs_one_request_at_a_time_in_the_order_they_were_accepted(twin: Twin) -> None:
    submitted = [submit(twin) for _ in range(5)]
    register(twin, slots=8)
    assert list(held(twin)) == submitted[:1]
    assert drain(twin) == submitted


def test_sessions_run_beside_each_other_as_far_as_slots_and_the_limit_go(twin: Twin) -> None:
    first = [submit(twin, f"s{n}") for n in range(6)]
    register(twin, slots=4)
    assert list(held(twin)) == sorted(first[:4])
    twin.ask(OPERATOR, "completion:limit", limit=5)
    register(twin, W2, slots=4)
    assert list(held(twin, W2)) == [first[4]]
    twin.ask(OPERATOR, "completion:limit", limit=6)
    assert sorted(held(twin, W2)) == sorted(first[4:])


def test_the_least_busy_worker_is_granted_first(twin: Twin) -> None:
    register(twin, W1, slots=4)
    register(twin, W2, slots=4)
    for n in range(6):
        submit(twin, f"s{n}")
    assert (len(held(twin, W1)), len(held(twin, W2))) == (3, 3)


def test_one_decision_grants_all_that_can_be_and_spreads_it(twin: Twin) -> None:
    twin.ask(OPERATOR, "completion:limit", limit=0)
    register(twin, W1, slots=4, capabilities=["cpu", "gpu"])
    register(twin, W2, slots=4, capabilities=["cpu", "gpu", "tpu"])
    for n in range(6):
        submit(twin, f"s{n}", requires=("cpu", "gpu", None)[n % 3])
    batches = len(twin.store.journal)
    twin.ask(OPERATOR, "completion:limit", limit=6)
    assert (len(held(twin, W1)), len(held(twin, W2))) == (3, 3)
    assert len(twin.store.journal) == batches + 1


def test_lower_priority_numbers_go_first_and_waiting_makes_up_for_it(twin: Twin) -> None:
    low = submit(twin, priority=5)
    high = submit(twin, priority=1)
    also_high = submit(twin, priority=1)
    twin.pass_time(4 * AGEING_S + 1)
    late = submit(twin, priority=1)  # came long after `low`, which has aged four steps by now
    register(twin)
    assert drain(twin) == [high, also_high, low, late]


def test_across_sessions_the_same_order_decides_who_gets_the_only_slot(twin: Twin) -> None:
    low, high = submit(twin, "s1", priority=9), submit(twin, "s2", priority=1)
    plain = submit(twin, "s3")
    register(twin)
    assert drain(twin) == [high, plain, low]


def test_a_request_waits_for_a_worker_that_offers_what_it_requires(twin: Twin) -> None:
    gpu = submit(twin, "s1", requires="gpu")
    behind = submit(twin, "s1")
    register(twin, capabilities=["cpu"])
    anything = submit(twin, "s2")
    assert list(held(twin)) == [anything]
    register(twin, W2, capabilities=["gpu", "gpu-2"])
    assert list(held(twin, W2)) == [gpu]
    report(twin, gpu, worker=W2)
    assert list(held(twin, W2)) == [behind]


def test_a_request_before_the_head_is_granted_though_the_head_finds_no_worker(twin: Twin) -> None:
    register(twin, capabilities=["cpu"])
    submit(twin, requires="gpu")
    urgent = submit(twin, requires="cpu", priority=1)
    assert list(held(twin)) == [urgent]


def test_many_commands_of_one_batch_are_followed_by_one_decision_on_grants(twin: Twin) -> None:
    register(twin, slots=64)
    for n in range(10):
        submit(twin, f"s{n}")
    assert len(held(twin)) == 10


def test_a_worker_is_given_all_it_needs(twin: Twin) -> None:
    register(twin)
    request_id = submit(
        twin, prompt="hello", model="m1", options={"t": 0.5}, data={"to_agent": "bob"}
    )
    (grant,) = twin.read("worker:grants", worker="w1", request_ids=[request_id]).grants
    assert (grant.prompt, grant.model, grant.options) == ("hello", "m1", {"t": 0.5})
    assert (grant.data, grant.requester, grant.attempt) == ({"to_agent": "bob"}, "alice", 1)
    assert twin.read("worker:grants", worker="w1", request_ids=["other"]).grants == []
    assert [each.topic for each in twin.told if "w1.granted" in each.topic] == ["worker.w1.granted"]


def test_large_prompts_come_in_pages(twin: Twin) -> None:
    register(twin, slots=4)
    asked = [submit(twin, f"s{n}", prompt="x" * 300_000) for n in range(4)]
    page = twin.read("worker:grants", worker="w1")
    assert (len(page.grants), page.more) == (2, True)
    left = sorted({*asked} - {each.request_id for each in page.grants})
    assert len(twin.read("worker:grants", worker="w1", request_ids=left).grants) == 2


def test_choosing_reads_no_more_rows_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_read(waiting: int) -> int:
        twin = Twin(OWNER)
        register(twin)
        for n in range(waiting):
            submit(twin, f"s{n % 20}", requires=("gpu", None)[n % 2])
        (request_id,) = held(twin)
        count = 0
        ranged = TwinTable.range

        def counting(table: Any, *args: Any, **more: Any) -> Any:
            nonlocal count
            for each in ranged(table, *args, **more):
                count += 1
                yield each

        with monkeypatch.context() as patch:
            patch.setattr(TwinTable, "range", counting)
            report(twin, request_id)
        assert len(held(twin)) == 1
        return count

    assert rows_read(400) == rows_read(1200) < 30


# What becomes of a request.


def test_a_result_ends_a_request_and_is_kept_announced_and_recorded(twin: Twin) -> None:
    register(twin)
    request_id = submit(twin, prompt="hello", data={"prompt": "forged", "agent_id": "forged"})
    twin.ask(W1, "worker:progress", request_id=request_id, attempt=1, progress={"tokens": 3})
    assert status(twin, request_id).progress == {"tokens": 3}
    assert report(twin, request_id).status == "completed"
    ended = status(twin, request_id)
    assert (ended.result, ended.worker, ended.attempt) == ({"response": "done"}, "w1", 1)
    assert told(twin, request_id) == ["queued", "granted", "progress", "result"]
    assert recorded(twin) == [("completion:request", request_id), ("completion:result", request_id)]
    entries = [msgspec.msgpack.decode(body)["data"] for *_, body in twin.sends]
    assert entries == [
        {"prompt": "hello", "agent_id": "alice", "session_id": "s1"},
        {"response": "done", "agent_id": "w1"},
    ]


def test_an_error_a_worker_reports_fails_the_request_with_its_words(twin: Twin) -> None:
    register(twin)
    request_id = submit(twin)
    report(twin, request_id, error="the model is on fire")
    ended = status(twin, request_id)
    assert (ended.status, ended.reason, ended.result) == ("failed", "the model is on fire", None)
    assert told(twin, request_id)[-1] == "failed"
    assert recorded(twin)[-1] == ("completion:failed", request_id)


def test_a_report_is_taken_once_and_from_the_holder_of_the_grant_only(twin: Twin) -> None:
    register(twin)
    register(twin, W2, slots=0)
    request_id = submit(twin)
    with pytest.raises(NotOwner, match="granted to w1"):
        report(twin, request_id, worker=W2)
    with pytest.raises(StaleEpoch, match="attempt 2 is over"):
        report(twin, request_id, attempt=2)
    report(twin, request_id)
    with pytest.raises(StaleEpoch, match="completed"):
        report(twin, request_id)
    with pytest.raises(NotFound):
        report(twin, "never")


def test_what_waits_is_cancelled_and_never_starts(twin: Twin) -> None:
    first, second, third = (submit(twin) for _ in range(3))
    cancelled = twin.ask("alice", "completion:cancel", request_id=second, reason="changed my mind")
    assert (cancelled.status, cancelled.reason) == ("cancelled", "changed my mind")
    register(twin)
    assert drain(twin) == [first, third]
    assert recorded(twin)[3] == ("completion:cancelled", second)


def test_what_runs_is_cancelled_its_worker_told_and_its_session_free_at_once(twin: Twin) -> None:
    register(twin)
    first, second = submit(twin), submit(twin)
    twin.ask(OPERATOR, "completion:cancel", request_id=first)
    assert list(held(twin)) == [second]
    assert twin.told[-1].topic == "worker.w1.granted" or "worker.w1.revoked" in [
        each.topic for each in twin.told
    ]
    with pytest.raises(StaleEpoch, match="cancelled"):
        report(twin, first)
    assert told(twin, first)[-1] == "cancelled"


def test_what_has_ended_is_not_cancelled_whatever_its_end_was(twin: Twin) -> None:
    register(twin)
    done, failed, cancelled = submit(twin), submit(twin), submit(twin)
    report(twin, done)
    report(twin, failed, error="no")
    twin.ask("alice", "completion:cancel", request_id=cancelled)
    for request_id in (done, failed, cancelled):
        with pytest.raises(Conflict) as refused:
            twin.ask("alice", "completion:cancel", request_id=request_id)
        assert refused.value.details["status"] == status(twin, request_id).status
    with pytest.raises(NotFound):
        twin.ask("alice", "completion:cancel", request_id="never")


def test_who_may_cancel_is_the_requester_an_operator_and_the_owner_of_the_session(
    twin: Twin,
) -> None:
    twin.facts = lambda _query: view(owner="carol")
    first, second = submit(twin, who="alice"), submit(twin, who="alice")
    with pytest.raises(Forbidden, match="is of alice"):
        twin.ask("bob", "completion:cancel", request_id=first, session_id="s1")
    with pytest.raises(Forbidden):
        twin.ask("carol", "completion:cancel", request_id=first)
    twin.ask("carol", "completion:cancel", request_id=first, session_id="s1")
    twin.ask("alice", "completion:cancel", request_id=second)


def test_an_attempt_that_takes_too_long_fails_and_frees_its_session(twin: Twin) -> None:
    register(twin, lease_s=3600.0)
    slow, following = submit(twin, run_s=60.0, attempts_max=1), submit(twin)
    twin.pass_time(59.0)
    assert status(twin, slow).status == "active"
    twin.pass_time(2.0)
    assert status(twin, slow).reason == "it took longer than 60 s"
    assert [each.topic for each in twin.told].count("worker.w1.revoked") == 1
    last = msgspec.msgpack.decode(twin.sends[-1][3])
    assert (last["event"], last["agent_id"]) == ("completion:failed", "w1")
    assert list(held(twin)) == [following]


# Workers that go.


def test_when_a_lease_lapses_the_request_waits_again_in_its_old_place(twin: Twin) -> None:
    register(twin, W1)
    first, second = submit(twin), submit(twin, priority=1)
    twin.pass_time(LEASE_S - 1)
    assert held(twin) == {first: 1}
    twin.pass_time(1.5)
    assert twin.read("worker:list").workers == []
    assert status(twin, first).status == "queued"
    register(twin, W2)
    assert drain(twin, W2) == [second, first]
    assert status(twin, first).attempt == 2
    with pytest.raises(StaleEpoch):
        report(twin, first, attempt=1)
    assert told(twin, first) == ["queued", "granted", "requeued", "granted", "result"]


def test_a_worker_that_renews_keeps_what_it_holds_and_learns_what_that_is(twin: Twin) -> None:
    epoch = register(twin, slots=2)
    first, second = submit(twin, "s1"), submit(twin, "s2")
    for _ in range(5):
        twin.pass_time(LEASE_S - 1)
        renewed = twin.ask(W1, "worker:renew", epoch=epoch)
    have = {each.request_id: each.attempt for each in renewed.grants}
    assert have == {first: 1, second: 1}


def test_leases_survive_a_restart_of_the_owner_to_the_second(twin: Twin) -> None:
    epoch = register(twin)
    request_id = submit(twin)
    twin.pass_time(LEASE_S - 1)
    twin.restart()
    recovered = twin.recovered()
    for each in (twin, recovered):
        assert held(each) == {request_id: 1}
        each.pass_time(0.5)
        assert held(each) == {request_id: 1}
        each.pass_time(1.0)
        assert held(each) == {}
    with pytest.raises(NotFound, match="lapsed"):
        twin.ask(W1, "worker:renew", epoch=epoch)


def test_of_two_workers_with_one_name_the_later_goes_on_and_the_former_is_told(twin: Twin) -> None:
    former = register(twin)
    request_id = submit(twin)
    later = register(twin)
    assert later > former
    assert held(twin) == {request_id: 2}
    for command in ("worker:renew", "worker:leave"):
        with pytest.raises(StaleEpoch, match="another registered as w1"):
            twin.ask(W1, command, epoch=former)
    with pytest.raises(StaleEpoch):
        report(twin, request_id, attempt=1)
    report(twin, request_id, attempt=2)


def test_a_worker_that_leaves_hands_back_what_it_holds(twin: Twin) -> None:
    epoch = register(twin)
    register(twin, W2)
    request_id = submit(twin)
    twin.ask(W1, "worker:leave", epoch=epoch)
    assert held(twin, W2) == {request_id: 2}
    with pytest.raises(NotFound, match="it has left"):
        twin.ask(W1, "worker:renew", epoch=epoch)


def test_a_worker_that_drains_finishes_what_it_holds_and_gets_no_more(twin: Twin) -> None:
    epoch = register(twin, slots=2)
    first, second = submit(twin, "s1"), submit(twin, "s1")
    twin.ask(W1, "worker:renew", epoch=epoch, slots=0)
    report(twin, first)
    assert held(twin) == {}
    twin.ask(W1, "worker:renew", epoch=epoch, slots=1)
    assert list(held(twin)) == [second]


def test_a_request_over_which_workers_vanish_again_and_again_is_given_up(twin: Twin) -> None:
    request_id = submit(twin)
    for _ in range(LAPSES_MAX - 1):
        twin.ask(W1, "worker:leave", epoch=register(twin))  # to leave is not to vanish
        register(twin)
        twin.pass_time(LEASE_S + 1)
        assert status(twin, request_id).status == "queued"
    twin.ask(W1, "worker:leave", epoch=register(twin))
    assert status(twin, request_id).status == "queued"
    register(twin)
    twin.pass_time(LEASE_S + 1)
    ended = status(twin, request_id)
    assert (ended.status, ended.reason) == (
        "failed",
        "given up: 5 workers vanished over it, at last w1",
    )
    assert ended.attempt == 2 * LAPSES_MAX


def test_what_a_restore_interrupts_waits_again_in_its_place_and_no_former_name_holds(
    twin: Twin,
) -> None:
    first, second, third = (submit(twin) for _ in range(3))
    other = submit(twin, "s2")
    epoch = register(twin, slots=2)
    assert held(twin) == {first: 1, other: 1}

    twin.restored("retry")
    assert [status(twin, each).status for each in (first, other)] == ["queued"] * 2
    assert told(twin, first)[-1] == "requeued"
    with pytest.raises(NotFound):
        twin.ask(W1, "worker:renew", epoch=epoch)
    with pytest.raises(StaleEpoch):
        report(twin, first)
    register(twin)
    assert drain(twin) == [first, second, third, other]
    assert status(twin, first).attempt == 2


def test_what_a_restore_interrupts_ends_once_where_that_is_the_rule(twin: Twin) -> None:
    first, second = submit(twin), submit(twin)
    register(twin)
    for _ in range(2):
        twin.restored("fail")
        ended = status(twin, first)
        assert (ended.status, ended.reason) == ("failed", "daemon_restart")
        assert status(twin, second).status == "queued"
    assert recorded(twin).count(("completion:failed", first)) == 1
    assert told(twin, first).count("failed") == 1
    register(twin)
    assert drain(twin) == [second]


def test_a_request_that_restores_interrupt_again_and_again_is_given_up(twin: Twin) -> None:
    request_id = submit(twin)
    for _ in range(LAPSES_MAX):
        register(twin)
        assert status(twin, request_id).status == "active"
        twin.restored("retry")
    assert status(twin, request_id).reason == "daemon_restart"


def test_there_is_a_bound_to_workers(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "WORKERS_MAX", 1)
    register(twin)
    register(twin)
    with pytest.raises(Quota):
        register(twin, W2)


# Sessions.


@pytest.mark.parametrize(
    ("fact", "refusal"),
    [
        (NotFound("there is no session s1"), NotFound),
        (view(status="closed"), Conflict),
        (view(owner="carol", admission="closed", admits=False), Forbidden),
        (view(owner="carol", admission="invited", admits=False), Forbidden),
    ],
)
def test_who_is_known_not_to_be_admitted_is_refused(
    twin: Twin, fact: Reply | KsiError, refusal: type[KsiError]
) -> None:
    asked: list[Query[Any]] = []

    def answer(query: Query[Any]) -> Reply | KsiError:
        asked.append(query)
        return fact

    twin.facts = answer
    with pytest.raises(refusal):
        submit(twin)
    assert msgspec.structs.asdict(asked[0]) == {"session_id": "s1", "agent_id": "alice"}
    assert twin.sends == []


@pytest.mark.parametrize("fact", [None, view(), view(admission="closed"), view(owner="bob")])
def test_who_may_be_admitted_is_accepted_and_the_owner_of_sessions_decides(
    twin: Twin, fact: Reply | None
) -> None:
    twin.facts = lambda _query: fact
    twin.refuses = lambda _message: Conflict("session s1 is closed")
    register(twin)
    request_id = submit(twin)
    ended = status(twin, request_id)
    assert (ended.status, ended.reason) == ("cancelled", "session s1 is closed")
    assert recorded(twin) == [("completion:request", request_id)]
    assert told(twin, request_id) == ["queued", "cancelled"]
    assert held(twin) == {}


def test_nothing_is_granted_before_its_request_is_in_the_file_of_the_session(twin: Twin) -> None:
    register(twin, slots=4)
    twin.hears = False
    first, other = submit(twin), submit(twin, "s2")
    urgent = submit(twin, priority=1)
    dropped = submit(twin, "s3")
    twin.ask("alice", "completion:cancel", request_id=dropped)
    twin.pass_time(10.0)
    twin.restart()
    assert (held(twin), told(twin, first)) == ({}, ["queued"])
    twin.hear()
    assert held(twin) == dict.fromkeys(sorted((urgent, other)), 1)
    assert status(twin, dropped).status == "cancelled"
    twin.hears = True
    assert drain(twin)[-1] == first


def test_an_answer_that_is_heard_twice_changes_nothing(twin: Twin) -> None:
    register(twin)
    twin.hears = False
    request_id = submit(twin)
    again = twin._unheard.copy()
    twin.hear()
    before = len(twin.events)
    twin._unheard = again.copy()
    twin.hear()
    assert len(twin.events) == before
    report(twin, request_id)
    twin._unheard = again.copy()
    twin.refuses = lambda _message: Conflict("session s1 is closed")
    twin.hear()
    assert (status(twin, request_id).status, status(twin, request_id).reason) == ("completed", None)


@pytest.mark.parametrize(
    "refusal", [Conflict("session s1 is closed"), TooLarge("a long line"), Internal("a defect")]
)
def test_an_outcome_that_is_not_recorded_does_not_vanish_in_silence(
    twin: Twin, refusal: KsiError
) -> None:
    register(twin)
    request_id = submit(twin)
    failed = submit(twin)
    twin.refuses = lambda _message: refusal
    report(twin, request_id)
    report(twin, failed, error="it broke")
    kept = status(twin, request_id)
    missed = f"not in the session's file: {refusal.text}"
    assert (kept.status, kept.result, kept.reason) == ("completed", {"response": "done"}, missed)
    assert status(twin, failed).reason == f"it broke; {missed}"
    assert told(twin, request_id)[-2:] == ["result", "unrecorded"]
    sent = [msgspec.msgpack.decode(body) for *_, body in twin.sends]
    instead = [each["data"] for each in sent if each["event"] == "completion:result"][1:]
    said = {"agent_id": "w1", "unrecorded": refusal.text}
    assert instead == ([] if isinstance(refusal, Conflict) else [said])


def test_all_that_waits_or_runs_in_a_session_ends_when_it_is_closed(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "ENDED_MAX", 2)
    register(twin, slots=2)
    ended = [submit(twin) for _ in range(40)]
    other = submit(twin, "s2")
    twin.ask(SESSIONS, "completion:session_closed", session_id="s1")
    while twin.read("completion:list").waiting:
        assert set(held(twin)) <= {other, ended[0]}
        twin.pass_time(0.25)
    assert {status(twin, each).reason for each in ended} == {"session s1 was closed"}
    assert held(twin) == {other: 1}
    assert [name for name, _ in recorded(twin)] == ["completion:request"] * 41
    assert [rows for name, rows in twin.store.rows().items() if name in ("closing", "queue")] == [
        {}, {},
    ]  # fmt: skip
    twin.ask(SESSIONS, "completion:session_closed", session_id="s1")


# Bounds, and once only.


def test_a_request_id_is_one_request_for_whoever_uses_it(twin: Twin) -> None:
    request_id = submit(twin, request_id="r1")
    assert [submit(twin, request_id="r1") for _ in range(3)] == [request_id] * 3
    with pytest.raises(Conflict, match="is of alice"):
        submit(twin, who="bob", request_id="r1")
    register(twin)
    assert drain(twin) == ["r1"]
    assert submit(twin, request_id="r1") == "r1"
    assert held(twin) == {}


@pytest.mark.parametrize(
    "bound", [("WAITING_MAX", 2), ("WAITING_SESSION_MAX", 2), ("WAITING_BYTES_MAX", 150)]
)
def test_above_each_bound_the_answer_is_busy_and_says_when_to_try_again(
    twin: Twin, bound: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, *bound)
    first, second = submit(twin), submit(twin)
    with pytest.raises(Busy) as refused:
        submit(twin)
    assert refused.value.details["retry_after_s"] > 0
    twin.loop.delivery.client("alice", b"i" * 16)  # its number was not consumed
    twin._numbers[Sender("alice", "agent")] -= 1
    twin.ask(OPERATOR, "completion:cancel", request_id=first)
    third = submit(twin)
    register(twin)
    assert drain(twin) == [second, third]


@pytest.mark.parametrize("bound", [("WAITING_AGENT_MAX", 2), ("WAITING_AGENT_BYTES_MAX", 150)])
def test_one_agent_does_not_fill_the_queues_of_all(
    twin: Twin, bound: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, *bound)
    first, _second = submit(twin, "s1"), submit(twin, "s2")
    with pytest.raises(Busy, match="of alice wait"):
        submit(twin, "s3")
    submit(twin, "s1", who="bob")
    twin._numbers[Sender("alice", "agent")] -= 1
    twin.ask("alice", "completion:cancel", request_id=first)
    third = submit(twin, "s3")
    register(twin, slots=8)
    assert third in held(twin)
    drain(twin)
    assert twin.store.rows()["asking"] == {}


def test_what_would_not_fit_a_line_is_refused(twin: Twin) -> None:
    register(twin)
    with pytest.raises(TooLarge, match="the request is"):
        submit(twin, prompt="x" * ENTRY_BYTES_MAX)
    with pytest.raises(TooLarge):
        submit(twin, prompt="\x85" * (ENTRY_BYTES_MAX // 6 + 1))  # three times as long in a line
    request_id = submit(twin)
    with pytest.raises(TooLarge, match="the result is"):
        report(twin, request_id, result={"response": "x" * ENTRY_BYTES_MAX})
    fields = {"request_id": request_id, "attempt": 1, "progress": {"x": "y" * 20_000}}
    with pytest.raises(TooLarge, match="the progress is"):
        twin.ask(W1, "worker:progress", **fields)
    report(twin, request_id)


def test_what_has_too_many_fields_to_be_recorded_is_refused(twin: Twin) -> None:
    register(twin)
    most = {f"k{n}": n for n in range(ITEMS_MAX)}  # With ours beside them they are too many.
    with pytest.raises(TooLarge, match="the request has"):
        submit(twin, data=most)
    request_id = submit(twin)
    with pytest.raises(TooLarge, match="the result has"):
        report(twin, request_id, result=most)
    report(twin, request_id)


@pytest.mark.parametrize("bound", [("FINISHED_MAX", 3), ("FINISHED_BYTES_MAX", 120)])
def test_outcomes_are_kept_within_bounds_the_longest_finished_go_first(
    twin: Twin, bound: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(twin, lease_s=3600.0)
    ids = [submit(twin) for _ in range(6)]
    for request_id in ids:
        twin.pass_time(1.0)
        report(twin, request_id)
    monkeypatch.setattr(completion, *bound)
    twin.pass_time(0.25)
    kept = [each.request_id for each in twin.read("completion:list", status="finished").requests]
    assert sorted(kept) == sorted(ids[3:])
    with pytest.raises(NotFound, match="not kept any more"):
        status(twin, ids[0])


def test_outcomes_are_forgotten_after_a_while(twin: Twin) -> None:
    register(twin)
    request_id = submit(twin)
    report(twin, request_id)
    twin.pass_time(FINISHED_S - 1)
    status(twin, request_id)
    twin.pass_time(2)
    with pytest.raises(NotFound):
        status(twin, request_id)
    sizes = {name: len(rows) for name, rows in twin.store.rows().items() if rows}
    assert not {"outcomes", "requests", "prompts"} & {*sizes}


def test_lists_come_in_pages_that_hold_each_request_once(twin: Twin) -> None:
    register(twin, slots=8, lease_s=3600.0)
    for n in range(5):
        for _ in range(2):
            submit(twin, f"s{n}")
    for name in ("queued", "active", "finished"):
        found, after = [], None
        while True:
            page = twin.read("completion:list", status=name, limit=2, after=after)
            found += [each.request_id for each in page.requests]
            after = page.next
            if after is None:
                break
        assert len(found) == len({*found}) == (0 if name == "finished" else 5), name
    queue = twin.read("completion:session_status", session_id="s1")
    assert (queue.waiting, queue.active.status, len(queue.next)) == (1, "active", 1)
    assert twin.read("completion:session_status", session_id="none").active is None


# What fails, and what may pass.


def fail(twin: Twin, request_id: str, attempt: int = 1, **more: Any) -> Any:
    fields = {"error": "429", "kind": "api_rate_limit", "provider": "gpu", **more}
    return report(twin, request_id, attempt, **fields)


def test_what_may_pass_is_tried_again_after_waits_that_double_and_then_is_dead(twin: Twin) -> None:
    register(twin, slots=4, lease_s=3600.0)
    request_id, behind = submit(twin, attempts_max=4), submit(twin)
    waits = []
    for attempt in (1, 2, 3):
        deferred = fail(twin, request_id, attempt)
        assert (deferred.status, deferred.failures) == ("queued", attempt)
        assert held(twin) == {}, "its session waits with it"
        waits.append(deferred.retry_at - twin.now)
        twin.pass_time(waits[-1] - 0.3)
        assert held(twin) == {}
        twin.pass_time(0.6)
        assert held(twin) == {request_id: attempt + 1}
    for wait_s, least_s in zip(waits, (2, 4, 8), strict=True):
        assert least_s <= wait_s < least_s * 1.26
    assert len({wait_s % 2 for wait_s in waits}) == 3, "they are drawn"
    ended = fail(twin, request_id, 4)
    assert (ended.status, ended.kind, ended.reason) == ("failed", "api_rate_limit", "429")
    assert told(twin, request_id).count("retry") == 3
    assert recorded(twin)[-1] == ("completion:failed", request_id)
    assert list(held(twin)) == [behind]
    (provider,) = twin.read("completion:provider_status", provider="gpu").providers
    assert (provider.retried, provider.failed, provider.kind) == (3, 1, "api_rate_limit")


def test_what_fails_at_once_is_not_tried_at_once_again(twin: Twin) -> None:
    register(twin, slots=8)
    asked = [submit(twin, f"s{n}") for n in range(8)]
    assert len({fail(twin, each).retry_at for each in asked}) == 8


@pytest.mark.parametrize("kind", ["authentication", "invalid_request", "model_not_found", None])
def test_what_will_not_pass_fails_at_once(twin: Twin, kind: str | None) -> None:
    register(twin)
    assert fail(twin, submit(twin), kind=kind).status == "failed"


def test_a_provider_that_asks_to_be_left_alone_is_for_that_long(twin: Twin) -> None:
    register(twin, lease_s=3600.0)
    request_id = submit(twin)
    assert fail(twin, request_id, retry_after_s=100.0).retry_at == twin.now + 100
    assert [each.request_id for each in twin.read("completion:retry_status").requests] == [
        request_id
    ]
    twin.pass_time(99)
    assert held(twin) == {}
    twin.pass_time(1.1)
    assert held(twin) == {request_id: 2}
    assert twin.read("completion:retry_status").waiting == 0


def test_what_waits_for_its_next_attempt_lets_more_urgent_requests_through(twin: Twin) -> None:
    register(twin)
    waiting = submit(twin)
    fail(twin, waiting)
    urgent = submit(twin, priority=1)
    assert list(held(twin)) == [urgent]
    report(twin, urgent)
    twin.pass_time(3)
    assert list(held(twin)) == [waiting]


def test_what_waits_for_its_next_attempt_can_be_cancelled_and_its_session_goes_on(
    twin: Twin,
) -> None:
    register(twin)
    waiting, behind = submit(twin), submit(twin)
    fail(twin, waiting)
    twin.ask("alice", "completion:cancel", request_id=waiting)
    assert list(held(twin)) == [behind]
    assert twin.read("completion:retry_status").waiting == 0
    twin.pass_time(10)
    assert status(twin, waiting).status == "cancelled"


def test_what_takes_too_long_is_tried_again_and_its_worker_told(twin: Twin) -> None:
    register(twin, lease_s=3600.0)
    request_id = submit(twin, run_s=1.0, attempts_max=2, retry_s=0.1)
    twin.pass_time(1.1)
    assert (status(twin, request_id).status, status(twin, request_id).kind) == ("queued", "timeout")
    assert "worker.w1.revoked" in [each.topic for each in twin.told]
    with pytest.raises(StaleEpoch):
        report(twin, request_id)
    twin.pass_time(0.3)
    twin.pass_time(1.1)
    ended = status(twin, request_id)
    assert (ended.status, ended.attempt, ended.kind) == ("failed", 2, "timeout")


def test_a_dead_letter_is_listed_and_retried_once_as_another_request(twin: Twin) -> None:
    register(twin)
    request_id = submit(twin, prompt="again?", options={"t": 1}, data={"pattern": "team"})
    fail(twin, request_id, kind="authentication")
    (dead,) = twin.read("completion:list", status="dead").requests
    assert dead.request_id == request_id
    with pytest.raises(Forbidden):
        twin.ask("bob", "completion:retry", request_id=request_id)
    again = twin.ask(OPERATOR, "completion:retry", request_id=request_id).request_id
    (grant,) = twin.read("worker:grants", worker="w1").grants
    assert (grant.request_id, grant.prompt, grant.requester) == (again, "again?", "alice")
    assert (grant.options, grant.data) == ({"t": 1}, {"pattern": "team"})
    assert twin.read("completion:list", status="dead").requests == []
    with pytest.raises(Conflict, match=f"was retried as {again}"):
        twin.ask(OPERATOR, "completion:retry", request_id=request_id)
    report(twin, again)
    assert status(twin, again).retry_of == request_id
    with pytest.raises(Conflict, match="completed"):
        twin.ask("alice", "completion:retry", request_id=again)


def test_dead_letters_outlive_the_outcomes_of_others(twin: Twin) -> None:
    register(twin, lease_s=3600.0)
    dead, done = submit(twin), submit(twin)
    fail(twin, dead, kind="authentication")
    report(twin, done)
    twin.pass_time(FINISHED_S + 1)
    twin.pass_time(1)
    with pytest.raises(NotFound):
        status(twin, done)
    assert status(twin, dead).status == "failed"
    twin.pass_time(DEAD_S)
    twin.pass_time(1)
    with pytest.raises(NotFound):
        status(twin, dead)
    assert [*twin.store.tables["prompts"].range()] == []
    totals = twin.store.tables["totals"].get("all")
    assert (totals.dead_bytes, totals.finished_bytes, totals.open_bytes) == (0, 0, 0)


def test_a_grant_names_what_was_answered_last_in_its_session(twin: Twin) -> None:
    register(twin)
    first, second = submit(twin), submit(twin)
    report(twin, first)
    twin.ask(W1, "worker:progress", request_id=second, attempt=1, progress={"tokens": 3})
    (grant,) = twin.read("worker:grants", worker="w1").grants
    assert (grant.request_id, grant.follows) == (second, first)


def test_an_answer_is_heard_as_it_grows_and_kept_nowhere(twin: Twin) -> None:
    register(twin)
    request_id = submit(twin)
    batches = len(twin.store.journal)
    growing: dict[str, Any] = {"request_id": request_id, "attempt": 1, "start": 3, "text": "epoch"}
    twin.ask(W1, "worker:tokens", **growing)
    assert twin.told[-1].topic == f"completion.alice.{request_id}.tokens"
    message = twin.told[-1].message
    assert isinstance(message, dict)
    assert (message["start"], message["text"]) == (3, "epoch")
    assert len(twin.store.journal) == batches
    with pytest.raises(StaleEpoch):
        twin.ask(W1, "worker:tokens", **{**growing, "attempt": 2})


def test_who_requires_what_nobody_can_offer_is_told_why(twin: Twin) -> None:
    twin.ask(W1, "worker:unfit", provider="openai", reason="OPENAI_API_KEY is not set")
    with pytest.raises(NotFound, match="OPENAI_API_KEY is not set"):
        submit(twin, requires="openai")
    submit(twin, requires="other")
    register(twin, W2, capabilities=["openai"])
    submit(twin, "s2", requires="openai")
    (provider,) = twin.read("completion:provider_status", provider="openai").providers
    assert (provider.unfit, provider.workers, provider.used) == (None, 1, 1)


def test_what_is_given_up_because_its_worker_registers_again_and_again_is_recorded(
    twin: Twin,
) -> None:
    request_id = submit(twin)
    for _ in range(LAPSES_MAX + 1):
        register(twin)
    assert status(twin, request_id).status == "failed"
    assert recorded(twin)[-1] == ("completion:failed", request_id)


# What it takes.

TOOK = {"input_tokens": 30, "output_tokens": 12, "cost_usd": 0.25}


def test_tokens_and_cost_are_summed_up_by_agent_and_model_also_of_failures(twin: Twin) -> None:
    register(twin, slots=4)
    for n, (who, model) in enumerate([("alice", "m1"), ("alice", "m1"), ("bob", "m2")]):
        fields = {"result": {"model": model}} if n else {"error": "no"}
        request_id = submit(twin, f"s{n}", who, model=model)
        report(twin, request_id, usage=TOOK, **fields)
    page = twin.read("completion:token_usage")
    assert [(each.agent_id, each.model, each.input_tokens) for each in page.usage] == [
        ("alice", "m1", 60),
        ("bob", "m2", 30),
    ]
    assert (page.input_tokens, page.output_tokens, page.cost_usd) == (90, 36, 0.75)
    assert twin.read("completion:token_usage", model="m2").output_tokens == 12
    assert twin.read("completion:token_usage", agent_id="carol").usage == []
    assert twin.read("completion:token_usage", since=twin.now + 7200).usage == []


def test_the_result_says_what_it_took(twin: Twin) -> None:
    register(twin)
    request_id = submit(twin)
    report(twin, request_id, result={"response": "done"}, usage=TOOK)
    assert status(twin, request_id).result["usage"] == {**TOOK, "cached_tokens": 0}


@pytest.mark.parametrize("bound", [{"tokens": 84}, {"cost_usd": 0.5}])
@pytest.mark.parametrize("holder", [{"agent_id": "alice"}, {"session_id": "s1"}])
def test_over_its_budget_nothing_is_accepted_and_nothing_begun(
    twin: Twin, bound: dict[str, Any], holder: dict[str, str]
) -> None:
    twin.ask(OPERATOR, "completion:budget", **bound, **holder)
    register(twin)
    first, second, third = (submit(twin) for _ in range(3))
    for request_id in (first, second):
        report(twin, request_id, result={"response": "done"}, usage=TOOK)
    ended = status(twin, third)
    assert (ended.status, ended.kind, ended.attempt) == ("failed", "budget", 0)
    last = msgspec.msgpack.decode(twin.sends[-1][3])
    assert (last["event"], last["agent_id"]) == ("completion:failed", "alice")
    with pytest.raises(Quota, match="the budget is used up"):
        submit(twin)
    submit(twin, "s2", "bob")
    twin.ask(OPERATOR, "completion:budget", tokens=1000, **holder)
    again = twin.ask("alice", "completion:retry", request_id=third).request_id
    assert status(twin, again).status in ("queued", "active")
    (budget,) = twin.read("completion:budgets", **holder).budgets
    assert (budget.taken_tokens, budget.taken_usd) == (84, 0.5)
    assert twin.ask(OPERATOR, "completion:budget", **holder).budgets == []
    assert twin.read("completion:budgets").budgets == []


def test_a_budget_is_of_one_agent_or_one_session_and_set_by_an_operator(twin: Twin) -> None:
    with pytest.raises(Invalid):
        twin.ask(OPERATOR, "completion:budget", tokens=1)
    with pytest.raises(Invalid):
        twin.ask(OPERATOR, "completion:budget", tokens=1, agent_id="a", session_id="s")


# What providers bear.

W3 = Sender("w3", "worker")
ALL = (W1, W2, W3)


def join(twin: Twin, *workers: Sender, **more: Any) -> None:
    for worker in workers:
        register(twin, worker, **{"slots": 4, "capabilities": ["gpu"], "lease_s": 3600.0, **more})


def held_by_all(twin: Twin) -> dict[str, Sender]:
    return {each: worker for worker in ALL for each in held(twin, worker)}


def bear(twin: Twin, provider: str = "gpu", **bound: Any) -> Any:
    return twin.ask(OPERATOR, "completion:limit", provider=provider, **bound)


def test_a_provider_bears_so_many_grants_at_a_time_by_all_its_workers(twin: Twin) -> None:
    join(twin, *ALL)
    asked = [submit(twin, f"s{n}", requires="gpu" if n % 2 else None) for n in range(12)]
    assert len(held_by_all(twin)) == 12
    assert bear(twin, limit=2).active == 12
    for n in range(8):
        submit(twin, f"t{n}", requires="gpu" if n % 2 else None)
    for done, request_id in enumerate(asked, 1):
        report(twin, request_id, worker=held_by_all(twin)[request_id])
        assert len(held_by_all(twin)) == max(2, 12 - done)
    twin.restart()
    for _ in range(3):
        (first, holder), *_ = held_by_all(twin).items()
        fail(twin, first, worker=holder)
        assert len(held_by_all(twin)) == 2
    (provider,) = twin.read("completion:provider_status", provider="gpu").providers
    assert (provider.limit, provider.rate) == (2, None)
    assert bear(twin).limit is None
    assert len(held_by_all(twin)) == 5, "the three that failed wait"


@pytest.mark.parametrize("end", ["lapse", "leave", "again", "timeout", "cancel", "close"])
def test_whatever_ends_a_grant_makes_room_for_one_more_of_its_provider(
    twin: Twin, end: str
) -> None:
    bear(twin, limit=1)
    epoch = register(twin, capabilities=["gpu"], slots=3)
    first = submit(twin, run_s=5.0 if end == "timeout" else 300.0, attempts_max=1)
    second = submit(twin, "s2")
    assert list(held(twin)) == [first]
    match end:
        case "lapse":
            twin.pass_time(LEASE_S + 1)
        case "leave":
            twin.ask(W1, "worker:leave", epoch=epoch)
        case "timeout":
            twin.pass_time(5.5)
        case "cancel":
            twin.ask("alice", "completion:cancel", request_id=first)
        case "close":
            twin.ask(SESSIONS, "completion:session_closed", session_id="s1")
    join(twin, W1 if end == "again" else W2)
    goes_on = first if end in ("lapse", "leave", "again") else second
    assert list(held_by_all(twin)) == [goes_on]
    assert bear(twin, limit=1).active == 1


def test_in_no_period_is_a_provider_granted_more_than_its_rate_whatever_is_restarted(
    twin: Twin,
) -> None:
    bear(twin, rate="5/m")
    join(twin, *ALL, slots=64)
    asked = [submit(twin, f"s{n}", run_s=86_000.0) for n in range(40)]
    for step in range(400):
        twin.pass_time(1.0)
        if step % 37 == 0:
            twin.restart()
        if step == 100:
            twin.ask(W3, "worker:leave", epoch=3)  # What it held is granted anew, and counts.
    granted = [each for each in asked if status(twin, each).status == "active"]
    times = sorted(status(twin, each).granted_at for each in granted)
    assert 30 <= len(times) < 35, "five in each of seven, less what was granted twice"
    assert all(sixth - first >= 60 for first, sixth in zip(times, times[5:], strict=False))


def test_a_provider_that_wants_to_be_left_alone_is_by_all_its_workers(twin: Twin) -> None:
    join(twin, W1, W2)
    join(twin, W3, capabilities=["cpu", "gpu"])
    first, second = submit(twin, requires="gpu"), submit(twin, "s2", requires="gpu")
    fail(twin, first, retry_after_s=30.0, worker=held_by_all(twin)[first])
    third, anything = submit(twin, "s3", requires="gpu"), submit(twin, "s4")
    assert held_by_all(twin) == {second: W2, anything: W3}, "what runs goes on, and so do others"
    twin.restart()
    twin.pass_time(29.0)
    assert third not in held_by_all(twin)
    twin.pass_time(1.1)
    assert {first, third} <= set(held_by_all(twin))
    fail(twin, third, retry_after_s=3000.0, worker=held_by_all(twin)[third])
    fourth = submit(twin, "s5", requires="gpu")
    assert fourth not in held_by_all(twin)
    bear(twin)
    assert fourth in held_by_all(twin), "an operator knows better"


def test_what_requires_nothing_goes_to_a_worker_whose_provider_bears_more(twin: Twin) -> None:
    bear(twin, limit=1)
    join(twin, W1)
    join(twin, W2, capabilities=["cpu", "gpu"], slots=2)
    first, second, third = (submit(twin, f"s{n}") for n in range(3))
    assert held_by_all(twin) == {first: W1, second: W2, third: W2}
    bear(twin, "cpu", limit=0)
    report(twin, second, worker=W2)
    submit(twin, "s4")
    assert list(held_by_all(twin)) == [first, third]


def test_there_is_a_bound_to_providers_that_have_bounds(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.actors.owners.bounds.PROVIDERS_MAX", 2)
    bear(twin, "one", limit=1)
    bear(twin, "two", rate="1/s")
    with pytest.raises(Quota):
        bear(twin, "three", limit=1)
    bear(twin, "two", limit=3)
    register(twin, capabilities=["three"])
    assert fail(twin, submit(twin), retry_after_s=9.0).retry_at == twin.now + 9
    assert bear(twin, "one").limit is None
    bear(twin, "three", limit=1)


@pytest.mark.parametrize(
    "bound", [{"rate": "1/s"}, {"limit": 1, "rate": "1/s"}, {"provider": "gpu", "rate": "often"},
              {"provider": "gpu", "rate": "0/s"}, {"provider": "gpu", "limit": -1}, {}],
)  # fmt: skip
def test_bounds_that_say_nothing_of_use_are_refused(twin: Twin, bound: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        twin.ask(OPERATOR, "completion:limit", **bound)
    with pytest.raises(Forbidden):
        twin.ask(W1, "completion:limit", limit=3)
