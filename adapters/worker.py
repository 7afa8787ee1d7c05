"""A worker: takes grants from the completion queue, lets providers answer them, and reports.

A push says what to start or to stop at once. One loop looks after the lease and learns from each
renewal which grants it holds: so it starts what it should be doing, and stops what it should not,
whatever was lost on the way: pushes, the connection, the owner, its own registration.

- A grant that is over (cancelled, timed out, given to another) has its provider cancelled. What it
  takes to end is not waited for: its session is free at once.
- It calls a provider no more often than its own rate. What all workers of a provider may do, and
  how long that is to be left alone, is seen to where requests are granted.
- Another worker under its name ends it. A lapsed lease does not: it registers again.
- Told to stop, it takes no more, finishes within `grace_s` what it has begun, hands back the rest
  and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ksi.actors.declarations.spending import Usage
from ksi.adapters.providers import Failed, Grant, Opened, Provider
from ksi.adapters.talk import SessionTalk
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
from ksi.transport.limits import RETRY_AFTER_S_MAX, WORKER_LEASE_S
from ksi.transport.link import Delivery

RETRY_S: Final = 0.2  # How soon to try again where nobody answers.
GRACE_S: Final = 30.0  # What grants get to finish in, once the worker is to stop.
ENDING_S: Final = 10.0  # What providers get to end in, once the worker has left.
RENEWALS: Final = 3  # A lease is renewed that many times before it would lapse.
# Nothing has come of it now; it will.
_SILENT: Final = (Unavailable, NotRunning, Expired, Busy, Draining, StorageFull)
_OVER: Final = (StaleEpoch, NotFound, NotOwner)  # The grant is not ours any more.


class Pace:
    """When this worker may call a provider next: evenly."""

    def __init__(self, rate_per_s: float) -> None:
        self._gap_s = 1 / rate_per_s
        self._next_s = 0.0

    async def turn(self) -> None:
        """Wait for one's turn."""
        at_s = max(time.monotonic(), self._next_s)
        self._next_s = at_s + self._gap_s
        await asyncio.sleep(at_s - time.monotonic())  # One has to wait for a turn.


class Worker:
    """One worker under one name.

    Args:
        name: its identity, enrolled as a worker on first use.
        providers: what answers; their names are what it offers.
        slots: how many grants it holds at a time, of all providers together.
        rate_per_s: how often each provider is called at the most.
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
        rate_per_s: float = math.inf,
        lease_s: float = WORKER_LEASE_S,
        grace_s: float = GRACE_S,
    ) -> None:
        if not providers:
            raise Invalid("a worker needs a provider")
        self.name = name
        self._providers = {each.name: each for each in providers}
        self._usual = providers[0]
        self._paces = {each.name: Pace(rate_per_s) for each in providers}
        self._slots = slots
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._client = AsyncClient(name, var=var, role="worker")
        self._epoch = 0
        self._tasks: dict[str, tuple[int, asyncio.Task[None]]] = {}  # by request: attempt, work
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, and not over yet
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
            Invalid: a provider cannot be made ready; the text says why.
        """
        for provider in self._providers.values():
            if isinstance(provider, Opened):
                await asyncio.to_thread(provider.open)
        async with self._client, await self._client.subscribe(f"worker.{self.name}.>") as news:
            listening = asyncio.create_task(self._listen(news))
            try:
                await self._register()
                await self._serve()
            finally:
                listening.cancel()
                self._cancel(list(self._tasks))
                if self._ending:
                    await asyncio.wait(self._ending, timeout=ENDING_S)

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
        self._cancel(list(self._tasks))
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
                    self._cancel([request_id])
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
        self._cancel(
            [each for each, (attempt, _) in self._tasks.items() if held.get(each) != attempt]
        )
        await self._start([each for each in held if each not in self._tasks])

    async def _register(self) -> None:
        self._cancel(list(self._tasks))
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

    def _cancel(self, request_ids: Iterable[str]) -> None:
        for each in request_ids:
            _attempt, task = self._tasks.pop(each)
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled():
            task.exception()  # It was cancelled: nobody waits for what it says.

    async def _work(self, grant: Grant) -> None:
        """Answer one grant and report it. Ends early when the grant is over."""
        provider = self._providers.get(grant.requires or "", self._usual)
        talk = SessionTalk(self._client, grant, provider.name)
        try:
            await self._paces[provider.name].turn()
            outcome = _outcome(provider.name, await provider.complete(grant, talk))
        except Failed as failed:
            outcome = {"error": str(failed), "kind": failed.kind, "usage": failed.usage}
            if failed.retry_after_s is not None:
                outcome["retry_after_s"] = min(failed.retry_after_s, RETRY_AFTER_S_MAX)
        except Exception as error:
            outcome = {"error": _words(error)}
        ours = {"request_id": grant.request_id, "attempt": grant.attempt}
        await self._report({**ours, **outcome, "provider": provider.name})
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
                fields.pop("result", None)
            except (*_SILENT, Restored, Evicted):
                await asyncio.sleep(RETRY_S)  # Nobody answers: not at once again.


def _outcome(provider: str, result: Any) -> dict[str, Any]:
    """Return what is reported of an answer: one that says nothing is none."""
    if not isinstance(result, dict):
        raise TypeError(f"provider {provider} has returned {type(result).__name__}, no result")
    result = {**result, "provider": provider}
    usage = result.pop("usage", None)
    taken = msgspec.convert(usage, Usage | None, from_attributes=True)
    if not str(result.get("response") or "").strip():
        raise Failed("provider_error", f"provider {provider} answered nothing", usage=taken)
    return {"result": result, "usage": taken}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:4000]
