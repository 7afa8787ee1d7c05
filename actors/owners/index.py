"""Index: where everything that was said can be found again.

Owns the orders to build the index again and to verify it. The index itself is derived: a follower
in the same process (`actors/followers/indexing.py`) writes it from the session files and their
journal, a SQLite database a day, and carries the orders out. Queries read those databases, in any
process.

- A row says where an entry lies: seeking to `byte_offset` in `file_path` yields that entry.
- `has_response` of a request becomes true when an entry of its session with its correlation id has
  been indexed that is neither a request nor progress: before or after it, on whatever day.
- An order is on disk when it is acknowledged; `index:status` says which has been carried out.

Source: "KSI Dynamic Storage Architecture", SQL Index Schema and Query Patterns.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import (
    Command,
    Decision,
    Event,
    Given,
    Index,
    Owner,
    Query,
    Reply,
    Sender,
    Table,
    Tables,
    Tick,
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


class IndexOwner(Owner[IndexTables]):
    """The owner of the orders to the index, and of the queries to it."""

    name = "index"
    tables = IndexTables
    events = OrderGiven

    def decide(self, command: Any, sender: Sender, tables: IndexTables, given: Given) -> Decision:
        match command:
            case Rebuild():
                return _order("rebuild", sender, tables, given)
            case Verify():
                return _order("verify", sender, tables, given)
            case Tick():
                return Decision()
            case _:
                raise TypeError(command)

    def apply(self, event: Any, tables: IndexTables) -> None:
        match event:
            case OrderGiven():
                tables.orders.put(event.kind, Order(event.number, event.by, event.now))
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: IndexTables) -> Reply:
        match query:
            case Find():
                return _find(query, tables)
            case FindPeerInteractions():
                return _entries(
                    tables, query, where={"pattern_type": "peer_to_peer"}, agent_id=query.agent_id
                )
            case FindPending():
                where = {"session_id": query.session_id}
                return _entries(tables, query, where=where, only="pending", agent_id=query.agent_id)
            case FindRoles():
                return _roles(query, tables)
            case FindParticipants():
                names = tables.index.participants(query.session_id)
                return SessionParticipants(session_id=query.session_id, participants=names)
            case GetStatus():
                return _status(tables)
            case _:
                raise TypeError(query)


OWNER = IndexOwner()


def _order(kind: Kind, sender: Sender, tables: IndexTables, given: Given) -> Decision:
    former = tables.orders.get(kind)
    number = 1 if former is None else former.number + 1
    return Decision((OrderGiven(kind, number, sender.name, given.now),), Ordered(number=number))


_COLUMNS: Final = (
    "session_id", "initiating_agent", "event_type", "pattern_type", "conversation_id",
    "correlation_id", "is_completion", "is_request", "has_response",
)  # fmt: skip


def _find(query: Find, tables: IndexTables) -> Entries:
    where = {column: getattr(query, column) for column in _COLUMNS}
    wanted = {"until": query.until, "reverse": query.reverse, "agent_id": query.agent_id}
    return _entries(tables, query, where=where, **wanted)


def _entries(tables: IndexTables, query: Any, *, where: dict[str, Any], **wanted: Any) -> Entries:
    rows = _rows(tables, query, where=where, since=query.since, **wanted)
    entries = [
        IndexedEntry(
            **{
                **row,
                "participating_agents": msgspec.json.decode(row["participating_agents"]),
                "agent_roles": msgspec.json.decode(row["agent_roles"]),
                **{flag: bool(row[flag]) for flag in _FLAGS},
            }
        )
        for row in rows[: query.limit]
    ]
    return Entries(entries=entries, next=_next(query, rows))


_FLAGS: Final = ("is_completion", "is_request", "has_response", "requests_response")


def _roles(query: FindRoles, tables: IndexTables) -> RoleHistory:
    where = {"session_id": query.session_id}
    rows = _rows(tables, query, where=where, only="roles", agent_id=query.agent_id)
    roles = [
        Role(
            timestamp=row["timestamp"],
            role=taken[query.agent_id],
            session_id=row["session_id"],
            file_path=row["file_path"],
            line_number=row["line_number"],
        )
        for row in rows[: query.limit]
        if query.agent_id in (taken := msgspec.json.decode(row["agent_roles"]))
    ]
    return RoleHistory(agent_id=query.agent_id, roles=roles, next=_next(query, rows))


def _rows(
    tables: IndexTables, query: Any, *, where: dict[str, Any], **wanted: Any
) -> list[dict[str, Any]]:
    where = {column: value for column, value in where.items() if value is not None}
    after = _place(query.after)
    return tables.index.rows(where=where, after=after, limit=query.limit + 1, **wanted)


def _place(after: str | None) -> tuple[float, str] | None:
    """Return the time and id a page begins behind: what `_next` made of them."""
    if after is None:
        return None
    at, _, id = after.partition(" ")
    with suppress(ValueError):
        if (timestamp := float(at)) >= 0:  # NaN is not.
            return timestamp, id
    text = f"{after[:100]!r} is no place in the index"
    raise Invalid(text, hint="after takes what `next` of the page before was")


def _next(query: Any, rows: list[dict[str, Any]]) -> str | None:
    """Return the place of the last row of a page that one more follows."""
    if len(rows) <= query.limit:
        return None
    last = rows[query.limit - 1]
    return f"{last['timestamp']!r} {last['id']}"


def _status(tables: IndexTables) -> IndexStatus:
    order = tables.orders.get("rebuild")
    state = tables.index.state()
    verified = state.get("verified")
    return IndexStatus(
        state=state.get("state", "waiting"),
        reason=state.get("reason"),
        days=state["days"],
        rows=state["rows"],
        behind_bytes=state["behind_bytes"],
        ordered=0 if order is None else order.number,
        rebuilt=state["rebuilt"],
        done_bytes=state.get("done_bytes", 0),
        total_bytes=state.get("total_bytes", 0),
        verified=None if verified is None else msgspec.convert(verified, Verified),
    )
