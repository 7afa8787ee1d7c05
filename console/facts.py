"""What can be known of a system without asking it: from its lock, its files and the kernel.

So it is known with an owner hung, with the supervisor stopped and with everything dead. Nothing
here waits for another process, writes, or makes a directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from msgspec.structs import replace

from ksi.actors.owners import OWNERS
from ksi.actors.stat import Stat, read_stat
from ksi.actors.supervision import checkpointed
from ksi.actors.supervision.lock import Holder, holder
from ksi.actors.supervision.reports import Exit, read_children, read_exit, read_follower
from ksi.actors.supervision.system import CheckpointList, ChildStatus, Phase, State, SystemStatus
from ksi.transport.errors import KsiError
from ksi.transport.limits import FREE_BYTES_MIN, FREE_PART_MIN, MAILBOX_REQUESTS_MAX

# A person looks earlier than the supervisor acts: an owner takes a turn every `TICK_S`.
CACHES: Final = {"index": "index", "compositions": "library", "conversations": "library"}
SILENT_S_MAX: Final = 2.0
COMMIT_S_MAX: Final = 5.0
STARTING_S_MAX: Final = 5.0  # A start that takes longer is worth a sentence.
MAILBOX_PART_MAX: Final = 0.5  # A mailbox fuller than this will refuse soon.
FREE_TIMES: Final = 4  # Disk space is a problem at this many times the limit that refuses work.

# What is counted, by owner: the table, and the table of those in it that no longer count.
COUNTED: Final[Mapping[str, Mapping[str, tuple[str, str | None]]]] = {
    "sessions": {"sessions": ("sessions", None)},
    "registry": {"agents": ("agents", "gone")},
    "completion": {
        "waiting": ("queue", None),
        "active": ("grants", None),
        "workers": ("workers", None),
    },
    "state": {"entities": ("entities", None), "queued": ("items", None)},
}


@dataclass(frozen=True, slots=True)
class Child:
    """One child of the supervisor: what its files say, checked against the kernel.

    Attributes:
        kind: owner, follower or agent.
        state: as the supervisor last wrote it; STOPPED if there is no such process any more.
        pid: None while no process runs.
        stat: what the process says of itself; None unless `pid` has written it.
        last_stat: the same, also of a process that is gone.
        frozen: it is stopped by a signal (SIGSTOP, Ctrl-Z, a debugger).
        hung: how it hangs, in words.
        db_bytes: what its directory takes on the disk; None if it has none.
    """

    name: str
    kind: str
    state: str
    pid: int | None
    starts: int
    restarts: int
    last_exit: str | None
    since: float
    stat: Stat | None
    last_stat: Stat | None
    frozen: bool
    hung: str | None
    db_bytes: int | None

    @property
    def uptime_s(self) -> float | None:
        """How long its process has been running."""
        return None if self.stat is None else time.monotonic() - self.stat.started_monotonic


@dataclass(frozen=True, slots=True)
class System:
    """One look at a var directory."""

    var: Path
    supervisor: Holder | None
    frozen: bool  # the supervisor is stopped by a signal
    stopping: bool
    phase: Phase | None  # how far it has come; None: nothing runs
    gave_up: str | None  # why the last supervisor ended, if it said so
    children: tuple[Child, ...]
    tcp: Mapping[str, str]  # owner to where it listens for other machines
    counts: Mapping[str, int | None]
    unreadable: Mapping[str, str]  # owner to why its state cannot be read
    free_bytes: int
    disk_bytes: int
    caches: Mapping[str, Mapping[str, Any]]  # by their name, what the follower of each said last
    checkpoints: CheckpointList

    def of(self, kind: Literal["owner", "follower", "agent"]) -> list[Child]:
        """Return the children of one kind, in the order of their start."""
        return [child for child in self.children if child.kind == kind]

    def problems(self, ksi: str = "ksi") -> list[str]:
        """Return what is wrong, a sentence each with the command to type next."""
        if self.supervisor is None:
            found = [f"no supervisor runs on {self.var} ({ksi} start)"]
            if self.gave_up:
                found.append(f"the last one ended: {self.gave_up} ({ksi} logs supervisor)")
        else:
            found = list(self._of_processes(ksi))
        for owner, why in self.unreadable.items():
            found.append(f"the state of {owner} cannot be read: {why} ({ksi} logs {owner})")
        short = min(FREE_BYTES_MIN, int(self.disk_bytes * FREE_PART_MIN)) * FREE_TIMES
        if self.disk_bytes and self.free_bytes < short:
            found.append(f"the disk has {self.free_bytes >> 20} MiB left (df -h {self.var})")
        return found

    def _of_processes(self, ksi: str) -> list[str]:
        assert self.supervisor is not None
        found = []
        if self.frozen:
            pid = self.supervisor.pid
            found.append(f"the supervisor is stopped by a signal (kill -CONT {pid})")
        if self.stopping:
            found.append(f"the system is stopping ({ksi} status)")
        for child in self.children:
            found += _problems_of(child, ksi)
        for name, said in self.caches.items():
            state, reason, owner = said.get("state"), said.get("reason"), CACHES[name]
            if state == "rebuilding" and not said["is_whole"] and said["total_bytes"]:
                found.append(
                    f"the cache {name} is being built again: {reason} ({ksi} {name} status)"
                )
            elif state == "waiting" and reason:
                found.append(f"the cache {name} waits: {reason} ({ksi} logs {owner})")
        if self.checkpoints.failed is not None:
            why = self.checkpoints.failed
            found.append(f"the last checkpoint failed: {why} ({ksi} checkpoint create)")
        return found


def look(var: Path) -> System:
    """Return what can be seen of `var` now."""
    held_by = holder(var)
    run = _run_directory(var)
    said, ended = read_children(run), read_exit(run)
    listed = said.children if said else [_never_started(name) for name in OWNERS]
    current = said if said and held_by and said.pid == held_by.pid else None
    if held_by is None:
        listed = [replace(each, state=_ended(each.state)) for each in listed]
    elif current is None:  # it has only just begun
        listed = [replace(each, state="STARTING", since=held_by.since) for each in listed]
    counts, unreadable = _counts(var)
    free_bytes, disk_bytes = _room(var)
    return System(
        var=var,
        supervisor=held_by,
        frozen=held_by is not None and _is_frozen(_process_state(held_by.pid)),
        stopping=current is not None and current.stopping,
        phase=_phase(held_by, current),
        gave_up=_why_ended(said, ended),
        tcp=_tcp(run),
        children=tuple(_child(var, run, each, current is not None) for each in listed),
        counts=counts,
        unreadable=unreadable,
        free_bytes=free_bytes,
        disk_bytes=disk_bytes,
        caches={name: read_follower(run, name) for name in CACHES},
        checkpoints=checkpointed.listed(var, run),
    )


def _phase(held_by: Holder | None, current: SystemStatus | None) -> Phase | None:
    if held_by is None:
        return None
    return "infrastructure" if current is None else current.phase


def _never_started(name: str) -> ChildStatus:
    return ChildStatus(
        name=name,
        kind="owner",
        state="STOPPED",
        pid=None,
        starts=0,
        restarts=0,
        last_exit=None,
        since=0.0,
    )


def _why_ended(said: SystemStatus | None, ended: Exit | None) -> str | None:
    """Return how the last supervisor ended, unless it was in order."""
    if ended is not None:
        return ended.reason
    in_order = said is None or all(each.state in ("STOPPED", "FATAL") for each in said.children)
    return None if in_order else "it was killed, or its machine was"


def _ended(state: State) -> State:
    return "FATAL" if state == "FATAL" else "STOPPED"


def _child(var: Path, run: Path, said: ChildStatus, is_current: bool) -> Child:
    last_stat = None if said.kind == "agent" else read_stat(run / f"{said.name}.stat")
    process_state = _process_state(said.pid) if is_current and said.pid else ""
    pid = said.pid if process_state not in ("", "Z") else None
    state = said.state if pid or not (is_current and said.pid) else _ended(said.state)
    stat = last_stat if last_stat is not None and last_stat.pid == pid else None
    hung = None
    if stat is not None:
        hung = stat.hung(time.monotonic(), turn_s_max=SILENT_S_MAX, commit_s_max=COMMIT_S_MAX)
    return Child(
        name=said.name,
        kind=said.kind,
        state=state,
        pid=pid,
        starts=said.starts,
        restarts=said.restarts,
        last_exit=said.last_exit,
        since=said.since,
        stat=stat,
        last_stat=last_stat,
        frozen=_is_frozen(process_state),
        hung=hung,
        db_bytes=_disk_use(var / "db" / said.name),
    )


def _problems_of(child: Child, ksi: str) -> list[str]:
    found = []
    name, logs = child.name, f"{ksi} logs {child.name}"
    if child.state == "FATAL":
        found.append(f"{name} ended too often, at last by {child.last_exit} ({logs})")
    elif child.state == "BACKOFF":
        found.append(f"{name} waits to be restarted, it ended by {child.last_exit} ({logs})")
    elif child.state == "STOPPED" and child.kind != "agent" and child.starts:
        found.append(f"{name} does not run ({ksi} restart {name})")
    elif child.state == "STARTING":
        since_s = time.time() - child.since
        slow = f" for {since_s:.0f} s" if since_s > STARTING_S_MAX else ""
        found.append(f"{name} is starting{slow} ({logs})")
    if child.frozen:
        found.append(f"{name} is stopped by a signal (kill -CONT {child.pid})")
    elif child.hung:
        found.append(f"{name} hangs, {child.hung}: it will be restarted ({logs})")
    if child.stat is not None:
        if child.stat.internal_errors:
            many = child.stat.internal_errors
            found.append(f"{name} failed at {many} requests ({logs} --level error)")
        if child.stat.mailbox > MAILBOX_REQUESTS_MAX * MAILBOX_PART_MAX:
            found.append(
                f"{child.stat.mailbox} of {MAILBOX_REQUESTS_MAX} requests wait for {name} ({logs})"
            )
    return found


def _counts(var: Path) -> tuple[dict[str, int | None], dict[str, str]]:
    """Return how many there are of what is counted, and why some could not be read."""
    from ksi.actors.counting import count_rows

    counts: dict[str, int | None] = {}
    unreadable: dict[str, str] = {}
    for owner, counted in COUNTED.items():
        counts |= dict.fromkeys(counted)
        if not (var / "db" / owner / "CURRENT").exists():
            continue
        tables = {name for names in counted.values() for name in names if name}
        try:
            rows = count_rows(var, owner, tables)
        except Exception as error:  # whatever it is, the rest is still worth knowing
            unreadable[owner] = str(error)
            continue
        for what, (table, less) in counted.items():
            counts[what] = rows[table] - (rows[less] if less else 0)
    return counts, unreadable


def _run_directory(var: Path) -> Path:
    usual = var / "run"
    if not (usual / "elsewhere").exists():
        return usual
    from ksi.transport.identity import run_directory  # loads ZeroMQ: only where it says something

    try:
        return run_directory(var)
    except KsiError:
        return usual


def _tcp(run: Path) -> dict[str, str]:
    """Return where owners listen for other machines."""
    try:  # Not by way of `Directory`, which loads ZeroMQ.
        places = json.loads((run / "endpoints.json").read_bytes())["owners"]
        return {name: place["tcp"] for name, place in places.items() if place.get("tcp")}
    except (OSError, ValueError, KeyError):
        return {}


def _process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process, or nothing if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1].decode()
    except OSError:
        return ""


def _is_frozen(process_state: str) -> bool:
    return process_state in ("T", "t")


def _disk_use(directory: Path) -> int | None:
    """Return the bytes that files below a directory take: of sparse ones, what is there."""
    total = None
    for folder, _folders, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # just removed
                total = (total or 0) + os.lstat(f"{folder}/{name}").st_blocks * 512
    return total


def _room(var: Path) -> tuple[int, int]:
    """Return the free and the total bytes of the disk that `var` is on, or will be."""
    for path in (var, *var.absolute().parents):
        try:
            found = os.statvfs(path)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    return 0, 0
