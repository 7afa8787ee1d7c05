"""What the event log says, read in place: pages of events, and how far it has come.

`Describer` is the one place that says what an event of a journal is to the log. Texts of sessions
are not repeated there: a line refers to the bytes of the session file. Any other value that is too
large for a line is kept beside it, and referred to, too; a reference holds length and SHA-256.
What an owner calls private is not there at all, but for those two.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import Any, Final, NamedTuple

import msgspec

from ksi.actors.delivery import HOST_RECORDS, Record
from ksi.actors.owner import Event, Owner
from ksi.storage.archive import Archive
from ksi.storage.errors import Corrupt
from ksi.storage.eventlog import (
    EVENTS,
    PAYLOADS,
    Scan,
    days_in,
    read_payload,
    read_place,
    whole_bytes,
)
from ksi.transport.errors import KsiError
from ksi.transport.identity import RESERVED
from ksi.transport.limits import (
    EVENT_PAYLOAD_BYTES,
    EVENT_RING_BYTES_MAX,
    EVENT_RING_MAX,
    EVENT_SCAN_BYTES_MAX,
    FRAME_BYTES_MAX,
)
from ksi.transport.moments import TimeRange, day_of, time_range
from ksi.transport.patterns import matcher, plain_part

PAGE_BYTES: Final = FRAME_BYTES_MAX * 3 // 4  # An answer fits into a frame.
RATE_S: Final = 60.0  # Over how long events a second are counted.
# Fields that name agents, the one who has done it first.
_AGENTS: Final = (
    "agent_id", "requester", "sender", "owner", "worker", "to_agent", "by", "observer",
    "subscriber",
)  # fmt: skip
_SHOWN: Final = frozenset({"now", "time_s", "session_id", "correlation_id"})  # beside the data
_to_json: Final = msgspec.json.Encoder().encode
# What some readers take for the end of a line.
_UNSAFE: Final = re.compile("[\u0080-\u009f\u2028\u2029]")

Keep = Callable[[bytes], dict[str, Any]]  # keeps a value as JSON beside the log; the reference


class Source(msgspec.Struct, gc=False):
    """Where an event comes from: the journal it is in, and the command that led to it."""

    owner: str
    store: str
    seq: int
    index: int
    operation: str


class LoggedEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """An event as its line holds it: the documented form, numbered, with what it is found by."""

    n: int
    event: str
    timestamp: float
    data: dict[str, Any]
    metadata: Source
    agents: list[str] = []
    session_id: str | None = None
    correlation_id: str | None = None


class Head(msgspec.Struct, gc=False):
    """Of a line, what filters look at."""

    event: str
    timestamp: float
    agents: tuple[str, ...] = ()
    session_id: str | None = None
    correlation_id: str | None = None


class _Entry(msgspec.Struct, gc=False):
    """Of a session's line, what the log says of it."""

    event: str = ""
    correlation_id: str | None = None


head_of: Final = msgspec.json.Decoder(Head).decode
_entry_of: Final = msgspec.json.Decoder(_Entry).decode


def event_directory(var: Path) -> Path:
    """Return where the event log is."""
    return var / "logs" / "events"


def event_archive(var: Path) -> Path:
    """Return where days are that are not in it any more."""
    return var / "archive" / "events"


def archived_days(var: Path) -> dict[str, dict[str, int]]:
    """Return the days in the archive: `size_bytes` of each, and `archived_bytes` it takes there."""
    found = {}
    for day in days_in(event_archive(var)):
        archive = Archive(event_archive(var) / day)
        sizes = {key: size for key in (EVENTS, PAYLOADS) if (size := archive.size(key)) is not None}
        found[day] = {
            "size_bytes": sum(sizes.values()),
            "archived_bytes": sum(archive.path(key).stat().st_size for key in sizes),
        }
    return found


class _Kind(NamedTuple):
    """What events of one type are to the log: worked out once.

    Attributes:
        shown: fields that are its data; encoded: those of them that are bytes; agents: those that
            name agents.
    """

    name: str
    shown: tuple[str, ...]
    encoded: tuple[str, ...]
    agents: tuple[str, ...]
    private: tuple[str, ...]


