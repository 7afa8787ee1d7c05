"""The journal: one write and one sync a batch, torn tails, damage, full disks."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashing import fork_to, in_child, kill
from trouble import until

from ksi.storage import journal as storage_journal
from ksi.storage import prewrite
from ksi.storage.errors import Corrupt, UnknownOutcome
from ksi.storage.journal import (
    HEADER,
    START,
    Batch,
    Journal,
    JournalReader,
    Position,
    create_segment,
    resume,
    segment_path,
)
from ksi.transport.errors import NotFound, StorageFull, TooLarge
from ksi.transport.limits import RECORD_BYTES_MAX


def payloads(journal: Journal) -> list[bytes]:
    return [batch.payload for batch in journal.read(START)]


def filled(directory: Path, *contents: bytes, segment_bytes: int = 1 << 20) -> Path:
    """Return the last segment of a new journal with one record for each of `contents`."""
    directory.mkdir(exist_ok=True)
    journal = Journal(directory, segment_bytes=segment_bytes)
    for number, content in enumerate(contents, 1):
        journal.append(number, content)
    journal.close()
    return segment_path(directory, journal.end.segment)


def test_what_was_appended_is_read_in_order_with_its_numbers_and_places(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = journal.append(1, b"one")
    second = journal.append(2, b"two and three", records=2)
    third = journal.append(4, b"")

    assert list(journal.read(START)) == [
        Batch(1, 1, b"one", START, first),
        Batch(2, 2, b"two and three", first, second),
        Batch(4, 1, b"", second, third),
    ]
    assert [batch.first_seq for batch in journal.read(first, second)] == [2]
    assert list(journal.read(third)) == []
    assert journal.end == third == Position(1, 3 * HEADER.size + 16)


def test_a_journal_goes_on_where_it_was_closed(tmp_path: Path) -> None:
    filled(tmp_path, b"one", b"two")

    journal = Journal(tmp_path)
    journal.append(3, b"three")

    assert payloads(journal) == [b"one", b"two", b"three"]


def test_an_append_is_one_write_and_one_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch, "pwritev", "pwrite", "write", "fdatasync", "fsync")
    journal = Journal(tmp_path)
    calls.clear()

    for number in range(1, 4):
        journal.append(number, b"x" * 50_000)

    assert calls == ["pwritev", "fdatasync"] * 3
    assert journal.syncs == 3


def recorded(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Record calls of these functions of `os`, which are still carried out."""
    calls: list[str] = []

    def record(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    return calls


def test_a_tail_torn_at_any_byte_of_the_last_record_is_cut_as_a_whole(tmp_path: Path) -> None:
    whole = filled(
        tmp_path / "whole", b"first", b"second", b"the third, which is torn"
    ).read_bytes()
    two = HEADER.size * 2 + len(b"firstsecond")
    for cut in range(two, len(whole)):
        torn = filled(tmp_path / "torn")
        torn.write_bytes(whole[:cut])

        journal = Journal(tmp_path / "torn")

        assert payloads(journal) == [b"first", b"second"]
        assert torn.stat().st_size == two
        journal.append(3, b"another third")
        journal.close()
        assert payloads(Journal(tmp_path / "torn"))[2:] == [b"another third"]
        shutil.rmtree(tmp_path / "torn")


@pytest.mark.parametrize("seed", range(3))
def test_a_tail_of_which_only_some_sectors_were_written_is_cut(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    last = chance.randbytes(5000)
    path = filled(tmp_path, b"first", b"second", last)
    whole = path.read_bytes()
    two = len(whole) - HEADER.size - len(last)
    for _ in range(30):
        torn = bytearray(whole)
        for sector in range(two // 512, len(whole) // 512 + 1):
            if chance.random() < 0.5:
                low, high = max(two, sector * 512), min(len(whole), (sector + 1) * 512)
                torn[low:high] = bytes(high - low)
        path.write_bytes(torn)

        journal = Journal(tmp_path)

        assert payloads(journal)[:2] == [b"first", b"second"]
        assert len(payloads(journal)) == 2 + (bytes(torn) == whole)
        journal.close()


def test_zeros_behind_the_last_record_are_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path, b"first", b"second")
    end = path.stat().st_size
    os.truncate(path, end + 5000)

    journal = Journal(tmp_path)
    assert journal.end.offset == end
    journal.append(3, b"third")
    assert path.stat().st_size == end + 5000
    assert payloads(journal) == [b"first", b"second", b"third"]
    journal.close()

    with open(path, "r+b") as file:  # a record of which only the beginning was written
        file.seek(journal.end.offset)
        file.write(path.read_bytes()[: HEADER.size + 3])
    journal = Journal(tmp_path)
    assert path.stat().st_size == journal.end.offset
    assert payloads(journal) == [b"first", b"second", b"third"]


def test_zeros_at_the_end_of_a_segment_lead_on_to_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=100)
    for number in range(1, 9):
        journal.append(number, b"x" * 40)
    first = segment_path(tmp_path, journal.segments()[0])
    os.truncate(first, first.stat().st_size + 3000)
    assert len(payloads(journal)) == 8

    with open(first, "ab") as file:
        file.write(b"more")
    with pytest.raises(Corrupt):
        payloads(journal)


def test_a_journal_does_not_go_on_from_a_place_in_the_zeros(tmp_path: Path) -> None:
    path = filled(tmp_path, b"first", b"second")
    end = path.stat().st_size
    os.truncate(path, end + 5000)

    assert resume(tmp_path, 2, Position(1, end)) == Position(1, end)
    assert resume(tmp_path, 9, Position(1, end + 1000)) is None
    assert resume(tmp_path, 9, Position(1, end + 9000)) is None
    assert resume(tmp_path, 0, START) == START


def test_zeros_are_written_ahead_only_of_a_journal_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_journal, "PREWRITE_FROM_BYTES", 3000)
    monkeypatch.setattr(prewrite, "PREWRITE_BYTES", 20_000)
    monkeypatch.setattr(prewrite, "_ZEROS", bytes(1000))
    journal = Journal(tmp_path)
    path = segment_path(tmp_path, 1)
    journal.append(1, b"a" * 2000)
    journal.append(2, b"b" * 900)
    assert path.stat().st_size == journal.end.offset

    journal.append(3, b"c" * 100)
    until(lambda: path.stat().st_size >= journal.end.offset + 20_000)
    journal.append(4, b"d" * 100)
    assert payloads(Journal(tmp_path)) == payloads(journal)
    journal.close()
    assert path.stat().st_size == journal.end.offset


