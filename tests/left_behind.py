"""What a killed system leaves to be done, the work that does it, and what must hold at any time.

Commit, projection with archive, index, checkpoint with prune, and restore, each in the process of
whoever calls it, over the stores of a system that was killed in the middle of its work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from checkpointing import made
from crashing import in_child
from disk import SAID
from system import System
from trouble import until

from ksi.actors import checkpoints as making
from ksi.actors import restoring
from ksi.actors.checkpoints import root_of
from ksi.actors.declarations.sessions import GetHistory
from ksi.actors.followers.files import LogFollower
from ksi.actors.followers.indexed import Verification
from ksi.actors.followers.indexing import IndexFollower
from ksi.actors.owner import Sender
from ksi.actors.owners import OWNERS, load
from ksi.actors.process import open_store
from ksi.actors.reading import reader_of
from ksi.actors.supervision.lock import holder
from ksi.actors.testing import reply_of, work_of
from ksi.storage import checkpoints
from ksi.storage.examination import lock_holder

SESSIONS = ("open", "over")
KEEP = 5
APPENDS = 4


class Quiet:
    """A log nobody reads."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_words, **_fields: None


class Left(NamedTuple):
    """What a killed system has left in `var`, kept beside it, and what was said in it by then."""

    var: Path
    kept: Path
    said: dict[str, list[Any]]

    @property
    def marks(self) -> Path:
        """Where an action says what its clients have been answered."""
        return self.var / SAID

    def put_back(self) -> None:
        shutil.rmtree(self.var, ignore_errors=True)
        shutil.copytree(self.kept, self.var)
        (self.var / "run").mkdir(mode=0o700)

    def open_all(self) -> None:
        """Recover the stores of all owners, as their start does."""
        for owner in OWNERS:
            store, _loop = open_store(load(owner), self.var / "db" / owner, Quiet())
            store.close()


