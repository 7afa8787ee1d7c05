"""Whether what is on disk, and what it is on, is as it should be; and what can safely be mended.

`Checkup` compares what says the same thing twice: the journal with the view, the session files with
the journal, the index with the session files; looks into the caches, and at what KSI stands on:
rights, locks, the file system, limits. It works while the system runs, which goes on meanwhile, and
with everything stopped. What it mends is what cannot lose anything: it is made again from what is
known to be good, by the process that owns it.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, Final

import lmdb
import msgspec

from ksi.actors import log
from ksi.actors.checkpoints import copies_of, root_of
from ksi.actors.commit import table_specs
from ksi.actors.followers import composed, conversed
from ksi.actors.followers.files import LogFollower
from ksi.actors.followers.indexed import Verification
from ksi.actors.owners import OWNERS, load
from ksi.actors.reading import OwnerReader, archive_directory, cursor_path, log_directory, reader_of
from ksi.actors.supervision import lock
from ksi.actors.supervision.reports import read_children
from ksi.storage import checkpoints, sqlite
from ksi.storage.archive import Archive
from ksi.storage.boot import this_boot
from ksi.storage.errors import Corrupt
from ksi.storage.examination import (
    Examined,
    check_rows,
    committed_batches,
    examine,
    free_readers,
    lock_holder,
    map_use,
    readers,
)
from ksi.storage.files import log_name, log_size, read_cursor, read_log
from ksi.storage.format import check_format
from ksi.storage.recovery import Mark
from ksi.storage.store import set_view_aside
from ksi.transport.errors import KsiError, NotFound, NotRunning
from ksi.transport.identity import run_directory
from ksi.transport.limits import FREE_BYTES_MIN, FREE_PART_MIN, MAP_USE_MAX

FOUND_MAX: Final = 20  # Findings of one check told in words; the rest is counted.
AGAIN_S: Final = 0.5  # What is found while the system runs counts if it is found again after this.
MEND_S: Final = 20.0  # How long what was mended may take to be as it should.
LOOK_S: Final = 0.1
FREE_TIMES: Final = 4  # Disk space is a problem at this many times the limit that refuses work.
OPEN_FILES_MIN: Final = 4096  # Connections, session files and databases of one owner.
BEHIND_MAX: Final = 10_000  # Transactions since a reader began: no page was freed meanwhile.
COMPARED_BYTES: Final = 8 << 20  # Of the journal, compared with the session files at once.

# LMDB's locks and shared memory need a disk of this machine.
FOREIGN: Final = ("9p", "afs", "ceph", "cifs", "fuse", "glusterfs", "lustre", "ncpfs", "nfs", "smb")
PRIVATE: Final = ("run", "keys", "db", "checkpoints", "logs", "state", "archive", "cache")

Ask = Callable[..., dict[str, Any]]


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be, and the command to type about it."""

    text: str
    command: str
    repaired: bool = False


class Check(msgspec.Struct, frozen=True):
    """What one check came to: `ok`, `repaired` or `wrong`, in words, with what was found."""

    name: str
    state: str
    text: str
    findings: list[Finding]


Looked = tuple[str, list[Finding]]


