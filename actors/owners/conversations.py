"""Conversations: what was said in sessions and in imported logs, listed, read and searched.

The files are the truth. A follower keeps a cache of them: of sessions from their journal, as far as
their files are written, and of imported logs from where they are. A line is found some 0.1 s after
it was written; that all files are looked at every minute is only a ceiling. A line that cannot be
read is counted, and told with its file and number.

- A conversation is a file. Its id is that of the session, or the name of the log without its
  suffix; where two logs have one name, `file_path` says which is meant.
- A search is for messages that hold all words, in whatever case: `"two words"` are next to each
  other, `begin*` is the beginning of a word.

These are operations of the owner `library` (`library.py`).

Source: "KSI State Management Analysis", 7. Conversation Service.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final, Protocol

import msgspec

from ksi.actors.declarations.compositions import Ordered
from ksi.actors.declarations.conversations import (
    Active,
    ConversationPage,
    ConversationRow,
    ConversationStats,
    ConversationStatus,
    Export,
    Exported,
    Forget,
    Found,
    GetConversation,
    GetConversationStatus,
    GetStats,
    Import,
    ImportChanged,
    ImportRow,
    Imports,
    ImportView,
    LineProblem,
    LineProblems,
    ListActive,
    ListConversations,
    ListImports,
    ListLineProblems,
    Matched,
    Messages,
    MessageView,
    Order,
    OrderGiven,
    Search,
)
from ksi.actors.owner import (
    Conversations,
    Decision,
    Given,
    Reply,
    Sender,
    Table,
)
from ksi.transport.errors import Conflict, Invalid, NotFound, Quota
from ksi.transport.limits import IMPORTS_MAX
from ksi.transport.moments import iso

MATCHES_EACH: Final = 10
NAMED_MAX: Final = 5  # Files told of where an id means more than one.


class ImportTables(Protocol):
    """The tables of the library that imports are in, and the cache."""

    orders: Table[Order]
    imports: Table[ImportRow]
    conversations: Conversations


def order(kind: str, sender: Sender, orders: Table[Order], given: Given) -> Decision:
    """Return what happens if something is ordered."""
    number = number_of(orders, kind) + 1
    return Decision((OrderGiven(kind, number, sender.name, given.now),), Ordered(number=number))


def number_of(orders: Table[Order], kind: str) -> int:
    """Return the number of the latest order of a kind."""
    row = orders.get(kind)
    return 0 if row is None else row.number


def import_log(command: Import, sender: Sender, tables: ImportTables, given: Given) -> Decision:
    """Return what happens if a path is imported."""
    path = command.path
    parts = path.split("/")
    if not path.startswith("/") or "\0" in path or ".." in parts or "." in parts:
        raise Invalid(f"{path!r} is no absolute path"[:300], hint="ksi import PATH makes it one")
    is_known = tables.imports.get(_key(path)) is not None
    if not is_known and tables.imports.count() >= IMPORTS_MAX:
        raise Quota(f"{IMPORTS_MAX} paths are imported", limit=IMPORTS_MAX)
    return _change(ImportChanged(path, True, sender.name, given.now), tables, given)


def forget_log(command: Forget, sender: Sender, tables: ImportTables, given: Given) -> Decision:
    """Return what happens if a path is imported no more."""
    if tables.imports.get(_key(command.path)) is None:
        text = f"{command.path!r} is not imported"[:300]
        raise NotFound(text, hint="ksi import --list")
    return _change(ImportChanged(command.path, False, sender.name, given.now), tables, given)


def import_changed(event: ImportChanged, tables: ImportTables) -> None:
    """Write what is imported."""
    if event.is_wanted:
        tables.imports.put(_key(event.path), ImportRow(event.path, event.by, event.now))
    else:
        tables.imports.delete(_key(event.path))


def answer(query: Any, tables: ImportTables) -> Reply | None:
    """Return the reply to a query about conversations; None if it is none."""
    cache = tables.conversations
    match query:
        case Search():
            return _search(query, cache)
        case ListConversations():
            return _list(query, cache)
        case GetConversation():
            return _get(query, cache)
        case Export():
            return _export(query, cache)
        case GetStats():
            return _stats(cache)
        case ListActive():
            found, total = cache.find(
                sort_by="last_timestamp",
                reverse=True,
                age_s=query.max_age_hours * 3600,
                offset=0,
                limit=query.limit,
            )
            rows = msgspec.convert(found, list[ConversationRow])
            return Active(active_sessions=rows, total_active=total)
        case ListLineProblems():
            return _problems(query, cache)
        case GetConversationStatus():
            return _status(tables)
        case ListImports():
            listed = [ImportView(path=r.path, by=r.by, at=r.at) for _, r in tables.imports.range()]
            return Imports(imports=sorted(listed, key=lambda each: each.path))
        case _:
            return None


def _key(path: str) -> str:
    """Return what a path is kept under: it may be longer than a key."""
    return sha256(path.encode()).hexdigest()


def _change(event: ImportChanged, tables: ImportTables, given: Given) -> Decision:
    number = number_of(tables.orders, "imports") + 1
    ordered = OrderGiven("imports", number, event.by, given.now)
    return Decision((event, ordered), Ordered(number=number))


def _list(query: ListConversations, cache: Conversations) -> ConversationPage:
    found, total = cache.find(
        sort_by=query.sort_by,
        reverse=query.reverse,
        since=query.start_date,
        until=query.end_date,
        offset=query.offset,
        limit=query.limit,
    )
    return ConversationPage(
        conversations=msgspec.convert(found, list[ConversationRow]),
        total=total,
        offset=query.offset,
        limit=query.limit,
        next=_next(query.offset, len(found), total),
    )


def _next(offset: int, count: int, total: int) -> int | None:
    return offset + count if count and offset + count < total else None


def _one(session_id: str, file_path: str | None, cache: Conversations) -> dict[str, Any]:
    """Return the conversation that is meant."""
    found = cache.named(session_id, file_path)
    if not found:
        text = f"there is no conversation {session_id!r}"
        raise NotFound(text, hint="ksi conversations list")
    if len(found) > 1:
        paths = [each["file_path"] for each in found[:NAMED_MAX]]
        raise Conflict(
            f"{session_id!r} may be {len(found)} conversations: {', '.join(paths)}"[:1000],
            hint="give the file_path, too",
            file_paths=paths,
        )
    return found[0]


def _get(query: GetConversation | Export, cache: Conversations) -> Messages:
    one = _one(query.session_id, query.file_path, cache)
    found = cache.messages(one["path"], query.offset, query.limit)
    return Messages(
        session_id=one["session_id"],
        file_path=one["file_path"],
        messages=msgspec.convert(found, list[MessageView]),
        total=one["message_count"],
        offset=query.offset,
        limit=query.limit,
        next=_next(query.offset, len(found), one["message_count"]),
    )


def _search(query: Search, cache: Conversations) -> Found:
    found = cache.search(
        query=query.query,
        search_in=sorted(set(query.search_in)),
        session_id=query.session_id,
        sender=query.sender,
        since=query.since,
        until=query.until,
        offset=query.offset,
        limit=query.limit,
        limit_each=MATCHES_EACH,
    )
    results = msgspec.convert(found["results"], list[Matched])
    return Found(
        query=query.query,
        results=results,
        total_conversations=found["conversations"],
        total_matches=found["matches"],
        next=_next(query.offset, len(results), found["conversations"]),
    )


def _export(query: Export, cache: Conversations) -> Exported:
    page = _get(query, cache)
    write = _as_markdown if query.format == "markdown" else _as_json
    return Exported(
        session_id=page.session_id,
        format=query.format,
        content=write(page),
        message_count=len(page.messages),
        next=page.next,
    )


def _as_markdown(page: Messages) -> str:
    parts = []
    if page.offset == 0:
        parts.append(f"# Conversation {page.session_id}\n\n*{page.total} messages*\n\n---\n")
    for each in page.messages:
        content = each.content if each.content is not None else "*(the file has changed)*"
        parts.append(
            f"\n### {iso(each.timestamp)} - {each.sender} ({each.type})\n\n{content}\n\n---\n"
        )
    return "".join(parts)


def _as_json(page: Messages) -> str:
    """Return a part of one JSON object: it begins in the first part, and ends in the last."""
    messages = [
        {**msgspec.to_builtins(each), "time": iso(each.timestamp)} for each in page.messages
    ]
    text = ",\n".join(msgspec.json.encode(each).decode() for each in messages)
    if page.offset == 0:
        head = {
            "session_id": page.session_id,
            "file_path": page.file_path,
            "total_messages": page.total,
        }
        text = f'{msgspec.json.encode(head).decode()[:-1]},"messages":[\n{text}'
    elif text:
        text = f",\n{text}"
    return text + ("\n]}\n" if page.next is None else "")


def _stats(cache: Conversations) -> ConversationStats:
    state = cache.counts()
    return ConversationStats(
        total_conversations=state.get("conversations", 0),
        imported_conversations=state.get("imported", 0),
        total_messages=state.get("messages", 0),
        total_size_bytes=state.get("size_bytes", 0),
        bad_lines=state.get("bad_lines", 0),
        unread_files=state.get("unread_files", 0),
        earliest_timestamp=state.get("earliest"),
        latest_timestamp=state.get("latest"),
    )


def _problems(query: ListLineProblems, cache: Conversations) -> LineProblems:
    after = None
    if query.after is not None:
        number, _, path = query.after.partition(" ")
        if not number.isdigit() or not number.isascii() or len(number) > 15:
            text = f"{query.after[:100]!r} is no place among the problems"
            raise Invalid(text, hint="after takes what `next` of the page before was")
        after = (path, int(number))
    found = cache.problems(file_path=query.file_path, after=after, limit=query.limit + 1)
    shown = found[: query.limit]
    last = f"{shown[-1]['line_number']} {shown[-1]['path']}" if len(found) > len(shown) else None
    return LineProblems(problems=msgspec.convert(shown, list[LineProblem]), next=last)


def _status(tables: ImportTables) -> ConversationStatus:
    state = tables.conversations.state()
    return ConversationStatus(
        state=state.get("state", "waiting"),
        reason=state.get("reason"),
        ordered=number_of(tables.orders, "conversations"),
        rebuilt=state.get("rebuilt", 0),
        import_ordered=number_of(tables.orders, "imports"),
        imported=state.get("imports", 0),
        done_bytes=state.get("done_bytes", 0),
        total_bytes=state.get("total_bytes", 0),
        watched=state.get("watched", False),
    )
