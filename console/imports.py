"""`ksi import`: have logs of other programs indexed where they are."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ksi.console.options import Options, command
from ksi.console.ordered import order
from ksi.console.show import instant, show_json, show_table
from ksi.transport.errors import Invalid, NotFound
from ksi.transport.remote import require_here


@command("import")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--forget", is_flag=True, help="Forget what was imported from PATH. The files stay.")
@click.option("--list", "lists", is_flag=True, help="List what is imported.")
@click.option("--no-wait", is_flag=True, help="Only order it.")
@click.pass_obj
def imports(options: Options, path: Path | None, forget: bool, lists: bool, no_wait: bool) -> None:
    """Have a log, or all .jsonl files below a folder, indexed where they are, from now on.

    Known are lines of the Claude command line (`human`, `claude`), of KSI's response logs (`ksi`,
    `response`), and the documented ones (`event`, `data`, `timestamp`). What is imported is listed,
    read and searched with `ksi conversations`.
    """
    if lists or path is None:
        return _list(options)
    require_here(options.var, "ksi import")
    found = Path(os.path.realpath(path))
    if not forget:
        _require_logs(options, found)
    status = order(
        options,
        "import",
        "conversation:forget" if forget else "conversation:import",
        "conversation:status",
        "imported",
        wait=not no_wait,
        shows=no_wait,
        path=str(found),
    )
    if status:
        _tell(options, found)
    return None


def _require_logs(options: Options, path: Path) -> None:
    """Raise unless there is something at `path` that is no session file of ours."""
    if not path.exists():
        raise NotFound(f"there is no {path}", hint="ksi import --help")
    if path.is_relative_to(os.path.realpath(options.var / "logs" / "responses")):
        text = f"{path} holds session files, which are indexed as they are written"
        raise Invalid(text, hint="ksi conversations list")


def _tell(options: Options, path: Path) -> None:
    from ksi.console.reads import Reads

    found = Reads(options.var, options.identity)("library", "conversation:stats")
    if options.json:
        show_json("import", {"path": str(path), "done": True, **found})
        return
    print(
        f"{found['imported_conversations']} logs are imported, {found['bad_lines']} lines and "
        f"{found['unread_files']} files of them cannot be read"
    )
    if found["bad_lines"] or found["unread_files"]:
        print("  ksi conversations problems")


def _list(options: Options) -> None:
    from ksi.console.reads import Reads

    found = Reads(options.var, options.identity)("library", "conversation:imports")["imports"]
    if options.json:
        show_json("import", {"imports": found})
        return
    rows = ((each["path"], each["by"], instant(each["at"])) for each in found)
    show_table(("PATH", "BY", "SINCE"), rows)
