"""Checkpoints: a consistent cut through all owners, by the protocol of Lai and Yang.

    supervisor ── starts ──▶ checkpoint ── HELLO, cut n ──▶ every owner: opens its read transaction
                                 ◀── WELCOME, cut n ── … and copies behind it, in a thread

Every frame carries `cut`, the highest number its sender has seen, and an owner opens its read
transaction *before* it handles the first frame of a higher one. So what an owner sends after its
cut is handled by nobody before his: no effect is in a checkpoint without its cause. What was sent
before and not yet answered lies in the outbox of its sender, in the same cut. No owner waits for
another. A number counts only while its checkpoint is being made: its directory says so.

`Cuts` is the part of an owner. `run_checkpoint` is the process that makes one: it collects the
copies, checks and hashes them, adds the session files, and gives the whole its name; then older
ones and journal segments that nobody needs any more may go.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar
from zlib import crc32

import lmdb
import msgspec
import zmq

from ksi.actors import log
from ksi.actors.commit import bind, table_specs
from ksi.actors.followers.conversed import cache_path
from ksi.actors.followers.indexed import index_directory
from ksi.actors.followers.recorded import event_directory
from ksi.actors.owner import Owner
from ksi.actors.owners import OWNERS, load
from ksi.actors.reading import cursor_path, log_directory, reader_of
from ksi.actors.supervision.reports import write_checkpoint
from ksi.storage import checkpoints
from ksi.storage.atomic import make_directory, sync_directory
from ksi.storage.boot import this_boot
from ksi.storage.checkpoints import Checkpoint, File
from ksi.storage.conversations import ConversationsReader
from ksi.storage.errors import Corrupt
from ksi.storage.eventlog import read_synced
from ksi.storage.files import read_cursor, read_log
from ksi.storage.former import drop_former
from ksi.storage.index import Place, read_place
from ksi.storage.journal import drop_segments
from ksi.storage.snapshots import Manifest, read_copy
from ksi.storage.store import Store, copy_view, seal_copy
from ksi.transport import wire
from ksi.transport.errors import KsiError, Unavailable
from ksi.transport.identity import Directory, KeyRing, run_directory
from ksi.transport.mailbox import connect, read_monitor
from ksi.transport.wire import Kind

T = TypeVar("T")

DELIVER_S: Final = 5.0  # An owner that has not made its cut by then fails the checkpoint ...
COPY_S_MAX: Final = 600.0  # ... and this long it may copy behind it: gigabytes.
LOOK_S: Final = 0.002  # How often is looked for copies.
NICE: Final = 10  # Whoever is asked meanwhile goes first.
TURN_S_MAX: Final = 1.0  # How long an owner lets others copy before it does ...
TURN_LOOK_S: Final = 0.005  # ... and how often it looks.
PAGE_LOGS: Final = 1000  # Session files looked up at once.
READ_BYTES: Final = 1 << 20  # Of a session file at once.
RESTORING: Final = "RESTORING"  # Stands in `db` from the first step of a restore to its last.
FAILED: Final = ".failed"  # Beside the place of a copy: why there is none.

_decode_frame = msgspec.msgpack.Decoder(wire.OwnerFrame).decode


def root_of(var: Path) -> Path:
    """Return where checkpoints are."""
    return var / "checkpoints"


def copies_of(var: Path, owner: str) -> Iterator[Path]:
    """Yield where the copy of an owner is, of each checkpoint that has one."""
    for name in checkpoints.names(root_of(var)):
        copy = root_of(var) / name / owner
        if copy.is_dir():
            yield copy


class Cuts:
    """Makes the cuts of one owner, and the copies behind them."""

    def __init__(self, owner: str, var: Path, store: Store, logger: Any) -> None:
        self._owner = owner
        self._root = root_of(var)
        self._store = store
        self._log = logger
        self._copying: list[threading.Thread] = []

    def make(self, number: int) -> bool:
        """Keep the state as last committed for the checkpoint `number`, if it is being made.

        It is copied in another thread: whoever asks does not wait.
        """
        place = checkpoints.making(self._root, number)
        if not place.is_dir():
            return False
        self._copying = [each for each in self._copying if each.is_alive()]
        frozen = self._store.freeze()

        def copy() -> None:
            temporary = place / f".{self._owner}"
            os.nice(NICE)  # This thread alone: nice(2).
            try:
                with _turn(place):
                    frozen.copy(temporary)
                os.rename(temporary, place / self._owner)
            except (OSError, lmdb.Error) as error:
                self._log.warning("a checkpoint failed", number=number, error=str(error))
                with suppress(OSError):
                    (place / (self._owner + FAILED)).write_text(str(error))
            finally:
                frozen.release()  # Again, or because it did not come to that.

        thread = threading.Thread(target=copy, name=f"checkpoint-{number}", daemon=True)
        self._copying.append(thread)
        thread.start()
        return True

    def close(self) -> None:
        """Wait for what is being copied: its store must not be closed before."""
        for thread in self._copying:
            thread.join()


@contextmanager
def _turn(place: Path) -> Iterator[None]:
    """Let other owners copy first, one at a time: all at once they take disk and cores from whoever
    is asked meanwhile. For a while only: no owner depends on another."""
    held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until_s = time.monotonic() + TURN_S_MAX
        while time.monotonic() < until_s:
            with suppress(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(TURN_LOOK_S)  # `flock` has no deadline.
        yield
    finally:
        os.close(held)


def run_checkpoint(var: str, checkpoint_id: str, reason: str, keep: str, former_s: str) -> None:
    """Make a checkpoint; with the reason `stop` of owners that do not run any more.

    Behind it goes what is not needed any more: older checkpoints but for `keep`, segments of
    journals, and what has been left behind for `former_s`.

    Once it has begun, only its own failure or SIGKILL ends it. Exits 1 with the reason in
    `run/checkpoint.json` if there is none.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    root = Path(var)
    logger = log.configure(root, "checkpoint")
    if reason != "stop":
        os.nice(NICE)
    begun_s = time.monotonic()
    try:
        made = make(root, checkpoint_id, reason)
        gone = checkpoints.prune(root_of(root), int(keep))
        dropped = drop_journals(root)
        former = drop_left_behind(root, float(former_s))
    except Exception as error:
        text = error.text if isinstance(error, KsiError) else f"{error!r}"
        logger.exception("a checkpoint failed", checkpoint=checkpoint_id)
        with suppress(OSError):
            write_checkpoint(run_directory(root), checkpoint_id, text[:1000])
        raise SystemExit(1) from error
    spent_s = round(time.monotonic() - begun_s, 3)
    logger.info(
        "checkpoint",
        checkpoint=checkpoint_id,
        reason=reason,
        seconds=spent_s,
        data_bytes=made.data_bytes,
        files=made.files,
        removed=gone,
        segments_dropped=dropped,
        former_dropped=former,
    )


