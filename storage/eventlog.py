"""The event log: what has happened in all owners, in plain lines, a directory a day (UTC).

    var/logs/events/<date>/events.jsonl      a line an event, in the order in which they were logged
    var/logs/events/<date>/payloads.jsonl    values too large for that, each a line, by reference
    var/logs/events/place.json               how far the writer has come; `synced.json`: on disk
    var/archive/events/<date>/               the files of a day that is over its time, compressed

Written by one follower; read by anybody, whose tool may be `jq`.

Invariants:
- events are numbered, and their numbers grow throughout; the day of an event is that of its time;
- a line is added whole behind others, a payload before the line that refers to it;
- each line says which event of which record of whose journal it is. The place is never ahead of the
  lines, and what is beyond it is read back from them: a writer that was killed repeats nothing;
- after a crash of the machine the log is cut back to what was synced and written on from there; as
  lines may have been read that come again, numbers go on beyond all that were given.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import lru_cache
from heapq import merge
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from ksi.storage.archive import Archive
from ksi.storage.atomic import make_directory, sync_directory, write_atomically
from ksi.storage.boot import this_boot
from ksi.storage.errors import Corrupt
from ksi.storage.files import LogGap, LogWriter, log_size
from ksi.storage.journal import Position
from ksi.transport.limits import EVENT_SCAN_BYTES_MAX, EVENTS_UNSYNCED_MAX
from ksi.transport.moments import DAY

EVENTS: Final = "events"  # the keys of the two files of a day
PAYLOADS: Final = "payloads"
PLACE: Final = "place.json"
SYNCED: Final = "synced.json"
BLOCK_BYTES: Final = 1 << 20  # Read at once: thousands of lines.
_PIECE_BYTES: Final = 1 << 16  # Read at once to find the last line.
_LINE_BYTES: Final = 4096  # Read at once to find the end of a line: most are shorter.
_NUMBER: Final = b'{"n":'  # How each line begins.
_TIME: Final = re.compile(rb',"timestamp":(\d+(?:\.\d+)?)')


class Followed(msgspec.Struct):
    """How far an owner's journal is logged: up to a place, and its last number before that."""

    store: str
    segment: int
    offset: int
    seq: int

    @property
    def position(self) -> Position:
        """The place."""
        return Position(self.segment, self.offset)


class Day(msgspec.Struct):
    """How much is logged of a day."""

    events: int = 0
    events_bytes: int = 0
    payloads_bytes: int = 0


class Place(msgspec.Struct):
    """How far the writer has come.

    Attributes:
        n: number of the last event.
        logged: how many there have been, those included whose days were removed.
        dropped: records that were gone from their journal before they were logged.
        seen: of owners, the record and event up to which lines were found that it was not past:
            what has to be passed over where it is met again.
        boot_id: run of the machine it was written in; `clean`: and synced in.
    """

    n: int = 0
    logged: int = 0
    dropped: int = 0
    owners: dict[str, Followed] = {}
    days: dict[str, Day] = {}
    seen: dict[str, tuple[str, int, int]] = {}  # by owner: store, seq, index
    boot_id: str = ""
    clean: bool = False


class Origin(msgspec.Struct):
    """Which event it is: the one at `index` among those of a record of an owner's journal."""

    owner: str
    store: str
    seq: int
    index: int


class _Numbered(msgspec.Struct):
    n: int
    metadata: Origin


_decode_place: Final = msgspec.json.Decoder(Place).decode
_decode_numbered: Final = msgspec.json.Decoder(_Numbered).decode


