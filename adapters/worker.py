"""A worker: takes grants from the completion queue, lets providers answer them, and reports.

A push says what to start or to stop at once. One loop looks after the lease and learns from each
renewal which grants it holds: so it starts what it should be doing, and stops what it should not,
whatever was lost on the way: pushes, the connection, the owner, its own registration.

- A grant that is over (cancelled, timed out, given to another) has its provider cancelled.
- Another worker under its name ends it. A lapsed lease does not: it registers again.
- Told to stop, it takes no more, finishes within `grace_s` what it has begun, hands back the rest
  and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ksi.adapters.providers import Grant, Provider
from ksi.transport import AsyncClient
from ksi.transport.aclient import Subscription
from ksi.transport.errors import (
    Busy,
    Draining,
    Evicted,
    Expired,
    Invalid,
    KsiError,
    NotFound,
    NotOwner,
    NotRunning,
    Restored,
    StaleEpoch,
    StorageFull,
    TooLarge,
    Unavailable,
)
from ksi.transport.limits import WORKER_LEASE_S
from ksi.transport.link import Delivery

RETRY_S: Final = 0.2  # How soon to try again where nobody answers.
GRACE_S: Final = 30.0  # What grants get to finish in, once the worker is to stop.
RENEWALS: Final = 3  # A lease is renewed that many times before it would lapse.
# Nothing has come of it now; it will.
_SILENT: Final = (Unavailable, NotRunning, Expired, Busy, Draining, StorageFull)
_OVER: Final = (StaleEpoch, NotFound, NotOwner)  # The grant is not ours any more.


class Worker:
    """One worker under one name.

    Args:
        name: its identity, enrolled as a worker on first use.
        providers: what answers; their names are what it offers.
        slots: how many grants it holds at a time, of all providers together.
        lease_s: how long it may be silent before its grants go to others.
        grace_s: how long it may take to finish once it is to stop.
    """

    def __init__(
        self,
        name: str,
        providers: Sequence[Provider],
        *,
        var: str | Path | None = None,
        slots: int = 1,
        lease_s: float = WORKER_LEASE_S,
        grace_s: float = GRACE_S,
    ) -> None:
        if not providers:
            raise Invalid("a worker needs a provider")
        self.name = name
        self._providers = {each.name: each for each in providers}
        self._usual = providers[0]
        self._slots = slots
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._client = AsyncClient(name, var=var, role="worker")
        self._epoch = 0
        self._tasks: dict[str, tuple[int, asyncio.Task[None]]] = {}  # by request: attempt, work
        self._heard: deque[Delivery] = deque()
        self._news = asyncio.Event()
        self._draining = False  # and the owner knows it
        self._stop_s: float | None = None  # when it is to be gone, once it is to stop
        self._failed: KsiError | None = None

    def stop(self) -> None:
        """Take no more, finish what is held, leave. Said again: leave now."""
        again = self._stop_s is not None
        self._stop_s = time.monotonic() + (0.0 if again else self._grace_s)
        self._news.set()

    async def run(self) -> None:
        """Work until told to stop.

        Raises:
            StaleEpoch: another worker has registered under this name.
            Forbidden: the key of this name is revoked, or not a worker's.
            NotRunning: there is no system on this var.
        """
        async with self._client, await self._client.subscribe(f"worker.{self.name}.>") as news:
            listening = asyncio.create_task(self._listen(news))
            try:
                await self._register()
                await self._serve()
            finally:
                listening.cancel()
                await self._cancel(list(self._tasks))

    async def _listen(self, news: Subscription) -> None:
        try:
            async for delivery in news:
                self._heard.append(delivery)
                self._news.set()
        except KsiError as error:
            self._failed = error
            self._news.set()

    async def _serve(self) -> None:
        renew_s = 0.0  # at once: what was granted to us before we listened was not heard
        while self._stop_s is None or (self._tasks and time.monotonic() < self._stop_s):
            self._news.clear()
            with contextlib.suppress(*_SILENT):  # What is held is worked on meanwhile.
                if await self._obey() or time.monotonic() >= renew_s:
                    await self._look()
                    renew_s = time.monotonic() + self._lease_s / RENEWALS
            await self._wait(renew_s)
            if self._failed is not None:
                raise self._failed
        await self._cancel(list(self._tasks))
        with contextlib.suppress(*_SILENT, *_OVER, Restored, Evicted):
            await self._client.ask("worker:leave", epoch=self._epoch)

    async def _wait(self, until_s: float) -> None:
        """Wait for something to do: news, the next renewal, the end."""
        if self._stop_s is not None:
            if not self._tasks:
                return
            until_s = min(until_s, self._stop_s)
        left_s = max(RETRY_S / 10, until_s - time.monotonic())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), left_s)

    async def _obey(self) -> bool:
        """Do what was pushed; return whether there is reason to look what else has happened."""
        look = self._stop_s is not None and not self._draining
        granted: list[str] = []
        while self._heard:
            delivery = self._heard.popleft()
            what = delivery.topic.rpartition(".")[2]
            look = look or delivery.gap > 0 or what not in ("granted", "revoked")
            if delivery.topic and not look:
                request_id, attempt = delivery.message["request_id"], delivery.message["attempt"]
                known, _task = self._tasks.get(request_id, (0, None))
                if known and (known < attempt or (what == "revoked" and known == attempt)):
                    await self._cancel([request_id])
                if what == "granted" and known < attempt:
                    granted.append(request_id)
        if granted and not look:
            await self._start(granted)
        return look

    async def _look(self) -> None:
        """Renew the lease, stop what is over and start what is new."""
        slots = 0 if self._stop_s is not None else self._slots
        try:
            renewed = await self._client.ask("worker:renew", epoch=self._epoch, slots=slots)
        except (NotFound, Restored, Evicted):
            await self._register()
            return
        self._draining = slots == 0
        held = {each["request_id"]: each["attempt"] for each in renewed["grants"]}
        await self._cancel(
            [each for each, (attempt, _) in self._tasks.items() if held.get(each) != attempt]
        )
        await self._start([each for each in held if each not in self._tasks])

    async def _register(self) -> None:
        await self._cancel(list(self._tasks))
        registered = await self._client.ask(
            "worker:register",
            capabilities=list(self._providers),
            slots=0 if self._stop_s is not None else self._slots,
            lease_s=self._lease_s,
        )
        self._epoch = registered["epoch"]

    async def _start(self, request_ids: list[str]) -> None:
        while request_ids:
            page = await self._client.ask(
                "worker:grants",
                worker=self.name,
                request_ids=request_ids,
            )
            grants = msgspec.convert(page["grants"], list[Grant])
            for grant in grants:
                task = asyncio.create_task(self._work(grant))
                self._tasks[grant.request_id] = grant.attempt, task
            request_ids = [each for each in request_ids if each not in self._tasks]
            if not page["more"]:
                return  # What is missing is over already.

    async def _cancel(self, request_ids: Iterable[str]) -> None:
        tasks = [self._tasks.pop(each)[1] for each in request_ids]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, grant: Grant) -> None:
        """Answer one grant and report it. Ends early when the grant is over."""
        ours = {"request_id": grant.request_id, "attempt": grant.attempt}

        async def say(progress: dict[str, Any]) -> None:
            with contextlib.suppress(*_SILENT, *_OVER):
                await self._client.ask("worker:progress", ours, progress=progress)

        provider = self._providers.get(grant.requires or "", self._usual)
        try:
            outcome: dict[str, Any] = {"result": await provider.complete(grant, say)}
        except Exception as error:
            outcome = {"error": _words(error)}
        await self._report({**ours, **outcome})
        if self._tasks.get(grant.request_id, (0, None))[1] is asyncio.current_task():
            del self._tasks[grant.request_id]
        if self._stop_s is not None:
            self._news.set()

    async def _report(self, fields: dict[str, Any]) -> None:
        """Report until it is answered: reported twice, an attempt is over the second time."""
        while True:
            try:
                await self._client.ask("worker:report", fields)
                return
            except _OVER:
                return
            except (Invalid, TooLarge) as error:
                if "error" in fields:
                    raise
                fields = {**fields, "error": _words(error)}
                del fields["result"]
            except (*_SILENT, Restored, Evicted):
                await asyncio.sleep(RETRY_S)  # Nobody answers: not at once again.


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:4000]
