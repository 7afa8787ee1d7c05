"""`ksi read QUERY`: answer a query from what is committed. No message is sent."""

from __future__ import annotations

from typing import Any

from ksi.console.ask import print_reply
from ksi.console.operations import Operations
from ksi.console.options import Options, group
from ksi.transport.message import Operation


def _read(
    options: Options, operation: Operation, fields: dict[str, Any], _timeout_s: float
) -> None:
    from ksi.console.reads import Reads

    read = Reads(options.var, options.identity)
    print_reply(options, "read", read(operation.owner, operation.name, **fields))


@group("read", cls=Operations, call=_read, kinds=("query",))
def read() -> None:
    """Answer a query in place, from what is committed.

    No message is sent: it works while the owner is busy, stopped or dead.
    """
