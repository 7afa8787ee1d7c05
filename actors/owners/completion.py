"""Completion: requests to language models, one at a time in each session, and who works on them.

Owns the queue of every session, the grants that workers hold, and the outcomes.

- A session has at most one active grant, ever. Other sessions run in parallel, within a limit.
- In a session the order is priority, then acceptance. Waiting raises priority: a request has a
  rank, the owner time at which one of priority 1 would have had to come to stand in its place.
- A worker is an identity that has registered with what it offers and how many grants it takes. Its
  lease is in owner time, so no restart of ours makes it lapse. An epoch names one registration.
- A grant is a row that a worker reads; pushing it is a hint. It is named by request and attempt:
  when the worker is gone the request waits again, in its old place, and the next grant has a higher
  attempt. What a former attempt reports is refused.
- A request ends once: completed, failed or cancelled. Its outcome is kept for a while; the record
  is the session's file, which the owner of sessions writes. That owner also has the last word on
  who may speak: nothing is granted before its request is recorded, and what it refuses ends here
  as cancelled. Of an outcome that it refuses the request says so.

Grants are decided once a commit, in the tick that follows, over heads of queues and free workers
only: the cost depends on neither how many requests wait nor how many sessions there are.

Source: "KSI State Management Analysis" 4, completion service: a queue a session against forks.
Leases with fencing tokens: Chubby's sequencers; redelivery after a lease: NATS JetStream's AckWait.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import (
    Announcement,
    Command,
    Decision,
    Event,
    Given,
    Keyed,
    Owner,
    Query,
    Reply,
    Send,
    Sender,
    Table,
    Tables,
    Tick,
)
from ksi.actors.owners import sessions
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    KsiError,
    NotFound,
    NotOwner,
    Quota,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import (
    ACTIVE_MAX,
    ACTIVE_USUAL,
    AGEING_S,
    ENDED_MAX,
    ENTRY_BYTES_MAX,
    FINISHED_BYTES_MAX,
    FINISHED_MAX,
    FINISHED_S,
    FRAME_BYTES_MAX,
    ITEMS_MAX,
    LAPSES_MAX,
    OFFERS_MAX,
    PROGRESS_BYTES_MAX,
    REQUEST_RUN_S,
    SLOTS_MAX,
    WAITING_AGENT_BYTES_MAX,
    WAITING_AGENT_MAX,
    WAITING_BYTES_MAX,
    WAITING_MAX,
    WAITING_SESSION_MAX,
    WORKER_LEASE_S,
    WORKERS_MAX,
)
from ksi.transport.message import OPERATOR, Id, Plain, Role, Text, operation
from ksi.transport.message import OWNER as OWNERS_ONLY

PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX * 3 // 4  # What grants in one reply may say.
PAGE_REQUESTS_MAX: Final = 1000  # Requests in one reply.
DUE_MAX: Final = 32  # Leases that lapse, and outcomes forgotten, in one decision.
RETRY_AFTER_S: Final = 0.5  # What a requester is asked to wait where the queue is full.
ANYTHING: Final = "*"  # What a request requires that any worker may take; every worker offers it.

Status = Literal["queued", "active", "completed", "failed", "cancelled"]
UNRECORDED: Final = "unrecorded"  # Why an outcome is not in the file, in the place of what it says.
OURS: Final = "completion"  # Who ends what took too long, or too many workers.
FINAL: Final = frozenset({"completed", "failed", "cancelled"})
WORKERS: Final[frozenset[Role]] = frozenset({"worker", "operator"})

Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}$(?!\n)")]
Offers = Annotated[list[Word], msgspec.Meta(max_length=OFFERS_MAX)]
Priority = Annotated[int, msgspec.Meta(ge=1, le=9)]
Epoch = Annotated[int, msgspec.Meta(ge=1)]
Attempt = Annotated[int, msgspec.Meta(ge=1)]
Slots = Annotated[int, msgspec.Meta(ge=0, le=SLOTS_MAX)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_REQUESTS_MAX)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0.5, le=3600.0)]
RunSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400.0)]
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

    `result` and `progress`, what its worker last said, are only in `completion:status`.
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


class Registered(Reply, frozen=True, kw_only=True):
    """The worker is registered. Its `epoch` names this registration; a later one ends it."""

    worker: str
    epoch: int
    lease_s: float


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A grant by its name."""

    request_id: str
    attempt: int


class Renewed(Reply, frozen=True, kw_only=True):
    """The lease runs from now; these are all the grants the worker holds."""

    worker: str
    epoch: int
    lease_s: float
    grants: list[Held]


class GrantView(Reply, frozen=True, kw_only=True):
    """What a worker is to do: answer `prompt`, and report as `attempt`."""

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


class Grants(Reply, frozen=True, kw_only=True):
    """The grants a worker holds; with `more` there are others: ask for them by their ids."""

    worker: str
    grants: list[GrantView]
    more: bool


class WorkerView(Reply, frozen=True, kw_only=True):
    """One worker; `used` of its slots hold a grant."""

    worker: str
    epoch: int
    capabilities: list[str]
    slots: int
    used: int
    lease_s: float
    registered_at: float


class WorkerPage(Reply, frozen=True, kw_only=True):
    """Workers in the order of their names."""

    workers: list[WorkerView]


class Limits(Reply, frozen=True, kw_only=True):
    """How many grants there may be at a time, in all sessions together, and how many there are."""

    limit: int
    active: int


@operation(
    "completion:async",
    owner="completion",
    refuses=(NotFound, Conflict, Forbidden, TooLarge, Busy),
    example={"session_id": "sess_1", "prompt": "What is an epoch?", "requires": "echo"},
)
class Async(Command[Accepted], frozen=True, kw_only=True):
    """Queue a request on a session that the sender owns or that admits it.

    A worker that offers `requires` is granted it when it stands first and nothing else runs in the
    session. Lower `priority` goes first; waiting makes up for it. `data` goes into the session's
    entry beside the prompt (`pattern`, `to_agent`, ...), `options` only to the worker. One attempt
    may run for `run_s`. The outcome: subscribe to `completion.SENDER.REQUEST.>`, or ask
    `completion:status`; `client.outcome(request_id)` does both.
    """

    session_id: Id
    prompt: str
    model: Text | None = None
    requires: Word | None = None
    priority: Priority = 5
    data: Plain = {}
    options: Plain = {}
    run_s: RunSeconds = REQUEST_RUN_S
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


