"""Mcp: which conversations know the tools already, so that they need not be told again.

Owns the tool sessions: for each conversation of an agent, which catalogue of tools it was told, and
how often it has used each. Servers of the Model Context Protocol (`adapters/mcp.py`) ask before
they list tools.

- A tool session is named by its agent, who is whoever asks, and an id of the agent's choosing.
- It knows the catalogue it was told last. Another digest or another role, and it is told anew.
- It is kept across restarts, and goes when it is cleared, when it was not used for a day of owner
  time, or when it is the one unused for longest of too many. To lose one costs one full list.

Source: "KSI State Management Analysis", MCP Session Cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ksi.actors.declarations.mcp import (
    Cleared,
    ClearSessions,
    Forgotten,
    GetStatus,
    Introduce,
    Introduced,
    Introduction,
    McpTables,
    SessionPage,
    SessionView,
    ToolSession,
    ToolUsed,
    Use,
    Used,
)
from ksi.actors.owner import (
    Decision,
    Event,
    Given,
    Owner,
    Reply,
    Sender,
    Tick,
)
from ksi.transport.errors import Forbidden, Invalid
from ksi.transport.limits import TOOL_SESSION_S, TOOL_SESSIONS_MAX, TOOLS_MAX

SWEPT_MAX: Final = 250  # Tool sessions that go in one tick: others wait meanwhile.


class Mcp(Owner[McpTables]):
    """The owner of all tool sessions."""

    name = "mcp"
    tables = McpTables
    events = Introduced | ToolUsed | Forgotten

    def decide(self, command: Any, sender: Sender, tables: McpTables, given: Given) -> Decision:
        match command:
            case Introduce():
                return _introduce(command, sender, tables, given)
            case Use():
                return _use(command, sender, tables, given)
            case ClearSessions():
                return _clear(command, sender, tables, given)
            case Tick():
                return Decision(_idle(tables, given))
            case _:
                raise TypeError(command)

    def apply(self, event: Any, tables: McpTables) -> None:
        match event:
            case Introduced():
                _introduced(event, tables)
            case ToolUsed():
                _used(event, tables)
            case Forgotten():
                _put(tables, (event.agent_id, event.conversation_id), None)
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: McpTables) -> Reply:
        match query:
            case GetStatus():
                return _status(query, tables)
            case _:
                raise TypeError(query)


OWNER = Mcp()


def _introduce(command: Introduce, sender: Sender, tables: McpTables, given: Given) -> Decision:
    known = tables.sessions.get((sender.name, command.conversation_id))
    same = known is not None and (known.digest, known.role) == (command.digest, sender.role)
    introduced = Introduced(
        sender.name,
        command.conversation_id,
        command.digest,
        command.tools,
        sender.role,
        given.now,
        given.time_s,
    )
    events: tuple[Event, ...] = (introduced,)
    if known is None and tables.sessions.count() >= TOOL_SESSIONS_MAX:
        (_, *longest), _ = next(iter(tables.by_use.range()))
        events = (Forgotten(*longest), introduced)
    listed = known.listed + 1 if known is not None and same else 1
    return Decision(events, Introduction(known=same, listed=listed))


def _use(command: Use, sender: Sender, tables: McpTables, given: Given) -> Decision:
    key = (sender.name, command.conversation_id)
    known = tables.sessions.get(key)
    if known is None:
        return Decision(reply=Used(count=0))
    count = known.uses.get(command.tool, 0) + 1
    if count == 1 and len(known.uses) >= TOOLS_MAX:
        return Decision(reply=Used(count=0))
    return Decision(
        (ToolUsed(*key, command.tool, given.now, given.time_s),),
        Used(count=count),
    )


def _clear(command: ClearSessions, sender: Sender, tables: McpTables, given: Given) -> Decision:
    agent_id = command.agent_id
    if sender.role != "operator":
        if agent_id not in (None, sender.name):
            text = f"{sender.name} may not clear the tool sessions of {agent_id}"
            raise Forbidden(text, hint="leave agent_id out: it is you")
        agent_id = sender.name
    gone = [
        Forgotten(*key)
        for key, session in tables.sessions.range(prefix=() if agent_id is None else (agent_id,))
        if command.conversation_id in (None, key[1])
        and given.time_s - session.used_s >= command.idle_s
    ]
    return Decision(tuple(gone), Cleared(cleared=len(gone)))


def _idle(tables: McpTables, given: Given) -> tuple[Event, ...]:
    """Return the end of tool sessions that were not used for too long."""
    gone: list[Event] = []
    for (used_s, *key), _ in tables.by_use.range():
        if given.time_s - used_s < TOOL_SESSION_S or len(gone) == SWEPT_MAX:
            break
        gone.append(Forgotten(*key))
    return tuple(gone)


def _introduced(event: Introduced, tables: McpTables) -> None:
    key = (event.agent_id, event.conversation_id)
    known = tables.sessions.get(key)
    same = known is not None and (known.digest, known.role) == (event.digest, event.role)
    session = ToolSession(
        digest=event.digest,
        tools=event.tools,
        role=event.role,
        listed=known.listed + 1 if known is not None and same else 1,
        uses={} if known is None else known.uses,
        created_at=event.now if known is None else known.created_at,
        used_at=event.now,
        used_s=int(event.time_s),
    )
    _put(tables, key, session)


def _used(event: ToolUsed, tables: McpTables) -> None:
    key = (event.agent_id, event.conversation_id)
    known = tables.sessions.get(key)
    if known is not None:
        uses = {**known.uses, event.tool: known.uses.get(event.tool, 0) + 1}
        used_s = int(event.time_s)
        session = msgspec.structs.replace(known, uses=uses, used_at=event.now, used_s=used_s)
        _put(tables, key, session)


def _put(tables: McpTables, key: tuple[str, str], session: ToolSession | None) -> None:
    """Set a tool session, or remove it, and its place in the order of use."""
    known = tables.sessions.get(key)
    if known is not None and (session is None or known.used_s != session.used_s):
        tables.by_use.delete((known.used_s, *key))
    if session is None:
        tables.sessions.delete(key)
        return
    if known is None or known.used_s != session.used_s:
        tables.by_use.put((session.used_s, *key), b"")
    tables.sessions.put(key, session)


def _status(query: GetStatus, tables: McpTables) -> SessionPage:
    found: list[SessionView] = []
    for (agent_id, conversation_id), session in _from(query, tables):
        if query.conversation_id not in (None, conversation_id):
            continue
        if len(found) == query.limit:
            last = found[-1]
            after = f"{last.agent_id} {last.conversation_id}"
            return SessionPage(sessions=found, total=tables.sessions.count(), next=after)
        found.append(
            SessionView(
                agent_id=agent_id,
                conversation_id=conversation_id,
                role=session.role,
                digest=session.digest,
                tools=session.tools,
                listed=session.listed,
                uses=session.uses,
                created_at=session.created_at,
                used_at=session.used_at,
            )
        )
    return SessionPage(sessions=found, total=tables.sessions.count(), next=None)


def _from(query: GetStatus, tables: McpTables) -> Iterator[tuple[Any, ToolSession]]:
    prefix = () if query.agent_id is None else (query.agent_id,)
    if query.after is None:
        return tables.sessions.range(prefix=prefix)
    agent_id, space, conversation_id = query.after.partition(" ")
    if not space:
        text = f"{query.after[:100]!r} is no place in the list"
        raise Invalid(text, hint="after takes what `next` of the page before was")
    return tables.sessions.range((agent_id, f"{conversation_id}\x01"), prefix=prefix)
