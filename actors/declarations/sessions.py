"""The owner `sessions` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/sessions.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import (
    Command,
    Event,
    Keyed,
    Log,
    Query,
    Reply,
    Table,
    Tables,
)
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    NotOwner,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import ARCHIVE_MAX
from ksi.transport.message import OPERATOR, Id, Message, Plain, Text, operation
from ksi.transport.message import OWNER as OWNERS_ONLY

PAGE_ENTRIES_MAX: Final = 1000  # In one page of history.
ENTRIES_MAX: Final = 256  # Entries of one `append_many`: one command must not be a whole batch.
INVITED_MAX: Final = 256  # Agents named when a session is made.
Admission = Literal["open", "invited", "closed"]
Status = Literal["active", "closed"]
Recorded = Literal[
    "completion:request", "completion:result", "completion:failed", "completion:cancelled"
]
EventName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Epoch = Annotated[int, msgspec.Meta(ge=1)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_ENTRIES_MAX)]
At = Annotated[int, msgspec.Meta(ge=0)] | Annotated[str, msgspec.Meta(max_length=64)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400.0)]


class Ownership(Reply, frozen=True, kw_only=True):
    """Who writes the session now. Send `epoch` with later commands to be fenced by it."""

    session_id: str
    owner: str
    epoch: int
    created_at: float | None = None


class Forked(Ownership, frozen=True, kw_only=True):
    """Who writes the fork, and where it leaves its parent: behind entry `parent_seq`."""

    parent: str
    parent_seq: int


class Appended(Reply, frozen=True, kw_only=True):
    """The entry is on disk as number `seq` of its session."""

    session_id: str
    seq: int
    epoch: int
    timestamp: float


class AppendedMany(Reply, frozen=True, kw_only=True):
    """The entries are on disk, all or none, numbered `first_seq` to `last_seq`."""

    session_id: str
    first_seq: int
    last_seq: int
    epoch: int
    timestamp: float


class SessionView(Reply, frozen=True, kw_only=True):
    """One session: times in seconds since the epoch."""

    session_id: str
    owner: str
    epoch: int
    status: Status
    seq: int
    size_bytes: int
    created_at: float
    updated_at: float
    pattern: str
    admission: Admission
    lease_s: float | None
    title: str
    parent: str | None = None
    parent_seq: int | None = None
    admits: bool | None = None


class SessionPage(Reply, frozen=True, kw_only=True):
    """Sessions in the order of their ids; `next` continues, None at the end."""

    sessions: list[SessionView]
    next: str | None


class History(Reply, frozen=True, kw_only=True):
    """Entries in order; `first_seq` numbers the first. `next` is the `after` of the next page."""

    session_id: str
    entries: list[dict[str, Any]]
    first_seq: int
    seq: int
    next: int | None


class ParticipantView(Reply, frozen=True, kw_only=True):
    """One who has a part in a session, with the role taken last and the way to it."""

    agent_id: str
    joined_at: float
    role: str | None
    roles: list[dict[str, Any]]


class Participants(Reply, frozen=True, kw_only=True):
    """All who have a part in a session, by name."""

    session_id: str
    participants: list[ParticipantView]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing said."""

    event: EventName
    data: Plain = {}
    correlation_id: Text | None = None


_WRITES: Final = (NotFound, NotOwner, StaleEpoch, Conflict, TooLarge)


@operation(
    "session:create",
    owner="sessions",
    refuses=(Conflict,),
    example={"pattern": "peer_to_peer", "admission": "open"},
)
class Create(Command[Ownership], frozen=True, kw_only=True):
    """Create a session that the sender owns and alone may append to.

    `admission` says who else may contribute: anyone (open), those in `invited`, or nobody
    (closed). With `lease_s` another agent may claim it once its owner has been silent that long.
    """

    session_id: Id | None = None
    pattern: EventName = "general"
    admission: Admission = "open"
    invited: Annotated[list[Id], msgspec.Meta(max_length=INVITED_MAX)] = []
    lease_s: LeaseSeconds | None = None
    title: Text = ""
    request_id: Id | None = None


