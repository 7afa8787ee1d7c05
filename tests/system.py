"""A whole system in a directory of its own, for tests: real processes, real sockets, real files."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import mutants

from ksi.actors.supervision.launch import MODULES, start_background
from ksi.actors.supervision.lock import holder
from ksi.actors.supervision.reports import read_children
from ksi.transport import Client
from ksi.transport.errors import KsiError
from ksi.transport.identity import run_directory

# A test that kills owners is no crash loop.
PATIENT = {"supervisor.intensity": 1_000_000, "supervisor.backoff_max_s": 0.05}


class System:
    """A running supervisor and its owners on `var`."""

    def __init__(self, var: Path, modules: tuple[str, ...] = (), **flags: Any) -> None:
        """Start it; `modules` of the tests are loaded, or called, in all its children."""
        self.var = var
        self._modules = (*MODULES, *mutants.modules(), *modules)
        self._flags = {**PATIENT, **flags}
        self.start()

    def start(self) -> None:
        start_background(self.var, self._flags, modules=self._modules)

    def stop(self) -> None:
        """Stop the system in order, and wait until it is gone."""
        with contextlib.suppress(KsiError), self.client("operator", role="operator") as operator:
            operator.ask("system:stop")
        self._gone(20.0)

    def end(self) -> None:
        """Stop it, whatever state it is in."""
        held = holder(self.var)
        if held is not None:
            os.kill(held.pid, signal.SIGTERM)
            try:
                self._gone(10.0)
            except TimeoutError:
                os.kill(held.pid, signal.SIGKILL)

    def pid_of(self, name: str) -> int | None:
        """Return the process of a child that runs now."""
        status = read_children(run_directory(self.var))
        return None if status is None else {c.name: c.pid for c in status.children}[name]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a child and return its pid."""
        pid = self.pid_of(name)
        assert pid is not None
        os.kill(pid, number)
        return pid

    def client(self, name: str, **more: Any) -> Client:
        return Client(name, var=self.var, **more)

    def file(self, session_id: str) -> Path:
        """Return the file of a session."""
        return self.var / "logs/responses/sessions" / f"{session_id}.jsonl"

    def _gone(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while holder(self.var) is not None:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the supervisor on {self.var} does not end")
            time.sleep(0.01)  # A poll with a deadline.
