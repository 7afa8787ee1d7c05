"""Events: what has happened, in all owners, where it can be looked for and followed.

Owns subscriptions to the event log, who observes whom (`observation.py`), and the order to clear
the log. That itself is derived: a follower
in the same process (`actors/followers/recording.py`) writes it from the journals of all owners, in
a directory a day, and removes days that are over their time. Queries read those files, in any
process; nobody is sent an event he has not asked for.

- Events are numbered in the order in which they were logged, and each is there once.
- A subscription is a pattern with a place in the log, kept by name until it is ended: whoever reads
  on from where he has acknowledged misses nothing and repeats nothing.
- What is cleared is whole days, and never today.

Source: "KSI: Comprehensive State Management Analysis", 2; the operations `event_log:*` and
`monitor:*` of KSI.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from ksi.actors.owner import (
    Command,
    Decision,
    Event,
    EventLog,
    Given,
    Keyed,
    Owner,
    Query,
    Reply,
    Sender,
    Table,
    Tables,
    Tick,
)
from ksi.actors.owners import observation
from ksi.actors.owners.observation import (
    AcknowledgeObserved,
    BreakerOpened,
    BreakerPassed,
    Count,
    Number,
    Observation,
    ObservationAcknowledged,
    ObservationEnded,
    ObservationSet,
    Observe,
    Patterns,
    Unobserve,
)
from ksi.transport.errors import Invalid, NotFound, Quota
from ksi.transport.message import OPERATOR, Id, Moment, Text, operation
from ksi.transport.moments import day_of, moment

PAGE_EVENTS_MAX: Final = 1000  # Of some hundred bytes: an answer fits into a frame.
SUBSCRIPTIONS_MAX: Final = 1000  # In all; each is a row, and costs nothing else.

Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_EVENTS_MAX)]


class Events(Reply, frozen=True, kw_only=True):
    """Events in the order of their numbers, or backwards.

    Attributes:
        next, offset: `after` and `offset` of the next page; None at the end.
        upto: number of the last event that was looked at: `after` of whoever follows.
    """

    events: list[dict[str, Any]]
    next: int | None
    offset: int | None
    upto: int


class EventStats(Reply, frozen=True, kw_only=True):
    """How much there is in the log, and what is not.

    Attributes:
        events: in all `days`, by day.
        dropped: records that were gone from their journal before they were logged.
        n: number of the newest event.
        oldest, newest: times in seconds since the epoch.
        per_s: events a second, over the last minute.
        behind: records of each owner that are not looked at yet.
    """

    events: int
    days: dict[str, int]
    dropped: int
    n: int
    oldest: float | None
    newest: float | None
    per_s: float
    behind: dict[str, int]
    subscriptions: int


class SubscriptionView(Reply, frozen=True, kw_only=True):
    """One subscription; `acked` is the number up to which its events are dealt with."""

    subscriber: str
    name: str
    event_patterns: list[str]
    agent_id: str | None
    session_id: str | None
    created_at: float
    acked: int


class SubscriptionList(Reply, frozen=True, kw_only=True):
    """Subscriptions by subscriber and name."""

    subscriptions: list[SubscriptionView]


class Newest(Reply, frozen=True, kw_only=True):
    """The number of the newest event, 0 if there is none."""

    n: int


class Cleared(Reply, frozen=True, kw_only=True):
    """All days before this one are removed soon."""

    before: str


@operation(
    "event_log:query",
    owner="events",
    refuses=(Invalid,),
    example={"event_patterns": ["completion:*"], "since": "10m", "agent_id": "alice"},
)
class FindEvents(Query[Events], frozen=True, kw_only=True):
    """Find events: all that agree with what is given, in the order of their numbers, or backwards.

    Patterns are those of a shell. `agent_id` is any whom an event is about; `since` is within,
    `until` beyond what is found. With `resolve_references` what was too large for a line, or is in
    the file of a session, stands in the place of its reference.
    """

    event_patterns: Patterns = []
    agent_id: Id | None = None
    session_id: Id | None = None
    correlation_id: Text | None = None
    since: Moment | None = None
    until: Moment | None = None
    limit: Limit = 100
    offset: Number = 0
    after: Number | None = None
    reverse: bool = False
    resolve_references: bool = False


@operation("event_log:stats", owner="events")
class GetStats(Query[EventStats], frozen=True, kw_only=True):
    """Return how much there is in the log, and how much of the journals is not."""


@operation("event_log:newest", owner="events")
class GetNewest(Query[Newest], frozen=True, kw_only=True):
    """Return the number of the newest event."""


@operation(
    "event_log:clear",
    owner="events",
    roles=OPERATOR,
    refuses=(Invalid,),
    example={"before": "2026-05-04"},
)
class Clear(Command[Cleared], frozen=True, kw_only=True):
    """Have the days before one removed from the log; by default all but today. In UTC."""

    before: Moment | None = None
    request_id: Id | None = None


@operation(
    "event_log:subscribe",
    owner="events",
    refuses=(Quota,),
    example={"name": "audit", "event_patterns": ["session:*"], "after": 0},
)
class Subscribe(Command[SubscriptionView], frozen=True, kw_only=True):
    """Keep a place in the log under a name, from now on or from behind event `after`.

    Whoever has it already changes what it is about, and keeps the place unless `after` is given.
    """

    name: Id
    event_patterns: Patterns = []
    agent_id: Id | None = None
    session_id: Id | None = None
    after: Number | None = None


@operation("event_log:unsubscribe", owner="events", refuses=(NotFound,), example={"name": "audit"})
class Unsubscribe(Command[None], frozen=True, kw_only=True):
    """End a subscription of the sender's; an operator may end any."""

    name: Id
    subscriber: Id | None = None


