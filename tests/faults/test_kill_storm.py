"""What was acknowledged survives kill -9 of any owner, once and in order.

Four client processes of sixteen callers append to two hundred sessions, and read them, while owners
are killed at random moments, one in seven of them stopped first. Each caller notes what it did and
when; at the end that must be a history of one log a session, and session files, view, journal and
index must hold that log. The seed is printed: `KSI_SEED=... bin/test tests/faults` repeats the
choices.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from agreement import PATIENCE_S, require_agreement, tokens_of
from history import Operation, violations
from system import System
from trouble import until
from weather import WEATHER

from ksi.actors.stat import read_stat
from ksi.transport.identity import run_directory

CLIENTS = 4
CALLERS = 16
SESSIONS = 200
CLIENT = Path(__file__).parent.parent / "storm_client.py"


def test_two_hundred_kills_lose_double_and_reorder_nothing(system: System, tmp_path: Path) -> None:
    _storm(system, tmp_path, 200)


@pytest.mark.soak
def test_a_thousand_kills_lose_double_and_reorder_nothing(system: System, tmp_path: Path) -> None:
    _storm(system, tmp_path, 1000, least=1_000_000)


def test_frames_that_come_twice_late_or_never_and_jumping_clocks_lose_and_double_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CLIENT.parent))
    running = System(tmp_path / "var", WEATHER)
    try:
        _storm(running, tmp_path, 8, least=100)
    finally:
        running.end()


@pytest.mark.soak
def test_three_hundred_kills_in_bad_weather_lose_and_double_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CLIENT.parent))
    running = System(tmp_path / "var", WEATHER)
    try:
        _storm(running, tmp_path, 300)
    finally:
        running.end()


def _storm(system: System, tmp_path: Path, kills: int, least: int = 1000) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    outs = [tmp_path / f"acked-{n}.json" for n in range(CLIENTS)]
    clients = []
    for n, out in enumerate(outs):
        words = [system.var, f"storm-{n}", seed + n, CALLERS, SESSIONS // CLIENTS, out]
        command = [sys.executable, str(CLIENT), *map(str, words)]
        clients.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    killed = strike(system, chance, kills)
    stat = run_directory(system.var) / "sessions.stat"
    until(lambda: (now := read_stat(stat)) and now.journal_seq > least + SESSIONS, PATIENCE_S)
    for client in clients:
        client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 0

    history = [Operation(*each) for out in outs for each in json.loads(out.read_text())]
    reads = sum(each.token is None for each in history)
    print(f"{len(history) - reads} acknowledged, {reads} reads, {dict(killed)}")
    assert len(history) - reads >= least, "the storm proves nothing without load"
    require_agreement(system)
    assert list(violations(history, tokens_of(system.var)))[:5] == []
    system.stop()
    assert list(violations(history, tokens_of(system.var)))[:5] == []


def strike(system: System, chance: random.Random, kills: int) -> Counter[str]:
    """Kill owners and followers at random moments; return how often which."""
    killed: Counter[str] = Counter()
    while killed.total() - killed["stopped first"] < kills:
        time.sleep(chance.uniform(0.02, 0.25))  # When it strikes is drawn.
        name = chance.choices(["sessions", "registry", "files", "index"], [5, 1, 2, 1])[0]
        is_stopped = chance.random() < 1 / 7
        pid = system.pid_of(name)
        if pid is None:
            continue
        with suppress(ProcessLookupError):  # It may just be replaced by another.
            if is_stopped:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(chance.uniform(0.01, 0.1))  # As long it is stopped.
                killed["stopped first"] += 1
            os.kill(pid, signal.SIGKILL)
            killed[name] += 1
    return killed
