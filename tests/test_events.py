"""The event log: each event once whatever is killed, found by what it is about, and kept by day."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from crashing import killed_at_each_step
from system import System
from trouble import kill, until

from ksi.actors.checkpoints import _logged
from ksi.actors.commit import batch_decoder
from ksi.actors.declarations.sessions import EntryAppended, Joined, OwnerSeen
from ksi.actors.delivery import Batch, Record
from ksi.actors.followers.recorded import (
    Describer,
    EventLogView,
    LoggedEvent,
    Ring,
    Source,
    event_archive,
    event_directory,
    line_of,
)
from ksi.actors.followers.recording import EventFollower, _Orders, _Taken
from ksi.actors.owner import EventLog, Sender
from ksi.actors.owners import OWNERS, load, load_all
from ksi.actors.owners.events import OWNER
from ksi.actors.reading import reader_of
from ksi.actors.testing import START, Asked, Twin
from ksi.console.main import main
from ksi.storage import eventlog
from ksi.storage.archive import Archive
from ksi.storage.eventlog import EventWriter, Followed, days_in, read_synced
from ksi.storage.files import LogWriter
from ksi.storage.journal import Batch as StoredBatch
from ksi.storage.journal import Position
from ksi.transport.errors import Forbidden, Invalid, NotFound, StorageFull
from ksi.transport.limits import EVENT_PAYLOAD_BYTES, EVENTS_UNSYNCED_MAX
from ksi.transport.moments import day_of

DAY_S = 86_400.0
NOON = 1_777_896_000.0  # 2026-05-04T12:00:00Z
KILLS = 12


class Logger:
    """Takes note of what is logged."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def note(self, event: str, **fields: Any) -> None:
        self.said.append((event, fields))

    info = warning = error = note


class ListedJournal:
    """A journal as a list: batches of times and counts of events, two records each."""

    def __init__(self, name: str, store: str = "store") -> None:
        self.name = name
        self.store = store
        self.describe = Describer(load("sessions"))
        self.batches: list[_Taken] = []
        self.most = 5

    def add(self, now: float, events: int, text: str = "") -> None:
        first_seq = 1 if not self.batches else self.batches[-1].stored.first_seq + 2
        n = len(self.batches)
        told = [Joined(f"{self.name}{first_seq}", f"a{each}{text}", now) for each in range(events)]
        records: list[Record[Any]] = [
            Record("alice", b"i", 1, "session:contribute", b"", list(told), []),
            Record("alice", b"i", 2, "session:heartbeat", b"", [OwnerSeen("alice", now)], []),
        ]
        stored = StoredBatch(first_seq, 2, b"", Position(1, n), Position(1, n + 1))
        self.batches.append(_Taken(now, self, stored, Batch(now, 0.0, 0, records)))  # type: ignore[arg-type]  # a list is its journal

    def take(self, known: Followed | None) -> tuple[list[_Taken], Followed, bool]:
        if known is None or known.store != self.store:
            known = Followed(self.store, 1, 0, 0)
        found = [each for each in self.batches if each.stored.start >= known.position]
        return found[: self.most], known, len(found) > self.most


def follower(
    var: Path, *journals: ListedJournal, keep_days: int = 90_000, archive_days: int = 90_000
) -> EventFollower:
    made = EventFollower(var, Logger(), keep_days, archive_days)
    made._journals = list(journals)  # type: ignore[arg-type]  # lists for journals
    return made


def log(var: Path, events: Sequence[dict[str, Any]]) -> EventWriter:
    """Log events as they are given, and return the open writer."""
    writer = EventWriter(event_directory(var))
    for fields in events:
        source = Source("sessions", "store", writer.place.n + 1, 0, "session:append")
        data = {"text": "", **fields.pop("data", {})}
        usual = {"event": "session:appended", "timestamp": NOON, "data": data, "metadata": source}
        logged = LoggedEvent(**{"n": writer.place.n + 1, **usual, **fields})
        day = day_of(logged.timestamp)

        def keep(content: bytes, day: str = day) -> dict[str, Any]:
            return {"payload": day, "offset": writer.payload(day, content)}

        writer.add(day, line_of(logged, keep))
    writer.write()
    return writer


def lines(var: Path) -> list[dict[str, Any]]:
    """Return what is in the files, in the order of numbers."""
    directory = event_directory(var)
    found = [
        json.loads(line)
        for day in days_in(directory)
        for line in (directory / day / "events.jsonl").read_bytes().splitlines()
    ]
    return sorted(found, key=lambda event: int(event["n"]))


def origins(found: Sequence[dict[str, Any]], *owners: str) -> list[tuple[str, int, int]]:
    return [
        (origin["owner"], origin["seq"], origin["index"])
        for origin in (each["metadata"] for each in found)
        if not owners or origin["owner"] in owners
    ]


def pages(view: EventLogView | None, wanted: dict[str, Any], var: Path = Path()) -> list[Any]:
    """Return the events of three pages, of a view or of a new one each time: from the files."""
    found = []
    for _ in range(3):
        page = (view or EventLogView(var)).find(wanted)
        found.append(page["events"])
        if page["next"] is None:
            break
        wanted = {**wanted, "after": page["next"], "offset": page["offset"]}
    return found


def find(var: Path, **wanted: Any) -> list[int]:
    return [event["n"] for event in EventLogView(var).find({"limit": 1000, **wanted})["events"]]


