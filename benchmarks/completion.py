"""Submit to grant: from `completion:async` to the moment a worker holds the grant with its prompt.

On the way are a synced commit of the request with its grant, the push to the worker, and the query
that gives the worker the prompt. Beside it: the same number of calls of the two parts alone, a
synced command (`session:append`) and a query (`session:get`). Each request is reported before the
next is submitted; then many sessions at a time, for how much work a queue lets through.

    python -m benchmarks.completion
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any, Final

from benchmarks.measuring import (
    Options,
    Report,
    System,
    measuring,
    percentile,
    ratios,
    say,
    spread,
)
from ksi.transport import AsyncClient

REQUESTS: Final = 300  # a round, one at a time
SESSIONS: Final = 64  # at a time, where many are
WAITING: Final = 5000  # requests that wait in other sessions, the second time


class Bench:
    """A requester and a worker that drive the protocol themselves, and see when what is there."""

    def __init__(self, system: System) -> None:
        self.requester = system.async_client("bench")
        self.worker = system.async_client("bench-worker", role="worker")
        self.news: Any = None

    async def prepare(self) -> None:
        self.news = await self.worker.subscribe("worker.bench-worker.granted")
        fields = {"capabilities": ["bench"], "slots": SESSIONS, "lease_s": 3600.0}
        await self.worker.ask("worker:register", fields)
        for number in range(SESSIONS):
            await self.requester.ask("session:create", session_id=f"s{number}")

    async def submit(self, number: int = 0, **more: Any) -> str:
        fields = {"session_id": f"s{number}", "prompt": "x" * 200, "requires": "bench", **more}
        return str((await self.requester.ask("completion:async", fields))["request_id"])

    async def pushed(self) -> str:
        return str((await self.news.next(10.0)).message["request_id"])

    async def granted(self, request_id: str) -> dict[str, Any]:
        """Return a grant that was pushed, with its prompt."""
        page = await self.worker.ask(
            "worker:grants", worker="bench-worker", request_ids=[request_id]
        )
        (grant,) = page["grants"]
        assert grant["request_id"] == request_id, page
        return dict(grant)

    async def report(self, grant: dict[str, Any]) -> None:
        ours = {name: grant[name] for name in ("request_id", "attempt")}
        reply = await self.worker.ask("worker:report", {**ours, "result": {"response": "y"}})
        assert reply["status"] == "completed", reply

    async def work(self, request_id: str) -> None:
        await self.report(await self.granted(request_id))

    async def one_by_one(self, requests: int) -> list[float]:
        taken_s = []
        for _ in range(requests):
            begun_s = time.perf_counter()
            submitted = asyncio.create_task(self.submit())
            grant = await self.granted(await self.pushed())
            taken_s.append(time.perf_counter() - begun_s)
            assert grant["request_id"] == await submitted
            await self.report(grant)
        return taken_s

    async def parts(self, requests: int) -> tuple[list[float], list[float]]:
        """Time a synced command and a query, each alone."""
        appended_s, asked_s = [], []
        for _ in range(requests):
            begun_s = time.perf_counter()
            await self.requester.ask(
                "session:append", session_id="s0", event="note", data={"text": "x" * 200}
            )
            appended_s.append(time.perf_counter() - begun_s)
            begun_s = time.perf_counter()
            reply = await self.requester.ask("session:get", session_id="s0")
            asked_s.append(time.perf_counter() - begun_s)
            assert reply["session_id"] == "s0", reply
        return appended_s, asked_s

    async def many(self, requests: int) -> float:
        """Return how many requests a second are submitted, granted and reported."""
        each = max(1, requests // SESSIONS)
        begun_s = time.perf_counter()
        submitted = asyncio.gather(
            *(self.submit(number) for _ in range(each) for number in range(SESSIONS))
        )
        work = []
        for _ in range(each * SESSIONS):
            work.append(asyncio.create_task(self.work(await self.pushed())))
        await asyncio.gather(submitted, *work)
        return each * SESSIONS / (time.perf_counter() - begun_s)

    async def fill(self, client: AsyncClient, waiting: int) -> None:
        """Let requests wait for a worker that does not come, in sessions of their own."""
        for number in range(10):
            await client.ask("session:create", session_id=f"full-{number}")
        for start in range(0, waiting, 500):
            fields = {"prompt": "x" * 200, "requires": "nobody"}
            await asyncio.gather(
                *(
                    client.ask(
                        "completion:async",
                        {**fields, "session_id": f"full-{number % 10}"},
                        timeout_s=30.0,
                    )
                    for number in range(start, min(start + 500, waiting))
                )
            )


async def measure(options: Options, system: System, report: Report) -> None:
    bench = Bench(system)
    await bench.prepare()
    requests = options.more.requests
    measured: dict[str, list[list[float]]] = {}
    rates: list[float] = []
    for number in range(options.rounds + 1):
        say(f"round {number} of {options.rounds}")
        appended_s, asked_s = await bench.parts(requests)
        sides = {"append": appended_s, "get": asked_s, "empty": await bench.one_by_one(requests)}
        rate = await bench.many(requests)
        if number:  # the first is for warming up
            rates.append(rate)
            for side, taken_s in sides.items():
                measured.setdefault(side, []).append(taken_s)
    await bench.fill(bench.requester, options.more.waiting)
    for _ in range(options.rounds):
        measured.setdefault("full", []).append(await bench.one_by_one(requests))
    for client in (bench.worker, bench.requester):
        await client.close()
    add_rows(report, measured, rates, options.more.waiting)


def add_rows(
    report: Report, measured: dict[str, list[list[float]]], rates: list[float], waiting: int
) -> None:
    def us(side: str, part: float) -> list[float]:
        return [percentile(taken_s, part) * 1e6 for taken_s in measured[side]]

    parts = [one + other for one, other in zip(us("append", 0.5), us("get", 0.5), strict=True)]
    for what, side in (("empty queue", "empty"), (f"{waiting} waiting", "full")):
        for name, part in (("p50", 0.5), ("p99", 0.99)):
            report.add(
                f"submit to grant, {what}, {name} us",
                f"{spread(us(side, part)):.0f}",
                f"{spread(parts):.0f}",
                ratio=ratios(us(side, part), parts),
            )
    report.add(f"{SESSIONS} sessions, submitted, granted and reported/s", f"{spread(rates):.0f}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=REQUESTS, help="a round")
    parser.add_argument("--waiting", type=int, default=WAITING, help="requests that only wait")


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.requests, options.more.waiting = 20, 100
        report = Report(
            "a request, from completion:async to its grant; the other side: p50 of a synced "
            "append and of a query"
        )
        with System(options.directory / "var") as system:
            asyncio.run(measure(options, system, report))
        report.show()


if __name__ == "__main__":
    main()