class EventWriter:
    """Writes the log; one thread of one process does.

    After an error it is to be abandoned and another to be opened.

    Attributes:
        place: how far it has come; `advance` moves it in the journals.
    """

    def __init__(self, directory: Path, *, boot_id: str | None = None) -> None:
        """Open the log: what a kill left is completed, what a crash left is cut.

        Raises:
            OSError: the disk does not do what is to be done.
        """
        self._directory = directory
        self._boot_id = boot_id or this_boot()
        self._writers: dict[str, LogWriter] = {}
        self._unwritten: list[tuple[str, str, bytes]] = []  # day, key, content
        self._unsynced: set[str] = set()
        make_directory(directory)
        self.place, is_trusted = _read_places(directory, self._boot_id)
        for day in days_in(directory):
            if is_trusted:
                self._read_back(day)
            else:
                self._cut_back(day)
        for day in self.place.days.keys() - set(days_in(directory)):
            del self.place.days[day]  # Somebody has removed it.
        if not is_trusted:
            self.place.n += EVENTS_UNSYNCED_MAX
        self._synced_n = self.place.n

    def seen(self, owner: str, store: str) -> tuple[int, int]:
        """Return record and event up to which those of an owner, from here on, are logged."""
        known, seq, index = self.place.seen.get(owner, (store, 0, 0))
        return (seq, index) if known == store else (0, 0)

    def advance(self, owner: str, place: Followed) -> None:
        """All up to here in an owner's journal is logged, or added."""
        self.place.owners[owner] = place
        if owner in self.place.seen and self.place.seen[owner][1] <= place.seq:
            del self.place.seen[owner]

    def payload(self, day: str, content: bytes) -> int:
        """Add a payload to what is to be written, and return its place in the file of its day."""
        known = self.place.days.setdefault(day, Day())
        offset = known.payloads_bytes
        self._unwritten.append((day, PAYLOADS, content + b"\n"))
        known.payloads_bytes += len(content) + 1
        return offset

    def add(self, day: str, line: bytes) -> None:
        """Add the line of event `place.n + 1`, with its end, to what is to be written."""
        known = self.place.days.setdefault(day, Day())
        self._unwritten.append((day, EVENTS, line))
        known.events_bytes += len(line)
        known.events += 1
        self.place.n += 1
        self.place.logged += 1

    def write(self) -> None:
        """Write what was added, in its order. It is seen by readers then, and not on disk yet.

        Raises:
            StorageFull, OSError: some of it is not written.
        """
        offsets: dict[tuple[str, str], int] = {}
        for day, key, content in reversed(self._unwritten):
            known = self.place.days[day]
            size = known.events_bytes if key == EVENTS else known.payloads_bytes
            offsets[day, key] = offsets.get((day, key), size) - len(content)
        for day, key, content in _runs(self._unwritten):
            self._write(day, key, offsets[day, key], content)
            offsets[day, key] += len(content)
        self._unwritten.clear()
        if self.place.n - self._synced_n > EVENTS_UNSYNCED_MAX // 2:
            self.sync()

    def save(self) -> None:
        """Note how far it has come, not synced: what a kill leaves is read back from there."""
        self.place.boot_id, self.place.clean = self._boot_id, False
        path = self._directory / PLACE
        fresh = path.with_name(f".{PLACE}.new")
        fresh.write_bytes(_shown(self.place))
        fresh.replace(path)

    def sync(self, *, clean: bool = False) -> None:
        """Put all that is written, then the place, on disk."""
        for day in self._unsynced:
            self._writers[day].sync()
        self._unsynced.clear()
        sync_directory(self._directory)
        self.place.boot_id, self.place.clean = self._boot_id, clean
        write_atomically(self._directory / SYNCED, _shown(self.place))
        self._synced_n = self.place.n
        if clean:
            write_atomically(self._directory / PLACE, _shown(self.place))
        else:
            self.save()

    def remove(self, day: str) -> None:
        """Remove a whole day."""
        self.place.days.pop(day, None)
        self._close_day(day)
        self.save()
        shutil.rmtree(self._directory / day, ignore_errors=True)

    def archive(self, day: str, directory: Path) -> None:
        """Compress a whole day into `directory`, read back and durable, and then remove it.

        Raises:
            Corrupt: something else is there of that day, or it does not read back as it was.
            OSError: it stays where it is.
        """
        archive = Archive(directory / day)
        archive.sweep()
        for key in (EVENTS, PAYLOADS):
            path = self._directory / day / f"{key}.jsonl"
            size = log_size(path.parent, key)
            if size and archive.size(key) is None:
                archive.store(key, path, size, lambda: None)
            elif size and not _begins(archive.chunks(key), path):
                raise Corrupt(f"{archive.path(key)} is not what the log has of that day")
        make_directory(directory / day)
        archive.sync()
        self.remove(day)

    def bring_back(self, day: str, directory: Path) -> None:
        """Have a day back that is in the archive in `directory`, unless there is one in the log.

        Raises:
            Corrupt: its archive is damaged; it stays there.
            OSError: it stays there.
        """
        archive, fresh = Archive(directory / day), self._directory / f".{day}"
        if archive.size(EVENTS) is None or (self._directory / day).exists():
            return
        shutil.rmtree(fresh, ignore_errors=True)
        writer, known = LogWriter(fresh), Day()
        with closing(writer):
            for content in archive.chunks(EVENTS):
                writer.write(EVENTS, known.events_bytes, content)
                known.events_bytes += len(content)
                known.events += content.count(b"\n")
            for content in archive.chunks(PAYLOADS) if archive.size(PAYLOADS) else ():
                writer.write(PAYLOADS, known.payloads_bytes, content)
                known.payloads_bytes += len(content)
            writer.sync()
        self.place.days[day] = known
        self.save()
        fresh.rename(self._directory / day)
        self.sync()  # Before a crash could cut it back to a place that does not know it.
        shutil.rmtree(directory / day, ignore_errors=True)

    def close(self) -> None:
        """Write, sync and close."""
        self.write()
        self.sync(clean=True)
        self.abandon()

    def abandon(self) -> None:
        """Close without a word; what is written stays."""
        for day in list(self._writers):
            self._close_day(day)

    def _close_day(self, day: str) -> None:
        self._unsynced.discard(day)
        writer = self._writers.pop(day, None)
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def _write(self, day: str, key: str, offset: int, content: bytes) -> None:
        if day not in self._writers:
            for other in [each for each in self._writers if each not in self._unsynced]:
                self._close_day(other)
            self._writers[day] = LogWriter(self._directory / day)
        self._unsynced.add(day)
        try:
            self._writers[day].write(key, offset, content)
        except LogGap as gap:  # Somebody has cut the file; what is left of it is read back.
            raise OSError(f"{day}/{key}.jsonl was changed by somebody else") from gap

    def _read_back(self, day: str) -> None:
        """Take in what is in the files of a day beyond the place; a torn line is cut."""
        directory = self._directory / day
        known = self.place.days.setdefault(day, Day())
        found_bytes = whole_bytes(directory, EVENTS)
        if found_bytes < known.events_bytes:  # Somebody has cut it.
            known.events = sum(1 for _ in _lines(directory, 0, found_bytes))
        else:
            for line in _lines(directory, known.events_bytes, found_bytes):
                known.events += 1
                self.place.logged += 1
                self._note(line)
        known.events_bytes = found_bytes
        known.payloads_bytes = whole_bytes(directory, PAYLOADS)
        self._truncate(day, known)

    def _note(self, line: bytes) -> None:
        with suppress(msgspec.MsgspecError):  # No line of ours, and so of no event.
            found = _decode_numbered(line)
            self.place.n = max(self.place.n, found.n)
            origin = found.metadata
            last = max(self.seen(origin.owner, origin.store), (origin.seq, origin.index))
            self.place.seen[origin.owner] = (origin.store, *last)

    def _cut_back(self, day: str) -> None:
        """Cut the files of a day back to what was synced."""
        if day not in self.place.days:
            shutil.rmtree(self._directory / day, ignore_errors=True)
            return
        known = self.place.days[day]
        directory = self._directory / day
        if (whole := whole_bytes(directory, EVENTS, known.events_bytes)) < known.events_bytes:
            known.events_bytes = whole
            known.events = sum(1 for _ in _lines(directory, 0, whole))
        known.payloads_bytes = whole_bytes(directory, PAYLOADS, known.payloads_bytes)
        self._truncate(day, known)

    def _truncate(self, day: str, known: Day) -> None:
        for key, size in ((EVENTS, known.events_bytes), (PAYLOADS, known.payloads_bytes)):
            if (log_size(self._directory / day, key) or 0) > size:
                os.truncate(self._directory / day / f"{key}.jsonl", size)


