"""`ksi events`: what has happened in all owners, from the event log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import MOMENT, SINCE, Failed, Options, group
from ksi.console.show import clean, instant, print_json, show_json, show_table

if TYPE_CHECKING:
    from ksi.console.reads import Reads

FOLLOW_S: Final = 0.1  # How often `-f` looks: a read is microseconds and sends no message.
PAGE: Final = 1000  # Events read at once.
STEMS_MAX: Final = 10_000  # Names remembered while files are written.
SHOWN_CHARS: Final = 400  # Of what an event holds, in a line.


def _filters(function: Any) -> Any:
    """Add the options that say which events are meant."""
    options = (
        click.option(
            "--match", "event_patterns", metavar="PATTERN", multiple=True,
            help="Only events with such a name: 'completion:*'. More than one: any of them.",
        ),
        click.option("--agent", "agent_id", metavar="NAME", help="Only what NAME has to do with."),
        click.option("--session", "session_id", metavar="SESSION", help="Only of this session."),
        click.option(
            "--correlation", "correlation_id", metavar="ID", help="Only what belongs to this id."
        ),
        click.option("--since", type=MOMENT, help=SINCE),
        click.option("--until", type=MOMENT, help="Only what was before: 10m, a date or a time."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@group("events", invoke_without_command=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@_filters
@click.option("--after", type=click.IntRange(min=0), help="Only those behind this number.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--resolve", is_flag=True, help="Show what is only referred to, too.")
@click.pass_context
def events(
    ctx: click.Context,
    /,
    follow: bool,
    after: int | None,
    limit: int,
    resolve: bool,
    **given: Any,
) -> None:
    """Show what has happened: the newest events, the oldest of them first. Sends no message.

    With `--after` those that come next. With `--json` and `-f`, one JSON object a line.
    """
    if ctx.invoked_subcommand is not None:
        return
    options: Options = ctx.obj
    read = _reads(options)
    wanted = {**_fields(given), "resolve_references": resolve}
    if after is None:
        found, more = _newest(read, wanted, limit)
        upto = found[-1]["n"] if found else read("events", "event_log:newest")["n"]
    else:
        found, upto, more = _after(read, wanted, after, limit)
    if options.json and not follow:
        show_json("events", {"events": found, "more": more, "upto": upto})
        return
    for event in found:
        show_event(options, event)
    if more and not follow:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)
    wanted.pop("since", None)
    while follow:
        found, upto, more = _after(read, wanted, upto, PAGE)
        for event in found:
            show_event(options, event)
        if not more:
            time.sleep(FOLLOW_S)  # Reads cost its owner nothing.


@events.command("stats")
@click.pass_obj
def stats(options: Options) -> None:
    """Show how much there is in the log, and what is not. Sends no message."""
    found = _reads(options)("events", "event_log:stats")
    if options.json:
        show_json("events.stats", found)
        return
    for name in ("events", "n", "dropped", "per_s", "subscriptions"):
        print(f"{name:<14} {found[name]}")
    for name in ("oldest", "newest"):
        print(f"{name:<14} {instant(found[name])}")
    print(f"{'behind':<14} {sum(found['behind'].values())}")
    print()
    show_table(("DAY", "EVENTS"), sorted(found["days"].items()))


@events.command("export")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@_filters
@click.option("--resolve", is_flag=True, help="Put what is only referred to in its place.")
@click.pass_obj
def export(options: Options, /, directory: Path, resolve: bool, **given: Any) -> None:
    """Write events into DIRECTORY, a file each: <date>/evt_<timestamp>_<name>.json.

    Sends no message. Where events have time and name in common, a number makes their files differ.
    """
    read = _reads(options)
    wanted = {**_fields(given), "resolve_references": resolve}
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise Failed(f"{directory} is not empty", hint="name a directory of its own")
    written = 0
    used: dict[str, int] = {}
    for event in _all(read, wanted):
        _write(event, directory, used)
        written += 1
    if options.json:
        show_json("events.export", {"events": written, "directory": str(directory)})
    else:
        print(f"{written} events in {directory}")


def _write(event: dict[str, Any], directory: Path, used: dict[str, int]) -> None:
    """Write one event into the directory of its day, under a name nothing has yet.

    `used` has how many names of a stem are taken; it is a hint, and the file system decides.
    """
    from ksi.transport.moments import day_of

    day = directory / day_of(event["timestamp"])
    day.mkdir(exist_ok=True)
    stem = f"evt_{event['timestamp']:.6f}_{event['event'].replace(':', '_')}"
    if len(used) > STEMS_MAX:
        used.clear()
    for number in count(used.get(stem, 0) + 1):
        used[stem] = number
        name = stem if number == 1 else f"{stem}_{number}"
        with suppress(FileExistsError), (day / f"{name}.json").open("x") as file:
            file.write(json.dumps(event, ensure_ascii=False, indent=2) + "\n")
            return


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in given.items() if value is not None}
    return {**fields, "event_patterns": list(fields["event_patterns"])}


def _newest(read: Reads, wanted: dict[str, Any], limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Return the newest events, the oldest of them first, and whether there are more."""
    found: list[dict[str, Any]] = []
    after = None
    while len(found) < limit:
        rest = min(PAGE, limit - len(found))
        page = _page(read, {**wanted, "reverse": True}, after, rest)
        found += page["events"]
        after = page["next"]
        if after is None:
            break
    return found[::-1], after is not None


def _after(
    read: Reads, wanted: dict[str, Any], after: int, limit: int
) -> tuple[list[dict[str, Any]], int, bool]:
    """Return the next events, up to which number was looked, and whether there are more."""
    found: list[dict[str, Any]] = []
    more = True
    while more and len(found) < limit:
        page = _page(read, wanted, after, min(PAGE, limit - len(found)))
        found += page["events"]
        after, more = page["upto"], page["next"] is not None
    return found, after, more


def _all(read: Reads, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    after, more = 0, True
    while more:
        found, after, more = _after(read, wanted, after, PAGE)
        yield from found


def _page(read: Reads, wanted: dict[str, Any], after: int | None, limit: int) -> dict[str, Any]:
    place = {} if after is None else {"after": after}
    return read("events", "event_log:query", **wanted, **place, limit=limit)


def show_event(options: Options, event: dict[str, Any]) -> None:
    """Print one event in a line; with `--json` as an object."""
    if options.json:
        print_json(event)
    else:
        who = event.get("agents", ["-"])[0]
        said = json.dumps(event["data"], ensure_ascii=False)
        said = said if len(said) <= SHOWN_CHARS else f"{said[:SHOWN_CHARS]} …"
        where = event.get("session_id") or "-"
        at = instant(event["timestamp"])
        print(clean(f"{event['n']:>8}  {at}  {event['event']}  {who}  {where}  {said}"))
    sys.stdout.flush()


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var, options.identity)
