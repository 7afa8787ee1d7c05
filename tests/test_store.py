"""The store: nothing that `commit` returned for is lost, whatever dies when."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import small_store
from crashing import fork_to, in_child, kill, killed_at_each_step
from small_store import State, add, content, leave, open_store, state_of

from ksi.storage import store as store_module
from ksi.storage.boot import this_boot
from ksi.storage.environment import open_reader
from ksi.storage.errors import Corrupt, UnknownOutcome
from ksi.storage.examination import examine
from ksi.storage.journal import START, Batch
from ksi.storage.recovery import TABLE, Decision, Mark, Snapshot, Start, View, decide
from ksi.storage.store import Store, copy_view, read_current, restore
from ksi.transport.errors import Conflict, StorageFull, TooLarge
from ksi.transport.limits import RECORD_BYTES_MAX, REPLAY_RECORDS, ROOM_CHECK_S

KEYS = ("a", "b", "c", "d")


def never(_store: Store, batch: Batch) -> tuple[float, bytes]:
    raise AssertionError(f"{batch.first_seq} is replayed")


def state_file(store_directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((store_directory / "STATE").read_bytes())
    return state


def test_a_new_store_is_empty_and_keeps_its_id(tmp_path: Path) -> None:
    store = open_store(tmp_path / "owner")
    assert store.meta.seq == 0
    assert store.meta.position == START == store.journal.end
    assert state_of(store) == {}
    assert read_current(tmp_path / "owner") == store.id == store.directory.name
    store.close()

    again = open_store(tmp_path / "owner")
    assert again.id == store.id
    again.close()


def test_a_commit_moves_number_place_time_and_rows_together(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.begin()
    end = store.commit(msgspec.msgpack.encode([]), 3, b"extra", 2.5)

    assert store.meta == store_module.Meta(store.id, 3, *end, 2.5, b"extra")
    store.close()
    again = Store.open(tmp_path, small_store.SPECS, replay=never)
    assert again.meta == store.meta
    again.close()


def test_what_was_committed_is_there_after_a_clean_close_without_replay(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for keys in ("ab", "a", "cab"):
        add(store, *keys)
    state = state_of(store)
    store.close()

    for boot_id in (None, "another boot"):
        again = Store.open(tmp_path, small_store.SPECS, replay=never, boot_id=boot_id)
        assert state_of(again) == state
        assert {key: len(each) for key, each in state.items()} == {"a": 3, "b": 2, "c": 1}
        again.close()


def test_what_was_aborted_is_not_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    state = state_of(store)
    store.begin()
    store.tables["totals"].put("a", small_store.Total(99, 99))
    store.tables["totals"].delete("b")
    assert store.tables["totals"].get("a") == small_store.Total(99, 99)
    store.abort()
    store.abort()

    assert state_of(store) == state
    add(store, "a", "b")
    assert len(state_of(store)["a"]) == 2
    store.close()


def test_rows_of_the_host_alone_need_no_record(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    end = store.journal.end
    store.begin()
    store.tables["totals"].put("host", small_store.Total(0, 7))
    store.commit_view(b"noted")

    assert store.journal.end == end == store.meta.position
    assert store.meta.extra == b"noted"
    leave(store)
    again = open_store(tmp_path)
    again.begin()
    assert again.tables["totals"].get("host") == small_store.Total(0, 7)
    assert again.meta.extra == b"noted"
    again.close()


def test_a_row_that_cannot_be_encoded_fails_the_commit_before_the_journal(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    state, end = state_of(store), store.journal.end
    store.begin()
    store.tables["totals"].put("b", small_store.Total(2**70, 0))
    with pytest.raises(OverflowError):
        store.commit(b"", 1, b"", 0.0)
    store.abort()

    assert store.journal.end == end == store.meta.position
    assert state_of(store) == state
    add(store, "a")
    leave(store)
    again = open_store(tmp_path)
    assert len(state_of(again)["a"]) == 2
    again.close()


def test_a_batch_too_large_for_the_journal_changes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.begin()
    with pytest.raises(TooLarge):
        store.commit(bytes(RECORD_BYTES_MAX + 1), 1, b"", 0.0)
    store.abort()
    add(store, "a")

    assert state_of(store) == {"a": ["a 1 \n"]}
    store.close()


def test_no_room_for_the_journal_undoes_the_batch_and_the_store_goes_on(tmp_path: Path) -> None:
    def meet_the_limit() -> None:
        store = open_store(tmp_path)
        add(store, "a")
        state = state_of(store)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        view_bytes = (store.directory / "view" / "data.mdb").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (view_bytes, unlimited[1]))
        store.begin()
        small_store.apply(store.tables, small_store.Added("a", 2, 5, "never"))
        with pytest.raises(StorageFull):
            store.commit(bytes(view_bytes), 1, b"", 0.0)
        store.abort()
        assert state_of(store) == state
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        add(store, "a")

    assert in_child(meet_the_limit) == 0

    store = open_store(tmp_path)
    assert len(state_of(store)["a"]) == 2
    store.close()


def test_a_view_that_cannot_be_written_is_an_unknown_outcome_that_recovery_settles(
    tmp_path: Path,
) -> None:
    def meet_the_limit() -> None:
        store = open_store(tmp_path)
        add(store, "a")
        view_bytes = (store.directory / "view" / "data.mdb").stat().st_size
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (view_bytes, hard))

        def add_until_it_fails() -> None:
            for number in itertools.count():  # the view needs more room than the journal
                add(store, f"key-{number}")

        with pytest.raises(UnknownOutcome):
            add_until_it_fails()

    store = open_store(tmp_path)
    store.close()
    assert in_child(meet_the_limit) == 0

    store = open_store(tmp_path)
    assert store.meta.position == store.journal.end
    assert len(state_of(store)["a"]) == 1
    store.close()


def test_room_is_refused_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.room()
    monkeypatch.setattr(store_module, "FREE_BYTES_MIN", 1 << 60)
    monkeypatch.setattr(store_module, "FREE_PART_MIN", 1.1)
    store.room()  # was looked at just now
    time.sleep(ROOM_CHECK_S)  # It was looked at just now.
    for _ in range(2):
        with pytest.raises(StorageFull, match="free on the disk"):
            store.room()
    store.close()


def test_room_is_refused_when_the_map_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    monkeypatch.setattr(store_module, "MAP_USE_MAX", 1e-9)
    with pytest.raises(StorageFull, match="of the map"):
        store.room()
    store.close()


SYNCS = """
import os, sys
from pathlib import Path
from small_store import add, open_store
store = open_store(Path(sys.argv[1]))
os.write(1, b"begin")
for number in range(20):
    add(store, "a", "b", str(number))