@operation("completion:limit", owner="completion", roles=OPERATOR, example={"limit": ACTIVE_USUAL})
class SetLimit(Command[Limits], frozen=True, kw_only=True):
    """Set how many grants there may be at a time. What runs beyond it goes on."""

    limit: Annotated[int, msgspec.Meta(ge=0, le=ACTIVE_MAX)]


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
    those that are finished, the latest first."""

    status: Literal["queued", "active", "finished"] = "queued"
    limit: Limit = 100
    after: Cursor | None = None


@operation(
    "worker:register",
    owner="completion",
    roles=WORKERS,
    refuses=(Quota,),
    example={"capabilities": ["echo"], "slots": 4},
)
class RegisterWorker(Command[Registered], frozen=True, kw_only=True):
    """Take part as a worker, under the name of the sender's key.

    A former registration of that name ends: its grants wait again.
    """

    capabilities: Offers = []
    slots: Slots = 1
    lease_s: LeaseSeconds = WORKER_LEASE_S


@operation(
    "worker:renew",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, StaleEpoch),
    example={"epoch": 1},
)
class RenewWorker(Command[Renewed], frozen=True, kw_only=True):
    """Renew the lease of the sender, and learn what it holds. With `slots` 0 it drains."""

    epoch: Epoch
    slots: Slots | None = None


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
    """End a granted request: completed with `result`, or failed because of `error`."""

    request_id: Id
    attempt: Attempt
    result: Plain = {}
    error: Text | None = None


@operation(
    "worker:leave",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, StaleEpoch),
    example={"epoch": 1},
)
class LeaveWorker(Command[None], frozen=True, kw_only=True):
    """Take part no longer. Grants that are still held wait again, for another."""

    epoch: Epoch


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


@operation("worker:list", owner="completion", example={"limit": 10})
class ListWorkers(Query[WorkerPage], frozen=True, kw_only=True):
    """List workers."""

    limit: Limit = PAGE_REQUESTS_MAX


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


class Forgotten(Event, frozen=True, array_like=True, tag="forgotten"):
    finished_ms: int
    request_id: str


class QueueClosed(Event, frozen=True, array_like=True, tag="closed"):
    session_id: str


class LimitSet(Event, frozen=True, array_like=True, tag="limit"):
    limit: int


class WorkerRegistered(Event, frozen=True, array_like=True, tag="worker"):
    worker: str
    epoch: int
    capabilities: list[str]
    slots: int
    lease_s: float
    now: float
    time_s: float


class WorkerRenewed(Event, frozen=True, array_like=True, tag="renewed"):
    worker: str
    slots: int
    time_s: float


class WorkerLeft(Event, frozen=True, array_like=True, tag="left"):
    worker: str
    epoch: int
    reason: str


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


class Lane(msgspec.Struct, frozen=True, array_like=True):
    """One session as far as its queue goes; it has a row while it has requests.

    What is `closed` is emptied before anything is granted again.
    """

    waiting: int = 0
    active: str = ""
    head: Head | None = None
    closed: bool = False


class Worker(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    capabilities: list[str]
    slots: int
    used: int
    lease_s: float
    due_ms: int
    registered_at: float


class Grant(msgspec.Struct, frozen=True, array_like=True):
    attempt: int
    progress: dict[str, Any] | None = None


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


class CompletionTables(Tables):
    requests: Table[Request]
    prompts: Annotated[Table[Prompt], Keyed(str, cache_rows=0)]
    outcomes: Annotated[Table[Outcome], Keyed(str, cache_rows=0)]
    queue: Annotated[Table[Waiting], Keyed(str, int, int)]  # session, rank, number
    lanes: Table[Lane]  # by session
    ready: Annotated[Table[Head], Keyed(str, int, int)]  # required, rank, number: one a session
    workers: Table[Worker]
    free: Annotated[Table[bytes], Keyed(str, int, str)]  # offered, slots used, worker
    grants: Annotated[Table[Grant], Keyed(str, str)]  # worker, request
    leases: Annotated[Table[bytes], Keyed(int, str)]  # ms of owner time, worker
    timeouts: Annotated[Table[bytes], Keyed(int, str)]  # likewise, request
    finished: Annotated[Table[bytes], Keyed(int, str)]  # likewise, the longest finished first
    closing: Table[bytes]  # sessions that are closed, while they still have requests
    totals: Table[Totals]  # one row, under "all"
    asking: Table[Asking]  # by requester


class Completion(Owner[CompletionTables]):
    """The owner of all requests, grants and workers."""

    name = "completion"
    tables = CompletionTables
    domains = ("completion", "worker")
    events = (
        Queued
        | Recorded
        | Unrecorded
        | Granted
        | Progressed
        | Requeued
        | Ended
        | Forgotten
        | QueueClosed
        | LimitSet
        | WorkerRegistered
        | WorkerRenewed
        | WorkerLeft
    )

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        match command:
            case Async():
                return sessions.Get(session_id=command.session_id, agent_id=sender.name)
            case Cancel(session_id=str(session_id)):
                return sessions.Get(session_id=session_id)
            case _:
                return None

    def decide(
        self, command: Any, sender: Sender, tables: CompletionTables, given: Given
    ) -> Decision:
        match command:
            case Tick():
                return _tick(tables, given)
            case Async():
                return _async(command, sender, tables, given)
            case Report():
                return _report(command, sender, tables, given)
            case RenewWorker():
                return _renew(command, sender, tables, given)
            case Progress():
                return _progress(command, sender, tables)
            case Cancel():
                return _cancel(command, sender, tables, given)
            case SessionClosed():
                return Decision((QueueClosed(command.session_id),), tick=True)
            case RegisterWorker():
                return _register(command, sender, tables, given)
            case LeaveWorker():
                _registered(tables, sender.name, command.epoch)
                return _left(sender.name, "it has left", tables, given, lapsed=False)
            case SetLimit():
                reply = Limits(limit=command.limit, active=_totals(tables).active)
                return Decision((LimitSet(command.limit),), reply, tick=True)
            case _:
                raise TypeError(command)

    def answered(
        self, command: Any, refusal: KsiError | None, tables: CompletionTables, given: Given
    ) -> Decision:
        assert isinstance(command, sessions.RecordEntry)
        if command.event == "completion:request":
            return _request_recorded(command.request_id, refusal, tables, given)
        if refusal is not None:
            return _outcome_refused(command, refusal, tables)
        return Decision()

    def apply(self, event: Any, tables: CompletionTables) -> None:
        match event:
            case Queued():
                _queued(event, tables)
            case Recorded():
                _request_noted(event.request_id, tables)
            case Unrecorded():
                _outcome_missed(event, tables)
            case Granted():
                _granted(event, tables)
            case Progressed():
                tables.grants.put(
                    (event.worker, event.request_id), Grant(event.attempt, event.progress)
                )
            case Ended():
                _ended(event, tables)
            case Requeued():
                _requeued(event, tables)
            case Forgotten():
                _forgotten(event, tables)
            case QueueClosed():
                _queue_closed(event, tables)
            case LimitSet():
                _add(tables, limit=event.limit - _totals(tables).limit)
            case WorkerRenewed():
                _worker_renewed(event, tables)
            case WorkerRegistered():
                _worker_registered(event, tables)
            case WorkerLeft():
                _put_worker(tables, event.worker, None)
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: CompletionTables) -> Reply:
        match query:
            case GetStatus():
                return _status(query.request_id, tables)
            case GetGrants():
                return _grants(query, tables)
            case GetSessionStatus():
                return _session_status(query, tables)
            case ListRequests():
                return _list(query, tables)
            case ListWorkers():
                rows = islice(tables.workers.range(), query.limit)
                return WorkerPage(workers=[_worker_view(name, worker) for name, worker in rows])
            case _:
                raise TypeError(query)

    def announce(self, event: Any) -> Iterable[Announcement]:
        match event:
            case Queued():
                return (_told(event, "queued", priority=event.priority),)
            case Granted():
                granted = {"request_id": event.request_id, "attempt": event.attempt}
                return (
                    Announcement(f"worker.{event.worker}.granted", granted),
                    _told(event, "granted", attempt=event.attempt, worker=event.worker),
                )
            case Progressed():
                return (_told(event, "progress", attempt=event.attempt, progress=event.progress),)
            case Unrecorded():
                return (_told(event, "unrecorded", reason=event.reason),)
            case Requeued():
                requeued = _told(event, "requeued", attempt=event.attempt, reason=event.reason)
                return (requeued, *_revoked(event))
            case Ended():
                what = "result" if event.status == "completed" else event.status
                outcome = {"reason": event.reason, "result": event.result}
                ended = _told(event, what, attempt=event.attempt, **outcome)
                return (ended, *(() if event.by == event.worker else _revoked(event)))
            case WorkerRegistered():
                registered = {"epoch": event.epoch, "slots": event.slots}
                return (Announcement(f"worker.{event.worker}.registered", registered),)
            case WorkerLeft():
                left = {"epoch": event.epoch, "reason": event.reason}
                return (Announcement(f"worker.{event.worker}.left", left),)
            case _:
                return ()


OWNER = Completion()


def _async(command: Async, sender: Sender, tables: CompletionTables, given: Given) -> Decision:
    session_id = command.session_id
    _require_admitted(session_id, sender, given.fact)
    request_id = command.request_id or f"req_{next(given.ids)}"
    known = tables.requests.get(request_id)
    if known is not None:
        raise Conflict(
            f"request {request_id} exists already and is of {known.requester}",
            hint="leave request_id out to get a fresh one",
            status=known.status,
        )
    entry = {**command.data, "prompt": command.prompt, "session_id": session_id}
    entry |= {"agent_id": sender.name} | ({"model": command.model} if command.model else {})
    size = _size({**entry, "": command.options}, "the request")
    lane, totals = tables.lanes.get(session_id) or Lane(), _totals(tables)
    asking = tables.asking.get(sender.name) or Asking()
    _require_room(session_id, sender.name, lane, asking, totals, size)
    event = Queued(
        request_id,
        session_id,
        sender.name,
        command.requires or ANYTHING,
        command.priority,
        _whole_ms(given.time_s + (command.priority - 1) * AGEING_S),
        totals.number + 1,
        command.prompt,
        command.model,
        command.data,
        command.options,
        command.run_s,
        size,
        given.now,
        recorded=False,
    )
    reply = Accepted(
        request_id=request_id,
        session_id=session_id,
        status="queued",
        queue_depth=lane.waiting + 1,
        session_active=bool(lane.active),
        priority=command.priority,
    )
    record = _recorded(session_id, request_id, sender.name, "completion:request", entry)
    return Decision((event,), reply, (record,))


def _require_admitted(session_id: str, sender: Sender, fact: Reply | KsiError | None) -> None:
    """Refuse who is known not to be admitted. The owner of sessions has the last word."""
    if isinstance(fact, KsiError):
        raise fact
    if not isinstance(fact, sessions.SessionView):
        return  # Nothing is known now.
    if fact.status == "closed":
        raise Conflict(f"session {session_id} is closed", hint="create another", status="closed")
    if fact.admits is False:
        who = "nobody else" if fact.admission == "closed" else "those invited"
        raise Forbidden(
            f"session {session_id} admits {who}, not {sender.name}",
            hint=f"ask its owner, {fact.owner}",
            owner=fact.owner,
        )


def _require_room(
    session_id: str, requester: str, lane: Lane, asking: Asking, totals: Totals, size: int
) -> None:
    for what, have, limit in (
        (f"requests of {requester} wait", asking.waiting + 1, WAITING_AGENT_MAX),
        (
            f"bytes of requests of {requester} wait",
            asking.open_bytes + size,
            WAITING_AGENT_BYTES_MAX,
        ),
        (f"requests wait in session {session_id}", lane.waiting + 1, WAITING_SESSION_MAX),
        ("requests wait", totals.waiting + 1, WAITING_MAX),
        ("bytes of requests wait", totals.open_bytes + size, WAITING_BYTES_MAX),
    ):
        if have > limit:
            raise Busy(f"{limit} {what}", limit=limit, retry_after_s=RETRY_AFTER_S)


def _cancel(command: Cancel, sender: Sender, tables: CompletionTables, given: Given) -> Decision:
    request_id = command.request_id
    request = _known(tables, request_id)
    fact = given.fact
    owns_session = (
        isinstance(fact, sessions.SessionView)
        and fact.session_id == request.session_id
        and fact.owner == sender.name
    )
    if sender.role != "operator" and request.requester != sender.name and not owns_session:
        raise Forbidden(
            f"request {request_id} is of {request.requester}, not of {sender.name}",
            hint="the owner of its session may cancel it too: name session_id",
            requester=request.requester,
        )
    if request.status in FINAL:
        raise Conflict(f"request {request_id} is {request.status}", status=request.status)
    reason = command.reason or f"cancelled by {sender.name}"
    return _end(request_id, request, "cancelled", given, by=sender.name, reason=reason)


def _request_recorded(
    request_id: str, refusal: KsiError | None, tables: CompletionTables, given: Given
) -> Decision:
    """A request is in its session's file, and may be granted; or it never will be, and ends."""
    request = tables.requests.get(request_id)
    if request is None or request.status in FINAL or request.recorded:
        return Decision()
    if refusal is None:
        return Decision((Recorded(request_id),), tick=True)
    end = _end(
        request_id, request, "cancelled", given, by="sessions", reason=refusal.text, record=False
    )
    return Decision(end.events, tick=True)


