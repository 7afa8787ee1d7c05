"""The operational log: whole lines, bounded files, and never in its caller's way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ksi.actors import log


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_a_line_is_one_json_object_that_says_who_and_when(tmp_path: Path) -> None:
    log.configure(tmp_path, "sessions").info("opened", journal_seq=3, odd="a\nb\u2028\x1b[31m")

    path = tmp_path / "logs" / "ksi" / "sessions.jsonl"
    [line] = lines(path)
    assert (line["event"], line["level"], line["journal_seq"]) == ("opened", "info", 3)
    assert (line["process"], line["pid"], line["odd"]) == (
        "sessions",
        os.getpid(),
        "a\nb\u2028\x1b[31m",
    )
    assert path.read_bytes().isascii()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_to_log_loads_neither_colours_nor_an_event_loop_and_who_needs_one_has_it() -> None:
    code = """
import sys
from ksi.actors.log import engine
logger = engine().get_logger()
print(*{"asyncio", "rich", "ssl"} & set(sys.modules))
import asyncio
asyncio.run(logger.ainfo("said in a loop"))
"""
    run = [sys.executable, "-P", "-c", code]
    first, said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split(
        "\n", 1
    )
    assert first == ""
    assert "said in a loop" in said


def test_what_is_below_the_level_is_not_written(tmp_path: Path) -> None:
    logger = log.configure(tmp_path, "x", "warning")
    logger.info("quiet")
    logger.warning("loud")

    assert [line["event"] for line in lines(log.directory(tmp_path) / "x.jsonl")] == ["loud"]


def test_an_exception_is_logged_with_its_traceback(tmp_path: Path) -> None:
    logger = log.configure(tmp_path, "x")
    try:
        raise ValueError("deep down")
    except ValueError:
        logger.exception("it failed")

    [line] = lines(log.directory(tmp_path) / "x.jsonl")
    assert "ValueError: deep down" in line["exception"]


def test_a_long_field_is_cut(tmp_path: Path) -> None:
    log.configure(tmp_path, "x").info("big", text="y" * 100_000)

    [line] = lines(log.directory(tmp_path) / "x.jsonl")
    assert len(line["text"]) < log.FIELD_CHARS_MAX + 100
    assert line["text"].endswith("(100000 characters)")


def test_a_file_that_was_moved_or_removed_is_opened_anew(tmp_path: Path) -> None:
    logger = log.configure(tmp_path, "x")
    path = log.directory(tmp_path) / "x.jsonl"
    logger.info("one")
    path.rename(path.with_suffix(".old"))
    path.touch()
    logger.info("two")
    assert [line["event"] for line in lines(path)] == ["two"]
    path.unlink()
    logger.info("three")

    assert [line["event"] for line in lines(path.with_suffix(".old"))] == ["one"]
    assert [line["event"] for line in lines(path)] == ["three"]


def test_a_full_file_is_moved_aside_and_one_before_it_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LOG_BYTES_MAX", 2000)
    logger = log.configure(tmp_path, "x")
    for number in range(100):
        logger.info("line", number=number)

    path = log.directory(tmp_path) / "x.jsonl"
    kept = [line["number"] for line in (*lines(path.with_name("x.jsonl.1")), *lines(path))]
    assert kept == list(range(kept[0], 100))
    assert sum(each.stat().st_size for each in path.parent.iterdir()) <= 4000


def test_a_log_that_cannot_be_written_is_no_error_of_its_caller(tmp_path: Path) -> None:
    logger = log.configure(tmp_path, "x")
    path = log.directory(tmp_path) / "x.jsonl"
    path.mkdir()
    logger.info("lost")
    path.rmdir()
    logger.info("kept")

    assert [line["event"] for line in lines(path)] == ["kept"]


def test_a_symlink_in_the_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    log.make_directory(tmp_path)
    (log.directory(tmp_path) / "x.jsonl").symlink_to(target)
    log.configure(tmp_path, "x").info("secret")

    assert target.read_bytes() == b""


def test_output_over_the_bound_is_moved_aside_while_its_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LOG_BYTES_MAX", 100)
    log.make_directory(tmp_path)
    path = log.output(tmp_path, "x")
    with path.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        log.trim(path)
        assert path.stat().st_size == 100
        writer.write(b"b")
        log.trim(path)
        writer.write(b"c\n")

    assert path.read_bytes() == b"c\n"
    assert path.with_name("x.out.1").read_bytes() == b"a" * 100 + b"b"


def test_the_last_words_of_a_process_are_found(tmp_path: Path) -> None:
    log.make_directory(tmp_path)
    path = log.output(tmp_path, "x")
    assert log.last_words(path) is None
    path.write_text("")
    assert log.last_words(path) is None
    path.write_text("Traceback\n" + "x" * 9000 + "\nOSError: no\n\n")
    assert log.last_words(path) == f"its last words: OSError: no (see {path})"
