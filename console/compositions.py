"""`ksi compositions`: what agents are made of, as the files say."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ksi.console.options import Options, group
from ksi.console.ordered import order
from ksi.console.show import clean, instant, show_json, show_table

if TYPE_CHECKING:
    from ksi.console.reads import Reads


@group("compositions", invoke_without_command=True)
@click.pass_context
def compositions(ctx: click.Context) -> None:
    """Find compositions. Without a sub-command: list them all."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_compositions)


@compositions.command("list")
@click.option("--type", "type_", metavar="TYPE", help="Only of this type.")
@click.option("--name", metavar="PART", help="Only those with this in their id or name.")
@click.option(
    "--tag", "tags", multiple=True, metavar="TAG", help="Only with this tag; of several, all."
)
@click.option("--capability", "capabilities", multiple=True, metavar="NAME", help="The same.")
@click.option(
    "--where", multiple=True, metavar="KEY=VALUE", help="Only with this value; JSON, or a text."
)
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def list_compositions(
    options: Options,
    type_: str | None = None,
    name: str | None = None,
    tags: tuple[str, ...] = (),
    capabilities: tuple[str, ...] = (),
    where: tuple[str, ...] = (),
    limit: int = 100,
) -> None:
    """List compositions, those for which every filter holds. Sends no message."""
    fields: dict[str, Any] = {
        "type": type_, "name": name, "tags": list(tags), "capabilities": list(capabilities),
        "metadata_filter": dict(map(_pair, where)),
    }  # fmt: skip
    given = {key: value for key, value in fields.items() if value}
    pages = _reads(options).pages("library", "composition:list", "compositions", limit)
    found, more = pages(**given)
    if options.json:
        show_json("compositions", {"compositions": found, "more": more})
        return
    rows = (
        (
            each["id"],
            each["component_type"],
            each["version"],
            " ".join(each["tags"]) or None,
            each["description"],
        )
        for each in found
    )
    show_table(("ID", "TYPE", "VERSION", "TAGS", "DESCRIPTION"), rows)
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


@compositions.command("show")
@click.argument("name")
@click.option("--type", "type_", metavar="TYPE", help="Of this type, where that decides.")
@click.pass_obj
def show(options: Options, name: str, type_: str | None) -> None:
    """Show one composition: what it says of itself, and its text. Sends no message."""
    given = {"name": name} | ({"type": type_} if type_ else {})
    found = _reads(options)("library", "composition:get", **given)
    if options.json:
        show_json("compositions.show", found)
        return
    for key, value in found.items():
        if key in ("content", "metadata"):
            continue
        shown = instant(value) if key.endswith("_at") else value
        shown = " ".join(shown) if isinstance(shown, list) else shown
        print(f"{key:<17} {clean(str(shown)) if shown not in (None, '') else '-'}")
    print()
    for line in (found["content"] or "").splitlines():
        print(clean(line))


@compositions.command("render")
@click.argument("name")
@click.option("--set", "values", multiple=True, metavar="NAME=VALUE", help="JSON, or a text.")
@click.pass_obj
def render(options: Options, name: str, values: tuple[str, ...]) -> None:
    """Print one with all it is made of, and variables filled in. Sends no message."""
    variables = dict(map(_pair, values))
    found = _reads(options)("library", "composition:render", name=name, variables=variables)
    if options.json:
        show_json("compositions.render", found)
        return
    for line in found["content"].splitlines():
        print(clean(line))
    if found["missing"]:
        print(f"without a value: {clean(' '.join(found['missing']))}", file=sys.stderr)


@compositions.command("problems")
@click.option("--state", type=click.Choice(["rejected", "excluded"]), help="Only these.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True)
@click.pass_obj
def problems(options: Options, state: str | None, limit: int) -> None:
    """List the files that are no compositions, and why not. Sends no message."""
    pages = _reads(options).pages("library", "composition:problems", "problems", limit)
    found, more = pages(**({"state": state} if state else {}))
    if options.json:
        show_json("compositions.problems", {"problems": found, "more": more})
        return
    show_table(
        ("FILE", "STATE", "REASON"),
        ((each["file_path"], each["state"], each["reason"]) for each in found),
    )


@compositions.command("status")
@click.pass_obj
def status(options: Options) -> None:
    """Show how many there are, and what goes on. Sends no message."""
    found = _reads(options)("library", "composition:status")
    if options.json:
        show_json("compositions.status", found)
        return
    types = " ".join(f"{name}={count}" for name, count in found.pop("types").items())
    for name, value in {**found, "types": types}.items():
        print(f"{name:<12} {'-' if value in (None, '') else clean(str(value))}")


@compositions.command("rebuild")
@click.option("--no-wait", is_flag=True, help="Only order it.")
@click.pass_obj
def rebuild(options: Options, no_wait: bool) -> None:
    """Make the cache again from the files. The present one is read until it is done."""
    order(
        options,
        "compositions.rebuild",
        "composition:rebuild_index",
        "composition:status",
        "rebuilt",
        wait=not no_wait,
    )


def _pair(text: str) -> tuple[str, Any]:
    import json

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.UsageError(f"{text!r} is no NAME=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var, options.identity)
