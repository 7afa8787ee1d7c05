"""One SQLite database that is a cache: opened, looked after and closed by its one writer.

Invariants:
- what it is made of is written in it: one that is made of something else is not gone on with;
- nothing is synced: one that was in use when the machine went down is not trusted;
- one that was changed by somebody else is checked, and not gone on with if it is damaged.

The databases themselves: `sqlite.py`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ksi.storage import sqlite
from ksi.storage.atomic import make_directory, sync_directory
from ksi.storage.boot import this_boot

_ABOUT: Final = """
CREATE TABLE about (
    made_of TEXT NOT NULL, boot_id TEXT NOT NULL, clean INTEGER NOT NULL, rebuilt INTEGER NOT NULL
);
"""
_SEAL: Final = ".seal"  # Beside it after an orderly end: what the file was like then.


class Cache:
    """Writes one cache; one thread of one process at a time does.

    Any `sqlite3.Error` leaves it as it was last committed: `abandon` it and open another.

    Attributes:
        rebuilt: the number of the last order to rebuild that it is the result of.
    """

    def __init__(
        self,
        path: Path,
        tables: str,
        made_of: str,
        *,
        making: bool = False,
        rebuilt: int = 0,
    ) -> None:
        """Open what is there, or with `making` begin anew one that nobody reads yet.

        Raises:
            FileNotFoundError: there is none, and it is not to be made.
        """
        self._path = path
        self._made_of = made_of
        self._making = making
        self._boot_id = this_boot()
        self._unsettled = 0
        if making:
            make_directory(path.parent)
            sqlite.remove(path)
            sqlite.create(path, tables + _ABOUT, wal=False)
        self._signature = sqlite.status(path)
        self._database = sqlite.connect(path, bulk=making)
        try:
            if making:
                row = (made_of, self._boot_id, 0, rebuilt)
                self._database.execute("INSERT INTO about VALUES (?,?,?,?)", row)
            about = self._database.execute("SELECT * FROM about").fetchone()
        except sqlite3.Error:
            self._database.close()
            raise
        self._found, boot_id, clean, rebuilt = about
        self.rebuilt = int(rebuilt)
        self._is_trusted = bool(clean) or boot_id == self._boot_id

    def outdated(self) -> str | None:
        """Return why it is not to be gone on with, in words, or None. Asked before it is used."""
        if not self._is_trusted:
            return "it was in use when the machine went down"
        if self._found != self._made_of:
            return "it was made of something else"
        seal = self._path.with_name(self._path.name + _SEAL)
        sealed = None
        with suppress(OSError, ValueError):
            sealed = json.loads(seal.read_bytes())
        if sealed != list(self._signature) and (wrong := self._damage()):
            return f"{self._path.name} is damaged: {wrong}"
        seal.unlink(missing_ok=True)
        row = (self._boot_id,)
        self._database.execute("UPDATE about SET clean = 0, boot_id = ?", row)
        return None

    def unsettled(self) -> int:
        """Return how many rows were put in since `settle`."""
        return self._unsettled

    def settle(self) -> str | None:
        """Move what was written into the database's own file; return what somebody else has done
        to it since the last time, in words, or None."""
        found = sqlite.signature_of(self._path)
        if found is None:
            return f"{self._path.name} was deleted"
        if found[0] != self._signature[0]:
            return f"{self._path.name} was replaced"
        if found != self._signature and not self._making and (wrong := self._damage()):
            return f"{self._path.name} is damaged: {wrong}"
        if self._unsettled and not self._making:
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        if left := self._left():
            self._signature = left
        self._unsettled = 0
        return None

    def finish(self) -> Iterator[str]:
        """Close one that was made: it can be put in the place of the former now.

        Nothing is left to be done piece by piece, as in an index of many files.
        """
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.close()
        return iter(())

    def install(self, path: Path) -> None:
        """Put one that is finished in the place of the one at `path`."""
        path.with_name(path.name + _SEAL).unlink(missing_ok=True)
        sqlite.replace(self._path, path)

    def close(self) -> None:
        """Settle, sync and close: after this it is trusted even if the machine goes down."""
        if self.settle() is not None:
            return self.abandon()
        self._database.execute("UPDATE about SET clean = 1")
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.close()
        sqlite.sync(self._path)
        if left := self._left():
            seal = self._path.with_name(self._path.name + _SEAL)
            seal.write_text(json.dumps(left))
        sync_directory(self._path.parent)
        return None

    def abandon(self) -> None:
        """Close without a word: what was not committed is gone."""
        with suppress(sqlite3.Error):
            self._database.close()

    def _left(self) -> sqlite.Signature | None:
        """Return what the file is like as we leave it; None if another one is in its place, which
        the next look finds."""
        found = sqlite.signature_of(self._path)
        return found if found is not None and found[0] == self._signature[0] else None

    def _damage(self) -> str | None:
        return sqlite.damage(self._path, "SELECT count(*) FROM about", 1)


def as_json(value: Any) -> str:
    """Return a value as the one JSON text that is compared: keys in order, numbers by value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
