"""`conversations`, a part of `library`, in its forms: messages, events, tables.

What it does: `actors/owners/conversations.py`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ksi.actors.declarations.compositions import Ordered
from ksi.actors.owner import (
    Command,
    Event,
    Query,
    Reply,
)
from ksi.transport.errors import Busy, Conflict, Invalid, NotFound, Quota
from ksi.transport.message import OPERATOR, Id, Moment, Text, operation

PAGE_MAX: Final = 1000  # Conversations or messages of one page.
SEARCH_MAX: Final = 100  # Conversations of one answer to a search, each with its first matches.
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
