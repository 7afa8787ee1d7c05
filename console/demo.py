"""`ksi demo`: the main job of KSI on real work, with an owner killed in the middle of it.

Four agent processes hold a conversation in sessions of a system of their own, in a temporary
directory. When half of it has been said, the owner of the sessions is killed with -9. Then what was
promised is proven from what the agents were told and what is on disk.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json, show_table

if TYPE_CHECKING:
    from ksi.console.demo_agent import Acked
    from ksi.console.demo_play import Play, Scene
    from ksi.console.demo_proof import Proof, Stored
    from ksi.transport import Client
    from ksi.transport.errors import KsiError

PLAY_S_MAX: Final = 60.0  # A play that takes longer has stuck.
FILES_S_MAX: Final = 1.0  # The promise: a session file has an entry this long after its reply.
SILENT_S: Final = 0.2  # How long the stopped owner is asked in vain.
GONE_S_MAX: Final = 10.0
LOOK_S: Final = 0.005


@command(
    "demo",
    epilog="""\b
Examples:
  ksi demo
  ksi demo --input ~/logs        files of lines of type human and claude
  ksi demo --json""",
)
@click.option(
    "--input",
    "logs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Play the *.jsonl logs in DIR instead of the transcript that comes with KSI.",
)
@click.pass_obj
def demo(options: Options, logs: Path | None) -> int:
    """Show what KSI does, on a system of its own, and prove what it promises.

    Four agent processes talk in sessions, an owner is killed with -9 in the middle, and everything
    acknowledged must be there, once and in order. It takes some seconds, uses a temporary
    directory and leaves nothing behind. Exit codes: 0 all proven, 1 something was not.
    """
    from ksi.console.demo_play import from_logs, shipped

    begun_s = time.monotonic()
    play = shipped() if logs is None else from_logs(logs)
    with _theatre() as var:
        shown = _show(options, var, play)
    proofs: list[Proof] = shown.pop("proofs")
    kept = all(proof.kept for proof in proofs)
    seconds = round(time.monotonic() - begun_s, 2)
    if options.json:
        listed = [proof._asdict() for proof in proofs]
        show_json("demo", {"ok": kept, "seconds": seconds, **shown, "proofs": listed})
    else:
        print()
        rows = [(each.promise, "yes" if each.kept else "NO", each.seen) for each in proofs]
        show_table(("PROMISE", "KEPT", "SEEN"), rows)
        print(f"\n{'All of it held' if kept else 'NOT all of it held'}, in {seconds:.1f} s.")
    return 0 if kept else 1


def _show(options: Options, var: Path, play: Play) -> dict[str, Any]:
    """Play everything on `var` and return what was seen."""
    from ksi.actors.reading import log_directory
    from ksi.console import demo_proof as prove

    with _system(var) as started, _client("watcher", var) as watcher:
        with _agents(var, play) as agents:
            _await_half(play, watcher, agents)
            recovered_s, killed_s = _kill(var, watcher, play.scenes[0].session_id)
            status = _status(options, var)
            acked = _finish(agents)
        _say(f"the play is over: {len(acked)} entries were acknowledged to four processes")
        late_s = _await_files(log_directory(var), acked)
        files = prove.stored(log_directory(var))
        proofs = [
            prove.all_stored(acked, files),
            prove.exactly_once(acked, files),
            prove.order_kept(play, acked, files),
            _killed(acked, killed_s, recovered_s),
            *_one_writer(var, play),
            _read_while_stopped(var, watcher, play, files),
        ]
        pids = _processes(var, started["pid"])
    proofs.append(_gone(pids))
    return {
        "var": str(var),
        "agents": len(agents),
        "sessions": len(play.scenes),
        "turns": play.turns,
        "skipped_lines": play.skipped,
        "start_s": started["seconds"],
        "acknowledged": len(acked),
        "stored": sum(map(len, files.values())),
        "recover_ms": round(recovered_s * 1000, 1),
        "files_late_ms": round(late_s * 1000, 1),
        "proofs": proofs,
        "status": status,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _theatre() -> Iterator[Path]:
    """Lend a directory, and clear it away with all that runs on it, however this ends."""
    from ksi.transport.identity import run_directory

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in former:
        signal.signal(number, _leave)
    place = Path(tempfile.mkdtemp(prefix="ksi-demo-"))
    var = place / "var"
    try:
        yield var
    finally:
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # this takes a moment, not more
        if sys.exc_info()[0] is not None:
            _stop_what_runs(var)
        with suppress(Exception):
            shutil.rmtree(run_directory(var), ignore_errors=True)  # elsewhere, for a deep TMPDIR
        shutil.rmtree(place, ignore_errors=True)
        signal.signal(signal.SIGINT, interrupted)
        for number, handler in former.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: Any) -> NoReturn:
    sys.exit(128 + number)


def _stop_what_runs(var: Path) -> None:
    """Stop a supervisor that may only just be starting."""
    from ksi.actors.lock import holder
    from ksi.console.stop import stop_and_wait
    from ksi.transport.errors import KsiError

    until_s = time.monotonic() + FILES_S_MAX
    while (found := holder(var)) is None or not found.pid:
        if time.monotonic() > until_s:
            return
        time.sleep(LOOK_S)
    with suppress(KsiError):
        stop_and_wait(Options(var=var), GONE_S_MAX, now=True)


@contextmanager
def _system(var: Path) -> Iterator[dict[str, Any]]:
    """Run a supervisor and its owners."""
    from ksi.actors.launch import start_background
    from ksi.console.stop import stop_and_wait

    def tell(line: dict[str, Any]) -> None:
        _say(f"  {line['child']:<12} ready  pid {line['pid']}")

    _say(f"starting a supervisor on {var}")
    started = start_background(var, {}, tell)
    _say(f"  ready in {started['seconds']:.2f} s, supervisor {started['pid']}")
    yield started
    _, seconds = stop_and_wait(Options(var=var), GONE_S_MAX)
    _say(f"stopped in {seconds:.2f} s")


def _client(name: str, var: Path) -> Client:
    from ksi.transport import Client

    return Client(name, var=var)


class _Agents:
    """The agent processes, each with the file it writes down in what was acknowledged."""

    def __init__(self, place: Path, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self.place = place
        self.processes = processes

    def __len__(self) -> int:
        return len(self.processes)

    def require_well(self) -> None:
        """Raise if one has ended in another way than by playing to the end."""
        for name, process in self.processes.items():
            if process.poll():
                words = (self.place / f"{name}.err").read_text().strip().splitlines()
                raise _failed(f"the agent {name} ended: {words[-1] if words else 'no words'}")


@contextmanager
def _agents(var: Path, play: Play) -> Iterator[_Agents]:
    """Start the agent processes; none is left in the end."""
    import msgspec

    from ksi.console.demo_play import AGENTS

    place = var.parent
    script = place / "play.json"
    script.write_bytes(msgspec.json.encode(play))
    agents = _Agents(place, {})
    with ExitStack() as undo:
        for name in AGENTS:
            errors = undo.enter_context((place / f"{name}.err").open("wb"))
            command = (sys.executable, "-P", "-m", "ksi.console.demo_agent", name)
            process = subprocess.Popen(
                [*command, str(var), str(script), str(place / f"{name}.acked")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            undo.callback(_end, process)
            agents.processes[name] = process
        pids = ", ".join(f"{name} {each.pid}" for name, each in agents.processes.items())
        _say(f"four agent processes play {play.turns} turns: {pids}")
        yield agents


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _await(what: str, done: Callable[[], bool], agents: _Agents) -> None:
    until_s = time.monotonic() + PLAY_S_MAX
    while not done():
        agents.require_well()
        if time.monotonic() > until_s:
            raise _failed(f"{what} has not come in {PLAY_S_MAX:g} s")
        time.sleep(LOOK_S)


def _failed(text: str) -> Exception:
    from ksi.transport.errors import Internal

    return Internal(text, hint="run it again with KSI_DEBUG=1, and report what it says")


def _await_half(play: Play, watcher: Client, agents: _Agents) -> None:
    """Wait until half of the turns have been said; nobody is asked, the sessions are read."""
    ids = [scene.session_id for scene in play.scenes]
    _await("the middle of the play", lambda: 2 * _said(watcher, ids) >= play.turns, agents)


def _said(watcher: Client, session_ids: list[str]) -> int:
    from ksi.transport.errors import NotFound

    said = 0
    for session_id in session_ids:
        try:
            said += watcher.read("session:get", session_id=session_id)["seq"]
        except NotFound:
            break
    return said


def _kill(var: Path, watcher: Client, session_id: str) -> tuple[float, float]:
    """Kill the owner of the sessions; return the seconds to its next reply, and when it was."""
    watcher.ask("session:get", session_id=session_id)  # connected, as an agent would be
    pid = _pid_of(var, "sessions")
    pidfd = os.pidfd_open(pid)
    try:
        killed_s = time.monotonic()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], GONE_S_MAX)  # it is gone: whoever answers is another
    finally:
        os.close(pidfd)
    watcher.ask("session:get", session_id=session_id)
    recovered_s = time.monotonic() - killed_s
    _say(
        f"kill -9 {pid}, the owner of the sessions: answers again after {recovered_s * 1e3:.1f} ms"
    )
    return recovered_s, killed_s


def _pid_of(var: Path, name: str) -> int:
    pid = _children(var).get(name)
    if pid is None:
        raise _failed(f"{name} does not run")
    return pid


def _children(var: Path) -> dict[str, int | None]:
    from ksi.actors.reports import read_children
    from ksi.transport.identity import run_directory

    system = read_children(run_directory(var))
    return {child.name: child.pid for child in system.children} if system else {}


def _status(options: Options, var: Path) -> dict[str, Any] | None:
    """Show what `ksi status` says, as anybody would see it."""
    import json

    words = [sys.executable, "-P", "-m", "ksi.console.main", "status", "--var", str(var)]
    if options.json:
        done = subprocess.run([*words, "--json"], capture_output=True, check=False)
        status: dict[str, Any] = json.loads(done.stdout)
        return status
    print("\n$ ksi status", flush=True)
    subprocess.run(words, check=False)
    print(flush=True)
    return None


def _finish(agents: _Agents) -> list[Acked]:
    """Wait for the end of the play; return what was acknowledged, in the order it was."""
    import msgspec

    from ksi.console.demo_agent import Acked

    processes = agents.processes
    _await("its end", lambda: all(each.poll() == 0 for each in processes.values()), agents)
    decode = msgspec.json.Decoder(Acked).decode
    acked = [
        decode(line)
        for name in processes
        for line in (agents.place / f"{name}.acked").read_bytes().splitlines()
    ]
    return sorted(acked, key=lambda each: each.acked_s)


def _await_files(directory: Path, acked: list[Acked]) -> float:
    """Wait for the session files, at most as long as promised; return how long it was."""
    last = {each.session_id: each.seq for each in acked}
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < FILES_S_MAX:
        lines = {path.stem: path.read_bytes().count(b"\n") for path in directory.glob("*.jsonl")}
        if all(lines.get(session_id, 0) >= seq for session_id, seq in last.items()):
            break
        time.sleep(LOOK_S)
    return time.monotonic() - begun_s


def _killed(acked: list[Acked], killed_s: float, recovered_s: float) -> Proof:
    from ksi.console.demo_proof import Proof

    before = sum(each.acked_s < killed_s for each in acked)
    longest_s = max(each.acked_s - each.asked_s for each in acked)
    seen = (
        f"{recovered_s * 1e3:.1f} ms to the next reply; {before} entries before it, "
        f"{len(acked) - before} after; no agent waited longer than {longest_s * 1e3:.0f} ms"
    )
    return Proof("kill -9 is survived", 0 < before < len(acked), seen)


def _one_writer(var: Path, play: Play) -> list[Proof]:
    """Try to write a session as somebody else, and as its former owner."""
    from ksi.console.demo_proof import Proof
    from ksi.transport.errors import NotOwner, StaleEpoch

    scene = play.scenes[0]
    heir = next(name for name in play.notes if name != scene.owner)
    entry: dict[str, Any] = {"session_id": scene.session_id, "event": "note", "data": {}}

    def refusal(client: Client, **more: Any) -> KsiError | None:
        try:
            client.ask("session:append", {**entry, **more})
        except (NotOwner, StaleEpoch) as refused:
            return refused
        return None

    with _client("mallory", var) as mallory, _client(scene.owner, var) as owner:
        stranger = refusal(mallory)
        owner.ask("session:transfer", session_id=scene.session_id, to_agent=heir)
        former = refusal(owner, epoch=1)
    return [
        Proof(
            "a second writer is refused by name",
            isinstance(stranger, NotOwner) and stranger.details["owner"] == scene.owner,
            _short(stranger, scene),
        ),
        Proof(
            "so is a former owner",
            isinstance(former, StaleEpoch) and former.details["owner"] == heir,
            _short(former, scene),
        ),
    ]


def _short(refused: KsiError | None, scene: Scene) -> str:
    """Return what was answered, with the session named as people do."""
    return str(refused).replace(scene.session_id, scene.title) if refused else "it was accepted"


def _read_while_stopped(var: Path, watcher: Client, play: Play, files: Stored) -> Proof:
    """Stop the owner by a signal, ask it in vain, and read all the same."""
    from ksi.console.demo_proof import Proof
    from ksi.transport.errors import Unavailable

    session_id = play.scenes[-1].session_id
    pid = _pid_of(var, "sessions")
    os.kill(pid, signal.SIGSTOP)
    try:
        answered = True
        try:
            watcher.ask("session:get", session_id=session_id, timeout_s=SILENT_S)
        except Unavailable:
            answered = False
        begun_s = time.perf_counter()
        page = watcher.read("session:history", session_id=session_id, limit=1000)
        spent_us = (time.perf_counter() - begun_s) * 1e6
    finally:
        os.kill(pid, signal.SIGCONT)
    expected = list(files[session_id])[-1000:]
    seen = (
        f"with the owner stopped (SIGSTOP): no answer to an ask in {SILENT_S * 1000:.0f} ms, "
        f"{len(page['entries'])} entries read in {spent_us:.0f} us"
    )
    return Proof("a read asks nobody", not answered and page["entries"] == expected, seen)


def _processes(var: Path, supervisor: int) -> dict[int, int]:
    """Return all processes of the system, each with a descriptor that tells its end."""
    pids = [supervisor, *filter(None, _children(var).values())]
    return {pid: os.pidfd_open(pid) for pid in pids}


def _gone(pids: dict[int, int]) -> Proof:
    """See that no process has outlived the stop."""
    from ksi.console.demo_proof import Proof

    left = [pid for pid, pidfd in pids.items() if not select.select([pidfd], [], [], 1.0)[0]]
    for pidfd in pids.values():
        os.close(pidfd)
    seen = f"{len(pids) - len(left)} of {len(pids)} processes ended with the stop"
    return Proof("nothing is left running", not left, seen)
