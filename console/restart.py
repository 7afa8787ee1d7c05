"""`ksi restart [NAME]`: stop and start the system, or one owner of it."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click

from ksi.console.options import DURATION, Options, command
from ksi.console.show import show_json
from ksi.console.start import start_and_tell
from ksi.console.stop import STOP_S, stop_and_wait
from ksi.transport.errors import NotRunning, Unavailable
from ksi.transport.remote import require_here

LOOK_S: Final = 0.01  # How often it is looked whether a child runs again.


@command("restart")
@click.argument("name", required=False)
@click.option("--timeout", type=DURATION, default=STOP_S, help="How long to wait. [30s]")
@click.pass_obj
def restart(options: Options, name: str | None, timeout: float) -> None:
    """Restart the system, or only the owner or agent NAME. Clients wait and lose nothing."""
    require_here(options.var, "ksi restart")
    begun_s = time.monotonic()
    done = _all(options, timeout) if name is None else _one(options, name, timeout)
    done["seconds"] = round(time.monotonic() - begun_s, 3)
    if options.json:
        show_json("restart", done)
    else:
        what = name or "supervisor"
        print(f"{what} runs again after {done['seconds']:.2f} s, pid {done['pid']}")


def _all(options: Options, timeout_s: float) -> dict[str, Any]:
    try:
        stop_and_wait(options, timeout_s)
    except NotRunning as error:
        print(f"  {error.text}: starting", file=sys.stderr)
    return start_and_tell(options, {})


def _one(options: Options, name: str, timeout_s: float) -> dict[str, Any]:
    options.require_running()
    deadline_s = time.monotonic() + timeout_s
    with options.client() as client:
        before = _child(client.ask("system:status", timeout_s=timeout_s), name)
        client.ask("system:restart", owner=name, timeout_s=timeout_s)
        while time.monotonic() < deadline_s:
            child = _child(client.ask("system:status", timeout_s=timeout_s), name)
            if child.get("state") == "RUNNING" and child.get("starts") != before.get("starts"):
                return {"name": name, "pid": child["pid"]}
            time.sleep(LOOK_S)  # A poll that ends.
    raise Unavailable(f"{name} does not run again after {timeout_s:g} s", hint=f"ksi logs {name}")


def _child(status: dict[str, Any], name: str) -> dict[str, Any]:
    return next((each for each in status["children"] if each["name"] == name), {})
