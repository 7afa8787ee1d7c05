"""Compositions put together: what one extends, mixes in and depends on, and variables filled in.

    extends                    its text comes before, or where `{{base_content}}` stands
    mixins, dependencies       their texts follow, each once
    components                 texts of a profile: a `template`, or another's by `source`
    conditions                 mixins that follow where a condition holds: `level == 'high'`
    variables                  defaults; what is given is stronger, and the outer one of two
    {{name}} {{a.b.0}} {{name|default}}    places of values; one without a value stays, and is told

All is pure, and nothing in a composition is carried out: a condition is compared, never evaluated
as code, and a value that is put in is not looked at again.

Source: `composition:render_component` of KSI, whose conditions went through `eval`.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ksi.transport.errors import Conflict, Quota

PARTS_MAX: Final = 100  # Compositions in one: each is a file to be read.
RENDERED_BYTES_MAX: Final = 512 << 10  # It fits into an answer.
CONDITION_CHARS_MAX: Final = 500  # Deeper ones than fit here exhaust the parser.
_PLACE: Final = re.compile(r"\{\{([^{}]*)\}\}")
_PATH: Final = re.compile(r"[A-Za-z_][\w.-]*")
_BASE: Final = "base_content"
_NOTHING: Final = object()
_COMPARE: Final[Mapping[type, Callable[[Any, Any], bool]]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many, ast.NotIn: lambda one, many: one not in many,
}  # fmt: skip


class Part(NamedTuple):
    """A composition that is put into another: its id, what it says of itself, and its text."""

    id: str
    metadata: Mapping[str, Any]
    text: str


class Rendered(NamedTuple):
    """A composition put together.

    Attributes:
        parts: the ids of what it is made of, itself first; missing: places that have no value.
    """

    text: str
    metadata: dict[str, Any]
    parts: list[str]
    missing: list[str]


Find = Callable[[str], Part]  # by name; refuses what is none, or more than one


def render(part: Part, given: Mapping[str, Any], find: Find) -> Rendered:
    """Return a composition with all it is made of, and `given` put in.

    Raises:
        Conflict: it contains itself, or says something that cannot be understood.
        Quota: it is made of too much, or gets too long.
    """
    assembly = _Assembly(given, find)
    text, metadata = assembly.put_in(part)
    missing: dict[str, None] = {}
    filled = _filled(text, assembly.values, missing)
    return Rendered(filled, metadata, assembly.parts, list(missing))


class _Assembly:
    """What was put together until now."""

    def __init__(self, given: Mapping[str, Any], find: Find) -> None:
        self.values = dict(given)
        self.parts: list[str] = []
        self._find = find
        self._within: list[str] = []

    def put_in(self, part: Part) -> tuple[str, dict[str, Any]]:
        """Return the text of a part with those it names, and its metadata over its parent's."""
        if len(self.parts) >= PARTS_MAX:
            raise Quota(f"it is made of more than {PARTS_MAX} compositions", limit=PARTS_MAX)
        self.parts.append(part.id)
        self._within.append(part.id)
        said = part.metadata
        self._take_defaults(said.get("variables"), part, "variables")
        texts, metadata = [part.text.strip()], dict(said)
        parent = self._other(said.get("extends"), part)
        base = ""
        if parent is not None:
            base, inherited = self.put_in(parent)
            metadata = {**inherited, **said}
        if f"{{{{{_BASE}}}}}" in texts[0]:
            texts[0] = texts[0].replace(f"{{{{{_BASE}}}}}", base)
        else:
            texts.insert(0, base)
        texts += [self._component(each, part) for each in _list(said, "components", part)]
        for name in self._mixed_in(part):
            other = self._other(name, part)
            if other is not None:
                texts.append(self.put_in(other)[0])
        self._within.pop()
        text = "\n\n".join(filter(None, texts))
        _require_room(len(text))
        return text, metadata

    def _take_defaults(self, said: Any, part: Part, what: str) -> None:
        for name, value in _map(said, part, what).items():
            default = value.get("default") if isinstance(value, Mapping) else value
            if default is not None:
                self.values.setdefault(name, default)

    def _component(self, said: Any, part: Part) -> str:
        """Return the text of a component of a part, if its conditions hold."""
        if not isinstance(said, Mapping):
            raise Conflict(f"{part.id} has a component that is no mapping")
        if not self._applies(said, part):
            return ""
        self._take_defaults(said.get("vars"), part, "vars")
        other = self._other(said.get("source") or said.get("composition"), part)
        if other is not None:
            return self.put_in(other)[0]
        template = said.get("template")
        return template.strip() if isinstance(template, str) else ""

    def _applies(self, said: Mapping[str, Any], part: Part) -> bool:
        groups = _map(said.get("conditions"), part, "conditions")
        every, some, none = (
            [holds(str(each), self.values) for each in _list(groups, name, part)]
            for name in ("all_of", "any_of", "none_of")
        )
        if said.get("condition") is not None:
            every.append(holds(str(said["condition"]), self.values))
        return all(every) and (any(some) or not some) and not any(none)

    def _other(self, name: Any, part: Part) -> Part | None:
        """Return the composition that a part names; None if it names none, or one that is in."""
        if name is None:
            return None
        if not isinstance(name, str):
            raise Conflict(f"{part.id} names a composition by {json.dumps(name)[:100]}")
        other = self._find(_filled(name, self.values, {}))
        if other.id in self._within:
            raise Conflict(f"it contains itself: {' -> '.join([*self._within, other.id])}"[:1000])
        return None if other.id in self.parts else other

    def _mixed_in(self, part: Part) -> list[Any]:
        said = part.metadata
        names = [*_list(said, "mixins", part), *_list(said, "dependencies", part)]
        for each in _list(said, "conditions", part):
            if not isinstance(each, Mapping):
                raise Conflict(f"{part.id} has a condition that is no mapping")
            if holds(str(each.get("condition", "")), self.values):
                names += _list(each, "mixins", part)
        return names


