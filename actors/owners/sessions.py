"""Sessions: conversations, each written by one agent at a time.

Owns who may write which session, and what was said in it, in one total order.

- A session has one owner, an agent identity, and an epoch that grows whenever the owner changes.
  Only the owner appends; a writer that carries a former epoch is refused even if the name fits.
- Entries are numbered 1, 2, 3 ... a session. Entry n's line begins where line n - 1 ended, so the
  bytes of a session's file are fixed by its events, whoever writes the file and however often.
- Others contribute through the system, if the session admits them, and become participants.
- A fork is a session of its own that goes on from an entry of another: nothing of that is copied,
  the link to it is its first entry.
- A session with a lease may be claimed once its owner has been silent for `lease_s`.
- Completions are recorded for their owner: a request if its session admits who made it, else its
  owner is told why not; an outcome once, for a request that was recorded. A closed session tells of
  its open requests.

Source: "KSI Dynamic Storage Architecture": session ownership, JSONL session files, patterns and
role transitions. Fencing tokens: Kafka's epochs, decided where the write is decided.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from ksi.actors.declarations.locks import GetLock, LockView
from ksi.actors.declarations.sessions import (
    Anchor,
    Append,
    Appended,
    AppendedMany,
    AppendMany,
    Archive,
    Archived,
    ArchivedPage,
    ArchivedSession,
    Claim,
    Close,
    ClosedSession,
    Contribute,
    Create,
    Entry,
    EntryAppended,
    Fork,
    Forked,
    Get,
    GetHistory,
    GetParticipants,
    Heartbeat,
    History,
    Joined,
    ListArchived,
    ListSessions,
    OwnerChanged,
    OwnerSeen,
    Ownership,
    Parent,
    Participant,
    Participants,
    ParticipantView,
    RecordEntry,
    RequestOpened,
    RequestSettled,
    RoleChange,
    RoleTaken,
    Seen,
    Session,
    SessionArchived,
    SessionClosed,
    SessionCreated,
    SessionForked,
    SessionPage,
    SessionTables,
    SessionUnarchived,
    SessionView,
    Transfer,
    Unarchive,
)
from ksi.actors.owner import (
    Announcement,
    Decision,
    Event,
    Given,
    Line,
    Owner,
    Query,
    Reply,
    Send,
    Sender,
    Tick,
)
from ksi.transport.errors import (
    Busy,
    Conflict,
    Forbidden,
    NotFound,
    NotOwner,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import FRAME_BYTES_MAX
from ksi.transport.moments import moment

LINE_BYTES_MAX: Final = FRAME_BYTES_MAX  # A line must fit into the frame that reads it back.
PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX * 3 // 4  # One page of history, with room for its header.
SCAN_ROWS_MAX: Final = 10_000  # Rows one `list` looks at before it returns with a cursor.
ANCHOR_EVERY: Final = 64  # Entries between two known offsets: a page of history reads no more.


class Sessions(Owner[SessionTables]):
    """The owner of all sessions."""

    name = "sessions"
    tables = SessionTables
    domains = ("session",)
    routine = (OwnerSeen,)
    events = (
        EntryAppended
        | SessionCreated
        | SessionForked
        | Joined
        | RoleTaken
        | OwnerChanged
        | SessionClosed
        | OwnerSeen
        | RequestOpened
        | RequestSettled
        | SessionArchived
        | SessionUnarchived
    )

    def decide(self, command: Any, sender: Sender, tables: SessionTables, given: Given) -> Decision:
        match command:
            case Append():
                return _append(command, sender, tables, given)
            case AppendMany():
                return _append_many(command, sender, tables, given)
            case Contribute():
                return _contribute(command, sender, tables, given)
            case RecordEntry():
                return _record(command, tables, given)
            case Create():
                return _create(command, sender, tables, given)
            case Fork():
                return _fork(command, sender, tables, given)
            case Transfer():
                return _transfer(command, sender, tables, given)
            case Claim():
                return _claim(command, sender, tables, given)
            case Close():
                return _close(command, sender, tables, given)
            case Archive():
                return _archive(command, sender, tables, given)
            case Unarchive():
                return _unarchive(command, sender, tables, given)
            case Heartbeat():
                return _heartbeat(command, tables, given)
            case Tick():
                return Decision()  # A lease is looked at when somebody claims.
            case _:
                raise TypeError(command)

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        match command:
            case Fork(at=str()):  # What was said when is in the log, which queries alone read.
                return GetHistory(session_id=command.session_id, at=command.at, limit=1)
            case Append() | Contribute() if command.lock_epoch is not None:
                return GetLock(conversation_id=command.session_id)
            case _:
                return None

    def apply(self, event: Any, tables: SessionTables) -> None:
        match event:
            case EntryAppended():
                _entry_appended(event, tables)
            case RequestOpened():
                tables.open.put((event.session_id, event.request_id), b"")
            case RequestSettled():
                tables.open.delete((event.session_id, event.request_id))
            case SessionCreated():
                _session_created(event, tables)
            case SessionForked():
                tables.parents.put(event.session_id, Parent(event.parent, event.seq))
            case Joined():
                key = (event.session_id, event.agent_id)
                tables.participants.put(key, Participant(event.now, None))
            case RoleTaken():
                _role_taken(event, tables)
            case OwnerChanged():
                _owner_changed(event, tables)
            case SessionClosed():
                _session_closed(event, tables)
            case SessionArchived():
                tables.archived.put(event.session_id, Archived(event.by, event.now))
            case SessionUnarchived():
                tables.archived.delete(event.session_id)
            case OwnerSeen():
                tables.seen.put(event.agent_id, Seen(event.time_s))
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: SessionTables) -> Reply:
        match query:
            case Get():
                return _get(query, tables)
            case GetHistory():
                return _history(query, tables)
            case ListSessions():
                return _list(query, tables)
            case ListArchived():
                return _list_archived(query, tables)
            case GetParticipants():
                return _participants(query, tables)
            case _:
                raise TypeError(query)

    def lines(self, event: Any) -> Iterable[Line]:
        if type(event) is EntryAppended:
            return (Line(event.session_id, event.offset, event.line),)
        return ()

    def archives(self, event: Any) -> Iterable[tuple[str, int | None]]:
        if type(event) is SessionArchived:
            return ((event.session_id, event.size),)
        if type(event) is SessionUnarchived:
            return ((event.session_id, None),)
        return ()

    def is_archived(self, tables: SessionTables, key: str) -> bool:
        return tables.archived.get(key) is not None

    def logs(self, tables: SessionTables, after: str) -> Iterator[tuple[str, int]]:
        rows = tables.sessions.range(_beyond(after))
        return ((session_id, session.size) for session_id, session in rows)

    def announce(self, event: Any) -> Iterable[Announcement]:
        match event:
            case EntryAppended():
                return (_told(event.session_id, "appended", event.agent_id, seq=event.seq),)
            case SessionCreated():
                return (_told(event.session_id, "created", event.owner, owner=event.owner),)
            case OwnerChanged():
                changed = {"owner": event.owner, "epoch": event.epoch}
                return (_told(event.session_id, "transferred", event.owner, **changed),)
            case SessionClosed():
                return (_told(event.session_id, "closed", event.by),)
            case _:
                return ()


OWNER = Sessions()


def _create(command: Create, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    session_id = command.session_id or f"sess_{next(given.ids)}"
    known = tables.sessions.get(session_id)
    if known is not None:
        raise Conflict(
            f"session {session_id} exists already and is written by {known.owner}",
            hint="leave session_id out to get a fresh one",
            owner=known.owner,
            epoch=known.epoch,
        )
    created = SessionCreated(
        session_id,
        sender.name,
        command.pattern,
        command.admission,
        command.invited,
        command.lease_s,
        command.title,
        given.now,
        given.time_s,
    )
    reply = Ownership(session_id=session_id, owner=sender.name, epoch=1, created_at=given.now)
    return Decision((created,), reply)


def _fork(command: Fork, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    parent, session = command.session_id, _known(tables, command.session_id)
    at = _forked_at(command.at, parent, session, given)
    create = Create(
        session_id=command.fork_id,
        pattern=session.pattern,
        admission=command.admission,
        invited=command.invited,
        lease_s=command.lease_s,
        title=session.title,
    )
    (created,) = _create(create, sender, tables, given).events
    assert isinstance(created, SessionCreated)
    fork_id = created.session_id
    link = Entry(event="session:fork", data={"parent": parent, "seq": at})
    first = _entry_events(fork_id, _session_of(created), link, sender.name, given)
    reply = Forked(
        session_id=fork_id,
        owner=sender.name,
        epoch=1,
        created_at=given.now,
        parent=parent,
        parent_seq=at,
    )
    return Decision((created, SessionForked(fork_id, parent, at), *first), reply)


def _forked_at(at: int | str | None, parent: str, session: Session, given: Given) -> int:
    if not isinstance(at, str):
        return _seq_up_to(at, parent, session)
    moment(at, what="at")
    if not isinstance(given.fact, History):
        raise Busy("what was said until then cannot be read now", retry_after_s=0.1)
    return given.fact.seq


def _append(command: Append, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    session_id = command.session_id
    session = _writable(tables, session_id, sender, command.epoch)
    _require_lock(command, sender, given)
    events = _entry_events(session_id, session, command, sender.name, given)
    seq = session.seq + 1
    reply = Appended(session_id=session_id, seq=seq, epoch=session.epoch, timestamp=given.now)
    return Decision(events, reply)


def _append_many(
    command: AppendMany, sender: Sender, tables: SessionTables, given: Given
) -> Decision:
    session = _writable(tables, command.session_id, sender, command.epoch)
    first_seq = session.seq + 1
    events: list[Event] = []
    for entry in command.entries:
        added = _entry_events(command.session_id, session, entry, sender.name, given)
        events += added
        session = _grown(session, added[0], session.active_s)
    if sum(len(each.line) for each in events if isinstance(each, EntryAppended)) > LINE_BYTES_MAX:
        raise TooLarge(f"the entries are over {LINE_BYTES_MAX} bytes", limit_bytes=LINE_BYTES_MAX)
    reply = AppendedMany(
        session_id=command.session_id,
        first_seq=first_seq,
        last_seq=session.seq,
        epoch=session.epoch,
        timestamp=given.now,
    )
    return Decision(tuple(events), reply)


def _contribute(
    command: Contribute, sender: Sender, tables: SessionTables, given: Given
) -> Decision:
    session_id = command.session_id
    session = _open(tables, session_id)
    _require_admitted(session_id, session, sender.name, tables)
    _require_lock(command, sender, given)
    events = _contributed(session_id, session, command, sender.name, tables, given)
    reply = Appended(
        session_id=session_id, seq=session.seq + 1, epoch=session.epoch, timestamp=given.now
    )
    return Decision(events, reply)


def _require_lock(command: Append | Contribute, sender: Sender, given: Given) -> None:
    """Raise unless the sender holds the lock it says it holds, as the library has committed it."""
    if command.lock_epoch is None:
        return
    lock = given.fact
    if not isinstance(lock, LockView):
        raise Busy("whether the conversation is locked cannot be read now", retry_after_s=0.1)
    if (lock.locked, lock.holder, lock.epoch) != (True, sender.name, command.lock_epoch):
        text = f"the lock on conversation {command.session_id}, epoch {command.lock_epoch}, is over"
        hint = "acquire it again, and see what was said meanwhile"
        raise StaleEpoch(text, hint=hint, owner=lock.holder, epoch=lock.epoch)


def _require_admitted(session_id: str, session: Session, name: str, tables: SessionTables) -> None:
    if not _admits(session_id, session, name, tables):
        raise Forbidden(
            f"session {session_id} admits {_ADMITS[session.admission]}, not {name}",
            hint=f"ask its owner, {session.owner}",
            owner=session.owner,
        )


def _admits(session_id: str, session: Session, name: str, tables: SessionTables) -> bool:
    if session.owner == name or session.admission == "open":
        return True
    invited = tables.invited.get((session_id, name)) is not None
    return session.admission == "invited" and invited


def _contributed(
    session_id: str,
    session: Session,
    entry: Contribute | Entry,
    name: str,
    tables: SessionTables,
    given: Given,
) -> tuple[Event, ...]:
    """Return the events of an entry by anyone: who is new becomes a participant."""
    events = _entry_events(session_id, session, entry, name, given)
    if tables.participants.get((session_id, name)) is None:
        return (Joined(session_id, name, given.now), *events)
    return events


def _record(command: RecordEntry, tables: SessionTables, given: Given) -> Decision:
    """Record what the owner of completions has accepted, unless it is not to be any more."""
    session_id, request_id = command.session_id, command.request_id
    session = _open(tables, session_id)
    is_request = command.event == "completion:request"
    is_open = tables.open.get((session_id, request_id)) is not None
    if is_request == is_open:
        return Decision()
    if is_request:
        _require_admitted(session_id, session, command.agent_id, tables)
    entry = Entry(event=command.event, data=command.data, correlation_id=request_id)
    events = _contributed(session_id, session, entry, command.agent_id, tables, given)
    mark = (RequestOpened if is_request else RequestSettled)(session_id, request_id)
    return Decision((*events, mark))


_ADMITS: Final = {"open": "anyone", "invited": "those invited", "closed": "nobody else"}


def _transfer(command: Transfer, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    session_id = command.session_id
    if sender.role == "operator":
        session = _open(tables, session_id)
    else:
        session = _writable(tables, session_id, sender, command.epoch)
    if command.to_agent == session.owner:
        raise Conflict(f"{command.to_agent} owns session {session_id} already", epoch=session.epoch)
    return _change_owner(session_id, session, command.to_agent, given)


def _claim(command: Claim, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    session = _open(tables, command.session_id)
    if sender.role != "operator" and session.owner != sender.name:
        left_s = _lease_left_s(session, tables, given)
        if left_s is None or left_s > 0:
            why = "has no lease" if left_s is None else f"has a lease for {left_s:.1f} s more"
            raise NotOwner(
                f"session {command.session_id} is written by {session.owner} and {why}",
                hint=f"ask {session.owner} to transfer it",
                owner=session.owner,
                epoch=session.epoch,
                lease_left_s=left_s,
            )
    return _change_owner(command.session_id, session, sender.name, given)


def _close(command: Close, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    if sender.role == "operator":
        session = _open(tables, command.session_id)
    else:
        session = _writable(tables, command.session_id, sender, command.epoch)
    session_id = command.session_id
    reply = Ownership(session_id=session_id, owner=session.owner, epoch=session.epoch)
    sends: tuple[Send, ...] = ()
    for _ in tables.open.range(prefix=(session_id,)):
        word = ClosedSession(session_id=session_id)
        sends = (Send("completion", "completion:session_closed", word),)
        break
    return Decision((SessionClosed(session_id, sender.name, given.now),), reply, sends)


def _archive(command: Archive, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    events = []
    for session_id in dict.fromkeys(command.session_ids):
        session = _known(tables, session_id)
        if session.status != "closed":
            raise Conflict(
                f"session {session_id} is not closed",
                hint=f"ksi ask session:close --session-id {session_id}",
                status=session.status,
            )
        events.append(SessionArchived(session_id, session.size, sender.name, given.now))
    return Decision(tuple(events))


def _unarchive(command: Unarchive, sender: Sender, tables: SessionTables, given: Given) -> Decision:
    events = []
    for session_id in dict.fromkeys(command.session_ids):
        _known(tables, session_id)
        if tables.archived.get(session_id) is not None:
            events.append(SessionUnarchived(session_id, sender.name, given.now))
    return Decision(tuple(events))


def _heartbeat(command: Heartbeat, tables: SessionTables, given: Given) -> Decision:
    for _ in tables.leased.range(prefix=(command.agent_id,)):
        return Decision((OwnerSeen(command.agent_id, given.time_s),))
    return Decision()


def _change_owner(session_id: str, session: Session, owner: str, given: Given) -> Decision:
    epoch = session.epoch + 1
    changed = OwnerChanged(session_id, owner, epoch, given.now, given.time_s)
    return Decision((changed,), Ownership(session_id=session_id, owner=owner, epoch=epoch))


def _known(tables: SessionTables, session_id: str) -> Session:
    session = tables.sessions.get(session_id)
    if session is None:
        raise NotFound(
            f"there is no session {session_id}", hint="ksi sessions list", session_id=session_id
        )
    return session


def _open(tables: SessionTables, session_id: str) -> Session:
    session = _known(tables, session_id)
    if session.status == "closed":
        raise Conflict(f"session {session_id} is closed", hint="create another", status="closed")
    return session


def _writable(tables: SessionTables, session_id: str, sender: Sender, epoch: int | None) -> Session:
    """Return the session if the sender writes it now: a former epoch is refused before a name."""
    session = _open(tables, session_id)
    if epoch is not None and epoch != session.epoch:
        raise StaleEpoch(
            f"session {session_id} is in epoch {session.epoch}, not {epoch}",
            hint="stop writing, or claim the session",
            owner=session.owner,
            epoch=session.epoch,
        )
    if session.owner != sender.name:
        raise NotOwner(
            f"session {session_id} is written by {session.owner} (epoch {session.epoch}), "
            f"not by {sender.name}",
            hint=f"ask {session.owner}, or contribute: ksi help session:contribute",
            owner=session.owner,
            epoch=session.epoch,
        )
    return session


def _lease_left_s(session: Session, tables: SessionTables, given: Given) -> float | None:
    if session.lease_s is None:
        return None
    seen = tables.seen.get(session.owner)
    active_s = max(session.active_s, seen.time_s if seen else 0.0)
    return active_s + session.lease_s - given.time_s


class _Metadata(msgspec.Struct, omit_defaults=True):
    session_id: str
    agent_id: str
    seq: int
    epoch: int
    pattern: str | None = None  # the one it shows, or the one its session is of
    owner: str | None = None  # who owns the session, where that is not the one who speaks


class _Line(msgspec.Struct, omit_defaults=True):
    """An entry as its line holds it: the documented form, with what the system vouches for."""

    event: str
    data: dict[str, Any]
    timestamp: float
    metadata: _Metadata
    correlation_id: str | None = None


_encode_line: Final = msgspec.json.Encoder().encode
# What some readers take for the end of a line, or a terminal for a command.
_UNSAFE: Final = re.compile("[\u0080-\u009f\u2028\u2029]")


def _entry_events(
    session_id: str,
    session: Session,
    entry: Append | Contribute | Entry,
    agent_id: str,
    given: Given,
) -> tuple[Event, ...]:
    data = entry.data
    pattern = None if _MARKS.isdisjoint(data) else detect_pattern(data)
    seq = session.seq + 1
    metadata = _Metadata(
        session_id,
        agent_id,
        seq,
        session.epoch,
        pattern or (session.pattern if session.pattern in PATTERNS else None),
        session.owner if session.owner != agent_id else None,
    )
    line = _encode_line(_Line(entry.event, data, given.now, metadata, entry.correlation_id))
    if not line.isascii():
        line = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line.decode()).encode()
    line += b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise TooLarge(
            f"the entry is {len(line)} bytes as a line, over the limit of {LINE_BYTES_MAX}",
            size_bytes=len(line),
            limit_bytes=LINE_BYTES_MAX,
        )
    appended = EntryAppended(
        session_id, agent_id, seq, session.size, line, given.now, given.time_s, pattern
    )
    taken = None if _MARKS.isdisjoint(data) else detect_role(data)
    if taken is None:
        return (appended,)
    role, previous, duration = taken
    return (
        appended,
        RoleTaken(session_id, agent_id, seq, role, previous, duration, given.now),
    )


PATTERNS: Final = frozenset(
    {
        "peer_to_peer",
        "broadcast",
        "team",
        "swarm",
        "peer_discovery",
        "team_formation",
        "role_assumption",
    }
)
_MARKS: Final = frozenset(
    {
        "pattern",
        "broadcast",
        "team_id",
        "swarm_id",
        "to_agent",
        "capabilities",
        "role",
        "new_role",
        "context",
    }
)


def detect_pattern(data: Mapping[str, Any]) -> str | None:
    """Return the communication pattern an entry shows, or None.

    What it declares goes first; then a change of role, joining a team, speaking within one, a
    call to all, an answer that offers capabilities, and speaking to one other.
    Source: "KSI Dynamic Storage Architecture", Dynamic Communication Patterns.
    """
    declared = data.get("pattern")
    if isinstance(declared, str) and declared in PATTERNS:
        return declared
    if _transition(data) is not None or "new_role" in data:
        return "role_assumption"
    if "team_id" in data:
        return "team_formation" if "role" in data else "team"
    if "swarm_id" in data:
        return "swarm"
    if data.get("broadcast") is True:
        return "broadcast"
    if "capabilities" in data:
        return "peer_discovery"
    return "peer_to_peer" if "to_agent" in data else None


def detect_role(data: Mapping[str, Any]) -> tuple[str, str | None, str | None] | None:
    """Return the role an entry takes, the one it leaves and for how long, or None.

    The document has three forms: `context.role_transition`, `new_role` with `previous_role`, and
    a plain `role`.
    """
    change = _transition(data)
    if change is not None:
        role, previous, duration = change.get("to"), change.get("from"), change.get("duration")
    elif "new_role" in data:
        role, previous, duration = data["new_role"], data.get("previous_role"), None
    else:
        role, previous, duration = data.get("role"), None, None
    if not isinstance(role, str) or not role:
        return None
    return (
        role[:128],
        previous[:128] if isinstance(previous, str) else None,
        duration[:128] if isinstance(duration, str) else None,
    )


def _transition(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    context = data.get("context")
    change = context.get("role_transition") if isinstance(context, dict) else None
    return change if isinstance(change, dict) else None


def _grown(session: Session, appended: Any, active_s: float) -> Session:
    return Session(
        session.owner,
        session.epoch,
        appended.seq,
        appended.offset + len(appended.line),
        session.created_at,
        appended.now,
        active_s,
        session.status,
        appended.pattern or session.pattern,
        session.admission,
        session.lease_s,
        session.title,
    )


def _entry_appended(event: EntryAppended, tables: SessionTables) -> None:
    session = _known(tables, event.session_id)
    active_s = event.time_s if event.agent_id == session.owner else session.active_s
    tables.sessions.put(event.session_id, _grown(session, event, active_s))
    if event.seq % ANCHOR_EVERY == 1:
        tables.anchors.put((event.session_id, event.seq), Anchor(event.offset))


def _session_of(event: SessionCreated) -> Session:
    return Session(
        event.owner,
        1,
        0,
        0,
        event.now,
        event.now,
        event.time_s,
        "active",
        event.pattern,
        event.admission,
        event.lease_s,
        event.title,
    )


def _session_created(event: SessionCreated, tables: SessionTables) -> None:
    tables.sessions.put(event.session_id, _session_of(event))
    tables.owned.put((event.owner, event.session_id), b"")
    tables.participants.put((event.session_id, event.owner), Participant(event.now, None))
    for agent_id in event.invited:
        tables.invited.put((event.session_id, agent_id), b"")
    if event.lease_s is not None:
        tables.leased.put((event.owner, event.session_id), b"")


def _role_taken(event: RoleTaken, tables: SessionTables) -> None:
    key = (event.session_id, event.agent_id)
    known = tables.participants.get(key)
    joined_at = known.joined_at if known else event.now
    previous = event.previous or (known.role if known else None)
    tables.participants.put(key, Participant(joined_at, event.role))
    change = RoleChange(event.agent_id, event.role, previous, event.duration, event.now)
    tables.roles.put((event.session_id, event.seq), change)


def _owner_changed(event: OwnerChanged, tables: SessionTables) -> None:
    session = _known(tables, event.session_id)
    former, owner = (session.owner, event.session_id), (event.owner, event.session_id)
    tables.owned.delete(former)
    tables.owned.put(owner, b"")
    if session.lease_s is not None:
        tables.leased.delete(former)
        tables.leased.put(owner, b"")
    if tables.participants.get((event.session_id, event.owner)) is None:
        tables.participants.put((event.session_id, event.owner), Participant(event.now, None))
    changed = msgspec.structs.replace(
        session, owner=event.owner, epoch=event.epoch, updated_at=event.now, active_s=event.time_s
    )
    tables.sessions.put(event.session_id, changed)


def _session_closed(event: SessionClosed, tables: SessionTables) -> None:
    session = _known(tables, event.session_id)
    tables.leased.delete((session.owner, event.session_id))
    for key in [key for key, _ in tables.open.range(prefix=(event.session_id,))]:
        tables.open.delete(key)
    closed = msgspec.structs.replace(session, status="closed", updated_at=event.now)
    tables.sessions.put(event.session_id, closed)


def _get(query: Get, tables: SessionTables) -> SessionView:
    session_id, session = query.session_id, _known(tables, query.session_id)
    view = _view(session_id, session, tables)
    if query.agent_id is None:
        return view
    admits = _admits(session_id, session, query.agent_id, tables)
    return msgspec.structs.replace(view, admits=admits)


def _view(session_id: str, session: Session, tables: SessionTables) -> SessionView:
    parent = tables.parents.get(session_id)
    return SessionView(
        session_id=session_id,
        owner=session.owner,
        epoch=session.epoch,
        status=session.status,
        seq=session.seq,
        size_bytes=session.size,
        created_at=session.created_at,
        updated_at=session.updated_at,
        pattern=session.pattern,
        admission=session.admission,
        lease_s=session.lease_s,
        title=session.title,
        parent=None if parent is None else parent.session_id,
        parent_seq=None if parent is None else parent.seq,
    )


def _history(query: GetHistory, tables: SessionTables) -> History:
    session = _known(tables, query.session_id)
    seq = _seq_at(query.at, query.session_id, session, tables)
    after = max(0, seq - query.limit if query.after is None else min(query.after, seq))
    last = min(seq, after + query.limit)
    entries: list[dict[str, Any]] = []
    if after < last:
        start = _offset(tables, query.session_id, after)
        skipped = after % ANCHOR_EVERY
        stop = session.size
        beyond = -(-last // ANCHOR_EVERY) * ANCHOR_EVERY  # the anchor at or after the last
        if beyond < session.seq:
            stop = _offset(tables, query.session_id, beyond)
        lines = tables.lines.read(query.session_id, start, stop).split(b"\n")
        room = PAGE_BYTES_MAX
        for line in lines[skipped : skipped + last - after]:
            room -= len(line)
            if room < 0 and entries:
                break
            entries.append(msgspec.json.decode(line))
    upto = after + len(entries)
    return History(
        session_id=query.session_id,
        entries=entries,
        first_seq=after + 1,
        seq=seq,
        next=upto if upto < seq else None,
    )


def _seq_at(at: int | str | None, session_id: str, session: Session, tables: SessionTables) -> int:
    """Return how many entries the session had: at an entry, or at a time."""
    if isinstance(at, str):
        return _seq_then(moment(at, what="at"), session_id, session, tables)
    return _seq_up_to(at, session_id, session)


def _seq_up_to(at: int | None, session_id: str, session: Session) -> int:
    if at is None:
        return session.seq
    if at > session.seq:
        text = f"session {session_id} has {session.seq} entries, not {at}"
        raise NotFound(text, hint="ksi sessions show SESSION", seq=session.seq)
    return at


class _Stamp(msgspec.Struct):
    timestamp: float


_stamp_of: Final = msgspec.json.Decoder(_Stamp).decode


def _seq_then(then: float, session_id: str, session: Session, tables: SessionTables) -> int:
    """Return how many entries were written until then, by the first entries behind anchors."""

    def lines(block: int, bytes_max: int | None = None) -> list[bytes]:
        start, stop = _offset(tables, session_id, block * ANCHOR_EVERY), session.size
        if (block + 1) * ANCHOR_EVERY < session.seq:
            stop = _offset(tables, session_id, (block + 1) * ANCHOR_EVERY)
        if bytes_max is not None:
            stop = min(stop, start + bytes_max)
        return tables.lines.read(session_id, start, stop).split(b"\n")[:ANCHOR_EVERY]

    def begins_later(block: int) -> bool:
        return _stamp_of(lines(block, LINE_BYTES_MAX)[0]).timestamp > then

    blocks = range(-(-session.seq // ANCHOR_EVERY))
    block = bisect_left(blocks, True, key=begins_later) - 1
    if block < 0:
        return 0
    stamps = [_stamp_of(line).timestamp for line in lines(block) if line]
    return block * ANCHOR_EVERY + bisect_right(stamps, then)


def _offset(tables: SessionTables, session_id: str, after: int) -> int:
    """Return where the line begins that follows entry `after`, rounded down to an anchor."""
    anchor = tables.anchors.get((session_id, after - after % ANCHOR_EVERY + 1))
    return 0 if anchor is None else anchor.offset


def _list(query: ListSessions, tables: SessionTables) -> SessionPage:
    found: list[SessionView] = []
    start = _beyond(query.after or "")
    if query.owner is not None:
        keys = (
            key[1] for key, _ in tables.owned.range((query.owner, start), prefix=(query.owner,))
        )
    else:
        keys = (key for key, _ in tables.sessions.range(start))
    last = None
    for looked, session_id in enumerate(keys):
        if len(found) == query.limit or looked == SCAN_ROWS_MAX:
            return SessionPage(sessions=found, next=last)
        last = session_id
        session = _known(tables, session_id)
        if query.status in (None, session.status) and query.pattern in (None, session.pattern):
            found.append(_view(session_id, session, tables))
    return SessionPage(sessions=found, next=None)


def _list_archived(query: ListArchived, tables: SessionTables) -> ArchivedPage:
    found: list[ArchivedSession] = []
    for session_id, archived in tables.archived.range(_beyond(query.after or "")):
        if len(found) == query.limit:
            return ArchivedPage(sessions=found, next=found[-1].session_id)
        found.append(
            ArchivedSession(
                session_id=session_id,
                size_bytes=_known(tables, session_id).size,
                archived_at=archived.at,
                archived_by=archived.by,
            )
        )
    return ArchivedPage(sessions=found, next=None)


def _beyond(key: str) -> str:
    """Return the least key above `key`: no id holds a character this low."""
    return f"{key}\x01" if key else ""


def _participants(query: GetParticipants, tables: SessionTables) -> Participants:
    _known(tables, query.session_id)
    roles: dict[str, list[dict[str, Any]]] = {}
    for (_, seq), change in tables.roles.range(prefix=(query.session_id,)):
        roles.setdefault(change.agent_id, []).append(
            {
                "seq": seq,
                "role": change.role,
                "previous": change.previous,
                "duration": change.duration,
                "at": change.at,
            }
        )
    views = [
        ParticipantView(
            agent_id=agent_id,
            joined_at=participant.joined_at,
            role=participant.role,
            roles=roles.get(agent_id, []),
        )
        for (_, agent_id), participant in tables.participants.range(prefix=(query.session_id,))
    ]
    return Participants(session_id=query.session_id, participants=views)


def _told(session_id: str, what: str, sender: str, **message: Any) -> Announcement:
    message = {"session_id": session_id, **message}
    return Announcement(f"session.{session_id}.{what}", message, sender)
