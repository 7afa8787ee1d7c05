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
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec

from ksi.actors.owner import (
    Command,
    Conversations,
    Decision,
    Event,
    Given,
    Query,
    Reply,
    Sender,
    Table,
)
from ksi.actors.owners.compositions import Ordered
from ksi.transport.errors import Busy, Conflict, Invalid, NotFound, Quota
from ksi.transport.limits import IMPORTS_MAX
from ksi.transport.message import OPERATOR, Id, Moment, Text, operation
from ksi.transport.moments import iso

PAGE_MAX: Final = 1000  # Conversations or messages of one page.
SEARCH_MAX: Final = 100  # Conversations of one answer to a search, each with its first matches.
MATCHES_EACH: Final = 10
NAMED_MAX: Final = 5  # Files told of where an id means more than one.
SORTS = Literal["last_timestamp", "first_timestamp", "message_count"]

Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Path = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Origin = Literal["session", "import"]


class ConversationRow(Reply, frozen=True, kw_only=True):
    """A conversation: a session, or an imported log. Times in seconds since the epoch."""

    session_id: str
    file_path: str
    origin: Origin
    message_count: int
    bad_lines: int
    size_bytes: int
    first_timestamp: float | None
    last_timestamp: float | None
    participants: list[str]


class ConversationPage(Reply, frozen=True, kw_only=True):
    """Conversations in order, and how many there are in all; `next` is the `offset` of the next
    page."""

    conversations: list[ConversationRow]
    total: int
    offset: int
    limit: int
    next: int | None


class MessageView(Reply, frozen=True, kw_only=True):
    """What one line says.

    Attributes:
        type: the event of an entry, who speaks in a log, or how an answer has ended.
        content: None if the file is not what it was any more.
        is_cut: there is more of it in the file.
    """

    line_number: int
    byte_offset: int
    timestamp: float
    sender: str
    type: str
    content: str | None
    is_cut: bool


class Messages(Reply, frozen=True, kw_only=True):
    """Messages of a conversation in the order of its lines; `next` is the next `offset`."""

    session_id: str
    file_path: str
    messages: list[MessageView]
    total: int
    offset: int
    limit: int
    next: int | None


class Match(Reply, frozen=True, kw_only=True):
    """A message that was searched for, with the place of its line."""

    line_number: int
    byte_offset: int
    timestamp: float
    sender: str
    type: str
    content_preview: str


class Matched(ConversationRow, frozen=True, kw_only=True):
    """A conversation with so many matches, the first of them in order."""

    match_count: int
    matches: list[Match]


class Found(Reply, frozen=True, kw_only=True):
    """Conversations with the most matches first; how many conversations and matches in all."""

    query: str
    results: list[Matched]
    total_conversations: int
    total_matches: int
    next: int | None


class Exported(Reply, frozen=True, kw_only=True):
    """A part of a conversation as text; the parts, one after the other, are all of it."""

    session_id: str
    format: str
    content: str
    message_count: int
    next: int | None


class ConversationStats(Reply, frozen=True, kw_only=True):
    """How much there is in all. `unread_files`: imported ones that cannot be read."""

    total_conversations: int
    imported_conversations: int
    total_messages: int
    total_size_bytes: int
    bad_lines: int
    unread_files: int
    earliest_timestamp: float | None
    latest_timestamp: float | None


class Active(Reply, frozen=True, kw_only=True):
    """Conversations in which something was said lately, the latest first."""

    active_sessions: list[ConversationRow]
    total_active: int


class LineProblem(Reply, frozen=True, kw_only=True):
    """A line that cannot be read; `line_number` 0 is the file itself."""

    file_path: str
    line_number: int
    byte_offset: int
    reason: str


class LineProblems(Reply, frozen=True, kw_only=True):
    """Lines that cannot be read, in the order of their files."""

    problems: list[LineProblem]
    next: str | None


class ConversationStatus(Reply, frozen=True, kw_only=True):
    """What the follower does.

    Attributes:
        state: following, rebuilding; or waiting, for the reason in `reason`.
        ordered, rebuilt: number of the latest order to rebuild, and of that carried out last.
        import_ordered, imported: the same of orders to import, or to forget.
        watched: whether the kernel tells of changes in imported logs.
    """

    state: str
    reason: str | None
    ordered: int
    rebuilt: int
    import_ordered: int
    imported: int
    done_bytes: int
    total_bytes: int
    watched: bool


class ImportView(Reply, frozen=True, kw_only=True):
    """A file or folder whose logs are indexed where they are."""

    path: str
    by: str
    at: float


class Imports(Reply, frozen=True, kw_only=True):
    """All that is imported, by path."""

    imports: list[ImportView]


