"""The client's half of effectively-once delivery to one owner. No I/O: bytes in, bytes out.

Commands of a client *instance* are numbered without a gap. The owner carries out number n only
after n - 1; a number it has carried out before is answered with the stored reply. So what may have
been lost is simply sent again, in order, and `acked` tells the owner which replies it may forget.

- Nothing is sent beyond `WINDOW_COMMANDS_MAX` commands or `WINDOW_BYTES_MAX` bytes unanswered.
- A transient refusal means that its number and all later ones did not happen: they wait
  `retry_after_s` and go again. A command whose deadline has passed goes with no time left, and
  the owner answers it with the stored reply or with `expired`: its number is settled either way.
- A frame from another store than before settles everything with `restored`: it is never resent.
- A window that starts anew, as another instance, counts on: an answer does not say which instance
  it is for, and a late one to the former must not pass for one to this.

Source: sessions as in TigerBeetle, with a window of replies in place of one; DESIGN 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ksi.transport import wire
from ksi.transport.errors import Evicted, KsiError, Restored, from_wire
from ksi.transport.limits import FRAME_BYTES_MAX, WINDOW_BYTES_MAX, WINDOW_COMMANDS_MAX
from ksi.transport.wire import Kind

ANSWER_S: Final = 0.1  # With less time left nothing is tried again: its answer would be late.
_FRAME_ROOM: Final = FRAME_BYTES_MAX - 512  # What is left of a frame beside its header.

_decode_frame = msgspec.msgpack.Decoder(wire.OwnerFrame).decode
_decode_replies = msgspec.msgpack.Decoder(wire.RepliesFrame).decode
_decode_deliveries = msgspec.msgpack.Decoder(wire.DeliveriesFrame).decode
_DECODERS: Final[dict[int, Any]] = {
    Kind.REPLIES: _decode_replies,
    Kind.ANSWERS: _decode_replies,
    Kind.DELIVERIES: _decode_deliveries,
}


class Pending:
    """One request on its way. `future` is whatever its caller waits on."""

    __slots__ = (
        "body", "correlation_id", "deadline_s", "doubtful", "future", "number", "operation",
        "refused", "sent", "traceparent",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        operation: str,
        body: bytes,
        deadline_s: float | None,
        correlation_id: str | None = None,
        traceparent: str | None = None,
    ) -> None:
        self.number = number
        self.operation = operation
        self.body = body
        self.deadline_s = deadline_s  # on the monotonic clock; None: none; 0: its caller was told
        self.correlation_id = correlation_id
        self.traceparent = traceparent
        self.sent = False
        self.doubtful = False  # it was sent, and what became of that is not known
        self.refused: KsiError | None = None  # the transient refusal it waits behind
        self.future: Any = None

    def request(self, now_s: float) -> wire.Request:
        remaining_ms = None
        if self.deadline_s is not None:
            remaining_ms = max(0, int((self.deadline_s - now_s) * 1000))
        return wire.Request(
            self.number,
            self.operation,
            self.body,
            remaining_ms,
            self.correlation_id,
            self.traceparent,
        )


Outcome = tuple[Pending, bytes | None, KsiError | None]


class Cut:
    """The highest checkpoint number seen, by all windows that share it.

    Who has heard of a checkpoint from one owner tells all others: so none of them counts what he
    then asks for to the time before it.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class Window:
    """Requests to one owner from one client instance, and what is known of their fate."""

    def __init__(self, instance: bytes | None = None, cut: Cut | None = None) -> None:
        self.cut = cut or Cut()
        self._last = 0
        self._last_query = 0
        self._reset(instance)

    def _reset(self, instance: bytes | None) -> None:
        self.instance = instance or os.urandom(16)
        self.store = ""
        self.commands: dict[int, Pending] = {}
        self.queries: dict[int, Pending] = {}
        self.command_bytes = 0
        self.not_before_s = 0.0  # nothing is sent before this moment: a refusal asked for patience
        self.deliveries: list[wire.Run] = []  # pushed to subscriptions, for the caller to take
        self.subscribed: list[wire.Answer] = []  # answers to SUBSCRIBE, likewise
        self.welcome: wire.Welcome | None = None
        self.farewell = False
        self.recorded: int | None = None  # of commands taken up: no answer beyond it may go yet
        self._unsent: list[Pending] = []  # commands, in order
        self._unsent_queries: list[Pending] = []

    @property
    def acked(self) -> int:
        """All commands up to this number have been answered."""
        for number in self.commands:
            return number - 1
        return self._last

    def _acknowledged(self) -> int:
        """What the owner is told: answers up to this number may be forgotten."""
        return self.acked if self.recorded is None else min(self.acked, self.recorded)

    def full(self) -> bool:
        """Whether a further command must wait for an answer to an earlier one."""
        return len(self.commands) >= WINDOW_COMMANDS_MAX or self.command_bytes >= WINDOW_BYTES_MAX

    def add_command(self, operation: str, body: bytes, deadline_s: float | None) -> Pending:
        """Number a command; it goes with the next `frames()`. Ask `full()` first."""
        self._last = number = self._last + 1
        pending = Pending(number, operation, body, deadline_s)
        self.commands[number] = pending
        self.command_bytes += len(body)
        self._unsent.append(pending)
        return pending

    def resume(self, number: int, operation: str, body: bytes, *, again: bool) -> Pending:
        """Take up a command that has its number already; in order of number.

        From then on no more is acknowledged than `recorded` says. `again`: an earlier life of this
        instance may have sent it.
        """
        self._last = number - 1
        if self.recorded is None:
            self.recorded = number - 1
        pending = self.add_command(operation, body, None)
        pending.sent = again
        return pending

    def add_query(self, operation: str, body: bytes, deadline_s: float | None) -> Pending:
        """Add a query; it goes with the next `frames()`, after the commands before it."""
        self._last_query = number = self._last_query + 1
        pending = Pending(number, operation, body, deadline_s)
        self.queries[number] = pending
        self._unsent_queries.append(pending)
        return pending

    def drop_query(self, number: int) -> None:
        """Forget a query nobody waits for any more."""
        self.queries.pop(number, None)

    def waiting(self) -> bool:
        """Whether anything is unanswered."""
        return bool(self.commands or self.queries)

    def unsent(self) -> bool:
        """Whether `frames` would yield any, now or after a pause."""
        return bool(self._unsent or self._unsent_queries)

    def give_up(self) -> list[Pending]:
        """Forget all that is unanswered and start anew as another instance; return it."""
        unsettled = [*self.commands.values(), *self.queries.values()]
        self._reset(None)
        return unsettled

    def frames(self, now_s: float) -> Iterator[bytes]:
        """Yield the frames that carry everything not sent yet; each counts as sent when taken."""
        if now_s < self.not_before_s:
            return
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            yield from self._frames_of(Kind.COMMANDS, unsent, now_s)
        if self._unsent_queries:
            unsent, self._unsent_queries = self._unsent_queries, []
            yield from self._frames_of(Kind.QUERIES, unsent, now_s)

    def control(self, kind: Kind, items: list[Any]) -> bytes:
        """Return a frame of another kind: HELLO, SUBSCRIBE, CREDIT, GOODBYE ..."""
        return wire.encode(
            wire.Frame(
                wire.VERSION,
                kind,
                self.store,
                self.cut.number,
                self.instance,
                self._acknowledged(),
                False,
                items,
            )
        )

    def lost(self) -> None:
        """The connection was lost, and with it perhaps any frame: all unanswered go again."""
        for pending in self.commands.values():
            pending.doubtful = pending.doubtful or (pending.sent and pending.refused is None)
        self._resend_from(0)
        self._unsent_queries = list(self.queries.values())

    def receive(self, frame: bytes, now_s: float) -> list[Outcome]:
        """Take in one frame from the owner; return what it settles, in order.

        Raises:
            msgspec.MsgspecError: the frame is not of this protocol.
        """
        decode = _DECODERS.get(frame[2], _decode_frame) if len(frame) > 2 else _decode_frame
        header: Any = decode(frame)
        if header.store != self.store:
            if self.store:
                return self._start_anew(
                    Restored(
                        "the store was restored from a checkpoint; what was unanswered is lost",
                        hint="read the state and send what is missing again",
                    )
                )
            self.store = header.store
        if header.cut > self.cut.number:
            self.cut.number = header.cut
        kind = header.kind
        if decode is _decode_replies:
            waiting = self.commands if kind == Kind.REPLIES else self.queries
            return self._settle(header.items, waiting, now_s)
        if kind == Kind.DELIVERIES:
            self.deliveries += header.items
        elif kind == Kind.RESEND_FROM:
            self._resend_from(int(header.items[0]))
        elif kind == Kind.WELCOME:
            self.welcome = msgspec.convert(header.items[0], wire.Welcome)
        elif kind == Kind.FAREWELL:
            self.farewell = True
        return []

    def _settle(
        self, answers: list[wire.Answer], waiting: dict[int, Pending], now_s: float
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for answer in answers:
            number = answer.number
            if number < 0:
                self.subscribed.append(answer)
                continue
            pending = waiting.get(number)
            if pending is None:  # settled already, or it is for a former instance
                continue
            error = None if answer.error is None else from_wire(answer.error)
            if error is not None and not error.conclusive and waiting is self.commands:
                self._hold(pending, error, now_s)
                continue
            if isinstance(error, Evicted):
                outcomes += self._start_anew(error)
                break
            del waiting[number]
            outcomes.append((pending, answer.body, error))
            if waiting is self.commands:
                self.command_bytes -= len(pending.body)
        return outcomes

    def _hold(self, pending: Pending, error: KsiError, now_s: float) -> None:
        """A command was refused for now: it and all after it go again a little later."""
        if not pending.doubtful:  # Else it says nothing of what was sent before.
            pending.refused = error
        self.not_before_s = now_s + float(error.details.get("retry_after_s") or error.retry_s)
        if pending.deadline_s:  # At the end its caller is to be told why, and not: who knows.
            left_s = pending.deadline_s - self.not_before_s
            self.not_before_s += left_s + error.retry_s if 0.0 < left_s < ANSWER_S else 0.0
        self._resend_from(pending.number)

    def _resend_from(self, number: int) -> None:
        """Mark all commands from `number` on as unsent, beside those that are so already."""
        if self._unsent:  # A refusal may come late, after the connection it came by was lost.
            number = min(number, self._unsent[0].number)
        self._unsent = [each for each in self.commands.values() if each.number >= number]

    def _start_anew(self, error: KsiError) -> list[Outcome]:
        """Settle everything with `error` and go on as a new instance."""
        return [(pending, None, error) for pending in self.give_up()]

    def _frames_of(self, kind: Kind, unsent: list[Pending], now_s: float) -> Iterator[bytes]:
        acked = self._acknowledged()
        if sum([len(pending.body) + 256 for pending in unsent]) <= _FRAME_ROOM:
            yield self._pack(kind, unsent, acked, now_s)
            return
        start, room = 0, _FRAME_ROOM
        for end, pending in enumerate(unsent):
            cost = len(pending.body) + 256
            if cost > room and end > start:
                yield self._pack(kind, unsent[start:end], acked, now_s)
                start, room = end, _FRAME_ROOM
            room -= cost
        yield self._pack(kind, unsent[start:], acked, now_s)

    def _pack(self, kind: Kind, batch: list[Pending], acked: int, now_s: float) -> bytes:
        again = kind is Kind.COMMANDS and any(pending.sent for pending in batch)
        for pending in batch:
            pending.sent = True
            pending.refused = None
        requests = [pending.request(now_s) for pending in batch]
        return wire.encode(
            wire.CommandsFrame(
                wire.VERSION,
                kind,
                self.store,
                self.cut.number,
                self.instance,
                acked,
                again,
                requests,
            )
        )
