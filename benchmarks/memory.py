"""Memory of an idle system, process by process, and of a client over what it imports.

PSS: what a process shares with others is divided among them, so the sum is what the machine gives.
What nobody shares is what a process adds to that.

    python -m benchmarks.memory
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import psutil

from benchmarks.measuring import Options, Report, System, Target, measuring, say, spread
from ksi.actors.supervision.reports import read_children
from ksi.transport import Client
from ksi.transport.identity import run_directory

SYSTEM_MB: Final = Target("≤", 150, "MB")
OWNER_MB: Final = Target("≤", 5, "MB")
CLIENT_MB: Final = Target("≤", 2, "MB")
SETTLE_S: Final = 1.0
IMPORTS: Final = ("ksi.transport", "ksi.actors.reading", "ksi.actors.owners.sessions")


def pss_mb(pid: int | str = "self") -> float:
    """Return the proportional share of a process in megabytes."""
    return _mb(pid, ("Pss:",))


def own_mb(pid: int) -> float:
    """Return what nobody shares with a process in megabytes."""
    return _mb(pid, ("Private_Clean:", "Private_Dirty:"))


def _mb(pid: int | str, kinds: Sequence[str]) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(tuple(kinds))) * 1024 / 1e6


def idle_mb(system: System) -> tuple[dict[str, float], dict[str, float]]:
    """Return the share of each process of the system, and what each of its children adds."""
    status = read_children(run_directory(system.var))
    assert status is not None
    names = {child.pid: child.name for child in status.children if child.pid is not None}
    assert {"registry", "sessions", "files"} <= set(names.values()), names
    shares = {"supervisor": pss_mb(system.supervisor_pid)}
    for process in psutil.Process(system.supervisor_pid).children(recursive=True):
        name = names.get(process.pid, "fork server and spare")
        shares[name] = shares.get(name, 0.0) + pss_mb(process.pid)
    return shares, {name: own_mb(pid) for pid, name in names.items()}


def be_client(var: Path, pipe: Connection) -> None:
    """Send what a client takes after its imports, and after it has asked and read."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    before_mb = pss_mb()
    with Client("bench", var=var) as client:
        session = client.ask("session:create")
        view = client.read("session:get", session_id=session["session_id"])
        assert view["seq"] == 0, view
        pipe.send((before_mb, pss_mb()))


def client_mb(system: System) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    client = context.Process(target=be_client, args=(system.var, theirs))
    client.start()
    before_mb, after_mb = ours.recv()
    client.join()
    assert client.exitcode == 0
    return before_mb, after_mb


def measure(options: Options, report: Report) -> None:
    rounds: list[dict[str, float]] = []
    adds: list[dict[str, float]] = []
    clients: list[tuple[float, float]] = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        with System(options.directory / f"var-{number}") as system:
            time.sleep(0 if options.quick else SETTLE_S)  # What is idle, not what starts.
            shares, added = idle_mb(system)
            rounds.append(shares)
            adds.append(added)
            clients.append(client_mb(system))
    for name in rounds[0]:
        report.add(f"{name}, MB", f"{spread(each[name] for each in rounds):.1f}")
    for name in adds[0]:
        added_mb = spread(each[name] for each in adds)
        report.add(f"{name} adds, MB", f"{added_mb:.1f}", target=OWNER_MB, value=added_mb.median)
    total = spread(sum(each.values()) for each in rounds)
    report.add("the idle system, MB", f"{total:.1f}", target=SYSTEM_MB, value=total.median)
    more = spread(after - before for before, after in clients)
    report.add(
        "a client over its imports, MB",
        f"{more:.2f}",
        f"{spread(before for before, _ in clients):.1f}",
        target=CLIENT_MB,
        value=more.median,
    )


def main() -> None:
    with measuring(__doc__) as options:
        report = Report("memory, PSS; the other side of a client: its imports alone")
        measure(options, report)
        report.show()


if __name__ == "__main__":
    main()
