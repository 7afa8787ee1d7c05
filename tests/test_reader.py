"""Reading in any process: one committed state, never one that is not, and logs to their end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest
from crashing import fork_to, in_child, kill
from small_store import SPECS, Added, State, add, check, leave, lines_of, open_store, state_of
from trouble import until

from ksi.storage import reader as reading
from ksi.storage.errors import Corrupt
from ksi.storage.files import Cursor, LogWriter
from ksi.storage.journal import START, Batch
from ksi.storage.reader import Reader
from ksi.storage.store import Meta, Store, restore
from ksi.storage.tables import TableSpec
from ksi.transport.errors import NotRunning


def state(reader: Reader) -> State:
    return reader.read(lambda tables, meta: check(tables, meta.seq))


def seq(reader: Reader) -> int:
    return reader.read(lambda _, meta: meta.seq)


def test_a_reader_sees_each_commit_and_nothing_before_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    reader = Reader(tmp_path, SPECS)
    for number in range(1, 5):
        add(store, "a", "b")
        store.begin()
        store.tables["totals"].delete("a")
        store.tables["totals"].flush()
        assert seq(reader) == 2 * number
        assert len(state(reader)["a"]) == number
        store.abort()
    store.close()


def test_what_is_journaled_but_not_committed_is_not_seen(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner")
    add(store, "a")
    record = [Added("a", 2, 5, "a 2 \n")]
    store.journal.append(2, msgspec.msgpack.encode(record))
    Cursor(tmp_path / "cursor").close()
    reader = log_reader(tmp_path)

    assert seq(reader) == 1
    assert reader.log("a", 0, 5) == b"a 1 \n"
    with pytest.raises(Corrupt, match="neither in its file nor in the journal"):
        reader.log("a", 0, 10)
    leave(store)


def read_on(directory: Path, told: int) -> None:
    """Check one committed state after another until killed; tell of each."""
    reader = Reader(directory, SPECS)
    last = 0
    while True:
        now = reader.read(lambda tables, meta: (meta.seq, check(tables, meta.seq)))[0]
        assert now >= last, "time went back"
        last = now
        os.write(told, b".")


def test_readers_in_other_processes_see_only_whole_commits(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    heard, told = os.pipe()
    readers = [fork_to(lambda: read_on(tmp_path, told)) for _ in range(2)]
    store = open_store(tmp_path)
    try:
        for number in range(150):
            add(store, *f"key-{number % 7}")
            if number % 10 == 0:
                store.begin()
                store.tables["totals"].delete("k")
                store.abort()
        for _ in range(100):
            assert os.read(heard, 1) == b"."
        assert [os.waitpid(pid, os.WNOHANG)[0] for pid in readers] == [0, 0], "a reader failed"
    finally:
        store.close()
        for pid in readers:
            kill(pid)


def test_a_stopped_or_dead_owner_does_not_keep_anybody_from_reading(tmp_path: Path) -> None:
    ready, tell = os.pipe()

    def own() -> None:
        store = open_store(tmp_path)
        add(store, "a", "b")
        store.begin()
        store.tables["totals"].delete("a")
        store.tables["totals"].flush()
        os.write(tell, b"!")
        signal.pause()

    owner = fork_to(own)
    os.read(ready, 1)
    os.kill(owner, signal.SIGSTOP)
    reader = Reader(tmp_path, SPECS)
    assert list(state(reader)) == ["a", "b"]
    kill(owner)

    assert list(state(reader)) == ["a", "b"]
    assert in_child(lambda: state(Reader(tmp_path, SPECS))) == 0


def test_the_owner_and_a_reader_in_one_process_share_the_environment(tmp_path: Path) -> None:
    add(store := open_store(tmp_path), "a")
    store.close()
    reader = Reader(tmp_path, SPECS)
    assert list(state(reader)) == ["a"]

    store = open_store(tmp_path)
    add(store, "b")
    assert list(state(reader)) == ["a", "b"]
    store.close()
    assert list(state(reader)) == ["a", "b"]
    store = open_store(tmp_path)
    add(store, "c")
    assert list(state(reader)) == ["a", "b", "c"]
    leave(store)


def test_many_threads_read_while_the_owner_commits(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    reader = Reader(tmp_path, SPECS)
    failed: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                state(reader)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        add(store, "a", "b")
    done.set()
    for thread in threads:
        thread.join()
    assert failed == []
    store.close()


def test_a_read_inside_a_read_sees_the_same_or_later(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    reader = Reader(tmp_path, SPECS)

    def outer(tables: Mapping[str, Any], meta: Meta) -> tuple[int, int]:
        add(store, "a")
        inner = seq(reader)
        assert tables["totals"].get("a").entries == meta.seq
        return meta.seq, inner

    assert reader.read(outer) == (1, 2)
    store.close()


FORKED = """
import os, sys
from pathlib import Path
from ksi.storage.environment import open_reader
from ksi.storage.reader import Reader
from small_store import SPECS, check

