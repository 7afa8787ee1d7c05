"""What followers share that keep a cache beside its owner, in the process of that owner.

A cache is made of what others have written, in SQLite, and is never the truth: it is brought on a
piece at a turn, and built again when somebody has ordered it, when it was deleted or is damaged,
when it has been through a crash of the machine, or is of something else. The new one is made beside
the old, which is read on until then, and replaces it when it is whole.
"""

from __future__ import annotations

import sqlite3
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from ksi.actors.reading import reader_of
from ksi.actors.supervision.reports import write_follower
from ksi.storage.errors import Corrupt
from ksi.storage.sqlite import is_damage
from ksi.transport.errors import KsiError, NotRunning
from ksi.transport.identity import run_directory
from ksi.transport.limits import TICK_S

SETTLE_S: Final = 1.0  # How often databases are looked after, and what was written moved into them.
SETTLE_LINES: Final = 50_000  # The same under load: what readers have to look through.
TURN_S: Final = 0.05  # Spent on what is built again, or on files, in one turn.
TELL_S: Final = 0.2  # How often it says how far it is.
RETRY_S: Final = 0.5  # After trouble that may pass; doubled each time ...
RETRY_S_MAX: Final = 30.0  # ... up to this.


class Outdated(Exception):
    """The cache cannot be gone on with; the text says why."""


class Writer(Protocol):
    """What writes a cache."""

    def unsettled(self) -> int:
        """Return how many lines were put in since `settle`."""

    def settle(self) -> str | None:
        """Move what was written into the database; return what somebody else did to it, if so."""

    def close(self) -> None:
        """Close it so that it is trusted even if the machine goes down."""

    def abandon(self) -> None:
        """Close it without a word: what was not committed is gone."""


class Making(Protocol):
    """What makes a cache anew, beside the old one."""

    reason: str
    done_bytes: int
    total_bytes: int
    lines: int
    begun_s: float

    def turn(self) -> bool:
        """Do a piece; return False when all is made."""

    def install(self) -> None:
        """Put what was made in the place of the old cache, which nobody writes any more."""

    def abandon(self) -> None:
        """Give it up."""


W = TypeVar("W", bound=Writer)