@operation(
    "session:fork",
    owner="sessions",
    refuses=(NotFound, Conflict, Invalid),
    example={"session_id": "sess_1", "at": 3, "fork_id": "sess_1_again"},
)
class Fork(Command[Forked], frozen=True, kw_only=True):
    """Create a session that the sender owns and that goes on from entry `at` of another.

    Without `at`, from its newest; `at` may be a time, as at `session:history`. Nothing is copied:
    the first entry of the fork names its parent, whose history `at` that entry is what was said
    before. Pattern and title are those of the parent; the rest is as at `session:create`.
    """

    session_id: Id
    at: At | None = None
    fork_id: Id | None = None
    admission: Admission = "open"
    invited: Annotated[list[Id], msgspec.Meta(max_length=INVITED_MAX)] = []
    lease_s: LeaseSeconds | None = None
    request_id: Id | None = None


@operation(
    "session:append",
    owner="sessions",
    refuses=(*_WRITES, Busy),
    example={"session_id": "sess_1", "event": "note", "data": {"text": "hello"}},
)
class Append(Command[Appended], frozen=True, kw_only=True):
    """Append one entry to a session the sender owns.

    With `lock_epoch`, only while the sender holds the lock of that epoch on the conversation of the
    same id (`conversation:acquire_lock`).
    """

    session_id: Id
    event: EventName
    data: Plain = {}
    epoch: Epoch | None = None
    lock_epoch: Epoch | None = None
    correlation_id: Text | None = None
    request_id: Id | None = None


@operation(
    "session:append_many",
    owner="sessions",
    refuses=_WRITES,
    example={"session_id": "sess_1", "entries": [{"event": "note", "data": {"text": "one"}}]},
)
class AppendMany(Command[AppendedMany], frozen=True, kw_only=True):
    """Append entries to a session the sender owns: all of them, in this order, or none."""

    session_id: Id
    entries: Annotated[list[Entry], msgspec.Meta(min_length=1, max_length=ENTRIES_MAX)]
    epoch: Epoch | None = None
    request_id: Id | None = None


@operation(
    "session:contribute",
    owner="sessions",
    refuses=(NotFound, Forbidden, StaleEpoch, Conflict, TooLarge, Busy),
    example={"session_id": "sess_1", "event": "note", "data": {"text": "may I?"}},
)
class Contribute(Command[Appended], frozen=True, kw_only=True):
    """Add one entry to a session of somebody else, if it admits the sender.

    `lock_epoch` as at `session:append`.
    """

    session_id: Id
    event: EventName
    data: Plain = {}
    lock_epoch: Epoch | None = None
    correlation_id: Text | None = None
    request_id: Id | None = None


@operation(
    "session:transfer",
    owner="sessions",
    refuses=(NotFound, NotOwner, StaleEpoch, Conflict),
    example={"session_id": "sess_1", "to_agent": "bob"},
)
class Transfer(Command[Ownership], frozen=True, kw_only=True):
    """Hand a session over. The epoch grows: what the former owner sends late is refused."""

    session_id: Id
    to_agent: Id
    epoch: Epoch | None = None
    request_id: Id | None = None


@operation(
    "session:claim",
    owner="sessions",
    refuses=(NotFound, NotOwner, Conflict),
    example={"session_id": "sess_1"},
)
class Claim(Command[Ownership], frozen=True, kw_only=True):
    """Take a session over whose lease has lapsed; an operator may always."""

    session_id: Id
    request_id: Id | None = None


@operation(
    "session:close",
    owner="sessions",
    refuses=(NotFound, NotOwner, StaleEpoch, Conflict),
    example={"session_id": "sess_1"},
)
class Close(Command[Ownership], frozen=True, kw_only=True):
    """Close a session for good: nothing is appended to it any more, it is still read."""

    session_id: Id
    epoch: Epoch | None = None
    request_id: Id | None = None


