"""What a process says about itself without being asked: `run/<name>.stat`, a small mmap.

The process writes it on every turn of its loop; anybody may read it at any time, also while the
writer hangs, is stopped or is dead. It is never synced and never trusted for state: it is for
`ksi status` and for the supervisor, which takes a process without turns for hung.

Layout: a head, two slots, a ring of latencies. The two times of the head (last turn, committing
since) are eight aligned bytes each and change in one store. The rest is a record with a number and
a CRC, written to the two slots in turn; a reader takes the newest that is whole. So a record that
is half written, for a moment or because its writer was killed there, is never mistaken for one.

Source: the two slots are the two meta pages of LMDB.
"""

from __future__ import annotations

import math
import mmap
import operator
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LATENCIES_MAX: Final = 512  # The latest turns with work: p99 is the fifth worst of them.
RATE_S: Final = 1.0  # A rate is counted over the last one to two of these.

_COUNTERS: Final = (
    "mailbox", "mailbox_peak", "oldest_ms", "commands", "queries", "commits", "syncs",
    "refusals", "internal_errors", "replies_dropped", "journal_seq", "epoch",
)  # fmt: skip
_counters_of: Final = operator.attrgetter(*_COUNTERS)

_MAGIC: Final = b"KSISTAT1"
_HEAD: Final = struct.Struct("@8sdd")  # magic, turn, committing since
_TURN_AT: Final = 8
_COMMITTING_AT: Final = 16
# number, pid, started, counters, latencies recorded, commands per second, state, store id
_RECORD: Final = struct.Struct(f"@QQd{len(_COUNTERS)}qqd16s40s")
_CRC: Final = struct.Struct("@Q")
_WHOLE_BYTES: Final = _RECORD.size + _CRC.size
_SLOTS_AT: Final = (64, 512)
_LATENCY: Final = struct.Struct("@f")
_RING_AT: Final = 1024
_FILE_BYTES: Final = 4096
assert min(_SLOTS_AT[1] - _SLOTS_AT[0], _RING_AT - _SLOTS_AT[1]) >= _WHOLE_BYTES
assert _RING_AT + LATENCIES_MAX * _LATENCY.size <= _FILE_BYTES

_put_time: Final = struct.Struct("@d").pack_into


@dataclass(frozen=True, slots=True)
class Stat:
    """One reading.

    Attributes:
        pid: the process that wrote it; compare it before believing the rest.
        started_monotonic, turn_monotonic: `time.monotonic()`, one clock for all processes.
        committing_since: when the running commit began, 0.0 outside of one.
        state: starting, running or draining.
        mailbox, mailbox_peak: requests that wait now, and the most that ever did.
        oldest_ms: how long the oldest of them waits.
        commands_per_s: over the last one to two seconds of its life.
        p99_ms: of the latest `LATENCIES_MAX` recorded latencies, 0.0 without any.
        journal_seq: the last number an owner has committed, or a follower has taken up.
        epoch: how often this owner has been started.
    """

    pid: int
    started_monotonic: float
    turn_monotonic: float
    committing_since: float
    state: str
    mailbox: int
    mailbox_peak: int
    oldest_ms: int
    commands: int
    queries: int
    commits: int
    syncs: int
    refusals: int
    internal_errors: int
    replies_dropped: int
    journal_seq: int
    epoch: int
    commands_per_s: float
    p99_ms: float
    store_id: str

    def hung(self, now_s: float, *, turn_s_max: float, commit_s_max: float) -> str | None:
        """Return how this process hangs, in words, or None if it takes its turns."""
        if self.committing_since > 0.0:
            spent_s = now_s - self.committing_since
            return f"in a commit for {spent_s:.1f} s" if spent_s > commit_s_max else None
        silent_s = now_s - self.turn_monotonic
        return f"no turn for {silent_s:.1f} s" if silent_s > turn_s_max else None


