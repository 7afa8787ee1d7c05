"""Followers: read an owner's journal from their own cursor and write something derived from it.

The journal is read up to the position committed in the owner's view, so a follower never sees what
may still be undone. What it writes is idempotent and the cursor moves after it: one that was dead
misses nothing and repeats nothing. The owner's doorbell is only a hint to look.

`run_files` is the process `files`: the session files, one line an entry, and the small JSON files
people read. An entry's offset is fixed by its event, so writing it again changes nothing; what a
crash of the machine, or a person, left in a file beyond or short of what is committed is cut, or
written again from the journal.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from ksi.actors import log
from ksi.actors.memory import settle
from ksi.actors.process import step_back, wait_for_room
from ksi.actors.reading import (
    OwnerReader,
    archive_directory,
    cursor_path,
    log_directory,
    reader_of,
)
from ksi.actors.stat import StatWriter
from ksi.storage.archive import Archive
from ksi.storage.atomic import make_directory, write_atomically
from ksi.storage.errors import Corrupt
from ksi.storage.files import BLOCKED, Cursor, LogGap, LogWriter, log_name
from ksi.storage.journal import NO_ROOM, Position
from ksi.transport.errors import NotRunning, StorageFull
from ksi.transport.identity import bell_endpoint, run_directory
from ksi.transport.limits import TICK_S
from ksi.transport.mailbox import listen, raise_file_limit
from ksi.transport.message import Query

GROUP_S: Final = 0.02  # Lines that come within this time are written together.
# How often files and cursor are synced: what a crash of the machine makes us redo from the journal.
# By then the kernel has written most of it; sooner, owners would wait behind these syncs.
SYNC_S: Final = 30.0
CHECK_ROWS: Final = 500  # Session files checked between two looks at the journal.
TURN_BATCHES: Final = 512  # Journal batches taken in one turn: keeps the heartbeat going.


class LogFollower:
    """Writes the logs of one owner: for sessions, a file a session.

    Attributes:
        seq: the owner's last sequence number that is in the files; 0 while that is not known.
    """

    def __init__(
        self, owner: str, var: Path, logger: Any, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Begin where the cursor is. `alive` is called now and then in work that may take long."""
        self.reader: OwnerReader = reader_of(owner, var)
        self._writer = LogWriter(log_directory(var))
        self._logs = log_directory(var)
        self._archive = Archive(archive_directory(var))
        self._archive.sweep()
        self._cursor = Cursor(cursor_path(var, owner))
        self._alive = alive
        self._log = logger
        self.seq = 0
        self._synced_s = time.monotonic()
        self._unsynced = False
        self._checked: str | None = ""  # files up to this key are as committed; None: all are

    def turn(self, stop: Position | None = None) -> bool:
        """Write what has been committed, up to `stop`; return whether there was any.

        Raises:
            NotRunning: the owner has no store that can be read yet.
        """
        committed = self.reader.committed()
        if committed.store != self._cursor.store:
            self._cursor.begin(committed.store, self.reader.journal().start())
            self._checked = ""
        stop = committed.position if stop is None else stop
        position = self._cursor.written
        if position >= stop:
            if position == committed.position:
                self.seq = committed.seq
            return False
        seq = self.seq
        owner = self.reader.owner
        lines: dict[str, list[tuple[int, bytes]]] = {}
        archived: dict[str, int | None] = {}
        for batch in islice(self.reader.journal().read(position, stop), TURN_BATCHES):
            for event in self.reader.events_of(batch):
                for line in owner.lines(event):
                    lines.setdefault(line.key, []).append((line.offset, line.content))
                archived.update(owner.archives(event))
            position, seq = batch.end, batch.first_seq + batch.records - 1
            if archived:  # What is archived is closed: no line of it follows.
                break
        for key, parts in lines.items():
            self._write(key, parts)
        self._move(archived)
        self._cursor.advance(position)
        self.seq = seq
        self._unsynced = True
        self._sync_if_due()
        return True

    def idle(self) -> bool:
        """Sync and check while there is nothing to write; return whether there is more to do."""
        self._sync_if_due()
        if self._checked is not None:
            self._check_some(self._checked)
        return self._checked is not None

    def sync(self) -> None:
        """Put files, then the cursor, on disk."""
        self._writer.sync()
        self._cursor.sync()
        self._synced_s = time.monotonic()
        self._unsynced = False

    def close(self) -> None:
        """Write all there is, sync and close."""
        with suppress(NotRunning, StorageFull):
            while self.turn():
                pass
        self.sync()
        self._writer.close()
        self._cursor.close()

    def _sync_if_due(self) -> None:
        if self._unsynced and time.monotonic() - self._synced_s > SYNC_S:
            self.sync()

    def _check_some(self, after: str) -> None:
        """Compare the next files with what is committed, and mend those that differ."""
        committed, sizes = self.reader.logs(after, CHECK_ROWS)
        while self.turn(committed):
            pass
        short = {}
        for key, size in sizes.items():
            found_bytes = self._size(key)
            if found_bytes is None:
                continue
            if found_bytes > size:
                self._log.warning("cut a file", log=key, bytes=found_bytes, committed_bytes=size)
                self._writer.truncate(key, size)
            elif found_bytes < size and not self._is_archived(key, size):
                self._bring_back(key)
                self._writer.truncate(key, size)
                short[key] = size
        if short:
            self._write_again(short)
        self._checked = max(sizes) if len(sizes) == CHECK_ROWS else None

    def _write(self, key: str, parts: list[tuple[int, bytes]]) -> None:
        """Write the parts of one log, which follow each other."""
        offset = parts[0][0]
        content = parts[0][1] if len(parts) == 1 else b"".join(part for _, part in parts)
        if offset == 0 and self._is_archived(key, len(content)):  # It is written once more.
            return
        try:
            self._writer.write(key, offset, content)
        except LogGap:
            if self._is_archived(key, offset + len(content)):
                return
            self._bring_back(key)
            self._writer.truncate(key, offset)
            self._write_again({key: offset + len(content)})
        except OSError as error:
            self._skip(key, error)

    def _is_archived(self, key: str, size: int) -> bool:
        """Whether the first `size` bytes of a log are in the archive, and it is not here."""
        archived_bytes = self._archive.size(key) if self._size(key) == 0 else None
        return (archived_bytes or 0) >= size and self.reader.is_archived(key)

    def _move(self, archived: Mapping[str, int | None]) -> None:
        """Move logs into the archive, or back (None); what is there already stays there."""
        stored = [key for key, size in archived.items() if size and self._store(key, size)]
        if stored:
            self._archive.sync()
        for key in stored:
            self._writer.remove(key)
        for key, size in archived.items():
            if size is None:
                self._bring_back(key)

    def _store(self, key: str, size: int) -> bool:
        """Archive one log; return whether its file may be removed now."""
        if self._is_archived(key, size):
            return False
        try:
            self._archive.store(key, self._logs / log_name(key), size, self._alive)
        except (Corrupt, FileNotFoundError) as error:
            self._log.error("a log is not archived", log=key, error=str(error))
            return False
        except OSError as error:
            self._skip(key, error)
            return False
        return True

    def _bring_back(self, key: str) -> None:
        if self._archive.size(key) is None:
            return
        offset = 0
        try:
            for content in self._archive.chunks(key):
                self._writer.write(key, offset, content)
                offset += len(content)
                self._alive()
        except Corrupt as error:
            self._writer.truncate(key, 0)
            self._log.error("a log stays in the archive", log=key, error=str(error))
            return
        except OSError as error:
            self._skip(key, error)
            return
        self._writer.sync()
        self._archive.remove(key)

    def _size(self, key: str) -> int | None:
        """Return how long a log is; None where something else is in its place."""
        try:
            return self._writer.size(key)
        except OSError as error:
            self._skip(key, error)
            return None

    def _skip(self, key: str, error: OSError) -> None:
        """Go on without a file whose place is taken: its lines are in the journal until then."""
        if error.errno not in BLOCKED:
            raise error
        self._log.error("something else is in the place of a file", log=key, error=str(error))

    def _write_again(self, sizes: dict[str, int]) -> None:
        """Write logs again up to these sizes, from what the journal still holds of them."""
        self._log.warning("files are short; writing them again", logs=len(sizes))
        _store, committed = self.reader.position()
        missing = set(sizes)
        journal = self.reader.journal()
        for batch in journal.read(journal.start(), committed):
            for key, offset, content in self.reader.lines_of(batch):
                if key in sizes and offset < sizes[key] and offset <= self._writer.size(key):
                    self._writer.write(key, offset, content)
                    missing.discard(key)
        for key in missing:
            self._log.error("a file is short and the journal has dropped its lines", log=key)