def _outcome_refused(
    command: sessions.RecordEntry, refusal: KsiError, tables: CompletionTables
) -> Decision:
    """An outcome is not in its session's file: whoever asks is told, and the file if it can be."""
    request = tables.requests.get(command.request_id)
    if UNRECORDED in command.data:  # Not even that.
        return Decision()
    sends: tuple[Send, ...] = ()
    if not isinstance(refusal, Conflict | NotFound):
        entry = {"agent_id": command.agent_id, UNRECORDED: refusal.text}
        sends = (
            _recorded(
                command.session_id, command.request_id, command.agent_id, command.event, entry
            ),
        )
    if request is None:
        return Decision((), None, sends)
    unrecorded = Unrecorded(command.request_id, request.session_id, request.requester, refusal.text)
    return Decision((unrecorded,), None, sends)


def _progress(command: Progress, sender: Sender, tables: CompletionTables) -> Decision:
    request = _held(tables, command.request_id, command.attempt, sender)
    _size(command.progress, "the progress", PROGRESS_BYTES_MAX)
    event = Progressed(
        command.request_id,
        request.session_id,
        request.requester,
        request.worker,
        command.attempt,
        command.progress,
    )
    return Decision((event,))


def _report(command: Report, sender: Sender, tables: CompletionTables, given: Given) -> Decision:
    request_id = command.request_id
    request = _held(tables, request_id, command.attempt, sender)
    status: Status = "completed" if command.error is None else "failed"
    result = command.result if command.error is None or command.result else None
    return _end(
        request_id, request, status, given, by=sender.name, reason=command.error, result=result
    )


