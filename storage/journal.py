"""The journal: what was decided, in order, on disk before anybody is told.

A journal is a directory of segments `<first sequence number>.log`, each a row of records. One
record holds one batch. Only the last segment is written, only at its end, by one process.

Invariants:
- a batch is on disk when `append` returns: one write, one `fdatasync`, nothing else;
- zeros behind the last record are nothing: space that was written ahead (`storage/prewrite.py`);
- only the last record can be torn, since each was synced before the next was written; so a bad
  tail is cut, but a bad record with a valid one behind it is damage, which is reported and left;
- a record is valid only where it was written: its checksum covers its place, so neither a stale
  block nor bytes that a client made look like a record are taken for one;
- sequence numbers have no gaps, within a segment and from one to the next.

Record, big-endian: magic "KSJ1", payload bytes u32, crc32 u32, first sequence number u64,
sequence numbers in it u32, payload. The checksum covers segment u64, offset u64, first sequence
number, count and length, then the payload.

Source: the torn-tail rule is that of etcd's WAL repair and TigerBeetle's journal recovery.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader, FileIO
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, NoReturn
from zlib import crc32

from ksi.storage.atomic import sync_directory, write_all
from ksi.storage.errors import Corrupt, UnknownOutcome
from ksi.storage.prewrite import Prewriter
from ksi.transport.errors import NotFound, StorageFull, TooLarge
from ksi.transport.limits import PREWRITE_FROM_BYTES, RECORD_BYTES_MAX, SEGMENT_BYTES

log = logging.getLogger("ksi.storage")

MAGIC: Final = b"KSJ1"
HEADER: Final = struct.Struct(">4sIIQI")  # magic, payload bytes, crc32, first seq, count
_PLACE: Final = struct.Struct(">QQQII")  # segment, offset, first seq, count, payload bytes
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_BYTES: Final = 1 << 16  # At once: stays in the cache, and in memory that is there already.


class Position(NamedTuple):
    """A place between two records: the first sequence number of the segment, and an offset."""

    segment: int
    offset: int


class Batch(NamedTuple):
    """One record: `records` sequence numbers from `first_seq` on, and where it lies."""

    first_seq: int
    records: int
    payload: bytes
    start: Position
    end: Position


START: Final = Position(1, 0)


def segment_path(directory: Path, segment: int) -> Path:
    return directory / f"{segment:020d}.log"


def segments_in(directory: Path) -> list[int]:
    """Return the first sequence numbers of the segments in `directory`, in order."""
    return sorted(
        int(name[:-4])
        for name in os.listdir(directory)
        if len(name) == 24 and name.endswith(".log") and name[:-4].isdigit()
    )


def resume(directory: Path, seq: int, position: Position) -> Position | None:
    """Return where the journal goes on after number `seq`, which ended at `position`.

    That is there, or, where its segment ended with it and has been dropped, at the next one's
    beginning. None means that the journal does not go on from there.
    """
    try:
        with open(segment_path(directory, position.segment), "rb") as file:
            before = max(0, position.offset - HEADER.size)
            file.seek(before)
            last = file.read(position.offset - before)
            if len(last) == position.offset - before and (any(last) or not last):
                return position  # A record ends there, and not only the zeros ahead of it.
    except FileNotFoundError:
        if segment_path(directory, seq + 1).exists():
            return Position(seq + 1, 0)
    return None


def goes_on(directory: Path, position: Position) -> bool:
    """Return whether the journal has a whole record behind `position`, where one ends."""
    for segment in [each for each in segments_in(directory) if each >= position.segment]:
        offset = position.offset if segment == position.segment else 0
        with suppress(NotFound), _opened(segment_path(directory, segment)) as file:
            file.seek(offset)
            if _next(file, segment, offset) is not None:
                return True
    return False


def create_segment(directory: Path, segment: int) -> int:
    """Create an empty segment, durably, and return it open for writing."""
    path = segment_path(directory, segment)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fsync(fd)
        sync_directory(directory)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def drop_segments(directory: Path, seq: int) -> int:
    """Remove the segments that hold only numbers below `seq`; return how many.

    Never the last one, which is written.
    """
    gone = [each for each, after in pairwise(segments_in(directory)) if after <= seq]
    for segment in gone:
        segment_path(directory, segment).unlink()
    if gone:
        sync_directory(directory)
    return len(gone)


def bytes_after(directory: Path, position: Position) -> int:
    """Return about how much a journal holds behind `position`: what replay has to read."""
    total = 0
    for segment in segments_in(directory):
        if segment >= position.segment:
            with suppress(FileNotFoundError):  # dropped just now
                total += segment_path(directory, segment).stat().st_size
                total -= position.offset if segment == position.segment else 0
    return max(0, total)


class Journal:
    """The writer. One process at a time has it: the holder of the store's lock.

    Attributes:
        end: where the next record goes.
        syncs: how many appends have been synced, for `status`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        known: Position | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Open the journal in `directory`, starting one where there is none.

        Records up to `known` are not read again. A torn tail is cut.

        Raises:
            Corrupt: there is damage before a valid record; nothing was changed.
        """
        self._directory = directory
        self._segment_bytes = segment_bytes
        self.syncs = 0
        self._last: Batch | None = None  # of those found beyond `known`, until `sync`
        self._ahead: Prewriter | None = None
        segments = segments_in(directory)
        if not segments:
            self._fd = create_segment(directory, START.segment)
            self.end = START
            self._prewrite_from = PREWRITE_FROM_BYTES
            return
        last = segments[-1]
        path = segment_path(directory, last)
        offset = known.offset if known is not None and known.segment == last else 0
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.end = Position(last, self._cut_torn_tail(path, last, offset))
        except BaseException:
            os.close(self._fd)
            raise
        self._prewrite_from = self.end.offset + PREWRITE_FROM_BYTES

    def prepare(self, first_seq: int, payload_bytes: int) -> Position:
        """Return where a record of this size would end; starts a new segment when one is due.

        Raises:
            TooLarge: the payload is over `RECORD_BYTES_MAX`.
            StorageFull: there is no room for a new segment; nothing was changed.
            UnknownOutcome: a new segment could not be made for another reason.
        """
        if payload_bytes > RECORD_BYTES_MAX:
            raise TooLarge(
                f"a journal record of {payload_bytes} bytes is over the limit of "
                f"{RECORD_BYTES_MAX}",
                size_bytes=payload_bytes,
                limit_bytes=RECORD_BYTES_MAX,
            )
        if self.end.offset >= self._segment_bytes:
            self._rotate(first_seq)
        return Position(self.end.segment, self.end.offset + HEADER.size + payload_bytes)

    def append(self, first_seq: int, payload: bytes, records: int = 1) -> Position:
        """Write one record and sync it; return its end.

        Raises:
            StorageFull: there was no room; the journal is as it was and goes on.
            UnknownOutcome: write or sync failed otherwise; this journal takes nothing more.
        """
        end = self.prepare(first_seq, len(payload))
        offset = self.end.offset
        header = _header(self.end, first_seq, records, payload)
        if end.offset > self._prewrite_from:
            self._claim(end.offset)
        try:
            if os.pwritev(self._fd, (header, payload), offset) != end.offset - offset:
                raise OSError(errno.ENOSPC, "short write")
            os.fdatasync(self._fd)
        except OSError as error:
            self._undo(error)
        self.end = end
        self.syncs += 1
        return end

    def read(self, start: Position, stop: Position | None = None) -> Iterator[Batch]:
        """Yield the batches from `start` up to `stop`, by default all there are.

        Raises:
            Corrupt: a record in between is damaged or a segment is missing.
            NotFound: the segment of `start` has been dropped.
        """
        return _read(self._directory, start, self.end if stop is None else stop)

    def segments(self) -> list[int]:
        """Return the first sequence numbers of the segments, in order."""
        return segments_in(self._directory)

    def drop_before(self, seq: int) -> int:
        """Remove the segments that hold only numbers below `seq`; return how many."""
        return drop_segments(self._directory, seq)

    def sync(self) -> None:
        """Sync what is written, for a tail that a killed process may not have synced.

        Its last record is written again first: when a sync has failed, the kernel takes for clean
        what never reached the disk, and the next sync says that all is well.

        Raises:
            UnknownOutcome: the sync failed.
        """
        last, self._last = self._last, None
        try:
            if last is not None:
                header = _header(last.start, last.first_seq, last.records, last.payload)
                write_all(self._fd, header + last.payload, last.start.offset)
            os.fdatasync(self._fd)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Let go of the file. Nothing is pending: `append` has synced it."""
        if self._fd >= 0:
            if self._end_prewriting():
                with suppress(OSError):  # Left there, the zeros are nothing.
                    os.ftruncate(self._fd, self.end.offset)
            os.close(self._fd)
            self._fd = -1

    def _claim(self, end: int) -> None:
        """Keep zeros ahead of the end from now on; none come below `end`."""
        if self._ahead is None:
            path = segment_path(self._directory, self.end.segment)
            try:
                self._ahead = Prewriter(path, end, self._segment_bytes)
            except (OSError, RuntimeError) as error:  # No descriptor or no thread: it goes without.
                log.warning("no zeros are written ahead of the journal: %s", error)
                self._prewrite_from = end + PREWRITE_FROM_BYTES
                return
        self._ahead.claim(end)

    def _end_prewriting(self) -> bool:
        """Write no more zeros; return whether there may be some."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()
        return ahead is not None

    def _rotate(self, first_seq: int) -> None:
        try:
            fd = create_segment(self._directory, first_seq)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise _full(error) from error
            self._fail(error)
        self.close()
        self._fd = fd
        self.end = Position(first_seq, 0)
        self._prewrite_from = PREWRITE_FROM_BYTES

    def _undo(self, error: OSError) -> NoReturn:
        """Take back a record for which there was no room; anything else is unknown."""
        if error.errno not in NO_ROOM:
            self._fail(error)
        self._end_prewriting()
        self._prewrite_from = self.end.offset + PREWRITE_FROM_BYTES
        try:
            os.ftruncate(self._fd, self.end.offset)
            os.fdatasync(self._fd)
        except OSError as second:
            self._fail(second)
        raise _full(error) from error

    def _fail(self, error: OSError) -> NoReturn:
        self._end_prewriting()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1  # Every later append fails too.
        raise UnknownOutcome(f"journal {self._directory}: {error}") from error

    def _cut_torn_tail(self, path: Path, segment: int, offset: int) -> int:
        """Return the end of the last valid record, having cut what follows it."""
        with BufferedReader(FileIO(path), _READ_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            while (batch := _next(file, segment, offset)) is not None:
                offset, self._last = batch.end.offset, batch
            if offset > size:
                raise Corrupt(
                    f"journal {path}: {size} bytes long, but was known to reach {offset}",
                    hint="nothing was changed: restore a checkpoint (ksi restore)",
                    file=str(path),
                    offset=size,
                )
            if _is_nothing(file, offset):
                return offset
            file.seek(offset)
            survivor = _find_valid(file.read(), segment, offset)
        if survivor is not None:
            raise Corrupt(
                f"journal {path}: damaged at byte {offset}, but byte {survivor} holds a valid "
                "record",
                hint="nothing was changed: restore a checkpoint (ksi restore)",
                file=str(path),
                offset=offset,
            )
        log.warning("journal %s: cut a torn record of %d bytes", path, size - offset)
        os.ftruncate(self._fd, offset)
        os.fsync(self._fd)
        return offset


class JournalReader:
    """Reads a journal that another process writes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, start: Position, stop: Position) -> Iterator[Batch]:
        """Yield the batches from `start` up to `stop`, which must be a committed position.

        Raises:
            Corrupt: a record in between is damaged or a segment is missing.
            NotFound: the segment of `start` has been dropped.
        """
        return _read(self._directory, start, stop)

    def start(self) -> Position:
        """Return where the oldest segment that is still there begins."""
        return Position(next(iter(segments_in(self._directory)), START.segment), 0)


