"""What was acknowledged survives kill -9 of any owner, once and in order.

Four client processes of sixteen callers append to two hundred sessions while owners are killed at
random moments. Each caller notes what was acknowledged; at the end the files must say the same.
The seed is printed: `KSI_SEED=... bin/test tests/faults` repeats the choices.
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
from typing import Any

import pytest
from system import System

CLIENTS = 4
CALLERS = 16
SESSIONS = 200
CLIENT = Path(__file__).parent.parent / "storm_client.py"


def test_two_hundred_kills_lose_double_and_reorder_nothing(system: System, tmp_path: Path) -> None:
    _storm(system, tmp_path, 200)


@pytest.mark.soak
def test_a_thousand_kills_lose_double_and_reorder_nothing(system: System, tmp_path: Path) -> None:
    _storm(system, tmp_path, 1000)


def _storm(system: System, tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    outs = [tmp_path / f"acked-{n}.json" for n in range(CLIENTS)]
    clients = []
    for n, out in enumerate(outs):
        words = [system.var, f"storm-{n}", seed + n, CALLERS, SESSIONS // CLIENTS, out]
        command = [sys.executable, str(CLIENT), *map(str, words)]
        clients.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    killed: Counter[str] = Counter()
    while killed.total() < kills:
        time.sleep(chance.uniform(0.02, 0.25))  # It may come at any moment.
        name = chance.choices(["sessions", "registry", "files"], [5, 1, 2])[0]
        pid = system.pid_of(name)
        if pid is not None:
            with suppress(ProcessLookupError):  # It may just be replaced by another.
                os.kill(pid, signal.SIGKILL)
                killed[name] += 1
    for client in clients:
        client.communicate(timeout=90)
        assert client.returncode == 0

    time.sleep(1.0)  # The promise: in the files within a second of the last acknowledgement.
    acked = [tuple(each) for out in outs for each in json.loads(out.read_text())]
    print(f"{len(acked)} acknowledged, killed {dict(killed)}")
    assert len(acked) > 1000, "the storm proves nothing without load"
    _require_exactly_once(system.var, acked)
    system.stop()
    _require_exactly_once(system.var, acked)


def _require_exactly_once(var: Path, acked: list[Any]) -> None:
    entries: dict[str, list[str]] = {}
    for path in (var / "logs/responses/sessions").glob("*.jsonl"):
        content = path.read_bytes()
        assert content.endswith(b"\n") or not content
        lines = [json.loads(line) for line in content.splitlines()]
        numbers = [line["metadata"]["seq"] for line in lines]
        assert numbers == list(range(1, len(lines) + 1)), path.name
        entries[path.stem] = [line["data"]["token"] for line in lines]
    tokens = Counter(token for lines in entries.values() for token in lines)
    assert not [token for token, count in tokens.items() if count > 1], "an entry was doubled"
    for session, seq, token in acked:
        assert entries[session][seq - 1] == token, f"{token} is not entry {seq} of {session}"
