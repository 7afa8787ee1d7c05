"""A store with the least that storage tests need: entries by key, their totals, and their log.

Each record adds one entry to a key. So in every committed state the totals, the entries, the
sequence number and the logs say the same, and `check` can tell a wrong state from any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ksi.storage.journal import Batch
from ksi.storage.store import Store
from ksi.storage.tables import TableSpec


class Total(msgspec.Struct, array_like=True, frozen=True):
    entries: int
    log_bytes: int


class Added(msgspec.Struct, array_like=True, frozen=True):
    key: str
    number: int
    offset: int
    text: str


SPECS: Mapping[str, TableSpec] = {
    "totals": TableSpec(Total, (str,), cache_rows=4),
    "entries": TableSpec(Added, (str, int), cache_rows=4),
}
_decode = msgspec.msgpack.Decoder(list[Added]).decode

State = dict[str, list[str]]


def apply(tables: Mapping[str, Any], added: Added) -> None:
    tables["entries"].put((added.key, added.number), added)
    log_bytes = added.offset + len(added.text.encode())
    tables["totals"].put(added.key, Total(added.number, log_bytes))


def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
    records = _decode(batch.payload)
    assert len(records) == batch.records
    for added in records:
        apply(store.tables, added)
    return float(batch.first_seq + batch.records - 1), b"replayed"


def open_store(directory: Path, **more: Any) -> Store:
    return Store.open(directory, SPECS, replay=replay, **more)


def add(store: Store, *keys: str) -> None:
    """Commit one batch with an entry for each key."""
    store.begin()
    records: list[Added] = []
    for key in keys:
        total = store.tables["totals"].get(key) or Total(0, 0)
        text = f"{key} {total.entries + 1} {'.' * (len(records) % 7)}\n"
        records.append(Added(key, total.entries + 1, total.log_bytes, text))
        apply(store.tables, records[-1])
    time_s = float(store.meta.seq + len(records))
    store.commit(msgspec.msgpack.encode(records), len(records), b"live", time_s)


def lines_of(batch: Batch) -> Iterator[tuple[str, int, bytes]]:
    for added in _decode(batch.payload):
        yield added.key, added.offset, added.text.encode()


def check(tables: Mapping[str, Any], seq: int) -> State:
    """Return the entries by key; fails unless all tables agree on one state of `seq` records."""
    state: State = {}
    for (key, number), added in tables["entries"].range():
        texts = state.setdefault(key, [])
        texts.append(added.text)
        assert (added.key, added.number) == (key, number)
        assert number == len(texts), f"{key}: {number} follows {len(texts) - 1}"
    totals = {key: (row.entries, row.log_bytes) for key, row in tables["totals"].range()}
    assert totals == {key: (len(each), len("".join(each))) for key, each in state.items()}
    assert sum(map(len, state.values())) == seq == tables["entries"].count()
    return state


def state_of(store: Store) -> State:
    """Return what the store holds."""
    store.begin()
    try:
        return check(store.tables, store.meta.seq)
    finally:
        store.abort()


def leave(store: Store) -> None:
    """Let go of a store as the death of its process does: no sync, no clean mark."""
    store.abort()
    store.journal._end_prewriting()  # The thread ends with its process; the zeros stay.
    store._closing.close()


def content(directory: Path, *, but: Iterable[str] = ()) -> dict[str, bytes]:
    """Return every file below `directory` by its name, but those with one of these names."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in but
    }
