"""One client process of the kill storm: appends and reads until its standard input is closed.

`python storm_client.py VAR NAME SEED CALLERS SESSIONS OUT`; OUT gets what was done and when: JSON,
a list of the fields of `history.Operation`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from ksi.transport import AsyncClient

PATIENCE_S = 60.0
READS = 0.1  # One in so many operations: half of them answered by the owner, half read in place.

Done = tuple[str, str | None, int, float, float]


async def storm(var: Path, name: str, seed: int, callers: int, sessions: int) -> list[Done]:
    """Append and read from so many callers in so many sessions; return what was done."""
    chance = random.Random(seed)
    done: list[Done] = []
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    async with AsyncClient(name, var=var) as client:
        created = [client.ask("session:create", timeout_s=PATIENCE_S) for _ in range(sessions)]
        ids = [each["session_id"] for each in await asyncio.gather(*created)]

        async def caller(number: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                session, invoked_s = chance.choice(ids), time.monotonic()
                token = None if chance.random() < READS else f"{name}-{number}-{count}"
                reached = await act(client, session, token, chance.random() < 0.5)
                done.append((session, token, reached, invoked_s, time.monotonic()))

        await asyncio.gather(*(caller(number) for number in range(callers)))
    return done


async def act(client: AsyncClient, session: str, token: str | None, is_local: bool) -> int:
    """Append a token, or read how far a session goes; return the number that is told."""
    reply: dict[str, Any]
    if token is not None:
        entry = {"session_id": session, "event": "note", "data": {"token": token}}
        reply = await client.ask("session:append", entry, timeout_s=PATIENCE_S)
    elif is_local:
        reply = await client.read("session:get", session_id=session)
    else:
        reply = await client.ask("session:get", session_id=session, timeout_s=PATIENCE_S)
    return int(reply["seq"])


def main() -> None:
    """Run as a program."""
    var, name, seed, callers, sessions, out = sys.argv[1:]
    done = asyncio.run(storm(Path(var), name, int(seed), int(callers), int(sessions)))
    Path(out).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
