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
- What fails and may pass is tried again after a while, in its old place: until then its session
  waits. What has failed for good is a dead letter and may be queued again, as another request.
- A request ends once: completed, failed or cancelled. Its outcome is kept for a while; the record
  is the session's file, which the owner of sessions writes. That owner also has the last word on
  who may speak: nothing is granted before its request is recorded, and what it refuses ends here
  as cancelled. Of an outcome that it refuses the request says so.

Grants are decided once a commit, in the tick that follows, in `granting.py`. How the queue of a
session is kept is in `lanes.py`, who works in `workers.py`, what providers bear in `bounds.py`,
what it costs in `spending.py`, and what is told of requests in `requests.py`.

Source: "KSI State Management Analysis" 4, completion service: a queue a session against forks.
Leases with fencing tokens: Chubby's sequencers; redelivery after a lease: NATS JetStream's AckWait.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec

from ksi.actors.declarations import sessions
from ksi.actors.declarations.bounds import BoundSet, Rested
from ksi.actors.declarations.completion import (
    FINAL,
    PASSING,
    Accepted,
    Asking,
    Async,
    Buried,
    Cancel,
    CompletionTables,
    Deferred,
    Ended,
    Forgotten,
    FoundUnfit,
    GetGrants,
    GetProviderStatus,
    GetRetryStatus,
    GetSessionStatus,
    GetStatus,
    Grant,
    Granted,
    Kind,
    Lane,
    Limits,
    LimitSet,
    ListRequests,
    Outcome,
    Progress,
    Progressed,
    Prompt,
    Provider,
    QueueClosed,
    Queued,
    Recorded,
    Report,
    ReportUnfit,
    Request,
    Requeued,
    Resumed,
    Retried,
    Retry,
    SessionClosed,
    SetLimit,
    Status,
    Totals,
    Unrecorded,
)
from ksi.actors.declarations.spending import (
    BudgetPage,
    BudgetSet,
    GetTokenUsage,
    ListBudgets,
    SetBudget,
    Taken,
    UsageForgotten,
)
from ksi.actors.declarations.workers import (
    ANYTHING,
    Held,
    LeaveWorker,
    ListWorkers,
    Registered,
    RegisterWorker,
    Renewed,
    RenewWorker,
    WorkerLeft,
    WorkerPage,
    WorkerRegistered,
    WorkerRenewed,
)
from ksi.actors.owner import (
    Announcement,
    Decision,
    Event,
    Given,
    Interrupted,
    Owner,
    Query,
    Reply,
    Restored,
    Send,
    Sender,
    Table,
    Tick,
)
from ksi.actors.owners import bounds, granting, lanes, requests, spending, workers
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    Invalid,
    KsiError,
    NotFound,
    NotOwner,
    Quota,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import (
    AGEING_S,
    DEAD_BYTES_MAX,
    DEAD_MAX,
    DEAD_S,
    ENDED_MAX,
    ENTRY_BYTES_MAX,
    FINISHED_BYTES_MAX,
    FINISHED_MAX,
    FINISHED_S,
    FRAME_BYTES_MAX,
    ITEMS_MAX,
    LAPSES_MAX,
    PROGRESS_BYTES_MAX,
    PROVIDERS_MAX,
    RETRY_S_MAX,
    WAITING_AGENT_BYTES_MAX,
    WAITING_AGENT_MAX,
    WAITING_BYTES_MAX,
    WAITING_MAX,
    WAITING_SESSION_MAX,
    WORKERS_MAX,
)
from ksi.transport.moments import due_ms, whole_ms

PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX * 3 // 4  # What grants in one reply may say.
DUE_MAX: Final = 32  # Leases that lapse, and outcomes forgotten, in one decision.
JITTER: Final = 0.25  # Of a wait, at the most, so that what failed at once is not tried at once.
RETRY_AFTER_S: Final = 0.5  # What a requester is asked to wait where the queue is full.
DAEMON_RESTART: Final = "daemon_restart"  # Why a request ended, where a restore interrupted it.
UNRECORDED: Final = "unrecorded"  # Why an outcome is not in the file, in the place of what it says.
OURS: Final = "completion"  # Who ends what took too long, or too many workers.


