"""Bad weather for owners: frames that come twice, late or not at all, and a wall clock that jumps.

The fork server of a system calls `apply` (`System(var, modules=WEATHER)`). Frames are encrypted on
the socket, so it is done behind it, in the mailbox: to the owner and to its clients that is the
same. A frame that is lost is missed by its sender when nothing has come for a while.
"""

from __future__ import annotations

import random
import time
from typing import Any

WEATHER = ("weather:apply",)
LOST, DOUBLED, LATE = 0.002, 0.1, 0.1  # One in so many frames.
DAY_S = 86_400.0


def apply() -> None:
    """Begin, in this process and those forked from it."""
    from ksi.actors import host
    from ksi.transport.mailbox import Mailbox, Post

    get, send = Mailbox.get, Mailbox.send
    chance = random.Random(time.monotonic_ns())

    def roughened(self: Any) -> Any:
        envelope = get(self)
        post = envelope.message
        if isinstance(post, Post):
            letters = []
            for letter in post.letters:
                luck = chance.random()
                if luck > LOST:
                    letters += [letter] * (1 + (luck < LOST + DOUBLED))
                if len(letters) > 1 and chance.random() < LATE:
                    letters[-1], letters[-2] = letters[-2], letters[-1]
            post.letters[:] = letters
        return envelope

    def answered(self: Any, route: bytes, frame: bytes) -> bool:
        luck = chance.random()
        if luck < LOST:
            return True
        if luck < LOST + DOUBLED:
            send(self, route, frame)
        return send(self, route, frame)

    class Clock:
        """Wall time, off by up to a day either way, and by another amount each second."""

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        def time(self) -> float:
            now = time.time()
            return now + random.Random(int(now)).uniform(-DAY_S, DAY_S)

    Mailbox.get = roughened
    Mailbox.send = answered
    host.time = Clock()
