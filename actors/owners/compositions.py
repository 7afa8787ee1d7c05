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

from typing import Any, Final

import msgspec

from ksi.actors.declarations.compositions import (
    CompositionPage,
    CompositionRow,
    CompositionStatus,
    CompositionView,
    Discover,
    FileProblem,
    FileProblems,
    GetComposition,
    GetCompositionStatus,
    ListCompositions,
    ListFileProblems,
    RenderComposition,
    RenderedComposition,
)
from ksi.actors.owner import Compositions, Reply
from ksi.actors.rendering import Part, render
from ksi.transport.errors import Busy, Conflict, NotFound

PAGE_BYTES_MAX: Final = 512 << 10  # With metadata, which may be large.
_TEXTS: Final = ("content", "prompt", "template")  # Where YAML keeps its text, in this order.
NAMED_MAX: Final = 5  # Files told of where a name means more than one.


def answer(query: Any, cache: Compositions, ordered: int) -> Reply | None:
    """Return the reply to a query about compositions; None if it is none."""
    match query:
        case ListCompositions():
            return _list(query, cache)
        case GetComposition():
            return _get(query, cache)
        case RenderComposition():
            return _render(query, cache)
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
    return msgspec.convert(one_named(query.name, query.type, cache), CompositionView)


def one_named(name: str, kind: str | None, cache: Compositions) -> dict[str, Any]:
    """Return the composition that a name means, or raise a refusal."""
    found = cache.named(name, kind)
    if not found:
        raise NotFound(f"there is no composition {name!r}"[:300], hint="ksi compositions list")
    if len(found) > 1:
        paths = [each["file_path"] for each in found[:NAMED_MAX]]
        raise Conflict(
            f"{name!r} may be {len(found)} compositions: {', '.join(paths)}"[:1000],
            hint="give the path",
            file_paths=paths,
        )
    return found[0]


def _render(query: RenderComposition, cache: Compositions) -> RenderedComposition:
    def find(name: str, kind: str | None = None) -> Part:
        found = one_named(name, kind, cache)
        if found["content"] is None:
            raise Busy(f"{found['file_path']} is just changing", retry_after_s=0.1)
        said = found.get("metadata") or {}
        text = found["content"] or next(
            (said[key] for key in _TEXTS if isinstance(said.get(key), str)), ""
        )
        return Part(found["id"], said, text)

    part = find(query.name, query.type)
    rendered = render(part, query.variables, find)
    return RenderedComposition(
        id=part.id,
        name=str(part.metadata.get("name", query.name)),
        content=rendered.text,
        parts=rendered.parts,
        missing=rendered.missing,
        metadata=rendered.metadata if query.include_metadata else None,
    )


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