class Completion(Owner[CompletionTables]):
    """The owner of all requests, grants and workers."""

    name = "completion"
    tables = CompletionTables
    domains = ("completion", "worker")
    routine = (WorkerRenewed,)
    recovers = True
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
        | Deferred
        | Resumed
        | Retried
        | Buried
        | FoundUnfit
        | Taken
        | BudgetSet
        | UsageForgotten
        | BoundSet
        | Rested
    )

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        match command:
            case Async():
                return sessions.Get(session_id=command.session_id, agent_id=sender.name)
            case Cancel(session_id=str(session_id)) | Retry(session_id=str(session_id)):
                return sessions.Get(session_id=session_id)
            case _:
                return None

    def decide(
        self, command: Any, sender: Sender, tables: CompletionTables, given: Given
    ) -> Decision:
        match command:
            case Tick():
                return _tick(tables, given)
            case Restored():
                return _restored(command.interrupted, tables, given)
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
            case Retry():
                return _retry(command, sender, tables, given)
            case SessionClosed():
                return Decision((QueueClosed(command.session_id),), tick=True)
            case RegisterWorker():
                return _register(command, sender, tables, given)
            case LeaveWorker():
                workers.registered(sender.name, command.epoch, tables)
                return _left(sender.name, "it has left", tables, given, lapsed=False)
            case SetLimit():
                return _set_limit(command, tables)
            case ReportUnfit():
                return _found_unfit(command, tables, given)
            case SetBudget():
                return _set_budget(command, tables, given)
            case _:
                raise TypeError(command)

    def relay(self, signal: Any, sender: Sender, tables: CompletionTables) -> Announcement | None:
        request = _held(tables, signal.request_id, signal.attempt, sender)
        message = {"attempt": signal.attempt, "start": signal.start, "text": signal.text}
        message |= {"request_id": signal.request_id, "session_id": request.session_id}
        topic = f"completion.{request.requester}.{signal.request_id}.tokens"
        return Announcement(topic, message, sender.name)

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
                _progressed(event, tables)
            case Ended():
                _ended(event, tables)
            case Requeued():
                _requeued(event, tables)
            case Forgotten():
                _forgotten(event, tables)
            case QueueClosed():
                _queue_closed(event, tables)
            case LimitSet():
                _add(tables, limit=event.limit - requests.totals(tables).limit)
            case WorkerRenewed():
                workers.apply_renewed(event, tables)
            case WorkerRegistered():
                _worker_registered(event, tables)
            case WorkerLeft():
                workers.apply_left(event, tables)
            case Deferred():
                _deferred(event, tables)
            case Resumed():
                _resumed(event, tables)
            case Retried() | Buried():
                _buried(event, tables)
            case FoundUnfit():
                _count(tables, event.provider, unfit=event.reason)
            case Taken():
                spending.apply_taken(event, tables)
            case BudgetSet():
                spending.apply_budget(event, tables)
            case BoundSet():
                bounds.apply_bound(event, _granted_of(event.provider, tables), tables)
            case Rested():
                bounds.apply_rested(event, _granted_of(event.provider, tables), tables)
            case UsageForgotten():
                tables.usage.delete((event.hour, event.agent_id, event.model))
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: CompletionTables) -> Reply:
        match query:
            case GetStatus():
                return requests.status(query.request_id, tables)
            case GetGrants():
                return requests.grants(query, tables)
            case GetSessionStatus():
                return requests.session_status(query, tables)
            case ListRequests():
                return requests.listed(query, tables)
            case GetRetryStatus():
                return requests.retry_status(query, tables)
            case GetProviderStatus():
                return requests.provider_status(query, tables)
            case GetTokenUsage():
                return spending.token_usage(query, tables)
            case ListBudgets():
                return spending.budgets(query, tables)
            case ListWorkers():
                rows = islice(tables.workers.range(), query.limit)
                return WorkerPage(workers=[workers.view(name, worker) for name, worker in rows])
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
            case Deferred():
                why = {"kind": event.kind, "reason": event.reason, "retry_at": event.retry_at}
                deferred = _told(event, "retry", attempt=event.attempt, **why)
                return (deferred, *(() if event.by == event.worker else _revoked(event)))
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
    _require_admitted(command.session_id, sender, given.fact)
    request_id = command.request_id or f"req_{next(given.ids)}"
    known = tables.requests.get(request_id)
    if known is not None:
        raise Conflict(
            f"request {request_id} exists already and is of {known.requester}",
            hint="leave request_id out to get a fresh one",
            status=known.status,
        )
    return _queue(command, request_id, sender.name, tables, given)


