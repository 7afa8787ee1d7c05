"""The index: SQLite databases, one a day (UTC), of where entries of session files are.

    var/logs/index/daily/<date>.db    the documented table and indexes, and who took part
    var/logs/index/cursor.db          how far it has come, and what links responses to requests

It is a cache, written by one follower: lines go in, and what comes out depends on the lines alone,
so what is missing or damaged is built again and is the same.

Invariants:
- writing is idempotent: the days are committed first, then the cursor with all that says what is in
  them; a writer that was killed between repeats what it did, and changes nothing by it;
- lines of a session go in without a gap, each once;
- nothing is synced: an index that was in use when the machine went down is not trusted;
- a day is created whole under its name, and replaced whole by `install`.

Source: "KSI Dynamic Storage Architecture", SQL Index Schema.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

from ksi.storage import sqlite
from ksi.storage.atomic import make_directory, sync_directory
from ksi.storage.boot import this_boot
from ksi.storage.journal import Position
from ksi.transport.limits import INDEX_DAYS_OPEN_MAX
from ksi.transport.moments import DAY, day_of

# The table and its indexes are the documented ones, to the word.
TABLES: Final = """
CREATE TABLE ksi_index (
    -- Core identifiers
    id TEXT PRIMARY KEY,
    timestamp REAL NOT NULL,
    event_type TEXT NOT NULL,
    session_id TEXT NOT NULL,

    -- File location (the only storage reference)
    file_path TEXT NOT NULL,
    line_number INTEGER,
    byte_offset INTEGER,            -- For efficient seeking

    -- Dynamic agent relationships
    initiating_agent TEXT NOT NULL, -- Session owner
    participating_agents TEXT,      -- JSON array of all participants
    agent_roles TEXT,              -- JSON: {"agent_id": "current_role"}

    -- Communication metadata
    pattern_type TEXT,             -- 'peer_to_peer', 'broadcast', 'team', 'swarm'
    conversation_id TEXT,
    correlation_id TEXT,           -- Links requests to responses

    -- Minimal flags for filtering
    is_completion BOOLEAN DEFAULT 0,
    is_request BOOLEAN DEFAULT 0,
    has_response BOOLEAN DEFAULT 0,
    requests_response BOOLEAN DEFAULT 0
);
CREATE TABLE participants (
    agent_id TEXT NOT NULL,
    timestamp REAL NOT NULL,
    id TEXT NOT NULL,
    PRIMARY KEY (agent_id, timestamp, id)
) WITHOUT ROWID;
"""
INDEXES: Final = """
CREATE INDEX IF NOT EXISTS idx_timeline ON ksi_index(timestamp);
CREATE INDEX IF NOT EXISTS idx_session ON ksi_index(session_id, timestamp);
CREATE INDEX IF NOT EXISTS idx_agent ON ksi_index(initiating_agent, timestamp);
CREATE INDEX IF NOT EXISTS idx_participants ON ksi_index(participating_agents);
CREATE INDEX IF NOT EXISTS idx_conversation ON ksi_index(conversation_id, timestamp);
CREATE INDEX IF NOT EXISTS idx_pattern ON ksi_index(pattern_type, timestamp);
CREATE INDEX IF NOT EXISTS idx_pending ON ksi_index(requests_response, has_response)
    WHERE requests_response = 1 AND has_response = 0;
