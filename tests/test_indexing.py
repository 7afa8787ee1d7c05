"""The index of a running system: it keeps up, survives kills and damage, and is built again."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from system import System
from trouble import kill, paused, until

from ksi.actors.followers.indexed import Verification, index_directory
from ksi.actors.process import NICE
from ksi.storage import sqlite
from ksi.storage.errors import Corrupt
from ksi.storage.index import IndexReader
from ksi.transport.errors import Forbidden, NotRunning

SESSIONS = 8
KILLS = 50


class Index:
    """The index of a system, as tests look at it."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.directory = index_directory(system.var)
        self.reader = IndexReader(self.directory)
        self.operator = system.client("operator", role="operator")
        self.alice = system.client("alice")
        self.said = 0
        for n in range(SESSIONS):
            self.alice.ask("session:create", session_id=f"s{n}", pattern="peer_to_peer")

    def say(self, chance: random.Random, entries: int) -> None:
        """Say all kinds of things in a few sessions; some of it is asked and answered."""
        for n in range(entries):
            event = chance.choice(("note", "completion:request", "completion:result"))
            correlation_id = f"req_{chance.randrange(entries)}"
            self.alice.tell(
                "session:append",
                session_id=f"s{chance.randrange(SESSIONS)}",
                event=event,
                data={"n": n, "text": "x" * chance.randrange(200), "to_agent": f"a{n % 20}"},
                correlation_id=None if event == "note" else correlation_id,
            )
        self.alice.flush(30.0)
        self.said += entries

    def close(self) -> None:
        self.alice.close()
        self.operator.close()

    def status(self) -> dict[str, Any]:
        """Return what the index says of itself; nothing while it is damaged."""
        try:
            found: dict[str, Any] = self.operator.read("index:status")
        except (Corrupt, NotRunning):
            return {"state": "unreadable", "behind_bytes": None, "rebuilt": 0, "rows": 0}
        return found

    def has_caught_up(self) -> bool:
        now = self.status()
        return bool(now["state"] == "following" and now["behind_bytes"] == 0)

    def has_settled(self) -> bool:
        """Whether its writer has left the newest day as it is: all of it is in the file itself."""
        day = self.day()
        cursor = f"{(self.directory / 'cursor.db').as_uri()}?mode=ro"
        with closing(sqlite3.connect(cursor, uri=True)) as database:
            known = "SELECT inode, size_bytes, changed_ns FROM days WHERE day = ?"
            (left,) = database.execute(known, (day.stem,)).fetchall()
        return left == sqlite.signature_of(day) and day.stat().st_size > 65_536

    def rebuild(self) -> None:
        number = self.operator.ask("index:rebuild")["number"]
        until(lambda: self.status()["rebuilt"] >= number, 30.0)

    def verify(self) -> dict[str, Any]:
        """Order a verification and return what it found."""
        number = self.operator.ask("index:verify")["number"]

        def verified() -> Any:
            found = self.status().get("verified")
            return found if found and found["number"] == number else None

        found: dict[str, Any] = until(verified)
        return found

    def dump(self) -> list[str]:
        """Return all of it, once it has caught up."""
        until(self.has_caught_up, 30.0)
        return list(self.reader.dump())

    def logged(self, event: str) -> list[str]:
        """Return the reasons the log gives for an event."""
        lines = (self.system.var / "logs" / "ksi" / "index.jsonl").read_text().splitlines()
        entries = map(json.loads, lines)
        return [each.get("reason", "") for each in entries if each["event"] == event]

    def day(self) -> Path:
        """Return the newest database."""
        return max((self.directory / "daily").glob("*.db"))

    def require_right(self) -> None:
        """Check that every row says where its entry is, and that nothing differs or is missing."""
        rows = self.reader.select(limit=1_000_000)
        assert len(rows) == self.said
        for row in rows:
            with open(row.file_path, "rb") as file:
                file.seek(row.byte_offset)
                entry = json.loads(file.readline())
            assert entry["metadata"]["session_id"] == row.session_id
            assert entry["metadata"]["seq"] == row.line_number
        verification = Verification(self.system.var)
        while verification.turn():
            pass
        assert verification.found == []
        assert verification.rows == self.said


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    system = System(tmp_path_factory.mktemp("index") / "var")
    found = Index(system)
    yield found
    found.close()
    system.end()


def test_after_fifty_kills_the_index_is_the_one_that_is_built_from_the_files(
    system: System,
) -> None:
    """The index, and now and then the files, are killed under load: `KSI_SEED` repeats it."""
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    index = Index(system)
    ended = threading.Event()

    def load() -> None:
        while not ended.wait(0.01):
            index.say(random.Random(index.said), 32)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for n in range(KILLS):
            if n % 5 == 4:  # One that dies while the index is built, or just before or after.
                index.operator.ask("index:rebuild")
            time.sleep(chance.uniform(0.0, 0.15))  # It may come at any moment.
            kill(system, chance.choices(["index", "files"], [4, 1])[0])
    finally:
        ended.set()
        loading.join()
    incremental = index.dump()
    index.require_right()
    index.rebuild()
    assert index.dump() == incremental
    print(f"{index.said} entries, {KILLS} kills")
    index.close()


def test_without_a_rebuild_a_killed_follower_goes_on_where_it_was(index: Index) -> None:
    index.dump()
    built = len(index.logged("building the index"))
    for _ in range(3):
        index.say(random.Random(1), 100)
        kill(index.system, "index")
        index.say(random.Random(2), 100)
    index.dump()
    assert len(index.logged("building the index")) == built
    index.require_right()


