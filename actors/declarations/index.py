"""The owner `index` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/index.py`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ksi.actors.owner import (
    Command,
    Event,
    Index,
    Query,
    Reply,
    Table,
    Tables,
)
from ksi.transport.errors import Busy, Invalid
from ksi.transport.message import OPERATOR, Id, Text, operation

PAGE_ROWS_MAX: Final = 1000  # Of about half a kilobyte: an answer fits into a frame.
Kind = Literal["rebuild", "verify"]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_ROWS_MAX)]
Time = Annotated[float, msgspec.Meta(ge=0, description="seconds since the epoch")]


class Ordered(Reply, frozen=True, kw_only=True):
    """The order is on disk under this number; it is carried out when `index:status` says so."""

    number: int


class IndexedEntry(Reply, frozen=True, kw_only=True):
    """A row of the index: the documented columns.

    Attributes:
        participating_agents: owner of the session, who speaks, and whom it is addressed to.
        agent_roles: the role this entry takes, by agent.
    """

    id: str
    timestamp: float
    event_type: str
    session_id: str
    file_path: str
    line_number: int
    byte_offset: int
    initiating_agent: str
    participating_agents: list[str]
    agent_roles: dict[str, str]
    pattern_type: str | None
    conversation_id: str | None
    correlation_id: str | None
    is_completion: bool
    is_request: bool
    has_response: bool
    requests_response: bool


class Entries(Reply, frozen=True, kw_only=True):
    """Rows in the order of time; `next` is the `after` of the next page, None at the end."""

    entries: list[IndexedEntry]
    next: str | None


class Role(Reply, frozen=True, kw_only=True):
    """A role an agent has taken, and where it said so."""

    timestamp: float
    role: str
    session_id: str
    file_path: str
    line_number: int


class RoleHistory(Reply, frozen=True, kw_only=True):
    """The roles of an agent in the order in which it took them."""

    agent_id: str
    roles: list[Role]
    next: str | None


class SessionParticipants(Reply, frozen=True, kw_only=True):
    """All who take part in a session, by name."""

    session_id: str
    participants: list[str]


class Verified(Reply, frozen=True, kw_only=True):
    """What the last verification found: so many differences, the first of them in words."""

    number: int
    at: float
    sessions: int
    rows: int
    differences: int
    found: list[str]


class IndexStatus(Reply, frozen=True, kw_only=True):
    """How far the index has come and what its follower does.

    Attributes:
        state: following, rebuilding, verifying; or waiting, for the reason in `reason`.
        behind_bytes: of the journal of the sessions that is not indexed yet.
        ordered, rebuilt: number of the latest order to rebuild, and of that carried out last.
        done_bytes, total_bytes: of the session files, while rebuilding or verifying.
    """

    state: str
    reason: str | None
    days: int
    rows: int
    behind_bytes: int | None
    ordered: int
    rebuilt: int
    done_bytes: int
    total_bytes: int
    verified: Verified | None


@operation("index:rebuild", owner="index", roles=OPERATOR)
class Rebuild(Command[Ordered], frozen=True, kw_only=True):
    """Build the index again from the session files. The present one is read until it is done."""

    request_id: Id | None = None


@operation("index:verify", owner="index", roles=OPERATOR)
class Verify(Command[Ordered], frozen=True, kw_only=True):
    """Compare every row with the line it speaks of. `index:status` shows what was found."""

    request_id: Id | None = None


@operation(
    "index:query",
    owner="index",
    refuses=(Invalid, Busy),
    example={"agent_id": "alice", "event_type": "completion:result", "limit": 10},
)
class Find(Query[Entries], frozen=True, kw_only=True):
    """Find entries: all that agree with what is given, in the order of time, or backwards.

    `agent_id` is any who takes part; `since` is within, `until` beyond what is found.
    """

    session_id: Id | None = None
    agent_id: Id | None = None
    initiating_agent: Id | None = None
    event_type: Text | None = None
    pattern_type: Text | None = None
    conversation_id: Text | None = None
    correlation_id: Text | None = None
    is_completion: bool | None = None
    is_request: bool | None = None
    has_response: bool | None = None
    since: Time | None = None
    until: Time | None = None
    reverse: bool = False
    limit: Limit = 100
    after: Text | None = None


@operation(
    "index:peer_interactions",
    owner="index",
    refuses=(Invalid, Busy),
    example={"agent_id": "alice"},
)
class FindPeerInteractions(Query[Entries], frozen=True, kw_only=True):
    """Find what an agent and another said to each other: entries of the pattern peer_to_peer."""

    agent_id: Id
    since: Time | None = None
    limit: Limit = 100
    after: Text | None = None


@operation(
    "index:role_history",
    owner="index",
    refuses=(Invalid, Busy),
    example={"agent_id": "alice", "session_id": "sess_1"},
)
class FindRoles(Query[RoleHistory], frozen=True, kw_only=True):
    """Return the roles an agent has taken, in one session or in all."""

    agent_id: Id
    session_id: Id | None = None
    limit: Limit = 100
    after: Text | None = None


@operation("index:pending", owner="index", refuses=(Invalid, Busy), example={"since": 1735500000.0})
class FindPending(Query[Entries], frozen=True, kw_only=True):
    """Find requests that have no response yet."""

    agent_id: Id | None = None
    session_id: Id | None = None
    since: Time | None = None
    limit: Limit = 100
    after: Text | None = None


@operation("index:participants", owner="index", refuses=(Busy,), example={"session_id": "sess_1"})
class FindParticipants(Query[SessionParticipants], frozen=True, kw_only=True):
    """Return who takes part in a session, as its entries tell."""

    session_id: Id


@operation("index:status", owner="index", refuses=(Busy,))
class GetStatus(Query[IndexStatus], frozen=True, kw_only=True):
    """Return how far the index has come, what goes on, and what the last verification found."""


class OrderGiven(Event, frozen=True, array_like=True, tag="ordered"):
    kind: Kind
    number: int
    by: str
    now: float


class Order(msgspec.Struct, frozen=True, array_like=True):
    """The latest order of a kind; numbers count them."""

    number: int
    by: str
    at: float


class IndexTables(Tables):
    orders: Table[Order]  # by kind
    index: Index
