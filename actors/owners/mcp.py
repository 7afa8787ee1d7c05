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
from typing import Annotated, Any, Final

import msgspec

from ksi.actors.owner import (
    Command,
    Decision,
    Event,
    Given,
    Keyed,
    Owner,
    Query,
    Reply,
    Sender,
    Table,
    Tables,
    Tick,
)
from ksi.transport.errors import Forbidden, Invalid
from ksi.transport.limits import TOOL_SESSION_S, TOOL_SESSIONS_MAX, TOOLS_MAX
from ksi.transport.message import Id, Role, operation

PAGE_ROWS_MAX: Final = 100  # Of a few kilobytes at the most: an answer fits into a frame.
SWEPT_MAX: Final = 250  # Tool sessions that go in one tick: others wait meanwhile.

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$(?!\n)", description="SHA-256 in hex")]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Introduction(Reply, frozen=True, kw_only=True):
    """Whether the conversation knows this catalogue already; `listed` counts how often it asked."""

    known: bool
    listed: int


class Used(Reply, frozen=True, kw_only=True):
    """How often the conversation has used the tool; 0 where nothing is known of either."""

    count: int


class Cleared(Reply, frozen=True, kw_only=True):
    """So many tool sessions are gone."""

    cleared: int


class SessionView(Reply, frozen=True, kw_only=True):
    """One tool session: times in seconds since the epoch.

    Attributes:
        digest, tools: of the catalogue it knows, and how many tools are in it.
        listed: how often it asked for the list since it was told of that catalogue, that included.
        uses: how often it has used each tool.
    """

    agent_id: str
    conversation_id: str
    role: str
    digest: str
    tools: int
    listed: int
    uses: dict[str, int]
    created_at: float
    used_at: float


class SessionPage(Reply, frozen=True, kw_only=True):
    """Tool sessions by agent and conversation, and how many there are; `next` continues."""

    sessions: list[SessionView]
    total: int
    next: str | None


@operation(
    "mcp:introduce",
    owner="mcp",
    example={"conversation_id": "plan", "digest": "0" * 64, "tools": 52},
)
class Introduce(Command[Introduction], frozen=True, kw_only=True):
    """Say that a conversation of the sender is told this catalogue, unless it knows it already."""

    conversation_id: Id
    digest: Digest
    tools: Annotated[int, msgspec.Meta(ge=0, le=TOOLS_MAX)]


@operation("mcp:use", owner="mcp", example={"conversation_id": "plan", "tool": "ksi_session_get"})
class Use(Command[Used], frozen=True, kw_only=True):
    """Count that a conversation of the sender uses a tool; it is not idle."""

    conversation_id: Id
    tool: Id


@operation(
    "mcp:clear_sessions",
    owner="mcp",
    refuses=(Forbidden,),
    example={"conversation_id": "plan"},
)
class ClearSessions(Command[Cleared], frozen=True, kw_only=True):
    """Forget tool sessions, so that their conversations are told all tools again.

    Those of `agent_id`, of `conversation_id`, and unused for `idle_s`, as far as each is given. An
    agent clears its own, an operator any.
    """

    agent_id: Id | None = None
    conversation_id: Id | None = None
    idle_s: Seconds = 0.0


@operation("mcp:status", owner="mcp", refuses=(Invalid,), example={"agent_id": "alice"})
class GetStatus(Query[SessionPage], frozen=True, kw_only=True):
    """Return the tool sessions of an agent, or of all."""

    agent_id: Id | None = None
    conversation_id: Id | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_ROWS_MAX)] = PAGE_ROWS_MAX
    after: Annotated[str, msgspec.Meta(max_length=257)] | None = None


class Introduced(Event, frozen=True, array_like=True, tag="introduced"):
    agent_id: str
    conversation_id: str
    digest: str
    tools: int
    role: Role
    now: float
    time_s: float


class ToolUsed(Event, frozen=True, array_like=True, tag="used"):
    agent_id: str
    conversation_id: str
    tool: str
    now: float
    time_s: float


class Forgotten(Event, frozen=True, array_like=True, tag="forgotten"):
    agent_id: str
    conversation_id: str


class ToolSession(msgspec.Struct, frozen=True, array_like=True):
    """What a conversation knows and does; `used_s` is owner time, in whole seconds."""

    digest: str
    tools: int
    role: Role
    listed: int
    uses: dict[str, int]
    created_at: float
    used_at: float
    used_s: int


class McpTables(Tables):
    sessions: Annotated[Table[ToolSession], Keyed(str, str)]  # by agent and conversation
    by_use: Annotated[Table[bytes], Keyed(int, str, str)]  # likewise, by `used_s` before


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