class Describer:
    """Says what events of one owner are to the log."""

    def __init__(self, owner: Owner[Any]) -> None:
        self._owner = owner
        self._domain = owner.domains[0] if owner.domains else owner.name
        self._kinds: dict[type[Event], _Kind | None] = dict.fromkeys(owner.routine)

    def __call__(
        self, event: Event, record: Record[Any], source: Source, now: float
    ) -> LoggedEvent | None:
        """Return what the log says of an event; None for signs of life. Its number is 0 yet."""
        try:
            kind = self._kinds[type(event)]
        except KeyError:
            kind = self._kinds[type(event)] = self._kind(type(event))
        if kind is None:
            return None
        fields = msgspec.structs.asdict(event)
        correlation_id = fields.get("correlation_id") or fields.get("request_id")
        for name in kind.private:
            value = fields[name]
            fields[name] = _digest(value if type(value) is bytes else _to_json(value))
        if kind.encoded:
            correlation_id = self._open(event, fields, kind.encoded) or correlation_id
        return LoggedEvent(
            0,
            kind.name,
            fields.get("now", now),
            {name: value for name in kind.shown if (value := fields[name]) is not None},
            source,
            _agents(fields, kind.agents, record),
            fields.get("session_id"),
            correlation_id,
        )

    def _kind(self, kind: type[Event]) -> _Kind:
        fields = kind.__struct_fields__
        private = tuple(name for name in fields if name in self._owner.private)
        types = {field.name: field.type for field in msgspec.structs.fields(kind)}
        return _Kind(
            name=f"{self._domain}:{kind.__struct_config__.tag}",
            shown=tuple(name for name in fields if name not in _SHOWN),
            encoded=tuple(name for name in fields if types[name] is bytes and name not in private),
            agents=tuple(name for name in _AGENTS if name in fields),
            private=private,
        )

    def _open(self, event: Event, fields: dict[str, Any], encoded: Sequence[str]) -> str | None:
        """Put values in the place of bytes; return the correlation id they tell of."""
        correlation_id = None
        lines = tuple(self._owner.lines(event))
        for name in encoded:
            value = fields[name]
            if line := next((each for each in lines if each.content is value), None):
                entry = _entry_of(value)
                correlation_id = entry.correlation_id
                place = {"log": line.key, "offset": line.offset, **_digest(value)}
                fields[name] = {"event": entry.event, "ref": place}
            else:
                with suppress(msgspec.MsgspecError):
                    fields[name] = msgspec.msgpack.decode(value)
        return correlation_id


def line_of(logged: LoggedEvent, keep: Keep) -> bytes:
    """Return an event as a line, what is too large for it kept beside."""
    line = _to_json(logged)
    if len(line) > EVENT_PAYLOAD_BYTES:
        data = logged.data
        for name, value in data.items():
            content = _to_json(value)
            if len(content) > EVENT_PAYLOAD_BYTES:
                data[name] = {"ref": {**keep(content), **_digest(content)}}
        line = _to_json(logged)
    if not line.isascii():
        line = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line.decode()).encode()
    return line + b"\n"


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def _agents(fields: Mapping[str, Any], named: Sequence[str], record: Record[Any]) -> list[str]:
    """Return whom an event is about: who has done it, then the others."""
    names = [] if record.operation in HOST_RECORDS else [record.sender]
    names += [value for name in named if type(value := fields[name]) is str]
    names += [agent for agent, _ in fields.get("receivers", ())]
    return [name for name in dict.fromkeys(names) if name and name not in RESERVED]


# An event that was met on the way through the log: its number, its line and what filters look at.
# The line is empty where it only says how far one has come; then, and where the line is none of
# ours, there is no head.
Met = tuple[int, bytes, Head | None]


class _Held(NamedTuple):
    """What a ring holds.

    Attributes:
        files: those that were read, with their sizes; upto: which number.
        events: in order; first: the log has no other event from this number on.
    """

    files: dict[Hashable, int]
    upto: int
    events: list[Met]
    first: int


