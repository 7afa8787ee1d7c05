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
from typing import Any, Final

import msgspec

from ksi.actors.declarations.index import (
    Entries,
    Find,
    FindParticipants,
    FindPeerInteractions,
    FindPending,
    FindRoles,
    GetStatus,
    IndexedEntry,
    IndexStatus,
    IndexTables,
    Kind,
    Order,
    Ordered,
    OrderGiven,
    Rebuild,
    Role,
    RoleHistory,
    SessionParticipants,
    Verified,
    Verify,
)
from ksi.actors.owner import (
    Decision,
    Given,
    Owner,
    Reply,
    Sender,
    Tick,
)
from ksi.transport.errors import Invalid


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
