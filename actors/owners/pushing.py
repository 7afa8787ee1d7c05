"""Pushing: observations that come by themselves, into the inbox of who observes.

At each tick those who are furthest behind are told what has happened, as it is in the event log: a
message for an event, through the outbox, so each comes once and in order, whatever is killed. What
is told is counted in the same commit.

- Nobody has more than `UNREAD_MAX` of it unread: what follows waits in the log, and nothing of it
  is lost, until he acknowledges what he has read, or his breaker opens.
- A message that finds no room opens the breaker; it is counted as missed.
- KSI told of the begin and the end of an event. What is observed here has happened when it is told,
  so there is one message, `observe:end`, with what those two held.

These are operations of the owner `events` (`events.py`).

Source: the messages `observe:begin` and `observe:end` of KSI, whose observers the observed waited
for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from ksi.actors.declarations.bus import SendMessage
from ksi.actors.declarations.observation import (
    AllDue,
    BreakerOpened,
    Due,
    Observation,
    ObservationPushed,
    PushRefused,
)
from ksi.actors.owner import Decision, Event, Given, Send
from ksi.actors.owners.observation import ObservationTables, Watch
from ksi.transport.errors import KsiError
from ksi.transport.message import encode

UNREAD_MAX: Final = 1000  # Of one observation: a tenth of an inbox, which is for others, too.
TOLD_ROWS_MAX: Final = 8  # Observations looked at in one tick: some milliseconds each.
TOLD_EVENTS_MAX: Final = 100  # Messages of one tick, and ...
TOLD_BYTES_MAX: Final = 256 << 10  # ... what they hold: they are in one record.
DATA_BYTES_MAX: Final = 16 << 10  # Of one event; more than a line has only where texts are matched.


def due(tables: ObservationTables) -> AllDue:
    """Return what observers are told next, of those who are furthest behind."""
    newest = None
    found: list[Due] = []
    events, room = TOLD_EVENTS_MAX, TOLD_BYTES_MAX
    for subscription_id, row in _behind(tables):
        newest = tables.log.newest() if newest is None else newest
        if newest <= row.acked or len(found) == TOLD_ROWS_MAX or not events or room <= 0:
            break
        watch, shown = _next(row, tables, min(events, UNREAD_MAX - row.unread), room)
        if watch.upto <= row.acked:  # It cannot be read now.
            continue
        events -= len(shown)
        room -= sum(map(_size, shown))
        one = Due(
            subscription_id=subscription_id,
            after=row.acked,
            upto=watch.upto,
            shown=watch.counts["shown"],
            sampled_out=watch.counts["sampled_out"],
            rate_limited=watch.counts["rate_limited"],
            window=watch.window,
            events=[_told(event) for event in shown],
        )
        found.append(one)
    return AllDue(due=found)


def told(decided: Iterable[Event], tables: ObservationTables, given: Given) -> Decision:
    """Return what is told at this tick, behind what is decided in it already."""
    opened = {event.subscription_id for event in decided if isinstance(event, BreakerOpened)}
    events: list[Event] = []
    sends: list[Send] = []
    for each in given.fact.due if isinstance(given.fact, AllDue) else []:
        row = tables.observations.get(each.subscription_id)
        if row is None or row.is_open or row.acked != each.after or each.subscription_id in opened:
            continue
        pushed = each.events[-1]["n"] if each.events else row.pushed
        events.append(
            ObservationPushed(
                each.subscription_id, each.upto, each.shown, each.sampled_out, each.rate_limited,
                each.window, pushed, given.time_s,
            )
        )  # fmt: skip
        sends += [_message(event, each.subscription_id, row) for event in each.events]
    return Decision(tuple(events), sends=tuple(sends))


def answered(message: SendMessage, refusal: KsiError | None, tables: ObservationTables) -> Decision:
    """Return what follows where a message was refused: its observer has missed it."""
    subscription_id = message.message["subscription_id"]
    row = tables.observations.get(subscription_id)
    if refusal is None or row is None:
        return Decision()
    missed = PushRefused(subscription_id, row.observer, row.target, str(refusal))
    return Decision((missed,))


def _behind(tables: ObservationTables) -> Iterator[tuple[str, Observation]]:
    """Yield the observations that may be pushed to, who is furthest behind first."""
    rows = [
        (subscription_id, row)
        for subscription_id, row in tables.observations.range()
        if row.push and not row.is_open and row.unread < UNREAD_MAX
    ]
    yield from sorted(rows, key=lambda each: each[1].acked)


def _next(
    row: Observation, tables: ObservationTables, most: int, room: int
) -> tuple[Watch, list[dict[str, Any]]]:
    """Return what is shown next of one page of the log, as far as there is room, and its counts."""
    watch = Watch(row, tables.log)
    shown = next(watch.pages(), [])
    taken: list[dict[str, Any]] = []
    for event in shown[:most]:
        room -= _size(event)
        if room < 0 and taken:
            break
        taken.append(event)
    if len(taken) < len(shown):
        watch = Watch(row, tables.log)
        next(watch.pages(taken[-1]["n"]))
    return watch, taken


def _size(event: dict[str, Any]) -> int:
    return min(len(encode(event["data"])), DATA_BYTES_MAX)


def _told(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event as it is told; what is too large for a message is in the log."""
    if len(encode(event["data"])) > DATA_BYTES_MAX:
        return {**event, "data": {}, "is_cut": True}
    return event


def _message(event: dict[str, Any], subscription_id: str, row: Observation) -> Send:
    told = {
        "event": "observe:end",
        "observation_id": f"{subscription_id}/{event['n']}",
        "subscription_id": subscription_id,
        "observer": row.observer,
        "source": next(iter(event.get("agents", ())), row.target),
        "original_event": event["event"],
        "original_data": event["data"],
        "timestamp": event["timestamp"],
        "n": event["n"],
    }
    if event.get("is_cut"):
        told["is_cut"] = True
    message = SendMessage(to_agent=row.observer, message=told)
    return Send("bus", "agent:send_message", message)
