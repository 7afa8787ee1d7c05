"""What followers share that keep a cache of files which others write, wherever they are.

A file is looked at when it has changed, which the kernel tells (watchfiles), and all of them are
looked at at the start, when what is to be watched changes, and every minute: what nobody has told
is found then at the latest. A file whose inode, size and times are what they were is not read.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from ksi.actors.followers.caching import TURN_S, CacheFollower, Making, Writer
from ksi.transport.limits import TICK_S

TTL_S: Final = 60.0  # All files are looked at this often, whatever is told of them.
UNWATCHED_S: Final = 1.0  # The same where the kernel tells nothing; and how often a root is sought.
WATCH_S: Final = 0.1  # How often it is asked what has changed.
_STEP_MS: Final = 1  # What the watcher may wait for more of the same.

W = TypeVar("W", bound=Writer)


class Roots(NamedTuple):
    """What is watched: folders with all that is below them, and single files."""

    folders: frozenset[Path] = frozenset()
    files: frozenset[Path] = frozenset()


class Watch:
    """Says which files have changed."""

    def __init__(self, logger: Any) -> None:
        self._log = logger
        self._roots: Roots | None = None
        self._watched: list[Generator[set[tuple[Any, str]], None, None]] = []
        self._begun_s = 0.0
        self._missing: list[Path] = []
        self.tells = False

    def look_at(self, roots: Roots) -> bool:
        """Watch these; return whether everything below them must be looked at, since nothing was
        told of them until now."""
        now_s = time.monotonic()
        if roots == self._roots:
            if not (self._missing and now_s - self._begun_s >= UNWATCHED_S):
                return False
            self._begun_s = now_s
            if not any(path.exists() for path in self._missing):
                return False
        self.close()
        self._roots, self._begun_s = roots, now_s
        places = dict.fromkeys(roots.folders, True)
        places |= {path.parent: False for path in roots.files if path.parent not in places}
        self._missing = [path for path in places if not path.is_dir()]
        for is_deep in (True, False):
            self._begin([path for path, deep in places.items() if deep is is_deep], is_deep)
        return True

    def changed(self) -> set[Path]:
        """Return what has changed since the last time."""
        found = set()
        try:
            for each in self._watched:
                found |= {Path(path) for _change, path in next(each)}
        except (OSError, StopIteration, RuntimeError) as error:
            self._fail(error)
        return found

    def close(self) -> None:
        """Watch nothing any more."""
        for each in self._watched:
            each.close()
        self._watched, self._roots, self.tells = [], None, False

    def _begin(self, places: list[Path], is_deep: bool) -> None:
        places = [path for path in places if path not in self._missing]
        if not places:
            return None
        from watchfiles import watch  # Only now: most systems have nothing to be watched.

        told = watch(
            *places,
            watch_filter=None,
            debounce=_STEP_MS,
            step=_STEP_MS,
            rust_timeout=_STEP_MS,
            yield_on_timeout=True,
            recursive=is_deep,
        )
        try:
            next(told)  # From now on it is told.
        except (OSError, StopIteration, RuntimeError) as error:
            return self._fail(error)
        self._watched.append(told)
        self.tells = True
        return None

    def _fail(self, error: Exception) -> None:
        self._log.warning("files are not watched, but looked at", error=str(error))
        roots = self._roots
        self.close()
        self._roots = roots  # Not again with every turn.


class FileFollower(CacheFollower[W]):
    """Keeps a cache of files: looks at each that has changed."""

    suffixes: tuple[str, ...]

    def __init__(self, owner: str, var: Path, logger: Any) -> None:
        super().__init__(owner, var, logger)
        self._watch = Watch(logger)
        self._scan: Iterator[None] | None = None  # goes on looking at all of them
        self._changed: dict[Path, Iterator[None]] = {}  # goes on with those that have changed
        self._looked_s = float("-inf")

    @abstractmethod
    def _roots(self) -> Roots:
        """Return what is to be watched now."""

    @abstractmethod
    def _paths(self, writer: W) -> set[Path]:
        """Return all files the cache knows of."""

    @abstractmethod
    def _examine(self, writer: W, path: Path, *, is_told: bool) -> Iterator[None]:
        """Bring the cache on by one file, which may be gone, a piece at a step: between two of them
        others may bring it on by the same file. `is_told`: it has changed, even if it looks as it
        did."""

    @property
    def wait_s(self) -> float:
        return WATCH_S if self._watch.tells else TICK_S

    def close(self) -> None:
        super().close()
        self._watch.close()

    def _follow_files(self, writer: W) -> bool:
        """Look at what has changed; return whether there is more to look at."""
        roots, now_s = self._roots(), time.monotonic()
        is_late = now_s - self._looked_s >= (TTL_S if self._watch.tells else UNWATCHED_S)
        if self._watch.look_at(roots) or (is_late and self._scan is None):
            self._scan, self._looked_s = self._all(writer, roots), now_s
        for path in self._watch.changed():
            if self._is_wanted(path, roots):
                self._changed[path] = self._examine(writer, path, is_told=True)
            elif path.is_dir() or not path.exists():  # What was in it has come or gone with it.
                self._scan = self._all(writer, roots)
        until_s = now_s + TURN_S
        while self._step():
            if time.monotonic() >= until_s:
                return True
        return False

    def _step(self) -> bool:
        """Look at a piece of a file, first of those that have changed; return whether there was
        one to look at."""
        if self._changed:
            path = next(iter(self._changed))
            steps = self._changed.pop(path)
            if next(steps, self) is not self:
                self._changed[path] = steps  # Behind the others.
        elif self._scan is not None:
            if next(self._scan, self) is self:
                self._scan = None
        else:
            return False
        return True

    def _all(self, writer: W, roots: Roots) -> Iterator[None]:
        known = self._paths(writer)
        for path in files_of(roots, self.suffixes):
            known.discard(path)
            yield from self._examine(writer, path, is_told=False)
        for path in sorted(known):
            yield from self._examine(writer, path, is_told=False)

    def _is_wanted(self, path: Path, roots: Roots) -> bool:
        if path in roots.files:
            return True
        if path.suffix not in self.suffixes or is_hidden(path, roots) or not _is_text(str(path)):
            return False
        return any(path.is_relative_to(folder) for folder in roots.folders)

    def _install(self, rebuild: Making) -> None:
        super()._install(rebuild)
        self._look_again()  # What was told meanwhile went into the former cache.

    def _let_go(self) -> None:
        super()._let_go()
        self._look_again()

    def _look_again(self) -> None:
        self._changed.clear()
        self._scan, self._looked_s = None, float("-inf")


def is_hidden(path: Path, roots: Roots) -> bool:
    """Return whether a file, or a folder it is in below its root, is hidden."""
    for folder in roots.folders:
        if path.is_relative_to(folder):
            return any(part.startswith(".") for part in path.relative_to(folder).parts)
    return False


def files_of(roots: Roots, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of these suffixes below folders, in order, then the single ones.

    Hidden ones and those whose names are no UTF-8 are left out, and folders that are links are not
    gone into.
    """
    for folder in sorted(roots.folders):
        yield from _files_below(folder, suffixes)
    yield from sorted(roots.files)


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if not _is_text(entry.name):
            continue
        with suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(path, suffixes)
            elif path.suffix in suffixes:
                yield path


def _is_text(name: str) -> bool:
    """Return whether a name can be said: in others there are bytes that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def signature_of(path: Path) -> str | None:
    """Return what tells one state of a file from another; None if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