@operation(
    "event_log:ack", owner="events", refuses=(NotFound,), example={"name": "audit", "upto": 1}
)
class Acknowledge(Command[None], frozen=True, kw_only=True):
    """Say that all events up to a number are dealt with: `upto` of a page. It never goes back."""

    name: Id
    upto: Number


@operation("event_log:subscriptions", owner="events", example={"subscriber": "alice"})
class ListSubscriptions(Query[SubscriptionList], frozen=True, kw_only=True):
    """List subscriptions to the log, all or those of one agent."""

    subscriber: Id | None = None


@operation(
    "event_log:next",
    owner="events",
    refuses=(NotFound,),
    example={"subscriber": "alice", "name": "audit"},
)
class FindNext(Query[Events], frozen=True, kw_only=True):
    """Return the next events of a subscription: those behind what is acknowledged, or `after`."""

    subscriber: Id
    name: Id
    after: Number | None = None
    limit: Limit = 100
    resolve_references: bool = False


@operation("monitor:get_events", owner="events", refuses=(Invalid,), example={"since": "10m"})
class MonitorEvents(FindEvents, frozen=True, kw_only=True):
    """Find events, the newest first: `event_log:query` as monitors of KSI ask it."""

    reverse: bool = True


@operation(
    "monitor:get_session_events",
    owner="events",
    refuses=(Invalid,),
    example={"session_id": "sess_1"},
)
class MonitorSession(FindEvents, frozen=True, kw_only=True):
    """Find the events of a session."""

    session_id: Id


@operation(
    "monitor:get_correlation_chain",
    owner="events",
    refuses=(Invalid,),
    example={"correlation_id": "req_1"},
)
class MonitorChain(FindEvents, frozen=True, kw_only=True):
    """Find all that belongs together: events with one correlation id, or of one request."""

    correlation_id: Text


@operation("monitor:get_stats", owner="events")
class MonitorStats(GetStats, frozen=True, kw_only=True):
    """Return how much there is in the log: `event_log:stats`."""


class Subscribed(Event, frozen=True, array_like=True, tag="subscribed"):
    subscriber: str
    name: str
    patterns: list[str]
    agent_id: str | None
    session_id: str | None
    acked: int
    now: float


class Unsubscribed(Event, frozen=True, array_like=True, tag="unsubscribed"):
    subscriber: str
    name: str


class Acknowledged(Event, frozen=True, array_like=True, tag="acknowledged"):
    subscriber: str
    name: str
    upto: int


class DaysCleared(Event, frozen=True, array_like=True, tag="cleared"):
    before: str
    by: str
    now: float


class Subscription(msgspec.Struct, frozen=True, array_like=True):
    patterns: list[str]
    agent_id: str | None
    session_id: str | None
    created_at: float
    acked: int


class ClearedDays(msgspec.Struct, frozen=True, array_like=True):
    day: str


class EventTables(Tables):
    subscriptions: Annotated[Table[Subscription], Keyed(str, str)]  # subscriber, name
    cleared: Table[ClearedDays]  # "before"
    observations: Table[Observation]  # by subscription
    log: EventLog


