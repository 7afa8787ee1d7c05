"""Many agents, many workers, many kills: one grant a session, one result a request, in order.

The journal of the owner of completions is the witness: its events say when each grant began and
ended. `KSI_SEED=... bin/test tests/faults` repeats the choices of a storm.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from system import System
from trouble import entries, until
from workers import (
    WorkerProcess,
    happened,
    registered,
    require_one_at_a_time,
    working,
)

from ksi.actors.declarations.completion import Granted, Queued
from ksi.transport import AsyncClient
from ksi.transport.limits import LAPSES_MAX

AGENTS, EACH = 20, 100
PATIENCE_S = 120.0
SUBMIT_SAME = """
import sys
from ksi.transport import Client
with Client("quadruple", var=sys.argv[1]) as client:
    for _ in range(25):
        fields = dict(session_id=sys.argv[2], prompt="once", request_id="the-same")
        print(client.ask("completion:async", fields))
    print(client.outcome("the-same")["result"])
"""


def test_twenty_agents_queue_on_one_session_and_are_answered_in_the_order_accepted(
    system: System,
) -> None:
    with working(system, "w1", "w2", slots=2, lease="15s"):
        beside = asyncio.run(agents_at_once(system))
    events = happened(system.var)
    done = [each for each in require_one_at_a_time(events) if not each.startswith("beside")]
    accepted = [each.request_id for each in events if type(each) is Queued]
    assert done == [each for each in accepted if not each.startswith("beside")]
    for agent in range(AGENTS):
        mine = [each for each in done if each.startswith(f"a{agent}-")]
        assert mine == [f"a{agent}-{n}" for n in range(EACH)]
    assert max(beside) < len(done), "other sessions waited for this one"
    until(lambda: len(entries(system, "shared")) == 2 * AGENTS * EACH)
    said = [(each["event"], each["correlation_id"]) for each in entries(system, "shared")]
    for name in ("request", "result"):
        assert [request for event, request in said if event == f"completion:{name}"] == done


async def agents_at_once(system: System) -> list[int]:
    """Let agents submit at once; return how many results the session had when others had theirs."""
    clients = [AsyncClient(f"agent-{n}", var=system.var) for n in range(AGENTS)]
    async with AsyncClient("aside", var=system.var) as aside:
        await aside.ask("session:create", session_id="shared")
        others = [f"other-{n}" for n in range(4)]
        for each in others:
            await aside.ask("session:create", session_id=each)
        fields: dict[str, Any] = {"session_id": "shared", "prompt": "x"}
        await asyncio.gather(
            *(
                client.ask(
                    "completion:async",
                    {**fields, "request_id": f"a{n}-{each}"},
                    timeout_s=PATIENCE_S,
                )
                for n, client in enumerate(clients)
                for each in range(EACH)
            )
        )
        reached = []
        for n, session_id in enumerate(others * 5):
            fields = {"session_id": session_id, "prompt": "y", "request_id": f"beside-{n}"}
            await aside.ask("completion:async", fields)
            assert (await aside.outcome(f"beside-{n}"))["status"] == "completed"
            page = await aside.read("session:get", session_id="shared")
            reached.append(max(0, page["seq"] - AGENTS * EACH))
        last = f"a{AGENTS - 1}-{EACH - 1}"
        await clients[-1].outcome(last, timeout_s=PATIENCE_S)
        until(lambda: not open_requests(system), PATIENCE_S)
        await asyncio.gather(*(client.close() for client in clients))
    return reached


def open_requests(system: System) -> int:
    """Return how many requests wait or run."""
    with system.client("looker") as looker:
        page = looker.read("completion:list", limit=1)
        return int(page["waiting"] + page["active"])


def held_by(system: System) -> list[str]:
    """Return the workers that hold a grant, but for one whose loss might be the last of a request:
    one that so many vanish over is given up."""
    with system.client("looker") as looker:
        active = looker.read("completion:list", status="active", limit=100)["requests"]
        lasts = {each["worker"] for each in active if each["attempt"] >= LAPSES_MAX - 1}
        return sorted({each["worker"] for each in active} - lasts)


def test_one_request_id_from_four_processes_is_one_execution_and_one_answer(
    system: System,
) -> None:
    with system.client("quadruple") as client, working(system, "w1"):
        session_id = client.ask("session:create")["session_id"]
        words = [sys.executable, "-P", "-c", SUBMIT_SAME, str(system.var), session_id]
        processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        said = Counter(
            line
            for process in processes
            for line in process.communicate(timeout=60)[0].splitlines()
        )
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(said.values()) == [4, 100], said
    assert sum(type(event) is Granted for event in happened(system.var)) == 1
    assert len(entries(system, session_id)) == 2


def test_a_storm_of_kills_and_stops_never_overlaps_grants_nor_loses_a_result(
    system: System,
) -> None:
    blows = Counter({"kill": 10, "stop": 7, "go on": 6, "owner": 2})
    storm(system, sessions=16, workers=6, each=12, blows=blows, lasting_s=4.0)


@pytest.mark.soak
def test_a_great_storm_of_kills_and_stops_never_overlaps_grants_nor_loses_a_result(
    system: System,
) -> None:
    blows = Counter({"kill": 300, "stop": 100, "go on": 100, "owner": 20})
    storm(system, sessions=64, workers=32, each=300, blows=blows, lasting_s=600.0, delay_s=1.2)


def storm(
    system: System,
    *,
    sessions: int,
    workers: int,
    each: int,
    blows: Counter[str],
    lasting_s: float,
    delay_s: float = 0.1,
) -> None:
    """Kill and stop workers, and sometimes the owner, and go on until all is answered."""
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    asyncio.run(submit_all(system, sessions, each, delay_s))
    names = [f"w{n}" for n in range(workers)]
    running = {name: WorkerProcess(system.var, name, slots=2) for name in names}
    dealt: Counter[str] = Counter()
    try:
        until(partial(held_by, system), PATIENCE_S)  # Workers take their time to start.
        begun_s = time.monotonic()
        order = list(blows.elements())
        chance.shuffle(order)
        for number, what in enumerate(order):
            time.sleep(
                max(0.0, begun_s + lasting_s * number / len(order) - time.monotonic())
            )  # evenly
            dealt[what] += 1
            strike(system, running, what, chance)
        waiting, spent_s = open_requests(system), time.monotonic() - begun_s
        for worker in running.values():
            worker.send(signal.SIGCONT)
        until(lambda: not open_requests(system), max(PATIENCE_S, lasting_s))
    finally:
        for worker in running.values():
            worker.kill()
    print(f"{spent_s:.0f} s of blows, {waiting} were open behind the last")
    events = happened(system.var)
    done = require_one_at_a_time(events)
    again = sum(type(event) is Granted for event in events) - len(done)
    print(f"{len(done)} completed, {again} granted again, {dict(dealt)}")
    assert len(done) == sessions * each
    assert again > 0, "the storm has hit nothing"
    require_one_result_each(system, sessions, each)


def strike(
    system: System, running: dict[str, WorkerProcess], what: str, chance: random.Random
) -> None:
    match what:
        case "owner":
            pid = system.pid_of("completion")
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        case "go on":
            for worker in running.values():
                worker.send(signal.SIGCONT)
        case _:
            if not (holding := [each for each in held_by(system) if each in running]):
                return
            name = chance.choice(holding)
            if what == "stop":
                running[name].send(signal.SIGSTOP)
            else:
                running[name].kill()
                running[name] = WorkerProcess(system.var, name, slots=2)


async def submit_all(system: System, sessions: int, each: int, delay_s: float) -> None:
    async with AsyncClient("alice", var=system.var) as alice:
        ids = [f"s{n}" for n in range(sessions)]
        await asyncio.gather(*(alice.ask("session:create", session_id=name) for name in ids))
        await asyncio.gather(
            *(
                alice.ask(
                    "completion:async", session_id=name, prompt=str(n), request_id=f"{name}-{n}",
                    options={"delay_s": delay_s}, timeout_s=PATIENCE_S,
                )
                for n in range(each)
                for name in ids
            )
        )  # fmt: skip


def require_one_result_each(system: System, sessions: int, each: int) -> None:
    def said(name: str, event: str) -> list[str]:
        path: Path = system.file(name)
        lines = map(json.loads, path.read_text().splitlines())
        return [line["data"].get("response") for line in lines if line["event"] == event]

    def are_all_there(name: str) -> bool:
        return len(entries(system, name)) == 2 * each

    in_order = [str(n) for n in range(each)]
    for session in range(sessions):
        until(partial(are_all_there, f"s{session}"))
    time.sleep(1.0)  # The promise: in the files within a second.
    for session in range(sessions):
        assert said(f"s{session}", "completion:result") == in_order
        assert len(said(f"s{session}", "completion:request")) == each


@pytest.mark.soak
def test_a_hundred_thousand_requests_wait_and_the_queue_goes_on_as_before(system: System) -> None:
    async def fill(filler: str, count: int) -> None:
        async with AsyncClient(filler, var=system.var) as client:
            sessions = [f"{filler}-{n}" for n in range(10)]
            for session_id in sessions:
                await client.ask("session:create", session_id=session_id)
            for start in range(0, count, 1000):
                await asyncio.gather(
                    *(
                        client.ask(
                            "completion:async", session_id=sessions[n % 10], prompt="x",
                            requires="nobody", timeout_s=PATIENCE_S,
                        )
                        for n in range(start, start + 1000)
                    )
                )  # fmt: skip

    for filler in range(4):  # None may fill more than a quarter of the queue.
        asyncio.run(fill(f"filler-{filler}", 25_000))
    with system.client("alice") as alice, working(system, "w1", lease="15s"):
        alice.ask("session:create", session_id="free")
        assert alice.read("completion:list", limit=1)["waiting"] == 100_000
        print("100000 requests wait")
        refused = alice.ask  # one more waits for room, and is told so in the end
        with pytest.raises(Exception, match="100000 requests wait"):
            refused("completion:async", session_id="free", prompt="one more", timeout_s=1.0)
        first = alice.read("completion:list", limit=1)["requests"][0]["request_id"]
        with system.client("operator", role="operator") as operator:
            operator.ask("completion:cancel", request_id=first)
        done = alice.ask("completion:async", session_id="free", prompt="through")
        assert alice.outcome(done["request_id"], timeout_s=10)["status"] == "completed"
        assert registered(alice)["w1"]["used"] == 0
