"""A database of a cache is replaced whole: whoever reads it finds the former or the new one."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path

from crashing import killed_at_each_step

from ksi.storage import sqlite

ROWS = 30


def made(path: Path, rows: int) -> sqlite3.Connection:
    """Create a database with so many rows, those in its log alone, and return its writer."""
    sqlite.create(path, "CREATE TABLE t (n INTEGER)")
    writer = sqlite.connect(path)
    writer.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(rows)])
    return writer


def count(path: Path) -> int:
    return int(sqlite.read(path, "SELECT count(*) FROM t", ())[0][0])


def test_whoever_reads_while_a_database_is_replaced_finds_all_of_the_former_or_of_the_new_one(
    tmp_path: Path,
) -> None:
    path, new = tmp_path / "there.db", tmp_path / "new.db"
    seen = set()

    def put_back() -> sqlite3.Connection:
        for each in (path, new):
            sqlite.remove(each)
        made(new, ROWS + 1).close()
        writer = made(path, ROWS)
        reader = sqlite3.connect(path)  # So the log stays when the writer goes.
        reader.execute("SELECT count(*) FROM t").fetchall()
        writer.close()
        assert path.with_name("there.db-wal").stat().st_size > 0
        return reader

    reader = put_back()
    for _ in killed_at_each_step(partial(sqlite.replace, new, path), runs=50):
        seen.add(count(path))  # Before the reader goes, who may move the log into the file.
        reader.close()
        reader = put_back()
    reader.close()
    assert seen == {ROWS, ROWS + 1}


def test_where_a_database_was_deleted_and_its_log_left_nobody_finds_an_empty_one(
    tmp_path: Path,
) -> None:
    path, new = tmp_path / "there.db", tmp_path / "new.db"
    left = tmp_path / "there.db-wal"

    def put_back() -> None:
        for each in (path, new):
            sqlite.remove(each)
        made(new, ROWS + 1).close()
        writer = made(path, ROWS)
        log = left.read_bytes()
        writer.close()
        sqlite.remove(path)
        left.write_bytes(log)

    put_back()
    for _ in killed_at_each_step(partial(sqlite.replace, new, path), runs=50):
        assert not path.exists() or count(path) == ROWS + 1
        put_back()
