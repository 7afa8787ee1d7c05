"""`observation`, a part of `events`, in its forms: messages, events, tables.

What it does: `actors/owners/observation.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from ksi.actors.owner import (
    Command,
    Event,
    Query,
    Reply,
)
from ksi.transport.errors import Busy, Forbidden, Invalid, NotFound, Quota
from ksi.transport.limits import PATTERN_CHARS_MAX, TEXT_CHARS_MAX
from ksi.transport.message import Id, Moment, operation

PATTERNS_MAX: Final = 64  # Names of events in one question.
PAGE_EVENTS_MAX: Final = 1000  # Of some hundred bytes: an answer fits into a frame.
RATE_EVENTS_MAX: Final = 1000  # Times kept of what was shown last, in a row.
BREAKER_S: Final = 300.0  # Silent for so long an observer hangs, where it does not say.
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=PATTERN_CHARS_MAX)]
Patterns = Annotated[list[Pattern], msgspec.Meta(max_length=PATTERNS_MAX)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_EVENTS_MAX)]
Operator = Literal["equals", "contains", "gt", "lt"]
Analysis = Literal["frequency", "sequence", "errors", "performance"]
Breaker = Literal["closed", "open"]
_TIMES: Final = {"time_range.start": "since", "time_range.end": "until"}
_FILTER: Final = {
    "event_patterns": "events",
    "filter.originator_id": "target",
    "filter.since": "since",
    "filter.until": "until",
    "filter.limit": "limit",
}
_OBSERVER: Final = {"observer": "leave it out: whoever asks is shown it"}


class ContentMatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an event must hold at `field`, a path as `data.status`: a value, or text of a pattern.

    `contains` is of texts and lists, `gt` and `lt` of numbers.
    """

    field: Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_CHARS_MAX)]
    value: str | int | float | bool | None = None
    pattern: Pattern | None = None
    operator: Operator = "equals"


class RateLimit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At most so many events in any so many seconds, by their times."""

    max_events: Annotated[int, msgspec.Meta(ge=1, le=RATE_EVENTS_MAX)] = 10
    window_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)] = 1.0


class Filter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of the events that are asked for are shown."""

    exclude: Patterns = []
    content_match: ContentMatch | None = None
    sampling_rate: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    rate_limit: RateLimit | None = None


class ObservationView(Reply, frozen=True, kw_only=True):
    """One subscription, and what became of what it is about, up to event `acked`."""

    subscription_id: str
    observer: str
    target: str
    events: list[str]
    filter: Filter
    created_at: float
    acked: int
    shown: int
    sampled_out: int
    rate_limited: int
    missed: int
    breaker: Breaker
    breaker_s: float
    push: bool = False
    unread: int = 0


class Observations(Reply, frozen=True, kw_only=True):
    """Subscriptions by id."""

    subscriptions: list[ObservationView]


class Observed(Reply, frozen=True, kw_only=True):
    """Events in order. Acknowledge `upto` to be shown what follows; `more`: there is some now."""

    events: list[dict[str, Any]]
    upto: int
    more: bool
    breaker: Breaker


class Counted(Reply, frozen=True, kw_only=True):
    """What becomes of the events behind `after` up to `upto`; `window`: times shown last.

    `is_all`: that is all there are now; `is_open`: the breaker, with which none are shown.
    """

    after: int
    upto: int
    is_all: bool
    is_open: bool
    shown: int
    sampled_out: int
    rate_limited: int
    window: list[float]


class Due(Reply, frozen=True, kw_only=True):
    """What an observer is to be told next: the events, and what becomes of all up to `upto`."""

    subscription_id: str
    after: int
    upto: int
    shown: int
    sampled_out: int
    rate_limited: int
    window: list[float]
    events: list[dict[str, Any]]


class AllDue(Reply, frozen=True, kw_only=True):
    """What is due now, of those who have waited longest, as much as is told at once."""

    due: list[Due]


class History(Reply, frozen=True, kw_only=True):
    """Events about an agent; `next`, `offset`: `after` and `offset` of the next page, if any."""

    events: list[dict[str, Any]]
    next: int | None
    offset: int | None


class Replayed(Reply, frozen=True, kw_only=True):
    """Events, the oldest first, each with `replay` and when it is due: seconds from the beginning.

    The next page begins behind `next`, and is told `begin`.
    """

    events: list[dict[str, Any]]
    begin: float | None
    next: int | None


