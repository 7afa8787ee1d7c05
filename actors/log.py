"""The operational log: `var/logs/ksi/<process>.jsonl`, one JSON object a line, one file a process.

A line carries ids, sizes and counts, never what an agent or a person said. Fields are `at` (UTC),
`level`, `event` (a constant in words), `process`, `pid`, and what the event is about.

Logging never fails its caller and never blocks it for long: a line that cannot be written is
dropped. A file that has been renamed or removed is opened anew at the next line, so log rotation
needs no signal; a file over `LOG_BYTES_MAX` is moved to `<name>.1` by its process itself.

    log = configure(var, "sessions", "info")
    log.info("opened", journal_seq=8812, replayed=41)
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

LOG_BYTES_MAX: Final = 16 << 20  # A file that grep reads at once; twice this a process is kept.
FIELD_CHARS_MAX: Final = 16_384  # A traceback fits, a prompt that got lost in a field does not.

Level = Literal["debug", "info", "warning", "error"]


def directory(var: Path) -> Path:
    """Return where the processes of `var` log."""
    return var / "logs" / "ksi"


def make_directory(var: Path) -> None:
    """Make it if it is missing.

    Raises:
        OSError: it cannot be made.
    """
    if not os.path.isdir(directory(var)):
        directory(var).mkdir(mode=0o700, parents=True, exist_ok=True)


def output(var: Path, process: str) -> Path:
    """Return the file of what a process writes to its standard output and error."""
    return directory(var) / f"{process}.out"


def redirect(path: Path) -> None:
    """Make the standard output and error of this process append to `path`.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = _open_to_append(path)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def last_words(path: Path) -> str | None:
    """Return what a process said last in its output, most likely why it ended, and where it is."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return None
    return f"its last words: {lines[-1][:500]} (see {path})" if lines else None


def trim(path: Path) -> None:
    """Move what a file over `LOG_BYTES_MAX` holds to `<name>.1`; its writers append and go on."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)


def configure(var: Path, process: str, level: Level = "info") -> Any:
    """Return the logger of this process: `.debug .info .warning .error .exception .bind`.

    Raises:
        OSError: the directory of logs cannot be made.
    """
    make_directory(var)
    return engine().make_filtering_bound_logger(level)(
        _lines(str(directory(var) / f"{process}.jsonl")),
        [_rendered],
        {"process": process, "pid": os.getpid()},
    )


def engine() -> Any:
    """Return structlog, loaded where something is logged: it takes a tenth of a second and 15 MB.

    Without `rich`, which it would load for colours that no file of ours has, as much again; and
    without `asyncio`, which is loaded when something of it is used: it brings TLS along.
    """
    if "structlog" in sys.modules:
        return sys.modules["structlog"]
    stand_ins: dict[str, Any] = {"rich": None, "asyncio": _stand_in("asyncio")}  # None: not there.
    ours = {name: each for name, each in stand_ins.items() if name not in sys.modules}
    sys.modules.update(ours)
    try:
        return import_module("structlog")
    finally:
        for name in ours:
            del sys.modules[name]


def _stand_in(name: str) -> ModuleType:
    """Return a module that has what the module `name` has, which it imports when it is asked.

    Source: PEP 562.
    """
    module = ModuleType(name)
    vars(module)["__getattr__"] = lambda attribute: getattr(import_module(name), attribute)
    return module


class Lines:
    """Appends lines to one file, each in a single write. This is the sink under the logger."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._bytes = 0

    def msg(self, line: str) -> None:
        """Append `line`, or drop it if that is impossible."""
        content = line.encode() + b"\n"
        with contextlib.suppress(OSError):
            if self._bytes + len(content) > LOG_BYTES_MAX:
                os.replace(self._path, self._path + ".1")
            if not self._is_current():
                self._open()
            self._bytes += os.write(self._fd, content)

    debug = info = warning = warn = error = critical = failure = fatal = log = msg

    def _is_current(self) -> bool:
        if self._fd < 0:
            return False
        try:
            named, held = os.stat(self._path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def _open(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = _open_to_append(self._path)
        self._bytes = os.fstat(self._fd).st_size


@functools.cache
def _lines(path: str) -> Lines:
    """Return the one sink a process has for a file, however often it configures its logger."""
    return Lines(path)


def _open_to_append(path: Path | str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


# Made at import, in the fork server: once for all processes, in pages that they share.
_encode: Final = json.JSONEncoder(default=repr).encode


def _rendered(logger: Any, level: str, fields: MutableMapping[str, Any]) -> str:
    """Return the line. One processor, not several: a process keeps pages of each."""
    if "exc_info" in fields:
        fields = engine().processors.format_exc_info(logger, level, fields)
    fields["level"] = level
    fields["at"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    for name, value in fields.items():
        if isinstance(value, str) and len(value) > FIELD_CHARS_MAX:
            fields[name] = f"{value[:FIELD_CHARS_MAX]}… ({len(value)} characters)"
    return _encode(fields)
