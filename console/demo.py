"""`ksi demo`: the main job of KSI on real work, with an owner killed in the middle of it.

Four agent processes hold a conversation in sessions of a system of their own, in a temporary
directory; they call each other over the bus and share a queue of requests that two workers answer.
A worker is killed with -9 over a request, and when half has been said the owner of the sessions.
Then what was promised is proven from what the agents were told and what is on disk.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json, show_table

if TYPE_CHECKING:
    from ksi.console.demo_agent import Acked
    from ksi.console.demo_play import Play, Scene
    from ksi.console.demo_proof import Proof, Stored
    from ksi.console.demo_stage import Cast
    from ksi.transport import Client
    from ksi.transport.errors import KsiError

FILES_S_MAX: Final = 1.0  # The promise: a session file has an entry this long after its reply.
SILENT_S: Final = 0.2  # How long the stopped owner is asked in vain.
GONE_S_MAX: Final = 5.0
INDEX_S_MAX: Final = 10.0
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
@click.option(
    "--with-model", is_flag=True, help="Install a small language model first, if it is not here."
)
@click.pass_obj
def demo(options: Options, logs: Path | None, with_model: bool) -> int:
    """Show what KSI does, on a system of its own, and prove what it promises.

    Four agent processes talk in sessions, over the bus and through the completion queue. A worker
    and an owner are killed with -9 in the middle, and everything acknowledged must be there, once
    and in order, also in the index. Requests are answered by the provider echo, and one by a real
    language model where that is installed. It takes some seconds, uses a temporary directory and
    leaves nothing behind. Exit codes: 0 all proven, 1 something was not.
    """
    from ksi.console import demo_model as model
    from ksi.console import demo_stage as stage
    from ksi.console.demo_play import from_logs, shipped

    if with_model:
        model.install(stage.say)
    begun_s = time.monotonic()
    play = shipped() if logs is None else from_logs(logs)
    with stage.directory() as var:
        proofs, shown = _perform(options, var, play)
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


def _perform(options: Options, var: Path, play: Play) -> tuple[list[Proof], dict[str, Any]]:
    """Play everything on `var`; return the proofs, and the figures that were seen."""
    from ksi.actors.reading import log_directory
    from ksi.console import demo_model as model
    from ksi.console import demo_proof as prove
    from ksi.console import demo_stage as stage
    from ksi.console.demo_agent import KILLED
    from ksi.transport import Client

    with stage.system(var) as started, Client("watcher", var=var) as watcher:
        watcher.ask("session:create", session_id=play.desk, title="the desk", admission="open")
        with stage.workers(var) as workers, stage.cast(var, play) as players:
            missed = _kill_a_worker(watcher, workers, players)
            players.wait_until("the middle", lambda: 2 * _said(watcher, play) >= play.turns)
            killed_s, recovered_s = _kill(var, watcher, play.scenes[0])
            watcher.ask("state:set", key=KILLED, value=True)
            status = _status(options, var)
            acked, told = players.finish()
        stage.say(f"the play is over: {len(acked)} entries were acknowledged to four processes")
        asked = 2 * sum(len(each.outcomes) for each in told)
        late_s = _await_files(log_directory(var), acked, {play.desk: asked})
        everything = prove.stored(log_directory(var))
        report = _verify_index(var, watcher, everything)
        files = {name: lines for name, lines in everything.items() if name != play.desk}
        proofs = [
            prove.all_stored(acked, files),
            prove.exactly_once(acked, files),
            prove.order_kept(play, acked, files),
            prove.survived(acked, killed_s, recovered_s),
            *_one_writer(var, play),
            _read_while_stopped(var, watcher, play, files),
            prove.heard(play, told),
            prove.answered(told, everything.get(play.desk, ()), missed),
            prove.indexed(report, everything),
        ]
        if model.is_installed():
            spoken = model.speak(var, watcher, stage.say)
        else:
            spoken = None
            stage.say("the provider echo spoke, which repeats; ksi demo --with-model has a model")
        ends = _ends_of(started["pid"])
    proofs.append(_gone(ends))
    return proofs, {
        "agents": len(players),
        "sessions": len(play.scenes),
        "turns": play.turns,
        "skipped_lines": play.skipped,
        "start_s": started["seconds"],
        "acknowledged": len(acked),
        "stored": sum(map(len, files.values())),
        "answered": asked // 2,
        "provider": "echo" if spoken is None else "local",
        "model": spoken,
        "indexed": report["rows"],
        "recover_ms": round(recovered_s * 1000, 1),
        "files_late_ms": round(late_s * 1000, 1),
        "status": status,
    }


def _said(watcher: Client, play: Play) -> int:
    """Return how many turns have been said; nobody is asked, the sessions are read."""
    from ksi.transport.errors import NotFound

    said = 0
    for scene in play.scenes:
        try:
            said += watcher.read("session:get", session_id=scene.session_id)["seq"]
        except NotFound:  # its turn has not come
            break
    return said


def _kill(var: Path, watcher: Client, scene: Scene) -> tuple[float, float]:
    """Kill the owner of the sessions; return when it was, and the seconds to its next reply."""
    from ksi.console import demo_stage as stage

    watcher.ask("session:get", session_id=scene.session_id)  # connected, as an agent would be
    pid = stage.children(var)["sessions"]
    pidfd = os.pidfd_open(pid)
    killed_s = time.monotonic()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [], GONE_S_MAX)  # it is gone: whoever answers is another
    os.close(pidfd)
    watcher.ask("session:get", session_id=scene.session_id)
    recovered_s = time.monotonic() - killed_s
    ms = f"{recovered_s * 1e3:.1f} ms"
    stage.say(f"kill -9 {pid}, the owner of the sessions; the next reply came {ms} later")
    return killed_s, recovered_s


def _kill_a_worker(
    watcher: Client, workers: dict[str, subprocess.Popen[bytes]], players: Cast
) -> str:
    """Kill a worker over what it is just answering; return the id of that request."""
    from ksi.console import demo_stage as stage

    caught: list[dict[str, Any]] = []

    def holds() -> bool:
        for each in watcher.read("completion:list", status="active")["requests"]:
            worker = workers[each["worker"]]
            worker.send_signal(signal.SIGSTOP)  # Else it may answer before it is killed.
            os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
            for _ in range(2):  # The owner has heard what was on its way to it.
                active = watcher.ask("completion:list", status="active")["requests"]
            if each["request_id"] in [other["request_id"] for other in active]:
                caught.append(each)
                return True
            worker.send_signal(signal.SIGCONT)
        return False

    players.wait_until("a request that is worked on", holds)
    (held,) = caught
    workers[held["worker"]].kill()
    stage.say(f"kill -9 of the worker {held['worker']}, which answers {held['request_id']}")
    request_id: str = held["request_id"]
    return request_id


def _verify_index(var: Path, watcher: Client, files: Stored) -> Mapping[str, Any]:
    """Compare the index with the files, once it has come as far; return what was found."""
    from ksi.actors.followers.indexed import Verification

    lines = sum(map(len, files.values()))
    until_s = time.monotonic() + INDEX_S_MAX
    while watcher.read("index:status")["rows"] < lines and time.monotonic() < until_s:
        time.sleep(LOOK_S)  # A poll with a deadline.
    verification = Verification(var)
    while verification.turn():
        pass
    return verification.report()


def _status(options: Options, var: Path) -> Any:
    """Show what `ksi status` says, as anybody would see it; with `--json`, return it."""
    words = [sys.executable, "-P", "-m", "ksi.console", "status", "--var", str(var)]
    if options.json:
        done = subprocess.run([*words, "--json"], capture_output=True, check=False)
        return json.loads(done.stdout)
    print("\n$ ksi status", flush=True)
    subprocess.run(words, check=False)
    print(flush=True)
    return None


def _await_files(directory: Path, acked: list[Acked], more: Mapping[str, int]) -> float:
    """Wait for the session files, at most as long as promised; return how long it was.

    `more`: lines that other sessions must have.
    """
    last = {each.session_id: each.seq for each in acked} | dict(more)
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < FILES_S_MAX:
        lines = {path.stem: path.read_bytes().count(b"\n") for path in directory.glob("*.jsonl")}
        if all(lines.get(session_id, 0) >= seq for session_id, seq in last.items()):
            break
        time.sleep(LOOK_S)  # A poll with a deadline.
    return time.monotonic() - begun_s


def _one_writer(var: Path, play: Play) -> list[Proof]:
    """Try to write a session as a stranger, and as its former owner."""
    from ksi.console.demo_proof import Proof
    from ksi.transport import Client

    scene = play.scenes[0]
    heir = next(name for name in play.notes if name != scene.owner)
    with Client("mallory", var=var) as mallory, Client(scene.owner, var=var) as owner:
        stranger = _refusal(mallory, scene)
        owner.ask("session:transfer", session_id=scene.session_id, to_agent=heir)
        former = _refusal(owner, scene, epoch=1)
    return [
        Proof(promise, _names(refused, code, writer), _short(refused, scene))
        for promise, refused, code, writer in (
            ("a second writer is refused by name", stranger, "not_owner", scene.owner),
            ("so is a former owner", former, "stale_epoch", heir),
        )
    ]


def _refusal(client: Client, scene: Scene, **more: Any) -> KsiError | None:
    """Return how an entry of this client is refused, None if it is not."""
    from ksi.transport.errors import KsiError

    try:
        client.ask("session:append", session_id=scene.session_id, event="note", **more)
    except KsiError as refused:
        return refused
    return None


def _names(refused: KsiError | None, code: str, writer: str) -> bool:
    return refused is not None and refused.code == code and refused.details["owner"] == writer


def _short(refused: KsiError | None, scene: Scene) -> str:
    """Return what was answered, with the session named as people do."""
    return str(refused).replace(scene.session_id, scene.title) if refused else "it was accepted"


def _read_while_stopped(var: Path, watcher: Client, play: Play, files: Stored) -> Proof:
    """Stop the owner by a signal, ask it in vain, and read all the same."""
    from ksi.console import demo_stage as stage
    from ksi.console.demo_proof import Proof
    from ksi.transport.errors import Unavailable

    session_id = play.scenes[-1].session_id
    pid = stage.children(var)["sessions"]
    os.kill(pid, signal.SIGSTOP)
    try:
        answered = True
        try:
            watcher.ask("session:get", session_id=session_id, timeout_s=SILENT_S)
        except Unavailable:
            answered = False
        begun_s = time.perf_counter()
        page = watcher.read("session:history", session_id=session_id, limit=1000)
        spent_ms = (time.perf_counter() - begun_s) * 1000
    finally:
        os.kill(pid, signal.SIGCONT)
    seen = (
        f"with the owner stopped (SIGSTOP): no answer to an ask in {SILENT_S * 1000:.0f} ms, "
        f"{len(page['entries'])} entries read in {spent_ms:.1f} ms"
    )
    same = page["entries"] == list(files[session_id])[-1000:]
    return Proof("a read asks nobody", same and not answered, seen)


def _ends_of(supervisor: int) -> dict[int, int]:
    """Return every process of the system with a descriptor that tells its end."""
    import psutil

    below = psutil.Process(supervisor).children(recursive=True)
    return {pid: os.pidfd_open(pid) for pid in (supervisor, *(each.pid for each in below))}


def _gone(ends: dict[int, int]) -> Proof:
    """See that no process has outlived the stop."""
    from ksi.console.demo_proof import Proof

    left = [pid for pid, pidfd in ends.items() if not select.select([pidfd], [], [], 1.0)[0]]
    for pidfd in ends.values():
        os.close(pidfd)
    seen = f"{len(ends) - len(left)} of {len(ends)} processes ended with the stop"
    return Proof("nothing is left running", not left, seen)
