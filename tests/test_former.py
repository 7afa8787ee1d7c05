"""What restores and recoveries leave behind stays until it is of no use, and then goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from small_store import add, leave, open_store, state_of

from ksi.storage.errors import Corrupt
from ksi.storage.former import drop_former
from ksi.storage.store import restore


@pytest.fixture
def replaced(tmp_path: Path) -> tuple[Path, str]:
    """Return an owner's directory after a restore, and the id of the store before it."""
    directory = tmp_path / "owner"
    store = open_store(directory)
    add(store, "a", "b")
    store.snapshot(tmp_path / "snapshot")
    former = store.id
    store.close()
    restore(directory, tmp_path / "snapshot")
    return directory, former


def age(path: Path, seconds: float) -> None:
    """Make everything below a path look as if it was written so long ago."""
    then = time.time() - seconds
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


def test_a_former_store_goes_when_it_is_old_and_no_checkpoint_is_of_it(
    replaced: tuple[Path, str],
) -> None:
    directory, former = replaced
    assert drop_former(directory, (), 3600.0) == []
    age(directory, 7200.0)
    assert drop_former(directory, {former}, 3600.0) == []
    assert (directory / former / "view" / "data.mdb").exists()
    assert drop_former(directory, (), 3600.0) == [former]
    store = open_store(directory)
    assert state_of(store) == {"a": ["a 1 \n"], "b": ["b 1 .\n"]}
    store.close()
    assert sum(path.is_dir() for path in directory.iterdir()) == 1


def test_nothing_goes_where_it_is_not_known_which_store_is_in_use(
    replaced: tuple[Path, str],
) -> None:
    directory, _former = replaced
    age(directory, 7200.0)
    current = directory / "CURRENT"
    content = current.read_text()
    current.unlink()
    assert drop_former(directory, (), 0.0) == []
    current.write_text(content[::-1].strip() + "\n")
    with pytest.raises(Corrupt):
        drop_former(directory, (), 0.0)
    current.write_text(content)
    assert len(drop_former(directory, (), 0.0)) == 1


def test_a_view_that_was_set_aside_goes_when_it_is_old(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner", boot_id="one")
    add(store, "a")
    leave(store)
    store = open_store(tmp_path / "owner", boot_id="two")
    assert drop_former(tmp_path / "owner", (), 3600.0) == []
    age(store.directory / "view.untrusted-1", 7200.0)
    assert drop_former(tmp_path / "owner", (), 3600.0) == ["view.untrusted-1"]
    assert state_of(store) == {"a": ["a 1 \n"]}
    store.close()
