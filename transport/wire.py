"""Frames: the bytes between a client and an owner, and nothing else.

A frame is one MessagePack array. Many requests travel in one frame and all replies of one commit
to one connection in another: the frame is the cost, not the request in it. The bodies inside are
byte strings of their own, so that one bad body spoils one request, not the frame.

`docs/protocol.md` describes the same for writers of clients in other languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, Literal

import msgspec

VERSION: Final = 1
NUMBER_MAX: Final = (1 << 63) - 1  # The largest that fits every integer on its way.
INSTANCE_BYTES: Final = 16

Number = Annotated[int, msgspec.Meta(ge=1, le=NUMBER_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
Instance = Annotated[bytes, msgspec.Meta(min_length=INSTANCE_BYTES, max_length=INSTANCE_BYTES)]


class Kind(IntEnum):
    """What a frame carries. Requests are below 64, what owners send is above."""

    HELLO = 1  # items: none; answered WELCOME; changes nothing
    COMMANDS = 2  # items: Request, commands and signals, numbered and carried out in order
    QUERIES = 3  # items: Request, answered from the state after the commands before it
    SUBSCRIBE = 4  # items: Subscribe
    UNSUBSCRIBE = 5  # items: numbers of subscriptions
    CREDIT = 6  # items: (number of subscription, messages it may have sent in total)
    GOODBYE = 7  # items: none; this instance is done, its row may go

    WELCOME = 65  # items: one Welcome
    REPLIES = 66  # items: Answer, to commands
    ANSWERS = 67  # items: Answer, to queries and subscriptions
    DELIVERIES = 68  # items: Run
    RESEND_FROM = 69  # items: one number; what was sent from it on was not carried out
    FAREWELL = 70  # items: none; the answer to GOODBYE


class Request(msgspec.Struct, array_like=True, frozen=True):
    """One command or query. `remaining_ms` is the time left for it, None for ever."""

    number: Number
    operation: str
    body: bytes
    remaining_ms: int | None = None
    correlation_id: str | None = None
    traceparent: str | None = None


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """What a client sends.

    `store` is the id of the store it believes it speaks with (empty: it knows none yet), `cut` the
    highest checkpoint number it has seen, `instance` 16 random bytes of this client object,
    `acked` the number up to which all its commands have been answered, `again` whether a command
    in it has been sent before.
    """

    version: Literal[1]
    kind: int
    store: str
    cut: Count
    instance: Instance
    acked: Count
    again: bool
    items: list[Any]


class CommandsFrame(msgspec.Struct, array_like=True, frozen=True):
    """`Frame` with items that are requests: COMMANDS and QUERIES."""

    version: Literal[1]
    kind: Annotated[int, msgspec.Meta(ge=2, le=3)]
    store: str
    cut: Count
    instance: Instance
    acked: Count
    again: bool
    items: list[Request]


class Subscribe(msgspec.Struct, array_like=True, frozen=True):
    """Ask for what is announced under topics that match `pattern` (`*` one word, `>` the rest)."""

    number: Number
    pattern: str
    credit: Count


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The outcome of one request: a reply body, or an error in its wire form."""

    number: int
    body: bytes | None
    error: list[Any] | None = None


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    """Who answers: the owner's name and process, and the versions it speaks."""

    owner: str
    pid: int
    version_min: int
    version_max: int
    window_commands: int
    window_bytes: int


class Said(msgspec.Struct, array_like=True, frozen=True):
    """Messages one after the other under one topic by one sender, each a body."""

    topic: str
    sender: str
    bodies: list[bytes]


class Run(msgspec.Struct, array_like=True, frozen=True):
    """A run of messages to one subscription; `said` is the same bytes for all who share a pattern.

    `seq` is the number of the first message: they count what was announced to the subscription,
    delivered or missed, from 1. `gap` is how many were missed right before it.
    """

    number: int
    seq: int
    gap: int
    said: list[Said]


class OwnerFrame(msgspec.Struct, array_like=True, frozen=True):
    """What an owner sends: store, cut, and items by kind."""

    version: int
    kind: int
    store: str
    cut: int
    items: list[Any]


class RepliesFrame(msgspec.Struct, array_like=True, frozen=True):
    """`OwnerFrame` with items that are answers: REPLIES and ANSWERS."""

    version: int
    kind: int
    store: str
    cut: int
    items: list[Answer]


class DeliveriesFrame(msgspec.Struct, array_like=True, frozen=True):
    """`OwnerFrame` with items that are runs of messages."""

    version: int
    kind: int
    store: str
    cut: int
    items: list[Run]


encode = msgspec.msgpack.Encoder().encode
_NOTHING: Final = msgspec.Raw(b"")  # Stands where bytes follow that are encoded already.


def encode_runs(store: str, cut: int, runs: Sequence[tuple[int, int, int, bytes]]) -> bytes:
    """Return a DELIVERIES frame of runs whose messages are encoded: each is copied once."""
    items = [_NOTHING] * len(runs)
    parts = [encode(OwnerFrame(VERSION, Kind.DELIVERIES, store, cut, items))]
    for number, seq, gap, said in runs:
        parts += (encode((number, seq, gap, _NOTHING)), said)
    return b"".join(parts)