class EventsOwner(Owner[EventTables]):
    """The owner of subscriptions to the event log and observations, and of the queries to it."""

    name = "events"
    tables = EventTables
    events = (
        Acknowledged
        | ObservationAcknowledged
        | Subscribed
        | Unsubscribed
        | DaysCleared
        | ObservationSet
        | ObservationEnded
        | BreakerOpened
        | BreakerPassed
    )
    # Whoever follows everything would follow himself.
    routine = (Acknowledged, ObservationAcknowledged)

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        match command:
            case Subscribe(after=None) | Observe(after=None):
                return GetNewest()
            case AcknowledgeObserved():
                return Count(subscription_id=command.subscription_id, upto=command.upto)
            case _:
                return None

    def decide(self, command: Any, sender: Sender, tables: EventTables, given: Given) -> Decision:
        match command:
            case Acknowledge():
                return _acknowledge(command, sender, tables)
            case Subscribe():
                return _subscribe(command, sender, tables, given)
            case Unsubscribe():
                return _unsubscribe(command, sender, tables)
            case Clear():
                return _clear(command, sender, given)
            case Observe() | Unobserve() | AcknowledgeObserved():
                return observation.decide(command, sender, tables, given)
            case Tick():
                return observation.tick(tables, given)
            case _:
                raise TypeError(command)

    def apply(self, event: Any, tables: EventTables) -> None:
        match event:
            case Acknowledged():
                key = (event.subscriber, event.name)
                known = _known(tables, *key)
                tables.subscriptions.put(key, msgspec.structs.replace(known, acked=event.upto))
            case Subscribed():
                row = Subscription(
                    event.patterns, event.agent_id, event.session_id, event.now, event.acked
                )
                tables.subscriptions.put((event.subscriber, event.name), row)
            case Unsubscribed():
                tables.subscriptions.delete((event.subscriber, event.name))
            case DaysCleared():
                tables.cleared.put("before", ClearedDays(event.before))
            case _:
                observation.apply(event, tables)

    def answer(self, query: Any, tables: EventTables) -> Reply:
        match query:
            case FindEvents():
                return _find(query, tables)
            case FindNext():
                return _next(query, tables)
            case GetNewest():
                return Newest(n=tables.log.newest())
            case GetStats():
                count = tables.subscriptions.count()
                return msgspec.convert({**tables.log.state(), "subscriptions": count}, EventStats)
            case ListSubscriptions():
                prefix = () if query.subscriber is None else (query.subscriber,)
                rows = tables.subscriptions.range(prefix=prefix)
                views = [_view(subscriber, name, row) for (subscriber, name), row in rows]
                return SubscriptionList(subscriptions=views)
            case _:
                return observation.answer(query, tables)


OWNER = EventsOwner()


def _subscribe(command: Subscribe, sender: Sender, tables: EventTables, given: Given) -> Decision:
    known = tables.subscriptions.get((sender.name, command.name))
    if known is None and tables.subscriptions.count() >= SUBSCRIPTIONS_MAX:
        raise Quota(f"there are {SUBSCRIPTIONS_MAX} subscriptions", limit=SUBSCRIPTIONS_MAX)
    after = command.after
    if after is None and known is not None:
        after = known.acked
    if after is None:
        after = given.fact.n if isinstance(given.fact, Newest) else 0
    row = Subscription(
        command.event_patterns, command.agent_id, command.session_id, given.now, after
    )
    about = (row.patterns, row.agent_id, row.session_id, row.acked, row.created_at)
    view = _view(sender.name, command.name, row)
    return Decision((Subscribed(sender.name, command.name, *about),), view)


def _unsubscribe(command: Unsubscribe, sender: Sender, tables: EventTables) -> Decision:
    is_operator = sender.role == "operator"
    subscriber = command.subscriber if is_operator and command.subscriber else sender.name
    _known(tables, subscriber, command.name)
    return Decision((Unsubscribed(subscriber, command.name),))


def _acknowledge(command: Acknowledge, sender: Sender, tables: EventTables) -> Decision:
    known = _known(tables, sender.name, command.name)
    if command.upto <= known.acked:
        return Decision()
    return Decision((Acknowledged(sender.name, command.name, command.upto),))


def _clear(command: Clear, sender: Sender, given: Given) -> Decision:
    at = given.now
    if command.before is not None:
        at = min(at, moment(command.before, now=given.now, what="before"))
    before = day_of(at)
    return Decision((DaysCleared(before, sender.name, given.now),), Cleared(before=before))


def _known(tables: EventTables, subscriber: str, name: str) -> Subscription:
    known = tables.subscriptions.get((subscriber, name))
    if known is None:
        text = f"{subscriber} has no subscription {name} to the event log"
        raise NotFound(text, hint="ksi read event_log:subscriptions")
    return known


def _find(query: FindEvents, tables: EventTables) -> Events:
    wanted = {
        name: getattr(query, name)
        for name in (
            "agent_id",
            "session_id",
            "correlation_id",
            "since",
            "until",
            "limit",
            "offset",
            "after",
            "reverse",
        )
    }
    return _page(tables, **wanted, patterns=query.event_patterns, resolve=query.resolve_references)


def _next(query: FindNext, tables: EventTables) -> Events:
    known = _known(tables, query.subscriber, query.name)
    return _page(
        tables,
        patterns=known.patterns,
        agent_id=known.agent_id,
        session_id=known.session_id,
        after=known.acked if query.after is None else query.after,
        limit=query.limit,
        resolve=query.resolve_references,
    )


def _page(tables: EventTables, **wanted: Any) -> Events:
    return msgspec.convert(tables.log.find(wanted), Events)


def _view(subscriber: str, name: str, row: Subscription) -> SubscriptionView:
    return SubscriptionView(
        subscriber=subscriber,
        name=name,
        event_patterns=row.patterns,
        agent_id=row.agent_id,
        session_id=row.session_id,
        created_at=row.created_at,
        acked=row.acked,
    )
