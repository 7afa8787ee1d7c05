"""The follower that writes the index, in the process of the index's owner.

It reads the journal of the sessions from its cursor, as far as the session files are written: so
where there is a row, its line is in the file.

How it is brought on and built again, from the session files and then the journal behind them, is
that of all caches: `actors/followers/caching.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from ksi.actors.followers.beside import GROUP_S, run_with
from ksi.actors.followers.caching import (
    SETTLE_LINES,
    CacheFollower,
    Outdated,
    Writer,
)
from ksi.actors.followers.indexed import (
    Describer,
    Verification,
    index_directory,
)
from ksi.actors.reading import archive_directory, cursor_path, log_directory, reader_of
from ksi.actors.supervision.reports import read_follower
from ksi.storage.archive import Archive
from ksi.storage.atomic import make_directory
from ksi.storage.boot import this_boot
from ksi.storage.files import read_cursor, read_lines
from ksi.storage.index import IndexGap, IndexReader, IndexWriter, Line, Place, install
from ksi.storage.journal import Position
from ksi.transport.errors import KsiError, NotFound

TURN_LINES: Final = 4096  # Taken in one turn, and in one transaction.
PAGE_LOGS: Final = 500  # Session files looked up at once.
FILES_WAIT_S: Final = 2.0  # How long building the index waits for files to be written, in all.
LAST_S: Final = 0.3  # Spent on last lines: more may come as long as it looks, and will be found.


class LineWriter(Writer, Protocol):
    """What writes a cache of what was said in sessions: the index, or that of conversations."""

    place: Place | None

    def add(self, lines: Iterable[Line], place: Place) -> int:
        """Put lines in and come to `place`, as `IndexWriter.add`."""

    def finish(self) -> Iterator[str]:
        """Make at the end what is better made then, a part at a step, and close it."""


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

    def feed(self, writer: LineWriter) -> bool:
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

    def is_ahead(self, writer: LineWriter | None) -> bool:
        """Return whether something was said that is not in the cache yet."""
        place = writer.place if writer is not None else None
        with suppress(KsiError):
            return place is not None and self.reader.position()[1] > place.position
        return False

    def finish(self, writer: LineWriter) -> None:
        """Bring the cache on at the end, as far as there is time."""
        until_s = time.monotonic() + LAST_S
        while self.feed(writer) and time.monotonic() < until_s:
            pass


class Rebuild:
    """Makes a new cache of all that was said beside the old, a piece at a turn.

    Attributes:
        reason: why.
        done_bytes, total_bytes: of the session files.
        lines: how many are in it.
    """

    def __init__(
        self,
        source: Source,
        writer: LineWriter,
        reason: str,
        order: int,
        put: Callable[[], None],
    ) -> None:
        """`put` puts what was made in the place of the old one."""
        self.reason = reason
        self.done_bytes = self.total_bytes = self.lines = 0
        self.begun_s = time.monotonic()
        self._source = source
        self._order = order
        self._put = put
        self._writer = writer
        self._steps = self._run()

    def turn(self) -> bool:
        """Do a piece; return False when all is made."""
        return next(self._steps, None) is not None

    def install(self) -> None:
        """Put what was made in the place of the old one, which nobody writes any more."""
        self._put()

    def abandon(self) -> None:
        """Give it up."""
        self._writer.abandon()

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
                time.sleep(GROUP_S)  # A poll with a deadline.
            for lines, are_all in self._lines(sizes):
                whole &= are_all
                self.lines += self._writer.add(lines, begin)
                if self._writer.unsettled() > SETTLE_LINES:
                    self._writer.settle()
                yield True
        # Where a file is short of what was said, the journal may still have it.
        self._writer.add((), begin if whole else begin._replace(position=oldest))
        while source.feed(self._writer):
            yield True
        yield from self._last()
        for _ in self._writer.finish():
            yield True

    def _last(self) -> Iterator[bool]:
        """Put in what else there is."""
        return iter(())

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


class IndexFollower(CacheFollower[IndexWriter]):
    """Keeps the index of one var, builds it again and verifies it."""

    name = what = "index"

    def __init__(self, var: Path, logger: Any) -> None:
        super().__init__("index", var, logger)
        self._directory = index_directory(var)
        make_directory(self._directory)
        self._source = Source(var)
        self._describe = Describer(var)
        self._verification: Verification | None = None
        self._verified: dict[str, Any] | None = read_follower(self._run, self.name).get("verified")

    def is_behind(self) -> bool:
        """Return whether there are entries that wait for their file."""
        return self._source.is_ahead(self._writer)

    def _finish(self, writer: IndexWriter) -> None:
        self._source.finish(writer)

    def _open(self) -> IndexWriter:
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
            return writer
        writer.abandon()
        raise Outdated(reason)

    def _feed(self, writer: IndexWriter) -> bool:
        return self._source.feed(writer)

    def _make(self, reason: str, order: int) -> Rebuild:
        self._verification = None
        made = self._directory / "rebuild"
        shutil.rmtree(made, ignore_errors=True)
        writer = IndexWriter(made, self._describe, bulk=True)
        return Rebuild(self._source, writer, reason, order, lambda: install(made, self._directory))

    def _rebuilt(self, writer: IndexWriter) -> int:
        return 0 if writer.place is None else writer.place.rebuilt

    def _obey(self) -> bool:
        if super()._obey():
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

    def _let_go(self) -> None:
        super()._let_go()
        self._verification = None

    def _work(self) -> tuple[str, Any]:
        if self._rebuild is None and self._verification is not None:
            return "verifying", self._verification
        return super()._work()

    def _more(self) -> dict[str, Any]:
        return {"verified": self._verified}


def run_index(var: str) -> None:
    """Run the owner of the index on `var`, and its follower beside it, until SIGTERM."""
    run_with("index", var, lambda root, logger: [IndexFollower(root, logger)])
