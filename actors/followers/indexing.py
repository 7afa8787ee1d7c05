"""The follower that writes the index, in the process of the index's owner.

It reads the journal of the sessions from its cursor, as far as the session files are written: so
where there is a row, its line is in the file. It has a thread of its own, since to build the index
again takes minutes where there are millions of entries, and its owner answers meanwhile.

The index is built again, from the session files and then the journal behind them, when somebody
has ordered it; when a database was deleted or is damaged; when it has been through a crash of the
machine, or is of another store. The new one is made beside the old, which is read on until then,
and replaces it when it is whole.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import zmq

from ksi.actors.followers.indexed import (
    Describer,
    Verification,
    index_directory,
)
from ksi.actors.process import run_owner, wait_for_room
from ksi.actors.reading import archive_directory, cursor_path, log_directory, reader_of
from ksi.actors.supervision.reports import read_index, write_index
from ksi.storage.archive import Archive
from ksi.storage.atomic import make_directory
from ksi.storage.boot import this_boot
from ksi.storage.errors import Corrupt
from ksi.storage.files import read_cursor, read_lines
from ksi.storage.index import IndexGap, IndexReader, IndexWriter, Line, Place, install, is_damage
from ksi.storage.journal import Position
from ksi.transport.errors import KsiError, NotFound, NotRunning
from ksi.transport.identity import bell_endpoint, run_directory
from ksi.transport.limits import TICK_S
from ksi.transport.mailbox import listen

GROUP_S: Final = 0.02  # Lines that come within this time are indexed together.
SETTLE_S: Final = 1.0  # How often databases are looked after, and what was written moved into them.
SETTLE_LINES: Final = 50_000  # The same under load: what readers have to look through.
TURN_LINES: Final = 4096  # Taken in one turn, and in one transaction.
PAGE_LOGS: Final = 500  # Session files looked up at once.
FILES_WAIT_S: Final = 2.0  # How long building the index waits for files to be written, in all.
TELL_S: Final = 0.2  # How often it says how far it is.
LAST_S: Final = 0.3  # Spent on last lines: more may come as long as it looks, and will be found.
CLOSE_S: Final = 3.0  # For the last lines at the end; a supervisor waits 5.
RETRY_S: Final = 0.5  # After trouble that may pass; doubled each time ...
RETRY_S_MAX: Final = 30.0  # ... up to this.


class Outdated(Exception):
    """The index cannot be gone on with; the text says why."""


class Source:
    """Where entries come from: the files, and the journal up to where the files are written."""

    def __init__(self, var: Path) -> None:
        self.var = var
        self.reader = reader_of("sessions", var)
        self._boot_id = this_boot()

    def written(self) -> tuple[str, Position | None]:
        """Return the store of the sessions, and up to where in its journal the files are written.

        Raises:
            NotRunning: there is no store yet.
        """
        marks = read_cursor(cursor_path(self.var, "sessions"), self._boot_id)
        mark = marks.written or marks.synced
        store, _ = self.reader.position()
        return store, mark.position if mark is not None and mark.store == store else None

    def feed(self, writer: IndexWriter) -> bool:
        """Bring the index on from where it is; return whether there was anything.

        Raises:
            Outdated: it cannot be brought on.
        """
        place = writer.place
        assert place is not None
        store, stop = self.written()
        if store != place.store:
            raise Outdated("the store of the sessions was replaced")
        position = place.position
        if stop is None or position >= stop:
            return False
        lines: list[Line] = []
        try:
            for batch in self.reader.journal().read(position, stop):
                lines += self.reader.lines_of(batch)
                position = batch.end
                if len(lines) >= TURN_LINES:
                    break
            writer.add(lines, place._replace(position=position))
        except NotFound as error:
            raise Outdated("the journal was dropped before it was indexed") from error
        except IndexGap as error:
            raise Outdated(str(error)) from error
        return True


class Rebuild:
    """Makes a new index beside the old, a piece at a turn.

    Attributes:
        reason: why.
        done_bytes, total_bytes: of the session files.
        lines: how many are in it.
    """

    def __init__(self, source: Source, describe: Describer, reason: str, order: int) -> None:
        self.reason = reason
        self.done_bytes = self.total_bytes = self.lines = 0
        self.begun_s = time.monotonic()
        self._source = source
        self._order = order
        self._directory = index_directory(source.var)
        self._made = self._directory / "rebuild"
        shutil.rmtree(self._made, ignore_errors=True)
        self.writer = IndexWriter(self._made, describe, bulk=True)
        self._steps = self._run()

    def turn(self) -> bool:
        """Do a piece; return False when all is made."""
        return next(self._steps, None) is not None

    def install(self) -> None:
        """Put what was made in the place of the old index, which nobody writes any more."""
        install(self._made, self._directory)

    def _run(self) -> Iterator[bool]:
        source = self._source
        store, written = source.written()
        oldest = source.reader.journal().start()
        begin = Place(store, written or oldest, True, self._order)
        for _, sizes in self._pages():
            self.total_bytes += sum(sizes.values())
            yield True
        whole = True
        until_s = time.monotonic() + FILES_WAIT_S
        for position, sizes in self._pages():
            while (source.written()[1] or oldest) < position and time.monotonic() < until_s:
                time.sleep(GROUP_S)
            for lines, are_all in self._lines(sizes):
                whole &= are_all
                self.lines += self.writer.add(lines, begin)
                if self.writer.unsettled() > SETTLE_LINES:
                    self.writer.settle()
                yield True
        # Where a file is short of what was said, the journal may still have it.
        self.writer.add((), begin if whole else begin._replace(position=oldest))
        while source.feed(self.writer):
            yield True
        for _ in self.writer.finish():
            yield True

    def _pages(self) -> Iterator[tuple[Position, dict[str, int]]]:
        """Yield the committed sizes of all files, many at a time."""
        after = ""
        while True:
            position, sizes = self._source.reader.logs(after, PAGE_LOGS)
            yield position, sizes
            if len(sizes) < PAGE_LOGS:
                return
            after = max(sizes)

    def _lines(self, sizes: dict[str, int]) -> Iterator[tuple[list[Line], bool]]:
        """Yield the lines of files, and whether these are all there should be."""
        directory = log_directory(self._source.var)
        archive = Archive(archive_directory(self._source.var))
        lines: list[Line] = []
        whole = True
        for key, size in sizes.items():
            offset = 0
            for some in read_lines(directory, key, size, archive):
                for content in some:
                    lines.append((key, offset, content))
                    offset += len(content)
                if len(lines) >= TURN_LINES:
                    yield lines, whole
                    lines = []
            self.done_bytes += size
            whole &= offset == size
        yield lines, whole


class IndexFollower:
    """Keeps the index of one var, builds it again and verifies it, a piece at a turn.

    Whatever goes wrong, the next turn begins from what is on disk.
    """

    def __init__(self, var: Path, logger: Any) -> None:
        self._var = var
        self._log = logger
        self._run = run_directory(var)
        self._directory = index_directory(var)
        make_directory(self._directory)
        self._source = Source(var)
        self._orders = reader_of("index", var).reader
        self._describe = Describer(var)
        self._writer: IndexWriter | None = None
        self._rebuild: Rebuild | None = None
        self._verification: Verification | None = None
        self._verified: dict[str, Any] | None = read_index(self._run).get("verified")
        self._outdated: str | None = None  # why the index must be built again
        self._trouble: str | None = None  # what keeps it from its work
        self._told: dict[str, Any] = {}
        self._told_s = self._settled_s = self._until_s = 0.0
        self._retry_s = RETRY_S

    def turn(self) -> bool:
        """Do a piece of what there is to do; return whether there is more."""
        if time.monotonic() < self._until_s:
            return False
        try:
            busy = self._turn()
        except Exception as error:  # A defect here must not take the other processes with it.
            busy = self._meet(error)
        else:
            self._trouble, self._retry_s = None, RETRY_S
        self._tell()
        return busy

    def is_behind(self) -> bool:
        """Return whether there are entries that wait for their file."""
        place = self._writer.place if self._writer is not None else None
        with suppress(KsiError):
            return place is not None and self._source.reader.position()[1] > place.position
        return False

    def close(self) -> None:
        """Index what the files have, or some of it if that is much, sync and close."""
        try:
            if self._writer is not None:
                until_s = time.monotonic() + LAST_S
                while self._source.feed(self._writer) and time.monotonic() < until_s:
                    pass
                self._writer.close()
        except (KsiError, Outdated, OSError, sqlite3.Error) as error:
            self._log.warning("the index was not closed in order", error=str(error))
        self._writer = None
        self._let_go()

    def _turn(self) -> bool:
        if self._outdated is not None:
            if self._rebuild is None:
                self._begin(self._outdated)
        elif self._writer is None:
            self._open()
        busy = False
        if self._writer is not None:
            busy = self._source.feed(self._writer)
            self._settle(self._writer)
        if self._rebuild is None:
            return self._obey() or busy
        if not self._rebuild.turn():
            self._install(self._rebuild)
        return True

    def _open(self) -> None:
        self._source.written()  # Without a store there is nothing to index, or to build from.
        writer = IndexWriter(self._directory, self._describe)
        place = writer.place
        if place is None:
            reason = "there was none"
        elif not place.trusted:
            reason = "it was in use when the machine went down"
        elif not self._describe.made(IndexReader(self._directory)):
            reason = "the var directory was moved"
        else:
            self._writer = writer
            return
        writer.abandon()
        raise Outdated(reason)

    def _settle(self, writer: IndexWriter) -> None:
        now_s = time.monotonic()
        if now_s - self._settled_s < SETTLE_S and writer.unsettled() < SETTLE_LINES:
            return
        self._settled_s = now_s
        if trouble := writer.settle():
            raise Outdated(trouble)

    def _obey(self) -> bool:
        """Carry out what was ordered last; return whether there is more of it to do."""
        assert self._writer is not None
        assert self._writer.place is not None
        if self._ordered("rebuild") > self._writer.place.rebuilt:
            self._begin("it was ordered")
            return True
        number = self._ordered("verify")
        if self._verification is None:
            if number <= (self._verified or {}).get("number", 0):
                return False
            self._verification = Verification(self._var)
        if not self._verification.turn():
            report = self._verification.report()
            self._verified = {"number": number, "at": time.time(), **report}
            self._log.info("the index was verified", differences=report["differences"])
            self._verification = None
        return True

    def _ordered(self, kind: str) -> int:
        """Return the number of the latest order of a kind."""
        order = self._orders.read(lambda tables, _: tables["orders"].get(kind))
        return 0 if order is None else int(order.number)

    def _begin(self, reason: str) -> None:
        self._log.warning("building the index", reason=reason)
        self._verification = None
        order = self._ordered("rebuild")
        self._rebuild = Rebuild(self._source, self._describe, reason, order)

    def _install(self, rebuild: Rebuild) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        rebuild.install()
        self._rebuild = self._outdated = None
        seconds = round(time.monotonic() - rebuild.begun_s, 3)
        self._log.info("the index is built", lines=rebuild.lines, seconds=seconds)

    def _meet(self, error: Exception) -> bool:
        """Build the index again if it is at fault, otherwise try again a little later."""
        was_rebuilding = self._rebuild is not None
        self._let_go()
        is_at_fault = isinstance(error, Outdated | Corrupt) or (
            isinstance(error, sqlite3.Error) and is_damage(error)
        )
        if is_at_fault and not was_rebuilding:
            self._outdated = str(error)
            return True
        if not isinstance(error, NotRunning):  # That is how a new var begins.
            self._trouble = str(error)
            is_expected = isinstance(error, KsiError | Outdated | OSError | sqlite3.Error)
            self._log.error("indexing failed", error=str(error), exc_info=not is_expected)
        self._until_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        return False

    def _let_go(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
        if self._rebuild is not None:
            self._rebuild.writer.abandon()
        self._writer = self._rebuild = self._verification = None

    def _tell(self) -> None:
        """Write down, for `index:status`, what is going on."""
        work = self._rebuild or self._verification
        state = "following" if self._writer is not None else "waiting"
        if work is not None:
            state = "rebuilding" if work is self._rebuild else "verifying"
        told = {
            "state": state,
            "is_whole": self._writer is not None,
            "reason": self._rebuild.reason if self._rebuild else self._trouble,
            "done_bytes": work.done_bytes if work else 0,
            "total_bytes": work.total_bytes if work else 0,
            "verified": self._verified,
        }
        now_s = time.monotonic()
        is_late = now_s - self._told_s >= TELL_S
        if told != self._told and (is_late or state != self._told.get("state")):
            with suppress(OSError):  # There will be room for it another time.
                write_index(self._run, told)
            self._told, self._told_s = told, now_s


def run_index(var: str) -> None:
    """Run the owner of the index on `var`, and its follower beside it, until SIGTERM."""
    os.nice(10)  # Behind the owners clients wait for, and the files it follows.
    run_owner("index", var, _start)


def _start(var: Path, logger: Any) -> Callable[[], None]:
    """Start the follower; return what ends it."""
    stopping = threading.Event()
    woken = os.eventfd(0, os.EFD_CLOEXEC)
    thread = threading.Thread(target=_follow, args=(var, logger, stopping, woken), daemon=True)
    thread.start()

    def end() -> None:
        stopping.set()
        os.eventfd_write(woken, 1)
        thread.join(CLOSE_S)  # What it is doing may as well be done again after the next start.

    return end


def _follow(var: Path, logger: Any, stopping: threading.Event, woken: int) -> None:
    try:
        follower = wait_for_room(lambda: IndexFollower(var, logger), logger)
        context = zmq.Context()
        bell = listen(context, bell_endpoint(var, "sessions"))
        news = zmq.Poller()
        for each in (bell, woken):
            news.register(each, zmq.POLLIN)
        while not stopping.is_set():
            if follower.turn():
                continue
            wait_s = GROUP_S if follower.is_behind() else TICK_S
            if news.poll(int(wait_s * 1000)) and not stopping.is_set():
                while bell.poll(0):
                    bell.recv()
                time.sleep(GROUP_S)
        follower.close()
        context.destroy(linger=0)
    except BaseException:
        logger.exception("the follower of the index ended")
        os._exit(1)
