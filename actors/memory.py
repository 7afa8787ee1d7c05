"""What a process keeps to itself once it has started. Nearly all of it is pages of the fork server
that it has written to, and so copied: the fewer it writes to, the less it takes."""

from __future__ import annotations

import ctypes
import gc
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any, Final

_libc: Final = ctypes.CDLL(None)
_trim: Final[Any] = getattr(_libc, "malloc_trim", None)  # glibc has it, musl does not
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
# Of the entry of a page in `pagemap`: it is there, nobody shares it; it is of a file.
_PRESENT: Final = 1 << 63
_ALONE: Final = 1 << 56
_OF_FILE: Final = 1 << 61
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, of Linux 5.14; Python has no name for it.


def settle() -> None:
    """Take all there is for what stays: the collector passes it by, and free pages go back.

    Nothing is collected first: that would leave holes, which are filled in one page each.
    Source: `gc.freeze` in the documentation of Python, malloc_trim(3).
    """
    gc.freeze()
    if _trim is not None:
        _trim(0)


def copy_as(pid: int) -> None:
    """Copy now the pages that `pid`, of the same fork server, had to copy when it wrote to them.

    Whoever is to become such a process writes to the same ones; a copy takes 4 µs, and a start
    makes more than a thousand. Nothing happens where the kernel does not tell, or cannot.
    Source: proc_pid_pagemap(5), madvise(2).
    """
    with suppress(OSError), open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
        for start, end in _writable():
            pagemap.seek(start // _PAGE_BYTES * 8)
            page = start
            entries = array("Q", pagemap.read((end - start) // _PAGE_BYTES * 8))
            for copied, run in groupby(entries, _is_copied):
                length = len([*run]) * _PAGE_BYTES
                if copied:
                    _libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(length), _POPULATE_WRITE)
                page += length


def _writable() -> Iterator[tuple[int, int]]:
    """Yield where the private memory of this process that it may write to begins and ends."""
    with open("/proc/self/maps") as maps:
        for line in maps.readlines():
            place, rights = line.split()[:2]
            if rights == "rw-p":
                start, _, end = place.partition("-")
                yield int(start, 16), int(end, 16)


def _is_copied(entry: int) -> bool:
    return entry & (_PRESENT | _ALONE | _OF_FILE) == _PRESENT | _ALONE
