"""`kill -9` of the owner of 100,000 sessions, until a client that waits has the reply to an append.

The client asks right after the kill: its frame is lost with the owner or never taken, it connects
again and resends. The next number of the session shows that nothing was lost or done twice. On the
other side Redis is killed, started again at once, and read, with as many keys in its log.

    python -m benchmarks.restart
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import random
import signal
import time
from collections import Counter
from typing import Any, Final

from benchmarks.measuring import (
    Options,
    Redis,
    Report,
    System,
    Target,
    create_sessions,
    measuring,
    percentile,
    redis_server,
    say,
    session_name,
    spread,
    wait_until,
)
from ksi.transport import Client

SESSIONS: Final = 100_000
KILLS: Final = 200
REST_S: Final = 0.1  # Before a kill; sooner, the backoff would come in, which is lifted here.
REDIS_KILLS: Final = 5
VALUE_BYTES: Final = 230
P99_MS: Final = Target("≤", 25, "ms")
# Killing owners is no crash loop, and nobody is to wait between two kills.
PATIENT: Final = {
    "supervisor__intensity": 1_000_000,
    "supervisor__backoff_first_s": 0.0,
    "supervisor__backoff_max_s": 0.0,
}


class Killer:
    """Kills the sessions owner of a system under a client of it.

    `seqs` are the numbers of the last entries, of sessions that have any.
    """

    def __init__(
        self, system: System, client: Client, sessions: int, seqs: Counter[str] | None = None
    ) -> None:
        self._system = system
        self._client = client
        self._sessions = sessions
        self._seqs: Counter[str] = Counter() if seqs is None else seqs

    def append(self, timeout_s: float = 10.0) -> None:
        """Append to a random session; nothing was lost and nothing done twice."""
        session_id = session_name(random.randrange(self._sessions))
        self._seqs[session_id] += 1
        reply = self._client.ask(
            "session:append",
            session_id=session_id,
            event="note",
            data={"text": "hello"},
            timeout_s=timeout_s,
        )
        assert reply["seq"] == self._seqs[session_id], reply

    def kill(self) -> float:
        """Kill the owner while it is idle; return the seconds until an append is answered."""
        self.append()
        time.sleep(REST_S)  # Followers are done then, and the next child is forked ahead.
        former = self._system.stat()
        begun_s = time.perf_counter()
        os.kill(former.pid, signal.SIGKILL)
        self.append()
        taken_s = time.perf_counter() - begun_s
        # What it says of itself is published behind the answer.
        wait_until(lambda: self._system.stat().epoch > former.epoch, "the new owner says so")
        assert self._system.stat().epoch == former.epoch + 1, "it was started more than once"
        return taken_s


def kill_redis(redis: Redis, keys: int) -> list[float]:
    """Return the seconds from each kill to the next reply."""
    client: Any = importlib.import_module("redis").Redis(unix_socket_path=redis.path)
    names = [session_name(number) for number in range(keys)]
    for first in range(0, keys, 10_000):
        with client.pipeline(transaction=False) as pipeline:
            for name in names[first : first + 10_000]:
                pipeline.set(name, b"x" * VALUE_BYTES)
            assert all(pipeline.execute())
    taken_s = []
    for _ in range(REDIS_KILLS):
        begun_s = time.perf_counter()
        redis.kill()
        redis.start()
        wait_until(redis.answers, "redis-server answers")
        assert len(client.get(random.choice(names))) == VALUE_BYTES
        taken_s.append(time.perf_counter() - begun_s)
    return taken_s


async def fill(system: System, sessions: int) -> None:
    async with system.async_client() as client:
        await create_sessions(client, 0, sessions)


def measure(options: Options, system: System, redis: Redis | None, report: Report) -> None:
    sessions, kills = options.more.sessions, options.more.kills
    say(f"creating {sessions} sessions")
    asyncio.run(fill(system, sessions))
    with system.client() as client:
        killer = Killer(system, client, sessions)
        say(f"killing the owner {kills} times")
        taken_ms = [killer.kill() * 1e3 for _ in range(kills)]
    say("killing Redis")
    other_ms = [each * 1e3 for each in kill_redis(redis, sessions)] if redis else []
    p50_ms, p99_ms = percentile(taken_ms, 0.5), percentile(taken_ms, 0.99)
    report.add(
        f"{kills} kills, p50 ms",
        f"{p50_ms:.1f}",
        f"{spread(other_ms):.0f}" if other_ms else "-",
        ratio=spread([p50_ms / spread(other_ms).median]) if other_ms else None,
    )
    report.add(f"{kills} kills, p99 ms", f"{p99_ms:.1f}", target=P99_MS, value=p99_ms)
    report.add(f"{kills} kills, least and most ms", f"{min(taken_ms):.1f} to {max(taken_ms):.1f}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--kills", type=int, default=KILLS)


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.sessions, options.more.kills = 200, 3
        report = Report(f"kill -9 to the next reply, {options.more.sessions} sessions; Redis: keys")
        with (
            System(options.directory / "var", **PATIENT) as system,
            redis_server(options.directory) as redis,
        ):
            measure(options, system, redis, report)
        report.show()


if __name__ == "__main__":
    main()
