"""`compositions`, a part of `library`, in its forms: messages, events, tables.

What it does: `actors/owners/compositions.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import Command, Query, Reply
from ksi.transport.errors import Busy, Conflict, NotFound, Quota
from ksi.transport.message import OPERATOR, Id, Plain, Text, operation

PAGE_MAX: Final = 1000  # Of about half a kilobyte, without metadata.
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)]
Labels = Annotated[list[Text], msgspec.Meta(max_length=100)]


class Ordered(Reply, frozen=True, kw_only=True):
    """The order is on disk under this number; the status says when it has been carried out."""

    number: int


class CompositionRow(Reply, frozen=True, kw_only=True):
    """What a composition says of itself. `id` is its path without the suffix."""

    id: str
    name: str
    component_type: str
    version: str | None
    description: str | None
    author: str | None
    extends: str | None
    loading_strategy: str | None
    tags: list[str]
    capabilities: list[str]
    file_path: str
    file_hash: str
    size_bytes: int
    modified_at: float
    metadata: dict[str, Any] | None = None


class CompositionPage(Reply, frozen=True, kw_only=True):
    """Compositions in the order of their paths; `next` is the `after` of the next page."""

    compositions: list[CompositionRow]
    count: int
    next: str | None


class CompositionView(CompositionRow, frozen=True, kw_only=True):
    """One composition. `content`: the text behind its front matter; None if it is just changing."""

    content: str | None


class RenderedComposition(Reply, frozen=True, kw_only=True):
    """A composition with all it is made of.

    Attributes:
        content: its text with variables filled in; metadata: with what it has of its parents.
        parts: the ids of what it is made of, itself first.
        missing: places that have no value; they stand in the text as they were.
    """

    id: str
    name: str
    content: str
    parts: list[str]
    missing: list[str]
    metadata: dict[str, Any] | None


class FileProblem(Reply, frozen=True, kw_only=True):
    """A file that is no composition."""

    file_path: str
    state: str
    reason: str


class FileProblems(Reply, frozen=True, kw_only=True):
    """Files that are no compositions, in the order of their paths."""

    problems: list[FileProblem]
    next: str | None


class CompositionStatus(Reply, frozen=True, kw_only=True):
    """How many files there are, and what the follower does.

    Attributes:
        state: following, rebuilding; or waiting, for the reason in `reason`.
        types: how many compositions of each type.
        ordered, rebuilt: number of the latest order to rebuild, and of that carried out last.
        parsed: files that were read and parsed since the follower was started.
        watched: whether the kernel tells of changes; otherwise files are looked at every second.
    """

    state: str
    reason: str | None
    folder: str | None
    indexed: int
    rejected: int
    excluded: int
    types: dict[str, int]
    ordered: int
    rebuilt: int
    parsed: int
    watched: bool


@operation(
    "composition:list",
    owner="library",
    refuses=(Busy,),
    example={"type": "core", "capabilities": ["state_management"]},
)
class ListCompositions(Query[CompositionPage], frozen=True, kw_only=True):
    """List compositions: all, or those for which every filter holds.

    `type` (or `component_type`) is exact, and `all` is none; `name` is a part of the id or the
    name, in whatever case. Of `tags` and `capabilities` a composition must have every one. Of
    `metadata_filter` each key, dotted where it is nested, must have the value, or one of the values
    where a list is given; where a composition has a list, one of it.
    """

    type: Text | None = None
    component_type: Text | None = None
    name: Text | None = None
    tags: Labels = []
    capabilities: Labels = []
    loading_strategy: Text | None = None
    metadata_filter: Plain = {}
    limit: Limit = 50
    after: Text | None = None


@operation(
    "composition:discover",
    owner="library",
    refuses=(Busy,),
    example={"tags": ["core"], "metadata_filter": {"author": "ksi_system"}},
)
class Discover(ListCompositions, frozen=True, kw_only=True):
    """The same, on demand with all that a composition says of itself."""

    include_metadata: bool = False


@operation(
    "composition:get",
    owner="library",
    refuses=(NotFound, Conflict, Busy),
    example={"name": "core/base_agent"},
)
class GetComposition(Query[CompositionView], frozen=True, kw_only=True):
    """Return one composition, with its metadata and text.

    `name` is its path, its id, the end of that, or its name; where that may be several, it is
    refused, and they are named.
    """

    name: Text
    type: Text | None = None


@operation(
    "composition:render",
    owner="library",
    refuses=(NotFound, Conflict, Quota, Busy),
    example={"name": "core/base_agent", "variables": {"agent_id": "alice"}},
    also=("composition:render_component", "composition:compose"),
)
class RenderComposition(Query[RenderedComposition], frozen=True, kw_only=True):
    """Put a composition together with what it extends, mixes in and depends on, fill in variables.

    Places are `{{name}}`, `{{a.b.0}}` and `{{name|default}}`. Conditions compare; nothing in a
    composition is carried out.
    """

    name: Text
    type: Text | None = None
    variables: Plain = {}
    include_metadata: bool = False


@operation("composition:problems", owner="library", refuses=(Busy,), example={"state": "rejected"})
class ListFileProblems(Query[FileProblems], frozen=True, kw_only=True):
    """List the files that are no compositions: rejected, or excluded by the settings."""

    state: Literal["rejected", "excluded"] | None = None
    limit: Limit = 100
    after: Text | None = None


@operation("composition:status", owner="library", refuses=(Busy,))
class GetCompositionStatus(Query[CompositionStatus], frozen=True, kw_only=True):
    """Return how many compositions there are, and what the follower does."""


@operation("composition:rebuild_index", owner="library", roles=OPERATOR)
class RebuildCompositions(Command[Ordered], frozen=True, kw_only=True):
    """Make the cache again from the files. The present one is read until it is done."""

    request_id: Id | None = None
