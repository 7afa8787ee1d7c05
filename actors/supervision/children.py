"""What a supervisor knows of each child, and which may start and which must stop next. No effects.

Order is by the list: children start from its first to its last, each when the one before is ready,
and stop from its last to its first, each when the one behind is gone. Where it goes by phase, that
holds of phases, and the children of one start and stop together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.forkserver import Running
from ksi.actors.supervision.probe import Probe
from ksi.actors.supervision.restarts import Strategy
from ksi.actors.supervision.system import ChildStatus, Phase, State


@dataclass(slots=True, eq=False)
class Child:
    """A spec, what its process should be, and what it is.

    Attributes:
        wanted: whether it should run.
        renew: the process that runs has to end first.
        running: its process; None when there is none.
        probe: what asks whether it is ready; None before and after.
        was_ready: whether it has ever been.
        restarts: when it was restarted lately, newest first.
        due_s: it is not started before.
        kill_s: when it is killed; None: it was not asked to stop.
        hung: why it was killed, until its end is seen.
    """

    spec: ChildSpec
    state: State = "STOPPED"
    since: float = field(default_factory=time.time)
    wanted: bool = True
    renew: bool = False
    running: Running | None = None
    probe: Probe | None = None
    was_ready: bool = False
    starts: int = 0
    restarts: tuple[float, ...] = ()
    restarts_total: int = 0
    due_s: float = 0.0
    kill_s: float | None = None
    hung: str | None = None
    last_exit: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_agent(self) -> bool:
        return self.spec.kind == "agent"

    @property
    def pid(self) -> int | None:
        return self.running.pid if self.running else None

    @property
    def leaves(self) -> bool:
        """Whether a process of it has to end."""
        return self.renew or not self.wanted

    def status(self) -> ChildStatus:
        """Return what others are told of it."""
        return ChildStatus(
            name=self.name,
            kind=self.spec.kind,
            state=self.state,
            pid=self.pid,
            starts=self.starts,
            restarts=self.restarts_total,
            last_exit=self.last_exit,
            since=self.since,
        )


def phase_of(own: Sequence[Child]) -> Phase:
    """Return how far the system has come: the phase of the first child that does not answer."""
    return next((child.spec.phase for child in own if child.state != "RUNNING"), "ready")


def next_to_start(
    own: Sequence[Child], strategy: Strategy, *, up: bool, by_phase: bool = False
) -> list[Child]:
    """Return the children that may start now, if they are due.

    Until all have been up once, and always under `rest_for_one`, a child waits for those before
    it, with `by_phase` for those of other phases. Under `rest_for_one` nothing starts while
    something still has to stop for it.
    """
    if strategy == "rest_for_one" and any(child.renew for child in own):
        return []
    startable = []
    awaited: Child | None = None
    for child in own:
        if awaited and not (by_phase and child.spec.phase == awaited.spec.phase):
            break
        if child.wanted and child.running is None:
            startable.append(child)
        if child.wanted and child.state != "RUNNING" and (strategy == "rest_for_one" or not up):
            awaited = child
    return startable


def next_to_stop(own: Sequence[Child], *, by_phase: bool = False) -> list[Child]:
    """Return the last child that runs and has to end, with `by_phase` all such of its phase: those
    before it wait for it."""
    leaving = [child for child in own if child.running and child.leaves]
    if not by_phase:
        return leaving[-1:]
    return [child for child in leaving if child.spec.phase == leaving[-1].spec.phase]


def rest_of(own: Sequence[Child], child: Child) -> Sequence[Child]:
    """Return the children that start after `child`."""
    return own[own.index(child) + 1 :]
