"""Reading an owner's state in any process: no message, no waiting, only what is committed.

A read looks at one committed state through a fresh read transaction, even while the owner is busy,
stopped or dead. What it never sees: a view that may have missed a crash of the machine (STATE says
so until the owner has recovered it), or a store that has been replaced (its last transaction says
so; and CURRENT is looked at every second, for a var directory that was deleted and made anew).
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb

from ksi.storage.archive import Archive
from ksi.storage.boot import this_boot
from ksi.storage.environment import Environment, open_reader
from ksi.storage.errors import Corrupt
from ksi.storage.files import read_cursor, read_log
from ksi.storage.journal import START, Batch, JournalReader, Position
from ksi.storage.recovery import Mark
from ksi.storage.store import META_TABLE, Meta, meta_in, read_current, read_mark
from ksi.storage.tables import Instant, ReadTable, TableSpec
from ksi.transport.errors import Busy, NotFound, NotRunning
from ksi.transport.limits import READERS_MAX

T = TypeVar("T")
Lines = Callable[[Batch], Iterable[tuple[str, int, bytes]]]

_RECHECK_S: Final = 1.0  # How long a deleted or rebuilt store may still be read.
_TRIES: Final = 4
_STEP_BYTES: Final = 1 << 18  # Of a log: what is read in vain, at most, before a page of it.


class _Stale(Exception):
    """This store has been replaced."""


class _Opened:
    """The tables of one environment, for one read at a time."""

    __slots__ = ("begin", "environment", "instant", "meta_database", "tables")

    def __init__(self, environment: Environment, specs: Mapping[str, TableSpec]) -> None:
        self.environment = environment
        self.begin = environment.lmdb.begin
        self.instant = Instant()
        self.meta_database = environment.database(META_TABLE)
        self.tables: dict[str, ReadTable[Any]] = {
            name: ReadTable(name, spec, environment.database(name), self.instant)
            for name, spec in specs.items()
        }


class _Trail:
    """Where the lines of one log lie in a journal, as far as somebody has looked: a step a while.

    What lies at the offset of a step, or behind it, is in the journal at its position or behind it:
    so a log that is read in pages is looked for once, not from the beginning for each.
    """

    def __init__(self, store: str, key: str) -> None:
        self.store = store
        self.key = key
        self._lock = threading.Lock()
        self._offsets: list[int] = []
        self._positions: list[Position] = []
        self._without = START, START  # Between these there is no line of the log.

    def begin(self, place: Position, offset: int) -> Position:
        """Return from where on to look for lines at `offset` or behind it: `place` or later."""
        without_from, without_until = self._without
        if place >= without_from:
            place = max(place, without_until)
        count = bisect_right(self._offsets, offset)
        return max(place, self._positions[count - 1]) if count else place

    def watch(self, place: Position, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches from `place` on; remember how far no line of the log has come up."""
        for batch in batches:
            yield batch
            if not self._offsets:
                without_from, without_until = self._without
                begun = without_from if without_from <= place <= without_until else place
                self._without = begun, batch.end

    def note(self, offset: int, position: Position) -> None:
        """Remember where a line is, if it is a step beyond the last."""
        if self._offsets and offset < self._offsets[-1] + _STEP_BYTES:
            return
        with self._lock:
            if not self._offsets or offset >= self._offsets[-1] + _STEP_BYTES:
                self._positions.append(position)
                self._offsets.append(offset)


