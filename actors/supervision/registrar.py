"""Tells the registry what becomes of supervised agents: in order, effectively once, never waiting.

It begins with a muster: the supervisor runs these agents and no others; so it does again when the
registry was restored and may have forgotten. The registry may be down or behind: what it has not
been told waits here, beyond a window of commands one report an agent, the latest. What a stopping
supervisor stops is not reported: to stop the system is not to end its agents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import zmq

from ksi.transport.link import Link
from ksi.transport.message import encode

REGISTRY: Final = "registry"

Fate = Literal["started", "exited", "failed"]


class Registrar:
    """The way to the registry, over a connection that it owns and closes."""

    def __init__(
        self,
        dealer: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        running: Callable[[], list[str]],
        log: Any,
    ) -> None:
        self._link = Link(REGISTRY, dealer, monitor)
        self._running = running
        self._log = log
        self._waiting: dict[str, dict[str, Any]] = {}
        self._muster()

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """The sockets after whose readiness `turn` is due."""
        return self._link.dealer, self._link.monitor

    def report(
        self, agent_id: str, fate: Fate, *, pid: int | None, exit: str | None, again: bool
    ) -> None:
        """Tell what has become of an agent's process; `again`: another will be started."""
        fields = {"agent_id": agent_id, "state": fate, "pid": pid, "exit": exit, "again": again}
        if self._waiting or self._link.window.full():
            self._waiting[agent_id] = fields
        else:
            self._tell("agent:report", fields)

    def turn(self, now_s: float) -> None:
        """Receive what has come and send what can be sent."""
        link, instance = self._link, self._link.window.instance
        refused = [(pending, error) for pending, _, error in link.take(now_s) if error is not None]
        for pending, error in refused:
            self._log.warning("the registry refused", what=pending.operation, error=str(error))
        if link.window.instance != instance:  # It was restored, or has forgotten us.
            self._muster()
        while self._waiting and not link.window.full():
            agent_id = next(iter(self._waiting))
            self._tell("agent:report", self._waiting.pop(agent_id))
        if link.due(now_s):
            link.flush(now_s)

    def close(self) -> None:
        """Close the connection; what was not told is not told."""
        self._link.close()

    def _muster(self) -> None:
        self._tell("agent:muster", {"running": self._running()})

    def _tell(self, operation: str, fields: dict[str, Any]) -> None:
        self._link.window.add_command(operation, encode(fields), None)