def _queue(
    command: Async,
    request_id: str,
    requester: str,
    tables: CompletionTables,
    given: Given,
    retry_of: str = "",
) -> Decision:
    session_id = command.session_id
    _require_fit(tables, command.requires)
    spending.require_budget(tables, requester, session_id)
    entry = {**command.data, "prompt": command.prompt, "session_id": session_id}
    entry |= {"agent_id": requester} | ({"model": command.model} if command.model else {})
    entry |= {"retry_of": retry_of} if retry_of else {}
    size = _size({**entry, "": command.options}, "the request")
    lane, totals = tables.lanes.get(session_id) or Lane(), requests.totals(tables)
    asking = tables.asking.get(requester) or Asking()
    _require_room(session_id, requester, lane, asking, totals, size)
    event = Queued(
        request_id,
        session_id,
        requester,
        command.requires or ANYTHING,
        command.priority,
        whole_ms(given.time_s + (command.priority - 1) * AGEING_S),
        totals.number + 1,
        command.prompt,
        command.model,
        command.data,
        command.options,
        command.run_s,
        size,
        given.now,
        False,
        command.attempts_max,
        command.retry_s,
        retry_of,
    )
    reply = Accepted(
        request_id=request_id,
        session_id=session_id,
        status="queued",
        queue_depth=lane.waiting + 1,
        session_active=bool(lane.active),
        priority=command.priority,
    )
    record = _recorded(session_id, request_id, requester, "completion:request", entry)
    return Decision((event,), reply, (record,))


def _require_fit(tables: CompletionTables, required: str | None) -> None:
    """Refuse what requires a provider that was found unfit and that nobody offers."""
    provider = tables.providers.get(required or ANYTHING)
    if provider is None or not provider.unfit:
        return
    if any(required in worker.capabilities for _, worker in tables.workers.range()):
        return
    raise NotFound(
        f"no worker can offer {required}: {provider.unfit}",
        hint=f"mend that, then: ksi start --worker {required}",
        provider=required,
    )


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
    request = requests.known(tables, request_id)
    _require_authority(request_id, request, sender, given.fact)
    if request.status in FINAL:
        raise Conflict(f"request {request_id} is {request.status}", status=request.status)
    reason = command.reason or f"cancelled by {sender.name}"
    return _end(request_id, request, "cancelled", given, by=sender.name, reason=reason)


def _require_authority(
    request_id: str, request: Request, sender: Sender, fact: Reply | KsiError | None
) -> None:
    owns_session = (
        isinstance(fact, sessions.SessionView)
        and fact.session_id == request.session_id
        and fact.owner == sender.name
    )
    if sender.role != "operator" and request.requester != sender.name and not owns_session:
        raise Forbidden(
            f"request {request_id} is of {request.requester}, not of {sender.name}",
            hint="the owner of its session may do it too: name session_id",
            requester=request.requester,
        )


def _retry(command: Retry, sender: Sender, tables: CompletionTables, given: Given) -> Decision:
    request_id = command.request_id
    request = requests.known(tables, request_id)
    _require_authority(request_id, request, sender, given.fact)
    prompt = tables.prompts.get(request_id)
    if tables.dead.get((request.finished_ms, request_id)) is None or prompt is None:
        what = f"was retried as {request.retried_as}" if request.retried_as else request.status
        raise Conflict(
            f"request {request_id} {what}: only what has failed for good is retried",
            hint="ksi queue list --status dead",
            status=request.status,
        )
    again = Async(
        session_id=request.session_id,
        prompt=prompt.prompt,
        model=prompt.model,
        requires=requests.required(request),
        priority=request.priority,
        data=prompt.data,
        options=prompt.options,
        run_s=request.run_s,
        attempts_max=request.attempts_max,
        retry_s=request.retry_s,
    )
    as_id = f"req_{next(given.ids)}"
    queued = _queue(again, as_id, request.requester, tables, given, retry_of=request_id)
    retried = Retried(request.finished_ms, request_id, as_id)
    return msgspec.structs.replace(queued, events=(retried, *queued.events))


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
    result: dict[str, Any] | None = command.result
    model = command.result.get("model")
    if not isinstance(model, str):
        prompt = tables.prompts.get(request_id)
        model = (prompt.model if prompt else None) or command.provider
    usage, requester = command.usage, request.requester
    taken = spending.taken(requester, request.session_id, model, usage, given.now)
    grant = tables.grants.get((request.worker, request_id))
    rested: tuple[Event, ...] = ()
    if grant is not None and command.error is not None and command.retry_after_s:
        rested = bounds.rested(grant.provider, given.time_s, command.retry_after_s, tables)
    if command.error is None:
        status: Status = "completed"
        if usage is not None:
            result = {**command.result, "usage": msgspec.to_builtins(usage)}
    else:
        status, result = "failed", command.result or None
    why = _Failure(command.error, command.kind, command.provider or "", command.retry_after_s or 0)
    if status == "failed" and _may_pass(request, command.kind):
        decision = _defer(request_id, request, why, given, by=sender.name)
    else:
        decision = _end(
            request_id, request, status, given, by=sender.name, reason=command.error,
            result=result, kind=command.kind or "", provider=why.provider,
        )  # fmt: skip
    return msgspec.structs.replace(decision, events=(*taken, *rested, *decision.events))


