"""What the index says, read in place: rows, how far it has come, and whether it is right.

`describe` is the one place that says what a line is to the index. The row of a line depends on that
line alone, so whoever indexes it, and however often, comes to the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

import msgspec

from ksi.actors.owners.sessions import detect_role
from ksi.actors.reading import archive_directory, log_directory
from ksi.actors.supervision.reports import read_follower
from ksi.storage.archive import Archive
from ksi.storage.files import read_lines
from ksi.storage.index import Indexed, IndexReader, Known, Row
from ksi.storage.journal import segment_path, segments_in
from ksi.storage.reader import Reader
from ksi.transport.errors import NotRunning
from ksi.transport.identity import RESERVED, run_directory
from ksi.transport.limits import ID_PATTERN
from ksi.transport.moments import day_of

FOUND_MAX: Final = 100  # Differences told in words; the rest is counted.
FOUND_IN_ONE_MAX: Final = 3  # Of one session: behind a byte too many every line is elsewhere.
PAGE_SESSIONS: Final = 100
_COUNTS_MAX: Final = 5  # How often a day is counted before it is said to hold too many rows.
_NAMES_MAX: Final = 1024  # Kept, as what is made of them: whoever speaks speaks again.
_LATEST_S: Final = 253_402_300_800.0  # The end of the calendar.
_ID: Final = re.compile(ID_PATTERN)
_to_json: Final = msgspec.json.Encoder().encode


class _Metadata(msgspec.Struct, frozen=True, gc=False):
    agent_id: str | None = None
    owner: str | None = None
    seq: int = 0
    pattern: str | None = None


class _Data(msgspec.Struct, frozen=True, gc=False):
    """Of what was said, only what the index is about; the rest is not even decoded."""

    agent_id: Any = msgspec.UNSET
    to_agent: Any = msgspec.UNSET
    request_id: Any = msgspec.UNSET
    conversation_id: Any = msgspec.UNSET
    requests_response: Any = msgspec.UNSET
    role: Any = msgspec.UNSET
    new_role: Any = msgspec.UNSET
    previous_role: Any = msgspec.UNSET
    context: Any = msgspec.UNSET


class _Entry(msgspec.Struct, gc=False):
    event: str
    timestamp: float
    data: _Data = _Data()
    metadata: _Metadata = _Metadata()
    correlation_id: str | None = None


_decode: Final = msgspec.json.Decoder(_Entry).decode


def index_directory(var: Path) -> Path:
    """Return where the index is."""
    return var / "logs" / "index"


class Describer:
    """Says what lines of the session files of one var are to the index."""

    def __init__(self, var: Path) -> None:
        self._prefix = f"{os.path.realpath(log_directory(var))}/"

    def __call__(
        self, session_id: str, number: int | None, offset: int, content: bytes
    ) -> Indexed | None:
        """Return the row of line `number`, which begins at `offset`; None if it is no entry.

        Without a `number` it is the one the entry itself gives.
        """
        try:
            entry = _decode(content)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        metadata, data = entry.metadata, entry.data
        number = metadata.seq if number is None else number
        speaker = _speaker(metadata.agent_id, data.agent_id)
        owner = _name(metadata.owner) or speaker
        if speaker is None or owner is None or not 0 <= entry.timestamp < _LATEST_S:
            return None
        addressed = data.to_agent if isinstance(data.to_agent, list) else [data.to_agent]
        taking_part = _listed((owner, speaker, *filter(None, map(_name, addressed))))
        event, asks = entry.event, data.requests_response
        is_request = event.endswith(":request")
        correlation_id = entry.correlation_id or _text(data.request_id)
        requests_response = asks is True or (is_request and asks is not False)
        row = Row(
            f"{session_id}:{number:09d}",
            entry.timestamp,
            event,
            session_id,
            f"{self._prefix}{session_id}.jsonl",
            number,
            offset,
            owner,
            taking_part.shown,
            _roles(speaker, data),
            metadata.pattern,
            _text(data.conversation_id),
            correlation_id,
            int(event.startswith("completion:")),
            int(is_request),
            0,  # what has a response is found out when it is put in
            int(requests_response),
        )
        answers = not (is_request or requests_response or event.endswith(":progress"))
        return Indexed(row, taking_part.names, answers and correlation_id is not None)

    def made(self, reader: IndexReader) -> bool:
        """Return whether the index names the session files of this var, where it is now."""
        for day in reader.days()[-1:]:
            for (path,) in reader.query(day, "SELECT file_path FROM ksi_index LIMIT 1"):
                return str(path).startswith(self._prefix)
        return True


def _speaker(proven: str | None, said: Any) -> str | None:
    """Return who speaks: the proven sender, or whom an owner of the system has written it for."""
    if proven is None or proven in RESERVED:
        return _name(said) or _name(proven)
    return _name(proven)


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and _is_name(value) else None


@lru_cache(_NAMES_MAX)
def _is_name(text: str) -> bool:
    return _ID.match(text) is not None


class _TakingPart(NamedTuple):
    """Who takes part in an entry, and the same as its row has it."""

    names: tuple[str, ...]
    shown: str


@lru_cache(_NAMES_MAX)
def _listed(names: tuple[str, ...]) -> _TakingPart:
    each_once = tuple(dict.fromkeys(names))
    return _TakingPart(each_once, _to_json(each_once).decode())


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _roles(speaker: str, data: _Data) -> str:
    if data.role is data.new_role is data.context is msgspec.UNSET:
        return "{}"
    said = {
        name: value
        for name in ("role", "new_role", "previous_role", "context")
        if (value := getattr(data, name)) is not msgspec.UNSET
    }
    taken = detect_role(said)
    return "{}" if taken is None else _to_json({speaker: taken[0]}).decode()


class IndexView:
    """The index of one var, for the queries of its owner: see `ksi.actors.owner.Index`."""

    def __init__(self, var: Path) -> None:
        self._var = var
        self._reader = IndexReader(index_directory(var))
        self._sessions = Reader(var / "db" / "sessions", {})

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return rows as the database has them, by column. Takes what `IndexReader.select` does."""
        return [row._asdict() for row in self._reader.select(**wanted)]

    def participants(self, session_id: str) -> list[str]:
        """Return who takes part in a session, by name."""
        sql = "SELECT DISTINCT participating_agents FROM ksi_index WHERE session_id = ?"
        found: set[str] = set()
        for day in self._reader.days():
            for (listed,) in self._reader.query(day, sql, (session_id,)):
                found.update(msgspec.json.decode(listed))
        return sorted(found)

    def state(self) -> dict[str, Any]:
        """Return how far the follower has come, and what it says of itself."""
        counted = self._reader.cursor("SELECT count(*), coalesce(sum(rows), 0) FROM days")
        days, rows = counted[0] if counted else (0, 0)
        place = self._reader.place()
        return {
            "days": days,
            "rows": rows,
            "behind_bytes": self._behind_bytes(),
            "rebuilt": place.rebuilt if place else 0,
            **read_follower(run_directory(self._var), "index"),
        }

    def _behind_bytes(self) -> int | None:
        """Return how much of the journal is not indexed; None if that cannot be told."""
        place = self._reader.place()
        try:
            store, end = self._sessions.committed()
        except NotRunning:
            return None
        if place is None or place.store != store.name:
            return None
        behind = end.offset - place.position.offset
        for segment in segments_in(store):
            if place.position.segment <= segment < end.segment:
                behind += segment_path(store, segment).stat().st_size
        return max(0, behind)


