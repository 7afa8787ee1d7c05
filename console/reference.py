"""`docs/operations.md`, made from the declarations: `python -m ksi.console.reference > FILE`.

What the page says is what owners check and `ksi help` prints; a test fails where it is out of date.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ksi.console import operations as words
from ksi.transport.errors import KsiError
from ksi.transport.message import ANYONE, PEOPLE, Operation

_HEAD: Final = """\
# Operations

What can be asked, of whom, by whom, and what comes back. Made from the declarations by
`python -m ksi.console.reference`: change those, not this page. `ksi help OPERATION` prints the same
for one, `ksi help OPERATION --json` as JSON Schema.

A *command* changes state; its reply means that what it says is on disk. A *query* is answered from
one committed state: by its owner (`ask`), or in place, without a message (`read`). *People* are
operators, agents and workers. A field without a default must be given. Times are seconds since the
epoch.

Beside what an operation names, any may be refused as {always}, and a command as
{commands}. `protocol.md` says what each means.
"""


def page() -> str:
    """Return the whole page."""
    found = words.catalogue()
    parts = [_head(), _contents(found.values())]
    parts += ["\n".join(_section(operation)) + "\n" for operation in found.values()]
    return "\n".join(parts)


def _head() -> str:
    return _HEAD.format(always=_codes(words.ALWAYS), commands=_codes(words.ALWAYS_COMMANDS))


def _contents(found: Iterable[Operation]) -> str:
    rows = [
        (
            f"[{each.name}](#{each.name.replace(':', '')})",
            each.kind,
            each.owner,
            words.summary(each),
        )
        for each in found
    ]
    return "\n".join(_table(("operation", "kind", "owner", "what it does"), rows)) + "\n"


def _section(operation: Operation) -> Iterator[str]:
    yield f"## {operation.name}\n"
    yield f"A {operation.kind} of `{operation.owner}`, for {_who(operation)}.\n"
    yield operation.doc.replace("\n    ", "\n") + "\n"
    fields = [
        (f"`{each.name}`", _code(words.default_words(each)), words.type_words(each.type))
        for each in words.fields_of(operation)
    ]
    if fields:
        yield from _table(("field", "default", "type"), fields)
        yield ""
    reply = [(f"`{name}`", kind) for name, kind in words.reply_rows(operation)]
    if reply[0][0] == "`-`":
        yield "The reply is empty.\n"
    else:
        yield from _table(("reply", "type"), reply)
        yield ""
    if operation.refuses:
        yield f"Refused as {_codes(operation.refuses)}.\n"
    yield f"```sh\n{words.example(operation)}\n```"


def _who(operation: Operation) -> str:
    if operation.roles == ANYONE:
        return "anyone"
    return "people" if operation.roles == PEOPLE else " and ".join(sorted(operation.roles)) + "s"


def _codes(errors: Sequence[type[KsiError]]) -> str:
    *others, last = [f"`{each.code}`" for each in errors]
    return f"{', '.join(others)} or {last}" if others else last


def _code(text: str | None) -> str:
    return "" if text is None else f"`{text}`"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headers)} |"
    yield "|" + "---|" * len(headers)
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |")


if __name__ == "__main__":
    print(page(), end="")
