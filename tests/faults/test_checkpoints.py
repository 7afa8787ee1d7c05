"""Checkpoints under load and in trouble: whole or absent, no effect without its cause."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from checkpointing import listed, load_on, made, ordered
from system import System
from trouble import kill, kill_all, paused, until

from ksi.actors.checkpoints import PAGE_LOGS, Cutting, root_of
from ksi.actors.commit import table_specs
from ksi.actors.owners import OWNERS, load
from ksi.storage import checkpoints
from ksi.storage.checkpoints import making, whole
from ksi.storage.errors import Corrupt
from ksi.storage.journal import segments_in
from ksi.storage.snapshots import read_copy
from ksi.storage.store import read_current, read_mark
from ksi.transport.errors import Conflict

PAIRS = [("completion", "sessions"), ("sessions", "completion")]


@pytest.fixture
def var(in_memory: Path) -> Path:
    return in_memory / "var"


@pytest.fixture
def system(var: Path) -> Iterator[System]:
    running = System(var)
    yield running
    running.end()


def failed(system: System, checkpoint_id: str) -> str:
    """Wait until a checkpoint is given up, and return why."""

    def why() -> str | None:
        now = listed(system)
        assert checkpoint_id not in [each["id"] for each in now["checkpoints"]]
        return now["failed"] if now["failed_id"] == checkpoint_id and not now["making"] else None

    return str(until(why))


def are_good(var: Path, count: int) -> None:
    found = whole(root_of(var))
    assert len(found) == count
    for each in found:
        checkpoints.verify(root_of(var) / each.id)


def in_cut(path: Path, owner: str) -> tuple[dict[str, int], list[tuple[str, int]], dict[str, int]]:
    """Return, of an owner in a cut: last numbers sent, those unanswered, last numbers received."""
    specs = table_specs(load(owner))

    def read(tables: Any) -> Any:
        sent = {
            key[4:] if isinstance(key, str) else key[0][4:]: row.value
            for key, row in tables["ksi.counters"].range()
            if (key if isinstance(key, str) else key[0]).startswith("out:")
        }
        received: dict[str, int] = {}
        for (sender, _instance), row in tables["ksi.clients"].range():
            received[sender] = max(row.last, received.get(sender, 0))
        return sent, [key for key, _ in tables["ksi.outbox"].range()], received

    found: tuple[dict[str, int], list[tuple[str, int]], dict[str, int]]
    found = read_copy(path / owner, specs, read)
    return found


def require_consistent(path: Path) -> int:
    """Every effect in a cut has its cause, and no cause is lost; return how many there were."""
    total = 0
    cut = {owner: in_cut(path, owner) for owner in OWNERS}
    for sender, receiver in PAIRS:
        sent, unanswered, _ = cut[sender]
        received = cut[receiver][2].get(sender, 0)
        assert received <= sent.get(receiver, 0), "an effect without its cause"
        waiting = {number for owner, number in unanswered if owner == receiver}
        lost = set(range(received + 1, sent.get(receiver, 0) + 1)) - waiting
        assert not lost, "a cause without a trace"
        total += received
    return total


def until_more(closed: list[str], count: int) -> None:
    enough = len(closed) + count
    until(lambda: len(closed) >= enough)


def test_a_stop_leaves_a_checkpoint_of_all_that_was_acknowledged(system: System) -> None:
    with system.client("alice") as alice:
        session_id = alice.ask("session:create")["session_id"]
        for n in range(10):
            alice.ask("session:append", session_id=session_id, event="n", data={"n": n})
    system.stop()

    (stopped,) = whole(root_of(system.var))
    assert stopped.reason == "stop"
    assert set(stopped.owners) == set(OWNERS)
    are_good(system.var, 1)
    content = system.file(session_id).read_bytes()
    (file,) = checkpoints.read_files(root_of(system.var) / stopped.id)
    assert (file.key, file.size, file.crc) == (session_id, len(content), crc32(content))


def test_a_checkpoint_of_many_sessions_knows_the_file_of_each_once(system: System) -> None:
    with system.client("alice") as alice:
        for n in range(PAGE_LOGS + 1):
            alice.tell("session:create", session_id=f"s{n}")
        alice.flush(timeout_s=30.0)
    found = made(system)
    keys = [file.key for file in checkpoints.read_files(root_of(system.var) / found.id)]
    assert sorted(keys) == sorted(f"s{n}" for n in range(PAGE_LOGS + 1))


def test_a_second_signal_does_not_tear_the_checkpoint_of_a_stop(system: System) -> None:
    from ksi.actors.supervision.lock import holder

    held = holder(system.var)
    assert held is not None
    for _ in range(5):
        os.kill(held.pid, signal.SIGTERM)
        time.sleep(0.02)  # Each meets another step of the stop.
    until(lambda: holder(system.var) is None)
    are_good(system.var, 1)


def test_only_the_newest_five_stay(system: System) -> None:
    ids = [made(system).id for _ in range(7)]
    assert [each.id for each in whole(root_of(system.var))] == ids[:1:-1]
    assert os.listdir(root_of(system.var)) != []
    are_good(system.var, 5)


def test_one_checkpoint_is_made_at_a_time(system: System) -> None:
    with paused(system):
        first = ordered(system)
        with pytest.raises(Conflict, match=first):
            ordered(system)
    until(lambda: listed(system)["making"] is None)
    assert [each["id"] for each in listed(system)["checkpoints"]] == [first]


def test_a_checkpoint_under_load_has_no_effect_without_its_cause(system: System) -> None:
    with load_on(system) as closed:
        until(lambda: closed)
        found = [made(system) for _ in range(5)]
    assert sum(require_consistent(root_of(system.var) / each.id) for each in found) > 0
    are_good(system.var, 5)


def test_a_cut_that_owners_hear_of_one_after_the_other_is_one_cut(system: System) -> None:
    total = 0
    with load_on(system) as closed:
        for first in ("sessions", "completion") * 3:
            with Cutting(system.var) as cutting:
                number = cutting.greet() + 1
                place = making(root_of(system.var), number)
                place.mkdir(parents=True)
                cutting._peers[first].tell(number)
                until((place / first).is_dir)
                until_more(closed, 9)  # The others have heard of it only from what they were told.
                cutting.cut(number)
                cutting.collect(place)
            total += require_consistent(place)
    assert total > 0


def test_a_number_that_no_checkpoint_has_is_not_believed(system: System) -> None:
    with system.client("mallory") as mallory:
        mallory.ask("session:create", session_id="s")
        mallory._caller._cut.number = 1 << 60
        mallory.ask("session:append", session_id="s", event="n", data={})
    made(system)
    are_good(system.var, 1)


def test_an_owner_that_does_not_answer_fails_that_checkpoint_only(system: System) -> None:
    with paused(system, "bus"):
        checkpoint_id = ordered(system)
        assert "bus did not" in failed(system, checkpoint_id)
        with system.client("alice") as alice:
            alice.ask("session:create", session_id="meanwhile")
    made(system)
    are_good(system.var, 1)


def test_an_owner_that_is_killed_meanwhile_leaves_no_half_checkpoint(system: System) -> None:
    for _ in range(5):
        checkpoint_id = ordered(system)
        kill(system, "sessions")
        until(lambda: listed(system)["making"] is None)
        now = listed(system)
        whole_ids = [each["id"] for each in now["checkpoints"]]
        assert checkpoint_id in whole_ids or now["failed_id"] == checkpoint_id
        for each in whole_ids:
            checkpoints.verify(root_of(system.var) / each)
    made(system)


def test_a_supervisor_that_is_killed_meanwhile_leaves_no_half_checkpoint(system: System) -> None:
    good = 0
    for pause_s in (0.0, 0.01, 0.02, 0.05, 0.1):
        ordered(system)
        time.sleep(pause_s)  # Each meets another step of the checkpoint.
        kill_all(system)
        found = whole(root_of(system.var))
        assert sorted(checkpoints.names(root_of(system.var))) == sorted(e.id for e in found)
        are_good(system.var, min(5, len(found)))
        system.start()
        made(system)
        good += 1
        are_good(system.var, len(whole(root_of(system.var))))
        hidden = [name for name in os.listdir(root_of(system.var)) if name.startswith(".")]
        assert hidden == []
    assert len(whole(root_of(system.var))) >= min(5, good)


def test_a_damaged_checkpoint_is_found(system: System) -> None:
    found = made(system)
    data = root_of(system.var) / found.id / "sessions" / "data.mdb"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(Corrupt, match="sessions"):
        checkpoints.verify(root_of(system.var) / found.id)


def fill(system: System, session_id: str, segments: int) -> int:
    """Append until the journal of the sessions has so many segments; return how many entries."""
    store = system.var / "db" / "sessions" / str(read_current(system.var / "db" / "sessions"))
    count = 0
    with system.client("alice") as alice:
        alice.ask("session:create", session_id=session_id)
        while len(segments_in(store)) < segments:
            text = "x" * 500_000
            alice.ask("session:append", session_id=session_id, event="n", data={"text": text})
            count += 1
    return count


def crash(system: System) -> None:
    """Kill all, and make it look as if the machine had gone down and the views had suffered."""
    kill_all(system)
    for current in (system.var / "db").glob("*/CURRENT"):
        store = current.parent / current.read_text().strip()
        (store / "STATE").write_text(json.dumps({"boot_id": "another", "clean": False}))
        data = store / "view" / "data.mdb"
        data.write_bytes(os.urandom(data.stat().st_size))


def test_after_a_crash_of_the_machine_a_checkpoint_replaces_dropped_segments(
    system: System,
) -> None:
    count = fill(system, "long", 3)
    sessions = system.var / "db" / "sessions"
    store = sessions / str(read_current(sessions))
    assert segments_in(store)[0] == 1
    for _ in range(2):
        system.stop()
        system.start()
    kept = segments_in(store)
    assert len(kept) < 3
    assert kept[0] > 1, "what two checkpoints and all followers are past is dropped"
    with system.client("alice") as alice:
        for n in range(10):
            alice.ask("session:append", session_id="long", event="after", data={"n": n})

    crash(system)
    system.start()

    assert read_mark(store, "another").name == "OTHER_BOOT"  # in use since this boot
    with system.client("alice") as alice:
        alice.ask("session:append", session_id="long", event="after", data={"n": 10})
        first = alice.read("session:history", session_id="long", after=0, limit=1)["entries"]
        last = alice.read("session:history", session_id="long", after=count)["entries"]
    assert first[0]["data"]["text"] == "x" * 500_000
    assert [each["data"]["n"] for each in last] == list(range(11))


def test_a_checkpoint_is_made_when_the_journals_have_grown(var: Path) -> None:
    running = System(var, (), **{"checkpoint.journal_bytes": 16 << 20})
    try:
        with running.client("alice") as alice:
            alice.ask("session:create", session_id="s")
            for _ in range(36):
                text = "x" * 500_000
                alice.ask("session:append", session_id="s", event="n", data={"text": text})
        until(lambda: whole(root_of(var)), 30.0)
        assert whole(root_of(var))[0].reason == "journal"
    finally:
        running.end()
