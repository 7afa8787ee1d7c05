"""An owner's state as it was: at a number of its journal, or at a time.

The nearest copy before it (a checkpoint, what a restore began from, or nothing at all) is
installed where nobody else sees it, and the journal replayed into it from there on, by the code
that recovers a store. So it reaches back as far as journal and checkpoints do, and no further than
the last restore.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ksi.actors.checkpoints import copies_of
from ksi.actors.commit import CommitLoop, batch_decoder, bind, caches_of, table_specs
from ksi.actors.delivery import Batch
from ksi.actors.owner import Log, Owner, Query
from ksi.actors.reading import CommittedLog, reader_of
from ksi.storage.errors import Corrupt
from ksi.storage.journal import JournalReader, Position
from ksi.storage.past import Base, PastView, bases
from ksi.storage.tables import TableSpec
from ksi.transport.errors import Invalid, NotFound
from ksi.transport.moments import iso, moment

Answer = Callable[[Query[Any]], Any]
Then = int | float  # a number of the journal, or seconds since the epoch


@contextmanager
def as_of(owner: Owner[Any], var: Path, at: int | str) -> Iterator[Answer]:
    """Yield what answers queries from the owner's state as it was at `at`.

    Args:
        at: a number of its journal; or a time, as `2026-05-04T09:00:00Z`, or `10m` for so long ago:
            the state behind the last batch before the first that is later.

    Raises:
        NotFound: there is nothing of then yet, or not any more; the text says from where on.
        Invalid: `at` is no time, or the owner answers from what has no past.
        NotRunning: the owner has no store that can be read.
        Corrupt: what it would be built from is damaged.
        StorageFull: there is no room to build it.
    """
    if caches_of(owner.tables):
        raise Invalid(f"what {owner.name} answers from has no past: it is built anew at any time")
    reader = reader_of(owner, var)
    present = reader.committed()
    then = at if isinstance(at, int) else moment(at, now=time.time(), what="at")
    if isinstance(then, int) and not 0 <= then <= present.seq:
        text = f"{owner.name} is at number {present.seq}: there is no number {then}"
        raise NotFound(text, hint="ksi status", seq=present.seq)
    store = var / "db" / owner.name / present.store
    found = bases(store, copies_of(var, owner.name))
    near = [base for base in found if _leads_to(base, then)]
    if not near:
        raise _gone(owner.name, found, then)
    base, view = _nearest(store.parent, table_specs(owner), near)
    with closing(view):
        _replay(owner, view, base, JournalReader(store), present.position, then)
        tables = bind(owner.tables, view.tables, {Log: CommittedLog(reader.reader)})
        yield lambda query: owner.answer(query, tables)


def _leads_to(base: Base, then: Then) -> bool:
    """Whether the state of then can be had from a copy."""
    if isinstance(then, int) and base.seq == then:
        return True
    before = base.seq < then if isinstance(then, int) else base.at <= then
    return before and base.journal is not None


def _gone(owner: str, found: Sequence[Base], then: Then) -> NotFound:
    """Return the refusal of what is not there any more."""
    kept = [base for base in found if base.journal is not None]
    if not kept:
        text = f"of {owner} there is no copy that its journal goes on from"
        return NotFound(text, hint="ksi checkpoint list")
    oldest = min(kept, key=lambda base: base.seq)
    wanted, first = (then, oldest.seq) if isinstance(then, int) else (iso(then), iso(oldest.at))
    return NotFound(
        f"the journal of {owner} is kept from {first} on, and {wanted} is before that",
        hint="former stores stay in var/db, and the files of sessions hold all that was said",
        seq=oldest.seq,
    )


def _nearest(
    directory: Path, specs: Mapping[str, TableSpec], near: Sequence[Base]
) -> tuple[Base, PastView]:
    """Return the newest of these copies that is good, and a view that starts with it."""
    for base in near[:-1]:
        try:
            return base, PastView(directory, specs, base.path)
        except Corrupt:
            continue
    return near[-1], PastView(directory, specs, near[-1].path)


def _replay(
    owner: Owner[Any],
    view: PastView,
    base: Base,
    journal: JournalReader,
    stop: Position,
    then: Then,
) -> None:
    """Apply to a view that holds `base` what follows in the journal, up to then."""
    if base.seq == then or base.journal is None:
        return
    loop: Any = CommitLoop(owner, view, iter(()), None)  # type: ignore[arg-type]  # commits nothing
    decode = batch_decoder(owner.events)
    for stored in journal.read(base.journal, stop):
        batch = decode(stored.payload)
        part = _until(batch, stored.first_seq, then)
        loop.replay_batch(part)
        view.applied(len(part.records))
        if len(part.records) < stored.records:
            return


def _until(batch: Batch[Any], first_seq: int, then: Then) -> Batch[Any]:
    """Return what of a batch had happened by then."""
    if isinstance(then, float):
        count = len(batch.records) if batch.now <= then else 0
    else:
        count = max(0, then - first_seq + 1)
    return msgspec.structs.replace(batch, records=batch.records[:count])
