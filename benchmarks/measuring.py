"""What all benchmarks share: a system of their own, a Redis beside it, a disk probe, a table.

What every benchmark keeps to:
- both sides run in one run, in turns; a figure is the median of the rounds, with the least and the
  greatest in brackets, and a ratio is taken within each round;
- every reply is looked at: refusals are quick, and were once measured for replies;
- a raw synced write is measured before and after: a durable figure means nothing without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import md5
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar
from uuid import UUID

from ksi.actors.stat import Stat, read_stat
from ksi.actors.supervision.launch import start_background
from ksi.actors.supervision.lock import holder
from ksi.transport import AsyncClient, Client
from ksi.transport.identity import run_directory
from ksi.transport.message import Role

T = TypeVar("T")

ROUNDS: Final = 5
PROBE_BYTES: Final = 4096
PROBE_WRITES: Final = 300
TOLD_AT_ONCE: Final = 512  # Commands a client keeps on their way while it fills a system.
WAIT_S: Final = 30.0


class Spread(NamedTuple):
    """The median of the rounds, and the least and the greatest."""

    median: float
    least: float
    greatest: float

    def __format__(self, spec: str) -> str:
        if self.least == self.greatest:
            return f"{self.median:{spec}}"
        return f"{self.median:{spec}} ({self.least:{spec}} to {self.greatest:{spec}})"


def spread(values: Iterable[float]) -> Spread:
    """Return the spread of some figures; there must be one at least."""
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def ratios(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """Return the spread of ours by theirs, round by round."""
    return spread(a / b for a, b in zip(ours, others, strict=True))


def percentile(values: Iterable[float], part: float) -> float:
    """Return the value that `part` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * part) - 1)]


class Target(NamedTuple):
    """What a median is to reach."""

    sign: str  # "≥" or "≤"
    value: float
    unit: str = "x"

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g} {self.unit}"

    def met(self, value: float) -> bool:
        return value >= self.value if self.sign == "≥" else value <= self.value


class Report:
    """The table a benchmark prints. What is going on goes to standard error."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rows = [("", "ours", "the other side", "ratio", "target", "")]

    def add(
        self,
        what: str,
        ours: str,
        other: str = "-",
        *,
        ratio: Spread | None = None,
        target: Target | None = None,
        value: float | None = None,
    ) -> None:
        """Add a row; `target` is compared with `value`, or with the median of `ratio`."""
        verdict = ""
        if target is not None:
            reached = ratio.median if value is None and ratio is not None else value
            assert reached is not None, f"{what}: a target needs a figure"
            verdict = "met" if target.met(reached) else "short"
        shown = "-" if ratio is None else f"{ratio:.2f}"
        self._rows.append(
            (what, ours, other, shown, "-" if target is None else str(target), verdict)
        )

    def show(self) -> None:
        """Print the table."""
        print(self._title)
        widths = [max(len(row[column]) for row in self._rows) for column in range(6)]
        for row in self._rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(("  " + "  ".join(cells)).rstrip())


@dataclass(frozen=True, slots=True)
class Options:
    """How long and where to measure.

    Attributes:
        quick: only see that the benchmark works: its figures mean nothing.
        directory: where systems and probes are; on the disk that is meant.
    """

    rounds: int
    quick: bool
    directory: Path
    more: argparse.Namespace


@contextlib.contextmanager
def measuring(
    description: str | None,
    arguments: Callable[[argparse.ArgumentParser], Any] = lambda _parser: None,
) -> Iterator[Options]:
    """Read the command line, show the machine, probe the disk before and after, clean up."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds in turn [{ROUNDS}]")
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    parser.add_argument("--directory", type=Path, help="measure on this disk [a temporary one]")
    arguments(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="ksi-bench-") as made:
        directory = Path(made)
        print(
            f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
            f"Python {platform.python_version()}, load {os.getloadavg()[0]:.2f}"
        )
        show_probe("before", directory)
        yield Options(1 if given.quick else given.rounds, given.quick, directory, given)
        show_probe("after", directory)


def show_probe(when: str, directory: Path) -> None:
    """Measure and print a raw synced write."""
    written_s = probe(directory)
    print(
        f"raw append of {PROBE_BYTES} bytes + fdatasync, {when}: p50 "
        f"{statistics.median(written_s) * 1e6:.0f} us, p99 {percentile(written_s, 0.99) * 1e6:.0f}",
        flush=True,
    )