def test_zeros_are_written_ahead_in_the_next_segment_as_soon_as_in_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_journal, "PREWRITE_FROM_BYTES", 3000)
    monkeypatch.setattr(prewrite, "_ZEROS", bytes(1000))
    filled(tmp_path, b"a" * 9000)
    journal = Journal(tmp_path, segment_bytes=10_000)
    journal.append(2, b"b" * 2000)
    for number in range(3, 7):
        journal.append(number, b"c" * 1000)
    assert journal.end.segment == 3
    until(lambda: segment_path(tmp_path, 3).stat().st_size > journal.end.offset)
    journal.close()


def test_a_journal_goes_on_where_nothing_can_write_zeros_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(storage_journal, "PREWRITE_FROM_BYTES", 0)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    journal = Journal(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(1, 4):
        journal.append(number, b"x")
    assert payloads(journal) == [b"x"] * 3
    assert len(os.listdir("/proc/self/fd")) == descriptors
    journal.close()


def test_zeros_never_hit_a_record_however_fast_the_journal_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_journal, "PREWRITE_FROM_BYTES", 0)
    monkeypatch.setattr(prewrite, "PREWRITE_BYTES", 4000)
    monkeypatch.setattr(prewrite, "_ZEROS", bytes(1500))
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    chance = random.Random(7)
    expected = [chance.randbytes(chance.randint(0, 3000)) for _ in range(3000)]
    journal = Journal(tmp_path, segment_bytes=500_000)

    for number, payload in enumerate(expected, 1):
        journal.append(number, payload)

    assert len(journal.segments()) > 5
    assert payloads(journal) == expected
    journal.close()
    assert payloads(Journal(tmp_path)) == expected


def test_damage_before_a_valid_record_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = filled(tmp_path, b"first", b"second", b"third")
    whole = path.read_bytes()
    for at in range(HEADER.size * 2 + len(b"firstsecond")):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)

        with pytest.raises(Corrupt) as caught:
            Journal(tmp_path)

        assert path.read_bytes() == damaged
        assert caught.value.details["file"] == str(path)
        assert caught.value.details["offset"] in (0, HEADER.size + len(b"first"))
        assert caught.value.hint is not None


def test_a_torn_record_that_holds_a_copy_of_a_record_is_still_only_torn(tmp_path: Path) -> None:
    copied = filled(tmp_path, b"first").read_bytes()
    path = filled(tmp_path / "other", b"first", b"a client sent this: " + copied + b"and more")
    path.write_bytes(path.read_bytes()[:-1])

    assert payloads(Journal(tmp_path / "other")) == [b"first"]


def test_a_record_is_not_valid_at_another_place(tmp_path: Path) -> None:
    path = filled(tmp_path, b"same", b"same")
    one = path.stat().st_size // 2
    content = path.read_bytes()
    path.write_bytes(content[one:] + content[:one])

    assert payloads(Journal(tmp_path)) == []


