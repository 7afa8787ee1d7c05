"""The index under full append load, and how fast it is built again and verified.

64 callers append entries of 230 bytes as fast as they can. Meanwhile another process says something
ten times a second and looks until the index has it: that is the lag. The other side is the same
load with the process of the index stopped: what following costs the appends. Afterwards the index
is built again from the files and verified, and its rows are counted: none may be missing.

    python -m benchmarks.index
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import time
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final

from benchmarks.append import CALLERS, DATA, Sessions
from benchmarks.measuring import (
    Options,
    Report,
    System,
    create_sessions,
    measuring,
    percentile,
    ratios,
    say,
    spread,
    wait_until,
)
from ksi.actors.followers.indexed import Verification, index_directory
from ksi.storage.index import IndexReader
from ksi.transport import Client
from ksi.transport.moments import day_of

ROUND_S: Final = 2.0
ROUNDS_OF_BUILDING: Final = 3
SAY_EVERY_S: Final = 0.1
LOOK_EVERY_S: Final = 0.001
CATCH_UP_S_MAX: Final = 120.0
COUNT: Final = max(CALLERS)


def probe_lag(var: Path, ended: Event, found: Connection) -> None:
    """Say something again and again, and look how long the index takes to have it."""
    lags_s: list[float] = []
    reader = IndexReader(index_directory(var))
    with Client("probe", var=var) as client:
        session_id = client.ask("session:create")["session_id"]
        found.send(None)  # ready
        while not ended.is_set() or not lags_s:
            said = client.ask("session:append", session_id=session_id, event="probe", data=DATA)
            begun_s = time.perf_counter()
            row = f"{session_id}:{said['seq']:09d}"
            day = day_of(said["timestamp"])
            sql = "SELECT line_number FROM ksi_index WHERE id = ?"
            while not (rows := reader.query(day, sql, (row,))):
                time.sleep(LOOK_EVERY_S)  # A lag is known to this.
            assert rows == [(said["seq"],)], rows
            lags_s.append(time.perf_counter() - begun_s)
            time.sleep(SAY_EVERY_S)  # Each is met by itself.
    found.send(lags_s)


def caught_up(client: Client) -> bool:
    status = client.read("index:status")
    return bool(status["state"] == "following" and status["behind_bytes"] == 0)


async def measure_load(options: Options, system: System, report: Report, client: Client) -> None:
    """Append with the index following and with it stopped, in turns, and add the rows."""
    following: list[float] = []
    stopped: list[float] = []
    caught_up_s: list[float] = []
    lags_s: list[float] = []
    pid = system.stat("index").pid
    async with system.async_client() as appender:
        await create_sessions(appender, 0, COUNT)
        sessions = Sessions(appender, system)
        for number in range(options.rounds + 1):
            say(f"load, round {number} of {options.rounds}")
            os.kill(pid, signal.SIGSTOP)
            try:
                without = await sessions.run(COUNT, options.more.seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            await asyncio.to_thread(wait_until, lambda: caught_up(client), "", CATCH_UP_S_MAX)
            lags, beside = await load_with_probe(system, sessions, options.more.seconds)
            begun_s = time.perf_counter()
            await asyncio.to_thread(wait_until, lambda: caught_up(client), "", CATCH_UP_S_MAX)
            if number:  # The first round is for warming up.
                caught_up_s.append(time.perf_counter() - begun_s)
                following.append(beside)
                stopped.append(without.per_s)
                lags_s += lags
    report.add(
        f"{COUNT} callers, appends/s",
        f"{spread(following):.0f}",
        f"{spread(stopped):.0f}",
        ratio=ratios(following, stopped),
    )
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        report.add(f"from the reply to the row, {name} ms", f"{percentile(lags_s, part) * 1e3:.0f}")
    report.add("behind when the load ends, s", f"{spread(caught_up_s):.2f}")


async def load_with_probe(
    system: System, sessions: Sessions, seconds: float
) -> tuple[list[float], float]:
    """Return the lags that were met under load, and the appends a second."""
    context = multiprocessing.get_context("spawn")
    ended = context.Event()
    ours, theirs = context.Pipe(duplex=False)
    probe = context.Process(target=probe_lag, args=(system.var, ended, theirs))
    probe.start()
    try:
        await asyncio.to_thread(ours.recv)
        done = await sessions.run(COUNT, seconds)
    finally:
        ended.set()
    lags_s: list[float] = await asyncio.to_thread(ours.recv)
    probe.join()
    return lags_s, done.per_s


def measure_building(options: Options, system: System, report: Report, client: Client) -> None:
    """Build the index again and verify it, and add the rows."""
    rows = client.read("index:status")["rows"]
    sessions = client.read("session:list", limit=1000)["sessions"]
    assert rows == sum(each["seq"] for each in sessions), "the index lacks rows"
    built: list[float] = []
    verified: list[float] = []
    for number in range(1 if options.quick else ROUNDS_OF_BUILDING):
        say(f"building {rows} rows, round {number + 1}")
        begun_s = time.perf_counter()
        order = client.ask("index:rebuild")["number"]
        wait_until(partial(has_built, client, order), "", CATCH_UP_S_MAX)
        built.append(rows / (time.perf_counter() - begun_s))
        assert client.read("index:status")["rows"] == rows
        verification = Verification(system.var)
        begun_s = time.perf_counter()
        while verification.turn():
            pass
        verified.append(rows / (time.perf_counter() - begun_s))
        assert verification.differences == 0, verification.found
        assert verification.rows == rows
    report.add(f"built again, {rows} entries, lines/s", f"{spread(built):.0f}")
    report.add("verified, lines/s", f"{spread(verified):.0f}")
    used = sum(path.stat().st_size for path in index_directory(system.var).rglob("*.db"))
    report.add("on disk, bytes an entry", f"{used / rows:.0f}")


def has_built(client: Client, order: int) -> bool:
    status: dict[str, Any] = client.read("index:status")
    return bool(status["rebuilt"] >= order)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=ROUND_S, help="of a round of one side")


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.seconds = 0.2
        report = Report("the index; the other side: the same with its process stopped")
        with (
            System(options.directory / "var") as system,
            system.client("operator", "operator") as client,
        ):
            asyncio.run(measure_load(options, system, report, client))
            measure_building(options, system, report, client)
        report.show()


if __name__ == "__main__":
    main()