class Page:
    """Keeps `var/state/<name>.json`, what a query answers, in a form people read."""

    def __init__(self, owner: str, var: Path, query: Query[Any], path: Path) -> None:
        self.reader: OwnerReader = reader_of(owner, var)
        self._query = query
        self._path = path
        self._seen: Any = None
        self._content = path.read_bytes() if path.exists() else b""

    def turn(self) -> bool:
        """Write the file if what it shows has changed; return whether there was news."""
        seen = self.reader.position()
        if seen == self._seen:
            return False
        shown = msgspec.json.encode(self.reader.answer(self._query))
        content = msgspec.json.format(shown, indent=2) + b"\n"
        if content != self._content:
            write_atomically(self._path, content)
            self._content = content
        self._seen = seen
        return True


def run_files(var: str) -> None:
    """Run the followers that write files until SIGTERM; then all that is committed is written."""
    root = Path(var)
    logger = log.configure(root, "files")
    stat = wait_for_room(lambda: StatWriter(run_directory(root) / "files.stat"), logger)
    step_back()  # Owners go first: clients wait for them, and for this one nobody does.
    raise_file_limit()
    stopping: list[int] = []
    woken = os.eventfd(0, os.EFD_CLOEXEC)

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        os.eventfd_write(woken, 1)  # A signal alone does not end the wait for a bell.

    signal.signal(signal.SIGTERM, stop)

    def alive() -> None:
        stat.begin_turn(time.monotonic())  # To compress a long log is not to hang.

    bells = zmq.Poller()
    bells.register(woken, zmq.POLLIN)
    context = zmq.Context()
    for owner in ("sessions", "registry"):
        bells.register(listen(context, bell_endpoint(root, owner)), zmq.POLLIN)
    logs = wait_for_room(lambda: LogFollower("sessions", root, logger, alive), logger)
    page = wait_for_room(lambda: _identities(root), logger)
    stat.state = "running"
    settle()
    while not stopping:
        stat.begin_turn(time.monotonic())
        busy = any([_try(logs.turn), _try(page.turn)])
        more = not busy and _try(logs.idle)
        stat.commits += busy
        stat.journal_seq = logs.seq
        stat.end_turn(time.monotonic())
        if not more and not busy:
            for bell, _event in bells.poll(int(TICK_S * 1000)):
                if bell != woken:
                    bell.recv(zmq.DONTWAIT)
                busy = True
        if busy and not stopping:
            time.sleep(GROUP_S)  # What comes meanwhile goes with it.
    stat.state = "draining"
    _try(page.turn)
    logs.close()
    stat.journal_seq = logs.seq
    stat.end_turn(time.monotonic())
    logger.info("closed")


def _try(step: Callable[[], bool]) -> bool:
    """Take a step that may find that it has to wait; then it has done nothing."""
    try:
        return step()
    except (NotRunning, StorageFull):  # Nothing to follow yet, or no room: again a little later.
        return False
    except OSError as error:
        if error.errno in NO_ROOM:
            return False
        raise


def _identities(var: Path) -> Page:
    from ksi.actors.declarations.registry import ListIdentities

    make_directory(var / "state")
    return Page("registry", var, ListIdentities(), var / "state" / "agent_identities.json")
