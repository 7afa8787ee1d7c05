"""What the fork servers of tests load, and what their children become."""

from __future__ import annotations

import errno
import os
import time

HOOK = "a hook ran"


def hook() -> None:
    """Ask, as modules do that have locks, to be told of forks."""
    os.register_at_fork(after_in_child=lambda: print(HOOK, flush=True))


def refuse() -> None:
    """Let no fork succeed, in this process."""

    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    os.fork = refused


def wait() -> None:
    """Stay until killed; no longer than any test takes, should nobody do it."""
    time.sleep(60)


def fork() -> None:
    """Fork, and say so."""
    hook()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def show(name: str) -> None:
    print(os.environ.get(name), os.umask(0), os.getsid(0) == os.getpid())
