"""The conformance kit: what is true of every owner, checked for each by its own test.

`Twin` is an owner's process without the process: its commit loop over tables, journal and log in
memory, with time and ids given by the test. `check_owner` runs random commands through it, in
batches, from several clients, with retries, gaps, ticks and restarts, and checks that

- messages and replies survive the wire;
- a refused command leaves every row as it was, and `decide` and `answer` write nothing;
- a batch the disk has no room for leaves no trace, and can be sent again;
- the journal, applied to empty tables, gives the live tables, and so does a copy of the rows taken
  at any moment with what the journal holds beyond it;
- a command that is sent again gets the bytes of its first answer, also after a restart;
- applying an event twice from equal tables gives equal tables;
- the lines of a log follow one another without a gap, and end where `logs` says;
- every operation was carried out at least once, and refused only as it declares.

All is drawn from a seed, which is in the message of whatever fails.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from ksi.actors.commit import CommitLoop, Facts, Outcome, Work, batch_decoder, bind, table_specs
from ksi.actors.delivery import SENT, Answered, ClientRow, Record
from ksi.actors.owner import (
    Announcement,
    Compositions,
    Conversations,
    Decision,
    Event,
    EventLog,
    Given,
    Index,
    Interrupted,
    Line,
    Log,
    Owner,
    Query,
    Reply,
    Restored,
    Sender,
)
from ksi.storage.tables import Key, MemoryTable, TableSpec
from ksi.transport import wire
from ksi.transport.errors import Conflict, Internal, KsiError, StorageFull, from_wire
from ksi.transport.message import CATALOGUE, Operation, encode
from ksi.transport.moments import time_range

SEEDS: Final = 50
STEPS: Final = 40  # Batches, ticks, queries and restarts of one seed.
START: Final = 1_735_500_000.0  # Wall time at which every twin begins.

_pack: Final = msgspec.msgpack.Encoder().encode
_decode_answer: Final = msgspec.msgpack.Decoder(wire.Answer).decode

_CLIENTS: Final = "ksi.clients"
_NOTHING: Final = type(None)  # the type of a reply that holds nothing

Rows = dict[str, dict[Key, bytes]]  # by table and key, encoded


class Asked(NamedTuple):
    """A command or query somebody sends."""

    sender: Sender
    operation: str
    fields: dict[str, Any]


Chooser = Callable[[random.Random], Asked]


class TwinTable(MemoryTable[Any]):
    """A table in memory that can go back to where its transaction began."""

    def __init__(self, name: str, spec: TableSpec, store: MemoryStore) -> None:
        super().__init__(name, spec)
        self.spec = spec
        self._store = store
        self._before: dict[Key, Any] = {}
        self.packed: dict[Key, bytes] = {}

    def put(self, key: Key, row: Any) -> None:
        """Set the row; only inside a transaction, and not while somebody decides."""
        self._remember(key)
        super().put(key, row)
        self.packed[key] = _pack(row)

    def delete(self, key: Key) -> None:
        """Remove the row if it is there; likewise."""
        self._remember(key)
        super().delete(key)
        self.packed.pop(key, None)

    def begin(self) -> None:
        """From now on remember what was there."""
        self._before.clear()

    def abort(self) -> None:
        """Put back what was there."""
        for key, row in list(self._before.items()):
            if row is None:
                self.delete(key)
            else:
                self.put(key, row)

    def _remember(self, key: Key) -> None:
        assert not self._store.is_frozen, "a decision or a query writes a table"
        assert self._store.is_open, "a table is written outside a transaction"
        self._before.setdefault(key, self.get(key))


class MemoryStore:
    """A store in memory: what `storage.store.Store` is to the commit loop.

    Attributes:
        journal: the payloads of the batches, in order.
        extra, time_s: what was committed with the last of them.
        full: whether it refuses to hold more.
        fails: what the next commit raises; nothing of it is kept.
    """

    def __init__(self, owner: Owner[Any]) -> None:
        self.tables: Mapping[str, Any] = {
            name: TwinTable(name, spec, self) for name, spec in table_specs(owner).items()
        }
        self.journal: list[bytes] = []
        self.extra = b""
        self.time_s = 0.0
        self.full = False
        self.fails: Exception | None = None
        self.is_open = self.is_frozen = False

    def room(self) -> None:
        """Raise StorageFull if the test says so."""
        if self.full:
            raise StorageFull("the disk of this test is full")

    def begin(self) -> None:
        """Begin a transaction."""
        self.is_open = True
        for table in self.tables.values():
            table.begin()

    def commit(self, payload: bytes, records: int, extra: bytes, time_s: float) -> None:
        """Keep what was written, and the batch."""
        assert self.is_open
        assert records > 0
        if self.fails is not None:
            failure, self.fails = self.fails, None
            raise failure
        self.extra, self.time_s = extra, time_s
        self.journal.append(payload)
        self.is_open = False

    def abort(self) -> None:
        """Undo what was written. Harmless where nothing has begun."""
        if self.is_open:
            for table in self.tables.values():
                table.abort()
        self.is_open = False

    def rows(self) -> Rows:
        """Return a copy of all rows, encoded."""
        return {name: table.packed.copy() for name, table in self.tables.items()}

    def install(self, rows: Rows) -> None:
        """Put rows copied from another store into this empty one."""
        self.begin()
        for name, packed in rows.items():
            table = self.tables[name]
            for key, row in packed.items():
                table.put(key, msgspec.msgpack.decode(row, type=table.spec.row))
        self.is_open = False

    def require_unmarred(self) -> None:
        """Raise AssertionError if a row is not what was put: its lists or maps were changed."""
        for name, table in self.tables.items():
            for key, row in table.range():
                assert _pack(row) == table.packed[key], f"a row of {name} was changed: {key}"


class MemoryLog:
    """Logs in memory, fed by `lines` as a follower would."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of `key`."""
        return self.content.get(key, b"")[start:stop]

    def add(self, line: Line) -> None:
        """Append a line that begins where the last one ended."""
        content = self.content.get(line.key, b"")
        assert line.offset == len(content), f"a gap in the log {line.key}"
        self.content[line.key] = content + line.content