def _held(tables: CompletionTables, request_id: str, attempt: int, sender: Sender) -> Request:
    """Return the request if the sender holds its grant now: a former attempt is refused first."""
    request = _known(tables, request_id)
    if request.status != "active" or request.attempt != attempt:
        raise StaleEpoch(
            f"request {request_id} is {request.status} in attempt {request.attempt}: "
            f"attempt {attempt} is over",
            hint="stop working on it",
            status=request.status,
            attempt=request.attempt,
        )
    if request.worker != sender.name:
        raise NotOwner(
            f"request {request_id} is granted to {request.worker}, not to {sender.name}",
            hint="report what worker:grants says is yours",
            owner=request.worker,
            attempt=request.attempt,
        )
    return request


def _end(
    request_id: str,
    request: Request,
    status: Status,
    given: Given,
    *,
    by: str,
    reason: str | None,
    result: dict[str, Any] | None = None,
    record: bool = True,
) -> Decision:
    """End an open request: once, for a request that has ended is not open any more."""
    speaker = request.worker if by == OURS else by
    entry = {**(result or {}), "agent_id": speaker}
    if reason is not None:
        entry["reason"] = reason
    size = _size(entry, "the result")
    event = Ended(
        request_id,
        request.session_id,
        request.requester,
        status,
        request.worker,
        request.attempt,
        reason,
        result,
        size,
        by,
        given.now,
        given.time_s,
    )
    name = _RECORDED[status]
    sends = (_recorded(request.session_id, request_id, speaker, name, entry),) if record else ()
    ended = msgspec.structs.replace(request, status=status, finished_at=given.now, reason=reason)
    return Decision((event,), _view(request_id, ended), sends, tick=True)


_RECORDED: Final[dict[Status, sessions.Recorded]] = {
    "completed": "completion:result",
    "failed": "completion:failed",
    "cancelled": "completion:cancelled",
}


def _recorded(
    session_id: str, request_id: str, agent_id: str, name: sessions.Recorded, entry: dict[str, Any]
) -> Send:
    record = sessions.RecordEntry(
        session_id=session_id, request_id=request_id, agent_id=agent_id, event=name, data=entry
    )
    return Send("sessions", "session:record", record)


