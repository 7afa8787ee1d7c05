"""`AsyncClient` does what it says, for many callers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system import System
from trouble import entries, kill, kill_all, living, paused, paused_supervisor, rows, rss_mb, until

from ksi.actors.declarations.sessions import Append, Create
from ksi.actors.stat import read_stat
from ksi.transport import AsyncClient
from ksi.transport.errors import (
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    NotFound,
    NotOwner,
    NotRunning,
    StaleEpoch,
    Unavailable,
)
from ksi.transport.identity import KeyRing, run_directory
from ksi.transport.limits import MAILBOX_REQUESTS_MAX, WINDOW_COMMANDS_MAX
from ksi.transport.link import CREDIT, SILENCE_S


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("aclient") / "var")
    yield running
    running.end()


@pytest.fixture
def session(system: System) -> str:
    """A session of alice."""
    with system.client("alice") as client:
        return str(client.ask("session:create")["session_id"])


def alice(system: System) -> AsyncClient:
    return AsyncClient("alice", var=system.var)


async def note(client: AsyncClient, session_id: str, n: int = 0, **more: Any) -> dict[str, Any]:
    return await client.ask(
        "session:append", session_id=session_id, event="n", data={"n": n}, **more
    )


async def tell(client: AsyncClient, session_id: str, n: int = 0) -> None:
    await client.tell("session:append", session_id=session_id, event="n", data={"n": n})


def noted(system: System, session_id: str) -> list[int]:
    return [entry["data"]["n"] for entry in entries(system, session_id)]


async def unavailable(call: Any) -> Unavailable:
    """Return the error of a call that gets no answer in time."""
    with pytest.raises(Unavailable) as late:
        await call
    return late.value


# Asking


def test_asks_by_name_and_typed_answer_alike(system: System) -> None:
    async def main() -> None:
        async with alice(system) as client:
            named = await client.ask("session:create", {"title": "both"}, pattern="team")
            typed = await client.ask(Append(session_id=named["session_id"], event="n"))
            found = await client.read("session:get", session_id=typed.session_id)
            assert (typed.seq, found["title"], found["seq"]) == (1, "both", 1)
            with pytest.raises(Invalid, match="timeout_s"):
                await client.ask("session:create", timeout_s=float("inf"))

    asyncio.run(main())


def test_what_is_asked_in_one_turn_is_carried_out_in_order_and_shares_syncs(
    system: System, session: str
) -> None:
    def syncs() -> int:
        stat = read_stat(run_directory(system.var) / "sessions.stat")
        assert stat is not None
        return stat.syncs

    async def main() -> list[dict[str, Any]]:
        async with alice(system) as client:
            await client.ask("session:get", session_id=session)
            return await asyncio.gather(*(note(client, session, n) for n in range(64)))

    before = syncs()
    replies = asyncio.run(main())

    assert [reply["seq"] for reply in replies] == list(range(1, 65))
    assert noted(system, session) == list(range(64))
    assert syncs() - before <= 4


def test_more_than_a_window_of_callers_wait_for_each_other(system: System, session: str) -> None:
    count = 3 * WINDOW_COMMANDS_MAX

    async def main() -> set[int]:
        async with alice(system) as client:
            calls = (note(client, session, n, timeout_s=20.0) for n in range(count))
            return {reply["seq"] for reply in await asyncio.gather(*calls)}

    assert asyncio.run(main()) == set(range(1, count + 1))
    assert sorted(noted(system, session)) == list(range(count))


def test_a_refusal_reaches_its_caller_and_no_other(system: System, session: str) -> None:
    async def main() -> list[Any]:
        async with alice(system) as client:
            calls = [note(client, session if n % 3 else "nowhere", n) for n in range(30)]
            return [*await asyncio.gather(*calls, return_exceptions=True)]

    outcomes = asyncio.run(main())
    assert all(isinstance(each, NotFound) == (n % 3 == 0) for n, each in enumerate(outcomes))
    assert noted(system, session) == [n for n in range(30) if n % 3]


def test_a_caller_that_is_cancelled_leaves_the_others_in_peace(
    system: System, session: str
) -> None:
    async def main() -> None:
        async with alice(system) as client:
            with paused(system):
                calls = [asyncio.create_task(note(client, session, n)) for n in range(6)]
                await asyncio.sleep(0.05)  # They are sent, and not answered.
                calls[2].cancel()
            outcomes: list[Any] = [*await asyncio.gather(*calls, return_exceptions=True)]
            assert isinstance(outcomes[2], asyncio.CancelledError)
            assert [each["seq"] for n, each in enumerate(outcomes) if n != 2] == [1, 2, 4, 5, 6]

    asyncio.run(main())
    assert noted(system, session) == list(range(6))


# Telling


def test_what_was_told_is_on_disk_in_order_when_flush_returns(system: System, session: str) -> None:
    async def main() -> None:
        async with alice(system) as client:
            for n in range(300):
                await tell(client, session, n)
            await client.flush()
            assert noted(system, session) == list(range(300))

    asyncio.run(main())


def test_flush_and_close_raise_what_was_refused_and_say_goodbye(
    system: System, session: str
) -> None:
    async def main() -> None:
        client = AsyncClient("leaver", var=system.var)
        await tell(client, "nowhere")
        with pytest.raises(NotFound):
            await client.flush()
        await tell(client, "nowhere")
        await client.tell("session:create", session_id=session)
        with pytest.raises(ExceptionGroup) as several:
            await client.close()
        assert [type(each) for each in several.value.exceptions] == [NotFound, Conflict]

        async with AsyncClient("leaver", var=system.var) as client:
            await tell(client, "nowhere")
            raise ZeroDivisionError  # It is not replaced by what `close` would raise.

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    until(lambda: not rows(system, "sessions", "ksi.clients", ("leaver",)))


# An owner that does not answer


def test_a_reply_that_came_too_late_is_settled_by_its_ticket(system: System, session: str) -> None:
    async def main() -> None:
        async with alice(system) as client:
            await client.ask("session:get", session_id=session)
            with paused(system):
                error = await unavailable(note(client, session, timeout_s=0.05))
                late = await unavailable(client.settle(error.ticket, timeout_s=0.1))
                assert "still no answer" in late.text
            assert (await client.settle(error.ticket))["seq"] == 1
            with pytest.raises(NotFound, match="ticket"):
                await client.settle(error.ticket)

            with paused(system):
                error = await unavailable(note(client, session, timeout_s=0.05))
            await client.ask("session:list", limit=1)
            assert (await client.settle(error.ticket))["seq"] == 2

    asyncio.run(main())


def test_what_could_not_be_sent_in_its_time_expires_and_never_happens(
    system: System, session: str
) -> None:
    async def main() -> None:
        async with alice(system) as client:
            with paused_supervisor(system):
                kill(system)
                await unavailable(client.ask("session:get", session_id=session, timeout_s=0.05))
                error = await unavailable(note(client, session, timeout_s=0.05))
            with pytest.raises(Expired):
                await client.settle(error.ticket)

    asyncio.run(main())
    assert noted(system, session) == []


def test_an_owner_stopped_and_killed_under_load_doubles_and_loses_nothing(
    system: System, session: str
) -> None:
    async def main() -> None:
        async with alice(system) as client:
            for n in range(1000):
                await tell(client, session, n)
                if n % 250 == 100:
                    await asyncio.sleep(0.002)  # Some are on their way.
                    await asyncio.to_thread(kill, system)
                if n % 250 == 200:
                    with paused(system):
                        await asyncio.sleep(0.05)  # The sweep goes on.
            await client.flush(20.0)

    asyncio.run(main())
    assert noted(system, session) == list(range(1000))


def test_a_full_mailbox_is_busy_and_nothing_is_lost_or_reordered(system: System) -> None:
    """More than the mailbox of an owner takes is sent to it at once."""
    count = MAILBOX_REQUESTS_MAX // WINDOW_COMMANDS_MAX + 2

    async def main() -> list[str]:
        clients = [AsyncClient(f"full-{n}", var=system.var) for n in range(count)]
        created = await asyncio.gather(*(client.ask("session:create") for client in clients))
        sessions = [str(each["session_id"]) for each in created]
        with paused(system):
            for client, session in zip(clients, sessions, strict=True):
                for n in range(WINDOW_COMMANDS_MAX):
                    await tell(client, session, n)
            await asyncio.sleep(0.2)  # A turn of the loop sends them.
        for client in clients:
            await client.close(20.0)
        return sessions

    for session in asyncio.run(main()):
        assert noted(system, session) == list(range(WINDOW_COMMANDS_MAX))
    stat = read_stat(run_directory(system.var) / "sessions.stat")
    assert stat is not None
    assert stat.mailbox_peak == MAILBOX_REQUESTS_MAX


# Epochs


def test_a_former_epoch_is_refused_though_the_name_fits_again(system: System, session: str) -> None:
    async def main() -> None:
        async with alice(system) as client, AsyncClient("bob", var=system.var) as bob:
            mine = (await client.ask(Create())).session_id
            await client.ask("session:transfer", session_id=mine, to_agent="bob")
            with pytest.raises(NotOwner):
                await note(client, mine)
            await bob.ask("session:transfer", session_id=mine, to_agent="alice")
            with pytest.raises(StaleEpoch):
                await client.ask(Append(session_id=mine, event="n"))
            assert (await note(client, mine, epoch=3))["seq"] == 1

    asyncio.run(main())


def test_a_read_needs_no_owner_that_runs(system: System, session: str) -> None:
    async def main() -> None:
        async with alice(system) as client:
            await note(client, session, 7)
            with paused(system):
                found = await client.read("session:history", session_id=session)
                assert found["entries"][0]["data"] == {"n": 7}

    asyncio.run(main())


# Subscriptions


def test_deliveries_come_in_order_without_a_gap_to_a_reader_that_keeps_up(
    system: System, session: str
) -> None:
    count = 20 * CREDIT

    async def main() -> None:
        async with alice(system) as client, AsyncClient("bob", var=system.var) as bob:
            news = await bob.subscribe(f"session.{session}.appended")
            for start in range(0, count, 64):
                writing = asyncio.gather(*(note(client, session, start + n) for n in range(64)))
                for n in range(64):
                    heard = await news.next(5.0)
                    assert (heard.message["seq"], heard.gap) == (start + n + 1, 0)
                await writing

    asyncio.run(main())


def test_a_slow_reader_is_told_how_much_it_missed_and_costs_no_memory(
    system: System, session: str
) -> None:
    count = 20 * CREDIT

    async def main() -> None:
        async with alice(system) as client, AsyncClient("slow", var=system.var) as slow:
            news = await slow.subscribe(f"session.{session}.appended")
            before_mb = rss_mb(living(system))
            for n in range(count):
                await tell(client, session, n)
            await client.flush(20.0)
            held = slow._caller.links["sessions"].subscribed[1].arrived
            assert len(held) <= CREDIT
            told = 0
            while told < count:
                heard = await news.next(5.0)
                told += bool(heard.topic) + heard.gap
            assert told == heard.seq == count
            assert rss_mb(living(system)) - before_mb < 16

    asyncio.run(main())


def test_a_subscription_is_renewed_when_its_owner_was_killed_until_it_ends(
    system: System, session: str
) -> None:
    async def main() -> None:
        async with alice(system) as client, AsyncClient("bob", var=system.var) as bob:
            news = await bob.subscribe(f"session.{session}.>")
            await asyncio.to_thread(kill, system)
            await bob.ask("session:list", limit=1)
            await note(client, session)
            assert (await news.next(5.0)).message["seq"] == 1
            news.close()
            async with await bob.subscribe("session.elsewhere.>") as other:
                await note(client, session)
                with pytest.raises(TimeoutError):
                    await other.next(0.1)
            with pytest.raises(Invalid, match="pattern"):
                await bob.subscribe("session..x")
            assert bob._caller.links["sessions"].subscribed == {}

    asyncio.run(main())


def test_a_revoked_key_ends_its_subscriptions(system: System, session: str) -> None:
    async def main() -> None:
        async with AsyncClient("spy", var=system.var) as spy:
            news = await spy.subscribe("session.>")
            KeyRing(system.var).remove("spy")
            with pytest.raises(Forbidden):
                await spy.ask("session:create")
            await asyncio.to_thread(kill, system)
            with pytest.raises(Forbidden):
                await news.next(5.0)

    asyncio.run(main())


# Many, closed, alone


def test_many_clients_share_a_loop(system: System) -> None:
    async def one(number: int) -> str:
        async with AsyncClient(f"many-{number}", var=system.var) as client:
            created = await client.ask("session:create")
            await note(client, created["session_id"], number)
            return str(created["session_id"])

    async def main() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(40)))

    for number, session in enumerate(asyncio.run(main())):
        assert noted(system, session) == [number]


def test_who_waits_when_a_client_is_closed_is_told(system: System, session: str) -> None:
    async def main() -> None:
        client = alice(system)
        await client.ask("session:get", session_id=session)
        news = await client.subscribe("session.>")
        with paused(system):
            calls: list[Any] = [
                note(client, session, timeout_s=30.0),
                client.ask("session:get", session_id=session, timeout_s=30.0),
                news.next(),
            ]
            waiting = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0.05)  # They are sent, and not answered.
            await unavailable(client.close(0.05))
            async with asyncio.timeout(1.0):
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable] * 3
        for call in (
            client.ask("session:create"),
            client.tell("session:create"),
            client.subscribe("session.>"),
            news.next(),
        ):
            assert "closed" in (await unavailable(call)).text
        news.close()
        await client.close()

    asyncio.run(main())


def test_without_a_supervisor_a_client_says_so_soon_and_close_does_not_wait(
    tmp_path: Path,
) -> None:
    async def ask() -> None:
        async with AsyncClient("alice", var=tmp_path / "var") as client:
            await client.ask("session:create")

    with pytest.raises(NotRunning, match="no directory"):
        asyncio.run(ask())
    system = System(tmp_path / "var")
    asyncio.run(ask())
    kill_all(system)

    began_s = time.monotonic()
    with pytest.raises(NotRunning):
        asyncio.run(ask())
    assert time.monotonic() - began_s < 3 * SILENCE_S
