"""The commit loop: carries out a batch of commands against one owner's tables and journal.

    for each command: number, sender, decide, apply into one open transaction
    → one write and one sync of the journal → commit the view → the answers

So an answer, and anything a reader sees, is on disk. One sync serves the whole batch.

Trouble, and what becomes of it:
- a refusal: stored as the command's answer; nothing else was touched;
- an exception in `decide` or `apply`: the transaction is aborted and the batch runs again one
  command at a time; the one at fault gets `internal`, the others go through;
- no room on disk: everything is undone, all get `storage_full`, reads go on;
- an error of sync or commit passes through: the outcome is unknown, and the process must end
  without a reply, so that recovery decides and clients send again.

A signal is numbered with the commands of its sender and passed on in its turn, and nothing of it is
written: after a crash one that was not acknowledged may be passed on again.

No sockets and no clock in here: the simulator runs this very code on tables in memory.

Source: DESIGN 5; group commit as in Redis `appendfsync always`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final, NamedTuple, Protocol, get_args, get_type_hints

import msgspec

from ksi.actors import delivery
from ksi.actors.delivery import HOST_TABLES, SENT, Answered, Batch, Client, Delivery, Record
from ksi.actors.owner import (
    CACHES,
    Announcement,
    Decision,
    Event,
    Given,
    Keyed,
    Log,
    Owner,
    Query,
    Reply,
    Restored,
    Send,
    Sender,
    Tables,
    Tick,
)
from ksi.storage.tables import TableSpec
from ksi.transport import wire
from ksi.transport.errors import (
    Busy,
    Evicted,
    Expired,
    Internal,
    KsiError,
    StorageFull,
    TooLarge,
)
from ksi.transport.limits import OUTBOX_ROWS_MAX, WINDOW_COMMANDS_MAX
from ksi.transport.message import CATALOGUE, Operation, encode, not_taken

_NO_REPLY: Final = encode({})
_NO_FORM: Final = (TypeError, ValueError, OverflowError)  # What cannot be encoded raises these.
_TICKS_MAX: Final = 16  # In one commit: what is left waits for the next.
_encode_cut = msgspec.msgpack.encode
_decode_answer = msgspec.msgpack.Decoder(wire.Answer).decode


class Work(NamedTuple):
    """One request as it waits in the mailbox."""

    route: bytes
    sender: Sender
    instance: bytes
    acked: int
    again: bool
    request: wire.Request
    expires_s: float | None  # on the monotonic clock, like:
    arrived_s: float = 0.0
    far: bool = False  # it came over a network


Facts = Callable[[Query[Any]], Reply | KsiError | None]  # answers from other owners' states


class Transactions(Protocol):
    """What the loop needs of a store; `storage.store.Store` and its twin in memory have it."""

    @property
    def tables(self) -> Mapping[str, Any]: ...

    def room(self) -> None: ...
    def begin(self) -> None: ...
    def commit(self, payload: bytes, records: int, extra: bytes, time_s: float) -> object: ...
    def abort(self) -> None: ...


class Outcome(NamedTuple):
    """What a batch led to: answers by connection, the events now on disk, and what is passed on."""

    answers: list[tuple[bytes, wire.Kind, Any]]
    events: list[Event]
    sends: list[tuple[str, int, str, bytes]]  # owner, number in the outbox, operation, body
    told: list[Event | Announcement]  # the events and, where they came, what signals announce


class _Fault(Exception):
    """`decide` or `apply` raised something that is no refusal."""


class CommitLoop:
    """Carries out batches for one owner over one store."""

    def __init__(
        self,
        owner: Owner[Any],
        store: Transactions,
        ids: Iterator[str],
        log: Any,
        facts: Facts = lambda _query: None,
    ) -> None:
        self.owner = owner
        self.store = store
        self.ids = ids
        self.log = log
        self._facts = facts
        self._wants_facts = type(owner).fact is not Owner.fact
        self.tables = bind(owner.tables, store.tables)
        self.delivery = Delivery(store.tables)
        self.refusals = 0
        self.internal_errors = 0
        self.cut = 0
        self._self = Sender(owner.name, "owner")
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = batch_decoder(owner.events)
        self._outcome = Outcome([], [], [], [])
        self._asked_tick = False  # by a decision in this batch, or by a tick
        self.recorded: dict[str, int] = {}  # by owner: messages up to this are answered, on disk
        self.wants_answers = type(owner).answered is not Owner.answered
        # What other owners said and found no room to be recorded: nobody says it again.
        self._sent: dict[str, Record[Any]] = {}
        self._answers: list[Answered] = []

    def replay(self, payload: bytes) -> tuple[float, bytes]:
        """Apply one journaled batch to the tables; return the owner time it was made at, and what
        else the store is to keep of it."""
        return self.replay_batch(self._decode(payload))

    def replay_batch(self, batch: Batch[Any]) -> tuple[float, bytes]:
        """Apply a batch that was journaled, or the beginning of one. Returns: as `replay`."""
        for record in batch.records:
            for event in record.events:
                self.owner.apply(event, self.tables)
            self.delivery.settle(record, batch.time_s)
        self.delivery.put_rows(batch.time_s)
        self.delivery.commit()
        self.cut = batch.cut
        return batch.time_s, _encode_cut(batch.cut)

    def run(
        self,
        works: Sequence[Work],
        ours: Sequence[Record[Any]],
        now: float,
        time_s: float,
        clock_s: float,
        *,
        answers: Sequence[Answered] = (),
        tick: bool = False,
    ) -> Outcome:
        """Carry out `works` in order and commit them; then `ours`, what follows from `answers`
        and, with `tick`, a tick.

        Args:
            ours: records of the host itself: goodbyes, messages that were sent.
            answers: what other owners have answered to messages.
            now: wall time; time_s: owner time; clock_s: the monotonic clock, for deadlines.

        Returns:
            The answers, all on disk.

        Raises:
            UnknownOutcome: the outcome is unknown; end the process.
        """
        given = Given(now, time_s, self.ids)
        if self._sent:
            ours, self._sent = [*self._sent.values(), *ours], {}
        if self._answers:
            answers, self._answers = [*self._answers, *answers], []
        try:
            return self._run(works, ours, answers, given, clock_s, tick)
        except StorageFull as full:
            self._undo()
            # The rows of clients that left go in the end without a goodbye.
            self._sent = {record.sender: record for record in ours if record.operation == SENT}
            self._answers = [*answers]
            return Outcome([self._refused(work, full) for work in works], [], [], [])
        except (_Fault, TooLarge, *_NO_FORM) as fault:  # All of them before the journal is written.
            self._undo()
            if len(works) + bool(ours) + len(answers) + tick == 1:
                return self._blame(works, fault, given)
        # One of them is at fault: each in a commit of its own, so that it undoes only itself.
        together = Outcome([], [], [], [])
        for work in works:
            _extend(together, self.run([work], (), now, time_s, clock_s))
        if ours:
            _extend(together, self.run((), ours, now, time_s, clock_s))
        for answer in answers:
            _extend(together, self.run((), (), now, time_s, clock_s, answers=[answer]))
        if tick:
            _extend(together, self.run((), (), now, time_s, clock_s, tick=True))
        return together

    def run_restored(self, restored: Restored, now: float, time_s: float) -> Outcome:
        """Commit what the owner decides about a restore of its store, before anything else.

        Raises:
            StorageFull: there is no room; nothing has changed.
            UnknownOutcome: the outcome is unknown; end the process.
        """
        given = Given(now, time_s, self.ids)
        self._outcome = outcome = Outcome([], [], [], [])
        self.store.room()
        self.store.begin()
        try:
            records = self._passed(restored, given)
            if records:
                self._commit(records, given)
        finally:
            self._undo()
        return outcome

    def _run(
        self,
        works: Sequence[Work],
        ours: Sequence[Record[Any]],
        answers: Sequence[Answered],
        given: Given,
        clock_s: float,
        tick: bool,
    ) -> Outcome:
        self.store.room()
        self.store.begin()
        self._outcome = outcome = Outcome([], [], [], [])
        self._asked_tick = False
        records: list[Record[Any]] = []
        for work in works:
            record = self._carry_out(work, given, clock_s)
            if record is not None:
                records.append(record)
        for record in ours:
            self.delivery.settle(record, given.time_s)
        records += ours
        for answer in answers:
            records += self._follow(answer, given)
        records += self._ticks(given, tick)
        if records:
            self._commit(records, given)
        else:
            self.store.abort()
            self.delivery.commit()
        return outcome

    def _blame(self, works: Sequence[Work], fault: Exception, given: Given) -> Outcome:
        """Settle the command at fault with `internal`; it consumes its number like a refusal."""
        self.internal_errors += 1
        cause = fault.__cause__ or fault
        self._outcome = outcome = Outcome([], [], [], [])
        for work in works:
            self.log.error(
                "a command failed",
                operation=work.request.operation,
                sender=work.sender.name,
                number=work.request.number,
                exc_info=cause,
            )
            error = Internal(
                f"{work.request.operation} failed with {type(cause).__name__}",
                hint="this is a defect of KSI: ksi logs shows the traceback",
            )
            self.store.begin()
            record = self._refusal(work, error)
            self.delivery.settle(record, given.time_s)
            try:
                self._commit([record], given)
            except StorageFull as full:
                self._undo()
                return Outcome([self._refused(work, full)], [], [], [])
        if not works:
            self.log.error("a tick, or what followed from an answer, failed", exc_info=cause)
        return outcome

    def _commit(self, records: list[Record[Any]], given: Given) -> None:
        self.delivery.put_rows(given.time_s)
        payload = self._encode(Batch(given.now, given.time_s, self.cut, records))
        self.store.commit(payload, len(records), _encode_cut(self.cut), given.time_s)
        self.delivery.commit()
        for record in records:
            if record.operation == SENT:
                self.recorded[record.sender] = record.number

    def _carry_out(self, work: Work, given: Given, clock_s: float) -> Record[Any] | None:
        """Decide and apply one command; return its record, or None if it is not its turn."""
        request = work.request
        number = request.number
        client = self.delivery.client(work.sender.name, work.instance)
        client.acknowledge(work.acked)
        answers = self._outcome.answers
        if number <= client.last:
            stored = client.replies.get(number)
            if stored is None:  # Acknowledged in an earlier life of this client: an outbox.
                stored = self._encode(wire.Answer(number, _NO_REPLY))
            answers.append((work.route, wire.Kind.REPLIES, msgspec.Raw(stored)))
            return None
        if number != client.last + 1:
            if not client.told:
                client.told = True
                answers.append((work.route, wire.Kind.RESEND_FROM, client.last + 1))
            return None
        declared = CATALOGUE.get(request.operation)
        is_signal = declared is not None and declared.kind == "signal"
        if work.again and not is_signal and self.delivery.forgotten(client):
            client.told = True
            answers.append(self._refused(work, _forgotten(work)))
            return None
        if number - client.acked > WINDOW_COMMANDS_MAX:
            client.told = True
            full = f"{number - client.acked} commands are unacknowledged"
            answers.append(self._refused(work, Busy(full, limit=WINDOW_COMMANDS_MAX)))
            return None
        try:
            if is_signal and self._pass_on(client, work, clock_s):
                return None
            record = self._decide(work, given, clock_s)
        except KsiError as error:
            if not error.conclusive:
                client.told = True
                answers.append(self._refused(work, error))
                return None
            record = self._refusal(work, error)
        sends = self.delivery.settle(record, given.time_s, client)
        if sends:
            self._outcome.sends.extend(sends)
        return record

    def _pass_on(self, client: Client, work: Work, clock_s: float) -> bool:
        """Pass a signal on; return False if the owner wants to decide about it."""
        request = work.request
        signal = self._declared(work, clock_s).decode_header(request.body)
        try:
            said = self.owner.relay(signal, work.sender, self.tables)
        except KsiError:
            raise
        except Exception as defect:
            raise _Fault from defect
        if said is None:
            return False
        answer = self._encode(wire.Answer(request.number, _NO_REPLY))
        client.pass_on(request.number, answer)
        outcome = self._outcome
        outcome.answers.append((work.route, wire.Kind.REPLIES, msgspec.Raw(answer)))
        outcome.told.append(said)
        return True

    def _declared(self, work: Work, clock_s: float) -> Operation:
        """Return the operation that is asked for, if it may be carried out."""
        request = work.request
        declared = CATALOGUE.get(request.operation)
        if declared is None or declared.owner != self.owner.name or not declared.changes:
            raise not_taken(request.operation, self.owner.name, "command")
        declared.require_role(work.sender.name, work.sender.role, far=work.far)
        if work.expires_s is not None and clock_s >= work.expires_s:
            raise Expired(f"the time for {request.operation} ran out before it was carried out")
        return declared

    def _decide(self, work: Work, given: Given, clock_s: float) -> Record[Any]:
        request = work.request
        declared = self._declared(work, clock_s)
        command: Any = declared.decode(request.body)
        request_id: str | None = command.request_id if _has_request_id(declared.name) else None
        if request_id is not None:
            known = self.delivery.requests.get((work.sender.name, request.operation, request_id))
            if known is not None:
                body = _decode_answer(known.body).body or _NO_REPLY
                return self._record(work, body, Decision())
        decision = self._apply(command, work.sender, given)
        body = _NO_REPLY if decision.reply is None else self._encode(decision.reply)
        return self._record(work, body, decision, request_id)

    def _apply(self, command: Any, sender: Sender, given: Given) -> Decision:
        """Decide, and apply what was decided. A refusal passes through; nothing was applied."""
        try:
            if self._wants_facts and (wanted := self.owner.fact(command, sender)) is not None:
                given = replace(given, fact=self._facts(wanted))
            decision = self.owner.decide(command, sender, self.tables, given)
        except KsiError:
            raise
        except Exception as defect:
            raise _Fault from defect
        return self._applied(decision)

    def _applied(self, decision: Decision) -> Decision:
        """Apply what was decided; return it with the messages that are to be sent."""
        if decision.sends:
            sends = tuple(self._to_send(decision.sends))
            decision = msgspec.structs.replace(decision, sends=sends)
        if decision.sends and self.delivery.outbox.count() >= OUTBOX_ROWS_MAX:
            raise Busy(f"{OUTBOX_ROWS_MAX} messages wait for other owners")
        try:
            for event in decision.events:
                self.owner.apply(event, self.tables)
        except Exception as defect:
            raise _Fault from defect
        self._asked_tick |= decision.tick
        return decision

    def _to_send(self, sends: Sequence[Send]) -> Iterator[Send]:
        """Leave out what is asked for already by a message that waits."""
        for send in sends:
            if not (send.unless_waiting and self.delivery.waits(*_encoded((send,)))):
                yield send

    def _record(
        self, work: Work, body: bytes, decision: Decision, request_id: str | None = None
    ) -> Record[Any]:
        request = work.request
        answer = self._encode(wire.Answer(request.number, body))
        outcome = self._outcome
        outcome.answers.append((work.route, wire.Kind.REPLIES, msgspec.Raw(answer)))
        sends: list[tuple[str, str, bytes]] = []
        if decision.events:
            outcome.events.extend(decision.events)
            outcome.told.extend(decision.events)
        if decision.sends:
            sends = _encoded(decision.sends)
        return Record(
            work.sender.name,
            work.instance,
            request.number,
            request.operation,
            answer,
            list(decision.events),
            sends,
            request_id,
        )

    def _refusal(self, work: Work, error: KsiError) -> Record[Any]:
        self.refusals += 1
        request = work.request
        answer = self._encode(wire.Answer(request.number, None, error.to_wire()))
        self._outcome.answers.append((work.route, wire.Kind.REPLIES, msgspec.Raw(answer)))
        operation = request.operation if request.operation in CATALOGUE else delivery.UNKNOWN
        return Record(work.sender.name, work.instance, request.number, operation, answer, [], [])

    def _refused(self, work: Work, error: KsiError) -> tuple[bytes, wire.Kind, Any]:
        """Return an answer that is not stored: nothing happened."""
        answer = wire.Answer(work.request.number, None, error.to_wire())
        return (work.route, wire.Kind.REPLIES, msgspec.Raw(self._encode(answer)))

    def _ticks(self, given: Given, is_due: bool) -> list[Record[Any]]:
        """Let time pass where it is due, and as often as it is asked for, within a bound."""
        records: list[Record[Any]] = []
        if is_due:
            records = self.delivery.overdue(given.time_s)
            for record in records:
                self.delivery.settle(record, given.time_s)
        for _ in range(_TICKS_MAX):
            if not (is_due or self._asked_tick):
                break
            is_due = self._asked_tick = False
            records += self._passed(Tick(), given)
        return records

    def _passed(self, what: Tick | Restored, given: Given) -> list[Record[Any]]:
        """Let the owner decide about what nobody has asked for."""
        try:
            decision = self._apply(what, self._self, given)
        except Busy:  # The outbox is full: what is due waits for the next tick.
            return []
        except KsiError as refusal:  # What has passed cannot be refused.
            raise _Fault from refusal
        return self._of_our_own(delivery.TICK, decision, given)

    def _follow(self, answer: Answered, given: Given) -> list[Record[Any]]:
        """Let the owner decide what follows from the answer to a message of its own."""
        try:
            message = CATALOGUE[answer.operation].decode(answer.body)
            decision = self.owner.answered(message, answer.refusal, self.tables, given)
        except Exception as defect:  # Nor can an answer be refused.
            raise _Fault from defect
        try:
            decision = self._applied(decision)
        except Busy:  # As in a tick.
            self._answers.append(answer)
            return []
        return self._of_our_own(delivery.ANSWERED, decision, given)

    def _of_our_own(self, what: str, decision: Decision, given: Given) -> list[Record[Any]]:
        """Return the record of what nobody has asked for, if anything has come of it."""
        if not decision.events and not decision.sends:
            return []
        events, sends = list(decision.events), _encoded(decision.sends)
        record = Record(self.owner.name, b"", 0, what, b"", events, sends)
        self._outcome.sends.extend(self.delivery.settle(record, given.time_s))
        self._outcome.events.extend(events)
        self._outcome.told.extend(events)
        return [record]

    def _undo(self) -> None:
        self.store.abort()
        self.delivery.undo()


@cache
def _has_request_id(operation: str) -> bool:
    """Whether a caller may give such a command an id of its own: an optional `request_id`.

    Where one is required it is not the command's: it names a request for a completion.
    """
    message = CATALOGUE[operation].message
    # Not by `structs.fields`: that works out all types, and what comes first after a start waits.
    defaults: tuple[Any, ...] = getattr(message, "__struct_defaults__", ())  # of the last fields
    of_fields = dict(zip(reversed(message.__struct_fields__), reversed(defaults), strict=False))
    return of_fields.get("request_id", msgspec.NODEFAULT) is not msgspec.NODEFAULT


def _encoded(sends: Sequence[Send]) -> list[tuple[str, str, bytes]]:
    """Return messages as records hold them. One without a form is a defect of its owner."""
    try:
        return [(each.owner, each.operation, encode(each.command)) for each in sends]
    except KsiError as defect:
        raise _Fault from defect


def _forgotten(work: Work) -> Evicted:
    return Evicted(
        f"whether number {work.request.number} was carried out is not known any more",
        hint="read the state and decide; the client has started anew",
    )


def _extend(together: Outcome, more: Outcome) -> None:
    together.answers.extend(more.answers)
    together.events.extend(more.events)
    together.sends.extend(more.sends)
    together.told.extend(more.told)


@cache
def batch_decoder(events: Any) -> Callable[[bytes], Batch[Any]]:
    """Return what decodes journaled batches of these events. Made once: it takes a while."""
    return msgspec.msgpack.Decoder(Batch[events]).decode


_HINTS: Final[dict[type[Tables], dict[str, Any]]] = {}  # finding them takes half a millisecond


def _hints(declared: type[Tables]) -> dict[str, Any]:
    if declared not in _HINTS:
        _HINTS[declared] = get_type_hints(declared, include_extras=True)
    return _HINTS[declared]


def bind(
    declared: type[Tables], tables: Mapping[str, Any], beside: Mapping[Any, Any] | None = None
) -> Any:
    """Return an instance of the declared tables over `tables`, by their names.

    `beside` has by its type what lies outside of the store: logs, and caches. The commit loop
    reads no such thing and has none.
    """
    bound = declared()
    for name, kind in _hints(declared).items():
        setattr(bound, name, (beside or {}).get(kind) if is_beside(kind) else tables[name])
    return bound


def is_beside(kind: Any) -> bool:
    """Return whether what is declared lies outside of the store."""
    return kind is Log or (isinstance(kind, type) and kind in CACHES)


def caches_of(declared: type[Tables]) -> list[Any]:
    """Return the caches among the declared tables."""
    return [kind for kind in _hints(declared).values() if is_beside(kind) and kind is not Log]


@cache
def table_specs(owner: Owner[Any]) -> Mapping[str, TableSpec]:
    """Return how each table in the owner's store is declared, the host's among them."""
    specs = {name: TableSpec(*types) for name, types in HOST_TABLES.items()}
    for name, kind in _hints(owner.tables).items():
        if not is_beside(kind):
            (keyed,) = getattr(kind, "__metadata__", (Keyed(str),))
            plain = kind.__origin__ if hasattr(kind, "__metadata__") else kind
            specs[name] = TableSpec(get_args(plain)[0], keyed.parts, keyed.cache_rows)
    return specs