def _register(
    command: RegisterWorker, sender: Sender, tables: CompletionTables, given: Given
) -> Decision:
    name = sender.name
    requeued: tuple[Event, ...] = ()
    if tables.workers.get(name) is not None:
        reason = f"another registered as {name}"
        requeued = _left(name, reason, tables, given, lapsed=True).events
    elif tables.workers.count() >= WORKERS_MAX:
        raise Quota(f"there are {WORKERS_MAX} workers", limit=WORKERS_MAX)
    event = WorkerRegistered(
        name,
        _totals(tables).epoch + 1,
        sorted({*command.capabilities}),
        command.slots,
        command.lease_s,
        given.now,
        given.time_s,
    )
    reply = Registered(worker=name, epoch=event.epoch, lease_s=command.lease_s)
    return Decision((*requeued, event), reply, tick=True)


def _renew(
    command: RenewWorker, sender: Sender, tables: CompletionTables, given: Given
) -> Decision:
    name = sender.name
    worker = _registered(tables, name, command.epoch)
    slots = worker.slots if command.slots is None else command.slots
    held = [
        Held(request_id=request_id, attempt=grant.attempt)
        for (_, request_id), grant in tables.grants.range(prefix=(name,))
    ]
    reply = Renewed(worker=name, epoch=worker.epoch, lease_s=worker.lease_s, grants=held)
    return Decision((WorkerRenewed(name, slots, given.time_s),), reply, tick=slots > worker.slots)


def _registered(tables: CompletionTables, name: str, epoch: int) -> Worker:
    worker = tables.workers.get(name)
    if worker is None:
        raise NotFound(
            f"there is no worker {name}: its lease has lapsed, or it has left",
            hint="register again",
            worker=name,
        )
    if worker.epoch != epoch:
        raise StaleEpoch(
            f"another registered as {name}: it is in epoch {worker.epoch}, not {epoch}",
            hint="stop, or take another name",
            epoch=worker.epoch,
        )
    return worker


def _left(
    name: str, reason: str, tables: CompletionTables, given: Given, *, lapsed: bool
) -> Decision:
    """Let a worker go. What it holds waits again, or ends if too many went over it."""
    events: list[Event] = []
    sends: list[Send] = []
    for (_, request_id), grant in tables.grants.range(prefix=(name,)):
        request = _known(tables, request_id)
        if lapsed and request.lapses + 1 >= LAPSES_MAX:
            why = f"given up: {LAPSES_MAX} workers vanished over it, at last {name}"
            end = _end(request_id, request, "failed", given, by=OURS, reason=why)
            events += end.events
            sends += end.sends
        else:
            events.append(
                Requeued(
                    request_id,
                    request.session_id,
                    request.requester,
                    name,
                    grant.attempt,
                    lapsed,
                    f"{name}: {reason}",
                )
            )
    worker = tables.workers.get(name)
    assert worker is not None
    return Decision((*events, WorkerLeft(name, worker.epoch, reason)), None, tuple(sends), True)


def _tick(tables: CompletionTables, given: Given) -> Decision:
    """Do the first of these that there is to do, and ask for another tick; at last grant.

    One kind at a time: each is decided over what the others have led to.
    """
    for due in (_lapse, _time_out, _close, _forget):
        decision = due(tables, given)
        if decision.events:
            return decision
    return Decision(tuple(_grant(tables, given)))


def _lapse(tables: CompletionTables, given: Given) -> Decision:
    """Let go the worker that has been silent for too long; the next follows in the next tick."""
    for (_, name), _row in tables.leases.range((0,), (_whole_ms(given.time_s) + 1,)):
        return _left(name, "its lease has lapsed", tables, given, lapsed=True)
    return Decision()


def _time_out(tables: CompletionTables, given: Given) -> Decision:
    overdue = tables.timeouts.range((0,), (_whole_ms(given.time_s) + 1,))
    ends = []
    for (_, request_id), _row in islice(overdue, DUE_MAX):
        request = _known(tables, request_id)
        why = f"it took longer than {request.run_s:g} s"
        ends.append(_end(request_id, request, "failed", given, by=OURS, reason=why))
    return _together(ends)


def _close(tables: CompletionTables, given: Given) -> Decision:
    """End requests of a closed session: a bounded number, the others follow."""
    for session_id, _row in tables.closing.range():
        lane = tables.lanes.get(session_id) or Lane()
        rows = islice(tables.queue.range(prefix=(session_id,)), ENDED_MAX)
        request_ids = [waiting.request_id for _, waiting in rows]
        request_ids += [lane.active] if lane.active else []
        why = f"session {session_id} was closed"
        return _together(
            [
                _end(each, _known(tables, each), "cancelled", given, by="sessions", reason=why,
                     record=False)
                for each in request_ids
            ]
        )  # fmt: skip
    return Decision()


def _together(decisions: list[Decision]) -> Decision:
    return Decision(
        tuple(event for each in decisions for event in each.events),
        None,
        tuple(send for each in decisions for send in each.sends),
        tick=True,
    )


def _forget(tables: CompletionTables, given: Given) -> Decision:
    """Forget the longest finished: beyond the number or bytes that are kept, and after a while."""
    surplus = tables.finished.count() - FINISHED_MAX
    surplus_bytes = _totals(tables).finished_bytes - FINISHED_BYTES_MAX
    before_ms = _whole_ms(given.time_s - FINISHED_S) if given.time_s > FINISHED_S else 0
    events: list[Event] = []
    for (finished_ms, request_id), _row in islice(tables.finished.range(), DUE_MAX):
        if surplus <= 0 and surplus_bytes <= 0 and finished_ms >= before_ms:
            break
        surplus -= 1
        if surplus_bytes > 0:
            outcome = tables.outcomes.get(request_id)
            surplus_bytes -= outcome.size if outcome else 0
        events.append(Forgotten(finished_ms, request_id))
    return Decision(tuple(events), tick=bool(events))


