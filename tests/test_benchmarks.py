"""Every benchmark runs, looks at its replies and shows its table; the figures here mean nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
# What the table of each must hold, besides the probe of the disk before and after it.
ROWS = {
    "append": ["64 callers, appends/s", "16 callers", "1 caller", "processes", "appends a sync"],
    "ask": ["raw echo over CURVE, p50", "Client.ask, p50", "AsyncClient.ask, p99"],
    "checkpoint": ["the longest append meanwhile, ms", "until it is whole, s"],
    "completion": ["empty queue, p50 us", "100 waiting, p99 us", "granted and reported/s"],
    "dev": ["edit to first answer, s", "the slowest of them, s"],
    "growth": ["append, 64 callers, 100 sessions", "append, 1 caller", "ask", "read", "restart"],
    "index": [
        "64 callers, appends/s",
        "from the reply to the row, p99 ms",
        "built again",
        "verified, lines/s",
    ],
    "library": [
        "import of",
        "search, a rare word: 2 matches, p50 ms",
        "from an edit to the answer",
        "64 callers, appends/s",
    ],
    "memory": ["supervisor", "sessions", "the idle system, MB", "a client over its imports"],
    "observe": [
        "the newest 100, ask, p50 ms",
        "100 of the newest 10,000, read, p50 ms",
        "the first by its correlation id, ask, p50 ms",
        "append, p99 us, beside a hung observer / without one",
    ],
    "publish": ["1 subscriber, messages/s", "10 subscribers", "100 subscribers", "silently lost"],
    "read": ["decoded, p50 us", "typed, owner stopped, p50 us"],
    "restart": ["kills, p50 ms", "kills, p99 ms"],
    "start_stop": ["start, cold", "start, warm", "stop, warm"],
    "state": ["create, 100 entities", "query by value", "walk of two steps", "count by type"],
    "status": ["ksi status --json, ms"],
}


def run(name: str, place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("KSI_")}
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--directory", str(place)],
        cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def test_every_benchmark_is_expected_to_show_something() -> None:
    assert set(COMMANDS) == set(ROWS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    for row in ROWS[name]:
        assert row in done.stdout
    assert re.search(r"before: p50 \d+ us.*\n(.*\n)+raw append.* after: p50 \d+ us", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_without_redis_a_benchmark_says_so_once_and_measures_our_side(tmp_path: Path) -> None:
    done = run("read", tmp_path, PATH="/nowhere")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("no comparison with Redis: redis-server") == 1
    assert "read, typed, p50 us" in done.stdout
    assert "GET in us" not in done.stdout