class Analysed(Reply, frozen=True, kw_only=True):
    """What an analysis has found in `events` events; `next`: it goes on behind that one."""

    target: str | None
    analysis_type: Analysis
    events: int
    found: dict[str, Any]
    next: int | None


@operation(
    "observation:subscribe",
    owner="events",
    refuses=(Invalid, Quota, Forbidden),
    example={
        "target": "alice",
        "events": ["session:*"],
        "filter": {"exclude": ["session:joined"], "rate_limit": {"max_events": 10}},
    },
)
class Observe(Command[ObservationView], frozen=True, kw_only=True):
    """Observe what an agent does from now on: events it has to do with, that match.

    `target` may be a pattern. Who observes is the sender; no other `observer` can be named. Whoever
    observes the same target under the same id changes how, and keeps his place. With `push` what is
    shown comes into his inbox, a message `observe:end` for each event, and he acknowledges what he
    has read; else he asks for it: `observation:next`.
    """

    observer: Id | None = None
    target: Pattern
    events: Patterns = []
    filter: Filter | None = None
    subscription_id: Id | None = None
    after: Number | None = None
    breaker_s: Annotated[float, msgspec.Meta(ge=1.0, le=30 * 86_400.0)] = BREAKER_S
    push: bool = False


@operation(
    "observation:unsubscribe",
    owner="events",
    refuses=(NotFound, Forbidden),
    example={"subscription_id": "obs_1"},
)
class Unobserve(Command[None], frozen=True, kw_only=True):
    """End an observation of the sender's, or all of one target; an operator may end any.

    `observer` is the sender, where an operator does not name another.
    """

    subscription_id: Id | None = None
    observer: Id | None = None
    target: Pattern | None = None


@operation(
    "observation:ack",
    owner="events",
    refuses=(NotFound, Forbidden, Busy),
    example={"subscription_id": "obs_1", "upto": 1},
)
class AcknowledgeObserved(Command[None], frozen=True, kw_only=True):
    """Say that all that was shown up to an event is seen; closes a breaker. A sign of life, too."""

    subscription_id: Id
    upto: Number


@operation("observation:list", owner="events", example={"target": "alice"})
class ListObservations(Query[Observations], frozen=True, kw_only=True):
    """List who observes whom, with what was shown and what was not."""

    observer: Id | None = None
    target: Pattern | None = None


@operation(
    "observation:next",
    owner="events",
    refuses=(NotFound,),
    example={"subscription_id": "obs_1"},
)
class FindObserved(Query[Observed], frozen=True, kw_only=True):
    """Return what an observer is shown next: behind what is acknowledged, or behind `after`."""

    subscription_id: Id
    after: Number | None = None
    limit: Limit = 100


@operation(
    "observation:count",
    owner="events",
    refuses=(NotFound,),
    example={"subscription_id": "obs_1", "upto": 1},
)
class Count(Query[Counted], frozen=True, kw_only=True):
    """Count what becomes of the events up to one, for an observer; by default up to the newest."""

    subscription_id: Id
    upto: Number | None = None


@operation("observation:due", owner="events")
class FindDue(Query[AllDue], frozen=True, kw_only=True):
    """Return what observers are told next whose observations come by themselves."""


@operation(
    "observation:query_history",
    owner="events",
    refuses=(Invalid,),
    example={"events": "completion:*", "include_data": False},
)
class QueryHistory(Query[History], frozen=True, kw_only=True):
    """Return what an agent has done, or all of them: `observation:query` as KSI's users ask it.

    Without `include_data` what the events hold is left out.
    """

    older: ClassVar = {**_TIMES, "event_name": "events"}
    instead: ClassVar = _OBSERVER

    target: Id | None = None
    events: Patterns | Pattern = []
    exclude: Patterns = []
    since: Moment | None = None
    until: Moment | None = None
    limit: Limit = 100
    offset: Number = 0
    after: Number | None = None
    reverse: bool = False
    include_data: bool = True


@operation(
    "observation:query",
    owner="events",
    refuses=(Invalid,),
    example={"target": "alice", "since": "1h"},
)
class FindHistory(QueryHistory, frozen=True, kw_only=True):
    """Return what an agent has done: events it has to do with, without a subscription."""

    older: ClassVar = _TIMES

    target: Id