@operation(
    "session:archive",
    owner="sessions",
    roles=OPERATOR,
    refuses=(NotFound, Conflict),
    example={"session_ids": ["sess_1"]},
)
class Archive(Command[None], frozen=True, kw_only=True):
    """Have the files of closed sessions compressed into the archive; they are read as before.

    It is done soon after. For one whose file is there already nothing is done.
    """

    session_ids: Annotated[list[Id], msgspec.Meta(min_length=1, max_length=ARCHIVE_MAX)]
    request_id: Id | None = None


@operation(
    "session:unarchive",
    owner="sessions",
    roles=OPERATOR,
    refuses=(NotFound,),
    example={"session_ids": ["sess_1"]},
)
class Unarchive(Command[None], frozen=True, kw_only=True):
    """Have the files of sessions back out of the archive. It is done soon after."""

    session_ids: Annotated[list[Id], msgspec.Meta(min_length=1, max_length=ARCHIVE_MAX)]
    request_id: Id | None = None


@operation("session:heartbeat", owner="sessions", roles=OWNERS_ONLY, example={"agent_id": "alice"})
class Heartbeat(Command[None], frozen=True, kw_only=True):
    """An agent is alive: its leases run from now. Sent by the registry."""

    agent_id: Id


@operation(
    "session:record",
    owner="sessions",
    roles=OWNERS_ONLY,
    refuses=(NotFound, Conflict, Forbidden, TooLarge),
    example={
        "session_id": "sess_1",
        "request_id": "req_1",
        "agent_id": "alice",
        "event": "completion:request",
        "data": {"prompt": "What is an epoch?", "session_id": "sess_1", "agent_id": "alice"},
    },
)
class RecordEntry(Command[None], frozen=True, kw_only=True):
    """Write a request or its outcome into a session. Sent by the owner of completions.

    What is there already, and the outcome of a request that is not, is left out.
    """

    session_id: Id
    request_id: Id
    agent_id: Id
    event: Recorded
    data: Plain


class ClosedSession(Message, frozen=True, kw_only=True):
    """What the owner of completions is told of a session that had open requests."""

    session_id: str


@operation("session:get", owner="sessions", refuses=(NotFound,), example={"session_id": "sess_1"})
class Get(Query[SessionView], frozen=True, kw_only=True):
    """Return one session: owner, epoch, how much was said and when; of `agent_id`, whether it is
    admitted."""

    session_id: Id
    agent_id: Id | None = None


@operation("session:list", owner="sessions", example={"limit": 10})
class ListSessions(Query[SessionPage], frozen=True, kw_only=True):
    """List sessions, all or those of one owner, status or pattern."""

    owner: Id | None = None
    status: Status | None = None
    pattern: EventName | None = None
    limit: Limit = 100
    after: Id | None = None


class ArchivedSession(Reply, frozen=True, kw_only=True):
    """A session whose file is in the archive, or will soon be."""

    session_id: str
    size_bytes: int
    archived_at: float
    archived_by: str


class ArchivedPage(Reply, frozen=True, kw_only=True):
    """Sessions in order of their ids. `next`, if not None, is the `after` of the next page."""

    sessions: list[ArchivedSession]
    next: str | None


@operation("session:archived", owner="sessions")
class ListArchived(Query[ArchivedPage], frozen=True, kw_only=True):
    """List the sessions whose files are archived."""

    limit: Limit = 100
    after: Id | None = None


@operation(
    "session:history",
    owner="sessions",
    refuses=(NotFound, Invalid),
    example={"session_id": "sess_1", "at": "2026-05-04T09:00:00Z"},
)
class GetHistory(Query[History], frozen=True, kw_only=True):
    """Return entries of a session in order: the newest `limit`, or those that follow `after`.

    With `at`, as it was then: at entry `at`, or at a time, as `2026-05-04T09:00:00Z`, by the times
    of the entries.
    """

    session_id: Id
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    at: At | None = None
    limit: Limit = 100


