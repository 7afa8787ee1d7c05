"""The owner `bus` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/bus.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from ksi.actors.declarations.registry import (
    Capabilities,
    Status,
    Word,
)
from ksi.actors.owner import (
    Command,
    Event,
    Keyed,
    Query,
    Reply,
    Table,
    Tables,
)
from ksi.transport.errors import Conflict, Forbidden, Invalid, NotFound, Quota
from ksi.transport.limits import PATTERN_CHARS_MAX
from ksi.transport.message import ANYONE, Id, Plain, Signal, operation

ACKNOWLEDGED_MAX: Final = 1000  # Messages one `message:ack` settles.
PAGE_MESSAGES_MAX: Final = 256  # Messages in one reply.
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=PATTERN_CHARS_MAX)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # One more is a key still.
Cursor = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._/-]{0,300}$(?!\n)")]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_MESSAGES_MAX)]


class Published(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """The message is accepted. Where it is kept, it has a number and is on disk."""

    message_id: int | None = None
    kept_for: int = 0


class Sent(Reply, frozen=True, kw_only=True):
    """The message is on disk, in the inbox of `to_agent`. An answer names `message_id`."""

    message_id: int
    to_agent: str


class SentToMany(Reply, frozen=True, kw_only=True):
    """The message is on disk, in the inboxes of `agents`; of `skipped` it says why not."""

    message_id: int | None
    agents: list[str]
    skipped: dict[str, str]


class DurableView(Reply, frozen=True, kw_only=True):
    """One durable subscription: `waiting` messages up to `message_id` are not acknowledged."""

    agent_id: str
    durable: str
    pattern: str
    created_at: float
    waiting: int
    waiting_bytes: int
    handed: int


class Durables(Reply, frozen=True, kw_only=True):
    """Durable subscriptions by agent and name; `next` continues, None at the end."""

    subscriptions: list[DurableView]
    next: str | None


class Handed(Reply, frozen=True, kw_only=True):
    """Messages up to `redelivered` were handed out before."""

    redelivered: int


class KeptMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message that waits."""

    message_id: int
    topic: str
    sender: str
    message: dict[str, Any]
    sent_at: float
    in_reply_to: int | None


class Waiting(Reply, frozen=True, kw_only=True):
    """Messages in order; `next` is the `after` of the next page, None at the end."""

    messages: list[KeptMessage]
    next: int | None


class Stats(Reply, frozen=True, kw_only=True):
    """How much is kept: `messages` wait in `waiting` places; `message_id` is the last number."""

    subscriptions: int
    messages: int
    waiting: int
    message_id: int


@operation(
    "message:publish",
    owner="bus",
    refuses=(Invalid, Quota),
    example={"topic": "news.today", "message": {"n": 1}},
)
class Publish(Signal[Published], frozen=True, kw_only=True):
    """Say something to whoever subscribes to its topic: words between dots.

    Subscribers hear the messages of one sender in their order. Where a durable subscription wants
    the topic, the message is on disk when the reply comes.
    """

    topic: str
    message: Plain


@operation(
    "message:subscribe",
    owner="bus",
    refuses=(Invalid, Conflict, Quota),
    example={"durable": "reader", "pattern": "news.>"},
)
class Subscribe(Command[DurableView], frozen=True, kw_only=True):
    """Let messages under `pattern` be kept for the sender, under a name, until acknowledged.

    The name `inbox` with the pattern `inbox` is what others send to this agent.
    """

    durable: Id
    pattern: Pattern


@operation(
    "message:unsubscribe",
    owner="bus",
    refuses=(NotFound, Forbidden),
    example={"durable": "reader"},
)
class Unsubscribe(Command[None], frozen=True, kw_only=True):
    """End a durable subscription and drop what waits in it; an operator may end any agent's."""

    durable: Id
    agent_id: Id | None = None


@operation(
    "message:receive",
    owner="bus",
    refuses=(NotFound,),
    example={"durable": "reader", "upto": 1},
)
class Receive(Command[Handed], frozen=True, kw_only=True):
    """Note that messages up to a number are being handed out; learn which of them were before."""

    durable: Id
    upto: Number


@operation(
    "message:ack",
    owner="bus",
    refuses=(NotFound,),
    example={"durable": "reader", "message_ids": [1]},
)
class Acknowledge(Command[None], frozen=True, kw_only=True):
    """Settle messages for good: they wait no longer. Those that do not wait are ignored."""

    durable: Id
    message_ids: Annotated[list[Number], msgspec.Meta(min_length=1, max_length=ACKNOWLEDGED_MAX)]


