"""The query language of owners: typed conditions on records, their order, and places in it.

A condition is a map. All of its entries must hold; each names a value and says what is wanted of
it: a value that is the same, or operators:

    {"status": "open", "priority": {"$gte": 3}, "$or": [{"of": "bob"}, {"of": {"$exists": false}}]}

Comparison is typed: 1 is not "1", and true is not 1; 1 and 1.0 are one number. What is of another
type, or is not there, is neither less nor greater. `$ne`, `$nin` and `$not` hold where what they
negate does not.

Single values have a text that orders as they do, null, booleans, numbers, texts in this order, so
that tables can keep them sorted. Numbers are ordered exactly, texts by their beginning: a table
narrows, the record decides. Whoever lists records in such an order goes on from a *place* in it,
which a cursor holds as a text: so pages neither repeat nor leave out what stays as it is.

Pure functions, no owner's in particular.

Source: names of operators as in MongoDB; total order of doubles by their bits: IEEE 754-2019, 5.10.
"""

from __future__ import annotations

import re
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from ksi.transport.errors import Invalid
from ksi.transport.message import require_plain

CONDITIONS_MAX: Final = 256  # Comparisons of one query: each is made for every record looked at.
NAME_BYTES_MAX: Final = 128  # Of what is asked for: keys of tables hold no more beside the rest.
ORDER_BYTES: Final = 200  # Of a text, by which it is ordered: keys of tables hold no more.

MISSING: Final[Any] = type("Missing", (), {"__repr__": lambda _: "MISSING"})()

Record = Callable[[str], Any]  # the value of a name, or MISSING
Test = Callable[[Any], bool]
Span = tuple[str, str]  # order texts from the first, up to but without the second

_NULL, _BOOLEAN, _NUMBER, _TEXT = "0", "1", "2", "3"
_SIGN: Final = 1 << 63
_LAST: Final = "\U0010ffff"
_ORDER: Final = re.compile(r"(-)?([\w.:/@+][\w.:/@+-]{0,127})(?: (asc|desc))?", re.IGNORECASE)


class Bound(NamedTuple):
    """What a condition says of the order text of one value: it lies in one of `spans`."""

    name: str
    spans: tuple[Span, ...]


class Where(NamedTuple):
    """A condition, ready to be asked of records.

    Attributes:
        holds: whether it holds of a record.
        bounds: what is true of every record of which it holds; none, or several.
    """

    holds: Callable[[Record], bool]
    bounds: tuple[Bound, ...]


class Order(NamedTuple):
    """By which value records are ordered, and whether the greatest comes first."""

    name: str
    descending: bool

    def __str__(self) -> str:
        return f"{self.name} desc" if self.descending else self.name


class Place(NamedTuple):
    """Where a record stands in an order: those without a single value there come last."""

    missing: bool
    text: str
    serial: int  # distinguishes those that are equal


def where(conditions: Mapping[str, Any]) -> Where:
    """Return the condition that a map describes.

    Raises:
        Invalid: an operator is unknown, has no such operand, or there are too many.
    """
    require_plain(conditions, "$.where", "a condition")
    compiler = _Compiler()
    tests, bounds = compiler.all_of(conditions, "$.where")
    return Where(lambda record: all(test(record) for test in tests), tuple(bounds))


def order(text: str) -> Order:
    """Return the order that a text describes: `NAME`, `NAME asc`, `NAME desc` or `-NAME`.

    Raises:
        Invalid: it is none.
    """
    found = _ORDER.fullmatch(text)
    if found is None:
        raise Invalid(
            f"{text[:100]!r} is no order - at `$.order_by`", hint="'NAME', 'NAME asc', 'NAME desc'"
        )
    minus, name, direction = found.groups()
    _require_name(name, "$.order_by")
    return Order(name, bool(minus) or (direction or "").lower() == "desc")


def order_text(value: Any) -> str | None:
    """Return a text that orders as the value does; None for a list, a map, or nothing."""
    if value is None:
        return _NULL
    kind = type(value)
    if kind is bool:
        return f"{_BOOLEAN}{value:d}"
    if kind is int or kind is float:
        return _NUMBER + _ordered_number(value)
    if kind is str:
        return _TEXT + _ordered_text(value)
    return None


