"""`ksi conversations`: what was said in sessions and in imported logs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import MOMENT, SINCE, Options, group
from ksi.console.ordered import order
from ksi.console.show import clean, instant, show_json, show_table, size

if TYPE_CHECKING:
    from ksi.console.reads import Reads

PAGE: Final = 1000  # Messages read at once.

_file = click.option(
    "--file", "file_path", metavar="PATH", help="Of this file, where that decides."
)


@group("conversations", invoke_without_command=True)
@click.pass_context
def conversations(ctx: click.Context) -> None:
    """Look through conversations: sessions, and imported logs (`ksi import`)."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_conversations)


@conversations.command("list")
@click.option(
    "--sort", "sort_by",
    type=click.Choice(["last_timestamp", "first_timestamp", "message_count"]),
    default="last_timestamp", show_default=True, help="By this, the greatest first.",
)  # fmt: skip
@click.option("--since", type=MOMENT, help=SINCE)
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def list_conversations(
    options: Options,
    sort_by: str = "last_timestamp",
    since: float | None = None,
    limit: int = 100,
) -> None:
    """List conversations. Sends no message."""
    fields: dict[str, Any] = {"sort_by": sort_by}
    if since is not None:
        fields["start_date"] = since
    read, offset = _reads(options), 0
    found: list[dict[str, Any]] = []
    while len(found) < limit and offset is not None:
        more = {"offset": offset, "limit": min(limit - len(found), PAGE)}
        page = read("library", "conversation:list", **fields, **more)
        found += page["conversations"]
        offset = page["next"]
    if options.json:
        show_json("conversations", {"conversations": found, "total": page["total"]})
        return
    show_table(_HEADERS, map(_row, found))
    if offset is not None:
        print(f"there are {page['total']}: --limit {page['total']}", file=sys.stderr)


_HEADERS: Final = ("CONVERSATION", "ORIGIN", "MESSAGES", "BAD", "SIZE", "LAST", "WHO")


def _row(each: dict[str, Any]) -> tuple[Any, ...]:
    return (
        each["session_id"],
        each["origin"],
        each["message_count"],
        each["bad_lines"],
        size(each["size_bytes"]),
        instant(each["last_timestamp"]),
        " ".join(each["participants"]) or None,
    )


@conversations.command("get")
@click.argument("session_id")
@_file
@click.option("--limit", type=click.IntRange(min=1), default=PAGE, show_default=True)
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True)
@click.pass_obj
def get(options: Options, session_id: str, file_path: str | None, limit: int, offset: int) -> None:
    """Print the messages of a conversation. Sends no message."""
    read = _reads(options)
    given = _given(session_id, file_path)
    found: list[dict[str, Any]] = []
    place: int | None = offset
    while len(found) < limit and place is not None:
        more = {"offset": place, "limit": min(limit - len(found), PAGE)}
        page = read("library", "conversation:get", **given, **more)
        found += page["messages"]
        place = page["next"]
    if options.json:
        show_json("conversations.get", {**page, "messages": found, "offset": offset})
        return
    for each in found:
        head = f"{each['line_number']:>6}  {instant(each['timestamp'])}  {each['sender']}"
        print(clean(f"{head}  ({each['type']})"))
        for line in (each["content"] or "").splitlines():
            print(f"        {clean(line)}")


@conversations.command("search")
@click.argument("query", nargs=-1, required=True)
@click.option("--session", "session_id", metavar="ID", help="Only in this conversation.")
@click.option("--sender", metavar="NAME", help="Only what NAME said.")
@click.option("--since", type=MOMENT, help=SINCE)
@click.option("--until", type=MOMENT, help="Only from before.")
@click.option("--limit", type=click.IntRange(1, 100), default=50, show_default=True)
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True)
@click.pass_obj
def search(options: Options, /, query: tuple[str, ...], **given: Any) -> None:
    """Find messages that hold all words of QUERY. Sends no message.

    "two words" in quotes are next to each other, begin* is the beginning of a word.
    """
    words = " ".join(f'"{word}"' if " " in word and '"' not in word else word for word in query)
    fields = {name: value for name, value in given.items() if value is not None}
    found = _reads(options)("library", "conversation:search", query=words, **fields)
    if options.json:
        show_json("conversations.search", found)
        return
    for each in found["results"]:
        for match in each["matches"]:
            place = f"{each['file_path']}:{match['line_number']}"
            preview = " ".join(match["content_preview"].split())
            print(clean(f"{place}: {instant(match['timestamp'])} {match['sender']}: {preview}"))
    shown = len(found["results"])
    print(
        f"{found['total_matches']} messages in {found['total_conversations']} conversations"
        + (f", {shown} of these are shown" if shown < found["total_conversations"] else ""),
        file=sys.stderr,
    )


