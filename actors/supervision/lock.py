"""Who holds a var directory: one supervisor at most, by a kernel lock on `var/run/lock`.

The lock is taken before anything is bound or opened and held for life; the kernel gives it back
when the process is gone, however it went, and keeps it while the process is stopped. The file is
never removed. What it says (pid, since when, host) is for messages only: nobody trusts it without
asking the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ksi.transport.errors import Conflict

TRIES: Final = 8  # A probe by `holder` holds the lock for microseconds; a supervisor for life.
PAUSE_S: Final = 0.015
_WORDS_BYTES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Holder:
    """The supervisor that holds a var directory. `pid` is 0 while it has not said it yet."""

    pid: int
    since: float  # seconds since the epoch
    host: str

    def words(self) -> str:
        """Return it as people read it."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"supervisor pid {self.pid} (started {since}, host {self.host})"


def hold(var: Path) -> int:
    """Take `var` for the life of this process; return the descriptor that holds it.

    Raises:
        Conflict: another process holds it; the text and the details name it.
        OSError: the directory or the file cannot be made.
    """
    path = _path(var)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    for _ in range(TRIES):
        if _locked(descriptor, fcntl.LOCK_EX):
            ours = json.dumps(asdict(Holder(os.getpid(), time.time(), socket.gethostname())))
            os.pwrite(descriptor, ours.encode().ljust(_WORDS_BYTES_MAX), 0)
            return descriptor
        time.sleep(PAUSE_S)  # Who only looks at the lock holds it for a moment.
    found = _words(descriptor)
    os.close(descriptor)
    raise Conflict(
        f"{var} is in use by {found.words()}",
        hint="ksi status shows it; ksi --var DIR start uses another directory",
        pid=found.pid,
        since=found.since,
        host=found.host,
    )


def holder(var: Path) -> Holder | None:
    """Return who holds `var`, or None if nobody does. Takes microseconds, waits for nobody."""
    try:
        descriptor = os.open(_path(var), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _locked(descriptor, fcntl.LOCK_SH) else _words(descriptor)
    finally:
        os.close(descriptor)


def _path(var: Path) -> Path:
    return var / "run" / "lock"


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _words(descriptor: int) -> Holder:
    try:
        return Holder(**json.loads(os.pread(descriptor, _WORDS_BYTES_MAX, 0)))
    except (ValueError, TypeError):
        return Holder(0, time.time(), socket.gethostname())
