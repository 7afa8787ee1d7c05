"""`ksi ask OPERATION`: ask an owner and print its reply. What it says is on disk."""

from __future__ import annotations

import sys
from typing import Any, Final

import click

from ksi.console.operations import Operations
from ksi.console.options import Options, group
from ksi.console.show import print_json, show_json
from ksi.console.worker import PROVIDER_NAMES
from ksi.transport.message import Operation

SUBMIT: Final = "completion:async"


def _ask(
    options: Options,
    operation: Operation,
    fields: dict[str, Any],
    timeout_s: float,
    wait: bool = False,
) -> None:
    options.require_running()
    if wait:
        _wait(options, fields, timeout_s)
        return
    with options.client() as client:
        reply = client.ask(operation.name, fields, timeout_s=timeout_s)
    print_reply(options, "ask", reply)


def _wait(options: Options, fields: dict[str, Any], timeout_s: float) -> None:
    """Submit a request, show its answer growing on a terminal, and print its outcome."""
    from ksi.transport.errors import Unanswered
    from ksi.transport.limits import OUTCOME_TIMEOUT_S

    given = click.get_current_context().get_parameter_source("_timeout_s")
    if given is not click.core.ParameterSource.COMMANDLINE:
        timeout_s = OUTCOME_TIMEOUT_S
    growing = Growing()
    prompt, session_id = fields.pop("prompt"), fields.pop("session_id")
    with options.client() as client:
        required = fields.get("requires")
        workers = client.read("worker:list")["workers"]
        if not any(required in (None, *each["capabilities"]) for each in workers):
            is_provider = required in (None, *PROVIDER_NAMES)
            what = (required or "echo") if is_provider else f"'PROVIDER --offers {required}'"
            print(
                f"no worker offers {required or 'anything'} now, so it waits: "
                f"ksi{options.words()} start --worker {what}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        try:
            reply = client.complete(
                session_id, prompt, timeout_s=timeout_s, on_tokens=growing.take, **fields
            )
        except Unanswered as error:
            growing.end()
            print_reply(
                options, "ask",
                client.ask("completion:status", request_id=error.details["request_id"]),
            )  # fmt: skip
            raise
    growing.end(reply["result"]["response"])
    print_reply(options, "ask", reply)


class Growing:
    """Shows an answer on a terminal as it grows: on standard error, for the reply is the output."""

    def __init__(self) -> None:
        self._shown = 0
        self._whole = sys.stderr.isatty()

    def take(self, start: int, text: str) -> None:
        """Show a piece; after a gap nothing more, but another attempt from its beginning."""
        if start == 0 and self._shown:
            self.end()
        if self._whole and start == self._shown:
            self._shown += len(text)
            print(_safe(text), end="", file=sys.stderr, flush=True)

    def end(self, answer: str = "") -> None:
        """Show what is left of the answer behind what was shown, and end the line."""
        if self._shown:
            print(_safe(answer[self._shown :]), file=sys.stderr, flush=True)
        self._shown = 0


def _safe(text: str) -> str:
    """Return text without what a terminal would take for a command."""
    return "".join(each for each in text if each.isprintable() or each in "\n\t")


def print_reply(options: Options, name: str, reply: dict[str, Any]) -> None:
    """Print a reply as one JSON object; with `--json` it says its schema, too."""
    if options.json:
        show_json(name, reply)
    else:
        print_json(reply)


@group(
    "ask",
    cls=Operations,
    call=_ask,
    kinds=("command", "signal", "query"),
    more={
        SUBMIT: click.Option(
            ["--wait", "wait"],
            is_flag=True,
            help="Wait for the answer, and show it growing on a terminal.",
        )
    },
)
def ask() -> None:
    """Ask an operation and print its reply.

    The reply means that what it says is on disk. Fields of the operation are flags; a value is
    JSON where the field is no string. `ksi help OPERATION` explains one.
    """
