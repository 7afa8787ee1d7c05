"""Reading an owner's state in place: its committed view and its logs, from any process.

This is what `Client.read`, a host that answers queries, and `ksi status` have in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from ksi.actors.commit import bind, table_types
from ksi.actors.delivery import Batch
from ksi.actors.owner import Owner
from ksi.actors.owners import load
from ksi.storage.journal import Batch as StoredBatch
from ksi.storage.reader import Reader
from ksi.storage.tables import TableSpec
from ksi.transport.message import Query

R = TypeVar("R")

SESSION_FILES: Final = Path("logs/responses/sessions")  # below var: one file a session
FILES_CURSOR: Final = Path("db/files")  # below var: how far the follower of files is


class OwnerReader:
    """Answers an owner's queries from its committed state."""

    def __init__(self, owner: Owner[Any], var: Path) -> None:
        self.owner = owner
        self._decode = msgspec.msgpack.Decoder(Batch[owner.events]).decode  # type: ignore[name-defined]
        specs = {name: TableSpec(row, key) for name, (row, key) in table_types(owner).items()}
        self.reader = Reader(
            var / "db" / owner.name,
            specs,
            logs=var / SESSION_FILES,
            cursor=var / FILES_CURSOR / f"{owner.name}.cursor",
            lines_of=self.lines_of,
        )
        self._bound_to: Any = None
        self._tables: Any = None

    def lines_of(self, batch: StoredBatch) -> Iterator[tuple[str, int, bytes]]:
        """Yield what a journaled batch adds to the owner's logs: key, offset, bytes."""
        for record in self._decode(batch.payload).records:
            for event in record.events:
                for line in self.owner.lines(event):
                    yield line.key, line.offset, line.content

    def bound(self, tables: Any) -> Any:
        """Return the owner's declared tables over those of a read transaction."""
        if tables is not self._bound_to:
            self._bound_to = tables
            self._tables = bind(self.owner.tables, tables, self.reader)
        return self._tables

    def answer(self, query: Query[R]) -> R:
        """Answer one query from one fresh read transaction."""
        reply: R = self.reader.read(
            lambda tables, _meta: self.owner.answer(query, self.bound(tables))
        )
        return reply

    def close(self) -> None:
        """Close what was opened."""
        self.reader.close()


def reader_of(owner: Owner[Any] | str, var: Path) -> OwnerReader:
    """Return a reader of the owner's state in `var`.

    Raises:
        NotFound: it has no store yet.
    """
    return OwnerReader(load(owner) if isinstance(owner, str) else owner, var)