class Checkup:
    """Looks at one var directory.

    Args:
        ksi: how the command is typed for this directory.
        ask: asks the running system as an operator; to mend only.
    """

    def __init__(self, var: Path, *, ksi: str = "ksi", ask: Ask | None = None) -> None:
        self.var = var
        self._ksi = ksi
        self._ask = ask
        self._logger: Any = None

    def run(self, *, repair: bool = False) -> Iterator[Check]:
        """Yield the checks, each when it is done. Mends what can be, if `repair` says so."""
        steps: tuple[tuple[str, Callable[[], Looked], Callable[[], None] | None], ...] = (
            ("format", self._format, None),
            ("file system", self._file_system, None),
            ("space", self._space, None),
            ("open files", self._open_files, None),
            ("sockets", self._sockets, None),
            ("permissions", self._permissions, self._close_to_others),
            ("locks", self._locks, None),
            ("stores", self._stores, None),
            ("checkpoints", self._checkpoints, None),
            ("journals", self._journals, None),
            ("rows", self._rows, self._build_views_again),
            ("map", self._map, None),
            ("readers", self._readers, self._free_readers),
            ("session files", self._session_files, self._write_files_again),
            ("archive", self._archived, None),
            ("index", self._index, self._build_index_again),
            ("library", self._library, self._build_library_again),
        )
        for name, look, mend in steps:
            yield self._check(name, look, mend if repair else None)

    @property
    def is_running(self) -> bool:
        """Whether a supervisor holds the directory."""
        return lock.holder(self.var) is not None

    def _check(
        self, name: str, look: Callable[[], Looked], mend: Callable[[], None] | None
    ) -> Check:
        text, found = self._tried(look)
        if found and self.is_running:
            time.sleep(AGAIN_S)  # It may have been on its way.
            text, again = self._tried(look)
            found = [each for each in again if each in found]
        if found and mend is not None:
            text, found = self._mended(look, mend, found)
        wrong = [each for each in found if not each.repaired]
        state = "wrong" if wrong else "repaired" if found else "ok"
        return Check(name, state, text, found)

    def _mended(
        self, look: Callable[[], Looked], mend: Callable[[], None], found: list[Finding]
    ) -> Looked:
        try:
            mend()
        except (KsiError, OSError, lmdb.Error) as error:
            command = getattr(error, "hint", None) or f"{self._ksi} status"
            return "", [*found, Finding(f"it could not be repaired: {_words(error)}", command)]
        deadline_s = time.monotonic() + (MEND_S if self.is_running else 0)
        while True:
            text, left = self._tried(look)
            if not left or time.monotonic() >= deadline_s:
                break
            time.sleep(LOOK_S)  # Its owner mends it in its own time.
        gone = [msgspec.structs.replace(each, repaired=True) for each in found if each not in left]
        return text, [*gone, *map(self._beyond_repair, left)]

    def _beyond_repair(self, left: Finding) -> Finding:
        """Return what repairing has not helped with another command than to repair it."""
        if "--repair" not in left.command or self.is_running:
            return left
        return msgspec.structs.replace(left, command=f"{self._ksi} restore latest")

    def _tried(self, look: Callable[[], Looked]) -> Looked:
        """Return what a look comes to; that it fails is a finding, too."""
        try:
            text, found = look()
        except (KsiError, OSError, lmdb.Error) as error:
            command = getattr(error, "hint", None) or f"{self._ksi} status"
            return "it cannot be told", [Finding(_words(error), command)]
        if len(found) > FOUND_MAX:
            more = Finding(f"and {len(found) - FOUND_MAX} more", found[-1].command)
            found = [*found[:FOUND_MAX], more]
        return text, found

    # What it stands on

    def _format(self) -> Looked:
        found = check_format(self.var)
        return "nothing has ever run here" if found is None else f"ksi {found}", []

    def _file_system(self) -> Looked:
        kind = file_system(_nearest(self.var))
        if kind.split(".")[0] in FOREIGN:
            text = f"{self.var} is on {kind}, where LMDB's locks and maps do not work"
            return kind, [Finding(text, f"{self._ksi} --var DIR start, on a disk of this machine")]
        return f"{kind}, gone when the machine stops" if kind == "tmpfs" else kind, []

    def _space(self) -> Looked:
        disk = os.statvfs(_nearest(self.var))
        free_bytes, disk_bytes = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        text = f"{free_bytes >> 20} MiB free"
        if free_bytes < min(FREE_BYTES_MIN, int(disk_bytes * FREE_PART_MIN)) * FREE_TIMES:
            words = f"the disk has {free_bytes >> 20} MiB left; soon new work is refused"
            return text, [Finding(words, f"df -h {quote(str(self.var))}")]
        return text, []

    def _open_files(self) -> Looked:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and hard < OPEN_FILES_MIN:
            words = f"a process may open only {hard} files; {OPEN_FILES_MIN} are worth having"
            return str(hard), [Finding(words, f"ulimit -Hn {OPEN_FILES_MIN}")]
        return "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard} a process", []

    def _sockets(self) -> Looked:
        directory = run_directory(self.var)
        usual = Path(os.path.realpath(self.var)) / "run"
        if directory == usual:
            return str(directory), []
        if self.is_running and not directory.is_dir():
            words = f"the sockets were in {directory}, which was removed: nobody can connect"
            return str(directory), [Finding(words, f"{self._ksi} restart")]
        return f"in {directory}: paths in {usual} would be too long", []

    def _permissions(self) -> Looked:
        found = []
        count = 0
        for path, status in self._private():
            count += 1
            words = _open_to_others(path, status)
            if words:
                shown = quote(str(path))
                command = f"chmod go= {shown}" if "others" in words else f"ls -ld {shown}"
                found.append(Finding(f"{path} {words}", command))
        return f"{count} files and directories are ours alone", found

    def _close_to_others(self) -> None:
        for path, status in self._private():
            if status.st_uid == os.geteuid() and "others" in _open_to_others(path, status):
                os.chmod(path, stat.S_IMODE(status.st_mode) & ~0o077)

    def _private(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield what must be ours alone, without following links."""
        roots = [self.var / name for name in PRIVATE]
        waiting = [path for path in roots if os.path.lexists(path)]
        while waiting:
            path = waiting.pop()
            with suppress(FileNotFoundError):  # Sockets and temporary files come and go.
                status = path.lstat()
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    waiting += [Path(entry.path) for entry in os.scandir(path)]

    def _locks(self) -> Looked:
        held_by = lock.holder(self.var)
        said = read_children(run_directory(self.var)) if held_by is not None else None
        pids = {child.name: child.pid for child in said.children} if said else {}
        found = []
        for owner in OWNERS:
            pid = lock_holder(self.var / "db" / owner)
            if held_by is None and pid is not None:
                words = f"process {pid} still has the store of {owner} open"
                found.append(Finding(words, f"ps {pid}; kill {pid}"))
            elif pids.get(owner) is not None and pid != pids[owner]:
                words = f"process {pids[owner]} runs as {owner}, but {pid} holds its store"
                found.append(Finding(words, f"{self._ksi} restart {owner}"))
        return held_by.words() if held_by else "nobody holds the directory", found

    # What is on disk

    def _examined(self) -> Iterator[tuple[str, Examined]]:
        for owner in OWNERS:
            examined = examine(self.var / "db" / owner, copies_of(self.var, owner))
            if examined is not None:
                yield owner, examined

    def _readable(self) -> Iterator[tuple[str, Examined]]:
        return (each for each in self._examined() if each[1].meta is not None)

    def _stores(self) -> Looked:
        found, names = [], []
        for owner, examined in self._examined():
            names.append(owner)
            if examined.is_lost:
                words = f"the store of {owner} cannot be opened: {examined.case.why}"
                found.append(Finding(words, f"{self._ksi} restore latest"))
            elif examined.mark is Mark.OTHER_BOOT:
                words = f"the store of {owner} was in use when the machine went down"
                found.append(Finding(words, f"{self._ksi} start, which recovers it"))
            elif examined.meta is None:
                words = f"the view of {owner} is damaged or gone"
                found.append(Finding(words, f"{self._ksi} restart, which builds it again"))
        return f"of {', '.join(names)}" if names else "none yet", found

    def _checkpoints(self) -> Looked:
        found, count = [], 0
        for name in checkpoints.names(root_of(self.var)):
            try:
                checkpoints.verify(root_of(self.var) / name)
            except NotFound:  # It was pruned just now.
                continue
            except Corrupt as error:
                found.append(Finding(error.text, f"{self._ksi} checkpoint create"))
            count += 1
        return f"{count} whole", found

    def _journals(self) -> Looked:
        found, count = [], 0
        for owner, examined in self._readable():
            try:
                for batch in committed_batches(examined):
                    count += batch.records
            except KsiError as error:
                found.append(Finding(f"{owner}: {error.text}", f"{self._ksi} restore latest"))
        return f"{count} numbers without a gap, up to where the views are", found

    def _rows(self) -> Looked:
        found, count = [], 0
        for owner, examined in self._readable():
            rows, damaged = _checked(owner, examined)
            count += rows
            found += [
                Finding(
                    f"the view of {owner} is damaged: {place}",
                    self._stopped(f"{self._ksi} doctor --repair"),
                )
                for place in damaged
            ]
        return f"{count} rows match their checksums", found

    def _build_views_again(self) -> None:
        if self.is_running:  # A view belongs to its owner, which would have to let go of it.
            return
        for owner, examined in list(self._readable()):
            if _checked(owner, examined)[1]:
                set_view_aside(self.var / "db" / owner, copies_of(self.var, owner), lock_wait_s=0.0)

    def _map(self) -> Looked:
        found, most = [], 0.0
        for owner, examined in self._readable():
            assert examined.environment is not None
            used_bytes, map_bytes = map_use(examined.environment)
            most = max(most, used_bytes / map_bytes)
            if used_bytes > map_bytes * MAP_USE_MAX / 2:
                words = f"{owner} uses {used_bytes >> 30} of the {map_bytes >> 30} GiB of its map"
                found.append(Finding(words, f"{self._ksi} status"))
        return f"{100 * most:.1f}% used at the most", found

    def _readers(self) -> Looked:
        found, count = [], 0
        for owner, examined in self._readable():
            assert examined.environment is not None
            for slot in readers(examined.environment):
                count += slot.alive
                if slot.behind is None:  # Between two reads, where it keeps nothing from anybody.
                    continue
                if not slot.alive:
                    words = f"process {slot.pid} was killed while it read {owner}"
                    found.append(Finding(words, f"{self._ksi} doctor --repair"))
                elif slot.behind > BEHIND_MAX:
                    words = f"process {slot.pid} has been in one read of {owner} for too long"
                    found.append(Finding(words, f"ps {slot.pid}; kill -CONT {slot.pid}"))
        return f"{count} connected", found

    def _free_readers(self) -> None:
        for _owner, examined in self._readable():
            assert examined.environment is not None
            free_readers(examined.environment)

    # Session files and index

    def _session_files(self) -> Looked:
        examined = examine(self.var / "db" / "sessions")
        if examined is None or examined.meta is None:
            return "none can be compared now", []
        texts, count = SessionFiles(self.var, examined).compare()
        command = self._stopped(f"{self._ksi} doctor --repair")
        return f"{count} are what was committed", [Finding(text, command) for text in texts]

    def _stopped(self, command: str) -> str:
        """Return what to type to have `command` done while nothing runs."""
        if not self.is_running:
            return command
        return f"{self._ksi} stop; {command}; {self._ksi} start"

    def _write_files_again(self) -> None:
        if self.is_running:
            assert self._ask is not None
            self._ask("system:restart", owner="files")  # It compares them all when it starts.
            return
        held = lock.hold(self.var)
        try:
            examined = examine(self.var / "db" / "sessions")
            if examined is not None and examined.meta is not None:
                files = SessionFiles(self.var, examined)
                files.compare()
                files.cut_changed()
            follower = LogFollower("sessions", self.var, self._log())
            try:
                while follower.turn() or follower.idle():
                    pass
            finally:
                follower.close()
        finally:
            os.close(held)

    def _archived(self) -> Looked:
        archive = Archive(archive_directory(self.var))
        found, count = [], 0
        for key in archive.logs():
            count += 1
            try:
                for _content in archive.chunks(key):
                    pass
            except FileNotFoundError:  # It was taken out just now.
                continue
            except Corrupt as error:
                found.append(Finding(error.text, error.hint or f"{self._ksi} archive list"))
        return f"{count} sessions, whole", found

    def _index(self) -> Looked:
        if not (self.var / "logs" / "index").is_dir():
            return "none yet", []
        verification = Verification(self.var)
        command = f"{self._ksi} doctor --repair"
        try:
            while verification.turn():
                pass
        except sqlite3.Error as error:
            if not sqlite.is_damage(error):
                raise
            return "it cannot be read", [Finding(f"the index is damaged: {error}", command)]
        found = [Finding(text, command) for text in verification.found]
        return f"{verification.rows} rows of {verification.sessions} sessions", found

    def _build_index_again(self) -> None:
        if self.is_running:
            assert self._ask is not None
            ordered = self._ask("index:rebuild")["number"]
            deadline_s = time.monotonic() + MEND_S
            while time.monotonic() < deadline_s:
                if self._ask("index:status")["rebuilt"] >= ordered:
                    return
                time.sleep(LOOK_S)  # A poll with a deadline.
            return
        raise NotRunning(
            "the index is built again while the system runs",
            hint=f"{self._ksi} start; {self._ksi} index rebuild",
        )

    def _library(self) -> Looked:
        found, count = [], 0
        for path, _rebuild in self._caches():
            count += 1
            if wrong := sqlite.damage(path, "SELECT count(*) FROM about", 1):
                words = f"the library's {path.name} is damaged: {wrong}"
                found.append(Finding(words, f"{self._ksi} doctor --repair"))
        return f"{count} caches, whole", found

    def _caches(self) -> Iterator[tuple[Path, str]]:
        """Yield those that are there, and what is asked to have each made again."""
        for path, rebuild in (
            (composed.cache_path(self.var), "composition:rebuild_index"),
            (conversed.cache_path(self.var), "conversation:rebuild_index"),
        ):
            if path.exists():
                yield path, rebuild

    def _build_library_again(self) -> None:
        for path, rebuild in self._caches():
            if not sqlite.damage(path, "SELECT count(*) FROM about", 1):
                continue
            if self.is_running:
                assert self._ask is not None
                self._ask(rebuild)
            else:
                sqlite.remove(path)  # It is made again when the system is started.

    def _log(self) -> Any:
        self._logger = self._logger or log.configure(self.var, "doctor")
        return self._logger


class SessionFiles:
    """Compares the session files with the journal and the view of the sessions, as of one look.

    Attributes:
        changed: where files begin to differ from what the journal holds from there on.
    """

    def __init__(self, var: Path, examined: Examined) -> None:
        self._logs = log_directory(var)
        self._archive = Archive(archive_directory(var))
        self._reader: OwnerReader = reader_of("sessions", var)
        self._examined = examined
        marks = read_cursor(cursor_path(var, "sessions"), this_boot())
        mark = marks.written or marks.synced
        is_ours = mark is not None and mark.store == examined.directory.name
        self._written = mark.position if mark is not None and is_ours else None
        self.changed: dict[str, int] = {}

    def cut_changed(self) -> None:
        """Cut those files there: what follows is in the journal, and is written again."""
        for key, size in self.changed.items():
            os.truncate(self._logs / log_name(key), size)

    def compare(self) -> tuple[list[str], int]:
        """Return what differs, in words, and how many files there are.

        What the journal has beyond the follower's cursor is still to be written and may be missing.
        """
        found: dict[str, str] = {}
        waiting: dict[str, int] = {}  # key to where the first line begins that is still to come
        parts: list[tuple[str, int, bytes]] = []
        held_bytes = 0
        for batch in committed_batches(self._examined):
            is_written = self._written is not None and batch.end <= self._written
            for key, offset, content in self._reader.lines_of(batch):
                if is_written:
                    parts.append((key, offset, content))
                    held_bytes += len(content)
                else:
                    waiting.setdefault(key, offset)
            if held_bytes > COMPARED_BYTES:
                found |= self._differing(parts)
                parts, held_bytes = [], 0
        found |= self._differing(parts)
        count = 0
        for key, size in self._sizes():
            count += 1
            found_bytes = log_size(self._logs, key)
            if found_bytes == 0 and size:
                found_bytes = self._archive.size(key) or 0
            if found_bytes is None:
                found[key] = f"something else is in the place of {key}.jsonl"
            elif found_bytes < waiting.get(key, size):
                found[key] = f"{key}.jsonl is {size - found_bytes} bytes short"
            elif found_bytes > size:
                found[key] = f"{key}.jsonl is {found_bytes - size} bytes too long"
        return [found[key] for key in sorted(found)], count

    def _differing(self, parts: list[tuple[str, int, bytes]]) -> dict[str, str]:
        """Compare lines with what the files have in their place."""
        joined: dict[str, tuple[int, bytearray]] = {}
        for key, offset, content in parts:
            joined.setdefault(key, (offset, bytearray()))[1].extend(content)
        found = {}
        for key, (start, said) in joined.items():
            read = read_log(self._logs, key, start, start + len(said), self._archive)
            if read == said[: len(read)]:
                continue
            pairs = enumerate(zip(read, said, strict=False))
            different = next(at for at, (has, should_have) in pairs if has != should_have)
            self.changed[key] = start + different
            found[key] = f"{key}.jsonl is not what was said, from byte {start + different} on"
        return found

    def _sizes(self) -> Iterator[tuple[str, int]]:
        after = ""
        while True:
            _position, sizes = self._reader.logs(after, 1000)
            yield from sizes.items()
            if len(sizes) < 1000:
                return
            after = max(sizes)


def file_system(path: Path) -> str:
    """Return the type of the file system that `path` is on, as the kernel names it."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = "unknown"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            words = line.split()
            if words[2] == wanted:
                found = words[words.index("-") + 1]
    return found


def _checked(owner: str, examined: Examined) -> tuple[int, list[str]]:
    """Return how many rows a view has, and where one, or a table, is damaged or missing."""
    assert examined.environment is not None
    return check_rows(examined.environment, table_specs(load(owner)))


def _words(error: Exception) -> str:
    return error.text if isinstance(error, KsiError) else str(error)


def _nearest(path: Path) -> Path:
    """Return the first of `path` and its parents that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _open_to_others(path: Path, status: os.stat_result) -> str:
    """Return how something is not ours alone, in words; nothing if it is."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}"
    closed_to = 0o022 if path.suffix == ".key" else 0o077
    if status.st_mode & closed_to:
        return f"is open to others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


__all__ = ["Check", "Checkup", "Finding"]
