"""Workers: who is registered, with what it offers and how many grants it takes, and until when.

A part of the owner of completions, with rows of its own. A worker with a free slot has a row for
each thing that it offers, the least busy first.
"""

from __future__ import annotations

import msgspec

from ksi.actors.declarations.workers import (
    ANYTHING,
    Worker,
    WorkerLeft,
    WorkerRegistered,
    WorkerRenewed,
    WorkerTables,
    WorkerView,
)
from ksi.transport.errors import NotFound, StaleEpoch
from ksi.transport.moments import due_ms


def registered(name: str, epoch: int, tables: WorkerTables) -> Worker:
    """Return a worker that is registered, in this epoch; refuse any other."""
    worker = tables.workers.get(name)
    if worker is None:
        raise NotFound(
            f"there is no worker {name}: its lease has lapsed, or it has left",
            hint="register again",
            worker=name,
        )
    if worker.epoch != epoch:
        raise StaleEpoch(
            f"another registered as {name}: it is in epoch {worker.epoch}, not {epoch}",
            hint="stop, or take another name",
            epoch=worker.epoch,
        )
    return worker


def view(name: str, worker: Worker) -> WorkerView:
    return WorkerView(
        worker=name,
        epoch=worker.epoch,
        capabilities=worker.capabilities,
        slots=worker.slots,
        used=worker.used,
        lease_s=worker.lease_s,
        registered_at=worker.registered_at,
    )


def apply_used(name: str, change: int, tables: WorkerTables) -> None:
    """So many more of the slots of a worker, or fewer, are used."""
    worker = tables.workers.get(name)
    if worker is not None:
        used = worker.used + change
        _put(tables, name, msgspec.structs.replace(worker, used=used))


def apply_registered(event: WorkerRegistered, tables: WorkerTables) -> None:
    until_ms = due_ms(event.time_s, event.lease_s)
    worker = Worker(
        event.epoch, event.capabilities, event.slots, 0, event.lease_s, until_ms, event.now
    )
    _put(tables, event.worker, worker)


def apply_renewed(event: WorkerRenewed, tables: WorkerTables) -> None:
    worker = tables.workers.get(event.worker)
    assert worker is not None
    until_ms = due_ms(event.time_s, worker.lease_s)
    renewed = msgspec.structs.replace(worker, slots=event.slots, due_ms=until_ms)
    _put(tables, event.worker, renewed)


def apply_left(event: WorkerLeft, tables: WorkerTables) -> None:
    _put(tables, event.worker, None)


def _put(tables: WorkerTables, name: str, worker: Worker | None) -> None:
    """Set or remove a worker, its lease, and the rows that say it is free."""
    before = tables.workers.get(name)
    was, now = _free_rows(name, before), _free_rows(name, worker)
    for key in was - now:
        tables.free.delete(key)
    for key in now - was:
        tables.free.put(key, b"")
    if before is not None and (worker is None or worker.due_ms != before.due_ms):
        tables.leases.delete((before.due_ms, name))
    if worker is None:
        tables.workers.delete(name)
    else:
        tables.leases.put((worker.due_ms, name), b"")
        tables.workers.put(name, worker)


def _free_rows(name: str, worker: Worker | None) -> set[tuple[str, int, str]]:
    if worker is None or worker.used >= worker.slots:
        return set()
    return {(offered, worker.used, name) for offered in (ANYTHING, *worker.capabilities)}