def _begins(archived: Iterator[bytes], path: Path) -> bool:
    """Whether an archived log begins with all that is in a file."""
    with path.open("rb") as file:
        return all(content.startswith(file.read(len(content))) for content in archived) and (
            not file.read(1)
        )


def _runs(parts: Sequence[tuple[str, str, bytes]]) -> Iterator[tuple[str, str, bytes]]:
    """Join what goes to one file, payloads ahead of all lines; days stay in their order."""
    days: list[tuple[str, dict[str, list[bytes]]]] = []
    for day, key, content in parts:
        if not days or days[-1][0] != day:
            days.append((day, {PAYLOADS: [], EVENTS: []}))
        days[-1][1][key].append(content)
    for day, files in days:
        for key, contents in files.items():
            if contents:
                yield day, key, b"".join(contents)


def _shown(place: Place) -> bytes:
    return msgspec.json.format(msgspec.json.encode(place), indent=1) + b"\n"


def _read_places(directory: Path, boot_id: str) -> tuple[Place, bool]:
    """Return the place to go on from, and whether what is beyond it can be trusted."""
    latest, synced = read_place(directory), _read_place(directory / SYNCED)
    if latest is not None and (latest.clean or latest.boot_id == boot_id):
        return latest, True
    if synced is not None:
        return synced, synced.boot_id == boot_id
    return Place(), latest is None


