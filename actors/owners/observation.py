"""Observation: what agents do, as others asked to see it.

Who observes whom, with which filters, and how far he has seen. What is seen is read from the event
log, by the observer or for him, so the observed never wait.

- What an observer is shown follows from the log and his subscription alone: reading on from where
  he has acknowledged shows each event once, also after a restart of anybody.
- Excluded is stronger than wanted. What sampling and rate limit leave out is counted.
- An observer who is silent for `breaker_s` has his breaker opened: he is shown nothing until he
  acknowledges again, and then goes on from there. What he has missed is counted.
- What is pushed, is put into his inbox by a tick, and counted as it is sent: `pushing.py`. He is
  silent who has something to read and acknowledges none of it.
- A replay is read like anything else: it is marked, and changes nothing.

These are operations of the owner `events` (`events.py`).

Source: "KSI: Comprehensive State Management Analysis", 9; the operations `observation:*` of KSI.
Circuit breakers: Nygard, "Release It!".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, Protocol
from zlib import crc32

import msgspec

from ksi.actors.declarations.observation import (
    AcknowledgeObserved,
    Analysed,
    AnalysePatterns,
    BreakerOpened,
    BreakerPassed,
    ContentMatch,
    Count,
    Counted,
    Filter,
    FindObserved,
    History,
    ListObservations,
    Observation,
    ObservationAcknowledged,
    ObservationEnded,
    ObservationPushed,
    ObservationRead,
    Observations,
    ObservationSet,
    ObservationView,
    Observe,
    Observed,
    PushRefused,
    QueryHistory,
    Replay,
    Replayed,
    Unobserve,
)
from ksi.actors.owner import (
    Decision,
    Event,
    EventLog,
    Given,
    Reply,
    Sender,
    Table,
)
from ksi.transport.errors import Busy, Forbidden, NotFound, Quota
from ksi.transport.patterns import matcher, plain_part

OBSERVATIONS_MAX: Final = 1000  # In all: a tick looks at each.
LOOKS_MAX: Final = 8  # Pages of the log looked at for one answer: half a second at the worst.
ERRORS_SHOWN_MAX: Final = 20  # Of an analysis.
ROW_S: Final = 60.0  # What comes later is not in a row with what was before.
ROWS_MAX: Final = 10  # The most frequent ones, of an analysis.
LOOK: Final = 1000  # Events looked at in one page of the log.


class ObservationTables(Protocol):
    """The tables of the owner `events` that this file is about."""

    observations: Table[Observation]
    log: EventLog


ObservationEvent = (
    ObservationAcknowledged
    | ObservationSet
    | ObservationEnded
    | ObservationPushed
    | ObservationRead
    | PushRefused
    | BreakerOpened
    | BreakerPassed
)


def decide(command: Any, sender: Sender, tables: ObservationTables, given: Given) -> Decision:
    """Return what happens if a command is carried out, or raise a refusal."""
    match command:
        case AcknowledgeObserved():
            return _acknowledge(command, sender, tables, given)
        case Observe():
            return _observe(command, sender, tables, given)
        case Unobserve():
            return _unobserve(command, sender, tables)
        case _:
            raise TypeError(command)


def tick(tables: ObservationTables, given: Given) -> Decision:
    """Open the breakers of observers who hang."""
    return Decision(tuple(_hanging(tables, given)))


def apply(event: Any, tables: ObservationTables) -> None:
    """Write what an event says."""
    rows = tables.observations
    match event:
        case ObservationAcknowledged():
            _acknowledged(event, tables)
        case ObservationSet():
            _observation_set(event, tables)
        case ObservationEnded():
            rows.delete(event.subscription_id)
        case BreakerOpened():
            rows.put(event.subscription_id, _with(event, tables, is_open=True))
        case BreakerPassed():
            missed = _known(tables, event.subscription_id).missed + event.missed
            passed = {"acked": event.upto, "missed": missed, "seen_s": event.time_s}
            row = _with(event, tables, **passed, is_open=not event.is_all, unread=0)
            rows.put(event.subscription_id, row)
        case ObservationPushed():
            rows.put(event.subscription_id, _pushed(event, tables))
        case ObservationRead():
            row = _with(event, tables, seen_s=event.time_s)
            row = msgspec.structs.replace(row, unread=0 if event.is_all else row.unread)
            rows.put(event.subscription_id, row)
        case PushRefused():
            row = _known(tables, event.subscription_id)
            counts = {"shown": row.shown - 1, "missed": row.missed + 1, "is_open": True}
            rows.put(event.subscription_id, msgspec.structs.replace(row, **counts))
        case _:
            raise TypeError(event)


def answer(query: Any, tables: ObservationTables) -> Reply:
    """Return the reply to a query, or raise a refusal."""
    match query:
        case FindObserved():
            return _find(query, tables)
        case Count():
            return _count(query, tables)
        case QueryHistory():
            return _history(query, tables)
        case Replay():
            return _replay(query, tables)
        case AnalysePatterns():
            return _analyse(query, tables)
        case ListObservations():
            views = [
                _view(subscription_id, row)
                for subscription_id, row in tables.observations.range()
                if query.observer in (None, row.observer) and query.target in (None, row.target)
            ]
            return Observations(subscriptions=views)
        case _:
            raise TypeError(query)


def _observe(command: Observe, sender: Sender, tables: ObservationTables, given: Given) -> Decision:
    if command.observer not in (None, sender.name):
        raise Forbidden(f"{sender.name} observes for himself, not for {command.observer}")
    subscription_id = command.subscription_id or f"obs_{next(given.ids)}"
    known = tables.observations.get(subscription_id)
    if known is not None and known.observer != sender.name:
        raise Forbidden(f"{subscription_id} is an observation of {known.observer}")
    if known is None and tables.observations.count() >= OBSERVATIONS_MAX:
        raise Quota(f"there are {OBSERVATIONS_MAX} observations", limit=OBSERVATIONS_MAX)
    after = command.after
    if after is None and known is not None and known.target == command.target:
        after = known.acked
    if after is None:
        after = getattr(given.fact, "n", 0)  # of the newest event, if that can be read now
    begun = ObservationSet(
        subscription_id, sender.name, command.target, command.events, command.filter or Filter(),
        command.breaker_s, after, given.now, given.time_s, command.push,
    )  # fmt: skip
    return Decision((begun,), _view(subscription_id, _row(begun, known)))


def _unobserve(command: Unobserve, sender: Sender, tables: ObservationTables) -> Decision:
    if command.subscription_id is not None:
        row = _own(tables, command.subscription_id, sender)
        ended = [ObservationEnded(command.subscription_id, row.observer, row.target)]
        return Decision(tuple(ended))
    observer = command.observer or sender.name
    if observer != sender.name and sender.role != "operator":
        raise Forbidden(f"what {observer} observes is not ended by {sender.name}")
    ended = [
        ObservationEnded(subscription_id, row.observer, row.target)
        for subscription_id, row in tables.observations.range()
        if row.observer == observer and row.target == command.target
    ]
    if not ended:
        raise NotFound(f"{observer} does not observe {command.target}")
    return Decision(tuple(ended))


def _acknowledge(
    command: AcknowledgeObserved, sender: Sender, tables: ObservationTables, given: Given
) -> Decision:
    subscription_id = command.subscription_id
    known = _own(tables, subscription_id, sender)
    counted = given.fact
    if not isinstance(counted, Counted):  # Its log cannot be read now: nobody has been shown any.
        counted = _nothing(known, max(known.acked, command.upto))
    if (counted.after, counted.is_open) != (known.acked, known.is_open):
        raise Busy("another acknowledgement came first", retry_after_s=0.05)
    if known.is_open:
        missed = counted.shown + counted.sampled_out + counted.rate_limited
        passed = BreakerPassed(
            subscription_id, known.observer, counted.upto, missed, counted.is_all, given.time_s
        )
        return Decision((passed,))
    if known.push:  # What was pushed is counted already.
        is_all = command.upto >= known.pushed
        return Decision((ObservationRead(subscription_id, is_all, given.time_s),))
    is_news = counted.upto > known.acked
    if not is_news and given.time_s - known.seen_s < known.breaker_s / 4:
        return Decision()
    acknowledged = ObservationAcknowledged(
        subscription_id, counted.upto, counted.shown, counted.sampled_out, counted.rate_limited,
        counted.window, given.time_s,
    )  # fmt: skip
    return Decision((acknowledged,))


def _hanging(tables: ObservationTables, given: Given) -> Iterator[Event]:
    for subscription_id, row in tables.observations.range():
        is_idle = row.push and not row.unread  # He has nothing to give a sign of life for.
        if not (row.is_open or is_idle) and given.time_s - row.seen_s > row.breaker_s:
            yield BreakerOpened(subscription_id, row.observer, row.target)


def _known(tables: ObservationTables, subscription_id: str) -> Observation:
    known = tables.observations.get(subscription_id)
    if known is None:
        raise NotFound(f"there is no observation {subscription_id}", hint="ksi observe list")
    return known


def _own(tables: ObservationTables, subscription_id: str, sender: Sender) -> Observation:
    known = _known(tables, subscription_id)
    if known.observer != sender.name and sender.role != "operator":
        raise Forbidden(f"{subscription_id} is an observation of {known.observer}")
    return known


def _with(event: Any, tables: ObservationTables, **changed: Any) -> Observation:
    return msgspec.structs.replace(_known(tables, event.subscription_id), **changed)


def _row(event: ObservationSet, known: Observation | None) -> Observation:
    """Return the row of an observation that is begun, or changed."""
    about = (event.observer, event.target, event.events, event.filter, event.breaker_s)
    if known is None or known.target != event.target:
        return Observation(*about, event.now, event.time_s, event.acked, push=event.push)
    counts = (known.shown, known.sampled_out, known.rate_limited, known.missed)
    row = Observation(*about, known.created_at, event.time_s, event.acked, *counts)
    is_on = event.push and known.push
    pushed = {"pushed": known.pushed, "unread": known.unread} if is_on else {}
    return msgspec.structs.replace(row, push=event.push, **pushed)


def _observation_set(event: ObservationSet, tables: ObservationTables) -> None:
    known = tables.observations.get(event.subscription_id)
    tables.observations.put(event.subscription_id, _row(event, known))


def _acknowledged(event: ObservationAcknowledged, tables: ObservationTables) -> None:
    known = _known(tables, event.subscription_id)
    changed = msgspec.structs.replace(
        known,
        acked=event.upto,
        shown=known.shown + event.shown,
        sampled_out=known.sampled_out + event.sampled_out,
        rate_limited=known.rate_limited + event.rate_limited,
        window=event.window,
        seen_s=event.time_s,
    )
    tables.observations.put(event.subscription_id, changed)


def _pushed(event: ObservationPushed, tables: ObservationTables) -> Observation:
    known = _known(tables, event.subscription_id)
    return msgspec.structs.replace(
        known,
        acked=event.upto,
        shown=known.shown + event.shown,
        sampled_out=known.sampled_out + event.sampled_out,
        rate_limited=known.rate_limited + event.rate_limited,
        window=event.window,
        pushed=event.pushed,
        unread=known.unread + event.shown,
        seen_s=known.seen_s if known.unread else event.time_s,  # From now on he may be late.
    )


def _view(subscription_id: str, row: Observation) -> ObservationView:
    return ObservationView(
        subscription_id=subscription_id,
        observer=row.observer,
        target=row.target,
        events=row.events,
        filter=row.filter,
        created_at=row.created_at,
        acked=row.acked,
        shown=row.shown,
        sampled_out=row.sampled_out,
        rate_limited=row.rate_limited,
        missed=row.missed,
        breaker="open" if row.is_open else "closed",
        breaker_s=row.breaker_s,
        push=row.push,
        unread=row.unread,
    )


class Watch:
    """What becomes of events, as an observation has it, from what is acknowledged on.

    Attributes:
        upto: number of the last event that was looked at; `is_all`: there were no more.
        counts: how many were shown, sampled_out, rate_limited.
        window: times of those shown last, for the rate limit.
    """

    def __init__(self, row: Observation, log: EventLog) -> None:
        self.upto = row.acked
        self.is_all = False
        self.counts: Counter[str] = Counter()
        self.window = [*row.window]
        self._row = row
        self._log = log

    def pages(self, stop: int | None = None) -> Iterator[list[dict[str, Any]]]:
        """Yield what is shown of each page of the log, up to event `stop`."""
        wanted = {"patterns": self._row.events, "limit": LOOK, **_about(self._row.target)}
        wanted["exclude"] = self._row.filter.exclude
        wanted["resolve"] = self._row.filter.content_match is not None
        for _ in range(LOOKS_MAX):
            page = self._log.find({**wanted, "after": self.upto})
            shown = []
            for event in page["events"]:
                if stop is not None and event["n"] > stop:
                    break
                if fate := self._fate(event):
                    self.counts[fate] += 1
                    if fate == "shown":
                        shown.append(event)
            self.upto = page["upto"] if stop is None else min(stop, page["upto"])
            self.is_all = page["next"] is None or self.upto == stop
            yield shown
            if self.is_all:
                return

    def _fate(self, event: dict[str, Any]) -> str | None:
        """Return what becomes of an event; None if it is not asked for."""
        row, wanted = self._row, self._row.filter
        if row.push and event["event"].startswith("message:") and row.observer in event["agents"]:
            return None  # That he is told of something, and reads it, would be told without end.
        if wanted.content_match is not None and not _holds(event, wanted.content_match):
            return None
        if wanted.sampling_rate < 1.0 and _chance(event) >= wanted.sampling_rate:
            return "sampled_out"
        limit = wanted.rate_limit
        if limit is not None:
            at, before = event["timestamp"], self.window[-limit.max_events :]
            if len(before) == limit.max_events and at - before[0] < limit.window_seconds:
                return "rate_limited"
            self.window = [*before, at][-limit.max_events :]
        return "shown"


def _about(target: str) -> dict[str, Any]:
    return {"agent_id": target} if plain_part(target) == target else {"agents": [target]}


def _chance(event: dict[str, Any]) -> float:
    """Return a number from 0 up to 1 that is that of this event, whoever asks and when."""
    origin = event["metadata"]
    words = "/".join(str(origin[name]) for name in ("owner", "store", "seq", "index"))
    return crc32(words.encode()) / 2**32


def _holds(event: dict[str, Any], match: ContentMatch) -> bool:
    """Return whether an event holds what is to be matched; the path begins in its data."""
    path = match.field.split(".")
    value: Any = event if path[0] in event else event["data"]
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    if match.pattern is not None:
        return isinstance(value, str) and matcher((match.pattern,))(value)
    wanted = match.value
    match match.operator:
        case "equals":
            return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
        case "contains":
            if isinstance(value, str):
                return isinstance(wanted, str) and wanted in value
            return isinstance(value, list) and wanted in value
        case "gt" | "lt":
            if not (_is_number(value) and _is_number(wanted)):
                return False
            return bool(value > wanted if match.operator == "gt" else value < wanted)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _find(query: FindObserved, tables: ObservationTables) -> Observed:
    row = _known(tables, query.subscription_id)
    if row.is_open:
        return Observed(events=[], upto=row.acked, more=True, breaker="open")
    after = row.acked if query.after is None else query.after
    watch = Watch(row, tables.log)
    for page in watch.pages():
        shown = [event for event in page if event["n"] > after]
        if len(shown) > query.limit:
            shown = shown[: query.limit]
            return Observed(events=shown, upto=shown[-1]["n"], more=True, breaker="closed")
        if shown:
            return Observed(events=shown, upto=watch.upto, more=not watch.is_all, breaker="closed")
    return Observed(events=[], upto=watch.upto, more=not watch.is_all, breaker="closed")


def _count(query: Count, tables: ObservationTables) -> Counted:
    row = _known(tables, query.subscription_id)
    stop = None if row.is_open else query.upto
    if stop is not None and stop <= row.acked:
        return _nothing(row, row.acked)
    watch = Watch(row, tables.log)
    for _ in watch.pages(stop):
        pass
    return Counted(
        after=row.acked,
        upto=max(row.acked, watch.upto),
        is_all=watch.is_all,
        is_open=row.is_open,
        shown=watch.counts["shown"],
        sampled_out=watch.counts["sampled_out"],
        rate_limited=watch.counts["rate_limited"],
        window=watch.window,
    )


def _nothing(row: Observation, upto: int) -> Counted:
    return Counted(
        after=row.acked, upto=upto, is_all=True, is_open=row.is_open, shown=0, sampled_out=0,
        rate_limited=0, window=row.window,
    )  # fmt: skip


def _page(query: Any, tables: ObservationTables, **more: Any) -> dict[str, Any]:
    times = {"since": query.since, "until": query.until, "after": query.after}
    return tables.log.find({"agent_id": query.target, **times, **more})


def _history(query: QueryHistory, tables: ObservationTables) -> History:
    page = _page(
        query,
        tables,
        patterns=[query.events] if isinstance(query.events, str) else query.events,
        exclude=query.exclude,
        limit=query.limit,
        offset=query.offset,
        reverse=query.reverse,
    )
    events = page["events"]
    if not query.include_data:
        events = [{name: event[name] for name in event if name != "data"} for event in events]
    return History(events=events, next=page["next"], offset=page["offset"])


def _replay(query: Replay, tables: ObservationTables) -> Replayed:
    page = _page(query, tables, patterns=query.events, limit=query.limit)
    begin = query.begin
    if begin is None and page["events"]:
        begin = page["events"][0]["timestamp"]
    events = [
        {**event, "replay": True, "due_s": max(0.0, event["timestamp"] - begin) / query.speed}
        for event in page["events"]
    ]
    return Replayed(events=events, begin=begin, next=page["next"])


_FAILED: Final = frozenset({"failed", "lost", "cancelled", "error", "timeout"})


def _analyse(query: AnalysePatterns, tables: ObservationTables) -> Analysed:
    events: list[dict[str, Any]] = []
    after = query.after
    for _ in range(LOOKS_MAX):
        query = msgspec.structs.replace(query, after=after)
        page = _page(query, tables, patterns=query.events, limit=LOOK)
        events += page["events"]
        after = page["next"]
        if after is None:
            break
    return Analysed(
        target=query.target,
        analysis_type=query.analysis_type,
        events=len(events),
        found=_ANALYSES[query.analysis_type](events),
        next=after,
    )


def _frequency(events: list[dict[str, Any]]) -> dict[str, Any]:
    times = [event["timestamp"] for event in events]
    seconds = max(times) - min(times) if times else 0.0
    return {
        "by_event": dict(Counter(event["event"] for event in events).most_common()),
        "seconds": seconds,
        "per_s": len(events) / seconds if seconds else 0.0,
    }


def _sequence(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what agents do in a row, two and three at a time, each within a minute of the last."""
    pairs: Counter[tuple[str, ...]] = Counter()
    triples: Counter[tuple[str, ...]] = Counter()
    last: dict[str, list[str]] = {}  # names, by agent
    last_at: dict[str, float] = {}
    for event in events:
        for agent in event.get("agents", ())[:1]:  # who has done it
            row = (
                last.get(agent, []) if event["timestamp"] - last_at.get(agent, 0.0) < ROW_S else []
            )
            row = [*row, event["event"]][-3:]
            if len(row) > 1:
                pairs[row[-2], row[-1]] += 1
            if len(row) > 2:
                triples[tuple(row)] += 1
            last[agent], last_at[agent] = row, event["timestamp"]
    return {
        name: [{"events": list(row), "count": count} for row, count in counts.most_common(ROWS_MAX)]
        for name, counts in (("pairs", pairs), ("triples", triples))
    }


