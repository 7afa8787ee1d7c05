"""Trouble from below: files that were changed, disks that are full, two at once, kills anywhere.

Each ends in a clear refusal or a repair, and nothing that was acknowledged is lost.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from system import System
from trouble import (
    COMMANDS,
    CREATE,
    GOODBYE,
    Stranger,
    entries,
    kill,
    kill_all,
    living,
    paused,
    rows,
    until,
)

from ksi.actors.owners.sessions import Sessions
from ksi.actors.supervision.launch import start_background
from ksi.actors.supervision.lock import holder
from ksi.actors.testing import Twin
from ksi.storage.errors import NewerFormat
from ksi.transport import Client
from ksi.transport.errors import Conflict, Forbidden, Invalid, KsiError, NotOwner, StorageFull
from ksi.transport.limits import ROOM_CHECK_S

OWNERS = ("sessions", "registry", "files")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("trouble") / "var")
    yield running
    running.end()


def note(client: Client, session_id: str, n: int = 0, **more: Any) -> dict[str, Any]:
    return client.ask("session:append", session_id=session_id, event="n", data={"n": n}, **more)


def noted(system: System, session_id: str) -> list[int]:
    return [entry["data"]["n"] for entry in entries(system, session_id)]


def lines(system: System, session_id: str) -> list[bytes]:
    file = system.file(session_id)
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def written(system: System, session_id: str, count: int) -> list[bytes]:
    """Wait until a session file holds so many whole lines, and return them."""

    def whole() -> bool:
        found = lines(system, session_id)
        return len(found) == count and all(
            line.startswith(b"{") and line.endswith(b"}\n") for line in found
        )

    until(whole)
    return lines(system, session_id)


# Session files


def tear(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b'{"event": "forged", "data": "' + b"x" * 5000)


DAMAGES: list[Callable[[Path], None]] = [tear, truncate, empty, lengthen, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_file_that_was_changed_is_mended_by_the_next_append(
    system: System, alice: Client, damage: Callable[[Path], None]
) -> None:
    session = alice.ask("session:create")["session_id"]
    for n in range(5):
        note(alice, session, n)
    before = written(system, session, 5)

    damage(system.file(session))
    assert noted(system, session) == list(range(5))
    note(alice, session, 5)

    assert written(system, session, 6)[:5] == before


def test_files_that_were_changed_are_mended_at_the_next_start(
    system: System, alice: Client
) -> None:
    sessions = [str(alice.ask("session:create")["session_id"]) for _ in DAMAGES]
    for session in sessions:
        for n in range(5):
            note(alice, session, n)
    before = [written(system, session, 5) for session in sessions]
    system.stop()
    for session, damage in zip(sessions, DAMAGES, strict=True):
        damage(system.file(session))
        assert noted(system, session) == list(range(5)), damage
    system.start()

    assert [written(system, session, 5) for session in sessions] == before


def test_what_is_acknowledged_until_the_last_moment_of_a_stop_is_in_its_file(
    tmp_path: Path,
) -> None:
    system = System(tmp_path / "var")
    acknowledged: list[int] = []

    def append() -> None:
        with system.client("alice") as client:
            client.ask("session:create", session_id="s")
            with suppress(KsiError):
                while True:
                    ack = note(client, "s", len(acknowledged), timeout_s=1.0)
                    acknowledged.append(ack["seq"])

    with ThreadPoolExecutor(1) as pool:
        appending = pool.submit(append)
        try:
            until(lambda: len(acknowledged) > 200)
        finally:
            system.stop()
        appending.result()
    lines = system.file("s").read_bytes().splitlines()
    assert len(lines) >= len(acknowledged)  # One more may have been stored and not answered.


@pytest.mark.parametrize("kind", ["a symlink", "a directory"])
def test_what_stands_in_the_place_of_a_file_is_left_alone_and_keeps_no_other_from_being_written(
    system: System, alice: Client, tmp_path: Path, kind: str
) -> None:
    blocked, other = (str(alice.ask("session:create")["session_id"]) for _ in range(2))
    file, target = system.file(blocked), tmp_path / "target"
    if kind == "a symlink":
        file.symlink_to(target)
    else:
        file.mkdir()
    pid = living(system, "files")

    for n in range(3):
        note(alice, blocked, n)
        note(alice, other, n)
    written(system, other, 3)
    assert noted(system, blocked) == [0, 1, 2]
    assert living(system, "files") == pid
    assert not target.exists()

    file.rmdir() if kind == "a directory" else file.unlink()
    note(alice, blocked, 3)
    written(system, blocked, 4)


# Owners that are killed, stopped and started


def test_a_stored_answer_outlives_its_owner_until_goodbye(system: System) -> None:
    with Stranger(system.var, "patient") as peer:
        first = peer.ask(COMMANDS, [CREATE])
        for _ in range(3):
            kill(system)
            peer.socket.close(0)
            peer.socket = peer.connected(peer.certificate.public, peer.certificate.secret)
            assert peer.ask(COMMANDS, [CREATE], again=True) == first
        peer.ask(GOODBYE, [])
        assert peer.ask(COMMANDS, [CREATE]) != first


def test_messages_to_another_owner_arrive_however_often_both_are_killed(tmp_path: Path) -> None:
    """The registry tells the sessions of each heartbeat, through its outbox."""
    running = System(tmp_path / "var")
    try:
        with running.client("alive") as client:
            client.ask("agent:register", agent_id="alive")
            client.ask("session:create", lease_s=60.0)
            for owner in ("sessions", "registry", "sessions", "registry"):
                with paused(running):
                    for _ in range(20):
                        client.ask("agent:heartbeat", agent_id="alive")
                    kill(running, owner)
                client.ask("agent:heartbeat", agent_id="alive", timeout_s=20.0)
                client.ask("session:list", limit=1, timeout_s=20.0)

        until(lambda: not rows(running, "registry", "ksi.outbox"))
        assert rows(running, "sessions", "seen") == ["alive"]
    finally:
        running.end()


def test_a_loaded_system_stops_in_time_and_loses_nothing(tmp_path: Path) -> None:
    running = System(tmp_path / "var")
    with running.client("alive") as client:
        session = client.ask("session:create")["session_id"]
    load = [load_process(running, f"load-{number}", session) for number in range(3)]
    try:
        for process in load:
            assert process.stdout is not None
            process.stdout.readline()
        began_s = time.monotonic()
        running.stop()
        assert time.monotonic() - began_s < 3.0
    finally:
        for process in load:
            process.kill()
            process.communicate()
        running.end()
    found = entries(running, session)
    assert [entry["metadata"]["seq"] for entry in found] == list(range(1, len(found) + 1))
    log = (running.var / "logs/ksi/supervisor.jsonl").read_text()
    assert "SIGKILL" not in log


LOAD = """
import asyncio, sys
from ksi.transport import AsyncClient
async def caller(client, session):
    while True:
        await client.ask("session:contribute", session_id=session, event="n", timeout_s=60)