def _grant(tables: CompletionTables, given: Given) -> Iterator[Granted]:
    """Yield a grant for every free slot that a request at the head of its session can take.

    The best of the ready first. A grant makes nothing ready and frees nobody, so what changes while
    they are drawn is only how many slots are left.
    """
    totals = _totals(tables)
    room = totals.limit - totals.active
    if room <= 0:
        return
    taken: dict[str, int] = {}  # slots, by worker
    lines = {each: tables.ready.range(prefix=(each,)) for each in _in_demand(tables)}
    heads = {each: next(line) for each, line in lines.items()}
    offers = {each: _Offer(tables, each, taken) for each in lines}
    while heads and room:
        required = min(heads, key=lambda each: heads[each][0][1:])
        worker = offers[required].take()
        if worker is None:
            del heads[required]
            continue
        room -= 1
        request_id = heads[required][1].request_id
        request = _known(tables, request_id)
        yield Granted(
            request_id,
            request.session_id,
            request.requester,
            worker,
            request.attempt + 1,
            given.now,
            given.time_s,
        )
        head = next(lines[required], None)
        if head is None:
            del heads[required]
        else:
            heads[required] = head


def _in_demand(tables: CompletionTables) -> Iterator[str]:
    """Yield what is both required and offered, by leaping from one to the other."""
    at = ""
    while True:
        required = next((key[0] for key, _ in tables.ready.range((at,))), None)
        if required is None:
            return
        offered = next((key[0] for key, _ in tables.free.range((required,))), None)
        if offered is None:
            return
        if offered == required:
            yield required
            at = required + "\x01"
        else:
            at = offered


class _Offer:
    """The workers that offer one thing, the least busy first."""

    def __init__(self, tables: CompletionTables, offered: str, taken: dict[str, int]) -> None:
        self._workers = tables.workers
        self._taken = taken
        rows = islice(tables.free.range(prefix=(offered,)), ACTIVE_MAX)
        free = [(used, name) for (_, used, name), _row in rows]
        self._free: list[tuple[int, str]] = free  # in order, and so a heap

    def take(self) -> str | None:
        """Take a slot of the least busy worker; None if none is left."""
        while self._free:
            used, name = self._free[0]
            worker = self._workers.get(name)
            assert worker is not None
            now_used = worker.used + self._taken.get(name, 0)
            if now_used >= worker.slots:
                heapq.heappop(self._free)
            elif now_used > used:
                heapq.heapreplace(self._free, (now_used, name))
            else:
                self._taken[name] = self._taken.get(name, 0) + 1
                return name
        return None


def _known(tables: CompletionTables, request_id: str) -> Request:
    request = tables.requests.get(request_id)
    if request is None:
        raise NotFound(
            f"there is no request {request_id}, or its outcome is not kept any more",
            hint="the session's file has it; ksi queue list",
            request_id=request_id,
        )
    return request


def _totals(tables: CompletionTables) -> Totals:
    return tables.totals.get("all") or Totals()


# What takes more bytes in a session's line than in JSON: up to six for two.
_WIDE: Final = re.compile("[\u0080-\u009f\u2028\u2029]")


_NUMBER: Final = re.compile("[0-9]{1,18}")


def _size(entry: dict[str, Any], what: str, limit: int = ENTRY_BYTES_MAX) -> int:
    """Return how many bytes an entry takes in a session's line; refuse what is over a limit.

    What is accepted here is never refused for its size by the owner of sessions: it would go
    unrecorded.
    """
    if len(entry) > ITEMS_MAX:
        raise TooLarge(
            f"{what} has {len(entry)} fields, over the limit of {ITEMS_MAX}", limit=ITEMS_MAX
        )
    text = msgspec.json.encode(entry)
    size = len(text)
    if not text.isascii():
        size += 4 * len(_WIDE.findall(text.decode()))
    if size > limit:
        raise TooLarge(
            f"{what} is {size} bytes as JSON, over the limit of {limit}",
            size_bytes=size,
            limit_bytes=limit,
        )
    return size


def _whole_ms(seconds: float) -> int:
    return int(seconds * 1000)


def _due_ms(time_s: float, after_s: float) -> int:
    return math.ceil((time_s + after_s) * 1000)


def _add(tables: CompletionTables, **more: int) -> None:
    """Add to the totals."""
    totals = _totals(tables)
    sums = {name: getattr(totals, name) + amount for name, amount in more.items()}
    tables.totals.put("all", msgspec.structs.replace(totals, **sums))


def _ask_for(tables: CompletionTables, requester: str, *, waiting: int, size: int = 0) -> None:
    """Add to what a requester has in the queues."""
    before = tables.asking.get(requester) or Asking()
    # What was queued before requesters were counted is not missed when it goes.
    after = Asking(max(0, before.waiting + waiting), max(0, before.open_bytes + size))
    if after == Asking():
        tables.asking.delete(requester)
    else:
        tables.asking.put(requester, after)


def _queued(event: Queued, tables: CompletionTables) -> None:
    request = Request(
        event.session_id,
        event.requester,
        event.requires,
        event.priority,
        event.rank,
        event.number,
        event.run_s,
        event.size,
        event.now,
        recorded=event.recorded,
    )
    tables.requests.put(event.request_id, request)
    prompt = Prompt(event.prompt, event.model, event.data, event.options)
    tables.prompts.put(event.request_id, prompt)
    lane = tables.lanes.get(event.session_id) or Lane()
    _put_lane(tables, event.session_id, lane, _enter(tables, event.request_id, request, lane))
    _add(tables, number=event.number - _totals(tables).number, waiting=1, open_bytes=event.size)
    _ask_for(tables, event.requester, waiting=1, size=event.size)


def _request_noted(request_id: str, tables: CompletionTables) -> None:
    request = _known(tables, request_id)
    tables.requests.put(request_id, msgspec.structs.replace(request, recorded=True))
    lane = tables.lanes.get(request.session_id) or Lane()
    if lane.head is not None and lane.head.request_id == request_id:
        head = msgspec.structs.replace(lane.head, recorded=True)
        _put_lane(tables, request.session_id, lane, msgspec.structs.replace(lane, head=head))


def _outcome_missed(event: Unrecorded, tables: CompletionTables) -> None:
    request = _known(tables, event.request_id)
    missed = f"not in the session's file: {event.reason}"
    reason = missed if request.reason is None else f"{request.reason}; {missed}"
    tables.requests.put(event.request_id, msgspec.structs.replace(request, reason=reason))


