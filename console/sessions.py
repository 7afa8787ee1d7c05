"""`ksi sessions`: the conversations, who writes them, and what is said."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import DURATION, Options, confirm, group
from ksi.console.show import clean, instant, print_json, show_json, show_table, size
from ksi.transport.limits import ASK_TIMEOUT_S

if TYPE_CHECKING:
    from ksi.console.reads import Reads

FOLLOW_S: Final = 0.1  # How often `tail -f` looks: a read is microseconds and sends no message.
PAGE: Final = 1000  # Entries or sessions read at once.

_timeout = click.option(
    "--timeout", type=DURATION, default=ASK_TIMEOUT_S, help="How long to wait. [5s]"
)


@group("sessions", invoke_without_command=True)
@click.pass_context
def sessions(ctx: click.Context) -> None:
    """Look at sessions, hand them over, close them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_sessions)


@sessions.command("list")
@click.option("--owner", metavar="NAME", help="Only those NAME writes.")
@click.option("--status", type=click.Choice(["active", "closed"]), help="Only these.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def list_sessions(
    options: Options, owner: str | None = None, status: str | None = None, limit: int = 100
) -> None:
    """List sessions in the order of their ids. Sends no message."""
    fields = {"owner": owner, "status": status}
    given = {name: value for name, value in fields.items() if value is not None}
    pages = _reads(options).pages("sessions", "session:list", "sessions", limit)
    found, more = pages(**given)
    if options.json:
        show_json("sessions", {"sessions": found, "more": more})
        return
    rows = (
        (
            each["session_id"],
            each["owner"],
            each["epoch"],
            each["status"],
            each["seq"],
            size(each["size_bytes"]),
            instant(each["updated_at"]),
            each["pattern"],
            each["title"] or None,
        )
        for each in found
    )
    headers = ("SESSION", "OWNER", "EPOCH", "STATUS", "ENTRIES", "SIZE", "LAST", "PATTERN", "TITLE")
    show_table(headers, rows)
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


@sessions.command("show")
@click.argument("session_id")
@click.pass_obj
def show(options: Options, session_id: str) -> None:
    """Show one session and who takes part in it. Sends no message."""
    read = _reads(options)
    session = read("sessions", "session:get", session_id=session_id)
    part = read("sessions", "session:participants", session_id=session_id)["participants"]
    if options.json:
        show_json("sessions.show", {**session, "participants": part})
        return
    for name, value in session.items():
        shown = instant(value) if name.endswith("_at") else value
        print(f"{name:<12} {clean(str(shown)) if shown not in (None, '') else '-'}")
    print()
    rows = ((each["agent_id"], each["role"], instant(each["joined_at"])) for each in part)
    show_table(("PARTICIPANT", "ROLE", "SINCE"), rows)


@sessions.command("tail")
@click.argument("session_id")
@click.option("-n", "--lines", type=click.IntRange(min=1, max=PAGE), default=20, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is said.")
@click.pass_obj
def tail(options: Options, session_id: str, lines: int, follow: bool) -> None:
    """Print the newest entries of a session. Sends no message.

    With `--json` and `-f`, one JSON object a line.
    """
    read = _reads(options)
    page = read("sessions", "session:history", session_id=session_id, limit=lines)
    if options.json and not follow:
        show_json("sessions.tail", page)
        return
    for number, entry in _entries(read, page, follow):
        if options.json:
            print_json({"seq": number, **entry})
        else:
            _print_entry(number, entry)


def _entries(
    read: Reads, page: dict[str, Any], follow: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the entries of a page with their numbers, and with `follow` all later ones."""
    while True:
        yield from enumerate(page["entries"], page["first_seq"])
        if not follow:
            return
        if not page["entries"]:
            time.sleep(FOLLOW_S)  # Then look again, until Ctrl-C.
        after = page["first_seq"] - 1 + len(page["entries"])
        place = {"session_id": page["session_id"], "after": after}
        page = read("sessions", "session:history", **place, limit=PAGE)


def _print_entry(number: int, entry: dict[str, Any]) -> None:
    import json

    who = entry.get("metadata", {}).get("agent_id", "-")
    said = json.dumps(entry.get("data", {}), ensure_ascii=False)
    at = instant(entry.get("timestamp"))
    print(clean(f"{number:>6}  {at}  {who}  {entry.get('event')}  {said}"), flush=True)


@sessions.command("transfer")
@click.argument("session_id")
@click.option("--to", "to_agent", required=True, metavar="NAME", help="Who writes it from now on.")
@_timeout
@click.pass_obj
def transfer(options: Options, session_id: str, to_agent: str, timeout: float) -> None:
    """Hand a session over; what its former owner sends late is refused."""
    reply = _ask(options, "session:transfer", timeout, session_id=session_id, to_agent=to_agent)
    if options.json:
        show_json("sessions.transfer", reply)
    else:
        print(f"{session_id} is written by {reply['owner']} now, epoch {reply['epoch']}")


@sessions.command("close")
@click.argument("session_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_timeout
@click.pass_obj
def close(options: Options, session_id: str, yes: bool, timeout: float) -> None:
    """Close a session for good. It can still be read."""
    confirm(f"close session {session_id}", yes=yes)
    reply = _ask(options, "session:close", timeout, session_id=session_id)
    if options.json:
        show_json("sessions.close", reply)
    else:
        print(f"{session_id} is closed")


def _ask(options: Options, operation: str, timeout_s: float, **fields: str) -> dict[str, Any]:
    options.require_running()
    with options.client() as client:
        return client.ask(operation, fields, timeout_s=timeout_s)


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var, options.identity)