class Reader:
    """Reads the store of one owner. Any number of threads may use it; it survives a fork."""

    def __init__(
        self,
        directory: Path,
        tables: Mapping[str, TableSpec],
        *,
        logs: Path | None = None,
        cursor: Path | None = None,
        archive: Path | None = None,
        lines_of: Lines | None = None,
        boot_id: str | None = None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            directory: of the owner, `var/db/<owner>`.
            logs: where a follower writes this owner's logs, `cursor` its cursor file,
                `archive` where it puts them in the end, and `lines_of` which lines (key, offset,
                content) a batch adds. All for `log` only.
            boot_id: of this run of the machine; None asks the kernel.
        """
        self._directory = directory
        self._current = directory / "CURRENT"
        self._specs = tables
        self._logs = logs
        self._cursor = cursor
        self._archive = None if archive is None else Archive(archive)
        self._lines_of = lines_of
        self._boot_id = boot_id or this_boot()
        self._environment: Environment | None = None
        self._idle: list[_Opened] = []
        self._identity: tuple[int, int] | None = None
        self._recheck_s = 0.0
        self._trail = _Trail("", "")

    def read(self, fn: Callable[[Mapping[str, ReadTable[Any]], Meta], T]) -> T:
        """Return `fn(tables, meta)`, called on one committed state.

        The tables are good only during the call, and it may be called more than once.

        Raises:
            NotRunning: there is no store that can be read; its owner has to be started.
            Busy: `READERS_MAX` reads are going on.
            Corrupt: a row is damaged.
        """
        for _ in range(_TRIES - 1):
            try:
                return self._read_once(fn)
            except (_Stale, Corrupt, lmdb.Error):
                # Replaced, or closed by the writer of this process, or a reader that slept while
                # the writer went on has met a page used anew: a fresh look tells.
                self._environment = None
        try:
            return self._read_once(fn)
        except lmdb.ReadersFullError as error:
            raise Busy(f"{READERS_MAX} reads of {self._directory} are going on") from error
        except (_Stale, lmdb.Error) as error:
            raise NotRunning(
                f"the store in {self._directory} cannot be read: {error}", hint="ksi doctor"
            ) from error

    def log(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a log; they must be committed.

        They come from the follower's file or archive, and where that is short, from the journal.

        Raises:
            Corrupt: neither has all of them.
        """
        assert self._logs is not None, "this reader reads no logs"
        assert self._cursor is not None, "this reader reads no logs"
        if start >= stop:
            return b""
        for tries_left in reversed(range(_TRIES)):
            # In this order: what the marks do not promise is in the journal behind them.
            marks = read_cursor(self._cursor, self._boot_id)
            content = read_log(self._logs, key, start, stop, self._archive)
            store, committed = self.committed()
            if marks.written is not None and marks.written.store == store.name:
                if len(content) == stop - start:
                    return content
                place = marks.written.position
            elif marks.synced is not None and marks.synced.store == store.name:
                place = marks.synced.position
            else:
                place = START
            journal = JournalReader(store)
            trail = self._trail_of(store.name, key)
            if place == START or not tries_left:  # A file cut by hand is short despite its mark.
                place = journal.start()
            found_from = trail.begin(place, start) if tries_left else place
            batches = trail.watch(place, journal.read(found_from, committed))
            try:
                complete = self._overlay(batches, trail, start, stop, content)
            except NotFound:  # The follower went on and the segment was dropped: look again.
                continue
            if complete is not None:
                return complete
        raise Corrupt(
            f"bytes {start} to {stop} of log {key} are neither in its file nor in the journal",
            hint="has the file been changed by hand?",
            key=key,
            start=start,
            stop=stop,
        )

    def _trail_of(self, store: str, key: str) -> _Trail:
        if (self._trail.store, self._trail.key) != (store, key):
            self._trail = _Trail(store, key)
        return self._trail

    def _overlay(
        self, batches: Iterable[Batch], trail: _Trail, start: int, stop: int, content: bytes
    ) -> bytes | None:
        """Return what the file has, overlaid with the lines of the journal, None if incomplete.

        Overlaid, not only continued: after a crash of the machine a file may have its length but
        not its bytes, and after a restore the bytes of the former store.
        """
        assert self._lines_of is not None, "this reader reads no logs"
        found = bytearray(content.ljust(stop - start, b"\0"))
        covered = start + len(content)
        for batch in batches:
            for key, offset, line in self._lines_of(batch):
                if key != trail.key:
                    continue
                trail.note(offset, batch.start)
                end = offset + len(line)
                if end > start and offset < stop:
                    low, high = max(offset, start), min(end, stop)
                    found[low - start : high - start] = line[low - offset : high - offset]
                    if low <= covered:
                        covered = max(covered, high)
                if end >= stop:  # What follows begins there, or behind it.
                    return bytes(found) if covered >= stop else None
        return bytes(found) if covered >= stop else None

    def committed(self) -> tuple[Path, Position]:
        """Return the directory of the store in use and where its committed journal ends."""
        meta = self.read(lambda _, meta: meta)
        return self._directory / meta.store, meta.position

    def _read_once(self, fn: Callable[[Mapping[str, ReadTable[Any]], Meta], T]) -> T:
        if time.monotonic() >= self._recheck_s:
            self._recheck()
        environment = self._environment
        try:
            opened = self._idle.pop()
        except IndexError:
            opened = self._open()
        else:
            if opened.environment is not environment or environment.inherited:
                opened = self._open()
        instant = opened.instant
        instant.txn = opened.begin()
        try:
            meta = meta_in(instant.txn, opened.meta_database)
            if meta.superseded:
                raise _Stale("it has been replaced")
            return fn(opened.tables, meta)
        finally:
            # No other name holds it: it is reused at once, an exception that is kept does not
            # keep its slot, and a fork finds none to inherit.
            instant.txn.abort()
            del instant.txn
            self._idle.append(opened)

    def _open(self) -> _Opened:
        self._idle.clear()
        store_id = read_current(self._directory)
        if store_id is None:
            raise NotRunning(f"there is no store in {self._directory}", hint="ksi start")
        store = self._directory / store_id
        if read_mark(store, self._boot_id) is Mark.OTHER_BOOT:
            raise NotRunning(
                f"the store {store} was in use when the machine went down",
                hint="start it, then it is recovered: ksi start",
            )
        self._environment = environment = open_reader(store / "view")
        return _Opened(environment, self._specs)

    def _recheck(self) -> None:
        try:
            status = os.stat(self._current)
        except FileNotFoundError:
            identity = None
        else:
            identity = (status.st_ino, status.st_mtime_ns)
        if identity != self._identity:
            self._environment = None
            self._identity = identity
        self._recheck_s = time.monotonic() + _RECHECK_S
