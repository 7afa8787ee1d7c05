"""The index: documented, linked, exact, idempotent, and right about where every entry is."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ksi.actors.followers.indexed import Describer, IndexView, Verification, index_directory
from ksi.actors.owner import Index, Sender
from ksi.actors.owners.index import OWNER
from ksi.actors.owners.sessions import OWNER as SESSIONS
from ksi.actors.reading import log_directory
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.storage import index as storage_index
from ksi.storage.errors import Corrupt
from ksi.storage.index import (
    IndexGap,
    IndexReader,
    IndexWriter,
    Line,
    Place,
    Row,
    install,
)
from ksi.storage.journal import START, Position
from ksi.transport.errors import Invalid
from ksi.transport.moments import day_of

MIDNIGHT = 1_735_516_800.0  # 2024-12-30T00:00:00Z
REQUEST, RESULT = "completion:request", "completion:result"

# The schema as it is documented.
DOCUMENTED = """
CREATE TABLE ksi_index (
    id TEXT PRIMARY KEY,
    timestamp REAL NOT NULL,
    event_type TEXT NOT NULL,
    session_id TEXT NOT NULL,
    file_path TEXT NOT NULL,
    line_number INTEGER,
    byte_offset INTEGER,
    initiating_agent TEXT NOT NULL,
    participating_agents TEXT,
    agent_roles TEXT,
    pattern_type TEXT,
    conversation_id TEXT,
    correlation_id TEXT,
    is_completion BOOLEAN DEFAULT 0,
    is_request BOOLEAN DEFAULT 0,
    has_response BOOLEAN DEFAULT 0,
    requests_response BOOLEAN DEFAULT 0
);
CREATE INDEX idx_timeline ON ksi_index(timestamp);
CREATE INDEX idx_session ON ksi_index(session_id, timestamp);
CREATE INDEX idx_agent ON ksi_index(initiating_agent, timestamp);
CREATE INDEX idx_participants ON ksi_index(participating_agents);
CREATE INDEX idx_conversation ON ksi_index(conversation_id, timestamp);
CREATE INDEX idx_pattern ON ksi_index(pattern_type, timestamp);
CREATE INDEX idx_pending ON ksi_index(requests_response, has_response)
    WHERE requests_response = 1 AND has_response = 0
"""
# The queries as they are documented; what they are asked for is put in place of `?` in this order.
PEERS = """
        SELECT id, timestamp, file_path, line_number, participating_agents
        FROM ksi_index
        WHERE pattern_type = 'peer_to_peer'
        AND participating_agents LIKE ?
        AND timestamp > ?
        ORDER BY timestamp
"""
ROLES = """
        SELECT timestamp, agent_roles, file_path, line_number
        FROM ksi_index
        WHERE session_id = ?
        AND participating_agents LIKE ?
        ORDER BY timestamp
"""
PENDING = """
        SELECT id, timestamp, initiating_agent, file_path
        FROM ksi_index
        WHERE requests_response = 1
        AND has_response = 0
        AND timestamp > ?
        ORDER BY timestamp
"""
PARTICIPANTS = """
        SELECT DISTINCT participating_agents
        FROM ksi_index
        WHERE session_id = ?