class NoIndex:
    """The index before its follower has come to anything."""

    def rows(self, **_wanted: Any) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def participants(self, session_id: str) -> list[str]:
        """Return nobody."""
        return []

    def state(self) -> dict[str, Any]:
        """Return that there is nothing."""
        return {"days": 0, "rows": 0, "behind_bytes": None, "rebuilt": 0}


class NoEventLog:
    """The event log before its follower has come to anything."""

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing."""
        time_range(wanted.get("since"), wanted.get("until"), now=START)
        return {"events": [], "next": None, "offset": None, "upto": wanted.get("after") or 0}

    def newest(self) -> int:
        """Return that there is none."""
        return 0

    def state(self) -> dict[str, Any]:
        """Return that there is nothing."""
        nothing: dict[str, Any] = dict.fromkeys(("events", "dropped", "n", "per_s"), 0)
        return {**nothing, "days": {}, "oldest": None, "newest": None, "behind": {}}


class OneComposition:
    """Compositions with one among them, whose name is `known`."""

    def find(self, **_wanted: Any) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def named(self, name: str, kind: str | None) -> list[dict[str, Any]]:
        """Return the one, if it is meant."""
        if name != "known":
            return []
        texts = ("id", "name", "component_type", "file_hash")
        gaps = ("version", "description", "author", "extends", "loading_strategy")
        row = {**dict.fromkeys(texts, "known"), **dict.fromkeys(gaps), "file_path": "known.md"}
        row["content"] = "text"
        return [{**row, "tags": [], "capabilities": [], "size_bytes": 0, "modified_at": 0.0}]

    def source(self, path: str) -> bytes | None:
        """Return the file of the one."""
        return b"---\nname: known\ntype: core\n---\n" if path == "known.md" else None

    def problems(self, **_wanted: Any) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def state(self) -> dict[str, Any]:
        """Return that nothing is known of the follower."""
        return {}


class OneConversation:
    """Conversations with one among them, whose id is `known`, where nothing was said."""

    def find(self, **_wanted: Any) -> tuple[list[dict[str, Any]], int]:
        """Return nothing."""
        return [], 0

    def named(self, session_id: str, file_path: str | None) -> list[dict[str, Any]]:
        """Return the one, if it is meant."""
        if session_id != "known":
            return []
        return [dict.fromkeys(("session_id", "path", "file_path"), "known") | {"message_count": 0}]

    def messages(self, path: str, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def search(self, **_wanted: Any) -> dict[str, Any]:
        """Return nothing."""
        return {"conversations": 0, "matches": 0, "results": []}

    def problems(self, **_wanted: Any) -> list[dict[str, Any]]:
        """Return nothing."""
        return []

    def counts(self) -> dict[str, Any]:
        """Return that nothing was counted."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return that nothing is known of the follower."""
        return {}


