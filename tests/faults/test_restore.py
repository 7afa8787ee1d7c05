"""Restores: nothing overwritten, everybody told, all or nothing, and twice as good as once."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpointing import load_on, made
from system import System
from trouble import WAIT_S, entries, rows, until

from ksi.actors import restoring
from ksi.actors.checkpoints import root_of
from ksi.actors.owners import OWNERS
from ksi.storage import checkpoints
from ksi.storage.store import restore
from ksi.transport import AsyncClient
from ksi.transport.errors import Conflict, NotFound, Restored


@pytest.fixture
def var(in_memory: Path) -> Path:
    return in_memory / "var"


@pytest.fixture
def system(var: Path) -> Iterator[System]:
    running = System(var)
    yield running
    running.end()


def note(client: Any, session_id: str, n: int) -> None:
    client.ask("session:append", session_id=session_id, event="n", data={"n": n})


def noted(system: System, session_id: str) -> list[int]:
    return [entry["data"]["n"] for entry in entries(system, session_id)]


def written(system: System, session_id: str) -> list[int]:
    lines = system.file(session_id).read_bytes().splitlines()
    return [json.loads(line)["data"]["n"] for line in lines]


def everything(var: Path) -> dict[str, tuple[int, int]]:
    """Return what is below a directory: names, sizes, times."""
    found = {}
    for folder, _, names in os.walk(var):
        for name in names:
            status = os.lstat(f"{folder}/{name}")
            found[f"{folder}/{name}"] = (status.st_size, status.st_mtime_ns)
    return found


def grown(system: System) -> str:
    """Make a checkpoint of one session with two entries, go on, stop; return its id."""
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="early")
        note(alice, "early", 1)
        note(alice, "early", 2)
        checkpoint_id = made(system).id
        note(alice, "early", 3)
        alice.ask("session:create", session_id="late")
        note(alice, "late", 1)
    system.stop()
    return checkpoint_id


def test_a_restore_goes_back_to_the_checkpoint_and_keeps_what_came_after(system: System) -> None:
    checkpoint_id = grown(system)
    before = {path.name for path in (system.var / "db" / "sessions").iterdir() if path.is_dir()}

    done = restoring.run(system.var, checkpoint_id)
    assert (done.shortened, done.removed) == (["early"], ["late"])
    aside = system.var / "archive" / f"before-restore-{checkpoint_id}"
    assert len((aside / "early.jsonl").read_bytes().splitlines()) == 3
    assert len((aside / "late.jsonl").read_bytes().splitlines()) == 1
    assert before < {path.name for path in (system.var / "db" / "sessions").iterdir()}

    system.start()
    assert noted(system, "early") == written(system, "early") == [1, 2]
    with system.client("alice") as alice:
        with pytest.raises(NotFound):
            alice.ask("session:get", session_id="late")
        note(alice, "early", 30)
    assert noted(system, "early") == [1, 2, 30]
    until(lambda: written(system, "early") == [1, 2, 30])
    system.stop()
    system.start()
    assert noted(system, "early") == [1, 2, 30]


def test_a_client_and_a_reader_that_stay_notice(system: System) -> None:
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="s")
        checkpoint_id = made(system).id
        note(alice, "s", 1)
        assert alice.read("session:history", session_id="s")["entries"] != []
        system.stop()
        restoring.run(system.var, checkpoint_id)
        assert alice.read("session:history", session_id="s")["entries"] == []
        system.start()
        with pytest.raises(Restored):
            note(alice, "s", 2)
        note(alice, "s", 3)
    assert noted(system, "s") == [3]


def test_a_dry_run_says_the_same_and_changes_nothing(system: System) -> None:
    checkpoint_id = grown(system)
    before = everything(system.var)
    planned = restoring.plan(system.var, checkpoint_id)
    assert everything(system.var) == before
    assert planned == restoring.run(system.var, checkpoint_id)


def test_restoring_twice_changes_nothing_more(system: System) -> None:
    checkpoint_id = grown(system)
    assert not restoring.run(system.var, checkpoint_id).is_nothing
    before = everything(system.var)
    again = restoring.run(system.var, checkpoint_id)
    assert again.is_nothing
    after = everything(system.var)
    assert {**after, f"{system.var}/run/lock": 0} == {**before, f"{system.var}/run/lock": 0}


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    system: System,
) -> None:
    good = grown(system)
    newest = checkpoints.whole(root_of(system.var))[0].id
    assert newest > good
    data = root_of(system.var) / newest / "bus" / "data.mdb"
    content = bytearray(data.read_bytes())
    content[-100] ^= 1
    data.write_bytes(content)
    done = restoring.run(system.var)
    assert done.id == good
    assert list(done.damaged) == [newest]


def test_after_an_older_checkpoint_the_newest_can_still_be_restored_whole(system: System) -> None:
    older = grown(system)
    newest = checkpoints.whole(root_of(system.var))[0].id
    restoring.run(system.var, older)

    planned = restoring.plan(system.var, newest)
    assert (planned.returned, planned.missing) == (["early", "late"], [])
    assert restoring.run(system.var, newest) == planned
    assert restoring.run(system.var, newest).is_nothing
    assert (written(system, "early"), written(system, "late")) == ([1, 2, 3], [1])
    system.start()
    assert (noted(system, "early"), noted(system, "late")) == ([1, 2, 3], [1])


def test_a_file_kept_aside_that_is_not_what_the_checkpoint_knows_stays_there(
    system: System,
) -> None:
    older = grown(system)
    newest = checkpoints.whole(root_of(system.var))[0].id
    aside = system.var / "archive" / restoring.run(system.var, older).aside
    (aside / "late.jsonl").write_bytes((aside / "late.jsonl").read_bytes().replace(b"1", b"7"))

    done = restoring.run(system.var, newest)
    assert (done.returned, done.missing) == (["early"], ["late"])
    assert not system.file("late").exists()


def test_a_former_store_goes_behind_the_last_checkpoint_of_it(var: Path) -> None:
    system = System(var, (), **{"checkpoint.former_s": 0, "checkpoint.keep": 2})
    try:
        checkpoint_id = grown(system)

        def stores() -> int:
            return len(list((var / "db" / "sessions").glob("*/STATE")))

        restoring.run(var, checkpoint_id)
        system.start()
        made(system)
        assert stores() == 2, "a checkpoint of it is left"
        made(system)
        assert stores() == 1
        assert noted(system, "early") == [1, 2]
        assert len(list((var / "archive").glob("before-restore-*/*"))) == 2
    finally:
        system.end()


def test_nothing_is_restored_while_the_system_runs(system: System) -> None:
    made(system)
    with pytest.raises(Conflict):
        restoring.run(system.var)


def test_a_restore_that_is_cut_short_is_ended_before_anything_starts(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_id = grown(system)
    real, calls = restore, iter(range(100))

    def dies(*arguments: Any) -> str:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(restoring, "restore", dies)
    with pytest.raises(KeyboardInterrupt):
        restoring.run(system.var, checkpoint_id)
    monkeypatch.setattr(restoring, "restore", real)

    with pytest.raises(Conflict, match="cut short"):
        system.start()
    newest = checkpoints.whole(root_of(system.var))[0].id
    with pytest.raises(Conflict, match="cut short"):
        restoring.run(system.var, newest)
    done = restoring.run(system.var)
    assert (done.id, len(done.unchanged), len(done.owners)) == (checkpoint_id, 2, len(OWNERS) - 2)
    system.start()
    assert noted(system, "early") == [1, 2]
    aside = system.var / "archive" / done.aside
    assert len((aside / "early.jsonl").read_bytes().splitlines()) == 3


def before_and_after(system: System, kept: int) -> Iterator[None]:
    """Say five things, some before a checkpoint; once they are read, go back and say another."""
    with system.client("alice") as alice:
        for n in range(1, 6):
            alice.ask("message:publish", topic="jobs.new", message={"n": n})
            if n == kept:
                checkpoint_id = made(system).id
    yield
    system.stop()
    restoring.run(system.var, checkpoint_id)
    system.start()
    with system.client("alice") as alice:
        alice.ask("message:publish", topic="jobs.new", message={"n": 6})
    yield


def test_a_reader_that_lives_through_a_restore_of_the_bus_begins_anew(system: System) -> None:
    with system.client("bob") as bob, bob.subscribe("jobs.>", durable="jobs") as jobs:
        went = before_and_after(system, kept=2)
        next(went)
        former = [jobs.next(WAIT_S) for _ in range(5)]
        former[0].ack()
        bob.flush()
        next(went)
        again = [jobs.next(WAIT_S) for _ in range(3)]
        assert [each.message["n"] for each in again] == [1, 2, 6]
        with pytest.raises(Restored):
            former[1].ack()  # Its number is that of another message now.
        for each in again:
            each.ack()
        bob.flush()
        assert bob.read("message:stats")["waiting"] == 0


def test_on_asyncio_it_begins_anew_likewise(system: System) -> None:
    async def read() -> None:
        async with AsyncClient("bob", var=system.var) as bob:
            jobs = await bob.subscribe("jobs.>", durable="jobs")
            went = before_and_after(system, kept=1)
            next(went)
            former = [await jobs.next(WAIT_S) for _ in range(5)]
            next(went)
            again = [await jobs.next(WAIT_S) for _ in range(2)]
            assert [each.message["n"] for each in again] == [1, 6]
            with pytest.raises(Restored):
                await former[1].ack()
            for each in again:
                await each.ack()
            await bob.flush()

    asyncio.run(read())


@pytest.mark.parametrize("rule", ["retry", "fail"])
def test_after_a_restore_requests_go_on_in_order_and_what_was_interrupted_once(
    system: System, rule: str
) -> None:
    with system.client("alice") as alice, system.client("w", role="worker") as worker:
        for session_id in ("s1", "s2"):
            alice.ask("session:create", session_id=session_id)
        for n in range(3):
            alice.ask("completion:async", session_id="s1", prompt="x", request_id=f"a{n}")
            alice.ask("completion:async", session_id="s2", prompt="x", request_id=f"b{n}")
        epoch = worker.ask("worker:register")["epoch"]
        assert until(lambda: granted(worker)) == ["a0"]
        checkpoint_id = made(system).id
        assert answer(worker, 6) == ["a0", "b0", "a1", "b1", "a2", "b2"]
        system.stop()
        (system.var / "ksi.toml").write_text(f'[checkpoint]\ninterrupted = "{rule}"\n')

        planned = restoring.plan(system.var, checkpoint_id)
        assert planned.queued == {"s1": 2, "s2": 3}
        assert (planned.interrupted, planned.rule) == (["a0"], rule)
        restoring.run(system.var, checkpoint_id)
        system.start()
        with system.client("bob") as bob:
            interrupted = bob.ask("completion:status", request_id="a0")
        with pytest.raises(Restored):
            worker.ask("worker:renew", epoch=epoch)
        with pytest.raises(NotFound):
            worker.ask("worker:renew", epoch=epoch)
        epoch = worker.ask("worker:register")["epoch"]
        system.stop()
        system.start()  # What was decided at the first start is not decided again.
        assert until(lambda: worker.ask("worker:renew", epoch=epoch)["grants"])
        rest = ["b0", "a1", "b1", "a2", "b2"]
        if rule == "retry":
            assert (interrupted["status"], interrupted["attempt"]) == ("queued", 1)
            assert answer(worker, 6) == ["a0", *rest]
        else:
            ended = (interrupted["status"], interrupted["reason"])
            assert ended == ("failed", "daemon_restart")
            assert answer(worker, 5) == rest
    until(lambda: not rows(system, "completion", "ksi.outbox"))
    ends = [each for each in entries(system, "s1") if each["event"] != "completion:request"]
    assert len(ends) == 3
    failed = [each["data"]["reason"] for each in ends if each["event"] == "completion:failed"]
    assert failed == ([] if rule == "retry" else ["daemon_restart"])


def granted(worker: Any) -> list[str]:
    grants = worker.ask("worker:grants", worker="w")["grants"]
    return [each["request_id"] for each in grants]


def answer(worker: Any, count: int) -> list[str]:
    """Report so many of the requests as they are granted; return the order."""
    order: list[str] = []
    while len(order) < count:
        (grant,) = until(lambda: worker.ask("worker:grants", worker="w")["grants"])
        name = {"request_id": grant["request_id"], "attempt": grant["attempt"]}
        worker.ask("worker:report", **name, result={"response": "x"})
        order.append(grant["request_id"])
    return order


def test_what_owners_had_to_tell_each_other_arrives_once_after_a_restore(system: System) -> None:
    with load_on(system) as closed:
        until(lambda: closed)  # Something has been told by now, and some is on its way.
        checkpoint_id = made(system).id
    system.stop()
    restoring.run(system.var, checkpoint_id)
    system.start()
    until(
        lambda: not any(rows(system, owner, "ksi.outbox") for owner in ("sessions", "completion"))
    )
    recorded: Counter[tuple[str, str, str]] = Counter()
    for session_id in rows(system, "sessions", "sessions"):
        key = session_id if isinstance(session_id, str) else session_id[0]
        for each in entries(system, key):
            recorded[(key, each["event"], each["correlation_id"])] += 1
    assert recorded
    assert set(recorded.values()) == {1}


def test_who_watches_the_state_is_told_that_its_revisions_are_others_now(system: System) -> None:
    with system.client("alice") as alice:
        alice.ask("state:set", key="k", value=1)
        checkpoint = made(system).id
        alice.ask("state:set", key="k", value=2)
        with alice.watch("k", after=0) as changes:
            assert [changes.next(WAIT_S)["properties"]["value"] for _ in range(2)] == [1, 2]
            revision, store = changes.revision, changes.store
            system.stop()
            restoring.run(system.var, checkpoint)
            system.start()
            with system.client("bob") as bob:
                for value in (3, 4, 5):
                    bob.ask("state:set", key="k", value=value)
                with pytest.raises(Restored, match="its revisions are others"):
                    bob.watch("k", after=revision, store=store)
            with pytest.raises(Restored):
                changes.next(WAIT_S)
