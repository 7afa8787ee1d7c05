"""The cache of conversations: what was said in sessions and imported logs, to be found again.

    files        a conversation each: how much of its file is in here, and what is shown of it
    messages     where the line of each message is, who spoke and when
    words        the words of each message, in a full-text index that keeps no text
    problems     lines and files that cannot be read, and why not

The files are the truth: text is read from them. Lines of a file go in without a gap, each once, and
with them how far the file has been read, in one transaction. Of a file that is no more what it was
everything goes, and its words point to messages that are gone; no number is given to two messages.

Full text: SQLite FTS5, contentless.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from ksi.storage import sqlite
from ksi.storage.cache import Cache
from ksi.storage.index import IndexGap, Line, Place
from ksi.storage.journal import Position
from ksi.transport.errors import Invalid
from ksi.transport.limits import BAD_LINES_MAX

TABLES: Final = """
CREATE TABLE place (store TEXT, segment INTEGER, offset INTEGER, imports INTEGER);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, session_id TEXT NOT NULL, path TEXT UNIQUE NOT NULL,
    signature TEXT NOT NULL, mark INTEGER NOT NULL, is_open INTEGER NOT NULL,
    lines INTEGER NOT NULL, size_bytes INTEGER NOT NULL, messages INTEGER NOT NULL,
    bad_lines INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL
);
CREATE INDEX files_by_session ON files(session_id);
CREATE INDEX files_by_last ON files(last_at);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL, line INTEGER NOT NULL, offset INTEGER NOT NULL,
    size INTEGER NOT NULL, timestamp REAL NOT NULL, sender TEXT NOT NULL, kind TEXT NOT NULL
);
CREATE INDEX messages_by_file ON messages(file, line);
CREATE TABLE senders (file INTEGER, sender TEXT, PRIMARY KEY (file, sender)) WITHOUT ROWID;
CREATE TABLE problems (
    path TEXT, line INTEGER, offset INTEGER, reason TEXT, PRIMARY KEY (path, line)
) WITHOUT ROWID;
CREATE TABLE counters (next_file INTEGER, next_message INTEGER, gone INTEGER);
INSERT INTO counters VALUES (1, 1, 0);
CREATE VIRTUAL TABLE words USING fts5(content, sender, content='', columnsize=0);
"""
FORM: Final = 2  # Of these tables, and of what is made of a line.
GONE_MAX: Final = 10_000  # Messages that are gone before it is worth making the cache anew ...
GONE_PART_MAX: Final = 0.5  # ... if they are this part of all that were ever put in.
SESSION: Final = "session:"  # What stands before the id of a session in place of a path.
PREVIEW_BEFORE: Final = 50  # Characters of a preview before what was found ...
PREVIEW_CHARS: Final = 200  # ... and in all.
_COLUMNS: Final = (
    "id", "session_id", "path", "lines", "size_bytes", "messages", "bad_lines", "first_at",
    "last_at",
)  # fmt: skip
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM files "
_SORTED: Final = {
    "last_timestamp": "last_at",
    "first_timestamp": "first_at",
    "message_count": "messages",
}


class Said(NamedTuple):
    """What a line says.

    Attributes:
        words: what can be searched.
        number: of the line, where the line itself tells it.
    """

    timestamp: float
    sender: str
    kind: str
    words: str
    number: int | None = None


class Unreadable(Exception):
    """A line is of no known form; the text says what is wrong."""


Describe = Callable[[bytes], Said]


class File(msgspec.Struct, gc=False):
    """How much of a conversation is in the cache.

    Attributes:
        signature, mark: of an imported file, what it looked like and how what was read of it ended.
        is_open: its last line had no end yet.
    """

    id: int
    session_id: str
    path: str
    signature: str
    mark: int
    is_open: int
    lines: int
    size_bytes: int
    messages: int
    bad_lines: int
    first_at: float
    last_at: float


class ConversationsWriter(Cache):
    """Writes the cache of conversations.

    Attributes:
        place: how far it has come in the journal of the sessions; None in a new one.
        imports: the number of the order to import that it has come to.
    """

    def __init__(
        self,
        path: Path,
        made_of: str,
        describe: Describe,
        *,
        making: bool = False,
        rebuilt: int = 0,
    ) -> None:
        super().__init__(path, TABLES, made_of, making=making, rebuilt=rebuilt)
        self._describe = describe
        self.place: Place | None = None
        self.imports = 0
        row = self._database.execute("SELECT * FROM place").fetchone()
        if row is not None:
            store, segment, offset, self.imports = row
            if store is not None:
                self.place = Place(store, Position(segment, offset), True, self.rebuilt)
        self._next_file, self._next_message, self._gone = self._database.execute(
            "SELECT * FROM counters"
        ).fetchone()

    def add(self, lines: Iterable[Line], place: Place) -> int:
        """Put lines of sessions in, those of a session in their order, and come to `place`; return
        how many were new. One that is being made leaves out what is nowhere any more.

        Raises:
            IndexGap: lines before them are missing; nothing was changed.
        """
        batch = _Batch(self, gaps=self._making)
        with self._database:
            self._database.execute("BEGIN")  # Questions in it take no lock of their own.
            for session_id, offset, content in lines:
                batch.add(self._session(session_id, batch), offset, content)
            self.place = place
            self._put(batch)
        return batch.count

    def take(
        self, path: str, session_id: str, lines: Sequence[bytes], signature: str, mark: int
    ) -> File:
        """Put in lines that follow what is in here of an imported file, and note what it looks like
        and how what was read of it ends. The last one may be without its end, if it is whole
        otherwise."""
        batch = _Batch(self, gaps=False)
        file = self.file(path) or self._new(session_id, path)
        for content in lines:
            if file.is_open and content == b"\n":  # The end of the line before.
                file.is_open = 0
                file.size_bytes += 1
                continue
            batch.add(file, file.size_bytes, content)
            file.is_open = int(not content.endswith(b"\n"))
        file.signature, file.mark = signature, mark
        batch.files[path] = file
        with self._database:
            self._database.execute("BEGIN")
            self._put(batch)
        return file

    def file(self, path: str) -> File | None:
        """Return what is in here of a file."""
        row = self._database.execute("SELECT * FROM files WHERE path = ?", (path,)).fetchone()
        return None if row is None else File(*row)

    def imported(self) -> list[str]:
        """Return the paths of all imported files that are known, those with a problem included."""
        of_imports = "WHERE path >= '/' AND path < '0'"  # A path; a session begins otherwise.
        sql = f"SELECT path FROM files {of_imports} UNION SELECT path FROM problems {of_imports}"
        return [path for (path,) in self._database.execute(sql)]

    def forget(self, path: str, reason: str | None = None) -> None:
        """Forget a file that is gone or no more what it was; with `reason`, say what is wrong with
        it in the same breath."""
        with self._database:
            self._database.execute("BEGIN")
            file = self.file(path)
            if file is not None:
                for table in ("messages", "senders"):
                    self._database.execute(f"DELETE FROM {table} WHERE file = ?", (file.id,))
                self._database.execute("DELETE FROM files WHERE id = ?", (file.id,))
                self._gone += file.messages
            self._report(path, 0, reason)
            self._put_counters()
        self._unsettled += 1

    def report(self, path: str, line: int, reason: str | None) -> None:
        """Say what is wrong with the end of a file, from a line on; None: nothing is any more."""
        with self._database:
            self._database.execute("BEGIN")
            self._report(path, line, reason)
        self._unsettled += 1

    def come_to(self, imports: int) -> None:
        """Note that an order to import has been carried out."""
        self.imports = imports
        self._database.execute("BEGIN")
        self._put_place()
        self._database.execute("COMMIT")
        self._unsettled += 1

    def is_worn(self) -> bool:
        """Return whether so much of it is of messages that are gone that it is to be made anew."""
        return bool(self._gone > max(GONE_MAX, GONE_PART_MAX * self._next_message))

    def _session(self, session_id: str, batch: _Batch) -> File:
        path = SESSION + session_id
        return batch.files.get(path) or self.file(path) or self._new(session_id, path)

    def _new(self, session_id: str, path: str) -> File:
        file = File(self._next_file, session_id, path, "", 0, 0, 0, 0, 0, 0, 0.0, 0.0)
        self._next_file += 1
        return file

    def _report(self, path: str, line: int, reason: str | None) -> None:
        self._database.execute(
            "DELETE FROM problems WHERE path = ? AND (line = 0 OR line >= ?)", (path, line)
        )
        if reason is not None:
            row = (path, line, 0, reason)
            self._database.execute("INSERT INTO problems VALUES (?,?,?,?)", row)

    def _put(self, batch: _Batch) -> None:
        batch.put()
        self._put_place()
        self._put_counters()
        self._unsettled += batch.count

    def _put_place(self) -> None:
        self._database.execute("DELETE FROM place")
        place = self.place
        row = (place.store, *place.position) if place is not None else (None, None, None)
        self._database.execute("INSERT INTO place VALUES (?,?,?,?)", (*row, self.imports))

    def _put_counters(self) -> None:
        row = (self._next_file, self._next_message, self._gone)
        self._database.execute("UPDATE counters SET next_file = ?, next_message = ?, gone = ?", row)


class _Batch:
    """Lines on their way into the cache."""

    def __init__(self, writer: ConversationsWriter, *, gaps: bool) -> None:
        self._writer = writer
        self._gaps = gaps
        self.files: dict[str, File] = {}
        self.count = 0
        self._messages: list[tuple[Any, ...]] = []
        self._words: list[tuple[int, str, str]] = []
        self._senders: set[tuple[int, str]] = set()
        self._problems: list[tuple[str, int, int, str]] = []

    def add(self, file: File, offset: int, content: bytes) -> None:
        """Take one line in, unless it is in the cache already."""
        if offset < file.size_bytes:
            return
        is_gap = offset > file.size_bytes
        if is_gap and not self._gaps:
            raise IndexGap(f"{file.session_id} is read up to {file.size_bytes}, not {offset}")
        number = file.lines + 1
        said, reason = None, ""
        if content.strip():
            try:
                said = self._writer._describe(content)
            except Unreadable as error:
                reason = str(error)
        if is_gap and said is not None and said.number is not None:
            number = said.number
        self.count += 1
        file.lines = number
        file.size_bytes = offset + len(content)
        if said is not None:
            self._say(file, offset, len(content), said)
        elif reason:
            if file.bad_lines < BAD_LINES_MAX:
                self._problems.append((file.path, number, offset, reason))
            file.bad_lines += 1
        self.files[file.path] = file

    def put(self) -> None:
        """Write what was taken in."""
        many = self._writer._database.executemany
        files = map(msgspec.structs.astuple, self.files.values())
        marks = ",".join("?" * len(File.__struct_fields__))
        many(f"INSERT OR REPLACE INTO files VALUES ({marks})", files)
        many("INSERT INTO messages VALUES (?,?,?,?,?,?,?,?)", self._messages)
        many("INSERT INTO words (rowid, content, sender) VALUES (?,?,?)", self._words)
        many("INSERT OR IGNORE INTO senders VALUES (?,?)", self._senders)
        many("INSERT OR REPLACE INTO problems VALUES (?,?,?,?)", self._problems)

    def _say(self, file: File, offset: int, size: int, said: Said) -> None:
        at, sender, kind, words, _number = said
        id = self._writer._next_message
        self._writer._next_message += 1
        self._messages.append((id, file.id, file.lines, offset, size, at, sender, kind))
        self._words.append((id, words, sender))
        self._senders.add((file.id, sender))
        file.first_at = min(file.first_at, at) if file.messages else at
        file.last_at = max(file.last_at, at) if file.messages else at
        file.messages += 1


class ConversationsReader:
    """Reads the cache of conversations, while it is written or without its writer.

    Everything raises `Corrupt` where it is damaged, and `Busy` where it takes too long.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(
        self,
        *,
        sort_by: str,
        reverse: bool,
        since: float | None,
        until: float | None,
        offset: int,
        limit: int,
    ) -> tuple[list[dict[str, Any]], int]:
        """Return conversations in order of what `sort_by` names, and how many there are in all.

        `since` and `until` are compared with the time of the last message.
        """
        column, order = _SORTED[sort_by], "DESC" if reverse else "ASC"
        conditions, parameters = _between("last_at", since, until)
        where = f"WHERE {conditions}"
        rows = self._ask(
            f"{_SELECT}{where} ORDER BY {column} {order}, id {order} LIMIT ? OFFSET ?",
            (*parameters, limit, offset),
        )
        ((total,),) = self._ask(f"SELECT count(*) FROM files {where}", parameters) or [(0,)]
        return self._files(rows), total

    def named(self, session_id: str, path: str | None) -> list[dict[str, Any]]:
        """Return the conversations of an id; with `path` the one of that file."""
        if path is not None:
            rows = self._ask(
                f"{_SELECT}WHERE session_id = ? AND path IN (?, ?)",
                (session_id, path, SESSION + session_id),
            )
            return self._files(rows)
        return self._files(self._ask(f"{_SELECT}WHERE session_id = ? ORDER BY path", (session_id,)))

    def messages(self, path: str, offset: int, limit: int) -> list[Any]:
        """Return the lines of a conversation: line, offset, size, timestamp, sender, kind."""
        return self._ask(
            "SELECT line, offset, size, timestamp, sender, kind FROM messages"
            " WHERE file = (SELECT id FROM files WHERE path = ?) ORDER BY line LIMIT ? OFFSET ?",
            (path, limit, offset),
        )

    def search(
        self,
        words: str,
        *,
        session_id: str | None,
        sender: str | None,
        since: float | None,
        until: float | None,
        offset: int,
        limit: int,
        limit_each: int,
    ) -> tuple[list[dict[str, Any]], list[Any], int, int]:
        """Return the conversations with the most matches, where these are, and how many
        conversations and matches there are in all.

        A match is: path, line, offset, size, timestamp, sender, kind.
        """
        between, parameters = _between("m.timestamp", since, until)
        source = (
            f"FROM words JOIN messages m ON m.id = words.rowid WHERE words MATCH ? AND {between}"
        )
        parameters = [words, *parameters]
        if session_id is not None:
            source += " AND m.file IN (SELECT id FROM files WHERE session_id = ?)"
            parameters.append(session_id)
        if sender is not None:
            source += " AND m.sender = ?"
            parameters.append(sender)
        path = "(SELECT path FROM files WHERE id = file)"
        counted = self._ask(
            f"SELECT {path}, n, count(*) OVER (), sum(n) OVER () FROM"
            f" (SELECT m.file, count(*) AS n {source} GROUP BY m.file)"
            " ORDER BY n DESC, file DESC LIMIT ? OFFSET ?",
            (*parameters, limit, offset),
        )
        if not counted:
            return [], [], 0, 0
        marks = ",".join("?" * len(counted))
        paths = [row[0] for row in counted]
        matches = self._ask(
            f"SELECT {path}, line, offset, size, timestamp, sender, kind FROM (SELECT m.*,"
            f" row_number() OVER (PARTITION BY m.file ORDER BY m.line) AS r {source} AND m.file IN"
            f" (SELECT id FROM files WHERE path IN ({marks}))) WHERE r <= ? ORDER BY file, line",
            (*parameters, *paths, limit_each),
        )
        found = self._files(self._ask(f"{_SELECT}WHERE path IN ({marks})", paths))
        by_path = {each["path"]: each for each in found}
        results = [{**by_path[key], "match_count": n} for key, n, *_ in counted if key in by_path]
        return results, matches, counted[0][2], counted[0][3]

    def problems(
        self, *, path: str | None, after: tuple[str, int] | None, limit: int
    ) -> list[dict[str, Any]]:
        """Return lines and files that cannot be read, in order; line 0 is the file itself."""
        rows = self._ask(
            "SELECT path, line, offset, reason FROM problems WHERE (path, line) > (?, ?)"
            " AND ? IN ('', path) ORDER BY path, line LIMIT ?",
            (*(after or ("", -1)), path or "", limit),
        )
        names = ("path", "line_number", "byte_offset", "reason")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def counts(self) -> dict[str, Any]:
        """Return how much there is in all."""
        rows = self._ask(
            "SELECT count(*), coalesce(sum(messages), 0), coalesce(sum(size_bytes), 0),"
            " coalesce(sum(bad_lines), 0), min(CASE WHEN messages THEN first_at END),"
            " max(CASE WHEN messages THEN last_at END),"
            f" coalesce(sum(path NOT LIKE '{SESSION}%'), 0) FROM files"
        ) or [(0, 0, 0, 0, None, None, 0)]
        files = self._ask("SELECT count(*) FROM problems WHERE line = 0") or [(0,)]
        names = (
            "conversations", "messages", "size_bytes", "bad_lines", "earliest", "latest",
            "imported",
        )  # fmt: skip
        return {**dict(zip(names, rows[0], strict=True)), "unread_files": files[0][0]}

    def place(self) -> Place | None:
        """Return how far it has come in the journal of the sessions; None if there is none yet."""
        rows = self._ask("SELECT store, segment, offset, rebuilt FROM place, about")
        if not rows or rows[0][0] is None:
            return None
        store, segment, offset, rebuilt = rows[0]
        return Place(store, Position(segment, offset), True, rebuilt)

    def orders(self) -> tuple[int, int]:
        """Return the numbers of the last orders it has come to: to rebuild and to import."""
        rows = self._ask("SELECT rebuilt, imports FROM about, place")
        return (rows[0][0], rows[0][1]) if rows else (0, 0)

    def dump(self) -> Iterator[str]:
        """Yield everything in one fixed order, for comparison; without the numbers given here."""
        columns = "session_id, path, is_open, lines, size_bytes, messages, bad_lines"
        yield from map(
            repr, self._ask(f"SELECT {columns}, first_at, last_at FROM files ORDER BY path")
        )
        yield from map(
            repr,
            self._ask(
                "SELECT f.path, m.line, m.offset, m.size, m.timestamp, m.sender, m.kind"
                " FROM messages m JOIN files f ON f.id = m.file ORDER BY f.path, m.line"
            ),
        )
        yield from map(repr, self._ask("SELECT * FROM problems ORDER BY path, line"))

    def _files(self, rows: list[Any]) -> list[dict[str, Any]]:
        found = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
        if not found:
            return []
        ids = [each["id"] for each in found]
        senders: dict[int, list[str]] = {}
        sql = f"SELECT file, sender FROM senders WHERE file IN ({','.join('?' * len(ids))})"
        for file, sender in self._ask(f"{sql} ORDER BY file, sender", ids):
            senders.setdefault(file, []).append(sender)
        return [{**each, "participants": senders.get(each["id"], [])} for each in found]

    def _ask(self, sql: str, parameters: Any = ()) -> list[Any]:
        return sqlite.ask(
            self._path, sql, parameters, of="cache of conversations", look="conversations status"
        )


