"""Queues: what agents hand over to whoever takes it first.

Owns the items that wait in queues, each under a namespace and a key.

- What is in a queue is handed out once, in order, until its time runs out, which is owner time.
- A queue is there as long as something is in it, and then leaves nothing behind.
- Items are counted, in each queue and in all.

These are operations of the owner `state` (`state.py`).

Source: the operations `async_state:*` of KSI, which lost concurrent pushes.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final, Protocol

import msgspec

from ksi.actors.declarations.queues import (
    DeleteQueue,
    ExpireQueue,
    GetQueue,
    Item,
    ItemPushed,
    ItemsTaken,
    ListQueues,
    Pop,
    Popped,
    Push,
    Queue,
    Queued,
    QueueDeleted,
    QueueItem,
    QueuePage,
    QueueSize,
    QueueSummary,
    QueueTimed,
    QueueView,
)
from ksi.actors.declarations.state import Totals
from ksi.actors.owner import Decision, Event, Given, Reply, Sender, Table
from ksi.actors.queries import beyond, cursor_of, place_of
from ksi.transport.errors import Quota, TooLarge
from ksi.transport.limits import FRAME_BYTES_MAX
from ksi.transport.message import encode
from ksi.transport.moments import whole_ms

QUEUE_ITEMS_MAX: Final = 10_000  # Items of one queue: deleting it is one decision.
QUEUED_MAX: Final = 1_000_000  # Items of all queues.
QUEUED_BYTES_MAX: Final = 1 << 30  # The same, for large ones.
LAPSED_MAX: Final = 1000  # Items dropped in one decision because their time ran out.
ITEM_BYTES_MAX: Final = 256 << 10  # Of one item: some of them fit into a frame.
PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX // 2  # Of items in one reply.

_decode: Final = msgspec.msgpack.Decoder().decode


class QueueTables(Protocol):
    """The tables of the owner `state` that queues are in."""

    queues: Table[Queue]
    items: Table[Item]
    deadlines: Table[bytes]
    totals: Table[Totals]


def decide(command: Any, sender: Sender, tables: QueueTables, given: Given) -> Decision:
    """Return what happens if a command is carried out, or raise a refusal."""
    match command:
        case Push():
            return _push(command, sender, tables, given)
        case Pop():
            return _pop(command, tables, given)
        case DeleteQueue():
            return _delete_queue(command, tables)
        case ExpireQueue():
            return _expire_queue(command, tables, given)
        case _:
            raise TypeError(command)


def tick(tables: QueueTables, given: Given) -> Decision:
    """Drop items whose time has run out: a bounded number, and at once more if there are."""
    due = tables.deadlines.range(stop=(whole_ms(given.time_s),))
    lapsed: dict[tuple[str, str], list[int]] = {}
    count = 0
    for (_, namespace, key, number), _ in islice(due, LAPSED_MAX):
        lapsed.setdefault((namespace, key), []).append(number)
        count += 1
    events = tuple(ItemsTaken(*queue, numbers, lapsed=True) for queue, numbers in lapsed.items())
    return Decision(events, tick=count == LAPSED_MAX)


def apply(event: Any, tables: QueueTables) -> None:
    """Write what an event says."""
    match event:
        case ItemPushed():
            _item_pushed(event, tables)
        case ItemsTaken():
            _items_taken(event.namespace, event.key, event.numbers, tables)
        case QueueDeleted():
            key = (event.namespace, event.key)
            numbers = [number for (_, _, number), _ in tables.items.range(prefix=key)]
            _items_taken(*key, numbers, tables)
        case QueueTimed():
            _queue_timed(event, tables)
        case _:
            raise TypeError(event)


def answer(query: Any, tables: QueueTables) -> Reply:
    """Return the reply to a query."""
    match query:
        case GetQueue():
            return _get_queue(query, tables)
        case ListQueues():
            return _list_queues(query, tables)
        case _:
            raise TypeError(query)


def totals_of(tables: QueueTables) -> Totals:
    """Return how much there is in all: of what the owner counts, and of what is in queues."""
    return tables.totals.get("all") or Totals()


def _push(command: Push, sender: Sender, tables: QueueTables, given: Given) -> Decision:
    namespace, key, ttl_s = command.namespace, command.key, command.ttl_seconds
    body = encode(command.data)
    if len(body) > ITEM_BYTES_MAX:
        raise TooLarge(
            f"{len(body)} bytes are over the limit of {ITEM_BYTES_MAX} - at `$.data`",
            size_bytes=len(body),
            limit_bytes=ITEM_BYTES_MAX,
        )
    queue, totals = _queue(namespace, key, tables), totals_of(tables)
    if queue.size >= QUEUE_ITEMS_MAX:
        raise Quota(f"{namespace}:{key} has {QUEUE_ITEMS_MAX} items", limit=QUEUE_ITEMS_MAX)
    if totals.items >= QUEUED_MAX or totals.item_bytes + len(body) > QUEUED_BYTES_MAX:
        raise Quota(f"all queues have {totals.items} items", limit=QUEUED_MAX)
    deadline_s = None if ttl_s is None else given.time_s + ttl_s
    number = queue.last + 1
    pushed = ItemPushed(namespace, key, number, body, deadline_s, given.now, sender.name)
    reply = Queued(
        namespace=namespace,
        key=key,
        number=number,
        size=queue.size + 1,
        expires_at=None if ttl_s is None else given.now + ttl_s,
    )
    return Decision((pushed,), reply)


def _pop(command: Pop, tables: QueueTables, given: Given) -> Decision:
    namespace, key = command.namespace, command.key
    items: list[QueueItem] = []
    lapsed: list[int] = []
    room = PAGE_BYTES_MAX
    for (_, _, number), item in tables.items.range(prefix=(namespace, key)):
        if item.deadline_s is not None and item.deadline_s <= given.time_s:
            lapsed.append(number)
            continue
        room -= len(item.body)
        if len(items) == command.count or (room < 0 and items):
            break
        items.append(_item_view(number, item))
    events: list[Event] = []
    if lapsed:
        events.append(ItemsTaken(namespace, key, lapsed, lapsed=True))
    if items:
        taken = [item.number for item in items]
        events.append(ItemsTaken(namespace, key, taken, lapsed=False))
    left = _queue(namespace, key, tables).size - len(lapsed) - len(items)
    return Decision(tuple(events), Popped(items=items, size=left))


def _delete_queue(command: DeleteQueue, tables: QueueTables) -> Decision:
    size = _queue(command.namespace, command.key, tables).size
    events = (QueueDeleted(command.namespace, command.key),) if size else ()
    return Decision(events, QueueSize(namespace=command.namespace, key=command.key, items=size))


def _expire_queue(command: ExpireQueue, tables: QueueTables, given: Given) -> Decision:
    size = _queue(command.namespace, command.key, tables).size
    ttl_s = command.ttl_seconds
    deadline_s = None if ttl_s is None else given.time_s + ttl_s
    events = (QueueTimed(command.namespace, command.key, deadline_s),) if size else ()
    return Decision(events, QueueSize(namespace=command.namespace, key=command.key, items=size))


def _item_pushed(event: ItemPushed, tables: QueueTables) -> None:
    namespace, key, number = event.namespace, event.key, event.number
    tables.items.put(
        (namespace, key, number), Item(event.body, event.deadline_s, event.now, event.by)
    )
    _set_deadline(namespace, key, number, event.deadline_s, tables)
    _queue_changed(namespace, key, number, 1, len(event.body), tables)


def _items_taken(namespace: str, key: str, numbers: list[int], tables: QueueTables) -> None:
    size_bytes = 0
    for number in numbers:
        item = tables.items.get((namespace, key, number))
        assert item is not None
        size_bytes += len(item.body)
        tables.items.delete((namespace, key, number))
        _drop_deadline(namespace, key, number, item.deadline_s, tables)
    _queue_changed(namespace, key, 0, -len(numbers), -size_bytes, tables)


def _queue_timed(event: QueueTimed, tables: QueueTables) -> None:
    namespace, key = event.namespace, event.key
    for (_, _, number), item in list(tables.items.range(prefix=(namespace, key))):
        _drop_deadline(namespace, key, number, item.deadline_s, tables)
        changed = msgspec.structs.replace(item, deadline_s=event.deadline_s)
        tables.items.put((namespace, key, number), changed)
        _set_deadline(namespace, key, number, event.deadline_s, tables)


def _queue_changed(
    namespace: str, key: str, last: int, size: int, size_bytes: int, tables: QueueTables
) -> None:
    """Count items of a queue in or out; a queue that is empty leaves nothing behind."""
    queue = _queue(namespace, key, tables)
    changed = Queue(max(last, queue.last), queue.size + size, queue.size_bytes + size_bytes)
    if changed.size:
        tables.queues.put((namespace, key), changed)
    else:
        tables.queues.delete((namespace, key))
    was = totals_of(tables)
    tables.totals.put(
        "all",
        msgspec.structs.replace(
            was, items=was.items + size, item_bytes=was.item_bytes + size_bytes
        ),
    )


def _set_deadline(
    namespace: str, key: str, number: int, deadline_s: float | None, tables: QueueTables
) -> None:
    if deadline_s is not None:
        tables.deadlines.put((whole_ms(deadline_s), namespace, key, number), b"")


def _drop_deadline(
    namespace: str, key: str, number: int, deadline_s: float | None, tables: QueueTables
) -> None:
    if deadline_s is not None:
        tables.deadlines.delete((whole_ms(deadline_s), namespace, key, number))


def _queue(namespace: str, key: str, tables: QueueTables) -> Queue:
    return tables.queues.get((namespace, key)) or Queue(0, 0, 0)


def _get_queue(query: GetQueue, tables: QueueTables) -> QueueView:
    prefix = (query.namespace, query.key)
    items: list[QueueItem] = []
    room, following = PAGE_BYTES_MAX, None
    for (_, _, number), item in tables.items.range((*prefix, query.after + 1), prefix=prefix):
        room -= len(item.body)
        if len(items) == query.limit or (room < 0 and items):
            following = items[-1].number
            break
        items.append(_item_view(number, item))
    queue = _queue(*prefix, tables)
    return QueueView(
        namespace=query.namespace,
        key=query.key,
        items=items,
        size=queue.size,
        bytes=queue.size_bytes,
        next=following,
    )


def _item_view(number: int, item: Item) -> QueueItem:
    return QueueItem(number=number, data=_decode(item.body), pushed_at=item.at, pushed_by=item.by)


def _list_queues(query: ListQueues, tables: QueueTables) -> QueuePage:
    prefix = () if query.namespace is None else (query.namespace,)
    last = () if query.after is None else place_of(query.after, "queues", str, str)
    found: list[QueueSummary] = []
    for (namespace, key), queue in tables.queues.range(beyond(last), prefix=prefix):
        if len(found) == query.limit:
            place = (found[-1].namespace, found[-1].key)
            return QueuePage(queues=found, next=cursor_of(place, "queues"))
        found.append(
            QueueSummary(namespace=namespace, key=key, size=queue.size, bytes=queue.size_bytes)
        )
    return QueuePage(queues=found, next=None)