"""


class Told:
    """Sessions in memory, their files, and an index of them that a test brings on as it likes."""

    def __init__(self, var: Path) -> None:
        self.var = var
        self.twin = Twin(SESSIONS)
        self.twin.now = MIDNIGHT
        self.lines: list[Line] = []
        self.place = Place("store", START, True, 0)
        self._taken = 0

    @property
    def directory(self) -> Path:
        return index_directory(self.var)

    def say(self, session_id: str, event: str, agent: str = "alice", **more: Any) -> None:
        """Have an agent say something, a second later."""
        self.twin.now += 1
        if session_id not in self.twin.log.content:
            self.twin.ask("alice", "session:create", session_id=session_id)
            self.twin.log.content[session_id] = b""
        row = self.twin.store.tables["sessions"].get(session_id)
        verb = "append" if row.owner == agent else "contribute"
        self.twin.ask(agent, f"session:{verb}", session_id=session_id, event=event, **more)

    def write(self) -> list[Line]:
        """Write the files; return the lines that are new."""
        directory = log_directory(self.var)
        directory.mkdir(parents=True, exist_ok=True)
        for key, content in self.twin.log.content.items():
            (directory / f"{key}.jsonl").write_bytes(content)
        new = [
            (line.key, line.offset, line.content)
            for event in self.twin.events[self._taken :]
            for line in SESSIONS.lines(event)
        ]
        self._taken = len(self.twin.events)
        self.lines += new
        return new

    def writer(self, directory: Path | None = None, **more: Any) -> IndexWriter:
        return IndexWriter(directory or self.directory, Describer(self.var), **more)

    def index(self) -> list[Row]:
        """Index what was said, and return all rows."""
        writer = self.writer()
        writer.add(self.write(), self.place)
        writer.close()
        return self.rows()

    def rows(self) -> list[Row]:
        return IndexReader(self.directory).select(limit=100_000)

    def dump(self) -> list[str]:
        return list(IndexReader(self.directory).dump())

    def file(self, session_id: str) -> Path:
        return log_directory(self.var) / f"{session_id}.jsonl"

    def read(self, operation: str, **fields: Any) -> Any:
        """Answer a query of the index's owner."""
        twin = Twin(OWNER)
        twin.caches[Index] = IndexView(self.var)
        return twin.read(operation, **fields)

    def verify(self) -> Verification:
        verification = Verification(self.var)
        while verification.turn():
            pass
        return verification


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path / "var")


def choose(chance: random.Random) -> Asked:
    """Draw what an operator and an agent ask about the index."""
    who = Sender("op", "operator") if chance.random() < 0.9 else Sender("alice", "agent")
    after = chance.choice((None, "1735516800.5 s:000000001", "nowhere"))
    agent = {"agent_id": "alice", "limit": 2, "after": after}
    return chance.choice(
        [
            Asked(who, "index:rebuild", {"request_id": chance.choice((None, "r1"))}),
            Asked(who, "index:verify", {}),
            Asked(who, "index:query", {**agent, "since": 1.0, "reverse": True}),
            Asked(who, "index:peer_interactions", agent),
            Asked(who, "index:role_history", agent),
            Asked(who, "index:pending", {"after": after}),
            Asked(who, "index:participants", {"session_id": "s1"}),
            Asked(who, "index:status", {}),
        ]
    )


def test_the_index_keeps_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose)


def plain(sql: str) -> list[str]:
    """Return the statements of some SQL without comments and layout."""
    bare = re.sub(r"--.*", "", sql).replace("IF NOT EXISTS ", "")
    return sorted(" ".join(each.split()) for each in bare.split(";") if each.strip())


def test_a_day_has_exactly_the_documented_table_and_indexes_and_one_table_of_participants(
    told: Told,
) -> None:
    told.say("s1", "note")
    told.index()

    with closing(sqlite3.connect(told.directory / "daily" / "2024-12-30.db")) as database:
        made = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    (extra,) = [sql for (sql,) in made if "CREATE TABLE participants" in sql]
    assert plain(";".join(sql for (sql,) in made if sql != extra)) == plain(DOCUMENTED)


def talk(told: Told, chance: random.Random, entries: int = 300) -> None:
    """Have a few agents, some with names like others, say all kinds of things over three days."""
    agents = ("a1", "a10", "a_0", "ab0", "alice")
    waiting: list[str] = []
    for n in range(entries):
        told.twin.now += chance.choice((0, 1, 30, 3600))
        data: dict[str, Any] = {"n": n, **chance.choice(SAID)}
        if chance.random() < 0.4:
            data["to_agent"] = chance.choice(agents)
        event, correlation_id = (
            chance.choice(("note", REQUEST, RESULT, "completion:progress")),
            None,
        )
        if event == REQUEST and chance.random() < 0.9:
            correlation_id = f"req_{n}"
            waiting.append(correlation_id)
        elif event != "note" and waiting:
            correlation_id = chance.choice(waiting)
        session_id = chance.choice(("s1", "s2", "s3"))
        more = {} if correlation_id is None else {"correlation_id": correlation_id}
        told.say(session_id, event, chance.choice(agents), data=data, **more)


