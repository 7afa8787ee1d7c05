"""A store: one owner's state on disk. The journal is the truth, LMDB is its view.

    var/db/<owner>/lock                  held by the process that has the store open
    var/db/<owner>/CURRENT               names the store in use
    var/db/<owner>/<store id>/
        <first sequence number>.log      the journal
        view/                            the LMDB environment
        STATE                            boot id and clean mark: whether the view can be trusted
        base/                            the snapshot a restored store began from
        FROM                             the checksum of the one that this was made from

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

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from ksi.storage.atomic import make_directory, sync_directory, write_atomically
from ksi.storage.boot import this_boot
from ksi.storage.environment import Environment, open_copy, open_reader, open_writer
from ksi.storage.errors import Corrupt, UnknownOutcome
from ksi.storage.journal import (
    NO_ROOM,
    START,
    Batch,
    Journal,
    Position,
    create_segment,
    goes_on,
    resume,
    segments_in,
)
from ksi.storage.recovery import Decision, Mark, Snapshot, Start, View, decide
from ksi.storage.snapshots import Frozen, Manifest, install, newest_good, seal
from ksi.storage.tables import LmdbTable, RowCodec, TableSpec
from ksi.transport.errors import Conflict, NotRunning, StorageFull
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
FROM: Final = "FROM"
_LOCK_POLL_S: Final = 0.002


class Meta(msgspec.Struct, array_like=True, frozen=True):
    """What the view says of itself, in one row that each commit rewrites.

    Attributes:
        store: id of the store.
        seq: last sequence number that is in the view.
        segment: with `offset`, the place in the journal that follows it.
        time_s: owner time, in seconds.
        extra: whatever else the host keeps there.
        superseded: this store has been replaced; look at CURRENT.
        origin: id of the first store it was restored from, in however many steps; empty: none.
    """

    store: str
    seq: int
    segment: int
    offset: int
    time_s: float
    extra: bytes
    superseded: bool = False
    origin: str = ""

    @property
    def lineage(self) -> str:
        """The same for a store and all that are restored from it: other owners know it by this."""
        return self.origin or self.store

    @property
    def position(self) -> Position:
        return Position(self.segment, self.offset)


META_CODEC: Final[RowCodec[Meta]] = RowCodec(META_TABLE, Meta)

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

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TableSpec],
        journal: Journal,
        environment: Environment,
        boot_id: str,
    ) -> None:
        """Use `Store.open`."""
        self.id = directory.name
        self.directory = directory
        self.journal = journal
        self.meta = read_meta(environment)
        environment.open_databases(specs)
        self.tables: dict[str, LmdbTable[Any]] = {
            name: LmdbTable(name, spec, environment.database(name)) for name, spec in specs.items()
        }
        self._all_tables = tuple(self.tables.values())
        self._meta_database = environment.database(META_TABLE)
        self._lmdb = environment.lmdb
        self._page_bytes = self._lmdb.stat()["psize"]
        self._txn: lmdb.Transaction[bytes] | None = None
        self._boot_id = boot_id
        self._room_until_s = 0.0
        self._closing = ExitStack()

    @classmethod
    def open(
        cls,
        directory: Path,
        tables: Mapping[str, TableSpec],
        *,
        replay: Replay,
        snapshots: Iterable[Path] = (),
        boot_id: str | None = None,
        locked: bool = False,
        lock_wait_s: float = LOCK_WAIT_S,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Store:
        """Open the store in `directory` (one owner's), creating it where there is none; recover.

        On return the journal is in the view up to its end, and synced.

        Args:
            replay: applies a batch to `store.tables` and returns owner time and `extra` after it.
            snapshots: directories that may hold snapshots of this store.
            boot_id: of this run of the machine; None asks the kernel.
            locked: the caller has taken the lock, and keeps it until the store is closed.

        Raises:
            Conflict: another process has held the store for all of `lock_wait_s`.
            Corrupt: what is there does not fit together; it was left as it is.
            StorageFull, OSError, UnknownOutcome: the disk did not do what recovery needs.
        """
        boot_id = boot_id or this_boot()
        with ExitStack() as undo:
            if not locked:
                undo.callback(os.close, take_lock(directory, lock_wait_s))
            _sweep(directory)
            store_directory = directory / (_find_current(directory) or _create(directory))
            journal, environment = _recover(
                store_directory, snapshots, boot_id, segment_bytes, undo
            )
            store = cls(store_directory, tables, journal, environment, boot_id)
            store._replay(replay)
            store._closing = undo.pop_all()
        return store

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
        meta = self._next(self.meta.seq + records, end, time_s, extra)
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

    @property
    def is_untouched(self) -> bool:
        """Whether it was restored from a snapshot and nothing has been committed since."""
        return bool(self.meta.origin) and self.meta.position == Position(self.meta.seq + 1, 0)

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
        """Sync the view, mark it clean and let go of everything. An open batch is undone.

        A view that lacks what may be in the journal is not clean: see `UnknownOutcome`.
        """
        with self._closing:
            self.abort()
            self._lmdb.sync(True)
            if not goes_on(self.directory, self.meta.position):
                _write_state(self.directory, self._boot_id, clean=True)

    def _replay(self, replay: Replay) -> None:
        """Apply what the journal has beyond the view; commit every `REPLAY_RECORDS`."""
        self.begin()
        pending = 0
        try:
            start = resume(self.directory, self.meta.seq, self.meta.position)
            for batch in self.journal.read(start or self.meta.position):
                if batch.first_seq != self.meta.seq + 1:
                    raise Corrupt(
                        f"store {self.directory}: number {self.meta.seq + 1} should follow at "
                        f"{batch.start}, found {batch.first_seq}",
                        hint="restore a checkpoint (ksi restore)",
                    )
                time_s, extra = replay(self, batch)
                seq = self.meta.seq + batch.records
                self.meta = self._next(seq, batch.end, time_s, extra)
                pending += batch.records
                if pending >= REPLAY_RECORDS:
                    self.commit_view()
                    self.begin()
                    pending = 0
            if pending:
                self.commit_view()
        finally:
            self.abort()

    def _next(self, seq: int, end: Position, time_s: float, extra: bytes) -> Meta:
        return Meta(self.id, seq, *end, time_s, extra, False, self.meta.origin)

    def _put(self, meta: Meta) -> None:
        txn = self._txn
        assert txn is not None, "no batch is open"
        try:
            for table in self._all_tables:
                table.flush()
            value = META_CODEC.encode(META_KEY, meta)
            txn.put(META_KEY, value, db=self._meta_database)
        except lmdb.MapFullError as error:
            raise StorageFull(f"the map is full: {error}", hint="archive what is old") from error

    def _commit(self, meta: Meta) -> None:
        assert self._txn is not None
        try:
            self._txn.commit()
        except lmdb.Error as error:
            raise UnknownOutcome(f"view {self.directory}: {error}") from error
        self._txn = None
        for table in self._all_tables:
            table.end()
        self.meta = meta

    def _describe(self, txn: lmdb.Transaction[bytes]) -> tuple[int, Position, float]:
        meta = meta_in(txn, self._meta_database)
        return meta.seq, meta.position, meta.time_s


def take_lock(directory: Path, wait_s: float = LOCK_WAIT_S) -> int:
    """Return the lock of this directory, held until its descriptor is closed, by the kernel.

    The directory is made if it is missing.

    Raises:
        Conflict: another process held it for all of `wait_s`.
    """
    make_directory(directory)
    path = directory / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline_s:
                time.sleep(_LOCK_POLL_S)  # A blocking `flock` has no deadline.
                continue
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise Conflict(
                f"the store in {directory} is held by process {holder}",
                hint="stop it first",
                pid=holder,
            ) from None
        except BaseException:
            os.close(fd)
            raise
        with suppress(OSError):  # Who holds it is for messages only, and the disk may be full.
            os.pwrite(fd, f"{os.getpid():<20}\n".encode(), 0)
        return fd


def copy_view(directory: Path, path: Path) -> None:
    """Copy the view of the store in use, which nobody writes now, to a new directory `path`.

    Raises:
        Corrupt, NotRunning: there is none that can be trusted.
    """
    store_id = read_current(directory)
    if store_id is None or read_mark(directory / store_id, this_boot()) is Mark.OTHER_BOOT:
        raise NotRunning(f"there is no store in {directory} that can be copied", hint="ksi start")
    environment = open_reader(directory / store_id / "view")
    try:
        if lacks_some(directory / store_id, read_meta(environment)):
            raise Corrupt(
                f"the view of {directory / store_id} lacks some of its journal", hint="ksi start"
            )
        Frozen(environment.lmdb, store_id, lambda _: (0, START, 0.0)).copy(path)
    finally:
        environment.close()


def seal_copy(path: Path) -> Manifest:
    """Make a snapshot of a copy of a view, by what the copy says of itself.

    Raises:
        Corrupt: it is damaged.
    """
    meta = read_copy_meta(path)
    return seal(path, meta.store, meta.seq, meta.position, meta.time_s)


def read_copy_meta(path: Path) -> Meta:
    """Return what a copy of a view says of itself. Raises: as `seal_copy`."""
    environment = open_copy(path)
    try:
        database = environment.open_db(META_TABLE.encode(), create=False)
        with environment.begin() as txn:
            return meta_in(txn, database)
    except lmdb.Error as error:
        raise Corrupt(f"the copy {path}: {error}", file=str(path)) from error
    finally:
        environment.close()


def restore(directory: Path, snapshot: Path, *, lock_wait_s: float = LOCK_WAIT_S) -> str:
    """Make a new store from a snapshot the one in use, and return its id.

    The former store stays where it is; its readers are told in its last transaction. The new one
    has a journal of its own, which begins behind the snapshot.

    Raises:
        Conflict: the store is in use.
        Corrupt: the snapshot is not good; nothing was changed.
    """
    with ExitStack() as undo:
        undo.callback(os.close, take_lock(directory, lock_wait_s))
        former = None
        with suppress(Corrupt):  # A store that is gone or damaged is no reason to stay without.
            former = _find_current(directory)
        store_id = _create(directory, snapshot)
        if former is not None and read_mark(directory / former, this_boot()) is not Mark.OTHER_BOOT:
            with suppress(Corrupt, lmdb.Error):  # Who reads it looks at CURRENT every second.
                _supersede(directory / former / "view")
    return store_id


def is_as_restored(directory: Path, snapshot: Manifest) -> bool:
    """Whether the store in use was restored from this snapshot and has not changed since."""
    with suppress(Corrupt, OSError):
        store_id = read_current(directory)
        if store_id is None or read_mark(directory / store_id, this_boot()) is not Mark.CLEAN:
            return False
        if (directory / store_id / FROM).read_text() != snapshot.sha256:
            return False
        return read_copy_meta(directory / store_id / "view").seq == snapshot.seq
    return False


def set_view_aside(
    directory: Path, snapshots: Iterable[Path] = (), *, lock_wait_s: float = LOCK_WAIT_S
) -> None:
    """Make the next `open` of the store in use build its view anew, from what the journal says.

    Raises:
        Conflict: the store is in use.
        Corrupt: there is nothing to build it from; nothing was changed.
    """
    with ExitStack() as undo:
        undo.callback(os.close, take_lock(directory, lock_wait_s))
        store_id = read_current(directory)
        if store_id is None:
            return
        store = directory / store_id
        whole = segments_in(store)[:1] == [START.segment]
        if not whole and not newest_good(
            [*snapshots, store / "base"],
            store_id,
            lambda seq, position: resume(store, seq, position) is not None,
        ):
            raise Corrupt(
                f"store {store}: neither its journal nor a snapshot holds all of its view",
                hint="restore a checkpoint (ksi restore)",
            )
        _set_view_aside(store)


def distrust_view(directory: Path) -> None:
    """Make the next `open` of the store in use treat its view as after a crash of the machine.

    LMDB does not check its pages: a view with a damaged one ends whoever meets it, again and again.

    Raises:
        Corrupt: CURRENT names no store.
    """
    store_id = read_current(directory)
    if store_id is not None:
        (directory / store_id / "STATE").unlink(missing_ok=True)


def read_current(directory: Path) -> str | None:
    """Return the id of the store in use, None where there is none."""
    try:
        store_id = (directory / "CURRENT").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not (store_id.isalnum() and (directory / store_id).is_dir()):
        raise Corrupt(
            f"{directory}/CURRENT names {store_id[:80]!r}, which is not there",
            hint=f"name one of the directories in {directory}",
            file=str(directory / "CURRENT"),
        )
    return store_id


def read_mark(directory: Path, boot_id: str) -> Mark:
    """Return what STATE says about the view of the store in `directory`."""
    try:
        state = _decode_state((directory / "STATE").read_bytes())
    except (OSError, ValueError):
        return Mark.OTHER_BOOT
    if state.clean:
        return Mark.CLEAN
    return Mark.SAME_BOOT if state.boot_id == boot_id else Mark.OTHER_BOOT


def read_meta(environment: Environment) -> Meta:
    """Return the meta row of a view.

    Raises:
        Corrupt: there is none, or it does not match its checksum.
    """
    database = environment.database(META_TABLE)
    with environment.lmdb.begin() as txn:
        return meta_in(txn, database)


def lacks_some(directory: Path, meta: Meta) -> bool:
    """Return whether a view was closed in order and has not all of its journal: `Store.close` sees
    to that, so it is damaged.

    LMDB does not check its pages: a flipped bit in one can show a former state of a table.
    """
    # In this order: who has opened the store since has said so before the first record.
    return goes_on(directory, meta.position) and read_mark(directory, this_boot()) is Mark.CLEAN


def meta_in(txn: lmdb.Transaction[bytes], database: lmdb._Database) -> Meta:
    """Return the meta row as of a transaction. Raises: as `read_meta`."""
    value = txn.get(META_KEY, None, database)
    if value is None:
        raise Corrupt("the view has no meta row")
    return META_CODEC.decode(META_KEY, value)


def is_no_room(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, says that the disk is full."""
    while error is not None:
        if isinstance(error, StorageFull | lmdb.DiskError):
            return True
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__
    return False


class _State(msgspec.Struct):
    boot_id: str
    clean: bool


# Made at import, in the fork server: once for all owners, in pages that they share.
_decode_state: Final = msgspec.json.Decoder(_State).decode


def _write_state(directory: Path, boot_id: str, *, clean: bool) -> None:
    """Write STATE, durably, unless it says so already: a restart after a kill costs no sync."""
    path = directory / "STATE"
    content = msgspec.json.encode(_State(boot_id, clean)) + b"\n"
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    write_atomically(path, content)


def _recover(
    directory: Path,
    snapshots: Iterable[Path],
    boot_id: str,
    segment_bytes: int,
    undo: ExitStack,
) -> tuple[Journal, Environment]:
    """Return journal and view, fit to replay the one onto the other, as `recovery.TABLE` says."""
    _sweep(directory)
    mark = read_mark(directory, boot_id)
    view, environment, known = _look_at_view(directory, mark)
    if environment is not None:
        undo.callback(environment.close)
    start = Start.WHOLE if segments_in(directory)[:1] == [START.segment] else Start.DROPPED
    snapshot = None
    if environment is None:
        snapshot = newest_good(
            [*snapshots, directory / "base"],
            directory.name,
            lambda seq, position: resume(directory, seq, position) is not None,
        )
    case = decide(mark, view, Snapshot.NONE if snapshot is None else Snapshot.JOINED, start)
    if case.decision is Decision.REFUSE:
        raise Corrupt(
            f"store {directory}: {case.why} (case {case.letter} of recovery)",
            hint="put back what is missing, or restore a checkpoint (ksi restore)",
            case=case.letter,
        )
    journal = Journal(directory, known=known, segment_bytes=segment_bytes)
    undo.callback(journal.close)
    if case.decision is not Decision.TRUST:
        log.warning("store %s: %s: %s", directory, case.why, case.decision.value)
        _set_view_aside(directory)
        _write_state(directory, boot_id, clean=False)  # The next one lacks what is to be replayed.
        if snapshot is None:
            _create_view(directory / "view", directory.name)
        else:
            install(snapshot[0], directory / "view")
        environment = _open_view(directory / "view")
        undo.callback(environment.close)
    assert environment is not None
    environment.lmdb.reader_check()
    journal.sync()
    _write_state(directory, boot_id, clean=False)
    if case.decision is not Decision.TRUST:
        current = directory.parent / "CURRENT"
        write_atomically(current, current.read_bytes())  # Another file: readers look again.
    return journal, environment


def _look_at_view(directory: Path, mark: Mark) -> tuple[View, Environment | None, Position | None]:
    """Return what the view is worth and, where it may be worth something, the view and its place.

    One that may have missed a crash of the machine is not even opened: that alone may kill us.
    """
    path = directory / "view"
    if not path.is_dir():
        return View.MISSING, None, None
    if mark is Mark.OTHER_BOOT:
        return View.DAMAGED, None, None
    try:
        environment = _open_view(path)
    except Corrupt as error:
        log.warning("%s", error)
        return View.DAMAGED, None, None
    try:
        meta = read_meta(environment)
        if meta.store != directory.name:
            raise Corrupt(f"view {path}: is that of store {meta.store}")
        if lacks_some(directory, meta):
            raise Corrupt(f"closed in order with number {meta.seq}, but its journal has more")
        known = resume(directory, meta.seq, meta.position)
    except (Corrupt, lmdb.Error) as error:
        log.warning("view %s: %s", path, error)
        environment.close()
        return View.DAMAGED, None, None
    except BaseException:
        environment.close()
        raise
    return (View.SEVERED if known is None else View.JOINED), environment, known


def _set_view_aside(directory: Path) -> None:
    """Rename the view so that nobody opens it, keeping only the last that was."""
    view = directory / "view"
    if not view.exists():
        return
    former = sorted(directory.glob("view.untrusted-*"))
    number = max((int(path.name.rsplit("-", 1)[1]) for path in former), default=0) + 1
    view.rename(directory / f"view.untrusted-{number}")
    sync_directory(directory)
    for path in former:
        shutil.rmtree(path)


def _create(directory: Path, base: Path | None = None) -> str:
    """Create a store, empty or from a snapshot, name it in CURRENT, and return its id."""
    store_id = os.urandom(16).hex()
    temporary = directory / f".new-{store_id}"
    temporary.mkdir(mode=0o700)
    first_seq = 1
    if base is None:
        _create_view(temporary / "view", store_id)
    else:
        first_seq = _create_from(base, temporary, store_id)
    os.close(create_segment(temporary, first_seq))
    _write_state(temporary, this_boot(), clean=True)
    temporary.rename(directory / store_id)
    sync_directory(directory)
    write_atomically(directory / "CURRENT", f"{store_id}\n".encode())
    return store_id


def _create_view(path: Path, store_id: str) -> None:
    """Make an empty view, whole and synced before it has its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    environment = _open_view(temporary, create=True)
    try:
        _put_meta(environment, Meta(store_id, 0, *START, 0.0, b""))
    finally:
        environment.close()
    sync_directory(temporary)
    temporary.rename(path)
    sync_directory(path.parent)


def _create_from(base: Path, temporary: Path, store_id: str) -> int:
    """Make view and base of a new store from a snapshot; return its next sequence number."""
    manifest = install(base, temporary / "view")
    write_atomically(temporary / FROM, manifest.sha256.encode())
    environment = _open_view(temporary / "view")
    try:
        former = read_meta(environment)
        place = Position(former.seq + 1, 0)
        meta = Meta(
            store_id, former.seq, *place, former.time_s, former.extra, False, former.lineage
        )
        _put_meta(environment, meta)
        Frozen(environment.lmdb, store_id, lambda _: (meta.seq, meta.position, meta.time_s)).save(
            temporary / "base"
        )
    finally:
        environment.close()
    return meta.seq + 1


def _supersede(view: Path) -> None:
    """Tell the readers of a store, in its last transaction, that it has been replaced."""
    environment = _open_view(view)
    try:
        _put_meta(environment, msgspec.structs.replace(read_meta(environment), superseded=True))
    finally:
        environment.close()


def _open_view(path: Path, *, create: bool = False) -> Environment:
    environment = open_writer(path, create=create)
    environment.open_databases([META_TABLE])
    return environment


def _put_meta(environment: Environment, meta: Meta) -> None:
    database = environment.database(META_TABLE)
    with environment.lmdb.begin(write=True) as txn:
        txn.put(META_KEY, META_CODEC.encode(META_KEY, meta), db=database)
    environment.lmdb.sync(True)


def _find_current(directory: Path) -> str | None:
    """Return the store to open; adopts one that a crash left built but not yet named."""
    current = read_current(directory)
    if current is not None:
        return current
    stores = filter(str.isalnum, os.listdir(directory))
    built = [name for name in stores if os.path.exists(directory / name / "STATE")]
    if len(built) > 1:
        raise Corrupt(
            f"{directory}/CURRENT is missing and there are {len(built)} stores",
            hint=f"write the name of one of them into {directory}/CURRENT",
            file=str(directory / "CURRENT"),
        )
    for store_id in built:
        write_atomically(directory / "CURRENT", f"{store_id}\n".encode())
        return store_id
    return None


def _sweep(directory: Path) -> None:
    """Remove what a killed process was still building under a hidden name."""
    for name in os.listdir(directory):
        if name.startswith("."):
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
