"""`ksi read QUERY`: answer a query from what is committed. No message is sent."""

from __future__ import annotations

from typing import Any

from ksi.console.ask import print_reply
from ksi.console.operations import Operations
from ksi.console.options import Options, group
from ksi.transport.message import Operation


def _read(
    options: Options,
    operation: Operation,
    fields: dict[str, Any],
    _timeout_s: float,
    at: str | None = None,
) -> None:
    from ksi.console.reads import Reads

    read = Reads(options.var, options.identity)
    if at is None:
        reply = read(operation.owner, operation.name, **fields)
    else:
        reply = read.past(at, operation.owner, operation.name, fields)
    print_reply(options, "read", reply)


@group("read", cls=Operations, call=_read, kinds=("query",), past=True)
def read() -> None:
    """Answer a query in place, from what is committed.

    No message is sent: it works while the owner is busy, stopped or dead. With --at, from the state
    as it was then, as far back as checkpoints and journal go.
    """
