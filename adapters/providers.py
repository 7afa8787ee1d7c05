"""Providers: what answers a prompt. A worker runs one or more of them.

A provider has a name, which its worker offers and a request may require, and answers one grant at a
time as often as its worker has slots. What it raises fails the request with these words; when it is
cancelled, the grant is over: it must end soon, and leave nothing running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec

Say = Callable[[dict[str, Any]], Awaitable[None]]  # tells the requester how it gets on


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to do: answer `prompt`. `data` is what the session's entry says besides."""

    request_id: str
    attempt: int
    session_id: str
    requester: str
    prompt: str
    model: str | None
    data: dict[str, Any]
    options: dict[str, Any]
    requires: str | None
    run_s: float


class Provider(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """What a request requires to come here."""

    async def complete(self, grant: Grant, say: Say) -> dict[str, Any]:
        """Return the result: `response`, `model`, and what else is to be recorded (`usage`)."""


class Echo:
    """Says what was said, and that it is an echo. `options.delay_s` makes it take that long."""

    name = "echo"

    async def complete(self, grant: Grant, say: Say) -> dict[str, Any]:
        delay_s = grant.options.get("delay_s", 0)
        if not isinstance(delay_s, int | float) or not 0 <= delay_s <= grant.run_s:
            raise ValueError(f"options.delay_s must be 0 to {grant.run_s:g}, not {delay_s!r}")
        if delay_s:
            await say({"delay_s": delay_s})
            await asyncio.sleep(delay_s)  # as it was asked to
        return {"response": grant.prompt, "model": "echo", "provider": "echo"}


PROVIDERS: Final[dict[str, Callable[[], Provider]]] = {"echo": Echo}
