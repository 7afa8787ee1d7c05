"""The follower that writes the event log, in the process of the owner of its subscriptions.

It reads the journals of all owners, each from where it was, merges what is new by time, and adds
lines (`storage/eventlog.py`). The place moves after the lines, and journal segments are kept until
both are on disk; so whatever is killed, each event is there once. An owner whose journal cannot be
read now is waited for, and the others go on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from heapq import merge
from pathlib import Path
from typing import Any, Final, NamedTuple

from ksi.actors.delivery import Batch
from ksi.actors.followers.beside import run_with
from ksi.actors.followers.recorded import (
    Describer,
    LoggedEvent,
    Source,
    event_archive,
    event_directory,
    line_of,
)
from ksi.actors.owners import OWNERS, load
from ksi.actors.reading import OwnerReader, reader_of
from ksi.storage.errors import Corrupt
from ksi.storage.eventlog import EventWriter, Followed, days_in
from ksi.storage.journal import Batch as StoredBatch
from ksi.storage.journal import Position
from ksi.transport.errors import KsiError, NotFound, NotRunning
from ksi.transport.limits import TICK_S
from ksi.transport.moments import day_of

SAVE_S: Final = 0.5  # How often the place is noted: what a start after a kill reads back.
SYNC_S: Final = 30.0  # How often the log is synced; sooner, owners would wait behind it.
SWEEP_S: Final = 60.0  # How often days that are over their time are looked for.
TURN_BATCHES: Final = 256  # Journal batches of one owner taken in one turn ...
TURN_BYTES: Final = 1 << 20  # ... or about so much of its journal: it is all in memory.
LAST_S: Final = 0.3  # Spent on them: what is left is logged after the next start.
RETRY_S: Final = 0.5  # After trouble that may pass.
DAY_S: Final = 86_400.0


class _Taken(NamedTuple):
    """A batch that is to be logged."""

    now: float
    journal: Journal
    stored: StoredBatch
    batch: Batch[Any]


class Journal:
    """One owner's journal, as the log follows it."""

    def __init__(self, name: str, var: Path) -> None:
        owner = load(name)
        self.name = name
        self.describe = Describer(owner)
        self._reader: OwnerReader = reader_of(owner, var)

    def take(self, known: Followed | None) -> tuple[list[_Taken], Followed | None, bool]:
        """Return what is new, the place it begins at, and whether there is more.

        Raises:
            NotRunning: its owner has no store yet.
            Corrupt: it is damaged.
        """
        committed = self._reader.committed()
        journal = self._reader.journal()
        if known is None or known.store != committed.store:
            known = Followed(committed.store, *journal.start(), 0)
        if known.position >= committed.position:
            return [], known, False
        try:
            found = self._read(known.position, committed.position)
        except NotFound:  # Dropped, though we were not past it: what is missing is counted.
            found = self._read(journal.start(), committed.position)
        return found, known, bool(found) and found[-1].stored.end < committed.position

    def _read(self, start: Position, stop: Position) -> list[_Taken]:
        found: list[_Taken] = []
        room = TURN_BYTES
        for stored in self._reader.journal().read(start, stop):
            batch = self._reader.decoded(stored)
            found.append(_Taken(batch.now, self, stored, batch))
            room -= len(stored.payload)
            if room < 0 or len(found) == TURN_BATCHES:
                break
        return found


class _Orders(NamedTuple):
    """What was ordered: the day before which all is removed, and when days were asked back."""

    cleared: str
    restored: dict[str, float]


