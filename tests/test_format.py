"""The version of the layout: a newer one is refused untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_store import content

from ksi.storage.errors import Corrupt, NewerFormat
from ksi.storage.format import FORMAT, check_format, mark_format


def test_a_new_directory_is_marked_once(tmp_path: Path) -> None:
    var = tmp_path / "new" / "var"
    mark_format(var)
    assert (var / "FORMAT").read_text() == f"ksi {FORMAT}\n"
    before = (var / "FORMAT").stat()

    mark_format(var)

    assert (var / "FORMAT").stat().st_ino == before.st_ino


def test_a_new_directory_says_what_is_in_it_but_not_over_what_somebody_says(tmp_path: Path) -> None:
    ours = Path(__file__).parent.parent / "var" / "README.md"
    mark_format(tmp_path / "fresh")
    assert (tmp_path / "fresh" / "README.md").read_text() == ours.read_text()
    (tmp_path / "README.md").write_text("mine")
    mark_format(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_older_format_is_read_as_it_is_and_marked_by_who_may_write(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("ksi 1\n")
    assert check_format(tmp_path) == 1
    assert (tmp_path / "FORMAT").read_text() == "ksi 1\n"
    mark_format(tmp_path)
    assert check_format(tmp_path) == FORMAT
    assert check_format(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_a_newer_format_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("ksi 999\n")
    before = content(tmp_path)

    for look in (check_format, mark_format):
        with pytest.raises(NewerFormat) as caught:
            look(tmp_path)

        assert content(tmp_path) == before
        assert caught.value.details == {"found": 999, "known": FORMAT}


@pytest.mark.parametrize(
    "text", ["", "ksi", "ksi one", "elephants 1", "ksi -1", "\x00" * 8, "\xff"]
)
def test_a_file_that_names_no_version_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "FORMAT").write_text(text, encoding="latin-1")
    with pytest.raises(Corrupt):
        check_format(tmp_path)
