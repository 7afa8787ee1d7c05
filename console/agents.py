"""`ksi agents`: who takes part, which run under the supervisor, and whose keys are enrolled."""

from __future__ import annotations

import re
from typing import Any

import click

from ksi.console.options import DURATION, Options, confirm, group
from ksi.console.show import show_json
from ksi.transport.errors import Forbidden, Invalid, NotFound
from ksi.transport.limits import ASK_TIMEOUT_S, ID_PATTERN

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
@click.pass_obj
def enroll(options: Options, name: str, role: Any, renew: bool) -> None:
    """Enrol NAME and print where its key is, to carry to another machine.

    On this machine agents enrol themselves. A name that was revoked gets a new key.
    """
    from ksi.transport.identity import KeyRing

    _require_ours(name)
    keys = KeyRing(options.var)
    if renew or name not in keys.names():
        keys.forget(name)  # what is left of a revoked one would be in the way
    made = keys.enroll(name, role)
    secret = keys.directory / f"{name}.key_secret"
    if options.json:
        fields = {"name": made.name, "role": made.role, "public": made.public.decode()}
        show_json("agents.enroll", {**fields, "key_file": str(secret.absolute())})
    else:
        print(f"{made.name} is enrolled as {made.role}; its key: {secret}")


@agents.command("remove")
@click.argument("name")
@_yes
@click.pass_obj
def remove(options: Options, name: str, yes: bool) -> None:
    """Revoke the key of NAME, also for connections that are up."""
    from ksi.transport.identity import KeyRing

    _require_ours(name)
    keys = KeyRing(options.var)
    if name not in keys.names():
        raise NotFound(f"{name} is not enrolled", hint=f"ksi{options.words()} agents list")
    confirm(f"revoke the key of {name}", yes=yes)
    keys.remove(name)
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
