"""The bus under trouble: readers that stop, owners that are killed, messages nobody wants."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from system import System
from trouble import COMMANDS, REPLIES, Stranger, kill, living, pack, rss_mb, until

from ksi.transport import AsyncClient, Client
from ksi.transport.errors import Forbidden, Invalid, NotFound, Unavailable
from ksi.transport.link import CREDIT

MANY = 20_000

READER = """
import sys
from ksi.transport import Client
with Client("stopped") as client, client.subscribe("flood.*") as news:
    print("listening", flush=True)
    heard = missed = 0
    while heard + missed < int(sys.argv[1]):
        delivery = news.next(30.0)
        heard += bool(delivery.topic)
        missed += delivery.gap
    print(heard, missed, flush=True)
"""

CRASHING = """
import os
from ksi.transport import Client
with Client("worker") as client, client.subscribe("jobs.>", durable="w") as jobs:
    jobs.next(10.0).ack()
    client.flush()
    jobs.next(10.0)
    os._exit(1)
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("bus") / "var")
    yield running
    running.end()


def process(system: System, code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "KSI_VAR": str(system.var)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def say(client: Client, topic: str, n: int) -> None:
    client.tell("message:publish", topic=topic, message={"n": n})


def refusing_once(ask: Any, operation: str) -> Any:
    """Return `ask` that is not answered the first time it is for `operation`."""
    refused: list[str] = []

    def asking(asked: str, *words: Any, **fields: Any) -> Any:
        if asked == operation and not refused:
            refused.append(asked)
            raise Unavailable("no answer")
        return ask(asked, *words, **fields)

    return asking


# Readers.


def test_messages_whose_handing_out_was_not_answered_are_not_passed_over(
    system: System, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(client: Any) -> None:
        monkeypatch.setattr(client, "ask", refusing_once(client.ask, "message:receive"))

    async def read_on() -> int:
        async with (
            AsyncClient("patient", var=system.var) as client,
            await client.subscribe("patience.>", durable="d") as news,
        ):
            fails(client)
            with pytest.raises(Unavailable):
                await news.next(5.0)
            return int((await news.next(5.0)).message["n"])

    with system.client("patient") as client, client.subscribe("patience.>", durable="d") as news:
        alice.ask("message:publish", topic="patience.a", message={"n": 7})
        fails(client)
        with pytest.raises(Unavailable):
            news.next(5.0)
        assert news.next(5.0).message == {"n": 7}
    assert asyncio.run(read_on()) == 7


def test_a_stopped_reader_misses_what_is_beyond_its_credit_knows_it_and_harms_nobody(
    system: System, alice: Client
) -> None:
    stopped = process(system, READER, str(MANY))
    assert stopped.stdout is not None
    try:
        assert stopped.stdout.readline() == "listening\n"
        with system.client("bob") as bob, bob.subscribe("flood.*") as news:
            say(alice, "flood.a", 0)
            assert news.next(5.0).message == {"n": 0}
            before_mb = rss_mb(living(system, "bus"))
            os.kill(stopped.pid, signal.SIGSTOP)
            heard: list[Any] = []
            step = CREDIT // 2  # So much is granted however little of the rest was taken.
            for start in range(1, MANY, step):
                for n in range(start, min(start + step, MANY)):
                    say(alice, "flood.a", n)
                while len(heard) < min(start + step, MANY) - 1:
                    heard += news.take(10.0)
            assert [each.message["n"] for each in heard] == list(range(1, MANY))
            assert not any(each.gap for each in heard)
            assert rss_mb(living(system, "bus")) - before_mb < 16
        os.kill(stopped.pid, signal.SIGCONT)
        took, missed = map(int, stopped.stdout.readline().split())
        assert took + missed == MANY
        assert missed > MANY - 4 * CREDIT
    finally:
        stopped.kill()
        stopped.wait()
        stopped.stdout.close()


def test_a_pattern_that_matches_everything_hears_all_that_is_published_and_no_direct_message(
    system: System, alice: Client
) -> None:
    with system.client("nosy") as nosy, nosy.subscribe(">") as everything:
        nosy.ask("message:subscribe", durable="inbox", pattern="inbox")
        for n, topic in enumerate(("a", "a.b", "c.d.e")):
            say(alice, topic, n)
        alice.ask("agent:send_message", to_agent="nosy", message={"secret": True})
        say(alice, "z", 3)
        heard = [everything.next(5.0) for _ in range(5)]
    topics = [each.topic for each in heard]
    assert topics == ["a", "a.b", "c.d.e", "message.nosy.inbox", "z"]
    assert heard[3].message.keys() == {"message_id", "in_reply_to"}


def test_a_message_to_nobody_is_accepted_and_to_no_agent_refused(alice: Client) -> None:
    assert alice.ask("message:publish", topic="nobody.cares", message={}) == {}
    with pytest.raises(NotFound, match="no agent ghost"):
        alice.ask("agent:send_message", to_agent="ghost", message={})


def test_many_senders_are_each_heard_in_their_order(system: System) -> None:
    senders, each_says = 4, 500

    async def say_all(name: str) -> None:
        async with AsyncClient(name, var=system.var) as client:
            for n in range(each_says):
                await client.tell("message:publish", topic=f"order.{name}", message={"n": n})

    async def hear() -> dict[str, list[int]]:
        heard: dict[str, list[int]] = {}
        async with (
            AsyncClient("ear", var=system.var) as client,
            await client.subscribe("order.>", credit=4096) as news,
        ):
            talking = asyncio.gather(*(say_all(f"sender-{n}") for n in range(senders)))
            while sum(map(len, heard.values())) < senders * each_says:
                for each in await news.take(10.0):
                    assert each.gap == 0
                    heard.setdefault(each.sender, []).append(each.message["n"])
            await talking
        return heard

    heard = asyncio.run(hear())
    assert heard == {f"sender-{n}": list(range(each_says)) for n in range(senders)}


# Bad input.


def test_garbage_for_a_message_is_passed_on_and_harms_neither_the_bus_nor_who_hears_it(
    system: System, alice: Client
) -> None:
    with (
        system.client("victim") as victim,
        victim.subscribe("evil.*") as news,
        Stranger(system.var, "eve", owner="bus") as eve,
    ):
        bad = b"\x82\xa5topic\xa6evil.x\xa7message\x81\xa1n\xa2\xff\xff"
        assert eve.ask(COMMANDS, [[1, "message:publish", bad]])[0] == REPLIES
        torn = pack({"topic": "evil.y", "message": {}})[:-1] + b"\x8f"
        assert eve.error(2, "message:publish", torn)[0] == "invalid"
        assert eve.error(3, "message:publish", pack({"topic": "evil.y"}))[0] == "invalid"
        forged = pack({"topic": "evil.y", "message": {}, "sender": "alice"})
        assert eve.error(4, "message:publish", forged)[0] == "invalid"
        say(alice, "evil.z", 1)
        first, second = news.next(5.0), news.next(5.0)
    assert (first.sender, second.sender) == ("eve", "alice")
    with pytest.raises(Invalid, match="eve sent"):
        _ = first.message
    assert second.message == {"n": 1}


def test_a_signal_is_numbered_with_commands_and_passed_on_once_however_often_it_is_sent(
    system: System,
) -> None:
    with (
        system.client("once") as once,
        once.subscribe("once.*") as news,
        Stranger(system.var, "twice", owner="bus") as peer,
    ):
        publish = [
            [n, "message:publish", pack({"topic": "once.x", "message": {"n": n}})] for n in (1, 3)
        ]
        keep = [2, "message:subscribe", pack({"durable": "inbox", "pattern": "inbox"})]
        for again in (False, True):
            kind, answers = peer.ask(COMMANDS, [publish[0], keep, publish[1]], again=again)
            assert kind == REPLIES
            assert [number for number, *_ in answers] == [1, 2, 3]
            assert answers[0][1] == answers[2][1] == pack({})
        peer.ask(COMMANDS, [[4, "message:publish", pack({"topic": "once.y", "message": {}})]])
        heard = [news.next(5.0) for _ in range(3)]
    assert [each.message.get("n") for each in heard] == [1, 3, None]


# Owners and readers that are killed.


def test_a_durable_subscription_loses_nothing_however_often_the_bus_is_killed(
    system: System, alice: Client
) -> None:
    total, stop = count(), threading.Event()
    accepted: list[int] = []

    def publish() -> None:
        while not stop.is_set():
            n = next(total)
            alice.ask("message:publish", topic="kept.x", message={"n": n}, timeout_s=20.0)
            accepted.append(n)

    with system.client("keeper") as keeper, keeper.subscribe("kept.>", durable="all") as kept:
        publisher = threading.Thread(target=publish)
        publisher.start()
        got: list[int] = []
        for kills in range(1, 6):
            while len(got) < kills * 20:
                delivery = kept.next(20.0)
                got.append(delivery.message["n"])
                delivery.ack()
            kill(system, "bus")
        stop.set()
        publisher.join()
        while len(got) < len(accepted):
            got.append(kept.next(20.0).message["n"])
    assert got == sorted(set(got)) == accepted


def test_a_reader_that_died_gets_again_what_it_has_not_acknowledged_and_is_told(
    system: System, alice: Client
) -> None:
    with system.client("worker") as worker, worker.subscribe("jobs.>", durable="w"):
        pass
    for n in range(4):
        reply = alice.ask("message:publish", topic="jobs.x", message={"n": n})
        assert reply["kept_for"] == 1
    crashed = process(system, CRASHING)
    crashed.communicate(timeout=30)
    assert crashed.returncode == 1
    late = alice.ask("message:publish", topic="jobs.x", message={"n": 4})
    assert late["kept_for"] == 1

    with system.client("worker") as worker, worker.subscribe("jobs.>", durable="w") as jobs:
        again = [jobs.next(5.0) for _ in range(4)]
        assert [each.message["n"] for each in again] == [1, 2, 3, 4]
        assert [each.redelivered for each in again] == [True, True, True, False]
        for each in again:
            each.ack()
        with pytest.raises(TimeoutError):
            jobs.next(0.1)
        worker.flush()
        held = worker.read("message:subscriptions", agent_id="worker")["subscriptions"]
    assert [each["waiting"] for each in held] == [0]


def test_a_live_subscription_is_renewed_when_the_bus_was_killed(
    system: System, alice: Client
) -> None:
    with system.client("bob") as bob, bob.subscribe("live.*") as news:
        say(alice, "live.x", 1)
        alice.flush(5.0)  # One that is not acknowledged when the bus ends may be passed on again.
        assert news.next(5.0).message == {"n": 1}
        kill(system, "bus")

        def heard() -> Any:  # Signals are for who listens now: until it does again, nobody.
            alice.ask("message:publish", topic="live.x", message={"n": 2}, timeout_s=20.0)
            with suppress(TimeoutError):
                return news.next(0.05)

        assert until(heard).message == {"n": 2}


def test_a_question_is_answered_though_the_bus_is_killed_in_between(
    system: System, alice: Client
) -> None:
    def answer() -> None:
        with system.client("oracle") as oracle, oracle.inbox() as inbox:
            ready.set()
            question = inbox.next(20.0)
            kill(system, "bus")
            oracle.ask(
                "agent:send_message",
                to_agent=question.sender,
                message={"answer": question.message["n"] + 1},
                in_reply_to=question.message_id,
                timeout_s=20.0,
            )
            question.ack()

    ready = threading.Event()
    oracle = threading.Thread(target=answer)
    oracle.start()
    assert ready.wait(10.0)
    reply = alice.request("oracle", {"n": 41}, timeout_s=20.0)
    oracle.join()
    assert (reply.sender, reply.message) == ("oracle", {"answer": 42})


def test_a_question_nobody_answers_ends_in_time_and_waits_for_the_other(
    system: System, alice: Client
) -> None:
    with system.client("mute") as mute:
        mute.ask("agent:register")
        with pytest.raises(Unavailable, match="did not answer message"):
            alice.request("mute", {"n": 1}, timeout_s=0.05)
        with mute.inbox() as inbox:
            assert inbox.next(5.0).message == {"n": 1}


def test_an_answer_by_somebody_else_is_no_answer_and_stays_in_the_inbox(system: System) -> None:
    async def talk(ann: AsyncClient, asking: Any, to_agent: str) -> list[Any]:
        async with (
            AsyncClient(to_agent, var=system.var) as asked,
            AsyncClient("mallory", var=system.var) as mallory,
            await asked.inbox() as inbox,
        ):
            await asked.ask("agent:register")
            answer = asyncio.create_task(asking(to_agent, {"n": 2}))
            question = await inbox.next(5.0)
            for client in (mallory, asked):
                fields = {"to_agent": "ann", "in_reply_to": question.message_id}
                await client.ask("agent:send_message", fields, message={"by": client.name})
            found = (await answer).sender
            async with await ann.inbox() as left:
                other = await left.next(5.0)
                await other.ack()
            return [found, other.sender]

    async def both() -> list[Any]:
        with system.client("ann") as waiting:
            request: Any = waiting.request
            async with AsyncClient("ann", var=system.var) as ann:
                there = await talk(ann, partial(asyncio.to_thread, request), "tim")
                return there + await talk(ann, ann.request, "jim")

    assert asyncio.run(both()) == ["tim", "mallory", "jim", "mallory"]


def test_async_readers_acknowledge_and_ask_alike(system: System) -> None:
    async def talk() -> list[Any]:
        async with (
            AsyncClient("ann", var=system.var) as ann,
            AsyncClient("tom", var=system.var) as tom,
            await tom.inbox() as inbox,
            await tom.subscribe("tasks.>", durable="t") as tasks,
        ):
            await ann.ask("message:publish", topic="tasks.1", message={"n": 1})
            task = await tasks.next(5.0)
            await task.ack()
            asked = asyncio.create_task(ann.request("tom", {"n": 2}))
            question = await inbox.next(5.0)
            await question.ack()
            reply = {"to_agent": "ann", "message": {"n": 3}, "in_reply_to": question.message_id}
            await tom.ask("agent:send_message", reply)
            answer = await asked
            await tom.flush()
            held = await tom.read("message:subscriptions", agent_id="tom")
            return [task.message, question.message, answer.message, held["subscriptions"]]

    *messages, held = asyncio.run(talk())
    assert messages == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [each["waiting"] for each in held] == [0, 0]


def test_nobody_acknowledges_or_ends_what_is_anothers(system: System, alice: Client) -> None:
    with system.client("mine") as mine, mine.subscribe("own.>", durable="d"):
        with pytest.raises(NotFound):
            alice.ask("message:ack", durable="d", message_ids=[1])
        with pytest.raises(Forbidden):
            alice.ask("message:unsubscribe", durable="d", agent_id="mine")


def test_what_waits_survives_a_stop_and_a_start(tmp_path: Path) -> None:
    system = System(tmp_path / "var")
    try:
        with system.client("alice") as alice, system.client("bob") as bob:
            bob.ask("message:subscribe", durable="d", pattern="a.>")
            alice.ask("message:publish", topic="a.b", message={"n": 1})
        system.stop()
        system.start()
        with system.client("bob") as bob, bob.subscribe("a.>", durable="d") as kept:
            delivery = kept.next(5.0)
            assert (delivery.message, delivery.redelivered) == ({"n": 1}, False)
    finally:
        system.end()