def make(var: Path, checkpoint_id: str, reason: str) -> Checkpoint:
    """Make a checkpoint, whole or not at all, and return it.

    Raises:
        Unavailable: an owner did not deliver.
        Corrupt: a state is damaged.
        OSError: there is no room, or no right.
    """
    root = root_of(var)
    make_directory(root)
    checkpoints.sweep(root)
    former = checkpoints.whole(root)
    number = former[0].number + 1 if former else 1
    created_at = time.time()
    if reason == "stop":
        place = checkpoints.making(root, number)
        place.mkdir(mode=0o700)
        _each(lambda owner: copy_view(var / "db" / owner, place / owner))
    else:
        with Cutting(var) as cutting:
            number = max(number, cutting.greet() + 1)
            place = checkpoints.making(root, number)
            place.mkdir(mode=0o700)
            cutting.cut(number)
            cutting.collect(place)
    owners = _each(lambda owner: seal_copy(place / owner))
    files = _files(var, place, owners["sessions"], root, former)
    count, files_bytes, digest = checkpoints.write_files(place, files)
    for owner in OWNERS:
        sync_directory(place / owner)
    made = Checkpoint(
        id=checkpoint_id,
        number=number,
        created_at=created_at,
        reason=reason,
        owners=owners,
        files=count,
        files_bytes=files_bytes,
        files_sha256=digest,
    )
    checkpoints.publish(place, root, made)
    return made