class Ring:
    """The newest events in memory, each as it is in its file.

    What it holds is replaced, never changed: whoever goes through it goes on undisturbed.
    """

    def __init__(self) -> None:
        self._held = _Held({}, 0, [], 0)

    def follow(self, scan: Scan) -> tuple[list[Met], int]:
        """Return the newest events of a scan, and from which number on they are all there are.

        They are in order. It reads what has come since it was asked last, or all that it may hold,
        where it holds none or a file is not the one it has read.
        """
        files: dict[Hashable, int] = {part.file: part.size for part in scan.parts}
        known = self._held
        has_grown = all(files.get(file, -1) >= size for file, size in known.files.items())
        is_news = all(p.first > known.upto for p in scan.parts if p.file not in known.files)
        if not (has_grown and is_news):  # A day was removed, or came back from the archive.
            known = _Held({}, 0, [], 0)
        if (files, scan.last) == (known.files, known.upto):
            return known.events, known.first
        last = known.events[-1][0] if known.events else 0
        fresh: list[Met] = []
        before: list[Met] = []
        first, room = 0, EVENT_RING_BYTES_MAX
        for n, line, head in map(_met, scan.lines((), after=None, reverse=True)):
            if head is None:
                continue
            if n <= last:
                before, first = known.events, known.first
                break
            room -= len(line)
            if fresh and (len(fresh) == EVENT_RING_MAX or room < 0):
                first = fresh[-1][0]
                break
            fresh.append((n, line, _shared(head)))
        events = [*before, *reversed(fresh)]
        over = _over(events)
        if over:
            events = events[over:]
            first = events[0][0]
        self._held = _Held(files, scan.last, events, first)
        return events, first


