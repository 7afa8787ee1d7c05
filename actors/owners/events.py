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
- A day that is over its time is in the archive until it is asked back, or over its time there.

Source: "KSI: Comprehensive State Management Analysis", 2; the operations `event_log:*` and
`monitor:*` of KSI.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ksi.actors.declarations.events import (
    Acknowledge,
    Acknowledged,
    Broadcast,
    BroadcastEvent,
    Clear,
    Cleared,
    ClearedDays,
    DaysCleared,
    DaysRestored,
    Events,
    EventStats,
    EventStatus,
    EventTables,
    FindEvents,
    FindNext,
    GetNewest,
    GetStats,
    GetStatus,
    ListSubscriptions,
    Newest,
    RestoreDays,
    RestoredDay,
    Subscribe,
    Subscribed,
    Subscription,
    SubscriptionList,
    SubscriptionView,
    Unsubscribe,
    Unsubscribed,
)
from ksi.actors.declarations.observation import (
    AcknowledgeObserved,
    BreakerOpened,
    BreakerPassed,
    Count,
    FindDue,
    ObservationAcknowledged,
    ObservationEnded,
    ObservationPushed,
    ObservationRead,
    ObservationSet,
    Observe,
    PushRefused,
    Unobserve,
)
from ksi.actors.owner import (
    Decision,
    Given,
    Owner,
    Query,
    Reply,
    Sender,
    Tick,
)
from ksi.actors.owners import observation, pushing
from ksi.transport.errors import KsiError, NotFound, Quota
from ksi.transport.moments import day_of, moment

SUBSCRIPTIONS_MAX: Final = 1000  # In all; each is a row, and costs nothing else.
RESTORED_MAX: Final = 10_000  # Days asked back from the archive, ever: twenty-seven years of them.


class EventsOwner(Owner[EventTables]):
    """The owner of subscriptions to the event log and observations, and of the queries to it."""

    name = "events"
    tables = EventTables
    events = (
        Acknowledged
        | ObservationAcknowledged
        | Broadcast
        | Subscribed
        | Unsubscribed
        | DaysCleared
        | DaysRestored
        | ObservationSet
        | ObservationEnded
        | ObservationPushed
        | ObservationRead
        | PushRefused
        | BreakerOpened
        | BreakerPassed
    )
    # Whoever follows everything would follow himself.
    routine = (Acknowledged, ObservationAcknowledged, ObservationPushed, ObservationRead)

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        match command:
            case Subscribe(after=None) | Observe(after=None):
                return GetNewest()
            case AcknowledgeObserved():
                return Count(subscription_id=command.subscription_id, upto=command.upto)
            case Tick():
                return FindDue()
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
            case BroadcastEvent():
                return _broadcast(command, sender, given)
            case Clear():
                return _clear(command, sender, given)
            case RestoreDays():
                return _restore(command, sender, tables, given)
            case Observe() | Unobserve() | AcknowledgeObserved():
                return observation.decide(command, sender, tables, given)
            case Tick():
                opened = observation.tick(tables, given).events
                told = pushing.told(opened, tables, given)
                return Decision((*opened, *told.events), sends=told.sends)
            case _:
                raise TypeError(command)

    def answered(
        self, command: Any, refusal: KsiError | None, tables: EventTables, given: Given
    ) -> Decision:
        return pushing.answered(command, refusal, tables)

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
            case Broadcast():
                pass  # Its place is the log.
            case DaysCleared():
                tables.cleared.put("before", ClearedDays(event.before))
            case DaysRestored():
                for day in event.days:
                    tables.restored.put(day, RestoredDay(event.now))
            case _:
                observation.apply(event, tables)

    def answer(self, query: Any, tables: EventTables) -> Reply:
        match query:
            case FindEvents():
                return _find(query, tables)
            case FindNext():
                return _next(query, tables)
            case FindDue():
                return pushing.due(tables)
            case GetNewest():
                return Newest(n=tables.log.newest())
            case GetStats():
                return _stats(tables)
            case GetStatus():
                wanted = {"patterns": query.event_patterns, "since": query.since}
                page = _page(tables, **wanted, limit=query.limit, reverse=True)
                return EventStatus(events=page.events, stats=_stats(tables))
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


def _broadcast(command: BroadcastEvent, sender: Sender, given: Given) -> Decision:
    said = (command.event_name, command.event_data, command.broadcast_metadata)
    return Decision((Broadcast(*said, sender.name, given.now),))


def _clear(command: Clear, sender: Sender, given: Given) -> Decision:
    at = given.now
    if command.before is not None:
        at = min(at, moment(command.before, now=given.now, what="before"))
    before = day_of(at)
    return Decision((DaysCleared(before, sender.name, given.now),), Cleared(before=before))


def _restore(command: RestoreDays, sender: Sender, tables: EventTables, given: Given) -> Decision:
    if tables.restored.count() + len(command.days) > RESTORED_MAX:
        raise Quota(f"{RESTORED_MAX} days have been asked back", limit=RESTORED_MAX)
    return Decision((DaysRestored(command.days, sender.name, given.now),))


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


def _stats(tables: EventTables) -> EventStats:
    count = tables.subscriptions.count()
    return msgspec.convert({**tables.log.state(), "subscriptions": count}, EventStats)


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
