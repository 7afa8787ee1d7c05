"""Log files that people read, and the cursor of the follower that writes them.

A log file holds lines a follower takes from a journal, each at an offset that the journal fixes, so
writing is idempotent: whatever is written twice is the same bytes at the same place. Files are
synced now and then, not on every write: the journal has it all until the `synced` mark is past it.

Invariants:
- what lies before the `written` mark is in the files (of this boot of the machine);
- what lies before the `synced` mark is in the files whatever happens to the machine;
- a write never leaves a hole: that is refused with `LogGap`;
- a file that somebody else has changed in length, replaced or removed is taken as it is found: what
  is too long is cut, what is missing is a `LogGap`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from ksi.storage.archive import Archive
from ksi.storage.atomic import make_directory, sync_directory, write_all
from ksi.storage.boot import this_boot
from ksi.storage.errors import Corrupt
from ksi.storage.journal import NO_ROOM, START, Position
from ksi.transport.errors import Invalid, StorageFull
from ksi.transport.limits import FILE_SYNCS_MAX, ID_PATTERN, OPEN_FILES_MAX

_KEY: Final = re.compile(ID_PATTERN)
_OPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_BYTES: Final = 1 << 20  # The longest line, or thousands of the usual.
# There is something in the place of a log that is none: a symlink, a directory, another's file.
BLOCKED: Final = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM})


class LogGap(Exception):
    """A write would leave a hole: the file ends before the offset. Replay from an earlier place.

    Attributes:
        key: of the log; with `size`, where it ends, and `offset`, where the write was to begin.
    """

    def __init__(self, key: str, size: int, offset: int) -> None:
        super().__init__(f"log {key} has {size} bytes, the next line belongs at {offset}")
        self.key = key
        self.size = size
        self.offset = offset


class _File:
    __slots__ = ("fd", "size")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size


class LogWriter:
    """Writes the files `<key>.jsonl` of one directory; the only process that does.

    Keeps at most `open_files_max` of them open.
    """

    def __init__(self, directory: Path, *, open_files_max: int = OPEN_FILES_MAX) -> None:
        """Open the directory, making it where it is missing."""
        make_directory(directory)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._directory = os.open(directory, flags)
        self._open_files_max = open_files_max
        self._open: OrderedDict[str, _File] = OrderedDict()  # least recently used first
        self._unsynced: set[str] = set()  # none of them when there are too many
        self._many_unsynced = False
        self._entries_unsynced = False

    def write(self, key: str, offset: int, content: bytes) -> None:
        """Put `content` at `offset`. Repeating it changes nothing; it is not synced yet.

        Raises:
            LogGap: the file ends before `offset`; nothing was written.
            StorageFull: there is no room; part of it may have been written. Repeat it later.
            Invalid: `key` is no id.
            OSError: one of `BLOCKED`, or the disk fails.
        """
        file = self._opened(key, create=offset == 0)  # An empty one would hide what is archived.
        if file is None or offset > file.size:
            raise LogGap(key, 0 if file is None else file.size, offset)
        self._note_unsynced(key)
        try:
            write_all(file.fd, content, offset)
        except OSError as error:
            file.size = os.fstat(file.fd).st_size
            if error.errno in NO_ROOM:
                raise StorageFull(f"there is no room for log {key}: {error.strerror}") from error
            raise
        file.size = max(file.size, offset + len(content))

    def sync(self) -> None:
        """Make durable what was written since the last call.

        Raises:
            OSError: it may not be; go back to the last synced mark.
        """
        if self._many_unsynced:
            _sync_file_system(self._directory)
            self._many_unsynced = self._entries_unsynced = False
        for key in list(self._unsynced):
            file = self._opened(key, create=False)
            if file is not None:
                os.fdatasync(file.fd)
            self._unsynced.discard(key)
        if self._entries_unsynced:
            os.fsync(self._directory)
            self._entries_unsynced = False

    def size(self, key: str) -> int:
        """Return how long the log is, 0 where there is none."""
        file = self._opened(key, create=False)
        return 0 if file is None else file.size

    def truncate(self, key: str, size: int) -> None:
        """Cut what is behind `size`; a shorter log stays as it is."""
        file = self._opened(key, create=False)
        if file is not None and file.size > size:
            os.ftruncate(file.fd, size)
            file.size = size
            self._note_unsynced(key)

    def remove(self, key: str) -> None:
        """Remove a log; fine if it is not there."""
        left = self._open.pop(key, None)
        if left is not None:
            os.close(left.fd)
        self._unsynced.discard(key)
        with suppress(FileNotFoundError):
            os.unlink(log_name(key), dir_fd=self._directory)
            self._entries_unsynced = True

    def close(self) -> None:
        """Sync and close all files."""
        self.sync()
        while self._open:
            os.close(self._open.popitem()[1].fd)
        os.close(self._directory)

    def _note_unsynced(self, key: str) -> None:
        if not self._many_unsynced:
            self._unsynced.add(key)
            if len(self._unsynced) > FILE_SYNCS_MAX:
                self._unsynced.clear()
                self._many_unsynced = True

    def _opened(self, key: str, *, create: bool) -> _File | None:
        left = self._open.get(key)
        if left is not None:
            found = os.fstat(left.fd)
            if found.st_nlink and found.st_size == left.size:
                self._open.move_to_end(key)
                return left
            os.close(left.fd)
            del self._open[key]
        name = log_name(key)
        try:
            fd = os.open(name, _OPEN, dir_fd=self._directory)
        except FileNotFoundError:
            if not create:
                return None
            fd = os.open(name, _OPEN | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._directory)
            self._entries_unsynced = True
        while len(self._open) >= self._open_files_max:
            os.close(self._open.popitem(last=False)[1].fd)
        file = self._open[key] = _File(fd)
        if left is not None and file.size > left.size:
            os.ftruncate(fd, left.size)
            file.size = left.size
        return file


def _sync_file_system(fd: int) -> None:
    """Make durable all that was written to the file system of `fd`, in one go: syncfs(2)."""
    if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def log_name(key: str) -> str:
    """Return the name of the file of a log.

    Raises:
        Invalid: `key` is no id, so it must not become part of a path.
    """
    if _KEY.match(key) is None:
        raise Invalid(f"a log cannot have the key {key!r}"[:200])
    return f"{key}.jsonl"


def read_log(
    directory: Path, key: str, start: int, stop: int, archive: Archive | None = None
) -> bytes:
    """Return the bytes [start, stop) of a log as far as its file, or else `archive`, has them."""
    content = _read_file(directory, key, start, stop)
    if content is None and archive is not None:
        content = archive.read(key, start, stop)
        if content is None:  # Not there or there: between the two looks it may have come back.
            content = _read_file(directory, key, start, stop)
    return content or b""


def _read_file(directory: Path, key: str, start: int, stop: int) -> bytes | None:
    try:
        fd = os.open(directory / log_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in BLOCKED:
            return b""
        raise
    try:
        return os.pread(fd, stop - start, start)
    except IsADirectoryError:
        return b""
    finally:
        os.close(fd)


def log_size(directory: Path, key: str) -> int | None:
    """Return how long the file of a log is, 0 where there is none; None where it is no file."""
    try:
        status = os.lstat(directory / log_name(key))
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def read_lines(
    directory: Path, key: str, stop: int, archive: Archive | None = None
) -> Iterator[list[bytes]]:
    """Yield the whole lines among the first `stop` bytes of a log, many at a time.

    They come from its file or, where there is none, from `archive`, as far as that is whole.
    """
    offset, rest = 0, b""
    for content in _pieces(directory, key, archive):
        taken = content[: stop - offset]
        offset += len(taken)
        *lines, rest = (rest + taken).split(b"\n")
        yield [line + b"\n" for line in lines]
        if offset >= stop:
            return


def _pieces(directory: Path, key: str, archive: Archive | None) -> Iterator[bytes]:
    try:
        fd = os.open(directory / log_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if archive is not None:
            with suppress(FileNotFoundError, Corrupt):
                yield from archive.chunks(key)
        return
    except OSError as error:
        if error.errno in BLOCKED:
            return
        raise
    try:
        offset = 0
        while content := os.pread(fd, _READ_BYTES, offset):
            offset += len(content)
            yield content
    except IsADirectoryError:
        return
    finally:
        os.close(fd)


class Mark(NamedTuple):
    """How far a follower has come: in the journal of which store, and to where."""

    store: str
    position: Position


class Marks(NamedTuple):
    """The two marks in a cursor file; None where there is none that can be believed."""

    written: Mark | None
    synced: Mark | None


class Cursor:
    """The durable place of a follower in a journal, in a file of two slots.

    Attributes:
        store: id of the store whose journal it is in; empty before the first `begin`.
        written: what lies before is in the files. Kept without a sync, and so believed only in the
            boot of the machine it was written in: after another it begins again at `synced`.
        synced: what lies before is in the files whatever happens to the machine. Journal segments
            before it are not needed by this follower.
    """

    def __init__(self, path: Path, *, boot_id: str | None = None) -> None:
        """Open the file, making it where it is missing. None as `boot_id` asks the kernel."""
        self._boot_id = boot_id or this_boot()
        make_directory(path.parent)
        created = not path.exists()
        self._fd = os.open(path, _OPEN | os.O_CREAT, 0o600)
        if created:
            sync_directory(path.parent)
        marks = _unpack(os.pread(self._fd, _CURSOR_BYTES, 0), self._boot_id)
        self.store, self.synced = marks.synced or Mark("", START)
        self.written = self.synced
        if marks.written is not None and marks.written.store == self.store:
            self.written = marks.written.position

    def begin(self, store: str, position: Position) -> None:
        """Follow the journal of another store, from `position` on. Durable on return."""
        self.store = store
        self.advance(position)
        self.sync()

    def advance(self, position: Position) -> None:
        """All before `position` is in the files now."""
        os.pwrite(self._fd, _pack(Mark(self.store, position), self._boot_id), _WRITTEN)
        self.written = position

    def sync(self) -> None:
        """The files have been synced after the last `advance`. Durable on return."""
        os.pwrite(self._fd, _pack(Mark(self.store, self.written), self._boot_id), _SYNCED)
        os.fdatasync(self._fd)
        self.synced = self.written

    def close(self) -> None:
        """Close the file; what was not synced may be lost with the machine."""
        os.close(self._fd)


def read_cursor(path: Path, boot_id: str) -> Marks:
    """Return the marks in a cursor file of another process; both None where there is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return Marks(None, None)
    try:
        return _unpack(os.pread(fd, _CURSOR_BYTES, 0), boot_id)
    finally:
        os.close(fd)


