"""`ksi index`: find again what was said, build the index again, see whether it is right."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import MOMENT, SINCE, Options, group
from ksi.console.show import instant, show_json, show_table, size

if TYPE_CHECKING:
    from ksi.console.reads import Reads

LOOK_S: Final = 0.1  # How often a rebuild is looked at: a read, no message.
SAY_S: Final = 1.0  # How often it is said how far it is.
EXIT_DIFFERENT: Final = 1  # `verify` found differences.


@group("index", invoke_without_command=True)
@click.pass_context
def index(ctx: click.Context) -> None:
    """Find again what was said; look after the index. Without a sub-command: its status."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(status)


@index.command("status")
@click.pass_obj
def status(options: Options) -> None:
    """Show how far the index has come and what goes on. Sends no message."""
    found = _reads(options)("index", "index:status")
    if options.json:
        show_json("index", found)
        return
    for name, value in found.items():
        if name != "verified":
            shown = size(value) if name.endswith("_bytes") else value
            print(f"{name:<12} {'-' if shown is None else shown}")
    verified = found["verified"]
    if verified is not None:
        print(f"{'verified':<12} {instant(verified['at'])}, {verified['differences']} differences")


@index.command("query")
@click.option("--session", "session_id", metavar="SESSION", help="Only of this session.")
@click.option("--agent", "agent_id", metavar="NAME", help="Only where NAME takes part.")
@click.option("--event", "event_type", metavar="EVENT", help="Only these, as completion:result.")
@click.option("--pattern", "pattern_type", metavar="PATTERN", help="Only these, as peer_to_peer.")
@click.option("--correlation", "correlation_id", metavar="ID", help="Only with this id.")
@click.option("--conversation", "conversation_id", metavar="ID", help="Only of this conversation.")
@click.option("--since", type=MOMENT, help=SINCE)
@click.option("--pending", is_flag=True, help="Only requests that have no response yet.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def query(
    options: Options, /, since: float | None, pending: bool, limit: int, **given: str | None
) -> None:
    """List entries, the newest first, with the place of each in its file. Sends no message.

    With `--pending` the oldest first.
    """
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if since is not None:
        fields["since"] = since
    if not pending:
        fields["reverse"] = True
    operation = "index:pending" if pending else "index:query"
    found, more = _reads(options).pages("index", operation, "entries", limit)(**fields)
    if options.json:
        show_json("index.query", {"entries": found, "more": more})
        return
    rows = (
        (
            instant(each["timestamp"]),
            each["event_type"],
            " ".join(each["participating_agents"]),
            each["pattern_type"],
            each["correlation_id"],
            _answered(each),
            each["session_id"],
            each["line_number"],
            each["byte_offset"],
        )
        for each in found
    )
    headers = (
        "AT", "EVENT", "AGENTS", "PATTERN", "CORRELATION", "RESPONSE", "SESSION", "LINE", "BYTE",
    )  # fmt: skip
    show_table(headers, rows)
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


def _answered(entry: dict[str, Any]) -> str | None:
    if not entry["requests_response"]:
        return None
    return "yes" if entry["has_response"] else "pending"


@index.command("rebuild")
@click.option("--no-wait", is_flag=True, help="Only order it.")
@click.pass_obj
def rebuild(options: Options, no_wait: bool) -> None:
    """Build the index again from the session files. The present one is read until it is done."""
    options.require_running()
    begun_s = time.monotonic()
    with options.client() as client:
        number = client.ask("index:rebuild")["number"]
    if no_wait:
        if options.json:
            show_json("index.rebuild", {"number": number, "done": False})
        else:
            print(f"ordered, number {number}: ksi index status")
        return
    read = _reads(options)
    say = _progress("rebuilding")
    while (now := read("index", "index:status"))["rebuilt"] < number:
        say(now["done_bytes"], now["total_bytes"])
        options.require_running()
        time.sleep(LOOK_S)  # A poll that ends.
    seconds = round(time.monotonic() - begun_s, 3)
    if options.json:
        fields = {"number": number, "done": True, "rows": now["rows"], "seconds": seconds}
        show_json("index.rebuild", fields)
    else:
        print(f"built again: {now['rows']} rows in {seconds:.1f} s")


@index.command("verify")
@click.pass_obj
def verify(options: Options) -> int:
    """Compare every row with the line it speaks of. Sends no message; exit 1 if any differs."""
    from ksi.actors.followers.indexed import Verification

    _reads(options)("index", "index:status")  # says that nothing has ever run here, if so
    verification = Verification(options.var)
    say = _progress("verifying")
    while verification.turn():
        say(verification.done_bytes, verification.total_bytes)
    report = verification.report()
    if options.json:
        show_json("index.verify", report)
    else:
        for text in report["found"]:
            print(text)
        if report["differences"] > len(report["found"]):
            print(f"and {report['differences'] - len(report['found'])} more")
        print(
            f"{report['rows']} rows of {report['sessions']} sessions, "
            f"{report['differences']} differences"
        )
    if report["differences"]:
        print("  ksi index rebuild makes the index agree with the files", file=sys.stderr)
    return EXIT_DIFFERENT if report["differences"] else 0


def _progress(what: str) -> Callable[[int, int], None]:
    """Return what says now and then how far something is."""
    said_s = time.monotonic()

    def say(done_bytes: int, total_bytes: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= SAY_S:
            said_s = time.monotonic()
            part = f"{100 * done_bytes // total_bytes}%" if total_bytes else "..."
            print(f"  {what} {part}", file=sys.stderr, flush=True)

    return say


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var)
