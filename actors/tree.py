"""The children of the supervisor, in the order in which they start; they stop in reverse.

One for one: an owner's state is on disk and its clients resend, so none needs another's restart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ksi.actors.child import ChildSpec
from ksi.actors.restarts import Strategy

STRATEGY: Final[Strategy] = "one_for_one"


def children(var: Path, *, start_s: float, shutdown_s: float) -> tuple[ChildSpec, ...]:
    """Return the specs of the system on `var`."""

    def owner(name: str) -> ChildSpec:
        return ChildSpec(
            name=name,
            kind="owner",
            function="ksi.actors.process:run_owner",
            arguments=(name, str(var)),
            start_s=start_s,
            shutdown_s=shutdown_s,
        )

    return (
        owner("registry"),
        owner("sessions"),
        ChildSpec(
            name="files",
            kind="follower",
            function="ksi.actors.follower:run_files",
            arguments=(str(var),),
            start_s=start_s,
            shutdown_s=shutdown_s,
        ),
    )
