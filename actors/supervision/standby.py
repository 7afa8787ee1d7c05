"""A supervisor that stands by: it has loaded the code as it is now, and starts when it is told to.

    Standby(var) ── python -c main ──▶ loads all it will need ──▶ "loaded", or why it cannot be
         .start() ──▶ takes the lock, starts its children, runs     .stop() ──▶ ends in order

So code is known to load before anything that runs is stopped for it, and to load it takes no time
in which nobody answers. It is a child of this process and ends with it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ksi.actors import log
from ksi.actors.supervision.launch import command_line, raised
from ksi.transport.errors import Internal

STOP_S: Final = 30.0  # Owners may take `supervisor.shutdown_s` each; this is several of them.


class Standby:
    """One supervisor process. Made by the main thread: the process ends when that thread does.

    Raises:
        Invalid: its code cannot be loaded; the text says what and where. Nothing is left running.
    """

    def __init__(self, var: Path, flags: Mapping[str, Any] | None = None) -> None:
        self._var = var
        ours, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                command_line(var, flags, progress=theirs, parent=os.getpid()),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._lines = os.fdopen(ours)
        next(self._told())

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        return self._process.pid

    def start(self, on_progress: Callable[[dict[str, Any]], None]) -> float:
        """Let it start; return the seconds until all its children were ready.

        Raises:
            Conflict: `var` is held by another supervisor; the text names it.
            KsiError: why it could not start. Nothing is left running.
        """
        begun_s = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for line in self._told():
            if "ready" in line:
                break
            on_progress(line)
        self._lines.close()
        return time.monotonic() - begun_s

    def ended(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Stop it in order, and return when it is gone; one that takes too long is killed."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _told(self) -> Iterator[dict[str, Any]]:
        """Yield the lines it writes; raise what it failed with, once it is gone."""
        for line in map(json.loads, self._lines):
            if "error" in line:
                self._process.wait()
                raise raised(line["error"])
            yield line
        self._process.wait()
        raise Internal(
            "the supervisor ended while it started",
            hint=log.last_words(log.output(self._var, "supervisor")),
        )
