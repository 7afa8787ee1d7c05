"""Looking at a store from outside, whether its owner runs, is stopped or has never been.

Nothing here waits for the owner or changes what it finds. A view that may have missed a crash of
the machine is not opened: what recovery would do about it is worked out instead.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import lmdb

from ksi.storage.boot import this_boot
from ksi.storage.environment import Environment, open_reader
from ksi.storage.errors import Corrupt
from ksi.storage.journal import START, Batch, JournalReader, resume, segments_in
from ksi.storage.recovery import Case, Decision, Mark, Snapshot, Start, View, decide
from ksi.storage.snapshots import newest_good
from ksi.storage.store import META_TABLE, Meta, lacks_some, read_current, read_mark, read_meta
from ksi.storage.tables import RowCodec
from ksi.transport.errors import NotFound

PAGE_ROWS: Final = 10_000  # Read in one transaction: a long one keeps its owner from reusing pages.
_TRIES: Final = 3


class Examined(NamedTuple):
    """What was found of a store.

    Attributes:
        directory: `<owner>/<id>`.
        mark, case: what STATE says, and what recovery would do if the owner were started now.
        environment, meta: its view, where that can be read.
    """

    directory: Path
    mark: Mark
    case: Case
    environment: Environment | None
    meta: Meta | None

    @property
    def is_lost(self) -> bool:
        """Whether recovery would refuse it."""
        return self.case.decision is Decision.REFUSE


class Slot(NamedTuple):
    """A reader of a view: its process, and how many transactions ago its own began, if one is open.

    Attributes:
        alive: whether there is such a process.
    """

    pid: int
    alive: bool
    behind: int | None


def examine(
    directory: Path, snapshots: Iterable[Path] = (), *, boot_id: str | None = None
) -> Examined | None:
    """Look at the store in use in `directory` (one owner's); None where there is none.

    Raises:
        Corrupt: CURRENT names a store that is not there.
    """
    store_id = read_current(directory)
    if store_id is None:
        return None
    store = directory / store_id
    mark = read_mark(store, boot_id or this_boot())
    view, environment, meta = _look_at_view(store, mark)
    start = Start.WHOLE if segments_in(store)[:1] == [START.segment] else Start.DROPPED
    snapshot = None
    if view is not View.JOINED:
        snapshot = newest_good(
            [*snapshots, store / "base"],
            store_id,
            lambda seq, position: resume(store, seq, position) is not None,
        )
    case = decide(mark, view, Snapshot.NONE if snapshot is None else Snapshot.JOINED, start)
    return Examined(store, mark, case, environment, meta)


def committed_batches(examined: Examined) -> Iterator[Batch]:
    """Yield what the journal still holds, up to what the view says is committed.

    Raises:
        Corrupt: a record is damaged, a number or a segment is missing, or the journal ends
            elsewhere than the view says.
    """
    meta = examined.meta
    assert meta is not None
    seq = None
    for batch in _from_its_start(examined.directory, meta):
        seq = batch.first_seq + batch.records - 1
        yield batch
    if seq is not None and seq != meta.seq:
        raise Corrupt(
            f"the journal {examined.directory} ends with number {seq}, its view with {meta.seq}"
        )


def check_rows(environment: Environment, tables: Iterable[str] = ()) -> tuple[int, list[str]]:
    """Read every row of a view; return how many there are, and where one is damaged or missing.

    LMDB does not check its pages: one that is damaged may hide rows. It knows how many there are.

    Args:
        tables: those that have to be there.

    Raises:
        lmdb.Error: the file is damaged.
    """
    with environment.lmdb.begin() as txn:
        names = {
            bytes(name).decode(errors="backslashreplace") for name in environment.lmdb.dbs(txn)
        }
    count = 0
    damaged = [f"table {name}, which is not there" for name in tables if name not in names]
    for name in sorted(names.intersection(tables) if damaged else names):
        database = environment.database(name)
        intact = RowCodec(name, bytes).intact
        after: bytes | None = b""
        found, states = 0, set()
        while after is not None:
            rows, wrong, after, state = _page(environment, database, after, intact)
            found += rows
            states.add(state)
            damaged += [f"table {name}, key {key[:100]!r}" for key in wrong]
        count += found
        if (
            len(states) == 1 and (known := states.pop()[1]) != found
        ):  # Nothing was written meanwhile.
            damaged.append(f"table {name}, where {found} of {known} rows are found")
    return count, damaged


def map_use(environment: Environment) -> tuple[int, int]:
    """Return how many bytes of the map are used, and how many there are."""
    described = environment.lmdb.info()
    return (described["last_pgno"] + 1) * environment.lmdb.stat()["psize"], described["map_size"]


def readers(environment: Environment) -> list[Slot]:
    """Return the readers of a view."""
    last = environment.lmdb.info()["last_txnid"]
    found = []
    for line in environment.lmdb.readers().splitlines()[1:]:
        pid, _thread, began = line.split()
        behind = last - int(began) if began.isdigit() else None
        found.append(Slot(int(pid), os.path.exists(f"/proc/{pid}"), behind))
    return found


def free_readers(environment: Environment) -> int:
    """Free the slots of readers that were killed; return how many."""
    return environment.lmdb.reader_check()


def lock_holder(directory: Path) -> int | None:
    """Return the process that has the store in `directory` open; None if none has.

    0 is one that has not said who it is.
    """
    try:
        fd = os.open(directory / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with suppress(ValueError):
            return int(os.pread(fd, 32, 0))
        return 0
    else:
        return None
    finally:
        os.close(fd)


def _look_at_view(store: Path, mark: Mark) -> tuple[View, Environment | None, Meta | None]:
    path = store / "view"
    if not (path / "data.mdb").exists():
        return View.MISSING, None, None
    if mark is Mark.OTHER_BOOT:
        return View.DAMAGED, None, None
    try:
        environment = open_reader(path)
        environment.database(META_TABLE)
        meta, former = read_meta(environment), None
        while lacks_some(store, meta):
            meta, former = read_meta(environment), meta  # Its owner may just have closed it.
            if meta == former:
                return View.DAMAGED, None, None
    except (Corrupt, lmdb.Error):
        return View.DAMAGED, None, None
    if resume(store, meta.seq, meta.position) is None:
        return View.SEVERED, environment, meta
    return View.JOINED, environment, meta


def _from_its_start(store: Path, meta: Meta) -> Iterator[Batch]:
    journal = JournalReader(store)
    for tries_left in reversed(range(_TRIES)):
        batches = journal.read(journal.start(), meta.position)
        try:
            first = next(batches, None)
        except NotFound:  # Its first segment was dropped just now.
            if not tries_left:
                raise
            continue
        if first is not None:
            yield first
            yield from batches
        return


def _page(
    environment: Environment,
    database: lmdb._Database,
    after: bytes,
    intact: Callable[[bytes, bytes], bool],
) -> tuple[int, list[bytes], bytes | None, tuple[int, int]]:
    """Check the rows behind the key `after`; return how many, which are damaged, the last, and the
    state that was looked at with the number of rows in it."""
    count, damaged, key = 0, [], after
    with environment.lmdb.begin() as txn:
        state = txn.id(), txn.stat(database)["entries"]
        cursor = txn.cursor(database)
        more = cursor.set_range(after) if after else cursor.first()
        if more and after and cursor.key() == after:
            more = cursor.next()
        for key, value in cursor if more else ():
            count += 1
            if not intact(key, value):
                damaged.append(key)
            if count == PAGE_ROWS:
                return count, damaged, key, state
    return count, damaged, None, state
