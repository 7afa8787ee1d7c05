"""`Client` does what it says, whatever becomes of the owner at the other end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from system import System
from trouble import entries, kill, kill_all, living, paused, paused_supervisor, rows, rss_mb, until

from ksi.actors.declarations.bus import ListWaiting
from ksi.actors.declarations.sessions import Append, Create, Get, ListSessions
from ksi.actors.owners import load
from ksi.actors.process import open_store
from ksi.storage.store import restore
from ksi.transport import Client
from ksi.transport.errors import (
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    NotFound,
    NotOwner,
    NotRunning,
    Restored,
    StaleEpoch,
    Unavailable,
    UnknownOperation,
)
from ksi.transport.identity import KeyRing
from ksi.transport.limits import WINDOW_COMMANDS_MAX
from ksi.transport.link import CREDIT, SILENCE_S, Delivery
from ksi.transport.message import encode


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("client") / "var")
    yield running
    running.end()


@pytest.fixture
def session(alice: Client) -> str:
    """A session of alice."""
    return str(alice.ask("session:create")["session_id"])


def note(client: Client, session_id: str, n: int = 0, **more: Any) -> dict[str, Any]:
    return client.ask("session:append", session_id=session_id, event="n", data={"n": n}, **more)


def tell(client: Client, session_id: str, n: int = 0) -> None:
    client.tell("session:append", session_id=session_id, event="n", data={"n": n})


def noted(system: System, session_id: str) -> list[int]:
    return [entry["data"]["n"] for entry in entries(system, session_id)]


# Asking


def test_an_operation_by_name_answers_with_a_dict_and_a_typed_one_with_its_reply(
    alice: Client,
) -> None:
    named = alice.ask("session:create", {"title": "both"}, pattern="team")
    typed = alice.ask(Get(session_id=named["session_id"]))

    assert (typed.title, typed.pattern, typed.owner) == ("both", "team", "alice")
    assert alice.ask("session:get", session_id=typed.session_id)["title"] == "both"
    assert alice.ask(Append(session_id=typed.session_id, event="n")).seq == 1


def test_what_cannot_be_asked_is_refused_before_anything_is_sent(alice: Client) -> None:
    note(alice, alice.ask("session:create")["session_id"])
    link = alice._caller.links["sessions"]
    before = link.window.acked

    with pytest.raises(UnknownOperation) as unknown:
        alice.ask("session:apend")
    with pytest.raises(Invalid, match="encoded"):
        alice.ask("session:create", title="\ud800")
    with pytest.raises(Invalid, match="timeout_s"):
        alice.ask("session:create", timeout_s=float("nan"))
    for what in ("session:create", Create()):
        with pytest.raises(Invalid, match="session:create is a command"):
            alice.read(what)
    for asked in ("session:list", ListSessions()):
        with pytest.raises(Invalid, match="session:list is a query"):
            alice.tell(asked)

    assert unknown.value.hint == "did you mean session:append?"
    assert (link.window.acked, link.window.commands) == (before, {})
    assert alice.ask("session:create")


def test_what_was_written_is_read_at_once(alice: Client, session: str) -> None:
    for n in range(1, 101):
        assert note(alice, session)["seq"] == n
        assert alice.read("session:get", session_id=session)["seq"] == n
        assert alice.ask("session:get", session_id=session)["seq"] == n


# Telling


def test_what_was_told_is_on_disk_in_order_when_flush_returns(
    system: System, alice: Client, session: str
) -> None:
    for n in range(300):
        tell(alice, session, n)
    alice.flush()

    assert noted(system, session) == list(range(300))


def test_flush_raises_what_was_refused_one_by_itself_and_several_together(
    system: System, alice: Client, session: str
) -> None:
    tell(alice, "nowhere")
    tell(alice, session, 1)
    with pytest.raises(NotFound):
        alice.flush()

    tell(alice, "nowhere")
    alice.tell("session:create", session_id=session)
    with pytest.raises(ExceptionGroup) as several:
        alice.flush()

    assert [type(each) for each in several.value.exceptions] == [NotFound, Conflict]
    alice.flush()
    assert noted(system, session) == [1]


def test_close_raises_what_was_refused_and_still_says_goodbye(system: System) -> None:
    client = system.client("leaver")
    client.ask("session:create")
    assert rows(system, "sessions", "ksi.clients", ("leaver",))
    tell(client, "nowhere")

    with pytest.raises(NotFound):
        client.close()

    until(lambda: not rows(system, "sessions", "ksi.clients", ("leaver",)))


def test_the_error_of_a_block_is_not_replaced_by_what_close_would_raise(system: System) -> None:
    def fail() -> None:
        with system.client("divider") as client:
            tell(client, "nowhere")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_a_full_window_holds_back_what_follows_and_lets_it_through_later(
    system: System, alice: Client, session: str
) -> None:
    with paused(system):
        for n in range(WINDOW_COMMANDS_MAX):
            tell(alice, session, n)
        with pytest.raises(Unavailable, match="was not sent"):
            note(alice, session, -1, timeout_s=0.1)
    tell(alice, session, WINDOW_COMMANDS_MAX)
    alice.flush()

    assert noted(system, session) == list(range(WINDOW_COMMANDS_MAX + 1))


# An owner that does not answer


def test_an_owner_that_was_stopped_answers_when_it_goes_on(
    system: System, alice: Client, session: str
) -> None:
    with paused(system) as pid:
        threading.Timer(0.3, os.kill, (pid, signal.SIGCONT)).start()
        assert note(alice, session)["seq"] == 1


def test_a_reply_that_came_too_late_is_settled_by_its_ticket(
    system: System, alice: Client, session: str
) -> None:
    with paused(system):
        with pytest.raises(Unavailable, match="may or may not") as late:
            note(alice, session, timeout_s=0.05)
        ticket = late.value.ticket
        with pytest.raises(Unavailable, match="still no answer"):
            alice.settle(ticket, timeout_s=0.05)

    assert alice.settle(ticket)["seq"] == 1
    with pytest.raises(NotFound, match="ticket"):
        alice.settle(ticket)


def test_a_ticket_is_settled_also_when_the_reply_has_come_before(
    system: System, alice: Client, session: str
) -> None:
    with paused(system), pytest.raises(Unavailable) as late:
        alice.ask("session:create", session_id=f"{session}-2", timeout_s=0.05)
    assert note(alice, session)["seq"] == 1

    assert alice.settle(late.value.ticket)["epoch"] == 1
    with system.client("operator", role="operator") as operator:
        operator.ask("session:claim", session_id=f"{session}-2")
    with pytest.raises(StaleEpoch):  # The epoch it carries is the one it learnt by settling.
        note(alice, f"{session}-2")


def test_what_could_not_be_sent_in_its_time_expires_and_never_happens(
    system: System, alice: Client, session: str
) -> None:
    with paused_supervisor(system):
        kill(system)
        with pytest.raises(Unavailable):
            alice.ask("session:get", session_id=session, timeout_s=0.05)
        with pytest.raises(Unavailable) as late:
            note(alice, session, timeout_s=0.05)

    with pytest.raises(Expired):
        alice.settle(late.value.ticket)
    assert noted(system, session) == []


def test_an_owner_killed_before_it_answers_doubles_and_loses_nothing(
    system: System, alice: Client, session: str
) -> None:
    for n in range(5):
        with paused(system):
            tell(alice, session, n)  # It lies in the socket of a process that will not read it.
            kill(system)
        alice.flush()

    assert noted(system, session) == list(range(5))


def test_an_owner_killed_while_a_thousand_are_in_flight_doubles_and_loses_nothing(
    system: System, alice: Client, session: str
) -> None:
    for n in range(1000):
        tell(alice, session, n)
        if n % 300 == 299:
            kill(system)
    alice.flush(20.0)

    assert noted(system, session) == list(range(1000))


def test_a_connection_too_crowded_for_another_frame_is_used_again(
    system: System, alice: Client, session: str
) -> None:
    with paused(system):
        for _ in range(6000):
            with pytest.raises(Unavailable):
                alice.ask("session:get", session_id=session, timeout_s=0)

    assert alice.ask("session:get", session_id=session)["owner"] == "alice"


def test_after_a_restore_what_was_unanswered_is_lost_and_said_to_be(tmp_path: Path) -> None:
    system = System(tmp_path / "var")
    directory = system.var / "db" / "sessions"
    try:
        with system.client("alice") as alice:
            session = alice.ask("session:create")["session_id"]
            system.stop()
            store, _ = open_store(load("sessions"), directory, None)
            store.snapshot(tmp_path / "snapshot")
            store.close()
            tell(alice, session, 1)
            restore(directory, tmp_path / "snapshot")
            system.start()

            with pytest.raises(Restored):
                alice.flush()
            assert noted(system, session) == []
            assert note(alice, session, 2)["seq"] == 1
    finally:
        system.end()


# Epochs


def test_a_former_epoch_is_refused_though_the_name_fits_again(
    system: System, alice: Client, session: str
) -> None:
    with system.client("bob") as bob:
        alice.ask("session:transfer", session_id=session, to_agent="bob")
        with pytest.raises(NotOwner) as stranger:
            note(alice, session)
        bob.ask("session:transfer", session_id=session, to_agent="alice")
        with pytest.raises(NotOwner):
            note(bob, session)

    with pytest.raises(StaleEpoch) as stale:
        note(alice, session)
    with pytest.raises(StaleEpoch):
        alice.ask(Append(session_id=session, event="n"))

    assert stranger.value.details == {"owner": "bob", "epoch": 2}
    assert stale.value.details == {"owner": "alice", "epoch": 3}
    assert note(alice, session, epoch=3)["seq"] == 1
    assert alice.ask(Append(session_id=session, event="n", epoch=3)).seq == 2


def test_the_epoch_of_a_typed_create_is_carried_as_well(system: System, alice: Client) -> None:
    session = alice.ask(Create()).session_id
    with system.client("operator", role="operator") as operator:
        operator.ask("session:claim", session_id=session)
        operator.ask("session:transfer", session_id=session, to_agent="alice")

    with pytest.raises(StaleEpoch):
        note(alice, session)


# Reading in place


def test_a_read_needs_no_owner_that_runs(system: System, alice: Client, session: str) -> None:
    note(alice, session, 7)
    with paused(system):
        assert noted(system, session) == [7]
        assert alice.read(Get(session_id=session)).seq == 1
    system.stop()
    try:
        assert noted(system, session) == [7]
        with pytest.raises(NotRunning):
            system.client("late").ask("session:create")
    finally:
        system.start()
    assert note(alice, session, 8)["seq"] == 2


def test_a_read_is_refused_as_the_owner_would(alice: Client) -> None:
    with pytest.raises(NotFound):
        alice.read("session:get", session_id="nowhere")
    for wrong in ("../x", "a\0b", "", "x" * 4096, 5, None, "\ud800"):
        with pytest.raises(Invalid):
            alice.read("session:get", session_id=wrong)


def test_what_is_for_one_agent_is_shown_to_it_and_to_operators_alone(
    system: System, alice: Client
) -> None:
    alice.ask("message:subscribe", durable="inbox", pattern="inbox")
    with (
        system.client("bob") as bob,
        system.client("will", role="worker") as will,
        system.client("op", role="operator") as operator,
    ):
        mine: dict[str, Any] = {"agent_id": "alice", "durable": "inbox"}
        grants = {"worker": "willa"}
        for who in (alice, operator):
            for look in (who.ask, who.read):
                assert look("message:waiting", mine)["messages"] == []
        assert operator.read("worker:grants", grants)["grants"] == []
        assert will.ask("worker:grants", worker="will")["grants"] == []
        for look in (bob.ask, bob.read):
            with pytest.raises(Forbidden, match="for alice and operators, not for bob"):
                look("message:waiting", mine)
            with pytest.raises(Forbidden, match="bob is agent"):
                look("worker:grants", grants)
        for look in (will.ask, will.read):
            with pytest.raises(Forbidden, match="not for will"):
                look("worker:grants", grants)
        with pytest.raises(Forbidden, match="not for bob"):
            bob.read(ListWaiting(agent_id="alice", durable="inbox"))


# Subscriptions


def test_deliveries_come_in_order_and_say_from_whom(
    system: System, alice: Client, session: str
) -> None:
    with system.client("bob") as bob, bob.subscribe(f"session.{session}.*") as news:
        heard = []
        for n in range(600):
            tell(alice, session, n)
            if n % 100 == 99:
                heard += [news.next(5.0) for _ in range(100)]
        alice.ask("session:transfer", session_id=session, to_agent="bob")
        heard.append(news.next(5.0))

    topic = f"session.{session}.appended"
    first = Delivery(topic, "alice", 1, 0, encode({"session_id": session, "seq": 1}))
    assert heard[0] == first
    assert [each.message["seq"] for each in heard[:600]] == list(range(1, 601))
    assert [each.seq for each in heard] == list(range(1, 602))
    assert heard[600].topic == f"session.{session}.transferred"
    assert not any(each.gap for each in heard)


def test_a_slow_reader_is_told_how_much_it_missed_and_costs_no_memory(
    system: System, alice: Client, session: str
) -> None:
    count = 20 * CREDIT
    with system.client("slow") as slow, slow.subscribe(f"session.{session}.appended") as news:
        note(alice, session)
        before_mb = rss_mb(living(system))
        for n in range(1, count):
            tell(alice, session, n)
        alice.flush()
        held = slow._caller.links["sessions"].subscribed[1].arrived
        until(lambda: len(held) == CREDIT)

        heard = [news.next(5.0)]
        while heard[-1].seq < count:
            heard.append(news.next(5.0))
        note(alice, session)
        last = news.next(5.0)

    assert [each.seq for each in heard[:CREDIT]] == list(range(1, CREDIT + 1))
    assert heard[CREDIT].gap == count - CREDIT
    assert sum(bool(each.topic) + each.gap for each in heard) == count
    assert (last.seq, last.gap) == (count + 1, 0)
    assert rss_mb(living(system)) - before_mb < 16


def test_a_subscription_is_renewed_when_its_owner_was_killed(
    system: System, alice: Client, session: str
) -> None:
    with system.client("bob") as bob, bob.subscribe(f"session.{session}.>") as news:
        for _ in range(3):
            kill(system)
            until(lambda: bob._caller.links["sessions"].up)
            bob.ask("session:list", limit=1)  # What was sent before it, it has taken before it.
            seq = note(alice, session)["seq"]
            heard = news.next(5.0)
            assert (heard.message["seq"], heard.seq, heard.gap) == (seq, 1, 0)


def test_a_subscription_that_ended_hears_nothing_nor_does_what_was_for_it_reach_the_next(
    system: System, alice: Client, session: str
) -> None:
    other = alice.ask("session:create")["session_id"]
    with system.client("bob") as bob:
        for _ in range(5):
            former = bob.subscribe(f"session.{session}.>")
            for n in range(50):
                tell(alice, session, n)
            alice.flush()
            former.close()
            with bob.subscribe(f"session.{other}.>") as news:
                note(alice, other)
                assert news.next(5.0).message["session_id"] == other
                with pytest.raises(TimeoutError):
                    news.next(0.01)


def test_a_pattern_that_is_none_is_refused(alice: Client) -> None:
    for pattern in ("session..x", "session.", "session." + "x" * 600):
        with pytest.raises(Invalid, match="pattern"):
            alice.subscribe(pattern)
    with alice.subscribe("session.>"):
        pass


def test_a_revoked_key_is_refused_and_hears_nothing_more(system: System, alice: Client) -> None:
    with system.client("spy") as spy, spy.subscribe("session.>") as news:
        alice.ask("session:create")
        news.next(5.0)
        KeyRing(system.var).remove("spy")
        for _ in range(3):
            alice.ask("session:create")
        with pytest.raises(Forbidden):
            spy.ask("session:create")
        with pytest.raises(TimeoutError):
            news.next(0.05)
        kill(system)  # The connection that comes next is not let in.
        with pytest.raises(Forbidden):
            news.next(5.0)
        with pytest.raises(Forbidden):
            spy.ask("session:create")
    with pytest.raises(Forbidden, match="revoked"):
        system.client("spy")


# Many, shared, closed


def test_many_clients_live_in_one_process(system: System) -> None:
    clients = [system.client(f"many-{n}") for n in range(40)]
    sessions = [client.ask("session:create")["session_id"] for client in clients]
    for client, session in zip(clients, sessions, strict=True):
        tell(client, session)
    for client in clients:
        client.close()

    assert len({*sessions}) == 40
    assert all(noted(system, session) == [0] for session in sessions)


def test_threads_share_a_client_and_each_gets_its_own_replies(
    system: System, alice: Client, session: str
) -> None:
    def ask(thread: int) -> list[int]:
        mine = alice.ask("session:create", title=f"of {thread}")["session_id"]
        for n in range(50):
            tell(alice, session, thread * 100 + n)
        return [note(alice, mine)["seq"] for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [list(range(1, 51))] * 4
    alice.flush()

    found = noted(system, session)
    assert len(found) == 200
    for thread in range(4):
        of_thread = [n for n in found if n // 100 == thread]
        assert of_thread == [thread * 100 + n for n in range(50)]


def test_a_thread_that_listens_does_not_hold_up_one_that_asks(alice: Client, session: str) -> None:
    heard: list[Delivery] = []

    def listen() -> None:
        while len(heard) < 100:
            heard.append(news.next(10.0))

    with alice.subscribe(f"session.{session}.>") as news:
        listener = threading.Thread(target=listen)
        listener.start()
        began_s = time.monotonic()
        for n in range(100):
            note(alice, session, n)
        spent_s = time.monotonic() - began_s
        listener.join()

    assert [each.message["seq"] for each in heard] == list(range(1, 101))
    assert spent_s < 2.0  # A hundred times the keeper's interval, as it was once.


def test_a_closed_client_says_so(system: System) -> None:
    client = system.client("closer")
    news = client.subscribe("session.>")
    client.close()
    client.close()

    for call in (
        lambda: client.ask("session:create"),
        lambda: client.tell("session:create"),
        lambda: client.subscribe("session.>"),
        lambda: news.next(1.0),
    ):
        with pytest.raises(Unavailable, match="closed"):
            call()
    news.close()


# Nobody there


def test_without_a_supervisor_a_client_says_so_soon_and_close_does_not_wait(
    tmp_path: Path,
) -> None:
    system = System(tmp_path / "var")
    with system.client("alice") as alice:
        alice.ask("session:create")
    kill_all(system)

    began_s = time.monotonic()
    with pytest.raises(NotRunning), system.client("alice") as alice:
        alice.ask("session:create")
    assert time.monotonic() - began_s < 3 * SILENCE_S

    began_s = time.monotonic()
    with pytest.raises(NotRunning), system.client("alice") as alice:
        alice.subscribe("session.>")
    assert time.monotonic() - began_s < 3 * SILENCE_S


def test_a_wrong_var_is_not_running_and_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for wrong in (tmp_path / "nowhere", file):
        with pytest.raises(NotRunning, match="no directory"):
            Client("alice", var=wrong)
    with Client("alice", var=tmp_path) as client:
        with pytest.raises(NotRunning, match="nothing runs"):
            client.ask("session:create")
        with pytest.raises(NotRunning):
            client.read("session:list")

    assert file.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_names_that_are_none_or_reserved_are_refused(system: System) -> None:
    for name in ("", "../x", "a/b", "a\0b", "x" * 129, ".hidden", "a\n"):
        with pytest.raises(Invalid):
            Client(name, var=system.var)
    for name in ("sessions", "registry", "supervisor", "bus"):
        with pytest.raises(Forbidden, match="owner"):
            Client(name, var=system.var)
