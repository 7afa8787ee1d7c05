"""Log files and the cursor of their follower: idempotent, without holes, and never outside."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from crashing import fork_to, in_child, kill

from ksi.storage import files
from ksi.storage.files import Cursor, LogGap, LogWriter, Mark, Marks, read_cursor, read_log
from ksi.storage.journal import START, Position
from ksi.transport.errors import Invalid, StorageFull


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_lines_are_put_where_they_belong_and_may_be_put_again(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "logs")
    writer.write("sess_1", 0, b"one\n")
    writer.write("sess_1", 4, b"two\n")
    writer.write("sess_1", 0, b"one\n")
    writer.write("sess_1", 4, b"two\nthree\n")
    writer.close()

    path = tmp_path / "logs" / "sess_1.jsonl"
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


def test_a_write_that_would_leave_a_hole_is_refused(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path)
    writer.write("a", 0, b"123")
    with pytest.raises(LogGap) as caught:
        writer.write("a", 4, b"5")
    with pytest.raises(LogGap):
        writer.write("new", 1, b"x")

    assert (caught.value.key, caught.value.size, caught.value.offset) == ("a", 3, 4)
    assert os.listdir(tmp_path) == ["a.jsonl"], "an empty file would hide one in the archive"
    assert read_log(tmp_path, "a", 0, 100) == b"123"
    writer.close()


def test_a_log_that_is_too_long_is_cut_and_one_that_is_short_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n":1}\n{"n":2}\n{"torn')
    writer = LogWriter(tmp_path)
    writer.truncate("a", 16)
    writer.truncate("a", 100)
    writer.truncate("none", 5)

    assert writer.size("a") == 16
    assert writer.size("none") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"n":1}\n{"n":2}\n'
    writer.write("a", 16, b'{"n":3}\n')
    writer.close()
    assert (tmp_path / "a.jsonl").read_bytes()[-8:] == b'{"n":3}\n'


def test_no_more_than_the_limit_of_files_is_open_and_all_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    writer = LogWriter(tmp_path, open_files_max=5)
    for offset in range(3):
        for key in range(20):
            writer.write(f"k{key}", offset, b"x")
            assert open_fds() <= before + 1 + 5
    synced = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    writer.sync()
    assert sorted(synced) == sorted(str(tmp_path / f"k{key}.jsonl") for key in range(20))
    synced.clear()
    writer.write("k3", 3, b"y")
    writer.sync()
    writer.sync()

    assert synced == [str(tmp_path / "k3.jsonl")]
    writer.close()
    assert open_fds() == before
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"xxx", b"xxxy"}


@pytest.mark.parametrize(
    "key", ["../up", "a/b", "", ".hidden", "a\0b", "k" * 129, "a\n", "\u00e9", "-a"]
)
def test_a_key_that_is_no_id_never_becomes_a_path(tmp_path: Path, key: str) -> None:
    writer = LogWriter(tmp_path / "logs")
    with pytest.raises(Invalid):
        writer.write(key, 0, b"x")
    with pytest.raises(Invalid):
        read_log(tmp_path / "logs", key, 0, 1)

    assert [path.name for path in tmp_path.rglob("*")] == ["logs"]
    writer.close()


def test_very_many_files_are_synced_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FILE_SYNCS_MAX", 3)
    calls: list[str] = []
    real_all, real_one = files._sync_file_system, os.fdatasync

    def noted(call: str, real: Callable[[int], None], fd: int) -> None:
        calls.append(call)
        real(fd)

    monkeypatch.setattr(files, "_sync_file_system", partial(noted, "all", real_all))
    monkeypatch.setattr(os, "fdatasync", partial(noted, "one", real_one))
    writer = LogWriter(tmp_path)
    for key in range(10):
        writer.write(f"k{key}", 0, b"line\n")
    writer.sync()
    assert calls == ["all"]

    writer.write("k1", 5, b"more\n")
    writer.sync()
    writer.sync()
    assert calls == ["all", "one"]


def test_a_sync_of_the_file_system_that_fails_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        files._sync_file_system(-1)


def test_a_symlink_in_the_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.jsonl").symlink_to(tmp_path / "secret")
    writer = LogWriter(logs)

    with pytest.raises(OSError, match="symbolic"):
        writer.write("a", 0, b"x")
    assert read_log(logs, "a", 0, 10) == b""
    assert (tmp_path / "secret").read_bytes() == b"secret"
    writer.close()
    (tmp_path / "link").symlink_to(logs)
    with pytest.raises(OSError, match="directory"):
        LogWriter(tmp_path / "link")


def test_without_room_a_write_is_refused_and_can_be_repeated(tmp_path: Path) -> None:
    def meet_the_limit() -> None:
        writer = LogWriter(tmp_path)
        writer.write("a", 0, b"x" * 1000)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, unlimited[1]))
        with pytest.raises(StorageFull):
            writer.write("a", 1000, b"y" * 1000)
        assert writer.size("a") == 1500
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        writer.write("a", 1000, b"y" * 1000)
        writer.close()

    assert in_child(meet_the_limit) == 0
    assert read_log(tmp_path, "a", 0, 5000) == b"x" * 1000 + b"y" * 1000


def test_a_part_of_a_log_is_read_as_far_as_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"0123456789")
    assert read_log(tmp_path, "a", 2, 5) == b"234"
    assert read_log(tmp_path, "a", 8, 20) == b"89"
    assert read_log(tmp_path, "a", 20, 30) == b""
    assert read_log(tmp_path, "b", 0, 10) == b""


def test_a_cursor_begins_nowhere_and_comes_back_to_where_it_was(tmp_path: Path) -> None:
    cursor = Cursor(tmp_path / "db" / "cursor")
    assert (cursor.store, cursor.written, cursor.synced) == ("", START, START)
    cursor.begin("store-1", Position(1, 0))
    cursor.advance(Position(1, 100))
    cursor.sync()
    cursor.advance(Position(7, 20))
    cursor.close()

    again = Cursor(tmp_path / "db" / "cursor")
    assert again.store == "store-1"
    assert again.written == Position(7, 20)
    assert again.synced == Position(1, 100)
    again.close()


def test_after_a_crash_of_the_machine_only_what_was_synced_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    cursor = Cursor(path, boot_id="one")
    cursor.begin("store-1", Position(1, 0))
    cursor.advance(Position(1, 100))
    cursor.sync()
    cursor.advance(Position(1, 500))
    cursor.close()

    synced = Mark("store-1", Position(1, 100))
    assert read_cursor(path, "one") == Marks(Mark("store-1", Position(1, 500)), synced)
    assert read_cursor(path, "two") == Marks(None, synced)
    again = Cursor(path, boot_id="two")
    assert again.written == again.synced == Position(1, 100)
    again.close()


def test_a_cursor_follows_another_store_from_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    cursor = Cursor(path)
    cursor.begin("store-1", Position(1, 0))
    cursor.advance(Position(9, 9))
    cursor.begin("store-2", Position(40, 0))
    cursor.close()

    again = Cursor(path)
    assert (again.store, again.written, again.synced) == (
        "store-2",
        Position(40, 0),
        Position(40, 0),
    )
    again.close()


@pytest.mark.parametrize("slot", [0, 512])
def test_a_torn_mark_is_not_believed(tmp_path: Path, slot: int) -> None:
    path = tmp_path / "cursor"
    cursor = Cursor(path, boot_id="one")
    cursor.begin("store-1", Position(1, 0))
    cursor.advance(Position(1, 500))
    cursor.close()
    content = path.read_bytes()
    for at in range(slot, slot + 60):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        marks = read_cursor(path, "one")
        assert (marks.written is None, marks.synced is None) == (slot == 0, slot == 512)

    path.write_bytes(content[: slot + 30])
    again = Cursor(path, boot_id="one")
    assert (again.store, again.written) == (
        ("store-1", Position(1, 0)) if slot else ("", START)
    ) or (slot == 512 and (again.store, again.written) == ("", START))
    again.close()
    assert read_cursor(tmp_path / "none", "one") == Marks(None, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_follower_killed_at_any_time_finds_in_the_files_what_its_cursor_says(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    lines = [(f"k{chance.randrange(5)}", b"%d\n" % number) for number in range(5000)]

    def follow() -> None:
        writer, cursor = LogWriter(tmp_path / "logs", open_files_max=3), Cursor(tmp_path / "cursor")
        cursor.begin("store", START)
        while cursor.written.offset < len(lines):
            key, line = lines[cursor.written.offset]
            writer.write(key, writer.size(key), line)
            cursor.advance(Position(1, cursor.written.offset + 1))
            os.write(told, b".")

    reader, told = os.pipe()
    follower = fork_to(follow)
    os.read(reader, 1)
    for _ in range(chance.randrange(50)):
        os.read(reader, 1)
    kill(follower)
    os.close(reader)
    os.close(told)

    cursor = Cursor(tmp_path / "cursor")
    assert cursor.written.offset > 0
    for key in {key for key, _ in lines}:
        promised = b"".join(line for each, line in lines[: cursor.written.offset] if each == key)
        found = read_log(tmp_path / "logs", key, 0, 1 << 20)
        assert found.startswith(promised)
        assert len(found) - len(promised) <= len(b"5000\n")
    cursor.close()
