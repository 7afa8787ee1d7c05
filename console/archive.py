"""`ksi archive`: put the files of closed sessions away, compressed, and have them back; days of
the event log go there by themselves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ksi.console.options import DURATION, Failed, Options, group
from ksi.console.show import instant, show_json, show_table, size
from ksi.transport.errors import NotFound
from ksi.transport.limits import ARCHIVE_MAX
from ksi.transport.remote import require_here

if TYPE_CHECKING:
    from ksi.console.reads import Reads

LOOK_S: Final = 0.02  # How often it is looked whether files are where they should be.
SAY_S: Final = 1.0
STUCK_S: Final = 30.0  # Without any progress for this long something is wrong.
EVERYTHING: Final = 1 << 62


@group("archive")
def archive() -> None:
    """Put the files of closed sessions away, compressed, and have them back.

    What is archived is read, listed and found as before. Days of the event log that are over their
    time (`events.keep_days`) are archived by themselves, and found again when they are back.
    """


@archive.command("run")
@click.argument("sessions", nargs=-1)
@click.option("--closed-for", type=DURATION, default=0.0, help="Only if closed this long: 30d.")
@click.pass_obj
def run(options: Options, sessions: tuple[str, ...], closed_for: float) -> None:
    """Archive the closed SESSIONS, by default all of them. Killed half way, run it again."""
    require_here(options.var, "ksi archive run")
    options.require_running()
    files = _Files(options.var)
    pages = _reads(options).pages("sessions", "session:list", "sessions", EVERYTHING)
    if sessions:
        wanted = dict.fromkeys(sessions, 1)
    else:
        before = time.time() - closed_for
        wanted = {
            each["session_id"]: each["size_bytes"]
            for each in pages(status="closed")[0]
            if each["updated_at"] <= before
        }
    names = [name for name, size_bytes in wanted.items() if size_bytes and not files.is_away(name)]
    seconds = _move(options, "session:archive", names, files.is_away)
    _tell(options, "archive.run", "sessions", "archived", names, seconds)


@archive.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def list_(options: Options, limit: int) -> None:
    """List what is archived: sessions, and days of the event log. Sends no message."""
    require_here(options.var, "ksi archive list")
    files = _Files(options.var)
    found, more = _reads(options).pages("sessions", "session:archived", "sessions", limit)()
    for each in found:
        each["archived_bytes"] = files.archived_bytes(each["session_id"])
    if options.json:
        show_json("archive", {"sessions": found, "more": more, "days": _archived_days(options.var)})
        return
    rows = (
        (
            each["session_id"],
            size(each["size_bytes"]),
            size(each["archived_bytes"]),
            instant(each["archived_at"]),
            each["archived_by"],
        )
        for each in found
    )
    show_table(("SESSION", "SIZE", "ARCHIVED", "AT", "BY"), rows)
    if days := _archived_days(options.var):
        print()
        show_table(
            ("DAY OF EVENTS", "SIZE", "ARCHIVED"),
            ((day, *map(size, each.values())) for day, each in days.items()),
        )
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


@archive.command("restore")
@click.argument("sessions", nargs=-1)
@click.option("--day", "days", multiple=True, help="A day of the event log: 2026-05-04.")
@click.pass_obj
def restore(options: Options, sessions: tuple[str, ...], days: tuple[str, ...]) -> None:
    """Have the files of SESSIONS back where they were, or days of the event log."""
    require_here(options.var, "ksi archive restore")
    if bool(sessions) == bool(days):
        raise click.UsageError("name sessions, or days with --day")
    options.require_running()
    if days:
        _restore_days(options, list(dict.fromkeys(days)))
        return
    files = _Files(options.var)
    names = list(dict.fromkeys(sessions))
    seconds = _move(options, "session:unarchive", names, files.is_back)
    _tell(options, "archive.restore", "sessions", "restored", names, seconds)


def _restore_days(options: Options, days: list[str]) -> None:
    archived = _archived_days(options.var)
    if missing := [day for day in days if day not in archived]:
        raise NotFound(f"{missing[0]} is not in the archive", hint="ksi archive list")
    seconds = _move(
        options,
        "event_log:restore",
        days,
        lambda day: day not in _archived_days(options.var),
        field="days",
    )
    _tell(options, "archive.restore", "days", "restored", days, seconds)


def _archived_days(var: Path) -> dict[str, dict[str, int]]:
    from ksi.actors.followers.recorded import archived_days

    return archived_days(var)


class _Files:
    """Where the files of sessions are."""

    def __init__(self, var: Path) -> None:
        from ksi.actors.reading import archive_directory, log_directory

        self._logs = log_directory(var)
        self._archive = archive_directory(var)

    def is_away(self, session_id: str) -> bool:
        """Whether the file of a session is in the archive, and only there."""
        return self._archived(session_id).exists() and not self._log(session_id).exists()

    def is_back(self, session_id: str) -> bool:
        """Whether it is not in the archive."""
        return not self._archived(session_id).exists()

    def archived_bytes(self, session_id: str) -> int | None:
        """Return how much room it takes in the archive; None if it is not there yet."""
        try:
            return self._archived(session_id).stat().st_size
        except FileNotFoundError:
            return None

    def _log(self, session_id: str) -> Path:
        return self._logs / f"{session_id}.jsonl"

    def _archived(self, session_id: str) -> Path:
        return self._archive / f"{session_id}.jsonl.zst"


def _move(
    options: Options,
    operation: str,
    names: list[str],
    is_done: Callable[[str], bool],
    field: str = "session_ids",
) -> float:
    """Order it, wait until all is done, saying how far it is; return how long it took."""
    begun_s = time.monotonic()
    done = 0
    with options.client() as client, bar(len(names)) as say:
        for start in range(0, len(names), ARCHIVE_MAX):
            some = names[start : start + ARCHIVE_MAX]
            client.ask(operation, {field: some})
            for _name in _arriving(options, some, is_done):
                done += 1
                say(done)
    return round(time.monotonic() - begun_s, 3)


def _arriving(
    options: Options, names: Iterable[str], is_done: Callable[[str], bool]
) -> Iterator[str]:
    """Yield names as it is done for them."""
    waiting = list(names)
    until_s = time.monotonic() + STUCK_S
    while waiting:
        left = []
        for name in waiting:
            if is_done(name):
                yield name
                until_s = time.monotonic() + STUCK_S
            else:
                left.append(name)
        waiting = left
        if time.monotonic() > until_s:
            raise Failed(
                f"{len(waiting)} of them, as {waiting[0]}, are not where they should be",
                hint="ksi logs files, or events, says why; then run it again",
            )
        options.require_running()
        time.sleep(LOOK_S)  # A poll that ends.


@contextmanager
def bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many of `total` are done: a bar on a terminal, else a line a second."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    said_s = time.monotonic()

    def say(done: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= SAY_S:
            said_s = time.monotonic()
            print(f"  {done} of {total}", file=sys.stderr, flush=True)

    yield say


def _tell(
    options: Options, schema: str, of: str, done: str, names: list[str], seconds: float
) -> None:
    if options.json:
        show_json(schema, {of: names, "seconds": seconds})
    else:
        print(f"{len(names)} {of} {done} in {seconds:.1f} s")


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var)