class Verification:
    """Compares the index with the session files, row by row, a piece at a turn.

    Each line that was indexed is sought where its row says it is. What was added since is left out.

    Attributes:
        sessions, rows: how many were compared.
        done_bytes, total_bytes: of the files.
        differences: how many there are; `found` tells the first of them in words.
    """

    def __init__(self, var: Path) -> None:
        self._reader = IndexReader(index_directory(var))
        self._describe = Describer(var)
        self._logs = log_directory(var)
        self._archive = Archive(archive_directory(var))
        self._steps = self._run()
        sizes = self._reader.cursor("SELECT coalesce(sum(size_bytes), 0) FROM sessions")
        self.total_bytes: int = sizes[0][0] if sizes else 0
        self.done_bytes = self.sessions = self.rows = self.differences = 0
        self.found: list[str] = []

    def turn(self) -> bool:
        """Compare some; return whether there is more. Raises as `IndexReader.select`."""
        return next(self._steps, None) is not None

    def report(self) -> dict[str, Any]:
        """Return what was found, as plain values."""
        return {
            "sessions": self.sessions,
            "rows": self.rows,
            "differences": self.differences,
            "found": self.found,
        }

    def _run(self) -> Iterator[bool]:
        if not self._reader.cursor("SELECT 1 FROM place"):
            self._tell("there is no index")
            return
        after = ""
        while page := self._reader.cursor(
            "SELECT * FROM sessions WHERE session_id > ? ORDER BY session_id LIMIT ?",
            (after, PAGE_SESSIONS),
        ):
            for session_id, *known in page:
                yield from self._session(session_id, Known(*known))
                self.sessions += 1
            after = page[-1][0]
        for (day,) in self._reader.cursor("SELECT day FROM days ORDER BY day"):
            self._count(day)
            yield True

    def _session(self, session_id: str, known: Known) -> Iterator[bool]:
        name = f"{session_id}.jsonl"
        before = self.differences
        checksum = number = offset = 0
        links = _Links()
        for lines in read_lines(self._logs, session_id, known.size_bytes, self._archive):
            expected = []
            for line in lines:
                number += 1
                checksum = crc32(line, checksum)
                indexed = self._describe(session_id, number, offset, line)
                if indexed is not None:
                    expected.append(indexed)
                offset += len(line)
                self.done_bytes += len(line)
            self._rows(name, expected, links, before)
            yield True
        if offset < known.size_bytes:
            self._tell(
                f"{name} has {offset} whole bytes of lines, and {known.size_bytes} were indexed: it"
                " was shortened by hand"
            )
        elif checksum != known.checksum and self.differences == before:
            self._tell(f"{name} was changed by hand after it was indexed, where no row speaks of")
        early = [] if self._has_grown(session_id, known) else links.early()
        for id in (*links.missing(), *early):
            self._tell(f"row {id}: has_response is not what {name} says", before)

    def _rows(self, name: str, expected: list[Indexed], links: _Links, before: int) -> None:
        """Compare the rows of some lines with what the lines say."""
        by_day: dict[str, list[Row]] = {}
        for indexed in expected:
            by_day.setdefault(day_of(indexed.row.timestamp), []).append(indexed.row)
        stored: dict[str, Row] = {}
        for day, rows in by_day.items():
            for start in range(0, len(rows), 500):
                ids = [row.id for row in rows[start : start + 500]]
                sql = f"SELECT * FROM ksi_index WHERE id IN ({','.join('?' * len(ids))})"
                stored |= {row[0]: Row._make(row) for row in self._reader.query(day, sql, ids)}
        for indexed in expected:
            row, has = indexed.row, stored.get(indexed.row.id)
            self.rows += 1
            where = f"line {row.line_number} of {name}, at byte {row.byte_offset},"
            if has is None:
                self._tell(f"{where} has no row in the index of {day_of(row.timestamp)}", before)
                continue
            links.add(indexed, bool(has.has_response))
            wrong = [
                column
                for column, value, is_value in zip(Row._fields, row, has, strict=True)
                if column != "has_response" and value != is_value
            ]
            if wrong:
                self._tell(f"{where} is not what its row says: {', '.join(wrong)}", before)

    def _count(self, day: str) -> None:
        """Compare how many rows a day has with how many were put in."""
        sql = "SELECT rows FROM days WHERE day = ?"
        for _ in range(_COUNTS_MAX):
            before = self._reader.cursor(sql, (day,))
            found = self._reader.query(day, "SELECT count(*) FROM ksi_index")
            if before != self._reader.cursor(sql, (day,)) or found == before:
                return
        self._tell(
            f"{day}.db has {found[0][0] if found else 'no'} rows, and {before[0][0]} were indexed"
        )

    def _has_grown(self, session_id: str, known: Known) -> bool:
        """Return whether more has been indexed: a response may have come meanwhile."""
        now = self._reader.cursor("SELECT * FROM sessions WHERE session_id = ?", (session_id,))
        return bool(now) and tuple(now[0][1:]) != known

    def _tell(self, text: str, since: int | None = None) -> None:
        self.differences += 1
        many = since is not None and self.differences - since > FOUND_IN_ONE_MAX
        if len(self.found) < FOUND_MAX and not many:
            self.found.append(text)


class _Links:
    """Which requests of a session its lines answer, and which its rows say are answered."""

    def __init__(self) -> None:
        self._answered: set[str] = set()
        self._requests: list[tuple[str, str | None, bool]] = []

    def add(self, indexed: Indexed, has_response: bool) -> None:
        row = indexed.row
        if indexed.answers and row.correlation_id is not None:
            self._answered.add(row.correlation_id)
        if row.requests_response or has_response:
            self._requests.append((row.id, row.correlation_id, has_response))

    def missing(self) -> list[str]:
        """Return the ids of rows that do not say that there is a response."""
        return [id for id, link, says in self._requests if not says and link in self._answered]

    def early(self) -> list[str]:
        """Return the ids of rows that say so without one."""
        return [id for id, link, says in self._requests if says and link not in self._answered]