"""
_CURSOR_TABLES: Final = """
CREATE TABLE place (
    store TEXT, segment INTEGER, offset INTEGER, boot_id TEXT, clean INTEGER, rebuilt INTEGER
);
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, lines INTEGER, size_bytes INTEGER, checksum INTEGER
) WITHOUT ROWID;
CREATE TABLE days (
    day TEXT PRIMARY KEY, rows INTEGER, inode INTEGER, size_bytes INTEGER, changed_ns INTEGER
) WITHOUT ROWID;
CREATE TABLE requests (
    session_id TEXT, correlation_id TEXT, id TEXT, day TEXT,
    PRIMARY KEY (session_id, correlation_id, id)
) WITHOUT ROWID;
CREATE TABLE answers (
    session_id TEXT, correlation_id TEXT, PRIMARY KEY (session_id, correlation_id)
) WITHOUT ROWID;
"""
CURSOR: Final = "cursor.db"
DAILY: Final = "daily"


class Row(NamedTuple):
    """A row of `ksi_index`: the documented columns, in their order."""

    id: str
    timestamp: float
    event_type: str
    session_id: str
    file_path: str
    line_number: int
    byte_offset: int
    initiating_agent: str
    participating_agents: str
    agent_roles: str
    pattern_type: str | None
    conversation_id: str | None
    correlation_id: str | None
    is_completion: int
    is_request: int
    has_response: int
    requests_response: int


class Indexed(NamedTuple):
    """What one line is to the index: its row and who takes part."""

    row: Row
    participants: tuple[str, ...]
    answers: bool  # It is the response to the request of its correlation id.


# Says what a line is to the index, by session, number, offset and bytes; None: it is no entry. The
# number is None where only the line itself can tell it.
Describe = Callable[[str, int | None, int, bytes], Indexed | None]
Line = tuple[str, int, bytes]  # session, offset, bytes


class Place(NamedTuple):
    """How far an index has come.

    Attributes:
        store, position: in the journal of the sessions.
        trusted: it has not been through a crash of the machine.
        rebuilt: the number of the last order to rebuild that it is the result of.
    """

    store: str
    position: Position
    trusted: bool
    rebuilt: int


class Known(NamedTuple):
    """What of a session is in the index: so many lines and bytes, with their checksum."""

    lines: int
    size_bytes: int
    checksum: int


class IndexGap(Exception):
    """A line does not follow what is indexed of its session: something has been missed."""


_INSERT: Final = f"INSERT OR IGNORE INTO ksi_index VALUES ({','.join('?' * len(Row._fields))})"
_INSERT_PARTICIPANT: Final = "INSERT OR IGNORE INTO participants VALUES (?,?,?)"
_ANSWERED: Final = "UPDATE ksi_index SET has_response = 1 WHERE id = ? AND has_response = 0"


_ONLY: Final = {
    "": "1",
    "pending": "k.requests_response = 1 AND k.has_response = 0",
    "roles": "k.agent_roles <> '{}'",
}


class IndexWriter:
    """Writes the index in a directory; one thread of one process at a time does.

    Any `sqlite3.Error` leaves it as it was last committed: `abandon` it and open another.

    Attributes:
        place: how far it has come; None in a new one.
    """

    def __init__(self, directory: Path, describe: Describe, *, bulk: bool = False) -> None:
        """Open what is there, or begin anew. With `bulk` a new one is filled before it is used:
        its documented indexes are made at the end, by `finish`."""
        self._directory = directory
        self._describe = describe
        self._bulk = bulk
        make_directory(directory / DAILY)
        self._open: OrderedDict[str, sqlite3.Connection] = OrderedDict()
        self._boot_id = this_boot()
        self._unsettled = 0
        path = directory / CURSOR
        if not path.exists():
            sqlite.create(path, _CURSOR_TABLES)
        self._cursor = sqlite.connect(path)
        self._inode = path.stat().st_ino
        try:
            self.place = _read_place(self._cursor, self._boot_id)
        except sqlite3.Error:
            self._cursor.close()
            raise

    def add(self, lines: Iterable[Line], place: Place) -> int:
        """Put lines in, those of a session in their order, and come to `place`; return how many
        were new. A bulk writer leaves out what is nowhere any more.

        Raises:
            IndexGap: lines before them are missing; nothing was changed.
        """
        batch = _Batch(self._cursor, self._describe, gaps=self._bulk)
        with self._cursor:
            self._cursor.execute("BEGIN")  # Questions in it take no lock of their own.
            for line in lines:
                batch.add(line)
            for day, rows in batch.rows.items():
                database = self._day(day, batch.rows)
                database.executemany(_INSERT, rows.values())
                database.executemany(_INSERT_PARTICIPANT, batch.participants[day])
            for day, ids in batch.answered.items():
                self._day(day, batch.rows).executemany(_ANSWERED, ids)
            for database in self._open.values():
                if database.in_transaction:
                    database.execute("COMMIT")
            batch.put()
            self._put_place(place)
        self._unsettled += batch.count
        return batch.count

    def unsettled(self) -> int:
        """Return how many lines were put in since `settle`."""
        return self._unsettled

    def settle(self) -> str | None:
        """Move what was written into the databases' own files; return what somebody else has done
        to one of them since the last time, in words, or None."""
        if self._bulk:
            self._cursor.execute("PRAGMA wal_checkpoint(PASSIVE)")
        elif trouble := self.trouble():
            return trouble
        elif self._unsettled:
            for day, database in self._open.items():
                database.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._remember(day)
            self._cursor.execute("PRAGMA wal_checkpoint(PASSIVE)")
        self._unsettled = 0
        return None

    def trouble(self) -> str | None:
        """Return which database was deleted or damaged, in words, or None.

        A file that has changed by itself is checked; a change that does no harm is accepted.
        """
        if sqlite.inode_of(self._directory / CURSOR) != self._inode:
            return f"{CURSOR} was deleted or replaced"
        known = self._cursor.execute(
            "SELECT day, rows, inode, size_bytes, changed_ns FROM days"
        ).fetchall()
        for day, rows, *signature in known:
            path = self._path(day)
            found = sqlite.signature_of(path)
            if found is None:
                return f"{path.name} was deleted"
            if list(found) == signature:
                continue
            if day in self._open and found[0] != signature[0]:
                return f"{path.name} was replaced"
            if wrong := sqlite.damage(path, "SELECT count(*) FROM ksi_index", rows):
                return f"{path.name} is damaged: {wrong}"
            self._cursor.execute(
                "UPDATE days SET inode = ?, size_bytes = ?, changed_ns = ? WHERE day = ?",
                (*found, day),
            )
        return None

    def finish(self) -> Iterator[str]:
        """Make the indexes of a bulk writer, a day at a step, and close it."""
        for (day,) in self._cursor.execute("SELECT day FROM days ORDER BY day").fetchall():
            database = self._day(day, ())
            database.executescript(INDEXES)
            database.execute("PRAGMA journal_mode=WAL")
            self._open.pop(day).close()
            self._remember(day)
            yield day
        # A close says nothing of what it could not move, and only the file itself is installed.
        self._cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._cursor.close()

    def close(self) -> None:
        """Settle, sync and close: after this the index is trusted even if the machine goes down."""
        if self.settle() is not None:
            return self.abandon()
        for database in self._open.values():
            database.close()
        for day in _days_in(self._directory / DAILY):
            sqlite.sync(self._directory / DAILY / f"{day}.db")
            self._remember(day)
        sync_directory(self._directory / DAILY)
        self._cursor.execute("UPDATE place SET clean = 1")
        self._cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._cursor.close()
        sqlite.sync(self._directory / CURSOR)
        return None

    def abandon(self) -> None:
        """Close without a word: what was not committed is gone."""
        for database in (*self._open.values(), self._cursor):
            with suppress(sqlite3.Error):
                database.close()
        self._open.clear()

    def _day(self, day: str, needed: Iterable[str]) -> sqlite3.Connection:
        """Return the open database of a day, in a transaction."""
        database = self._open.get(day)
        if database is None:
            while len(self._open) >= INDEX_DAYS_OPEN_MAX:
                oldest = next((each for each in self._open if each not in needed), None)
                if oldest is None:
                    break
                self._open.pop(oldest).close()
                self._remember(oldest)
            path = self._path(day)
            if not path.exists():
                sqlite.create(path, TABLES if self._bulk else TABLES + INDEXES, wal=not self._bulk)
            self._cursor.execute(
                "INSERT OR IGNORE INTO days VALUES (?,0,?,?,?)", (day, *sqlite.status(path))
            )
            database = self._open[day] = sqlite.connect(path, bulk=self._bulk)
        self._open.move_to_end(day)
        if not database.in_transaction:
            database.execute("BEGIN")
        return database

    def _path(self, day: str) -> Path:
        return self._directory / DAILY / f"{day}.db"

    def _remember(self, day: str) -> None:
        """Take the file of a day as it is now for as we left it; not another one that was put in
        its place meanwhile, which the next look finds."""
        if found := sqlite.signature_of(self._path(day)):
            self._cursor.execute(
                "UPDATE days SET size_bytes = ?, changed_ns = ? WHERE day = ? AND inode = ?",
                (*found[1:], day, found[0]),
            )

    def _put_place(self, place: Place) -> None:
        self._cursor.execute("DELETE FROM place")
        row = (place.store, *place.position, self._boot_id, 0, place.rebuilt)
        self._cursor.execute("INSERT INTO place VALUES (?,?,?,?,?,?)", row)
        self.place = place


class _Batch:
    """Lines on their way into the index: sorted by day, linked, counted."""

    def __init__(self, cursor: sqlite3.Connection, describe: Describe, *, gaps: bool) -> None:
        self._cursor = cursor
        self._describe = describe
        self._gaps = gaps
        self._known: dict[str, Known] = {}
        self._open: dict[tuple[str, str], list[tuple[str, str]]] = {}  # requests: day and id
        self._answers: set[tuple[str, str]] = set()
        self._settled: list[tuple[str, str]] = []  # requests that had waited in the cursor
        self.rows: dict[str, dict[str, Row]] = {}
        self.participants: dict[str, list[tuple[str, float, str]]] = {}
        self.answered: dict[str, list[tuple[str]]] = {}
        self.count = 0

    def add(self, line: Line) -> None:
        """Take one line in, unless it is in the index already."""
        session_id, offset, content = line
        known = self._known.get(session_id) or known_of(self._cursor, session_id)
        lines, size_bytes, checksum = known
        if offset < size_bytes:
            return
        is_gap = offset > size_bytes
        if is_gap and not self._gaps:
            raise IndexGap(f"{session_id} is indexed up to {size_bytes}, not {offset}")
        number = lines + 1
        indexed = self._describe(session_id, None if is_gap else number, offset, content)
        if indexed is not None:
            number = indexed.row.line_number
        self._known[session_id] = Known(number, offset + len(content), crc32(content, checksum))
        self.count += 1
        if indexed is None:
            return
        row = indexed.row
        day = day_of(row.timestamp)
        if row.correlation_id is not None:
            row = self._link(row, day, (session_id, row.correlation_id), indexed.answers)
        self.rows.setdefault(day, {})[row.id] = row
        told = self.participants.setdefault(day, [])
        told += [(agent_id, row.timestamp, row.id) for agent_id in indexed.participants]

    def put(self) -> None:
        """Write into the cursor what was taken in."""
        execute = self._cursor.executemany
        execute(
            "INSERT OR REPLACE INTO sessions VALUES (?,?,?,?)",
            [(session_id, *known) for session_id, known in self._known.items()],
        )
        execute(
            "UPDATE days SET rows = rows + ? WHERE day = ?",
            [(len(rows), day) for day, rows in self.rows.items()],
        )
        execute("DELETE FROM requests WHERE session_id = ? AND correlation_id = ?", self._settled)
        execute("INSERT OR IGNORE INTO answers VALUES (?,?)", self._answers)
        execute(
            "INSERT OR IGNORE INTO requests VALUES (?,?,?,?)",
            [(*link, id, day) for link, waiting in self._open.items() for day, id in waiting],
        )

    def _link(self, row: Row, day: str, link: tuple[str, str], answers: bool) -> Row:
        """Link a request to its response, whichever came first, on whichever day."""
        if answers:
            self._answers.add(link)
            waiting = self._open.pop(link, [])
            for request_day, id in waiting:
                request = self.rows[request_day][id]
                self.rows[request_day][id] = request._replace(has_response=1)
                # Its row may be there without the response, from a batch whose cursor was lost.
                self.answered.setdefault(request_day, []).append((id,))
            stored = self._cursor.execute(
                "SELECT day, id FROM requests WHERE session_id = ? AND correlation_id = ?", link
            ).fetchall()
            for request_day, id in stored:
                self.answered.setdefault(request_day, []).append((id,))
            if stored:
                self._settled.append(link)
        elif row.requests_response:
            if link in self._answers or self._has_answer(link):
                return row._replace(has_response=1)
            self._open.setdefault(link, []).append((day, row.id))
        return row

    def _has_answer(self, link: tuple[str, str]) -> bool:
        found = self._cursor.execute(
            "SELECT 1 FROM answers WHERE session_id = ? AND correlation_id = ?", link
        )
        return found.fetchone() is not None


def install(made: Path, directory: Path) -> None:
    """Put a finished index in the place of the one in `directory`, a day at a time, cursor last.

    Whoever reads finds each day as it was or as it is made; if it is killed between, the former
    cursor goes on from where it was and finds in the new days only what belongs there.
    """
    make_directory(directory / DAILY)
    new = _days_in(made / DAILY)
    for day in new:
        sqlite.replace(made / DAILY / f"{day}.db", directory / DAILY / f"{day}.db")
    for day in {*_days_in(directory / DAILY)}.difference(new):
        sqlite.remove(directory / DAILY / f"{day}.db")
    sqlite.replace(made / CURSOR, directory / CURSOR)
    shutil.rmtree(made)


def _days_in(directory: Path) -> list[str]:
    """Return the days that have a database in `directory`, in order."""
    try:
        days = (each.removesuffix(".db") for each in os.listdir(directory) if each.endswith(".db"))
        return sorted(filter(DAY.fullmatch, days))
    except FileNotFoundError:
        return []


class IndexReader:
    """Reads the index in a directory, while it is written or without its writer.

    Opens a database for each question and closes it: one that was replaced is not read on.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._daily = directory / DAILY

    def days(self) -> list[str]:
        """Return the days there are, in order."""
        return _days_in(self._daily)

    def select(
        self,
        *,
        where: Mapping[str, Any] | None = None,
        only: str = "",
        agent_id: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: tuple[float, str] | None = None,
        limit: int = 100,
        reverse: bool = False,
    ) -> list[Row]:
        """Return rows in the order of time, or backwards with `reverse`.

        Args:
            where: what columns must be.
            only: `pending` requests, or those that take `roles`.
            agent_id: one who takes part in them, by the exact name.
            after: time and id of the last row of the page before.

        Raises:
            Corrupt: a database is damaged; the follower will notice and build it again.
            Busy: it took longer than a reader may; ask for less.
        """
        lowest, highest = (until, since) if reverse else (since, until)
        table = (
            "participants p CROSS JOIN ksi_index k ON k.id = p.id" if agent_id else "ksi_index k"
        )
        at = "p" if agent_id else "k"
        conditions = [_ONLY[only], *(f"k.{column} = ?" for column in where or {})]
        parameters = list((where or {}).values())
        for condition, value in (
            ("p.agent_id = ?", agent_id),
            (f"{at}.timestamp >= ?", since),
            (f"{at}.timestamp < ?", until),
        ):
            if value is not None:
                conditions.append(condition)
                parameters.append(value)
        if after is not None:
            conditions.append(f"({at}.timestamp, {at}.id) {'<' if reverse else '>'} (?, ?)")
            parameters += after
            lowest = after[0]
        order = "DESC" if reverse else "ASC"
        sql = (
            f"SELECT k.* FROM {table} WHERE {' AND '.join(conditions)} "
            f"ORDER BY {at}.timestamp {order}, {at}.id {order} LIMIT ?"
        )
        found: list[Row] = []
        for day in self._between(lowest, highest, reverse):
            found += map(Row._make, self.query(day, sql, (*parameters, limit - len(found))))
            if len(found) >= limit:
                break
        return found

    def query(self, day: str, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Return what a day's database answers; nothing if there is none.

        Raises: as `select`.
        """
        return self._query(self._daily / f"{day}.db", sql, parameters)

    def cursor(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Return what the cursor answers; nothing if there is none. Raises as `select`."""
        return self._query(self._directory / CURSOR, sql, parameters)

    def place(self) -> Place | None:
        """Return how far the index has come; None if there is none yet."""
        rows = self.cursor("SELECT * FROM place")
        return _place(rows[0], this_boot()) if rows else None

    def dump(self) -> Iterator[str]:
        """Yield everything in the index in one fixed order, for comparison."""
        for day in self.days():
            yield day
            yield from map(repr, self.query(day, "SELECT * FROM ksi_index ORDER BY id"))
            yield from map(repr, self.query(day, "SELECT * FROM participants"))

    def _between(self, lowest: float | None, highest: float | None, reverse: bool) -> list[str]:
        """Return the days from the one of `lowest` to that of `highest`, as they are read."""
        first, last = (highest, lowest) if reverse else (lowest, highest)
        low = "" if first is None else _day_within(first)
        high = "9999-99-99" if last is None else _day_within(last)
        days = [day for day in self.days() if low <= day <= high]
        return days[::-1] if reverse else days

    def _query(self, path: Path, sql: str, parameters: Sequence[Any]) -> list[Any]:
        return sqlite.ask(path, sql, parameters, of="index", look="index status")


def known_of(cursor: sqlite3.Connection, session_id: str) -> Known:
    """Return what of a session is in the index."""
    row = cursor.execute(
        "SELECT lines, size_bytes, checksum FROM sessions WHERE session_id = ?", (session_id,)
    ).fetchone()
    return Known(*row) if row else Known(0, 0, 0)


def read_place(directory: Path) -> Place | None:
    """Return how far the index in a directory has come; None where there is none that can be read.

    It may be written meanwhile.
    """
    try:
        ((store, segment, offset, _boot, _clean, rebuilt),) = sqlite.read(
            directory / CURSOR, "SELECT * FROM place", ()
        )
    except (sqlite3.Error, ValueError):
        return None
    return Place(store, Position(segment, offset), True, rebuilt)


def _read_place(cursor: sqlite3.Connection, boot_id: str) -> Place | None:
    row = cursor.execute("SELECT * FROM place").fetchone()
    return None if row is None else _place(row, boot_id)


def _place(row: Sequence[Any], boot_id: str) -> Place:
    store, segment, offset, boot, clean, rebuilt = row
    return Place(store, Position(segment, offset), bool(clean) or boot == boot_id, rebuilt)


def _day_within(timestamp: float) -> str:
    """Return the day of any number, at either end of the calendar if it lies beyond."""
    return day_of(min(max(timestamp, 0.0), 253_402_300_799.0))