def _each(step: Callable[[str], T]) -> dict[str, T]:
    """Take a step for every owner: together, for they wait for the disk more than they compute."""
    with ThreadPoolExecutor(len(OWNERS)) as pool:
        return dict(zip(OWNERS, pool.map(step, OWNERS), strict=True))


class Peer:
    """One owner as the process that makes a checkpoint sees it: who answered, and its last cut."""

    def __init__(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        self._dealer = dealer
        self._monitor = monitor
        self._told = 0
        self.pid = 0
        self.cut = -1

    def tell(self, number: int) -> None:
        """Ask it who it is, as one who has seen the cut `number`."""
        self._told = number
        with suppress(zmq.Again):  # Not connected: it is told when it is.
            hello: Any = wire.Frame(
                wire.VERSION, Kind.HELLO, "", number, os.urandom(16), 0, False, []
            )
            self._dealer.send(wire.encode(hello), zmq.DONTWAIT)

    def take(self) -> None:
        """Take in what it has answered."""
        if "up" in read_monitor(self._monitor):
            self.tell(self._told)
        with suppress(zmq.Again):
            while True:
                frame = _decode_frame(self._dealer.recv(zmq.DONTWAIT))
                if frame.kind == Kind.WELCOME:
                    self.pid = msgspec.convert(frame.items[0], wire.Welcome).pid
                    self.cut = frame.cut

    def close(self) -> None:
        """Close the connection."""
        self._dealer.disable_monitor()
        self._monitor.close(0)
        self._dealer.close(0)


class Cutting:
    """Asks all owners to make a cut, over connections of its own, and waits for their copies."""

    def __init__(self, var: Path) -> None:
        self._context = zmq.Context()
        directory = Directory.read(var)
        certificate = KeyRing(var).load("supervisor")
        assert certificate is not None, "the supervisor has a key before it starts anybody"
        self._peers: dict[str, Peer] = {}
        for owner in OWNERS:
            place = directory.owners[owner]
            sockets = connect(self._context, place.endpoint, place.key.encode(), certificate)
            self._peers[owner] = Peer(*sockets)

    def __enter__(self) -> Cutting:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers.values():
            peer.close()
        self._context.term()

    def greet(self) -> int:
        """Wait until every owner answers; return the highest number they have seen."""
        self._tell(0, "answer")
        return max(peer.cut for peer in self._peers.values())

    def cut(self, number: int) -> None:
        """Tell every owner the number; return when all have made their cut."""
        before = {owner: peer.pid for owner, peer in self._peers.items()}
        self._tell(number, "make its cut")
        for owner, peer in self._peers.items():
            if peer.pid != before[owner]:  # It may have gone on before it was told.
                raise Unavailable(f"{owner} was restarted while the checkpoint was made")

    def collect(self, place: Path) -> None:
        """Wait until the copies of all owners are there."""
        until_s = time.monotonic() + COPY_S_MAX
        while missing := [owner for owner in self._peers if not (place / owner).is_dir()]:
            for owner in missing:
                with suppress(FileNotFoundError):
                    why = (place / (owner + FAILED)).read_text()
                    raise Unavailable(f"{owner} could not copy its state: {why}")
                if not Path(f"/proc/{self._peers[owner].pid}").exists():
                    raise Unavailable(f"{owner} ended before it had copied its state")
            if time.monotonic() > until_s:
                raise Unavailable(f"{missing[0]} did not copy its state in {COPY_S_MAX:.0f} s")
            time.sleep(LOOK_S)  # Another process puts it there: a poll with a deadline.

    def _tell(self, number: int, what: str) -> None:
        for peer in self._peers.values():
            peer.tell(number)
        until_s = time.monotonic() + DELIVER_S
        while late := [owner for owner, peer in self._peers.items() if peer.cut < number]:
            if time.monotonic() > until_s:
                text = f"{', '.join(late)} did not {what} in {DELIVER_S:g} s"
                raise Unavailable(text, hint="ksi status")
            time.sleep(LOOK_S)  # A poll with a deadline.
            for peer in self._peers.values():
                peer.take()


def _files(
    var: Path, place: Path, cut: Manifest, root: Path, former: list[Checkpoint]
) -> Iterator[File]:
    """Yield length and CRC of every session file as of a cut of the sessions.

    What the last checkpoint of the same store knows of a file is not read again.
    """
    known: dict[str, File] = {}
    if former and former[0].owners["sessions"].store == cut.store:
        known = {file.key: file for file in checkpoints.read_files(root / former[0].id)}
    directory = log_directory(var)
    mark = read_cursor(cursor_path(var, "sessions"), this_boot()).written
    are_written = mark is not None and mark.store == cut.store and mark.position >= cut.position
    journaled = reader_of("sessions", var).reader.log

    def read(key: str, start: int, stop: int) -> bytes:
        content = read_log(directory, key, start, stop) if are_written else b""
        return content if len(content) == stop - start else journaled(key, start, stop)

    for key, size in _logs(place / "sessions"):
        before = known.get(key)
        start, crc = 0, 0
        if before is not None and before.crc is not None and before.size <= size:
            start, crc = before.size, before.crc
        yield File(key, size, _crc(read, key, start, size, crc))


def _crc(
    read: Callable[[str, int, int], bytes], key: str, start: int, stop: int, crc: int
) -> int | None:
    """Return the CRC of a file that is `crc` up to `start`; None where it lacks bytes."""
    try:
        for offset in range(start, stop, READ_BYTES):
            crc = crc32(read(key, offset, min(offset + READ_BYTES, stop)), crc)
    except Corrupt:
        return None
    return crc


def _page(owner: Owner[Any], after: str, tables: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(islice(owner.logs(bind(owner.tables, tables), after), PAGE_LOGS))


def _logs(copy: Path) -> Iterator[tuple[str, int]]:
    """Yield every session file with its size, as of a copy of the sessions' state."""
    owner = load("sessions")
    after = ""
    while True:
        page = read_copy(copy, table_specs(owner), partial(_page, owner, after))
        yield from page
        if len(page) < PAGE_LOGS:
            return
        after = page[-1][0]


def drop_left_behind(var: Path, unused_s: float) -> list[str]:
    """Remove former stores of which there is no checkpoint any more, and views set aside.

    Returns:
        Their names; nothing while a restore is under way.
    """
    if (var / "db" / RESTORING).exists():
        return []
    made = checkpoints.whole(root_of(var))
    gone = []
    for owner in OWNERS:
        kept = {each.owners[owner].store for each in made if owner in each.owners}
        gone += drop_former(var / "db" / owner, kept, unused_s)
    return gone


def drop_journals(var: Path) -> int:
    """Remove the journal segments that nobody needs any more; return how many.

    Kept is what follows the older of the two newest checkpoints, should one of them be damaged,
    and what has yet to get into session files and the event log, on disk, and the index.
    """
    newest = checkpoints.whole(root_of(var))[:2]
    if len(newest) < 2:
        return 0
    dropped = 0
    for owner, manifest in newest[0].owners.items():
        older = newest[1].owners.get(owner)
        if older is None or older.store != manifest.store:
            continue
        seq = min(manifest.seq, older.seq) + 1
        seq = min(seq, _logged(var, owner, manifest.store))
        if owner == "sessions":
            seq = min(seq, _followed(var, manifest.store))
        dropped += drop_segments(var / "db" / owner / manifest.store, seq)
    return dropped


def _logged(var: Path, owner: str, store: str) -> int:
    """Return the first number of a journal that the event log still has to be given, on disk."""
    place = read_synced(event_directory(var))
    known = place.owners.get(owner) if place is not None else None
    return known.segment if known is not None and known.store == store else 0


def _followed(var: Path, store: str) -> int:
    """Return the first number of the sessions' journal that a follower still has to read."""
    synced = read_cursor(cursor_path(var, "sessions"), this_boot()).synced
    if synced is None or synced.store != store:
        return 0
    segments = [synced.position.segment]
    for place in (read_place(index_directory(var)), _conversations_place(var)):
        if place is not None and place.store == store:  # Otherwise it is built from the files.
            segments.append(place.position.segment)
    return min(segments)


def _conversations_place(var: Path) -> Place | None:
    try:
        return ConversationsReader(cache_path(var)).place()
    except KsiError:
        return None