_TERM: Final = re.compile(r'"([^"]*)"(\*?)|(\S+)')


def terms_of(query: str) -> list[str]:
    """Return what a query looks for, one by one: words, and phrases in quotes.

    Raises:
        Invalid: there is no word in it.
    """
    found = [
        phrase + star if phrase or star else word
        for phrase, star, word in _TERM.findall(query)
        if any(map(str.isalnum, phrase + word))
    ]
    if not found:
        raise Invalid(
            f"there is no word in {query!r}"[:200], hint='ksi conversations search "words"'
        )
    return found


def match_of(terms: Sequence[str], columns: Sequence[str]) -> str:
    """Return the expression of FTS5 for messages that hold all terms, in these columns.

    A term that ends with * is the beginning of a word.
    """
    quoted = []
    for term in terms:
        word, star = (term[:-1], "*") if term.endswith("*") else (term, "")
        quoted.append('"' + word.replace('"', '""') + '"' + star)
    return f"{{{' '.join(columns)}}} : ({' AND '.join(quoted)})"


def preview_of(text: str, terms: Sequence[str]) -> str:
    """Return the part of a text around the first term that is in it."""
    lower = text.lower()
    places = [lower.find(term.rstrip("*").lower()) for term in terms]
    at = min((place for place in places if place >= 0), default=0)
    start = max(0, at - PREVIEW_BEFORE) if len(text) > PREVIEW_CHARS else 0
    part = text[start : start + PREVIEW_CHARS]
    return ("..." if start else "") + part + ("..." if start + len(part) < len(text) else "")


def _between(column: str, since: float | None, until: float | None) -> tuple[str, list[Any]]:
    """Return the condition that a column is between two times, either of them open."""
    conditions, parameters = ["1"], []
    for sign, at in ((">=", since), ("<", until)):
        if at is not None:
            conditions.append(f"{column} {sign} ?")
            parameters.append(at)
    return " AND ".join(conditions), parameters
