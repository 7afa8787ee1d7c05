"""A checkpoint while everybody works: how long appends wait for it, and how long it takes.

One caller appends without a pause. The pause is the longest append while a checkpoint is made; the
other side is the longest in the same time without one, right before.

    python -m benchmarks.checkpoint
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from pathlib import Path
from typing import Final

from benchmarks.measuring import (
    Options,
    Report,
    System,
    Target,
    create_sessions,
    measuring,
    ratios,
    say,
    session_name,
    spread,
    wait_until,
)
from ksi.transport import Client

SESSIONS: Final = 10_000
CHECKPOINTS: Final = 15
SETTLE_S: Final = 1.0  # Between two: the disk is done with the last one.
PAUSE_MS: Final = Target("≤", 10, "ms")


class Appending(threading.Thread):
    """Appends one entry after the other; `calls` are when each began, and when it was answered."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.calls: list[tuple[float, float]] = []
        self._ending = threading.Event()
        self._system = system

    def run(self) -> None:
        with self._system.client("caller") as client:
            client.ask("session:create", session_id="appended")
            while not self._ending.is_set():
                begun_s = time.perf_counter()
                seq = client.ask("session:append", session_id="appended", event="n")["seq"]
                self.calls.append((begun_s, time.perf_counter()))
                assert seq == len(self.calls), seq

    def longest_ms(self, since_s: float, until_s: float) -> float:
        """Return the longest of the calls that were under way between two moments."""
        wait_until(lambda: bool(self.calls) and self.calls[-1][1] > until_s, "an append ends")
        return max((b - a) * 1e3 for a, b in self.calls if b > since_s and a < until_s)

    def end(self) -> None:
        self._ending.set()
        self.join()


def make(operator: Client) -> float:
    """Make a checkpoint; return the seconds until it is whole."""
    begun_s = time.perf_counter()
    checkpoint_id = operator.ask("checkpoint:create")["id"]
    while (now := operator.ask("checkpoint:list"))["making"] is not None:
        time.sleep(0.005)  # A poll, as fine as what it measures.
    assert now["checkpoints"][0]["id"] == checkpoint_id, now
    return time.perf_counter() - begun_s


def measure(options: Options, system: System, report: Report) -> None:
    sessions, count = options.more.sessions, 2 if options.quick else CHECKPOINTS

    async def fill() -> None:
        async with system.async_client() as client:
            await create_sessions(client, 0, sessions)

    say(f"creating {sessions} sessions, {session_name(0)} and others")
    asyncio.run(fill())
    pause_ms, without_ms, taken_s = [], [], []
    appending = Appending(system)
    appending.start()
    try:
        with system.client("operator", role="operator") as operator:
            taken = make(operator)
            for number in range(count):
                say(f"checkpoint {number + 1} of {count}")
                time.sleep(0.1 if options.quick else SETTLE_S)  # The disk comes to rest.
                begun_s = time.perf_counter()
                time.sleep(taken)  # As long without one as the last took, to compare.
                between_s = time.perf_counter()
                taken = make(operator)
                ended_s = time.perf_counter()
                without_ms.append(appending.longest_ms(begun_s, between_s))
                pause_ms.append(appending.longest_ms(between_s, ended_s))
                taken_s.append(taken)
    finally:
        appending.end()
    report.add(
        "the longest append meanwhile, ms",
        f"{spread(pause_ms):.1f}",
        f"{spread(without_ms):.1f}",
        ratio=ratios(pause_ms, without_ms),
        target=PAUSE_MS,
        value=spread(pause_ms).median,
    )
    report.add("until it is whole, s", f"{spread(taken_s):.2f}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=SESSIONS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.sessions = 200
        title = f"checkpoints of {options.more.sessions} sessions"
        report = Report(f"{title}; the other side: the same time without")
        var: Path = options.directory / "var"
        with System(var) as system:
            measure(options, system, report)
        report.show()


if __name__ == "__main__":
    main()
