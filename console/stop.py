"""`ksi stop`: stop the system in order, and wait until it is gone."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Final

import click

from ksi.console.options import DURATION, Options, command
from ksi.console.show import show_json
from ksi.transport.errors import NotRunning, Unavailable
from ksi.transport.remote import require_here

STOP_S: Final = 30.0  # Owners may take `supervisor.shutdown_s` each; this is several of them.


@command("stop")
@click.option("--now", is_flag=True, help="Do not wait for orderly ends: kill what is left.")
@click.option("--timeout", type=DURATION, default=STOP_S, help="How long to wait. [30s]")
@click.pass_obj
def stop(options: Options, now: bool, timeout: float) -> None:
    """Stop the system in order: owners finish what they have accepted, agents are ended.

    What was acknowledged is on disk either way.
    """
    require_here(options.var, "ksi stop")
    pid, seconds = stop_and_wait(options, timeout, now=now)
    if options.json:
        show_json("stop", {"stopped": True, "pid": pid, "seconds": round(seconds, 3)})
    else:
        print(f"stopped in {seconds:.2f} s")


def stop_and_wait(options: Options, timeout_s: float, *, now: bool = False) -> tuple[int, float]:
    """Stop the supervisor on this var; return its pid and the seconds it took.

    Raises:
        NotRunning: there is none.
        Unavailable: it has not ended in time; it goes on stopping.
    """
    from ksi.actors.supervision.lock import holder

    begun_s = time.monotonic()
    found = holder(options.var)
    if found is None or not found.pid:
        raise NotRunning(f"no supervisor runs on {options.var}", hint=f"ksi{options.words()} start")
    pidfd = os.pidfd_open(found.pid)
    try:
        if holder(options.var) != found:  # the pid may be another's by now
            raise NotRunning(f"the supervisor on {options.var} has just ended")
        # The second signal means: in a hurry.
        for _ in range(2 if now else 1):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            time.sleep(0.05 if now else 0.0)  # Two at once may arrive as one.
        ended, _, _ = select.select([pidfd], [], [], timeout_s)
    except ProcessLookupError:
        ended = [pidfd]
    finally:
        os.close(pidfd)
    if not ended:
        raise Unavailable(
            f"the supervisor, pid {found.pid}, goes on stopping after {timeout_s:g} s",
            hint=f"ksi{options.words()} status shows what runs; ksi{options.words()} stop --now",
        )
    return found.pid, time.monotonic() - begun_s