def choose(chance: random.Random) -> Asked:
    who = Sender(chance.choice(("alice", "bob")), "agent")
    who = Sender("op", "operator") if chance.random() < 0.2 else who
    name = {"name": chance.choice(("audit", "feed"))}
    patterns = {"event_patterns": chance.sample(["session:*", "agent:seen", "*"], 2)}
    choices: list[tuple[str, dict[str, Any]]] = [
        ("event_log:subscribe", {**name, **patterns, "after": chance.randrange(5)}),
        ("event_log:subscribe", {**name, **patterns}),
        ("event_log:unsubscribe", name),
        ("event_log:ack", {**name, "upto": chance.randrange(9)}),
        ("event_log:clear", {"before": chance.choice((START, "2024-12-30", "1d"))}),
        ("event_log:clear", {}),
        ("monitor:broadcast_event", {"event_name": "x:y", "event_data": {"n": 1}}),
        ("event_log:restore", {"days": ["2024-12-30"]}),
        ("event_log:query", {"since": chance.choice((None, "10m", "2024-12-30"))}),
        ("event_log:next", {"subscriber": who.name, **name}),
        ("event_log:subscriptions", {"subscriber": chance.choice((None, "bob"))}),
        ("event_log:newest", {}),
        ("event_log:stats", {}),
        ("monitor:get_stats", {}),
        ("monitor:get_status", {"limit": 3}),
        ("monitor:get_events", {"until": "5m"}),
        ("monitor:get_session_events", {"session_id": "s"}),
        ("monitor:get_correlation_chain", {"correlation_id": "c"}),
    ]
    operation, fields = chance.choice(choices)
    return Asked(who, operation, {key: value for key, value in fields.items() if value is not None})


def test_a_subscription_keeps_its_place_and_never_goes_back() -> None:
    twin = Twin(OWNER)
    twin.ask("alice", "event_log:subscribe", name="audit", event_patterns=["session:*"], after=7)
    twin.ask("alice", "event_log:ack", name="audit", upto=9)
    twin.ask("alice", "event_log:ack", name="audit", upto=8)
    again = twin.ask("alice", "event_log:subscribe", name="audit", event_patterns=["agent:*"])
    assert (again.acked, again.event_patterns) == (9, ["agent:*"])
    with pytest.raises(NotFound):
        twin.ask("bob", "event_log:ack", name="audit", upto=1)


def test_only_an_operator_clears_and_never_today() -> None:
    twin = Twin(OWNER)
    with pytest.raises(Forbidden):
        twin.ask("alice", "event_log:clear")
    operator = Sender("op", "operator")
    assert twin.ask(operator, "event_log:clear").before == day_of(twin.now)
    ahead = twin.ask(operator, "event_log:clear", before=twin.now + 9 * DAY_S)
    assert ahead.before == day_of(twin.now)


class Monitored(Twin):
    """The owner of events over a log in files: three of alice, a minute apart, and one of bob."""

    def __init__(self, var: Path) -> None:
        super().__init__(OWNER)
        alice = [{"agents": ["alice"], "timestamp": NOON + 60 * n} for n in range(3)]
        log(var, [*alice, {"agents": ["bob"], "timestamp": NOON + 180}]).close()
        self.caches[EventLog] = EventLogView(var)

    def found(self, operation: str, **fields: Any) -> list[int]:
        return [event["n"] for event in self.read(operation, **fields).events]


def test_monitors_of_ksi_ask_under_the_names_they_know(tmp_path: Path) -> None:
    twin = Monitored(tmp_path)
    twin.ask("alice", "monitor:subscribe", client_id="tui", event_patterns=["session:*"])
    twin.ask("alice", "monitor:subscribe", _agent_id="tui", event_patterns=["agent:*"])
    (kept,) = twin.read("monitor:get_subscriptions").subscriptions
    assert (kept.subscriber, kept.name, kept.event_patterns) == ("alice", "tui", ["agent:*"])
    twin.ask("alice", "monitor:unsubscribe", client_id="tui")
    assert twin.read("event_log:subscriptions").subscriptions == []

    status = twin.read("monitor:get_status", limit=2)
    assert [event["n"] for event in status.events] == [4, 3]
    assert status.stats == twin.read("monitor:get_stats") == twin.read("event_log:stats")
    assert twin.found("monitor:query") == [1, 2, 3, 4]
    with pytest.raises(Forbidden):
        twin.ask("alice", "monitor:clear_log")
    assert twin.ask(Sender("op", "operator"), "monitor:clear_log").before == day_of(twin.now)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"_agent_id": "alice"}, [1, 2, 3]),
        ({"source_agent": "bob"}, [4]),
        ({"originator_id": "bob", "_agent_id": "bob"}, None),
        ({"start_time": NOON + 60, "end_time": "2026-05-04T12:03:00Z"}, [2, 3]),
        ({"start_time": "10m"}, []),
        ({"start_time": NOON, "since": NOON}, None),
        ({"source_agent": None, "end_time": NOON + 1, "limit": 3}, [1]),
        ({"source_agent": "../x"}, None),
    ],
)
def test_fields_are_taken_by_the_names_they_had_too_but_not_twice(
    tmp_path: Path, fields: dict[str, Any], found: list[int] | None
) -> None:
    twin = Monitored(tmp_path)
    for operation in ("event_log:query", "monitor:query"):
        if found is None:
            with pytest.raises(Invalid):
                twin.read(operation, **fields)
        else:
            assert twin.found(operation, **fields) == found
            newest_first = twin.found("monitor:get_events", **fields)
            assert newest_first == found[::-1]
            assert twin.found("monitor:get_events", **fields, reverse=False) == found