# A slot: crc32 of the rest, segment, offset, store id and boot id.
_SLOT: Final = struct.Struct(">IQQ64s64s")
_SECTOR_BYTES: Final = 512  # Written whole or not at all: what LMDB relies on, too.
_WRITTEN: Final = 0
_SYNCED: Final = _SECTOR_BYTES
_CURSOR_BYTES: Final = 2 * _SECTOR_BYTES


def _pack(mark: Mark, boot_id: str) -> bytes:
    store, boot = mark.store.encode(), boot_id.encode()
    assert len(store) <= 64, store
    assert len(boot) <= 64, boot
    slot = _SLOT.pack(0, *mark.position, store, boot)
    return crc32(slot[4:]).to_bytes(4, "big") + slot[4:]


def _unpack(content: bytes, boot_id: str) -> Marks:
    written, written_in = _unpack_slot(content[_WRITTEN : _WRITTEN + _SLOT.size])
    synced, _ = _unpack_slot(content[_SYNCED : _SYNCED + _SLOT.size])
    return Marks(written if written_in == boot_id else None, synced)


def _unpack_slot(slot: bytes) -> tuple[Mark | None, str]:
    if len(slot) < _SLOT.size:
        return None, ""
    checksum, segment, offset, store, boot = _SLOT.unpack(slot)
    if checksum != crc32(slot[4:]):
        return None, ""
    return Mark(store.rstrip(b"\0").decode(), Position(segment, offset)), boot.rstrip(
        b"\0"
    ).decode()
