"""Snapshots: whole or absent, of one committed state, and checked before they are used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashing import killed_at_each_step
from small_store import SPECS, State, add, check, content, leave, open_store, state_of

from ksi.storage.environment import open_copy
from ksi.storage.errors import Corrupt
from ksi.storage.snapshots import check_rows, install, newest_good, read_manifest
from ksi.storage.store import Store
from ksi.storage.tables import Instant, ReadTable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "owner")
    for keys in ("ab", "cab", "a"):
        add(store, *keys)
    yield store
    store.close()


def state_in(snapshot: Path) -> State:
    """Return what a snapshot holds."""
    environment = open_copy(snapshot)
    instant = Instant()
    tables = {
        name: ReadTable[object](name, spec, environment.open_db(name.encode()), instant)
        for name, spec in SPECS.items()
    }
    with environment.begin() as instant.txn:
        state = check(tables, read_manifest(snapshot).seq)
    environment.close()
    return state


def test_a_snapshot_holds_the_committed_state_and_says_so(tmp_path: Path, store: Store) -> None:
    manifest = store.snapshot(tmp_path / "snapshot")

    assert state_in(tmp_path / "snapshot") == state_of(store)
    assert manifest == read_manifest(tmp_path / "snapshot")
    assert (manifest.store, manifest.seq, manifest.position) == (store.id, 6, store.journal.end)
    assert manifest.rows == {"totals": 3, "entries": 6, "ksi.meta": 1}
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "snapshot").iterdir()}
    assert files == {"data.mdb": 0o600, "manifest.json": 0o600}


def test_a_frozen_state_stays_as_it_was_while_commits_go_on(tmp_path: Path, store: Store) -> None:
    before = state_of(store)
    frozen = store.freeze()
    for _ in range(50):
        add(store, "a", "z")

    manifest = frozen.save(tmp_path / "snapshot")

    assert manifest.seq == 6
    assert state_in(tmp_path / "snapshot") == before
    assert len(state_of(store)["z"]) == 50


def test_a_batch_that_is_open_is_not_in_a_snapshot(tmp_path: Path, store: Store) -> None:
    store.begin()
    store.tables["totals"].delete("a")
    store.tables["totals"].flush()
    store.snapshot(tmp_path / "snapshot")
    store.abort()

    assert state_in(tmp_path / "snapshot") == state_of(store)


def test_a_snapshot_killed_at_any_step_is_whole_or_not_there(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    store = open_store(owner)
    add(store, "a", "b")
    state = state_of(store)
    leave(store)
    found = set()

    def act() -> None:
        open_store(owner).snapshot(tmp_path / "snapshot")

    for _ in killed_at_each_step(act, runs=40):
        there = (tmp_path / "snapshot").exists()
        found.add(there)
        if there:
            assert state_in(tmp_path / "snapshot") == state
            shutil.rmtree(tmp_path / "snapshot")
    assert found == {True, False}


def test_after_a_killed_one_the_next_snapshot_is_made(tmp_path: Path, store: Store) -> None:
    (tmp_path / ".snapshot.tmp").mkdir()
    (tmp_path / ".snapshot.tmp" / "data.mdb").write_bytes(b"half of it")

    store.snapshot(tmp_path / "snapshot")

    assert state_in(tmp_path / "snapshot") == state_of(store)
    assert not (tmp_path / ".snapshot.tmp").exists()


def test_a_damaged_row_makes_no_snapshot(tmp_path: Path, store: Store) -> None:
    store.begin()
    assert store._txn is not None
    database = store._lmdb.open_db(b"entries", txn=store._txn)
    key, value = next(iter(store._txn.cursor(database)))
    store._txn.put(key, value[:-1] + bytes([value[-1] ^ 1]), db=database)
    store.commit_view()

    with pytest.raises(Corrupt, match="table entries"):
        store.snapshot(tmp_path / "snapshot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owner"]


def test_a_snapshot_is_not_made_over_another(tmp_path: Path, store: Store) -> None:
    store.snapshot(tmp_path / "snapshot")
    before = content(tmp_path / "snapshot")
    add(store, "a")
    with pytest.raises(OSError, match="not empty"):
        store.snapshot(tmp_path / "snapshot")

    assert content(tmp_path / "snapshot") == before
    assert not (tmp_path / ".snapshot.tmp").exists()


def test_any_damage_to_a_snapshot_is_found_before_it_is_installed(
    tmp_path: Path, store: Store
) -> None:
    store.snapshot(tmp_path / "snapshot")
    data = tmp_path / "snapshot" / "data.mdb"
    whole = data.read_bytes()
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(60):
        damaged = bytearray(whole)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        data.write_bytes(damaged)

        with pytest.raises(Corrupt, match="does not match the manifest"):
            install(tmp_path / "snapshot", tmp_path / "view")
        assert not (tmp_path / "view").exists()
        assert newest_good([tmp_path / "snapshot"], store.id, lambda *_: True) is None

    data.write_bytes(whole)
    install(tmp_path / "snapshot", tmp_path / "view")
    assert (tmp_path / "view" / "data.mdb").read_bytes() == whole
    assert check_rows(tmp_path / "view")["entries"] == 6


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1}', "\x00"])
def test_a_manifest_that_cannot_be_read_is_no_snapshot(
    tmp_path: Path, store: Store, text: str
) -> None:
    store.snapshot(tmp_path / "snapshot")
    (tmp_path / "snapshot" / "manifest.json").write_text(text)

    with pytest.raises(Corrupt):
        read_manifest(tmp_path / "snapshot")
    assert newest_good([tmp_path / "snapshot"], store.id, lambda *_: True) is None


def test_a_manifest_of_another_format_is_refused(tmp_path: Path, store: Store) -> None:
    store.snapshot(tmp_path / "snapshot")
    path = tmp_path / "snapshot" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))

    with pytest.raises(Corrupt, match="of format 2"):
        read_manifest(tmp_path / "snapshot")


def test_the_newest_snapshot_of_the_store_that_the_journal_goes_on_from_is_chosen(
    tmp_path: Path, store: Store
) -> None:
    other = open_store(tmp_path / "another owner")
    add(other, *"abcdefghijkl")
    paths = [tmp_path / f"snapshot-{number}" for number in range(4)]
    for path in paths[:3]:
        store.snapshot(path)
        add(store, "a")
    other.snapshot(paths[3])
    other.close()
    missing = tmp_path / "missing"

    def chosen(goes_on_before: int) -> Path | None:
        found = newest_good([*paths, missing], store.id, lambda seq, position: seq < goes_on_before)
        return found and found[0]

    assert chosen(100) == paths[2]
    assert chosen(8) == paths[1]
    assert chosen(0) is None
