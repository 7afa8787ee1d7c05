"""The owner's half of effectively-once delivery: numbers, stored replies, request ids, outbox.

Numbers run per (sender, instance). Command n is carried out only when n = max(last, acked) + 1;
a smaller one gets the reply stored for it, a larger one is not carried out and the client is told
where to resend from. Replies are kept until the client acknowledges them, in its row, which is
put once a batch however many commands it holds.

These rows live in the owner's LMDB view beside its own tables and are rebuilt from the journal by
the same code: a `Record` says everything that changed them.

Source: DESIGN 4; the session table of TigerBeetle, with a window in place of a single reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from ksi.actors.owner import Key, Table
from ksi.transport.errors import KsiError
from ksi.transport.limits import (
    CLIENT_IDLE_S_MAX,
    CLIENT_ROWS_MAX,
    REQUEST_ID_S_MAX,
    WINDOW_COMMANDS_MAX,
)

E = TypeVar("E")

GOODBYE: Final = "ksi:goodbye"  # the instance is done
EVICTED: Final = "ksi:evicted"  # the instance was forgotten to keep within the limits
SENT: Final = "ksi:sent"  # messages up to `number` have been carried out by owner `sender`
PURGED: Final = "ksi:purged"  # request ids from before `number` ms of owner time
TICK: Final = "ksi:tick"  # time has passed
ANSWERED: Final = "ksi:answered"  # another owner has answered a message of ours
UNKNOWN: Final = "ksi:unknown"  # no operation of ours: what a client calls one is not recorded
HOST_RECORDS: Final = frozenset({GOODBYE, EVICTED, SENT, PURGED, TICK, ANSWERED})
_PURGE_ROWS_MAX: Final = 1000  # Request ids removed a tick: keeps the turn short.
_SWEEP_ROWS: Final = 200  # Client rows looked at a tick for idle ones, likewise.
_ACTIVE_CLIENTS_MAX: Final = 4096  # Kept in memory; the others come back from their rows.


class Record(msgspec.Struct, Generic[E], array_like=True, frozen=True, gc=False):
    """One command as the journal holds it: whose, which, what was replied, what happened."""

    sender: str
    instance: bytes
    number: int
    operation: str
    reply: bytes  # the encoded `wire.Answer`
    events: list[E]
    sends: list[tuple[str, str, bytes]]  # owner, operation, body
    request_id: str | None = None


class Answered(NamedTuple):
    """What another owner has answered to a message in the outbox; `refusal` None: carried out."""

    owner: str
    operation: str
    body: bytes
    refusal: KsiError | None


class Batch(msgspec.Struct, Generic[E], array_like=True, frozen=True):
    """What one commit adds to the journal."""

    now: float
    time_s: float
    cut: int
    records: list[Record[E]]


class ClientRow(msgspec.Struct, array_like=True, frozen=True):
    """What is kept of a client instance: the last number and the replies it may still ask for."""

    last: int
    first: int  # the number of replies[0]
    replies: list[bytes]
    used_s: float  # in owner time: no clock that is set makes it old


class RequestRow(msgspec.Struct, array_like=True, frozen=True):
    """The reply to a command that carried a `request_id`."""

    body: bytes
    at_s: float  # in owner time


class Message(msgspec.Struct, array_like=True, frozen=True):
    """A command to another owner that waits in the outbox."""

    operation: str
    body: bytes


class Counter(msgspec.Struct, array_like=True, frozen=True):
    """A number that only grows."""

    value: int


HOST_TABLES: Final[Mapping[str, tuple[type, tuple[type, ...]]]] = {
    "ksi.clients": (ClientRow, (str, str)),  # sender, instance in hex
    "ksi.requests": (RequestRow, (str, str, str)),  # sender, operation, request id
    "ksi.request_ages": (bytes, (int, str, str, str)),  # ms of owner time, then the key above
    "ksi.outbox": (Message, (str, int)),  # owner, number
    "ksi.counters": (Counter, (str,)),  # "evictions"; "out:<owner>": last number in its outbox
}


class Client:
    """A client instance in memory while it is active."""

    __slots__ = (
        "_before",
        "acked",
        "instance",
        "key",
        "known",
        "last",
        "replies",
        "sender",
        "told",
    )

    def __init__(self, sender: str, instance: bytes, row: ClientRow | None) -> None:
        self.sender = sender
        self.instance = instance
        self.key: Key = (sender, instance.hex())
        self.known = row is not None  # if not, what it sent before may have been forgotten
        self.last = row.last if row else 0
        self.acked = row.first - 1 if row else 0
        self.replies: dict[int, bytes] = (
            dict(zip(range(row.first, row.last + 1), row.replies, strict=True)) if row else {}
        )
        self.told = False  # in this batch it was told to wait or from where to resend
        self._before = self.last, self.known

    def begin(self) -> None:
        """A batch has something of it: from here `undo` goes back to."""
        self.told = False
        self._before = self.last, self.known

    def undo(self) -> None:
        """Forget what the batch has carried out; what it has acknowledged holds all the same."""
        last, self.known = self._before
        for number in range(last + 1, self.last + 1):
            self.replies.pop(number, None)
        self.last = max(last, self.acked)

    def pass_on(self, number: int, reply: bytes) -> None:
        """A signal was passed on. Only this process knows of it: nothing is written."""
        self.last = number
        self.replies[number] = reply

    def acknowledge(self, acked: int) -> None:
        """The client has all replies up to `acked`; they may go."""
        if acked <= self.acked:
            return
        if acked >= self.last:
            self.last = acked
            self.replies.clear()
        else:
            for number in range(self.acked + 1, acked + 1):
                self.replies.pop(number, None)
        self.acked = acked

    def row(self, time_s: float) -> ClientRow:
        return ClientRow(self.last, self.acked + 1, list(self.replies.values()), time_s)


class Delivery:
    """The client rows, request ids and outbox of one owner, over its tables."""

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self.client_rows: Table[ClientRow] = tables["ksi.clients"]
        self.requests: Table[RequestRow] = tables["ksi.requests"]
        self.request_ages: Table[bytes] = tables["ksi.request_ages"]
        self.outbox: Table[Message] = tables["ksi.outbox"]
        self.counters: Table[Counter] = tables["ksi.counters"]
        self._clients: dict[tuple[str, bytes], Client] = {}
        self._touched: dict[Client, None] = {}  # in this batch, in order
        self._sweep_from: Key = ()
        self._waiting: set[tuple[str, str, bytes]] | None = None  # what `outbox` holds, once asked
        self._waiting_changed = False  # in this batch

    def client(self, sender: str, instance: bytes) -> Client:
        """Return the instance, from memory or its row; needs an open transaction."""
        client = self._clients.get((sender, instance))
        if client is None:
            client = Client(sender, instance, self.client_rows.get((sender, instance.hex())))
            if len(self._clients) >= _ACTIVE_CLIENTS_MAX:
                self._clients = {(each.sender, each.instance): each for each in self._touched}
            self._clients[(sender, instance)] = client
        if client not in self._touched:
            self._touched[client] = None
            client.begin()
        return client

    def forgotten(self, client: Client) -> bool:
        """Whether what this instance has sent before may have been carried out and forgotten."""
        return not client.known and self.counters.get("evictions") is not None

    def waits(self, message: tuple[str, str, bytes]) -> bool:
        """Whether this message (owner, operation, body) is in the outbox; in a transaction."""
        if self._waiting is None:
            rows = self.outbox.range()
            self._waiting = {(owner, row.operation, row.body) for (owner, _), row in rows}
        return message in self._waiting

    def settle(
        self, record: Record[Any], time_s: float, client: Client | None = None
    ) -> list[tuple[str, int, str, bytes]]:
        """Write what `record` says besides its events. The same live and in replay.

        Args:
            time_s: owner time, like everywhere here.
            client: of the record, where it is known already.

        Returns:
            The messages it puts into the outbox: owner, number, operation, body.
        """
        if record.operation in HOST_RECORDS:
            self._settle_ours(record)
        else:
            # Replay does not see acknowledgements; numbers and the window say what they must be.
            number = record.number
            client = client or self.client(record.sender, record.instance)
            if number != client.last + 1:
                client.acknowledge(number - 1)
            elif len(client.replies) >= WINDOW_COMMANDS_MAX:
                client.acknowledge(number - WINDOW_COMMANDS_MAX)
            client.known = True
            client.last = number
            client.replies[number] = record.reply
            if record.request_id is not None:
                key = (record.sender, record.operation, record.request_id)
                self.requests.put(key, RequestRow(record.reply, time_s))
                self.request_ages.put((int(time_s * 1000), *key), b"")
        if not record.sends:
            return []
        sends = []
        for owner, name, body in record.sends:
            number = self._count(f"out:{owner}")
            self.outbox.put((owner, number), Message(name, body))
            if self._waiting is not None:
                self._waiting.add((owner, name, body))
                self._waiting_changed = True
            sends.append((owner, number, name, body))
        return sends

    def put_rows(self, time_s: float) -> None:
        """Put the row of every client this batch has touched; then `commit` or `undo`.

        One of which nothing was carried out has no row: it would pass for one that is known.
        """
        for client in self._touched:
            if client.known:
                self.client_rows.put(client.key, client.row(time_s))

    def commit(self) -> None:
        """The batch is on disk, or had nothing to write."""
        self._touched.clear()
        self._waiting_changed = False

    def undo(self) -> None:
        """The batch was aborted: its clients are as they were before it."""
        for client in self._touched:
            client.undo()
        self._touched.clear()
        if self._waiting_changed:
            self._waiting, self._waiting_changed = None, False

    def overdue(self, time_s: float) -> list[Record[Any]]:
        """Return the records that keep the tables within their limits; called once a tick."""
        records: list[Record[Any]] = [
            Record(sender, bytes.fromhex(instance), 0, EVICTED, b"", [], [])
            for sender, instance in self._idle_clients(time_s)
        ]
        before_ms = int((time_s - REQUEST_ID_S_MAX) * 1000)
        for key, _ in self.request_ages.range():
            if key[0] < before_ms:
                records.append(Record("", b"", before_ms, PURGED, b"", [], []))
            break
        return records

    def _idle_clients(self, time_s: float) -> list[Any]:
        """Return clients to forget: of the next few in key order, those idle for too long, and
        where there are too many rows in all, the longer idle half."""
        surplus = max(0, self.client_rows.count() - CLIENT_ROWS_MAX)
        seen: list[tuple[float, Any]] = []
        self._sweep_from, start = (), self._sweep_from
        for key, row in self.client_rows.range(start):
            if len(seen) >= max(_SWEEP_ROWS, min(2 * surplus, 10 * _SWEEP_ROWS)):
                self._sweep_from = key
                break
            seen.append((row.used_s, key))
        seen.sort()
        surplus = min(surplus, len(seen) // 2)
        return [
            key
            for position, (used_s, key) in enumerate(seen)
            if position < surplus or time_s - used_s > CLIENT_IDLE_S_MAX
        ]

    def _settle_ours(self, record: Record[Any]) -> None:
        if record.operation == GOODBYE:
            self._forget(record)
        elif record.operation == EVICTED:
            self._forget(record)
            self._count("evictions")
        elif record.operation == SENT:
            sent = self.outbox.range((record.sender,), (record.sender, record.number + 1))
            for key, row in [*sent]:
                self.outbox.delete(key)
                if self._waiting is not None:
                    self._waiting.discard((record.sender, row.operation, row.body))
                    self._waiting_changed = True
        elif record.operation == PURGED:
            old = self.request_ages.range((0,), (record.number,))
            for key in [key for key, _ in islice(old, _PURGE_ROWS_MAX)]:
                self.request_ages.delete(key)
                self.requests.delete(key[1:])

    def _forget(self, record: Record[Any]) -> None:
        client = self._clients.pop((record.sender, record.instance), None)
        if client is not None:
            self._touched.pop(client, None)
        self.client_rows.delete((record.sender, record.instance.hex()))

    def _count(self, name: str) -> int:
        row = self.counters.get(name)
        value = 1 if row is None else row.value + 1
        self.counters.put(name, Counter(value))
        return value
