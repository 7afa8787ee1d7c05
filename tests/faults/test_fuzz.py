"""Whatever bytes come in a frame, the host of any owner refuses or carries it out, and that whole.

The real host, commit loop and owner, in this process; the socket and the disk are stood in for. An
exception that leaves a turn would end the owner; a defect in `decide` or `apply` is logged and
answered with `internal`. Neither may happen, whatever is sent, and the journal gives the tables.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from hosted import host_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksi.actors.outbox import Outbox
from ksi.actors.owners import OWNERS, load, load_all
from ksi.actors.testing import Twin
from ksi.transport.mailbox import Letter, Post
from ksi.transport.message import CATALOGUE
from ksi.transport.wire import Kind

load_all()
pack = msgspec.msgpack.encode
ROLES = ("agent", "agent", "operator", "worker", "owner")
FRESH_AFTER = 3000  # Frames to one owner: then it begins anew, and stays small.
FRAMES, VERY_MANY_FRAMES = 2500, 1_000_000

NASTY: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.0, -1.5, 1e308, float("nan"),
    float("inf"), "", "a", ".", "..", "../../x", "a/b", "a\0b", "x" * 129, "\u2028", "sess_1",
    "operator", "\x1b[2J", "*", ">", "a.>.b", b"", b"\xff" * 9, [], {}, [[]], {"": {}},
    {"a": None}, [1, "a", None], ["sess_1"] * 3, {"k" * 600: 1}, {1: 2}, [{"a": [{"b": {}}]}] * 2,
]  # fmt: skip


class Nobody:
    """The socket to another owner, and its monitor, when none is there."""

    def recv(self, _flags: int) -> bytes:
        raise zmq.Again

    recv_multipart = recv


class Hosted:
    """An owner of this name in its host, and a peer that says who it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.operations = [each for each in CATALOGUE.values() if each.owner == name]
        self.examples = {each.name: each.example for each in self.operations}
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """Begin anew, with some state there."""
        self.twin = twin = Twin(load(self.name))
        self.role = "agent"
        mailbox = SimpleNamespace(
            sender_of=lambda key: (key, self.role), send=self._answered, ring=lambda: None,
            watch=lambda *_: None, timeout_s=0.0, gone=False,
        )  # fmt: skip
        nobodies: Any = (Nobody(), Nobody())
        outbox = Outbox("store", lambda _: nobodies, self)
        self.host = host_of(twin, mailbox, outbox, self)
        for each in self.operations:
            self.send(self.frame(each.name, pack(each.example)), "alice", "operator")

    def _answered(self, _route: bytes, frame: bytes) -> bool:
        _version, kind, _store, _cut, items = msgspec.msgpack.decode(frame)
        if kind in (Kind.REPLIES, Kind.ANSWERS):
            for item in items:
                self.outcomes["done" if item[1] is not None else item[2][0]] += 1
        return True

    def exception(self, event: str, **fields: Any) -> None:
        raise AssertionError(f"{event}: {fields}")

    def frame(self, operation: str, body: bytes) -> bytes:
        """Return a frame of a new client with one request."""
        declared = CATALOGUE.get(operation)
        kind = Kind.COMMANDS if declared is None or declared.changes else Kind.QUERIES
        items = [[1, operation, body]]
        return pack([1, kind, "", 0, os.urandom(16), 0, False, items])

    def send(self, frame: bytes, name: str, role: str) -> None:
        self.role = role
        self.sent += 1
        self.host._turn(Post([Letter(name.encode(), name, frame, time.monotonic())]))

    def require_unharmed(self) -> None:
        """Check that nothing was a defect, and that the journal gives the tables."""
        assert self.twin.errors == []
        self.twin.store.require_unmarred()
        assert self.twin.recovered().store.rows() == self.twin.store.rows()


def mutated_body(chance: random.Random, hosted: Hosted) -> tuple[str, bytes]:
    """Return an operation and its example with something wrong, or something else, in it."""
    operation = chance.choice(hosted.operations).name
    fields: dict[str, Any] = dict(hosted.examples[operation])
    declared = [each.name for each in msgspec.structs.fields(CATALOGUE[operation].message)]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        name = chance.choice([*declared, "extra"])
        if chance.random() < 0.15:
            fields.pop(name, None)
        else:
            other = hosted.examples[chance.choice(hosted.operations).name].get(name)
            fields[name] = other if other is not None and chance.random() < 0.3 else nasty(chance)
    body = bytearray(pack(fields))
    if chance.random() < 0.1:
        return operation, noisy(chance, body)
    return operation, bytes(body)


def nasty(chance: random.Random) -> Any:
    if chance.random() < 0.1:
        return {str(chance.choice(NASTY)): chance.choice(NASTY), "b": [chance.choice(NASTY)]}
    return chance.choice(NASTY)


def noisy(chance: random.Random, content: bytearray) -> bytes:
    for _ in range(chance.randrange(1, 4)):
        if content:
            content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content[: chance.randrange(len(content) + 1)])


def fuzz(frames: int) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    total: Counter[str] = Counter()
    for name in OWNERS:
        hosted = Hosted(name)
        for _ in range(frames // len(OWNERS)):
            frame = hosted.frame(*mutated_body(chance, hosted))
            if chance.random() < 0.1:
                frame = noisy(chance, bytearray(frame))
            hosted.send(frame, chance.choice(("alice", "eve")), chance.choice(ROLES))
            if hosted.sent >= FRESH_AFTER:
                hosted.require_unharmed()
                hosted.sent = 0
                hosted.begin()
        hosted.require_unharmed()
        total += hosted.outcomes
    print(f"{frames} frames: {dict(total)}")
    assert total["internal"] == 0
    assert total["done"] > frames / 20, "hardly anything was carried out: this has proved little"
    assert total["invalid"] > frames / 20


def test_no_frame_is_too_strange_for_any_owner() -> None:
    fuzz(FRAMES)


@pytest.mark.soak
def test_of_a_million_frames_none_is_too_strange_for_any_owner() -> None:
    fuzz(VERY_MANY_FRAMES)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
    | st.text(max_size=20) | st.binary(max_size=20) | st.sampled_from(["sess_1", "alice", "req_1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)  # fmt: skip
HOSTED = {name: Hosted(name) for name in OWNERS}
OPERATIONS = [each for hosted in HOSTED.values() for each in hosted.operations]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_value_of_a_field_is_too_strange(data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(OPERATIONS))
    names = [each.name for each in msgspec.structs.fields(operation.message)]
    changed = data.draw(st.dictionaries(st.sampled_from([*names, "extra"]), VALUES, max_size=3))
    hosted = HOSTED[operation.owner]
    body = pack({**operation.example, **changed})
    hosted.send(hosted.frame(operation.name, body), "alice", data.draw(st.sampled_from(ROLES)))
    assert hosted.twin.errors == []


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(OWNERS))
def test_no_bytes_are_too_strange(payload: bytes, name: str) -> None:
    HOSTED[name].send(payload, "alice", "agent")
