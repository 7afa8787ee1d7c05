"""Tables: rows by key, in LMDB or in memory, alike to whoever uses them.

A row is an immutable `msgspec.Struct` or plain bytes. On disk it is followed by the CRC-32 of the
name of the table, key and row together, so damage is found when the row is read, not believed; that
includes LMDB's own: one bit in the page number of a table, and it shows the rows of another. The
checksum is stored so that the CRC of all and itself is a constant (`_RESIDUE`): one comparison.

Keys order as tuples do: strings as UTF-8, ended by a NUL where another part follows, integers as
eight bytes big-endian.

The three kinds pass one conformance kit, `tests/conformance/test_tables.py`:
- `LmdbTable`, the writer's. Rows put in a batch stay decoded and are encoded and put once, at its
  end. A bounded cache of decoded rows survives from batch to batch: nobody else writes.
- `ReadTable`, over a read transaction, in any process.
- `MemoryTable`, for tests and simulation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Generic, TypeVar
from zlib import crc32

import lmdb
import msgspec

from ksi.storage.errors import Corrupt
from ksi.transport.limits import CACHE_ROWS, KEY_BYTES_MAX

Row = TypeVar("Row")
Key = str | tuple[str | int, ...]

CRC_BYTES: Final = 4
_RESIDUE: Final = 0x2144DF1C  # crc32(x + crc32(x).to_bytes(4, "little")), whatever x is
_INT_BYTES: Final = 8
_UNKNOWN: Final[Any] = object()  # not in the cache; None is: there is no such row
_pack: Final = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class TableSpec:
    """How a table is declared.

    Attributes:
        row: the type of a row: a frozen, array-like `msgspec.Struct`, or bytes.
        key_types: the types of the parts of a key, `str` or `int`; `(str,)` and `()` mean that a
            key is a plain string.
        cache_rows: how many decoded rows the writer keeps, at the most twice that.
    """

    row: Any
    key_types: tuple[type, ...] = (str,)
    cache_rows: int = CACHE_ROWS


class KeyCodec:
    """Keys of one shape, to bytes that order the same and back.

    Attributes:
        encode: the bytes of a key; ValueError for one that is empty, over `KEY_BYTES_MAX` bytes or
            has a NUL in a string, TypeError or OverflowError for parts of another type.
        seek: as `encode`, for looking up: a plain string is not checked, it is just not found.
        decode: the key of these bytes.
    """

    __slots__ = ("_types", "decode", "encode", "seek")

    def __init__(self, key_types: tuple[type, ...]) -> None:
        assert {str, int}.issuperset(key_types), key_types
        self._types = key_types
        self.encode: Callable[[Any], bytes] = self._encode_tuple
        self.seek: Callable[[Any], bytes] = self._encode_tuple
        self.decode: Callable[[bytes], Any] = self._decode_tuple
        if key_types in ((), (str,)):
            self._types = (str,)
            self.encode = _encode_plain
            self.seek = str.encode
            self.decode = bytes.decode

    def bounds(self, start: Key, stop: Key | None, prefix: Key) -> tuple[bytes, bytes | None]:
        """Return the first bytes of a range and those it ends before; None means no end."""
        low = self._part_of(start)
        high = None if stop is None else self._part_of(stop)
        if prefix:
            floor = self._part_of(prefix)
            whole = type(prefix) is tuple and len(prefix) == len(self._types)
            ceiling = floor + b"\0" if whole else _after(floor)
            low = max(low, floor)
            if high is None or (ceiling is not None and ceiling < high):
                high = ceiling
        return low, high

    def _encode_tuple(self, key: tuple[str | int, ...]) -> bytes:
        if type(key) is not tuple or len(key) != len(self._types):
            raise TypeError(f"a key of {len(self._types)} parts is needed, not {key!r}")
        encoded = self._parts(key)
        if len(encoded) > KEY_BYTES_MAX:
            raise _too_long(encoded)
        return encoded

    def _part_of(self, bound: Key) -> bytes:
        if type(bound) is str:
            return bound.encode()
        assert type(bound) is tuple
        if len(bound) > len(self._types):
            raise TypeError(f"a key has {len(self._types)} parts, not {len(bound)}")
        return self._parts(bound)

    def _parts(self, key: tuple[Any, ...]) -> bytes:
        encoded = b""
        last = len(self._types) - 1
        for position, part in enumerate(key):
            if self._types[position] is int:
                encoded += part.to_bytes(_INT_BYTES, "big")
                continue
            text = part.encode()
            if 0 in text:
                raise ValueError(f"a key may not hold a NUL: {part!r}")
            encoded += text if position == last else text + b"\0"
        return encoded

    def _decode_tuple(self, encoded: bytes) -> tuple[str | int, ...]:
        key: list[str | int] = []
        at = 0
        last = len(self._types) - 1
        for position, kind in enumerate(self._types):
            if kind is int:
                key.append(int.from_bytes(encoded[at : at + _INT_BYTES], "big"))
                at += _INT_BYTES
            elif position == last:
                key.append(encoded[at:].decode())
            else:
                end = encoded.index(0, at)
                key.append(encoded[at:end].decode())
                at = end + 1
        return tuple(key)


@cache
def row_decoder(row: Any) -> Callable[[bytes], Any]:
    """Return what decodes rows of this type. Made once: it takes a tenth of a millisecond."""
    return bytes if row is bytes else msgspec.msgpack.Decoder(row).decode


class RowCodec(Generic[Row]):
    """Rows of one table, to bytes with a checksum and back."""

    __slots__ = ("_pack", "_seed", "table", "unpack")

    def __init__(self, table: str, row: Any) -> None:
        self.table = table
        self._seed = crc32(table.encode())
        self._pack: Callable[[Any], bytes] = bytes if row is bytes else _pack
        self.unpack = row_decoder(row)

    def encode(self, key: bytes, row: Row) -> bytes:
        """Return the bytes of a row; raises what msgspec raises for one it cannot encode."""
        packed = self._pack(row)
        return packed + crc32(packed, crc32(key, self._seed)).to_bytes(CRC_BYTES, "little")

    def decode(self, key: bytes, value: bytes) -> Row:
        """Return the row.

        Raises:
            Corrupt: key and row do not match their checksum, or the row is of another type.
        """
        if crc32(value, crc32(key, self._seed)) != _RESIDUE and not _is_of_format_1(key, value):
            raise Corrupt(
                f"a row of the table {self.table} does not match its checksum: {key!r}"[:500],
                hint="stop the owner, remove its view directory and start it: it is rebuilt",
                table=self.table,
                key=repr(key),
            )
        try:
            row: Row = self.unpack(value[:-CRC_BYTES])
        except msgspec.DecodeError as error:
            raise Corrupt(
                f"a row of the table {self.table} is of another type: {error}: {key!r}"[:500],
                hint="another version of KSI has written it",
                table=self.table,
                key=repr(key),
            ) from error
        return row

    def intact(self, key: bytes, value: bytes) -> bool:
        """Return whether a key and the value stored under it match their checksum."""
        matches = crc32(value, crc32(key, self._seed)) == _RESIDUE
        return matches or _is_of_format_1(key, value)


# A codec has no state: the fork server makes those of all owners, in pages that they share.
key_codec: Final = cache(KeyCodec)
row_codec: Final[Callable[[str, Any], RowCodec[Any]]] = cache(RowCodec)


class MemoryTable(Generic[Row]):
    """A table in memory."""

    def __init__(self, name: str, spec: TableSpec) -> None:
        self._keys = key_codec(spec.key_types)
        self._codec: RowCodec[Row] = row_codec(name, spec.row)
        self._rows: dict[bytes, tuple[Any, Row]] = {}
        self._order: list[bytes] = []

    def get(self, key: Key) -> Row | None:
        """Return the row, or None."""
        found = self._rows.get(self._keys.seek(key))
        return None if found is None else found[1]

    def put(self, key: Key, row: Row) -> None:
        """Set the row. Raises what a table on disk would for a row that cannot be encoded."""
        encoded = self._keys.encode(key)
        self._codec.encode(encoded, row)
        if encoded not in self._rows:
            insort(self._order, encoded)
        self._rows[encoded] = (key, row)

    def delete(self, key: Key) -> None:
        """Remove the row if it is there."""
        encoded = self._keys.encode(key)
        if self._rows.pop(encoded, None) is not None:
            del self._order[bisect_left(self._order, encoded)]

    def range(
        self, start: Key = (), stop: Key | None = None, *, prefix: Key = (), reverse: bool = False
    ) -> Iterator[tuple[Any, Row]]:
        """Yield `(key, row)` with start <= key < stop, in order or in reverse."""
        low, high = self._keys.bounds(start, stop, prefix)
        end = len(self._order) if high is None else bisect_left(self._order, high)
        inside = self._order[bisect_left(self._order, low) : end]
        return (self._rows[key] for key in (reversed(inside) if reverse else inside))

    def count(self) -> int:
        """Return how many rows there are."""
        return len(self._rows)


class LmdbTable(Generic[Row]):
    """A table as its one writer sees it, inside the transactions of its `Store`."""

    __slots__ = (
        "_cache_rows", "_codec", "_cursor", "_database", "_decode", "_dirty", "_keys", "_older",
        "_rows", "_seek", "_txn", "name",
    )  # fmt: skip

    def __init__(self, name: str, spec: TableSpec, database: lmdb._Database) -> None:
        self.name = name
        self._keys = key_codec(spec.key_types)
        self._codec: RowCodec[Row] = row_codec(name, spec.row)
        self._seek = self._keys.seek
        self._decode = self._codec.decode
        self._cache_rows = spec.cache_rows
        self._database = database
        self._txn: lmdb.Transaction[bytes] | None = None
        self._cursor: lmdb.Cursor[bytes] | None = None
        self._dirty: dict[bytes, Row | None] = {}  # encoded key -> row, None where it was deleted
        # Two generations of decoded rows: a row that is used moves to the younger one, and the
        # older one is dropped as a whole. Both agree with the table as this batch sees it.
        self._rows: dict[Key, Row | None] = {}
        self._older: dict[Key, Row | None] = {}

    def get(self, key: Key) -> Row | None:
        """Return the row, or None."""
        row = self._rows.get(key, _UNKNOWN)
        if row is _UNKNOWN:
            return self._load(key)
        return row

    def put(self, key: Key, row: Row) -> None:
        """Set the row. It is encoded when the batch ends, once, however often it was put."""
        self._dirty[self._keys.encode(key)] = row
        self._rows[key] = row

    def delete(self, key: Key) -> None:
        """Remove the row if it is there."""
        self._dirty[self._keys.encode(key)] = None
        self._rows[key] = None

    def range(
        self, start: Key = (), stop: Key | None = None, *, prefix: Key = (), reverse: bool = False
    ) -> Iterator[tuple[Any, Row]]:
        """Yield `(key, row)` with start <= key < stop, in order or in reverse."""
        self.flush()
        low, high = self._keys.bounds(start, stop, prefix)
        cursor = self._open_txn().cursor(self._database)
        return _walk(cursor, self._keys, self._codec, low, high, reverse)

    def count(self) -> int:
        """Return how many rows there are."""
        self.flush()
        return self._open_txn().stat(self._database)["entries"]

    def begin(self, txn: lmdb.Transaction[bytes]) -> None:
        """From now on work in this write transaction."""
        self._txn = txn
        self._cursor = None

    def flush(self) -> None:
        """Put the rows of this batch into the transaction.

        Raises what msgspec raises for a row it cannot encode, and `lmdb.MapFullError`; the
        transaction must then be aborted.
        """
        if not self._dirty:
            return
        cursor = self._cursor
        if cursor is None:
            cursor = self._cursor = self._open_txn().cursor(self._database)
        encode = self._codec.encode
        for key, row in self._dirty.items():
            if row is not None:
                cursor.put(key, encode(key, row))
            elif cursor.set_key(key):
                cursor.delete()
        self._dirty.clear()
        if len(self._rows) > self._cache_rows:
            self._older, self._rows = self._rows, {}

    def end(self) -> None:
        """The transaction is over."""
        self._txn = self._cursor = None

    def forget(self) -> None:
        """The transaction was aborted: drop what it put and all that is cached."""
        self._dirty.clear()
        self._rows.clear()
        self._older.clear()
        self.end()

    def _load(self, key: Key) -> Row | None:
        """Return the row of a key that the younger generation does not have."""
        row = self._older.pop(key, _UNKNOWN)
        if row is _UNKNOWN:
            encoded = self._seek(key)
            row = self._dirty.get(encoded, _UNKNOWN)
            if row is _UNKNOWN:
                cursor = self._cursor
                if cursor is None:
                    cursor = self._cursor = self._open_txn().cursor(self._database)
                try:
                    value = cursor.get(encoded)
                except lmdb.BadValsizeError:  # empty, or longer than any key
                    return None
                if value is None:
                    return None  # Not cached: most lookups that find nothing are never repeated.
                row = self._decode(encoded, value)
        if len(self._rows) >= self._cache_rows:
            self._older, self._rows = self._rows, {}
        self._rows[key] = row
        return row

    def _open_txn(self) -> lmdb.Transaction[bytes]:
        assert self._txn is not None, f"the table {self.name} is used outside a transaction"
        return self._txn


class Instant:
    """The read transaction that the tables of one reader look through."""

    __slots__ = ("txn",)

    txn: lmdb.Transaction[bytes]


class ReadTable(Generic[Row]):
    """A table as of one committed state. Good only while its transaction is open."""

    __slots__ = ("_codec", "_database", "_decode", "_instant", "_keys", "_seek", "name")

    def __init__(
        self, name: str, spec: TableSpec, database: lmdb._Database, instant: Instant
    ) -> None:
        self.name = name
        self._keys = key_codec(spec.key_types)
        self._codec: RowCodec[Row] = row_codec(name, spec.row)
        self._seek = self._keys.seek
        self._decode = self._codec.decode
        self._database = database
        self._instant = instant

    def get(self, key: Key) -> Row | None:
        """Return the row, or None."""
        encoded = self._seek(key)
        try:
            value = self._instant.txn.get(encoded, None, self._database)
        except lmdb.BadValsizeError:  # empty, or longer than any key
            return None
        return None if value is None else self._decode(encoded, value)

    def put(self, key: Key, row: Row) -> None:
        """Raise TypeError: only its owner writes a table."""
        raise TypeError(f"the table {self.name} is read here, its owner writes it")

    def delete(self, key: Key) -> None:
        """Raise TypeError: only its owner writes a table."""
        raise TypeError(f"the table {self.name} is read here, its owner writes it")

    def range(
        self, start: Key = (), stop: Key | None = None, *, prefix: Key = (), reverse: bool = False
    ) -> Iterator[tuple[Any, Row]]:
        """Yield `(key, row)` with start <= key < stop, in order or in reverse."""
        low, high = self._keys.bounds(start, stop, prefix)
        cursor = self._instant.txn.cursor(self._database)
        return _walk(cursor, self._keys, self._codec, low, high, reverse)

    def count(self) -> int:
        """Return how many rows there are."""
        return self._instant.txn.stat(self._database)["entries"]


def _walk(
    cursor: lmdb.Cursor[bytes],
    keys: KeyCodec,
    codec: RowCodec[Row],
    low: bytes,
    high: bytes | None,
    reverse: bool,
) -> Iterator[tuple[Any, Row]]:
    if reverse:
        beyond = high is not None and cursor.set_range(high)
        found = cursor.prev() if beyond else cursor.last()
        items = cursor.iterprev() if found else iter(())
    else:
        found = cursor.set_range(low) if low else cursor.first()
        items = cursor.iternext() if found else iter(())
    for key, value in items:
        if key < low or (high is not None and key >= high):
            return
        row = codec.decode(key, value)
        yield keys.decode(key), row


def _is_of_format_1(key: bytes, value: bytes) -> bool:
    """Whether a row matches its checksum as of format 1, which left out the name of the table."""
    return crc32(value, crc32(key)) == _RESIDUE


def _encode_plain(key: str) -> bytes:
    encoded = key.encode()
    if 0 < len(encoded) <= KEY_BYTES_MAX and 0 not in encoded:
        return encoded
    if not encoded:
        raise ValueError("a key may not be empty")
    if 0 in encoded:
        raise ValueError(f"a key may not hold a NUL: {key!r}"[:200])
    raise _too_long(encoded)


def _too_long(encoded: bytes) -> ValueError:
    return ValueError(f"a key of {len(encoded)} bytes is over the limit of {KEY_BYTES_MAX}")


def _after(prefix: bytes) -> bytes | None:
    """Return the least bytes greater than all that begin with `prefix`, None if there are none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else None