class EventLogView:
    """The event log of one var, for queries: see `ksi.actors.owner.EventLog`.

    Whoever asks again for the newest has them in memory. The first question, often the only one of
    its process, does not wait for that; and whoever only follows has no use for it.
    """

    def __init__(self, var: Path) -> None:
        self._var = var
        self._directory = event_directory(var)
        self._sessions: Any = None
        self._ring: Ring | None = None
        self._is_asked = False  # for the newest

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return `events` that agree with all that is wanted, in the order of their numbers.

        Args:
            wanted: `patterns` of names, and of those to `exclude`, `agent_id` or patterns of
                `agents`, `session_id`, `correlation_id`, moments `since` and `until`, a number
                `after`, `offset`, `limit`, `reverse`, and `resolve` for values in the place of
                references; all may be missing.

        Returns:
            `events`; `next` and `offset`: what `after` and `offset` of the next page are, None at
            the end; `upto`: the number of the last event that was looked at.

        Raises:
            Invalid: there is no such time.
        """
        times = time_range(wanted.get("since"), wanted.get("until"), now=time.time())
        found: list[dict[str, Any]] = []
        room, skip = PAGE_BYTES, wanted.get("offset", 0)
        after, reverse = wanted.get("after"), wanted.get("reverse", False)
        limit, resolve = wanted.get("limit", 100), wanted.get("resolve", False)
        scan = Scan(self._directory, days_in(self._directory))
        upto = (after or 0) if after is not None else (scan.last if reverse else 0)
        agrees = _filter(wanted, times)
        for n, line, head in self._met(scan, wanted, _days(self._directory, times)):
            if head is None and line:  # Its number is not one of ours either.
                continue
            if head is not None and agrees(head):
                if skip:
                    skip -= 1
                else:
                    event, size = self._event(line, resolve=resolve)
                    if len(found) == limit or (found and room < size):
                        break
                    found.append(event)
                    room -= size
            upto = n
            if not line and scan.read_bytes > EVENT_SCAN_BYTES_MAX:
                break
        else:
            return {"events": found, "next": None, "offset": None, "upto": upto}
        return {"events": found, "next": upto, "offset": skip, "upto": upto}

    def _met(
        self, scan: Scan, wanted: Mapping[str, Any], days: Mapping[str, float]
    ) -> Iterator[Met]:
        """Yield events that may be wanted, in order: from memory as far as they are there."""
        after, reverse = wanted.get("after"), wanted.get("reverse", False)
        if reverse and self._is_asked and self._ring is None:
            self._ring = Ring()
        self._is_asked = self._is_asked or reverse
        if self._ring is not None:
            events, first = self._ring.follow(scan)
            if reverse:
                stop = len(events) if after is None else bisect_left(events, (after,))
                yield from reversed(events[:stop])
                after = first if after is None else min(first, after)
            elif (after or 0) + 1 >= first:
                yield from events[bisect_right(events, after or 0, key=itemgetter(0)) :]
                return
        lines = scan.lines(_needles(wanted), after=after, reverse=reverse, days=days)
        yield from map(_met, lines)

    def newest(self) -> int:
        """Return the number of the newest event, 0 where there is none."""
        return Scan(self._directory, days_in(self._directory)).last

    def state(self) -> dict[str, Any]:
        """Return how much there is, from when to when, and what of the journals is not in it."""
        days = days_in(self._directory)
        place = read_place(self._directory)
        counted = {day: self._count(day, place) for day in days}
        scan = Scan(self._directory, days)
        edges = [
            next((head_of(line).timestamp for _, line in lines if line), None)
            for lines in (scan.lines((), after=None, reverse=each) for each in (False, True))
        ]
        return {
            "events": sum(counted.values()),
            "days": counted,
            "dropped": place.dropped if place else 0,
            "n": scan.last,
            "oldest": edges[0],
            "newest": edges[1],
            "per_s": self._rate(edges[1]),
            "behind": self._behind(place),
        }

    def _count(self, day: str, place: Any) -> int:
        """Return how many events are logged of a day: as noted, and what has come since."""
        known = place.days.get(day) if place else None
        directory = self._directory / day
        start, events = (known.events_bytes, known.events) if known else (0, 0)
        stop = whole_bytes(directory, EVENTS)
        if stop < start:
            start, events = 0, 0
        if stop > start:
            with suppress(OSError), (directory / f"{EVENTS}.jsonl").open("rb") as file:
                file.seek(start)
                while start < stop and (content := file.read(min(1 << 20, stop - start))):
                    events += content.count(b"\n")
                    start += len(content)
        return events

    def _rate(self, newest: float | None) -> float:
        """Return how many events a second there were in the last minute."""
        now = time.time()
        if newest is None or newest < now - RATE_S:
            return 0.0
        times = time_range(now - RATE_S, None)
        days = _days(self._directory, times)
        scan = Scan(self._directory, [*days])
        count = 0
        for _, line in scan.lines((), after=None, reverse=True, days=days):
            if line and head_of(line).timestamp >= now - RATE_S:
                count += 1
            elif line or scan.read_bytes > EVENT_SCAN_BYTES_MAX:
                break
        return round(count / RATE_S, 3)

    def _behind(self, place: Any) -> dict[str, int]:
        """Return how many records of each owner's journal are not looked at yet."""
        from ksi.actors.owners import OWNERS, load
        from ksi.actors.reading import reader_of

        behind = {}
        for name in OWNERS:
            with suppress(KsiError):
                meta = reader_of(load(name), self._var).committed()
                known = place.owners.get(name) if place else None
                seq = known.seq if known is not None and known.store == meta.store else 0
                behind[name] = max(0, meta.seq - seq)
        return behind

    def _event(self, line: bytes, *, resolve: bool) -> tuple[dict[str, Any], int]:
        """Return an event as plain values, and about how large it is."""
        event: dict[str, Any] = msgspec.json.decode(line)
        size = len(line)
        if resolve:
            for name, value in event["data"].items():
                ref = value.get("ref") if isinstance(value, dict) else None
                content = self._resolved(ref) if isinstance(ref, dict) else None
                if content is not None:
                    event["data"][name] = msgspec.json.decode(content)
                    size += len(content)
        return event, size

    def _resolved(self, ref: dict[str, Any]) -> bytes | None:
        """Return the bytes a reference is to, to the byte; None where they are there no more."""
        content: bytes | None = None
        if "payload" in ref:
            content = read_payload(self._directory, ref["payload"], ref["offset"], ref["bytes"])
        elif "log" in ref:
            with suppress(KsiError, Corrupt, OSError):
                content = self._session(ref["log"], ref["offset"], ref["offset"] + ref["bytes"])
        if content is None or sha256(content).hexdigest() != ref["sha256"]:
            return None
        return content

    def _session(self, key: str, start: int, stop: int) -> bytes:
        if self._sessions is None:
            from ksi.actors.reading import reader_of

            self._sessions = reader_of("sessions", self._var)
        content: bytes = self._sessions.reader.log(key, start, stop)
        return content