class Watched(Owner[Any]):
    """An owner whose decisions and queries are watched: they may not write, and refuse as declared.

    Attributes:
        done: the operations that were carried out or answered.
        refused: what was refused: operation and class of the refusal.
    """

    def __init__(self, owner: Owner[Any], store: MemoryStore) -> None:
        vars(self).update(name=owner.name, tables=owner.tables, events=owner.events)
        self._owner = owner
        self._store = store
        self.done: set[str] = set()
        self.refused: set[tuple[str, type[KsiError]]] = set()

    def decide(self, command: Any, sender: Sender, tables: Any, given: Given) -> Decision:
        """Decide, with the tables locked."""
        decision: Decision = self._watch(
            command, lambda: self._owner.decide(command, sender, tables, given)
        )
        return decision

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        """Return what the owner wants to know."""
        return self._owner.fact(command, sender)

    def answered(
        self, command: Any, refusal: KsiError | None, tables: Any, given: Given
    ) -> Decision:
        """Decide what follows from an answer, likewise."""
        self._store.is_frozen = True
        try:
            return self._owner.answered(command, refusal, tables, given)
        finally:
            self._store.is_frozen = False

    def relay(self, signal: Any, sender: Sender, tables: Any) -> Announcement | None:
        """Relay, with the tables locked."""
        said: Announcement | None = self._watch(
            signal, lambda: self._owner.relay(signal, sender, tables)
        )
        return said

    def apply(self, event: Any, tables: Any) -> None:
        """Apply; the event must be as it was afterwards."""
        before = _pack(event)
        self._owner.apply(event, tables)
        assert _pack(event) == before, f"applying changed the event {event}"

    def answer(self, query: Any, tables: Any) -> Reply:
        """Answer, with the tables locked."""
        reply: Reply = self._watch(query, lambda: self._owner.answer(query, tables))
        return reply

    def _watch(self, message: Any, act: Callable[[], Any]) -> Any:
        kind = type(message)
        names = [each.name for each in CATALOGUE.values() if kind in (each.message, each.signal)]
        self._store.is_frozen = True
        try:
            result = act()
            self.done.update(names)
        except KsiError as refusal:
            self._store.require_unmarred()
            self.refused.update((name, type(refusal)) for name in names)
            raise
        finally:
            self._store.is_frozen = False
        return result