@operation(
    "session:participants", owner="sessions", refuses=(NotFound,), example={"session_id": "sess_1"}
)
class GetParticipants(Query[Participants], frozen=True, kw_only=True):
    """Return who has a part in a session, with their roles and how these changed."""

    session_id: Id


class SessionCreated(Event, frozen=True, array_like=True, tag="created"):
    session_id: str
    owner: str
    pattern: str
    admission: Admission
    invited: list[str]
    lease_s: float | None
    title: str
    now: float
    time_s: float


class SessionForked(Event, frozen=True, array_like=True, tag="forked"):
    session_id: str
    parent: str
    seq: int


class EntryAppended(Event, frozen=True, array_like=True, tag="appended"):
    session_id: str
    agent_id: str
    seq: int
    offset: int
    line: bytes
    now: float
    time_s: float
    pattern: str | None = None


class Joined(Event, frozen=True, array_like=True, tag="joined"):
    session_id: str
    agent_id: str
    now: float


class RoleTaken(Event, frozen=True, array_like=True, tag="role"):
    session_id: str
    agent_id: str
    seq: int
    role: str
    previous: str | None
    duration: str | None
    now: float


class OwnerChanged(Event, frozen=True, array_like=True, tag="owner"):
    session_id: str
    owner: str
    epoch: int
    now: float
    time_s: float


class SessionClosed(Event, frozen=True, array_like=True, tag="closed"):
    session_id: str
    by: str
    now: float


class RequestOpened(Event, frozen=True, array_like=True, tag="request"):
    session_id: str
    request_id: str


class RequestSettled(Event, frozen=True, array_like=True, tag="settled"):
    session_id: str
    request_id: str


class OwnerSeen(Event, frozen=True, array_like=True, tag="seen"):
    agent_id: str
    time_s: float


class SessionArchived(Event, frozen=True, array_like=True, tag="archived"):
    session_id: str
    size: int
    by: str
    now: float


class SessionUnarchived(Event, frozen=True, array_like=True, tag="unarchived"):
    session_id: str
    by: str
    now: float


class Session(msgspec.Struct, frozen=True, array_like=True):
    """The row of a session. Small: 64 random ones are touched by one commit."""

    owner: str
    epoch: int
    seq: int
    size: int
    created_at: float
    updated_at: float
    active_s: float  # owner time of the owner's last command
    status: Status
    pattern: str
    admission: Admission
    lease_s: float | None
    title: str


class Anchor(msgspec.Struct, frozen=True, array_like=True):
    """Where the line of an entry begins."""

    offset: int


class Parent(msgspec.Struct, frozen=True, array_like=True):
    session_id: str
    seq: int


class Participant(msgspec.Struct, frozen=True, array_like=True):
    joined_at: float
    role: str | None


class RoleChange(msgspec.Struct, frozen=True, array_like=True):
    agent_id: str
    role: str
    previous: str | None
    duration: str | None
    at: float


class Seen(msgspec.Struct, frozen=True, array_like=True):
    time_s: float


class Archived(msgspec.Struct, frozen=True, array_like=True):
    by: str
    at: float


class SessionTables(Tables):
    sessions: Table[Session]
    anchors: Annotated[Table[Anchor], Keyed(str, int)]  # every 64th entry, by its number
    parents: Table[Parent]  # by fork
    participants: Annotated[Table[Participant], Keyed(str, str)]
    invited: Annotated[Table[bytes], Keyed(str, str)]
    roles: Annotated[Table[RoleChange], Keyed(str, int)]  # by session and entry
    owned: Annotated[Table[bytes], Keyed(str, str)]  # by owner and session
    leased: Annotated[Table[bytes], Keyed(str, str)]  # likewise, those with a lease
    seen: Table[Seen]  # by agent: its last heartbeat, where it owns a session with a lease
    open: Annotated[Table[bytes], Keyed(str, str)]  # by session and request: those that wait or run
    archived: Table[Archived]  # those whose file is to be in the archive
    lines: Log
