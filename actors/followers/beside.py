"""Followers that run beside an owner: in its process, in a thread of their own.

What they do may take minutes, and their owner answers meanwhile. They are woken by the doorbells of
the owners whose journals they read, and look now and then all the same: a bell may be missed. Where
there is much to do they wait longer for it to be taken together, within a bound: much at once is
less work in all, and whoever is answered needs the processor meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import zmq

from ksi.actors.process import Beside, run_owner, step_back, wait_for_room
from ksi.transport.identity import bell_endpoint
from ksi.transport.mailbox import listen

GROUP_S: Final = 0.02  # What comes within this time is taken together ...
GROUP_S_MAX: Final = 0.05  # ... and where there is much to do, within this.
_REST_FACTOR: Final = 10  # It rests so many times as long as its last work took.
CLOSE_S: Final = 3.0  # For what is left at the end; a supervisor waits 5.


class Follower(Protocol):
    """What follows journals, a piece at a turn. Whatever ends it, the next begins from the disk."""

    def turn(self) -> bool:
        """Do a piece of what there is to do; return whether there is more."""

    def is_behind(self) -> bool:
        """Return whether there is something to take up that cannot be taken up yet."""

    @property
    def wait_s(self) -> float:
        """How long it may sleep where nobody rings."""

    def close(self) -> None:
        """Take up what is left, or some of it if that is much, sync and close."""


Make = Callable[[Path, Any], Sequence[Follower]]


def run_with(
    owner: str,
    var: str,
    make: Make,
    *,
    bells: Sequence[str] = ("sessions",),
    group_s: float = GROUP_S,
) -> None:
    """Run an owner on `var`, and followers beside it, until SIGTERM.

    Args:
        make: makes them, for a var directory and a logger.
        bells: the owners whose journals they read.
        group_s: what is said within this time is taken together.
    """
    step_back()
    run_owner(owner, var, _beside(owner, make, bells, group_s))


def _beside(owner: str, make: Make, bells: Sequence[str], group_s: float) -> Beside:
    def start(var: Path, logger: Any) -> Callable[[], None]:
        stopping = threading.Event()
        woken = os.eventfd(0, os.EFD_CLOEXEC)

        def follow() -> None:
            try:
                followers = wait_for_room(lambda: make(var, logger), logger)
                _follow(var, followers, bells, stopping, woken, group_s)
            except BaseException:
                logger.exception(f"a follower beside {owner} ended")
                os._exit(1)

        def end() -> None:
            stopping.set()
            os.eventfd_write(woken, 1)
            thread.join(CLOSE_S)  # What it is doing may as well be done again after the next start.

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        return end

    return start


def _follow(
    var: Path,
    followers: Sequence[Follower],
    bells: Sequence[str],
    stopping: threading.Event,
    woken: int,
    group_s: float,
) -> None:
    context = zmq.Context()
    news = zmq.Poller()
    news.register(woken, zmq.POLLIN)
    for name in bells:
        news.register(listen(context, bell_endpoint(var, name)), zmq.POLLIN)
    begun_s = time.monotonic()
    while not stopping.is_set():
        if sum(each.turn() for each in followers):  # Each has its turn.
            continue
        rest_s = _REST_FACTOR * (time.monotonic() - begun_s)
        together_s = max(group_s, min(rest_s, GROUP_S_MAX))
        wait_s = min(together_s if each.is_behind() else each.wait_s for each in followers)
        rung = [bell for bell, _event in news.poll(int(wait_s * 1000)) if bell != woken]
        for bell in rung:
            while bell.poll(0):
                bell.recv()
        if rung:
            stopping.wait(together_s)  # What comes meanwhile goes with it.
        begun_s = time.monotonic()
    for follower in followers:
        follower.close()
    context.destroy(linger=0)
