"""Locks on conversations: one request of one agent at a time, the others in a queue.

For conversations that are held elsewhere (a command line, another service), where going on from two
sides at once forks them. A lock is fenced by its epoch, as a session is: who holds one says it with
what he does, and who held one before is refused. `session:append` takes it as `lock_epoch`.

These are operations of the owner `library` (`library.py`).

Source: "KSI State Management Analysis", 4. and 7.; fencing tokens as in Kafka's epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol

import msgspec

from ksi.actors.declarations.locks import (
    Acquired,
    AcquireLock,
    Count,
    DetectFork,
    ForkDetected,
    Forked,
    ForkRow,
    Freed,
    GetLock,
    Held,
    ListLocks,
    Lock,
    LockForgotten,
    LockFreed,
    LockGranted,
    LockLeft,
    LockPage,
    LockQueued,
    LockRenewed,
    LockView,
    Parent,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
    Waiter,
)
from ksi.actors.owner import (
    Announcement,
    Decision,
    Event,
    Given,
    Reply,
    Sender,
    Table,
)
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    NotFound,
    NotOwner,
    Quota,
    StaleEpoch,
)
from ksi.transport.limits import (
    FORKS_MAX,
    LOCK_EXPIRED_S,
    LOCK_QUEUE_MAX,
    LOCKS_MAX,
)
from ksi.transport.moments import whole_ms

TICK_LOCKS_MAX: Final = 250  # Locks that expire in one decision: it is felt.
SHOWN_MAX: Final = 5  # Of a queue.
CHILDREN_SHOWN_MAX: Final = 100
METADATA_BYTES_MAX: Final = 1024  # Of a lock, as JSON: it is shown with it.


class LockTables(Protocol):
    """The tables of the library that locks are in."""

    locks: Table[Lock]
    waiting: Table[Waiter]
    requests: Table[Held]
    due: Table[bytes]
    forks: Table[ForkRow]
    parents: Table[Parent]
    counters: Table[Count]


def decide(command: Any, sender: Sender, tables: LockTables, given: Given) -> Decision:
    """Return what happens if a command about locks is carried out."""
    match command:
        case AcquireLock():
            return _acquire(command, sender, tables, given)
        case ReleaseLock():
            return _release(command, sender, tables, given)
        case RenewLock():
            return _renew(command, sender, tables, given)
        case DetectFork():
            return _fork(command, sender, tables, given)
        case _:
            raise TypeError(command)


def apply(event: Any, tables: LockTables) -> None:
    """Write what an event about locks says."""
    match event:
        case LockGranted():
            _granted(event, tables)
        case LockQueued():
            waiter = Waiter(
                event.agent_id, event.request_id, event.ttl_s, event.metadata, event.now
            )
            tables.waiting.put((event.conversation_id, event.ticket), waiter)
            held = Held(event.conversation_id, event.ticket)
            tables.requests.put((event.agent_id, event.request_id), held)
            tables.counters.put("ticket", Count(event.ticket))
        case LockLeft():
            tables.waiting.delete((event.conversation_id, event.ticket))
            tables.requests.delete((event.agent_id, event.request_id))
        case LockRenewed():
            lock = tables.locks.get(event.conversation_id)
            assert lock is not None
            expires_ms = whole_ms(event.time_s + event.ttl_s)
            renewed = msgspec.structs.replace(lock, ttl_s=event.ttl_s, expires_ms=expires_ms)
            _put(event.conversation_id, lock, renewed, tables)
        case LockFreed():
            _freed(event, tables)
        case LockForgotten():
            _put(event.conversation_id, tables.locks.get(event.conversation_id), None, tables)
        case ForkDetected():
            row = ForkRow(event.by, event.request_id, event.now)
            tables.forks.put((event.parent, event.child), row)
            tables.parents.put(event.child, Parent(event.parent))
        case _:
            raise TypeError(event)


def answer(query: Any, tables: LockTables) -> Reply:
    """Return the reply to a query about locks."""
    match query:
        case GetLock():
            return _view(query.conversation_id, tables)
        case ListLocks():
            found: list[LockView] = []
            start = f"{query.after}\x01" if query.after else ""
            for conversation_id, _lock in tables.locks.range(start):
                if len(found) == query.limit:
                    return LockPage(locks=found, next=found[-1].conversation_id)
                found.append(_view(conversation_id, tables))
            return LockPage(locks=found, next=None)
        case _:
            raise TypeError(query)


def announce(event: Any) -> Iterable[Announcement]:
    """Return what subscribers are told of an event: `conversation.<id>.locked` and so on."""
    match event:
        case LockGranted():
            what = "lock_transferred" if event.ticket else "locked"
            message = {"request_id": event.request_id, "epoch": event.epoch, "holder": event.holder}
            return (_told(event.conversation_id, what, event.holder, **message),)
        case LockQueued():
            request = {"request_id": event.request_id}
            return (_told(event.conversation_id, "queued", event.agent_id, **request),)
        case LockFreed():
            what = "lock_expired" if event.reason == "expired" else "unlocked"
            request = {"request_id": event.request_id}
            return (_told(event.conversation_id, what, event.holder, **request),)
        case ForkDetected():
            fork = {"request_id": event.request_id, "child_conversation": event.child}
            return (_told(event.parent, "forked", event.by, **fork),)
        case _:
            return ()


def tick(tables: LockTables, given: Given) -> Decision:
    """Return which locks have expired by now, and who has them next."""
    events: list[Event] = []
    epoch = _count(tables, "epoch")
    for taken, ((_ms_due, conversation_id), _) in enumerate(
        tables.due.range(stop=(whole_ms(given.time_s) + 1,))
    ):
        if taken == TICK_LOCKS_MAX:
            break
        lock = tables.locks.get(conversation_id)
        assert lock is not None
        if lock.has_expired:
            events.append(LockForgotten(conversation_id))
            continue
        events.append(_free(conversation_id, lock, "expired", given))
        for granted in _next(conversation_id, tables, epoch + 1, given):
            epoch += 1
            events.append(granted)
    return Decision(tuple(events))


def _acquire(command: AcquireLock, sender: Sender, tables: LockTables, given: Given) -> Decision:
    conversation_id, request_id = command.conversation_id, command.request_id
    if len(msgspec.json.encode(command.metadata)) > METADATA_BYTES_MAX:
        raise Quota(f"metadata is over {METADATA_BYTES_MAX} bytes", limit_bytes=METADATA_BYTES_MAX)
    held = tables.requests.get((sender.name, request_id))
    lock = _live(tables, conversation_id)
    if held is not None and held.conversation_id != conversation_id:
        raise Conflict(
            f"request {request_id} has conversation {held.conversation_id}, or waits for it",
            hint="release it first, or give this one an id of its own",
        )
    if held is not None and lock is not None:
        renewed = LockRenewed(conversation_id, command.ttl_s, given.time_s)
        events = () if held.ticket else (renewed,)
        return Decision(events, _acquired(command, lock, _position(held, tables), tables))
    if lock is None:
        if tables.locks.count() >= LOCKS_MAX:
            raise Busy(f"{LOCKS_MAX} conversations are locked", limit=LOCKS_MAX)
        granted = LockGranted(
            conversation_id,
            sender.name,
            request_id,
            _count(tables, "epoch") + 1,
            command.ttl_s,
            command.metadata,
            0,
            given.now,
            given.time_s,
        )
        return Decision((granted,), _acquired(command, granted, None, tables))
    waiting = sum(1 for _ in tables.waiting.range(prefix=(conversation_id,)))
    if not command.queue or waiting >= LOCK_QUEUE_MAX:
        why = f"is locked by {lock.holder}, request {lock.request_id}"
        if command.queue:
            why = f"has {waiting} requests waiting"
        raise Conflict(f"conversation {conversation_id} {why}", owner=lock.holder, epoch=lock.epoch)
    ticket = _count(tables, "ticket") + 1
    queued = LockQueued(
        conversation_id,
        sender.name,
        request_id,
        ticket,
        command.ttl_s,
        command.metadata,
        given.now,
    )
    return Decision((queued,), _acquired(command, lock, waiting + 1, tables))


def _acquired(
    command: AcquireLock, lock: Lock | LockGranted, position: int | None, tables: LockTables
) -> Acquired:
    return Acquired(
        acquired=position is None,
        state="locked" if position is None else "queued",
        conversation_id=command.conversation_id,
        request_id=command.request_id,
        holder=lock.holder,
        holder_request=lock.request_id,
        epoch=lock.epoch if position is None else None,
        position=position,
        fork_warning=_warning(command.conversation_id, tables),
    )


def _release(command: ReleaseLock, sender: Sender, tables: LockTables, given: Given) -> Decision:
    if command.agent_id not in (None, sender.name) and sender.role != "operator":
        raise Forbidden("only an operator releases the lock of another agent")
    agent_id, request_id = command.agent_id or sender.name, command.request_id
    held = tables.requests.get((agent_id, request_id))
    if held is None:
        if command.epoch is not None:
            raise StaleEpoch(f"request {request_id} of {agent_id} has no lock any more")
        text = f"request {request_id} of {agent_id} holds no lock and waits for none"
        raise NotFound(text, hint="ksi read conversation:locks")
    conversation_id = held.conversation_id
    if held.ticket:
        left = LockLeft(conversation_id, agent_id, request_id, held.ticket)
        reply = Released(
            released=False, conversation_id=conversation_id, next_holder=None, next_request=None
        )
        return Decision((left,), reply)
    lock = tables.locks.get(conversation_id)
    assert lock is not None
    _require_epoch(conversation_id, lock, command.epoch)
    events = _pass_on(conversation_id, lock, "released", tables, given)
    granted = events[-1] if isinstance(events[-1], LockGranted) else None
    reply = Released(
        released=True,
        conversation_id=conversation_id,
        next_holder=granted.holder if granted else None,
        next_request=granted.request_id if granted else None,
    )
    return Decision(events, reply)


def _renew(command: RenewLock, sender: Sender, tables: LockTables, given: Given) -> Decision:
    lock = _require_holder(
        command.conversation_id, command.request_id, command.epoch, sender, tables
    )
    renewed = LockRenewed(command.conversation_id, lock.ttl_s, given.time_s)
    reply = Renewed(conversation_id=command.conversation_id, epoch=lock.epoch, ttl_s=lock.ttl_s)
    return Decision((renewed,), reply)


def _fork(command: DetectFork, sender: Sender, tables: LockTables, given: Given) -> Decision:
    parent, child = command.expected_conversation_id, command.actual_conversation_id
    if parent == child:
        raise Conflict(f"conversation {parent} cannot be a fork of itself")
    lock = _require_holder(parent, command.request_id, command.epoch, sender, tables)
    if tables.forks.count() >= FORKS_MAX:
        raise Quota(f"{FORKS_MAX} forks are on record", limit=FORKS_MAX)
    fork = ForkDetected(parent, child, sender.name, command.request_id, given.now)
    freed = _pass_on(parent, lock, "forked", tables, given)
    granted: tuple[LockGranted, ...] = ()
    if _live(tables, child) is None:
        epoch = _count(tables, "epoch") + len(freed)  # One of them is no grant.
        granted = (
            LockGranted(
                child,
                sender.name,
                command.request_id,
                epoch,
                lock.ttl_s,
                lock.metadata,
                0,
                given.now,
                given.time_s,
            ),
        )
    known = [other for (_, other), _ in tables.forks.range(prefix=(parent,))]
    reply = Forked(
        fork_detected=True,
        parent_conversation=parent,
        child_conversation=child,
        total_forks=len({*known, child}),
        epoch=granted[0].epoch if granted else None,
    )
    return Decision((fork, *freed, *granted), reply)


def _pass_on(
    conversation_id: str, lock: Lock, reason: Freed, tables: LockTables, given: Given
) -> tuple[Event, ...]:
    """Return what happens when a lock is freed: who waits first has it."""
    epoch = _count(tables, "epoch") + 1
    freed = _free(conversation_id, lock, reason, given)
    return (freed, *_next(conversation_id, tables, epoch, given))


def _free(conversation_id: str, lock: Lock, reason: Freed, given: Given) -> LockFreed:
    return LockFreed(conversation_id, lock.holder, lock.request_id, reason, given.time_s)


def _next(
    conversation_id: str, tables: LockTables, epoch: int, given: Given
) -> Iterator[LockGranted]:
    for (_, ticket), waiter in tables.waiting.range(prefix=(conversation_id,)):
        yield LockGranted(
            conversation_id,
            waiter.agent_id,
            waiter.request_id,
            epoch,
            waiter.ttl_s,
            waiter.metadata,
            ticket,
            given.now,
            given.time_s,
        )
        return


def _require_holder(
    conversation_id: str, request_id: str, epoch: int | None, sender: Sender, tables: LockTables
) -> Lock:
    lock = tables.locks.get(conversation_id)
    if lock is None:
        text = f"conversation {conversation_id} is not locked"
        raise NotFound(text, hint="ksi read conversation:locks")
    _require_epoch(conversation_id, lock, epoch)
    if (lock.holder, lock.request_id) != (sender.name, request_id):
        raise NotOwner(
            f"conversation {conversation_id} is locked by {lock.holder}, request {lock.request_id}",
            owner=lock.holder,
            epoch=lock.epoch,
        )
    if lock.has_expired:
        raise _stale(conversation_id, lock)
    return lock


def _require_epoch(conversation_id: str, lock: Lock, epoch: int | None) -> None:
    if epoch is not None and epoch != lock.epoch:
        raise _stale(conversation_id, lock)


def _stale(conversation_id: str, lock: Lock) -> StaleEpoch:
    how = "has expired" if lock.has_expired else f"is that of {lock.holder} now"
    return StaleEpoch(
        f"the lock on conversation {conversation_id} {how}, epoch {lock.epoch}",
        hint="acquire it again",
        owner=lock.holder,
        epoch=lock.epoch,
    )


def _granted(event: LockGranted, tables: LockTables) -> None:
    lock = Lock(
        event.holder,
        event.request_id,
        event.epoch,
        event.ttl_s,
        whole_ms(event.time_s + event.ttl_s),
        event.now,
        False,
        event.metadata,
    )
    conversation_id = event.conversation_id
    _put(conversation_id, tables.locks.get(conversation_id), lock, tables)
    tables.requests.put((event.holder, event.request_id), Held(conversation_id, 0))
    tables.counters.put("epoch", Count(event.epoch))
    if event.ticket:
        tables.waiting.delete((conversation_id, event.ticket))


def _freed(event: LockFreed, tables: LockTables) -> None:
    lock = tables.locks.get(event.conversation_id)
    assert lock is not None
    tables.requests.delete((event.holder, event.request_id))
    expired = None
    if event.reason == "expired":
        forgotten_ms = whole_ms(event.time_s + LOCK_EXPIRED_S)
        expired = msgspec.structs.replace(lock, has_expired=True, expires_ms=forgotten_ms)
    _put(event.conversation_id, lock, expired, tables)


def _put(conversation_id: str, former: Lock | None, lock: Lock | None, tables: LockTables) -> None:
    """Put a lock, or remove it, and what says when it is over."""
    if former is not None:
        tables.due.delete((former.expires_ms, conversation_id))
    if lock is None:
        tables.locks.delete(conversation_id)
    else:
        tables.locks.put(conversation_id, lock)
        tables.due.put((lock.expires_ms, conversation_id), b"")


def _live(tables: LockTables, conversation_id: str) -> Lock | None:
    lock = tables.locks.get(conversation_id)
    return None if lock is None or lock.has_expired else lock


def _position(held: Held, tables: LockTables) -> int | None:
    if not held.ticket:
        return None
    key = held.conversation_id
    return sum(1 for _ in tables.waiting.range((key,), (key, held.ticket + 1), prefix=(key,)))


def _warning(conversation_id: str, tables: LockTables) -> str | None:
    parent = tables.parents.get(conversation_id)
    children = _children(conversation_id, tables)
    if parent is not None:
        return f"conversation {conversation_id} is a fork of {parent.conversation_id}"
    if children:
        return f"conversation {conversation_id} has forked: {', '.join(children[:SHOWN_MAX])}"
    return None


def _children(conversation_id: str, tables: LockTables) -> list[str]:
    found: list[str] = []
    for (_, child), _fork in tables.forks.range(prefix=(conversation_id,)):
        if len(found) == CHILDREN_SHOWN_MAX:
            break
        found.append(child)
    return found


def _view(conversation_id: str, tables: LockTables) -> LockView:
    lock = tables.locks.get(conversation_id)
    parent = tables.parents.get(conversation_id)
    children = _children(conversation_id, tables)
    forks = LockView(
        conversation_id=conversation_id,
        locked=False,
        state="unlocked" if parent is None and not children else "forked",
        parent_conversation=parent.conversation_id if parent else None,
        child_conversations=children,
    )
    if lock is None:
        return forks
    waiting = [
        [waiter.agent_id, waiter.request_id]
        for _, waiter in tables.waiting.range(prefix=(conversation_id,))
    ]
    return msgspec.structs.replace(
        forks,
        locked=not lock.has_expired,
        state="expired" if lock.has_expired else "locked",
        holder=lock.holder,
        holder_request=lock.request_id,
        epoch=lock.epoch,
        acquired_at=lock.at,
        ttl_s=lock.ttl_s,
        queue_length=len(waiting),
        queue=waiting[:SHOWN_MAX],
        metadata=lock.metadata,
    )


def _count(tables: LockTables, name: str) -> int:
    row = tables.counters.get(name)
    return 0 if row is None else row.value


def _told(conversation_id: str, what: str, sender: str, **message: Any) -> Announcement:
    topic = f"conversation.{conversation_id}.{what}"
    return Announcement(topic, {"conversation_id": conversation_id, **message}, sender)
