"""Reading an owner's state in place: its committed view and its logs, from any process.

This is what `Client.read`, a host that answers queries, a follower and `ksi status` share.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from ksi.actors.commit import batch_decoder, bind, caches_of, table_specs
from ksi.actors.delivery import Batch
from ksi.actors.owner import Compositions, Conversations, EventLog, Index, Log, Owner
from ksi.actors.owners import load
from ksi.storage.journal import Batch as StoredBatch
from ksi.storage.journal import JournalReader, Position
from ksi.storage.reader import Reader
from ksi.storage.store import Meta
from ksi.transport.errors import KsiError
from ksi.transport.message import Query, Reply, operation_of

R = TypeVar("R")


def log_directory(var: Path) -> Path:
    """Return where session files are: one file a session."""
    return var / "logs" / "responses" / "sessions"


def archive_directory(var: Path) -> Path:
    """Return where the files of archived sessions are."""
    return var / "archive" / "sessions"


def cursor_path(var: Path, owner: str) -> Path:
    """Return the cursor of the follower that writes the logs of `owner`."""
    return var / "db" / "files" / f"{owner}.cursor"


class CommittedLog:
    """An owner's `Log`: from the files, and where they are short from the journal."""

    def __init__(self, reader: Reader) -> None:
        self.read = reader.log


class OwnerReader:
    """Answers an owner's queries from its committed state, and reads its journal."""

    def __init__(self, owner: Owner[Any], var: Path) -> None:
        self.owner = owner
        self._decode = batch_decoder(owner.events)
        self.reader = Reader(
            var / "db" / owner.name,
            table_specs(owner),
            logs=log_directory(var),
            cursor=cursor_path(var, owner.name),
            archive=archive_directory(var),
            lines_of=self.lines_of,
        )
        self._log = CommittedLog(self.reader)
        self._beside: dict[Any, Any] = {Log: self._log}
        self._beside |= {kind: _cache(kind, var) for kind in caches_of(owner.tables)}
        self._bound_to: Any = None
        self._tables: Any = None

    def bound(self, tables: Any) -> Any:
        """Return the owner's declared tables over those of a read transaction."""
        if tables is not self._bound_to:
            self._bound_to = tables
            self._tables = bind(self.owner.tables, tables, self._beside)
        return self._tables

    def answer(self, query: Query[R]) -> R:
        """Answer one query from one fresh read transaction.

        Raises:
            NotRunning: the owner has no store yet.
        """
        answer = self.owner.answer
        return cast("R", self.reader.read(lambda tables, _meta: answer(query, self.bound(tables))))

    def events_of(self, batch: StoredBatch) -> Iterator[Any]:
        """Yield the events of a journaled batch."""
        for record in self.decoded(batch).records:
            yield from record.events

    def decoded(self, batch: StoredBatch) -> Batch[Any]:
        """Return a journaled batch: whose commands, when, and what has happened."""
        return self._decode(batch.payload)

    def lines_of(self, batch: StoredBatch) -> Iterator[tuple[str, int, bytes]]:
        """Yield what a journaled batch adds to the owner's logs: key, offset, bytes."""
        for event in self.events_of(batch):
            yield from self.owner.lines(event)

    def is_archived(self, key: str) -> bool:
        """Return whether the log `key` is to be in the archive, as is committed now."""
        return self.reader.read(
            lambda tables, _meta: self.owner.is_archived(self.bound(tables), key)
        )

    def logs(self, after: str, count: int) -> tuple[Position, dict[str, int]]:
        """Return the committed sizes of the next logs, and the place in the journal they are of."""
        return self.reader.read(
            lambda tables, meta: (
                meta.position,
                dict(islice(self.owner.logs(self.bound(tables), after), count)),
            )
        )

    def committed(self) -> Meta:
        """Return what the committed state says of itself: store, last number, place in the journal.

        Raises:
            NotRunning: the owner has no store yet.
        """
        return self.reader.read(lambda _tables, meta: meta)

    def position(self) -> tuple[str, Position]:
        """Return the id of the store in use and where its committed journal ends."""
        meta = self.committed()
        return meta.store, meta.position

    def journal(self) -> JournalReader:
        """Return a reader of the journal of the store in use."""
        store, _position = self.reader.committed()
        return JournalReader(store)


class Facts:
    """Answers queries to any owner of `var` from its committed state, without a message."""

    def __init__(self, var: Path) -> None:
        self._var = var
        self._readers: dict[str, OwnerReader] = {}

    def __call__(self, query: Query[Any]) -> Reply | KsiError | None:
        """Return the reply, or the refusal; None if that state cannot be read now."""
        asked = operation_of(query)
        if asked.owner not in self._readers:
            self._readers[asked.owner] = reader_of(asked.owner, self._var)
        try:
            reply: Reply = self._readers[asked.owner].answer(query)
            return reply
        except KsiError as refusal:
            return refusal if isinstance(refusal, asked.refuses) else None


# Imported when they are asked for: SQLite, which hardly any reader needs.
_VIEWS: Final = {
    Index: "ksi.actors.followers.indexed:IndexView",
    EventLog: "ksi.actors.followers.recorded:EventLogView",
    Compositions: "ksi.actors.followers.composed:CompositionsView",
    Conversations: "ksi.actors.followers.conversed:ConversationsView",
}


def _cache(kind: Any, var: Path) -> Any:
    module, _, name = _VIEWS[kind].partition(":")
    return getattr(import_module(module), name)(var)


def reader_of(owner: Owner[Any] | str, var: Path) -> OwnerReader:
    """Return a reader of the owner's state in `var`. Nothing is opened yet."""
    return OwnerReader(load(owner) if isinstance(owner, str) else owner, var)
