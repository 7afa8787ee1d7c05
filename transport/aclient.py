"""The client for programs on asyncio: `AsyncClient`.

What is asked in one turn of the event loop travels in one frame, and one sweep watches all
deadlines: no timer a call, no task a connection, the raw socket in place of `zmq.asyncio`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Generic, Protocol, Self, TypeVar, overload

from ksi.transport import outcomes
from ksi.transport.caller import Caller, Known, Prepared, Ticket
from ksi.transport.durable import INBOX, LOOK_S, DurableDelivery, Place, bell_of, delivery_of
from ksi.transport.errors import KsiError, NotFound, Restored, Unavailable
from ksi.transport.limits import ASK_TIMEOUT_S, OUTCOME_TIMEOUT_S
from ksi.transport.link import CREDIT, Delivery, Link, Subscribed
from ksi.transport.message import Command, Message, Query, Role
from ksi.transport.watching import Watched, require_store
from ksi.transport.window import Pending

R = TypeVar("R")
D = TypeVar("D")

SWEEP_S: Final = 0.02  # Precision of deadlines, and of what is sent again.
_CLOSE_S: Final = 5.0
_FAREWELL_S: Final = 0.25


class _Told:
    """Stands where a future would: nobody waits for a `tell`, but its refusal is kept."""


_TOLD: Final = _Told()


class AsyncClient:
    """An agent's way to the system. Use it from one event loop.

    Args:
        name: who speaks; enrolled on first use over a local var. Default: `KSI_AGENT`, or the
            only key in a directory that was carried from another machine.
        var: the runtime directory. Default: `KSI_VAR`, or `./var`.
        role: the role to enrol with, if the name is new.

    Raises:
        NotRunning: there is no such var directory.
        Forbidden: the key of this name was revoked, or the name is reserved.
    """

    def __init__(
        self, name: str | None = None, *, var: str | Path | None = None, role: Role = "agent"
    ) -> None:
        self._caller = Caller(name, var=var, role=role)
        self._loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # with the first link
        self._scheduled: set[Link] = set()
        self._sweeping = False
        self._woken = 0  # callers that were answered and have not asked again
        self._room: asyncio.Event | None = None
        self._quiet: asyncio.Event | None = None
        self._told_errors: list[KsiError] = []
        self._closed = False

    @property
    def name(self) -> str:
        """Who speaks."""
        return self._caller.name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            await self.close()
        else:
            with contextlib.suppress(KsiError, ExceptionGroup):  # What is raised says more.
                await self.close()

    @overload
    async def ask(self, what: Command[R] | Query[R], /, *, timeout_s: float = ...) -> R: ...
    @overload
    async def ask(
        self,
        what: str,
        fields: Mapping[str, Any] | None = ...,
        /,
        *,
        timeout_s: float = ...,
        **named: Any,
    ) -> dict[str, Any]: ...
    async def ask(
        self,
        what: str | Message,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        timeout_s: float = ASK_TIMEOUT_S,
        **named: Any,
    ) -> Any:
        """Ask an operation and return its reply: what it says is on disk.

        Args:
            what: the name of an operation, or a typed message.
            fields: its fields, for names that are taken here; `named` for all others.
            timeout_s: how long to wait for the reply, resends included.

        Raises:
            KsiError: the refusal, by its class. Nothing was changed.
            Unavailable: no answer in time; `ticket` is for `settle`.
        """
        prepared = self._caller.prepare(what, fields, named)
        pending = await self._send(prepared, self._caller.deadline_s(timeout_s))
        return self._caller.reply(prepared, await pending.future)

    async def tell(
        self,
        what: str | Message,
        fields: Mapping[str, Any] | None = None,
        /,
        **named: Any,
    ) -> None:
        """Send a command and go on. It is delivered, resends included, while this client lives.

        A refusal is raised by the next `flush` or `close`.
        """
        prepared = self._caller.prepare_command(what, fields, named)
        pending = await self._send(prepared, None)
        pending.future = _TOLD

    async def flush(self, timeout_s: float = ASK_TIMEOUT_S) -> None:
        """Wait until every command is answered; raise what was refused since the last time.

        An `ask` that has ended in `Unavailable` is not waited for: that is what `settle` is for.

        Raises:
            KsiError: the refusal of a `tell`; an ExceptionGroup if there are several.
            Unavailable: some are still unanswered at the deadline.
        """
        unanswered = self._caller.unanswered
        if unanswered():
            self._quiet = self._quiet or asyncio.Event()
            self._quiet.clear()
            try:
                await asyncio.wait_for(self._quiet.wait(), timeout_s)
            except TimeoutError:
                raise Unavailable(f"{unanswered()} commands are still unanswered") from None
        errors, self._told_errors = self._told_errors, []
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("commands that were told were refused", errors)

    async def read(
        self, what: str | Message, fields: Mapping[str, Any] | None = None, /, **named: Any
    ) -> Any:
        """Answer a query from the owner's committed state, in this process: no message, no wait.

        It works while the owner is busy, stopped or dead. From another machine it is asked.
        """
        if self._caller.remote:
            self._caller.require_query(what)
            return await self.ask(what, {**(fields or {}), **named})  # type: ignore[arg-type]  # no overload takes both
        return self._caller.read_local(what, fields, named)

    async def read_at(
        self,
        at: int | str,
        what: str | Message,
        fields: Mapping[str, Any] | None = None,
        /,
        **named: Any,
    ) -> Any:
        """Answer a query from the owner's state as it was, here: no message is sent.

        Args:
            at: a number of the owner's journal; or a time, as `2026-05-04T09:00:00Z` or `10m` ago.

        Raises:
            NotFound: there is nothing of then yet, or not any more: it reaches back as far as
                checkpoints and journal, and to the last restore.
            Invalid: `at` is no time, or the owner answers from what has no past.
        """
        return await asyncio.to_thread(self._caller.read_past, at, what, fields, named)

    async def settle(self, ticket: Ticket, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, Any]:
        """Return the reply to a command whose `ask` ended in `Unavailable`.

        Raises:
            Expired: it was not carried out and never will be. Other refusals likewise.
            Unavailable: still no answer.
            NotFound: this client knows nothing of the ticket.
        """
        known = self._caller.outcome_of(ticket)
        if known is None:
            raise NotFound("this client knows nothing of that ticket")
        if isinstance(known, Pending):
            known.future = self._loop.create_future()
            try:
                body = await asyncio.wait_for(asyncio.shield(known.future), timeout_s)
            except TimeoutError:
                known.future = None
                raise Unavailable(f"still no answer to {known.operation}") from None
            known = Known(known.operation, body, None)
        return self._caller.settled(ticket, known)

    @overload
    async def subscribe(
        self, pattern: str, *, owner: str | None = ..., credit: int = ..., durable: None = ...
    ) -> Subscription: ...
    @overload
    async def subscribe(self, pattern: str, *, durable: str) -> DurableSubscription: ...
    async def subscribe(
        self,
        pattern: str,
        *,
        owner: str | None = None,
        credit: int = CREDIT,
        durable: str | None = None,
    ) -> Subscription | DurableSubscription:
        """Hear what is announced under topics that match `pattern`: `*` a word, `>` the rest.

        With `durable`, messages published on the bus are kept under that name until they are
        acknowledged, whether this agent is there or not. Else `credit` is how many may be sent
        ahead of their reader; what comes beyond it is counted, and the next delivery says how many.

        Raises:
            Invalid, Quota: the pattern is none, or one too many.
        """
        if durable is not None:
            await self.ask("message:subscribe", pattern=pattern, durable=durable)
            bell = await self.subscribe(bell_of(self.name, durable), credit=1)
            return DurableSubscription(self, durable, bell)
        link = self._link(owner or self._caller.owner_of_topic(pattern))
        subscribed = link.subscribe(pattern, credit)
        subscription = Subscription(self, link, subscribed)
        self._look_again(link)
        try:
            await subscription._confirmed()
        except BaseException:
            subscription.close()
            raise
        return subscription

    async def outcome(
        self, request_id: str, *, timeout_s: float = OUTCOME_TIMEOUT_S
    ) -> dict[str, Any]:
        """Wait until a completion of this client has ended; return what `completion:status` says.

        It does not matter whether it has ended before, or what is restarted meanwhile.

        Raises:
            NotFound: there is no such request, or its outcome is not kept any more.
            Unavailable: it has not ended in time; it goes on.
            Quota: as many are waited for already as a connection may hold subscriptions.
        """
        deadline_s = self._caller.deadline_s(timeout_s)
        async with await self.subscribe(outcomes.topic(self.name, request_id)) as news:
            return await self._ended(request_id, news, deadline_s, timeout_s, None)

    async def complete(
        self,
        session_id: str,
        prompt: str,
        *,
        timeout_s: float = OUTCOME_TIMEOUT_S,
        on_tokens: Callable[[int, str], None] | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Queue a prompt on a session and wait for its answer: `["result"]["response"]`.

        Args:
            on_tokens: called with pieces of the answer as it grows, where its provider streams:
                behind how many characters a piece comes, and the piece. One may be missed, and
                another attempt begins at 0.
            fields: those of `completion:async`.

        Returns:
            What `completion:status` says: `result` with `response`, `model` and `usage`.

        Raises:
            Unanswered: it has failed or was cancelled.
            Unavailable: it has not ended in time; it goes on. Refusals of `completion:async`.
        """
        request_id = fields.pop("request_id", None) or outcomes.fresh_id()
        deadline_s = self._caller.deadline_s(timeout_s)
        asked = {**fields, "session_id": session_id, "prompt": prompt, "request_id": request_id}
        async with await self.subscribe(outcomes.topic(self.name, request_id)) as news:
            await self.ask("completion:async", asked, timeout_s=timeout_s)
            status = await self._ended(request_id, news, deadline_s, timeout_s, on_tokens)
        return outcomes.require_completed(status)

    async def _ended(
        self,
        request_id: str,
        news: Subscription,
        deadline_s: float,
        timeout_s: float,
        on_tokens: Callable[[int, str], None] | None,
    ) -> dict[str, Any]:
        """Wait until a request has ended, and pass on what is heard of its answer."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            status = await self.ask("completion:status", request_id=request_id, timeout_s=left_s)
            if outcomes.has_ended(status):
                return status
            again_s = min(deadline_s, time.monotonic() + outcomes.RECHECK_S)
            with contextlib.suppress(TimeoutError):
                while True:
                    delivery = await news.next(max(0.0, again_s - time.monotonic()))
                    if outcomes.may_have_ended(delivery):
                        break
                    outcomes.hear(delivery, on_tokens)
        raise outcomes.still_open(request_id, timeout_s)

    async def watch(
        self,
        prefix: str | None = None,
        *,
        id: str | None = None,
        after: int | None = None,
        store: str | None = None,
    ) -> Watch:
        """Follow what changes in the state: all of it, ids that begin with `prefix`, or one `id`.

        It begins behind the revision `after`, else now, and leaves out nothing and repeats nothing.
        `store` says which store `after` is of, where it may have been restored since.

        Raises:
            NotFound: changes behind `after` are not kept any more.
            Conflict: there is no such revision yet.
            Restored: the state has another store now.
        """
        wanted = {"id": id, "prefix": prefix}
        page = await self.ask("state:changes", {**wanted, "after": after, "limit": 1})
        present = self._caller.store_of("state")
        require_store(store or present, present)
        bell = await self.subscribe(page["topic"], credit=1)
        return Watch(
            self, bell, Watched(wanted, page["revision"] if after is None else after, present)
        )

    async def inbox(self) -> DurableSubscription:
        """Read what others send to this agent: direct messages, broadcasts and tasks."""
        return await self.subscribe(INBOX, durable=INBOX)

    async def request(
        self, to_agent: str, message: Mapping[str, Any], *, timeout_s: float = ASK_TIMEOUT_S
    ) -> DurableDelivery:
        """Send a message to an agent and wait for its answer, which is acknowledged.

        What others say to it stays in the inbox.

        Raises:
            KsiError: the refusal of `agent:send_message`.
            Unavailable: it waits in the inbox of the agent, and no answer has come in time.
            Restored: the bus was restored meanwhile, and knows perhaps of neither.
        """
        deadline_s = self._caller.deadline_s(timeout_s)
        async with await self.subscribe(bell_of(self.name, INBOX), credit=1) as bell:
            sent = await self.ask("agent:send_message", to_agent=to_agent, message=message)
            after = asked = sent["message_id"]
            store = self._caller.store_of("bus")
            while True:
                page = await self.ask(
                    "message:waiting",
                    agent_id=self.name,
                    durable=INBOX,
                    after=after,
                    in_reply_to=asked,
                )
                self._caller.require_store("bus", store)
                for answer in page["messages"]:
                    after = answer["message_id"]
                    if answer["sender"] == to_agent:  # Anybody can name a message.
                        await self.ask("message:ack", durable=INBOX, message_ids=[after])
                        return delivery_of(answer, 0, _settled)
                after = page["next"] or after
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise Unavailable(
                        f"{to_agent} did not answer message {asked} in {timeout_s} s",
                        hint=f"an answer will wait in the inbox of {self.name}",
                        message_id=asked,
                    )
                if page["next"] is None:
                    with contextlib.suppress(TimeoutError):
                        await bell.next(min(left_s, LOOK_S))

    async def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Wait until all is acknowledged, say goodbye and close. Raises what `flush` raises."""
        if self._closed:
            return
        try:
            await self.flush(timeout_s)
        finally:
            self._closed = True
            try:
                await self._say_goodbye()
            finally:
                for link in self._caller.links.values():
                    self._unwatch(link)
                    self._abandon(link, [*link.window.commands.values()])
                    self._abandon(link, [*link.window.queries.values()])
                    for subscribed in link.subscribed.values():
                        subscribed.fail(Unavailable("this client is closed"))
                self._caller.close_links()
                if self._room is not None:
                    self._room.set()

    async def _say_goodbye(self) -> None:
        """Where nothing is unanswered, let the owner forget this instance."""
        links = [each for each in self._caller.links.values() if each.may_leave()]
        for link in links:
            link.goodbye()
            self._arrived(link)
        deadline_s = time.monotonic() + _FAREWELL_S
        while time.monotonic() < deadline_s and not all(link.window.farewell for link in links):
            await asyncio.sleep(0.001)  # The loop reads the sockets meanwhile.

    async def _send(self, prepared: Prepared, deadline_s: float | None) -> Pending:
        link = self._caller.links.get(prepared.owner) or self._link(prepared.owner)
        while prepared.is_command and link.window.full():
            await self._await_room(prepared, deadline_s)
            link = self._link(prepared.owner)  # The former may have been denied meanwhile.
        pending = self._caller.add(prepared, link, deadline_s)
        if deadline_s is not None:
            pending.future = self._loop.create_future()
        if link not in self._scheduled:
            self._scheduled.add(link)
            self._loop.call_soon(self._flush, link)
        self._woken -= 1
        if self._woken == 0:  # Whoever was answered last has asked again: no more will come.
            link.flush(time.monotonic())
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP_S, self._sweep)
        return pending

    async def _await_room(self, prepared: Prepared, deadline_s: float | None) -> None:
        self._room = self._room or asyncio.Event()
        self._room.clear()
        left_s = None if deadline_s is None else deadline_s - time.monotonic()
        try:
            await asyncio.wait_for(self._room.wait(), left_s)
        except TimeoutError:
            raise Unavailable(
                f"{prepared.operation} was not sent: the window to {prepared.owner} is full"
            ) from None

    def _link(self, owner: str) -> Link:
        link = self._caller.links.get(owner)
        if link is None:
            if self._closed:
                raise Unavailable("this client is closed")
            self._loop = asyncio.get_running_loop()
            link = self._caller.link(owner)
            for descriptor in link.descriptors():
                self._loop.add_reader(descriptor, self._arrived, link)
            self._arrived(link)
        return link

    def _unwatch(self, link: Link) -> None:
        for descriptor in link.descriptors():
            self._loop.remove_reader(descriptor)

    def _flush(self, link: Link) -> None:
        self._scheduled.discard(link)
        if link.denied:
            return
        now_s = time.monotonic()
        if not link.window.waiting():
            link.heard_s = now_s
        link.flush(now_s)
        self._look_again(link)

    def _look_again(self, link: Link) -> None:
        """The descriptor signals edges only, and sending may have taken one."""
        if link.readable():
            self._loop.call_soon(self._arrived, link)

    def _arrived(self, link: Link) -> None:
        """Take all that has come on `link` and wake who waited for it."""
        if link.denied or link.closed:
            return
        was_up = link.up
        outcomes = link.take(time.monotonic())
        for pending, body, error in outcomes:
            future = pending.future
            if future is None:
                self._caller.keep(link, pending, body, error)
            elif future is _TOLD:
                if error is not None:
                    self._told_errors.append(error)
            elif not future.done():
                if error is None:
                    future.set_result(body)
                else:
                    future.set_exception(error)
        if outcomes:
            self._woken = len(outcomes)
            if self._room is not None:
                self._room.set()
            if self._quiet is not None and not self._caller.unanswered():
                self._quiet.set()
        if link.denied:
            self._unwatch(link)
            self._caller.drop(link)
        elif (link.up and not was_up) or (link.window.unsent() and link not in self._scheduled):
            self._scheduled.add(link)
            self._loop.call_soon(self._flush, link)

    def _sweep(self) -> None:
        """Look at every deadline, and send again what is due."""
        now_s = time.monotonic()
        busy = False
        for link in list(self._caller.links.values()):
            self._arrived(link)
            self._abandon(link, link.expired(now_s))
            if not link.up and self._caller.is_alone(link, now_s):
                self._abandon(link, link.expired(float("inf")))
            if link.due(now_s):
                self._flush(link)
            busy = busy or link.window.waiting()
        self._sweeping = busy
        if busy:
            self._loop.call_later(SWEEP_S, self._sweep)

    def _abandon(self, link: Link, late: list[Pending]) -> None:
        """Tell who waits for these that no answer has come."""
        for pending in late:
            future = pending.future
            if isinstance(future, asyncio.Future) and not future.done():
                future.set_exception(self._caller.late(link, pending))


