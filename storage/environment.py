"""LMDB environments: opened once a process, in one way, and never across a fork.

Rules, each from a failure seen (`docs/decisions/` has the reasons):
- LMDB's locks belong to a process and a file. Opening an environment twice, or opening and closing
  `lock.mdb` in any other way, silently drops them. So every opener goes through this cache.
- Every opener names the same map size and reader slots: the first one sizes the lock file.
- Syncing is off: only the journal is synced when a batch is committed. So a view that may have
  missed a crash of the machine is never opened by anyone but recovery, which decides about it.
- A truncated data file kills whoever reads it (SIGBUS), so its length is checked when it is opened.
- A forked child must neither use nor close what its parent opened: closing would free the
  parent's reader slots. It is left alone for ever, and the child opens its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final
from weakref import WeakSet

import lmdb
import lmdb._envid

from ksi.storage.errors import Corrupt
from ksi.transport.errors import NotRunning
from ksi.transport.limits import MAP_BYTES, READERS_MAX

_DATABASES_MAX: Final = 32
_SPARE_TXNS: Final = 4  # Read transactions kept for reuse: makes beginning one three times faster.
_OPEN_TRIES: Final = 5  # Opening may fail while another process opens or closes the same files.
_DAMAGE: Final = (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError)
_OPEN_RETRY_S: Final = 0.004


class Environment:
    """An open LMDB environment and the handles of its databases.

    Attributes:
        lmdb: the environment itself.
        writable: whether this process is its writer.
        inherited: it was opened by the process we were forked from, and must not be used.
    """

    def __init__(self, path: Path, opened: lmdb.Environment, *, writable: bool) -> None:
        self.path = path
        self.lmdb = opened
        self.writable = writable
        self.inherited = False
        self._identity = _identity(path)
        self._databases: dict[str, lmdb._Database] = {}
        _all.add(self)

    def database(self, name: str) -> lmdb._Database:
        """Return the handle of a database.

        A reader's first use of one takes a transaction of its own: not inside another.

        Raises:
            NotRunning: there is none of this name; its owner makes it when it starts.
        """
        if name not in self._databases:
            self._open_for_reading(name)
        return self._databases[name]

    def open_databases(self, names: Iterable[str]) -> None:
        """Open these databases, creating those that are missing. For the writer."""
        with _lock, self.lmdb.begin(write=True) as txn:
            opened = {name: self.lmdb.open_db(name.encode(), txn=txn) for name in names}
        self._databases.update(opened)

    def _open_for_reading(self, name: str) -> None:
        # The writer has opened all there is; to open one more it would wait for itself.
        if not self.writable:
            with suppress(lmdb.NotFoundError), _lock:
                self._databases[name] = self.lmdb.open_db(name.encode(), create=False)
                return
        raise NotRunning(f"the view {self.path} has no table {name} yet", hint="ksi restart")

    def is_current(self) -> bool:
        """Return whether the files at its path are still those that were opened."""
        return self._identity == _identity(self.path)

    def close(self) -> None:
        """Close it. Transactions of this process on it become invalid."""
        with _lock:
            if _open.get(self.path) is self:
                del _open[self.path]
            self.lmdb.close()


_lock = threading.RLock()
_open: dict[Path, Environment] = {}
_all: WeakSet[Environment] = WeakSet()


def open_writer(path: Path, *, create: bool = False) -> Environment:
    """Open the environment in the directory `path` for its one writer.

    Whoever calls this holds the store's lock. A reader of this process that has it open is cut
    off and opens it again.

    Raises:
        Corrupt: there is none, or it is damaged.
    """
    with _lock:
        present = _open.get(path)
        if present is not None:
            assert not present.writable, f"{path} is open for writing already"
            present.close()
        if create:
            path.mkdir(mode=0o700)
        elif not (path / "data.mdb").exists():
            raise Corrupt(f"there is no view {path}", file=str(path))
        return _keep(path, writable=True)


def open_reader(path: Path) -> Environment:
    """Open the environment in the directory `path` for reading, or return the one that is open.

    Raises:
        NotRunning: there is none.
        Corrupt: it is damaged.
    """
    with _lock:
        present = _open.get(path)
        if present is not None:
            if present.is_current():
                return present
            del _open[path]  # Others of this process may still be reading it: not closed here.
        if not (path / "data.mdb").exists():
            raise NotRunning(f"there is no view {path}", hint="ksi start")
        return _keep(path, writable=False)


def open_copy(path: Path) -> lmdb.Environment:
    """Open a snapshot, which nobody writes, without touching its directory.

    Raises:
        Corrupt: it is damaged.
    """
    return _opened(path, readonly=True, lock=False)


def _keep(path: Path, *, writable: bool) -> Environment:
    environment = Environment(path, _opened(path, readonly=not writable), writable=writable)
    _open[path] = environment
    return environment


def _opened(path: Path, *, readonly: bool, lock: bool = True) -> lmdb.Environment:
    for tried in range(1, _OPEN_TRIES + 1):
        try:
            opened = lmdb.Environment(
                str(path),
                map_size=MAP_BYTES,
                readonly=readonly,
                create=not readonly,
                lock=lock,
                sync=False,
                writemap=False,
                mode=0o600,
                max_readers=READERS_MAX,
                max_dbs=_DATABASES_MAX,
                max_spare_txns=_SPARE_TXNS,
                lib_version=0,
            )
            break
        except lmdb.Error as error:
            if tried < _OPEN_TRIES:
                # Not all at once again: children of one fork server draw the same from `random`.
                time.sleep(tried * _OPEN_RETRY_S * os.urandom(1)[0] / 255)
            elif isinstance(error, _DAMAGE):
                raise Corrupt(f"the view {path} does not open: {error}", file=str(path)) from error
            else:  # Out of descriptors, memory or rights: that says nothing of the view.
                raise
    needed = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    size = (path / "data.mdb").stat().st_size
    if size < needed:
        opened.close()
        raise Corrupt(
            f"{path}/data.mdb has {size} bytes, its pages need {needed}",
            file=str(path / "data.mdb"),
        )
    return opened


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path / "data.mdb")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _leave_inherited() -> None:
    """In a forked child: never touch what the parent opened, and let the child open its own."""
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread we do not have
    _lock = threading.RLock()
    if not _all:
        return
    for environment in _all:
        environment.inherited = True
    _open.clear()
    # py-lmdb refuses to open files that this process has open, and takes the parent's for such.
    keys_of: Callable[..., tuple[object, ...]] = lmdb._envid.env_keys
    child = os.getpid()
    lmdb._envid.env_keys = lambda path, subdir: tuple((child, key) for key in keys_of(path, subdir))


os.register_at_fork(after_in_child=_leave_inherited)
