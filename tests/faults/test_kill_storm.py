"""What was acknowledged survives kill -9 of any owner, once and in order.

Four client processes of sixteen callers append to two hundred sessions while owners are killed at
random moments. Each caller notes what was acknowledged; at the end the files must say the same.
The seed is printed: `KSI_SEED=... bin/test tests/faults` repeats the choices.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from system import System

from ksi.transport import AsyncClient

CLIENTS = 4
CALLERS = 16
SESSIONS = 200
KILLS = 200
Acked = list[tuple[str, int, str]]  # session, seq, token


async def _append(var: Path, name: str, seed: int, stop: Any, acked: Acked) -> None:
    chance = random.Random(seed)
    async with AsyncClient(name, var=var) as client:
        created = [
            client.ask("session:create", title=f"storm {n}", timeout_s=60)
            for n in range(SESSIONS // CLIENTS)
        ]
        sessions = [each["session_id"] for each in await asyncio.gather(*created)]

        async def caller(number: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                session, token = chance.choice(sessions), f"{name}-{number}-{count}"
                reply = await client.ask(
                    "session:append",
                    session_id=session,
                    event="note",
                    data={"token": token},
                    timeout_s=60,
                )
                acked.append((session, reply["seq"], token))

        await asyncio.gather(*(caller(number) for number in range(CALLERS)))


def _client(var: Path, name: str, seed: int, stop: Any, out: Path) -> None:
    acked: Acked = []
    asyncio.run(_append(var, name, seed, stop, acked))
    out.write_text(json.dumps(acked))


def test_two_hundred_kills_lose_double_and_reorder_nothing(system: System, tmp_path: Path) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    outs = [tmp_path / f"acked-{n}.json" for n in range(CLIENTS)]
    clients = [
        spawn.Process(target=_client, args=(system.var, f"storm-{n}", seed + n, stop, out))
        for n, out in enumerate(outs)
    ]
    for client in clients:
        client.start()

    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        time.sleep(chance.uniform(0.02, 0.25))
        name = chance.choices(["sessions", "registry", "files"], [5, 1, 2])[0]
        pid = system.pid_of(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed[name] += 1
    stop.set()
    for client in clients:
        client.join(90)
        assert client.exitcode == 0

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
