"""`ksi agents`: who takes part, which run under the supervisor, and whose keys are enrolled."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from ksi.console.options import DURATION, Failed, Options, confirm, group
from ksi.console.show import duration, show_json, show_table
from ksi.transport.errors import Forbidden, Invalid, NotFound, Unavailable
from ksi.transport.limits import ASK_TIMEOUT_S, ID_PATTERN
from ksi.transport.remote import require_here

LOOK_S: Final = 0.01  # How often it is looked whether a spawned program runs.

_timeout = click.option(
    "--timeout", type=DURATION, default=ASK_TIMEOUT_S, help="How long to wait. [5s]"
)
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


@group("agents", invoke_without_command=True)
@click.pass_context
def agents(ctx: click.Context) -> None:
    """Look at agents, start and stop them, enrol and revoke their keys."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_agents)


@agents.command("list")
@click.option("--all", "include_gone", is_flag=True, help="Also those that have gone.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def list_agents(options: Options, include_gone: bool = False, limit: int = 100) -> None:
    """List agents in the order of their names. Sends no message."""
    from ksi.console.reads import Reads

    pages = Reads(options.var, options.identity).pages("registry", "agent:list", "agents", limit)
    found, more = pages(include_gone=include_gone)
    if options.json:
        show_json("agents", {"agents": found, "more": more})
        return
    now = time.time()
    rows = (
        (
            each["agent_id"],
            each["status"],
            each["kind"],
            each["epoch"],
            duration(each["lease_s"]),
            duration(now - each["seen_at"]),
            each["pid"],
            each["spawned_by"],
            each["exit"],
        )
        for each in found
    )
    headers = ("AGENT", "STATUS", "KIND", "EPOCH", "LEASE", "SEEN", "PID", "SPAWNED BY", "EXIT")
    show_table(headers, rows)
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


@agents.command("spawn")
@click.argument("name")
@click.argument("words", nargs=-1, required=True, metavar="-- PROGRAM [ARGUMENT]...")
@click.option(
    "--restart",
    type=click.Choice(["permanent", "transient", "temporary"]),
    default="transient",
    show_default=True,
    help="Start it again when it ends: always, after a failure, never.",
)
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable for it.")
@click.option("--cwd", help="Where it runs. [where the supervisor does]")
@_timeout
@click.pass_obj
def spawn(
    options: Options,
    name: str,
    words: tuple[str, ...],
    restart: str,
    variables: tuple[str, ...],
    cwd: str | None,
    timeout: float,
) -> None:
    """Run a program as the agent NAME, under the supervisor.

    It finds who it is in KSI_AGENT and the runtime directory in KSI_VAR.
    """
    begun_s = time.monotonic()
    env = {}
    for text in variables:
        variable, equals, env[variable] = text.partition("=")
        if not equals:
            raise click.UsageError(f"--env takes NAME=VALUE, not {text!r}")
    fields = {"agent_id": name, "argv": list(words), "restart": restart, "env": env, "cwd": cwd}
    reply = _ask(options, "agent:spawn", timeout, **fields)
    program = _wait_for_program(options, name, begun_s + timeout)
    if options.json:
        show_json("agents.spawn", {**reply, **program})
    elif program["pid"] is None:
        print(f"{name} ran and has ended: {program['exit']}")
    else:
        print(f"{name} runs, pid {program['pid']}")


def _wait_for_program(options: Options, name: str, deadline_s: float) -> dict[str, Any]:
    """Return what the registry says of an agent that was just spawned, once it has started."""
    from ksi.console.reads import Reads

    read = Reads(options.var, options.identity)
    while time.monotonic() < deadline_s:
        agent = read("registry", "agent:info", agent_id=name)
        if agent["status"] == "failed":
            hint = f"ksi{options.words()} logs {name} --output"
            raise Failed(agent["exit"] or f"{name} has failed", hint=hint)
        if agent["pid"] or agent["exit"]:
            return {key: agent[key] for key in ("status", "pid", "exit")}
        time.sleep(LOOK_S)  # A poll that ends.
    hint = f"ksi{options.words()} agents list"
    raise Unavailable(f"the supervisor has not started {name} in time", hint=hint)


@agents.command("kill")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--force", is_flag=True, help="At once, by SIGKILL.")
@_timeout
@click.pass_obj
def kill(options: Options, names: tuple[str, ...], force: bool, timeout: float) -> None:
    """End agents: their programs are stopped and not started again."""
    reply = _ask(options, "agent:terminate", timeout, agent_ids=list(names), force=force)
    if options.json:
        show_json("agents.kill", reply)
        return
    for name in reply["agent_ids"]:
        print(f"{name} ends")
    for name, why in reply["skipped"].items():
        print(f"{name} {why}")


def _ask(options: Options, operation: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
    options.require_running()
    with options.client() as client:
        return client.ask(operation, fields, timeout_s=timeout_s)


@agents.command("keys")
@click.pass_obj
def keys(options: Options) -> None:
    """List the names that have a key here, and what they may do."""
    from ksi.transport.identity import KeyRing

    found = [
        {"name": each.name, "role": each.role, "public": each.public.decode()}
        for each in KeyRing(options.var).enrolled()
    ]
    if options.json:
        show_json("agents.keys", {"keys": found})
    else:
        show_table(("NAME", "ROLE", "PUBLIC KEY"), [tuple(each.values()) for each in found])


@agents.command("enroll")
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["agent", "worker", "operator"]),
    default="agent",
    show_default=True,
    help="What it may do. The role of an enrolled name stays.",
)
@click.option("--renew", is_flag=True, help="Revoke its key, if it has one, and make another.")
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Make DIR, to carry to another machine and to use there as --var or KSI_VAR.",
)
@click.option(
    "--host", default="", help="What the other machine calls this one. [transport.tcp_host]"
)
@click.pass_obj
def enroll(options: Options, name: str, role: Any, renew: bool, to: Path | None, host: str) -> None:
    """Enrol NAME and print where its key is.

    On this machine agents enrol themselves. A name that was revoked gets a new key. For another
    machine `--to` puts the key of NAME, and where to find this system, into a directory.
    """
    from ksi.transport.identity import Directory, KeyRing

    require_here(options.var, "ksi agents enroll")
    _require_ours(name)
    if host and to is None:
        raise click.UsageError("--host says where to find this system: it needs --to DIR")
    if to is not None:
        Directory.read(options.var).carry(to, host)  # first: it may refuse
    ring = KeyRing(options.var)
    if renew or name not in ring.names():
        ring.forget(name)  # what is left of a revoked one would be in the way
    made = ring.enroll(name, role)
    if to is not None:
        ring = KeyRing(to)
        ring.carry(made)
    secret = ring.directory / f"{name}.key_secret"
    if options.json:
        fields = {"name": made.name, "role": made.role, "public": made.public.decode()}
        carried = None if to is None else str(to.absolute())
        show_json(
            "agents.enroll", {**fields, "key_file": str(secret.absolute()), "directory": carried}
        )
    else:
        print(f"{made.name} is enrolled as {made.role}; its key: {secret}")
        if to is not None:
            print(f"carry {to} to the other machine and use it there as --var or KSI_VAR")


@agents.command("remove")
@click.argument("name")
@_yes
@click.pass_obj
def remove(options: Options, name: str, yes: bool) -> None:
    """Revoke the key of NAME, also for connections that are up."""
    from ksi.transport.identity import KeyRing

    require_here(options.var, "ksi agents remove")
    _require_ours(name)
    ring = KeyRing(options.var)
    if name not in ring.names():
        raise NotFound(f"{name} is not enrolled", hint=f"ksi{options.words()} agents keys")
    confirm(f"revoke the key of {name}", yes=yes)
    ring.remove(name)
    if options.json:
        show_json("agents.remove", {"name": name, "revoked": True})
    else:
        print(f"the key of {name} is revoked; ksi agents enroll {name} makes another")


def _require_ours(name: str) -> None:
    """Raise unless `name` is one that agents and people may have."""
    from ksi.transport.identity import RESERVED

    if not re.match(ID_PATTERN, name):
        raise Invalid(f"{name[:200]!r} is no name: letters, digits, dots, dashes, 128 at most")
    if name in RESERVED:
        raise Forbidden(f"{name} is the name of an owner", hint="choose another name")
