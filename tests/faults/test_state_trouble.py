"""The state under trouble: many processes at one queue, an owner that is killed, lost watchers."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from system import System
from trouble import kill, living, until

from ksi.transport import AsyncClient, Client
from ksi.transport.errors import Conflict, KsiError, NotFound

PROCESSES = 8
CHANGED = ("a", "b", "c")

AT_THE_QUEUE = """
import asyncio, json, sys
from ksi.transport import AsyncClient
name, queue = sys.argv[1], {"namespace": "jobs", "key": "all"}
async def push(client, first, last):
    for start in range(first, last, 125):
        await asyncio.gather(*(
            client.ask("async_state:push", **queue, data=[name, n], timeout_s=60)
            for n in range(start, min(start + 125, last))
        ))
async def pop(client):
    taken = []
    while items := (await client.ask("async_state:pop", **queue, count=7, timeout_s=60))["items"]:
        taken += [item["data"] for item in items]
    return taken
async def main():
    async with AsyncClient(name) as client:
        for line in sys.stdin:
            said = await (push(client, *json.loads(line)) if line.strip() else pop(client))
            print(json.dumps(said), flush=True)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("state") / "var")
    yield running
    running.end()


@pytest.fixture
def crowd(system: System) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that push what they are told, or pop all they get."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AT_THE_QUEUE, f"p{number}"],
            env={**os.environ, "KSI_VAR": str(system.var)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    yield processes
    for each in processes:
        each.kill()
        each.communicate()


def tell(crowd: list[subprocess.Popen[str]], *lines: str) -> None:
    for each, line in zip(crowd, lines, strict=True):
        assert each.stdin is not None
        print(line, file=each.stdin, flush=True)


def heard(crowd: list[subprocess.Popen[str]]) -> list[Any]:
    return [json.loads(each.stdout.readline()) for each in crowd if each.stdout is not None]


def test_concurrent_pushes_from_eight_processes_are_popped_exactly_once_each(
    system: System, alice: Client, crowd: list[subprocess.Popen[str]]
) -> None:
    before = [0] * PROCESSES
    for count in (50, 5000):
        share = [count // PROCESSES + (each < count % PROCESSES) for each in range(PROCESSES)]
        upto = [first + many for first, many in zip(before, share, strict=True)]
        tell(crowd, *map(json.dumps, zip(before, upto, strict=True)))
        if count > 50:
            until(lambda: size(alice) > 0, 60.0)
            kill(system, "state")
        heard(crowd)
        assert size(alice) == count

        tell(crowd, *[""] * PROCESSES)
        if count > 50:
            until(lambda: size(alice) < 5000, 60.0)
            kill(system, "state")
        taken = Counter(tuple(each) for popped in heard(crowd) for each in popped)
        pushed = ((f"p{n}", each) for n in range(PROCESSES) for each in range(before[n], upto[n]))
        assert taken == Counter(pushed)
        assert size(alice) == 0
        before = upto


def size(client: Client) -> int:
    queue: dict[str, Any] = client.read("async_state:get_queue", namespace="jobs", key="all")
    return int(queue["size"])


def test_of_a_transaction_all_is_there_or_nothing_whenever_the_owner_is_killed(
    system: System, alice: Client
) -> None:
    transactions_and_kills(system, alice, kills=10)


@pytest.mark.soak
def test_of_a_transaction_all_is_there_or_nothing_in_a_hundred_kills(
    system: System, alice: Client
) -> None:
    transactions_and_kills(system, alice, kills=100)


def transactions_and_kills(system: System, alice: Client, kills: int) -> None:
    """Count up several keys at once while the owner is killed; nobody ever sees them differ."""
    over = threading.Event()
    failed: list[BaseException] = []
    done = [0]

    def count_up() -> None:
        try:
            with system.client("counter") as client:
                while not over.is_set():
                    done[0] += 1
                    client.ask("state:transaction", steps=steps(done[0]), timeout_s=30)
        except BaseException as failure:
            failed.append(failure)

    alice.ask("state:transaction", steps=steps(0))
    counter = threading.Thread(target=count_up)
    counter.start()
    chance = random.Random(1)

    def is_behind(count: int) -> bool:
        return done[0] > count or bool(failed)

    try:
        for _ in range(kills):
            until(partial(is_behind, done[0] + chance.randrange(3)), 30.0)
            kill(system, "state")
            assert len(values(alice)) == 1
            living(system, "state")
    finally:
        over.set()
        counter.join(60)
    assert not failed, failed
    assert values(alice) == {done[0]}
    print(f"{kills} kills, {done[0]} transactions, each whole or absent at any time")


def steps(number: int) -> list[dict[str, Any]]:
    return [
        {"operation": "state:set", "data": {"key": f"count/{key}", "value": number}}
        for key in CHANGED
    ]


def values(client: Client) -> set[int]:
    """Return the values of all the keys that are counted up, as one read sees them."""
    page = client.read("state:entity:query", type="value", where={"id": {"$prefix": "count/"}})
    assert page["count"] == len(CHANGED)
    return {each["properties"]["value"] for each in page["entities"]}


def test_a_watcher_misses_nothing_and_sees_nothing_twice_across_restarts_of_both(
    system: System, alice: Client
) -> None:
    begin = alice.read("state:changes")["revision"]

    def write() -> None:
        with system.client("writer") as client:
            for number in range(150):
                key = ("watched/a", "watched/b", "other")[number % 3]
                client.ask("state:set", key=key, value=number, timeout_s=30)

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[int] = []
    revision, chance = begin, random.Random(2)
    for turn in itertools.count():
        if len(seen) == 100:
            break
        with system.client("watcher") as client, client.watch("watched/", after=revision) as news:
            for _ in range(min(chance.randint(5, 30), 100 - len(seen))):
                change = news.next(20.0)
                seen.append(change["properties"]["value"])
                assert news.revision >= change["revision"]
                revision = change["revision"]
        if turn % 3 == 0:
            kill(system, "state")
    writer.join(60)
    assert seen == [number for number in range(150) if number % 3 < 2]
    with system.client("watcher") as client, client.watch("watched/", after=revision) as news:
        with pytest.raises(TimeoutError):
            news.next(0.05)
        assert news.revision >= revision


def test_an_async_watcher_hears_of_one_id_from_now_on(system: System) -> None:
    async def main() -> list[Any]:
        async with AsyncClient("watcher", var=system.var) as client:
            await client.ask("state:set", key="one", value=0)
            async with await client.watch(id="one") as news:
                for number in (1, 2):
                    await client.ask("state:set", key="two", value=number)
                    await client.ask("state:set", key="one", value=number)
                return [(await news.next(20.0))["properties"] for _ in range(2)]

    assert asyncio.run(main()) == [{"value": 1}, {"value": 2}]


def test_a_watch_of_what_is_not_kept_or_not_there_yet_is_refused(
    system: System, alice: Client
) -> None:
    revision = alice.ask("state:set", key="k", value=1)["revision"]
    with pytest.raises(Conflict, match="no revision"):
        alice.watch(after=revision + 1)


def test_what_lapses_in_a_queue_does_so_in_its_time_also_if_the_owner_was_killed(
    system: System, alice: Client
) -> None:
    queue: dict[str, Any] = {"namespace": "ttl", "key": "q"}
    begun_s = time.monotonic()
    alice.ask("async_state:push", **queue, data=1, ttl_seconds=1.0)
    kill(system, "state")
    until(lambda: alice.read("async_state:get_queue", **queue)["size"] == 0)
    assert time.monotonic() - begun_s >= 1.0
    assert alice.ask("async_state:pop", **queue)["items"] == []


def test_the_state_can_be_read_while_its_owner_is_dead_and_is_as_it_was(
    system: System, alice: Client
) -> None:
    made = alice.ask("state:entity:create", type="task", properties={"n": 1e300, "x": None})
    kill(system, "state")
    got = alice.read("state:entity:get", id=made["id"])
    assert got["properties"] == {"n": 1e300, "x": None}
    with pytest.raises(NotFound):
        alice.ask("state:entity:get", id="nobody")
    with pytest.raises(KsiError, match=r"revision \d+, not 1$"):
        alice.ask("state:entity:delete", id=made["id"], revision=1)