class _Failure(NamedTuple):
    """Why an attempt has failed, in words and as a kind, whose it was, and how long to wait."""

    reason: str | None
    kind: Kind | None
    provider: str = ""
    retry_after_s: float = 0.0


def _may_pass(request: Request, kind: Kind | None) -> bool:
    """Whether another attempt is to follow one that has failed."""
    return kind in PASSING and request.failures + 1 < request.attempts_max


def _defer(request_id: str, request: Request, why: _Failure, given: Given, *, by: str) -> Decision:
    """Let a request wait before its next attempt: ever twice as long, and no two alike.

    What makes them differ is drawn from its name, so that a replay comes to the same.
    """
    wait_s = min(request.retry_s * 2**request.failures, max(RETRY_S_MAX, request.retry_s))
    name = f"{request_id}/{request.attempt}".encode()
    wait_s *= 1 + JITTER * zlib.crc32(name) / (1 << 32)
    wait_s = max(wait_s, why.retry_after_s)
    event = Deferred(
        request_id,
        request.session_id,
        request.requester,
        request.worker,
        request.attempt,
        why.kind or "",
        why.reason or "",
        why.provider,
        due_ms(given.time_s, wait_s),
        given.now + wait_s,
        by,
        given.now,
    )
    waiting = msgspec.structs.replace(
        request, status="queued", failures=request.failures + 1, kind=event.kind,
        reason=event.reason, retry_at=event.retry_at,
    )  # fmt: skip
    return Decision((event,), requests.view(request_id, waiting), tick=True)


def _held(tables: CompletionTables, request_id: str, attempt: int, sender: Sender) -> Request:
    """Return the request if the sender holds its grant now: a former attempt is refused first."""
    request = requests.known(tables, request_id)
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
    kind: str = "",
    provider: str = "",
) -> Decision:
    """End an open request: once, for a request that has ended is not open any more."""
    speaker = (request.worker or request.requester) if by == OURS else by
    entry = {**(result or {}), "agent_id": speaker}
    if reason is not None:
        entry["reason"] = reason
    if kind:
        entry["kind"] = kind
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
        kind,
        provider,
    )
    name = _RECORDED[status]
    sends = (_recorded(request.session_id, request_id, speaker, name, entry),) if record else ()
    ended = msgspec.structs.replace(
        request, status=status, finished_at=given.now, reason=reason, kind=kind, retry_at=None
    )
    return Decision((event,), requests.view(request_id, ended), sends, tick=True)


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
    former = Decision()
    if tables.workers.get(name) is not None:
        reason = f"another registered as {name}"
        former = _left(name, reason, tables, given, lapsed=True)
    elif tables.workers.count() >= WORKERS_MAX:
        raise Quota(f"there are {WORKERS_MAX} workers", limit=WORKERS_MAX)
    event = WorkerRegistered(
        name,
        requests.totals(tables).epoch + 1,
        list(dict.fromkeys(command.capabilities)),
        command.slots,
        command.lease_s,
        given.now,
        given.time_s,
    )
    reply = Registered(worker=name, epoch=event.epoch, lease_s=command.lease_s)
    return Decision((*former.events, event), reply, former.sends, tick=True)


def _renew(
    command: RenewWorker, sender: Sender, tables: CompletionTables, given: Given
) -> Decision:
    name = sender.name
    worker = workers.registered(name, command.epoch, tables)
    slots = worker.slots if command.slots is None else command.slots
    held = [
        Held(request_id=request_id, attempt=grant.attempt)
        for (_, request_id), grant in tables.grants.range(prefix=(name,))
    ]
    reply = Renewed(worker=name, epoch=worker.epoch, lease_s=worker.lease_s, grants=held)
    return Decision((WorkerRenewed(name, slots, given.time_s),), reply, tick=slots > worker.slots)


