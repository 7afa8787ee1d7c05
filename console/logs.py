"""`ksi logs [NAME]`: the operational logs of all processes, merged by time."""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from ksi.console.options import MOMENT, SINCE, Options, command
from ksi.console.show import print_json, show_json
from ksi.transport.errors import NotFound, NotRunning
from ksi.transport.moments import iso
from ksi.transport.remote import require_here

FOLLOW_S: Final = 0.2  # How often `-f` looks for more: unnoticed by a person, free for a machine.
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_SHOWN_FIRST: Final = frozenset({"at", "level", "event", "process", "pid", "exception"})

Line = dict[str, Any]


@command("logs")
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("--since", type=MOMENT, help=SINCE)
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only so many, the newest.")
@click.option(
    "--level", type=click.Choice(LEVELS[:4]), default="debug", help="Only this and what is worse."
)
@click.option("--output", is_flag=True, help="What NAME wrote to standard output and error.")
@click.pass_obj
def logs(
    options: Options,
    name: str | None,
    follow: bool,
    since: float | None,
    lines: int | None,
    level: str,
    output: bool,
) -> None:
    """Show the logs of all processes of the system, or of NAME.

    With `--json` and `-f`, one JSON object a line.
    """
    require_here(options.var, "ksi logs")
    if output:
        _show_output(options, name)
        return
    wanted = _Wanted(
        since=since,
        levels=frozenset(LEVELS[LEVELS.index(level) :]),
    )
    files = _Files(options.var, name)
    found = list(wanted.of(files.new()))
    found = found if lines is None else found[len(found) - min(lines, len(found)) :]
    if options.json and not follow:
        show_json("logs", {"lines": found})
        return
    _show(options, found)
    while follow:
        time.sleep(FOLLOW_S)  # Then look again, until Ctrl-C.
        _show(options, wanted.of(files.new()))


class _Wanted:
    """Which lines are shown."""

    def __init__(self, since: float | None, levels: frozenset[str]) -> None:
        self._since = "" if since is None else iso(since)
        self._levels = levels

    def of(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            if line.get("level") in self._levels and str(line.get("at")) >= self._since:
                yield line


class _Files:
    """The log files of a var directory, each read on from where it was left."""

    def __init__(self, var: Path, name: str | None) -> None:
        if not var.is_dir():
            raise NotRunning(f"nothing has ever run on {var}", hint="ksi start")
        self._directory = var / "logs" / "ksi"
        self._name = name
        self._offsets: dict[tuple[int, int], int] = {}
        if name is not None and not (self._directory / f"{name}.jsonl").exists():
            known = ", ".join(sorted({path.name.split(".jsonl")[0] for path in self._paths("*")}))
            raise NotFound(f"no process {name} has logged here", hint=f"there are: {known or '-'}")

    def new(self) -> Iterator[Line]:
        """Yield the lines since the last call, in the order of their times."""
        return heapq.merge(*map(self._read, self._paths(self._name or "*")), key=_time_of)

    def _paths(self, name: str) -> list[Path]:
        """Return the files, of each process first the one that is full."""
        return sorted(self._directory.glob(f"{name}.jsonl*"), reverse=True)

    def _read(self, path: Path) -> list[Line]:
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                identity = (found.st_dev, found.st_ino)  # a file that is full is renamed
                file.seek(self._offsets.get(identity, 0))
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content.rfind(b"\n") + 1
        self._offsets[identity] = self._offsets.get(identity, 0) + whole
        return sorted(map(_parsed, content[:whole].splitlines()), key=_time_of)


def _parsed(line: bytes) -> Line:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        return parsed
    return {"at": "", "level": "warning", "event": line.decode(errors="backslashreplace")}


def _time_of(line: Line) -> str:
    return str(line.get("at", ""))


def _show(options: Options, lines: Iterable[Line]) -> None:
    for line in lines:
        if options.json:
            print_json(line)
        else:
            print(_as_text(line), flush=True)


def _as_text(line: Line) -> str:
    at = str(line.get("at", "")).replace("T", " ").removesuffix("Z")[:23]
    words = [f"{at:23}", f"{line.get('level', ''):7}", f"{line.get('process', ''):12}"]
    words.append(str(line.get("event", "")))
    words += [f"{key}={value}" for key, value in line.items() if key not in _SHOWN_FIRST]
    trace = line.get("exception")
    return " ".join(words) + (f"\n{trace}" if trace else "")


def _show_output(options: Options, name: str | None) -> None:
    if name is None:
        raise click.UsageError("--output needs the NAME of a process")
    path = options.var / "logs" / "ksi" / f"{Path(name).name}.out"
    try:
        text = path.read_text(errors="backslashreplace")
    except FileNotFoundError:
        text = f"{name} has written nothing: there is no {path}"
        raise NotFound(text, hint="ksi ps") from None
    if options.json:
        show_json("logs", {"name": name, "output": text})
    else:
        print(text, end="")
