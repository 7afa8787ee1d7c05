"""Checkpoints of a running system, for tests: made, listed, and with owners busy meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from system import System
from trouble import until

from ksi.actors.checkpoints import root_of
from ksi.storage import checkpoints
from ksi.storage.checkpoints import Checkpoint


def ordered(system: System) -> str:
    with system.client("operator", role="operator") as operator:
        return str(operator.ask("checkpoint:create")["id"])


def listed(system: System) -> dict[str, Any]:
    with system.client("operator", role="operator") as operator:
        found: dict[str, Any] = operator.ask("checkpoint:list")
        return found


def made(system: System) -> Checkpoint:
    """Make a checkpoint and return it."""
    checkpoint_id = ordered(system)
    until(lambda: listed(system)["making"] is None)
    assert listed(system)["failed"] is None
    return checkpoints.read(root_of(system.var) / checkpoint_id)


@contextmanager
def load_on(system: System) -> Iterator[list[str]]:
    """Let owners tell each other: requests are recorded, and ended when their session closes.

    Yields the sessions that are closed by now: it grows.
    """
    ending = threading.Event()
    closed: list[str] = []

    def run(name: str) -> None:
        with system.client(name) as client:
            while not ending.is_set():
                session_id = client.ask("session:create")["session_id"]
                for _ in range(5):
                    client.ask("completion:async", session_id=session_id, prompt="hello")
                client.ask("session:close", session_id=session_id)
                closed.append(session_id)

    threads = [threading.Thread(target=run, args=(f"busy-{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield closed
    finally:
        ending.set()
        for thread in threads:
            thread.join()