SAID: tuple[dict[str, Any], ...] = (
    {"text": "Grüße \u2028"},
    {"role": "analyst", "team_id": "t1"},
    {"new_role": "lead", "previous_role": "peer", "conversation_id": "c1"},
    {"context": {"role_transition": {"from": "lead", "to": "peer"}}},
    {"context": "none", "role": 7, "conversation_id": None},
    {"requests_response": False, "broadcast": True},
)


@pytest.mark.parametrize("seed", range(3))
def test_seeking_to_where_a_row_says_yields_that_entry(told: Told, seed: int) -> None:
    talk(told, random.Random(seed))
    rows = told.index()

    assert len(rows) == len(told.lines) == 300
    assert {day_of(row.timestamp) for row in rows} >= {"2024-12-30", "2024-12-31"}
    for row in rows:
        with open(row.file_path, "rb") as file:
            file.seek(row.byte_offset)
            line = file.readline()
            file.seek(0)
            assert file.read(row.byte_offset).count(b"\n") == row.line_number - 1
        entry = json.loads(line)
        assert (entry["timestamp"], entry["event"]) == (row.timestamp, row.event_type)
        assert entry["metadata"]["session_id"] == row.session_id
        assert entry["metadata"]["seq"] == row.line_number
        assert entry.get("correlation_id") == row.correlation_id


def brute(told: Told) -> Iterator[dict[str, Any]]:
    """Yield all entries as they stand in the files, in the order of time."""
    found = [
        json.loads(line)
        for path in log_directory(told.var).iterdir()
        for line in path.read_bytes().splitlines()
    ]
    yield from sorted(found, key=lambda e: (e["timestamp"], place(e)))


def place(entry: dict[str, Any]) -> str:
    return f"{entry['metadata']['session_id']}:{entry['metadata']['seq']:09d}"


def present(entry: dict[str, Any]) -> set[str]:
    speaker = entry["metadata"]["agent_id"]
    owner = entry["metadata"].get("owner", speaker)
    return {speaker, owner, entry["data"].get("to_agent", speaker)}