def holds(condition: str, values: Mapping[str, Any]) -> bool:
    """Return whether a condition holds of values: names, literals and comparisons, joined by `and`,
    `or` and `not`. A name that has no value is none; what cannot be compared does not hold.

    Raises:
        Conflict: it is something else.
    """
    text = _PLACE.sub(lambda found: found[1].strip(), condition).strip()
    try:
        if not text or len(text) > CONDITION_CHARS_MAX:
            raise ValueError("too long" if text else "empty")
        tree = ast.parse(text, mode="eval").body
        return bool(_value_of(tree, values))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Conflict(f"the condition {condition[:100]!r} is not understood: {error}") from None


def _value_of(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, str | int | float):
            return value
        case ast.List(elts=each) | ast.Tuple(elts=each):
            return [_value_of(one, values) for one in each]
        case ast.Name() | ast.Attribute():
            found = _looked_up(ast.unparse(node), values)
            return None if found is _NOTHING else found
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value_of(operand, values)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value_of(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value_of(part, values) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            sides = [_value_of(side, values) for side in (left, *rights)]
            return all(map(_compared, ops, sides, sides[1:]))
        case _:
            raise ValueError(f"{ast.unparse(node)[:100]!r} is no comparison")


def _compared(op: ast.cmpop, left: Any, right: Any) -> bool:
    compare = _COMPARE.get(type(op))
    if compare is None:
        raise ValueError("`is` compares no values")
    try:
        return compare(left, right)
    except TypeError:
        return False


def _filled(text: str, values: Mapping[str, Any], missing: dict[str, None]) -> str:
    """Return a text with values in their places; those without one are noted and stay."""
    size = len(text)

    def put(found: re.Match[str]) -> str:
        nonlocal size
        name, bar, default = (each.strip() for each in found[1].partition("|"))
        value = _looked_up(name, values) if _PATH.fullmatch(name) else _NOTHING
        if value is _NOTHING and bar:
            value = default
        elif value is _NOTHING and name == _BASE:
            value = ""
        if value is _NOTHING:
            missing[found[1].strip()] = None
            return found[0]
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        size += len(shown)
        _require_room(size)
        return shown

    return _PLACE.sub(put, text)


def _looked_up(path: str, values: Mapping[str, Any]) -> Any:
    """Return the value at a path, as `user.names.0`; null is none."""
    value: Any = values
    for name in path.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _NOTHING
    return _NOTHING if value is None else value


def _list(said: Mapping[str, Any], name: str, part: Part) -> list[Any]:
    value = said.get(name) or []
    if not isinstance(value, list):
        raise Conflict(f"{part.id} has {name} that are no list")
    return value


def _map(value: Any, part: Part, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Conflict(f"{part.id} has {name} that are no mapping")
    return value


def _require_room(size: int) -> None:
    if size > RENDERED_BYTES_MAX:
        text = f"it gets longer than {RENDERED_BYTES_MAX} characters"
        raise Quota(text, limit=RENDERED_BYTES_MAX)
