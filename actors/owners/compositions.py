"""Compositions: what agents are made of, found in a folder of YAML and Markdown files.

The files are the truth, written by whoever likes. A follower keeps a cache of what they say of
themselves; every file below the folder is a composition, or is reported with the reason why it is
none. Queries read the cache, in any process; a composition's text is read from its file.

- A composition is known by its path below the folder: names repeat. Its id is that path without the
  suffix, and it is found by its name, too, where only one has it.
- All filters must hold. Values are compared as they are: `1` is not `"1"`.

These are operations of the owner `library` (`library.py`).

Source: "KSI State Management Analysis", 8. Composition Index.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import Command, Compositions, Query, Reply
from ksi.transport.errors import Busy, Conflict, NotFound
from ksi.transport.message import OPERATOR, Id, Plain, Text, operation

PAGE_MAX: Final = 1000  # Of about half a kilobyte, without metadata.
PAGE_BYTES_MAX: Final = 512 << 10  # With metadata, which may be large.
NAMED_MAX: Final = 5  # Files told of where a name means more than one.

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


def answer(query: Any, cache: Compositions, ordered: int) -> Reply | None:
    """Return the reply to a query about compositions; None if it is none."""
    match query:
        case ListCompositions():
            return _list(query, cache)
        case GetComposition():
            return _get(query, cache)
        case ListFileProblems():
            found = cache.problems(state=query.state, after=query.after, limit=query.limit + 1)
            listed = msgspec.convert(found[: query.limit], list[FileProblem])
            more = len(found) > query.limit
            return FileProblems(problems=listed, next=listed[-1].file_path if more else None)
        case GetCompositionStatus():
            return _status(cache, ordered)
        case _:
            return None


def _list(query: ListCompositions, cache: Compositions) -> CompositionPage:
    kind = query.component_type or query.type
    facets: dict[str, list[list[Any]]] = {}
    for key, labels in (("tags", query.tags), ("capabilities", query.capabilities)):
        facets[key] = [[label] for label in labels]
    for key, value in query.metadata_filter.items():
        facets.setdefault(key, []).append(value if isinstance(value, list) else [value])
    if query.loading_strategy is not None:
        facets.setdefault("loading_strategy", []).append([query.loading_strategy])
    found = cache.find(
        component_type=None if kind == "all" else kind,
        name=query.name,
        facets=facets,
        after=query.after,
        limit=query.limit + 1,
    )
    is_full = isinstance(query, Discover) and query.include_metadata
    rows: list[CompositionRow] = []
    room = PAGE_BYTES_MAX
    for each in found[: query.limit]:
        room -= len(msgspec.json.encode(each)) if is_full else 0
        if room < 0 and rows:
            break
        metadata = each["metadata"] if is_full else None
        rows.append(msgspec.convert({**each, "metadata": metadata}, CompositionRow))
    more = len(found) > len(rows)
    return CompositionPage(
        compositions=rows, count=len(rows), next=rows[-1].file_path if more else None
    )


def _get(query: GetComposition, cache: Compositions) -> CompositionView:
    found = cache.named(query.name, query.type)
    if not found:
        raise NotFound(
            f"there is no composition {query.name!r}"[:300], hint="ksi compositions list"
        )
    if len(found) > 1:
        paths = [each["file_path"] for each in found[:NAMED_MAX]]
        raise Conflict(
            f"{query.name!r} may be {len(found)} compositions: {', '.join(paths)}"[:1000],
            hint="give the path",
            file_paths=paths,
        )
    return msgspec.convert(found[0], CompositionView)


def _status(cache: Compositions, ordered: int) -> CompositionStatus:
    state = cache.state()
    return CompositionStatus(
        state=state.get("state", "waiting"),
        reason=state.get("reason"),
        folder=state.get("folder"),
        indexed=state.get("indexed", 0),
        rejected=state.get("rejected", 0),
        excluded=state.get("excluded", 0),
        types=state.get("types", {}),
        ordered=ordered,
        rebuilt=state.get("rebuilt", 0),
        parsed=state.get("parsed", 0),
        watched=state.get("watched", False),
    )
