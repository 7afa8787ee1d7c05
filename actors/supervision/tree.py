"""The children of the supervisor, in the order in which they start; they stop in reverse.

They start in phases: `infrastructure` writes what the owners accept, the `owners` hold the state,
and `context` is what agents look things up in, derived from both. Then the system is `ready`.

One for one: an owner's state is on disk and its clients resend, so none needs another's restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import ksi.actors.supervision.system  # noqa: F401 - declares the supervisor's operations
from ksi.actors.config import Config
from ksi.actors.owners import OWNERS, load_all
from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.restarts import Strategy

# Owners with something beside them in their process; it runs them, too.
FUNCTIONS: Final = {
    "index": "ksi.actors.followers.indexing:run_index",
    "library": "ksi.actors.followers.library:run_library",
    "events": "ksi.actors.followers.recording:run_events",
}


CONTEXT: Final = frozenset({"index", "library", "events"})


class Tree(NamedTuple):
    """What one supervisor supervises.

    Attributes:
        specs: makes the child specs for a var directory from its settings.
        strategy: what else is restarted when one of them has ended.
        domains: which of them announces the topics that begin with a word.
        by_phase: whether those of one phase start and stop together.
        has_checkpoints: whether they are owners with stores, of which checkpoints are made.
    """

    specs: Callable[[Path, Config], tuple[ChildSpec, ...]]
    strategy: Strategy = "one_for_one"
    domains: Mapping[str, str] = {}
    by_phase: bool = False
    has_checkpoints: bool = False


def tree() -> Tree:
    """Return the tree of the system. It declares all operations."""
    owners = load_all()
    return Tree(
        specs,
        domains={domain: name for name, owner in owners.items() for domain in owner.domains},
        by_phase=True,  # Owners do not ask each other: none waits for another.
        has_checkpoints=True,
    )


def specs(var: Path, settings: Config) -> tuple[ChildSpec, ...]:
    """Return the child specs of the system."""
    start_s, shutdown_s = settings.supervisor.start_s, settings.supervisor.shutdown_s
    owners = [
        ChildSpec(
            name=name,
            kind="owner",
            phase="context" if name in CONTEXT else "owners",
            function=FUNCTIONS.get(name, "ksi.actors.process:run_owner"),
            arguments=_arguments(name, var, settings),
            start_s=start_s,
            shutdown_s=shutdown_s,
        )
        for name in OWNERS
    ]
    files = ChildSpec(
        name="files",
        kind="follower",
        phase="infrastructure",
        function="ksi.actors.followers.files:run_files",
        arguments=(str(var),),
        start_s=start_s,
        shutdown_s=shutdown_s,
    )
    return (files, *owners)  # Stopped last, it writes all that the owners still accept.


def _arguments(name: str, var: Path, settings: Config) -> tuple[str, ...]:
    if name == "events":
        return str(var), str(settings.events.keep_days), str(settings.events.archive_days)
    return (str(var),) if name in FUNCTIONS else (name, str(var))
