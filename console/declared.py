"""The declarations of operations, in words, as schemas and as examples.

All of it comes from the declarations: what `ksi help` shows is what the owner checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import Any, Final

import msgspec
from msgspec import inspect as shape

from ksi.actors.owners import load_all
from ksi.actors.supervision import system as _supervisor  # noqa: F401  its operations
from ksi.transport.errors import (
    Busy,
    Draining,
    Expired,
    Forbidden,
    Invalid,
    KsiError,
    StorageFull,
    Unavailable,
)
from ksi.transport.limits import ID_PATTERN
from ksi.transport.message import ANYONE, CATALOGUE, Operation

# What any operation may answer, beside the refusals it declares.
ALWAYS: Final[tuple[type[KsiError], ...]] = (Invalid, Forbidden, Expired, Unavailable)
ALWAYS_COMMANDS: Final[tuple[type[KsiError], ...]] = (Busy, Draining, StorageFull)


def catalogue() -> dict[str, Operation]:
    """Return all operations by name, in alphabetical order."""
    load_all()
    return dict(sorted(CATALOGUE.items()))


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def fields_of(operation: Operation) -> tuple[shape.Field, ...]:
    """Return the declared fields of an operation."""
    declared = shape.type_info(operation.message)
    assert isinstance(declared, shape.StructType)
    return declared.fields


def _parts(declared: shape.Type) -> Iterator[shape.Type]:
    """Yield the alternatives of a type, less None."""
    if isinstance(declared, shape.Metadata):
        yield from _parts(declared.type)
    elif isinstance(declared, shape.UnionType):
        for each in declared.types:
            yield from _parts(each)
    elif not isinstance(declared, shape.NoneType):
        yield declared


def field_kind(each: shape.Field) -> str:
    """Return how a field is written on the command line: text, choice, number, boolean, json."""
    kinds = {_kind(part) for part in _parts(each.type)}
    return kinds.pop() if len(kinds) == 1 else "json"


def _kind(part: shape.Type) -> str:
    if isinstance(part, shape.StrType):
        return "text"
    if isinstance(part, shape.LiteralType) and all(isinstance(v, str) for v in part.values):
        return "choice"
    if isinstance(part, shape.BoolType):
        return "boolean"
    return "number" if isinstance(part, shape.IntType | shape.FloatType) else "json"


def holds_text(each: shape.Field) -> bool:
    """Return whether a text is one of the values a field may have."""
    return any(isinstance(part, shape.StrType) for part in _parts(each.type))


def choices(each: shape.Field) -> list[str]:
    """Return the legal texts of a field that names them all."""
    literals = (part for part in _parts(each.type) if isinstance(part, shape.LiteralType))
    return [str(value) for literal in literals for value in literal.values]


def type_words(declared: shape.Type) -> str:
    """Return a type in words: `an id`, `integer 1..`, `list of text`."""
    return " or ".join(dict.fromkeys(_words(part) for part in _parts(declared))) or "nothing"


def _words(part: shape.Type) -> str:
    if isinstance(part, shape.StrType):
        if part.pattern == ID_PATTERN:
            return "an id"
        return "text" + _bounds(part.min_length, part.max_length, " characters")
    if isinstance(part, shape.IntType | shape.FloatType):
        name = "integer" if isinstance(part, shape.IntType) else "number"
        low = part.ge if part.ge is not None else part.gt
        return name + _bounds(low, part.le if part.le is not None else part.lt)
    if isinstance(part, shape.LiteralType):
        return ", ".join(str(value) for value in part.values)
    if isinstance(part, shape.CollectionType):
        bounds = _bounds(part.min_length, part.max_length).strip()
        return f"list of {type_words(part.item_type)}" + (f" ({bounds})" if bounds else "")
    if isinstance(part, shape.DictType):
        if isinstance(part.value_type, shape.AnyType):
            return "object"
        return f"object of {type_words(part.value_type)}"
    if isinstance(part, shape.StructType):
        inner = ", ".join(f"{each.name}{'' if each.required else '?'}" for each in part.fields)
        return f"{{{inner}}}"
    named = {shape.BoolType: "true or false", shape.AnyType: "any value"}
    return named.get(type(part), type(part).__name__.removesuffix("Type").lower())


def _bounds(low: float | None, high: float | None, unit: str = "") -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" {low:g} or more{unit}"
    return f" up to {high:g}{unit}" if low is None else f" {low:g} to {high:g}{unit}"


def default_words(each: shape.Field) -> str | None:
    """Return the default of a field as JSON, or None if it must be given."""
    if each.required:
        return None
    value = each.default if each.default is not msgspec.NODEFAULT else each.default_factory()
    return json.dumps(value, ensure_ascii=False)


def example(operation: Operation, verb: str | None = None) -> str:
    """Return the declared example as a command line."""
    verb = verb or ("read" if operation.kind == "query" else "ask")
    kinds = {each.encode_name: field_kind(each) for each in fields_of(operation)}
    words = ["ksi", verb, operation.name]
    for name, value in operation.example.items():
        as_text = isinstance(value, str) and kinds.get(name) in ("text", "choice")
        shown = value if as_text else json.dumps(value, ensure_ascii=False)
        words += [flag(name), quote(shown)]
    return " ".join(words)


def reply_rows(operation: Operation) -> list[tuple[str, str]]:
    """Return the fields of the reply, each with its type in words."""
    declared = shape.type_info(operation.reply)
    if not isinstance(declared, shape.StructType):
        return [("-", type_words(declared))]
    return [
        (each.encode_name, type_words(each.type) + (" or null" if _is_optional(each.type) else ""))
        for each in declared.fields
    ]


def _is_optional(declared: shape.Type) -> bool:
    return isinstance(declared, shape.UnionType) and declared.includes_none


def refusals(operation: Operation) -> dict[str, str]:
    """Return the codes an operation may answer with, each with what it means."""
    commands = ALWAYS_COMMANDS if operation.changes else ()
    known = dict.fromkeys([*operation.refuses, *ALWAYS, *commands])
    return {each.code: (each.__doc__ or "").strip().splitlines()[0] for each in known}


def schema_of(message: Any) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a message or a reply."""
    if message in (None, type(None)):
        return {"type": "null"}
    return msgspec.json.schema(message)


def summary(operation: Operation) -> str:
    """Return the first sentence of what an operation does."""
    if operation.same_as is not None:
        return f"The same as {operation.same_as}."
    return operation.doc.split("\n\n")[0].replace("\n", " ")


def older_words(operation: Operation) -> str:
    """Return in words by which other names fields are taken, if by any."""
    names = (f"`{name}` for `{today}`" for name, today in operation.message.older.items())
    return ", ".join(names)


def audience(operation: Operation) -> str:
    """Return in words who may ask an operation."""
    words = "anyone" if operation.roles == ANYONE else ", ".join(sorted(operation.roles))
    if operation.far_roles != operation.roles:
        words += f" (over a network: {', '.join(sorted(operation.far_roles))})"
    if operation.own is not None:
        words += f"; for all but operators, `{operation.own}` is who asks"
    return words


def declaration(operation: Operation) -> Mapping[str, Any]:
    """Return all that is declared of an operation, as plain values."""
    return {
        "operation": operation.name,
        "kind": operation.kind,
        "owner": operation.owner,
        "roles": sorted(operation.roles),
        "far_roles": sorted(operation.far_roles),
        "own": operation.own,
        "doc": operation.doc,
        "fields": schema_of(operation.message),
        "reply": schema_of(operation.reply),
        "same_as": operation.same_as,
        "older": dict(operation.message.older),
        "refuses": refusals(operation),
        "example": dict(operation.example),
    }
