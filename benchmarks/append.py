"""Durable `session:append` against `redis.asyncio` XADD with `appendfsync always`.

64, 16 and 1 callers in one process, each with a session (a stream) of its own, 230 bytes an entry,
one command an await, as an agent is written. Then the syncs that an acknowledged append costs, of
callers in one process and of as many processes, counted by the owner and not timed.

    python -m benchmarks.append
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.measuring import (
    Options,
    Redis,
    Report,
    System,
    Target,
    create_sessions,
    measuring,
    percentile,
    probe,
    ratios,
    redis_server,
    say,
    session_name,
    spread,
)
from ksi.transport import AsyncClient, Client

ENTRY_BYTES: Final = 230
CALLERS: Final = {64: Target("≥", 3), 16: Target("≥", 1.3), 1: Target("≥", 0.75)}
P50_OVER_WRITE_MS: Final = 0.7
ROUND_S: Final = 1.0
PROCESSES: Final = 8

_FRAME: Final = len(json.dumps({"event": "note", "data": {"text": ""}}, separators=(",", ":")))
DATA: Final = {"text": "x" * (ENTRY_BYTES - _FRAME)}
ENTRY: Final = json.dumps({"event": "note", "data": DATA}, separators=(",", ":"))
assert len(ENTRY) == ENTRY_BYTES


class Round(NamedTuple):
    """What one side did in one round."""

    per_s: float
    latencies_s: list[float]
    appends_a_sync: float = 0.0


async def callers(count: int, seconds: float, append: Callable[[int], Awaitable[None]]) -> Round:
    """Let `count` callers append one after the other for some seconds."""
    latencies_s: list[float] = []
    deadline_s = time.perf_counter() + seconds

    async def call(caller: int) -> None:
        while (begun_s := time.perf_counter()) < deadline_s:
            await append(caller)
            latencies_s.append(time.perf_counter() - begun_s)

    begun_s = time.perf_counter()
    await asyncio.gather(*(call(caller) for caller in range(count)))
    return Round(len(latencies_s) / (time.perf_counter() - begun_s), latencies_s)


class Sessions:
    """Our side: a session a caller."""

    def __init__(self, client: AsyncClient, system: System) -> None:
        self._client = client
        self._system = system
        self._names = [session_name(caller) for caller in range(max(CALLERS))]
        self._seqs = [0] * max(CALLERS)

    async def run(self, count: int, seconds: float) -> Round:
        before = self._system.stat()
        done = await callers(count, seconds, self._append)
        after = self._system.stat()
        syncs = after.syncs - before.syncs
        return done._replace(appends_a_sync=(after.commands - before.commands) / syncs)

    async def _append(self, caller: int) -> None:
        reply = await self._client.ask(
            "session:append", session_id=self._names[caller], event="note", data=DATA
        )
        self._seqs[caller] += 1
        assert reply["seq"] == self._seqs[caller], reply


class Streams:
    """The other side: a stream a caller."""

    def __init__(self, path: str) -> None:
        redis: Any = importlib.import_module("redis.asyncio")
        self._redis = redis.Redis(unix_socket_path=path)
        self._last = [(0, 0)] * max(CALLERS)

    async def run(self, count: int, seconds: float) -> Round:
        return await callers(count, seconds, self._append)

    async def _append(self, caller: int) -> None:
        added = await self._redis.xadd(f"stream:{caller}", {"entry": ENTRY})
        milliseconds, _, number = added.partition(b"-")
        entry_id = int(milliseconds), int(number)
        assert entry_id > self._last[caller], added
        self._last[caller] = entry_id

    async def close(self) -> None:
        await self._redis.aclose()


async def compare(options: Options, system: System, redis: Redis | None, report: Report) -> None:
    """Measure both sides in turns and add the rows."""
    seconds = options.more.seconds
    async with system.async_client() as client:
        await create_sessions(client, 0, max(CALLERS))
        ours, other = Sessions(client, system), Streams(redis.path) if redis else None
        for count, target in CALLERS.items():
            mine: list[Round] = []
            theirs: list[Round] = []
            over_ms: list[float] = []
            for number in range(options.rounds + 1):
                say(f"{people(count)}, round {number} of {options.rounds}")
                raw_s = statistics.median(probe(options.directory, 100))
                mine.append(await ours.run(count, seconds))
                over_ms.append((statistics.median(mine[-1].latencies_s) - raw_s) * 1e3)
                if other is not None:
                    theirs.append(await other.run(count, seconds))
            # The first round is for warming up.
            add_rows(report, count, target, mine[1:], theirs[1:], over_ms[1:])
        if other is not None:
            await other.close()


def add_rows(
    report: Report,
    count: int,
    target: Target,
    mine: list[Round],
    theirs: list[Round],
    over_ms: list[float],
) -> None:
    who = people(count)
    per_s = [each.per_s for each in mine]
    other_per_s = [each.per_s for each in theirs]
    report.add(
        f"{who}, appends/s",
        f"{spread(per_s):.0f}",
        f"{spread(other_per_s):.0f}" if theirs else "-",
        ratio=ratios(per_s, other_per_s) if theirs else None,
        target=target if theirs else None,
    )
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        ours_us = [percentile(each.latencies_s, part) * 1e6 for each in mine]
        other_us = [percentile(each.latencies_s, part) * 1e6 for each in theirs]
        report.add(
            f"{who}, {name} us",
            f"{spread(ours_us):.0f}",
            f"{spread(other_us):.0f}" if theirs else "-",
            ratio=ratios(ours_us, other_us) if theirs else None,
        )
    if count == max(CALLERS):
        over = spread(over_ms)
        report.add(
            f"{who}, p50 less a raw synced write",
            f"{over:.2f} ms",
            target=Target("≤", P50_OVER_WRITE_MS, "ms"),
            value=over.median,
        )
    shared = spread(each.appends_a_sync for each in mine)
    report.add(
        f"{who}, one process: appends a sync",
        f"{shared:.1f}",
        target=Target("≥", 0.9 * count, ""),
        value=shared.median,
    )


def people(count: int) -> str:
    return "1 caller" if count == 1 else f"{count} callers"


def work(number: int, var: Path, seconds: float, turns: Barrier, counts: Queue[int]) -> None:
    """Be one of many processes, each a caller with a session of its own."""
    with Client(f"bench-{number}", var=var) as client:
        session_id = client.ask("session:create")["session_id"]
        turns.wait()  # all are there; the syncs so far are counted
        turns.wait()
        seq, deadline_s = 0, time.perf_counter() + seconds
        while time.perf_counter() < deadline_s:
            seq += 1
            reply = client.ask("session:append", session_id=session_id, event="note", data=DATA)
            assert reply["seq"] == seq, reply
        counts.put(seq)
        turns.wait()  # all have been counted


def processes(options: Options, system: System, report: Report) -> None:
    """Count the syncs of as many processes as callers."""
    many = 2 if options.quick else PROCESSES
    shared, per_s = [], []
    for number in range(options.rounds):
        say(f"{many} processes, round {number + 1} of {options.rounds}")
        context = multiprocessing.get_context("spawn")
        turns, counts = context.Barrier(many + 1), context.Queue()
        seconds = options.more.seconds
        workers = [
            context.Process(target=work, args=(worker, system.var, seconds, turns, counts))
            for worker in range(many)
        ]
        for worker in workers:
            worker.start()
        turns.wait()
        before = system.stat()
        turns.wait()
        appended = sum(counts.get() for _ in workers)
        after = system.stat()
        turns.wait()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0, worker
        shared.append(appended / (after.syncs - before.syncs))
        per_s.append(appended / seconds)
    report.add(f"{many} processes, one caller each, appends/s", f"{spread(per_s):.0f}")
    report.add(
        f"{many} processes, one caller each: appends a sync",
        f"{spread(shared):.1f}",
        target=Target("≥", 0.5 * many, ""),
        value=spread(shared).median,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=ROUND_S, help="of a round of one side")


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.seconds = 0.1
        report = Report(f"session:append, durable, entries of {ENTRY_BYTES} bytes; Redis: XADD")
        with System(options.directory / "var") as system:
            with redis_server(options.directory) as redis:
                asyncio.run(compare(options, system, redis, report))
            processes(options, system, report)
        report.show()


if __name__ == "__main__":
    main()
