"""What a thousand times as many entities cost: create, update, relate, push, query, walk, count.

A system for each size, all alive at once, so that the rounds of all sizes take turns on the same
disk. Entities are drawn at random; each is related to two others. Queries are answered by the owner
and look for ten entities of those there are. `--full` goes on to a million entities.

    python -m benchmarks.state
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
from collections.abc import Callable
from typing import Any, Final

from benchmarks.measuring import (
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
)
from ksi.transport import Client

SIZES: Final = (1_000, 10_000, 100_000)
FULL: Final = 1_000_000
ASKS: Final = 200
BULK: Final = 2_000
MATCHES: Final = 10  # Entities that a query finds.
GROWTH: Final = Target("≤", 1.5)


class Size:
    """One system with so many entities, and what was measured of it, a figure a round."""

    def __init__(self, system: System, entities: int) -> None:
        self.system = system
        self.entities = entities
        self.figures: dict[str, list[float]] = {}
        self._more = itertools.count(entities)

    def fill(self) -> None:
        with self.system.client() as client:
            for start in range(0, self.entities, BULK):
                numbers = range(start, min(start + BULK, self.entities))
                made = client.ask(
                    "state:entity:bulk_create", entities=[entity(n) for n in numbers], timeout_s=60
                )
                assert made["success"] == len(numbers), made
            for number in range(0, self.entities, max(1, self.entities // BULK)):
                for other in (number // 2, self.entities - 1 - number):
                    ends = {"from_id": name(number), "to_id": name(other)}
                    client.tell(
                        "state:relationship:create", **ends, relation_type="to", upsert=True
                    )
            client.flush(60)

    def measure(self, asks: int) -> None:
        with self.system.client() as client:
            for what, ask, right in self._asked(client):
                taken = timed(ask, asks, right)
                self.figures.setdefault(what, []).append(percentile(taken, 0.5) * 1e6)

    def _asked(self, client: Client) -> list[tuple[str, Callable[[], Any], Callable[[Any], bool]]]:
        """Return what is measured: its name, how it is asked, and whether a reply is right."""
        ask = client.ask
        queue: dict[str, Any] = {"namespace": "bench", "key": "q"}

        def query(**fields: Any) -> Any:
            return ask("state:entity:query", type="task", limit=MATCHES, **fields)

        def full(page: Any) -> bool:
            return bool(page["count"] == MATCHES)

        def changed(reply: Any) -> bool:
            return bool(reply["revision"] > 0)

        return [
            ("create", lambda: ask("state:entity:create", entity(next(self._more))), changed),
            ("update", lambda: ask(
                "state:entity:update", id=self._drawn(), properties={"n": random.random()}
            ), changed),
            ("push and pop", lambda: (
                ask("async_state:push", **queue, data=1), ask("async_state:pop", **queue),
            )[1], lambda reply: [each["data"] for each in reply["items"]] == [1]),
            ("get", lambda: ask("state:entity:get", id=self._drawn()),
             lambda view: "part" in view["properties"]),
            ("query by value", lambda: query(
                where={"part": random.randrange(self.entities // MATCHES)}
            ), full),
            ("query in the order of a value", lambda: query(order_by="part"), full),
            ("query of the newest", query, full),
            ("walk of two steps", lambda: ask(
                "state:graph:traverse", from_id=name(0), depth=2
            ), lambda graph: graph["node_count"] > 1),
            ("count by type", lambda: ask("state:aggregate:count", group_by="type"),
             lambda count: count["count"] >= self.entities),
        ]  # fmt: skip

    def _drawn(self) -> str:
        return name(random.randrange(self.entities))


def name(number: int) -> str:
    return f"task_{number:07}"


def entity(number: int) -> dict[str, Any]:
    properties = {"part": number // MATCHES, "n": float(number), "text": f"what task {number} is"}
    return {"id": name(number), "type": "task", "properties": properties}


def measure(options: Options, sizes: list[Size]) -> None:
    """Measure all sizes in turns."""
    for size in sizes:
        say(f"creating {size.entities} entities")
        size.fill()
    for number in range(options.rounds):
        for size in sizes:
            say(f"round {number + 1} of {options.rounds}, {size.entities} entities")
            size.measure(options.more.asks)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help=f"up to {FULL} entities")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of entities {SIZES}")
    parser.set_defaults(asks=ASKS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        more = options.more
        wanted = more.sizes or (*SIZES, FULL) if more.full else more.sizes or SIZES
        if options.quick:
            wanted, more.asks = (50, 100), 5
        report = Report(f"state; the other side: the same with {wanted[0]} entities")
        with contextlib.ExitStack() as ending:
            sizes = [
                Size(ending.enter_context(System(options.directory / f"var-{number}")), number)
                for number in wanted
            ]
            measure(options, sizes)
        first, last = sizes[0], sizes[-1]
        for what in first.figures:
            for size in sizes:
                report.add(
                    f"{what}, {size.entities} entities, p50 us",
                    f"{spread(size.figures[what]):.1f}",
                    f"{spread(first.figures[what]):.1f}",
                    ratio=ratios(size.figures[what], first.figures[what]),
                    target=GROWTH if size is last else None,
                )
        report.show()


if __name__ == "__main__":
    main()
