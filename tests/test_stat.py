"""What a process says about itself must be readable at any moment, and never half written."""

import os
import random
import signal
import struct
import time
from pathlib import Path

import pytest

from ksi.actors import stat as layout
from ksi.actors.stat import LATENCIES_MAX, Stat, StatWriter, read_stat


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.stat"


def reading(path: Path) -> Stat:
    stat = read_stat(path)
    assert stat is not None
    return stat


def test_what_was_written_is_read(path: Path) -> None:
    writer = StatWriter(path, epoch=7)
    writer.state, writer.store_id = "running", "3f0e4c58-7a0b-4a59-8a35-2f4ab0a0c1de"
    for number, name in enumerate(layout._COUNTERS):
        setattr(writer, name, 1000 + number)
    now_s = time.monotonic()
    writer.end_turn(now_s)

    stat = reading(path)
    for number, name in enumerate(layout._COUNTERS):
        assert getattr(stat, name) == 1000 + number
    assert (stat.pid, stat.state, stat.store_id) == (os.getpid(), "running", writer.store_id)
    assert stat.turn_monotonic == now_s
    assert stat.started_monotonic <= now_s


def test_a_fresh_file_says_starting_and_is_for_its_owner_alone(path: Path) -> None:
    StatWriter(path)

    assert reading(path).state == "starting"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_commit_shows_from_its_begin_to_the_end_of_the_turn(path: Path) -> None:
    writer = StatWriter(path)
    writer.begin_turn(10.0)
    writer.committing(10.5)
    during = reading(path)
    writer.end_turn(11.0)

    assert (during.turn_monotonic, during.committing_since) == (10.0, 10.5)
    assert (reading(path).turn_monotonic, reading(path).committing_since) == (11.0, 0.0)


def test_a_process_without_turns_is_hung_and_one_in_a_commit_is_given_longer(path: Path) -> None:
    writer = StatWriter(path)
    writer.end_turn(100.0)
    bounds = {"turn_s_max": 10.0, "commit_s_max": 60.0}

    assert reading(path).hung(110.0, **bounds) is None
    assert reading(path).hung(110.2, **bounds) == "no turn for 10.2 s"
    writer.committing(105.0)
    assert reading(path).hung(164.0, **bounds) is None
    assert reading(path).hung(166.0, **bounds) == "in a commit for 61.0 s"


def test_the_rate_is_counted_over_a_second_or_two_and_falls_to_nothing(path: Path) -> None:
    writer = StatWriter(path)
    start_s = reading(path).started_monotonic
    for turn in range(1, 31):
        writer.commands += 50
        writer.end_turn(start_s + turn / 10)

    assert reading(path).commands_per_s == pytest.approx(500, rel=0.2)
    writer.end_turn(start_s + 5.0)
    writer.end_turn(start_s + 7.0)
    assert reading(path).commands_per_s == 0.0


def test_p99_is_of_the_latest_latencies(path: Path) -> None:
    writer = StatWriter(path)
    writer.end_turn(1.0)
    assert reading(path).p99_ms == 0.0

    for number in range(1, 101):
        writer.record(number / 1000)
    writer.end_turn(2.0)
    assert reading(path).p99_ms == 99.0

    for _ in range(LATENCIES_MAX):
        writer.record(0.002)
    writer.end_turn(3.0)
    assert reading(path).p99_ms == 2.0


def test_what_is_no_stat_file_reads_as_none(path: Path) -> None:
    assert read_stat(path) is None
    path.write_bytes(b"")
    assert read_stat(path) is None
    path.write_bytes(random.randbytes(4096))
    assert read_stat(path) is None
    path.write_bytes(layout._MAGIC + bytes(4088))
    assert read_stat(path) is None


def test_a_record_that_is_half_written_is_never_taken_for_one(path: Path) -> None:
    """A writer killed in the middle of a record leaves the one before it to be read."""
    writer = StatWriter(path)
    writer.commands = 1
    writer.end_turn(1.0)
    before = path.read_bytes()
    writer.commands = 2**40 + 1
    writer.queries = 2**40 + 1
    writer.end_turn(2.0)
    after = path.read_bytes()
    changed = [at for at in range(64, 1024) if before[at] != after[at]]

    for cut in range(changed[0], changed[-1] + 1):
        path.write_bytes(before[:cut] + after[cut:1024] + before[1024:])
        backwards = reading(path)
        path.write_bytes(after[:cut] + before[cut:])
        forwards = reading(path)
        for stat in (backwards, forwards):
            assert (stat.commands, stat.queries) in ((1, 0), (2**40 + 1, 2**40 + 1))


def test_a_reader_beside_a_busy_writer_sees_only_whole_records(path: Path) -> None:
    StatWriter(path).close()
    child = os.fork()
    if child == 0:
        writer = StatWriter(path)
        while True:
            writer.commands = writer.queries = writer.commits = writer.journal_seq = (
                writer.commands * 31 + 7
            ) % (1 << 62)
            writer.end_turn(time.monotonic())
    try:
        seen = set()
        until_s = time.monotonic() + 0.5
        while time.monotonic() < until_s:
            stat = reading(path)
            assert stat.commands == stat.queries == stat.commits == stat.journal_seq
            seen.add(stat.commands)
        assert len(seen) > 10
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert reading(path).pid in (child, os.getpid())


def test_a_new_process_replaces_the_file_in_one_step(path: Path) -> None:
    former = StatWriter(path)
    former.commands = 5
    former.end_turn(1.0)

    StatWriter(path, epoch=2)
    former.commands = 6
    former.end_turn(2.0)

    assert (reading(path).commands, reading(path).epoch) == (0, 2)


def test_a_file_that_is_a_symlink_is_replaced_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    path.symlink_to(target)
    path.with_name(path.name + ".new").symlink_to(target)

    StatWriter(path)

    assert target.read_text() == "untouched"
    assert not path.is_symlink()


def test_the_head_is_changed_in_aligned_words() -> None:
    """One store of eight aligned bytes is whole for every reader; a misaligned one need not be."""
    assert layout._TURN_AT % 8 == layout._COMMITTING_AT % 8 == 0
    assert layout._HEAD.unpack_from(struct.pack("@8sdd", layout._MAGIC, 1.5, 2.5))[1:] == (1.5, 2.5)