def read_place(directory: Path) -> Place | None:
    """Return how far the writer has come, a little behind what it has written; None: nowhere."""
    return _read_place(directory / PLACE)


def read_synced(directory: Path) -> Place | None:
    """Return what is logged whatever happens to the machine; None: nothing."""
    return _read_place(directory / SYNCED)


def _read_place(path: Path) -> Place | None:
    try:
        return _decode_place(path.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None


def days_in(directory: Path) -> list[str]:
    """Return the days of the log, in order."""
    try:
        return sorted(name for name in os.listdir(directory) if DAY.fullmatch(name))
    except FileNotFoundError:
        return []


def whole_bytes(directory: Path, key: str, stop: int | None = None) -> int:
    """Return up to where a file has whole lines, of its first `stop` bytes; 0 without a file."""
    size = log_size(directory, key) or 0
    size = size if stop is None else min(size, stop)
    if not size:
        return 0
    with _opened(directory, key) as file:
        while size > 0:
            begin = max(0, size - _PIECE_BYTES)
            found = os.pread(file.fileno(), size - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            size = begin
    return 0


def read_payload(directory: Path, day: str, offset: int, size_bytes: int) -> bytes | None:
    """Return the bytes of a payload; None where they are not there any more."""
    if DAY.fullmatch(day) is None:
        return None
    try:
        with _opened(directory / day, PAYLOADS) as file:
            content = os.pread(file.fileno(), size_bytes, offset)
    except OSError:
        return None
    return content if len(content) == size_bytes else None


class Part(NamedTuple):
    """The whole lines of a file, and the numbers of the first and the last of them."""

    directory: Path
    inode: int
    size: int
    first: int
    last: int

    @property
    def file(self) -> tuple[Path, int, int]:
        """Which file it is, also where another one has taken its place."""
        return self.directory, self.inode, self.first


class Scan:
    """One look through the log, over what was there when it began.

    Attributes:
        parts: the files of it.
        last: number of the newest event, 0 where there is none.
        read_bytes: how much was looked through so far.
    """

    def __init__(self, directory: Path, days: Sequence[str]) -> None:
        self.read_bytes = 0
        # Sizes are looked at twice: what was written before the newest of the first look is there
        # in the second, whatever file it is in.
        places = [directory / day for day in days]
        self.last = max((each.last for each in map(_part, places) if each), default=0)
        self.parts = [each for each in map(_part, places) if each and each.first <= self.last]

    def lines(
        self,
        needles: Sequence[bytes],
        *,
        after: int | None,
        reverse: bool,
        days: Mapping[str, float] | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        """Yield events in the order of their numbers, or backwards, those beyond `after`.

        Only lines that hold all of `needles`, and of all days or some; of a day, events before
        the time that is given with it may be left out. In between, an empty line says how far it
        has come.
        """
        days = {part.directory.name: 0.0 for part in self.parts} if days is None else days
        parts = [part for part in self.parts if part.directory.name in days]
        parts.sort(key=lambda part: part.last if reverse else part.first, reverse=reverse)
        groups: list[list[Part]] = []
        reached = 0
        for part in parts:  # Days hardly ever overlap: only those that do are merged.
            meets = part.last >= reached if reverse else part.first <= reached
            if groups and meets:
                groups[-1].append(part)
            else:
                groups.append([part])
            reached = min(reached or part.first, part.first) if reverse else max(reached, part.last)
        for group in groups:
            sources = [
                self._part_lines(part, needles, after, reverse, days[part.directory.name])
                for part in group
            ]
            yield from (
                sources[0]
                if len(sources) == 1
                else merge(*sources, key=lambda found: found[0], reverse=reverse)
            )

    def _part_lines(
        self, part: Part, needles: Sequence[bytes], after: int | None, reverse: bool, since: float
    ) -> Iterator[tuple[int, bytes]]:
        try:
            file = _opened(part.directory, EVENTS)
        except FileNotFoundError:  # Its day was removed just now.
            return
        with file:
            fd = file.fileno()
            start, stop = 0, part.size
            if after is not None and reverse:
                stop = _offset_of(fd, part.size, after)
            elif after is not None:
                start = _offset_of(fd, part.size, after + 1)
            if since:
                start = max(start, _times_of(part.file).start(fd, part, since))
            blocks = _blocks_backwards if reverse else _blocks
            for block in blocks(fd, start, stop):
                self.read_bytes += len(block)
                lines = _picked(block, needles)
                for line in reversed(lines) if reverse else lines:
                    n = _number(line)
                    if 0 < n <= self.last:
                        yield n, line
                edge = block if reverse else block[block.rfind(b"\n", 0, -1) + 1 :]
                if 0 < (n := _number(edge)) <= self.last:
                    yield n, b""


class _Times:
    """How late the lines of a file are: up to where none is of a time or later.

    Events may be logged late, so lines are not in the order of their times: kept is the greatest
    time up to some places. A time within what an event holds may be taken for one: it costs no more
    than looking at lines in vain.
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []  # the greatest time up to an offset

    def start(self, fd: int, part: Part, since: float) -> int:
        """Return an offset before which all lines of a file are of times before `since`."""
        ends = self._ends if not self._ends or self._ends[-1][1] <= part.size else []
        greatest, end = ends[-1] if ends else (0.0, 0)
        fresh = []
        for block in _blocks(fd, end, min(part.size, end + EVENT_SCAN_BYTES_MAX)):
            if len(block) < _PIECE_BYTES // 2:
                break  # It grows: whatever is in it is looked at.
            end += len(block)
            greatest = max(greatest, max(map(float, _TIME.findall(block)), default=0.0))
            fresh.append((greatest, end))
        self._ends = ends = [*ends, *fresh]
        passed = bisect_left(ends, (since,))
        return ends[passed - 1][1] if passed else 0


@lru_cache(maxsize=64)
def _times_of(_file: tuple[Path, int, int]) -> _Times:
    """Return what is known of the times in a file; it only grows."""
    return _Times()


def _opened(directory: Path, key: str) -> io.FileIO:
    fd = os.open(directory / f"{key}.jsonl", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return io.FileIO(fd, "rb")


def _part(directory: Path) -> Part | None:
    try:
        found = os.stat(directory / f"{EVENTS}.jsonl", follow_symlinks=False)
        return _part_of(directory, found.st_ino, found.st_size, found.st_mtime_ns)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=256)
def _part_of(directory: Path, inode: int, _size: int, _mtime_ns: int) -> Part | None:
    """Return the part a file is as long as it is this file, of this size and time."""
    size = whole_bytes(directory, EVENTS)
    if not size:
        return None
    with _opened(directory, EVENTS) as file:
        fd = file.fileno()
        first = _number(os.pread(fd, 32, 0))
        last = next(
            (
                n
                for each in _blocks_backwards(fd, 0, size)
                for line in reversed(_picked(each, ()))
                if (n := _number(line))
            ),
            0,
        )
    return Part(directory, inode, size, first, last)


def _number(line: bytes) -> int:
    """Return the number of an event, 0 where a line is none of ours."""
    if not line.startswith(_NUMBER):
        return 0
    digits = line[len(_NUMBER) : line.find(b",", len(_NUMBER), 32)]
    return int(digits) if digits.isdigit() else 0


def _picked(block: bytes, needles: Sequence[bytes]) -> list[bytes]:
    """Return the lines of a block of whole lines that hold all needles."""
    if not needles:
        return block.split(b"\n")[:-1]
    found: list[bytes] = []
    first, others = needles[0], needles[1:]
    at = block.find(first)
    while at >= 0:
        end = block.index(b"\n", at)
        line = block[block.rfind(b"\n", 0, at) + 1 : end]
        if all(other in line for other in others):
            found.append(line)
        at = block.find(first, end)
    return found


def _lines(directory: Path, start: int, stop: int) -> Iterator[bytes]:
    if start >= stop:
        return
    with _opened(directory, EVENTS) as file:
        for block in _blocks(file.fileno(), start, stop):
            yield from _picked(block, ())


def _blocks(fd: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield [start, stop), which begins and ends with whole lines, in pieces that do so, too.

    Pieces grow: often the first are enough.
    """
    rest, block_bytes = b"", _PIECE_BYTES
    while start < stop:
        content = os.pread(fd, min(block_bytes, stop - start), start)
        block_bytes = min(2 * block_bytes, BLOCK_BYTES)
        if not content:
            return
        start += len(content)
        whole = content.rfind(b"\n") + 1
        if whole:
            yield rest + content[:whole]
            rest = content[whole:]
        else:
            rest += content


def _blocks_backwards(fd: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield the same from its end to its beginning."""
    rest, block_bytes = b"", _PIECE_BYTES
    while start < stop:
        begin = max(start, stop - block_bytes)
        block_bytes = min(2 * block_bytes, BLOCK_BYTES)
        content = os.pread(fd, stop - begin, begin) + rest
        stop = begin
        cut = 0 if begin == start else content.find(b"\n", 0, len(content) - 1) + 1
        if cut or begin == start:
            yield content[cut:]
            rest = content[:cut]
        else:
            rest = content


def _offset_of(fd: int, size: int, n: int) -> int:
    """Return where the first line with a number of at least `n` begins; `size`: there is none."""
    low, high = 0, size
    while high - low > _PIECE_BYTES:
        middle = (low + high) // 2
        begin = _line_behind(fd, middle, high)
        if begin >= high or _number(os.pread(fd, 32, begin)) >= n:
            high = middle
        else:
            low = begin
    while low < size:
        number = _number(os.pread(fd, 32, low))
        if number >= n:
            return low
        low = _line_behind(fd, low, size)
    return size


def _line_behind(fd: int, offset: int, stop: int) -> int:
    """Return where the first line behind `offset` begins, `stop` if that is beyond."""
    while offset < stop:
        content = os.pread(fd, min(_LINE_BYTES, stop - offset), offset)
        found = content.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(content) or stop
    return stop
