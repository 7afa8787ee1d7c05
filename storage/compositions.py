"""The cache of a folder of compositions: what each file says of itself, and what is wrong with it.

    files     every file that was looked at: a composition, rejected, or excluded, with the reason
    facets    what can be filtered by: each value of a composition's metadata under its dotted key

The files are the truth. A file is known by its path below the folder; a composition's id is that
path without its suffix, since names repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from ksi.storage import sqlite
from ksi.storage.cache import Cache, as_json

TABLES: Final = """
CREATE TABLE files (
    path TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT, signature TEXT NOT NULL,
    file_hash TEXT, size_bytes INTEGER NOT NULL, modified_at REAL NOT NULL,
    id TEXT, name TEXT, component_type TEXT, version TEXT, description TEXT, author TEXT,
    extends TEXT, loading_strategy TEXT, metadata TEXT
) WITHOUT ROWID;
CREATE INDEX files_by_id ON files(id);
CREATE INDEX files_by_name ON files(name);
CREATE INDEX files_by_state ON files(state, path);
CREATE TABLE facets (
    key TEXT NOT NULL, value TEXT NOT NULL, path TEXT NOT NULL, PRIMARY KEY (key, value, path)
) WITHOUT ROWID;
CREATE INDEX facets_by_path ON facets(path);
"""
FORM: Final = 1  # Of these tables, and of what is made of a file.
_COLUMNS: Final = (
    "id", "name", "component_type", "version", "description", "author", "extends",
    "loading_strategy", "path", "file_hash", "size_bytes", "modified_at", "metadata",
)  # fmt: skip
_SELECT: Final = f"SELECT {', '.join('f.' + column for column in _COLUMNS)} FROM files f WHERE "


class Known(NamedTuple):
    """What is known of a file: what tells its states apart, and the hash of its content."""

    signature: str
    file_hash: str | None


class Composition(NamedTuple):
    """What a file says of itself. `facets`: what it can be found by, key and value."""

    name: str
    component_type: str
    version: str | None
    description: str | None
    author: str | None
    extends: str | None
    loading_strategy: str | None
    metadata: str
    facets: frozenset[tuple[str, str]]


class CompositionsWriter(Cache):
    """Writes the cache of compositions."""

    def known(self, path: str) -> Known | None:
        """Return what is known of a file."""
        sql = "SELECT signature, file_hash FROM files WHERE path = ?"
        row = self._database.execute(sql, (path,)).fetchone()
        return None if row is None else Known(*row)

    def paths(self) -> list[str]:
        """Return all files that are known."""
        return [path for (path,) in self._database.execute("SELECT path FROM files")]

    def put(
        self,
        path: str,
        known: Known,
        stat: tuple[int, float],
        found: Composition | str,
        *,
        excluded: bool = False,
    ) -> None:
        """Take up a file: a composition, or why it is none. `stat`: its size and last change."""
        self._database.execute("BEGIN")
        self._drop(path)
        values: tuple[Any, ...]
        if isinstance(found, str):
            state = "excluded" if excluded else "rejected"
            values = (path, state, found, *known, *stat, *(None,) * 9)
        else:
            *fields, facets = found
            values = (path, "indexed", None, *known, *stat, path.rpartition(".")[0], *fields)
            self._database.executemany(
                "INSERT INTO facets VALUES (?,?,?)", [(*facet, path) for facet in facets]
            )
        marks = ",".join("?" * len(values))
        self._database.execute(f"INSERT INTO files VALUES ({marks})", values)
        self._database.execute("COMMIT")
        self._unsettled += 1

    def touch(self, path: str, known: Known, modified_at: float) -> None:
        """Note that a file was written again with the content it had."""
        sql = "UPDATE files SET signature = ?, modified_at = ? WHERE path = ?"
        self._database.execute(sql, (known.signature, modified_at, path))
        self._unsettled += 1

    def forget(self, path: str) -> None:
        """Forget a file that is gone."""
        self._database.execute("BEGIN")
        self._drop(path)
        self._database.execute("COMMIT")
        self._unsettled += 1

    def _drop(self, path: str) -> None:
        self._database.execute("DELETE FROM facets WHERE path = ?", (path,))
        self._database.execute("DELETE FROM files WHERE path = ?", (path,))


class CompositionsReader:
    """Reads the cache of compositions, while it is written or without its writer.

    Everything raises `Corrupt` where it is damaged, and `Busy` where it takes too long.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(
        self,
        *,
        component_type: str | None = None,
        name: str | None = None,
        facets: Mapping[str, list[list[str]]] | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> list[dict[str, Any]]:
        """Return compositions in the order of their paths.

        Args:
            name: what their id or name holds, in whatever case.
            facets: by key, values of which each group must have one.
            after: the path of the last one of the page before.
        """
        conditions, parameters = ["f.state = 'indexed'"], []
        if component_type is not None:
            conditions.append("f.component_type = ?")
            parameters.append(component_type)
        if name is not None:
            conditions.append("(f.id LIKE ? ESCAPE '\\' OR f.name LIKE ? ESCAPE '\\')")
            parameters += 2 * [f"%{_escaped(name)}%"]
        for key, groups in (facets or {}).items():
            for group in groups:
                marks = ",".join("?" * len(group))
                conditions.append(
                    f"f.path IN (SELECT path FROM facets WHERE key = ? AND value IN ({marks}))"
                )
                parameters += [key, *group]
        if after is not None:
            conditions.append("f.path > ?")
            parameters.append(after)
        sql = f"{_SELECT}{' AND '.join(conditions)} ORDER BY f.path LIMIT ?"
        return self._rows(sql, [*parameters, str(limit)])

    def named(self, name: str, component_type: str | None) -> list[dict[str, Any]]:
        """Return what a name may mean: a path, an id, the end of an id, or the name itself."""
        for condition, value in (
            ("f.path = ?", name),
            ("f.id = ?", name),
            ("f.id = ?", f"components/{name}"),
            ("f.name = ?", name),
            ("f.id LIKE ? ESCAPE '\\'", f"%/{_escaped(name)}"),
        ):
            sql = f"{_SELECT}f.state = 'indexed' AND {condition} AND ? IN ('', f.component_type)"
            found = self._rows(f"{sql} ORDER BY f.path", [value, component_type or ""])
            if found:
                return found
        return []

    def problems(self, *, state: str | None, after: str | None, limit: int) -> list[dict[str, Any]]:
        """Return files that are no compositions in the order of their paths, with the reason."""
        sql = (
            "SELECT path, state, reason FROM files WHERE state IN (?, ?) AND path > ?"
            " ORDER BY path LIMIT ?"
        )
        states = (state, state) if state is not None else ("rejected", "excluded")
        rows = self._ask(sql, (*states, after or "", limit))
        return [{"file_path": path, "state": what, "reason": why} for path, what, why in rows]

    def counts(self) -> dict[str, Any]:
        """Return how many files there are by state, and how many compositions by type."""
        states = self._ask("SELECT state, count(*) FROM files GROUP BY state")
        types = self._ask(
            "SELECT component_type, count(*) FROM files WHERE state = 'indexed'"
            " GROUP BY component_type ORDER BY component_type"
        )
        return {**dict.fromkeys(("indexed", "rejected", "excluded"), 0), **dict(states)} | {
            "types": dict(types)
        }

    def made_of(self) -> str | None:
        """Return what it was made of; None if there is no cache yet."""
        rows = self._ask("SELECT made_of, rebuilt FROM about")
        return rows[0][0] if rows else None

    def rebuilt(self) -> int:
        """Return the number of the last order to rebuild that it is the result of."""
        rows = self._ask("SELECT rebuilt FROM about")
        return rows[0][0] if rows else 0

    def dump(self) -> Iterator[str]:
        """Yield everything in one fixed order, for comparison; not what the disk says of files."""
        columns = "path, state, reason, file_hash, id, name, component_type, metadata"
        yield from map(repr, self._ask(f"SELECT {columns} FROM files ORDER BY path"))
        yield from map(repr, self._ask("SELECT * FROM facets ORDER BY path, key, value"))

    def _rows(self, sql: str, parameters: list[str]) -> list[dict[str, Any]]:
        return [dict(zip(_COLUMNS, row, strict=True)) for row in self._ask(sql, parameters)]

    def _ask(self, sql: str, parameters: Any = ()) -> list[Any]:
        return sqlite.ask(
            self._path, sql, parameters, of="cache of compositions", look="compositions status"
        )


def facets_of(metadata: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return what a composition can be found by.

    Each value under its dotted key, those of a list one by one; what stands under `metadata` under
    its own key, too, since some files keep it there.
    """
    found = set(_leaves("", metadata))
    inner = metadata.get("metadata")
    if isinstance(inner, Mapping):
        found |= set(_leaves("", inner))
    return frozenset(found)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(f"{key}.{name}" if key else str(name), each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(key, each)
    else:
        yield key, as_json(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