class Subscription:
    """What a pattern brings, in order: `async with await client.subscribe(...) as news:`."""

    def __init__(self, client: AsyncClient, link: Link, subscribed: Subscribed) -> None:
        self._client = client
        self._link = link
        self._subscribed = subscribed
        self._arrived = asyncio.Event()
        subscribed.wake = self._arrived.set

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        return await self.next()

    async def next(self, timeout_s: float | None = None) -> Delivery:
        """Return the next delivery.

        Raises:
            TimeoutError: none came in time.
            Forbidden: the key of this client was revoked. Other refusals likewise.
            Unavailable: the client is closed.
        """
        return await self._next(timeout_s, self._link.next_delivery)

    async def take(self, timeout_s: float | None = None) -> list[Delivery]:
        """Return all deliveries that have come, one at least: cheaper than one by one.

        Raises what `next` raises.
        """
        return await self._next(timeout_s, self._link.all_deliveries)

    async def _next(self, timeout_s: float | None, take: Callable[[Subscribed], R]) -> R:
        while not self._subscribed.arrived:
            if self._subscribed.error is not None:
                raise self._subscribed.error
            self._arrived.clear()
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        granted = self._subscribed.granted
        taken = take(self._subscribed)
        if self._subscribed.granted != granted:
            self._client._look_again(self._link)
        return taken

    def close(self) -> None:
        """End the subscription."""
        self._link.unsubscribe(self._subscribed)
        self._client._look_again(self._link)

    async def _confirmed(self) -> None:
        deadline_s = time.monotonic() + ASK_TIMEOUT_S
        while not self._subscribed.ready:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), deadline_s - time.monotonic())
            except TimeoutError:
                raise Unavailable(f"{self._link.owner} did not answer the subscription") from None
        if self._subscribed.error is not None:
            raise self._subscribed.error


