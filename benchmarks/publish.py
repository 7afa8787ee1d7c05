"""`message:publish` to 1, 10 and 100 subscribers against raw ZeroMQ PUB/SUB and Redis pub/sub.

Loss-free on all sides: one publisher keeps at most a window ahead of the slowest subscriber, every
subscriber counts what it gets, and a round is over when all of them have all of it. Raw PUB/SUB
sends one message a frame, without keys; Redis gets its commands in pipelines. Bodies are 300 bytes.
Then what a reader that is stopped costs another one, and whether it learns how much it has missed.

    python -m benchmarks.publish
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, Final, Protocol

import zmq

from benchmarks.measuring import (
    WAIT_S,
    Options,
    Redis,
    Report,
    System,
    Target,
    measuring,
    percentile,
    ratios,
    redis_server,
    say,
    spread,
    wait_until,
)
from ksi.transport import AsyncClient

TARGETS: Final = {1: Target("≥", 1), 10: Target("≥", 3), 100: Target("≥", 5)}
MESSAGES: Final = {1: 100_000, 10: 30_000, 100: 4_000}  # of a round: about a second of raw PUB/SUB
AHEAD: Final = 2048  # Messages the publisher is ahead of the slowest subscriber, at the most.
STOPPED_MESSAGES: Final = 20_000
PROCESSES: Final = 2  # The subscribers share them: a core each for them, the bus and its publisher.
BODY_BYTES: Final = 300
TOPIC: Final = "news.today"
_PAUSE_S: Final = 0.0002

TEXT: Final = "x" * (BODY_BYTES - 9)  # {"text": TEXT} as MessagePack
_SPAWN: Final = multiprocessing.get_context("spawn")

Counts = Any  # an array shared by all processes: what each subscriber has got; -1: not there yet


class Publisher(Protocol):
    """The publishing half of one side."""

    async def publish(self, count: int) -> None:
        """Publish `count` messages as fast as it goes; not all need have left."""

    async def close(self) -> None:
        """Leave."""


class Bus:
    """Ours: a client tells, the bus relays."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def publish(self, count: int) -> None:
        tell, message = self._client.tell, {"text": TEXT}
        for _ in range(count):
            await tell("message:publish", topic=TOPIC, message=message)

    async def close(self) -> None:
        await self._client.close()