@contextmanager
def left_behind() -> Iterator[Left]:
    """Let a system work in a directory in memory, kill it, and give what it has left."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, prefix="ksi-test-") as name:
        var = Path(name) / "var"
        system = System(var)
        try:
            said = work_and_die(system)
        finally:
            system.end()
        until(lambda: not any(lock_holder(var / "db" / owner) for owner in OWNERS))
        kept = Path(name) / "kept"
        shutil.copytree(var, kept, ignore=shutil.ignore_patterns("run", "keys"))
        yield Left(var, kept, said)


def work_and_die(system: System) -> dict[str, list[Any]]:
    """Leave five checkpoints, and lines that are in no file, no index and no archive yet."""
    with system.client("alice") as alice, system.client("op", role="operator") as operator:

        def say(count: int) -> None:
            for session in SESSIONS:
                for n in range(count):
                    alice.ask("session:append", session_id=session, event="n", data={"n": n})

        for session in SESSIONS:
            alice.ask("session:create", session_id=session)
        say(20)
        for _ in range(KEEP):
            made(system)
            say(2)
        until(lambda: operator.read("index:status")["behind_bytes"] == 0)
        for name in ("files", "index"):
            system.kill(name, signal.SIGSTOP)
        say(20)
        alice.ask("session:close", session_id="over")
        operator.ask("session:archive", session_ids=["over"])
    held = holder(system.var)
    assert held is not None
    os.kill(held.pid, signal.SIGKILL)
    until(lambda: holder(system.var) is None)
    return history_in(system.var)


def history_in(var: Path) -> dict[str, list[Any]]:
    reader = reader_of("sessions", var)
    return {
        name: reader.answer(GetHistory(session_id=name, after=0, limit=1000)).entries
        for name in SESSIONS
    }


def require_said(left: Left) -> None:
    """Check that all that was said is still there, in its order."""
    for name, entries in history_in(left.var).items():
        assert entries[: len(left.said[name])] == left.said[name]


def commit(left: Left) -> None:
    """Append, note each answer as its client would, and close."""
    store, loop = open_store(load("sessions"), left.var / "db" / "sessions", Quiet())
    for number in range(1, APPENDS + 1):
        fields = {"session_id": "open", "event": "acked", "data": {"n": number}}
        alice = Sender("alice", "agent")
        work = work_of(alice, "session:append", fields, number)
        outcome = loop.run([work], (), time.time(), 1.0, 1.0)
        reply_of("session:append", outcome.answers[0][2])
        with open(left.marks, "ab", 0) as marks:
            marks.write(b"%d\n" % number)
    store.close()


def require_committed(left: Left, *, is_done: bool) -> None:
    def check() -> None:
        store, _loop = open_store(load("sessions"), left.var / "db" / "sessions", Quiet())
        store.close()
        require_said(left)
        entries = history_in(left.var)["open"][len(left.said["open"]) :]
        numbers = [each["data"]["n"] for each in entries if each["event"] == "acked"]
        acked = [*map(int, left.marks.read_bytes().split())] if left.marks.exists() else []
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= max(acked, default=0), "what was acknowledged is lost"
        assert not is_done or len(numbers) == APPENDS

    assert in_child(check) == 0


def project(left: Left) -> None:
    """Write session files as far as the journal goes, and archive what is to be archived."""
    follower = LogFollower("sessions", left.var, Quiet())
    while follower.turn() or follower.idle():
        pass
    follower.close()


def require_projected(left: Left, *, is_done: bool) -> None:
    assert in_child(partial(require_said, left)) == 0
    if is_done:
        assert os.listdir(left.var / "logs/responses/sessions") == ["open.jsonl"]
        assert os.listdir(left.var / "archive/sessions") == ["over.jsonl.zst"]
        content = (left.var / "logs/responses/sessions/open.jsonl").read_bytes()
        assert [json.loads(line) for line in content.splitlines()] == left.said["open"]


def index(left: Left) -> None:
    """Index what the files have; fails if it cannot come to the end of it."""
    project(left)
    follower = IndexFollower(left.var, Quiet())
    until_s = time.monotonic() + 20.0
    while follower.turn() or follower.is_behind() or follower._writer is None:
        assert time.monotonic() < until_s, follower._trouble
    follower.close()


def require_indexed(left: Left, *, is_done: bool) -> None:
    def check() -> None:
        require_said(left)
        if is_done:
            verification = Verification(left.var)
            while verification.turn():
                pass
            assert verification.found == []
            assert verification.rows == sum(map(len, left.said.values()))

    assert in_child(check) == 0


def checkpoint(left: Left) -> None:
    """Make a checkpoint, as after a stop, and remove what is not needed any more."""
    making.make(left.var, "99991231T000000.000Z", "stop")
    checkpoints.prune(root_of(left.var), KEEP)
    making.drop_journals(left.var)


def require_checkpoints(left: Left, *, is_done: bool) -> None:
    def check() -> None:
        root = root_of(left.var)
        whole = [checkpoints.verify(root / each.id) for each in checkpoints.whole(root)]
        assert len(whole) >= KEEP
        assert sorted(each.id for each in whole) == checkpoints.names(root)
        require_said(left)
        if is_done:
            assert len(whole) == KEEP
            assert whole[0].reason == "stop"

    assert in_child(check) == 0


def checkpoint_again(left: Left) -> None:
    """As the next stop would: one of that name may be there already."""
    if not (root_of(left.var) / "99991231T000000.000Z").exists():
        making.make(left.var, "99991231T000000.000Z", "stop")
    checkpoints.prune(root_of(left.var), KEEP)
    making.drop_journals(left.var)


def restore(left: Left) -> None:
    restoring.run(left.var)


def require_restored(left: Left, *, is_done: bool) -> None:
    def check() -> None:
        newest = checkpoints.whole(root_of(left.var))[0]
        logs = left.var / "logs/responses/sessions"
        asides = (left.var / "archive").glob("before-restore-*")  # After EIO, an older one's.
        kept = [logs, *asides]
        for name in SESSIONS:
            lines = (left.kept / "logs/responses/sessions" / f"{name}.jsonl").read_bytes()
            places = [each / f"{name}.jsonl" for each in kept]
            found = [each.read_bytes() for each in places if each.exists()]
            assert lines in found, "the whole of a longer file is kept nowhere"
        if is_done:
            assert restoring.plan(left.var, newest.id).is_nothing
            history = history_in(left.var)
            assert {name: len(history[name]) for name in SESSIONS} == dict.fromkeys(SESSIONS, 28)

    assert in_child(check) == 0


class Work(NamedTuple):
    """What is done, what must hold at any time and in the end, and how it is done again."""

    act: Callable[[Left], None]
    require: Callable[..., None]
    again: Callable[[Left], None]


WORK = {
    "commit": Work(commit, require_committed, commit),
    "projection and archive": Work(project, require_projected, project),
    "index": Work(index, require_indexed, index),
    "checkpoint and prune": Work(checkpoint, require_checkpoints, checkpoint_again),
    "restore": Work(restore, require_restored, restore),
}
