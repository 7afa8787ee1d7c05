"""The one idea: one owner, one mailbox, one writer.

Every piece of state has exactly one owner. To change it, a *command* is sent to that owner, which
*decides*: it refuses (raise a refusal: nothing has changed, the caller is told why) or accepts, as
events and a reply. Events are then *applied*; applying never refuses and has no other effect.
To read it, a *query* is answered from one committed state, by the owner or in any other process.

    decide(command, sender, tables, given) -> Decision      reads tables, writes nothing
    apply(event, tables)                                    writes tables, live and in replay
    answered(message, refusal, tables, given) -> Decision   another owner's word on a message
    relay(signal, sender, tables) -> Announcement           reads tables; nothing is kept
    answer(query, tables) -> reply                          reads tables, in any process

Nothing here does I/O, knows the time or draws a random number: what a decision needs from outside
is *given* as data. So a refused command has nothing to undo, a journal replays to the same state,
and an owner runs in a simulator unchanged. `actors/host.py` is the loop around it.

Invariants every owner keeps (checked for each by `actors/testing.py`):
- a refused command leaves the tables as they were;
- the events of a journal, applied in order to empty tables, give the live tables.

Source: "commands may be refused, events may not fail": event sourcing as in Pekko persistence;
the split of generic loop and callbacks: Erlang/OTP gen_server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from ksi.transport.errors import KsiError
from ksi.transport.limits import CACHE_ROWS
from ksi.transport.message import Command, Event, Message, Query, Reply, Role

Row = TypeVar("Row")
Key = str | tuple[str | int, ...]


class Table(Protocol[Row]):
    """Rows by key, in key order. Rows are immutable; to change one, put another.

    A key is a string or a tuple of strings and non-negative integers; tuples order by their
    parts. Strings in keys hold no NUL.
    """

    def get(self, key: Key) -> Row | None:
        """Return the row, or None."""

    def put(self, key: Key, row: Row) -> None:
        """Set the row."""

    def delete(self, key: Key) -> None:
        """Remove the row if it is there."""

    def range(
        self, start: Key = (), stop: Key | None = None, *, prefix: Key = (), reverse: bool = False
    ) -> Iterator[tuple[Any, Row]]:
        """Yield `(key, row)` with start <= key < stop, in order, or backwards with `reverse`.

        `prefix` keeps to keys that begin with these parts. The table must not change meanwhile.
        """

    def count(self) -> int:
        """Return how many rows there are."""


class Log(Protocol):
    """Bytes by key that only ever grow: the files people read, written by a follower.

    `apply` does not write it; the owner's `lines` says which bytes an event adds. Reading gives
    what is committed, from the file and, where the follower is behind, from the journal.
    """

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of `key`."""


class Index(Protocol):
    """Where entries of another owner's log are, in databases that a follower writes.

    `apply` does not write it, and nothing in it is of its own: it is built again at any time.
    Reading gives what the follower has come to.
    """

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return rows of the index in the order of time, by column."""

    def participants(self, session_id: str) -> list[str]:
        """Return who takes part in a session, by name."""

    def state(self) -> dict[str, Any]:
        """Return how far the follower has come and what it does now."""


class EventLog(Protocol):
    """What has happened in all owners, in files that a follower writes.

    `apply` does not write it. Reading gives what the follower has come to.
    """

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return a page of events, and where the next one begins."""

    def newest(self) -> int:
        """Return the number of the newest event, 0 where there is none."""

    def state(self) -> dict[str, Any]:
        """Return how much there is, and how far the follower has come."""


class Compositions(Protocol):
    """What is in a folder of compositions, in a database that a follower writes."""

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the compositions that are wanted, in the order of their ids."""

    def named(self, name: str, kind: str | None) -> list[dict[str, Any]]:
        """Return the compositions that a name may mean, with their metadata and content."""

    def source(self, path: str) -> bytes | None:
        """Return the file at a path as it is in the folder now; None if there is none."""

    def problems(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the files that are no compositions, and why not."""

    def state(self) -> dict[str, Any]:
        """Return how many there are, and what the follower does now."""


