"""Stores that a restore has replaced, and views that recovery has set aside: when they go.

Both are kept for people: nothing reads them any more. What they were is gone for good when they go,
so each stays until it has not been used for a while, and a former store also as long as there is a
checkpoint of it: until then it may become the present one's history again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from ksi.storage.atomic import sync_directory
from ksi.storage.store import read_current


def drop_former(directory: Path, kept: Collection[str], unused_s: float) -> list[str]:
    """Remove what is left behind in an owner's directory and was not used for `unused_s`.

    Never the store in use, nor those that are `kept`. Readers of a former store have been told.

    Returns:
        The names of what was removed.

    Raises:
        Corrupt: it is not known which store is in use.
    """
    current = read_current(directory)
    if current is None:
        return []
    gone = [path for path in _left_behind(directory, current, kept) if _unused_s(path) >= unused_s]
    for path in gone:
        hidden = path.with_name(f".gone-{path.name}")
        os.rename(path, hidden)
        sync_directory(path.parent)
        shutil.rmtree(hidden, ignore_errors=True)
    return [path.name for path in gone]


def _left_behind(directory: Path, current: str, kept: Collection[str]) -> Iterator[Path]:
    for state in directory.glob("*/STATE"):
        store = state.parent
        if store.name.isalnum() and store.name != current and store.name not in kept:
            yield store
    yield from (directory / current).glob("view.untrusted-*")


def _unused_s(path: Path) -> float:
    """Return for how many seconds nothing has been written to it."""
    written_at = path.stat().st_mtime
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            written_at = max(written_at, file.lstat().st_mtime)
    return time.time() - written_at
