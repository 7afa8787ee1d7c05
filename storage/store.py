"""A store: one owner's state on disk. The journal is the truth, LMDB is its view.

    var/db/<owner>/lock                  held by the process that has the store open
    var/db/<owner>/CURRENT               names the store in use
    var/db/<owner>/<store id>/
        <first sequence number>.log      the journal
        view/                            the LMDB environment
        STATE                            boot id and clean mark: whether the view can be trusted
        base/                            the snapshot a restored store began from

Invariants:
- `commit` returns after the batch is synced in the journal; only then does any reader see it. The
  view is committed without a sync, so a batch costs one write and one sync.
- the view's meta row says exactly how much of the journal is in it; replaying the rest gives the
  state as of the last batch, whatever process died when.
- STATE says "in use since this boot" before the first unsynced commit of the view; so a view that
  may have missed a crash of the machine is known as such, by recovery and by readers.
- a store is built under another name and renamed, then named by CURRENT: it is whole or not there.
- a store is replaced, never overwritten; the last transaction of the old one tells its readers.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from ksi.storage import snapshots as snapshot_files
from ksi.storage.atomic import make_directory, sync_directory, write_atomically
from ksi.storage.environment import Environment, open_writer
from ksi.storage.errors import Corrupt, UnknownOutcome
from ksi.storage.journal import (
    START,
    Batch,
    Journal,
    Position,
    create_segment,
    holds,
    segments_in,
)
from ksi.storage.recovery import Decision, Mark, Snapshot, Start, View, decide
from ksi.storage.snapshots import Frozen, Manifest
from ksi.storage.tables import LmdbTable, RowCodec, TableSpec
from ksi.transport.errors import Conflict, StorageFull
from ksi.transport.limits import (
    FREE_BYTES_MIN,
    FREE_PART_MIN,
    LOCK_WAIT_S,
    MAP_BYTES,
    MAP_USE_MAX,
    REPLAY_RECORDS,
    ROOM_CHECK_S,
    SEGMENT_BYTES,
)

log = logging.getLogger("ksi.storage")

META_TABLE: Final = "ksi.meta"
META_KEY: Final = b"meta"
_LOCK_POLL_S: Final = 0.002


class Meta(msgspec.Struct, array_like=True, frozen=True):
    """What the view says of itself, in one row that each commit rewrites.

    Attributes:
        seq: last sequence number that is in the view.
        segment: with `offset`, the place in the journal that follows it.
        time_s: owner time, in seconds.
        extra: whatever else the host keeps there.
        superseded: this store has been replaced; look at CURRENT.
    """

    seq: int
    segment: int
    offset: int
    time_s: float
    extra: bytes = b""
    superseded: bool = False

    @property
    def position(self) -> Position:
        return Position(self.segment, self.offset)


META_CODEC: Final[RowCodec[Meta]] = RowCodec(META_TABLE, Meta)
_NEW: Final = Meta(seq=0, segment=START.segment, offset=START.offset, time_s=0.0)

Replay = Callable[["Store", Batch], tuple[float, bytes]]


class Store:
    """The store of one owner, open for writing. One thread uses it.

    Attributes:
        id: made when the store was created or restored.
        directory: where it is, `<owner>/<id>`.
        meta: what is committed, or being replayed.
        journal: its journal.
        tables: the tables by name, usable between `begin` and `commit`.
    """

    id: str
    directory: Path
    meta: Meta
    journal: Journal
    tables: dict[str, LmdbTable[Any]]

    @classmethod
    def open(
        cls,
        directory: Path,
        tables: Mapping[str, TableSpec],
        *,
        replay: Replay,
        snapshots: Iterable[Path] = (),
        boot_id: str | None = None,
        lock_wait_s: float = LOCK_WAIT_S,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Store:
        """Open the store in `directory` (one owner's), creating it where there is none; recover.

        On return the journal is in the view up to its end, and synced.

        Args:
            replay: applies a batch to `store.tables` and returns owner time and `extra` after it.
            snapshots: directories that may hold snapshots of this store.
            boot_id: of this run of the machine; None asks the kernel.

        Raises:
            Conflict: another process has held the store for all of `lock_wait_s`.
            Corrupt: what is there does not fit together; it was left as it is.
            StorageFull, OSError, UnknownOutcome: the disk did not do what recovery needs.
        """
        make_directory(directory)
        lock = _take_lock(directory, lock_wait_s)
        store = cls()
        try:
            boot_id = boot_id or this_boot()
            store_id = _find_current(directory) or _create(directory, boot_id)
            store._lock = lock
            store._setup(directory / store_id, tables, segment_bytes)
            store._recover([*snapshots, store.directory / "base"], boot_id)
            store._replay(replay)
        except BaseException:
            store._let_go()
            os.close(lock)
            raise
        return store

    def __init__(self) -> None:
        self._txn: lmdb.Transaction[bytes] | None = None
        self._environment: Environment | None = None
        self._room_until_s = 0.0

    def begin(self) -> None:
        """Open the transaction of a batch."""
        assert self._txn is None, "a batch is open already"
        self._txn = txn = self._lmdb.begin(write=True)
        for table in self._all_tables:
            table.begin(txn)

    def commit(self, payload: bytes, records: int, extra: bytes, time_s: float) -> Position:
        """Make the batch durable and then visible; return where the journal ends now.

        `payload` is what replay will be given for these `records` sequence numbers.

        Raises:
            StorageFull, TooLarge, TypeError, ValueError: there is no room, or a row or the payload
                cannot be written; nothing is on disk and the batch is still open: `abort` it.
            UnknownOutcome: it may be on disk or not; end the process.
        """
        first_seq = self.meta.seq + 1
        end = self.journal.prepare(first_seq, len(payload))
        meta = Meta(self.meta.seq + records, end.segment, end.offset, time_s, extra)
        self._put(meta)
        self.journal.append(first_seq, payload, records)
        self._commit(meta)
        return end

    def commit_view(self, extra: bytes | None = None) -> None:
        """Make the batch visible without a record in the journal.

        For rows that replay brings about again, or that may be lost with the machine.

        Raises: as `commit`.
        """
        meta = self.meta if extra is None else msgspec.structs.replace(self.meta, extra=extra)
        self._put(meta)
        self._commit(meta)

    def abort(self) -> None:
        """Undo the batch, if one is open."""
        if self._txn is not None:
            self._txn.abort()
            self._txn = None
        for table in self._all_tables:
            table.forget()

    def room(self) -> None:
        """Raise `StorageFull` when disk or map are too full to take new work.

        Looks at most every `ROOM_CHECK_S` as long as there is room.
        """
        now_s = time.monotonic()
        if now_s < self._room_until_s:
            return
        disk = os.statvfs(self.directory)
        free_bytes = disk.f_bavail * disk.f_frsize
        needed_bytes = int(min(FREE_BYTES_MIN, FREE_PART_MIN * disk.f_blocks * disk.f_frsize))
        if free_bytes < needed_bytes:
            raise StorageFull(
                f"{free_bytes >> 20} MiB are free on the disk, {needed_bytes >> 20} are needed",
                hint="free disk space; reads go on",
                free_bytes=free_bytes,
                needed_bytes=needed_bytes,
            )
        used_bytes = self.view_bytes()
        if used_bytes > MAP_USE_MAX * MAP_BYTES:
            raise StorageFull(
                f"{used_bytes >> 20} MiB of the map of {MAP_BYTES >> 20} are in use",
                hint="archive what is old; reads go on",
                used_bytes=used_bytes,
                map_bytes=MAP_BYTES,
            )
        self._room_until_s = now_s + ROOM_CHECK_S

    def view_bytes(self) -> int:
        """Return how much of the map the view uses."""
        return (self._lmdb.info()["last_pgno"] + 1) * self._page_bytes

    def check_readers(self) -> int:
        """Free the slots of readers that were killed; return how many."""
        return self._lmdb.reader_check()

    def freeze(self) -> Frozen:
        """Return the state as last committed, to be saved as a snapshot later."""
        return Frozen(self._lmdb, self.id, self._describe)

    def snapshot(self, path: Path) -> Manifest:
        """Make a verified snapshot of the state as last committed, in the directory `path`.

        Raises: as `Frozen.save`.
        """
        return self.freeze().save(path)

    def close(self) -> None:
        """Sync the view, mark it clean and let go of everything. An open batch is undone."""
        self.abort()
        self._lmdb.sync(True)
        self._let_go()
        _write_state(self.directory, self._boot_id, clean=True)
        os.close(self._lock)

    def _setup(self, directory: Path, specs: Mapping[str, TableSpec], segment_bytes: int) -> None:
        self.directory = directory
        self.id = directory.name
        self._specs = specs
        self._segment_bytes = segment_bytes

    def _recover(self, snapshots: Iterable[Path], boot_id: str) -> None:
        """Open view and journal as `recovery.TABLE` says; on return the meta row is believed."""
        segments = segments_in(self.directory)
        mark = read_mark(self.directory, boot_id)
        start = Start.WHOLE if segments[:1] == [START.segment] else Start.DROPPED
        view, environment, meta = self._look_at_view(mark)
        self._environment = environment
        usable = [
            (path, manifest)
            for path, manifest in snapshot_files.newest_first(snapshots, self.id)
            if holds(self.directory, manifest.position)
        ]
        while True:
            case = decide(mark, view, Snapshot.JOINED if usable else Snapshot.NONE, start)
            if case.decision is Decision.REFUSE:
                raise _refusal(self.directory, case.letter, mark, view)
            if case.decision is Decision.TRUST:
                assert environment is not None
                assert meta is not None
                self.journal = self._open_journal(meta.position)
                break
            self.journal = self._open_journal(None)
            try:
                self._set_view_aside()
                if case.decision is Decision.INSTALL:
                    snapshot_files.install(usable[0][0], self.directory / "view")
                else:
                    _create_view(self.directory / "view", _NEW)
            except Corrupt as error:
                log.warning("%s", error)
                self.journal.close()
                del usable[0]
                continue
            log.warning("store %s: case %s: %s", self.directory, case.letter, case.decision.value)
            environment = open_writer(self.directory / "view")
            meta = _read_meta(environment)
            break
        self._environment = environment
        self._lmdb = environment.lmdb
        self.meta = meta
        self._lmdb.reader_check()
        self.journal.sync()
        self._boot_id = boot_id
        _write_state(self.directory, boot_id, clean=False)
        self._open_tables(environment)

    def _look_at_view(self, mark: Mark) -> tuple[View, Environment | None, Meta | None]:
        path = self.directory / "view"
        if not path.is_dir():
            return View.MISSING, None, None
        if mark is Mark.OTHER_BOOT:  # Whatever it holds: not opened, for that alone may crash.
            return View.DAMAGED, None, None
        try:
            environment = open_writer(path)
        except Corrupt as error:
            log.warning("%s", error)
            return View.DAMAGED, None, None
        try:
            meta = _read_meta(environment)
        except Corrupt as error:
            log.warning("%s", error)
            environment.close()
            return View.DAMAGED, None, None
        joined = holds(self.directory, meta.position)
        return (View.JOINED if joined else View.SEVERED), environment, meta
