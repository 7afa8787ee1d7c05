"""The followers beside the owner of the library: the caches of compositions and of conversations.

Compositions come from a folder that others write. Conversations come from the journal of the
sessions, as far as the session files are written, and from imported logs, which are read where they
are. How both are kept and built again is that of all caches: `caching.py`; how files are watched,
`watching.py`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import msgspec

from ksi.actors.composing import SUFFIXES, Rejected, hash_of
from ksi.actors.config import load
from ksi.actors.declarations.editing import Edit
from ksi.actors.followers import composed, conversed
from ksi.actors.followers.beside import run_with
from ksi.actors.followers.caching import CacheFollower, Making, Outdated
from ksi.actors.followers.indexing import Rebuild, Source
from ksi.actors.followers.watching import FileFollower, Roots, files_of, signature_of
from ksi.actors.reading import log_directory
from ksi.storage import compositions, conversations, shared
from ksi.storage.atomic import make_directory
from ksi.storage.cache import Cache
from ksi.storage.compositions import CompositionsWriter, Known
from ksi.storage.conversations import ConversationsWriter, Unreadable
from ksi.transport.limits import LOG_LINE_BYTES_MAX

GROUP_S: Final = 0.05  # What is said within this time is put into the cache together.
READ_BYTES: Final = (
    1 << 20
)  # Of an imported log at once: one transaction, and what memory it takes.
MARK_BYTES: Final = 4096  # Of a log that has grown, what is compared with what it was.


class CompositionsFollower(FileFollower[CompositionsWriter]):
    """Keeps the cache of the folder of compositions."""

    name = order = "compositions"
    what = "cache of compositions"
    suffixes = SUFFIXES

    def __init__(self, var: Path, logger: Any) -> None:
        super().__init__("library", var, logger)
        settings = load(var).config.compositions
        self._folder = Path(os.path.realpath(var / settings.folder))
        self._exclude = tuple(settings.exclude.split())
        self._path = composed.cache_path(var)
        self.parsed = 0
        self._edits: dict[str, dict[str, Any]] = {}  # what became of those that are not settled
        made_of = {
            "folder": str(self._folder), "exclude": self._exclude, "form": compositions.FORM,
        }  # fmt: skip
        self._made_of = msgspec.json.encode(made_of).decode()

    def _roots(self) -> Roots:
        return Roots(folders=frozenset({self._folder}))

    def _open(self) -> CompositionsWriter:
        if not self._path.exists():
            raise Outdated("there was none")
        writer = CompositionsWriter(self._path, compositions.TABLES, self._made_of)
        _require_usable(writer)
        return writer

    def _feed(self, writer: CompositionsWriter) -> bool:
        self._edit(writer)
        return self._follow_files(writer)

    def _edit(self, writer: CompositionsWriter) -> None:
        """Carry out what was decided about files, and remember what became of it."""
        edits = self._orders.read(lambda tables, _: list(tables["edits"].range()))
        known, self._edits = self._edits, {}
        for path, edit in edits:
            done = known.get(path, {})
            if done.get("number") != edit.number or done["state"] == "waiting":
                done = {"number": edit.number, **self._edited(path, edit)}
                if done["state"] == "written":
                    self._look(writer, self._folder / path, is_told=True)
            self._edits[path] = done

    def _edited(self, path: str, edit: Edit) -> dict[str, Any]:
        content = None if edit.content is None else edit.content.encode()
        try:
            make_directory(self._folder)
            shared.replace(self._folder, path, content, edit.base)
        except shared.Differs as differs:
            self._log.warning("an edit was refused", path=path, reason=str(differs))
            return {"state": "refused", "reason": f"somebody else was there first: {differs}"}
        except OSError as error:
            return {"state": "waiting", "reason": f"it cannot be written: {error.strerror}"}
        return {"state": "written", "reason": None}

    def _make(self, reason: str, order: int) -> Making:
        path = self._path.with_name("compositions.new.db")
        writer = CompositionsWriter(
            path, compositions.TABLES, self._made_of, making=True, rebuilt=order
        )
        return FolderRebuild(self._fill(writer), writer, reason, lambda: writer.install(self._path))

    def _fill(self, writer: CompositionsWriter) -> Iterator[int]:
        for path in files_of(self._roots(), self.suffixes):
            self._look(writer, path, is_told=False)
            yield 1
        writer.finish()

    def _rebuilt(self, writer: CompositionsWriter) -> int:
        return writer.rebuilt

    def _more(self) -> dict[str, Any]:
        return {"parsed": self.parsed, "watched": self._watch.tells, "edits": self._edits}

    def _paths(self, writer: CompositionsWriter) -> set[Path]:
        return {self._folder / path for path in writer.paths()}

    def _examine(self, writer: CompositionsWriter, path: Path, *, is_told: bool) -> Iterator[None]:
        self._look(writer, path, is_told=is_told)
        yield None

    def _look(self, writer: CompositionsWriter, path: Path, *, is_told: bool) -> None:
        key = path.relative_to(self._folder).as_posix()
        known, signature = writer.known(key), signature_of(path)
        if signature is None or path.is_dir():
            if known is not None:
                writer.forget(key)
            return None
        if known is not None and known.signature == signature and not is_told:
            return None
        status = path.lstat()
        about = (status.st_size, status.st_mtime)
        if why := composed.exclusion_of(key, self._exclude):
            return writer.put(key, Known(signature, None), about, why, excluded=True)
        file_hash = None
        try:
            content = composed.read_file(path)
            file_hash = hash_of(content)
            if known is not None and known.file_hash == file_hash:
                return writer.touch(key, Known(signature, file_hash), status.st_mtime)
            self.parsed += 1
            found: Any = composed.parse(key, content)
        except Rejected as why_not:
            found = str(why_not)
        except FileNotFoundError:
            return None
        return writer.put(key, Known(signature, file_hash), about, found)


class FolderRebuild:
    """Makes a new cache of files beside the old one, a file at a turn."""

    def __init__(
        self, steps: Iterator[int], writer: Any, reason: str, put: Callable[[], None]
    ) -> None:
        self.reason = reason
        self.done_bytes = self.total_bytes = self.lines = 0
        self.begun_s = time.monotonic()
        self._steps = steps
        self._writer = writer
        self._put = put

    def turn(self) -> bool:
        """Do a piece; return False when all is made."""
        done = next(self._steps, None)
        self.lines += done or 0
        return done is not None

    def install(self) -> None:
        """Put what was made in the place of the old one."""
        self._put()

    def abandon(self) -> None:
        """Give it up."""
        self._writer.abandon()


class ConversationsFollower(FileFollower[ConversationsWriter]):
    """Keeps the cache of conversations."""

    name = order = "conversations"
    what = "cache of conversations"
    suffixes = (".jsonl",)

    def __init__(self, var: Path, logger: Any) -> None:
        super().__init__("library", var, logger)
        self._source = Source(var)
        self._path = conversed.cache_path(var)
        made_of = {
            "sessions": os.path.realpath(log_directory(var)), "form": conversations.FORM,
        }  # fmt: skip
        self._made_of = msgspec.json.encode(made_of).decode()
        self._imports = -1  # the order to import that has been taken up
        self._imported = Roots()

    def is_behind(self) -> bool:
        """Return whether there are entries that wait for their file."""
        return self._source.is_ahead(self._writer)

    def _finish(self, writer: ConversationsWriter) -> None:
        self._source.finish(writer)

    def _open(self) -> ConversationsWriter:
        self._source.written()  # Without a store there is nothing to read, or to build from.
        if not self._path.exists():
            raise Outdated("there was none")
        writer = ConversationsWriter(self._path, self._made_of, conversed.said)
        _require_usable(writer)
        if writer.place is None:
            writer.abandon()
            raise Outdated("it was not made to its end")
        return writer

    def _feed(self, writer: ConversationsWriter) -> bool:
        busy = self._source.feed(writer)
        if writer.is_worn():
            raise Outdated("most of it is of messages that are gone")
        return self._follow_files(writer) or busy

    def _make(self, reason: str, order: int) -> Making:
        path = self._path.with_name("conversations.new.db")
        writer = ConversationsWriter(
            path, self._made_of, conversed.said, making=True, rebuilt=order
        )
        rebuild = ConversationsRebuild(
            self._source, writer, reason, order, lambda: writer.install(self._path)
        )
        rebuild.last = self._fill(writer)
        return rebuild

    def _fill(self, writer: ConversationsWriter) -> Iterator[bool]:
        roots, number = self._roots(), self._imports
        for path in files_of(roots, self.suffixes):
            for _ in self._examine(writer, path, is_told=False):
                yield True
        writer.come_to(number)

    def _rebuilt(self, writer: ConversationsWriter) -> int:
        return writer.rebuilt

    def _more(self) -> dict[str, Any]:
        return {"watched": self._watch.tells}

    def _roots(self) -> Roots:
        number = self._ordered("imports")
        if number != self._imports:
            listed = self._orders.read(
                lambda tables, _: [Path(row.path) for _key, row in tables["imports"].range()]
            )
            files = frozenset(filter(_is_log, listed))
            self._imported = Roots(frozenset(listed) - files, files)
            self._imports = number
            self._looked_s = float("-inf")  # What is imported again is looked at, told or not.
        return self._imported

    def _all(self, writer: ConversationsWriter, roots: Roots) -> Iterator[None]:
        number = self._imports  # A later order has a look of its own.
        yield from super()._all(writer, roots)
        if writer.imports != number:
            writer.come_to(number)

    def _paths(self, writer: ConversationsWriter) -> set[Path]:
        return set(map(Path, writer.imported()))

    def _examine(self, writer: ConversationsWriter, path: Path, *, is_told: bool) -> Iterator[None]:
        key, signature = str(path), signature_of(path)
        if signature is None or not self._is_imported(path):
            writer.forget(key)
            return
        file = writer.file(key)
        if file is not None and file.signature == signature:  # A log that has grown looks so.
            return
        try:
            yield from read_on(writer, path, signature)
        except OSError as error:
            why = "it is a link, which is not followed" if path.is_symlink() else error.strerror
            writer.forget(key, f"it cannot be read: {why}")

    def _is_imported(self, path: Path) -> bool:
        roots, ours = self._imported, log_directory(self._var).absolute()
        if path.is_relative_to(ours):  # What was said in sessions is in the cache already.
            return False
        return path in roots.files or any(path.is_relative_to(each) for each in roots.folders)


class ConversationsRebuild(Rebuild):
    """Makes a new cache of conversations beside the old: the sessions, then the imported logs."""

    last: Iterator[bool]

    def _last(self) -> Iterator[bool]:
        return self.last


def _is_log(path: Path) -> bool:
    """Return whether an import names a single file; one that is not there goes by its name."""
    return path.is_file() or (not path.is_dir() and path.suffix == ".jsonl")


def read_on(writer: ConversationsWriter, path: Path, signature: str) -> Iterator[None]:
    """Put into the cache what a log has got, or all of it if it is no more what it was.

    A block at a step. Whoever reads it meanwhile, or after this was put off, reads on behind the
    last block; this ends at its next step then, and no line is put in twice.
    """
    key, session_id = str(path), path.stem
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as log:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no file")
        file = writer.file(key)
        if file is None or not _has_grown(fd, file, status):
            writer.forget(key)
            file = None
        writer.report(key, file.lines + 1 if file is not None else 1, None)
        rest, offset, left = b"", 0 if file is None else file.size_bytes, file
        log.seek(offset)
        while content := log.read(READ_BYTES):
            *lines, rest = (rest + content).split(b"\n")
            if lines:
                offset = log.tell() - len(rest)
                lines = [line + b"\n" for line in lines]
                partly = f"{status.st_ino}:{offset}:0:0"
                left = writer.take(key, session_id, lines, partly, _mark(fd, offset))
            if len(rest) > LOG_LINE_BYTES_MAX:
                break
            yield None
            if writer.file(key) != left:
                return  # It has changed: who was told of that has read on.
        whole = [rest] if rest and _is_whole(rest) else []
        mark = _mark(fd, offset + sum(map(len, whole)))
        left = writer.take(key, session_id, whole, signature, mark)
        missing = None if whole or not rest else "it has no end yet, and is no JSON as it is"
        if len(rest) > LOG_LINE_BYTES_MAX:
            missing = f"it is over {LOG_LINE_BYTES_MAX} bytes; nothing behind it is read"
        writer.report(key, left.lines + 1, missing)


def _has_grown(fd: int, file: conversations.File, status: os.stat_result) -> bool:
    """Return whether a log is what it was, with more behind it, or has not been read to its end."""
    if not file.signature:
        return False
    inode, size, changed_ns, _ = map(int, file.signature.split(":"))
    if inode != status.st_ino or size > status.st_size or (changed_ns and size == status.st_size):
        return False
    if file.is_open and os.pread(fd, 1, file.size_bytes) != b"\n":
        return False
    return _mark(fd, file.size_bytes) == file.mark


def _mark(fd: int, size: int) -> int:
    """Return the checksum of the end of what was read."""
    start = max(0, size - MARK_BYTES)
    return crc32(os.pread(fd, size - start, start))


def _is_whole(line: bytes) -> bool:
    try:
        conversed.said(line)
    except Unreadable:
        return False
    return True


def _require_usable(writer: Cache) -> None:
    reason = writer.outdated()
    if reason is not None:
        writer.abandon()
        raise Outdated(reason)


def run_library(var: str) -> None:
    """Run the owner of the library on `var`, and its followers beside it, until SIGTERM."""
    run_with("library", var, _followers, bells=("sessions", "library"), group_s=GROUP_S)


def _followers(var: Path, logger: Any) -> list[CacheFollower[Any]]:
    return [CompositionsFollower(var, logger), ConversationsFollower(var, logger)]