class EventFollower:
    """Writes the event log of one var, a piece at a turn.

    Whatever goes wrong, the next turn begins from what is on disk.
    """

    def __init__(self, var: Path, logger: Any, keep_days: int, archive_days: int) -> None:
        self._directory = event_directory(var)
        self._archive = event_archive(var)
        self._log = logger
        self._keep_days = keep_days
        self._archive_days = archive_days
        self._journals = [Journal(name, var) for name in OWNERS]
        self._orders = reader_of("events", var).reader
        self._writer: EventWriter | None = None
        self._saved_s = self._synced_s = time.monotonic()
        self._swept_s = self._until_s = 0.0
        self._swept: _Orders | None = None
        self._unsynced = self._unsaved = False
        self._trouble: set[str] = set()

    def turn(self) -> bool:
        """Log what is new, or as much of it as one turn takes; return whether there is more."""
        if time.monotonic() < self._until_s:
            return False
        try:
            if self._writer is None:
                self._writer = EventWriter(self._directory)
            more = self._turn(self._writer)
            self._save_if_due(self._writer)
            self._trouble.discard("")
        except (KsiError, OSError) as error:
            self.abandon()
            self._say("", error)
            self._until_s = time.monotonic() + RETRY_S
            return False
        return more

    def is_behind(self) -> bool:
        """Return False: what is in a journal can be logged at once."""
        return False

    @property
    def wait_s(self) -> float:
        """How long it may sleep where nobody rings."""
        return TICK_S

    def close(self) -> None:
        """Log what there is, or some of it if that is much, sync and close."""
        until_s = time.monotonic() + LAST_S
        while self.turn() and time.monotonic() < until_s:
            pass
        if self._writer is not None:
            try:
                self._writer.close()
            except (KsiError, OSError) as error:
                self._log.warning("the event log was not closed in order", error=str(error))
            self._writer = None

    def abandon(self) -> None:
        """Forget what is not written; it is logged again."""
        if self._writer is not None:
            self._writer.abandon()
        self._writer = None

    def _turn(self, writer: EventWriter) -> bool:
        taken: list[list[_Taken]] = []
        horizon = float("inf")  # Of an owner that is cut short, more may come behind this time.
        for journal in self._journals:
            try:
                found, known, is_cut = journal.take(writer.place.owners.get(journal.name))
            except NotRunning:
                continue
            except (KsiError, Corrupt) as error:
                self._say(journal.name, error)
                continue
            self._trouble.discard(journal.name)
            if known is not None:
                writer.place.owners[journal.name] = known
            taken.append(found)
            if is_cut:
                horizon = min(horizon, max(each.now for each in found))
        behind: set[Journal] = set()
        for each in merge(*taken, key=lambda each: each.now):
            if each.now > horizon:
                behind.add(each.journal)  # With all that follows, if the clock goes back.
            if each.journal not in behind:
                self._add(writer, each)
        if any(taken):
            writer.write()
            self._unsaved = self._unsynced = True
        return horizon < float("inf")

    def _add(self, writer: EventWriter, taken: _Taken) -> None:
        name, stored = taken.journal.name, taken.stored
        known = writer.place.owners[name]
        if known.seq and stored.first_seq > known.seq + 1:
            dropped = stored.first_seq - known.seq - 1
            writer.place.dropped += dropped
            self._log.error("records were gone before they were logged", owner=name, count=dropped)
        seen = writer.seen(name, known.store)
        for seq, index, logged in _described(taken, known.store):
            if (seq, index) > seen:
                day = day_of(logged.timestamp)
                logged.n = writer.place.n + 1

                def keep(content: bytes, day: str = day) -> dict[str, Any]:
                    return {"payload": day, "offset": writer.payload(day, content)}

                writer.add(day, line_of(logged, keep))
        last = stored.first_seq + stored.records - 1
        writer.advance(name, Followed(known.store, *stored.end, last))

    def _save_if_due(self, writer: EventWriter) -> None:
        now_s = time.monotonic()
        if self._unsynced and now_s - self._synced_s >= SYNC_S:
            writer.sync()
            self._unsynced = self._unsaved = False
            self._synced_s = self._saved_s = now_s
        elif self._unsaved and now_s - self._saved_s >= SAVE_S:
            writer.save()
            self._unsaved = False
            self._saved_s = now_s
        orders = self._ordered()
        if now_s - self._swept_s >= SWEEP_S or orders != self._swept:
            self._swept_s, self._swept = now_s, orders
            self._sweep(writer, orders)

    def _ordered(self) -> _Orders:
        """Return what was ordered of days."""
        with suppress(NotRunning):
            return self._orders.read(
                lambda tables, _: _Orders(
                    row.day if (row := tables["cleared"].get("before")) else "",
                    {day: each.at for day, each in tables["restored"].range()},
                )
            )
        return _Orders("", {})

    def _sweep(self, writer: EventWriter, orders: _Orders) -> None:
        """Archive the days that are over their time, remove those that are cleared, and have back
        those that are asked for: whole ones only."""
        oldest = self._days_ago(self._keep_days)
        archived_from = max(self._days_ago(self._archive_days), orders.cleared)
        for day in days_in(self._directory):
            if day < orders.cleared:
                self._log.info("a day of the event log is removed", day=day)
                writer.remove(day)
            elif day < oldest and day_of(orders.restored.get(day, 0.0)) < oldest:
                self._try(day, writer.archive)
        for day, at in orders.restored.items():
            if day_of(at) >= oldest:
                self._try(day, writer.bring_back)
        for day in days_in(self._archive):
            if day < archived_from:
                self._log.info("a day is removed from the archive of events", day=day)
                shutil.rmtree(self._archive / day, ignore_errors=True)

    def _days_ago(self, days: int) -> str:
        return day_of(max(0.0, time.time() - days * DAY_S))

    def _try(self, day: str, move: Callable[[str, Path], None]) -> None:
        """Move a day into the archive or out of it; one that cannot be moved stays."""
        try:
            move(day, self._archive)
            self._trouble.discard(day)
        except (Corrupt, OSError) as error:
            self._say(day, error, "a day of the event log stays where it is")

    def _say(self, what: str, error: Exception, trouble: str = "events are not logged") -> None:
        """Log trouble once, until it has passed."""
        if what not in self._trouble:
            self._trouble.add(what)
            self._log.error(trouble, of=what or "all", error=str(error))


def _described(taken: _Taken, store: str) -> Iterator[tuple[int, int, LoggedEvent]]:
    """Yield the events of a batch with the numbers of their records, and among those."""
    for seq, record in enumerate(taken.batch.records, taken.stored.first_seq):
        for index, event in enumerate(record.events):
            source = Source(taken.journal.name, store, seq, index, record.operation)
            logged = taken.journal.describe(event, record, source, taken.now)
            if logged is not None:
                yield seq, index, logged


def run_events(var: str, keep_days: str, archive_days: str) -> None:
    """Run the owner of event subscriptions on `var`, and the follower beside it, until SIGTERM."""

    def make(root: Path, logger: Any) -> list[EventFollower]:
        return [EventFollower(root, logger, int(keep_days), int(archive_days))]

    run_with("events", var, make, bells=OWNERS)