class Twin:
    """An owner with its commit loop, in memory.

    Attributes:
        now, time_s: wall time and owner time. `pass_time` moves both.
        facts: answers from other owners' states; by default there are none.
        hears: whether other owners answer messages at once, else with `hear`; where the owner
            wants to know. refuses: what they answer to one: None, or a refusal.
        events: all that is committed; told: what was announced of it; sends: messages to others.
    """

    def __init__(self, owner: Owner[Any], seed: int = 0) -> None:
        self.owner = owner
        self.store = MemoryStore(owner)
        self.watched = Watched(owner, self.store)
        self.log = MemoryLog()
        self.caches: dict[Any, Any] = {
            Index: NoIndex(),
            EventLog: NoEventLog(),
            Compositions: OneComposition(),
            Conversations: OneConversation(),
        }
        self.now = START
        self.time_s = 0.0
        self.facts: Facts = lambda _query: None
        self.hears = type(owner).answered is not Owner.answered
        self.refuses: Callable[[Any], KsiError | None] = lambda _message: None
        self._unheard: list[tuple[str, int, str, bytes]] = []
        self.events: list[Event] = []
        self.told: list[Announcement] = []
        self.sends: list[tuple[str, int, str, bytes]] = []
        self.errors: list[str] = []  # what the loop has logged as a defect
        self._ids = _seeded_ids(random.Random(seed))
        self._numbers: dict[Sender, int] = {}
        self.loop = self._new_loop()

    def ask(self, sender: Sender | str, operation: str, **fields: Any) -> Any:
        """Carry out a command by itself; return its typed reply or raise its refusal.

        A plain name is an agent. Replies are acknowledged with the next command.
        """
        who = Sender(sender, "agent") if isinstance(sender, str) else sender
        number = self._numbers[who] = self._numbers.get(who, 0) + 1
        work = work_of(who, operation, fields, number, acked=number - 1)
        ((_, _, answer),) = self.run([work]).answers
        return reply_of(operation, answer)

    def read(self, operation: str, **fields: Any) -> Any:
        """Answer a query; return the typed reply or raise the refusal."""
        declared = CATALOGUE[operation]
        query = declared.decode(encode(fields))
        tables = bind(self.owner.tables, self.store.tables, {Log: self.log, **self.caches})
        return msgspec.msgpack.decode(
            encode(self.watched.answer(query, tables)), type=declared.reply
        )

    def pass_time(self, seconds: float) -> Outcome:
        """Let time pass and the owner know."""
        self.now += seconds
        self.time_s += seconds
        return self.run([], tick=True)

    def run(
        self,
        works: Sequence[Work],
        ours: Sequence[Record[Any]] = (),
        *,
        answers: Sequence[Answered] = (),
        tick: bool = False,
    ) -> Outcome:
        """Carry out a batch, as the host does; monotonic time is owner time here."""
        now, time_s = self.now, self.time_s
        return self._told_of(
            self.loop.run(works, ours, now, time_s, time_s, answers=answers, tick=tick)
        )

    def restored(self, interrupted: Interrupted = "retry") -> Outcome:
        """Let the owner decide about a restore, as the host does before anything else."""
        restored = Restored(interrupted=interrupted)
        return self._told_of(self.loop.run_restored(restored, self.now, self.time_s))

    def _told_of(self, outcome: Outcome) -> Outcome:
        self.events += outcome.events
        self.sends += outcome.sends
        for each in outcome.told:
            self.told += (each,) if type(each) is Announcement else self.owner.announce(each)
        for event in outcome.events:
            for line in self.owner.lines(event):
                self.log.add(line)
        self._unheard += outcome.sends
        if self.hears and outcome.sends:
            self.hear()
        return outcome

    def hear(self) -> None:
        """Let the other owners answer what they were sent."""
        unheard, self._unheard = self._unheard, []
        answers, sent = [], {}
        for owner, number, operation, body in unheard:
            refusal = self.refuses(CATALOGUE[operation].decode(body))
            answers.append(Answered(owner, operation, body, refusal))
            sent[owner] = Record[Any](owner, b"", number, SENT, b"", [], [])
        self.run([], [*sent.values()], answers=answers)

    def restart(self) -> None:
        """Begin anew with what is committed, as after a crash of the process."""
        self.store.abort()
        self.loop = self._new_loop()

    def recovered(self, rows: Rows | None = None, since: int = 0) -> Twin:
        """Return a twin that was rebuilt: from `rows`, or nothing, and the journal from `since`."""
        twin = Twin(self.owner)
        twin.now, twin.time_s = self.now, self.time_s
        twin.facts = self.facts
        twin.log.content = self.log.content.copy()
        twin.loop.ids = self._ids
        if rows is not None:
            twin.store.install(rows)
        twin.store.begin()
        for payload in self.store.journal[since:]:
            twin.loop.replay(payload)
        twin.store.is_open = False
        twin.store.journal = [*self.store.journal]
        return twin

    def error(self, event: str, exc_info: BaseException, **_fields: Any) -> None:
        """Take note of a defect: the loop's log."""
        self.errors.append(f"{event}: {exc_info!r}")

    def _new_loop(self) -> CommitLoop:
        return CommitLoop(self.watched, self.store, self._ids, self, self._fact)

    def _fact(self, query: Query[Any]) -> Reply | KsiError | None:
        return self.facts(query)