class _Page(Protocol[D]):
    """What was fetched and is not taken yet, and whether there may be more."""

    page: deque[D]
    look: bool


class _Fetched(Generic[D]):
    """What is fetched page by page, whenever a bell says that there is more."""

    def __init__(self, client: AsyncClient, bell: Subscription, place: _Page[D], what: str) -> None:
        self._client = client
        self._bell = bell
        self._page = place
        self._what = what

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[D]:
        return self

    async def __anext__(self) -> D:
        return await self.next()

    async def next(self, timeout_s: float | None = None) -> D:
        """Return the next of them.

        Raises:
            TimeoutError: none came in time.
            NotFound: what is read from is not there any more.
            Unavailable: its owner does not answer, or the client is closed.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._page.page:
            if self._page.look:
                await self._fetch()
                continue
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"nothing waits in {self._what} after {timeout_s} s")
            with contextlib.suppress(TimeoutError):
                await self._bell.next(min(left_s, LOOK_S))
            self._page.look = True
        return self._page.page.popleft()

    def close(self) -> None:
        """Stop reading. What comes is kept where it is read from."""
        self._bell.close()

    async def _fetch(self) -> None:
        raise NotImplementedError


class DurableSubscription(_Fetched[DurableDelivery]):
    """What waits under a name, in order, until it is acknowledged: as `Subscription`.

    Each message comes once to each of these objects; what was not acknowledged comes again to the
    next one of the same name. After a restore of the bus all that waits there comes, and what was
    handed out before can be acknowledged no more: that raises `Restored`.
    """

    def __init__(self, client: AsyncClient, durable: str, bell: Subscription) -> None:
        self._durable = durable
        self._place = Place(client.name, durable)
        super().__init__(client, bell, self._place, durable)

    async def _fetch(self) -> None:
        ask, durable, place = self._client.ask, self._durable, self._place
        try:
            page = await ask("message:waiting", place.question())
            upto = place.upto(page, self._client._caller.store_of("bus"))
            if upto is not None:
                handed = await ask("message:receive", durable=durable, upto=upto)
                place.hand_out(page, handed["redelivered"], self._settle)
        except Restored:  # Nothing was handed out: what is there now waits in the other store.
            place.begin_anew()

    async def _settle(self, number: int, store: str) -> None:
        self._client._caller.require_store("bus", store)
        await self._client.tell("message:ack", durable=self._durable, message_ids=[number])


class Watch(_Fetched[dict[str, Any]]):
    """Changes of the state in order, each once: `with client.watch("config/") as changes:`.

    They are as `state:changes` returns them. Whoever goes on later, or elsewhere, does so from
    `revision`, or from that of the last change it has dealt with, and from the same `store`. After
    a restore of the state `next` raises `Restored`.
    """

    def __init__(self, client: AsyncClient, bell: Subscription, place: Watched) -> None:
        self._place = place
        super().__init__(client, bell, place, "what is watched")

    @property
    def revision(self) -> int:
        """All that is watched and has changed up to here was returned."""
        return self._place.revision

    @property
    def store(self) -> str:
        """The store that the revisions are of."""
        return self._place.store

    async def _fetch(self) -> None:
        page = await self._client.ask("state:changes", self._place.question())
        self._place.take_in(page, self._client._caller.store_of("state"))


async def _settled() -> None:
    """An answer is acknowledged before it is returned."""
