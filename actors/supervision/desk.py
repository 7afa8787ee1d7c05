"""Where requests to the supervisor are taken: frames in, frames out, effectively once.

The same protocol as at any owner, kept in memory: commands are numbered a client instance, carried
out in order, and a number seen before gets the reply it got then. Memory is right here: when the
supervisor ends, so has all that its commands can have changed. So its store never changes its id.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import msgspec

from ksi.actors.owner import Sender
from ksi.transport import wire
from ksi.transport.errors import Busy, Expired, Forbidden, Internal, KsiError
from ksi.transport.limits import WINDOW_BYTES_MAX, WINDOW_COMMANDS_MAX
from ksi.transport.message import CATALOGUE, Message, encode, not_taken
from ksi.transport.wire import Kind

STORE: Final = "supervisor"
CLIENTS_MAX: Final = 1024  # Instances remembered; the longest silent goes first. Few ever call.

Carry = Callable[[Message, Sender], msgspec.Struct]

_decode_requests = msgspec.msgpack.Decoder(wire.CommandsFrame).decode
_decode_frame = msgspec.msgpack.Decoder(wire.Frame).decode


class _Client:
    """What is remembered of one instance: its last number, and replies it may ask for again."""

    __slots__ = ("last", "replies")

    def __init__(self) -> None:
        self.last = 0
        self.replies: dict[int, wire.Answer] = {}


class Desk:
    """Takes the frames addressed to `name`; `carry` does what a message asks or refuses."""

    def __init__(self, name: str, carry: Carry, log: Any) -> None:
        self._name = name
        self._carry = carry
        self._log = log
        self._clients: OrderedDict[tuple[str, bytes], _Client] = OrderedDict()
        self._operations = {each.name: each for each in CATALOGUE.values() if each.owner == name}

    def take(
        self, payload: bytes, sender: Sender | None, arrived_s: float
    ) -> Iterable[tuple[Kind, list[Any]]]:
        """Return the answers to one frame, each a kind and its items. Garbage has none."""
        try:
            frame = _decode_frame(payload)
            if frame.kind in (Kind.COMMANDS, Kind.QUERIES):
                requests = _decode_requests(payload).items
            else:
                requests = []
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
            return []
        if frame.kind == Kind.COMMANDS:
            return self._commands(frame, requests, sender, arrived_s)
        if frame.kind == Kind.QUERIES:
            answers = [self._answer(each, "query", sender, arrived_s)[0] for each in requests]
            return [(Kind.ANSWERS, answers)]
        if sender is None:
            return []
        return self._control(frame, sender)

    def _control(self, frame: wire.Frame, sender: Sender) -> Iterable[tuple[Kind, list[Any]]]:
        if frame.kind == Kind.HELLO:
            version = wire.VERSION
            bounds = WINDOW_COMMANDS_MAX, WINDOW_BYTES_MAX
            yield Kind.WELCOME, [wire.Welcome(self._name, os.getpid(), version, version, *bounds)]
        elif frame.kind == Kind.GOODBYE:
            self._clients.pop((sender.name, frame.instance), None)
            yield Kind.FAREWELL, []

    def _commands(
        self,
        frame: wire.Frame,
        requests: list[wire.Request],
        sender: Sender | None,
        arrived_s: float,
    ) -> Iterable[tuple[Kind, list[Any]]]:
        """Carry out the commands of a frame in order; stop at the first that must come again."""
        client = self._client(frame, sender)
        answers: list[wire.Answer] = []
        resend: list[int] = []
        for request in requests:
            if request.number <= client.last:
                # One acknowledged in an earlier life of its sender has no reply any more.
                forgotten = wire.Answer(request.number, encode({}))
                answers.append(client.replies.get(request.number, forgotten))
                continue
            if request.number != client.last + 1:
                resend = [client.last + 1]
                break
            if len(client.replies) >= WINDOW_COMMANDS_MAX:
                full = Busy("too many commands are unacknowledged", limit=WINDOW_COMMANDS_MAX)
                answers.append(wire.Answer(request.number, None, full.to_wire()))
                break
            answer, conclusive = self._answer(request, "command", sender, arrived_s)
            answers.append(answer)
            if not conclusive:
                break
            client.last = request.number
            client.replies[request.number] = answer
        if answers:
            yield Kind.REPLIES, answers
        if resend:
            yield Kind.RESEND_FROM, resend

    def _client(self, frame: wire.Frame, sender: Sender | None) -> _Client:
        if sender is None:  # refused whatever it asks: nothing of it is kept
            client = _Client()
            client.last = frame.acked
            return client
        client = self._clients.setdefault((sender.name, frame.instance), _Client())
        self._clients.move_to_end((sender.name, frame.instance))
        while len(self._clients) > CLIENTS_MAX:
            self._clients.popitem(last=False)
        client.last = max(client.last, frame.acked)
        for number in [number for number in client.replies if number <= frame.acked]:
            del client.replies[number]
        return client

    def _answer(
        self,
        request: wire.Request,
        kind: Literal["command", "query"],
        sender: Sender | None,
        arrived_s: float,
    ) -> tuple[wire.Answer, bool]:
        """Return the answer to one request, and whether it is conclusive."""
        try:
            operation = self._operations.get(request.operation)
            if operation is None or operation.kind != kind:
                raise not_taken(request.operation, self._name, kind)
            if sender is None:
                raise Forbidden("this key is not enrolled", hint="ksi agents enroll NAME")
            operation.require_role(sender.name, sender.role)
            left_ms = request.remaining_ms
            if left_ms is not None and time.monotonic() > arrived_s + left_ms / 1000:
                raise Expired(f"{operation.name} came too late and was not carried out")
            reply = self._carry(operation.decode(request.body), sender)
            return wire.Answer(request.number, encode(reply)), True
        except KsiError as refusal:
            return wire.Answer(request.number, None, refusal.to_wire()), refusal.conclusive
        except Exception:
            self._log.exception("a request failed", operation=request.operation[:100])
            fault = Internal(f"{request.operation} failed", hint="ksi logs supervisor")
            return wire.Answer(request.number, None, fault.to_wire()), True
