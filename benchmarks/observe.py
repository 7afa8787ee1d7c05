"""The event log: how soon the newest are found, and what an observer who hangs costs his target.

The log is filled by appends, each an event. Then its newest 100, a page of 100 of those before one
of the newest 10,000, and the very first by its correlation id are asked for, and read in place.
The target appends one by one, without an observer and with one who is stopped while he observes; he
then goes on, and must see every entry once.

    python -m benchmarks.observe
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Any, Final

from benchmarks.measuring import (
    TOLD_AT_ONCE,
    WAIT_S,
    Options,
    Report,
    System,
    Target,
    measuring,
    percentile,
    ratios,
    say,
    spread,
    timed,
    wait_until,
)
from ksi.transport import Client

EVENTS: Final = 100_000
NEWEST: Final = 10_000
PAGE: Final = 100
QUESTIONS: Final = 200  # a round
APPENDS: Final = 3_000  # a round
RING: Final = Target("≤", 5, "ms")
FIRST: Final = Target("≤", 200, "ms")
HUNG: Final = Target("≤", 1.1)
EYE: Final[dict[str, Any]] = {"subscription_id": "eye"}
_SPAWN: Final = multiprocessing.get_context("spawn")


def fill(client: Client, events: int) -> None:
    """Have this many entries logged; the first alone has its correlation id."""
    client.ask("session:create", session_id="plan")
    data = {"text": "x" * 200}
    for number in range(events):
        client.tell(
            "session:append", session_id="plan", event="note", data=data,
            correlation_id="the-first" if number == 0 else f"c{number}",
        )  # fmt: skip
        if number % TOLD_AT_ONCE == 0:
            client.flush(WAIT_S)
    client.flush(WAIT_S)
    wait_until(
        lambda: not any(client.read("event_log:stats")["behind"].values()), "all is logged", 120.0
    )


def questions(call: Callable[..., Any], newest: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is asked, by name; `call` asks or reads."""
    chance = random.Random(1)
    ring = range(max(PAGE, newest - NEWEST + PAGE), newest)

    def page() -> dict[str, Any]:
        found: dict[str, Any] = call("monitor:get_events", limit=PAGE, after=chance.choice(ring))
        return found

    return {
        "the newest 100": lambda: call("monitor:get_events", limit=PAGE),
        "100 of the newest 10,000": page,
    }


def find(options: Options, client: Client, report: Report) -> None:
    """Measure questions to the log and add the rows."""
    newest = client.read("event_log:newest")["n"]
    times = 10 if options.quick else QUESTIONS
    for way, call in (("ask", client.ask), ("read", client.read)):
        for what, question in questions(call, newest).items():
            timed(question, 3, lambda found: len(found["events"]) == PAGE)
            rounds = []
            for number in range(options.rounds):
                say(f"{what}, {way}, round {number + 1} of {options.rounds}")
                taken_s = timed(question, times, lambda found: len(found["events"]) == PAGE)
                rounds.append(percentile(taken_s, 0.5) * 1e3)
            median = spread(rounds)
            report.add(f"{what}, {way}, p50 ms", f"{median:.2f}", target=RING, value=median.median)
        taken_s = timed(
            partial(call, "monitor:get_correlation_chain", correlation_id="the-first"),
            max(1, times // 20),
            lambda found: [each["data"]["seq"] for each in found["events"]] == [1],
        )
        first = percentile(taken_s, 0.5) * 1e3
        report.add(
            f"the first by its correlation id, {way}, p50 ms", f"{first:.1f}",
            target=FIRST, value=first,
        )  # fmt: skip


def watch(place: str, seen: Any, total: int) -> None:
    """Be an observer: see this many entries, each once and in order, then end it."""
    with Client("eye", var=place) as eye:
        eye.ask("observation:subscribe", target="target", events=["session:appended"], **EYE)
        seen[0] = last = 0
        while seen[0] < total:
            page = eye.read("observation:next", **EYE, limit=1000)
            for event in page["events"]:
                assert last in (0, event["data"]["seq"] - 1), "an entry was missed or repeated"
                last = event["data"]["seq"]
            if page["events"]:
                eye.ask("observation:ack", **EYE, upto=page["upto"])
            seen[0] += len(page["events"])
            if not page["more"]:
                time.sleep(0.002)  # A poll, as `ksi observe` does.
        eye.ask("observation:unsubscribe", **EYE)


def has_seen(seen: Any, count: int) -> bool:
    return bool(seen[0] == count)


def appends(target: Client, count: int) -> list[float]:
    """Return how long each of some appends took, in seconds."""
    return timed(
        lambda: target.ask("session:append", session_id="seen", event="note", data={"n": 1}),
        count,
        lambda reply: reply["epoch"] == 1,
    )


def hang(options: Options, system: System, report: Report) -> None:
    """Compare a target's appends without an observer and with one that is stopped."""
    count = 100 if options.quick else APPENDS
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    with system.client("target") as target:
        target.ask("session:create", session_id="seen")
        for number in range(options.rounds + 1):  # The first one is for warming up.
            say(f"a hung observer, round {number} of {options.rounds}")
            alone.append(appends(target, count))
            seen = RawArray("q", [-1])
            observer = _SPAWN.Process(target=watch, args=(str(system.var), seen, count + 10))
            observer.start()
            wait_until(partial(has_seen, seen, 0), "the observer has begun")
            appends(target, 10)
            wait_until(partial(has_seen, seen, 10), "the observer sees")
            assert observer.pid is not None
            os.kill(observer.pid, signal.SIGSTOP)
            beside.append(appends(target, count))
            assert seen[0] == 10, "the observer did not hang"
            os.kill(observer.pid, signal.SIGCONT)
            observer.join(WAIT_S)
            assert observer.exitcode == 0, "the observer has not seen all"
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        without = [percentile(each, part) * 1e6 for each in alone[1:]]
        with_it = [percentile(each, part) * 1e6 for each in beside[1:]]
        report.add(
            f"append, {name} us, beside a hung observer / without one",
            f"{spread(with_it):.0f}",
            f"{spread(without):.0f}",
            ratio=ratios(with_it, without),
            target=HUNG if name == "p99" else None,
        )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=int, default=EVENTS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        events = 2_000 if options.quick else options.more.events
        report = Report(f"the event log, {events} events")
        with System(options.directory / "var") as system:
            with system.client() as client:
                fill(client, events)
                find(options, client, report)
            hang(options, system, report)
        report.show()


if __name__ == "__main__":
    main()
