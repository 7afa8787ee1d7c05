"""A local `read`, decoded and typed, against redis-py GET; and once more with the owner stopped.

GET returns the bytes as they are stored: Redis decodes nothing. Keys are drawn at random from as
many sessions as there are values in Redis.

    python -m benchmarks.read
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import random
import signal
from typing import Any, Final

from benchmarks.measuring import (
    Options,
    Redis,
    Report,
    Spread,
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
from ksi.actors.declarations.sessions import Get
from ksi.transport import Client
from ksi.transport.message import encode

READS: Final = 20_000  # a round of our side; a tenth of it of the other
SESSIONS: Final = 10_000
P50_US: Final = Target("≤", 5, "us")
FASTER: Final = Target("≥", 10)


class Reader:
    """Our side."""

    def __init__(self, client: Client, sessions: int) -> None:
        self._client = client
        self._names = [session_name(number) for number in range(sessions)]

    def __call__(self, *, typed: bool, times: int) -> list[float]:
        names = iter(random.choices(self._names, k=times))
        read = self._client.read
        if typed:
            return timed(lambda: read(Get(session_id=next(names))), times, _is_ours)
        return timed(lambda: read("session:get", session_id=next(names)), times, _is_our_dict)


def _is_ours(view: Any) -> bool:
    ours: bool = view.owner == "bench"
    return ours


def _is_our_dict(view: Any) -> bool:
    ours: bool = view["owner"] == "bench"
    return ours


class Getter:
    """The other side: the same values in Redis."""

    def __init__(self, path: str, client: Client, sessions: int) -> None:
        self._redis: Any = importlib.import_module("redis").Redis(unix_socket_path=path)
        self._names = [session_name(number) for number in range(sessions)]
        self._bytes = len(encode(client.read("session:get", session_id=self._names[0])))
        with self._redis.pipeline(transaction=False) as pipeline:
            for name in self._names:
                pipeline.set(name, b"x" * self._bytes)
            assert all(pipeline.execute())

    def __call__(self, times: int) -> list[float]:
        names = iter(random.choices(self._names, k=times))
        get = self._redis.get
        return timed(lambda: get(next(names)), times, lambda value: len(value) == self._bytes)


def compare(options: Options, system: System, redis: Redis | None, report: Report) -> None:
    sessions, reads = options.more.sessions, options.more.reads
    with system.client() as client:
        ours = Reader(client, sessions)
        other = Getter(redis.path, client, sessions) if redis else None
        sides = ("decoded", "typed", "decoded, owner stopped", "typed, owner stopped")
        mine: dict[str, list[float]] = {side: [] for side in sides}
        theirs: list[float] = []
        tails: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            if other is not None:
                theirs.append(percentile(other(max(1, reads // 10)), 0.5) * 1e6)
            for side in sides:
                owner = system.stat().pid
                if "stopped" in side:
                    os.kill(owner, signal.SIGSTOP)
                try:
                    taken_s = ours(typed="typed" in side, times=reads)
                finally:
                    os.kill(owner, signal.SIGCONT)
                mine[side].append(percentile(taken_s, 0.5) * 1e6)
                tails[side].append(percentile(taken_s, 0.99) * 1e6)
    for side in sides:
        add_rows(report, side, mine[side], spread(tails[side]), theirs)


def add_rows(
    report: Report, side: str, mine: list[float], tail: Spread, theirs: list[float]
) -> None:
    report.add(
        f"read, {side}, p50 us", f"{spread(mine):.2f}", target=P50_US, value=spread(mine).median
    )
    report.add(f"read, {side}, p99 us", f"{tail:.2f}")
    if theirs:
        report.add(
            f"read, {side}: p50 of GET in us, times faster",
            f"{spread(mine):.2f}",
            f"{spread(theirs):.1f}",
            ratio=ratios(theirs, mine),
            target=FASTER,
        )


async def fill(system: System, sessions: int) -> None:
    async with system.async_client() as client:
        await create_sessions(client, 0, sessions)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reads", type=int, default=READS, help="a round of our side")
    parser.add_argument("--sessions", type=int, default=SESSIONS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.reads, options.more.sessions = 200, 100
        report = Report("a local read of a session against GET of a value of the same size")
        with System(options.directory / "var") as system, redis_server(options.directory) as redis:
            asyncio.run(fill(system, options.more.sessions))
            compare(options, system, redis, report)
        report.show()


if __name__ == "__main__":
    main()