def _restored(interrupted: Interrupted, tables: CompletionTables, given: Given) -> Decision:
    """Let all workers go: no epoch, and no attempt, that was named since the checkpoint holds.

    What they were at waits again, as often as when workers vanish, or ends.
    """
    lapses_max = LAPSES_MAX if interrupted == "retry" else 1
    why = DAEMON_RESTART
    return _together(
        [
            _left(name, why, tables, given, lapsed=True, lapses_max=lapses_max, why=why)
            for name, _worker in tables.workers.range()
        ]
    )


def _left(
    name: str,
    reason: str,
    tables: CompletionTables,
    given: Given,
    *,
    lapsed: bool,
    lapses_max: int = LAPSES_MAX,
    why: str | None = None,
) -> Decision:
    """Let a worker go. What it holds waits again, or ends for `why` if too many went over it."""
    events: list[Event] = []
    sends: list[Send] = []
    for (_, request_id), grant in tables.grants.range(prefix=(name,)):
        request = requests.known(tables, request_id)
        if lapsed and request.lapses + 1 >= lapses_max:
            given_up = why or f"given up: {LAPSES_MAX} workers vanished over it, at last {name}"
            end = _end(request_id, request, "failed", given, by=OURS, reason=given_up)
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


def _found_unfit(command: ReportUnfit, tables: CompletionTables, given: Given) -> Decision:
    known = tables.providers.get(command.provider)
    if known is None and tables.providers.count() >= PROVIDERS_MAX:
        raise Quota(f"there are {PROVIDERS_MAX} providers", limit=PROVIDERS_MAX)
    return Decision((FoundUnfit(command.provider, command.reason, given.now),))


def _set_limit(command: SetLimit, tables: CompletionTables) -> Decision:
    """Bound what providers bear: one of them, or all together."""
    if command.provider is not None:
        provider = command.provider
        event = bounds.set_bound(provider, command.limit, command.rate, tables)
        active = _granted_of(provider, tables)
        reply = Limits(limit=command.limit, active=active, provider=provider, rate=command.rate)
        return Decision((event,), reply, tick=True)
    if command.limit is None or command.rate is not None:
        raise Invalid(
            "without a provider there is a limit, and no rate",
            hint="ksi ask completion:limit --provider openai --rate 60/m",
        )
    reply = Limits(limit=command.limit, active=requests.totals(tables).active)
    return Decision((LimitSet(command.limit),), reply, tick=True)


def _granted_of(provider: str, tables: CompletionTables) -> int:
    """Return how many grants a provider has: it is counted once, when it gets a bound."""
    return sum(grant.provider == provider for _, grant in tables.grants.range())


def _set_budget(command: SetBudget, tables: CompletionTables, given: Given) -> Decision:
    event = spending.set_budget(command, tables, given.now)
    budget = spending.after(event, tables)
    views = [] if budget is None else [spending.view(event.holder, event.name, budget)]
    return Decision((event,), BudgetPage(budgets=views), tick=True)


def _tick(tables: CompletionTables, given: Given) -> Decision:
    """Do the first of these that there is to do, and ask for another tick; at last grant.

    One kind at a time: each is decided over what the others have led to.
    """
    for due in (_lapse, _time_out, _close, _resume, _forget):
        decision = due(tables, given)
        if decision.events:
            return decision
    return _grant_or_end(tables, given)


def _lapse(tables: CompletionTables, given: Given) -> Decision:
    """Let go the worker that has been silent for too long; the next follows in the next tick."""
    for (_, name), _row in tables.leases.range((0,), (whole_ms(given.time_s) + 1,)):
        return _left(name, "its lease has lapsed", tables, given, lapsed=True)
    return Decision()


def _time_out(tables: CompletionTables, given: Given) -> Decision:
    overdue = tables.timeouts.range((0,), (whole_ms(given.time_s) + 1,))
    ends = []
    for (_, request_id), _row in islice(overdue, DUE_MAX):
        request = requests.known(tables, request_id)
        why = _Failure(f"it took longer than {request.run_s:g} s", "timeout")
        if _may_pass(request, why.kind):
            ends.append(_defer(request_id, request, why, given, by=OURS))
        else:
            ends.append(
                _end(
                    request_id, request, "failed", given, by=OURS, reason=why.reason, kind="timeout"
                )
            )
    return _together(ends)


