"""`docs/operations.md`: all operations on one page, made from their declarations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from ksi.console.declared import (
    ALWAYS,
    ALWAYS_COMMANDS,
    audience,
    default_words,
    example,
    fields_of,
    older_words,
    reply_rows,
    summary,
    type_words,
)
from ksi.transport.message import Operation

_PREFACE: Final = (
    "What owners and the supervisor can be asked. This page is made from the declarations by",
    "`ksi discover --markdown`; `ksi help OPERATION` shows one of them. A command changes state; a",
    "query is answered from what is committed, by its owner (`ask`) or in place (`read`).",
)


def as_page(operations: Mapping[str, Operation]) -> str:
    """Return `docs/operations.md`: all operations, as Markdown."""
    lines = ["# Operations", "", *_PREFACE, ""]
    for always, kind in ((ALWAYS, "Any operation"), (ALWAYS_COMMANDS, "Any command")):
        codes = ", ".join(f"`{each.code}`" for each in always)
        lines += [f"{kind} may also be refused as {codes}.", ""]
    domain = None
    for name, each in operations.items():
        if domain != (domain := name.partition(":")[0]):
            lines += [f"## {domain}", ""]
        lines += [*_section(each), ""]
    return "\n".join(lines[:-1]) + "\n"


def _section(operation: Operation) -> Iterator[str]:
    yield f"### {operation.name}"
    yield ""
    if operation.same_as is not None:
        yield summary(operation)
        return
    yield f"A {operation.kind} of {operation.owner}, for {audience(operation)}."
    yield ""
    yield from (line.strip() for line in operation.doc.splitlines())
    rows = [
        (each.encode_name, default_words(each) or "-", type_words(each.type))
        for each in fields_of(operation)
    ]
    yield from _markdown_table(("field", "default", "type"), rows)
    if older := older_words(operation):
        yield ""
        yield f"Also taken: {older}."
    yield from _markdown_table(("reply", "type"), reply_rows(operation))
    if operation.refuses:
        yield ""
        yield "Refused as " + ", ".join(f"`{each.code}`" for each in operation.refuses) + "."
    yield ""
    yield "```sh"
    yield example(operation)
    yield "```"


def _markdown_table(headers: tuple[str, ...], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    if not (rows := list(rows)):
        return
    yield ""
    for row in (headers, ("---",) * len(headers), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