class StatWriter:
    """The writer's side. Set the counters as plain attributes; `end_turn` publishes them all.

    A file has one writer. Creating it replaces the file of a former process in one step.

    Raises:
        OSError: the file cannot be created.
    """

    __slots__ = (
        *_COUNTERS, "_latencies", "_map", "_mark_commands", "_mark_s", "_number", "_pid",
        "_rate", "_started_s", "state", "store_id",
    )  # fmt: skip

    def __init__(self, path: Path, *, epoch: int = 0) -> None:
        self.mailbox = self.mailbox_peak = self.oldest_ms = 0
        self.commands = self.queries = self.commits = self.syncs = 0
        self.refusals = self.internal_errors = self.replies_dropped = 0
        self.journal_seq = 0
        self.epoch = epoch
        self.state = "starting"
        self.store_id = ""
        self._number = self._latencies = self._mark_commands = 0
        self._pid = os.getpid()
        self._started_s = self._mark_s = time.monotonic()
        self._rate = 0.0
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _FILE_BYTES)  # a full disk says so here, not by SIGBUS
            self._map = mmap.mmap(fd, _FILE_BYTES)
        finally:
            os.close(fd)
        _HEAD.pack_into(self._map, 0, _MAGIC, self._started_s, 0.0)
        self.end_turn(self._started_s)
        fresh.rename(path)

    def begin_turn(self, now_s: float) -> None:
        """Say that the loop is alive. A loop turns at least once a second, idle or not."""
        _put_time(self._map, _TURN_AT, now_s)

    def committing(self, now_s: float) -> None:
        """Say that a commit begins; the next `end_turn` says that it is over."""
        _put_time(self._map, _COMMITTING_AT, now_s)

    def record(self, latency_s: float) -> None:
        """Add one latency to those that `p99_ms` is taken from."""
        at = _RING_AT + _LATENCY.size * (self._latencies % LATENCIES_MAX)
        _LATENCY.pack_into(self._map, at, latency_s * 1e3)
        self._latencies += 1

    def end_turn(self, now_s: float) -> None:
        """Publish all counters, and that the loop is alive and in no commit."""
        if now_s - self._mark_s >= RATE_S:
            self._rate = (self.commands - self._mark_commands) / (now_s - self._mark_s)
            self._mark_s, self._mark_commands = now_s, self.commands
        self._number = number = self._number + 1
        record = _RECORD.pack(
            number, self._pid, self._started_s, *_counters_of(self), self._latencies,
            self._rate, self.state.encode(), self.store_id.encode(),
        )  # fmt: skip
        slot = _SLOTS_AT[number & 1]
        self._map[slot : slot + _WHOLE_BYTES] = record + _CRC.pack(zlib.crc32(record))
        _put_time(self._map, _COMMITTING_AT, 0.0)
        _put_time(self._map, _TURN_AT, now_s)

    def close(self) -> None:
        """Unmap the file. It stays, with the last state of this process."""
        self._map.close()


def read_stat(path: Path) -> Stat | None:
    """Return the newest whole record of `path`, or None if there is none to be read."""
    try:
        with path.open("rb", buffering=0) as file:
            content = file.read(_FILE_BYTES) or b""
    except OSError:
        return None
    if len(content) < _FILE_BYTES or not content.startswith(_MAGIC):
        return None
    whole = [record for at in _SLOTS_AT if (record := _record_at(content, at)) is not None]
    if not whole:
        return None
    _number, pid, started_s, *counters, latencies, rate, state, store_id = max(whole)
    _magic, turn_s, committing_s = _HEAD.unpack_from(content)
    return Stat(
        pid=pid,
        started_monotonic=started_s,
        turn_monotonic=turn_s,
        committing_since=committing_s,
        state=_text(state),
        store_id=_text(store_id),
        commands_per_s=round(rate, 1),
        p99_ms=_p99_ms(content, min(latencies, LATENCIES_MAX)),
        **dict(zip(_COUNTERS, counters, strict=True)),
    )


def _record_at(content: bytes, at: int) -> tuple[Any, ...] | None:
    record = content[at : at + _RECORD.size]
    (crc,) = _CRC.unpack_from(content, at + _RECORD.size)
    unpacked = _RECORD.unpack(record)
    return unpacked if unpacked[0] and zlib.crc32(record) == crc else None


def _p99_ms(content: bytes, count: int) -> float:
    if not count:
        return 0.0
    latencies = sorted(struct.unpack_from(f"@{count}f", content, _RING_AT))
    p99_ms: float = latencies[math.ceil(count * 0.99) - 1]
    return round(p99_ms, 3)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
