"""What sub-commands share that order something of a follower, and wait until it is done."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from ksi.console.options import Options
from ksi.console.show import show_json

LOOK_S: Final = 0.05  # How often it is looked at: a read, no message.
SAY_S: Final = 1.0  # How often it is said that it goes on.


def order(
    options: Options,
    name: str,
    operation: str,
    status: str,
    mark: str,
    *,
    wait: bool = True,
    shows: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    """Send an order, wait until it has been carried out, say so, and return the status then.

    Args:
        name: of the sub-command, for its JSON.
        status: the query that shows under `mark` the number of the order that was carried out last.
        wait: do not wait otherwise; the answer is empty then.
        shows: do not say anything otherwise.
    """
    from ksi.console.reads import Reads

    options.require_running()
    begun_s = said_s = time.monotonic()
    with options.client() as client:
        number = client.ask(operation, fields)["number"]
    read = Reads(options.var, options.identity)
    found: dict[str, Any] = {}
    while wait and (found := read("library", status))[mark] < number:
        options.require_running()
        if time.monotonic() - said_s >= SAY_S:
            said_s = time.monotonic()
            print(f"  {found['state']} ...", file=sys.stderr, flush=True)
        time.sleep(LOOK_S)  # A poll: what is ordered may take minutes, and is not pushed.
    seconds = round(time.monotonic() - begun_s, 3)
    if shows and options.json:
        show_json(name, {"number": number, "done": wait, "seconds": seconds})
    elif shows:
        print(f"done in {seconds:.1f} s" if wait else f"ordered, number {number}")
    return found