def _require_name(name: str, path: str) -> None:
    """Refuse a name that nothing can have, and no key of a table could hold."""
    if "\0" in name or len(name.removeprefix("properties.").encode()) > NAME_BYTES_MAX:
        words = f"a name has {NAME_BYTES_MAX} bytes at most and no NUL, not {name[:100]!r}"
        raise Invalid(f"{words} - at `{path}`"[:500])


def is_same(one: Any, other: Any) -> bool:
    """Return whether two plain values are the same: of one type, and equal."""
    kind = _kind(one)
    if kind != _kind(other):
        return False
    if kind is list:
        return len(one) == len(other) and all(map(is_same, one, other))
    if kind is dict:
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return bool(one == other)


def cursor_of(place: tuple[Any, ...], what: str) -> str:
    """Return a place as a text that only `place_of` reads. `what` names the listing it is of."""
    packed = msgspec.msgpack.encode([what, *place])
    return urlsafe_b64encode(packed).rstrip(b"=").decode()


def beyond(key: tuple[str, ...]) -> tuple[str, ...]:
    """Return the least key that is greater, of those that end in a text."""
    return (*key[:-1], key[-1] + "\x01") if key else ()


def place_of(cursor: str, what: str, *parts: type) -> tuple[Any, ...]:
    """Return the place that a cursor holds.

    Raises:
        Invalid: it is none, or of another listing.
    """
    try:
        packed = urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
        listing, *place = msgspec.msgpack.decode(packed, type=list[Any])
    except (ValueError, msgspec.MsgspecError):
        raise _no_cursor() from None
    if listing != what:
        raise Invalid(
            f"this cursor is of the order {listing[:100]!r}, not {what!r} - at `$.after`",
            hint="ask for the next page as for the first",
        )
    if tuple(map(type, place)) != parts or not all(map(_is_part, place)):
        raise _no_cursor()
    return tuple(place)


class _Compiler:
    """Makes tests of one query, and counts them."""

    def __init__(self) -> None:
        self._left = CONDITIONS_MAX

    def all_of(
        self, conditions: Any, path: str
    ) -> tuple[list[Callable[[Record], bool]], list[Bound]]:
        """Return a test for each entry of a map, and what is bounded by any of them."""
        if type(conditions) is not dict:
            raise Invalid(f"a condition is a map - at `{path}`"[:500])
        tests: list[Callable[[Record], bool]] = []
        bounds: list[Bound] = []
        for name, wanted in conditions.items():
            here = f"{path}.{name}"
            if name.startswith("$"):
                test, more = self._logical(name, wanted, here)
                tests.append(test)
                bounds += more
                continue
            _require_name(name, path)
            for operator, operand in _operators(wanted):
                tests.append(self._of(name, operator, operand, here))
                spans = _spans(operator, operand)
                if spans is not None:
                    bounds.append(Bound(name, spans))
        return tests, bounds

    def _logical(
        self, operator: str, operand: Any, path: str
    ) -> tuple[Callable[[Record], bool], list[Bound]]:
        if operator == "$not":
            tests, _ = self.all_of(operand, path)
            return (lambda record: not all(test(record) for test in tests)), []
        if operator not in ("$and", "$or"):
            raise _unknown(operator, path)
        if type(operand) is not list or not operand:
            raise Invalid(f"{operator} takes a list of conditions - at `{path}`"[:500])
        branches = [self.all_of(each, f"{path}[{at}]") for at, each in enumerate(operand)]
        every = [tests for tests, _ in branches]
        if operator == "$and":
            bounds = [bound for _, bounds in branches for bound in bounds]
            return (lambda record: all(test(record) for each in every for test in each)), bounds
        return (lambda record: any(all(test(record) for test in each) for each in every)), []

    def _of(self, name: str, operator: str, operand: Any, path: str) -> Callable[[Record], bool]:
        self._left -= 1
        if self._left < 0:
            raise Invalid(f"more than {CONDITIONS_MAX} conditions - at `$.where`")
        make = _TESTS.get(operator)
        if make is None:
            raise _unknown(operator, path)
        test = make(operand, path)
        return lambda record: test(record(name))


