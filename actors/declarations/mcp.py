"""The owner `mcp` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/mcp.py`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from ksi.actors.owner import (
    Command,
    Event,
    Keyed,
    Query,
    Reply,
    Table,
    Tables,
)
from ksi.transport.errors import Forbidden, Invalid
from ksi.transport.limits import TOOLS_MAX
from ksi.transport.message import Id, Role, operation

PAGE_ROWS_MAX: Final = 100  # Of a few kilobytes at the most: an answer fits into a frame.
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
