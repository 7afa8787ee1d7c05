"""`ksi state`: what agents keep: values under keys, entities and their relationships, queues."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import DURATION, Options, confirm, group
from ksi.console.show import clean, duration, instant, print_json, show_json, show_table, size
from ksi.transport.limits import ASK_TIMEOUT_S

if TYPE_CHECKING:
    from ksi.console.reads import Reads

OWNER: Final = "state"
TEXT_CHARS: Final = 60  # Of properties in a table.

_timeout = click.option(
    "--timeout", type=DURATION, default=ASK_TIMEOUT_S, help="How long to wait. [5s]"
)
_namespace = click.option("--namespace", metavar="NAME", help="What stands before the key.")
_revision = click.option(
    "--revision", type=click.IntRange(min=0), help="Only if it has this revision still; 0: none."
)
_limit = click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)


@group("state", invoke_without_command=True)
@click.pass_context
def state(ctx: click.Context) -> None:
    """Look at what agents keep, and change it."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(summary)


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var, options.identity)


@state.command("summary")
@click.pass_obj
def summary(options: Options) -> None:
    """Count entities by type and relationships by theirs. Sends no message."""
    read = _reads(options)
    revision = read(OWNER, "state:changes")["revision"]
    entities = read(OWNER, "state:aggregate:count", group_by="type")["groups"]
    relationships = read(
        OWNER, "state:aggregate:count", target="relationships", group_by="relation_type"
    )["groups"]
    if options.json:
        fields = {"revision": revision, "entities": entities, "relationships": relationships}
        show_json("state", fields)
        return
    print(f"revision {revision}")
    rows = [("entity", each["value"], each["count"]) for each in entities]
    rows += [("relationship", each["value"], each["count"]) for each in relationships]
    show_table(("KIND", "TYPE", "COUNT"), rows)


@state.command("get")
@click.argument("key")
@_namespace
@click.pass_obj
def get(options: Options, key: str, namespace: str | None) -> None:
    """Print the value under KEY, as JSON. Sends no message."""
    found = _reads(options)(OWNER, "state:get", key=key, namespace=namespace)
    if options.json:
        show_json("state.get", found)
    else:
        print_json(found["value"])


@state.command("set")
@click.argument("key")
@click.argument("value")
@_namespace
@_revision
@click.option("--text", is_flag=True, help="VALUE is a text, whatever it looks like.")
@_timeout
@click.pass_obj
def set_value(
    options: Options,
    key: str,
    value: str,
    namespace: str | None,
    revision: int | None,
    text: bool,
    timeout: float,
) -> None:
    """Set a value under KEY: VALUE as JSON, or as a text where it is none."""
    fields = {"key": key, "value": value if text else _value_of(value), "namespace": namespace}
    reply = _ask(options, "state:set", timeout, **fields, revision=revision)
    if options.json:
        show_json("state.set", reply)
    else:
        print(f"{reply['id']} is set, revision {reply['revision']}")


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@state.command("delete")
@click.argument("key")
@_namespace
@_revision
@click.option("--yes", is_flag=True, help="Do not ask.")
@_timeout
@click.pass_obj
def delete(
    options: Options,
    key: str,
    namespace: str | None,
    revision: int | None,
    yes: bool,
    timeout: float,
) -> None:
    """Delete what is set under KEY."""
    confirm(f"delete {key}", yes=yes)
    fields = {"key": key, "namespace": namespace, "revision": revision}
    reply = _ask(options, "state:delete", timeout, **fields)
    if options.json:
        show_json("state.delete", reply)
    else:
        print(f"{reply['id']} is deleted")


@state.command("list")
@click.argument("prefix", required=False)
@_namespace
@_limit
@click.pass_obj
def list_keys(options: Options, prefix: str | None, namespace: str | None, limit: int) -> None:
    """List keys, all or those that begin with PREFIX. Sends no message."""
    read = _reads(options)
    found: dict[str, int] = {}
    fields: dict[str, Any] = {"prefix": prefix, "namespace": namespace}
    more = True
    while more and len(found) < limit:
        page = read(OWNER, "state:list", **fields, limit=min(limit - len(found), 1000))
        found |= page["keys"]
        fields["after"], more = page["next"], page["next"] is not None
    if options.json:
        show_json("state.list", {"keys": found, "more": more})
        return
    show_table(("KEY", "REVISION"), found.items())
    _say_more(more, limit)


