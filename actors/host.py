"""The host: one process, one owner, one loop. The same for all owners.

A pykka actor whose inbox is the ZeroMQ mailbox and whose loop runs in the main thread. Each turn
takes what has arrived, carries out one batch (`actors/commit.py`), sends the answers, one frame a
connection, answers the queries behind them, and lets time pass.

The mailbox is bounded by count and bytes; what comes beyond is answered `busy` at once. Frames
that are not of this protocol are dropped. A sender whose key was removed gets `forbidden`.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import pykka

from ksi.actors.checkpoints import Cuts
from ksi.actors.commit import CommitLoop, Work
from ksi.actors.delivery import GOODBYE, Answered, Record
from ksi.actors.outbox import Outbox
from ksi.actors.owner import Announcement, Event, Sender
from ksi.actors.reading import OwnerReader
from ksi.actors.stat import StatWriter
from ksi.actors.subscriptions import Deliveries, Run, Subscriptions
from ksi.storage.store import Store
from ksi.transport import wire
from ksi.transport.errors import Busy, Draining, Forbidden, Internal, KsiError, TooLarge
from ksi.transport.limits import (
    BATCH_BYTES_MAX,
    BATCH_COMMANDS_MAX,
    FRAME_BYTES_MAX,
    MAILBOX_BYTES_MAX,
    MAILBOX_REQUESTS_MAX,
    TICK_S,
    WINDOW_BYTES_MAX,
    WINDOW_COMMANDS_MAX,
)
from ksi.transport.mailbox import Letter, Mailbox, Post
from ksi.transport.message import CATALOGUE, Role, not_taken
from ksi.transport.wire import Kind

EXIT_UNKNOWN_OUTCOME: Final = 74  # EX_IOERR: a sync or commit failed, recovery must decide
_STEP_S_MAX: Final = 4 * TICK_S  # Owner time goes no further at once: a stopped owner ages little.
_REPLY_BYTES_MAX: Final = FRAME_BYTES_MAX - 1024
_ANSWER_S_MAX: Final = 0.05  # Spent on queries in one turn: commands wait no longer for them.
_PROBE_S: Final = 2.0  # How often is looked for subscribers and readers that were killed.

_decode_requests = msgspec.msgpack.Decoder(wire.CommandsFrame).decode
_decode_frame = msgspec.msgpack.Decoder(wire.Frame).decode
_REQUESTS: Final = frozenset({Kind.COMMANDS, Kind.QUERIES})


class Host(pykka.ThreadingActor):
    """The actor around one owner. `Host.start(...)` runs its loop and returns when it has ended."""

    def __init__(
        self,
        loop: CommitLoop,
        store: Store,
        reader: OwnerReader,
        mailbox: Mailbox,
        outbox: Outbox,
        stat: StatWriter,
        cuts: Cuts,
        log: Any,
    ) -> None:
        self._mailbox = mailbox
        super().__init__()
        self._loop = loop
        self._owner = loop.owner
        self._store = store
        self._reader = reader
        self._outbox = outbox
        self._stat = stat
        self._cuts = cuts
        self._log = log
        self._subscriptions = Subscriptions()
        self._commands: deque[Work] = deque()
        self._queries: deque[tuple[int, Work]] = deque()  # each behind that many commands
        self._waiting_bytes = 0
        self._said: list[tuple[bytes, Kind, Any]] = []  # at once; sent when all is taken in
        self._came = self._done = 0  # commands
        self._ours: list[Record[Any]] = []
        self._goodbyes: deque[tuple[int, Record[Any]]] = deque()  # behind how many commands
        # What our messages led to may wait for a commit there is anyway: lost, it comes again.
        self._sent: list[Record[Any]] = []
        self._answered: list[Answered] = []  # this is waited for
        self._time_s = store.meta.time_s
        self._turned_s = self._ticked_s = self._probed_s = time.monotonic()
        self._draining = False

    def _create_actor_inbox(self) -> Any:  # type: ignore[override]  # static in pykka
        return self._mailbox

    def _start_actor_loop(self) -> None:
        self._actor_loop()

    def on_start(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._drain)
        self._mailbox.wake_on_signals()
        self._store.begin()
        for (owner, number), row in self._store.tables["ksi.outbox"].range():
            self._push(owner, number, row.operation, row.body, again=True)
        self._store.abort()
        self._stat.state = "running"
        self._stat.store_id = self._store.id
        self._stat.journal_seq = self._store.meta.seq
        self._stat.end_turn(time.monotonic())  # Whoever asks is told so from now on.
        self._mailbox.timeout_s = TICK_S

    def on_receive(self, message: Any) -> None:
        """One turn. Anything unexpected ends the process: its outcome is unknown."""
        try:
            self._turn(message)
        except BaseException:
            self._log.exception("the turn failed; recovery decides")
            os._exit(EXIT_UNKNOWN_OUTCOME)

    def on_stop(self) -> None:
        self._outbox.close()
        self._mailbox.close()
        self._stat.end_turn(time.monotonic())

    def _drain(self, _number: int, _frame: Any) -> None:
        self._draining = True

    def _turn(self, post: Post) -> None:
        started_s = time.monotonic()
        self._stat.begin_turn(started_s)
        self._time_s += min(started_s - self._turned_s, _STEP_S_MAX)
        self._turned_s = started_s
        for letter in post.letters:
            self._take_in(letter)
        if self._said:
            said, self._said = self._said, []
            self._send_all(said)
        self._send_on(started_s)
        commands = self._next_batch()
        self._done += len(commands)
        while self._goodbyes and self._goodbyes[0][0] <= self._done:
            self._ours.append(self._goodbyes.popleft()[1])
        tick = started_s - self._ticked_s >= TICK_S
        if commands or self._ours or self._answered or tick:
            self._carry_out(commands, started_s, tick)
        if self._queries and self._queries[0][0] <= self._done:
            self._answer()
        if started_s - self._probed_s >= _PROBE_S:
            self._probed_s = started_s
            self._probe()
        self._end_turn(commands, started_s)
        if self._draining and not self._commands and not self._queries:
            self._stat.state = "draining"
            self.stop()

    def _probe(self) -> None:
        """Find out who has left without a word: subscribers, and readers of the view."""
        for route in self._subscriptions.routes():
            self._send_runs(route, [])
        self._store.check_readers()

    def _take_in(self, letter: Letter) -> None:
        """Put the requests of a frame into the queue, or act on another kind at once."""
        sender = self._mailbox.sender_of(letter.sender)
        payload = letter.payload
        try:
            if len(payload) > 2 and payload[2] in _REQUESTS:
                frame = _decode_requests(payload)
            else:
                return self._control(letter, _decode_frame(payload), sender)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
            self._stat.refusals += 1
            return None
        kind = Kind(frame.kind)
        if sender is None:
            return self._turn_away(letter.route, kind, frame)
        if frame.cut > self._loop.cut:
            self._see(frame.cut)
        if self._draining or frame.store not in ("", self._store.id):
            return self._put_off(letter.route, kind, frame)
        who = Sender(*sender)
        for request in frame.items:
            if (
                len(self._commands) + len(self._queries) >= MAILBOX_REQUESTS_MAX
                or self._waiting_bytes > MAILBOX_BYTES_MAX
            ):
                full = Busy("the mailbox is full", limit=MAILBOX_REQUESTS_MAX, retry_after_s=0.05)
                return self._said.append(
                    (letter.route, kind_of_answer(kind), _error(request, full))
                )
            left_ms = request.remaining_ms
            work = Work(
                letter.route,
                who,
                frame.instance,
                frame.acked,
                frame.again,
                request,
                None if left_ms is None else letter.arrived_s + left_ms / 1000,
                letter.arrived_s,
                letter.far,
            )
            if kind is Kind.COMMANDS:
                self._commands.append(work)
                self._came += 1
            else:
                self._queries.append((self._came, work))
            self._waiting_bytes += len(request.body)
        return None

    def _control(self, letter: Letter, frame: wire.Frame, sender: tuple[str, Role] | None) -> None:
        """Act on a frame that carries no requests."""
        route = letter.route
        if sender is None:
            return
        if frame.cut > self._loop.cut:
            self._see(frame.cut)
        match frame.kind:
            case Kind.HELLO:
                welcome = wire.Welcome(
                    self._owner.name,
                    os.getpid(),
                    wire.VERSION,
                    wire.VERSION,
                    WINDOW_COMMANDS_MAX,
                    WINDOW_BYTES_MAX,
                )
                self._send(route, Kind.WELCOME, [welcome])
            case Kind.SUBSCRIBE:
                for asked in msgspec.convert(frame.items, list[wire.Subscribe]):
                    refused = self._subscriptions.add(route, asked, letter.sender)
                    wired = refused.to_wire() if refused else None
                    answer = wire.Answer(-asked.number, b"", wired)
                    self._said.append((route, Kind.ANSWERS, answer))
            case Kind.UNSUBSCRIBE:
                for number in msgspec.convert(frame.items, list[int]):
                    self._subscriptions.remove(route, number)
            case Kind.CREDIT:
                for number, credit in msgspec.convert(frame.items, list[tuple[int, int]]):
                    self._deliver(self._subscriptions.grant(route, number, credit))
            case Kind.GOODBYE:
                # What it has sent before is known for a repeat only as long as its row is there.
                goodbye: Record[Any] = Record(sender[0], frame.instance, 0, GOODBYE, b"", [], [])
                self._goodbyes.append((self._came, goodbye))
                self._subscriptions.drop(route)
                self._send(route, Kind.FAREWELL, [])
            case _:
                self._stat.refusals += 1

    def _see(self, cut: int) -> None:
        """Make the cut that somebody has told, before anything of his is handled."""
        if self._cuts.make(cut):
            self._loop.cut = cut

    def _send_on(self, now_s: float) -> None:
        """Talk to other owners. What they answer counts to the time after the cuts they tell."""
        cut = self._outbox.cut
        cut.number = max(cut.number, self._loop.cut)
        self._sent += self._outbox.turn(now_s)
        if self._loop.wants_answers:
            self._answered += self._outbox.answers
        self._outbox.answers.clear()
        if cut.number > self._loop.cut:
            self._see(cut.number)

    def _turn_away(self, route: bytes, kind: Kind, frame: wire.CommandsFrame) -> None:
        """The key was removed while the connection was open."""
        error = Forbidden("the key of this connection is not enrolled any more")
        self._stat.refusals += len(frame.items)
        self._said += [(route, kind_of_answer(kind), _error(each, error)) for each in frame.items]

    def _put_off(self, route: bytes, kind: Kind, frame: wire.CommandsFrame) -> None:
        """Take nothing of a frame: it goes again, to our successor or not at all."""
        if frame.store not in ("", self._store.id):  # The header tells that this is another.
            self._send(route, kind_of_answer(kind), [])
        elif kind is Kind.COMMANDS and frame.items:
            draining = Draining(f"{self._owner.name} is stopping")
            self._said.append((route, Kind.REPLIES, _error(frame.items[0], draining)))

    def _next_batch(self) -> list[Work]:
        """Take the next commands from the queue."""
        commands: list[Work] = []
        waiting = self._commands
        room = BATCH_BYTES_MAX
        for _ in range(min(len(waiting), BATCH_COMMANDS_MAX)):
            work = waiting.popleft()
            room -= len(work.request.body)
            commands.append(work)
            if room < 0:
                break
        self._waiting_bytes -= BATCH_BYTES_MAX - room
        return commands

    def _carry_out(self, commands: Sequence[Work], started_s: float, tick: bool) -> None:
        if tick:
            self._ticked_s = started_s
        ours, self._ours, self._sent = [*self._sent, *self._ours], [], []
        answered, self._answered = self._answered, []
        now = round(time.time(), 6)
        self._stat.committing(started_s)
        outcome = self._loop.run(
            commands, ours, now, self._time_s, started_s, answers=answered, tick=tick
        )
        for owner, upto in self._loop.recorded.items():
            self._outbox.recorded(owner, upto)
        self._send_all(outcome.answers)
        if outcome.events:
            self._mailbox.ring()
        if outcome.told and self._subscriptions:
            self._deliver(self._subscriptions.deliver(self._announced(outcome.told)))
        if outcome.sends:
            for owner, number, operation, body in outcome.sends:
                self._push(owner, number, operation, body)
            self._send_on(started_s)
        if commands:
            self._stat.commits += 1
            self._stat.commands += len(commands)
            self._stat.record(time.monotonic() - commands[0].arrived_s)

    def _announced(self, told: Sequence[Event | Announcement]) -> Iterator[Announcement]:
        for each in told:
            if type(each) is Announcement:
                yield each
            else:
                yield from self._owner.announce(each)

    def _answer(self) -> None:
        """Answer queries from one read transaction, after the commands that came before them.

        As many as one turn has time and room for: the commands behind them wait no longer.
        """
        answers = self._reader.reader.read(lambda tables, _meta: self._answers(tables))
        for _ in answers:
            _came, work = self._queries.popleft()
            self._waiting_bytes -= len(work.request.body)
        self._send_all(answers)
        self._stat.queries += len(answers)

    def _answers(self, tables: Any) -> list[tuple[bytes, Kind, Any]]:
        answers: list[tuple[bytes, Kind, Any]] = []
        room, until_s = BATCH_BYTES_MAX, time.monotonic() + _ANSWER_S_MAX
        for came, work in self._queries:
            if came > self._done:
                break
            answer = self._answer_one(work, tables)
            answers.append((work.route, Kind.ANSWERS, answer))
            room -= len(answer.body or b"")
            if room < 0 or time.monotonic() > until_s:
                break
        return answers

    def _answer_one(self, work: Work, tables: Any) -> wire.Answer:
        request = work.request
        try:
            declared = CATALOGUE.get(request.operation)
            if declared is None or declared.owner != self._owner.name or declared.kind != "query":
                raise not_taken(request.operation, self._owner.name, "query")
            declared.require_role(work.sender.name, work.sender.role, far=work.far)
            query = declared.decode(request.body)
            declared.require_own(query, work.sender.name, work.sender.role)
            reply = self._owner.answer(query, self._reader.bound(tables))
            body = wire.encode(reply)
            if len(body) > _REPLY_BYTES_MAX:
                raise TooLarge(f"the answer is {len(body)} bytes", hint="ask for a smaller page")
            return wire.Answer(request.number, body)
        except KsiError as error:
            return _error(request, error)
        except Exception:
            self._log.exception("a query failed", operation=request.operation)
            self._stat.internal_errors += 1
            return _error(request, Internal(f"{request.operation} failed: see ksi logs"))

    def _end_turn(self, commands: Sequence[Work], started_s: float) -> None:
        stat = self._stat
        waiting = len(self._commands) + len(self._queries)
        stat.mailbox = waiting
        stat.mailbox_peak = max(stat.mailbox_peak, waiting + len(commands))
        now_s = time.monotonic()
        oldest_s = min(
            self._commands[0].arrived_s if self._commands else now_s,
            self._queries[0][1].arrived_s if self._queries else now_s,
        )
        stat.oldest_ms = int((now_s - oldest_s) * 1000)
        stat.refusals += self._loop.refusals
        stat.internal_errors += self._loop.internal_errors
        self._loop.refusals = self._loop.internal_errors = 0
        stat.syncs = self._store.journal.syncs
        stat.journal_seq = self._store.meta.seq
        stat.end_turn(now_s)
        due_s = max(0.0, self._ticked_s + TICK_S - now_s)
        self._mailbox.timeout_s = 0.0 if waiting or self._ours or self._answered else due_s

    def _push(
        self, owner: str, number: int, operation: str, body: bytes, *, again: bool = False
    ) -> None:
        for socket in self._outbox.push(owner, number, operation, body, again=again):
            self._mailbox.watch(socket, _nothing)

    def _deliver(self, deliveries: Deliveries) -> None:
        for route, items in deliveries.items():
            if self._mailbox.sender_of(self._subscriptions.key_of(route)) is None:
                self._subscriptions.drop(route)  # Its key was removed.
            else:
                self._send_runs(route, items)

    def _send_runs(self, route: bytes, runs: list[Run]) -> None:
        frame = wire.encode_runs(self._store.id, self._loop.cut, runs)
        if len(frame) > _REPLY_BYTES_MAX and len(runs) > 1:
            half = len(runs) // 2
            self._send_runs(route, runs[:half])
            self._send_runs(route, runs[half:])
        elif not self._mailbox.send(route, frame):
            self._stat.replies_dropped += 1
            if self._mailbox.gone:
                self._subscriptions.drop(route)
            else:
                self._subscriptions.missed(route, runs)

    def _send_all(self, answers: Sequence[tuple[bytes, Kind, Any]]) -> None:
        """Send answers, those of one kind to one connection in one frame, in their order."""
        frames: dict[tuple[bytes, Kind], list[Any]] = {}
        for route, kind, answer in answers:
            frames.setdefault((route, kind), []).append(answer)
        for (route, kind), items in frames.items():
            self._send(route, kind, items)

    def _send(self, route: bytes, kind: Kind, items: list[Any]) -> None:
        frame = wire.encode(
            wire.OwnerFrame(wire.VERSION, kind, self._store.id, self._loop.cut, items)
        )
        if len(frame) > _REPLY_BYTES_MAX and len(items) > 1:
            half = len(items) // 2
            self._send(route, kind, items[:half])
            self._send(route, kind, items[half:])
        elif not self._mailbox.send(route, frame):
            self._stat.replies_dropped += 1  # What it missed it will ask for again.
            if self._mailbox.gone:
                self._subscriptions.drop(route)


def kind_of_answer(kind: Kind) -> Kind:
    """Return the kind of frame that answers requests of `kind`."""
    return Kind.REPLIES if kind is Kind.COMMANDS else Kind.ANSWERS


def _error(request: wire.Request, error: KsiError) -> wire.Answer:
    return wire.Answer(request.number, None, error.to_wire())


def _nothing() -> None:
    """The socket is looked at in the turn that follows."""


def fresh_ids() -> Iterator[str]:
    """Yield random UUIDs for ever."""
    while True:
        yield str(uuid.uuid4())
