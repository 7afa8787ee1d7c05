"""What the event log says, read in place: pages of events, and how far it has come.

`Describer` is the one place that says what an event of a journal is to the log. Texts of sessions
are not repeated there: a line refers to the bytes of the session file. Any other value that is too
large for a line is kept beside it, and referred to, too; a reference holds length and SHA-256.
What an owner calls private is not there at all, but for those two.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

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
from ksi.transport.limits import EVENT_PAYLOAD_BYTES, EVENT_SCAN_BYTES_MAX, FRAME_BYTES_MAX
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


class Source(msgspec.Struct):
    """Where an event comes from: the journal it is in, and the command that led to it."""

    owner: str
    store: str
    seq: int
    index: int
    operation: str


class LoggedEvent(msgspec.Struct, omit_defaults=True):
    """An event as its line holds it: the documented form, numbered, with what it is found by."""

    n: int
    event: str
    timestamp: float
    data: dict[str, Any]
    metadata: Source
    agents: list[str] = []
    session_id: str | None = None
    correlation_id: str | None = None


class Head(msgspec.Struct):
    """Of a line, what filters look at."""

    n: int
    event: str
    timestamp: float
    agents: list[str] = []
    session_id: str | None = None
    correlation_id: str | None = None


class _Entry(msgspec.Struct):
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


class Describer:
    """Says what events of one owner are to the log."""

    def __init__(self, owner: Owner[Any]) -> None:
        self._owner = owner
        self._domain = owner.domains[0] if owner.domains else owner.name

    def __call__(
        self, event: Event, record: Record[Any], source: Source, now: float
    ) -> LoggedEvent | None:
        """Return what the log says of an event; None for signs of life. Its number is 0 yet."""
        kind = type(event)
        if kind in self._owner.routine:
            return None
        fields = {name: getattr(event, name) for name in event.__struct_fields__}
        correlation_id = fields.get("correlation_id") or fields.get("request_id")
        for name in self._owner.private:
            if name in fields:
                value = fields[name]
                fields[name] = _digest(value if type(value) is bytes else _to_json(value))
        if kind_has_bytes(kind):
            correlation_id = self._open(event, fields) or correlation_id
        return LoggedEvent(
            n=0,
            event=f"{self._domain}:{kind.__struct_config__.tag}",
            timestamp=fields.get("now", now),
            data={
                name: value
                for name, value in fields.items()
                if value is not None and name not in _SHOWN
            },
            metadata=source,
            agents=_agents(fields, record),
            session_id=fields.get("session_id"),
            correlation_id=correlation_id,
        )

    def _open(self, event: Event, fields: dict[str, Any]) -> str | None:
        """Put values in the place of bytes; return the correlation id they tell of."""
        correlation_id = None
        lines = tuple(self._owner.lines(event))
        for name, value in fields.items():
            if type(value) is not bytes:
                continue
            if line := next((each for each in lines if each.content is value), None):
                entry = _entry_of(value)
                correlation_id = entry.correlation_id
                place = {"log": line.key, "offset": line.offset}
                fields[name] = {"event": entry.event, "ref": {**place, **_digest(value)}}
            else:
                with suppress(msgspec.MsgspecError):
                    fields[name] = msgspec.msgpack.decode(value)
        return correlation_id


@lru_cache
def kind_has_bytes(kind: type[Event]) -> bool:
    """Return whether events of a kind hold something encoded."""
    return any(field.type is bytes for field in msgspec.structs.fields(kind))


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


def _agents(fields: Mapping[str, Any], record: Record[Any]) -> list[str]:
    """Return whom an event is about: who has done it, then the others."""
    names = [] if record.operation in HOST_RECORDS else [record.sender]
    names += [fields[name] for name in _AGENTS if type(fields.get(name)) is str]
    names += [agent for agent, _ in fields.get("receivers", ())]
    return [name for name in dict.fromkeys(names) if name and name not in RESERVED]


class EventLogView:
    """The event log of one var, for queries: see `ksi.actors.owner.EventLog`."""

    def __init__(self, var: Path) -> None:
        self._var = var
        self._directory = event_directory(var)
        self._sessions: Any = None

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return `events` that agree with all that is wanted, in the order of their numbers.

        Args:
            wanted: `patterns` of names, `agent_id` or patterns of `agents`, `session_id`,
                `correlation_id`, moments `since` and `until`, a number `after`, `offset`,
                `limit`, `reverse`, and `resolve` for values in the place of references; all may
                be missing.

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
        scan = Scan(self._directory, _days(self._directory, times))
        upto = (after or 0) if after is not None else (scan.last if reverse else 0)
        agrees = _filter(wanted, times)
        for n, line in scan.lines(_needles(wanted), after=after, reverse=reverse):
            if line and agrees(line):
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
        scan = Scan(self._directory, _days(self._directory, times))
        count = 0
        for _, line in scan.lines((), after=None, reverse=True):
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


def _days(directory: Path, times: TimeRange) -> list[str]:
    """Return the days that may hold events of a range."""
    days = days_in(directory)
    if times.since is not None:
        days = [day for day in days if day >= day_of(times.since)]
    if times.until is not None:
        days = [day for day in days if day <= day_of(times.until)]
    return days


def _needles(wanted: Mapping[str, Any]) -> list[bytes]:
    """Return what a line that is wanted holds in any case: most others are not even decoded."""
    names = ("correlation_id", "session_id", "agent_id")
    needles = [_to_json(wanted[name]) for name in names if wanted.get(name) is not None]
    patterns: Sequence[str] = wanted.get("patterns") or ()
    if len(patterns) == 1 and (plain := plain_part(patterns[0])):
        needles.append(b'"event":' + _to_json(plain)[:-1])
    return [needle for needle in needles if needle.isascii()]


def _filter(wanted: Mapping[str, Any], times: TimeRange) -> Callable[[bytes], bool]:
    """Return what tells whether a line is wanted."""
    named = matcher(tuple(wanted.get("patterns") or ()))
    agent_id, session_id = wanted.get("agent_id"), wanted.get("session_id")
    correlation_id = wanted.get("correlation_id")
    target: Sequence[str] = wanted.get("agents") or ()
    is_meant = matcher(tuple(target))
    is_open = times.since is None and times.until is None

    def agrees(line: bytes) -> bool:
        try:
            head = head_of(line)
        except msgspec.MsgspecError:  # Somebody has written into the file.
            return False
        return (
            (is_open or times.holds(head.timestamp))
            and named(head.event)
            and (agent_id is None or agent_id in head.agents)
            and (not target or any(map(is_meant, head.agents)))
            and session_id in (None, head.session_id)
            and correlation_id in (None, head.correlation_id)
        )

    return agrees