@operation(
    "agent:send_message",
    owner="bus",
    roles=ANYONE,
    refuses=(NotFound, Quota),
    example={"to_agent": "bob", "message": {"text": "hello"}},
)
class SendMessage(Command[Sent], frozen=True, kw_only=True):
    """Put a message into the inbox of an agent, here or away. An answer sets `in_reply_to`."""

    to_agent: Id
    message: Plain
    in_reply_to: Number | None = None
    request_id: Id | None = None


@operation(
    "agent:broadcast",
    owner="bus",
    refuses=(Quota,),
    example={"message": {"text": "all hands"}, "capabilities": ["search"]},
)
class Broadcast(Command[SentToMany], frozen=True, kw_only=True):
    """Put a message into the inboxes of all active agents that match, but the sender's.

    Those match that have all of `capabilities`, are of one of `kinds` and in one of `status`.
    """

    message: Plain
    capabilities: Capabilities = []
    kinds: Annotated[list[Word], msgspec.Meta(max_length=64)] = []
    exclude: Annotated[list[Id], msgspec.Meta(max_length=999)] = []
    status: Annotated[list[Status], msgspec.Meta(max_length=16)] = []
    request_id: Id | None = None


@operation(
    "agent:route_task",
    owner="bus",
    refuses=(NotFound, Quota),
    example={"message": {"task": "find it"}, "capabilities": ["search"]},
)
class RouteTask(Command[Sent], frozen=True, kw_only=True):
    """Give a task to the active agent with all of `capabilities` that has least waiting."""

    message: Plain
    capabilities: Annotated[Capabilities, msgspec.Meta(min_length=1)]
    kinds: Annotated[list[Word], msgspec.Meta(max_length=64)] = []
    exclude: Annotated[list[Id], msgspec.Meta(max_length=999)] = []
    request_id: Id | None = None


@operation(
    "message:waiting",
    owner="bus",
    own="agent_id",
    refuses=(NotFound,),
    example={"agent_id": "bob", "durable": "inbox"},
)
class ListWaiting(Query[Waiting], frozen=True, kw_only=True):
    """Return messages that wait, in order: those that follow `after`, or answers to one."""

    agent_id: Id
    durable: Id
    after: Number = 0
    in_reply_to: Number | None = None
    limit: Limit = 100


@operation("message:subscriptions", owner="bus", example={"agent_id": "bob"})
class ListDurables(Query[Durables], frozen=True, kw_only=True):
    """List durable subscriptions with what waits in them, all or those of one agent."""

    agent_id: Id | None = None
    limit: Limit = 100
    after: Cursor | None = None


@operation("message:stats", owner="bus", example={})
class GetStats(Query[Stats], frozen=True, kw_only=True):
    """Return how much is kept."""


class Subscribed(Event, frozen=True, array_like=True, tag="subscribed"):
    agent_id: str
    durable: str
    pattern: str
    now: float


class Unsubscribed(Event, frozen=True, array_like=True, tag="unsubscribed"):
    agent_id: str
    durable: str


class Kept(Event, frozen=True, array_like=True, tag="kept"):
    number: int
    topic: str
    sender: str
    body: bytes
    receivers: list[tuple[str, str]]  # agent, durable
    in_reply_to: int | None
    now: float


class HandedOut(Event, frozen=True, array_like=True, tag="handed"):
    agent_id: str
    durable: str
    upto: int


class Acknowledged(Event, frozen=True, array_like=True, tag="acknowledged"):
    agent_id: str
    durable: str
    numbers: list[int]


class Durable(msgspec.Struct, frozen=True, array_like=True):
    pattern: str
    created_at: float
    waiting: int
    waiting_bytes: int
    handed: int  # the highest number that was handed out


class Message(msgspec.Struct, frozen=True, array_like=True):
    """A message that is kept, for as long as it waits in `places`."""

    topic: str
    sender: str
    body: bytes
    in_reply_to: int | None
    at: float
    places: int


class Last(msgspec.Struct, frozen=True, array_like=True):
    number: int


class Wanted(msgspec.Struct, frozen=True, array_like=True, cache_hash=True):
    """All durable subscriptions with a pattern, in one row: each message published reads it."""

    durables: tuple[tuple[str, str, str], ...]  # agent, durable, pattern


class BusTables(Tables):
    durables: Annotated[Table[Durable], Keyed(str, str)]  # agent, durable
    wanted: Table[Wanted]  # "all"
    messages: Annotated[Table[Message], Keyed(int)]
    waiting: Annotated[Table[bytes], Keyed(str, str, int)]  # agent, durable, number
    last: Table[Last]  # "number"
