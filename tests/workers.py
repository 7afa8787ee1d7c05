"""Worker processes for tests, and what the journal says became of requests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from system import System
from trouble import until

from ksi.actors.commit import batch_decoder
from ksi.actors.declarations.completion import Deferred, Ended, Granted, Queued, Requeued
from ksi.actors.owners import completion
from ksi.actors.reading import reader_of
from ksi.transport.errors import KsiError

READY_S: Final = 60.0  # Some load the packages of their providers first.
ECHO: Final = ("--provider", "echo")


class WorkerProcess:
    """`ksi worker` under a name of its own, with `provider` and its options; `env` is added."""

    def __init__(
        self,
        var: Path,
        name: str,
        *,
        slots: int = 1,
        lease: str = "1s",
        provider: Sequence[str] = ECHO,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        words = ["--var", str(var), "--as", name, "worker", *provider]
        words += ["--slots", str(slots), "--lease", lease]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ksi.console", *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill it, stopped or not, and reap it."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()

    def ended(self, timeout_s: float = 20.0) -> tuple[int, str]:
        """Wait until it has ended; return its exit code and what it said."""
        _out, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said


@contextlib.contextmanager
def working(system: System, *names: str, **more: Any) -> Iterator[list[WorkerProcess]]:
    """Run workers, registered when the body begins; killed at the end, and no longer granted to."""
    workers = [WorkerProcess(system.var, name, **more) for name in names]
    try:
        with system.client("looker") as looker:
            until(lambda: {*names} <= set(registered(looker)), READY_S)
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for name in names:
            _leave(system, name)


def _leave(system: System, name: str) -> None:
    """End the registration of a worker that was killed, without waiting for its lease."""
    with contextlib.suppress(KsiError, KeyError), system.client(name, role="worker") as itself:
        itself.ask("worker:leave", epoch=registered(itself)[name]["epoch"])


def registered(client: Any) -> dict[str, dict[str, Any]]:
    """Return the workers there are, by name."""
    return {each["worker"]: each for each in client.read("worker:list")["workers"]}


def state(client: Any, request_id: str) -> str:
    """Return the status of a request."""
    return str(client.read("completion:status", request_id=request_id)["status"])


def happened(var: Path) -> list[Any]:
    """Return all events of the owner of completions, in order."""
    reader = reader_of(completion.OWNER, var)
    decode = batch_decoder(completion.OWNER.events)
    journal = reader.journal()
    _store, committed = reader.position()
    batches = [decode(each.payload) for each in journal.read(journal.start(), committed)]
    return [event for batch in batches for record in batch.records for event in record.events]


def require_one_at_a_time(events: list[Any]) -> list[str]:
    """Check that no session ever had two grants and that each request ended once.

    Returns:
        The requests that were completed, in the order in which they were.
    """
    active: dict[str, tuple[str, int]] = {}  # by session: request, attempt
    queued: set[str] = set()
    ended: dict[str, str] = {}
    for event in events:
        match event:
            case Queued():
                assert event.request_id not in queued, f"{event.request_id} was accepted twice"
                queued.add(event.request_id)
            case Granted():
                assert event.session_id not in active, f"two grants at once: {event}"
                assert event.request_id not in ended, f"granted after its end: {event}"
                active[event.session_id] = event.request_id, event.attempt
            case Requeued() | Deferred():
                assert active.pop(event.session_id) == (event.request_id, event.attempt)
            case Ended():
                assert event.request_id not in ended, f"ended twice: {event}"
                ended[event.request_id] = event.status
                if active.get(event.session_id) == (event.request_id, event.attempt):
                    del active[event.session_id]
    assert ended.keys() == queued, "a request has not ended"
    assert not active
    return [request_id for request_id, status in ended.items() if status == "completed"]