def _operators(wanted: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is wanted of one value, as operators."""
    if type(wanted) is dict and any(key.startswith("$") for key in wanted):
        yield from wanted.items()
    else:
        yield "$eq", wanted


def _equal(operand: Any, _path: str) -> Test:
    return lambda value: is_same(value, operand)


def _different(operand: Any, _path: str) -> Test:
    return lambda value: not is_same(value, operand)


def _among(operand: Any, path: str) -> Test:
    wanted = _list(operand, path)
    return lambda value: any(is_same(value, each) for each in wanted)


def _not_among(operand: Any, path: str) -> Test:
    test = _among(operand, path)
    return lambda value: not test(value)


def _compared(compare: Callable[[Any, Any], bool]) -> Callable[[Any, str], Test]:
    def make(operand: Any, path: str) -> Test:
        kind = _kind(operand)
        if kind not in (float, str):
            raise Invalid(f"only numbers and texts are less or greater - at `{path}`"[:500])
        return lambda value: _kind(value) is kind and compare(value, operand)

    return make


def _exists(operand: Any, path: str) -> Test:
    if type(operand) is not bool:
        raise Invalid(f"$exists takes true or false - at `{path}`"[:500])
    return lambda value: (value is not MISSING) is operand


def _prefixed(operand: Any, path: str) -> Test:
    if type(operand) is not str:
        raise Invalid(f"$prefix takes a text - at `{path}`"[:500])
    return lambda value: type(value) is str and value.startswith(operand)


def _containing(operand: Any, _path: str) -> Test:
    def test(value: Any) -> bool:
        if type(value) is str:
            return type(operand) is str and operand in value
        return type(value) is list and any(is_same(each, operand) for each in value)

    return test


_TESTS: Final[Mapping[str, Callable[[Any, str], Test]]] = {
    "$eq": _equal,
    "$ne": _different,
    "$gt": _compared(lambda value, operand: value > operand),
    "$gte": _compared(lambda value, operand: value >= operand),
    "$lt": _compared(lambda value, operand: value < operand),
    "$lte": _compared(lambda value, operand: value <= operand),
    "$in": _among,
    "$nin": _not_among,
    "$exists": _exists,
    "$prefix": _prefixed,
    "$contains": _containing,
}


def _spans(operator: str, operand: Any) -> tuple[Span, ...] | None:
    """Return where order texts of values lie of which a comparison holds; None: anywhere."""
    if operator == "$in":
        texts = [order_text(each) for each in operand]
        return None if None in texts else tuple((text, text + "\x01") for text in texts if text)
    if operator not in ("$eq", "$gt", "$gte", "$lt", "$lte", "$prefix"):
        return None
    text = order_text(operand)
    if text is None:
        return None
    if operator == "$prefix":
        return ((text, _beyond(text)),)
    if operator in ("$gt", "$gte"):
        return ((text, _beyond(text[0])),)
    return ((text if operator == "$eq" else text[0], text + "\x01"),)


def _beyond(prefix: str) -> str:
    """Return the least text greater than all that begin with `prefix`."""
    stem = prefix.rstrip(_LAST)
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)


def _ordered_number(value: float) -> str:
    near = float(value)
    (bits,) = struct.unpack(">Q", struct.pack(">d", near + 0.0))  # -0.0 is 0.0
    ordered = bits ^ ((1 << 64) - 1) if bits & _SIGN else bits | _SIGN
    return f"{ordered:016x}{int(value) - int(near) + 2048:04x}"


def _ordered_text(value: str) -> str:
    """Return the text without a NUL, which keys cannot hold, in the same order, and cut."""
    plain = value[:ORDER_BYTES].replace("\x01", "\x01\x02").replace("\0", "\x01\x01")
    return plain.encode()[:ORDER_BYTES].decode(errors="ignore")


def _kind(value: Any) -> type:
    kind = type(value)
    return float if kind is int else kind


def _list(operand: Any, path: str) -> list[Any]:
    if type(operand) is not list:
        raise Invalid(f"a list of values is wanted - at `{path}`"[:500])
    return operand


def _is_part(part: Any) -> bool:
    """Whether this may be part of a key."""
    return "\0" not in part if type(part) is str else 0 <= part < _SIGN


def _no_cursor() -> Invalid:
    return Invalid("this is no cursor - at `$.after`", hint="the `next` of a page")


def _unknown(operator: str, path: str) -> Invalid:
    known = ", ".join([*_TESTS, "$and", "$or", "$not"])
    return Invalid(f"there is no operator {operator[:50]!r} - at `{path}`"[:500], hint=known[:500])
