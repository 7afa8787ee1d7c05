"""The owner `queues` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/queues.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from ksi.actors.declarations.registry import Word
from ksi.actors.declarations.state import Cursor, Limit, Revision
from ksi.actors.owner import Command, Event, Query, Reply
from ksi.transport.errors import Invalid, Quota, TooLarge
from ksi.transport.message import Id, operation

TTL_S_MAX: Final = 365 * 86_400.0  # Whoever means for ever says null.
TtlSeconds = Annotated[float, msgspec.Meta(ge=0.0, le=TTL_S_MAX)]


class Queued(Reply, frozen=True, kw_only=True):
    """It is in the queue, which now has `size` items. `expires_at` is a time on the wall."""

    namespace: str
    key: str
    number: int
    size: int
    expires_at: float | None


class QueueItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of a queue."""

    number: int
    data: Any
    pushed_at: float
    pushed_by: str


class Popped(Reply, frozen=True, kw_only=True):
    """These were taken out, in order, and nobody else gets them. `size` items are left."""

    items: list[QueueItem]
    size: int


class QueueView(Reply, frozen=True, kw_only=True):
    """What is in a queue, left there; `next` is the `after` of the next page, None at the end."""

    namespace: str
    key: str
    items: list[QueueItem]
    size: int
    bytes: int
    next: int | None


class QueueSize(Reply, frozen=True, kw_only=True):
    """How many items of a queue this has concerned."""

    namespace: str
    key: str
    items: int


class QueueSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One queue that is not empty."""

    namespace: str
    key: str
    size: int
    bytes: int


class QueuePage(Reply, frozen=True, kw_only=True):
    """Queues by name; `next` continues, None at the end."""

    queues: list[QueueSummary]
    next: str | None


@operation(
    "async_state:push",
    owner="state",
    refuses=(Quota, TooLarge),
    example={"namespace": "jobs", "key": "todo", "data": {"n": 1}},
)
class Push(Command[Queued], frozen=True, kw_only=True):
    """Put something at the end of a queue, for as long as `ttl_seconds`; null: for ever."""

    namespace: Word
    key: Word
    data: Any
    ttl_seconds: TtlSeconds | None = 3600.0
    request_id: Id | None = None


@operation("async_state:pop", owner="state", example={"namespace": "jobs", "key": "todo"})
class Pop(Command[Popped], frozen=True, kw_only=True):
    """Take out what is first in a queue, up to `count` items; none if it is empty."""

    namespace: Word
    key: Word
    count: Limit = 1
    request_id: Id | None = None


@operation("async_state:delete", owner="state", example={"namespace": "jobs", "key": "todo"})
class DeleteQueue(Command[QueueSize], frozen=True, kw_only=True):
    """Drop all that is in a queue."""

    namespace: Word
    key: Word
    request_id: Id | None = None


@operation(
    "async_state:expire_queue",
    owner="state",
    example={"namespace": "jobs", "key": "todo", "ttl_seconds": 60},
)
class ExpireQueue(Command[QueueSize], frozen=True, kw_only=True):
    """Let all that is in a queue now stay for so long from now; null: for ever."""

    namespace: Word
    key: Word
    ttl_seconds: TtlSeconds | None = 3600.0
    request_id: Id | None = None


@operation("async_state:get_queue", owner="state", example={"namespace": "jobs", "key": "todo"})
class GetQueue(Query[QueueView], frozen=True, kw_only=True):
    """Return what is in a queue, and leave it there."""

    namespace: Word
    key: Word
    limit: Limit = 100
    after: Revision = 0


@operation("async_state:list_queues", owner="state", refuses=(Invalid,), example={})
class ListQueues(Query[QueuePage], frozen=True, kw_only=True):
    """List the queues that are not empty."""

    namespace: Word | None = None
    limit: Limit = 100
    after: Cursor | None = None


class ItemPushed(Event, frozen=True, array_like=True, tag="pushed"):
    namespace: str
    key: str
    number: int
    body: bytes
    deadline_s: float | None
    now: float
    by: str


class ItemsTaken(Event, frozen=True, array_like=True, tag="taken"):
    namespace: str
    key: str
    numbers: list[int]
    lapsed: bool


class QueueDeleted(Event, frozen=True, array_like=True, tag="emptied"):
    namespace: str
    key: str


class QueueTimed(Event, frozen=True, array_like=True, tag="timed"):
    namespace: str
    key: str
    deadline_s: float | None


class Queue(msgspec.Struct, frozen=True, array_like=True):
    last: int  # the highest number
    size: int
    size_bytes: int


class Item(msgspec.Struct, frozen=True, array_like=True):
    body: bytes
    deadline_s: float | None
    at: float
    by: str
