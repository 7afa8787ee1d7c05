"""The archive: closed sessions compressed, verified, found as before, whole whatever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import zstandard
from crashing import in_child, killed_at_each_step
from system import System
from trouble import until

from ksi.actors.checkup import Checkup
from ksi.actors.declarations.sessions import GetHistory
from ksi.actors.followers.files import LogFollower
from ksi.actors.followers.indexed import Verification
from ksi.actors.owners import OWNERS
from ksi.actors.reading import reader_of
from ksi.actors.supervision.lock import holder
from ksi.console.main import main
from ksi.storage.archive import Archive
from ksi.storage.errors import Corrupt
from ksi.storage.examination import lock_holder
from ksi.storage.files import LogWriter, read_lines, read_log
from ksi.transport.errors import Conflict, Forbidden, NotFound

LINES = b"".join(b'{"n": %d, "text": "closed"}\n' % number for number in range(5000))


def nothing() -> None:
    pass


def stored(tmp_path: Path, content: bytes = LINES) -> Archive:
    archive = Archive(tmp_path / "archive")
    (tmp_path / "a.jsonl").write_bytes(content)
    archive.store("a", tmp_path / "a.jsonl", len(content), nothing)
    archive.sync()
    return archive


def test_what_was_archived_is_read_as_it_was(tmp_path: Path) -> None:
    archive = stored(tmp_path)
    assert archive.size("a") == len(LINES)
    assert archive.path("a").stat().st_size < len(LINES) / 5
    assert archive.path("a").stat().st_mode & 0o777 == 0o600
    assert b"".join(archive.chunks("a")) == LINES
    assert archive.read("a", 100, 70_000) == LINES[100:70_000]
    assert archive.read("a", len(LINES) - 3, len(LINES) + 3) == LINES[-3:]
    assert (archive.size("b"), archive.read("b", 0, 1), list(archive.logs())) == (None, None, ["a"])

    gone = tmp_path / "logs"
    assert read_log(gone, "a", 5, 9, archive) == LINES[5:9]
    assert b"".join(b"".join(some) for some in read_lines(gone, "a", 2700, archive)) in LINES
    assert sum(map(len, read_lines(gone, "a", len(LINES), archive))) == 5000


@pytest.mark.parametrize("size", [len(LINES) - 1, len(LINES) + 1, 0])
def test_a_log_of_another_length_than_was_committed_is_not_archived(
    tmp_path: Path, size: int
) -> None:
    archive = Archive(tmp_path / "archive")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(Corrupt):
        archive.store("a", tmp_path / "a.jsonl", size, nothing)
    assert os.listdir(tmp_path / "archive") == []


def test_an_archive_that_was_not_written_as_meant_is_found_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def damage(fd: int) -> None:
        real(fd)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp"):
            os.pwrite(fd, b"\xff\xff", os.fstat(fd).st_size // 2)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(Corrupt):
        stored(tmp_path)
    assert os.listdir(tmp_path / "archive") == []


def test_an_archive_of_something_else_is_found_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = zstandard.compress(LINES.replace(b"closed", b"opened", 1))
    real = os.fsync

    def replace(fd: int) -> None:
        real(fd)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp"):
            os.ftruncate(fd, 0)
            os.pwrite(fd, other, 0)

    monkeypatch.setattr(os, "fsync", replace)
    with pytest.raises(Corrupt, match="does not read back as it was"):
        stored(tmp_path)
    assert os.listdir(tmp_path / "archive") == []


def test_damage_to_an_archive_is_found_when_it_is_read(tmp_path: Path) -> None:
    archive = stored(tmp_path)
    content = archive.path("a").read_bytes()
    half = len(content) // 2
    changed = content[:half] + b"\0" + content[half:]
    for damaged in (content[:-1], content[:-9], content[:half], changed, b"text", b""):
        archive.path("a").write_bytes(damaged)
        with pytest.raises(Corrupt):
            list(archive.chunks("a"))
        found = b"".join(map(b"".join, read_lines(tmp_path / "none", "a", len(LINES), archive)))
        assert found in LINES


def test_a_removed_log_is_gone_and_can_be_written_anew(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path)
    writer.write("a", 0, b"one\n")
    writer.remove("a")
    writer.remove("a")
    assert (writer.size("a"), list(tmp_path.iterdir())) == (0, [])
    writer.write("a", 0, b"two\n")
    writer.close()
    assert read_log(tmp_path, "a", 0, 9) == b"two\n"


# In a system


@pytest.fixture
def said(system: System) -> System:
    """A system with two sessions that are closed and one that only speaks of it."""
    with system.client("alice") as alice:
        for session_id in ("done", "over", "open"):
            alice.ask("session:create", session_id=session_id)
            for number in range(70):
                data = {"n": number, "text": "this session is closed and archived"}
                alice.ask("session:append", session_id=session_id, event="note", data=data)
        alice.ask("session:close", session_id="done")
        alice.ask("session:close", session_id="over")
    return system


def typed(system: System, *words: str) -> int:
    return main(["--var", str(system.var), *words])


def history(system: System, session_id: str) -> list[Any]:
    with system.client("alice") as alice:
        page = alice.read("session:history", session_id=session_id, after=0, limit=1000)
        assert page == alice.ask("session:history", session_id=session_id, after=0, limit=1000)
        return list(page["entries"])


def archived(system: System, session_id: str) -> Path:
    return system.var / "archive" / "sessions" / f"{session_id}.jsonl.zst"


def indexed(system: System) -> int:
    """Return how many rows the index has, each compared with its line."""
    verification = Verification(system.var)
    while verification.turn():
        pass
    assert verification.found == []
    return verification.rows


def test_what_is_closed_is_archived_and_read_and_found_as_before(
    said: System, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: history(said, name) for name in ("done", "over", "open")}
    content = said.file("done").read_bytes() if said.file("done").exists() else b""
    until(lambda: indexed(said) == 210)
    content = said.file("done").read_bytes()
    assert typed(said, "--json", "archive", "run") == 0
    assert json.loads(capsys.readouterr().out)["sessions"] == ["done", "over"]

    assert [said.file(name).exists() for name in before] == [False, False, True]
    assert {name: history(said, name) for name in before} == before
    assert indexed(said) == 210
    assert typed(said, "archive", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["sessions"]
    assert [each["session_id"] for each in listed] == ["done", "over"]
    assert listed[0]["size_bytes"] == len(content) > listed[0]["archived_bytes"] > 0
    assert [each.name for each in Checkup(said.var).run() if each.state != "ok"] == []

    assert typed(said, "archive", "run") == 0  # There is nothing left to do.
    assert typed(said, "archive", "restore", "done") == 0
    assert said.file("done").read_bytes() == content
    assert not archived(said, "done").exists()
    assert history(said, "done") == before["done"]


def test_damage_to_an_archive_is_told_by_the_doctor_and_stops_nobody(said: System) -> None:
    assert typed(said, "archive", "run") == 0
    content = archived(said, "done").read_bytes()
    archived(said, "done").write_bytes(content[:-20])
    checks = {each.name: each for each in Checkup(said.var).run()}
    assert checks["archive"].state == "wrong"
    assert "done.jsonl.zst is damaged" in checks["archive"].findings[0].text

    assert typed(said, "index", "rebuild") == 0
    with said.client("operator", role="operator") as operator:
        operator.ask("session:unarchive", session_ids=["done", "over"])
    until(lambda: said.file("over").exists() and not archived(said, "over").exists())
    assert archived(said, "done").exists()
    archived(said, "done").write_bytes(content)
    assert len(history(said, "done")) == 70


def test_the_index_is_built_again_from_the_archive(said: System) -> None:
    assert typed(said, "archive", "run") == 0
    assert typed(said, "index", "rebuild") == 0
    assert indexed(said) == 210


def test_only_an_operator_archives_and_only_what_is_closed(said: System) -> None:
    with said.client("alice") as alice, pytest.raises(Forbidden):
        alice.ask("session:archive", session_ids=["done"])
    with said.client("operator", role="operator") as operator:
        with pytest.raises(Conflict, match="open is not closed"):
            operator.ask("session:archive", session_ids=["done", "open"])
        with pytest.raises(NotFound):
            operator.ask("session:unarchive", session_ids=["none"])
        assert operator.ask("session:archived") == {"sessions": [], "next": None}


def test_a_follower_that_forgot_how_far_it_was_comes_to_the_same(said: System) -> None:
    before = history(said, "done")
    assert typed(said, "archive", "run", "done") == 0
    said.stop()
    (said.var / "db" / "files" / "sessions.cursor").unlink()
    said.start()
    until(lambda: archived(said, "done").exists() and not said.file("done").exists())

    assert history(said, "done") == before
    assert [each.name for each in Checkup(said.var).run() if each.state != "ok"] == []


def test_a_file_that_is_missing_and_was_never_archived_is_still_written_again(said: System) -> None:
    until(lambda: indexed(said) == 210)
    content = said.file("open").read_bytes()
    said.stop()
    archived(said, "open").parent.mkdir(parents=True)
    Archive(archived(said, "open").parent).store("open", said.file("open"), len(content), nothing)
    said.file("open").unlink()  # As after a restore to before it was archived.
    said.start()
    with said.client("alice") as alice:
        alice.ask("session:append", session_id="open", event="note", data={"n": "more"})

    until(lambda: said.file("open").exists() and said.file("open").stat().st_size > len(content))
    assert said.file("open").read_bytes().startswith(content)
    assert len(history(said, "open")) == 71


class Recorder:
    def warning(self, *_words: Any, **_fields: Any) -> None: ...
    def error(self, *_words: Any, **_fields: Any) -> None: ...


def test_killed_at_any_step_it_resumes_and_nothing_is_lost(said: System, in_memory: Path) -> None:
    before = {name: history(said, name) for name in ("done", "over")}
    said.kill("files", signal.SIGSTOP)  # So that all of it is left to do.
    with said.client("operator", role="operator") as operator:
        operator.ask("session:archive", session_ids=["over"])
        operator.ask("session:unarchive", session_ids=["over"])
        operator.ask("session:archive", session_ids=["done", "over"])
    held = holder(said.var)
    assert held is not None
    os.kill(held.pid, signal.SIGKILL)
    until(lambda: not any(lock_holder(said.var / "db" / owner) for owner in OWNERS))
    var = in_memory / "var"

    def follow() -> None:
        follower = LogFollower("sessions", var, Recorder())
        while follower.turn() or follower.idle():
            pass
        follower.close()

    def check() -> None:
        reader = reader_of("sessions", var)
        for name, entries in before.items():
            query = GetHistory(session_id=name, after=0, limit=1000)
            assert reader.answer(query).entries == entries

    def begin() -> None:
        shutil.rmtree(var, ignore_errors=True)
        shutil.copytree(said.var, var, ignore=shutil.ignore_patterns("run", "index", "keys"))

    begin()
    killed = 0
    for step in killed_at_each_step(follow, runs=25):
        assert in_child(check) == 0
        assert in_child(follow) == 0
        assert in_child(check) == 0
        names = sorted(os.listdir(var / "archive" / "sessions"))
        assert names == ["done.jsonl.zst", "over.jsonl.zst"]
        assert os.listdir(var / "logs/responses/sessions") == ["open.jsonl"]
        killed += step > 0
        begin()
    assert killed >= 20


def test_a_long_log_is_compressed_without_hanging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.storage.archive._CHUNK_BYTES", 1 << 10)
    alive = []
    (tmp_path / "a.jsonl").write_bytes(LINES)
    archive = Archive(tmp_path / "archive")
    archive.store("a", tmp_path / "a.jsonl", len(LINES), lambda: alive.append(1))
    assert len(alive) > len(LINES) / (1 << 10)