def _granted(event: Granted, tables: CompletionTables) -> None:
    request = _known(tables, event.request_id)
    timeout_ms = _due_ms(event.time_s, request.run_s)
    active = msgspec.structs.replace(
        request,
        status="active",
        attempt=event.attempt,
        worker=event.worker,
        granted_at=event.now,
        timeout_ms=timeout_ms,
    )
    tables.requests.put(event.request_id, active)
    tables.grants.put((event.worker, event.request_id), Grant(event.attempt))
    tables.timeouts.put((timeout_ms, event.request_id), b"")
    lane = tables.lanes.get(event.session_id) or Lane()
    after = _leave(tables, event.request_id, request, lane)
    after = msgspec.structs.replace(after, active=event.request_id)
    _put_lane(tables, event.session_id, lane, after)
    _use_slot(tables, event.worker, 1)
    _add(tables, waiting=-1, active=1)
    _ask_for(tables, event.requester, waiting=-1)


def _requeued(event: Requeued, tables: CompletionTables) -> None:
    request = _release(event, tables)
    waiting = msgspec.structs.replace(
        request, status="queued", worker="", granted_at=None, timeout_ms=0,
        lapses=request.lapses + event.lapsed,
    )  # fmt: skip
    tables.requests.put(event.request_id, waiting)
    lane = tables.lanes.get(event.session_id) or Lane()
    after = _enter(tables, event.request_id, waiting, lane)
    _put_lane(tables, event.session_id, lane, msgspec.structs.replace(after, active=""))
    _add(tables, waiting=1)
    _ask_for(tables, event.requester, waiting=1)


def _ended(event: Ended, tables: CompletionTables) -> None:
    request = _known(tables, event.request_id)
    lane = tables.lanes.get(event.session_id) or Lane()
    if request.status == "active":
        _release(event, tables)
        after = msgspec.structs.replace(lane, active="")
    else:
        after = _leave(tables, event.request_id, request, lane)
        _add(tables, waiting=-1)
    was_waiting = request.status == "queued"
    _ask_for(tables, request.requester, waiting=-was_waiting, size=-request.size)
    _put_lane(tables, event.session_id, lane, after)
    ended = msgspec.structs.replace(
        request, status=event.status, finished_at=event.now, reason=event.reason, timeout_ms=0
    )
    tables.requests.put(event.request_id, ended)
    tables.prompts.delete(event.request_id)
    tables.outcomes.put(event.request_id, Outcome(event.result, event.size))
    tables.finished.put((_whole_ms(event.time_s), event.request_id), b"")
    _add(tables, open_bytes=-request.size, finished_bytes=event.size)


def _release(event: Requeued | Ended, tables: CompletionTables) -> Request:
    """Take the grant of an active request away, whatever becomes of it."""
    request = _known(tables, event.request_id)
    tables.grants.delete((request.worker, event.request_id))
    tables.timeouts.delete((request.timeout_ms, event.request_id))
    _use_slot(tables, request.worker, -1)
    _add(tables, active=-1)
    return request


def _enter(tables: CompletionTables, request_id: str, request: Request, lane: Lane) -> Lane:
    """Put a request into the queue of its session."""
    key = (request.session_id, request.rank, request.number)
    tables.queue.put(key, Waiting(request_id, request.requires))
    head = Head(request.rank, request.number, request_id, request.requires, request.recorded)
    if lane.head is not None and (lane.head.rank, lane.head.number) < key[1:]:
        head = lane.head
    return msgspec.structs.replace(lane, waiting=lane.waiting + 1, head=head)


def _leave(tables: CompletionTables, request_id: str, request: Request, lane: Lane) -> Lane:
    """Take a request out of the queue of its session."""
    tables.queue.delete((request.session_id, request.rank, request.number))
    head = lane.head
    if head is not None and head.request_id == request_id:
        head = None
        if lane.waiting > 1:
            (_, rank, number), first = next(tables.queue.range(prefix=(request.session_id,)))
            recorded = _known(tables, first.request_id).recorded
            head = Head(rank, number, first.request_id, first.requires, recorded)
    return msgspec.structs.replace(lane, waiting=lane.waiting - 1, head=head)


def _put_lane(tables: CompletionTables, session_id: str, before: Lane, after: Lane) -> None:
    """Set the lane of a session, and whether its head is ready."""
    was, now = _ready_of(before), _ready_of(after)
    if was != now:
        if was is not None:
            tables.ready.delete((was.requires, was.rank, was.number))
        if now is not None:
            tables.ready.put((now.requires, now.rank, now.number), now)
    if after.waiting or after.active:
        tables.lanes.put(session_id, after)
        return
    tables.lanes.delete(session_id)
    if after.closed:
        tables.closing.delete(session_id)


def _ready_of(lane: Lane) -> Head | None:
    return None if lane.active or lane.head is None or not lane.head.recorded else lane.head


def _queue_closed(event: QueueClosed, tables: CompletionTables) -> None:
    lane = tables.lanes.get(event.session_id)
    if lane is not None:
        tables.closing.put(event.session_id, b"")
        closed = msgspec.structs.replace(lane, closed=True)
        _put_lane(tables, event.session_id, lane, closed)


def _forgotten(event: Forgotten, tables: CompletionTables) -> None:
    outcome = tables.outcomes.get(event.request_id)
    tables.finished.delete((event.finished_ms, event.request_id))
    tables.outcomes.delete(event.request_id)
    tables.requests.delete(event.request_id)
    _add(tables, finished_bytes=-(outcome.size if outcome else 0))


def _use_slot(tables: CompletionTables, name: str, change: int) -> None:
    worker = tables.workers.get(name)
    if worker is not None:
        used = worker.used + change
        _put_worker(tables, name, msgspec.structs.replace(worker, used=used))


def _worker_registered(event: WorkerRegistered, tables: CompletionTables) -> None:
    due_ms = _due_ms(event.time_s, event.lease_s)
    worker = Worker(
        event.epoch, event.capabilities, event.slots, 0, event.lease_s, due_ms, event.now
    )
    _put_worker(tables, event.worker, worker)
    _add(tables, epoch=event.epoch - _totals(tables).epoch)


