"""The owner `events` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/events.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

import msgspec

from ksi.actors.declarations.observation import (
    Number,
    Observation,
    Patterns,
)
from ksi.actors.owner import (
    Command,
    Event,
    EventLog,
    Keyed,
    Query,
    Reply,
    Table,
    Tables,
)
from ksi.transport.errors import Invalid, NotFound, Quota
from ksi.transport.limits import ARCHIVE_MAX
from ksi.transport.message import OPERATOR, Id, Moment, Plain, Text, operation

PAGE_EVENTS_MAX: Final = 1000  # Of some hundred bytes: an answer fits into a frame.
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_EVENTS_MAX)]
Day = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", max_length=10)]


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


class EventStatus(Reply, frozen=True, kw_only=True):
    """What has happened last, the newest first, and how much there is in the log."""

    events: list[dict[str, Any]]
    stats: EventStats


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
    also=("monitor:query",),
)
class FindEvents(Query[Events], frozen=True, kw_only=True):
    """Find events: all that agree with what is given, in the order of their numbers, or backwards.

    Patterns are those of a shell. `agent_id` is any whom an event is about; `since` is within,
    `until` beyond what is found. With `resolve_references` what was too large for a line, or is in
    the file of a session, stands in the place of its reference.
    """

    older: ClassVar = {
        "_agent_id": "agent_id",
        "originator_id": "agent_id",
        "source_agent": "agent_id",
        "start_time": "since",
        "end_time": "until",
    }
    instead: ClassVar = {
        "query": "no SQL: event_patterns, agent_id, session_id, correlation_id, since and until",
        "context_bundle": "resolve_references: true shows what is only referred to",
        "context_fields": "resolve_references: true shows what is only referred to",
        "include_memory": "leave it out: all that is logged is looked through",
    }

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


@operation("event_log:stats", owner="events", also=("monitor:get_stats",))
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
    also=("monitor:clear_log",),
)
class Clear(Command[Cleared], frozen=True, kw_only=True):
    """Have the days before one removed, from the log and its archive; by default all but today.

    In UTC.
    """

    before: Moment | None = None
    request_id: Id | None = None


@operation(
    "event_log:restore",
    owner="events",
    roles=OPERATOR,
    refuses=(Quota,),
    example={"days": ["2026-05-04"]},
)
class RestoreDays(Command[None], frozen=True, kw_only=True):
    """Have days back in the log that are in its archive. It is done soon after.

    They stay as long as today will. What is not in the archive is passed over.
    """

    days: Annotated[list[Day], msgspec.Meta(min_length=1, max_length=ARCHIVE_MAX)]
    request_id: Id | None = None


@operation(
    "event_log:subscribe",
    owner="events",
    refuses=(Quota,),
    example={"name": "audit", "event_patterns": ["session:*"], "after": 0},
    also=("monitor:subscribe",),
)
class Subscribe(Command[SubscriptionView], frozen=True, kw_only=True):
    """Keep a place in the log under a name, from now on or from behind event `after`.

    Whoever has it already changes what it is about, and keeps the place unless `after` is given.
    """

    older: ClassVar = {"client_id": "name", "_agent_id": "name"}
    instead: ClassVar = {
        "filter_fn": "event_patterns, agent_id and session_id",
        "writer": "nothing is sent: event_log:next returns what has come",
    }

    name: Id
    event_patterns: Patterns = []
    agent_id: Id | None = None
    session_id: Id | None = None
    after: Number | None = None


@operation(
    "event_log:unsubscribe",
    owner="events",
    refuses=(NotFound,),
    example={"name": "audit"},
    also=("monitor:unsubscribe",),
)
class Unsubscribe(Command[None], frozen=True, kw_only=True):
    """End a subscription of the sender's; an operator may end any."""

    older: ClassVar = Subscribe.older

    name: Id
    subscriber: Id | None = None


@operation(
    "event_log:ack", owner="events", refuses=(NotFound,), example={"name": "audit", "upto": 1}
)
class Acknowledge(Command[None], frozen=True, kw_only=True):
    """Say that all events up to a number are dealt with: `upto` of a page. It never goes back."""

    name: Id
    upto: Number


@operation(
    "event_log:subscriptions",
    owner="events",
    example={"subscriber": "alice"},
    also=("monitor:get_subscriptions",),
)
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
class MonitorSession(MonitorEvents, frozen=True, kw_only=True):
    """Find the events of a session, the newest first."""

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


@operation("monitor:get_status", owner="events", refuses=(Invalid,), example={"limit": 5})
class GetStatus(Query[EventStatus], frozen=True, kw_only=True):
    """Return what has happened last, and how much there is in the log."""

    instead: ClassVar = {
        "include_agents": "agent:list returns agents",
        "include_events": "event_log:stats returns no events",
    }

    event_patterns: Patterns = []
    since: Moment | None = None
    limit: Limit = 20


@operation(
    "monitor:broadcast_event",
    owner="events",
    example={"event_name": "build:done", "event_data": {"ok": True}},
)
class BroadcastEvent(Command[None], frozen=True, kw_only=True):
    """Tell all who follow the event log of something that is no event of an owner.

    It is logged as `events:broadcast`, with its name in its data: nobody can say in this way what
    an owner says.
    """

    event_name: Text
    event_data: Plain
    broadcast_metadata: Plain = {}
    request_id: Id | None = None


class Broadcast(Event, frozen=True, array_like=True, tag="broadcast"):
    event_name: str
    event_data: dict[str, Any]
    broadcast_metadata: dict[str, Any]
    by: str
    now: float


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


class DaysRestored(Event, frozen=True, array_like=True, tag="restored"):
    days: list[str]
    by: str
    now: float


class RestoredDay(msgspec.Struct, frozen=True, array_like=True):
    at: float


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
    restored: Table[RestoredDay]  # by day: those asked back from the archive
    observations: Table[Observation]  # by subscription
    log: EventLog
