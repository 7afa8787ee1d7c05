"""The client for ordinary programs: `Client`. The socket is driven by the thread that waits.

No thread stands between the caller and the owner: a call sends, then polls until its reply is
there. Only once something was told or subscribed to does a keeper thread look after the links
between calls, so that a `tell` is resent, and a subscription renewed, while the program does other
things. A client may be shared by threads; their calls then take turns. For many calls at once use
`AsyncClient`, whose calls share frames.
"""

from __future__ import annotations

import contextlib
import math
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Generic, Protocol, Self, TypeVar, overload

import zmq

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

KEEPER_S: Final = 0.02  # How often the keeper looks, while there is anything to look after.
_CLOSE_S: Final = 5.0
_FAREWELL_S: Final = 0.25


class _Slot:
    """Where the outcome of one request is put for the thread that waits."""

    __slots__ = ("body", "done", "error")

    def __init__(self) -> None:
        self.done = False
        self.body: bytes | None = None
        self.error: KsiError | None = None


_TOLD: Final = _Slot()  # nobody waits for a `tell`, but its refusal is kept


class Client:
    """An agent's way to the system.

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
        self._lock = threading.RLock()
        self._poller = zmq.Poller()
        self._told_errors: list[KsiError] = []
        self._keeper: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """Who speaks."""
        return self._caller.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(KsiError, ExceptionGroup):  # What is raised already says more.
                self.close()

    @overload
    def ask(self, what: Command[R] | Query[R], /, *, timeout_s: float = ...) -> R: ...
    @overload
    def ask(
        self,
        what: str,
        fields: Mapping[str, Any] | None = ...,
        /,
        *,
        timeout_s: float = ...,
        **named: Any,
    ) -> dict[str, Any]: ...
    def ask(
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
        deadline_s = self._caller.deadline_s(timeout_s)
        with self._lock:
            link, pending = self._send(prepared, deadline_s)
            slot = pending.future = _Slot()
            if not self._wait(lambda: slot.done, deadline_s, link):
                raise self._caller.late(link, pending)
        if slot.error is not None:
            raise slot.error
        return self._caller.reply(prepared, slot.body)

    def tell(
        self,
        what: str | Message,
        fields: Mapping[str, Any] | None = None,
        /,
        **named: Any,
    ) -> None:
        """Send a command and go on. It is delivered, resends included, while this client lives.

        A refusal is raised by the next `flush` or `close`.

        Raises:
            Invalid: it is a query.
            Unavailable: the window is full and nothing in it is answered; it was not sent.
        """
        prepared = self._caller.prepare_command(what, fields, named)
        with self._lock:
            _link, pending = self._send(prepared, None)
            pending.future = _TOLD
            self._take_all()
        self._keep()

    def flush(self, timeout_s: float = ASK_TIMEOUT_S) -> None:
        """Wait until every command is answered; raise what was refused since the last time.

        An `ask` that has ended in `Unavailable` is not waited for: that is what `settle` is for.

        Raises:
            KsiError: the refusal of a `tell`; an ExceptionGroup if there are several.
            Unavailable: some are still unanswered at the deadline.
        """
        unanswered = self._caller.unanswered
        with self._lock:
            if not self._wait(lambda: not unanswered(), time.monotonic() + timeout_s):
                raise Unavailable(f"{unanswered()} commands are still unanswered")
            errors, self._told_errors = self._told_errors, []
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("commands that were told were refused", errors)

    def read(
        self, what: str | Message, fields: Mapping[str, Any] | None = None, /, **named: Any
    ) -> Any:
        """Answer a query from the owner's committed state, in this process: no message, no wait.

        It works while the owner is busy, stopped or dead. From another machine it is asked.
        """
        if self._caller.remote:
            self._caller.require_query(what)
            return self.ask(what, {**(fields or {}), **named})  # type: ignore[arg-type]  # no overload takes both
        return self._caller.read_local(what, fields, named)

    def read_at(
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
        return self._caller.read_past(at, what, fields, named)

    def settle(self, ticket: Ticket, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, Any]:
        """Return the reply to a command whose `ask` ended in `Unavailable`.

        Raises:
            Expired: it was not carried out and never will be. Other refusals likewise.
            Unavailable: still no answer.
            NotFound: this client knows nothing of the ticket.
        """
        with self._lock:
            self._take_all()
            known = self._caller.outcome_of(ticket)
            if known is None:
                raise NotFound("this client knows nothing of that ticket")
            if isinstance(known, Pending):
                slot = known.future = _Slot()
                if not self._wait(lambda: slot.done, time.monotonic() + timeout_s):
                    known.future = None
                    raise Unavailable(f"still no answer to {known.operation}")
                known = Known(known.operation, slot.body, slot.error)
        return self._caller.settled(ticket, known)

    @overload
    def subscribe(
        self, pattern: str, *, owner: str | None = ..., credit: int = ..., durable: None = ...
    ) -> Subscription: ...
    @overload
    def subscribe(self, pattern: str, *, durable: str) -> DurableSubscription: ...
    def subscribe(
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
            Unavailable: no answer.
        """
        if durable is not None:
            self.ask("message:subscribe", pattern=pattern, durable=durable)
            bell = self.subscribe(bell_of(self.name, durable), credit=1)
            return DurableSubscription(self, durable, bell)
        deadline_s = time.monotonic() + ASK_TIMEOUT_S
        with self._lock:
            link = self._link(owner or self._caller.owner_of_topic(pattern))
            subscribed = link.subscribe(pattern, credit)
            if not self._wait(lambda: subscribed.ready, deadline_s, link):
                link.unsubscribe(subscribed)
                raise self._caller.no_answer(link, "the subscription")
            if subscribed.error is not None:
                link.unsubscribe(subscribed)
                raise subscribed.error
        self._keep()
        return Subscription(self, link, subscribed)

    def outcome(self, request_id: str, *, timeout_s: float = OUTCOME_TIMEOUT_S) -> dict[str, Any]:
        """Wait until a completion of this client has ended; return what `completion:status` says.

        It does not matter whether it has ended before, or what is restarted meanwhile.

        Raises:
            NotFound: there is no such request, or its outcome is not kept any more.
            Unavailable: it has not ended in time; it goes on.
            Quota: as many are waited for already as a connection may hold subscriptions.
        """
        deadline_s = self._caller.deadline_s(timeout_s)
        with self.subscribe(outcomes.topic(self.name, request_id)) as news:
            return self._ended(request_id, news, deadline_s, timeout_s, None)

    def complete(
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
        with self.subscribe(outcomes.topic(self.name, request_id)) as news:
            self.ask("completion:async", asked, timeout_s=timeout_s)
            status = self._ended(request_id, news, deadline_s, timeout_s, on_tokens)
        return outcomes.require_completed(status)

    def _ended(
        self,
        request_id: str,
        news: Subscription,
        deadline_s: float,
        timeout_s: float,
        on_tokens: Callable[[int, str], None] | None,
    ) -> dict[str, Any]:
        """Wait until a request has ended, and pass on what is heard of its answer."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            status = self.ask("completion:status", request_id=request_id, timeout_s=left_s)
            if outcomes.has_ended(status):
                return status
            again_s = min(deadline_s, time.monotonic() + outcomes.RECHECK_S)
            with contextlib.suppress(TimeoutError):
                while True:
                    delivery = news.next(max(0.0, again_s - time.monotonic()))
                    if outcomes.may_have_ended(delivery):
                        break
                    outcomes.hear(delivery, on_tokens)
        raise outcomes.still_open(request_id, timeout_s)

    def watch(
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
        page = self.ask("state:changes", {**wanted, "after": after, "limit": 1})
        present = self._caller.store_of("state")
        require_store(store or present, present)
        bell = self.subscribe(page["topic"], credit=1)
        return Watch(
            self, bell, Watched(wanted, page["revision"] if after is None else after, present)
        )

    def inbox(self) -> DurableSubscription:
        """Read what others send to this agent: direct messages, broadcasts and tasks."""
        return self.subscribe(INBOX, durable=INBOX)

    def request(
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
        with self.subscribe(bell_of(self.name, INBOX), credit=1) as bell:
            sent = self.ask("agent:send_message", to_agent=to_agent, message=message)
            after = asked = sent["message_id"]
            store = self._caller.store_of("bus")
            while True:
                page = self.ask(
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
                        self.ask("message:ack", durable=INBOX, message_ids=[after])
                        return delivery_of(answer, 0, lambda: None)
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
                        bell.next(min(left_s, LOOK_S))

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Wait until all is acknowledged, say goodbye and close. Raises what `flush` raises."""
        if self._closed.is_set():
            return
        try:
            self.flush(timeout_s)
        finally:
            self._say_goodbye()
            self._closed.set()
            if self._keeper is not None:
                self._keeper.join()
            with self._lock:
                self._caller.close_links()

    def _say_goodbye(self) -> None:
        """Where nothing is unanswered, let the owner forget this instance."""
        with self._lock:
            links = [each for each in self._caller.links.values() if each.may_leave()]
            for link in links:
                link.goodbye()
            self._wait(
                lambda: all(each.window.farewell for each in links), time.monotonic() + _FAREWELL_S
            )

    def _link(self, owner: str) -> Link:
        link = self._caller.links.get(owner)
        if link is None:
            if self._closed.is_set():
                raise Unavailable("this client is closed")
            link = self._caller.link(owner)
            self._poller.register(link.dealer, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
            if self._caller.remote:
                self._keep()  # Its monitor tells of every attempt to connect, and must be read.
        return link

    def _send(self, prepared: Prepared, deadline_s: float | None) -> tuple[Link, Pending]:
        link = self._caller.links.get(prepared.owner) or self._link(prepared.owner)
        now_s = time.monotonic()
        if prepared.is_command and link.window.full():
            until_s = now_s + ASK_TIMEOUT_S if deadline_s is None else deadline_s
            if not self._wait(lambda: not link.window.full(), until_s):
                raise Unavailable(
                    f"{prepared.operation} was not sent: the window to {prepared.owner} is full"
                )
            link = self._link(prepared.owner)  # The former may have been denied meanwhile.
        if not link.window.waiting():
            link.heard_s = now_s
        pending = self._caller.add(prepared, link, deadline_s)
        link.flush(now_s)
        return link, pending

    def _wait(self, done: Any, deadline_s: float, link: Link | None = None) -> bool:
        """Drive the sockets until `done()`; return False when the deadline comes first.

        Nor is the deadline waited for when there is nobody at the other end of `link`.
        """
        while not done():
            now_s = time.monotonic()
            if now_s >= deadline_s or (link is not None and self._caller.is_alone(link, now_s)):
                return False
            with contextlib.suppress(zmq.ZMQError):  # A signal's handler may have run: look again.
                self._poller.poll(1 + int(min(deadline_s - now_s, KEEPER_S) * 1000))
            self._take_all()
        return True

    def _take_all(self) -> None:
        """Take what has come on all links, and send what is due."""
        now_s = time.monotonic()
        for link in self._caller.links.values():
            for pending, body, error in link.take(now_s):
                slot = pending.future
                if slot is None:
                    self._caller.keep(link, pending, body, error)
                elif slot is _TOLD:
                    if error is not None:
                        self._told_errors.append(error)
                else:
                    slot.body, slot.error, slot.done = body, error, True
            if link.due(now_s):
                link.flush(now_s)
        for link in [each for each in self._caller.links.values() if each.denied]:
            self._poller.unregister(link.dealer)
            self._poller.unregister(link.monitor)
            self._caller.drop(link)

    def _keep(self) -> None:
        """Start the thread that looks after the links between calls."""
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._look_after, name="ksi", daemon=True)
            self._keeper.start()

    def _look_after(self) -> None:
        while not self._closed.wait(KEEPER_S):
            if self._lock.acquire(blocking=False):  # Whoever holds it is driving the sockets.
                try:
                    self._take_all()
                finally:
                    self._lock.release()


class Subscription:
    """What a pattern brings, in order: `with client.subscribe("agent.*") as news:`."""

    def __init__(self, client: Client, link: Link, subscribed: Subscribed) -> None:
        self._client = client
        self._link = link
        self._subscribed = subscribed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delivery]:
        while True:
            yield self.next()

    def next(self, timeout_s: float | None = None) -> Delivery:
        """Return the next delivery.

        Raises:
            TimeoutError: none came in time.
            Forbidden: the key of this client was revoked. Other refusals likewise.
            Unavailable: the client is closed.
        """
        return self._next(timeout_s, self._link.next_delivery)

    def take(self, timeout_s: float | None = None) -> list[Delivery]:
        """Return all deliveries that have come, one at least: cheaper than one by one.

        Raises what `next` raises.
        """
        return self._next(timeout_s, self._link.all_deliveries)

    def _next(self, timeout_s: float | None, take: Callable[[Subscribed], R]) -> R:
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        client, link, subscribed = self._client, self._link, self._subscribed
        while True:
            with client._lock:  # Only for a moment: other threads want to ask.
                if not subscribed.arrived:
                    client._take_all()
                if subscribed.arrived:
                    return take(subscribed)
                descriptors = () if link.closed else link.descriptors()
            if subscribed.error is not None:
                raise subscribed.error
            if client._closed.is_set():
                raise Unavailable("this client is closed")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"nothing under {subscribed.pattern} in {timeout_s} s")
            news = select.poll()  # Not of ZeroMQ: its sockets belong to who holds the lock.
            for descriptor in descriptors:
                news.register(descriptor, select.POLLIN)
            news.poll(min(left_s, KEEPER_S) * 1000)

    def close(self) -> None:
        """End the subscription."""
        with self._client._lock:
            self._link.unsubscribe(self._subscribed)