class Conversations(Protocol):
    """What was said in sessions and in imported logs, in a database that a follower writes."""

    def find(self, **wanted: Any) -> tuple[list[dict[str, Any]], int]:
        """Return the conversations that are wanted, and how many there are in all."""

    def named(self, session_id: str, file_path: str | None) -> list[dict[str, Any]]:
        """Return the conversations that an id may mean."""

    def messages(self, path: str, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return messages of one conversation, as many as fit into an answer."""

    def search(self, **wanted: Any) -> dict[str, Any]:
        """Return where words were said."""

    def problems(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the lines and files that cannot be read, and why not."""

    def counts(self) -> dict[str, Any]:
        """Return how much there is in all."""

    def state(self) -> dict[str, Any]:
        """Return what the follower does now."""


CACHES: Final = frozenset({Index, EventLog, Compositions, Conversations})


class Line(NamedTuple):
    """Bytes that an event adds to the log of `key`, at `offset`: the same each time it is asked."""

    key: str
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Sender:
    """Who speaks, proven by the key of the connection, never by the message."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Given:
    """What a decision may use from outside its tables.

    Attributes:
        now: wall time in seconds since the epoch, for people.
        time_s: owner time in seconds: advances only while the owner runs; for deadlines.
        ids: fresh ids, each a UUID in its usual form.
        fact: the answer of another owner's state to `Owner.fact`, or what it refused it with;
            None if nothing was asked or that state cannot be read now.
    """

    now: float
    time_s: float
    ids: Iterator[str]
    fact: Reply | KsiError | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """A command to another owner, sent after commit and effectively once.

    `unless_waiting`: left out while an equal one has not been answered. For what only says that
    something is so now: the one that waits will say it later than this one would.
    """

    owner: str
    operation: str
    command: Message
    unless_waiting: bool = False


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What happens if this command is carried out: events in order, a reply, and messages.

    With `tick` the owner's `Tick` follows in the same commit, after the rest of the batch: for what
    is decided once for many commands, over what they have led to.
    """

    events: tuple[Event, ...] = ()
    reply: Reply | None = None
    sends: tuple[Send, ...] = ()
    tick: bool = False


class Announcement(msgspec.Struct, frozen=True, gc=False):
    """Something subscribers of `topic` are told. May be lost by them, and they know how many.

    Told of an event once that is on disk, of a signal at once, with the message as it came.
    """

    topic: str
    message: dict[str, Any] | msgspec.Raw
    sender: str = ""


Interrupted = Literal["retry", "fail"]


class Tick(Command[None], frozen=True, kw_only=True):
    """Time has passed. Sent by the host to its own owner: a few times a second, and when asked."""


class Restored(Command[None], frozen=True, kw_only=True):
    """The store was restored from a checkpoint: what was told of later is undone.

    Sent by the host to an owner that `recovers`: once, before anything else is carried out.
    `interrupted` is what is to become of work that was under way: tried again, or failed.
    """

    interrupted: Interrupted = "retry"


class Keyed:
    """The parts of a table's key: `Annotated[Table[Row], Keyed(str, int)]`. Default: one string.

    `cache_rows` is how many decoded rows its writer keeps between batches: fewer of large ones.
    """

    def __init__(self, *parts: type, cache_rows: int = CACHE_ROWS) -> None:
        self.parts = parts
        self.cache_rows = cache_rows


class Tables:
    """Base of an owner's tables: annotate each as `name: Table[Row]` or `name: Log`."""


T = TypeVar("T", bound=Tables)


class Owner(ABC, Generic[T]):
    """One piece of state and all that may happen to it. Instances hold nothing."""

    name: ClassVar[str]
    tables: ClassVar[type[Tables]]
    events: ClassVar[Any]  # the union of this owner's event classes
    domains: ClassVar[tuple[str, ...]] = ()  # first words of the topics it announces
    routine: ClassVar[tuple[type[Event], ...]] = ()  # signs of life: the event log leaves them out
    private: ClassVar[tuple[str, ...]] = ()  # fields of events: the event log has their digests
    recovers: ClassVar[bool] = False  # whether it decides about `Restored`

    @abstractmethod
    def decide(self, command: Any, sender: Sender, tables: T, given: Given) -> Decision:
        """Return what happens if `command` is carried out, or raise a refusal."""

    @abstractmethod
    def apply(self, event: Any, tables: T) -> None:
        """Write what `event` says. Never refuses, reads nothing but its arguments."""

    @abstractmethod
    def answer(self, query: Any, tables: T) -> Reply:
        """Return the reply to `query`, or raise a refusal."""

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        """Return what `decide` wants to be given of another owner's state, or of what is beside its
        own tables, as logs are: a query.

        It is answered from what that owner has committed, without a message, and may be out of
        date when it is used: the other owner has the last word, through a `Send`.
        """
        return None

    def answered(self, command: Any, refusal: KsiError | None, tables: T, given: Given) -> Decision:
        """Return what follows from another owner's answer to `command`, a message of this one.

        `refusal` None: it was carried out there. What it leads to may be decided twice.
        """
        return Decision()

    def relay(self, signal: Any, sender: Sender, tables: T) -> Announcement | None:
        """Return what subscribers are told of `signal`, or raise a refusal.

        None: it concerns what is kept, and is to be decided like any command. Fields of it whose
        values are left open are `msgspec.Raw`.
        """
        return None

    def announce(self, event: Any) -> Iterable[Announcement]:
        """Return what subscribers are told of `event`."""
        return ()

    def lines(self, event: Any) -> Iterable[Line]:
        """Return the bytes that `event` adds to logs."""
        return ()

    def archives(self, event: Any) -> Iterable[tuple[str, int | None]]:
        """Return the logs that `event` archives, with their sizes; None takes one out again."""
        return ()

    def is_archived(self, tables: T, key: str) -> bool:
        """Return whether the log `key` is to be in the archive."""
        return False

    def logs(self, tables: T, after: str) -> Iterator[tuple[str, int]]:
        """Yield every log beyond the key `after` with its committed size, in order of keys."""
        return iter(())


__all__ = [
    "CACHES", "Announcement", "Command", "Compositions", "Conversations", "Decision", "Event",
    "EventLog", "Given", "Index", "Interrupted", "Key", "Keyed", "Line", "Log", "Owner", "Query",
    "Reply", "Restored", "Send", "Sender", "Table", "Tables", "Tick",
]  # fmt: skip
