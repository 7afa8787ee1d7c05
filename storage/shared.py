"""Files in a folder that others write, too: read and replaced only as what they are known to be.

A path below the folder is walked a directory at a time and no link is followed, so it cannot leave
the folder, whatever others put into it meanwhile. A file is replaced in one step, durably, and only
if its content is what it is expected to be; one that is expected not to be there is never replaced.
Whoever changes a file between that comparison and the rename, some microseconds, loses his change:
no file system can compare and rename in one.

Source: openat(2) and O_NOFOLLOW against races of paths; as `atomic.py` otherwise.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from ksi.storage.atomic import write_all

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FRESH: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
# What is in the way and does not go by itself: a link, a file for a directory or the other way.
_IN_THE_WAY: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})


class Differs(Exception):
    """The file is not what it was expected to be; the text says how."""


def read(folder: Path, path: str, most: int) -> bytes | None:
    """Return the content of a file below a folder, at the most `most` bytes; None if there is none.

    Raises:
        Differs: something else is in its place, or on the way to it.
        OSError: it cannot be read.
    """
    try:
        with _parent(folder, path, make=False) as (parent, name):
            return _content(parent, name, most)
    except FileNotFoundError:
        return None


def replace(folder: Path, path: str, content: bytes | None, expected: str | None) -> None:
    """Put `content` in the place of a file below a folder, or remove it; fine if that is so.

    Args:
        expected: the SHA-256 of what it is now; None: there is none.

    Raises:
        Differs: it is something else, or something is in the way. Nothing was changed.
        OSError: it could not be done; it may be done again.
    """
    wanted = None if content is None else sha256(content).hexdigest()
    try:
        with _parent(folder, path, make=content is not None) as (parent, name):
            present = _hash_of(parent, name)
            if present not in (wanted, expected):
                was = "there is one already" if expected is None else "it is not what it was"
                raise Differs("it is gone" if present is None else was)
            if present != wanted:
                _put(parent, name, content, is_new=present is None)
            os.fsync(parent)
    except FileNotFoundError:
        if content is not None:
            raise


def _put(parent: int, name: str, content: bytes | None, *, is_new: bool) -> None:
    if content is None:
        os.unlink(name, dir_fd=parent)
        return
    temporary = f".{name}.new"  # Known by its name: what a killed writer left is used again.
    mode = 0o666 if is_new else os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode & 0o777
    fd = os.open(temporary, _FRESH, mode, dir_fd=parent)
    try:
        write_all(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    if not is_new:
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        return
    try:
        os.link(temporary, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        raise Differs("there is one already") from None
    finally:
        os.unlink(temporary, dir_fd=parent)


def _hash_of(parent: int, name: str) -> str | None:
    try:
        content = _content(parent, name, -1)
    except FileNotFoundError:
        return None
    return sha256(content).hexdigest()


def _content(parent: int, name: str, most: int) -> bytes:
    with os.fdopen(_opened(name, _FILE, parent), "rb") as file:
        return file.read(most)


@contextmanager
def _parent(folder: Path, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
    """Open the directory of a file below a folder, made with `make`; give it, and the file's name.

    Raises:
        FileNotFoundError: there is none.
    """
    *parts, name = path.split("/")
    if not {"", ".", ".."}.isdisjoint((*parts, name)):
        raise Differs(f"{path[:100]!r} is no path below a folder")
    fd = os.open(folder, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        for part in parts:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=fd)
                    os.fsync(fd)
            inner = _opened(part, _DIRECTORY, fd)
            os.close(fd)
            fd = inner
        yield fd, name
    finally:
        os.close(fd)


def _opened(name: str, flags: int, parent: int) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise Differs(f"{name} is a link, or of another kind: {error.strerror}") from None
        raise
