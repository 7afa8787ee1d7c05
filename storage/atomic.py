"""Files that are whole or absent, and directories whose entries survive a power cut.

A name is durable only when its directory has been synced: a file that was written and synced but
whose directory was not may be gone after a power cut.

Source: SQLite "Atomic Commit in SQLite"; Pillai et al., "All File Systems Are Not Created Equal"
(OSDI '14): write a temporary, sync it, rename, sync the directory.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_serial = itertools.count()


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `content`, durably.

    At every instant, power cuts included, readers find the former file or the new one, whole.

    Raises:
        OSError: the former file is still there, unless the last sync of the directory failed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, mode)
        try:
            os.fchmod(fd, mode)
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_all(fd: int, content: bytes, offset: int = 0) -> None:
    """Write all of `content` at `offset`; a short write is continued, an error raised."""
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def sync_directory(path: Path) -> None:
    """Make the present entries of the directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create the directory and missing parents, 0700 and durable; fine if it is there."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_directory(path.parent)
