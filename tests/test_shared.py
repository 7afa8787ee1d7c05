"""Files in folders of others: never outside, never over what somebody else has written."""

from __future__ import annotations

import os
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ksi.storage import shared
from ksi.storage.shared import Differs


def hash_of(content: bytes) -> str:
    return sha256(content).hexdigest()


def put(folder: Path, path: str, content: bytes | None, over: bytes | None = None) -> None:
    shared.replace(folder, path, content, None if over is None else hash_of(over))


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def test_a_file_is_made_replaced_and_removed_and_nothing_else_is_left(tmp_path: Path) -> None:
    assert shared.read(tmp_path, "a/b/x.md", 99) is None
    put(tmp_path, "a/b/x.md", b"one")
    assert shared.read(tmp_path, "a/b/x.md", 2) == b"on"
    (tmp_path / "a/b/x.md").chmod(0o640)
    put(tmp_path, "a/b/x.md", b"two", over=b"one")
    assert files(tmp_path) == {"a/b/x.md": b"two"}
    assert stat.S_IMODE((tmp_path / "a/b/x.md").stat().st_mode) == 0o640
    put(tmp_path, "a/b/x.md", None, over=b"two")
    assert files(tmp_path) == {}


def test_what_is_done_already_is_fine_and_so_is_what_a_killed_writer_left(tmp_path: Path) -> None:
    put(tmp_path, "a/x.md", b"one")
    put(tmp_path, "a/x.md", b"one")
    put(tmp_path, "a/x.md", b"one", over=b"something before")
    put(tmp_path, "none/x.md", None, over=b"once there")
    put(tmp_path, "a/y.md", None, over=b"once there")
    (tmp_path / "a/.x.md.new").write_bytes(b"half of anoth")
    put(tmp_path, "a/x.md", b"two", over=b"one")
    assert files(tmp_path) == {"a/x.md": b"two"}


@pytest.mark.parametrize(
    ("content", "over", "reason"),
    [
        (b"mine", None, "there is one already"),
        (b"mine", b"another", "not what it was"),
        (None, b"another", "not what it was"),
    ],
)
def test_what_somebody_else_has_written_is_left_alone(
    tmp_path: Path, content: bytes | None, over: bytes | None, reason: str
) -> None:
    (tmp_path / "x.md").write_bytes(b"theirs")
    with pytest.raises(Differs, match=reason):
        put(tmp_path, "x.md", content, over)
    assert files(tmp_path) == {"x.md": b"theirs"}
    with pytest.raises(Differs, match="gone"):
        put(tmp_path, "gone.md", b"mine", over=b"once there")


def test_one_that_appears_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def late(*names: Any, **fds: Any) -> None:
        (tmp_path / "x.md").write_bytes(b"theirs")
        link(*names, **fds)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(Differs, match="there is one already"):
        put(tmp_path, "x.md", b"mine")
    assert files(tmp_path) == {"x.md": b"theirs"}


def test_no_link_and_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "x.md").write_bytes(b"secret")
    (folder / "away").symlink_to(outside)
    (folder / "x.md").symlink_to(outside / "x.md")
    (folder / "file").write_bytes(b"")
    for path in ("away/x.md", "away/y.md", "x.md", "../outside/x.md", "/x.md", "./x.md", "file/x"):
        with pytest.raises(Differs):
            shared.read(folder, path, 99)
        with pytest.raises(Differs):
            put(folder, path, b"mine", over=b"secret")
    assert files(outside) == {"x.md": b"secret"}


def test_a_folder_that_cannot_be_written_is_an_error_and_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "x.md", b"one")

    def full(_fd: int, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared, "write_all", full)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path, "x.md", b"two", over=b"one")
    assert (tmp_path / "x.md").read_bytes() == b"one"