def _resume(tables: CompletionTables, given: Given) -> Decision:
    """Let what has waited for its next attempt be granted."""
    due = tables.deferred.range((0,), (whole_ms(given.time_s) + 1,))
    ids = [request_id for (_, request_id), _row in islice(due, DUE_MAX)]
    events = tuple(Resumed(each, requests.known(tables, each).session_id) for each in ids)
    return Decision(events, tick=bool(events))


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
                _end(
                    each, requests.known(tables, each), "cancelled", given,
                    by="sessions", reason=why, record=False,
                )
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
    """Forget what is not kept any more: the longest finished, dead letters, sums of usage."""
    totals, time_s = requests.totals(tables), given.time_s
    forgotten = (
        Forgotten(finished_ms, request_id)
        for (finished_ms, request_id), _ in _surplus(
            tables.finished, FINISHED_MAX, time_s - FINISHED_S,
            totals.finished_bytes - FINISHED_BYTES_MAX, lambda each: _outcome_size(tables, each),
        )
    )  # fmt: skip
    buried = (
        Buried(finished_ms, request_id)
        for (finished_ms, request_id), _ in _surplus(
            tables.dead, DEAD_MAX, time_s - DEAD_S,
            totals.dead_bytes - DEAD_BYTES_MAX, lambda each: requests.known(tables, each).size,
        )
    )  # fmt: skip
    events = (*forgotten, *buried, *spending.forgotten(tables, given.now))
    return Decision(events, tick=bool(events))


def _surplus(
    table: Table[bytes],
    rows_max: int,
    before_s: float,
    surplus_bytes: int,
    size_of: Callable[[str], int],
) -> Iterator[tuple[tuple[int, str], bytes]]:
    """Yield the first rows of a table as long as it is over a bound: some of them."""
    surplus = table.count() - rows_max
    before_ms = whole_ms(before_s) if before_s > 0 else 0
    for (finished_ms, request_id), row in islice(table.range(), DUE_MAX):
        if surplus <= 0 and surplus_bytes <= 0 and finished_ms >= before_ms:
            return
        surplus -= 1
        if surplus_bytes > 0:
            surplus_bytes -= size_of(request_id)
        yield (finished_ms, request_id), row


def _outcome_size(tables: CompletionTables, request_id: str) -> int:
    outcome = tables.outcomes.get(request_id)
    return outcome.size if outcome else 0


def _grant_or_end(tables: CompletionTables, given: Given) -> Decision:
    """Grant what can be; what has no budget left ends instead, and others get its slot next."""
    granted: list[Event] = []
    ends: list[Decision] = []
    for event in granting.drawn(tables, given):
        spent = spending.exhausted(tables, event.requester, event.session_id)
        if spent is None:
            granted.append(event)
            continue
        request, why = requests.known(tables, event.request_id), f"the budget is used up: {spent}"
        ends.append(
            _end(event.request_id, request, "failed", given, by=OURS, reason=why, kind="budget")
        )
    ended = _together(ends)
    events = (*granted, *ended.events)
    return msgspec.structs.replace(ended, events=events, tick=bool(ends))


# What takes more bytes in a session's line than in JSON: up to six for two.
_WIDE: Final = re.compile("[\u0080-\u009f\u2028\u2029]")


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


def _add(tables: CompletionTables, **more: int) -> None:
    """Add to the totals."""
    totals = requests.totals(tables)
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
        attempts_max=event.attempts_max,
        retry_s=event.retry_s,
        retry_of=event.retry_of,
    )
    tables.requests.put(event.request_id, request)
    prompt = Prompt(event.prompt, event.model, event.data, event.options)
    tables.prompts.put(event.request_id, prompt)
    lane = tables.lanes.get(event.session_id) or Lane()
    after = lanes.enter(tables, event.request_id, request, lane)
    lanes.put(tables, event.session_id, lane, after)
    _add(
        tables,
        number=event.number - requests.totals(tables).number,
        waiting=1,
        open_bytes=event.size,
    )
    _ask_for(tables, event.requester, waiting=1, size=event.size)


def _request_noted(request_id: str, tables: CompletionTables) -> None:
    request = requests.known(tables, request_id)
    tables.requests.put(request_id, msgspec.structs.replace(request, recorded=True))
    lane = tables.lanes.get(request.session_id) or Lane()
    if lane.head is not None and lane.head.request_id == request_id:
        head = msgspec.structs.replace(lane.head, recorded=True)
        lanes.put(tables, request.session_id, lane, msgspec.structs.replace(lane, head=head))


