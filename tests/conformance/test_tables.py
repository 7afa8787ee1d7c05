"""The kit that every kind of table passes: on disk as the writer sees it, read, and in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol
from zlib import crc32

import lmdb
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksi.storage import environment
from ksi.storage.errors import Corrupt
from ksi.storage.tables import Instant, LmdbTable, MemoryTable, ReadTable, RowCodec, TableSpec
from ksi.transport.limits import KEY_BYTES_MAX


class Item(msgspec.Struct, array_like=True, frozen=True):
    name: str
    size: int
    parts: tuple[str, ...] = ()


class ItemOfNext(msgspec.Struct, array_like=True, frozen=True):
    name: str
    size: int
    parts: tuple[str, ...] = ()
    added_later: int = 7


class Kit(Protocol):
    """A table to write, one to read, and `settle`, after which the reader sees what is written."""

    writer: Any
    reader: Any

    def settle(self) -> None: ...
    def undo(self) -> bool: ...
    def close(self) -> None: ...


class InMemory:
    def __init__(self, spec: TableSpec, _environment: Any) -> None:
        self.writer: Any = MemoryTable[Any]("t", spec)
        self.reader: Any = self.writer

    def settle(self) -> None:
        pass

    def undo(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Written:
    """The writer's table; batches end at `settle`."""

    def __init__(self, spec: TableSpec, opened: environment.Environment) -> None:
        self._lmdb = opened.lmdb
        with opened.lmdb.begin(write=True) as txn:
            txn.drop(opened.database("t"), delete=False)
        self.writer: Any = LmdbTable[Any]("t", spec, opened.database("t"))
        self.reader: Any = self.writer
        self._begin()

    def _begin(self) -> None:
        self._txn = self._lmdb.begin(write=True)
        self.writer.begin(self._txn)

    def settle(self) -> None:
        self.writer.flush()
        self._txn.commit()
        self.writer.end()
        self._begin()

    def undo(self) -> bool:
        self._txn.abort()
        self.writer.forget()
        self._begin()
        return True

    def close(self) -> None:
        self._txn.abort()


class Read(Written):
    """What a read transaction sees after each batch."""

    def __init__(self, spec: TableSpec, opened: environment.Environment) -> None:
        super().__init__(spec, opened)
        self._instant = Instant()
        self._instant.txn = self._lmdb.begin()
        self.reader = ReadTable[Any]("t", spec, opened.database("t"), self._instant)

    def settle(self) -> None:
        super().settle()
        self._instant.txn.abort()
        self._instant.txn = self._lmdb.begin()

    def close(self) -> None:
        super().close()
        self._instant.txn.abort()


KITS = (InMemory, Written, Read)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[environment.Environment]:
    opened = environment.open_writer(tmp_path_factory.mktemp("lmdb") / "view", create=True)
    opened.open_databases(["t"])
    yield opened
    opened.close()


@pytest.fixture
def make(
    request: pytest.FixtureRequest, opened: environment.Environment
) -> Iterator[Callable[[TableSpec], Kit]]:
    made: list[Kit] = []

    def make(spec: TableSpec) -> Kit:
        while made:
            made.pop().close()
        made.append(request.param(spec, opened))
        return made[0]

    yield make
    while made:
        made.pop().close()


every_kit = pytest.mark.parametrize("make", KITS, indirect=True, ids=lambda kit: kit.__name__)

letters = st.text(alphabet="ab\x01~é中\U0001f600", max_size=3)
numbers = st.sampled_from([0, 1, 2, 255, 256, 2**32, 2**64 - 1])
SHAPES: dict[tuple[type, ...], st.SearchStrategy[Any]] = {
    (str,): letters.filter(bool),
    (): letters.filter(bool),
    (int,): st.tuples(numbers),
    (str, int): st.tuples(letters, numbers),
    (int, str): st.tuples(numbers, letters),
    (str, str, str): st.tuples(letters, letters, letters),
}
rows = st.builds(Item, letters, st.integers(-5, 5), st.lists(letters, max_size=2).map(tuple))