def answered(entries: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {
        (e["metadata"]["session_id"], e["correlation_id"])
        for e in entries
        if "correlation_id" in e and e["event"] in (RESULT, "note")
    }


@pytest.mark.parametrize("seed", range(3))
def test_every_query_finds_what_a_scan_of_the_files_finds(told: Told, seed: int) -> None:
    talk(told, random.Random(seed))
    told.index()
    entries = list(brute(told))
    done = answered(entries)

    def asks(e: dict[str, Any]) -> bool:
        return e["event"] == REQUEST and e["data"].get("requests_response") is not False

    pending = [
        place(e)
        for e in entries
        if asks(e) and (e["metadata"]["session_id"], e.get("correlation_id")) not in done
    ]
    found = told.read("index:pending", limit=1000).entries
    assert [e.id for e in found] == pending
    assert pending
    for agent in ("a1", "a10", "a_0", "ab0", "alice"):
        of_agent = [e for e in entries if agent in present(e)]
        found = told.read("index:query", agent_id=agent, limit=1000).entries
        assert [e.id for e in found] == [place(e) for e in of_agent]
        peers = [place(e) for e in of_agent if e["metadata"].get("pattern") == "peer_to_peer"]
        found = told.read("index:peer_interactions", agent_id=agent, limit=1000).entries
        assert [e.id for e in found] == peers
        taken = [
            (e["timestamp"], role)
            for e in entries
            if e["metadata"]["agent_id"] == agent and (role := role_of(e["data"])) is not None
        ]
        history = told.read("index:role_history", agent_id=agent, limit=1000).roles
        assert [(each.timestamp, each.role) for each in history] == taken
    for session_id in ("s1", "s2", "s3"):
        of_session = [e for e in entries if e["metadata"]["session_id"] == session_id]
        names = told.read("index:participants", session_id=session_id).participants
        assert names == sorted(set().union(*map(present, of_session)))


def role_of(data: dict[str, Any]) -> str | None:
    """Return the role that one of `SAID` takes."""
    if isinstance(data.get("context"), dict):
        return "peer"
    if "new_role" in data:
        return "lead"
    return "analyst" if data.get("role") == "analyst" else None


@pytest.mark.parametrize("reverse", [False, True])
def test_pages_follow_one_another_over_days_without_gap_or_repetition(
    told: Told, reverse: bool
) -> None:
    talk(told, random.Random(5), entries=200)
    expected = [row.id for row in told.index()]

    found: list[str] = []
    after = None
    while True:
        page = told.read("index:query", limit=7, after=after, reverse=reverse)
        found += [entry.id for entry in page.entries]
        if (after := page.next) is None:
            break
    assert found == (expected[::-1] if reverse else expected)
    low, high = MIDNIGHT + 80_000, MIDNIGHT + 90_000
    within = told.read("index:query", since=low, until=high, limit=1000, reverse=reverse).entries
    inside = [row.id for row in told.rows() if low <= row.timestamp < high]
    assert [entry.id for entry in within] == (inside[::-1] if reverse else inside)
    for nowhere in ("nowhere", "nan x", "-1.0 x"):
        with pytest.raises(Invalid, match="no place in the index"):
            told.read("index:query", after=nowhere)


def documented(told: Told, agent: str, session: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    return {
        "peers": (PEERS, (f'%"{agent}"%', 0.0)),
        "roles": (ROLES, (session, f'%"{agent}"%')),
        "pending": (PENDING, (0.0,)),
        "participants": (PARTICIPANTS, (session,)),
    }


def test_the_documented_queries_run_unchanged_and_say_what_ours_say(told: Told) -> None:
    talk(told, random.Random(7))
    told.index()
    asked = documented(told, "a1", "s1")
    found: dict[str, list[sqlite3.Row]] = {name: [] for name in asked}
    for path in sorted((told.directory / "daily").glob("*.db")):
        with closing(sqlite3.connect(path)) as database:
            database.row_factory = sqlite3.Row
            for name, (sql, parameters) in asked.items():
                found[name] += database.execute(sql, parameters).fetchall()

    def ids(operation: str, **fields: Any) -> set[str]:
        return {entry.id for entry in told.read(operation, limit=1000, **fields).entries}

    assert {row["id"] for row in found["peers"]} == ids("index:peer_interactions", agent_id="a1")
    assert {row["id"] for row in found["pending"]} == ids("index:pending")
    taken = [
        (row["timestamp"], roles["a1"])
        for row in found["roles"]
        if "a1" in (roles := json.loads(row["agent_roles"]))
    ]
    ours = told.read("index:role_history", agent_id="a1", session_id="s1", limit=1000).roles
    assert taken == [(each.timestamp, each.role) for each in ours]
    names = {name for row in found["participants"] for name in json.loads(row[0])}
    assert sorted(names) == told.read("index:participants", session_id="s1").participants
    assert all(found.values())


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the program sqlite3 is not installed")
def test_the_documented_queries_run_in_the_program_sqlite3(told: Told) -> None:
    talk(told, random.Random(7))
    told.index()
    day = told.directory / "daily" / "2024-12-30.db"
    for sql, parameters in documented(told, "a1", "s1").values():
        text = sql
        for value in parameters:
            text = text.replace("?", f"'{value}'" if isinstance(value, str) else str(value), 1)
        printed = subprocess.run(
            ["sqlite3", "-readonly", "-json", str(day), text],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        with closing(sqlite3.connect(day)) as database:
            expected = database.execute(sql, parameters).fetchall()
        assert [tuple(each.values()) for each in json.loads(printed)] == expected
        assert expected


def pending(told: Told) -> list[int]:
    return [entry.line_number for entry in told.read("index:pending").entries]


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
def test_a_response_settles_its_request_in_either_order_and_across_midnight(
    told: Told, together: bool
) -> None:
    steps: list[tuple[float, str, dict[str, Any]]] = [
        (0, REQUEST, {"correlation_id": "early"}),
        (0, RESULT, {"correlation_id": "late"}),
        (0, REQUEST, {"correlation_id": "late"}),
        (0, REQUEST, {"correlation_id": "never"}),
        (0, REQUEST, {"data": {"request_id": "by-data"}}),
        (0, "completion:progress", {"correlation_id": "never"}),
        (0, REQUEST, {"correlation_id": "tomorrow"}),
        (86_400, RESULT, {"correlation_id": "early"}),
        (0, "completion:failed", {"correlation_id": "tomorrow"}),
        (0, RESULT, {"data": {"request_id": "by-data"}}),
        (0, REQUEST, {}),
    ]
    told.say("s2", RESULT, correlation_id="never")  # of another session: it answers nothing here
    for wait_s, event, more in steps:
        told.twin.now += wait_s
        told.say("s1", event, **more)
        if not together:
            told.index()
    told.index()

    assert pending(told) == [4, 11]
    assert [row.has_response for row in told.rows() if row.is_request] == [1, 1, 0, 1, 1, 0]
    (told.directory / "daily" / "copy of 2024-12-31.db").touch()
    assert IndexReader(told.directory).days() == ["2024-12-30", "2024-12-31"]
    assert told.verify().found == []


def test_who_speaks_is_the_proven_sender_unless_the_system_writes_for_another(told: Told) -> None:
    told.say("s1", "note", "mallory", data={"agent_id": "bob", "role": "chief"})
    describe = Describer(told.var)
    (line,) = told.write()
    row = described(describe, line[2])
    assert json.loads(row.participating_agents) == ["alice", "mallory"]
    assert json.loads(row.agent_roles) == {"mallory": "chief"}
    assert row.initiating_agent == "alice"

    entry = json.loads(line[2])
    entry["metadata"]["agent_id"] = "completion"
    row = described(describe, json.dumps(entry).encode())
    assert json.loads(row.participating_agents) == ["alice", "bob"]
    assert json.loads(row.agent_roles) == {"bob": "chief"}


def described(describe: Describer, content: bytes) -> Row:
    indexed = describe("s1", 1, 0, content)
    assert indexed is not None
    return indexed.row


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n", b"[]\n", b'{"event": "n"}\n', b'{"event": "n", "timestamp": "now"}\n',
        b'{"event": "n", "timestamp": 1e300, "metadata": {"agent_id": "a"}}\n',
        b'{"event": "n", "timestamp": -1, "metadata": {"agent_id": "a"}}\n',
        b'{"event": "n", "timestamp": 1.0, "data": [], "metadata": {"agent_id": "a"}}\n',
        b'{"event": "n", "timestamp": 1.0, "metadata": {"agent_id": "../a"}}\n',
        b"[" * 100_000, b'{"event": "\xff", "timestamp": 1.0}\n',
    ],
)  # fmt: skip
def test_a_line_that_is_no_entry_has_no_row(told: Told, content: bytes) -> None:
    assert Describer(told.var)("s1", 1, 0, content) is None


def test_what_a_session_was_made_for_is_the_pattern_of_entries_that_show_none(told: Told) -> None:
    told.twin.ask("alice", "session:create", session_id="s1", pattern="peer_to_peer")
    told.twin.log.content["s1"] = b""
    told.say("s1", "note", data={"text": "hello"})
    told.say("s1", "note", data={"broadcast": True})
    told.say("s2", "note")

    assert [row.pattern_type for row in told.index()] == ["peer_to_peer", "broadcast", None]


def test_lines_that_are_put_in_twice_change_nothing_and_a_gap_is_refused(told: Told) -> None:
    talk(told, random.Random(1), entries=100)
    told.index()
    before = told.dump()
    writer = told.writer()

    assert writer.add(told.lines, told.place) == 0
    with pytest.raises(IndexGap):
        writer.add([("s1", 10**9, b"{}\n")], told.place)
    writer.close()
    assert told.dump() == before


@pytest.mark.parametrize("together", [1, 7, 300])
def test_however_lines_come_the_index_is_the_same_also_when_it_is_made_in_bulk(
    told: Told, together: int
) -> None:
    talk(told, random.Random(2))
    lines = told.write()
    writer = told.writer()
    for start in range(0, len(lines), together):
        writer.add(lines[start : start + together], told.place)
    writer.close()
    before = told.dump()
    assert before

    made = told.directory / "rebuild"
    bulk = told.writer(made, bulk=True)
    bulk.add(sorted(lines), told.place)
    assert list(bulk.finish()) == IndexReader(told.directory).days()
    assert list(IndexReader(made).dump()) == before
    (told.directory / "daily" / "2023-01-01.db").write_bytes(b"of a day there is no more")
    install(made, told.directory)
    assert told.dump() == before
    assert not made.exists()
    assert told.verify().found == []
    writer = told.writer()
    assert writer.add(lines, told.place) == 0
    assert writer.trouble() is None
    writer.close()


def test_a_writer_that_dies_between_the_days_and_the_cursor_repeats_without_a_trace(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(told, random.Random(3))
    lines = told.write()
    half = len(lines) // 2
    writer = told.writer()
    writer.add(lines[:half], told.place)

    def die(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage_index._Batch, "put", die)
        with pytest.raises(OSError, match="killed"):
            writer.add(lines[half:], told.place._replace(position=Position(1, 7)))
    writer.abandon()

    writer = told.writer()
    assert writer.place == told.place
    assert writer.add(lines[half:], told.place) == len(lines) - half
    assert writer.trouble() is None
    writer.close()
    dumped = told.dump()
    shutil.rmtree(told.directory)
    writer = told.writer()
    writer.add(lines, told.place)
    writer.close()
    assert told.dump() == dumped


def test_a_response_links_a_request_whose_row_was_left_by_a_writer_that_died(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is repeated comes in other batches: the request was written alone, now with both."""
    told.say("s1", REQUEST, correlation_id="r1")
    request = told.write()
    writer = told.writer()

    def die(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage_index._Batch, "put", die)
        with pytest.raises(OSError, match="killed"):
            writer.add(request, told.place)
    writer.abandon()

    told.say("s1", RESULT, correlation_id="r1")
    writer = told.writer()
    writer.add([*request, *told.write()], told.place)
    writer.close()
    assert told.verify().found == []


def test_more_days_than_may_be_open_are_written(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_index, "INDEX_DAYS_OPEN_MAX", 3)
    writer = told.writer()
    for _ in range(2):
        for n in range(10):
            told.twin.now = MIDNIGHT + 86_400 * n
            told.say("s1", "note")
            writer.add(told.write(), told.place)
    assert writer.trouble() is None
    writer.close()

    assert len(IndexReader(told.directory).days()) == 10
    assert len(told.rows()) == 20
    assert told.verify().found == []


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xde\xad" * 1000)


def empty(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DELETE FROM ksi_index")
        database.commit()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def garble(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"no database")
    other.rename(path)


DAMAGES: list[Callable[[Path], None]] = [delete, replace, truncate, overwrite, empty, garble]


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_day_that_was_deleted_or_damaged_is_noticed(
    told: Told, damage: Callable[[Path], None], is_open: bool
) -> None:
    talk(told, random.Random(4), entries=100)
    writer = told.writer()
    writer.add(told.write(), told.place)
    assert writer.settle() is None
    if not is_open:
        writer.close()
        writer = told.writer()
    damage(told.directory / "daily" / "2024-12-30.db")

    trouble = writer.trouble()
    assert trouble is not None
    assert trouble.startswith("2024-12-30.db ")
    writer.abandon()


@pytest.mark.parametrize("damage", [delete, replace], ids=["delete", "replace"])
def test_a_day_that_goes_while_it_is_settled_is_noticed_at_the_next_look(
    told: Told, damage: Callable[[Path], None]
) -> None:
    talk(told, random.Random(4), entries=100)
    writer = told.writer()
    writer.add(told.write(), told.place)
    day = "2024-12-30"
    path = told.directory / "daily" / f"{day}.db"

    def damage_once(sql: str) -> None:
        if "checkpoint" in sql and path.exists():
            database.set_trace_callback(None)
            damage(path)

    database = writer._open[day]
    database.set_trace_callback(damage_once)
    writer.settle()
    trouble = writer.settle()
    assert trouble is not None
    assert trouble.startswith(f"{day}.db was ")
    writer.abandon()


def test_what_does_no_harm_to_a_day_is_accepted(told: Told) -> None:
    talk(told, random.Random(4), entries=100)
    told.index()
    day = told.directory / "daily" / "2024-12-30.db"
    with closing(sqlite3.connect(day)) as database:
        database.execute("VACUUM")
    os.utime(day)

    writer = told.writer()
    assert writer.trouble() is None
    assert writer.trouble() is None
    writer.close()


def test_a_database_that_cannot_be_read_is_said_to_be_corrupt(told: Told) -> None:
    told.say("s1", "note")
    told.index()
    garble(told.directory / "daily" / "2024-12-30.db")

    with pytest.raises(Corrupt, match=r"2024-12-30\.db of the index cannot be read"):
        told.rows()


def test_an_index_that_was_in_use_when_the_machine_went_down_is_not_trusted(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusted() -> bool:
        writer = told.writer()
        writer.abandon()
        assert writer.place is not None
        return writer.place.trusted

    told.say("s1", "note")
    told.index()
    monkeypatch.setattr(storage_index, "this_boot", lambda: "another")
    assert trusted(), "it had been closed"
    writer = told.writer()
    writer.add([], told.place)
    writer.abandon()
    assert trusted(), "only the process has died"
    monkeypatch.setattr(storage_index, "this_boot", lambda: "a third")
    assert not trusted()


def edit(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


EDITS: list[tuple[Callable[[Told], Any], str]] = [
    (lambda t: edit(t.file("s1"), b'"number":1', b'"number":7'), r"s1\.jsonl was changed by hand"),
    (
        lambda t: edit(t.file("s1"), b'"event":"note"', b'"event":"nope"'),
        r"line 1 of s1\.jsonl, at byte 0, is not what its row says: event_type",
    ),
    (
        lambda t: edit(t.file("s1"), b'"number":1', b'"number":111'),
        r"line 3 of s1\.jsonl, at byte \d+, is not what its row says: byte_offset",
    ),
    (lambda t: edit(t.file("s1"), b"{", b"["), r"s1\.jsonl was changed by hand"),
    (lambda t: truncate(t.file("s1")), r"s1\.jsonl has \d+ whole bytes .* was shortened by hand"),
    (lambda t: t.file("s1").unlink(), r"s1\.jsonl has 0 whole bytes"),
    (lambda t: change(t, "DELETE FROM ksi_index WHERE line_number = 3"), r"line 3 .* has no row"),
    (
        lambda t: change(t, "UPDATE ksi_index SET timestamp = 1 WHERE line_number = 4"),
        r"line 4 .* is not what its row says: timestamp",
    ),
    (
        lambda t: change(t, "UPDATE ksi_index SET has_response = 0"),
        r"row s1:000000001: has_response is not what s1\.jsonl says",
    ),
    (
        lambda t: change(t, "UPDATE ksi_index SET has_response = 1 WHERE line_number = 3"),
        r"row s1:000000003: has_response is not what s1\.jsonl says",
    ),
    (
        lambda t: change(
            t, "INSERT INTO ksi_index (id, timestamp, event_type, session_id, file_path, "
            "initiating_agent) VALUES ('x', 1, 'e', 's9', 'f', 'a')",
        ),
        r"2024-12-30\.db has 6 rows, and 5 were indexed",
    ),
    (lambda t: (t.directory / "cursor.db").unlink(), "there is no index"),
]  # fmt: skip


def change(told: Told, sql: str) -> None:
    with closing(sqlite3.connect(told.directory / "daily" / "2024-12-30.db")) as database:
        database.execute(sql)
        database.commit()


@pytest.mark.parametrize(("mistreat", "said"), EDITS, ids=[said for _, said in EDITS])
def test_verify_tells_what_was_changed_by_hand(
    told: Told, mistreat: Callable[[Told], Any], said: str
) -> None:
    told.say("s1", "note", data={"request_id": "r1", "requests_response": True})
    told.say("s1", "note", "bob", data={"request_id": "r1", "number": 1})
    for n in range(2, 5):
        told.say("s1", "note", data={"number": n})
    told.index()
    whole = told.verify()
    assert (whole.differences, whole.rows, whole.sessions) == (0, 5, 1)
    assert whole.done_bytes == whole.total_bytes == told.file("s1").stat().st_size

    mistreat(told)
    found = told.verify().found
    assert any(re.search(said, text) for text in found), found


def test_what_was_said_since_is_no_difference(told: Told) -> None:
    talk(told, random.Random(6), entries=50)
    told.index()
    talk(told, random.Random(6), entries=50)
    told.write()

    assert told.verify().report() == {"sessions": 3, "rows": 50, "differences": 0, "found": []}
