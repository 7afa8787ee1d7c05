"""Zeros ahead of a journal's end: what is written over them costs a sync less.

A sync of bytes that make a file longer commits its size and extents as well; one of bytes in place
of others does not (0.6 of the time: facts in docs/performance.md). So a thread keeps some zeros on
disk beyond the end of a journal that is being written much. To readers they are nothing: a record
never begins with a zero.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Final

from ksi.transport.limits import PREWRITE_BYTES

log = logging.getLogger("ksi.storage")

_ZEROS: Final = bytes(1 << 18)  # Written and synced at once: as long as an append may have to wait.


class Prewriter:
    """Keeps zeros beyond the end of one segment, from `start` on, until it is closed.

    Invariant: no zero is written below an offset that was claimed before.

    Raises:
        OSError, RuntimeError: there is no descriptor or no thread to be had.
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        # A descriptor of its own: an error of the disk is told once to each, also to the journal.
        self._fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._zeroed = self._end = start
        self._stop = stop
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ksi-prewrite", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            os.close(self._fd)
            raise

    def claim(self, end: int) -> None:
        """The journal is about to write up to `end`; waits for zeros on their way."""
        if end > self._zeroed:
            with self._lock:
                self._zeroed = max(end, self._zeroed)
        self._end = end
        if self._zeroed - end < PREWRITE_BYTES // 2 and not self._due.is_set():
            self._due.set()

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True
        self._due.set()
        self._thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        try:
            while not self._closed:
                while self._zeroed < min(self._end + PREWRITE_BYTES, self._stop):
                    with self._lock:
                        if self._closed:
                            return
                        os.pwrite(self._fd, _ZEROS, self._zeroed)
                        os.fdatasync(self._fd)
                        self._zeroed += len(_ZEROS)
                self._due.wait()
                self._due.clear()
        except OSError as error:  # The journal goes on without, and meets the same if it lasts.
            log.warning("no zeros are written ahead of the journal any more: %s", error)
