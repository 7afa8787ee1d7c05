"""The supervisor: a process that starts, watches, restarts and stops other processes, its children.

It has no state that outlives it. Its children end with it, however it ends, and what they own is
on disk: so whatever goes wrong here, starting again is right.

Principles, in the words and by the rules of OTP:

- *Children start in order*, each when the one before is ready, and stop in reverse. While the
  system comes up, a child that ends before it is ready fails the start as a whole.
- *A child that ends by itself* is restarted by its restart type (`restarts.py`): `one_for_one`
  alone, `rest_for_one` with all that started after it. The first time at once, then with backoff.
- *Too many restarts escalate.* More than `intensity` in `period_s` and the supervisor stops all
  children and itself, exits 1 and says why. Each supervised agent sits under an intensity of its
  own: an agent that cannot live becomes FATAL alone, owners and other agents go on.
- *A child that hangs has ended*: no turn for `hung_turn_s`, or `hung_commit_s` in a commit, by its
  stat file. It is killed, and the rule for ended children applies.
- *Ended means ended*: a child is stopped by SIGTERM, after `shutdown_s` by SIGKILL, and nothing
  takes its place before the kernel says that it is gone.

It is an actor: its inbox is a mailbox, its loop runs in the main thread, and nothing in it waits.
A turn takes in what has happened (children that ended, requests, signals, time), then `_advance`
compares what each child should be with what it is and takes the next steps, in order.

Files it writes for others to read, also when it hangs or is gone: `run/children.json` on each
change, `run/supervisor.stat` each turn, `run/supervisor.exit` when it gives up.

Source: Erlang/OTP `supervisor.erl` and `sup_princ`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import pykka

from ksi.actors import config, log
from ksi.actors.child import ChildSpec
from ksi.actors.desk import STORE, Desk
from ksi.actors.forkserver import ForkServer, Running
from ksi.actors.owner import Sender
from ksi.actors.probe import Probe
from ksi.actors.restarts import (
    Backoff,
    Intensity,
    Strategy,
    add_restart,
    backoff_s,
    exit_words,
    is_restarted,
    within,
)
from ksi.actors.stat import StatWriter, read_stat
from ksi.actors.system import (
    ChildStatus,
    Done,
    RestartChild,
    StartChild,
    State,
    Status,
    Stop,
    StopChild,
    SystemStatus,
)
from ksi.transport import wire
from ksi.transport.errors import (
    Conflict,
    Draining,
    Internal,
    KsiError,
    NotFound,
    Quota,
    UnknownOperation,
)
from ksi.transport.mailbox import Mailbox, Post
from ksi.transport.message import Message

AGENTS_MAX: Final = 1024  # Supervised at once: four descriptors and some memory each.
LOOK_S: Final = 0.5  # How often children are looked at for hanging, if nothing else happens.
READY_LOOK_S: Final = 0.002  # How often a starting child is asked whether it is ready ...
READY_LOOK_S_MAX: Final = 0.05  # ... and how often when it takes long.
HURRY_S: Final = 0.5  # What children may still take to stop after the second signal.
EXIT_GAVE_UP: Final = 1
EXIT_DEFECT: Final = 70  # EX_SOFTWARE: a turn of the supervisor itself failed

Progress = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class Child:
    """A spec, what its process should be and what it is. `running` is None when there is none."""

    spec: ChildSpec
    state: State = "STOPPED"
    wanted: bool = True  # it should run ...
    renew: bool = False  # ... but be stopped and started again first
    running: Running | None = None
    probe: Probe | None = None  # until it is ready
    was_ready: bool = False
    restarts: tuple[float, ...] = ()  # newest first
    restarts_total: int = 0
    starts: int = 0
    due_s: float = 0.0  # not to be started before
    kill_s: float | None = None  # when it is killed; None: it was not asked to stop
    last_exit: str | None = None
    since: float = field(default_factory=time.time)

    def status(self) -> ChildStatus:
        """Return what others are told of it."""
        return ChildStatus(
            name=self.spec.name,
            kind=self.spec.kind,
            state=self.state,
            pid=self.running.pid if self.running else None,
            starts=self.starts,
            restarts=self.restarts_total,
            last_exit=self.last_exit,
            since=self.since,
        )
