"""Editing: compositions are written, changed, forked and merged, and the files stay the truth.

What is decided here is what a file is to be, and what it is now, by its hash; a follower writes it
into the folder. A file that is not what it was, then or now, is not touched: who edits by hand is
never overwritten.

- An edit is on disk when it is acknowledged, and it is settled when it was carried out, or refused
  because somebody else has changed the file in between. Each is told.
- One edit of a file is open at a time: the next one builds on what was written.
- What is written is a composition, at a path below the folder, and says what was meant.

These are operations of the owner `library` (`library.py`).

Source: the operations `composition:create`, `save`, `update`, `fork` and `merge` of KSI, which
committed to git instead, and overwrote what others had edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import msgspec

from ksi.actors import composing
from ksi.actors.composing import Rejected
from ksi.actors.declarations.conversations import Order
from ksi.actors.declarations.editing import (
    CompositionEdited,
    CreateComposition,
    DeleteComposition,
    Edit,
    Edited,
    Edits,
    EditSettled,
    EditView,
    ForkComposition,
    GetEdits,
    GetSource,
    MergeComposition,
    SaveComposition,
    Source,
    Sources,
    UpdateComposition,
)
from ksi.actors.owner import (
    Announcement,
    Compositions,
    Decision,
    Event,
    Given,
    Query,
    Reply,
    Sender,
    Table,
    Tick,
)
from ksi.actors.owners.compositions import one_named
from ksi.transport.errors import Busy, Conflict, Invalid, KsiError, NotFound
from ksi.transport.moments import iso

EDITS_MAX: Final = 100  # Not settled: the folder cannot be written; each is a row of its text.
MERGES_MAX: Final = 100  # Kept on record in a file; the oldest go.
_BUSY_S: Final = 0.1  # A follower needs about so long for an edit.
_LEARNT: Final = ("learnings", "performance")

EditEvent = CompositionEdited | EditSettled


class EditTables(Protocol):
    """The tables of the library that edits are in, and the cache."""

    orders: Table[Order]
    edits: Table[Edit]
    compositions: Compositions


def fact(command: Any) -> Query[Any] | None:
    """Return what is to be known of the folder for a command: the files that it is about."""
    match command:
        case CreateComposition() | SaveComposition():
            path = _path_of(command)
            return None if path is None else GetSource(target=path)
        case UpdateComposition() | DeleteComposition():
            return GetSource(names=[command.name])
        case ForkComposition():
            return GetSource(names=[command.parent], target=command.name)
        case MergeComposition():
            return GetSource(names=[command.source, command.target])
        case Tick():
            return GetEdits()
        case _:
            return None


def decide(command: Any, sender: Sender, tables: EditTables, given: Given) -> Decision | None:
    """Return what happens if a command about files is carried out; None if it is none."""
    try:
        match command:
            case CreateComposition():
                return _create(command, sender, tables, given)
            case SaveComposition():
                metadata, text = command.composition, command.content
                composing.require_composition(metadata)
                return _save(command, metadata, text, sender, tables, given)
            case UpdateComposition():
                return _update(command, sender, tables, given)
            case ForkComposition():
                return _fork(command, sender, tables, given)
            case MergeComposition():
                return _merge(command, sender, tables, given)
            case DeleteComposition():
                return _delete(command, sender, tables, given)
            case _:
                return None
    except Rejected as why_not:
        raise Invalid(str(why_not)) from None


def settled(tables: EditTables, given: Given) -> tuple[Event, ...]:
    """Return which edits are known now to be in the folder, or not to get there."""
    found = given.fact.edits if isinstance(given.fact, Edits) else []
    events = []
    for each in found:
        edit = tables.edits.get(each.file_path)
        if edit is not None and edit.number == each.number and each.state != "waiting":
            reason = each.reason if each.state == "refused" else None
            events.append(_settled(each.file_path, edit, reason))
    return tuple(events)


def apply(event: EditEvent, tables: EditTables) -> None:
    """Write what an event says."""
    match event:
        case CompositionEdited():
            edit = Edit(
                event.number, event.content, event.file_hash, event.base, event.by, event.now
            )
            tables.edits.put(event.file_path, edit)
            tables.orders.put("edits", Order(event.number, event.by, event.now))
        case EditSettled():
            tables.edits.delete(event.file_path)


def answer(query: Any, tables: EditTables) -> Reply | None:
    """Return the reply to a query about files; None if it is none."""
    match query:
        case GetSource():
            try:
                return _sources(query, tables.compositions)
            except Rejected as why_not:
                raise Invalid(str(why_not)) from None
        case GetEdits():
            return _edits(tables)
        case _:
            return None


def announce(event: EditSettled) -> Iterable[Announcement]:
    """Return what subscribers are told of an edit."""
    what = "refused" if event.reason else "written" if event.file_hash else "deleted"
    told = {"file_path": event.file_path, "file_hash": event.file_hash, "reason": event.reason}
    return (Announcement(f"composition.{what}", {**told, "number": event.number}, event.by),)


def _create(
    command: CreateComposition, sender: Sender, tables: EditTables, given: Given
) -> Decision:
    name = command.name or f"dynamic_{next(given.ids)[:8]}"
    if isinstance(command.content, dict):
        metadata = {"name": _last(name), "type": command.type, **command.content}
        return _save(command, metadata, None, sender, tables, given, name=name)
    about = {"dynamic": True, "created_at": iso(given.now), "parent_agent": sender.name}
    fields = {
        "name": _last(name),
        "type": command.type,
        "version": "1.0.0",
        "description": command.description or f"Dynamically created {command.type}",
        "author": command.author or sender.name,
        "extends": command.extends,
        "mixins": command.mixins,
        "components": command.components or _components(command),
        "variables": command.variables,
        "metadata": {**command.metadata, **about},
    }
    metadata = {key: value for key, value in fields.items() if value or key == "metadata"}
    return _save(command, metadata, command.content, sender, tables, given, name=name)


def _components(command: CreateComposition) -> list[dict[str, Any]]:
    """Return what a profile is made of that says only what it is to be like."""
    if command.type != "profile" or command.content is not None:
        return []
    config = command.config or {
        "role": command.role or "assistant",
        "model": command.model or "sonnet",
        "capabilities": command.capabilities,
        "tools": command.tools,
    }
    found: list[dict[str, Any]] = [{"name": "agent_config", "inline": config}]
    if command.prompt is not None:
        found.append({"name": "prompt", "template": command.prompt})
    return found


def _save(
    command: CreateComposition | SaveComposition,
    metadata: Mapping[str, Any],
    text: str | None,
    sender: Sender,
    tables: EditTables,
    given: Given,
    name: str | None = None,
) -> Decision:
    path = _path_of(command)
    if path is None:  # Nobody has named it: there cannot be one of its name.
        assert name is not None
        suffix = ".yaml" if text is None else ".md"
        target = Source(
            file_path=composing.path_of(name, str(metadata["type"]), suffix),
            file_hash=None,
            content=None,
        )
    else:
        target = _found(given, tables).target or _unreadable()
    wanted = getattr(command, "file_hash", None)
    if text is not None and not target.file_path.endswith(".md"):
        raise Rejected(f"{target.file_path} is YAML, and has no text behind it: let it end in .md")
    _require_hash(target, wanted)
    if target.file_hash is not None and not command.overwrite and wanted is None:
        raise Conflict(
            f"{target.file_path} exists already",
            hint="name its file_hash to replace it as it is, or overwrite",
            file_hash=target.file_hash,
        )
    content = composing.written(target.file_path, metadata, text or "")
    return _edit(target, content, sender, tables, given)


def _update(
    command: UpdateComposition, sender: Sender, tables: EditTables, given: Given
) -> Decision:
    (source,) = _found(given, tables, command.name).sources
    _require_hash(source, command.file_hash)
    metadata = _metadata(source)
    for name, value in command.updates.items():
        _set(metadata, name, value, is_merged=command.merge_metadata)
    content = composing.changed(source.file_path, _bytes(source), metadata, _text(source, command))
    return _edit(source, content, sender, tables, given)


def _fork(command: ForkComposition, sender: Sender, tables: EditTables, given: Given) -> Decision:
    found = _found(given, tables, command.parent)
    (parent,) = found.sources
    target = found.target or _unreadable()
    _require_settled(parent, tables)
    if target.file_hash is not None:
        raise Conflict(f"{target.file_path} exists already", file_hash=target.file_hash)
    metadata = _metadata(parent)
    for name, value in command.modifications.items():
        _set(metadata, name, value, is_merged=True)
    metadata["name"] = _last(command.name)
    lineage = {
        "parent": _id(parent),
        "parent_hash": parent.file_hash,
        "forked_at": iso(given.now),
        "reason": command.reason,
        "author": command.author or sender.name,
    }
    metadata["metadata"] = {**_inner(metadata), "lineage": lineage}
    content = composing.changed(parent.file_path, _bytes(parent), metadata, _text(parent, command))
    if target.file_path.endswith(".md") != parent.file_path.endswith(".md"):
        raise Rejected(f"{target.file_path} is to be of another kind than {parent.file_path}")
    return _edit(target, content, sender, tables, given)


def _merge(command: MergeComposition, sender: Sender, tables: EditTables, given: Given) -> Decision:
    source, target = _found(given, tables, command.source, command.target).sources
    _require_hash(target, command.file_hash)
    fork, metadata = _metadata(source), _metadata(target)
    lineage = _inner(fork).get("lineage")
    if not isinstance(lineage, Mapping) or lineage.get("parent") != _id(target):
        raise Conflict(f"{source.file_path} is no fork of {target.file_path}")
    _require_settled(source, tables)
    learnt = {name: value for name, value in _inner(fork).items() if name != "lineage"}
    text = composing.split(source.file_path, _bytes(source))[1]
    match command.strategy:
        case "full":
            kept = {"name": metadata["name"], "metadata": {**_inner(metadata), **learnt}}
            metadata = {**metadata, **fork, **kept}
        case "selective":
            taken = {name: fork[name] for name in command.improvements if name in fork}
            for name, value in taken.items():
                _set(metadata, name, learnt if name == "metadata" else value, is_merged=True)
            text = text if "content" in command.improvements else ""
        case "metadata_only":
            taken = {name: learnt[name] for name in _LEARNT if name in learnt}
            metadata["metadata"] = {**_inner(metadata), **taken}
            text = ""
    _record_merge(metadata, source, command, sender, given)
    body = text if text and target.file_path.endswith(".md") else None
    content = composing.changed(target.file_path, _bytes(target), metadata, body)
    return _edit(target, content, sender, tables, given)


def _record_merge(
    metadata: dict[str, Any],
    source: Source,
    command: MergeComposition,
    sender: Sender,
    given: Given,
) -> None:
    merged = {
        "from": _id(source),
        "date": iso(given.now),
        "by": sender.name,
        "strategy": command.strategy,
        "improvements": command.improvements,
        "validation": command.validation_results,
    }
    inner = _inner(metadata)
    before = inner.get("merges")
    merges = [*(before if isinstance(before, list) else []), merged][-MERGES_MAX:]
    metadata["metadata"] = {**inner, "merges": merges}


def _delete(
    command: DeleteComposition, sender: Sender, tables: EditTables, given: Given
) -> Decision:
    (source,) = _found(given, tables, command.name).sources
    _require_hash(source, command.file_hash)
    return _edit(source, None, sender, tables, given)


def _edit(
    source: Source, content: bytes | None, sender: Sender, tables: EditTables, given: Given
) -> Decision:
    """Return the edit of a file that is now as `source` says."""
    path, order = source.file_path, tables.orders.get("edits")
    composing.require_path(path)
    _require_settled(source, tables)
    events: list[Event] = []
    known = tables.edits.get(path)
    if known is not None:
        events.append(_settled(path, known, None))
    elif tables.edits.count() >= EDITS_MAX:
        raise Busy(f"{EDITS_MAX} edits wait for the folder: ksi read composition:edits")
    text = None if content is None else content.decode()
    file_hash = None if content is None else composing.hash_of(content)
    number = 1 if order is None else order.number + 1
    edited = CompositionEdited(
        path, text, file_hash, source.file_hash, number, sender.name, given.now
    )
    name = _last(path).rpartition(".")[0]
    if content is not None:
        name, _kind = composing.require_composition(composing.read_metadata(path, content))
    reply = Edited(id=_id(source), name=name, file_path=path, file_hash=file_hash, number=number)
    return Decision((*events, edited), reply)


def _settled(path: str, edit: Edit, reason: str | None) -> EditSettled:
    return EditSettled(path, edit.file_hash, edit.number, edit.by, reason)


def _require_settled(source: Source, tables: EditTables) -> None:
    """Raise `Busy` while an edit is open that the file does not show."""
    known = tables.edits.get(source.file_path)
    if known is not None and known.file_hash != source.file_hash:
        raise Busy(f"{source.file_path} is just being written", retry_after_s=_BUSY_S)


def _require_hash(source: Source, wanted: str | None) -> None:
    if wanted is not None and source.file_hash != wanted:
        what = "is not there" if source.file_hash is None else "is not what it was"
        raise Conflict(
            f"{source.file_path} {what}: somebody else has changed it",
            hint=f"look at it again: ksi read composition:source --names '[\"{_id(source)}\"]'",
            file_hash=source.file_hash,
        )


def _found(given: Given, tables: EditTables, *names: str) -> Sources:
    """Return the files that a command is about, by the names that it has for them."""
    if isinstance(given.fact, NotFound):  # Is it one that is just being written?
        for path, _row in tables.edits.range():
            named = {path, path.rpartition(".")[0], _last(path).rpartition(".")[0]}
            if not named.isdisjoint(names):
                raise Busy(f"{path} is just being written", retry_after_s=_BUSY_S)
    if isinstance(given.fact, KsiError):
        raise given.fact
    return given.fact if isinstance(given.fact, Sources) else _unreadable()


def _unreadable() -> Any:
    raise Busy("the folder of compositions cannot be read now", retry_after_s=_BUSY_S)


def _path_of(command: CreateComposition | SaveComposition) -> str | None:
    """Return where a composition is to be; None if it has no name yet. Not checked."""
    if isinstance(command, SaveComposition):
        name, kind = (str(command.composition.get(key, "")) for key in ("name", "type"))
        kind = str(command.composition.get("component_type") or kind)
        text, name = command.content, command.path or name
    else:
        name, kind = command.name or "", command.type
        text = command.content if isinstance(command.content, str) else None
    if not name:
        return None
    try:
        return composing.path_of(name, kind, ".yaml" if text is None else ".md")
    except Rejected:
        return name  # It will be refused by this name.


def _metadata(source: Source) -> dict[str, Any]:
    return composing.read_metadata(source.file_path, _bytes(source))


def _bytes(source: Source) -> bytes:
    return (source.content or "").encode()


def _text(source: Source, command: UpdateComposition | ForkComposition) -> str | None:
    """Return the new text of a composition, if there is to be one."""
    if command.content is not None and not source.file_path.endswith(".md"):
        raise Rejected(f"{source.file_path} is YAML, and has no text behind it")
    return command.content


def _inner(metadata: Mapping[str, Any]) -> dict[str, Any]:
    inner = metadata.get("metadata")
    return dict(inner) if isinstance(inner, Mapping) else {}


def _set(metadata: dict[str, Any], name: str, value: Any, *, is_merged: bool) -> None:
    """Set a field to a value, or remove it; merge maps of metadata if that is wanted."""
    if value is None:
        metadata.pop(name, None)
    elif name == "metadata" and is_merged and isinstance(value, Mapping):
        merged = {**_inner(metadata), **value}
        metadata[name] = {key: each for key, each in merged.items() if each is not None}
    else:
        metadata[name] = value


def _id(source: Source) -> str:
    return source.file_path.rpartition(".")[0]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _sources(query: GetSource, cache: Compositions) -> Sources:
    paths = [one_named(name, None, cache)["file_path"] for name in query.names]
    target = None
    if query.target is not None:
        path = query.target
        if paths:
            suffix = ".md" if paths[0].endswith(".md") else ".yaml"
            path = composing.path_of(path, "", suffix, beside=paths[0])
        composing.require_path(path)
        target = _source(path, cache)
    return Sources(sources=[_source(path, cache) for path in paths], target=target)


def _source(path: str, cache: Compositions) -> Source:
    content = cache.source(path)
    if content is None:
        return Source(file_path=path, file_hash=None, content=None)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise Rejected(f"{path} is no UTF-8") from None
    return Source(file_path=path, file_hash=composing.hash_of(content), content=text)


def _edits(tables: EditTables) -> Edits:
    rows = list(tables.edits.range())
    doing = tables.compositions.state().get("edits", {}) if rows else {}
    found = []
    for path, edit in rows:
        told = doing.get(path, {})
        if told.get("number") != edit.number:
            told = {"state": "waiting", "reason": None}
        view = {"file_path": path, "number": edit.number, "by": edit.by, "at": edit.at}
        found.append({**view, "state": told["state"], "reason": told["reason"]})
    return Edits(edits=[msgspec.convert(each, EditView) for each in found])
