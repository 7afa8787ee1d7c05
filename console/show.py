"""How sub-commands print: one JSON object, or lines for people; a table only on a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

_COLOURS: Final = {
    "RUNNING": "green", "STARTING": "yellow", "BACKOFF": "yellow", "FATAL": "red",
    "active": "green", "alive": "green", "suspect": "yellow", "lost": "red",
    "warning": "yellow", "error": "red",
}  # fmt: skip


# Controls that JSON leaves as they are: a terminal may take them for commands, a reader for lines.
_UNSAFE: Final = re.compile("[\u007f-\u009f\u2028\u2029\ud800-\udfff]")


def show_json(name: str, fields: Mapping[str, Any]) -> None:
    """Print `fields` as the object of the sub-command `name`."""
    print_json({"schema": f"ksi.{name}/1", **fields})


def print_json(content: Any) -> None:
    """Print one JSON value: on a terminal over several lines, else on one."""
    indent = 2 if sys.stdout.isatty() else None
    text = json.dumps(content, ensure_ascii=False, indent=indent, default=_plain)
    print(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def clean(text: str) -> str:
    """Return `text` with what a terminal would take for a command spelt out."""
    return text if text.isprintable() else "".join(map(_spelt, text))


def _spelt(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def show_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under headers: aligned text, coloured and fitted on a terminal."""
    cells = [["-" if cell is None else clean(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _show_rich(headers, cells)
        return
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [_is_numeric(column) for column in zip(*cells, strict=True)] or [False] * len(widths)
    for row in [headers, *cells]:
        line = (
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        )
        print("  ".join(line).rstrip())


def _show_rich(headers: Sequence[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    right = [_is_numeric(column) for column in zip(*cells, strict=True)] or [False] * len(headers)
    for header, numeric in zip(headers, right, strict=True):
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    Console().print(table)


def _is_numeric(column: Iterable[str]) -> bool:
    return all(cell[:1].isdigit() or cell == "-" for cell in column)


def _plain(value: Any) -> Any:
    """Return what `json` does not know as something it does."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, frozenset | set | tuple):
        return sorted(value)
    return str(value)


def duration(seconds: float | None) -> str | None:
    """Return a time span as people read it: 12s, 3m20s, 4h05m, 2d03h."""
    if seconds is None:
        return None
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"


def size(count_bytes: float | None) -> str | None:
    """Return a number of bytes as people read it: 812 B, 1.2 MiB."""
    if count_bytes is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"


def instant(at_s: float | None) -> str | None:
    """Return a time in seconds since the epoch as people read it, in their time zone."""
    if at_s is None:
        return None
    from datetime import datetime

    return datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")
