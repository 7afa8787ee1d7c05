"""One client process of the kill storm: appends until its standard input is closed.

`python storm_client.py VAR NAME SEED CALLERS SESSIONS OUT`; OUT gets what was acknowledged:
JSON, a list of session, number and token.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

from ksi.transport import AsyncClient

PATIENCE_S = 60.0


async def storm(
    var: Path, name: str, seed: int, callers: int, sessions: int
) -> list[tuple[str, int, str]]:
    """Append from so many callers to so many sessions; return what was acknowledged."""
    chance = random.Random(seed)
    acked: list[tuple[str, int, str]] = []
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    async with AsyncClient(name, var=var) as client:
        created = [client.ask("session:create", timeout_s=PATIENCE_S) for _ in range(sessions)]
        ids = [each["session_id"] for each in await asyncio.gather(*created)]

        async def caller(number: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                session, token = chance.choice(ids), f"{name}-{number}-{count}"
                reply = await client.ask(
                    "session:append",
                    session_id=session,
                    event="note",
                    data={"token": token},
                    timeout_s=PATIENCE_S,
                )
                acked.append((session, reply["seq"], token))

        await asyncio.gather(*(caller(number) for number in range(callers)))
    return acked


def main() -> None:
    """Run as a program."""
    var, name, seed, callers, sessions, out = sys.argv[1:]
    acked = asyncio.run(storm(Path(var), name, int(seed), int(callers), int(sessions)))
    Path(out).write_text(json.dumps(acked))


if __name__ == "__main__":
    main()