def _seeded_ids(chance: random.Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=chance.getrandbits(128), version=4))


def work_of(
    sender: Sender,
    operation: str,
    fields: dict[str, Any] | bytes,
    number: int,
    *,
    instance: bytes = b"i" * 16,
    acked: int = 0,
    again: bool = False,
    expires_s: float | None = None,
) -> Work:
    """Return a command as it waits in the mailbox."""
    body = fields if isinstance(fields, bytes) else encode(fields)
    request = wire.Request(number, operation, body)
    return Work(instance, sender, instance, acked, again, request, expires_s)


def reply_of(operation: str, answer: Any) -> Any:
    """Return the typed reply in an answer of the loop, or raise the refusal in it."""
    decoded = _decode_answer(_pack(answer))
    if decoded.error is not None:
        raise from_wire(decoded.error)
    reply = CATALOGUE[operation].reply
    return None if reply is _NOTHING else msgspec.msgpack.decode(decoded.body or b"", type=reply)


class _Caller:
    """A client instance of the check: it numbers, keeps first answers, and acknowledges some."""

    def __init__(self, sender: Sender, instance: bytes) -> None:
        self.sender = sender
        self.instance = instance
        self.last = self.acked = 0
        self.sent: dict[int, Work] = {}
        self.answers: dict[int, bytes] = {}

    def next(self, asked: Asked) -> Work:
        self.last += 1
        work = work_of(
            self.sender,
            asked.operation,
            asked.fields,
            self.last,
            instance=self.instance,
            acked=self.acked,
        )
        self.sent[self.last] = work
        return work

    def again(self, number: int) -> Work:
        return self.sent[number]._replace(again=True, acked=self.acked)