def _outcome_missed(event: Unrecorded, tables: CompletionTables) -> None:
    request = requests.known(tables, event.request_id)
    missed = f"not in the session's file: {event.reason}"
    reason = missed if request.reason is None else f"{request.reason}; {missed}"
    tables.requests.put(event.request_id, msgspec.structs.replace(request, reason=reason))


def _granted(event: Granted, tables: CompletionTables) -> None:
    request = requests.known(tables, event.request_id)
    timeout_ms = due_ms(event.time_s, request.run_s)
    active = msgspec.structs.replace(
        request,
        status="active",
        attempt=event.attempt,
        worker=event.worker,
        granted_at=event.now,
        timeout_ms=timeout_ms,
    )
    tables.requests.put(event.request_id, active)
    lane = tables.lanes.get(event.session_id) or Lane()
    grant = Grant(event.attempt, follows=lane.last, provider=event.provider)
    tables.grants.put((event.worker, event.request_id), grant)
    tables.timeouts.put((timeout_ms, event.request_id), b"")
    after = lanes.leave(tables, event.request_id, request, lane)
    after = msgspec.structs.replace(after, active=event.request_id)
    lanes.put(tables, event.session_id, lane, after)
    workers.apply_used(event.worker, 1, tables)
    bounds.apply_granted(event.provider, event.time_s, tables)
    _add(tables, waiting=-1, active=1)
    _ask_for(tables, event.requester, waiting=-1)


def _progressed(event: Progressed, tables: CompletionTables) -> None:
    key = (event.worker, event.request_id)
    grant = tables.grants.get(key) or Grant(event.attempt)
    tables.grants.put(key, msgspec.structs.replace(grant, progress=event.progress))


def _requeued(event: Requeued, tables: CompletionTables) -> None:
    request = _release(event, tables)
    lapses = request.lapses + event.lapsed
    _wait_again(tables, event.request_id, msgspec.structs.replace(request, lapses=lapses))


def _deferred(event: Deferred, tables: CompletionTables) -> None:
    request = _release(event, tables)
    deferred = msgspec.structs.replace(
        request, failures=request.failures + 1, kind=event.kind, reason=event.reason,
        due_ms=event.due_ms, retry_at=event.retry_at,
    )  # fmt: skip
    tables.deferred.put((event.due_ms, event.request_id), b"")
    _wait_again(tables, event.request_id, deferred)
    if event.provider:
        row = tables.providers.get(event.provider) or Provider()
        _count(tables, event.provider, retried=row.retried + 1, failed_at=event.now,
               kind=event.kind, reason=event.reason)  # fmt: skip


def _wait_again(tables: CompletionTables, request_id: str, request: Request) -> None:
    """Put a request that was released into the queue of its session, in its old place."""
    waiting = msgspec.structs.replace(
        request, status="queued", worker="", granted_at=None, timeout_ms=0
    )
    tables.requests.put(request_id, waiting)
    lane = tables.lanes.get(request.session_id) or Lane()
    after = lanes.enter(tables, request_id, waiting, lane)
    lanes.put(tables, request.session_id, lane, msgspec.structs.replace(after, active=""))
    _add(tables, waiting=1)
    _ask_for(tables, request.requester, waiting=1)


def _resumed(event: Resumed, tables: CompletionTables) -> None:
    request = requests.known(tables, event.request_id)
    tables.deferred.delete((request.due_ms, event.request_id))
    lane = tables.lanes.get(event.session_id) or Lane()
    after = lanes.leave(tables, event.request_id, request, lane)
    resumed = msgspec.structs.replace(request, due_ms=0, retry_at=None)
    tables.requests.put(event.request_id, resumed)
    lanes.put(tables, event.session_id, lane, lanes.enter(tables, event.request_id, resumed, after))


def _count(tables: CompletionTables, name: str, **changes: Any) -> None:
    """Change the row of a provider; of a new one only as long as there is room for it."""
    row = tables.providers.get(name)
    if row is not None or tables.providers.count() < PROVIDERS_MAX:
        tables.providers.put(name, msgspec.structs.replace(row or Provider(), **changes))


