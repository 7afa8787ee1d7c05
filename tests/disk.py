"""A disk put together as a power cut at any point of a traced run may leave it.

`Recording` takes note of each write, sync, creation, rename and removal. Then:
- what was synced is there; of what was written since, each sector of 512 bytes is there or not, so
  that a file may hold any mixture of what was ever in it since it was last synced;
- of the entries of a directory since its last sync, any number of the first ones are there.

What is written through a mapping is not seen: of LMDB and SQLite that is only what they never read
after a restart of the machine.

Source: the crash states of ALICE (OSDI '14), with directory entries in order, as file systems with
a journal of their metadata keep them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tracing import Call

SECTOR_BYTES = 512
ROOT = 1
SAID = "said"  # a file below the root: what is written there is a mark, and on no disk
Event = tuple[Any, ...]


class Recording:
    """What a traced child does below `root`: pass `watch` to `tracing.run`.

    Attributes:
        events: what it did, files and directories by number; what was there is synced.
    """

    def __init__(self, root: Path) -> None:
        self.events: list[Event] = []
        self._root = root
        self._numbers: dict[int, int] = {root.stat().st_ino: ROOT}
        self._entries: dict[int, dict[str, int]] = {ROOT: {}}
        self._count = ROOT
        for folder, folders, files in os.walk(root):
            for name in folders:
                self._enter("mkdir", f"{folder}/{name}")
            for name in files:
                self._enter("create", f"{folder}/{name}")
                content = Path(folder, name).read_bytes()
                self.events.append(("write", self._count, 0, content))
                self.events.append(("sync", self._count))
            self.events.append(("sync", self._number(folder)))
        self.since = len(self.events)

    def watch(self, call: Call, result: int) -> None:
        """Take note of a call that was made."""
        if result < 0:
            return
        if call.path == f"{self._root}/{SAID}":
            if call.name in ("write", "pwrite64"):
                self.events.append((SAID, *map(int, Path(call.path).read_bytes().split())))
            return
        match call.name:
            case "open" | "openat":
                self._opened(call)
            case "mkdir" | "mkdirat":
                self._enter("mkdir", call.path)
            case "rename" | "renameat" | "renameat2":
                self._renamed(call.path, call.target)
            case "link" | "linkat":
                (parent, former), (other, name) = self._place(call.path), self._place(call.target)
                number = self._entries[other][name] = self._entries[parent][former]
                self.events.append(("rename", other, name, number))
            case "unlink" | "unlinkat" | "rmdir":
                parent, name = self._place(call.path)
                del self._entries[parent][name]
                self.events.append(("unlink", parent, name, 0))
            case "ftruncate":
                self.events.append(("truncate", self._by_fd(call), call.arguments[1]))
            case "fsync" | "fdatasync":
                self.events.append(("sync", self._by_fd(call)))
            case "syncfs":
                self.events.append(("syncfs",))
            case "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2" | "sendfile":
                self._written(call, result)
            case "flock" | "fchmod" | "chmod" | "fchmodat":
                pass
            case other:
                raise NotImplementedError(other)

    def _opened(self, call: Call) -> None:
        flags = call.arguments[1 if call.name == "open" else 2]
        if flags & os.O_CREAT and not os.path.isdir(call.path):
            parent, name = self._place(call.path)
            if name not in self._entries[parent]:
                self._enter("create", call.path)
            elif flags & os.O_TRUNC:
                self.events.append(("truncate", self._number(call.path), 0))

    def _written(self, call: Call, result: int) -> None:
        with open(f"/proc/{call.pid}/fdinfo/{call.fd}") as described:
            position = int(described.readline().split()[1])
        is_placed = call.name.startswith("p")
        offset = call.arguments[3] if is_placed else position - result
        with open(f"/proc/{call.pid}/fd/{call.fd}", "rb") as file:
            content = os.pread(file.fileno(), result, offset)
        self.events.append(("write", self._by_fd(call), offset, content))

    def _renamed(self, source: str, target: str) -> None:
        (parent, former), (other, name) = self._place(source), self._place(target)
        number = self._entries[parent].pop(former)
        self._entries[other][name] = number
        if parent == other:
            self.events.append(("rename", parent, name, number, former))
        else:  # Harsher than file systems are: either half may be there without the other.
            self.events.append(("rename", other, name, number))
            self.events.append(("unlink", parent, former, 0))

    def _enter(self, kind: str, path: str) -> None:
        parent, name = self._place(path)
        self._count += 1
        self._numbers[os.stat(path).st_ino] = self._entries[parent][name] = self._count
        if kind == "mkdir":
            self._entries[self._count] = {}
        self.events.append((kind, parent, name, self._count))

    def _place(self, path: str) -> tuple[int, str]:
        folder, name = os.path.split(path)
        return self._number(folder), name

    def _number(self, path: str) -> int:
        return self._numbers[os.stat(path).st_ino]

    def _by_fd(self, call: Call) -> int:
        return self._numbers[os.stat(f"/proc/{call.pid}/fd/{call.fd}").st_ino]


class File:
    """The bytes of a file as last synced, and what was done to it since."""

    def __init__(self) -> None:
        self.latest = bytearray()
        self._synced = b""
        self._since: list[tuple[int, bytes] | int] = []  # writes, and sizes it was cut to

    def write(self, offset: int, content: bytes) -> None:
        self.latest.extend(bytes(max(0, offset + len(content) - len(self.latest))))
        self.latest[offset : offset + len(content)] = content
        self._since.append((offset, content))

    def truncate(self, size: int) -> None:
        del self.latest[size:]
        self.latest.extend(bytes(size - len(self.latest)))
        self._since.append(size)

    def sync(self) -> None:
        if self._since:
            self._synced = bytes(self.latest)
            self._since.clear()

    def after_cut(self, chance: random.Random) -> bytes:
        """Return what a power cut may leave of it."""
        if not self._since:
            return self._synced
        content, sizes = bytearray(self._synced), [len(self._synced), len(self.latest)]
        often = chance.choice((0.0, 0.5, 1.0, chance.random()))
        for each in self._since:
            if isinstance(each, int):
                sizes.append(each)
                if chance.random() < often:
                    del content[each:]
                    content.extend(bytes(each - len(content)))
                continue
            offset, written = each
            while written:
                part = written[: SECTOR_BYTES - offset % SECTOR_BYTES]
                if chance.random() < often:
                    content.extend(bytes(max(0, offset + len(part) - len(content))))
                    content[offset : offset + len(part)] = part
                offset, written = offset + len(part), written[len(part) :]
        size = chance.choice((len(content), sizes[1], chance.randint(min(sizes), max(sizes))))
        content.extend(bytes(max(0, size - len(content))))
        return bytes(content[:size])


def disk_after(events: Iterable[Event], chance: random.Random, target: Path) -> list[int]:
    """Make `target` what a cut after these events may leave; return what was said by then."""
    files: dict[int, File] = {}
    entered: dict[int, dict[str, int]] = {ROOT: {}}
    pending: dict[int, list[Event]] = {ROOT: []}
    said: list[int] = []
    for event in events:
        match event:
            case (kind, *numbers) if kind == SAID:
                said = numbers
            case ("write", number, offset, content):
                files[number].write(offset, content)
            case ("truncate", number, size):
                files[number].truncate(size)
            case ("sync", number) if number in entered:
                _enter_all(entered[number], pending[number])
            case ("sync", number):
                files[number].sync()
            case ("syncfs",):
                for number, entries in entered.items():
                    _enter_all(entries, pending[number])
                for file in files.values():
                    file.sync()
            case (kind, parent, _, number, *_):
                if kind == "mkdir":
                    entered[number], pending[number] = {}, []
                elif kind == "create":
                    files[number] = File()
                pending[parent].append(event)
    for number, since in pending.items():
        _enter_all(entered[number], since[: chance.randint(0, len(since))])
    _build(target, ROOT, entered, files, chance)
    return said


def _enter_all(entries: dict[str, int], since: list[Event]) -> None:
    for kind, _parent, name, number, *former in since:
        for each in (name, *former) if kind == "unlink" else former:
            entries.pop(each, None)
        if kind != "unlink":
            entries[name] = number
    since.clear()


def _build(
    target: Path,
    number: int,
    entered: dict[int, dict[str, int]],
    files: dict[int, File],
    chance: random.Random,
) -> None:
    target.mkdir(mode=0o700)
    for name, each in entered[number].items():
        if each in entered:
            _build(target / name, each, entered, files, chance)
        else:
            (target / name).write_bytes(files[each].after_cut(chance))