class _Run:
    """One seed of `check_owner`."""

    def __init__(self, owner: Owner[Any], choose: Chooser, seed: int) -> None:
        self.twin = Twin(owner, seed)
        self.chance = random.Random(seed)
        self.twin.refuses = self._answer
        self._choose = choose
        self._callers: dict[tuple[Sender, int], _Caller] = {}

    def step(self) -> None:
        """Do one thing that can happen to an owner."""
        chance = self.chance.random()
        if chance < 0.7:
            self._batch()
        elif chance < 0.9:
            self.twin.pass_time(self.chance.choice((0.05, 0.25, 1.0, 5.0, 70.0)))
        elif chance < 0.95:
            self.twin.restart()
            if self.twin.owner.recovers and self.chance.random() < 0.5:
                self.twin.restored(self.chance.choice(("retry", "fail")))
        elif chance < 0.97 and type(self.twin.owner).answered is not Owner.answered:
            self.twin.hears = not self.twin.hears
            self.twin.hear()
        else:
            self._retry(self.twin)

    def check_the_end(self) -> None:
        """Check what must hold of the journal and the rows, whatever has happened."""
        twin = self.twin
        rows = twin.store.rows()
        replayed = twin.recovered()
        require_alike(rows, replayed.store.rows(), "the journal applied to empty tables")
        _require_numbers(rows, replayed.store.rows())
        self._retry(replayed)
        sizes = dict(
            twin.owner.logs(bind(twin.owner.tables, twin.store.tables, {Log: twin.log}), "")
        )
        written = {key: len(content) for key, content in twin.log.content.items()}
        shown = {key: size for key, size in sizes.items() if size}
        assert shown == written, f"`logs` says {shown}, written is {written}"
        for announcement in twin.told:
            if type(announcement.message) is dict:  # What was published is of any topic.
                assert announcement.topic.split(".")[0] in twin.owner.domains, announcement
                encode(announcement.message)

    def _batch(self) -> None:
        works: list[Work] = []
        for _ in range(self.chance.choice((1, 1, 2, 8))):
            asked = self._choose(self.chance)
            if not CATALOGUE[asked.operation].changes:
                self._query(asked)
            else:
                works.append(self._caller(asked.sender).next(asked))
        if not works:
            return
        before = self.twin.store.rows()
        if self.chance.random() < 0.1:
            self._run_without_room(works)
            require_alike(before, self.twin.store.rows(), "the tables after a full disk")
        outcome = self.twin.run(works)
        assert len(outcome.answers) == len(works)
        refused = 0
        for work, (_route, _kind, answer) in zip(works, outcome.answers, strict=True):
            caller = self._callers[work.sender, work.instance[0]]
            caller.answers[work.request.number] = bytes(answer)
            if CATALOGUE[work.request.operation].kind == "signal":
                caller.acked = work.request.number  # It may be forgotten by the next life.
            refused += self._read(work, bytes(answer))
        if refused == len(works):
            require_alike(before, self.twin.store.rows(), "the tables after a refusal")

    def _run_without_room(self, works: Sequence[Work]) -> None:
        """Let the journal find no room for a batch: it must be as if it had not been."""
        self.twin.store.fails = StorageFull("no room")
        answers = self.twin.run(works).answers
        if self.twin.store.fails is None:  # Else nothing was to be committed.
            errors = [_decode_answer(bytes(answer)).error for _, _, answer in answers]
            codes = [error and error[0] for error in errors]
            assert codes == [StorageFull.code] * len(works), codes
        self.twin.store.fails = None

    def _answer(self, _message: Any) -> KsiError | None:
        """Return what another owner answers: now and then it refuses, for whatever reason."""
        chance = self.chance.random()
        if chance > 0.1:
            return None
        return Internal("a defect") if chance < 0.05 else Conflict("it is closed")

    def _read(self, work: Work, answer: bytes) -> bool:
        """Check that an answer survives the wire; return whether it is a refusal."""
        decoded = _decode_answer(answer)
        if decoded.error is not None:
            assert from_wire(decoded.error).to_wire() == decoded.error
            return True
        require_round_trip(CATALOGUE[work.request.operation], decoded.body)
        return False

    def _query(self, asked: Asked) -> None:
        try:
            reply = self.twin.read(asked.operation, **asked.fields)
        except KsiError:
            return
        require_round_trip(CATALOGUE[asked.operation], encode(reply))

    def _retry(self, twin: Twin) -> None:
        """Send again what is not acknowledged; acknowledge some of it afterwards."""
        before = twin.store.rows()
        for caller in self._callers.values():
            numbers = [n for n in caller.sent if n > caller.acked]
            outcome = twin.run([caller.again(number) for number in numbers])
            answers = [bytes(answer) for _, _, answer in outcome.answers]
            first = [caller.answers[number] for number in numbers]
            assert answers == first, "a retry has another answer than at first"
        require_alike(before, twin.store.rows(), "the tables after a retry")
        if twin is self.twin:
            for caller in self._callers.values():
                caller.acked = self.chance.randint(caller.acked, caller.last)

    def _caller(self, sender: Sender) -> _Caller:
        which = self.chance.randrange(2)
        return self._callers.setdefault((sender, which), _Caller(sender, bytes([which]) * 16))