owner, view = map(Path, sys.argv[1:])
state = lambda reader: list(reader.read(lambda tables, meta: check(tables, meta.seq)))
reader = Reader(owner, SPECS)
assert state(reader) == ["a"]
inherited = reader._environment
shared = open_reader(view).lmdb
held = shared.begin()
slots = shared.readers()
if os.fork() == 0:
    assert state(reader) == state(Reader(owner, SPECS)) == ["a"]
    assert open_reader(view).lmdb is not shared
    assert reader._environment is not inherited, "what the parent has opened is used"
    del reader, inherited, shared, held
    sys.exit()  # in order, so that all that is left is finalised
assert os.wait()[1] == 0, "the child failed"
open_reader(view).lmdb.reader_check()
assert shared.readers() == slots, f"the child freed slots of its parent: {shared.readers()}"
assert state(reader) == ["a"]
"""


def test_a_forked_child_reads_and_its_end_leaves_the_reads_of_its_parent_alone(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    leave(store)
    subprocess.run(
        [sys.executable, "-c", FORKED, tmp_path, store.directory / "view"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True, timeout=30,
    )  # fmt: skip


def test_where_there_is_no_store_the_reader_says_so_and_finds_one_that_comes(
    tmp_path: Path,
) -> None:
    reader = Reader(tmp_path / "owner", SPECS)
    with pytest.raises(NotRunning):
        state(reader)
    store = open_store(tmp_path / "owner")
    add(store, "a")

    assert list(state(reader)) == ["a"]
    store.close()


def test_a_table_that_its_owner_has_not_made_yet_is_not_there(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    later = {**SPECS, "added_later": TableSpec(bytes)}
    with pytest.raises(NotRunning, match="no table added_later"):
        Reader(tmp_path, later).read(lambda tables, meta: meta.seq)


def test_a_store_that_was_in_use_when_the_machine_went_down_is_not_read_until_recovered(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    leave(store)
    reader = Reader(tmp_path, SPECS, boot_id="another boot")
    with pytest.raises(NotRunning, match="when the machine went down"):
        state(reader)

    store = open_store(tmp_path, boot_id="another boot")
    assert list(state(reader)) == ["a"]
    store.close()
    assert list(state(Reader(tmp_path, SPECS, boot_id="a third boot"))) == ["a"]


def test_readers_of_a_store_that_is_replaced_read_the_new_one_at_once(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    store = open_store(owner)
    add(store, "a")
    store.snapshot(tmp_path / "snapshot")
    add(store, "b")
    store.close()
    heard, told = os.pipe()
    go, say_go = os.pipe()

    def read() -> None:
        reader = Reader(owner, SPECS)
        os.write(told, b"%d" % seq(reader))
        os.read(go, 1)
        os.write(told, b"%d" % seq(reader))

    pid = fork_to(read)
    assert os.read(heard, 9) == b"2"
    reader = Reader(owner, SPECS)
    assert list(state(reader)) == ["a", "b"]

    restore(owner, tmp_path / "snapshot")

    assert list(state(reader)) == ["a"]
    os.write(say_go, b"!")
    assert os.read(heard, 9) == b"1"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_directory_that_was_deleted_and_made_anew_is_noticed(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    store = open_store(owner)
    add(store, "former")
    leave(store)
    reader = Reader(owner, SPECS)
    assert list(state(reader)) == ["former"]
    shutil.rmtree(owner)
    store = open_store(owner)
    add(store, "new")

    until(lambda: list(state(reader)) == ["new"])
    leave(store)
    shutil.rmtree(owner)

    def is_gone() -> bool:
        try:
            state(reader)
        except NotRunning:
            return True
        return False

    until(is_gone)


def test_a_view_rebuilt_in_its_place_is_noticed(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    store = open_store(tmp_path)
    add(store, "a")
    leave(store)

    def read() -> None:
        reader = Reader(tmp_path, SPECS)
        assert seq(reader) == 1
        os.write(tell, b"!")
        until(lambda: seq(reader) == 2)

    pid = fork_to(read)
    os.read(ready, 1)
    shutil.rmtree(store.directory / "view")
    store = open_store(tmp_path)
    add(store, "a")

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    leave(store)


def test_a_row_that_a_slow_reader_saw_change_under_it_is_read_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    reader = Reader(tmp_path, SPECS)
    calls: list[int] = []

    def wrong_at_first(_tables: Any, meta: Meta) -> int:
        calls.append(meta.seq)
        if len(calls) == 1:
            raise Corrupt("a page used anew")
        return meta.seq

    assert reader.read(wrong_at_first) == 1
    assert len(calls) == 2
    store.close()


def test_a_damaged_row_is_reported_and_reading_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a", "b")
    store.begin()
    assert store._txn is not None
    database = store._lmdb.open_db(b"totals", txn=store._txn)
    store._txn.put(b"a", b"\x00" * 12, db=database)
    store.commit_view()
    reader = Reader(tmp_path, SPECS)

    with pytest.raises(Corrupt, match="table totals"):
        reader.read(lambda tables, _: tables["totals"].get("a"))
    assert reader.read(lambda tables, _: tables["totals"].get("b")) is not None
    leave(store)


def test_a_refusal_of_a_query_passes_through_and_frees_the_state(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    reader = Reader(tmp_path, SPECS)

    def refuse(_tables: Any, _meta: Meta) -> None:
        raise KeyError("mine")

    kept = []
    for _ in range(500):
        with pytest.raises(KeyError) as caught:
            reader.read(refuse)
        kept.append(caught.value)  # and with it the frames of the read
    assert list(state(reader)) == ["a"]
    slots = store._lmdb.readers().splitlines()[1:]
    assert [line.split()[2] for line in slots] == ["-"]
    store.close()


def test_a_range_that_is_kept_holds_no_state_once_its_read_is_over(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, *"abc")
    kept = Reader(tmp_path, SPECS).read(lambda tables, _: tables["totals"].range())

    slots = store._lmdb.readers().splitlines()[1:]
    assert [line.split()[2] for line in slots] == ["-"]
    with pytest.raises(lmdb.Error):
        next(kept)
    store.close()


def log_reader(directory: Path, *, counted: Any = lines_of, **more: Any) -> Reader:
    return Reader(
        directory / "owner",
        SPECS,
        logs=directory / "logs",
        cursor=directory / "cursor",
        lines_of=counted,
        **more,
    )


class Follower:
    """Writes the logs of a small store as far as it is told to."""

    def __init__(self, directory: Path, store: Store, **more: Any) -> None:
        self.store = store
        self.writer = LogWriter(directory / "logs")
        self.cursor = Cursor(directory / "cursor", **more)
        if self.cursor.store != store.id:
            self.cursor.begin(store.id, START)

    def follow(self, batches: int = 1 << 30) -> None:
        for batch in self.store.journal.read(self.cursor.written):
            if batches == 0:
                break
            batches -= 1
            for line in lines_of(batch):
                self.writer.write(*line)
            self.cursor.advance(batch.end)

    def sync(self) -> None:
        self.writer.sync()
        self.cursor.sync()

    def close(self) -> None:
        self.writer.close()
        self.cursor.close()


def expected_log(store: Store, key: str) -> bytes:
    return "".join(state_of(store).get(key, [])).encode()


def test_a_log_is_whole_however_far_its_follower_has_come(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner", segment_bytes=300)
    for number in range(20):
        add(store, "a", "b", "a", f"key-{number}")
    follower = Follower(tmp_path, store)
    reader = log_reader(tmp_path)
    whole = {key: expected_log(store, key) for key in ("a", "b", "key-3")}
    for step in (0, 1, 5, 1 << 30):
        follower.follow(step)
        for key, expected in whole.items():
            size = len(expected)
            assert reader.log(key, 0, size) == expected
            assert reader.log(key, size // 3, size - 1) == expected[size // 3 : size - 1]
            assert reader.log(key, size, size) == b""
    assert (tmp_path / "logs" / "a.jsonl").read_bytes() == whole["a"]
    follower.close()
    store.close()


def test_without_a_follower_a_log_comes_from_the_journal(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner")
    add(store, "a", "a", "b")
    expected = expected_log(store, "a")

    assert log_reader(tmp_path).log("a", 0, len(expected)) == expected
    store.close()


def test_bytes_a_line_holds_only_in_part_are_taken_from_file_and_journal(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner")
    add(store, *"aaaa")
    expected = expected_log(store, "a")
    follower = Follower(tmp_path, store)
    follower.writer.write("a", 0, expected[: len(expected) // 2 + 1])
    reader = log_reader(tmp_path)

    for start in range(len(expected)):
        assert reader.log("a", start, len(expected)) == expected[start:]
    follower.close()
    store.close()


def test_after_a_crash_of_the_machine_the_journal_has_the_last_word(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner", boot_id="one")
    for _ in range(4):
        add(store, "a", "b")
    follower = Follower(tmp_path, store, boot_id="one")
    follower.follow(1)
    follower.sync()
    follower.follow()
    expected = expected_log(store, "a")
    synced = len(b"a 1 \n")
    follower.close()
    leave(store)
    path = tmp_path / "logs" / "a.jsonl"
    path.write_bytes(expected[:synced] + bytes(len(expected) - synced))  # length without bytes

    store = open_store(tmp_path / "owner", boot_id="two")

    assert log_reader(tmp_path, boot_id="two").log("a", 0, len(expected)) == expected
    again = Follower(tmp_path, store, boot_id="two")
    again.follow()
    assert path.read_bytes() == expected
    again.close()
    store.close()


def test_pages_of_a_log_whose_follower_is_behind_are_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_STEP_BYTES", 64)
    store = open_store(tmp_path / "owner", boot_id="one", segment_bytes=4000)
    for number in range(100):
        add(store, "a", f"early-{number}")
    follower = Follower(tmp_path, store, boot_id="one")
    follower.follow()
    follower.sync()
    for number in range(100):
        add(store, f"between-{number}")
    for number in range(100):
        add(store, "a", f"late-{number}")
    add(store, "quiet")
    follower.follow()
    expected = {key: expected_log(store, key) for key in ("a", "early-3", "late-99")}
    follower.close()
    leave(store)
    store = open_store(tmp_path / "owner", boot_id="two", segment_bytes=4000)
    looked_at = []

    def counted(batch: Batch) -> Iterator[tuple[str, int, bytes]]:
        looked_at.append(batch.first_seq)
        return lines_of(batch)

    reader = log_reader(tmp_path, boot_id="two", counted=counted)
    pages = range(0, len(expected["a"]), 20)
    for turn in (list(pages), list(reversed(pages))):
        looked_at.clear()
        for start in turn:
            stop = min(start + 20, len(expected["a"]))
            assert reader.log("a", start, stop) == expected["a"][start:stop]
        assert len(looked_at) < 202 + 12 * len(turn)
    for key in ("early-3", "late-99"):
        whole = expected[key]
        looked_at.clear()
        for start in range(len(whole)):
            assert reader.log(key, start, len(whole)) == whole[start:]
        assert len(looked_at) <= 202 + 2 * len(whole)
        add(store, key)
        assert reader.log(key, 0, len(expected_log(store, key))) == expected_log(store, key)
    store.close()


def test_a_log_cut_by_hand_is_read_from_the_journal(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner")
    add(store, "a", "a", "b")
    follower = Follower(tmp_path, store)
    follower.follow()
    expected = expected_log(store, "a")
    follower.writer.truncate("a", 3)

    assert log_reader(tmp_path).log("a", 0, len(expected)) == expected
    follower.close()
    store.close()


def test_a_cursor_of_a_store_that_was_replaced_is_not_believed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner")
    add(store, "a")
    store.snapshot(tmp_path / "snapshot")
    add(store, "b", "b", "b", "a")
    follower = Follower(tmp_path, store)
    follower.follow()
    follower.close()
    store.close()
    restore(tmp_path / "owner", tmp_path / "snapshot")
    store = open_store(tmp_path / "owner")
    add(store, "c", "a")  # at the place of what was restored away, and shorter
    expected = expected_log(store, "a")

    assert not (tmp_path / "logs" / "a.jsonl").read_bytes().startswith(expected)
    assert log_reader(tmp_path).log("a", 0, len(expected)) == expected
    store.close()


def test_segments_dropped_behind_the_follower_are_not_missed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner", segment_bytes=1)
    follower = Follower(tmp_path, store)
    for _ in range(5):
        add(store, "a", "b")
    follower.follow(4)
    follower.sync()
    store.journal.drop_before(follower.cursor.synced.segment)
    expected = expected_log(store, "a")
    reader = log_reader(tmp_path)
    assert len(store.journal.segments()) < 5

    assert reader.log("a", 0, len(expected)) == expected
    with pytest.raises(Corrupt):
        reader.log("a", 0, len(expected) + 1)
    (tmp_path / "logs" / "a.jsonl").unlink()
    assert reader.log("a", len(expected) - 2, len(expected)) == expected[-2:]
    with pytest.raises(Corrupt, match="neither in its file nor in the journal"):
        reader.log("a", 0, len(expected))  # its end is in the journal, its beginning nowhere
    follower.close()
    store.close()


def test_a_log_can_be_read_while_writer_and_follower_work(tmp_path: Path) -> None:
    open_store(tmp_path / "owner").close()

    def work() -> None:
        store = open_store(tmp_path / "owner", segment_bytes=2000)
        follower = Follower(tmp_path, store)
        for number in range(200):
            add(store, "a", "b")
            if number % 3 == 0:
                follower.follow(4)
            if number % 20 == 0:
                follower.sync()
                store.journal.drop_before(follower.cursor.synced.segment)
        follower.follow()
        follower.close()
        store.close()

    worker = fork_to(work)
    reader = log_reader(tmp_path)
    seen = 0
    while seen < 200:
        try:
            total = reader.read(lambda tables, _: tables["totals"].get("a"))
        except NotRunning:  # closed, and not opened yet
            continue
        if total is not None:
            lines = reader.log("a", 0, total.log_bytes).decode().splitlines()
            seen = total.entries
            assert [line.split()[:2] for line in lines] == [
                ["a", str(number)] for number in range(1, seen + 1)
            ]
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0


def test_a_read_costs_little(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    reader = Reader(tmp_path, SPECS)

    def timed() -> float:
        began_s = time.perf_counter()
        for _ in range(2000):
            reader.read(lambda tables, _: tables["totals"].get("a"))
        return (time.perf_counter() - began_s) / 2000

    assert min(timed() for _ in range(5)) < 20e-6  # 2 µs where it was measured
    store.close()
