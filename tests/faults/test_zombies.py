"""Writers that were paused and come back, processes that would be a second one, and callers that
die and start again: none of them writes what is not theirs, nor anything twice."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from system import System
from trouble import entries, kill, living, until

from ksi.actors.owners import OWNERS
from ksi.actors.supervision.launch import start_background
from ksi.actors.supervision.lock import holder
from ksi.transport.errors import Conflict

PATIENCE_S = 20.0

# Creates a session, says its id, appends until that is refused, and says how; then another.
WRITER = """
import json, sys
from ksi.transport import Client
from ksi.transport.errors import KsiError
with Client(sys.argv[2], var=sys.argv[1]) as client:
    for line in sys.stdin:
        session = client.ask("session:create")["session_id"]
        print(session, flush=True)
        while True:
            try:
                client.ask("session:append", session_id=session, event="mine", timeout_s=60)
            except KsiError as refused:
                print(refused.code, flush=True)
                break
"""


def spawned(code: str, system: System, *words: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", code, str(system.var), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def zombies(system: System, rounds: int, writers: int) -> None:
    """Pause writers, give their sessions to another, and let them go on."""
    processes = [spawned(WRITER, system, f"writer-{n}") for n in range(writers)]
    codes: list[str] = []
    try:
        with system.client("heir", role="operator") as heir:
            for _ in range(rounds):
                sessions = [told(each, "go") for each in processes]
                for session in sessions:
                    until(partial(entries, system, session))
                for process in processes:
                    os.kill(process.pid, signal.SIGSTOP)
                for session in sessions:
                    heir.ask("session:claim", session_id=session)
                    heir.ask("session:append", session_id=session, event="theirs")
                for process in processes:
                    os.kill(process.pid, signal.SIGCONT)
                codes += [told(each) for each in processes]
                for session in sessions:
                    said = [each["event"] for each in entries(system, session)]
                    first = said.index("theirs")
                    assert set(said[:first]) == {"mine"}
                    assert said[first:] == ["theirs"], "a former owner has written"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    print(f"{len(codes)} former owners refused")
    assert codes == ["stale_epoch"] * (rounds * writers)


def told(process: subprocess.Popen[str], order: str = "") -> str:
    """Give a process an order, if any, and return the next line it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    if order:
        process.stdin.write(order + "\n")
        process.stdin.flush()
    assert select.select([process.stdout], [], [], PATIENCE_S)[0], "it was not refused"
    return process.stdout.readline().strip()


def test_writers_that_were_paused_are_refused_once_another_owns_their_sessions(
    system: System,
) -> None:
    zombies(system, rounds=3, writers=4)


@pytest.mark.soak
def test_two_hundred_writers_that_were_paused_are_all_refused(system: System) -> None:
    zombies(system, rounds=20, writers=10)


def second_starts(system: System, count: int) -> None:
    held = holder(system.var)
    assert held is not None
    pids = {name: living(system, name) for name in OWNERS}
    with system.client("alice") as alice:
        session = alice.ask("session:create")["session_id"]
        for _ in range(count):
            with pytest.raises(Conflict, match=f"pid {held.pid}"):
                start_background(system.var)
            alice.ask("session:append", session_id=session, event="meanwhile")
    assert len(entries(system, session)) == count
    assert {name: living(system, name) for name in OWNERS} == pids
    print(f"{count} second starts refused")


def test_a_second_start_is_refused_and_the_first_goes_on(system: System) -> None:
    second_starts(system, 5)


@pytest.mark.soak
def test_a_hundred_second_starts_are_refused_and_the_first_goes_on(system: System) -> None:
    second_starts(system, 100)


# Its children append 0, 1, 2, ... with the number as `request_id`, each going on where the one
# before was known to be; a child says each number that was acknowledged and is killed at some time.
MORTAL = """
import json, os, random, signal, sys, time
from ksi.transport import Client
var, name, session, kills, seed = sys.argv[1:]
chance = random.Random(int(seed))

def live(told, number):
    with Client(name, var=var) as client:
        while True:
            fields = dict(session_id=session, event="n", data={"n": number})
            client.ask("session:contribute", request_id=f"{name}-{number}", timeout_s=60, **fields)
            os.write(told, b"%d " % number)
            number += 1

reached = 0
for _ in range(int(kills)):
    heard, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        live(told, reached)
    os.close(told)
    said = os.read(heard, 100)
    time.sleep(chance.uniform(0, 0.05))  # It dies at a moment that is drawn.
    os.kill(pid, signal.SIGKILL)
    while more := os.read(heard, 1 << 16):
        said += more
    os.close(heard)
    os.waitpid(pid, 0)
    reached = int(said.split()[-1]) + 1
print(json.dumps(reached))
"""


def client_kills(system: System, clients: int, kills: int) -> None:
    """Kill clients that number their commands themselves, and now and then the owner they ask."""
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    with system.client("host") as host:
        session = host.ask("session:create", admission="open")["session_id"]
        mortals = [
            spawned(MORTAL, system, f"mortal-{n}", session, kills, seed + n) for n in range(clients)
        ]
        while any(each.poll() is None for each in mortals):
            time.sleep(0.4)  # Between two deaths they get on.
            kill(system, "sessions")
        reached = [json.loads(each.communicate()[0]) for each in mortals]
    said: dict[str, list[int]] = {}
    for each in entries(system, session):
        said.setdefault(each["metadata"]["agent_id"], []).append(each["data"]["n"])
    print(f"{clients * kills} clients killed, {sum(reached)} acknowledged")
    for n, count in enumerate(reached):
        numbers = said[f"mortal-{n}"]
        assert numbers == list(range(len(numbers))), "one was doubled, lost or out of order"
        assert count <= len(numbers) <= count + 1024
    assert sum(reached) > clients * kills


def test_clients_that_are_killed_and_start_again_have_no_command_carried_out_twice(
    system: System,
) -> None:
    client_kills(system, 2, 10)


@pytest.mark.soak
def test_two_hundred_clients_killed_have_no_command_carried_out_twice(system: System) -> None:
    client_kills(system, 4, 50)
