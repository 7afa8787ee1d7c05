"""Processes that die: run an action in a forked child and kill it -9 at a chosen step.

A step is a call from Python into the kernel's files or into LMDB. Killing before each in turn
leaves on disk every state that a killed process can leave between two of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_MODULES = frozenset({"posix", "fcntl", "io", "_io"})


def in_child(action: Callable[[], Any]) -> int:
    """Run `action` in a forked child and return how that ended: exit code, or minus the signal."""
    pid = fork_to(action)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_to(action: Callable[[], Any]) -> int:
    """Start `action` in a forked child and return its process id."""
    pid = os.fork()
    if pid == 0:
        _run(action)
    return pid


def kill(pid: int) -> None:
    """Kill a child of ours -9 and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def killed_at_each_step(action: Callable[[], Any], *, runs: int) -> Iterator[int]:
    """Run `action` in a child about `runs` times, each time killed at a later step.

    Yields the step after each; the last one yielded is 0, for a run that was not killed.
    """
    steps = _count_steps(action)
    assert steps > 0
    for step in range(1, steps + 1, max(1, steps // runs)):
        yield step if in_child(partial(_killed_at, step, action)) == -signal.SIGKILL else 0
    assert in_child(action) == 0
    yield 0


def _run(action: Callable[[], Any]) -> NoReturn:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no child outlives a failed test
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _count_steps(action: Callable[[], Any]) -> int:
    reader, writer = os.pipe()

    def count() -> None:
        counted = 0

        def on_call() -> None:
            nonlocal counted
            counted += 1

        _on_each_step(on_call)
        action()
        sys.setprofile(None)
        os.write(writer, counted.to_bytes(4, "big"))

    assert in_child(count) == 0
    steps = int.from_bytes(os.read(reader, 4), "big")
    os.close(reader)
    os.close(writer)
    return steps


def _killed_at(step: int, action: Callable[[], Any]) -> None:
    left = step

    def on_call() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _on_each_step(on_call)
    action()


def _on_each_step(on_call: Callable[[], None]) -> None:
    def profile(_frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call":
            return
        owner = type(getattr(called, "__self__", None))
        if (
            called.__module__ in _MODULES
            or owner.__module__.startswith(("lmdb", "_io"))
            or (owner.__name__ in ("Environment", "Transaction", "Cursor"))
        ):
            on_call()

    sys.setprofile(profile)