def test_records_before_a_known_place_are_not_read_again(tmp_path: Path) -> None:
    path = filled(tmp_path, b"first", b"second")
    known = Position(1, HEADER.size + 5)
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)

    journal = Journal(tmp_path, known=known)

    assert [batch.payload for batch in journal.read(known)] == [b"second"]
    with pytest.raises(Corrupt):
        list(journal.read(START))


def test_a_journal_shorter_than_it_was_known_to_be_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path, b"first")
    size = path.stat().st_size

    with pytest.raises(Corrupt, match="was known to reach"):
        Journal(tmp_path, known=Position(1, size + 1))

    assert path.stat().st_size == size


def test_a_segment_that_is_full_is_followed_by_one_named_after_its_first_number(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path, segment_bytes=200)
    for number in range(1, 40, 3):
        journal.append(number, b"x" * 60, records=3)

    segments = journal.segments()
    assert segments == sorted(segments)
    assert len(segments) > 3
    assert segments == [batch.first_seq for batch in journal.read(START) if batch.start.offset == 0]
    assert len(payloads(journal)) == 13
    journal.close()
    again = Journal(tmp_path, segment_bytes=200)
    assert again.end == journal.end
    assert len(payloads(again)) == 13


def test_a_new_segment_is_durable_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, segment_bytes=1)
    journal.append(1, b"first")
    calls = recorded(monkeypatch, "open", "fsync", "fdatasync", "pwritev")

    journal.append(2, b"second")

    assert calls == ["open", "fsync", "open", "fsync", "pwritev", "fdatasync"]  # file, directory


def test_only_whole_segments_before_a_number_are_dropped_and_never_the_last(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path, segment_bytes=1)
    for number in range(1, 6):
        journal.append(number, b"x")

    assert journal.drop_before(1) == 0
    assert journal.drop_before(3) == 2
    assert journal.segments() == [3, 4, 5]
    assert journal.drop_before(100) == 2
    assert journal.segments() == [5]
    with pytest.raises(NotFound):
        list(journal.read(START))
    assert JournalReader(tmp_path).start() == Position(5, 0)


def test_a_place_at_the_end_of_a_dropped_segment_is_the_start_of_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1)
    ends = {number: journal.append(number, b"x") for number in (1, 2, 3)}
    assert resume(tmp_path, 1, ends[1]) == ends[1]

    journal.drop_before(3)

    assert resume(tmp_path, 1, ends[1]) is None
    assert resume(tmp_path, 2, ends[2]) == Position(3, 0)
    assert resume(tmp_path, 3, ends[3]) == ends[3]
    assert resume(tmp_path, 3, ends[3]._replace(offset=ends[3].offset + 1)) is None


def test_a_missing_segment_in_the_middle_is_reported(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1)
    for number in range(1, 5):
        journal.append(number, b"x")
    segment_path(tmp_path, 2).unlink()

    with pytest.raises(Corrupt, match="number 2 should follow, found 3"):
        list(journal.read(START))
    for segment in (3, 4):
        segment_path(tmp_path, segment).unlink()
    os.close(create_segment(tmp_path, 5))  # just begun: there is no record that could tell
    with pytest.raises(Corrupt, match="number 2 should follow, found 5"):
        list(journal.read(START, Position(5, 0)))


def test_records_that_do_not_follow_each_other_are_reported(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(1, b"x", records=2)
    journal.append(4, b"x")

    with pytest.raises(Corrupt, match="number 3 should follow, found 4"):
        list(journal.read(START))


def test_damage_in_an_older_segment_is_reported_by_reading(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1)
    for number in range(1, 4):
        journal.append(number, b"x" * 50)
    path = segment_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-1])

    read = journal.read(START)
    assert next(read).first_seq == 1
    with pytest.raises(Corrupt, match=r"00002.log: no valid record at byte 0"):
        next(read)


def test_a_record_over_the_limit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(TooLarge):
        journal.append(1, bytes(RECORD_BYTES_MAX + 1))

    assert journal.append(1, bytes(RECORD_BYTES_MAX)).offset == HEADER.size + RECORD_BYTES_MAX
    assert [len(payload) for payload in payloads(journal)] == [RECORD_BYTES_MAX]


def test_where_there_is_no_room_the_journal_is_as_before_and_goes_on(tmp_path: Path) -> None:
    def meet_the_limit() -> None:
        journal = Journal(tmp_path)
        journal.append(1, b"x" * 1000)
        before = journal.end
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, unlimited[1]))
        for _ in range(2):
            with pytest.raises(StorageFull):
                journal.append(2, b"y" * 5000)  # partly written, then refused by the kernel
        assert journal.end == before
        assert segment_path(tmp_path, 1).stat().st_size == before.offset
        journal.append(2, b"small")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        journal.append(3, b"z" * 5000)

    assert in_child(meet_the_limit) == 0

    assert payloads(Journal(tmp_path)) == [b"x" * 1000, b"small", b"z" * 5000]


