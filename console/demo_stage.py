"""Where `ksi demo` happens: a directory, a system and agent processes, lent and taken away again.

Whatever ends a demo, an error, Ctrl-C or a signal to stop, nothing of it is left: no process and no
file.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from ksi.actors.supervision.launch import start_background
from ksi.actors.supervision.lock import holder
from ksi.actors.supervision.reports import read_children
from ksi.console.demo_agent import Acked, Told
from ksi.console.demo_play import AGENTS, Play
from ksi.console.options import Options
from ksi.console.stop import stop_and_wait
from ksi.transport.errors import Internal, KsiError
from ksi.transport.identity import run_directory

PLAY_S_MAX: Final = 60.0  # A play that takes longer has stuck.
STOP_S_MAX: Final = 10.0
STARTING_S_MAX: Final = 1.0  # A supervisor that was begun holds its lock by then.
LOOK_S: Final = 0.005
WORKERS: Final = ("echo-1", "echo-2")
WORKER_LEASE: Final = "1s"  # One that is killed is missed after this.


def say(text: str) -> None:
    """Tell people how far it is."""
    print(text, file=sys.stderr, flush=True)


def failed(text: str) -> Internal:
    """Return the error for what a demo should never meet."""
    return Internal(text, hint="run it again; if it stays, it is a defect of ksi")


@contextmanager
def directory() -> Iterator[Path]:
    """Lend a runtime directory; clear it away with all that runs on it, however this ends."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in former:
        signal.signal(number, _leave)
    place = Path(tempfile.mkdtemp(prefix="ksi-demo-"))
    var = place / "var"
    whole = False
    try:
        yield var
        whole = True
    finally:
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a moment, and it is done
        if not whole:
            _stop_what_runs(var)
        with suppress(KsiError):
            shutil.rmtree(run_directory(var), ignore_errors=True)  # elsewhere, for a deep TMPDIR
        shutil.rmtree(place, ignore_errors=True)
        signal.signal(signal.SIGINT, interrupted)
        for number, handler in former.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: Any) -> NoReturn:
    sys.exit(128 + number)


def _stop_what_runs(var: Path) -> None:
    """Stop a supervisor, also one that is only just starting."""
    until_s = time.monotonic() + STARTING_S_MAX
    while (found := holder(var)) is None or not found.pid:
        if time.monotonic() > until_s:
            return
        time.sleep(LOOK_S)  # A poll with a deadline.
    with suppress(KsiError):
        stop_and_wait(Options(var=var), STOP_S_MAX, now=True)


@contextmanager
def system(var: Path) -> Iterator[dict[str, Any]]:
    """Run a supervisor and its owners; yields `pid` and `seconds` of the start."""

    def tell(line: dict[str, Any]) -> None:
        say(f"  {line['child']:<12} ready  pid {line['pid']}")

    say(f"starting a supervisor on {var}")
    started = start_background(var, {}, tell)
    say(f"  ready in {started['seconds']:.2f} s, supervisor {started['pid']}")
    yield started
    _, seconds = stop_and_wait(Options(var=var), STOP_S_MAX)
    say(f"stopped in {seconds:.2f} s")


def children(var: Path) -> dict[str, int]:
    """Return the processes of the system by name."""
    found = read_children(run_directory(var))
    return {child.name: child.pid for child in found.children if child.pid} if found else {}


class Cast:
    """The agent processes, each with the file in which it notes what was acknowledged."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __len__(self) -> int:
        return len(self._processes)

    def start(self, name: str, var: Path, script: Path) -> subprocess.Popen[bytes]:
        """Start one agent."""
        program = (sys.executable, "-P", "-m", "ksi.console.demo_agent")
        with (self._place / f"{name}.err").open("wb") as errors:
            self._processes[name] = subprocess.Popen(
                [*program, name, str(var), str(script), *map(str, self._notes(name))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us: we end them
            )
        return self._processes[name]

    def _notes(self, name: str) -> tuple[Path, Path]:
        return self._place / f"{name}.acked", self._place / f"{name}.told"

    def words(self) -> str:
        """Return who is who."""
        return ", ".join(f"{name} {each.pid}" for name, each in self._processes.items())

    def wait_until(self, what: str, done: Callable[[], bool]) -> None:
        """Wait while agents play.

        Raises:
            Internal: an agent has failed, or it takes too long.
        """
        until_s = time.monotonic() + PLAY_S_MAX
        while not done():
            for name, process in self._processes.items():
                if process.poll():
                    said = (self._place / f"{name}.err").read_text().strip().splitlines()
                    raise failed(f"the agent {name} ended: {said[-1] if said else 'no words'}")
            if time.monotonic() > until_s:
                raise failed(f"{what} has not come in {PLAY_S_MAX:g} s")
            time.sleep(LOOK_S)  # A poll with a deadline.

    def finish(self) -> tuple[list[Acked], list[Told]]:
        """Wait for the end; return what was acknowledged, in the order it was, and was told."""
        processes = self._processes.values()
        self.wait_until("the end", lambda: all(each.poll() == 0 for each in processes))
        decode = msgspec.json.Decoder(Acked).decode
        notes = [self._notes(name) for name in self._processes]
        acked = [decode(line) for each, _ in notes for line in each.read_bytes().splitlines()]
        told = [msgspec.json.decode(each.read_bytes(), type=Told) for _, each in notes]
        return sorted(acked, key=lambda each: each.acked_s), told


@contextmanager
def cast(var: Path, play: Play) -> Iterator[Cast]:
    """Start the agent processes; none is left in the end."""
    script = var.parent / "play.json"
    script.write_bytes(msgspec.json.encode(play))
    players = Cast(var.parent)
    with ExitStack() as undo:
        for name in AGENTS:
            process = players.start(name, var, script)
            undo.callback(process.wait)
            undo.callback(process.kill)
        say(f"four agent processes play {play.turns} turns: {players.words()}")
        yield players


@contextmanager
def workers(var: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start those who answer at the desk, by their names; none is left in the end."""
    program = (sys.executable, "-P", "-m", "ksi.console", "worker", "--var", str(var))
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as undo:
        for name in WORKERS:
            running[name] = process = subprocess.Popen(
                [*program, "--as", name, "--provider", "echo", "--lease", WORKER_LEASE],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
        yield running
        for process in running.values():
            process.terminate()
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S_MAX)
