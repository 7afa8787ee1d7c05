"""`ksi ask OPERATION`: ask an owner and print its reply. What it says is on disk."""

from __future__ import annotations

from typing import Any

from ksi.console.operations import Operations
from ksi.console.options import Options, group
from ksi.console.show import print_json, show_json
from ksi.transport.message import Operation


def _ask(options: Options, operation: Operation, fields: dict[str, Any], timeout_s: float) -> None:
    options.require_running()
    with options.client() as client:
        reply = client.ask(operation.name, fields, timeout_s=timeout_s)
    print_reply(options, "ask", reply)


def print_reply(options: Options, name: str, reply: dict[str, Any]) -> None:
    """Print a reply as one JSON object; with `--json` it says its schema, too."""
    if options.json:
        show_json(name, reply)
    else:
        print_json(reply)


@group("ask", cls=Operations, call=_ask, kinds=("command", "signal", "query"))
def ask() -> None:
    """Ask an operation and print its reply.

    The reply means that what it says is on disk. Fields of the operation are flags; a value is
    JSON where the field is no string. `ksi help OPERATION` explains one.
    """