@operation(
    "observation:replay",
    owner="events",
    refuses=(Invalid,),
    example={"target": "alice", "speed": 10.0, "since": "1h"},
)
class Replay(Query[Replayed], frozen=True, kw_only=True):
    """Return what an agent has done, the oldest first, each event with the time at which it is due.

    At `speed` 2 it takes half as long as it took. Nothing happens again: who asks keeps the time.
    """

    older: ClassVar = {**_TIMES, **_FILTER}
    instead: ClassVar = {
        **_OBSERVER,
        "target_agent": _OBSERVER["observer"],
        "as_new_events": "leave it out: a replay changes nothing, and whoever asks may act on it",
        "offset": "after: the number of the event that it goes on behind",
    }

    target: Id
    speed: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    events: Patterns = []
    since: Moment | None = None
    until: Moment | None = None
    limit: Limit = 100
    after: Number | None = None
    begin: Annotated[float, msgspec.Meta(ge=0.0)] | None = None


@operation(
    "observation:analyze_patterns",
    owner="events",
    refuses=(Invalid,),
    example={"events": ["completion:*"], "analysis_type": "sequence"},
)
class AnalysePatterns(Query[Analysed], frozen=True, kw_only=True):
    """Say the same of certain events, of one agent or of all: what `observation:analyze` finds."""

    older: ClassVar = {**_TIMES, **_FILTER}
    instead: ClassVar = {"limit": "since and until: what is found is of all events in between"}

    target: Id | None = None
    analysis_type: Analysis = "frequency"
    events: Patterns = []
    since: Moment | None = None
    until: Moment | None = None
    after: Number | None = None


@operation(
    "observation:analyze",
    owner="events",
    refuses=(Invalid,),
    example={"target": "alice", "analysis_type": "performance"},
)
class Analyse(AnalysePatterns, frozen=True, kw_only=True):
    """Say how often an agent does what, and what after what, what has failed, or how long its
    completions take.
    """

    older: ClassVar = _TIMES
    instead: ClassVar = {}

    target: Id


class ObservationSet(Event, frozen=True, array_like=True, tag="observing"):
    subscription_id: str
    observer: str
    target: str
    events: list[str]
    filter: Filter
    breaker_s: float
    acked: int
    now: float
    time_s: float
    push: bool = False


class ObservationEnded(Event, frozen=True, array_like=True, tag="observation_ended"):
    subscription_id: str
    observer: str
    target: str


class ObservationAcknowledged(Event, frozen=True, array_like=True, tag="observation_acknowledged"):
    subscription_id: str
    upto: int
    shown: int
    sampled_out: int
    rate_limited: int
    window: list[float]
    time_s: float


class ObservationPushed(Event, frozen=True, array_like=True, tag="observation_pushed"):
    subscription_id: str
    upto: int
    shown: int
    sampled_out: int
    rate_limited: int
    window: list[float]
    pushed: int  # number of the last event that he is told of
    time_s: float


class ObservationRead(Event, frozen=True, array_like=True, tag="observation_read"):
    subscription_id: str
    is_all: bool
    time_s: float


class PushRefused(Event, frozen=True, array_like=True, tag="push_refused"):
    """A message found no room, or nobody: he has missed it, and the breaker is open."""

    subscription_id: str
    observer: str
    target: str
    reason: str


class BreakerOpened(Event, frozen=True, array_like=True, tag="breaker_opened"):
    subscription_id: str
    observer: str
    target: str


class BreakerPassed(Event, frozen=True, array_like=True, tag="breaker_passed"):
    """He is back: all up to here was missed, and if that is all, the breaker is closed."""

    subscription_id: str
    observer: str
    upto: int
    missed: int
    is_all: bool
    time_s: float


class Observation(msgspec.Struct, frozen=True, array_like=True):
    observer: str
    target: str
    events: list[str]
    filter: Filter
    breaker_s: float
    created_at: float
    seen_s: float  # owner time of his last sign of life
    acked: int
    shown: int = 0
    sampled_out: int = 0
    rate_limited: int = 0
    missed: int = 0
    is_open: bool = False
    window: list[float] = []
    push: bool = False
    pushed: int = 0
    unread: int = 0  # Of what was pushed.