def _read(directory: Path, start: Position, stop: Position) -> Iterator[Batch]:
    segment, offset = start
    expected = None  # the sequence number the next record must begin with
    while (segment, offset) < stop:
        path = segment_path(directory, segment)
        with _opened(path) as file:
            file.seek(offset)
            while (segment, offset) < stop:
                batch = _next(file, segment, offset)
                if batch is None:
                    break
                if expected is not None and batch.first_seq != expected:
                    raise _gap(path, offset, expected, batch.first_seq)
                yield batch
                offset = batch.end.offset
                expected = batch.first_seq + batch.records
            if segment == stop.segment or not _is_nothing(file, offset):
                if (segment, offset) != stop:
                    raise Corrupt(
                        f"journal {path}: no valid record at byte {offset}, expected up to {stop}",
                        hint="restore a checkpoint (ksi restore)",
                        file=str(path),
                        offset=offset,
                    )
                return
        following = [each for each in segments_in(directory) if each > segment]
        if not following or (expected is not None and following[0] != expected):
            raise _gap(path, offset, expected, next(iter(following), None))
        segment, offset = following[0], 0


def _opened(path: Path) -> BufferedReader[FileIO]:
    try:
        return BufferedReader(FileIO(path), _READ_BYTES)
    except FileNotFoundError:
        hint = "start from a snapshot"
        raise NotFound(f"journal {path} has been dropped", hint=hint) from None


