"""Everything at once, and anything killed at any moment: what was acknowledged is there, once.

Agents append, publish what is kept, write to an inbox and ask for completions, while owners and
followers are killed and stopped. At the end files, inboxes, outcomes and index must say the same
as those who were answered. `KSI_SEED=... bin/test tests/faults` repeats the choices of a storm.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from agreement import require_index
from system import System
from trouble import entries
from workers import happened, require_one_at_a_time, working

from ksi.actors.owners import OWNERS
from ksi.transport import AsyncClient
from ksi.transport.durable import DurableDelivery

PATIENCE_S = 60.0
SESSIONS = 6
SENT_MAX = 5000  # They are left in the inbox, which holds twice as many.
CHILDREN = (*OWNERS, "files")


def test_a_storm_over_all_owners_loses_doubles_and_reorders_nothing(system: System) -> None:
    storm(system, blows=30)


@pytest.mark.soak
def test_a_great_storm_over_all_owners_loses_doubles_and_reorders_nothing(system: System) -> None:
    storm(system, blows=600)


class Load:
    """What agents do until told to stop, and what was acknowledged to them."""

    def __init__(self, client: AsyncClient, chance: random.Random) -> None:
        self.client = client
        self.is_over = asyncio.Event()
        self.all_said = asyncio.Event()  # nothing more will be published
        self.appended: list[tuple[str, int, str]] = []  # session, seq, token
        self.published: list[tuple[int, str]] = []  # message id, token
        self.sent: list[tuple[int, str]] = []
        self.completed: list[str] = []
        self.heard: list[tuple[int, str]] = []
        self._chance = chance
        self._tokens = count()

    async def ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        reply: dict[str, Any] = await self.client.ask(operation, fields, timeout_s=PATIENCE_S)
        return reply

    async def again_and_again(self, act: Callable[[str], Awaitable[None]]) -> None:
        while not self.is_over.is_set():
            await act(f"t{next(self._tokens)}")

    async def append(self, token: str) -> None:
        session_id = f"s{self._chance.randrange(SESSIONS)}"
        data = {"token": token}
        said = await self.ask("session:append", session_id=session_id, event="note", data=data)
        self.appended.append((session_id, said["seq"], token))

    async def publish(self, token: str) -> None:
        topic = f"jobs.{self._chance.randrange(4)}"
        kept = await self.ask("message:publish", topic=topic, message={"token": token})
        assert kept["kept_for"] == 1
        self.published.append((kept["message_id"], token))

    async def send(self, token: str) -> None:
        if len(self.sent) >= SENT_MAX:
            await self.is_over.wait()
            return
        sent = await self.ask("agent:send_message", to_agent="reader", message={"token": token})
        self.sent.append((sent["message_id"], token))

    async def complete(self, token: str) -> None:
        session_id = f"s{self._chance.randrange(SESSIONS)}"
        await self.ask("completion:async", session_id=session_id, prompt=token, request_id=token)
        outcome = await self.client.outcome(token, timeout_s=PATIENCE_S)
        assert outcome["status"] == "completed", outcome
        self.completed.append(token)

    async def read(self, reader: AsyncClient) -> None:
        """Take what is published and acknowledge it, until there is no more to come."""
        async with await reader.subscribe("jobs.>", durable="jobs") as jobs:
            while not (self.all_said.is_set() and len(self.heard) >= len(self.published)):
                with suppress(TimeoutError):
                    delivery: DurableDelivery = await jobs.next(1.0)
                    self.heard.append((delivery.message_id, delivery.message["token"]))
                    await delivery.ack()
        await reader.flush(PATIENCE_S)


def storm(system: System, *, blows: int) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    with working(system, "w1", "w2", slots=2, lease="15s"):
        load = asyncio.run(carry_on(system, random.Random(seed), blows))
    require_all(system, load)
    require_index(system)


async def carry_on(system: System, chance: random.Random, blows: int) -> Load:
    """Deal that many blows to a system under load; return what was acknowledged."""
    async with (
        AsyncClient("alice", var=system.var) as alice,
        AsyncClient("reader", var=system.var) as reader,
    ):
        load = Load(alice, chance)
        await reader.ask("agent:register")
        await reader.ask("message:subscribe", durable="jobs", pattern="jobs.>")
        for n in range(SESSIONS):
            await alice.ask("session:create", session_id=f"s{n}")
        acts = [load.append] * 6 + [load.publish] * 3 + [load.send] * 2 + [load.complete] * 8
        acting = [asyncio.create_task(load.again_and_again(act)) for act in acts]
        reading = asyncio.create_task(load.read(reader))
        dealt = await strike(system, chance, blows)
        load.is_over.set()
        await asyncio.gather(*acting)
        load.all_said.set()
        await reading
        await alice.flush(PATIENCE_S)
    print(
        f"{len(load.appended)} appended, {len(load.published)} published, {len(load.sent)} sent, "
        f"{len(load.completed)} completed; {dict(dealt)}"
    )
    return load


async def strike(system: System, chance: random.Random, blows: int) -> Counter[str]:
    """Kill or stop a child, again and again; return how often which was hit."""
    dealt: Counter[str] = Counter()
    while dealt.total() < blows:
        await asyncio.sleep(chance.uniform(0.02, 0.25))  # It may come at any moment,
        name = chance.choice(CHILDREN)
        pid = system.pid_of(name)
        if pid is None:
            continue
        with suppress(ProcessLookupError):
            if chance.random() < 0.2:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(chance.uniform(0.02, 0.2))  # and last for any time.
                os.kill(pid, signal.SIGCONT)
            else:
                os.kill(pid, signal.SIGKILL)
            dealt[name] += 1
    return dealt


def require_all(system: System, load: Load) -> None:
    """Check that everything acknowledged is there, once and in order."""
    for acknowledged in (load.appended, load.published, load.sent, load.completed):
        assert len(acknowledged) > 10, "the storm proves nothing without load"
    said = {f"s{n}": entries(system, f"s{n}") for n in range(SESSIONS)}
    for session_id, seq, token in load.appended:
        assert said[session_id][seq - 1]["data"] == {"token": token}
    told = [(each["event"], each["correlation_id"]) for all in said.values() for each in all
            if each["event"] != "note"]  # fmt: skip
    completed = require_one_at_a_time(happened(system.var))
    assert sorted(completed) == sorted(load.completed)
    expected = [(f"completion:{what}", token) for what in ("request", "result")
                for token in completed]  # fmt: skip
    assert sorted(told) == sorted(expected)
    assert sum(map(len, said.values())) == len(load.appended) + len(told)

    assert load.heard == sorted(load.published), "a message was lost, doubled or out of order"
    with system.client("reader") as reader:
        left = reader.read("message:waiting", agent_id="reader", durable="jobs")["messages"]
        assert left == []
        inbox: list[tuple[int, str]] = []
        after: int | None = 0
        while after is not None:
            page = reader.read("message:waiting", agent_id="reader", durable="inbox", after=after)
            inbox += [(each["message_id"], each["message"]["token"]) for each in page["messages"]]
            after = page["next"]
        assert inbox == sorted(load.sent)
        assert reader.read("message:stats")["messages"] == len(inbox)