@pytest.mark.parametrize(
    ("operation", "fields", "hint"),
    [
        ("monitor:query", {"query": "SELECT * FROM events"}, "event_patterns"),
        ("monitor:get_events", {"context_bundle": "full"}, "resolve_references"),
        ("monitor:get_events", {"_agent_id": "alice", "context_fields": []}, "resolve_references"),
        ("monitor:get_status", {"include_agents": True}, "agent:list"),
        ("observation:replay", {"target": "a", "as_new_events": True}, "changes nothing"),
        ("observation:replay", {"event_patterns": ["*"], "target_agent": "b"}, "leave it out"),
        ("observation:query", {"target": "a", "observer": "b"}, "leave it out"),
        ("observation:query", {"target": "a", "scope": 1}, "ksi help observation:query"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_what_to_do_instead(
    operation: str, fields: dict[str, Any], hint: str
) -> None:
    with pytest.raises(Invalid) as refused:
        Twin(OWNER).read(operation, **fields)
    assert hint in (refused.value.hint or "")


def test_what_is_a_sign_of_life_is_not_logged(tmp_path: Path) -> None:
    journal = ListedJournal("sessions")
    journal.add(NOON, 3)
    follower(tmp_path, journal).close()

    assert [event["event"] for event in lines(tmp_path)] == ["session:joined"] * 3


def test_events_of_all_owners_are_merged_by_time_and_keep_the_order_of_each(tmp_path: Path) -> None:
    one, two = ListedJournal("sessions"), ListedJournal("bus")
    for n in range(40):
        one.add(NOON + n, 1)
    for n in range(0, 40, 2):
        two.add(NOON + n + 0.5, 2)
    two.add(NOON - 5, 1)  # The clock has gone back.
    two.add(NOON + 50, 1)
    logging = follower(tmp_path, one, two)
    while logging.turn():
        pass

    found = lines(tmp_path)
    assert [event["n"] for event in found] == list(range(1, 83))
    for name in ("sessions", "bus"):
        seqs = [seq for owner, seq, _ in origins(found) if owner == name]
        assert seqs == sorted(seqs)
    times = [event["timestamp"] for event in found if event["timestamp"] >= NOON]
    assert times == sorted(times)


def test_whatever_a_killed_writer_left_each_event_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after any byte of what it writes: `KSI_SEED` repeats it."""
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    journals = [ListedJournal("sessions"), ListedJournal("bus")]
    write = LogWriter.write

    class Killed(BaseException):
        pass

    def killed(self: LogWriter, key: str, offset: int, content: bytes) -> None:
        if chance.random() < 0.3:
            write(self, key, offset, content[: chance.randrange(len(content))])
            raise Killed
        write(self, key, offset, content)

    monkeypatch.setattr(LogWriter, "write", killed)
    at = NOON + 12 * 3600 - 200  # just before midnight
    for _ in range(60):
        for journal in journals:
            for _ in range(chance.randrange(4)):
                at += chance.choice((0.0, 60.0, -20.0))
                text = "x" * EVENT_PAYLOAD_BYTES * chance.randrange(2)
                journal.add(at, chance.randrange(4), text)
        logging = follower(tmp_path, *journals)
        try:
            more = True
            while more:
                more = logging.turn()
                if chance.random() < 0.3 and logging._writer is not None:
                    logging._writer.save()
        except Killed:
            continue
        logging.abandon()
    monkeypatch.undo()
    follower(tmp_path, *journals).close()

    found = lines(tmp_path)
    assert len(days_in(event_directory(tmp_path))) > 1
    for journal in journals:
        expected = [
            (journal.name, taken.stored.first_seq, index)
            for taken in journal.batches
            for index in range(len(taken.batch.records[0].events))
        ]
        assert [each for each in origins(found) if each[0] == journal.name] == expected
    numbers = [event["n"] for event in found]
    assert numbers == sorted(set(numbers))
    state = EventLogView(tmp_path).state()
    assert state["events"] == len(found)
    for event in EventLogView(tmp_path).find({"resolve": True, "limit": 1000})["events"]:
        assert isinstance(event["data"]["agent_id"], str)


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    log(tmp_path, [{}, {}]).close()
    path = event_directory(tmp_path) / day_of(NOON) / "events.jsonl"
    with path.open("ab") as file:
        file.write(b'{"n":3,"event":"session:app')

    assert find(tmp_path) == [1, 2]
    log(tmp_path, [{}]).close()
    assert [event["n"] for event in lines(tmp_path)] == [1, 2, 3]


def test_without_its_place_the_log_is_gone_on_with_from_its_lines(tmp_path: Path) -> None:
    journal = ListedJournal("sessions")
    for n in range(20):
        journal.add(NOON + n * 3600, 2)
    follower(tmp_path, journal).close()
    (event_directory(tmp_path) / eventlog.PLACE).unlink()
    (event_directory(tmp_path) / eventlog.SYNCED).unlink()
    journal.add(NOON + DAY_S, 1)
    follower(tmp_path, journal).close()

    found = lines(tmp_path)
    assert len(origins(found)) == len(set(origins(found))) == 41
    assert [event["n"] for event in found] == list(range(1, 42))


def test_a_crash_of_the_machine_cuts_what_was_not_synced_and_numbers_go_on(tmp_path: Path) -> None:
    directory = event_directory(tmp_path)
    writer = log(tmp_path, [{}, {}])
    writer.sync()
    writer.abandon()
    log(tmp_path, [{}, {"timestamp": NOON + DAY_S}]).save()
    assert find(tmp_path) == [1, 2, 3, 4]

    after = EventWriter(directory, boot_id="another")
    assert (find(tmp_path), len(days_in(directory))) == ([1, 2], 1)
    assert after.place.n == 2 + EVENTS_UNSYNCED_MAX
    after.close()
    log(tmp_path, [{}]).close()
    assert find(tmp_path) == [1, 2, 3 + EVENTS_UNSYNCED_MAX]


def test_a_full_disk_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = ListedJournal("sessions")
    for n in range(4):
        journal.add(NOON + n, 3)
    write = LogWriter.write

    def full(self: LogWriter, key: str, offset: int, content: bytes) -> None:
        write(self, key, offset, content[:100])
        raise StorageFull("no room")

    logging = follower(tmp_path, journal)
    monkeypatch.setattr(LogWriter, "write", full)
    assert not logging.turn()
    monkeypatch.undo()
    logging._until_s = 0.0
    logging.close()

    assert len(set(origins(lines(tmp_path)))) == len(lines(tmp_path)) == 12


def test_what_was_gone_from_a_journal_is_counted_to_the_record(tmp_path: Path) -> None:
    journal = ListedJournal("sessions")
    for n in range(10):
        journal.add(NOON + n, 1)
    logging = follower(tmp_path, journal)
    journal.most = 2
    logging.turn()
    del journal.batches[2:5]  # Three batches of two records.
    logging.close()

    state = EventLogView(tmp_path).state()
    assert (state["dropped"], state["events"]) == (6, 7)


def test_retention_and_clearing_remove_whole_days_only(tmp_path: Path) -> None:
    today = time.time()
    journal = ListedJournal("sessions")
    for age in range(6, -1, -1):
        journal.add(today - age * DAY_S, 2)
    follower(tmp_path, journal).close()
    directory = event_directory(tmp_path)
    days = days_in(directory)
    assert len(days) == 7

    logging = follower(tmp_path, journal, keep_days=3, archive_days=5)
    logging.turn()
    assert days_in(directory) == days[3:]
    assert days_in(event_archive(tmp_path)) == days[1:3]
    ordered(logging, _Orders(days[2], {}))
    assert days_in(event_archive(tmp_path)) == days[2:3]
    ordered(logging, _Orders(days[5], {}))
    assert (days_in(event_archive(tmp_path)), days_in(directory)) == ([], days[5:])
    logging.close()
    assert EventLogView(tmp_path).state()["events"] == 4
    assert [event["n"] for event in lines(tmp_path)] == [11, 12, 13, 14]


def test_stats_say_how_much_there_is_from_when_to_when_and_how_fast_it_comes(
    tmp_path: Path,
) -> None:
    now = time.time()
    last = [{"timestamp": round(now - 10.0 + n / 10, 3)} for n in range(30)]
    log(tmp_path, [{"timestamp": NOON}, {"timestamp": now - 3600.0}, *last]).close()
    state = EventLogView(tmp_path).state()
    assert (state["events"], state["n"], state["dropped"]) == (32, 32, 0)
    assert sum(state["days"].values()) == 32
    assert state["days"][day_of(NOON)] == 1
    assert (state["oldest"], state["newest"]) == (NOON, last[-1]["timestamp"])
    assert state["per_s"] == 30 / 60


def test_a_span_is_counted_back_from_now(tmp_path: Path) -> None:
    now = time.time()
    log(tmp_path, [{"timestamp": now - ago} for ago in (7200.0, 1200.0, 60.0, 0.0)]).close()
    assert find(tmp_path, since="10m") == [3, 4]
    assert find(tmp_path, since="1h", until="10m") == [2]
    assert find(tmp_path, since="1d", reverse=True) == [4, 3, 2, 1]


def test_what_was_logged_late_is_found_by_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.storage.eventlog._PIECE_BYTES", 500)
    monkeypatch.setattr("ksi.storage.eventlog.BLOCK_BYTES", 1000)
    chance = random.Random(8)
    for step in range(12):
        at = NOON + 100.0 * step
        ago = [chance.choice((0.0, 150.0))] * 12 + [chance.choice((0.0, 700.0))] * 13
        log(tmp_path, [
            {"timestamp": at + n - late, "data": {"timestamp": chance.choice((NOON, at + 40.0))}}
            for n, late in enumerate(ago)
        ]).close()  # fmt: skip
        whole = lines(tmp_path)
        for since in (
            NOON,
            at - 300.0,
            at,
            at + 12.0,
            at + 24.0,
            at + 600.0,
            whole[-3]["timestamp"],
        ):
            within = [event["n"] for event in whole if event["timestamp"] >= since]
            assert find(tmp_path, since=since) == within
            assert find(tmp_path, since=since, reverse=True) == within[::-1]
            assert find(tmp_path, since=since, after=9) == [n for n in within if n > 9]


def test_of_a_long_day_only_what_may_be_late_enough_is_looked_at(tmp_path: Path) -> None:
    log(tmp_path, [{"timestamp": NOON + n} for n in range(20_000)]).close()
    directory = event_directory(tmp_path)
    scan = eventlog.Scan(directory, days_in(directory))
    whole = scan.parts[0].size
    days = {day_of(NOON): NOON + 19_500}
    for reverse in (False, True):
        before = scan.read_bytes
        numbers = [n for n, line in scan.lines((), after=None, reverse=reverse, days=days) if line]
        assert {*range(19_501, 20_001)} <= {*numbers}
        assert scan.read_bytes - before < whole / 2


def ordered(logging: EventFollower, orders: _Orders) -> None:
    """Let a follower find orders, which are rows of its owner."""
    logging._ordered = lambda: orders  # type: ignore[method-assign]  # no owner runs
    logging.turn()


def test_a_day_that_is_over_its_time_is_archived_and_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = aged(4)
    follower(tmp_path, journal).close()
    directory = event_directory(tmp_path)
    days = days_in(directory)
    before = lines(tmp_path)
    payloads = (directory / days[0] / "payloads.jsonl").read_bytes()

    logging = follower(tmp_path, journal, keep_days=1)
    logging.turn()
    assert (days_in(event_archive(tmp_path)), days_in(directory)) == (days[:2], days[2:])
    ordered(logging, _Orders("", {days[0]: time.time(), days[1]: time.time() - 3 * DAY_S}))
    assert (days_in(event_archive(tmp_path)), days_in(directory)) == (
        [days[1]],
        [days[0], *days[2:]],
    )
    ordered(logging, _Orders("", dict.fromkeys(days, time.time())))
    assert days_in(event_archive(tmp_path)) == []
    assert lines(tmp_path) == before
    assert (directory / days[0] / "payloads.jsonl").read_bytes() == payloads
    journal.add(time.time(), 1)
    logging.close()

    logging = follower(tmp_path, journal)
    assert logging.turn() is False
    logging.close()
    state = EventLogView(tmp_path).state()
    assert (state["events"], state["dropped"]) == (len(before) + 1, 0)
    found = EventLogView(tmp_path).find({"resolve": True, "limit": 1})["events"]
    assert isinstance(found[0]["data"]["agent_id"], str)


def test_a_day_whose_archive_is_of_something_else_stays_in_the_log(tmp_path: Path) -> None:
    journal = aged(4)
    follower(tmp_path, journal).close()
    directory = event_directory(tmp_path)
    days, before = days_in(directory), lines(tmp_path)
    for content, stays in ((b'{"n":1}\n', True), (None, False)):
        path = directory / days[0] / "events.jsonl"
        archive = Archive(event_archive(tmp_path) / days[0])
        other = tmp_path / "other"
        other.write_bytes(content or path.read_bytes() + b'{"n":9}\n')
        archive.store("events", other, other.stat().st_size, lambda: None)
        logging = follower(tmp_path, journal, keep_days=1)
        logging.turn()
        assert (days[0] in days_in(directory)) is stays
        logging.close()
        assert lines(tmp_path) == (before[0:2] if stays else []) + before[4:]


def test_a_kill_while_days_are_archived_or_brought_back_loses_no_line(tmp_path: Path) -> None:
    journal = aged(4)
    follower(tmp_path, journal).close()
    before = lines(tmp_path)

    def move(orders: _Orders) -> None:
        logging = follower(tmp_path, journal, keep_days=1)
        ordered(logging, orders)
        logging.close()

    for orders in [_Orders("", {}), _Orders("", dict.fromkeys(days_of(4), time.time()))]:
        for _ in killed_at_each_step(partial(move, orders), runs=40):
            archived = [
                json.loads(line)
                for day in days_in(event_archive(tmp_path))
                if not (event_directory(tmp_path) / day / "events.jsonl").exists()
                for line in b"".join(
                    Archive(event_archive(tmp_path) / day).chunks("events")
                ).splitlines()
            ]
            assert archived + lines(tmp_path) == before
    assert days_in(event_archive(tmp_path)) == []


def test_an_archived_day_is_listed_and_had_back_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(tmp_path / "var", [{}, {}]).close()
    day, system = day_of(NOON), System(tmp_path / "var")

    def ksi(*words: str) -> dict[str, Any]:
        assert main(["--var", str(system.var), "--json", *words]) == 0
        shown: dict[str, Any] = json.loads(capsys.readouterr().out)
        return shown

    try:
        until(lambda: day in ksi("archive", "list")["days"])
        of_day = ("--since", "2026-05-04", "--until", "2026-05-05")
        until(lambda: not ksi("events", *of_day)["events"])  # Archived first, then removed.
        assert ksi("archive", "restore", "--day", day)["days"] == [day]
        assert ksi("archive", "list")["days"] == {}
        found = ksi("events", *of_day)["events"]
        assert [event["n"] for event in found] == [1, 2]
        assert main(["--var", str(system.var), "archive", "restore", "--day", day]) == 6
        assert f"{day} is not in the archive" in capsys.readouterr().err
    finally:
        system.end()


def days_of(count: int) -> list[str]:
    return [day_of(time.time() - age * DAY_S) for age in range(count - 1, -1, -1)]


def aged(days: int) -> ListedJournal:
    """Return a journal with two events of each of the last days, one with a large payload."""
    journal = ListedJournal("sessions")
    for age in range(days - 1, -1, -1):
        journal.add(time.time() - age * DAY_S, 2, "x" * EVENT_PAYLOAD_BYTES)
    return journal


def test_events_are_found_by_what_they_are_about(tmp_path: Path) -> None:
    log(
        tmp_path,
        [
            {"agents": ["alice"], "session_id": "s1"},
            {"event": "completion:queued", "agents": ["bob", "alice"], "correlation_id": "r1"},
            {"event": "completion:ended", "agents": ["bob"], "correlation_id": "r1"},
            {"event": "agent:status", "timestamp": NOON + DAY_S, "data": {"text": "alice s1 r1"}},
            {"event": "completion:ended", "timestamp": NOON - 60, "session_id": "s1"},
        ],
    ).close()

    assert find(tmp_path) == [1, 2, 3, 4, 5]
    assert find(tmp_path, patterns=["completion:*"]) == [2, 3, 5]
    assert find(tmp_path, patterns=["*:ended", "agent:*"], reverse=True) == [5, 4, 3]
    assert find(tmp_path, patterns=["completion"]) == []
    assert find(tmp_path, agent_id="alice") == [1, 2]
    assert find(tmp_path, session_id="s1") == [1, 5]
    assert find(tmp_path, correlation_id="r1", patterns=["*:queued"]) == [2]
    assert find(tmp_path, since=NOON) == [1, 2, 3, 4]
    assert find(tmp_path, until="2026-05-04T12:00:00Z") == [5]
    assert find(tmp_path, since="2026-05-05") == [4]
    assert find(tmp_path, since="10m") == []
    with pytest.raises(Invalid):
        find(tmp_path, since="soon")


def test_pages_join_up_in_both_directions(tmp_path: Path) -> None:
    """Days overlap in numbers, as where an owner was late at midnight."""
    chance = random.Random(3)
    days = [1, 0] + [chance.choice((0, 0, 1)) for _ in range(98)]
    days += [chance.choice((1, 2, 2)) for _ in range(199)] + [1]  # One is around another one.
    log(tmp_path, [{"timestamp": NOON + day * DAY_S} for day in days]).close()
    view = EventLogView(tmp_path)
    whole = list(range(1, 301))
    assert find(tmp_path) == whole
    assert find(tmp_path, reverse=True) == whole[::-1]
    assert find(tmp_path, limit=7, offset=290) == whole[290:297]
    assert find(tmp_path, offset=300) == []
    assert find(tmp_path, offset=12, limit=3, reverse=True) == [288, 287, 286]
    assert find(tmp_path, after=298) == [299, 300]
    for reverse in (False, True):
        got: list[int] = []
        after = None
        while True:
            page = view.find({"limit": 13, "reverse": reverse, "after": after})
            got += [event["n"] for event in page["events"]]
            after = page["next"]
            if after is None:
                break
        assert got == (whole[::-1] if reverse else whole)


def test_the_first_of_a_hundred_thousand_is_found_by_its_correlation_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tmp_path, [{"correlation_id": f"c{n}"} for n in range(100_000)]).close()
    view = EventLogView(tmp_path)

    assert find(tmp_path, correlation_id="c0") == [1]
    assert find(tmp_path, correlation_id="c0", reverse=True) == [1]
    ring = [n for first in range(0, 10_000, 1000)
            for n in find(tmp_path, reverse=True, offset=first)]  # fmt: skip
    assert ring == list(range(100_000, 90_000, -1))

    monkeypatch.setattr("ksi.actors.followers.recorded.EVENT_SCAN_BYTES_MAX", 1 << 20)
    page = view.find({"correlation_id": "c99999"})
    assert page["events"] == []
    assert 1000 < page["next"] < 99_999
    pages = 1
    while not page["events"]:
        page = view.find({"correlation_id": "c99999", "after": page["next"]})
        pages += 1
    assert (page["events"][0]["n"], pages > 3) == (100_000, True)


def test_what_is_in_memory_is_what_is_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log that grows, over days that overlap; days go, one comes back, and it begins anew."""
    monkeypatch.setattr("ksi.actors.followers.recorded.EVENT_RING_MAX", 60)
    monkeypatch.setattr("ksi.actors.followers.recorded.EVENT_RING_BYTES_MAX", 12_000)
    chance = random.Random(11)
    directory = event_directory(tmp_path)
    view = EventLogView(tmp_path)
    sizes = set()
    for step in range(36):
        if step in (4, 12):
            (directory / days_in(directory)[0]).rename(tmp_path / "away")
        elif step in (5, 14):
            (tmp_path / "away").rename(directory / day_of(NOON))
        elif step == 20:
            shutil.rmtree(directory / days_in(directory)[0])
        elif step == 30:
            shutil.rmtree(directory)
        day = NOON + step // 6 * DAY_S
        log(tmp_path, [
            {
                "timestamp": day + chance.choice((0.0, 0.0, 9.0, DAY_S)),
                "event": chance.choice(("session:appended", "agent:seen")),
                "agents": chance.sample(["alice", "bob", "carol"], 2),
                "data": {"text": "x" * chance.randrange(200)},
            }
            for _ in range(chance.choice((0, 1, 3, 30, 70)))
        ]).close()  # fmt: skip
        if step % 7 == 3:
            with (directory / days_in(directory)[-1] / "events.jsonl").open("ab") as file:
                file.write(b'{"no":"event"}\nhello\n')
        for _ in range(10):
            wanted = {
                "reverse": chance.random() < 0.6,
                "limit": chance.choice((1, 7, 100)),
                "offset": chance.choice((0, 0, 5, 90)),
                "after": chance.choice((None, 0, view.newest(), chance.randrange(2000))),
                "patterns": chance.choice(([], ["*:seen"], ["session:*"])),
                "exclude": chance.choice(([], ["agent:*"])),
                "agent_id": chance.choice((None, "alice")),
                "since": chance.choice((None, None, day)),
                "until": chance.choice((None, None, day + 9)),
            }
            assert pages(view, wanted) == pages(None, wanted, tmp_path), wanted
        held = view._ring._held.events if view._ring is not None else []
        sizes.add(len(held))
        assert sum(len(line) for _, line, _ in held) <= 12_000
    assert max(sizes) <= 60
    assert len(sizes) > 5


def test_what_was_written_while_a_scan_began_comes_with_the_next_one(tmp_path: Path) -> None:
    log(tmp_path, [{}, {}]).close()
    directory, ring = event_directory(tmp_path), Ring()
    scan = eventlog.Scan(directory, days_in(directory))
    scan.last = 1  # Its second look at the files has met one more.
    assert [n for n, _, _ in ring.follow(scan)[0]] == [1]
    again = eventlog.Scan(directory, days_in(directory))
    assert [n for n, _, _ in ring.follow(again)[0]] == [1, 2]


def test_what_is_too_large_for_a_line_is_kept_to_the_byte(tmp_path: Path) -> None:
    prompt = "ünïcode \u2028 \U0001f600 " * 2000
    log(tmp_path, [{"data": {"prompt": prompt, "n": 1}}]).close()
    (line,) = lines(tmp_path)
    ref = line["data"]["prompt"]["ref"]
    assert line["data"]["n"] == 1
    assert len(json.dumps(line)) < EVENT_PAYLOAD_BYTES

    (event,) = EventLogView(tmp_path).find({"resolve": True})["events"]
    assert event["data"]["prompt"] == prompt
    kept = event_directory(tmp_path) / ref["payload"] / "payloads.jsonl"
    content = kept.read_bytes()[ref["offset"] : ref["offset"] + ref["bytes"]]
    assert sha256(content).hexdigest() == ref["sha256"]
    assert json.loads(content) == prompt

    kept.write_bytes(b"x" * len(kept.read_bytes()))
    (event,) = EventLogView(tmp_path).find({"resolve": True})["events"]
    assert event["data"]["prompt"]["ref"] == ref


def test_a_line_is_one_line_to_every_reader(tmp_path: Path) -> None:
    log(tmp_path, [{"data": {"text": "a\u2028b\x85c\nd"}}]).close()
    path = event_directory(tmp_path) / day_of(NOON) / "events.jsonl"
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["data"]["text"] == "a\u2028b\x85c\nd"


def test_a_line_somebody_else_has_written_is_passed_over(tmp_path: Path) -> None:
    log(tmp_path, [{}]).close()
    path = event_directory(tmp_path) / day_of(NOON) / "events.jsonl"
    with path.open("ab") as file:
        file.write(b"hello\n" + b'{"n":7,"no":"event"}\n')
    log(tmp_path, [{}]).close()
    assert find(tmp_path)[0] == 1
    assert len(find(tmp_path)) == 2


def test_segments_are_needed_until_what_is_in_them_is_logged_on_disk(tmp_path: Path) -> None:
    journal = ListedJournal("sessions")
    journal.add(NOON, 1)
    logging = follower(tmp_path, journal)
    logging.turn()
    assert _logged(tmp_path, "sessions", "store") == 0
    logging.close()
    assert _logged(tmp_path, "sessions", "store") == 1
    assert _logged(tmp_path, "sessions", "another") == 0
    assert read_synced(event_directory(tmp_path)) is not None


class Happening:
    """A running system, and what has happened in it by its journals."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.view = EventLogView(system.var)
        self.alice = system.client("alice")
        self.operator = system.client("operator", role="operator")

    def say(self, entries: int) -> None:
        for n in range(entries):
            data = {"n": n, "text": "x" * (n % 7) * 1000}
            self.alice.tell("session:append", session_id="plan", event="note", data=data)
        self.alice.flush(30.0)

    def journaled(self) -> set[tuple[str, int, int]]:
        """Return the events of all journals but signs of life."""
        found = set()
        for name, owner in load_all().items():
            reader = reader_of(owner, self.system.var)
            decode = batch_decoder(owner.events)
            journal = reader.journal()
            for batch in journal.read(journal.start(), reader.position()[1]):
                for seq, record in enumerate(decode(batch.payload).records, batch.first_seq):
                    for index, event in enumerate(record.events):
                        if type(event) not in owner.routine:
                            found.add((name, seq, index))
        return found

    def caught_up(self) -> list[dict[str, Any]]:
        """Return all that is logged, once that is all there is."""
        until(lambda: not any(self.view.state()["behind"].values()), 30.0)
        return lines(self.system.var)


@pytest.fixture(scope="module")
def happening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Happening]:
    system = System(tmp_path_factory.mktemp("events") / "var")
    found = Happening(system)
    found.alice.ask("session:create", session_id="plan")
    yield found
    found.alice.close()
    found.operator.close()
    system.end()


def test_a_follower_killed_under_load_logs_every_event_of_every_owner_once(
    happening: Happening,
) -> None:
    chance = random.Random(5)
    ended = threading.Event()
    got: list[dict[str, Any]] = []
    upto = 0

    def load() -> None:
        while not ended.is_set():
            happening.say(50)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.0, 0.15))  # It dies at a moment that is drawn.
            kill(happening.system, "events")
            page = happening.view.find({"after": upto, "limit": 1000})
            got += page["events"]
            upto = page["upto"]
    finally:
        ended.set()
        loading.join()
    found = happening.caught_up()
    while (page := happening.view.find({"after": upto, "limit": 1000}))["events"]:
        got += page["events"]
        upto = page["upto"]

    assert len(found) == len(set(origins(found)))
    assert set(origins(found)) == happening.journaled()
    assert [event["n"] for event in got] == [event["n"] for event in found]


def test_a_subscriber_killed_and_restarted_misses_nothing_and_repeats_nothing(
    happening: Happening,
) -> None:
    with happening.system.client("watcher") as watcher:
        watcher.ask("event_log:subscribe", name="audit", event_patterns=["session:*"])
    begun = EventLogView(happening.system.var).newest()
    got: list[int] = []
    for n in range(3):
        happening.say(60)
        if n == 1:
            kill(happening.system, "events")
        happening.caught_up()
        with happening.system.client("watcher") as watcher:  # another life of it
            while True:
                place = {"subscriber": "watcher", "name": "audit"}
                page = watcher.ask("event_log:next", **place, limit=17, timeout_s=20.0)
                got += [event["n"] for event in page["events"]]
                watcher.ask("event_log:ack", name="audit", upto=page["upto"])
                if page["next"] is None:
                    break
    assert got == find(happening.system.var, after=begun, patterns=["session:*"])
    assert len(got) == 180


def test_text_is_in_the_files_of_sessions_and_found_from_the_log(happening: Happening) -> None:
    data = {"text": "over the hills " * 400}
    happening.alice.ask("session:append", session_id="plan", event="note", data=data)
    found = happening.caught_up()
    logged = happening.system.var / "logs" / "events"
    assert not any(b"over the hills" in path.read_bytes() for path in logged.rglob("*.jsonl"))
    (event,) = happening.view.find({"reverse": True, "limit": 1, "resolve": True})["events"]
    assert event["n"] == found[-1]["n"]
    assert event["data"]["line"]["data"] == data


def test_what_is_for_one_agent_alone_is_not_in_the_log(happening: Happening) -> None:
    happening.operator.ask("agent:register", agent_id="bob")
    happening.alice.ask("agent:send_message", to_agent="bob", message={"text": "between us"})
    found = happening.caught_up()
    (kept,) = (event for event in found if event["event"] == "message:kept")
    assert kept["agents"] == ["alice", "bob"]
    assert set(kept["data"]["body"]) == {"bytes", "sha256"}
    logged = happening.system.var / "logs" / "events"
    assert not any(b"between us" in path.read_bytes() for path in logged.rglob("*.jsonl"))


def test_whoever_follows_the_log_is_told_what_an_agent_broadcasts_as_what_it_is(
    happening: Happening,
) -> None:
    said = {"event_name": "session:appended", "event_data": {"ok": [1e300, None]}}
    with happening.system.client("watcher") as watcher:
        watcher.ask("event_log:subscribe", name="news", event_patterns=["events:broadcast"])
        happening.alice.ask("monitor:broadcast_event", said)
        happening.caught_up()
        (event,) = watcher.read("event_log:next", subscriber="watcher", name="news")["events"]
    assert event["event"] == "events:broadcast"
    assert (event["data"]["by"], event["agents"]) == ("alice", ["alice"])
    assert {name: event["data"][name] for name in said} == said


def test_the_files_of_a_day_are_read_with_jq(happening: Happening) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    found = happening.caught_up()
    files = sorted(event_directory(happening.system.var).glob("*/events.jsonl"))
    command = ["jq", "-r", ".event", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [event["event"] for event in found]


def test_an_operator_has_the_days_before_today_removed_and_nothing_of_today(
    happening: Happening,
) -> None:
    found = happening.caught_up()
    directory = event_directory(happening.system.var)
    before = directory / day_of(time.time() - 2 * DAY_S)
    before.mkdir()
    (before / "events.jsonl").write_bytes(b"{}\n")
    happening.operator.ask("monitor:clear_log")
    until(lambda: not before.exists(), 20.0)
    assert happening.caught_up()[: len(found)] == found


def test_remote_clients_ask_what_local_ones_read(happening: Happening) -> None:
    happening.caught_up()
    wanted: dict[str, Any] = {"event_patterns": ["session:created"], "limit": 5}
    asked = happening.alice.ask("monitor:get_events", **wanted)
    assert asked == happening.alice.read("monitor:get_events", **wanted)
    assert asked["events"][0]["session_id"] == "plan"
    assert happening.alice.read("event_log:stats")["dropped"] == 0
    older = {"event_patterns": ["session:created"], "source_agent": "alice", "start_time": "1h"}
    found = happening.alice.read("monitor:query", older)
    assert found == happening.alice.ask("monitor:query", older)
    assert found["events"] == asked["events"]


def test_every_owner_is_followed() -> None:
    followed = EventFollower(Path("v"), Logger(), 1, 1)._journals
    assert [journal.name for journal in followed] == [*OWNERS]


def test_the_twin_sees_no_log_unless_it_is_given_one() -> None:
    twin = Twin(OWNER)
    assert twin.read("event_log:query").events == []
    assert EventLog in twin.caches
    assert EntryAppended.__struct_config__.tag == "appended"