def _errors(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the events that tell of a failure: by status, or of a grant that lapsed."""
    wrong = [
        event
        for event in events
        if event["data"].get("status") in _FAILED or event["data"].get("lapsed") is True
    ]
    return {
        "count": len(wrong),
        "by_event": dict(Counter(event["event"] for event in wrong).most_common()),
        "newest": [
            {"n": event["n"], "event": event["event"], "timestamp": event["timestamp"],
             "reason": event["data"].get("reason") or event["data"].get("exit")}
            for event in wrong[-ERRORS_SHOWN_MAX:]
        ],
    }  # fmt: skip


def _performance(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how long requests waited, and ran, until they had ended, in seconds."""
    begun: dict[tuple[str, str], float] = {}
    waited: list[float] = []
    ran: list[float] = []
    for event in events:
        name, request = event["event"], event.get("correlation_id", "")
        at = event["timestamp"]
        if name == "completion:queued":
            begun[name, request] = at
        elif name == "completion:granted":
            begun[name, request] = at
            if (since := begun.get(("completion:queued", request))) is not None:
                waited.append(at - since)
        elif name == "completion:ended":
            if (since := begun.pop(("completion:granted", request), None)) is not None:
                ran.append(at - since)
            begun.pop(("completion:queued", request), None)
    return {"waited_s": _spread(waited), "ran_s": _spread(ran), "open": len(begun)}


_ANALYSES: Final = {
    "frequency": _frequency, "sequence": _sequence, "errors": _errors, "performance": _performance,
}  # fmt: skip


def _spread(seconds: list[float]) -> dict[str, Any]:
    if not seconds:
        return {"count": 0}
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "mean": sum(ordered) / len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "max": ordered[-1],
    }