@operation("conversation:list", owner="library", refuses=(Invalid, Busy), example={"limit": 10})
class ListConversations(Query[ConversationPage], frozen=True, kw_only=True):
    """List conversations, by default that with the newest message first.

    Only those whose last message is between `start_date` and `end_date`, where these are given.
    """

    limit: Limit = 100
    offset: Offset = 0
    sort_by: SORTS = "last_timestamp"
    reverse: bool = True
    start_date: Moment | None = None
    end_date: Moment | None = None


@operation(
    "conversation:get",
    owner="library",
    refuses=(NotFound, Conflict, Busy),
    example={"session_id": "sess_1"},
)
class GetConversation(Query[Messages], frozen=True, kw_only=True):
    """Return the messages of a conversation in the order of their lines."""

    session_id: Name
    file_path: Path | None = None
    limit: Limit = 1000
    offset: Offset = 0


@operation(
    "conversation:search",
    owner="library",
    refuses=(Invalid, Busy),
    example={"query": 'lease "owner time" epoch*'},
)
class Search(Query[Found], frozen=True, kw_only=True):
    """Find messages that hold all words of `query`; the conversations with the most come first.

    `search_in` is where: in what was said, or in the names of those who say it. `sender` is exact.
    """

    query: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    search_in: Annotated[
        list[Literal["content", "sender"]], msgspec.Meta(min_length=1, max_length=2)
    ] = msgspec.field(default_factory=lambda: ["content"])
    session_id: Name | None = None
    sender: Text | None = None
    since: Moment | None = None
    until: Moment | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=SEARCH_MAX)] = 50
    offset: Offset = 0


@operation(
    "conversation:export",
    owner="library",
    refuses=(NotFound, Conflict, Busy),
    example={"session_id": "sess_1", "format": "json"},
)
class Export(Query[Exported], frozen=True, kw_only=True):
    """Return a conversation as Markdown or JSON text, a part at a time."""

    session_id: Name
    format: Literal["markdown", "json"] = "markdown"
    file_path: Path | None = None
    limit: Limit = 1000
    offset: Offset = 0


@operation("conversation:stats", owner="library", refuses=(Busy,))
class GetStats(Query[ConversationStats], frozen=True, kw_only=True):
    """Return how many conversations and messages there are, and from when."""


@operation("conversation:active", owner="library", refuses=(Busy,), example={"max_age_hours": 24.0})
class ListActive(Query[Active], frozen=True, kw_only=True):
    """List the conversations in which something was said lately, the latest first."""

    max_age_hours: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 2160.0
    limit: Limit = 100


@operation("conversation:problems", owner="library", refuses=(Invalid, Busy))
class ListLineProblems(Query[LineProblems], frozen=True, kw_only=True):
    """List lines and files that cannot be read, with the reason; of all files, or of one."""

    file_path: Path | None = None
    limit: Limit = 100
    after: Annotated[str, msgspec.Meta(max_length=5000)] | None = None


@operation("conversation:status", owner="library", refuses=(Busy,))
class GetConversationStatus(Query[ConversationStatus], frozen=True, kw_only=True):
    """Return what the follower of conversations does."""


@operation("conversation:imports", owner="library")
class ListImports(Query[Imports], frozen=True, kw_only=True):
    """List the files and folders whose logs are indexed where they are."""


@operation(
    "conversation:import",
    owner="library",
    roles=OPERATOR,
    refuses=(Invalid, Quota),
    example={"path": "/var/log/agents"},
)
class Import(Command[Ordered], frozen=True, kw_only=True):
    """Have a log, or all `.jsonl` files below a folder, indexed where they are, from now on.

    Again for one that is imported already, all of its files are looked at once more.
    """

    path: Path
    request_id: Id | None = None


@operation(
    "conversation:forget",
    owner="library",
    roles=OPERATOR,
    refuses=(NotFound,),
    example={"path": "/var/log/agents"},
)
class Forget(Command[Ordered], frozen=True, kw_only=True):
    """Have what was imported from a file or folder forgotten. The files stay."""

    path: Path
    request_id: Id | None = None


@operation("conversation:rebuild_index", owner="library", roles=OPERATOR)
class RebuildConversations(Command[Ordered], frozen=True, kw_only=True):
    """Make the cache again from the files. The present one is read until it is done."""

    request_id: Id | None = None


class OrderGiven(Event, frozen=True, array_like=True, tag="ordered"):
    kind: str
    number: int
    by: str
    now: float


class ImportChanged(Event, frozen=True, array_like=True, tag="import"):
    path: str
    is_wanted: bool
    by: str
    now: float


class Order(msgspec.Struct, frozen=True, array_like=True):
    """The latest order of a kind; numbers count them."""

    number: int
    by: str
    at: float


class ImportRow(msgspec.Struct, frozen=True, array_like=True):
    path: str
    by: str
    at: float


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
