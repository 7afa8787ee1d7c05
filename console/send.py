"""`ksi send COMMAND`: deliver a command, without its reply."""

from __future__ import annotations

from typing import Any

from ksi.console.ask import print_reply
from ksi.console.operations import Operations
from ksi.console.options import Options, group
from ksi.transport.message import Operation


def _send(options: Options, operation: Operation, fields: dict[str, Any], timeout_s: float) -> None:
    options.require_running()
    with options.client() as client:
        client.tell(operation.name, fields)
        client.flush(timeout_s)
    reply = {"operation": operation.name, "owner": operation.owner, "delivered": True}
    print_reply(options, "send", reply)


@group("send", cls=Operations, call=_send, kinds=("command", "signal"))
def send() -> None:
    """Deliver a command, effectively once, and print that it arrived.

    The exit code says whether it was accepted; `ksi ask` prints what was replied.
    """
