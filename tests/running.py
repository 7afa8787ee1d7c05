"""A whole system for the time of a `with`: supervisor, owners and followers on a var directory."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ksi.actors.launch import start_background


@contextmanager
def running(var: Path) -> Iterator[Path]:
    """Start a system on `var`, and stop it in the end; nothing of it runs any more then."""
    supervisor = os.pidfd_open(start_background(var)["pid"])
    try:
        yield var
    finally:
        signal.pidfd_send_signal(supervisor, signal.SIGTERM)
        ended, _, _ = select.select([supervisor], [], [], 30)
        os.close(supervisor)
        assert ended, "the supervisor goes on"