async def main(var, name, session):
    client = AsyncClient(name, var=var)
    await client.ask("session:contribute", session_id=session, event="n")
    print("loading", flush=True)
    await asyncio.gather(*(caller(client, session) for _ in range(1000)))
asyncio.run(main(*sys.argv[1:]))
"""


def load_process(system: System, name: str, session: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", LOAD, str(system.var), name, session]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_clock_on_the_wall_may_jump_and_no_lease_lapses_or_comes_back() -> None:
    twin = Twin(Sessions())
    twin.ask("alice", "session:create", session_id="s", lease_s=60.0)
    for jump_s in (-86_400.0, 40 * 86_400.0, -90 * 86_400.0):
        twin.now += jump_s
        twin.run([], tick=True)
        with pytest.raises(NotOwner):
            twin.ask("bob", "session:claim", session_id="s")
        twin.ask("alice", "session:append", session_id="s", event="n")
    twin.pass_time(61.0)

    assert twin.ask("bob", "session:claim", session_id="s").epoch == 2
    assert [
        entry["metadata"]["seq"] for entry in twin.read("session:history", session_id="s").entries
    ] == [1, 2, 3]


# A var that cannot be used


def test_a_second_supervisor_is_refused_by_name_and_the_first_goes_on(
    system: System, alice: Client
) -> None:
    held = holder(system.var)
    assert held is not None
    pids = {name: living(system, name) for name in OWNERS}
    for _ in range(3):
        with pytest.raises(Conflict, match=f"pid {held.pid}"):
            start_background(system.var)

    assert alice.ask("session:create")
    assert {name: living(system, name) for name in OWNERS} == pids


def test_a_newer_format_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    running = System(tmp_path / "var")
    with running.client("alice") as alice:
        session = alice.ask("session:create")["session_id"]
        note(alice, session, 1)
    running.stop()
    present = (running.var / "FORMAT").read_text()
    (running.var / "FORMAT").write_text("ksi 999\n")
    before = snapshot(running.var)

    with pytest.raises(NewerFormat):
        start_background(running.var)

    assert snapshot(running.var) == before
    (running.var / "FORMAT").write_text(present)
    try:
        running.start()
        assert noted(running, session) == [1]
    finally:
        running.end()


def snapshot(directory: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of the last change of all that is below."""
    found = [(path, path.lstat()) for path in directory.rglob("*")]
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found}


