"""The Model Context Protocol: declared operations as tools, sessions and agents as resources.

A server speaks for one identity, that of its client, whoever calls it: its key decides what may be
done. Queries are read in place, so they are answered with their owner dead; commands are asked, and
their answer means: it is on disk.

- A refusal is a result with `isError`: its code, text, hint and details, for the model to read. An
  unknown tool or resource is an error of the protocol with the same in its `data`.
- A client that names its conversation is told all tools once and thin ones after, for as long as
  the owner `mcp` remembers; where that owner cannot be asked, it is told all. Any other client is
  told all each time, and by `ttlMs` and `cacheScope` for how long it need not ask again.
- Headers claim nothing: a server that is taken for another agent's says so.

Source: the protocol at 2026-07-28 and 2025-11-25, by the official SDK.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import msgspec
from mcp import MCPError
from mcp.server import Server
from mcp.server.caching import CacheHint
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp_types import (
    INVALID_REQUEST,
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
)
from mcp_types import Tool as Definition

from ksi.actors.owners import OWNERS
from ksi.adapters.refusals import protocol_error, refused
from ksi.adapters.resources import Resources
from ksi.adapters.tools import (
    DESCRIBE,
    SETTLE,
    AwaitCompletion,
    Catalogue,
    DescribeTool,
    SettleCall,
    Tool,
)
from ksi.transport import AsyncClient
from ksi.transport.caller import Ticket
from ksi.transport.errors import Invalid, KsiError, NotFound, Unavailable
from ksi.transport.limits import WINDOW_COMMANDS_MAX
from ksi.transport.outcomes import still_open

CALL_S: Final = 30.0  # What a call may take where the server is not told: models are patient.
LOOK_S: Final = 2.0  # How often a client that waits hears that it still does.
LISTED_MS: Final = 300_000  # How long a list holds: upgrades are rare, and wanted soon.
_INTRODUCE_S: Final = 1.0  # A list is not worth waiting longer for the owner that shortens it.
_CLOSE_S: Final = 1.0

CONVERSATION: Final = "X-KSI-Conversation-ID"
AGENT: Final = "X-KSI-Agent-ID"

INSTRUCTIONS: Final = """\
KSI keeps the state of a group of agents; you are the agent {name}. Each tool is one operation: \
`session:append` is `ksi_session_append`. The answer to a command means that it is on disk; a \
query changes nothing. A refusal has changed nothing, and says what to do. Where a tool shows no \
arguments, ksi_describe_tool does."""

Context = ServerRequestContext[Any, Any]


class ToolServer:
    """What a client of the protocol can ask, on behalf of the identity of `client`.

    Args:
        client: asks and reads; it stays the caller's to close.
        catalogue: the tools there are.
        conversation: of a client that does not name it in a header.
        call_s: how long a call may take before it ends as `unavailable`, with a ticket.

    Attributes:
        server: the server of the SDK, to be run over some transport.
    """

    def __init__(
        self,
        client: AsyncClient,
        catalogue: Catalogue,
        *,
        version: str = "",
        conversation: str | None = None,
        call_s: float = CALL_S,
    ) -> None:
        self._client = client
        self._catalogue = catalogue
        self._conversation = conversation
        self._call_s = call_s
        self._tickets: dict[str, Ticket] = {}
        self._counting: set[asyncio.Task[None]] = set()
        resources = Resources(client, catalogue)
        listed = CacheHint(ttl_ms=LISTED_MS, scope="private")  # another role, another list
        self.server: Server[Any] = Server(
            "ksi",
            version=version,
            instructions=INSTRUCTIONS.format(name=client.name),
            cache_hints={
                "tools/list": listed,
                "resources/templates/list": listed,
                "server/discover": listed,
            },
            get_tool_input_schema=lambda _name: None,  # Asked for a list, it would count as one.
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
            on_list_resources=resources.list,
            on_list_resource_templates=resources.templates,
            on_read_resource=resources.read,
            on_subscriptions_listen=resources.listen,
        )
        self.server.middleware.append(self._require_identity)

    async def close(self) -> None:
        """Let what is counted get there, if it does so soon."""
        if self._counting:
            await asyncio.wait(self._counting, timeout=_CLOSE_S)

    async def _require_identity(self, ctx: Context, call_next: CallNext) -> HandlerResult:
        claimed = _header(ctx, AGENT)
        if claimed is not None and claimed != self._client.name:
            text = f"this server speaks for {self._client.name}, not for {claimed[:128]}"
            hint = f"leave {AGENT} out, or ask the server that runs as that agent"
            raise MCPError(INVALID_REQUEST, text, {"code": "forbidden", "hint": hint})
        return await call_next(ctx)

    async def _list_tools(
        self, ctx: Context, params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        if params is not None and params.cursor is not None:
            raise protocol_error(Invalid("the tools come in one page", hint="send no cursor"))
        conversation = self._conversation_of(ctx)
        known = conversation is not None and await self._is_known(conversation)
        tools = self._catalogue.thin if known else self._catalogue.full
        return ListToolsResult(tools=[Definition.model_validate(each) for each in tools.values()])

    async def _is_known(self, conversation: str) -> bool:
        """Whether this conversation knows this catalogue already; from now on it does."""
        try:
            introduced = await self._client.ask(
                "mcp:introduce",
                conversation_id=conversation,
                digest=self._catalogue.digest,
                tools=len(self._catalogue.tools),
                timeout_s=_INTRODUCE_S,
            )
        except Invalid as error:
            raise protocol_error(error) from None
        except KsiError:
            return False  # To be told all of it is always right.
        return bool(introduced["known"])

    async def _call_tool(self, ctx: Context, params: CallToolRequestParams) -> CallToolResult:
        try:
            tool = self._catalogue[params.name]
        except KsiError as error:
            raise protocol_error(error) from None
        conversation = self._conversation_of(ctx)
        if conversation is not None:
            counting = asyncio.create_task(self._count(conversation, tool))
            self._counting.add(counting)
            counting.add_done_callback(self._counting.discard)
        try:
            fields = self._catalogue.arguments(tool, params.arguments or {})
            return _result(await self._carry_out(ctx, tool, fields))
        except KsiError as error:
            return self._refused(tool, error)

    async def _carry_out(
        self, ctx: Context, tool: Tool, fields: dict[str, Any]
    ) -> Mapping[str, Any]:
        if tool.operation is None:
            return await self._serve(ctx, tool, fields)
        name = tool.operation.name
        if tool.reads and tool.operation.owner in OWNERS:
            read: dict[str, Any] = await self._client.read(name, fields)
            return read
        return await self._client.ask(name, fields, timeout_s=self._call_s)

    async def _serve(self, ctx: Context, tool: Tool, fields: dict[str, Any]) -> Mapping[str, Any]:
        """Carry out what is no operation."""
        try:
            asked = msgspec.convert(fields, tool.message)
        except msgspec.ValidationError as error:
            raise Invalid(f"{tool.name}: {error}") from None
        match asked:
            case DescribeTool():
                return self._catalogue.full[self._catalogue[asked.tool].name]
            case SettleCall():
                return await self._settle(asked.ticket)
            case AwaitCompletion():
                return await self._await(ctx, asked)
            case _:
                raise TypeError(asked)

    async def _settle(self, name: str) -> Mapping[str, Any]:
        ticket = self._tickets.get(name)
        if ticket is None:
            raise NotFound(f"there is no ticket {name[:128]!r}", hint="this server has given none")
        try:
            return await self._client.settle(ticket, self._call_s)
        except Unavailable as error:
            error.ticket = ticket
            raise

    async def _await(self, ctx: Context, asked: AwaitCompletion) -> Mapping[str, Any]:
        """Wait for an outcome, and let the client know meanwhile that somebody does."""
        began_s = time.monotonic()
        while (waited_s := time.monotonic() - began_s) < asked.timeout_s:
            left_s = min(LOOK_S, asked.timeout_s - waited_s)
            with suppress(Unavailable):
                return await self._client.outcome(asked.request_id, timeout_s=left_s)
            waited_s = min(time.monotonic() - began_s, asked.timeout_s)
            await ctx.session.report_progress(waited_s, asked.timeout_s, "it has not ended yet")
        raise still_open(asked.request_id, asked.timeout_s)

    async def _count(self, conversation: str, tool: Tool) -> None:
        """Count a use. Nobody waits for it, and nothing is lost but the count."""
        with suppress(KsiError):
            await self._client.ask("mcp:use", conversation_id=conversation, tool=tool.name)

    def _refused(self, tool: Tool, error: KsiError) -> CallToolResult:
        """Return a refusal as a model reads it."""
        hint, details = error.hint, dict(error.details)
        if tool.operation is not None and hint == tool.operation.hint:
            hint = f"{DESCRIBE.name} with tool={tool.name!r} shows its arguments"
        if isinstance(error, Unavailable) and error.ticket is not None:
            details["ticket"] = self._keep(error.ticket)
            hint = f"{SETTLE.name} with ticket={details['ticket']!r} finds out"
        return refused(error, hint=hint, details=details)

    def _keep(self, ticket: Ticket) -> str:
        """Return the name of a ticket; the oldest of too many is forgotten, as its client does."""
        name = f"{ticket.owner}-{ticket.instance.hex()[:8]}-{ticket.number}"
        self._tickets[name] = ticket
        while len(self._tickets) > WINDOW_COMMANDS_MAX:
            del self._tickets[next(iter(self._tickets))]
        return name

    def _conversation_of(self, ctx: Context) -> str | None:
        return _header(ctx, CONVERSATION) or self._conversation


def _result(reply: Mapping[str, Any]) -> CallToolResult:
    text = msgspec.json.encode(reply).decode()
    return CallToolResult(content=[TextContent(text=text)], structured_content=dict(reply))


def _header(ctx: Context, name: str) -> str | None:
    """Return a header of the request, None where there is none, as over stdio."""
    headers = getattr(ctx.request, "headers", None)
    return None if headers is None else headers.get(name)
