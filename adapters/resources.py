"""Sessions and agents as resources of the Model Context Protocol, and tools in full.

    ksi://session/ID{?after,limit}   the newest entries of a session, or those behind an entry
    ksi://agent/ID                   an agent, with its identity and metadata
    ksi://tool/NAME                  the full definition of a tool

Each is one JSON object: what the operation behind it answers. So there are only those whose
operations are tools of the same server. A client that listens is told when a session or an agent it
names has changed; like any announcement that may be missed, so it is a reason to look and no more.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import msgspec
from mcp.server.context import ServerRequestContext
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, ResourceUpdated
from mcp_types import (
    ListResourcesResult,
    ListResourceTemplatesResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    Resource,
    ResourceTemplate,
    SubscriptionsListenRequestParams,
    SubscriptionsListenResult,
    TextResourceContents,
)

from ksi.adapters.refusals import protocol_error
from ksi.adapters.tools import Catalogue
from ksi.transport import AsyncClient
from ksi.transport.aclient import Subscription
from ksi.transport.errors import Invalid, KsiError, NotFound

JSON: Final = "application/json"
PAGE: Final = 100

Context = ServerRequestContext[Any, Any]


class Kind(NamedTuple):
    """A kind of resource whose members are listed: the operations behind it."""

    name: str
    words: str
    id: str
    listing: str
    members: str
    reading: str
    more: dict[str, Any]
    query: str = ""


KINDS: Final = (
    Kind(
        "session", "Entries of a session: the newest, or those that follow `after`", "session_id",
        "session:list", "sessions", "session:history", {}, "{?after,limit}",
    ),
    Kind(
        "agent", "An agent, with its identity and metadata", "agent_id",
        "agent:list", "agents", "agent:info", {"include": ["identity", "metadata"]},
    ),
)  # fmt: skip


class Resources:
    """The resources of one server, read by its client."""

    def __init__(self, client: AsyncClient, catalogue: Catalogue) -> None:
        self._client = client
        self._catalogue = catalogue
        self._kinds = {
            each.name: each
            for each in KINDS
            if catalogue.has(each.listing) and catalogue.has(each.reading)
        }

    async def list(
        self, ctx: Context, params: PaginatedRequestParams | None
    ) -> ListResourcesResult:
        """List sessions, then agents. A cursor is a kind and the `after` of its next page."""
        cursor = params.cursor if params is not None else None
        if cursor is None:
            cursor = next(iter(self._kinds), "")
        name, _, after = cursor.partition(" ")
        kind = self._kinds.get(name)
        if kind is None and cursor:
            raise protocol_error(Invalid(f"{cursor[:128]!r} is no place in the list"))
        if kind is None:
            return ListResourcesResult(resources=[])
        try:
            page = await self._client.read(kind.listing, limit=PAGE, after=after or None)
        except KsiError as error:
            raise protocol_error(error) from None
        found = [
            Resource(uri=f"ksi://{name}/{each[kind.id]}", name=each[kind.id], mime_type=JSON)
            for each in page[kind.members]
        ]
        return ListResourcesResult(resources=found, next_cursor=self._next(name, page["next"]))

    async def templates(
        self, ctx: Context, params: PaginatedRequestParams | None
    ) -> ListResourceTemplatesResult:
        """List the forms of uri there are."""
        found = [
            ResourceTemplate(
                uri_template=f"ksi://{each.name}/{{{each.id}}}{each.query}",
                name=each.name,
                description=each.words,
                mime_type=JSON,
            )
            for each in self._kinds.values()
        ]
        found.append(
            ResourceTemplate(
                uri_template="ksi://tool/{name}",
                name="tool",
                description="The full definition of a tool",
                mime_type=JSON,
            )
        )
        return ListResourceTemplatesResult(resource_templates=found)

    async def read(self, ctx: Context, params: ReadResourceRequestParams) -> ReadResourceResult:
        """Read one resource."""
        try:
            found = await self._read(params.uri)
        except KsiError as error:
            raise protocol_error(error, uri=params.uri) from None
        text = msgspec.json.encode(found).decode()
        content = TextResourceContents(uri=params.uri, mime_type=JSON, text=text)
        return ReadResourceResult(contents=[content])

    async def listen(
        self, ctx: Context, params: SubscriptionsListenRequestParams
    ) -> SubscriptionsListenResult:
        """Tell a client when one of the resources it names has changed, for as long as it hears."""
        bus = InMemorySubscriptionBus()
        async with AsyncExitStack() as news:
            for uri in dict.fromkeys(params.notifications.resource_subscriptions or ()):
                try:
                    changes = await self._changes(uri)
                except KsiError as error:
                    raise protocol_error(error, uri=uri) from None
                news.callback(changes.close)
                news.callback(asyncio.create_task(_tell(changes, bus, uri)).cancel)
            return await ListenHandler(bus)(ctx, params)

    async def _changes(self, uri: str) -> Subscription:
        name, id, query = _parts(uri)
        if name not in self._kinds or query:
            raise NotFound(f"nothing tells when {uri[:200]!r} changes", hint="ksi://session/ID")
        await self._read(uri)  # So it is there.
        return await self._client.subscribe(f"{name}.{id}.>", credit=1)

    async def _read(self, uri: str) -> Any:
        name, id, query = _parts(uri)
        if name == "tool" and not query:
            return self._catalogue.full[self._catalogue[id].name]
        kind = self._kinds.get(name)
        if kind is None:
            raise NotFound(f"there is no resource {uri[:200]!r}", hint="ksi://session/ID")
        fields = {kind.id: id, **kind.more, **query}
        return await self._client.read(kind.reading, fields)

    def _next(self, name: str, after: str | None) -> str | None:
        """Return the cursor of what follows a page: of the same kind, or of the next."""
        if after is not None:
            return f"{name} {after}"
        names = list(self._kinds)
        return next(iter(names[names.index(name) + 1 :]), None)


async def _tell(changes: Subscription, bus: InMemorySubscriptionBus, uri: str) -> None:
    with suppress(KsiError):  # The client is closed, or its key revoked: nothing more will come.
        while await changes.take():
            await bus.publish(ResourceUpdated(uri=uri))


def _parts(uri: str) -> tuple[str, str, dict[str, Any]]:
    """Return kind, id and query of a uri; numbers in the query are numbers."""
    try:
        parts = urlsplit(uri)
        query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        parts, query = urlsplit("none:"), {}
    if parts.scheme != "ksi" or parts.fragment or not parts.path.startswith("/"):
        raise NotFound(f"there is no resource {uri[:200]!r}", hint="ksi://session/ID")
    numbers = {key: int(value) if value.isdecimal() else value for key, value in query.items()}
    return parts.netloc, parts.path[1:], numbers
