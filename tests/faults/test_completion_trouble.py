"""Completions in trouble: workers that vanish, sessions that close, requesters that go away."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from system import System
from trouble import entries, kill, paused, until
from workers import WorkerProcess, happened, registered, state, working

from ksi.actors.declarations.workers import WorkerRenewed
from ksi.transport import Client
from ksi.transport.errors import Conflict, Forbidden, NotFound, StaleEpoch, Unavailable
from ksi.transport.identity import KeyRing

HELD = {"delay_s": 60.0}  # An echo that takes this long has to be helped to an end.


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("completion") / "var")
    yield running
    running.end()


@pytest.fixture
def session_id(alice: Client) -> str:
    return str(alice.ask("session:create")["session_id"])


def submit(client: Client, session_id: str, **more: Any) -> str:
    fields = {"session_id": session_id, "prompt": "hello", **more}
    return str(client.ask("completion:async", fields)["request_id"])


def is_begun(client: Client, request_id: str) -> bool:
    """Whether a worker has begun: an echo that takes time says so."""
    return client.read("completion:status", request_id=request_id)["progress"] is not None


def said(system: System, session_id: str) -> list[tuple[str, str]]:
    """Return event and request of each entry of a session."""
    return [(each["event"], each["correlation_id"]) for each in entries(system, session_id)]


def test_what_is_asked_and_answered_is_in_the_sessions_file(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "plain"):
        request_id = submit(alice, session_id, data={"pattern": "peer_to_peer"})
        outcome = alice.outcome(request_id)
    assert outcome["result"] == {"response": "hello", "model": "echo", "provider": "echo"}
    until(lambda: len(entries(system, session_id)) == 2)
    request, result = entries(system, session_id)
    asked = {"prompt": "hello", "pattern": "peer_to_peer", "agent_id": "alice"}
    assert request["event"] == "completion:request"
    assert request["data"] == {**asked, "session_id": session_id}
    assert (result["event"], result["data"]["agent_id"]) == ("completion:result", "plain")
    assert request["correlation_id"] == result["correlation_id"] == request_id


def test_when_a_worker_is_killed_another_gets_its_grant_after_the_lease(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "doomed") as [doomed]:
        request_id = submit(alice, session_id, options={"delay_s": 0.5})
        following = submit(alice, session_id)
        until(lambda: is_begun(alice, request_id))
        doomed.kill()
        with working(system, "heir"):
            outcome = alice.outcome(request_id, timeout_s=20)
            assert (outcome["worker"], outcome["attempt"]) == ("heir", 2)
            assert alice.outcome(following)["attempt"] == 1
    assert "doomed" not in registered(alice)


def test_a_worker_that_is_stopped_and_goes_on_is_refused_and_takes_part_again(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "dozing") as [dozing]:
        request_id = submit(alice, session_id, options={"delay_s": 0.3})
        until(lambda: is_begun(alice, request_id))
        dozing.send(signal.SIGSTOP)
        with working(system, "awake") as [awake]:
            assert alice.outcome(request_id, timeout_s=20)["worker"] == "awake"
            awake.send(signal.SIGTERM)
            assert awake.ended()[0] == 0
        dozing.send(signal.SIGCONT)
        until(lambda: "dozing" in registered(alice))
        assert alice.outcome(submit(alice, session_id), timeout_s=20)["worker"] == "dozing"
    until(lambda: len(entries(system, session_id)) == 4)
    assert [each["event"] for each in entries(system, session_id)].count("completion:result") == 2


def test_a_worker_whose_key_is_revoked_is_cut_off_and_its_grant_goes_to_another(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "outcast") as [outcast]:
        request_id = submit(alice, session_id, options={"delay_s": 1.0})
        until(lambda: is_begun(alice, request_id))
        KeyRing(system.var).remove("outcast")
        with working(system, "insider"):
            outcome = alice.outcome(request_id, timeout_s=20)
        assert (outcome["worker"], outcome["attempt"]) == ("insider", 2)
        code, words = outcast.ended()
        assert (code, "forbidden" in words) == (5, True), words


def test_grants_outlive_the_death_and_the_pause_of_their_owner(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "steadfast", lease="3s"):
        request_id = submit(alice, session_id, options={"delay_s": 1.5})
        until(lambda: is_begun(alice, request_id))
        kill(system, "completion")
        with paused(system, "completion"):
            time.sleep(3.2)  # longer than the lease
        outcome = alice.outcome(request_id, timeout_s=20)
        assert (outcome["status"], outcome["attempt"]) == ("completed", 1)


def test_of_two_workers_with_one_name_the_former_ends_and_says_why(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "twin") as [former]:
        request_id = submit(alice, session_id, options={"delay_s": 60})
        until(lambda: is_begun(alice, request_id))
        epoch = registered(alice)["twin"]["epoch"]
        later = WorkerProcess(system.var, "twin")
        try:
            code, words = former.ended()
            assert (code, "another registered as twin" in words) == (5, True), words
            assert registered(alice)["twin"]["epoch"] > epoch
            again = alice.read("completion:status", request_id=request_id)
            assert (again["worker"], again["attempt"]) == ("twin", 2)
        finally:
            later.kill()
    alice.ask("completion:cancel", request_id=request_id)


def test_a_worker_told_to_stop_finishes_what_it_holds_and_leaves(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "leaving") as [leaving]:
        request_id = submit(alice, session_id, options={"delay_s": 0.5})
        until(lambda: is_begun(alice, request_id))
        behind = submit(alice, session_id)
        leaving.send(signal.SIGTERM)
        assert leaving.ended()[0] == 0
        assert state(alice, request_id) == "completed"
        assert state(alice, behind) == "queued"
        assert "leaving" not in registered(alice)
    alice.ask("completion:cancel", request_id=behind)


def test_a_worker_told_twice_to_stop_hands_back_what_it_holds(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "hasty") as [hasty]:
        request_id = submit(alice, session_id, options=HELD)
        until(lambda: is_begun(alice, request_id))
        hasty.send(signal.SIGTERM)
        until(lambda: registered(alice)["hasty"]["slots"] == 0)
        hasty.send(signal.SIGTERM)
        assert hasty.ended()[0] == 0
        assert state(alice, request_id) == "queued"
    alice.ask("completion:cancel", request_id=request_id)


def test_cancel_in_every_state(system: System, alice: Client, session_id: str) -> None:
    with working(system, "busy"):
        running = submit(alice, session_id, options=HELD)
        waiting = submit(alice, session_id)
        last = submit(alice, session_id)
        until(lambda: is_begun(alice, running))
        for request_id in (waiting, running):
            alice.ask("completion:cancel", request_id=request_id)
            assert alice.outcome(request_id)["status"] == "cancelled"
        assert (
            alice.outcome(last, timeout_s=5)["status"] == "completed"
        )  # its slot was free at once
        for request_id in (running, waiting, last):
            with pytest.raises(Conflict):
                alice.ask("completion:cancel", request_id=request_id)
        with pytest.raises(NotFound):
            alice.ask("completion:cancel", request_id="never")
        with system.client("bob") as bob, pytest.raises(Forbidden):
            bob.ask("completion:cancel", request_id=submit(alice, session_id, options=HELD))
        alice.ask("session:close", session_id=session_id)
    ends = [event for event, _ in said(system, session_id) if event != "completion:request"]
    assert ends == ["completion:cancelled", "completion:cancelled", "completion:result"]


def test_a_session_that_is_closed_ends_what_waits_and_runs_in_it(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "closing"):
        running = submit(alice, session_id, options=HELD)
        until(lambda: is_begun(alice, running))
        waiting = [submit(alice, session_id) for _ in range(20)]
        alice.ask("session:close", session_id=session_id)
        for request_id in (running, *waiting):
            outcome = alice.outcome(request_id, timeout_s=10)
            assert outcome["status"] == "cancelled"
            assert f"session {session_id} " in outcome["reason"]
            assert "closed" in outcome["reason"]
        with pytest.raises(Conflict, match="closed"):
            submit(alice, session_id)
        until(lambda: registered(alice)["closing"]["used"] == 0)
    assert {event for event, _ in said(system, session_id)} == {"completion:request"}


def test_a_session_that_is_transferred_keeps_its_queue_and_admits_its_new_owner(
    system: System, alice: Client
) -> None:
    made = alice.ask("session:create", admission="closed")
    session_id = made["session_id"]
    waiting = [submit(alice, session_id) for _ in range(3)]
    until(lambda: len(said(system, session_id)) == 3)
    alice.ask("session:transfer", session_id=session_id, to_agent="bob")
    with pytest.raises(Forbidden, match="admits nobody else"):
        submit(alice, session_id)
    with system.client("bob") as bob:
        bob.ask("completion:cancel", request_id=waiting[1], session_id=session_id)
        mine = submit(bob, session_id)
        with working(system, "inherited"):
            assert alice.outcome(waiting[2], timeout_s=10)["status"] == "completed"
            assert bob.outcome(mine, timeout_s=10)["status"] == "completed"
    until(lambda: len(said(system, session_id)) == 8)
    results = [request for event, request in said(system, session_id) if "result" in event]
    assert results == [waiting[0], waiting[2], mine]


@pytest.mark.parametrize("dies", [False, True])
def test_nothing_is_granted_before_the_owner_of_sessions_has_recorded_it(
    system: System, alice: Client, session_id: str, dies: bool
) -> None:
    closed = str(alice.ask("session:create")["session_id"])
    with working(system, "eager", slots=2):
        with paused(system, "sessions"):
            kept = submit(alice, session_id)
            lost = submit(alice, closed, requires="nobody")
            renewed = renewals(system)
            until(lambda: renewals(system) > renewed + 1)
            assert [state(alice, each) for each in (kept, lost)] == ["queued"] * 2
            alice.tell("session:close", session_id=closed)
            if dies:
                kill(system, "sessions")
        assert alice.outcome(kept, timeout_s=10)["status"] == "completed"
        outcome = alice.outcome(lost, timeout_s=10)
        assert (outcome["status"], "closed" in outcome["reason"]) == ("cancelled", True)
    until(lambda: len(said(system, session_id)) == 2)
    assert said(system, session_id) == [("completion:request", kept), ("completion:result", kept)]


def renewals(system: System) -> int:
    return sum(type(event) is WorkerRenewed for event in happened(system.var))


GONE = """
import os, sys
from ksi.transport import Client
client = Client("passing", var=sys.argv[1])
client.ask("completion:async", session_id=sys.argv[2], prompt="bye", request_id=sys.argv[3])
os._exit(9)
"""


def test_a_requester_that_goes_away_finds_the_outcome_when_it_is_back(
    system: System, session_id: str
) -> None:
    request_id = f"of-{session_id}"
    words = [sys.executable, "-P", "-c", GONE, str(system.var), session_id, request_id]
    assert subprocess.run(words, check=False, timeout=20).returncode == 9
    with working(system, "faithful"), system.client("passing") as passing:
        outcome = passing.outcome(request_id, timeout_s=10)
        assert outcome["result"]["response"] == "bye"
        again = submit(passing, session_id, prompt="bye", request_id=request_id)
        assert again == request_id  # and was not asked a second time
        until(lambda: len(said(system, session_id)) == 2)


def test_a_requester_hears_of_the_outcome_over_the_death_of_the_owner(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "patient"):
        request_id = submit(alice, session_id, options={"delay_s": 1.0})
        found: list[dict[str, Any]] = []
        waiting = threading.Thread(target=lambda: found.append(alice.outcome(request_id)))
        waiting.start()
        until(lambda: is_begun(alice, request_id))
        for _ in range(3):
            kill(system, "completion")
        waiting.join(20)
        assert [each["status"] for each in found] == ["completed"]


def test_waiting_for_an_outcome_ends_in_time_and_the_request_goes_on(
    alice: Client, session_id: str
) -> None:
    request_id = submit(alice, session_id, requires="nobody")
    with pytest.raises(Unavailable, match="it goes on"):
        alice.outcome(request_id, timeout_s=0.3)
    assert state(alice, request_id) == "queued"
    alice.ask("completion:cancel", request_id=request_id)
    with pytest.raises(NotFound):
        alice.outcome("never")


def test_a_report_without_a_grant_is_refused(
    system: System, alice: Client, session_id: str
) -> None:
    with working(system, "holder"), system.client("liar", role="worker") as liar:
        request_id = submit(alice, session_id, options=HELD)
        until(lambda: is_begun(alice, request_id))
        with pytest.raises(StaleEpoch):
            liar.ask("worker:report", request_id=request_id, attempt=7, result={})
        with pytest.raises(Forbidden):
            alice.ask("worker:report", request_id=request_id, attempt=1, result={})
        alice.ask("completion:cancel", request_id=request_id)