class CacheFollower(ABC, Generic[W]):
    """Keeps one cache, and builds it again, a piece at a turn.

    Whatever goes wrong, the next turn begins from what is on disk.
    """

    name: str  # of what it says of itself, in the run directory
    what: str  # it keeps, in words
    order = "rebuild"  # the order of its owner to build it again

    def __init__(self, owner: str, var: Path, logger: Any) -> None:
        self._var = var
        self._log = logger
        self._run = run_directory(var)
        self._orders = reader_of(owner, var).reader
        self._writer: W | None = None
        self._rebuild: Making | None = None
        self._outdated: str | None = None  # why the cache must be built again
        self._trouble: str | None = None  # what keeps it from its work
        self._told: dict[str, Any] = {}
        self._told_s = self._settled_s = self._until_s = 0.0
        self._retry_s = RETRY_S
        self._built_s = float("-inf")  # when it was last built

    @abstractmethod
    def _open(self) -> W:
        """Return the writer of the cache as it is.

        Raises:
            Outdated: it is not to be gone on with.
        """

    @abstractmethod
    def _feed(self, writer: W) -> bool:
        """Bring the cache on from where it is; return whether there was anything.

        Raises:
            Outdated: it cannot be brought on.
        """

    @abstractmethod
    def _make(self, reason: str, order: int) -> Making:
        """Begin to make a new one."""

    @abstractmethod
    def _rebuilt(self, writer: W) -> int:
        """Return the number of the last order that the cache is the result of."""

    def is_behind(self) -> bool:
        """Return whether there is something to take up that cannot be taken up yet."""
        return False

    @property
    def wait_s(self) -> float:
        """How long it may sleep where nobody rings."""
        return TICK_S

    def turn(self) -> bool:
        """Do a piece of what there is to do; return whether there is more."""
        if time.monotonic() < self._until_s:
            return False
        try:
            busy = self._turn()
        except Exception as error:  # A defect here must not take the other processes with it.
            busy = self._meet(error)
        else:
            self._trouble, self._retry_s = None, RETRY_S
        self._tell()
        return busy

    def close(self) -> None:
        """Take up what is left, or some of it if that is much, sync and close."""
        try:
            if self._writer is not None:
                self._finish(self._writer)
                self._writer.close()
        except (KsiError, Outdated, OSError, sqlite3.Error) as error:
            self._log.warning(f"the {self.what} was not closed in order", error=str(error))
        self._writer = None
        self._let_go()

    def _finish(self, writer: W) -> None:
        """Take up what is left at the end."""

    def _turn(self) -> bool:
        if self._outdated is not None:
            if self._rebuild is None:
                self._begin(self._outdated)
        elif self._writer is None:
            self._writer = self._open()
        busy = False
        if self._writer is not None:
            busy = self._feed(self._writer)
            self._settle(self._writer)
        if self._rebuild is None:
            return self._obey() or busy
        until_s = time.monotonic() + TURN_S
        while self._rebuild.turn():
            if time.monotonic() >= until_s:
                return True
        self._install(self._rebuild)
        return True

    def _settle(self, writer: W) -> None:
        now_s = time.monotonic()
        if now_s - self._settled_s < SETTLE_S and writer.unsettled() < SETTLE_LINES:
            return
        self._settled_s = now_s
        if trouble := writer.settle():
            raise Outdated(trouble)

    def _obey(self) -> bool:
        """Carry out what was ordered last; return whether there is more of it to do."""
        assert self._writer is not None
        if self._ordered(self.order) <= self._rebuilt(self._writer):
            return False
        self._begin("it was ordered")
        return True

    def _ordered(self, kind: str) -> int:
        """Return the number of the latest order of a kind."""
        order = self._orders.read(lambda tables, _: tables["orders"].get(kind))
        return 0 if order is None else int(order.number)

    def _begin(self, reason: str) -> None:
        self._log.warning(f"building the {self.what}", reason=reason)
        self._rebuild = self._make(reason, self._ordered(self.order))

    def _install(self, rebuild: Making) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        rebuild.install()
        self._built_s = time.monotonic()
        self._rebuild = self._outdated = None
        seconds = round(time.monotonic() - rebuild.begun_s, 3)
        self._log.info(f"the {self.what} is built", lines=rebuild.lines, seconds=seconds)

    def _meet(self, error: Exception) -> bool:
        """Build the cache again if it is at fault, otherwise try again a little later."""
        was_rebuilding = self._rebuild is not None
        self._let_go()
        is_at_fault = isinstance(error, Outdated | Corrupt) or (
            isinstance(error, sqlite3.Error) and is_damage(error)
        )
        if is_at_fault and not was_rebuilding:
            self._outdated = str(error)
            if time.monotonic() - self._built_s > RETRY_S_MAX:
                return True
            self._until_s = time.monotonic() + RETRY_S  # It was built only just now.
            return False
        if not isinstance(error, NotRunning):  # That is how a new var begins.
            self._trouble = str(error)
            is_expected = isinstance(error, KsiError | Outdated | OSError | sqlite3.Error)
            self._log.error(
                f"the {self.what} cannot be written", error=str(error), exc_info=not is_expected
            )
        self._until_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        return False

    def _let_go(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
        if self._rebuild is not None:
            self._rebuild.abandon()
        self._writer = self._rebuild = None

    def _work(self) -> tuple[str, Any]:
        """Return what it does, in a word, and what says how far that is."""
        if self._rebuild is not None:
            return "rebuilding", self._rebuild
        return ("waiting" if self._writer is None else "following"), None

    def _more(self) -> dict[str, Any]:
        """Return what else it says of itself."""
        return {}

    def _tell(self) -> None:
        """Write down, for the status of its owner, what is going on."""
        state, work = self._work()
        told = {
            "state": state,
            "is_whole": self._writer is not None,
            "reason": self._rebuild.reason if self._rebuild else self._trouble,
            "done_bytes": work.done_bytes if work else 0,
            "total_bytes": work.total_bytes if work else 0,
            **self._more(),
        }
        now_s = time.monotonic()
        is_late = now_s - self._told_s >= TELL_S
        if told != self._told and (is_late or state != self._told.get("state")):
            with suppress(OSError):  # There will be room for it another time.
                write_follower(self._run, self.name, told)
            self._told, self._told_s = told, now_s
