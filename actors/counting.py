"""How many rows an owner's tables have, without its declarations: for those who are in a hurry."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ksi.storage.reader import Reader
from ksi.storage.tables import TableSpec


def count_rows(var: Path, owner: str, tables: Iterable[str]) -> dict[str, int]:
    """Return how many rows each of an owner's tables has, all in one committed state.

    Raises:
        NotRunning: there is no store that can be read.
    """
    reader = Reader(var / "db" / owner, {table: TableSpec(bytes) for table in tables})
    return reader.read(lambda found, _meta: {name: table.count() for name, table in found.items()})