def probe(directory: Path, writes: int = PROBE_WRITES) -> list[float]:
    """Return how long each of some raw synced writes took, in seconds."""
    content, taken_s = os.urandom(PROBE_BYTES), []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(writes):
            begun_s = time.perf_counter()
            file.write(content)
            os.fdatasync(file.fileno())
            taken_s.append(time.perf_counter() - begun_s)
    return taken_s


def say(text: str) -> None:
    """Say on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)


class System:
    """A running system in a directory of its own: supervisor, owners, follower."""

    def __init__(self, var: Path, **settings: Any) -> None:
        """Start it. `settings` as in `ksi start --set`, with `__` for the dot."""
        self.var = var
        flags = {name.replace("__", "."): value for name, value in settings.items()}
        start_background(var, flags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop it in order."""
        held = holder(self.var)
        if held is not None:
            os.kill(held.pid, signal.SIGTERM)
            wait_until(lambda: holder(self.var) is None, "the supervisor ends")

    def client(self, name: str = "bench", role: Role = "agent") -> Client:
        return Client(name, var=self.var, role=role)

    def async_client(self, name: str = "bench", role: Role = "agent") -> AsyncClient:
        return AsyncClient(name, var=self.var, role=role)

    @property
    def supervisor_pid(self) -> int:
        held = holder(self.var)
        assert held is not None, "the supervisor has ended"
        return held.pid

    def stat(self, owner: str = "sessions") -> Stat:
        """Return what the owner says of itself."""
        stat = read_stat(run_directory(self.var) / f"{owner}.stat")
        assert stat is not None, f"{owner} says nothing"
        return stat


def wait_until(done: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until `done()`; TimeoutError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s:.0f} s: {what}")
        time.sleep(0.001)  # A poll with a deadline.


def ksi(var: Path, *words: str) -> tuple[dict[str, Any], float]:
    """Run a `ksi` command as a person does; return what it says and the seconds it took."""
    command = [sys.executable, "-P", "-m", "ksi.console", "--var", str(var), *words, "--json"]
    begun_s = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    taken_s = time.perf_counter() - begun_s
    assert done.returncode == 0, done.stderr or done.stdout
    said: dict[str, Any] = json.loads(done.stdout)
    return said, taken_s


def session_name(number: int) -> str:
    """Return the id of session `number`; they are spread over the table like random ones."""
    return f"sess_{UUID(bytes=md5(number.to_bytes(8, 'big')).digest())}"


async def create_sessions(client: AsyncClient, first: int, beyond: int) -> None:
    """Create the sessions numbered `first` up to, not including, `beyond`, owned by the client."""
    for number in range(first, beyond):
        await client.tell("session:create", session_id=session_name(number))
        if number % TOLD_AT_ONCE == 0:
            await client.flush(WAIT_S)
    await client.flush(WAIT_S)
    if beyond > first:
        last = await client.ask("session:get", session_id=session_name(beyond - 1))
        assert last["seq"] == 0, last


class Redis:
    """A Redis that syncs every command, on the files in a directory and a socket in it.

    Attributes:
        path: its socket.
    """

    def __init__(self, home: Path) -> None:
        self.path = str(home / "socket")
        self._command = ["redis-server", "--port", "0", "--unixsocket", self.path]
        self._command += ["--dir", str(home), "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.start()
        wait_until(self.answers, "redis-server answers")

    def start(self) -> None:
        """Start it, or start it again; it does not answer yet."""
        self._server = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self._server.kill()
        self._server.wait()

    def answers(self) -> bool:
        """Whether it has loaded its files and answers."""
        with socket.socket(socket.AF_UNIX) as raw, contextlib.suppress(OSError):
            raw.connect(self.path)
            raw.sendall(b"PING\r\n")
            return raw.recv(64).startswith(b"+PONG")
        return False


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[Redis | None]:
    """Run a Redis in `directory`; yields None, and says so, where there is none to run."""
    missing = [
        what
        for what, found in (
            ("redis-server (Debian: redis-server)", shutil.which("redis-server")),
            ("the Python package redis (pip install 'ksi[bench]')", find_spec("redis")),
        )
        if not found
    ]
    if missing:
        say(f"no comparison with Redis: {' and '.join(missing)} not found")
        yield None
        return
    home = directory / "redis"
    home.mkdir()
    redis = Redis(home)
    try:
        yield redis
    finally:
        redis.kill()


def timed(call: Callable[[], T], times: int, right: Callable[[T], bool]) -> list[float]:
    """Call `times` times; return the seconds each took. Every result must be `right`."""
    taken_s = []
    for _ in range(times):
        begun_s = time.perf_counter()
        result = call()
        taken_s.append(time.perf_counter() - begun_s)
        assert right(result), result
    return taken_s