def bounds(shape: tuple[type, ...]) -> st.SearchStrategy[Any]:
    """Return keys and beginnings of keys."""
    if shape in ((), (str,)):
        return letters
    return SHAPES[shape].flatmap(
        lambda key: st.integers(0, len(key)).map(lambda count: key[:count])
    )


def steps(shape: tuple[type, ...]) -> st.SearchStrategy[Any]:
    key = SHAPES[shape]
    return st.lists(
        st.one_of(
            st.tuples(st.just("put"), key, rows),
            st.tuples(st.just("delete"), key),
            st.tuples(st.just("get"), key),
            st.tuples(st.just("settle")),
            st.tuples(st.just("undo")),
            st.tuples(
                st.just("range"),
                st.just(()) | bounds(shape),
                st.none() | bounds(shape),
                st.just(()) | bounds(shape),
                st.booleans(),
            ),
        ),
        max_size=20,
    )


def expected_range(
    model: dict[Any, Item], start: Any, stop: Any, prefix: Any, reverse: bool
) -> list[tuple[Any, Item]]:
    found = [
        (key, row)
        for key, row in sorted(model.items())
        if (not start or key >= start)
        and (stop is None or key < stop)
        and (not prefix or key[: len(prefix)] == prefix)
    ]
    return found[::-1] if reverse else found


@every_kit
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: "-".join(kind.__name__ for kind in shape)
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_table_behaves_like_a_sorted_dict(
    make: Callable[[TableSpec], Kit], shape: tuple[type, ...], data: st.DataObject
) -> None:
    kit = make(TableSpec(Item, shape, cache_rows=2))
    model: dict[Any, Item] = {}
    settled: dict[Any, Item] = {}
    sees_batch = kit.reader is kit.writer

    for key, row in data.draw(st.dictionaries(SHAPES[shape], rows, max_size=12)).items():
        kit.writer.put(key, row)
        model[key] = row
    for step in data.draw(steps(shape)):
        seen = model if sees_batch else settled
        match step:
            case ("put", key, row):
                kit.writer.put(key, row)
                model[key] = row
            case ("delete", key):
                kit.writer.delete(key)
                model.pop(key, None)
            case ("get", key):
                assert kit.reader.get(key) == seen.get(key)
            case ("settle",):
                kit.settle()
                settled = model.copy()
            case ("undo",):
                if kit.undo():
                    model = settled.copy()
            case ("range", start, stop, prefix, reverse):
                found = kit.reader.range(start, stop, prefix=prefix, reverse=reverse)
                assert list(found) == expected_range(seen, start, stop, prefix, reverse)
                assert kit.reader.count() == len(seen)

    kit.settle()
    assert list(kit.reader.range()) == sorted(model.items())
    assert kit.reader.count() == len(model)
    assert all(kit.reader.get(key) == row for key, row in model.items())


@every_kit
def test_a_row_put_in_a_batch_is_seen_in_it(make: Callable[[TableSpec], Kit]) -> None:
    kit = make(TableSpec(Item))
    kit.writer.put("a", Item("one", 1))
    kit.writer.put("a", Item("two", 2))
    kit.writer.put("b", Item("gone", 0))
    kit.writer.delete("b")

    assert kit.writer.get("a") == Item("two", 2)
    assert kit.writer.get("b") is None
    assert list(kit.writer.range()) == [("a", Item("two", 2))]
    assert kit.writer.count() == 1


@every_kit
def test_a_row_that_is_deleted_is_gone_whatever_was_read_since_it_was_put(
    make: Callable[[TableSpec], Kit],
) -> None:
    kit = make(TableSpec(Item, cache_rows=2))
    for reads in range(8):
        for name in "abcdef":
            kit.writer.put(name, Item(name, reads))
        kit.settle()
        for name in ("a" + "bcdefbcd")[:reads]:
            kit.writer.get(name)
        kit.writer.delete("a")
        assert kit.writer.get("a") is None
        kit.settle()
        assert kit.reader.get("a") is None