def check_owner(
    owner: Owner[Any],
    choose: Chooser,
    *,
    seeds: Iterable[int] = range(SEEDS),
    steps: int = STEPS,
    facts: Facts = lambda _query: None,
) -> None:
    """Check everything the kit knows of `owner`; raise AssertionError with the seed at fault.

    Args:
        choose: draws a command or query; from few names, so that they meet.
        facts: answers from other owners' states; by default there are none.
    """
    declared = [each for each in CATALOGUE.values() if each.owner == owner.name]
    for operation in declared:
        require_round_trip_of_message(operation)
    done: set[str] = set()
    for seed in seeds:
        run = _Run(owner, choose, seed)
        run.twin.facts = facts
        copied: tuple[Rows, int] = ({}, 0)
        try:
            for step in range(steps):
                if step == steps // 2:
                    copied = run.twin.store.rows(), len(run.twin.store.journal)
                run.step()
            assert not run.twin.errors, run.twin.errors
            run.check_the_end()
            _require_snapshot(run.twin, *copied)
            _require_pure(run.twin)
            _require_declared(run.twin.watched.refused)
        except Exception as error:
            raise AssertionError(f"{owner.name}, seed {seed}: {error}") from error
        done |= run.twin.watched.done
    never = sorted({operation.name for operation in declared} - done)
    assert not never, f"these were never carried out, choose others: {never}"


def require_round_trip_of_message(operation: Operation) -> None:
    """Check that the example of an operation is valid and survives the wire and JSON."""
    message = operation.decode(encode(operation.example))
    assert operation.decode(encode(message)) == message
    as_json = msgspec.json.encode(message)
    assert msgspec.json.decode(as_json, type=operation.message) == message


def require_round_trip(operation: Operation, body: bytes | None) -> None:
    """Check that the body of a reply is what it declares, to the byte."""
    assert body is not None
    if operation.reply is _NOTHING:
        assert body == encode({})
    else:
        assert encode(msgspec.msgpack.decode(body, type=operation.reply)) == body


def require_alike(one: Rows, other: Rows, what: str) -> None:
    """Check that all rows are the same, but those of clients."""
    for name in one.keys() - {_CLIENTS}:
        for key in sorted(one[name].keys() | other[name].keys(), key=str):
            have, got = one[name].get(key), other[name].get(key)
            assert have == got, f"{what}: {name} {key}: {_shown(have)} is not {_shown(got)}"


def _last_numbers(rows: Rows) -> dict[Key, int]:
    """Return the last number of each client instance that was carried out.

    Of clients nothing else must be equal: acknowledgements are not in the journal.
    """
    clients = rows[_CLIENTS].items()
    return {key: msgspec.msgpack.decode(row, type=ClientRow).last for key, row in clients}


def _require_numbers(live: Rows, replayed: Rows) -> None:
    """Check the last number of each client: the journal knows all but signals that came last."""
    numbers, journaled = _last_numbers(live), _last_numbers(replayed)
    assert numbers.keys() == journaled.keys(), "other clients are known"
    assert all(numbers[key] >= last for key, last in journaled.items()), "numbers were lost"


def _shown(row: bytes | None) -> str:
    return "nothing" if row is None else str(msgspec.msgpack.decode(row))[:300]


def _require_snapshot(twin: Twin, rows: Rows, since: int) -> None:
    recovered = twin.recovered(rows, since)
    now, then = twin.store.rows(), recovered.store.rows()
    require_alike(now, then, "a snapshot and the journal beyond it")
    _require_numbers(now, then)


def _require_pure(twin: Twin) -> None:
    """Apply every event twice, each time to tables that are equal; compare after each.

    The lines of the events, in the order of the journal, are the logs.
    """
    owner, log = twin.owner, MemoryLog()
    stores = MemoryStore(owner), MemoryStore(owner)
    bound = [bind(owner.tables, store.tables) for store in stores]
    decode = batch_decoder(owner.events)
    for store in stores:
        store.begin()
    batches = [decode(payload) for payload in twin.store.journal]
    for event in (
        event for batch in batches for record in batch.records for event in record.events
    ):
        for tables in bound:
            owner.apply(event, tables)
        one, other = ([table.packed for table in store.tables.values()] for store in stores)
        assert one == other, f"{event} applied to equal tables made them differ"
        for line in owner.lines(event):
            log.add(line)
    assert log.content == twin.log.content, "the lines in the journal are not the logs"


def _require_declared(refused: set[tuple[str, type[KsiError]]]) -> None:
    undeclared = [
        f"{name} refuses {kind.__name__}"
        for name, kind in refused
        if kind not in CATALOGUE[name].refuses
    ]
    assert not undeclared, f"undeclared: {sorted(undeclared)}"
