"""`ksi checkpoint` and `ksi restore`, and what makes up a checkpoint on disk."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpointing import made
from system import System
from trouble import until

from ksi.actors import checkpoints as actors_checkpoints
from ksi.actors.checkpoints import Cuts, root_of
from ksi.actors.config import CheckpointSection
from ksi.actors.supervision import checkpointing
from ksi.actors.supervision.checkpointing import Checkpoints
from ksi.actors.supervision.child import ChildSpec
from ksi.console.main import main
from ksi.storage import checkpoints
from ksi.storage.checkpoints import Checkpoint, File
from ksi.storage.errors import Corrupt
from ksi.storage.journal import Position, bytes_after, create_segment, drop_segments, segments_in
from ksi.transport.errors import Conflict, NotFound


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run a command with `--json`, and return what it printed; it must succeed."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def made_of_nothing(root: Path, number: int) -> Checkpoint:
    place = checkpoints.making(root, number)
    place.mkdir(parents=True)
    count, size, digest = checkpoints.write_files(place, [File("a", 5, 7)])
    made = Checkpoint(
        id=f"2026-{number}",
        number=number,
        created_at=0.0,
        reason="hand",
        owners={},
        files=count,
        files_bytes=size,
        files_sha256=digest,
    )
    checkpoints.publish(place, root, made)
    return made


def test_checkpoints_are_made_shown_verified_removed_and_restored_by_command(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    var = ("--var", str(system.var))
    first = shown(capsys, *var, "checkpoint", "create")
    second = shown(capsys, *var, "checkpoint", "create")
    listed = shown(capsys, *var, "checkpoint", "list")["checkpoints"]
    assert [each["id"] for each in listed] == [second["id"], first["id"]]
    assert shown(capsys, *var, "checkpoint", "show")["id"] == second["id"]
    assert shown(capsys, *var, "checkpoint", "show", first["id"])["number"] == first["number"]
    verified = shown(capsys, *var, "checkpoint", "verify")["checkpoints"]
    assert [each["good"] for each in verified] == [True, True]
    status = shown(capsys, *var, "status")["checkpoint"]
    assert (status["id"], status["count"], status["failed"]) == (second["id"], 2, None)
    removed = shown(capsys, *var, "checkpoint", "prune", "--keep", "1")["removed"]
    assert removed == [first["id"]]
    with system.client("operator", role="operator") as operator:
        third = operator.ask("dev:checkpoint")["id"]
        assert third > second["id"]
        until(lambda: operator.ask("dev:checkpoint", action="status")["id"] == third)
        assert operator.ask("checkpoint:verify") == {"id": third, "good": True, "reason": None}
        for refused in ({"action": "clear_all"}, {"action": "remove_request", "request_id": "r"}):
            with pytest.raises(Conflict):
                operator.ask("dev:checkpoint", refused)
        with pytest.raises(Conflict, match="while the system runs"):
            operator.ask("dev:restore", id=second["id"])
        manifest = system.var / "checkpoints" / third / "bus" / "manifest.json"
        manifest.write_text("{}")
        assert operator.ask("checkpoint:verify", id=third)["good"] is False
        with pytest.raises(NotFound):
            operator.ask("checkpoint:verify", id="none")
    system.stop()

    planned = shown(capsys, *var, "restore", second["id"], "--dry-run")
    assert (planned["dry_run"], planned["changed"]) == (True, True)
    assert shown(capsys, *var, "restore", second["id"])["changed"]
    assert not shown(capsys, *var, "restore", second["id"])["changed"]


def test_every_session_is_looked_up_however_many_there_are_and_whatever_they_are_called(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors_checkpoints, "PAGE_LOGS", 2)
    names = ["1st", "2nd", "a", "b", "c"]
    with system.client("alice") as alice:
        for name in names:
            alice.ask("session:create", session_id=name)
    copy = root_of(system.var) / made(system).id / "sessions"
    found = islice(actors_checkpoints._logs(copy), 10)
    assert [name for name, _size in found] == names


def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    var = ("--var", str(tmp_path / "var"))
    for words in (("checkpoint", "show"), ("restore",), ("restore", "--dry-run"), ("restore", "x")):
        assert main([*var, *words]) == NotFound.exit_code
        assert "not_found" in capsys.readouterr().err
    assert not (tmp_path / "var").exists()


def test_the_newest_stay_and_a_damaged_one_counts_for_none(tmp_path: Path) -> None:
    for number in range(1, 6):
        made_of_nothing(tmp_path, number)
    (tmp_path / "2026-5" / "manifest.json").write_text("{")
    assert checkpoints.prune(tmp_path, 2) == ["2026-1", "2026-2", "2026-5"]
    assert [each.number for each in checkpoints.whole(tmp_path)] == [4, 3]


def test_one_that_was_being_made_is_never_listed_and_swept(tmp_path: Path) -> None:
    made_of_nothing(tmp_path, 1)
    checkpoints.making(tmp_path, 2).mkdir()
    assert checkpoints.names(tmp_path) == ["2026-1"]
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["2026-1"]


def test_a_list_of_files_that_was_changed_is_found(tmp_path: Path) -> None:
    made = made_of_nothing(tmp_path, 1)
    assert checkpoints.verify(tmp_path / made.id) == made
    assert list(checkpoints.read_files(tmp_path / made.id)) == [File("a", 5, 7)]
    (tmp_path / made.id / checkpoints.FILES).write_text('["a", 5, 8]\n')
    with pytest.raises(Corrupt):
        checkpoints.verify(tmp_path / made.id)


class Spawned:
    """What a supervisor starts, without a process."""

    def __init__(self) -> None:
        self.specs: list[ChildSpec] = []
        self.signals: list[int] = []
        self.started_s = time.monotonic()

    def spawn(self, spec: ChildSpec, _has_ended: Any) -> Any:
        self.specs.append(spec)
        return self

    def signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def spawned() -> Spawned:
    return Spawned()


def checkpoints_of(var: Path, spawned: Spawned) -> Checkpoints:
    return Checkpoints(var, var / "run", spawned.spawn, lambda _: None, None)


def test_one_is_made_by_time_if_something_has_changed(tmp_path: Path, spawned: Spawned) -> None:
    store = tmp_path / "db" / "sessions" / "store"
    store.mkdir(parents=True)
    (store.parent / "CURRENT").write_text("store\n")
    hourly, never = CheckpointSection(every_s=3600.0), CheckpointSection(every_s=0.0)
    later_s = time.monotonic() + 60
    made = made_of_nothing(tmp_path / "checkpoints", 1)  # long ago
    checkpoints_of(tmp_path, spawned).turn(hourly, later_s)
    assert spawned.specs == []
    with open(create_segment(store, 1), "wb") as file:
        file.write(b"x" * 100)
    checkpoints_of(tmp_path, spawned).turn(never, later_s)
    assert spawned.specs == []
    making = checkpoints_of(tmp_path, spawned)
    making.turn(hourly, later_s)
    assert spawned.specs[0].arguments[2] == "time"
    assert making.making is not None
    assert made.created_at == 0.0


def test_a_last_one_that_hangs_is_ended(
    tmp_path: Path, spawned: Spawned, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = checkpoints_of(tmp_path, spawned)
    for _ in range(3):
        assert not making.is_last_taken(CheckpointSection())
    assert (len(spawned.specs), spawned.signals) == (1, [])
    monkeypatch.setattr(checkpointing, "LAST_S_MAX", -1.0)
    assert not making.is_last_taken(CheckpointSection())
    assert spawned.signals == [signal.SIGKILL]


def test_one_owner_copies_at_a_time_and_none_waits_for_another_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, released = checkpoints.making(tmp_path / "checkpoints", 1), []
    place.mkdir(parents=True)
    frozen = SimpleNamespace(copy=Path.mkdir, release=lambda: released.append(1))
    store: Any = SimpleNamespace(freeze=lambda: frozen)
    cuts = Cuts("sessions", tmp_path, store, None)
    with other_copies(place):
        monkeypatch.setattr(actors_checkpoints, "TURN_S_MAX", 60.0)
        assert cuts.make(1)
        time.sleep(0.1)  # It has its chance.
        assert not (place / "sessions").exists()
        assert not released
    until((place / "sessions").exists)
    with other_copies(place):
        monkeypatch.setattr(actors_checkpoints, "TURN_S_MAX", 0.01)
        (place / "sessions").rmdir()
        assert cuts.make(1)
        until((place / "sessions").exists)
        cuts.close()
    assert released == [1, 1]


@contextmanager
def other_copies(place: Path) -> Iterator[None]:
    held = os.open(place, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(held)


def test_segments_are_counted_and_dropped_but_for_the_last(tmp_path: Path) -> None:
    for segment in (1, 10, 20):
        with open(create_segment(tmp_path, segment), "wb") as file:
            file.write(b"x" * 100)
    assert bytes_after(tmp_path, Position(1, 40)) == 260
    assert bytes_after(tmp_path, Position(20, 100)) == 0
    assert drop_segments(tmp_path, 19) == 1
    assert segments_in(tmp_path) == [10, 20]
    assert drop_segments(tmp_path, 1000) == 1
    assert segments_in(tmp_path) == [20]
