"""States as they were: copies that the journal goes on from, and a view to replay it into.

Nobody else sees such a view: its files are removed as soon as they are open, so that they go with
whoever has opened them, however he ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, NamedTuple

import lmdb

from ksi.storage.environment import open_writer
from ksi.storage.errors import Corrupt
from ksi.storage.journal import START, Position, resume, segments_in
from ksi.storage.snapshots import install, read_manifest
from ksi.storage.store import is_no_room
from ksi.storage.tables import LmdbTable, TableSpec
from ksi.transport.errors import StorageFull
from ksi.transport.limits import REPLAY_RECORDS

_BEGINNING: Final = float("-inf")  # No state is older than the one of nothing.


class Base(NamedTuple):
    """A copy of the state up to number `seq`; `path` is None for the one of nothing.

    `journal` is where the journal goes on from it, None where that has been dropped. What it holds
    is no later than `at`, in seconds since the epoch.
    """

    path: Path | None
    seq: int
    journal: Position | None
    at: float


def bases(store: Path, snapshots: Iterable[Path]) -> list[Base]:
    """Return the copies there are of states of a store, the newest first."""
    found = []
    for path in (*snapshots, store / "base"):
        with suppress(Corrupt, OSError):
            manifest = read_manifest(path)
            at = (path / "manifest.json").stat().st_mtime
            if manifest.store == store.name:
                follows = resume(store, manifest.seq, manifest.position)
                found.append(Base(path, manifest.seq, follows, at))
    if segments_in(store)[:1] == [START.segment]:
        found.append(Base(None, 0, START, _BEGINNING))
    return sorted(found, key=lambda each: each.seq, reverse=True)


class PastView:
    """A view of its own that starts with a copy. `tables` may be written and read; then `close`."""

    def __init__(
        self, directory: Path, specs: Mapping[str, TableSpec], snapshot: Path | None
    ) -> None:
        """Copy `snapshot`, or start with nothing; `directory` is where there is room for it.

        Raises:
            Corrupt: the copy is damaged.
            StorageFull: there is no room.
        """
        place = Path(mkdtemp(prefix=".past-", dir=directory))
        try:
            if snapshot is not None:
                install(snapshot, place / "view")
            self._environment = open_writer(place / "view", create=snapshot is None)
        except OSError as error:
            if not is_no_room(error):
                raise
            raise StorageFull(f"there is no room for a past state: {error.strerror}") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
        self._environment.open_databases(specs)
        self.tables: dict[str, LmdbTable[Any]] = {
            name: LmdbTable(name, spec, self._environment.database(name))
            for name, spec in specs.items()
        }
        self._pending = 0
        self._begin()

    def applied(self, records: int) -> None:
        """So many more have been replayed: what they wrote is let go of from time to time."""
        self._pending += records
        if self._pending >= REPLAY_RECORDS:
            self._pending = 0
            for table in self.tables.values():
                table.flush()
            self._txn.commit()
            self._begin()

    def close(self) -> None:
        """Let it go."""
        for table in self.tables.values():
            table.forget()
        self._txn.abort()
        self._environment.close()

    def _begin(self) -> None:
        self._txn: lmdb.Transaction[bytes] = self._environment.lmdb.begin(write=True)
        for table in self.tables.values():
            table.begin(self._txn)
