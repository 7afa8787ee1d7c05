"""The owner `completion` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/completion.py`. A field that is added to an event or a row goes last
and has a default: journals and views of former versions are read with it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.declarations.bounds import BoundTables
from ksi.actors.declarations.spending import SpendingTables, Usage
from ksi.actors.declarations.workers import ANYTHING, WORKERS, Word, WorkerTables
from ksi.actors.owner import Command, Event, Keyed, Query, Reply, Table
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    NotOwner,
    Quota,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import (
    ACTIVE_MAX,
    ACTIVE_USUAL,
    ATTEMPTS_MAX,
    ATTEMPTS_USUAL,
    RATE_PATTERN,
    REQUEST_RUN_S,
    RETRY_AFTER_S_MAX,
    RETRY_S,
    SLOTS_MAX,
)
from ksi.transport.message import OPERATOR, Id, Plain, Signal, Text, operation
from ksi.transport.message import OWNER as OWNERS_ONLY

PAGE_REQUESTS_MAX: Final = 1000  # Requests in one reply.


Status = Literal["queued", "active", "completed", "failed", "cancelled"]
# Why an attempt has failed. Of the first five the next attempt may come to more.
Kind = Literal[
    "timeout",
    "network_error",
    "api_rate_limit",
    "provider_error",
    "temporary_failure",
    "invalid_request",
    "authentication",
    "model_not_found",
    "budget",
]
PASSING: Final[frozenset[Kind]] = frozenset(
    {"timeout", "network_error", "api_rate_limit", "provider_error", "temporary_failure"}
)
FINAL: Final = frozenset({"completed", "failed", "cancelled"})

Priority = Annotated[int, msgspec.Meta(ge=1, le=9)]
Attempt = Annotated[int, msgspec.Meta(ge=1)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_REQUESTS_MAX)]
RunSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400.0)]
RetrySeconds = Annotated[float, msgspec.Meta(ge=0.05, le=3600.0)]
RetryAfterSeconds = Annotated[float, msgspec.Meta(ge=0, le=RETRY_AFTER_S_MAX)]
Attempts = Annotated[int, msgspec.Meta(ge=1, le=ATTEMPTS_MAX)]
Rate = Annotated[str, msgspec.Meta(pattern=RATE_PATTERN)]
Cursor = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._/-]{0,300}$(?!\n)")]


class Accepted(Reply, frozen=True, kw_only=True):
    """The request is on disk; `queue_depth` requests wait in its session, it among them."""

    request_id: str
    session_id: str
    status: Status
    queue_depth: int
    session_active: bool
    priority: int


class RequestView(Reply, frozen=True, kw_only=True):
    """One request: times in seconds since the epoch. `reason` says why it was not completed, or
    its outcome is not in the session's file.

    `failures` of its attempts have failed, the last one for `reason`, which is of a `kind`; the
    next is not begun before `retry_at`. A dead letter that was retried names the request that it
    became, and that one the dead letter. `result` and `progress`, what its worker last said, are
    only in `completion:status`.
    """

    request_id: str
    session_id: str
    requester: str
    status: Status
    priority: int
    requires: str | None
    attempt: int
    worker: str | None
    queued_at: float
    granted_at: float | None
    finished_at: float | None
    reason: str | None
    kind: str | None = None
    failures: int = 0
    attempts_max: int = ATTEMPTS_USUAL
    retry_at: float | None = None
    retried_as: str | None = None
    retry_of: str | None = None
    result: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None


class RequestPage(Reply, frozen=True, kw_only=True):
    """Requests, and how many there are in all; `next` continues, None at the end."""

    requests: list[RequestView]
    waiting: int
    active: int
    finished: int
    limit: int
    next: str | None


class SessionQueue(Reply, frozen=True, kw_only=True):
    """What runs and waits in one session: `next` are the first that wait, in order."""

    session_id: str
    waiting: int
    active: RequestView | None
    next: list[RequestView]


class GrantView(Reply, frozen=True, kw_only=True):
    """What a worker is to do: answer `prompt`, and report as `attempt`.

    `follows` was completed last in the session: its answer may not be in the history yet.
    """

    request_id: str
    attempt: int
    session_id: str
    requester: str
    prompt: str
    model: str | None
    data: dict[str, Any]
    options: dict[str, Any]
    requires: str | None
    run_s: float
    follows: str | None = None


class Grants(Reply, frozen=True, kw_only=True):
    """The grants a worker holds; with `more` there are others: ask for them by their ids."""

    worker: str
    grants: list[GrantView]
    more: bool


class ProviderView(Reply, frozen=True, kw_only=True):
    """What one provider can do now, and how requests have fared that it was asked to answer.

    `retried` counts attempts that have failed and were followed by another. `unfit` says why a
    worker that should have offered it could not. `limit` and `rate` bound its workers together.
    """

    provider: str
    workers: int
    slots: int
    used: int
    completed: int
    failed: int
    retried: int
    completed_at: float | None
    failed_at: float | None
    kind: str | None
    reason: str | None
    unfit: str | None
    limit: int | None = None
    rate: str | None = None


class ProviderPage(Reply, frozen=True, kw_only=True):
    """Providers in the order of their names."""

    providers: list[ProviderView]


class RetryPage(Reply, frozen=True, kw_only=True):
    """Requests whose next attempt is to come, the next first, and how many have failed for good."""

    requests: list[RequestView]
    waiting: int
    dead: int


class Limits(Reply, frozen=True, kw_only=True):
    """How many grants there may be at a time, None for any number, and how many there are: of one
    provider, or in all sessions together.
    """

    limit: int | None
    active: int
    provider: str | None = None
    rate: str | None = None


@operation(
    "completion:async",
    owner="completion",
    refuses=(NotFound, Conflict, Forbidden, TooLarge, Quota, Busy),
    example={"session_id": "sess_1", "prompt": "What is an epoch?", "requires": "echo"},
)
class Async(Command[Accepted], frozen=True, kw_only=True):
    """Queue a request on a session that the sender owns or that admits it.

    A worker that offers `requires` is granted it when it stands first and nothing else runs in the
    session. Lower `priority` goes first; waiting makes up for it. `data` goes into the session's
    entry beside the prompt (`pattern`, `to_agent`, ...), `options` only to the worker. One attempt
    may run for `run_s`. What fails and may pass is tried again, `attempts_max` times in all, after
    `retry_s`, then ever twice as long; its session waits for it. The outcome: subscribe to
    `completion.SENDER.REQUEST.>`, or ask `completion:status`; `client.complete` does all of it.
    """

    session_id: Id
    prompt: str
    model: Text | None = None
    requires: Word | None = None
    priority: Priority = 5
    data: Plain = {}
    options: Plain = {}
    run_s: RunSeconds = REQUEST_RUN_S
    attempts_max: Attempts = ATTEMPTS_USUAL
    retry_s: RetrySeconds = RETRY_S
    request_id: Id | None = None


@operation(
    "completion:cancel",
    owner="completion",
    refuses=(NotFound, Forbidden, Conflict),
    example={"request_id": "req_1"},
)
class Cancel(Command[RequestView], frozen=True, kw_only=True):
    """Cancel a request that waits or runs: its session is free at once.

    For whoever made it and operators, and the owner of its session, who names that in `session_id`.
    """

    request_id: Id
    session_id: Id | None = None
    reason: Text = ""


@operation(
    "completion:retry",
    owner="completion",
    refuses=(NotFound, Forbidden, Conflict, Quota, Busy),
    example={"request_id": "req_1"},
)
class Retry(Command[Accepted], frozen=True, kw_only=True):
    """Queue a request that has failed for good once more, as a new one of the same requester.

    For whoever made it and operators, and the owner of its session, who names that in `session_id`.
    """

    request_id: Id
    session_id: Id | None = None


@operation(
    "completion:limit",
    owner="completion",
    roles=OPERATOR,
    refuses=(Invalid, Quota),
    example={"provider": "openai", "limit": 8, "rate": "60/m"},
)
class SetLimit(Command[Limits], frozen=True, kw_only=True):
    """Set how many grants there may be at a time: of a `provider`, by all its workers, or in all.

    Of a provider also how many in a second, minute or hour (`5/s`, `60/m`, `1000/h`), counted from
    now; what is left out has no bound. What runs beyond it goes on.
    """

    limit: Annotated[int, msgspec.Meta(ge=0, le=ACTIVE_MAX)] | None = None
    provider: Word | None = None
    rate: Rate | None = None


@operation(
    "completion:session_closed",
    owner="completion",
    roles=OWNERS_ONLY,
    example={"session_id": "sess_1"},
)
class SessionClosed(Command[None], frozen=True, kw_only=True):
    """A session with open requests was closed: they end. Sent by the owner of sessions."""

    session_id: Id


@operation(
    "completion:status",
    owner="completion",
    refuses=(NotFound,),
    example={"request_id": "req_1"},
)
class GetStatus(Query[RequestView], frozen=True, kw_only=True):
    """Return how a request stands, or its outcome."""

    request_id: Id


@operation("completion:session_status", owner="completion", example={"session_id": "sess_1"})
class GetSessionStatus(Query[SessionQueue], frozen=True, kw_only=True):
    """Return what runs and waits in a session."""

    session_id: Id
    limit: Limit = 10


@operation("completion:list", owner="completion", example={"status": "queued", "limit": 10})
class ListRequests(Query[RequestPage], frozen=True, kw_only=True):
    """List requests: those that wait, by session in their order; those that run, by worker; or
    those that are finished, or have failed for good (`dead`), the latest first."""

    status: Literal["queued", "active", "finished", "dead"] = "queued"
    limit: Limit = 100
    after: Cursor | None = None


@operation("completion:retry_status", owner="completion", example={"limit": 10})
class GetRetryStatus(Query[RetryPage], frozen=True, kw_only=True):
    """List requests that have failed and are to be tried again."""

    limit: Limit = 100


@operation("completion:provider_status", owner="completion", example={"provider": "local"})
class GetProviderStatus(Query[ProviderPage], frozen=True, kw_only=True):
    """Return what providers there are, who offers them, and how they have fared."""

    provider: Word | None = None


@operation(
    "worker:progress",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, NotOwner, StaleEpoch, TooLarge),
    example={"request_id": "req_1", "attempt": 1, "progress": {"tokens": 12}},
)
class Progress(Command[None], frozen=True, kw_only=True):
    """Say how a granted request gets on."""

    request_id: Id
    attempt: Attempt
    progress: Plain


@operation(
    "worker:report",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, NotOwner, StaleEpoch, TooLarge),
    example={"request_id": "req_1", "attempt": 1, "result": {"response": "..."}},
)
class Report(Command[RequestView], frozen=True, kw_only=True):
    """End a granted request: completed with `result`, or failed because of `error`.

    A `kind` that may pass lets it be tried again, not before `retry_after_s`, and until then its
    provider is granted nothing; without a kind it has failed for good. `usage` is what it took,
    whatever came of it.
    """

    request_id: Id
    attempt: Attempt
    result: Plain = {}
    error: Text | None = None
    kind: Kind | None = None
    retry_after_s: RetryAfterSeconds | None = None
    provider: Word | None = None
    usage: Usage | None = None


@operation(
    "worker:tokens",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, NotOwner, StaleEpoch),
    example={"request_id": "req_1", "attempt": 1, "start": 0, "text": "An epoch"},
)
class Tokens(Signal[None], frozen=True, kw_only=True):
    """Let who listens see the answer grow: `text` comes behind its first `start` characters.

    It is kept nowhere; the result has all of it.
    """

    request_id: Id
    attempt: Attempt
    start: Annotated[int, msgspec.Meta(ge=0)]
    text: Text


@operation(
    "worker:unfit",
    owner="completion",
    roles=WORKERS,
    refuses=(Quota,),
    example={"provider": "openai", "reason": "OPENAI_API_KEY is not set"},
)
class ReportUnfit(Command[None], frozen=True, kw_only=True):
    """Say that a provider cannot answer here, and why: an extra or a key is missing.

    While nobody offers it, requests that require it are refused with these words.
    """

    provider: Word
    reason: Text


@operation(
    "worker:grants",
    owner="completion",
    roles=WORKERS,
    own="worker",
    example={"worker": "gpu-1"},
)
class GetGrants(Query[Grants], frozen=True, kw_only=True):
    """Return the grants a worker holds with all it needs for them, or those of them named."""

    worker: Id
    request_ids: Annotated[list[Id], msgspec.Meta(max_length=SLOTS_MAX)] | None = None


class Queued(Event, frozen=True, array_like=True, tag="queued"):
    request_id: str
    session_id: str
    requester: str
    requires: str
    priority: int
    rank: int
    number: int
    prompt: str
    model: str | None
    data: dict[str, Any]
    options: dict[str, Any]
    run_s: float
    size: int
    now: float
    recorded: bool = True  # False: it waits for the owner of sessions to write it
    attempts_max: int = ATTEMPTS_USUAL
    retry_s: float = RETRY_S
    retry_of: str = ""


class Recorded(Event, frozen=True, array_like=True, tag="recorded"):
    request_id: str


class Unrecorded(Event, frozen=True, array_like=True, tag="unrecorded"):
    request_id: str
    session_id: str
    requester: str
    reason: str


class Granted(Event, frozen=True, array_like=True, tag="granted"):
    request_id: str
    session_id: str
    requester: str
    worker: str
    attempt: int
    now: float
    time_s: float
    provider: str = ANYTHING


class Progressed(Event, frozen=True, array_like=True, tag="progress"):
    request_id: str
    session_id: str
    requester: str
    worker: str
    attempt: int
    progress: dict[str, Any]


class Requeued(Event, frozen=True, array_like=True, tag="requeued"):
    request_id: str
    session_id: str
    requester: str
    worker: str
    attempt: int
    lapsed: bool
    reason: str


class Deferred(Event, frozen=True, array_like=True, tag="deferred"):
    """An attempt has failed and another is to follow, not before `due_ms`."""

    request_id: str
    session_id: str
    requester: str
    worker: str
    attempt: int
    kind: str
    reason: str
    provider: str
    due_ms: int
    retry_at: float
    by: str
    now: float


class Resumed(Event, frozen=True, array_like=True, tag="resumed"):
    """What was deferred may be granted."""

    request_id: str
    session_id: str


class Ended(Event, frozen=True, array_like=True, tag="ended"):
    request_id: str
    session_id: str
    requester: str
    status: Status
    worker: str
    attempt: int
    reason: str | None
    result: dict[str, Any] | None
    size: int
    by: str
    now: float
    time_s: float
    kind: str = ""
    provider: str = ""


class Retried(Event, frozen=True, array_like=True, tag="retried"):
    """A dead letter was queued again, under another id."""

    finished_ms: int
    request_id: str
    retried_as: str


class Buried(Event, frozen=True, array_like=True, tag="buried"):
    """A dead letter is not kept any longer."""

    finished_ms: int
    request_id: str


class FoundUnfit(Event, frozen=True, array_like=True, tag="unfit"):
    provider: str
    reason: str
    now: float


class Forgotten(Event, frozen=True, array_like=True, tag="forgotten"):
    finished_ms: int
    request_id: str


class QueueClosed(Event, frozen=True, array_like=True, tag="closed"):
    session_id: str


class LimitSet(Event, frozen=True, array_like=True, tag="limit"):
    limit: int


class Request(msgspec.Struct, frozen=True, array_like=True):
    """The row of a request. Small: what it says is in `prompts` while it is open."""

    session_id: str
    requester: str
    requires: str
    priority: int
    rank: int
    number: int
    run_s: float
    size: int
    queued_at: float
    status: Status = "queued"
    attempt: int = 0
    lapses: int = 0
    worker: str = ""
    granted_at: float | None = None
    timeout_ms: int = 0
    finished_at: float | None = None
    reason: str | None = None
    recorded: bool = True  # in the session's file
    attempts_max: int = ATTEMPTS_USUAL
    retry_s: float = RETRY_S
    failures: int = 0
    kind: str = ""
    due_ms: int = 0
    retry_at: float | None = None
    finished_ms: int = 0
    retried_as: str = ""
    retry_of: str = ""


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    prompt: str
    model: str | None
    data: dict[str, Any]
    options: dict[str, Any]


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    result: dict[str, Any] | None
    size: int


class Waiting(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    requires: str


class Head(msgspec.Struct, frozen=True, array_like=True):
    """Which request stands first in a session."""

    rank: int
    number: int
    request_id: str
    requires: str
    recorded: bool = True
    deferred: bool = False


class Lane(msgspec.Struct, frozen=True, array_like=True):
    """One session as far as its queue goes; it has a row while it has requests.

    What is `closed` is emptied before anything is granted again. `last` was completed last.
    """

    waiting: int = 0
    active: str = ""
    head: Head | None = None
    closed: bool = False
    last: str = ""


class Grant(msgspec.Struct, frozen=True, array_like=True):
    attempt: int
    progress: dict[str, Any] | None = None
    follows: str = ""
    provider: str = ANYTHING


class Provider(msgspec.Struct, frozen=True, array_like=True):
    """How a provider has fared, and why it cannot answer, if it cannot."""

    completed: int = 0
    failed: int = 0
    retried: int = 0
    completed_at: float | None = None
    failed_at: float | None = None
    kind: str = ""
    reason: str = ""
    unfit: str = ""


class Asking(msgspec.Struct, frozen=True, array_like=True):
    """What one requester has in all queues; it has a row while there is anything."""

    waiting: int = 0
    open_bytes: int = 0


class Totals(msgspec.Struct, frozen=True, array_like=True):
    """Numbers that were given last, and sums over tables."""

    number: int = 0
    epoch: int = 0
    waiting: int = 0
    open_bytes: int = 0
    active: int = 0
    finished_bytes: int = 0
    limit: int = ACTIVE_USUAL
    dead_bytes: int = 0


class CompletionTables(SpendingTables, BoundTables, WorkerTables):
    requests: Table[Request]
    prompts: Annotated[Table[Prompt], Keyed(str, cache_rows=0)]
    outcomes: Annotated[Table[Outcome], Keyed(str, cache_rows=0)]
    queue: Annotated[Table[Waiting], Keyed(str, int, int)]  # session, rank, number
    lanes: Table[Lane]  # by session
    ready: Annotated[Table[Head], Keyed(str, int, int)]  # required, rank, number: one a session
    grants: Annotated[Table[Grant], Keyed(str, str)]  # worker, request
    timeouts: Annotated[Table[bytes], Keyed(int, str)]  # likewise, request
    finished: Annotated[Table[bytes], Keyed(int, str)]  # likewise, the longest finished first
    deferred: Annotated[Table[bytes], Keyed(int, str)]  # likewise, request: to be tried again
    dead: Annotated[Table[bytes], Keyed(int, str)]  # keys of `finished`: what may be retried
    providers: Table[Provider]
    closing: Table[bytes]  # sessions that are closed, while they still have requests
    totals: Table[Totals]  # one row, under "all"
    asking: Table[Asking]  # by requester