class Raw:
    """The other side: a PUB socket, a message a frame."""

    def __init__(self, path: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(
            zmq.SNDHWM, 0
        )  # PUB drops at the mark, and learns of room only now and then.
        self._socket.bind(path)

    async def publish(self, count: int) -> None:
        send, frame = self._socket.send, f"{TOPIC} {TEXT}".encode()
        for _ in range(count):
            send(frame)

    async def close(self) -> None:
        self._socket.close(0)


class Channel:
    """Redis, with what is published at once in one pipeline."""

    def __init__(self, path: str) -> None:
        redis: Any = importlib.import_module("redis.asyncio")
        self._redis = redis.Redis(unix_socket_path=path)

    async def publish(self, count: int) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for _ in range(count):
            pipeline.publish(TOPIC, TEXT)
        await pipeline.execute()

    async def close(self) -> None:
        await self._redis.aclose()


def hear_bus(numbers: range, place: str, total: int, counts: Counts) -> None:
    """Be subscribers of ours, each with a client of its own."""

    async def hear(number: int) -> None:
        async with (
            AsyncClient(f"reader-{number}", var=place) as client,
            await client.subscribe(TOPIC, credit=2 * AHEAD) as news,
        ):
            got = counts[number] = 0
            while got < total:
                deliveries = await news.take(WAIT_S)
                assert not any(each.gap for each in deliveries), "messages were missed"
                got += len(deliveries)
                counts[number] = got

    _all(hear, numbers)


def hear_raw(numbers: range, place: str, total: int, counts: Counts) -> None:
    """Be SUB sockets."""
    poller, sockets = zmq.Poller(), {}
    for number in numbers:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        socket.rcvhwm = 0
        socket.subscribe(TOPIC)
        socket.connect(place)
        poller.register(socket, zmq.POLLIN)
        sockets[socket] = number
        counts[number] = 0
    while min(counts[number] for number in numbers) < total:
        for socket, _event in poller.poll(int(WAIT_S * 1000)):
            got = 0
            try:
                while True:
                    socket.recv(zmq.DONTWAIT)
                    got += 1
            except zmq.Again:
                counts[sockets[socket]] += got


def hear_channel(numbers: range, place: str, total: int, counts: Counts) -> None:
    """Be subscribers of a Redis channel."""
    redis: Any = importlib.import_module("redis.asyncio")

    async def hear(number: int) -> None:
        client = redis.Redis(unix_socket_path=place)
        news = client.pubsub(ignore_subscribe_messages=True)
        await news.subscribe(TOPIC)
        got = counts[number] = 0
        while got < total:
            if await news.get_message(timeout=WAIT_S) is not None:
                got += 1
                counts[number] = got
        await news.aclose()
        await client.aclose()

    _all(hear, numbers)


def _all(hear: Callable[[int], Any], numbers: range) -> None:
    async def together() -> None:
        await asyncio.gather(*map(hear, numbers))

    asyncio.run(together())


class Side:
    """One side: its publisher, and its subscribers in other processes."""

    def __init__(
        self,
        name: str,
        publisher: Callable[[], Publisher],
        hear: Callable[[range, str, int, Counts], None],
        place: str,
        part: int = 1,
    ) -> None:
        self.name = name
        self.part = part  # It publishes one of so many messages: a slow side takes no longer.
        self._make = publisher
        self._hear = hear
        self._place = place
        self.per_s: list[float] = []

    @contextmanager
    def subscribed(self, subscribers: int, total: int) -> Iterator[None]:
        """Have this many subscribers, and a publisher, for a while."""
        self.per_s = []
        self._counts = RawArray("q", [-1] * subscribers)
        self._done = 0
        self.publisher = self._make()
        many = min(PROCESSES, subscribers)
        share = subscribers // many
        processes = [
            _SPAWN.Process(
                target=self._hear,
                args=(range(first, first + share), self._place, total, self._counts),
            )
            for first in range(0, subscribers, share)
        ]
        for process in processes:
            process.start()
        wait_until(lambda: min(self._counts) >= 0, f"{self.name}: all have subscribed")
        time.sleep(0.3)  # PUB says nothing of subscriptions that have yet to arrive.
        yield
        for process in processes:
            process.join(WAIT_S)
            assert process.exitcode == 0, f"{self.name}: a subscriber has failed"

    async def round(self, messages: int) -> None:
        """Publish, and wait until every subscriber has got everything."""
        begun_s = time.perf_counter()
        goal = self._done + messages
        step = AHEAD // 8
        while self._done < goal:
            if self._done - min(self._counts) > AHEAD - step:
                await asyncio.sleep(_PAUSE_S)  # The readers are to catch up.
                continue
            count = min(step, goal - self._done)
            await self.publisher.publish(count)
            self._done += count
            await asyncio.sleep(0)  # What was said goes out.
        while min(self._counts) < goal:
            assert time.perf_counter() - begun_s < WAIT_S, f"{self.name}: some were lost"
            await asyncio.sleep(_PAUSE_S)  # A poll with a deadline.
        assert list(self._counts) == [goal] * len(self._counts)
        self.per_s.append(messages / (time.perf_counter() - begun_s))


async def compare(subscribers: int, sides: list[Side], options: Options, report: Report) -> None:
    """Measure all sides in turns and add the rows."""
    messages = 500 if options.quick else MESSAGES[subscribers]
    rounds = options.rounds + 1  # The first one is for warming up.
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(side.subscribed(subscribers, rounds * (messages // side.part)))
        for number in range(rounds):
            for side in sides:
                say(f"{side.name}, {people(subscribers)}, round {number} of {options.rounds}")
                await side.round(messages // side.part)
        for side in sides:
            await side.publisher.close()
    ours, *others = ([*side.per_s[1:]] for side in sides)
    for side, theirs in zip(sides[1:], others, strict=True):
        report.add(
            f"{people(subscribers)}, messages/s, {side.name}",
            f"{spread(ours):.0f}",
            f"{spread(theirs):.0f}",
            ratio=ratios(ours, theirs),
            target=TARGETS[subscribers] if side.name == "raw PUB/SUB" else None,
        )


def people(count: int) -> str:
    return "1 subscriber" if count == 1 else f"{count} subscribers"


def be_stopped(place: str, total: int, counts: Counts) -> None:
    """Subscribe, be stopped from outside, and go on until everything was heard or missed."""

    async def hear() -> None:
        async with (
            AsyncClient("stopped", var=place) as client,
            await client.subscribe(TOPIC) as news,
        ):
            counts[0] = counts[1] = 0
            while counts[0] + counts[1] < total:
                for each in await news.take(WAIT_S):
                    counts[0] += bool(each.topic)
                    counts[1] += each.gap

    asyncio.run(hear())


def all_count(counts: Counts) -> bool:
    return bool(min(counts) >= 0)


async def times_s(client: AsyncClient, news: Any, count: int) -> list[float]:
    """Publish one by one; return how long each took from the call to its delivery."""
    taken_s = []
    for _ in range(count):
        begun_s = time.perf_counter()
        await client.tell("message:publish", topic=TOPIC, message={"text": TEXT})
        delivery = await news.next(WAIT_S)
        taken_s.append(time.perf_counter() - begun_s)
        assert delivery.gap == 0, delivery
    return taken_s


async def stopped_reader(options: Options, system: System, report: Report) -> None:
    """Compare the time to another reader with and without one that is stopped."""
    single = 200 if options.quick else 3000
    flood = 1000 if options.quick else STOPPED_MESSAGES
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    lost = 0
    for number in range(options.rounds + 1):
        say(f"a stopped reader, round {number} of {options.rounds}")
        async with (
            system.async_client("speaker") as speaker,
            system.async_client("listener") as listener,
            await listener.subscribe(TOPIC, credit=2 * AHEAD) as news,
        ):
            alone.append(await times_s(speaker, news, single))
            counts, total = RawArray("q", [-1, -1]), flood + single
            reader = _SPAWN.Process(target=be_stopped, args=(str(system.var), total, counts))
            reader.start()
            wait_until(partial(all_count, counts), "the reader has subscribed")
            assert reader.pid is not None
            os.kill(reader.pid, signal.SIGSTOP)
            published = 0
            while published < flood:
                await times_s(speaker, news, min(500, flood - published))
                published += min(500, flood - published)
            beside.append(await times_s(speaker, news, single))
            os.kill(reader.pid, signal.SIGCONT)
            reader.join(WAIT_S)
            lost += total - sum(counts)
            assert reader.exitcode == 0, "the reader has not learnt of all"
    assert lost == 0
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        without = [percentile(each, part) * 1e6 for each in alone[1:]]
        with_it = [percentile(each, part) * 1e6 for each in beside[1:]]
        report.add(
            f"publish to delivery, {name} us, beside a stopped reader / without it",
            f"{spread(with_it):.0f}",
            f"{spread(without):.0f}",
            ratio=ratios(with_it, without),
            target=Target("≤", 1.1) if name == "p99" else None,
        )
    report.add(f"{flood} messages to a stopped reader: silently lost", f"{lost}")


def sides_of(system: System, redis: Redis | None, directory: Path) -> list[Side]:
    raw = f"ipc://{directory / 'raw'}"
    sides = [
        Side("ours", lambda: Bus(system.async_client()), hear_bus, str(system.var)),
        Side("raw PUB/SUB", lambda: Raw(raw), hear_raw, raw),
    ]
    if redis is not None:
        sides.append(Side("Redis", lambda: Channel(redis.path), hear_channel, redis.path, 5))
    return sides


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--subscribers", type=int, nargs="+", default=[*TARGETS], choices=[*TARGETS], metavar="N"
    )


def main() -> None:
    with measuring(__doc__, arguments) as options:
        report = Report(f"message:publish, bodies of {BODY_BYTES} bytes, loss-free")
        with (
            System(options.directory / "var") as system,
            redis_server(options.directory) as redis,
        ):
            for subscribers in options.more.subscribers:
                sides = sides_of(system, redis, options.directory)
                asyncio.run(compare(subscribers, sides, options, report))
            asyncio.run(stopped_reader(options, system, report))
        report.show()


if __name__ == "__main__":
    main()