os.write(1, b"end")
store.abort()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_commit_costs_one_sync_in_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SYNCS)
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=/sync,/pwritev,write", "-o", tmp_path / "trace",
         sys.executable, script, tmp_path / "owner"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if "ptrace" in done.stderr.lower():
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr

    calls = [line.split(None, 1)[1] for line in (tmp_path / "trace").read_text().splitlines()]
    first = next(i for i, call in enumerate(calls) if '"begin' in call)
    last = next(i for i, call in enumerate(calls) if '"end' in call)
    counted = Counter(call.split("(")[0] for call in calls[first + 1 : last])
    counted.pop("pwritev", 0)  # how LMDB writes a run of pages
    assert counted == {"pwritev2": 20, "fdatasync": 20}


def test_a_restart_after_a_kill_writes_no_state_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    before = (store.directory / "STATE").stat()
    leave(store)

    again = open_store(tmp_path)
    after = (again.directory / "STATE").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    leave(again)


def test_what_a_killed_process_wrote_last_is_synced_before_the_store_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.journal.append(1, msgspec.msgpack.encode([small_store.Added("a", 1, 0, "a\n")]))
    leave(store)
    synced: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    leave(open_store(tmp_path))

    assert synced == ["00000000000000000001.log"]


@pytest.mark.parametrize("boot_id", [None, "another boot"])
def test_the_state_file_says_in_use_before_the_view_is_written(
    tmp_path: Path, boot_id: str | None
) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    store.close()
    assert state_file(store.directory) == {"boot_id": this_boot(), "clean": True}
    ahead = open_store(tmp_path)
    seen: list[dict[str, Any]] = []
    ahead.journal.append(2, msgspec.msgpack.encode([]), 1)
    leave(ahead)

    def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
        seen.append(state_file(store.directory))
        return 0.0, b""

    again = Store.open(tmp_path, small_store.SPECS, replay=replay, boot_id=boot_id)
    assert seen[-1:] == [{"boot_id": boot_id or this_boot(), "clean": False}]
    again.close()