@conversations.command("export")
@click.argument("session_id")
@_file
@click.option(
    "--format", "format_", type=click.Choice(["markdown", "json"]), default="markdown",
    show_default=True,
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="To this file."
)
@click.pass_obj
def export(
    options: Options, session_id: str, file_path: str | None, format_: str, output: Path | None
) -> None:
    """Print a conversation as Markdown or JSON, or write it into a file. Sends no message."""
    if options.json:
        format_ = "json"
    parts = _parts(_reads(options), {**_given(session_id, file_path), "format": format_})
    if output is None:
        for text in parts:
            sys.stdout.write(text)
        return
    with output.open("w") as file:
        for text in parts:
            file.write(text)
    print(f"written to {output}", file=sys.stderr)


def _parts(read: Reads, given: dict[str, Any]) -> Iterator[str]:
    offset: int | None = 0
    while offset is not None:
        page = read("library", "conversation:export", **given, offset=offset)
        yield page["content"]
        offset = page["next"]


@conversations.command("stats")
@click.pass_obj
def stats(options: Options) -> None:
    """Show how much there is in all. Sends no message."""
    found = _reads(options)("library", "conversation:stats")
    _show(options, "conversations.stats", found)


@conversations.command("status")
@click.pass_obj
def status(options: Options) -> None:
    """Show what goes on. Sends no message."""
    found = _reads(options)("library", "conversation:status")
    _show(options, "conversations.status", found)


@conversations.command("problems")
@_file
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True)
@click.pass_obj
def problems(options: Options, file_path: str | None, limit: int) -> None:
    """List lines and files that cannot be read, and why not. Sends no message."""
    pages = _reads(options).pages("library", "conversation:problems", "problems", limit)
    found, more = pages(**({"file_path": file_path} if file_path else {}))
    if options.json:
        show_json("conversations.problems", {"problems": found, "more": more})
        return
    for each in found:
        print(clean(f"{each['file_path']}:{each['line_number']}: {each['reason']}"))


@conversations.command("locks")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def locks(options: Options, limit: int) -> None:
    """List locked conversations, whose they are, and how many wait. Sends no message."""
    found, more = _reads(options).pages("library", "conversation:locks", "locks", limit)()
    if options.json:
        show_json("conversations.locks", {"locks": found, "more": more})
        return
    rows = (
        (
            each["conversation_id"],
            each["state"],
            each["holder"],
            each["holder_request"],
            each["epoch"],
            each["queue_length"],
            instant(each["acquired_at"]),
        )
        for each in found
    )
    show_table(("CONVERSATION", "STATE", "HOLDER", "REQUEST", "EPOCH", "WAITING", "SINCE"), rows)


@conversations.command("rebuild")
@click.option("--no-wait", is_flag=True, help="Only order it.")
@click.pass_obj
def rebuild(options: Options, no_wait: bool) -> None:
    """Make the cache again from the files. The present one is read until it is done."""
    order(
        options,
        "conversations.rebuild",
        "conversation:rebuild_index",
        "conversation:status",
        "rebuilt",
        wait=not no_wait,
    )


def _given(session_id: str, file_path: str | None) -> dict[str, Any]:
    return {"session_id": session_id} | ({"file_path": file_path} if file_path else {})


def _show(options: Options, name: str, found: dict[str, Any]) -> None:
    if options.json:
        show_json(name, found)
        return
    for key, value in found.items():
        shown = value
        if key.endswith("_bytes"):
            shown = size(value)
        elif key.endswith("_timestamp"):
            shown = instant(value)
        print(f"{key:<23} {'-' if shown is None else shown}")


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var, options.identity)
