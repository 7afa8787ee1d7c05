"""Atomic files: whole or absent, whoever is killed when."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from crashing import fork_to, kill, killed_at_each_step

from ksi.storage.atomic import make_directory, write_all, write_atomically


def test_a_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"former", mode=0o644)
    write_atomically(path, b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_is_synced_before_the_rename_and_the_directory_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(fd: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).suffix or 'directory'}")
        fsync(fd)

    def record_rename(source: Path, target: Path) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)

    write_atomically(tmp_path / "file", b"content")

    assert calls == ["fsync .tmp", "rename", "fsync directory"]


def test_a_writer_killed_at_any_step_leaves_the_former_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    found = set()

    for _ in killed_at_each_step(lambda: write_atomically(path, b"new" * 9999), runs=50):
        found.add(path.read_bytes()[:6])
        path.write_bytes(b"former")

    assert found == {b"former", b"newnew"}


def test_readers_of_a_file_that_is_written_all_the_time_find_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"0" * 50_000)

    def write_on() -> None:
        while True:
            write_atomically(path, random.choice(b"abc").to_bytes(1, "big") * 50_000)

    writer = fork_to(write_on)
    try:
        for _ in range(300):
            content = path.read_bytes()
            assert len(content) == 50_000
            assert len(set(content)) == 1
    finally:
        kill(writer)


def test_a_write_that_fails_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "taken", b"content")

    assert os.listdir(tmp_path) == ["taken"]


def test_a_symlink_in_the_place_of_the_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"untouched")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")

    write_atomically(tmp_path / "file", b"content")

    assert (tmp_path / "elsewhere").read_bytes() == b"untouched"
    assert not (tmp_path / "file").is_symlink()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: pwrite(fd, content[:3], at))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)

    write_all(fd, b"0123456789", 2)

    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\0\0" + b"0123456789"


def test_directories_are_made_with_their_parents_for_us_alone(tmp_path: Path) -> None:
    for _ in range(2):
        make_directory(tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_directory(tmp_path / "file")