@contextmanager
def mounted(path: Path, size: str) -> Iterator[Path]:
    """A disk of its own, in memory. Skips the test where nobody may mount one."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def remounted(disk: Path, how: str) -> bool:
    command = ["mount", "-o", f"remount,{how}", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_var_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "16m") as disk:
        var = disk / "var"
        running = System(var)
        with running.client("alice") as alice:
            session = alice.ask("session:create")["session_id"]
            note(alice, session, 1)
        running.stop()
        until(lambda: remounted(disk, "ro"))  # Once the last process has closed its log.
        try:
            with pytest.raises(Invalid, match="cannot be used: Read-only"):
                start_background(var)
            with pytest.raises(Forbidden, match="cannot be enrolled"):
                Client("newcomer", var=var)
        finally:
            assert remounted(disk, "rw")
        running.start()
        try:
            assert noted(running, session) == [1]
        finally:
            running.end()


# A disk that is full


class FullDisk:
    """A system on a small disk that can be filled to the last byte, and freed."""

    def __init__(self, disk: Path) -> None:
        self.system = System(disk / "var", (), **{"supervisor.intensity": 5})  # as it is by default
        self._ballast = disk / "ballast"
        self.system.client("reader").close()  # It is enrolled now: that needs room, too.

    def fill(self) -> None:
        until(self._filled)  # Who is at work gives room back now and then.
        time.sleep(2 * ROOM_CHECK_S)  # How old an answer to "is there room" may be.

    def _filled(self) -> bool:
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        size = 1 << 20
        while size:
            try:
                if os.write(descriptor, b"x" * size) < size:
                    size //= 2
            except OSError:
                size //= 2
        os.close(descriptor)
        return shutil.disk_usage(self._ballast).free == 0

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[FullDisk]:
    with mounted(tmp_path / "disk", "40m") as disk:
        made = FullDisk(disk)
        yield made
        made.system.end()


def test_on_a_full_disk_writing_is_refused_reading_goes_on_and_it_resumes_by_itself(
    full: FullDisk,
) -> None:
    fill_and_free(full, 3)


@pytest.mark.soak
def test_a_disk_that_is_filled_and_freed_a_hundred_times_loses_nothing(full: FullDisk) -> None:
    fill_and_free(full, 100)


def fill_and_free(full: FullDisk, rounds: int) -> None:
    system = full.system
    pids = {name: living(system, name) for name in OWNERS}
    with system.client("alice") as alice:
        session = alice.ask("session:create")["session_id"]
        count = 0
        for _ in range(rounds):
            note(alice, session, count)
            full.fill()
            with pytest.raises(StorageFull) as refused:
                note(alice, session, -1, timeout_s=1.0)
            alice.tell("session:append", session_id=session, event="n", data={"n": count + 1})
            assert noted(system, session) == list(range(count + 1))
            assert alice.ask("session:get", session_id=session)["seq"] == count + 1
            full.free()
            alice.flush()
            count += 2
        written(system, session, count)

    details = refused.value.details
    assert details["free_bytes"] < details["needed_bytes"]
    assert noted(system, session) == list(range(count))
    assert {name: living(system, name) for name in OWNERS} == pids
    print(f"{rounds} times full and freed")


def test_a_disk_that_fills_up_between_two_looks_loses_nothing(full: FullDisk) -> None:
    """Writes meet the end of the disk itself: in the journal, the view and the files."""
    system = full.system
    pid = living(system, "files")
    acked = 0
    with system.client("alice") as alice:
        session = alice.ask("session:create")["session_id"]
        for _ in range(8):
            with paused(system, "files"):
                for n in range(acked, acked + 8):
                    said = {"n": n, "text": "x" * 9000}
                    alice.ask("session:append", session_id=session, event="n", data=said)
                with paused(system):
                    for n in range(acked + 8, acked + 16):
                        said = {"n": n, "text": "x" * 9000}
                        alice.tell("session:append", session_id=session, event="n", data=said)
                    full.fill()
            time.sleep(0.3)  # Both go on, and there is no room for either.
            assert noted(system, session)[: acked + 8] == list(range(acked + 8))
            full.free()
            alice.flush(20.0)
            acked += 16
        written(system, session, acked)

    assert noted(system, session) == list(range(acked))
    assert living(system, "files") == pid


def test_what_ends_on_a_full_disk_starts_again_once_there_is_room(full: FullDisk) -> None:
    system = full.system
    with system.client("alice") as alice:
        session = alice.ask("session:create")["session_id"]
        note(alice, session, 1)
        full.fill()
        for name in OWNERS:
            kill(system, name)
        time.sleep(3.0)  # Longer than it takes to start six times and be given up.
        assert noted(system, session) == [1]
        with pytest.raises(KsiError):
            note(alice, session, -1, timeout_s=1.0)
        full.free()

        assert note(alice, session, 2, timeout_s=20.0)["seq"] == 2
        written(system, session, 2)
    kill_all(system)
    system.start()
    assert noted(system, session) == [1, 2]
