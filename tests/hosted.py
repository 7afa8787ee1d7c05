"""The real host of an owner, with its commit loop and outbox, over what tests give it for a socket,
a disk and other owners."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ksi.actors.commit import batch_decoder, bind
from ksi.actors.host import Host
from ksi.actors.owner import Log
from ksi.actors.testing import Twin


def host_of(twin: Twin, mailbox: Any, outbox: Any, log: Any) -> Host:
    """Return a host over the tables of `twin`. What it is asked it reads there, committed or not:
    between turns nothing is open."""
    nothing = SimpleNamespace
    store = nothing(
        id="store", meta=nothing(time_s=twin.store.time_s, seq=0), journal=nothing(syncs=0),
        check_readers=lambda: 0,
    )  # fmt: skip

    def read(function: Any) -> Any:
        follow(twin)
        return function(twin.store.tables, store.meta)

    reader = nothing(
        reader=nothing(read=read),
        bound=lambda _tables: bound(twin),
    )
    stat = nothing(
        begin_turn=lambda _: None, end_turn=lambda _: None, committing=lambda _: None,
        record=lambda _: None, refusals=0, commits=0, commands=0, queries=0, mailbox_peak=0,
        internal_errors=0, replies_dropped=0,
    )  # fmt: skip
    beside = nothing(make=lambda _: False)
    parts: tuple[Any, ...] = (store, reader, mailbox, outbox, stat, beside, log)
    return Host(twin.loop, *parts)


def bound(twin: Twin) -> Any:
    """Return the declared tables of the owner, with logs and caches, as its queries get them."""
    beside = {Log: twin.log, **twin.caches}
    return bind(twin.owner.tables, twin.store.tables, beside)


def events_in(twin: Twin) -> Iterator[Any]:
    """Yield all events in the journal of `twin`."""
    decode = batch_decoder(twin.owner.events)
    for payload in twin.store.journal:
        for record in decode(payload).records:
            yield from record.events


def follow(twin: Twin) -> None:
    """Write the logs of `twin` as far as its journal goes, as the follower of files does."""
    for event in events_in(twin):
        for line in twin.owner.lines(event):
            if line.offset >= len(twin.log.content.get(line.key, b"")):
                twin.log.add(line)
