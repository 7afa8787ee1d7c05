"""`docs/protocol.md` is true, and enough: a client written from it with pyzmq and msgpack alone.

Nothing of our transport is used but to start a system. So what one MessagePack library writes here
is read by another, both ways.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from system import System
from zmq.utils import z85

from ksi.transport import errors, limits

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()

HELLO, COMMANDS, QUERIES, SUBSCRIBE, UNSUBSCRIBE, CREDIT, GOODBYE = range(1, 8)
WELCOME, REPLIES, ANSWERS, DELIVERIES, RESEND_FROM, FAREWELL = range(65, 71)
WAIT_MS = 5000
pack = msgpack.packb


@pytest.fixture(scope="module")
def var(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    system = System(tmp_path_factory.mktemp("protocol") / "var")
    yield system.var
    system.end()


class Peer:
    """A client of the protocol, as literal as it can be."""

    def __init__(self, var: Path, name: str, owner: str = "sessions") -> None:
        run = var / "run"
        if (run / "elsewhere").exists():
            run = Path((run / "elsewhere").read_text().strip())
        self.place = json.loads((run / "endpoints.json").read_text())["owners"][owner]
        self.name = name
        self.keys = enrolled(var / "keys", name)
        self.instance = os.urandom(16)
        self.store = ""
        self.cut = 0
        self._context = zmq.Context()
        self.socket = self.connected()

    def connected(self) -> Any:
        """Return a new connection."""
        socket: Any = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = 1
        socket.maxmsgsize = 1 << 20
        socket.reconnect_ivl, socket.reconnect_ivl_max = 1, 16
        socket.sndtimeo = socket.rcvtimeo = WAIT_MS
        socket.curve_serverkey = self.place["key"].encode()
        socket.curve_publickey, socket.curve_secretkey = self.keys
        socket.connect(self.place["endpoint"])
        return socket

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def send(self, kind: int, items: list[Any], *, acked: int = 0, again: bool = False) -> None:
        frame = [1, kind, self.store, self.cut, self.instance, acked, again, items]
        self.socket.send(pack(frame))

    def receive(self) -> tuple[int, list[Any]]:
        """Return kind and items of the next frame."""
        version, kind, store, cut, items = msgpack.unpackb(self.socket.recv())
        assert version == 1
        assert store == (self.store or store)
        self.store, self.cut = store, max(self.cut, cut)
        return kind, items

    def ask(self, kind: int, items: list[Any], **header: Any) -> tuple[int, list[Any]]:
        self.send(kind, items, **header)
        return self.receive()

    def reply(self, number: int, operation: str, **fields: Any) -> dict[str, Any]:
        """Ask one command, all before it being answered, and return its reply."""
        request = [number, operation, pack(fields)]
        kind, [answer] = self.ask(COMMANDS, [request], acked=number - 1)
        assert kind == REPLIES
        assert answer[0] == number
        assert answer[2] is None, answer[2]
        body: dict[str, Any] = msgpack.unpackb(answer[1])
        return body

    def silent(self, wait_ms: int = 100) -> bool:
        """Whether nothing comes."""
        return not self.socket.poll(wait_ms)


def enrolled(keys: Path, name: str) -> tuple[bytes, bytes]:
    """Enrol a name as the page says, and return its key pair."""
    public, secret = zmq.curve_keypair()
    half = f'metadata\n    name = "{name}"\n    role = "agent"\ncurve\n'
    half += f'    public-key = "{public.decode()}"\n'
    draft = keys / f".{name}"
    for path, text in (
        (keys / f"{z85.decode(public).hex()}.key", half),
        (keys / f"{name}.key_secret", f'{half}    secret-key = "{secret.decode()}"\n'),
    ):
        draft.touch(0o600)
        draft.write_text(text)
        draft.rename(path)
    return public, secret


@pytest.fixture
def peer(var: Path, request: pytest.FixtureRequest) -> Iterator[Peer]:
    with Peer(var, f"peer-{request.node.name[-60:]}".replace("_", "-")) as peer:
        yield peer


# The exchange of the page, byte by byte

_WORDS = {
    "PID": rb"(?:[\x00-\x7f]|\xcc.|\xcd..|\xce....)",
    "TIME": rb"\xcb.{8}",
    "TEXT": rb"(?:[\xa0-\xbf]|\xd9.|\xda..)[\x20-\x7e]+",
}
INSTANCE = bytes(range(16))


def exchange() -> Iterator[tuple[str, list[str]]]:
    """Yield the frames of the page in order: `>` or `<`, and the words. Text stands between two."""
    block = PAGE.split("```hex\n")[1].split("```")[0]
    for sign, lines in groupby(block.splitlines(), lambda line: re.findall(r"^[<>]? ?", line)[0]):
        if sign:
            yield sign[0], " ".join(line[2:] for line in lines).split()


def as_bytes(word: str, store: str) -> bytes:
    if word == "INSTANCE":
        return bytes(pack(INSTANCE))
    return bytes(pack(store)) if word == "STORE" else bytes.fromhex(word)


def as_pattern(word: str, store: str) -> bytes:
    return _WORDS[word] if word in _WORDS else re.escape(as_bytes(word, store))


def test_the_worked_exchange_happens_exactly_as_the_page_shows_it(var: Path) -> None:
    frames = list(exchange())
    assert [sign for sign, _ in frames].count("<") == 12

    with Peer(var, "eva") as peer:
        peer.instance = INSTANCE
        peer.ask(HELLO, [])
        for sign, words in frames:
            if sign == ">":
                peer.socket.send(b"".join(as_bytes(word, peer.store) for word in words))
                continue
            received = peer.socket.recv()
            expected = b"".join(as_pattern(word, peer.store) for word in words)
            assert re.fullmatch(expected, received, re.S), (words, received.hex(" "))
        assert peer.silent()


# Commands


def test_a_number_is_carried_out_once_however_often_it_is_sent(peer: Peer) -> None:
    created = peer.reply(1, "session:create")
    note = pack({"session_id": created["session_id"], "event": "note"})

    first = peer.ask(COMMANDS, [[2, "session:append", note]], acked=1)
    again = peer.ask(COMMANDS, [[2, "session:append", note]], acked=1, again=True)

    assert first == again
    assert msgpack.unpackb(first[1][0][1])["seq"] == 1


def test_the_stored_answer_outlives_the_connection_and_goes_when_acknowledged(peer: Peer) -> None:
    command = [1, "session:create", pack({})]
    first = peer.ask(COMMANDS, [command])

    peer.socket.close()
    peer.socket = peer.connected()
    assert peer.ask(COMMANDS, [command], again=True) == first

    acknowledged = peer.ask(COMMANDS, [command], acked=1, again=True)
    assert acknowledged == (REPLIES, [[1, pack({}), None]])


def test_numbers_of_two_identities_with_one_instance_do_not_meet(var: Path, peer: Peer) -> None:
    with Peer(var, "twin") as other:
        other.instance = peer.instance
        mine, theirs = peer.reply(1, "session:create"), other.reply(1, "session:create")

    assert mine["owner"] == peer.name
    assert theirs["owner"] == "twin"


def test_after_a_gap_nothing_happens_until_the_client_resends_in_order(peer: Peer) -> None:
    session = peer.reply(1, "session:create")["session_id"]
    notes = [
        [number, "session:append", pack({"session_id": session, "event": "note"})]
        for number in range(2, 6)
    ]

    assert peer.ask(COMMANDS, notes[1:], acked=1) == (RESEND_FROM, [2])
    assert peer.silent(), "one RESEND_FROM for however many numbers"
    kind, answers = peer.ask(COMMANDS, notes, acked=1, again=True)

    assert kind == REPLIES
    assert [answer[0] for answer in answers] == [2, 3, 4, 5]
    assert [msgpack.unpackb(answer[1])["seq"] for answer in answers] == [1, 2, 3, 4]


def test_a_bad_body_is_refused_with_its_path_and_uses_up_its_number(peer: Peer) -> None:
    session = peer.reply(1, "session:create")["session_id"]
    bad = [
        pack({"session_id": session}),
        pack({"session_id": session, "event": "note", "epoch": "one"}),
        pack({"session_id": session, "event": "note", "data": {"x": float("nan")}}),
        pack({"session_id": session, "event": "note", "data": {"x": b"bytes"}}),
        pack({"session_id": session, "event": "note", "data": {"x": msgpack.Timestamp(1)}}),
        pack({"session_id": session, "event": "note", "unknown": 1}),
        pack({"session_id": "../x", "event": "note"}),
        pack([1]),
        b"\xc1",
        b"",
    ]
    for number, body in enumerate(bad, 2):
        request = [number, "session:append", body]
        kind, [[answered, reply, error]] = peer.ask(COMMANDS, [request], acked=number - 1)
        assert (kind, answered, reply) == (REPLIES, number, None)
        assert error[0] == "invalid", (body, error)
        assert peer.ask(COMMANDS, [request], acked=number - 1, again=True)[1][0][2] == error

    appended = peer.reply(len(bad) + 2, "session:append", session_id=session, event="note")
    assert appended["seq"] == 1


def test_a_command_without_time_left_expires_and_one_carried_out_answers_as_it_did(
    peer: Peer,
) -> None:
    done = [1, "session:create", pack({})]
    first = peer.ask(COMMANDS, [done])

    assert peer.ask(COMMANDS, [[*done, 0]], again=True) == first
    _, [[_, _, error]] = peer.ask(COMMANDS, [[2, "session:create", pack({}), 0]], acked=1)
    assert error[0] == "expired"


def test_numbers_go_on_behind_acked_and_more_elements_than_known_are_ignored(peer: Peer) -> None:
    peer.send(HELLO, [])
    peer.receive()
    request = [8, "session:create", pack({}), None, "corr-1", None, "of a later version"]
    frame = [1, COMMANDS, peer.store, 0, peer.instance, 7, False, [request], "also"]
    peer.socket.send(pack(frame))

    kind, [[number, _, error]] = peer.receive()
    assert (kind, number, error) == (REPLIES, 8, None)


def test_a_command_too_many_in_flight_is_busy_and_nothing_behind_it_happens(peer: Peer) -> None:
    commands = [
        [number, "session:get", pack({})] for number in range(1, limits.WINDOW_COMMANDS_MAX + 2)
    ]
    peer.send(COMMANDS, commands)
    answers: list[Any] = []
    while len(answers) < len(commands):
        _, items = peer.receive()
        answers += items

    assert {answer[2][0] for answer in answers[:-1]} == {"invalid"}
    assert answers[-1][2][0] == "busy"
    kind, [[number, _, error]] = peer.ask(COMMANDS, commands[-1:], acked=1, again=True)
    assert (kind, number, error[0]) == (REPLIES, commands[-1][0], "invalid")


def test_what_is_no_frame_is_dropped_and_the_connection_goes_on(peer: Peer) -> None:
    frame = pack([1, COMMANDS, "", 0, peer.instance, 0, False, [[1, "session:create", pack({})]]])
    long_header = b"\xdc\x00\x08" + frame[1:]
    for garbage in (b"", b"\x99", b"\xc1" * 40, frame[:-1], long_header, pack({"a": 1})):
        peer.socket.send(garbage)
    peer.socket.send_multipart([b"two", frame])
    assert peer.silent()

    kind, [[number, _, error]] = peer.ask(COMMANDS, [[1, "session:create", pack({})]])
    assert (kind, number, error) == (REPLIES, 1, None)


def test_a_farewell_ends_an_instance_and_its_numbers_begin_again(peer: Peer) -> None:
    first = peer.reply(1, "session:create")
    assert peer.ask(GOODBYE, [], acked=1) == (FAREWELL, [])

    again = peer.reply(1, "session:create")
    assert again["session_id"] != first["session_id"]


def test_a_frame_for_another_store_is_not_taken_and_told_the_present_one(peer: Peer) -> None:
    peer.ask(HELLO, [])
    present, peer.store = peer.store, "0" * 32
    for kind, answer in ((COMMANDS, REPLIES), (QUERIES, ANSWERS)):
        peer.send(kind, [[1, "session:create", pack({})]])
        _, told, store, _, items = msgpack.unpackb(peer.socket.recv())
        assert (told, store, items) == (answer, present, [])

    peer.store, peer.instance = present, os.urandom(16)
    assert peer.reply(8, "session:create")["epoch"] == 1, "a new instance may count on"


def test_a_request_id_is_carried_out_once_whatever_the_instance(peer: Peer) -> None:
    first = peer.reply(1, "session:create", request_id="once")
    peer.instance = os.urandom(16)

    assert peer.reply(1, "session:create", request_id="once") == first


# Queries and subscriptions


def test_a_query_sees_the_commands_sent_before_it(peer: Peer) -> None:
    session = peer.reply(1, "session:create")["session_id"]
    note = {"session_id": session, "event": "note", "data": {"text": "ünï\U0001f40d", "big": 2**63}}
    peer.send(COMMANDS, [[2, "session:append", pack(note)]], acked=1)
    peer.send(QUERIES, [[7, "session:history", pack({"session_id": session})]], acked=1)

    assert peer.receive()[0] == REPLIES
    kind, [[number, body, error]] = peer.receive()
    assert (kind, number, error) == (ANSWERS, 7, None)
    (entry,) = msgpack.unpackb(body)["entries"]
    assert entry["data"] == note["data"]


def test_deliveries_stop_at_the_credit_and_the_gap_is_told(peer: Peer) -> None:
    session = peer.reply(1, "session:create")["session_id"]
    assert peer.ask(SUBSCRIBE, [[3, f"session.{session}.*", 2]], acked=1) == (
        ANSWERS, [[-3, b"", None]],
    )  # fmt: skip
    notes = [[number, "session:append", note_of(session)] for number in range(2, 6)]
    assert peer.ask(COMMANDS, notes, acked=1)[0] == REPLIES
    kind, [[number, seq, gap, [[topic, sender, bodies]]]] = peer.receive()
    assert (kind, number, seq, gap) == (DELIVERIES, 3, 1, 0)
    assert [msgpack.unpackb(body)["seq"] for body in bodies] == [1, 2]

    assert peer.ask(CREDIT, [[3, 10]], acked=5) == (DELIVERIES, [[3, 4, 2, []]])
    peer.send(COMMANDS, [[6, "session:append", note_of(session)]], acked=5)
    assert peer.receive()[0] == REPLIES
    _, [[_, seq, gap, [[*said, [_]]]]] = peer.receive()
    assert (seq, gap, said) == (5, 0, [topic, sender])
    assert (topic, sender) == (f"session.{session}.appended", peer.name)

    peer.send(UNSUBSCRIBE, [3], acked=6)
    peer.reply(7, "session:append", session_id=session, event="note")
    assert peer.silent()


def note_of(session: str) -> bytes:
    body: bytes = pack({"session_id": session, "event": "note"})
    return body


def test_a_pattern_that_is_none_is_refused_under_the_negative_number(peer: Peer) -> None:
    kind, [[number, _, error]] = peer.ask(SUBSCRIBE, [[4, "session..x", 1]])
    assert (kind, number, error[0]) == (ANSWERS, -4, "invalid")


def test_the_supervisor_speaks_the_same_protocol(var: Path) -> None:
    with Peer(var, "looker", owner="supervisor") as peer:
        kind, [[owner, pid, *_]] = peer.ask(HELLO, [])
        _, [[_, body, _]] = peer.ask(QUERIES, [[1, "system:status", pack({})]])
        _, [[_, _, refused]] = peer.ask(COMMANDS, [[1, "system:stop", pack({})]])

    assert (kind, owner) == (WELCOME, "supervisor")
    assert msgpack.unpackb(body)["pid"] == pid
    assert refused[0] == "forbidden"


# Keys


def test_a_key_that_is_not_enrolled_gets_no_frame_in(peer: Peer) -> None:
    peer.keys = zmq.curve_keypair()
    stranger = peer.connected()
    monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)

    assert monitor.poll(WAIT_MS)
    stranger.disable_monitor()
    monitor.close(0)
    stranger.close()


def test_a_revoked_key_is_refused_on_the_connection_that_is_up(var: Path, peer: Peer) -> None:
    peer.reply(1, "session:create")
    (var / "keys" / f"{z85.decode(peer.keys[0]).hex()}.key").unlink()

    _, [[number, _, error]] = peer.ask(COMMANDS, [[2, "session:create", pack({})]], acked=1)
    assert (number, error[0]) == (2, "forbidden")


# What the page says in tables


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the last table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[1:]]


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    table = rows("12. Limits")
    assert len(table) > 5
    assert {name: int(value) for name, value, _ in table} == {
        name: getattr(limits, name) for name, _, _ in table
    }


def test_the_codes_of_the_page_are_those_of_the_code() -> None:
    # Concluded by a client, never sent.
    local = {"unavailable", "not_running", "restored", "unanswered"}
    table = {code: conclusive == "yes" for code, conclusive, _ in rows("7. Refusals")}
    ours = {
        code: error.conclusive
        for code, error in errors.BY_CODE.items()
        if error.__module__ == errors.__name__ and code not in local
    }
    assert table == ours | {"evicted": False}