def _met(found: tuple[int, bytes]) -> Met:
    n, line = found
    try:
        head = head_of(line) if line else None
    except msgspec.MsgspecError:  # Somebody has written into the file.
        head = None
    return n, line, head


def _shared(head: Head) -> Head:
    """Return a head whose names are those of others, too: thousands are held, and names are few."""
    head.event = intern(head.event)
    head.agents = tuple(map(intern, head.agents))
    head.session_id = head.session_id and intern(head.session_id)
    return head


def _over(events: Sequence[Met]) -> int:
    """Return how many of some events, the oldest, are more than a ring may hold."""
    over = max(0, len(events) - EVENT_RING_MAX)
    size = sum(len(line) for _, line, _ in events[over:])
    while size > EVENT_RING_BYTES_MAX:
        size -= len(events[over][1])
        over += 1
    return over


def _days(directory: Path, times: TimeRange) -> dict[str, float]:
    """Return the days that may hold events of a range, and of each from when on; 0.0: all."""
    since = 0.0 if times.since is None else times.since
    first = day_of(since)
    last = None if times.until is None else day_of(times.until)
    return {
        day: since if day == first else 0.0
        for day in days_in(directory)
        if first <= day and (last is None or day <= last)
    }


def _needles(wanted: Mapping[str, Any]) -> list[bytes]:
    """Return what a line that is wanted holds in any case: most others are not even decoded."""
    names = ("correlation_id", "session_id", "agent_id")
    needles = [_to_json(wanted[name]) for name in names if wanted.get(name) is not None]
    patterns: Sequence[str] = wanted.get("patterns") or ()
    if len(patterns) == 1 and (plain := plain_part(patterns[0])):
        needles.append(b'"event":' + _to_json(plain)[:-1])
    return [needle for needle in needles if needle.isascii()]


def _filter(wanted: Mapping[str, Any], times: TimeRange) -> Callable[[Head], bool]:
    """Return what tells whether an event is wanted."""
    named = cache(matcher(tuple(wanted.get("patterns") or ())))
    is_excluded = cache(matcher(tuple(wanted.get("exclude") or ())))
    is_meant = matcher(tuple(wanted.get("agents") or ()))
    agent_id, session_id = wanted.get("agent_id"), wanted.get("session_id")
    correlation_id = wanted.get("correlation_id")
    checks: dict[str, Callable[[Head], bool]] = {
        "since": lambda head: times.holds(head.timestamp),
        "until": lambda head: times.holds(head.timestamp),
        "patterns": lambda head: named(head.event),
        "exclude": lambda head: not is_excluded(head.event),
        "agent_id": lambda head: agent_id in head.agents,
        "agents": lambda head: any(map(is_meant, head.agents)),
        "session_id": lambda head: session_id == head.session_id,
        "correlation_id": lambda head: correlation_id == head.correlation_id,
    }
    # Thousands are looked at: only what is asked is checked.
    agrees: Callable[[Head], bool] = _every
    for name, check in checks.items():
        if wanted.get(name) not in (None, [], ()):
            agrees = check if agrees is _every else _both(agrees, check)
    return agrees


def _every(_head: Head) -> bool:
    return True


def _both(one: Callable[[Head], bool], other: Callable[[Head], bool]) -> Callable[[Head], bool]:
    return lambda head: one(head) and other(head)
