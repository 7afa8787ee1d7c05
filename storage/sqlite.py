"""SQLite databases that are caches: of one writer, read meanwhile by anybody, never synced.

Invariants:
- a database is created whole under its name, and replaced whole by a rename;
- a reader opens it for each question and closes it: one that was replaced is not read on;
- what SQLite keeps beside a database is never found beside another one.

Readers beside a writer: SQLite's WAL.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from ksi.storage.errors import Corrupt
from ksi.transport.errors import Busy
from ksi.transport.limits import INDEX_QUERY_S_MAX, INDEX_WAIT_S

_NEW: Final = ".new"
_BESIDE: Final = ("-wal", "-shm", "-journal")  # What SQLite keeps beside a database.
# Not the database is at fault but its surroundings: the same may go well a little later.
_WAITING: Final = frozenset(
    {
        sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_INTERRUPT,
    }
)  # fmt: skip

Signature = tuple[int, int, int]  # inode, size in bytes, time of the last change in ns


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error says that a database is not what was written, and not: no room."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.DatabaseError) and (
        code is None or code & 0xFF not in _WAITING
    )


def connect(path: Path, *, bulk: bool = False) -> sqlite3.Connection:
    """Open a database to write: without syncs, and without checkpoints but those we make.

    With `bulk` for one that is filled before anybody reads it.
    """
    database = sqlite3.connect(path, isolation_level=None, timeout=INDEX_WAIT_S)
    try:
        database.execute("PRAGMA synchronous=OFF")
        database.execute(f"PRAGMA journal_mode={'OFF' if bulk else 'WAL'}")
        database.execute("PRAGMA wal_autocheckpoint=0")
        if bulk:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
    except sqlite3.Error:
        database.close()
        raise
    return database


def create(path: Path, tables: str, *, wal: bool = True) -> None:
    """Create a database that is there with its tables or not at all."""
    new = path.with_name(path.name + _NEW)
    remove(new)
    with closing(sqlite3.connect(new, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous=OFF")
        database.executescript(tables)
        if wal:  # From now on: what a close could not move out of a log would stay behind.
            database.execute("PRAGMA journal_mode=WAL")
    new.chmod(0o600)
    replace(new, path)


def replace(new: Path, path: Path) -> None:
    """Rename a closed database to its place; what lay beside the former goes before it.

    A log of the former that was found beside the new one would be played into it. What it alone
    holds is moved into the former itself first, for whoever reads that until the rename.
    """
    _empty_log(path)
    for suffix in _BESIDE:
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    new.replace(path)


def _empty_log(path: Path) -> None:
    """Move what is in the log of a database that nobody writes any more into its own file."""
    if not path.with_name(f"{path.name}-wal").exists():
        return
    uri = f"{path.absolute().as_uri()}?mode=rw"  # Readers would find the one that is made here.
    with suppress(sqlite3.Error):  # A damaged one, and one that was deleted, has nothing to keep.
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=INDEX_WAIT_S)
        with closing(database):
            database.execute("PRAGMA synchronous=OFF")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # Waits for readers, each a moment.


def remove(path: Path) -> None:
    """Remove a database with what lies beside it."""
    for suffix in (*_BESIDE, ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def ask(path: Path, sql: str, parameters: Sequence[Any] = (), *, of: str, look: str) -> list[Any]:
    """Return what a database answers to one question; nothing if there is none.

    Args:
        of: what it is a part of, for the text of a refusal: `index`.
        look: the sub-command that shows how that is: `index status`.

    Raises:
        Corrupt: it is damaged; its writer will notice and build it again.
        Busy: it took longer than a reader may; ask for less.
    """
    for _ in range(3):
        inode = inode_of(path)
        if inode is None:
            return []
        try:
            rows = read(path, sql, parameters)
        except sqlite3.Error as error:
            if inode_of(path) != inode:
                continue
            code = getattr(error, "sqlite_errorcode", None) or 0
            if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
                raise Busy(
                    f"the {of} was read for {INDEX_QUERY_S_MAX:.0f} s and is not through",
                    hint="ask for less: a session, a shorter time, a rarer word",
                ) from error
            raise Corrupt(
                f"{path.name} of the {of} cannot be read: {error}",
                hint=f"it is built again when that is noticed: ksi {look}",
            ) from error
        if inode_of(path) == inode:  # Otherwise it may have been read half from its successor.
            return rows
    raise Busy(f"{path.name} of the {of} is being replaced again and again")


def read(path: Path, sql: str, parameters: Sequence[Any]) -> list[Any]:
    """Return what a database answers, within the time a reader has.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    until_s = time.monotonic() + INDEX_QUERY_S_MAX
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=INDEX_WAIT_S)) as database:
        database.set_progress_handler(lambda: int(time.monotonic() > until_s), 100_000)
        return database.execute(sql, parameters).fetchall()


def damage(path: Path, counting: str, rows: int) -> str | None:
    """Return what is wrong with a database in which `counting` should find so many rows."""
    try:
        with closing(sqlite3.connect(path, timeout=INDEX_WAIT_S)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                return str(said)
            (found,) = database.execute(counting).fetchone()
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return str(error)
    return None if found >= rows else f"it holds {found} rows in place of {rows}"


def signature_of(path: Path) -> Signature | None:
    """Return what tells one state of a file from another; None if there is none."""
    try:
        return status(path)
    except FileNotFoundError:
        return None


def status(path: Path) -> Signature:
    """Return the same of a file that is there."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def inode_of(path: Path) -> int | None:
    """Return the inode of a file; None if there is none."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def sync(path: Path) -> None:
    """Make what was written into a file durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