def _ended(event: Ended, tables: CompletionTables) -> None:
    request = requests.known(tables, event.request_id)
    lane = tables.lanes.get(event.session_id) or Lane()
    if request.status == "active":
        _release(event, tables)
        last = event.request_id if event.status == "completed" else lane.last
        after = msgspec.structs.replace(lane, active="", last=last)
    else:
        after = lanes.leave(tables, event.request_id, request, lane)
        _add(tables, waiting=-1)
    was_waiting = request.status == "queued"
    _ask_for(tables, request.requester, waiting=-was_waiting, size=-request.size)
    lanes.put(tables, event.session_id, lane, after)
    finished_ms = whole_ms(event.time_s)
    ended = msgspec.structs.replace(
        request, status=event.status, finished_at=event.now, reason=event.reason, timeout_ms=0,
        kind=event.kind, due_ms=0, retry_at=None, finished_ms=finished_ms,
    )  # fmt: skip
    tables.requests.put(event.request_id, ended)
    tables.outcomes.put(event.request_id, Outcome(event.result, event.size))
    tables.finished.put((finished_ms, event.request_id), b"")
    _add(tables, open_bytes=-request.size, finished_bytes=event.size)
    if event.status == "failed":
        tables.dead.put((finished_ms, event.request_id), b"")
        _add(tables, dead_bytes=request.size)
    else:
        tables.prompts.delete(event.request_id)
    if event.provider and event.status == "completed":
        row = tables.providers.get(event.provider) or Provider()
        _count(tables, event.provider, completed=row.completed + 1, completed_at=event.now)
    elif event.provider:
        row = tables.providers.get(event.provider) or Provider()
        _count(tables, event.provider, failed=row.failed + 1, failed_at=event.now,
               kind=event.kind, reason=event.reason or "")  # fmt: skip


def _release(event: Requeued | Deferred | Ended, tables: CompletionTables) -> Request:
    """Take the grant of an active request away, whatever becomes of it."""
    request = requests.known(tables, event.request_id)
    grant = tables.grants.get((request.worker, event.request_id))
    assert grant is not None
    bounds.apply_released(grant.provider, tables)
    tables.grants.delete((request.worker, event.request_id))
    tables.timeouts.delete((request.timeout_ms, event.request_id))
    workers.apply_used(request.worker, -1, tables)
    _add(tables, active=-1)
    return request


def _queue_closed(event: QueueClosed, tables: CompletionTables) -> None:
    lane = tables.lanes.get(event.session_id)
    if lane is not None:
        tables.closing.put(event.session_id, b"")
        closed = msgspec.structs.replace(lane, closed=True)
        lanes.put(tables, event.session_id, lane, closed)


def _worker_registered(event: WorkerRegistered, tables: CompletionTables) -> None:
    workers.apply_registered(event, tables)
    for offered in event.capabilities:
        provider = tables.providers.get(offered)
        if provider is not None and provider.unfit:
            _count(tables, offered, unfit="")
    _add(tables, epoch=event.epoch - requests.totals(tables).epoch)


def _forgotten(event: Forgotten, tables: CompletionTables) -> None:
    key = (event.finished_ms, event.request_id)
    tables.finished.delete(key)
    _add(tables, finished_bytes=-_outcome_size(tables, event.request_id))
    if tables.dead.get(key) is None:
        tables.outcomes.delete(event.request_id)
        tables.requests.delete(event.request_id)


def _buried(event: Retried | Buried, tables: CompletionTables) -> None:
    """Take a dead letter away; its outcome stays as long as that of others."""
    key = (event.finished_ms, event.request_id)
    request = requests.known(tables, event.request_id)
    tables.dead.delete(key)
    tables.prompts.delete(event.request_id)
    _add(tables, dead_bytes=-request.size)
    if tables.finished.get(key) is None:
        tables.outcomes.delete(event.request_id)
        tables.requests.delete(event.request_id)
    elif isinstance(event, Retried):
        retried = msgspec.structs.replace(request, retried_as=event.retried_as)
        tables.requests.put(event.request_id, retried)


def _told(event: Any, what: str, **message: Any) -> Announcement:
    message = {"request_id": event.request_id, "session_id": event.session_id, **message}
    return Announcement(f"completion.{event.requester}.{event.request_id}.{what}", message)


def _revoked(event: Requeued | Deferred | Ended) -> Iterable[Announcement]:
    """Tell a worker that a grant it held is over."""
    if not event.worker:
        return ()
    revoked = {"request_id": event.request_id, "attempt": event.attempt}
    return (Announcement(f"worker.{event.worker}.revoked", revoked),)