def delete(index: Index) -> None:
    index.day().unlink()


def truncate(index: Index) -> None:
    os.truncate(index.day(), 8192)


def overwrite(index: Index) -> None:
    with index.day().open("r+b") as file:
        file.seek(4096)
        file.write(b"\xde\xad" * 20_000)


def replace(index: Index) -> None:
    other = index.day().with_name("other")
    other.write_bytes(b"no database")
    other.rename(index.day())


def delete_cursor(index: Index) -> None:
    (index.directory / "cursor.db").unlink()


def delete_all(index: Index) -> None:
    for path in sorted(index.directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


DAMAGES: list[Callable[[Index], None]] = [
    delete,
    truncate,
    overwrite,
    replace,
    delete_cursor,
    delete_all,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_index_that_is_damaged_while_it_runs_is_built_again_by_itself(
    index: Index, damage: Callable[[Index], None]
) -> None:
    index.say(random.Random(3), 500)
    before = index.dump()
    until(index.has_settled)
    begun, built = len(index.logged("building the index")), len(index.logged("the index is built"))

    damage(index)
    until(lambda: len(index.logged("the index is built")) > built, 20.0)
    assert index.dump() == before
    assert len(index.logged("building the index")) == begun + 1, "the log says why, once"
    index.say(random.Random(4), 100)
    index.dump()
    index.require_right()


def test_an_index_that_is_deleted_while_nothing_runs_is_there_again_after_the_start(
    index: Index,
) -> None:
    index.say(random.Random(3), 300)
    before = index.dump()
    index.system.stop()
    delete_all(index)
    index.system.start()

    assert index.dump() == before


def test_it_is_built_from_the_journal_where_a_file_is_short(index: Index) -> None:
    index.say(random.Random(3), 300)
    before = index.dump()
    with paused(index.system, "files"):
        for name in ("s1", "s2"):
            os.truncate(index.system.file(name), index.system.file(name).stat().st_size // 2)
        index.rebuild()
        assert index.dump() == before
    for name in ("s1", "s2"):  # Whoever writes the files mends them with the next entry.
        index.alice.ask("session:append", session_id=name, event="note")
    index.said += 2
    index.dump()
    index.require_right()


def test_while_files_are_not_written_no_row_speaks_of_them(index: Index) -> None:
    index.dump()
    said = index.said
    with paused(index.system, "files"):
        index.say(random.Random(4), 100)
        index.verify()  # By then it has looked for what is new.
        assert index.status()["behind_bytes"]
        index.said, said = said, index.said
        index.require_right()
    index.said = said
    index.dump()
    index.require_right()


def test_queries_are_answered_in_place_with_the_index_stopped_and_by_it_otherwise(
    index: Index,
) -> None:
    index.say(random.Random(5), 20)
    index.dump()
    with index.system.client("bob") as bob:
        asked = bob.ask("index:pending", limit=1000)
        assert asked["entries"]
        with paused(index.system, "index"):
            assert bob.read("index:pending", limit=1000) == asked
        index.system.stop()
        assert bob.read("index:pending", limit=1000) == asked
        index.system.start()


def test_only_an_operator_orders(index: Index) -> None:
    for order in ("index:rebuild", "index:verify"):
        with pytest.raises(Forbidden):
            index.alice.ask(order)


def test_a_verification_that_is_ordered_tells_of_a_file_that_was_edited(index: Index) -> None:
    index.say(random.Random(3), 100)
    index.dump()
    file = index.system.file("s1")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"xx", b"yy", 1))

    found = index.verify()
    assert (found["rows"], found["differences"]) == (index.said, 1)
    assert found["found"][0].startswith("s1.jsonl was changed by hand")
    file.write_bytes(content)


def test_what_stands_in_the_way_of_a_database_is_said_and_waited_for(index: Index) -> None:
    index.say(random.Random(3), 50)
    index.dump()
    failed = len(index.logged("the index cannot be written"))
    day = index.day()
    day.unlink()
    day.mkdir()
    until(lambda: len(index.logged("the index cannot be written")) > failed, 20.0)
    assert index.system.pid_of("index") is not None
    day.rmdir()
    index.dump()
    index.require_right()


def test_a_reader_that_does_not_end_holds_up_nobody(index: Index) -> None:
    index.say(random.Random(3), 50)
    index.dump()
    with closing(sqlite3.connect(index.day(), isolation_level=None)) as database:
        database.execute("BEGIN")
        before = database.execute("SELECT count(*) FROM ksi_index").fetchone()
        index.say(random.Random(4), 500)
        index.dump()
        index.rebuild()
        index.say(random.Random(5), 50)
        index.dump()
        assert database.execute("SELECT count(*) FROM ksi_index").fetchone() == before
    index.require_right()


def has_niceness(group: Path, nice: int) -> bool:
    return group.read_text().endswith(f"nice {nice}\n")


def test_who_follows_steps_back_for_those_that_clients_wait_for(system: System) -> None:
    """Also where the kernel shares the processor out among sessions of processes."""
    for name, nice in (("sessions", 0), ("files", NICE), ("index", NICE), ("events", NICE)):
        pid = system.pid_of(name)
        assert pid is not None
        assert os.getpriority(os.PRIO_PROCESS, pid) == nice
        group = Path(f"/proc/{pid}/autogroup")
        if group.exists():
            until(partial(has_niceness, group, nice))