def _next(file: BufferedReader[FileIO], segment: int, offset: int) -> Batch | None:
    """Return the record at the present place of `file`, None where there is no valid one."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    magic, payload_bytes, checksum, first_seq, records = HEADER.unpack(header)
    if magic != MAGIC or payload_bytes > RECORD_BYTES_MAX:
        return None
    payload = file.read(payload_bytes)
    if len(payload) < payload_bytes:
        return None
    if checksum != _checksum(segment, offset, first_seq, records, payload):
        return None
    end = Position(segment, offset + HEADER.size + payload_bytes)
    return Batch(first_seq, records, payload, Position(segment, offset), end)


def _header(place: Position, first_seq: int, records: int, payload: bytes) -> bytes:
    checksum = _checksum(*place, first_seq, records, payload)
    return HEADER.pack(MAGIC, len(payload), checksum, first_seq, records)


def _checksum(segment: int, offset: int, first_seq: int, records: int, payload: bytes) -> int:
    return crc32(payload, crc32(_PLACE.pack(segment, offset, first_seq, records, len(payload))))


def _find_valid(tail: bytes, segment: int, offset: int) -> int | None:
    """Return the offset of a valid record anywhere in `tail`, which begins at `offset`."""
    at = tail.find(MAGIC, 1)
    while at >= 0:
        if at + HEADER.size <= len(tail):
            _, payload_bytes, checksum, first_seq, records = HEADER.unpack_from(tail, at)
            payload = tail[at + HEADER.size : at + HEADER.size + payload_bytes]
            if len(payload) == payload_bytes <= RECORD_BYTES_MAX and checksum == _checksum(
                segment, offset + at, first_seq, records, payload
            ):
                return offset + at
        at = tail.find(MAGIC, at + 1)
    return None


def _is_nothing(file: BufferedReader[FileIO], offset: int) -> bool:
    """Whether only zeros follow. Without a copy in between: recovery waits for this."""
    block, zeros = bytearray(_READ_BYTES), bytes(_READ_BYTES)
    while (count := os.preadv(file.fileno(), [block], offset)) == _READ_BYTES:
        if block != zeros:
            return False
        offset += count
    return block[:count] == zeros[:count]


def _gap(path: Path, offset: int, expected: int | None, found: int | None) -> Corrupt:
    return Corrupt(
        f"journal {path}: after byte {offset} number {expected} should follow, found {found}",
        hint="a segment is missing: put it back, or restore a checkpoint (ksi restore)",
        file=str(path),
        offset=offset,
    )


def _full(error: OSError) -> StorageFull:
    return StorageFull(
        f"there is no room for the journal: {os.strerror(error.errno or errno.ENOSPC)}",
        hint="free disk space; nothing was changed",
    )
