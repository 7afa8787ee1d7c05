"""`locks`, a part of `library`, in its forms: messages, events, tables.

What it does: `actors/owners/locks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import (
    Command,
    Event,
    Query,
    Reply,
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
    LOCK_S,
)
from ksi.transport.message import Id, Plain, operation

PAGE_MAX: Final = 500  # Locks of one page, with their queues and metadata.
Epoch = Annotated[int, msgspec.Meta(ge=1)]
LockSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400.0)]
State = Literal["unlocked", "locked", "queued", "forked", "expired"]
Freed = Literal["released", "expired", "forked"]


class Acquired(Reply, frozen=True, kw_only=True):
    """Whether the conversation is locked for the request now, or where it waits.

    Attributes:
        epoch: of the lock, if it was acquired: to be said with what is done under it.
        holder, holder_request: whose it is.
        position: in the queue, from 1.
        fork_warning: what is known of forks of this conversation.
    """

    acquired: bool
    state: State
    conversation_id: str
    request_id: str
    holder: str
    holder_request: str
    epoch: int | None
    position: int | None
    fork_warning: str | None


class Released(Reply, frozen=True, kw_only=True):
    """The lock is released, or the request does not wait any more; who has it next, if anybody."""

    released: bool
    conversation_id: str
    next_holder: str | None
    next_request: str | None


class Renewed(Reply, frozen=True, kw_only=True):
    """The lock holds for `ttl_s` from now on."""

    conversation_id: str
    epoch: int
    ttl_s: float


class Forked(Reply, frozen=True, kw_only=True):
    """The fork is on record. `epoch`: of the lock on the child, if it could be given."""

    fork_detected: bool
    parent_conversation: str
    child_conversation: str
    total_forks: int
    epoch: int | None


class LockView(Reply, frozen=True, kw_only=True):
    """Whether a conversation is locked, for whom, who waits, and what is known of forks.

    `state` is forked where it is not locked and has forked, or is a fork. `queue` names the first
    of those who wait, as agent and request.
    """

    conversation_id: str
    locked: bool
    state: State
    holder: str | None = None
    holder_request: str | None = None
    epoch: int | None = None
    acquired_at: float | None = None
    ttl_s: float | None = None
    queue_length: int = 0
    queue: list[list[str]] = []
    parent_conversation: str | None = None
    child_conversations: list[str] = []
    metadata: dict[str, Any] = {}


class LockPage(Reply, frozen=True, kw_only=True):
    """Locks in the order of their conversations; `next` is the `after` of the next page."""

    locks: list[LockView]
    next: str | None


@operation(
    "conversation:acquire_lock",
    owner="library",
    refuses=(Conflict, Busy, Quota),
    example={"conversation_id": "conv_1", "request_id": "req_1", "ttl_s": 60.0},
)
class AcquireLock(Command[Acquired], frozen=True, kw_only=True):
    """Lock a conversation for a request of the sender, or wait for it in the queue.

    It expires after `ttl_s` in owner time unless it is renewed. Said again, it says how it is now,
    and renews the lock. Without `queue`, who cannot have it at once is refused.
    """

    conversation_id: Id
    request_id: Id
    ttl_s: LockSeconds = LOCK_S
    queue: bool = True
    metadata: Plain = {}


@operation(
    "conversation:release_lock",
    owner="library",
    refuses=(NotFound, StaleEpoch, Forbidden),
    example={"request_id": "req_1"},
)
class ReleaseLock(Command[Released], frozen=True, kw_only=True):
    """Release the lock of a request, or leave its place in the queue. The next one gets it at once.

    An operator may do so for the request of another agent.
    """

    request_id: Id
    epoch: Epoch | None = None
    agent_id: Id | None = None


@operation(
    "conversation:renew_lock",
    owner="library",
    refuses=(NotFound, NotOwner, StaleEpoch),
    example={"conversation_id": "conv_1", "request_id": "req_1", "epoch": 1},
)
class RenewLock(Command[Renewed], frozen=True, kw_only=True):
    """Have the lock of a request last longer: as long as it was to last, from now."""

    conversation_id: Id
    request_id: Id
    epoch: Epoch | None = None


@operation(
    "conversation:fork_detected",
    owner="library",
    refuses=(NotFound, NotOwner, StaleEpoch, Conflict, Quota),
    example={
        "request_id": "req_1",
        "expected_conversation_id": "conv_1",
        "actual_conversation_id": "conv_2",
    },
)
class DetectFork(Command[Forked], frozen=True, kw_only=True):
    """Say that a request that was to go on with one conversation went on with another.

    Only who holds the lock may. The lock on the expected one goes to the next, with a warning; the
    request gets the lock on the other one, if nobody has it.
    """

    request_id: Id
    expected_conversation_id: Id
    actual_conversation_id: Id
    epoch: Epoch | None = None


@operation("conversation:lock_status", owner="library", example={"conversation_id": "conv_1"})
class GetLock(Query[LockView], frozen=True, kw_only=True):
    """Return whether a conversation is locked, for whom, who waits, and what is known of forks."""

    conversation_id: Id


@operation("conversation:locks", owner="library", example={"limit": 10})
class ListLocks(Query[LockPage], frozen=True, kw_only=True):
    """List the conversations that are locked, or whose lock has expired."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 100
    after: Id | None = None


class LockGranted(Event, frozen=True, array_like=True, tag="granted"):
    conversation_id: str
    holder: str
    request_id: str
    epoch: int
    ttl_s: float
    metadata: dict[str, Any]
    ticket: int  # in the queue; 0: it did not wait
    now: float
    time_s: float


class LockQueued(Event, frozen=True, array_like=True, tag="queued"):
    conversation_id: str
    agent_id: str
    request_id: str
    ticket: int
    ttl_s: float
    metadata: dict[str, Any]
    now: float


class LockLeft(Event, frozen=True, array_like=True, tag="left"):
    conversation_id: str
    agent_id: str
    request_id: str
    ticket: int


class LockRenewed(Event, frozen=True, array_like=True, tag="renewed"):
    conversation_id: str
    ttl_s: float
    time_s: float


class LockFreed(Event, frozen=True, array_like=True, tag="freed"):
    conversation_id: str
    holder: str
    request_id: str
    reason: Freed
    time_s: float


class LockForgotten(Event, frozen=True, array_like=True, tag="forgotten"):
    conversation_id: str


class ForkDetected(Event, frozen=True, array_like=True, tag="forked"):
    parent: str
    child: str
    by: str
    request_id: str
    now: float


class Lock(msgspec.Struct, frozen=True, array_like=True):
    """The lock on a conversation. `expires_ms` of owner time: when it expires; or, where it has
    expired, when that is forgotten."""

    holder: str
    request_id: str
    epoch: int
    ttl_s: float
    expires_ms: int
    at: float
    has_expired: bool
    metadata: dict[str, Any]


class Waiter(msgspec.Struct, frozen=True, array_like=True):
    agent_id: str
    request_id: str
    ttl_s: float
    metadata: dict[str, Any]
    at: float


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What a request has: the lock (ticket 0), or a place in the queue."""

    conversation_id: str
    ticket: int


class ForkRow(msgspec.Struct, frozen=True, array_like=True):
    by: str
    request_id: str
    at: float


class Parent(msgspec.Struct, frozen=True, array_like=True):
    conversation_id: str


class Count(msgspec.Struct, frozen=True, array_like=True):
    value: int