def _worker_renewed(event: WorkerRenewed, tables: CompletionTables) -> None:
    worker = tables.workers.get(event.worker)
    assert worker is not None
    due_ms = _due_ms(event.time_s, worker.lease_s)
    renewed = msgspec.structs.replace(worker, slots=event.slots, due_ms=due_ms)
    _put_worker(tables, event.worker, renewed)


def _put_worker(tables: CompletionTables, name: str, worker: Worker | None) -> None:
    """Set or remove a worker, its lease, and the rows that say it is free."""
    before = tables.workers.get(name)
    was, now = _free_rows(name, before), _free_rows(name, worker)
    for key in was - now:
        tables.free.delete(key)
    for key in now - was:
        tables.free.put(key, b"")
    if before is not None and (worker is None or worker.due_ms != before.due_ms):
        tables.leases.delete((before.due_ms, name))
    if worker is None:
        tables.workers.delete(name)
    else:
        tables.leases.put((worker.due_ms, name), b"")
        tables.workers.put(name, worker)


def _free_rows(name: str, worker: Worker | None) -> set[tuple[str, int, str]]:
    if worker is None or worker.used >= worker.slots:
        return set()
    return {(offered, worker.used, name) for offered in (ANYTHING, *worker.capabilities)}


def _view(request_id: str, request: Request) -> RequestView:
    return RequestView(
        request_id=request_id,
        session_id=request.session_id,
        requester=request.requester,
        status=request.status,
        priority=request.priority,
        requires=_required(request),
        attempt=request.attempt,
        worker=request.worker or None,
        queued_at=request.queued_at,
        granted_at=request.granted_at,
        finished_at=request.finished_at,
        reason=request.reason,
    )


def _required(request: Request) -> str | None:
    return None if request.requires == ANYTHING else request.requires


def _status(request_id: str, tables: CompletionTables) -> RequestView:
    request = _known(tables, request_id)
    view = _view(request_id, request)
    if request.status in FINAL:
        outcome = tables.outcomes.get(request_id)
        return msgspec.structs.replace(view, result=outcome.result if outcome else None)
    grant = tables.grants.get((request.worker, request_id)) if request.worker else None
    return msgspec.structs.replace(view, progress=grant.progress if grant else None)


def _grants(query: GetGrants, tables: CompletionTables) -> Grants:
    held = tables.grants.range(prefix=(query.worker,))
    named = None if query.request_ids is None else {*query.request_ids}
    found: list[GrantView] = []
    room = PAGE_BYTES_MAX
    for (_, request_id), grant in held:
        if named is not None and request_id not in named:
            continue
        request, prompt = _known(tables, request_id), tables.prompts.get(request_id)
        assert prompt is not None
        room -= request.size
        if room < 0 and found:
            return Grants(worker=query.worker, grants=found, more=True)
        view = GrantView(
            request_id=request_id,
            attempt=grant.attempt,
            session_id=request.session_id,
            requester=request.requester,
            prompt=prompt.prompt,
            model=prompt.model,
            data=prompt.data,
            options=prompt.options,
            requires=_required(request),
            run_s=request.run_s,
        )
        found.append(view)
    return Grants(worker=query.worker, grants=found, more=False)


def _session_status(query: GetSessionStatus, tables: CompletionTables) -> SessionQueue:
    lane = tables.lanes.get(query.session_id) or Lane()
    rows = islice(tables.queue.range(prefix=(query.session_id,)), query.limit)
    return SessionQueue(
        session_id=query.session_id,
        waiting=lane.waiting,
        active=_view(lane.active, _known(tables, lane.active)) if lane.active else None,
        next=[_view(each.request_id, _known(tables, each.request_id)) for _, each in rows],
    )


def _list(query: ListRequests, tables: CompletionTables) -> RequestPage:
    rows: Iterator[tuple[Any, str]]
    if query.status == "queued":
        start = _place(query.after, str, int, int)
        rows = ((key, each.request_id) for key, each in tables.queue.range(start))
    elif query.status == "active":
        start = _place(query.after, str, str)
        rows = ((key, key[1]) for key, _ in tables.grants.range(start))
    else:
        stop = _place(query.after, int, str)
        rows = ((k, k[1]) for k, _ in tables.finished.range((), stop or None, reverse=True))
    found: list[RequestView] = []
    following: str | None = None
    for key, request_id in rows:
        place = "/".join(map(str, key))
        if place == query.after:
            continue
        if len(found) == query.limit:
            break
        following = place
        found.append(_view(request_id, _known(tables, request_id)))
    else:
        following = None
    totals = _totals(tables)
    return RequestPage(
        requests=found,
        waiting=totals.waiting,
        active=totals.active,
        finished=tables.finished.count(),
        limit=totals.limit,
        next=following,
    )


def _place(after: str | None, *kinds: type) -> Any:
    """Return the key a cursor names, or the beginning for one that names none."""
    parts = (after or "").split("/")
    if len(parts) != len(kinds):
        return ()
    keyed = list(zip(kinds, parts, strict=True))
    if not all(kind is str or _NUMBER.fullmatch(part) for kind, part in keyed):
        return ()
    return tuple(kind(part) for kind, part in keyed)


def _worker_view(name: str, worker: Worker) -> WorkerView:
    return WorkerView(
        worker=name,
        epoch=worker.epoch,
        capabilities=worker.capabilities,
        slots=worker.slots,
        used=worker.used,
        lease_s=worker.lease_s,
        registered_at=worker.registered_at,
    )


def _told(event: Any, what: str, **message: Any) -> Announcement:
    message = {"request_id": event.request_id, "session_id": event.session_id, **message}
    return Announcement(f"completion.{event.requester}.{event.request_id}.{what}", message)


def _revoked(event: Requeued | Ended) -> Iterable[Announcement]:
    """Tell a worker that a grant it held is over."""
    if not event.worker:
        return ()
    revoked = {"request_id": event.request_id, "attempt": event.attempt}
    return (Announcement(f"worker.{event.worker}.revoked", revoked),)