def test_replay_applies_what_the_journal_has_beyond_the_view_in_bounded_transactions(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    encode = msgspec.msgpack.encode
    for first in range(2, 2 * REPLAY_RECORDS, 1000):
        offset = len("".join(f"k {number} \n" for number in range(2, first)))
        records = []
        for number in range(first, first + 1000):
            text = f"k {number} \n"
            records.append(small_store.Added("k", number - 1, offset, text))
            offset += len(text)
        store.journal.append(first, encode(records), 1000)
    leave(store)
    seen: set[int] = set()

    def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
        seen.add(store_module.read_meta(open_reader(store.directory / "view")).seq)
        return small_store.replay(store, batch)

    again = Store.open(tmp_path, small_store.SPECS, replay=replay)
    assert again.meta.seq == 1 + 9000
    assert again.meta.time_s == 9001.0
    assert again.meta.extra == b"replayed"
    assert len(seen) == 2, "replay is committed every few thousand records"
    assert len(state_of(again)["k"]) == 9000
    again.close()


def test_a_defect_in_replay_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    store.journal.append(2, b"no list", 1)
    leave(store)

    for _ in range(2):
        with pytest.raises(msgspec.DecodeError):
            open_store(tmp_path)


def test_a_record_that_does_not_follow_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    store.journal.append(3, msgspec.msgpack.encode([]), 1)
    leave(store)

    with pytest.raises(Corrupt, match="number 2 should follow"):
        open_store(tmp_path)


def write_on(directory: Path, seed: int, told: int) -> None:
    """Commit batches until killed; tell of each after it is committed."""
    chance = random.Random(seed)
    store = open_store(directory, segment_bytes=1 << 14)
    while True:
        add(store, *chance.choices("abcdefgh", k=chance.randrange(1, 30)))
        os.write(told, b"%d\n" % store.meta.seq)
        if chance.random() < 0.1:
            store.begin()
            store.tables["totals"].put("a", small_store.Total(0, 0))
            store.abort()


def test_a_writer_killed_at_any_time_loses_no_commit_that_returned(in_memory: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    ahead, kills = 0, 0
    while kills < 40 or not ahead:  # until one has hit between journal and view
        assert kills < 400, "no kill hits between journal and view"
        kills += 1
        reader, writer = os.pipe()
        pid = fork_to(partial(write_on, in_memory, chance.randrange(1 << 30), writer))
        os.close(writer)
        last, enough = 0, chance.randrange(40)
        with os.fdopen(reader) as told:
            for count, line in enumerate(told):
                last = int(line)
                if count == enough:
                    break
            time.sleep(chance.random() * 0.001)  # It may come at any moment.
            kill(pid)
            for line in told:
                last = int(line)

        replayed: list[int] = []

        def replay(
            store: Store, batch: Batch, replayed: list[int] = replayed
        ) -> tuple[float, bytes]:
            replayed.append(batch.records)
            return small_store.replay(store, batch)

        store = Store.open(in_memory, small_store.SPECS, replay=replay, segment_bytes=1 << 14)
        assert store.meta.seq >= last
        assert len(replayed) <= 1, "the view is at most one batch behind"
        ahead += len(replayed)
        state = state_of(store)
        leave(store)

    rebuilt = open_store(in_memory, boot_id="after a crash of the machine")
    assert state_of(rebuilt) == state
    rebuilt.close()


def test_after_a_crash_of_the_machine_the_view_is_set_aside_and_built_from_the_journal(
    tmp_path: Path,
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    store = open_store(tmp_path, segment_bytes=2000)
    for number in range(60):
        add(store, *chance.choices(KEYS, k=4), f"key-{number}")
    state = state_of(store)
    leave(store)
    for boot in range(4):
        data = store.directory / "view" / "data.mdb"
        pages = bytearray(data.read_bytes())
        for page in range(len(pages) // 4096):
            if chance.random() < 0.4:  # never got to the disk
                pages[page * 4096 : (page + 1) * 4096] = bytes(4096)
        data.write_bytes(pages[: chance.randrange(len(pages))])

        again = open_store(tmp_path, boot_id=f"boot {boot}", segment_bytes=2000)

        assert state_of(again) == state
        assert [path.name for path in again.directory.glob("view.*")] == [
            f"view.untrusted-{boot + 1}"
        ]
        add(again, "a")
        state = state_of(again)
        leave(again)


@pytest.mark.parametrize("kept_pages", [0, 1, 2, 3, 7])
def test_a_view_that_was_cut_off_is_built_anew_and_kills_nobody(
    tmp_path: Path, kept_pages: int
) -> None:
    store = open_store(tmp_path)
    for _ in range(5):
        add(store, *KEYS)
    state = state_of(store)
    leave(store)
    os.truncate(store.directory / "view" / "data.mdb", kept_pages * 4096)

    def look() -> None:
        again = open_store(tmp_path)
        assert state_of(again) == state
        again.close()

    assert in_child(look) == 0


def test_recovery_begins_at_the_newest_good_snapshot(tmp_path: Path) -> None:
    directory = tmp_path / "owner"
    store = open_store(directory)
    seqs = []
    for number in range(3):
        add(store, *KEYS)
        store.snapshot(tmp_path / f"snapshot-{number}")
        seqs.append(store.meta.seq)
    add(store, *KEYS)
    state = state_of(store)
    leave(store)
    spoilt = tmp_path / "snapshot-2" / "data.mdb"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    replayed: list[int] = []

    def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
        replayed.append(batch.first_seq)
        return small_store.replay(store, batch)

    again = Store.open(
        directory,
        small_store.SPECS,
        replay=replay,
        snapshots=tmp_path.glob("snapshot-*"),
        boot_id="another boot",
    )
    assert replayed == [seqs[1] + 1, seqs[2] + 1]
    assert state_of(again) == state
    again.close()


def test_segments_before_a_snapshot_can_be_dropped(tmp_path: Path) -> None:
    directory = tmp_path / "owner"
    store = open_store(directory, segment_bytes=1)
    for _ in range(4):
        add(store, *KEYS)
    manifest = store.snapshot(tmp_path / "snapshot")
    for _ in range(2):
        add(store, *KEYS)
    assert store.journal.drop_before(manifest.seq + 1) == 4
    state = state_of(store)
    leave(store)

    with pytest.raises(Corrupt, match=r"beginning of its journal has been dropped \(case E"):
        open_store(directory, boot_id="another boot")
    again = open_store(directory, boot_id="another boot", snapshots=[tmp_path / "snapshot"])
    assert state_of(again) == state
    again.close()


def test_every_combination_of_findings_meets_exactly_one_row_of_the_table() -> None:
    for findings in itertools.product(Mark, View, Snapshot, Start):
        assert sum(case.meets(*findings) for case in TABLE) == 1, findings
        mark, view, snapshot, start = findings
        decision = decide(*findings).decision
        if decision is Decision.TRUST:
            assert mark is not Mark.OTHER_BOOT
            assert view is View.JOINED
        if decision is Decision.INSTALL:
            assert snapshot is Snapshot.JOINED
        if decision is Decision.REBUILD:
            assert start is Start.WHOLE
    assert [case.letter for case in TABLE] == sorted(case.letter for case in TABLE)
    assert all(
        any(case.meets(*f) for f in itertools.product(Mark, View, Snapshot, Start))
        for case in TABLE
    )


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """A store of several segments, a snapshot of its middle, and its state after each commit."""
    directory = tmp_path_factory.mktemp("used")
    store = open_store(directory / "owner", segment_bytes=1)
    states: list[State] = [{}]
    for number in range(8):
        add(store, *KEYS[: 1 + number % 4])
        states.append(state_of(store))
        if number == 4:
            store.snapshot(directory / "snapshot")
    leave(store)
    return directory, states


MARKS = {
    Mark.CLEAN: {"boot_id": "some former boot", "clean": True},
    Mark.SAME_BOOT: {"boot_id": this_boot(), "clean": False},
    Mark.OTHER_BOOT: {"boot_id": "some former boot", "clean": False},
}


@pytest.mark.parametrize(
    ("mark", "view", "snapshot", "start"),
    list(itertools.product(Mark, View, Snapshot, Start)),
    ids=lambda finding: finding.name,
)
def test_each_combination_of_findings_on_disk_is_recovered_or_refused_as_the_table_says(
    tmp_path: Path,
    used: tuple[Path, list[State]],
    mark: Mark,
    view: View,
    snapshot: Snapshot,
    start: Start,
) -> None:
    directory = tmp_path / "used"
    shutil.copytree(used[0], directory)
    owner, states = directory / "owner", used[1]
    store = owner / (read_current(owner) or "")
    segments = sorted(store.glob("*.log"))
    (store / "STATE").write_text(json.dumps(MARKS[mark]))
    if view is View.MISSING:
        shutil.rmtree(store / "view")
    elif view is View.DAMAGED:
        (store / "view" / "data.mdb").write_bytes(b"\xff" * 20_000)
    elif view is View.SEVERED:
        segments[-1].unlink()
        states = states[:-1]
    if start is Start.DROPPED:
        segments[0].unlink()
    snapshots = [directory / "snapshot"] if snapshot is Snapshot.JOINED else []
    decision = decide(mark, view, snapshot, start).decision
    before = content(owner, but=["lock", "lock.mdb"])

    def open_it(replay: Callable[[Store, Batch], tuple[float, bytes]]) -> Store:
        return Store.open(owner, small_store.SPECS, replay=replay, snapshots=snapshots)

    if decision is Decision.REFUSE:
        with pytest.raises(Corrupt, match=r"case [BEH]"):
            open_it(never)
        assert content(owner, but=["lock", "lock.mdb"]) == before
        return
    replayed: list[int] = []

    def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
        replayed.append(batch.first_seq)
        return small_store.replay(store, batch)

    recovered = open_it(replay)
    assert state_of(recovered) == states[-1]
    count = {
        Decision.TRUST: 0,
        Decision.INSTALL: len(states) - 6,
        Decision.REBUILD: len(states) - 1,
    }
    assert len(replayed) == count[decision]
    recovered.close()


@pytest.mark.parametrize("what", ["create", "reboot", "restart", "commit and close", "restore"])
def test_a_store_killed_at_any_step_of_anything_opens_with_all_that_was_committed(
    in_memory: Path, what: str
) -> None:
    owner, fresh = in_memory / "owner", in_memory / "fresh"
    boot_id = "the next boot" if what == "reboot" else None
    if what != "create":
        store = open_store(fresh / "owner", segment_bytes=1)
        add(store, *KEYS)
        store.snapshot(fresh / "snapshot")
        add(store, *KEYS)
        leave(store) if what in ("reboot", "restart") else store.close()

    def prepare() -> None:
        shutil.rmtree(owner, ignore_errors=True)
        if what != "create":
            shutil.copytree(fresh / "owner", owner)

    def act() -> None:
        if what == "restore":
            restore(owner, fresh / "snapshot")
            return
        store = open_store(owner, segment_bytes=1, boot_id=boot_id)
        if what == "commit and close":
            add(store, "a")
        store.close()

    def check() -> None:
        found = open_store(owner, segment_bytes=1, boot_id=boot_id)
        counts = {key: len(texts) for key, texts in state_of(found).items()}
        allowed: dict[str, list[dict[str, int]]] = {
            "create": [{}],
            "restore": [dict.fromkeys(KEYS, 1), dict.fromkeys(KEYS, 2)],
            "commit and close": [dict.fromkeys(KEYS, 2), dict.fromkeys(KEYS, 2) | {"a": 3}],
        }
        assert counts in allowed.get(what, [dict.fromkeys(KEYS, 2)])
        add(found, "z")
        found.close()
        assert not [path.name for path in owner.rglob(".*")], "nothing is left behind"

    prepare()
    for _ in killed_at_each_step(act, runs=30):
        assert in_child(check) == 0
        prepare()


def test_only_one_process_has_a_store_and_another_waits_for_it(tmp_path: Path) -> None:
    ready, tell = os.pipe()

    def hold() -> None:
        open_store(tmp_path)
        os.write(tell, b"!")
        signal.pause()

    holder = fork_to(hold)
    os.read(ready, 1)
    before = content(tmp_path)
    with pytest.raises(Conflict, match=f"held by process {holder}"):
        open_store(tmp_path, lock_wait_s=0.05)
    assert content(tmp_path) == before

    def end_it() -> None:
        time.sleep(0.2)  # Meanwhile the other waits.
        os.kill(holder, signal.SIGKILL)

    ended = fork_to(end_it)
    store = open_store(tmp_path, lock_wait_s=30.0)
    store.close()
    os.waitpid(ended, 0)
    os.waitpid(holder, 0)


def test_opening_after_a_kill_does_not_depend_on_the_size_of_the_state(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.begin()
    for number in range(20_000):
        store.tables["totals"].put(f"session-{number:032d}", small_store.Total(number, number))
    store.commit(msgspec.msgpack.encode([]), 1, b"", 0.0)
    leave(store)

    def timed() -> float:
        began_s = time.perf_counter()
        again = Store.open(tmp_path, small_store.SPECS, replay=never)
        took_s = time.perf_counter() - began_s
        leave(again)
        return took_s

    assert min(timed() for _ in range(10)) < 0.010  # 0.0006 to 0.0015 where it was measured


def test_a_current_file_that_names_nothing_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    (tmp_path / "CURRENT").write_text("../elsewhere\n")
    with pytest.raises(Corrupt, match="CURRENT names"):
        open_store(tmp_path)


def test_without_a_current_file_the_only_store_is_adopted_and_of_several_none(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)
    add(store, "a")
    store.close()
    (tmp_path / "CURRENT").unlink()

    again = open_store(tmp_path)
    assert again.id == store.id
    again.close()

    (tmp_path / "CURRENT").unlink()
    shutil.copytree(store.directory, tmp_path / ("0" * 32))
    with pytest.raises(Corrupt, match="CURRENT is missing and there are 2 stores"):
        open_store(tmp_path)


def test_a_restored_store_has_the_snapshot_a_new_id_and_survives_the_machine(
    tmp_path: Path,
) -> None:
    owner = tmp_path / "owner"
    former = open_store(owner)
    add(former, *KEYS)
    former.snapshot(tmp_path / "snapshot")
    state = state_of(former)
    add(former, *KEYS)
    former.close()

    restored = restore(owner, tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "snapshot")

    assert read_current(owner) == restored != former.id
    assert (owner / former.id).is_dir()
    store = open_store(owner)
    assert store.id == restored == store.meta.store
    assert store.meta.seq == 4
    assert store.meta.extra == b"live"
    assert state_of(store) == state
    add(store, "a")
    state = state_of(store)
    leave(store)
    again = open_store(owner, boot_id="another boot")
    assert state_of(again) == state
    again.close()


def test_restoring_a_bad_snapshot_or_a_store_in_use_changes_nothing(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    store = open_store(owner)
    add(store, *KEYS)
    store.snapshot(tmp_path / "snapshot")
    with pytest.raises(Conflict):
        restore(owner, tmp_path / "snapshot", lock_wait_s=0.01)
    store.close()
    data = tmp_path / "snapshot" / "data.mdb"
    data.write_bytes(data.read_bytes()[:-4096])

    with pytest.raises(Corrupt):
        restore(owner, tmp_path / "snapshot")

    assert read_current(owner) == store.id
    again = open_store(owner)
    assert again.id == store.id
    again.close()


def test_the_view_of_another_store_is_not_trusted(tmp_path: Path) -> None:
    stores = [open_store(tmp_path / name) for name in ("one", "two")]
    for store in stores:
        add(store, store.directory.parent.name)
        store.close()
    shutil.rmtree(stores[0].directory / "view")
    shutil.copytree(stores[1].directory / "view", stores[0].directory / "view")

    again = open_store(tmp_path / "one")
    assert list(state_of(again)) == ["one"]
    again.close()


def test_a_view_that_was_closed_in_order_and_lacks_what_the_journal_has_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So it looks where a flipped bit shows a former row of what the view says of itself: the last
    command would be carried out twice."""

    def full(_path: Path, _store_id: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(tmp_path / "owner")
    add(store, "a")
    store.close()
    shutil.copytree(store.directory / "view", tmp_path / "former")
    store = open_store(tmp_path / "owner")
    add(store, "b")
    state = state_of(store)
    store.close()
    shutil.rmtree(store.directory / "view")
    shutil.copytree(tmp_path / "former", store.directory / "view")

    examined = examine(tmp_path / "owner")
    assert examined is not None
    assert examined.case.letter == "G"
    with pytest.raises(Corrupt, match="lacks some of its journal"):
        copy_view(tmp_path / "owner", tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_create_view", full)
        with pytest.raises(OSError, match="No space"):
            open_store(tmp_path / "owner")
    assert not state_file(store.directory)["clean"]
    replayed: list[int] = []

    def replay(store: Store, batch: Batch) -> tuple[float, bytes]:
        replayed.append(batch.first_seq)
        return small_store.replay(store, batch)

    again = Store.open(tmp_path / "owner", small_store.SPECS, replay=replay)
    assert (replayed, state_of(again)) == ([1, 2], state)
    assert len(list(store.directory.glob("view.untrusted-*"))) == 1
    again.close()


def test_a_store_whose_last_commit_is_unknown_is_not_closed_in_order(tmp_path: Path) -> None:
    """What is not known to be there is replayed, and nothing is built anew for it."""
    store = open_store(tmp_path)
    add(store, "a")
    store.begin()
    store.journal.append(2, msgspec.msgpack.encode([small_store.Added("b", 1, 0, "text")]))
    # And then the view cannot be committed.
    store.close()
    assert not state_file(store.directory)["clean"]
    examined = examine(tmp_path)
    assert examined is not None
    assert examined.case.letter == "A"
    again = open_store(tmp_path)
    assert (again.meta.seq, len(state_of(again)["b"])) == (2, 1)
    again.close()
    assert state_file(store.directory)["clean"]
