"""What a thousand times as many sessions cost: append by one and by 64 callers, ask, read, restart.

A system for each size, all alive at once, so that the rounds of all sizes take turns on the same
disk. Sessions are drawn at random; on the other side are XADDs to as many streams, made as they
are drawn. `--full` goes on to a million sessions.

    python -m benchmarks.growth
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import random
from collections import Counter
from typing import Any, Final

from benchmarks.append import DATA, ENTRY, callers
from benchmarks.measuring import (
    Options,
    Redis,
    Report,
    System,
    Target,
    create_sessions,
    measuring,
    percentile,
    ratios,
    redis_server,
    say,
    session_name,
    spread,
    timed,
)
from benchmarks.restart import PATIENT, Killer
from ksi.transport import AsyncClient, Client

SIZES: Final = (1_000, 10_000, 100_000)
FULL: Final = 1_000_000
CALLERS: Final = 64
ROUND_S: Final = 0.5
ASKS: Final = 200
READS: Final = 2000
KILLS: Final = 3
GROWTH: Final = Target("≤", 1.5)
TO_REDIS: Final = Target("≥", 2.5)  # at a million


class Size:
    """One system with so many sessions, and what was measured of it, a figure a round."""

    def __init__(self, system: System, sessions: int) -> None:
        self.system = system
        self.sessions = sessions
        self.figures: dict[str, list[float]] = {}
        self._seqs: Counter[str] = Counter()

    async def fill(self) -> None:
        async with self._async_client() as client:
            await create_sessions(client, 0, self.sessions)

    async def append(self, seconds: float) -> None:
        """Append by one caller and by many, each time to a session drawn at random."""
        async with self._async_client() as client:

            async def append(_caller: int) -> None:
                name = session_name(random.randrange(self.sessions))
                self._seqs[name] += 1
                seq = self._seqs[name]
                reply = await client.ask("session:append", session_id=name, event="note", data=DATA)
                assert reply["seq"] == seq, reply

            for name, count in ((f"append, {CALLERS} callers", CALLERS), ("append, 1 caller", 1)):
                done = await callers(count, seconds, append)
                self.note(name, 1e6 / done.per_s)

    def query(self, asks: int, reads: int) -> None:
        with self._client() as client:

            def right(view: Any) -> bool:
                return bool(view["seq"] == self._seqs[view["session_id"]])

            drawn = random.choices(range(self.sessions), k=asks + reads)
            names = iter([session_name(number) for number in drawn])
            asked = timed(lambda: client.ask("session:get", session_id=next(names)), asks, right)
            read = timed(lambda: client.read("session:get", session_id=next(names)), reads, right)
        self.note("ask, p50", percentile(asked, 0.5) * 1e6)
        self.note("read, p50", percentile(read, 0.5) * 1e6)

    def restart(self, kills: int) -> None:
        with self._client() as client:
            killer = Killer(self.system, client, self.sessions, self._seqs)
            taken_s = [killer.kill() for _ in range(kills)]
        self.note("restart, p50", percentile(taken_s, 0.5) * 1e6)

    def note(self, name: str, us: float) -> None:
        self.figures.setdefault(name, []).append(us)

    def _client(self) -> Client:
        return self.system.client()

    def _async_client(self) -> AsyncClient:
        return self.system.async_client()


async def append_to_streams(redis: Redis, streams: int, seconds: float) -> float:
    """Return the microseconds of an XADD by many callers to streams drawn at random."""
    asynchronous: Any = importlib.import_module("redis.asyncio")
    client = asynchronous.Redis(unix_socket_path=redis.path)

    async def append(_caller: int) -> None:
        stream = session_name(random.randrange(streams))
        added = await client.xadd(stream, {"entry": ENTRY})
        assert b"-" in added, added

    done = await callers(CALLERS, seconds, append)
    await client.aclose()
    return 1e6 / done.per_s


def measure(options: Options, sizes: list[Size], redis: Redis | None) -> dict[int, list[float]]:
    """Measure all sizes in turns; return the figures of Redis by size."""
    more = options.more
    others: dict[int, list[float]] = {size.sessions: [] for size in sizes}
    for size in sizes:
        say(f"creating {size.sessions} sessions")
        asyncio.run(size.fill())
    for number in range(options.rounds):
        for size in sizes:
            say(f"round {number + 1} of {options.rounds}, {size.sessions} sessions")
            asyncio.run(size.append(more.seconds))
            if redis is not None:
                others[size.sessions].append(
                    asyncio.run(append_to_streams(redis, size.sessions, more.seconds))
                )
            size.query(more.asks, more.asks * READS // ASKS)
            size.restart(KILLS)
    return others


def add_rows(report: Report, sizes: list[Size], others: dict[int, list[float]]) -> None:
    first, last = sizes[0], sizes[-1]
    for name in first.figures:
        for size in sizes:
            is_last = size is last
            report.add(
                f"{name}, {size.sessions} sessions, us",
                f"{spread(size.figures[name]):.1f}",
                f"{spread(first.figures[name]):.1f}",
                ratio=ratios(size.figures[name], first.figures[name]),
                target=GROWTH if is_last else None,
            )
    for size in sizes:
        theirs = others[size.sessions]
        if theirs:
            mine = size.figures[f"append, {CALLERS} callers"]
            report.add(
                f"append, {CALLERS} callers, {size.sessions} sessions, times faster than XADD",
                f"{spread(mine):.1f}",
                f"{spread(theirs):.1f}",
                ratio=ratios(theirs, mine),
                target=TO_REDIS if size.sessions >= FULL else None,
            )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help=f"up to {FULL} sessions")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of sessions {SIZES}")
    parser.add_argument("--seconds", type=float, default=ROUND_S, help="of a round of one side")
    parser.set_defaults(asks=ASKS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        more = options.more
        wanted = more.sizes or (*SIZES, FULL) if more.full else more.sizes or SIZES
        if options.quick:
            wanted, more.seconds, more.asks = (50, 100), 0.05, 20
        report = Report(f"growth; the other side: the same with {wanted[0]} sessions")
        with contextlib.ExitStack() as ending:
            redis = ending.enter_context(redis_server(options.directory))
            sizes = [
                Size(
                    ending.enter_context(System(options.directory / f"var-{number}", **PATIENT)),
                    number,
                )
                for number in wanted
            ]
            others = measure(options, sizes, redis)
        add_rows(report, sizes, others)
        report.show()


if __name__ == "__main__":
    main()
