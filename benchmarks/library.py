"""The library: how fast conversations and compositions are found, and how soon what is new.

Logs of two lines each, as the Claude command line writes them, and compositions are made; or those
of `--logs` and `--compositions` are taken. Searches are read in place by a client, decoded, with
previews from the files. Every count is compared with what was written. Then 64 callers append as
fast as they can, with the library following and with its process stopped: what following costs.

    python -m benchmarks.library
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.append import CALLERS, Sessions
from benchmarks.measuring import (
    Options,
    Report,
    System,
    Target,
    create_sessions,
    measuring,
    percentile,
    ratios,
    say,
    spread,
    wait_until,
)
from ksi.transport import Client

LOGS: Final = 10_000
COMPOSITIONS: Final = 470
WORDS: Final = [
    f"{a}{b}" for a in "bdfgklmnprstv" for b in ("ando", "elit", "irum", "osta", "ulan")
]
TEXT_WORDS: Final = 150
SEARCHES: Final = 50
ROUND_S: Final = 2.0
TARGET: Final = Target("≤", 50, "ms")
WAIT_S: Final = 120.0


def make_logs(folder: Path, count: int, chance: random.Random) -> None:
    """Write logs of a question and its answer each; every hundredth speaks of a zebra."""
    folder.mkdir()
    for n in range(count):
        text = " ".join(chance.choices(WORDS, k=TEXT_WORDS)) + (" zebra" if n % 100 == 0 else "")
        at = 1_750_000_000.0 + n
        lines = (
            {"timestamp": at, "type": "human", "content": "what next?"},
            {"type": "claude", "subtype": "success", "result": text, "timestamp": at + 1},
        )
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"log{n}.jsonl").write_text(content)


def make_compositions(folder: Path, count: int, chance: random.Random) -> None:
    """Write compositions with some tags each."""
    folder.mkdir()
    for n in range(count):
        tags = ", ".join(chance.sample(WORDS[:20], 3))
        front = f"---\nname: c{n}\ncomponent_type: t{n % 7}\ntags: [{tags}]\n---\n"
        (folder / f"c{n}.md").write_text(front + "Do as you are told.\n" * 20)


def timed(ask: Callable[[], Any], count: int) -> list[float]:
    """Return how long each of some calls took, in ms."""
    taken_ms = []
    for _ in range(count):
        begun_s = time.perf_counter()
        ask()
        taken_ms.append((time.perf_counter() - begun_s) * 1e3)
    return taken_ms


def wait_for(client: Client, operation: str, field: str, least: int | str) -> None:
    """Wait until a follower says that it is as far as that."""
    what = f"{field} {least} in {operation}"
    wait_until(lambda: client.read(operation)[field] >= least, what, WAIT_S)


def measure_conversations(options: Options, report: Report, client: Client, logs: Path) -> None:
    """Import, make again, search, and add the rows."""
    begun_s = time.perf_counter()
    number = client.ask("conversation:import", path=str(logs))["number"]
    wait_for(client, "conversation:status", "imported", number)
    imported_s = time.perf_counter() - begun_s
    stats = client.read("conversation:stats")
    lines = stats["total_messages"]
    assert stats["total_conversations"] == len(list(logs.glob("*.jsonl")))
    say(f"{stats['total_conversations']} conversations, {lines} messages")
    report.add(
        f"import of {stats['total_conversations']} logs, lines/s", f"{lines / imported_s:.0f}"
    )
    begun_s = time.perf_counter()
    order = client.ask("conversation:rebuild_index")["number"]
    wait_for(client, "conversation:status", "rebuilt", order)
    report.add("made again, lines/s", f"{lines / (time.perf_counter() - begun_s):.0f}")
    count = 5 if options.quick else SEARCHES
    for name, query in queries(options):
        found = client.read("conversation:search", query=query)
        what = f"search, {name}: {found['total_matches']} matches"
        taken = timed(partial(client.read, "conversation:search", query=query), count)
        p50, p99 = percentile(taken, 0.5), percentile(taken, 0.99)
        report.add(f"{what}, p50 ms (p99)", f"{p50:.1f} ({p99:.1f})", target=TARGET, value=p50)
    taken = timed(lambda: client.read("conversation:list", limit=100), count)
    report.add("list of 100, p50 ms", f"{percentile(taken, 0.5):.1f}")


def queries(options: Options) -> list[tuple[str, str]]:
    """Return what is searched for, by what it is an example of."""
    if options.more.logs is not None:
        words = [("a rare word", "consciousness"), ("a common word", "the")]
        return [*words, ("a phrase", '"session boundaries"')]
    phrase = f'"{WORDS[3]} {WORDS[5]}"'
    return [("a rare word", "zebra"), ("a common word", WORDS[0]), ("a phrase", phrase)]


def measure_compositions(options: Options, report: Report, client: Client, folder: Path) -> None:
    """List and edit, and add the rows."""
    count = 5 if options.quick else SEARCHES
    files = len(list(folder.rglob("*.md"))) + len(list(folder.rglob("*.yaml")))
    status = client.read("composition:status")
    assert status["indexed"] + status["rejected"] + status["excluded"] == files, status
    filters = {"tags": [WORDS[1]]} if options.more.compositions is None else {"type": "core"}
    taken = timed(lambda: client.read("composition:list", limit=1000, **filters), count)
    report.add(
        f"compositions listed by a filter, of {files}, p50 ms", f"{percentile(taken, 0.5):.1f}"
    )
    begun_s = time.perf_counter()
    order = client.ask("composition:rebuild_index")["number"]
    wait_for(client, "composition:status", "rebuilt", order)
    report.add("made again, files/s", f"{files / (time.perf_counter() - begun_s):.0f}")
    if options.more.compositions is None:
        lags_ms = []
        for n in range(count):
            (folder / "c0.md").write_text(f"---\nname: edit{n}\ntype: t\n---\n")
            begun_s = time.perf_counter()
            while not client.read("composition:list", name=f"edit{n}")["count"]:
                time.sleep(0.001)  # A poll, as fine as what it measures.
            lags_ms.append((time.perf_counter() - begun_s) * 1e3)
        report.add("from an edit to the answer, p50 ms", f"{percentile(lags_ms, 0.5):.0f}")


async def measure_load(options: Options, system: System, report: Report) -> None:
    """Append with the library following and with it stopped, in turns, and add the rows."""
    following: list[float] = []
    stopped: list[float] = []
    caught_up_s: list[float] = []
    count = max(CALLERS)
    pid = system.stat("library").pid
    async with system.async_client() as client:
        await create_sessions(client, 0, count)
        sessions = Sessions(client, system)
        for number in range(options.rounds + 1):
            say(f"load, round {number} of {options.rounds}")
            os.kill(pid, signal.SIGSTOP)
            try:
                without = await sessions.run(count, options.more.seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            await asyncio.to_thread(wait_until, lambda: caught_up(system), "", WAIT_S)
            beside = await sessions.run(count, options.more.seconds)
            begun_s = time.perf_counter()
            await asyncio.to_thread(wait_until, lambda: caught_up(system), "", WAIT_S)
            if number:  # The first round is for warming up.
                caught_up_s.append(time.perf_counter() - begun_s)
                following.append(beside.per_s)
                stopped.append(without.per_s)
    report.add(
        f"{count} callers, appends/s", f"{spread(following):.0f}", f"{spread(stopped):.0f}",
        ratio=ratios(following, stopped),
    )  # fmt: skip
    report.add("behind when the load ends, s", f"{spread(caught_up_s):.2f}")


def caught_up(system: System) -> bool:
    with system.client("looking") as client:
        said = sum(each["seq"] for each in client.read("session:list", limit=1000)["sessions"])
        listed = client.read("conversation:list", limit=1000, sort_by="message_count")
        rows = [each for each in listed["conversations"] if each["origin"] == "session"]
        return bool(sum(each["message_count"] for each in rows) == said)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--logs", type=Path, help="logs to import, in place of made ones")
    parser.add_argument("--compositions", type=Path, help="a folder of compositions, likewise")
    parser.add_argument("--count", type=int, default=LOGS, help=f"of made logs [{LOGS}]")
    parser.add_argument("--seconds", type=float, default=ROUND_S, help="of a round of one side")


def main() -> None:
    with measuring(__doc__, arguments) as options:
        chance = random.Random(1)
        logs, folder = options.more.logs, options.more.compositions
        if options.quick:
            options.more.seconds = 0.2
        if logs is None:
            logs = options.directory / "logs"
            make_logs(logs, 200 if options.quick else options.more.count, chance)
        if folder is None:
            folder = options.directory / "compositions"
            make_compositions(folder, 20 if options.quick else COMPOSITIONS, chance)
        report = Report("the library; the other side: the same with its process stopped")
        with (
            System(options.directory / "var", compositions__folder=str(folder.resolve())) as system,
            system.client("operator", "operator") as client,
        ):
            wait_for(client, "composition:status", "state", "following")
            measure_conversations(options, report, client, logs.resolve())
            measure_compositions(options, report, client, folder)
            asyncio.run(measure_load(options, system, report))
        report.show()


if __name__ == "__main__":
    main()