@state.command("query")
@click.option("--type", "kind", metavar="TYPE", help="Only entities of this type.")
@click.option("--where", metavar="JSON", default="{}", help="""Such as '{"n": {"$gt": 1}}'.""")
@click.option("--order-by", default="created_at desc", show_default=True, metavar="NAME [desc]")
@_limit
@click.pass_obj
def query(options: Options, kind: str | None, where: str, order_by: str, limit: int) -> None:
    """Find entities by type and properties. Sends no message.

    `ksi help state:entity:query` explains conditions.
    """
    try:
        conditions = json.loads(where)
    except ValueError as error:
        raise click.UsageError(
            f"--where takes JSON, and {where[:100]!r} is none: {error}"
        ) from None
    pages = _reads(options).pages(OWNER, "state:entity:query", "entities", limit)
    found, more = pages(type=kind, where=conditions, order_by=order_by)
    if options.json:
        show_json("state.query", {"entities": found, "more": more})
        return
    now = time.time()
    rows = (
        (
            each["id"],
            each["type"],
            each["revision"],
            duration(now - each["updated_at"]),
            _short(each["properties"]),
        )
        for each in found
    )
    show_table(("ID", "TYPE", "REVISION", "CHANGED", "PROPERTIES"), rows)
    _say_more(more, limit)


@state.command("show")
@click.argument("entity_id", metavar="ID")
@click.pass_obj
def show(options: Options, entity_id: str) -> None:
    """Show one entity, with its relationships. Sends no message."""
    include = ["properties", "relationships"]
    found = _reads(options)(OWNER, "state:entity:get", id=entity_id, include=include)
    if options.json:
        show_json("state.show", found)
        return
    for name in ("id", "type", "revision", "created_at", "updated_at"):
        shown = instant(found[name]) if name.endswith("_at") else found[name]
        print(f"{name:<12} {shown}")
    for name, value in found["properties"].items():
        print(clean(f"{name:<12} {json.dumps(value, ensure_ascii=False)}"))
    for each in found["relationships"]:
        print(f"{each['from_id']} {each['relation_type']} {each['to_id']}")
    if found.get("more_relationships"):
        print(f"there are more: ksi ask state:relationship:query --from-id {entity_id}")


@state.command("queues")
@_namespace
@_limit
@click.pass_obj
def queues(options: Options, namespace: str | None, limit: int) -> None:
    """List queues that are not empty. Sends no message."""
    pages = _reads(options).pages(OWNER, "async_state:list_queues", "queues", limit)
    found, more = pages(namespace=namespace)
    if options.json:
        show_json("state.queues", {"queues": found, "more": more})
        return
    rows = ((each["namespace"], each["key"], each["size"], size(each["bytes"])) for each in found)
    show_table(("NAMESPACE", "KEY", "ITEMS", "SIZE"), rows)
    _say_more(more, limit)


@state.command("watch")
@click.argument("prefix", required=False)
@click.option("--id", "entity_id", metavar="ID", help="Only this one.")
@click.option("--after", type=click.IntRange(min=0), help="Begin behind this revision. [now]")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many.")
@click.pass_obj
def watch(
    options: Options,
    prefix: str | None,
    entity_id: str | None,
    after: int | None,
    count: int | None,
) -> None:
    """Print what changes until Ctrl-C, with `--json` one object a line: nothing is left out.

    All changes, or those of ids that begin with PREFIX.
    """
    options.require_running()
    with options.client() as client, client.watch(prefix, id=entity_id, after=after) as changes:
        print(f"watching from revision {changes.revision}", file=sys.stderr, flush=True)
        for number, change in enumerate(changes, 1):
            if options.json:
                print_json(change)
            else:
                _print_change(change)
            if number == count:
                return


def _print_change(change: dict[str, Any]) -> None:
    words = [instant(change["at"]), str(change["revision"]), change["id"], change["what"]]
    if change.get("relation_type"):
        words.append(f"{change['relation_type']} {change['to_id']}")
    if change.get("properties") is not None:
        words.append(_short(change["properties"]))
    if change.get("removed"):
        words.append(f"without {', '.join(change['removed'])}")
    print(clean("  ".join([*words, f"by {change['by']}"])), flush=True)


def _short(properties: dict[str, Any]) -> str:
    text = json.dumps(properties, ensure_ascii=False)
    return text if len(text) <= TEXT_CHARS else text[: TEXT_CHARS - 1] + "…"


def _say_more(more: bool, limit: int) -> None:
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


def _ask(options: Options, operation: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
    options.require_running()
    with options.client() as client:
        reply: dict[str, Any] = client.ask(operation, fields, timeout_s=timeout_s)
    return reply
