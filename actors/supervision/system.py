"""What can be asked of the supervisor. Declarations only: it is cheap to import anywhere.

`system:*` looks at the system and stops it; `child:*` starts and stops supervised agents, asked
for by the registry, which knows why. A supervised agent is `agent:spawn`ed there, not here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ksi.actors.supervision.restarts import Restart
from ksi.transport.errors import Conflict, Draining, Invalid, NotFound, Quota, TooLarge
from ksi.transport.message import (
    ANYONE,
    OPERATOR,
    Command,
    Id,
    Query,
    Reply,
    Role,
    Text,
    operation,
)

State = Literal["STARTING", "RUNNING", "BACKOFF", "STOPPED", "FATAL"]
# How a system comes up: what the owners need, the owners, what is derived from them, and all of it.
Phase = Literal["infrastructure", "owners", "context", "ready"]
STARTERS: frozenset[Role] = frozenset({"operator", "owner"})


class ChildStatus(Reply, frozen=True, kw_only=True):
    """One child process as the supervisor sees it; `run/children.json` holds the same.

    Attributes:
        state: STARTING: not ready yet. RUNNING. BACKOFF: waits to be restarted. STOPPED: on
            purpose. FATAL: ended too often, it needs `child:start` or a person.
        pid: None while no process runs.
        starts: how often it was started by this supervisor.
        restarts: how often because it had ended by itself.
        last_exit: how it last ended, in words, None if it never did.
        since: when it came into this state, seconds since the epoch.
    """

    name: str
    kind: str
    state: State
    pid: int | None
    starts: int
    restarts: int
    last_exit: str | None
    since: float


class SystemStatus(Reply, frozen=True, kw_only=True):
    """The supervisor and its children, in the order in which they start.

    `phase`: that of the first child that does not answer; `ready` means that each answers, now.
    """

    pid: int
    started_at: float
    stopping: bool
    phase: Phase
    children: list[ChildStatus]


class Done(Reply, frozen=True, kw_only=True):
    """It will be done; `system:status` shows how far it is. `pid` is what ends, None: nothing."""

    name: str
    pid: int | None


@operation("system:status", owner="supervisor", roles=ANYONE)
class Status(Query[SystemStatus], frozen=True, kw_only=True):
    """The processes of the system: which run, which were restarted, which gave up."""


@operation("system:stop", owner="supervisor", roles=OPERATOR)
class Stop(Command[Done], frozen=True, kw_only=True):
    """Stop the whole system in order. The reply comes first, then everything ends."""


@operation(
    "system:restart",
    owner="supervisor",
    roles=OPERATOR,
    refuses=(NotFound, Draining),
    example={"owner": "sessions"},
)
class RestartChild(Command[Done], frozen=True, kw_only=True):
    """Stop one child in order and start it again. Its clients wait and lose nothing."""

    owner: Id


@operation(
    "child:start",
    owner="supervisor",
    roles=STARTERS,
    refuses=(Conflict, Quota, Invalid, Draining),
    example={"name": "alice", "argv": ["claude", "-p", "hello"], "identity": "alice"},
)
class StartChild(Command[ChildStatus], frozen=True, kw_only=True):
    """Start a command line as a supervised agent; it runs when the reply comes.

    It finds its identity in `KSI_AGENT` and the var directory in `KSI_VAR`.
    """

    name: Id
    argv: Annotated[list[str], msgspec.Meta(min_length=1, max_length=256)]
    env: dict[str, str] = {}
    cwd: Text | None = None
    restart: Restart = "transient"
    identity: Id | None = None
    shutdown_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 5.0


@operation(
    "child:stop",
    owner="supervisor",
    roles=STARTERS,
    refuses=(NotFound, Conflict),
    example={"name": "alice"},
)
class StopChild(Command[Done], frozen=True, kw_only=True):
    """Stop a supervised agent: SIGTERM, then SIGKILL after its `shutdown_s`; `force` at once."""

    name: Id
    force: bool = False


class Making(Reply, frozen=True, kw_only=True):
    """A checkpoint is being made; when it is whole, `checkpoint:list` has it."""

    id: str


class SnapshotStatus(Reply, frozen=True, kw_only=True):
    """The state of one owner in a checkpoint, and the place in its journal that follows it."""

    owner: str
    store_id: str
    seq: int
    segment: int
    offset: int
    data_bytes: int


class CheckpointStatus(Reply, frozen=True, kw_only=True):
    """One checkpoint.

    Attributes:
        number: of the cut; a later one has a higher number.
        reason: stop, time, journal or hand.
        data_bytes: of the owners' snapshots.
        files: how many session files it knows the length and CRC of, `files_bytes` in all.
    """

    id: str
    number: int
    created_at: float
    reason: str
    data_bytes: int
    files: int
    files_bytes: int
    owners: list[SnapshotStatus]


class CheckpointList(Reply, frozen=True, kw_only=True):
    """The whole checkpoints, the newest first; `making` is the id of one that is not yet whole.

    Attributes:
        failed_id: the last one that failed, and `failed` why.
    """

    checkpoints: list[CheckpointStatus]
    making: str | None
    failed_id: str | None
    failed: str | None


class Pruned(Reply, frozen=True, kw_only=True):
    """The ids of the checkpoints that were removed."""

    removed: list[str]


@operation("checkpoint:create", owner="supervisor", roles=OPERATOR, refuses=(Conflict, Draining))
class CreateCheckpoint(Command[Making], frozen=True, kw_only=True):
    """Make a checkpoint of all owners while they run. The reply comes first."""


class DevCheckpoints(CheckpointList, frozen=True, kw_only=True):
    """As `checkpoint:list`; `id` is that of the one that was begun, or of the newest."""

    id: str | None


DevAction = Literal[
    "create", "status", "list_requests", "remove_request", "clear_failed", "clear_all"
]


@operation(
    "dev:checkpoint",
    owner="supervisor",
    roles=OPERATOR,
    refuses=(Conflict, Draining),
    example={"action": "create"},
)
class DevCheckpoint(Command[DevCheckpoints], frozen=True, kw_only=True):
    """The older name of `checkpoint:create`, and with the action `status` of `checkpoint:list`.

    Requests are not looked at and removed in a checkpoint but where they wait: the other actions
    are refused, with the operation of today that does it.
    """

    action: DevAction = "create"
    request_id: Id | None = None


@operation(
    "dev:restore", owner="supervisor", roles=OPERATOR, refuses=(Conflict,), example={"id": "latest"}
)
class DevRestore(Command[None], frozen=True, kw_only=True):
    """An older name: nothing is restored under a system that runs. It is refused, and says what to
    type; a start brings back all there was without it."""

    id: Id = "latest"


@operation("checkpoint:list", owner="supervisor", roles=ANYONE)
class ListCheckpoints(Query[CheckpointList], frozen=True, kw_only=True):
    """The checkpoints there are."""


@operation(
    "checkpoint:show",
    owner="supervisor",
    roles=ANYONE,
    refuses=(NotFound,),
    example={"id": "20261121T090557.123Z"},
)
class ShowCheckpoint(Query[CheckpointStatus], frozen=True, kw_only=True):
    """One checkpoint: what it holds of each owner. Without an id the newest."""

    id: Id | None = None


class Verified(Reply, frozen=True, kw_only=True):
    """A checkpoint was read; if it is not `good`, `reason` says what is wrong with it."""

    id: str
    good: bool
    reason: str | None


@operation(
    "checkpoint:verify",
    owner="supervisor",
    roles=OPERATOR,
    refuses=(NotFound, TooLarge),
    example={"id": "20261121T090557.123Z"},
)
class VerifyCheckpoint(Query[Verified], frozen=True, kw_only=True):
    """Read all of a checkpoint and compare it with its checksums. Without an id the newest.

    One that takes long is verified beside the system: `ksi checkpoint verify`.
    """

    id: Id | None = None


@operation(
    "checkpoint:prune", owner="supervisor", roles=OPERATOR, refuses=(Draining,), example={"keep": 5}
)
class PruneCheckpoints(Command[Pruned], frozen=True, kw_only=True):
    """Remove all but the newest whole checkpoints."""

    keep: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 5