FULL_DISK = """
import os, sys
from pathlib import Path
from ksi.storage.journal import Journal, START
from ksi.transport.errors import StorageFull

disk = Path(sys.argv[1])
journal = Journal(disk, segment_bytes=1 << 14)
seq, full = 1, 0
ballast = disk / "ballast"
ballast.write_bytes(bytes(300_000))
while full < 20:
    try:
        journal.append(seq, os.urandom(1000 * (1 + seq % 9)))
        seq += 1
    except StorageFull:
        full += 1
        if full == 10:
            ballast.unlink()
batches = list(Journal(disk).read(START))
assert [batch.first_seq for batch in batches] == list(range(1, seq)), "a number is missing"
assert len(journal.segments()) > 10
print("survived", seq, full)
"""


def test_a_full_disk_is_survived_at_every_size_of_record(tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec {sys.executable} - {tmp_path}"
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a small disk needs root and unshare")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        check=False, input=FULL_DISK, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if "mount" in done.stderr:
        pytest.skip(f"no small disk: {done.stderr.strip()}")
    assert done.stdout.startswith("survived"), done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_where_the_sync_finds_no_room_the_record_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    journal = Journal(tmp_path)
    journal.append(1, b"first")
    with monkeypatch.context() as broken:
        fail_once(broken, number)
        with pytest.raises(StorageFull):
            journal.append(2, b"second")

    assert segment_path(tmp_path, 1).stat().st_size == journal.end.offset
    journal.append(2, b"another second")
    assert payloads(journal) == [b"first", b"another second"]


def fail_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the next `fdatasync` fail: a disk error that cannot be had from a real disk here."""
    real = os.fdatasync
    failed: list[int] = []

    def fdatasync(fd: int) -> None:
        if not failed:
            failed.append(fd)
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)


def test_after_a_failed_sync_the_outcome_is_unknown_and_nothing_more_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.append(1, b"first")
    with monkeypatch.context() as broken:
        fail_once(broken, errno.EIO)
        with pytest.raises(UnknownOutcome):
            journal.append(2, b"second")

    for number in (2, 3):
        with pytest.raises(UnknownOutcome):
            journal.append(number, b"later")
    assert payloads(Journal(tmp_path)) in ([b"first"], [b"first", b"second"])


def test_a_record_whose_sync_may_have_failed_is_written_again_before_it_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops what it could not write and calls it clean: fsync(2), ERRORS."""
    path = filled(tmp_path, b"one", b"two")
    whole = path.read_bytes()
    journal = Journal(tmp_path)
    found = payloads(journal)  # as the page cache has it ...
    second = whole.rindex(b"KSJ1")
    with path.open("r+b") as file:  # ... and the disk has not.
        file.seek(second)
        file.write(bytes(len(whole) - second))
    calls = recorded(monkeypatch, "pwrite", "fdatasync")

    journal.sync()

    assert found == [b"one", b"two"]
    assert path.read_bytes() == whole
    assert calls == ["pwrite", "fdatasync"]
    journal.sync()
    assert calls[2:] == ["fdatasync"]
    journal.close()


def test_a_reader_follows_a_writer_through_segments_up_to_each_committed_place(
    tmp_path: Path,
) -> None:
    ends, tell = os.pipe()

    def write() -> None:
        journal = Journal(tmp_path, segment_bytes=500)
        for number in range(1, 301):
            end = journal.append(number, b"%d" % number * (number % 50))
            os.write(tell, b"%d %d\n" % end)

    writer = fork_to(write)
    os.close(tell)
    reader, place, seen = JournalReader(tmp_path), START, 0
    with os.fdopen(ends) as told:
        for line in told:
            stop = Position(*map(int, line.split()))
            for batch in reader.read(place, stop):
                seen += 1
                assert batch.first_seq == seen
                assert batch.payload == b"%d" % seen * (seen % 50)
                place = batch.end
            assert place == stop
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    assert seen == 300


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_writer_leaves_all_it_has_told_of(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    ends, tell = os.pipe()

    def write() -> None:
        journal = Journal(tmp_path, segment_bytes=100_000)
        number = 1
        while True:
            journal.append(number, b"%d " % number * chance.randrange(20_000))
            os.write(tell, b"%d\n" % number)
            number += 1

    writer = fork_to(write)
    os.close(tell)
    told = 0
    with os.fdopen(ends) as lines:
        for line in lines:
            told = int(line)
            if told >= chance.randrange(10, 60):
                break
        kill(writer)
        for line in lines:
            told = int(line)

    journal = Journal(tmp_path)
    found = list(journal.read(START))
    assert told <= len(found) <= told + 1
    assert all(
        set(batch.payload.split()) <= {b"%d" % number} for number, batch in enumerate(found, 1)
    )
