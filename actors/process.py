"""The entry of an owner process: opens its store, binds its mailbox, runs its host.

The order is part of the design: the lock on the store is held before anything is opened or bound,
and nothing is taken from the socket before the store is open, so whoever is answered is answered by
the only writer. It is bound first: clients connect while the store is opened.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import msgspec
import zmq

from ksi.actors import config, log
from ksi.actors.checkpoints import Cuts, copies_of
from ksi.actors.commit import CommitLoop, batch_decoder, table_specs
from ksi.actors.delivery import Counter
from ksi.actors.host import Host, fresh_ids
from ksi.actors.memory import settle
from ksi.actors.outbox import Outbox
from ksi.actors.owner import Owner, Restored
from ksi.actors.owners import load, load_all
from ksi.actors.reading import Facts, reader_of
from ksi.actors.stat import StatWriter
from ksi.storage.boot import this_boot
from ksi.storage.journal import Batch
from ksi.storage.store import Store, is_no_room, take_lock
from ksi.storage.tables import key_codec, row_codec
from ksi.transport.errors import StorageFull
from ksi.transport.identity import Directory, KeyRing, endpoint, run_directory
from ksi.transport.mailbox import Mailbox, connect, raise_file_limit, srand

NICE: Final = 5  # A third of the share of others, where all want more than there is.
_SESSION_TRIES: Final = 100  # In some twenty seconds.

T = TypeVar("T")
Beside = Callable[[Path, Any], Callable[[], None]]


def warm() -> None:
    """Work out what owners need of their types; the fork server does it once for all of them."""
    for owner in load_all().values():
        batch_decoder(owner.events)
        for name, spec in table_specs(owner).items():
            row_codec(name, spec.row)
            key_codec(spec.key_types)
    this_boot()
    config.warm()
    # The first look at the annotations of a class makes them, and so marks each of its subclasses
    # as changed, in pages of the server. pyzmq looks at these when it sets an option.
    getattr(Generic, "__annotations__", {})
    srand()
    logging.getLogger("pykka").isEnabledFor(logging.DEBUG)  # It asks, and what it hears is kept.


def run_owner(name: str, var: str, beside: Beside | None = None) -> None:
    """Run the owner `name` on `var` until SIGTERM; what is in its mailbox then is carried out.

    Args:
        beside: starts what else runs in this process, once nobody else holds the store, and
            returns what ends it.

    Raises:
        KsiError: the store cannot be opened; its text says what to do.
    """
    root = Path(var)
    logger = log.configure(root, name)
    stat = wait_for_room(lambda: StatWriter(run_directory(root) / f"{name}.stat"), logger)
    raise_file_limit()
    owner = load(name)
    lock = wait_for_room(lambda: take_lock(root / "db" / name), logger)

    def start() -> tuple[Store, CommitLoop]:
        stat.begin_turn(time.monotonic())  # To wait for room is not to hang.
        store, loop = open_store(owner, root / "db" / name, logger, locked=True)
        try:
            stat.epoch = _count_start(store)
            if owner.recovers and store.is_untouched:
                interrupted = config.load(root).config.checkpoint.interrupted
                restored = Restored(interrupted=interrupted)
                loop.run_restored(restored, round(time.time(), 6), store.meta.time_s)
        except BaseException:
            store.close()
            raise
        return store, loop

    context = zmq.Context()
    keys = KeyRing(root)
    certificate = keys.load(name)
    assert certificate is not None, "the supervisor enrols owners before it starts them"

    def to_owner(other: str) -> Any:
        place = Directory.read(root).owners[other]
        return connect(context, place.endpoint, place.key.encode(), certificate)

    tcp = Directory.read(root).owners[name].tcp
    mailbox = Mailbox(context, endpoint(root, name), certificate, keys, tcp=tcp or None)
    store, loop = wait_for_room(start, logger)
    outbox = Outbox(store.meta.lineage, to_owner, logger)
    logger.info("open", store=store.id, journal_seq=store.meta.seq)
    end = beside(root, logger) if beside is not None else None
    settle()
    cuts = Cuts(name, root, store, logger)
    Host.start(loop, store, reader_of(owner, root), mailbox, outbox, stat, cuts, logger)
    if end is not None:
        end()
    cuts.close()
    context.term()
    store.close()
    os.close(lock)  # Last: until then nobody else may open the store or bind the socket.
    logger.info("closed", journal_seq=store.meta.seq)


def step_back() -> None:
    """Let others have the processor first: those for whom a client waits.

    The kernel may share it out among sessions of processes before it looks at the processes, and
    each child is one. Source: sched(7), "The autogroup feature".
    """
    os.nice(NICE)
    threading.Thread(target=_step_back_session, daemon=True).start()


def _step_back_session() -> None:
    for _ in range(_SESSION_TRIES):
        try:
            group = os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(group, b"%d" % NICE)
            finally:
                os.close(group)
            return
        except BlockingIOError:  # Of all users together one may, each tenth of a second.
            time.sleep(0.1 + os.getpid() % 16 / 100)
        except OSError:  # It does not share it so.
            return


def wait_for_room(start: Callable[[], T], logger: Any) -> T:
    """Return `start()`, once there is room on the disk for what it does.

    A process that ended for want of room would only be started again, until its supervisor gives
    up on all of them, those included that need no more room.
    """
    while True:
        try:
            return start()
        except Exception as error:
            if not is_no_room(error):
                raise
            logger.error("there is no room to start; waiting for it", error=str(error))
        time.sleep(StorageFull.retry_s)  # A poll: nobody tells that there is room again.


def open_store(
    owner: Owner[Any], directory: Path, logger: Any, *, locked: bool = False
) -> tuple[Store, CommitLoop]:
    """Open and recover the owner's store; return it with its commit loop. `locked`: the caller has
    its lock, and keeps it until the store is closed."""
    loops: list[CommitLoop] = []
    facts = Facts(directory.parent.parent)

    def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
        if not loops:
            loops.append(CommitLoop(owner, store, fresh_ids(), logger, facts))
        return loops[0].replay(batch.payload)

    copies = copies_of(directory.parent.parent, owner.name)
    store = Store.open(
        directory, table_specs(owner), replay=replay, snapshots=copies, locked=locked
    )
    loop = loops[0] if loops else CommitLoop(owner, store, fresh_ids(), logger, facts)
    if store.meta.extra:
        loop.cut = msgspec.msgpack.decode(store.meta.extra, type=int)
    return store, loop


def _count_start(store: Store) -> int:
    """Count this start in the store and return the count: the epoch of this process."""
    store.begin()
    counters = store.tables["ksi.counters"]
    row = counters.get("starts")
    starts = 1 if row is None else row.value + 1
    counters.put("starts", Counter(starts))
    store.commit_view()
    return starts
