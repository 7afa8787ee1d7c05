"""The supervisor is killed, again and again: nobody is left, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest
from system import System
from trouble import entries, until

from ksi.actors.supervision.lock import holder
from ksi.actors.supervision.reports import read_children
from ksi.actors.supervision.supervisor import LOOK_S
from ksi.transport.identity import run_directory

ORPHANS_S = 1.0  # The promise: nobody outlives the supervisor by more than this.


def kill_supervisors(system: System, kills: int) -> None:
    slowest_s, session = 0.0, ""
    for number in range(kills):
        held = holder(system.var)
        assert held is not None
        below = psutil.Process(held.pid).children(recursive=True)
        assert len(below) > 6
        with system.client("alice") as alice:
            session = session or alice.ask("session:create")["session_id"]
            alice.ask("session:append", session_id=session, event="n", data={"n": number})
            if number % 3 == 1:  # One that is stopped cannot even see that its parent has ended.
                system.kill("sessions", signal.SIGSTOP)
            killed_s = time.monotonic()
            os.kill(held.pid, signal.SIGKILL)
            left = gone(below, killed_s + ORPHANS_S)
        for each in left:
            each.kill()
        assert left == [], f"after {ORPHANS_S} s these are still there: {left}"
        slowest_s = max(slowest_s, time.monotonic() - killed_s)
        system.start()
    said = [each["data"]["n"] for each in entries(system, session)]
    assert said == list(range(kills))
    print(f"{kills} supervisors killed, the last child gone after {slowest_s:.3f} s at most")


def gone(processes: list[psutil.Process], until_s: float) -> list[psutil.Process]:
    """Return those that are still there when the time is over."""
    while left := [each for each in processes if lives(each)]:
        if time.monotonic() > until_s:
            return left
        time.sleep(0.005)  # A poll with a deadline.
    return []


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def seven(server: psutil.Process) -> list[psutil.Process]:
    """Return the children of a fork server, once there are more than are restarted."""
    below = server.children()
    return below if len(below) > 6 else []


def states(system: System) -> set[str]:
    status = read_children(run_directory(system.var))
    return set() if status is None else {each.state for each in status.children}


def test_a_killed_supervisor_leaves_nobody_and_loses_nothing(system: System) -> None:
    kill_supervisors(system, 4)


def test_a_killed_fork_server_is_one_restart_however_many_children_end_with_it(
    tmp_path: Path,
) -> None:
    """By what a supervisor bears as it is shipped, which is fewer restarts than it has children."""
    with ExitStack() as undo:
        system = System(tmp_path / "var", (), **{"supervisor.intensity": 3})
        undo.callback(system.end)
        alice = undo.enter_context(system.client("alice"))
        session = alice.ask("session:create")["session_id"]
        held = holder(system.var)
        assert held is not None
        for number in range(3):
            (server,) = psutil.Process(held.pid).children()
            below = until(partial(seven, server))
            server.kill()
            assert gone(below, time.monotonic() + ORPHANS_S) == []
            said = {"session_id": session, "event": "n", "data": {"n": number}}
            alice.ask("session:append", said, timeout_s=20.0)
            until(lambda: all(map(system.pid_of, ("events", "library"))))
        until(lambda: [each["data"]["n"] for each in entries(system, session)] == [0, 1, 2])
        assert holder(system.var) == held


def test_want_that_keeps_all_children_from_starting_is_one_restart(tmp_path: Path) -> None:
    with ExitStack() as undo:
        flags = {
            "supervisor.intensity": 3,
            "supervisor.backoff_first_s": 4.0,
            "supervisor.backoff_max_s": 8.0,
        }
        system = System(tmp_path / "var", (), **flags)
        undo.callback(system.end)
        held = holder(system.var)
        assert held is not None
        logs, away = system.var / "logs" / "ksi", system.var / "logs" / "away"
        logs.rename(away)
        logs.touch()  # Nothing can be written into it: no child can be started.
        (server,) = psutil.Process(held.pid).children()
        server.kill()
        until(lambda: states(system) == {"BACKOFF"})
        os.kill(held.pid, signal.SIGHUP)
        time.sleep(3 * LOOK_S)  # It looks at what they have logged, too.
        logs.unlink()
        away.rename(logs)
        until(lambda: states(system) == {"RUNNING"}, 20.0)
        assert holder(system.var) == held


@pytest.mark.soak
def test_a_hundred_killed_supervisors_leave_nobody_and_lose_nothing(system: System) -> None:
    kill_supervisors(system, 100)
