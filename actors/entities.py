"""Entities: records of some type with properties, kept so that a query finds them.

Beside each entity there are rows by its type, in the order of creation, and by each single value
among its properties, in the order of values. So a query looks at what its condition leaves of an
index, or walks along a table that has the order it wants, from where the last page ended: what it
costs does not depend on how many entities there are.

An owner that keeps entities has these tables among its own. `put` and `remove` are for `apply`,
all else only reads.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from ksi.actors.owner import Keyed, Table, Tables
from ksi.actors.queries import MISSING, Bound, Order, Place, Where, order_text
from ksi.transport.errors import Quota

SCAN_ROWS_MAX: Final = 10_000  # Rows one query looks at before it returns with a cursor.
SCAN_BYTES_MAX: Final = 16 << 20  # The same, for large entities: its owner does nothing meanwhile.
OWN_NAMES: Final = ("id", "type", "created_at", "updated_at", "revision")
BY_CREATION: Final = "created_at"

decode_properties: Final = msgspec.msgpack.Decoder(dict[str, Any]).decode


class Entity(msgspec.Struct, frozen=True, array_like=True):
    type: str
    properties: bytes  # a map in MessagePack: exact, and nobody can change it
    serial: int  # the revision at which it was created: the order of creation
    revision: int
    created_at: float
    updated_at: float


class Number(msgspec.Struct, frozen=True, array_like=True):
    count: int


class EntityTables(Tables):
    entities: Annotated[Table[Entity], Keyed(str, cache_rows=1024)]
    by_type: Annotated[Table[bytes], Keyed(str, int)]  # type, serial -> id
    by_value: Annotated[Table[bytes], Keyed(str, str, str, int)]  # type, name, text, serial -> id
    types: Table[Number]


class Found(NamedTuple):
    """An entity as a query looks at it."""

    id: str
    entity: Entity
    properties: dict[str, Any]

    def value(self, name: str) -> Any:
        """Return what a condition calls `name`, or MISSING."""
        if name in OWN_NAMES:
            return self.id if name == "id" else getattr(self.entity, name)
        return self.properties.get(_property(name), MISSING)

    def place(self, by: Order) -> Place:
        """Return where it stands in an order."""
        if by.name == BY_CREATION:
            return Place(False, "", self.entity.serial)
        text = order_text(self.value(by.name))
        return Place(text is None, text or "", self.entity.serial)


Placed = Iterator[tuple[Place, str]]  # ids of entities in an order, each with its place


def put(entity_id: str, entity: Entity, tables: EntityTables) -> None:
    """Set an entity, and all rows by which it is found."""
    known = tables.entities.get(entity_id)
    tables.entities.put(entity_id, entity)
    if known is None or known.type != entity.type:
        if known is not None:
            tables.by_type.delete((known.type, known.serial))
            count_one(tables.types, known.type, -1)
        tables.by_type.put((entity.type, entity.serial), entity_id.encode())
        count_one(tables.types, entity.type, 1)
    former = set() if known is None else _index_keys(known)
    present = _index_keys(entity)
    for key in sorted(former - present):
        tables.by_value.delete(key)
    for key in sorted(present - former):
        tables.by_value.put(key, entity_id.encode())


def remove(entity_id: str, tables: EntityTables) -> None:
    """Remove an entity that is there, and all rows by which it is found."""
    known = tables.entities.get(entity_id)
    assert known is not None
    tables.entities.delete(entity_id)
    tables.by_type.delete((known.type, known.serial))
    count_one(tables.types, known.type, -1)
    for key in sorted(_index_keys(known)):
        tables.by_value.delete(key)


def count_one(table: Table[Number], key: str, more: int) -> None:
    """Count something in or out; at none the row is gone."""
    known = table.get(key)
    count = more + (0 if known is None else known.count)
    if count:
        table.put(key, Number(count))
    else:
        table.delete(key)


def find(entity_id: str, tables: EntityTables) -> Found:
    """Return an entity that is there."""
    entity = tables.entities.get(entity_id)
    assert entity is not None
    return Found(entity_id, entity, decode_properties(entity.properties))


def types_of(kind: str | None, tables: EntityTables) -> list[str]:
    """Return one type, or all there are."""
    return [kind] if kind is not None else [kind for kind, _ in tables.types.range()]


def select(
    kind: str | None, condition: Where, by: Order, after: Place | None, tables: EntityTables
) -> Placed:
    """Yield entities beyond a place in an order, among them all of which a condition holds.

    Whoever looks at one asks whether it does, and whether it really stands in that place: ordered
    by a property, all come once more at the end, as those that have no single value there.

    Raises:
        Quota: no table has this order, and there are too many to sort.
    """
    types = types_of(kind, tables)
    narrowed = among(condition, types, tables)
    if narrowed is not None:
        return _sorted(narrowed, by, after, tables)
    if by.name == BY_CREATION:
        return created(types, after, by, tables)
    if by.name in OWN_NAMES:
        return _sorted(_all_of(types, by, tables), by, after, tables)
    if after is not None and after.missing:
        return created(types, after, by, tables)
    unvalued = created(types, None, by, tables, missing=True)
    return chain(_valued(types, after, by, tables), unvalued)


def among(condition: Where, types: list[str], tables: EntityTables) -> list[str] | None:
    """Return the ids among which are all that a condition can hold of; None if too many.

    The ranges of the index that its bounds name are walked side by side: the first to end is the
    smallest.
    """
    ranges = [
        _indexed(bound, types, tables) for bound in condition.bounds if bound.name not in OWN_NAMES
    ]
    found: list[list[str]] = [[] for _ in ranges]
    for _ in range(1 + SCAN_ROWS_MAX // len(ranges) if ranges else 0):
        for rows, ids in zip(ranges, found, strict=True):
            row = next(rows, None)
            if row is None:
                return list(dict.fromkeys(ids))
            ids.append(row[1].decode())
    return None


def created(
    types: list[str],
    after: Place | None,
    by: Order,
    tables: EntityTables,
    *,
    missing: bool = False,
) -> Placed:
    """Yield entities of these types in the order of creation."""
    missing = missing if after is None else after.missing
    start, stop = _bounds(() if after is None else (after.serial,), by)
    rows = [
        tables.by_type.range(
            (kind, *start), stop and (kind, *stop), prefix=(kind,), reverse=by.descending
        )
        for kind in types
    ]
    for (_, serial), entity_id in _merged(rows, by):
        yield Place(missing, "", serial), entity_id.decode()


def _valued(types: list[str], after: Place | None, by: Order, tables: EntityTables) -> Placed:
    """Yield entities that have a single value under the name of an order, in that order."""
    name = _property(by.name)
    start, stop = _bounds(() if after is None else (after.text, after.serial), by)
    rows = [
        tables.by_value.range(
            (kind, name, *start),
            stop and (kind, name, *stop),
            prefix=(kind, name),
            reverse=by.descending,
        )
        for kind in types
    ]
    for (_, _, text, serial), entity_id in _merged(rows, by):
        yield Place(False, text, serial), entity_id.decode()


def _all_of(types: list[str], by: Order, tables: EntityTables) -> Iterator[str]:
    numbers = (tables.types.get(kind) for kind in types)
    count = sum(number.count for number in numbers if number is not None)
    if count > SCAN_ROWS_MAX:
        raise _too_many(f"{count} entities", by)
    return (entity_id for _, entity_id in created(types, None, by, tables))


def _sorted(
    entity_ids: Iterable[str], by: Order, after: Place | None, tables: EntityTables
) -> Placed:
    placed: list[tuple[Place, str]] = []
    left = SCAN_BYTES_MAX
    for entity_id in entity_ids:
        found = find(entity_id, tables)
        left -= len(found.entity.properties)
        if left < 0:
            raise _too_many(f"{SCAN_BYTES_MAX} bytes or more", by)
        placed.append((found.place(by), entity_id))
    placed.sort(reverse=by.descending)
    placed.sort(key=lambda each: each[0].missing)  # Those come last in both directions.
    return (each for each in placed if after is None or _is_beyond(each[0], after, by))


def _too_many(what: str, by: Order) -> Quota:
    return Quota(
        f"{what} are too many to order by {by.name}",
        hint="order_by created_at or a property, or narrow it with where",
        limit=SCAN_ROWS_MAX,
    )


def _is_beyond(place: Place, after: Place, by: Order) -> bool:
    if place.missing != after.missing:
        return place.missing
    return place < after if by.descending else place > after


def _indexed(bound: Bound, types: list[str], tables: EntityTables) -> Iterator[tuple[Any, bytes]]:
    """Yield the rows of the index within a bound, of several types one after the other."""
    for kind in types:
        prefix = (kind, _property(bound.name))
        for start, stop in bound.spans:
            yield from tables.by_value.range((*prefix, start), (*prefix, stop), prefix=prefix)


def _index_keys(entity: Entity) -> set[tuple[str, str, str, int]]:
    return {
        (entity.type, name, text, entity.serial)
        for name, value in decode_properties(entity.properties).items()
        if (text := order_text(value)) is not None
    }


def _property(name: str) -> str:
    return name.removeprefix("properties.")


def _bounds(key: tuple[Any, ...], by: Order) -> tuple[tuple[Any, ...], tuple[Any, ...] | None]:
    """Return where a range begins and ends that goes on from a key that ends in a number."""
    if not key:
        return (), None
    return ((), key) if by.descending else ((*key[:-1], key[-1] + 1), None)


def _merged(rows: list[Iterator[tuple[Any, bytes]]], by: Order) -> Iterator[tuple[Any, bytes]]:
    """Yield rows of several types as if they were of one: by what follows the type in the key."""
    if len(rows) == 1:
        return rows[0]
    return heapq.merge(*rows, key=lambda row: row[0][1:], reverse=by.descending)
