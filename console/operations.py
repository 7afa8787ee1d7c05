"""Operations on the command line: a sub-command each, with their fields as flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import click
from msgspec import inspect as shape

from ksi.console.declared import (
    catalogue,
    choices,
    example,
    field_kind,
    fields_of,
    flag,
    holds_text,
    type_words,
)
from ksi.console.options import DURATION, Command, Group, nearest
from ksi.transport.errors import Invalid
from ksi.transport.limits import ASK_TIMEOUT_S
from ksi.transport.message import OWNER, Operation, encode, unknown

Call = Callable[..., Any]


class Operations(Group):
    """A sub-command whose sub-commands are operations, with their fields as flags.

    `call(options, operation, fields, timeout_s)` does it and prints; `kinds` are what it takes.
    `more` are flags of single operations beside their fields, passed to `call` by name. With `past`
    there is a flag `--at` beside those of each.
    """

    def __init__(
        self,
        *args: Any,
        call: Call,
        kinds: tuple[str, ...],
        more: Mapping[str, click.Option] = MappingProxyType({}),
        past: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, subcommand_metavar="OPERATION [--FIELD VALUE]...", **kwargs)
        self._call = call
        self._kinds = kinds
        self._more = more
        self._past = past

    def list_commands(self, ctx: click.Context) -> list[str]:
        ours = (each for each in catalogue().values() if each.kind in self._kinds)
        return [each.name for each in ours if each.roles != OWNER]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = catalogue().get(cmd_name)
        if found is None or found.kind not in self._kinds:
            return None
        more = self._more.get(cmd_name)
        if self._past and "at" not in {each.encode_name for each in fields_of(found)}:
            more = _at_option()  # Else the field means the same, of what the query is about.
        return as_command(found, self._call, more)

    def unknown(self, ctx: click.Context, name: str) -> Exception:
        found = catalogue().get(name)
        if found is not None:
            instead = "ask" if found.changes else "read"
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


def as_command(operation: Operation, call: Call, more: click.Option | None = None) -> click.Command:
    """Return the click command of an operation: a flag for each field, and the common ones."""
    fields = {flag(each.encode_name): each for each in fields_of(operation)}

    def carry_out(_fields: str | None, _timeout_s: float, **given: str | None) -> Any:
        values = _more(_fields)
        beside = {} if more is None or more.name is None else {more.name: given.pop(more.name)}
        for name, text in given.items():
            if text is not None:
                each = fields["--" + name.replace("_", "-")]
                values[each.encode_name] = value_of(operation, each, text)
        operation.decode(encode(values))  # the same refusal as the owner's, but at once
        return call(click.get_current_context().obj, operation, values, _timeout_s, **beside)

    return _Fields(
        operation.name,
        params=[
            *(
                _option(name, each, _older_flags(operation, each))
                for name, each in fields.items()
                if name not in _TAKEN
            ),
            *_call_options(),
            *([more] if more is not None else []),
        ],
        callback=carry_out,
        help=operation.doc,
        epilog=f"\b\nExample:\n  {example(operation)}",
        context_settings={"help_option_names": ["--help"], "max_content_width": 100},
    )


_TAKEN: Final = frozenset({"--var", "--as", "--json", "--timeout", "--fields", "--help"})


def _at_option() -> click.Option:
    words = "The state as it was: at a number of its owner's journal, at a time, or so long ago."
    return click.Option(["--at", "at"], metavar="SEQ|TIME", help=words)


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


def _older_flags(operation: Operation, each: shape.Field) -> list[str]:
    """Return the flags of a field beside its own: those of other names that can be flags."""
    names = (name for name, today in operation.message.older.items() if today == each.encode_name)
    return [flag(name) for name in names if name.isidentifier() and not name.startswith("_")]


def _option(name: str, each: shape.Field, older: list[str]) -> click.Option:
    kind = field_kind(each)
    words = "required" if each.required else ""
    alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if kind == "boolean" else {}
    if kind != "choice":
        words += ("; " if words else "") + type_words(each.type)
    return click.Option(
        [name, *older, name.removeprefix("--").replace("-", "_")],
        type=click.Choice(choices(each)) if kind == "choice" else str,
        metavar=None if kind == "choice" else kind.upper(),
        help=words,
        **alone,
    )


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
        if holds_text(each):
            return text
        words = type_words(each.type)
        raise Invalid(
            f"{flag(each.encode_name)} takes JSON ({words}), and {text[:100]!r} is none: {error}",
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