@every_kit
def test_a_range_ends_where_it_should_in_both_directions(make: Callable[[TableSpec], Kit]) -> None:
    kit = make(TableSpec(Item, (str, int)))
    keys = [(name, number) for name in ("a", "ab", "b") for number in range(3)]
    for key in reversed(keys):
        kit.writer.put(key, Item("x", 1))
    kit.settle()

    def found(*bounds: Any, **more: Any) -> list[Any]:
        forward = [key for key, _ in kit.reader.range(*bounds, **more)]
        backward = [key for key, _ in kit.reader.range(*bounds, **more, reverse=True)]
        assert forward == backward[::-1]
        return forward

    assert found() == keys
    assert found(("a", 1), ("b", 1)) == keys[1:7]
    assert found(("a", 9), ("b",)) == keys[3:6]
    assert found(("ab",)) == keys[3:]
    assert found(prefix=("a",)) == keys[:3]
    assert found(("a", 1), prefix=("a",)) == keys[1:3]
    assert found((), ("ab", 1), prefix=("ab",)) == keys[3:4]
    assert found(prefix=("ab", 2)) == keys[5:6]
    assert found(("c",)) == found((), ("a",)) == found(prefix=("aa",)) == []


@every_kit
def test_rows_may_be_plain_bytes(make: Callable[[TableSpec], Kit]) -> None:
    kit = make(TableSpec(bytes, (int, str)))
    kit.writer.put((3, "x"), b"\x00\xff")
    kit.writer.put((3, "y"), b"")
    kit.settle()

    assert list(kit.reader.range(prefix=(3,))) == [((3, "x"), b"\x00\xff"), ((3, "y"), b"")]


@every_kit
@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((str,), ""),
        ((str,), "a\0b"),
        ((str,), "k" * (KEY_BYTES_MAX + 1)),
        ((str,), "\ud800"),
        ((str, int), ("a\0b", 1)),
        ((str, int), ("k" * KEY_BYTES_MAX, 1)),
    ],
)
def test_a_key_that_cannot_be_stored_is_refused_when_it_is_put(
    make: Callable[[TableSpec], Kit], shape: tuple[type, ...], key: Any
) -> None:
    kit = make(TableSpec(Item, shape))

    with pytest.raises(ValueError):  # noqa: PT011 - each says it in its own words
        kit.writer.put(key, Item("x", 1))
    kit.settle()

    assert kit.reader.count() == 0


@every_kit
@pytest.mark.parametrize("key", [("a", 1, 2), ("a",), "a"])
def test_a_key_of_another_shape_is_refused(make: Callable[[TableSpec], Kit], key: Any) -> None:
    kit = make(TableSpec(Item, (str, int)))
    with pytest.raises(TypeError):
        kit.writer.put(key, Item("x", 1))


@every_kit
def test_the_longest_key_can_be_stored_and_a_longer_one_is_not_found(
    make: Callable[[TableSpec], Kit],
) -> None:
    kit = make(TableSpec(Item))
    kit.writer.put("k" * KEY_BYTES_MAX, Item("x", 1))
    kit.settle()

    assert kit.reader.get("k" * KEY_BYTES_MAX) == Item("x", 1)
    assert kit.reader.get("k" * (KEY_BYTES_MAX + 1)) is None
    assert kit.reader.get("") is None


@every_kit
@pytest.mark.parametrize("row", [Item("\ud800", 1), Item("x", 2**64)])
def test_a_row_that_cannot_be_encoded_is_refused_before_the_batch_ends(
    make: Callable[[TableSpec], Kit], row: Item
) -> None:
    kit = make(TableSpec(Item))

    def put_and_end() -> None:
        kit.writer.put("a", row)
        kit.settle()

    with pytest.raises((ValueError, OverflowError)):
        put_and_end()
    kit.undo()


