"""Operations on the command line: their fields as flags, and their declarations in words.

All of it comes from the declarations: what `ksi help` shows is what the owner checks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from shlex import quote
from typing import Any, Final

import click
import msgspec
from msgspec import inspect as shape

from ksi.actors import system as _supervisor  # noqa: F401  its operations, too
from ksi.actors.owners import load_all
from ksi.console.options import DURATION, Command, Group, Options, nearest
from ksi.transport.errors import Busy, Draining, Expired, Forbidden, Invalid, KsiError, StorageFull
from ksi.transport.errors import Unavailable as NoAnswer
from ksi.transport.limits import ASK_TIMEOUT_S, ID_PATTERN
from ksi.transport.message import CATALOGUE, Operation, encode, unknown

# What any operation may answer, beside the refusals it declares.
ALWAYS: Final[tuple[type[KsiError], ...]] = (Invalid, Forbidden, Expired, NoAnswer)
ALWAYS_COMMANDS: Final[tuple[type[KsiError], ...]] = (Busy, Draining, StorageFull)

Call = Callable[[Options, Operation, dict[str, Any], float], Any]


def catalogue() -> dict[str, Operation]:
    """Return all operations by name, in alphabetical order."""
    load_all()
    return dict(sorted(CATALOGUE.items()))


class Operations(Group):
    """A sub-command whose sub-commands are operations, with their fields as flags.

    `call(options, operation, fields, timeout_s)` does it and prints; `kinds` are what it takes.
    """

    def __init__(self, *args: Any, call: Call, kinds: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, subcommand_metavar="OPERATION [--FIELD VALUE]...", **kwargs)
        self._call = call
        self._kinds = kinds

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [each.name for each in catalogue().values() if each.kind in self._kinds]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = catalogue().get(cmd_name)
        if found is None or found.kind not in self._kinds:
            return None
        return as_command(found, self._call)

    def unknown(self, ctx: click.Context, name: str) -> Exception:
        found = catalogue().get(name)
        if found is not None:
            instead = "ask" if found.kind == "command" else "read"
            text = f"{name} is a {found.kind}: use ksi {instead} {name}"
            return click.UsageError(text, ctx)
        return unknown(name, self.list_commands(ctx))


class _Fields(Command):
    """The command of one operation: an unknown flag is answered with the nearest field."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = [flag for each in self.params for flag in each.opts]
            near = nearest(error.option_name, flags)
            raise Invalid(
                f"{self.name} has no field {error.option_name}{near}", hint=f"ksi help {self.name}"
            ) from None


def as_command(operation: Operation, call: Call) -> click.Command:
    """Return the click command of an operation: a flag for each field, and the common ones."""
    fields = {flag(each.name): each for each in fields_of(operation)}

    def carry_out(_fields: str | None, _timeout_s: float, **given: str | None) -> Any:
        values = _more(_fields)
        for name, text in given.items():
            if text is not None:
                each = fields["--" + name.replace("_", "-")]
                values[each.name] = value_of(operation, each, text)
        operation.decode(encode(values))  # the same refusal as the owner's, but at once
        return call(click.get_current_context().obj, operation, values, _timeout_s)

    return _Fields(
        operation.name,
        params=[
            *(_option(name, each) for name, each in fields.items() if name not in _TAKEN),
            *_call_options(),
        ],
        callback=carry_out,
        help=operation.doc,
        epilog=f"\b\nExample:\n  {example(operation)}",
        context_settings={"help_option_names": ["--help"], "max_content_width": 100},
    )


_TAKEN: Final = frozenset({"--var", "--as", "--json", "--timeout", "--fields", "--help"})


def _call_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--fields", "_fields"],
            metavar="JSON",
            help="More fields, as one JSON object; - reads it from standard input.",
        ),
        click.Option(
            ["--timeout", "_timeout_s"],
            type=DURATION,
            default=ASK_TIMEOUT_S,
            help="How long to wait for the reply: 300ms, 5s, 1m. [5s]",
        ),
    ]


def _option(name: str, each: shape.Field) -> click.Option:
    kind = field_kind(each)
    words = "required" if each.required else ""
    alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if kind == "boolean" else {}
    if kind != "choice":
        words += ("; " if words else "") + type_words(each.type)
    return click.Option(
        [name, name.removeprefix("--").replace("-", "_")],
        type=click.Choice(choices(each)) if kind == "choice" else str,
        metavar=None if kind == "choice" else kind.upper(),
        help=words,
        **alone,
    )


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def fields_of(operation: Operation) -> tuple[shape.Field, ...]:
    """Return the declared fields of an operation."""
    declared = shape.type_info(operation.message)
    assert isinstance(declared, shape.StructType)
    return declared.fields


def value_of(operation: Operation, each: shape.Field, text: str) -> Any:
    """Return what `text` on the command line means for a field.

    A field that holds only strings takes the text as it is; any other takes JSON.

    Raises:
        Invalid: it is no JSON.
    """
    if field_kind(each) in ("text", "choice"):
        return text
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        if shape.StrType in {type(part) for part in _parts(each.type)}:
            return text
        words = type_words(each.type)
        raise Invalid(
            f"{flag(each.name)} takes JSON ({words}), and {text[:100]!r} is none: {error}",
            hint=operation.hint,
        ) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _more(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    content = sys.stdin.read() if text == "-" else text
    try:
        values = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"--fields takes a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise Invalid(f"--fields takes a JSON object, not {content[:100]!r}")
    return values


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
        return f"list of {type_words(part.item_type)}" + _bounds(part.min_length, part.max_length)
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
    kinds = {each.name: field_kind(each) for each in fields_of(operation)}
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
    return [(each.name, type_words(each.type)) for each in declared.fields]


def refusals(operation: Operation) -> dict[str, str]:
    """Return the codes an operation may answer with, each with what it means."""
    commands = ALWAYS_COMMANDS if operation.kind == "command" else ()
    known = dict.fromkeys([*operation.refuses, *ALWAYS, *commands])
    return {each.code: (each.__doc__ or "").strip().splitlines()[0] for each in known}


def schema_of(message: Any) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a message or a reply."""
    if message in (None, type(None)):
        return {"type": "null"}
    return msgspec.json.schema(message)


def summary(operation: Operation) -> str:
    """Return the first sentence of what an operation does."""
    return operation.doc.split("\n\n")[0].replace("\n", " ")


def declaration(operation: Operation) -> Mapping[str, Any]:
    """Return all that is declared of an operation, as plain values."""
    return {
        "operation": operation.name,
        "kind": operation.kind,
        "owner": operation.owner,
        "roles": sorted(operation.roles),
        "doc": operation.doc,
        "fields": schema_of(operation.message),
        "reply": schema_of(operation.reply),
        "refuses": refusals(operation),
        "example": dict(operation.example),
    }
