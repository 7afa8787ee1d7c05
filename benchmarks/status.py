"""`ksi status --json` with 1,000 agents and 100,000 sessions: wall time of the command.

The other side is an interpreter that starts and ends, and one that imports click besides.

    python -m benchmarks.status
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from typing import Final

from benchmarks.measuring import (
    Options,
    Report,
    System,
    Target,
    create_sessions,
    ksi,
    measuring,
    ratios,
    say,
    spread,
)

AGENTS: Final = 1_000
SESSIONS: Final = 100_000
TARGET_MS: Final = Target("≤", 200, "ms")
TIMES: Final = 3  # a round


async def fill(system: System, agents: int, sessions: int) -> None:
    async with system.async_client("bench-operator", role="operator") as operator:
        registered = await asyncio.gather(
            *(
                operator.ask("agent:register", agent_id=f"agent-{number}")
                for number in range(agents)
            )
        )
        assert {each["agent_id"] for each in registered} == {f"agent-{n}" for n in range(agents)}
    async with system.async_client() as client:
        await create_sessions(client, 0, sessions)


def run_python(code: str) -> float:
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    return time.perf_counter() - begun_s


def measure(options: Options, system: System, report: Report) -> None:
    ours: list[float] = []
    bare: list[float] = []
    click: list[float] = []
    for number in range(options.rounds * TIMES):
        say(f"status {number + 1} of {options.rounds * TIMES}")
        status, taken_s = ksi(system.var, "status")
        assert status["healthy"], status["problems"]
        assert status["sessions"] == options.more.sessions, status
        assert status["agents"] == options.more.agents, status
        ours.append(taken_s * 1e3)
        bare.append(run_python("pass") * 1e3)
        click.append(run_python("import click") * 1e3)
    report.add(
        "ksi status --json, ms",
        f"{spread(ours):.0f}",
        f"{spread(bare):.0f}",
        ratio=ratios(ours, bare),
        target=TARGET_MS,
        value=spread(ours).median,
    )
    report.add("the same against `import click`", f"{spread(ours):.0f}", f"{spread(click):.0f}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--sessions", type=int, default=SESSIONS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.agents, options.more.sessions = 20, 100
        more = options.more
        report = Report(f"{more.agents} agents, {more.sessions} sessions; the other side: python")
        with System(options.directory / "var") as system:
            say("creating agents and sessions")
            asyncio.run(fill(system, more.agents, more.sessions))
            measure(options, system, report)
        report.show()


if __name__ == "__main__":
    main()
