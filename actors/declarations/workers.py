"""`workers`, a part of `completion`, in its forms: messages, events, tables.

What it does: `actors/owners/workers.py`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from ksi.actors.owner import Command, Event, Keyed, Query, Reply, Table, Tables
from ksi.transport.errors import NotFound, Quota, StaleEpoch
from ksi.transport.limits import OFFERS_MAX, SLOTS_MAX, WORKER_LEASE_S, WORKERS_MAX
from ksi.transport.message import Role, operation

ANYTHING: Final = "*"  # What a request requires that any worker may take; every worker offers it.

WORKERS: Final[frozenset[Role]] = frozenset({"worker", "operator"})
Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}$(?!\n)")]
Offers = Annotated[list[Word], msgspec.Meta(max_length=OFFERS_MAX)]
Epoch = Annotated[int, msgspec.Meta(ge=1)]
Slots = Annotated[int, msgspec.Meta(ge=0, le=SLOTS_MAX)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=WORKERS_MAX)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0.5, le=3600.0)]


class Registered(Reply, frozen=True, kw_only=True):
    """The worker is registered. Its `epoch` names this registration; a later one ends it."""

    worker: str
    epoch: int
    lease_s: float


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A grant by its name."""

    request_id: str
    attempt: int


class Renewed(Reply, frozen=True, kw_only=True):
    """The lease runs from now; these are all the grants the worker holds."""

    worker: str
    epoch: int
    lease_s: float
    grants: list[Held]


class WorkerView(Reply, frozen=True, kw_only=True):
    """One worker; `used` of its slots hold a grant."""

    worker: str
    epoch: int
    capabilities: list[str]
    slots: int
    used: int
    lease_s: float
    registered_at: float


class WorkerPage(Reply, frozen=True, kw_only=True):
    """Workers in the order of their names."""

    workers: list[WorkerView]


@operation(
    "worker:register",
    owner="completion",
    roles=WORKERS,
    refuses=(Quota,),
    example={"capabilities": ["echo"], "slots": 4},
)
class RegisterWorker(Command[Registered], frozen=True, kw_only=True):
    """Take part as a worker, under the name of the sender's key.

    A former registration of that name ends: its grants wait again. What answers requests that
    require nothing comes first in `capabilities`.
    """

    capabilities: Offers = []
    slots: Slots = 1
    lease_s: LeaseSeconds = WORKER_LEASE_S


@operation(
    "worker:renew",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, StaleEpoch),
    example={"epoch": 1},
)
class RenewWorker(Command[Renewed], frozen=True, kw_only=True):
    """Renew the lease of the sender, and learn what it holds. With `slots` 0 it drains."""

    epoch: Epoch
    slots: Slots | None = None


@operation(
    "worker:leave",
    owner="completion",
    roles=WORKERS,
    refuses=(NotFound, StaleEpoch),
    example={"epoch": 1},
)
class LeaveWorker(Command[None], frozen=True, kw_only=True):
    """Take part no longer. Grants that are still held wait again, for another."""

    epoch: Epoch


@operation("worker:list", owner="completion", example={"limit": 10})
class ListWorkers(Query[WorkerPage], frozen=True, kw_only=True):
    """List workers."""

    limit: Limit = WORKERS_MAX


class WorkerRegistered(Event, frozen=True, array_like=True, tag="worker"):
    worker: str
    epoch: int
    capabilities: list[str]
    slots: int
    lease_s: float
    now: float
    time_s: float


class WorkerRenewed(Event, frozen=True, array_like=True, tag="renewed"):
    worker: str
    slots: int
    time_s: float


class WorkerLeft(Event, frozen=True, array_like=True, tag="left"):
    worker: str
    epoch: int
    reason: str


class Worker(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    capabilities: list[str]
    slots: int
    used: int
    lease_s: float
    due_ms: int
    registered_at: float


class WorkerTables(Tables):
    workers: Table[Worker]
    free: Annotated[Table[bytes], Keyed(str, int, str)]  # offered, slots used, worker
    leases: Annotated[Table[bytes], Keyed(int, str)]  # ms of owner time, worker
