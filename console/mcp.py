"""`ksi mcp`: tools and resources for clients of the Model Context Protocol."""

from __future__ import annotations

import sys
from functools import partial
from typing import Final

import click

from ksi.console.options import DURATION, Failed, Options, group
from ksi.console.show import show_json
from ksi.transport.remote import is_remote

AGENT: Final = "mcp"  # who a client is unless --as or KSI_AGENT says otherwise
CALL_S: Final = 30.0  # As in `ksi.adapters.mcp`, which takes long to import.


@group("mcp")
def mcp() -> None:
    """Let clients of the Model Context Protocol use KSI: its operations are their tools.

    \b
    For Claude Code:
      claude mcp add ksi -- ksi --var DIR mcp serve --as NAME
    """


@mcp.command("serve")
@click.option(
    "--http", "port", type=click.IntRange(0, 65_535), metavar="PORT",
    help="Serve over HTTP on 127.0.0.1, instead of stdin and stdout; 0 is any free port.",
)  # fmt: skip
@click.option("--no-token", is_flag=True, help="Over HTTP: let anybody on this machine be NAME.")
@click.option(
    "--tools", "patterns", multiple=True, metavar="PATTERN",
    help="Only operations that match, as `session:*`; may be given more than once.",
)  # fmt: skip
@click.option(
    "--conversation", envvar="KSI_CONVERSATION", metavar="ID",
    help="Tell this conversation all tools once, and thin ones after. [KSI_CONVERSATION]",
)  # fmt: skip
@click.option("--timeout", type=DURATION, default=CALL_S, help="What a call may take. [30s]")
@click.pass_obj
def serve(
    options: Options,
    port: int | None,
    no_token: bool,
    patterns: tuple[str, ...],
    conversation: str | None,
    timeout: float,
) -> None:
    """Serve on stdin and stdout until the client closes them, or over HTTP until Ctrl-C.

    It speaks for the agent of `--as`, whoever calls it, and offers what its role may use. The
    system may be started later, and restarted meanwhile.
    """
    _require_extra()
    import asyncio
    import signal

    from ksi.adapters.mcp import ToolServer
    from ksi.adapters.serving import serve_http, serve_stdio, token
    from ksi.adapters.tools import Catalogue
    from ksi.console.declared import catalogue
    from ksi.console.version import VERSION
    from ksi.transport import AsyncClient
    from ksi.transport.identity import KeyRing

    async def run() -> None:
        async with AsyncClient(_name(options), var=options.var) as client:
            certificate = KeyRing(options.var).load(client.name)
            role = "agent" if certificate is None else certificate.role
            found = Catalogue(catalogue().values(), role, patterns or ("*",))
            tools = ToolServer(
                client, found, version=VERSION, conversation=conversation, call_s=timeout
            )
            try:
                if port is None:
                    await serve_stdio(tools)
                else:
                    secret = None if no_token else token(options.var, client.name)
                    ready = partial(_announce, options, client.name)
                    await serve_http(tools, port, secret, ready)
            finally:
                await tools.close()

    if port is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A read of stdin cannot be cancelled.
    asyncio.run(run())


@mcp.command("token")
@click.pass_obj
def show_token(options: Options) -> None:
    """Print the token that `serve --http` asks of its clients: `Authorization: Bearer TOKEN`.

    It is made from the key of the agent of `--as`, and goes with it.
    """
    _require_extra()
    from ksi.adapters.serving import token
    from ksi.transport.caller import Caller

    name = Caller(_name(options), var=options.var).name
    said = token(options.var, name)
    if options.json:
        show_json("mcp.token", {"agent": name, "token": said})
    else:
        print(said)


def _name(options: Options) -> str | None:
    """Return who is spoken for; None: whoever's key was carried here from another machine."""
    return options.identity or (None if is_remote(options.var) else AGENT)


def _announce(options: Options, name: str, url: str) -> None:
    if options.json:
        show_json("mcp.serve", {"agent": name, "url": url})
        sys.stdout.flush()
    else:
        print(f"{name} is served at {url}", file=sys.stderr, flush=True)


def _require_extra() -> None:
    """Raise `Failed` where the official SDK is not installed."""
    from importlib.util import find_spec

    if find_spec("mcp") is None:
        raise Failed("ksi mcp needs the package mcp", hint="pip install 'ksi[mcp]'")