class _Page(Protocol[D]):
    """What was fetched and is not taken yet, and whether there may be more."""

    page: deque[D]
    look: bool


class _Fetched(Generic[D]):
    """What is fetched page by page, whenever a bell says that there is more."""

    def __init__(self, client: Client, bell: Subscription, place: _Page[D], what: str) -> None:
        self._client = client
        self._bell = bell
        self._page = place
        self._what = what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[D]:
        while True:
            yield self.next()

    def next(self, timeout_s: float | None = None) -> D:
        """Return the next of them.

        Raises:
            TimeoutError: none came in time.
            NotFound: what is read from is not there any more.
            Unavailable: its owner does not answer, or the client is closed.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._page.page:
            if self._page.look:
                self._fetch()
                continue
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"nothing waits in {self._what} after {timeout_s} s")
            with contextlib.suppress(TimeoutError):
                self._bell.next(min(left_s, LOOK_S))
            self._page.look = True
        return self._page.page.popleft()

    def close(self) -> None:
        """Stop reading. What comes is kept where it is read from."""
        self._bell.close()

    def _fetch(self) -> None:
        raise NotImplementedError


class DurableSubscription(_Fetched[DurableDelivery]):
    """What waits under a name, in order, until it is acknowledged: as `Subscription`.

    Each message comes once to each of these objects; what was not acknowledged comes again to the
    next one of the same name. After a restore of the bus all that waits there comes, and what was
    handed out before can be acknowledged no more: that raises `Restored`.
    """

    def __init__(self, client: Client, durable: str, bell: Subscription) -> None:
        self._durable = durable
        self._place = Place(client.name, durable)
        super().__init__(client, bell, self._place, durable)

    def _fetch(self) -> None:
        ask, durable, place = self._client.ask, self._durable, self._place
        try:
            page = ask("message:waiting", place.question())
            upto = place.upto(page, self._client._caller.store_of("bus"))
            if upto is not None:
                handed = ask("message:receive", durable=durable, upto=upto)
                place.hand_out(page, handed["redelivered"], self._settle)
        except Restored:  # Nothing was handed out: what is there now waits in the other store.
            place.begin_anew()

    def _settle(self, number: int, store: str) -> None:
        self._client._caller.require_store("bus", store)
        self._client.tell("message:ack", durable=self._durable, message_ids=[number])


class Watch(_Fetched[dict[str, Any]]):
    """Changes of the state in order, each once: `with client.watch("config/") as changes:`.

    They are as `state:changes` returns them. Whoever goes on later, or elsewhere, does so from
    `revision`, or from that of the last change it has dealt with, and from the same `store`. After
    a restore of the state `next` raises `Restored`.
    """

    def __init__(self, client: Client, bell: Subscription, place: Watched) -> None:
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

    def _fetch(self) -> None:
        page = self._client.ask("state:changes", self._place.question())
        self._place.take_in(page, self._client._caller.store_of("state"))