@every_kit
def test_bytes_of_a_row_are_read_by_a_later_type_with_another_field(
    make: Callable[[TableSpec], Kit], opened: environment.Environment
) -> None:
    kit = make(TableSpec(Item))
    if isinstance(kit, InMemory):
        return
    kit.writer.put("a", Item("x", 1))
    kit.settle()

    later = LmdbTable[Any]("t", TableSpec(ItemOfNext), opened.database("t"))
    assert isinstance(kit, Written)
    later.begin(kit._txn)

    assert later.get("a") == ItemOfNext("x", 1, (), 7)


def test_a_read_table_cannot_be_written(opened: environment.Environment) -> None:
    table = ReadTable[Any]("t", TableSpec(Item), opened.database("t"), Instant())
    with pytest.raises(TypeError, match="its owner writes it"):
        table.put("a", Item("x", 1))
    with pytest.raises(TypeError, match="its owner writes it"):
        table.delete("a")


def damaged_row(
    opened: environment.Environment, change: Callable[[lmdb.Transaction[bytes], Any], None]
) -> Read:
    kit = Read(TableSpec(Item), opened)
    kit.writer.put("key-1", Item("row", 1))
    kit.settle()
    kit.writer.flush()
    change(kit._txn, opened.database("t"))
    kit.settle()
    kit.undo()
    return kit


@pytest.mark.parametrize("bit", range(0, 8 * 11, 3))
def test_a_flipped_bit_in_a_row_is_reported_and_not_served(
    opened: environment.Environment, bit: int
) -> None:
    def flip(txn: lmdb.Transaction[bytes], database: Any) -> None:
        value = bytearray(txn.get(b"key-1", b"", database))
        value[bit // 8 % len(value)] ^= 1 << bit % 8
        txn.put(b"key-1", bytes(value), db=database)

    kit = damaged_row(opened, flip)
    try:
        for table in (kit.reader, kit.writer):
            with pytest.raises(Corrupt, match=r"table t .*key-1") as caught:
                table.get("key-1")
            assert caught.value.details["table"] == "t"
            with pytest.raises(Corrupt):
                list(table.range())
    finally:
        kit.close()


def test_a_row_under_a_damaged_key_is_reported(opened: environment.Environment) -> None:
    def move(txn: lmdb.Transaction[bytes], database: Any) -> None:
        txn.put(b"key-3", txn.pop(b"key-1", db=database) or b"", db=database)

    kit = damaged_row(opened, move)
    try:
        with pytest.raises(Corrupt, match="key-3"):
            kit.reader.get("key-3")
    finally:
        kit.close()


def test_a_row_of_another_table_is_reported(opened: environment.Environment) -> None:
    codec = RowCodec[Item]("u", Item)

    def put(txn: lmdb.Transaction[bytes], database: Any) -> None:
        txn.put(b"key-1", codec.encode(b"key-1", Item("row", 1)), db=database)

    kit = damaged_row(opened, put)
    try:
        for table in (kit.reader, kit.writer):
            with pytest.raises(Corrupt, match=r"table t .*key-1"):
                table.get("key-1")
    finally:
        kit.close()


def test_a_row_of_format_1_is_read(opened: environment.Environment) -> None:
    packed = msgspec.msgpack.encode(Item("row", 1))
    value = packed + crc32(packed, crc32(b"key-1")).to_bytes(4, "little")

    def put(txn: lmdb.Transaction[bytes], database: Any) -> None:
        txn.put(b"key-1", value, db=database)

    kit = damaged_row(opened, put)
    try:
        assert kit.reader.get("key-1") == kit.writer.get("key-1") == Item("row", 1)
    finally:
        kit.close()


def test_the_cache_keeps_within_its_bound(opened: environment.Environment) -> None:
    kit = Written(TableSpec(Item, cache_rows=10), opened)
    for number in range(200):
        kit.writer.put(f"k{number}", Item("x", number))
    kit.settle()
    for number in range(200):
        assert kit.writer.get(f"k{number}") == Item("x", number)

    assert len(kit.writer._rows) + len(kit.writer._older) <= 20
    kit.close()
