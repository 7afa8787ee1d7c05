"""Whatever is sent to an owner, it is refused or dropped, and the owner goes on unharmed.

After each test the owners are the processes they were before, and what had been acknowledged before
it is still there.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from msgspec.msgpack import Ext
from system import System
from trouble import (
    ANSWERS,
    COMMANDS,
    CREATE,
    CREDIT,
    DELIVERIES,
    FAREWELL,
    GOODBYE,
    HELLO,
    QUERIES,
    REPLIES,
    RESEND_FROM,
    SUBSCRIBE,
    UNSUBSCRIBE,
    WELCOME,
    Stranger,
    entries,
    living,
    pack,
    paused,
    rows,
    rss_mb,
    unpack,
    until,
)

from ksi.actors.stat import read_stat
from ksi.storage.environment import open_reader
from ksi.transport import Client
from ksi.transport.errors import Invalid, KsiError, NotOwner, TooLarge
from ksi.transport.identity import KeyRing, endpoint, run_directory
from ksi.transport.limits import (
    BATCH_COMMANDS_MAX,
    BODY_BYTES_MAX,
    FRAME_BYTES_MAX,
    ITEMS_MAX,
    NESTING_MAX,
    WINDOW_COMMANDS_MAX,
)

OWNERS = ("sessions", "registry", "supervisor")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("bad-input") / "var")
    yield running
    running.end()


@pytest.fixture(autouse=True)
def session(system: System) -> Iterator[str]:
    """A session of `witness` with one entry, which is there before and after."""
    pids = {name: living(system, name) for name in ("sessions", "registry", "files")}
    with system.client("witness") as witness:
        session = str(witness.ask("session:create")["session_id"])
        witness.ask("session:append", session_id=session, event="seen")
    yield session
    with system.client("witness") as witness:
        witness.ask("session:append", session_id=session, event="still here")
    assert [entry["event"] for entry in entries(system, session)] == ["seen", "still here"]
    assert {name: living(system, name) for name in pids} == pids


@pytest.fixture
def peer(system: System) -> Iterator[Stranger]:
    with Stranger(system.var, "stranger") as stranger:
        yield stranger


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


# Bodies

BODIES: dict[str, tuple[Any, str]] = {  # the fields beside those that are right; the code
    "a field is missing": ({"event": ...}, "invalid"),
    "a field is of another type": ({"event": 5}, "invalid"),
    "a field is nothing": ({"event": None}, "invalid"),
    "a field is too long": ({"event": "e" * 129}, "invalid"),
    "a field nobody knows": ({"evnet": "n"}, "invalid"),
    "a sender": ({"sender": "witness"}, "invalid"),
    "a key that is no string": ({"data": {"a": {1: 2}}}, "invalid"),
    "a key that is bytes, and long": ({"data": {"a": {b"\0" * 900_000: 1}}}, "invalid"),
    "no number": ({"data": {"a": float("nan")}}, "invalid"),
    "no number, deep in a long place": ({"data": {"k" * 900_000: [float("inf")]}}, "invalid"),
    "minus infinity": ({"data": {"a": [-float("inf")]}}, "invalid"),
    "bytes": ({"data": {"a": b"bytes"}}, "invalid"),
    "a time": ({"data": {"a": Ext(-1, b"\0\0\0\1")}}, "invalid"),
    "an extension": ({"data": {"a": Ext(5, b"x")}}, "invalid"),
    "an extension for a field": ({"event": Ext(5, b"x")}, "invalid"),
    "nested too deep": ({"data": {"a": deep(NESTING_MAX)}}, "invalid"),
    "nested far too deep": ({"data": {"a": deep(900)}}, "invalid"),
    "a list too long": ({"data": {"a": [0] * (ITEMS_MAX + 1)}}, "too_large"),
    "a map too long": ({"data": {str(n): n for n in range(ITEMS_MAX + 1)}}, "too_large"),
    "an id that climbs": ({"session_id": "../../etc/passwd"}, "invalid"),
    "an id with a slash": ({"session_id": "a/b"}, "invalid"),
    "an id of dots": ({"session_id": ".."}, "invalid"),
    "an id with a NUL": ({"session_id": "a\0b"}, "invalid"),
    "an id of two lines": ({"session_id": "a\n"}, "invalid"),
    "an id of 4 KB": ({"session_id": "a" * 4096}, "invalid"),
    "an empty id": ({"session_id": ""}, "invalid"),
    "an epoch of none": ({"epoch": 0}, "invalid"),
    "an epoch that is no integer": ({"epoch": 1.5}, "invalid"),
    "an epoch to come": ({"epoch": 2**64 - 1}, "stale_epoch"),
    "somebody else's session": ({}, "not_owner"),
    "no session": ({"session_id": "sess_nowhere"}, "not_found"),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_wrong_is_refused_by_its_code(
    peer: Stranger, session: str, what: str
) -> None:
    wrong, code = BODIES[what]
    fields = {"session_id": session, "event": "n", **wrong}
    body = pack({name: value for name, value in fields.items() if value is not ...})

    refusal = peer.error(1, "session:append", body)

    assert refusal[0] == code
    assert len(pack(refusal)) < 2000, "a refusal is no place for what was sent"


RAW_BODIES = {
    "nothing": b"",
    "no MessagePack": b"\xc1",
    "half of a map": b"\x82\xa5event",
    "an array": pack(["n"]),
    "an integer": pack(1),
    "text that is no UTF-8": b"\x81\xa5event\xa3\xed\xa0\x80",
    "a key that is no UTF-8": b"\x81\xa2\xff\xfe\x01",
    "a map that says it is huge": b"\xdf\xff\xff\xff\xff",
    "text that says it is huge": b"\x81\xa5event\xdb\xff\xff\xff\xff",
    "a million empty lists": b"\x81\xa4data\x81\xa1a\xdd\x00\x0f\x40\x00" + b"\x90" * 0xF4000,
    "a million nested lists": b"\x81\xa4data\x81\xa1a" + b"\x91" * 1_000_000,
    "a million nested maps": b"\x81\xa4data" + b"\x81\xa1a" * 300_000,
    "two maps": pack({"event": "n"}) * 2,
}


@pytest.mark.parametrize("what", RAW_BODIES)
def test_bytes_that_are_no_body_are_refused(
    system: System, peer: Stranger, session: str, what: str
) -> None:
    pid = living(system)
    before_mb = rss_mb(pid)
    for owner, operation in (("sessions", "session:append"), ("registry", "agent:register")):
        with Stranger(system.var, "stranger", owner) as stranger:
            for number in range(1, 4):
                refusal = stranger.error(number, operation, RAW_BODIES[what])
                assert refusal[0] in ("invalid", "too_large")
    assert rss_mb(pid) - before_mb < 120  # What a bomb takes while it is looked at is given back.


def test_a_query_that_is_wrong_is_refused(peer: Stranger, session: str) -> None:
    wrong = [
        ("session:histroy", {"session_id": session}, "unknown_operation"),
        ("session:append", {"session_id": session, "event": "n"}, "invalid"),
        ("agent:list", {}, "unknown_operation"),
        ("session:history", {"session_id": session, "limit": 0}, "invalid"),
        ("session:history", {"session_id": session, "limit": 2**63}, "invalid"),
        ("session:history", {"session_id": session, "after": -1}, "invalid"),
        ("session:list", {"after": "../x"}, "invalid"),
        ("session:get", {"session_id": "nowhere"}, "not_found"),
    ]
    requests = [[n, operation, pack(fields)] for n, (operation, fields, _) in enumerate(wrong, 1)]
    kind, answers = peer.ask(QUERIES, requests)

    assert kind == ANSWERS
    assert [answer[2][0] for answer in answers] == [code for _, _, code in wrong]
    _, [[_, body, error]] = peer.ask(
        QUERIES, [[9, "session:history", pack({"session_id": session, "after": 2**64 - 1})]]
    )
    assert error is None
    assert unpack(body)["entries"] == []


def test_an_operation_nobody_knows_is_refused_with_the_nearest(peer: Stranger) -> None:
    known = {
        "session:apend": "did you mean session:append?",
        "agent:register": "ksi discover lists all operations",  # It is another owner's.
        "": "ksi discover lists all operations",
        "session:" + "x" * 500_000: "ksi discover lists all operations",
    }
    for number, (operation, hint) in enumerate(known.items(), 1):
        code, text, found, _ = peer.error(number, operation, pack({}))
        assert (code, len(text) < 300) == ("unknown_operation", True)
        assert hint == found or operation == "agent:register"


def test_a_command_is_no_query_and_a_query_no_command(peer: Stranger) -> None:
    wrong = {
        "session:append": "session:append is a command, not a query",
        "agent:list": "sessions has no operation agent:list",
    }
    asked = [[number, operation, pack({})] for number, operation in enumerate(wrong, 1)]
    kind, answers = peer.ask(QUERIES, asked)
    assert kind == ANSWERS
    assert [answer[2][1] for answer in answers] == [*wrong.values()]
    assert peer.error(1, "session:list", pack({}))[:3] == [
        "invalid", "session:list is a query, not a command", "send it in QUERIES"
    ]  # fmt: skip


def test_nobody_speaks_as_the_host(system: System, peer: Stranger) -> None:
    with system.client("careful") as careful:
        careful.ask("session:create", request_id="once")
        kept = rows(system, "sessions", "ksi.requests", ("careful",))
        number = 10**15  # As a time it is far behind all that is kept.
        for operation in ("ksi:purged", "ksi:goodbye", "ksi:evicted", "ksi:sent", "ksi:tick"):
            request = [number, operation, pack({})]
            _, [[_, _, error]] = peer.ask(COMMANDS, [request], acked=number - 1)
            assert error[0] == "unknown_operation"
            number += 1

        assert rows(system, "sessions", "ksi.requests", ("careful",)) == kept
        assert careful.ask("session:create", request_id="once")


def test_a_client_refuses_at_once_what_has_no_form_on_the_wire(system: System) -> None:
    circular: list[Any] = []
    circular.append(circular)
    with system.client("stranger") as client:
        session = client.ask("session:create")["session_id"]
        for wrong in ("\ud800", 2**64, -(2**63) - 1, circular, {1: 2}, float("nan"), b"", object()):
            with pytest.raises(Invalid):
                client.ask("session:append", session_id=session, event="n", data={"a": wrong})
        with pytest.raises(TooLarge) as large:
            client.ask("session:append", session_id=session, event="n", data={"a": "x" * (1 << 20)})
        with pytest.raises(TooLarge, match="as a line"):
            client.ask(
                "session:append", session_id=session, event="n", data={"a": "\1" * (1 << 19)}
            )
        for no_id in ([session], {"a": 1}, 5, None):
            with pytest.raises(Invalid):
                client.ask("session:append", session_id=no_id, event="n")

        assert large.value.details["limit_bytes"] == BODY_BYTES_MAX
        largest = {"a": 2**64 - 1, "b": -(2**63), "c": "x" * 1_000_000, "d": deep(NESTING_MAX - 1)}
        client.ask("session:append", session_id=session, event="n", data=largest)
    assert entries(system, session)[0]["data"] == largest


def test_the_sender_is_the_key_and_what_the_body_claims_is_data(system: System) -> None:
    claims = {"sender": "witness", "agent_id": "witness", "metadata": {"agent_id": "witness"}}
    with system.client("stranger") as client, system.client("witness") as witness:
        mine = client.ask("session:create")["session_id"]
        client.ask("session:append", session_id=mine, event="n", data=claims)
        theirs = witness.ask("session:create", admission="open")["session_id"]
        with pytest.raises(NotOwner):
            client.ask("session:append", session_id=theirs, event="n", data=claims)
        client.ask("session:contribute", session_id=theirs, event="n", data=claims)

    for session in (mine, theirs):
        (entry,) = entries(system, session)
        assert entry["metadata"]["agent_id"] == "stranger"
        assert entry["data"] == claims


# Frames

HEADERS: dict[str, dict[str, Any]] = {
    "version 0": {"version": 0},
    "version 2": {"version": 2},
    "a version that is text": {"version": "1"},
    "an unknown kind": {"kind": 8},
    "no kind": {"kind": 0},
    "a kind of owners": {"kind": WELCOME},
    "a kind far away": {"kind": 200},
    "a huge kind": {"kind": 2**64 - 1},
    "a negative kind": {"kind": -1},
    "a store that is no text": {"store": 5},
    "a huge cut": {"cut": 2**64 - 1},
    "a negative cut": {"cut": -1},
    "no instance": {"instance": b""},
    "a short instance": {"instance": b"i" * 15},
    "a long instance": {"instance": b"i" * 400},
    "an instance that is text": {"instance": "i" * 16},
    "a negative acked": {"acked": -1},
    "a huge acked": {"acked": 2**64 - 1},
    "acked that is no number": {"acked": 1.5},
    "again that is no truth": {"again": 1},
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("what", HEADERS)
def test_a_frame_with_a_wrong_head_is_dropped_and_the_connection_goes_on(
    system: System, owner: str, what: str
) -> None:
    with Stranger(system.var, "stranger", owner) as peer:
        assert peer.is_served()
        for kind in (COMMANDS, QUERIES, SUBSCRIBE, GOODBYE):
            items = {COMMANDS: [CREATE], QUERIES: [CREATE], SUBSCRIBE: [[1, "a.b", 1]]}
            peer.send(**{"kind": kind, "items": items.get(kind, []), **HEADERS[what]})
        assert peer.is_served(), "nothing came before the answer to HELLO"


ITEMS: dict[str, tuple[int, list[Any]]] = {
    "number 0": (COMMANDS, [[0, *CREATE[1:]]]),
    "a negative number": (COMMANDS, [[-1, *CREATE[1:]]]),
    "a huge number": (COMMANDS, [[2**64 - 1, *CREATE[1:]]]),
    "a number that is none": (COMMANDS, [["1", *CREATE[1:]]]),
    "a huge number of a query": (QUERIES, [[2**64 - 1, "session:list", pack({})]]),
    "a request of two": (COMMANDS, [CREATE[:2]]),
    "a request that is a map": (COMMANDS, [{"number": 1}]),
    "a body that is text": (COMMANDS, [[1, "session:create", "body"]]),
    "a body that is a map": (COMMANDS, [[1, "session:create", {}]]),
    "time that is no number": (COMMANDS, [[*CREATE, "soon"]]),
    "subscription 0": (SUBSCRIBE, [[0, "session.>", 1]]),
    "a huge subscription": (SUBSCRIBE, [[2**64 - 1, "session.>", 1]]),
    "negative credit": (SUBSCRIBE, [[1, "session.>", -1]]),
    "a pattern that is none": (SUBSCRIBE, [[1, 5, 1]]),
    "an end that is none": (UNSUBSCRIBE, ["1"]),
    "credit for nothing": (CREDIT, [[77, 2**64 - 1]]),
    "credit that is none": (CREDIT, [5]),
    "items where there are none": (HELLO + 70, [1, 2, 3]),
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("what", ITEMS)
def test_a_frame_with_wrong_items_is_dropped_and_the_connection_goes_on(
    system: System, owner: str, what: str
) -> None:
    kind, items = ITEMS[what]
    with Stranger(system.var, "stranger", owner) as peer:
        peer.send(kind, items)
        assert peer.is_served(), "nothing came before the answer to HELLO"


def test_time_left_may_be_any_number(peer: Stranger) -> None:
    for number, left_ms in enumerate((2**64 - 1, 10**12), 1):
        _, [[_, _, error]] = peer.ask(COMMANDS, [[number, *CREATE[1:], left_ms]], acked=number - 1)
        assert error is None
    for number, left_ms in enumerate((0, -1, -(2**63)), 3):
        _, [[_, _, error]] = peer.ask(COMMANDS, [[number, *CREATE[1:], left_ms]], acked=number - 1)
        assert error[0] == "expired"


def test_what_is_acknowledged_beyond_what_was_sent_is_not_carried_out(
    system: System, peer: Stranger
) -> None:
    top = 2**63 - 1
    assert peer.ask(COMMANDS, [CREATE])[0] == REPLIES
    for acked in (5, top - 3):
        request = [acked + 1, "session:create", pack({})]
        kind, [[number, _, error]] = peer.ask(COMMANDS, [request], acked=acked)
        assert (kind, number, error) == (REPLIES, acked + 1, None)
        assert peer.ask(COMMANDS, [[acked + 3, *CREATE[1:]]], acked=acked) == (
            RESEND_FROM, [acked + 2],
        )  # fmt: skip
    # The last numbers there are; what is committed with them must not find them too large.
    for acked in (top - 1, top):
        peer.send(COMMANDS, [[top, "session:create", pack({})]], acked=acked)
        peer.send(COMMANDS, [CREATE], instance=b"another instance")
    with system.client("stranger") as client:
        assert client.ask("session:create")


def test_frames_of_noise_are_dropped(system: System) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    for owner in OWNERS:
        with Stranger(system.var, "stranger", owner) as peer:
            whole = [
                peer.frame(COMMANDS, [[1, "session:create", pack({"title": "noise"})]]),
                peer.frame(QUERIES, [[1, "session:list", pack({"limit": 1})]]),
                peer.frame(SUBSCRIBE, [[1, "session.>", 1]]),
                peer.frame(CREDIT, [[1, 5]]),
                peer.frame(GOODBYE, []),
            ]
            for frame in whole * 60:
                noisy = bytearray(frame)
                for _ in range(chance.randrange(1, 4)):
                    noisy[chance.randrange(len(noisy))] = chance.randrange(256)
                peer.socket.send(bytes(noisy[: chance.randrange(1, len(noisy) + 1)]))
                peer.socket.send(chance.randbytes(chance.randrange(64)))
            peer.socket.send_multipart([b"of", b"several", whole[0]])
            peer.send(HELLO, [])
            until(lambda: peer.receive()[0] == WELCOME)


def test_a_frame_too_large_ends_its_connection_and_no_other(system: System, peer: Stranger) -> None:
    peer.socket.send(b"x" * (FRAME_BYTES_MAX + 1))
    with Stranger(system.var, "stranger") as other:
        assert other.is_served()
    # It connects again; what it says before it knows that it must is lost.

    def hears() -> bool:
        peer.send(HELLO, [])
        return bool(peer.socket.poll(100))

    until(hears)
    while not peer.silent():
        assert peer.receive()[0] == WELCOME
    for bomb in (b"\x90" * 900_000, b"\x91" * 900_000):
        head = peer.frame(HELLO, [])[:-1]
        peer.socket.send(head + b"\xdd" + len(bomb).to_bytes(4, "big") + bomb)
    assert peer.receive()[0] == WELCOME  # A HELLO whose items are a million empty lists.
    assert peer.is_served()


@pytest.mark.parametrize("owner", OWNERS)
def test_raw_bytes_on_the_socket_keep_nobody_else_from_being_served(
    system: System, owner: str
) -> None:
    path = endpoint(system.var, owner).removeprefix("ipc://")
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" * 32
    null = greeting.replace(b"CURVE", b"NULL\0")
    noise = (b"", b"\xff", b"GET / HTTP/1.1\r\n\r\n", greeting, greeting + b"\x04\xff" * 20, null)
    with ExitStack() as held:
        for bytes_ in (*noise, random.Random(1).randbytes(4096)):
            raw = held.enter_context(socket.socket(socket.AF_UNIX))
            raw.connect(path)
            raw.send(bytes_)
        with Stranger(system.var, "stranger", owner) as peer:
            assert peer.is_served()


# Keys


def test_who_has_no_key_that_is_enrolled_gets_nothing_in(system: System, peer: Stranger) -> None:
    for public, secret in (zmq.curve_keypair(), (None, None)):
        intruder = peer.connected(public, secret)
        monitor = intruder.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        intruder.sndtimeo = 200
        with pytest.raises(zmq.Again):
            intruder.send(peer.frame(COMMANDS, [CREATE]))
        assert not monitor.poll(50)
        intruder.disable_monitor()
        monitor.close(0)
        intruder.close(0)
    assert peer.is_served()


def test_a_key_that_is_revoked_can_do_and_hear_nothing_more(system: System) -> None:
    with Stranger(system.var, "leaver") as peer, system.client("witness") as witness:
        assert peer.ask(SUBSCRIBE, [[1, "session.>", 100]])[0] == ANSWERS
        witness.ask("session:create")
        assert peer.receive()[0] == DELIVERIES
        KeyRing(system.var).remove("leaver")
        witness.ask("session:create")
        witness.ask("session:create")
        assert peer.silent()

        for kind in (COMMANDS, QUERIES):
            _, [[_, _, error]] = peer.ask(kind, [CREATE])
            assert error[0] == "forbidden"
        peer.send(SUBSCRIBE, [[2, "session.>", 100]])
        peer.send(HELLO, [])
        assert peer.silent()


# Clients that misbehave

STOPS_READING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from trouble import HELLO, QUERIES, SUBSCRIBE, Stranger, pack
peer = Stranger(Path(sys.argv[1]), sys.argv[2])
peer.is_served()
page = pack({"session_id": sys.argv[3], "limit": 1})
peer.send(SUBSCRIBE, [[1, "session.>", 4096]])
for _ in range(4):
    peer.send(QUERIES, [[number, "session:history", page] for number in range(1, 257)])
print("sent", flush=True)
time.sleep(60)  # until it is ended
"""


def test_clients_that_stop_reading_cost_their_queues_and_nobody_waits_for_them(
    system: System,
) -> None:
    count = 3
    with system.client("witness") as witness, ExitStack() as stopped:
        session = witness.ask("session:create")["session_id"]
        witness.ask("session:append", session_id=session, event="n", data={"text": "x" * 900_000})
        before_mb = rss_mb(living(system))
        for number in range(count):
            client = spawn(STOPS_READING, system, f"deaf-{number}", session)
            stopped.callback(end, client)
            assert client.stdout is not None
            client.stdout.readline()
            os.kill(client.pid, signal.SIGSTOP)

        grown_mb, slowest_s = 0.0, 0.0
        for _ in range(60):
            began_s = time.monotonic()
            witness.ask("session:append", session_id=session, event="n", data={"text": "x"})
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            grown_mb = max(grown_mb, rss_mb(living(system)) - before_mb)
            time.sleep(0.05)  # What it costs is seen over three seconds.

    assert slowest_s < 1.0
    assert grown_mb < count * 32  # Sixteen frames of a megabyte each, and what is being made.


def spawn(code: str, system: System, *arguments: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-P", "-c", code, str(system.var), *arguments, tests]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


DIES = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from trouble import COMMANDS, SUBSCRIBE, Stranger, pack
peer = Stranger(Path(sys.argv[1]), sys.argv[2])
peer.is_served()
for n in range(256):
    peer.send(SUBSCRIBE, [[n + 1, f"session.nowhere-{n}.>", 1]])
body = pack({"session_id": sys.argv[3], "event": "n", "data": {"text": "x" * 9000}})
peer.send(COMMANDS, [[number, "session:contribute", body] for number in range(1, 100)])
peer.socket.poll(int(sys.argv[2][-1]) * 5)
os.kill(os.getpid(), 9)
"""


def test_clients_that_die_in_the_middle_leave_whole_commands_or_none(system: System) -> None:
    with system.client("witness") as witness:
        session = witness.ask("session:create", admission="open")["session_id"]
    dying = [spawn(DIES, system, f"dying-{number}", session) for number in range(4)]
    for process in dying:
        assert process.wait(30) == -signal.SIGKILL
        end(process)

    with system.client("witness") as witness:
        witness.ask("session:append", session_id=session, event="last")
    found = entries(system, session)
    assert [entry["metadata"]["seq"] for entry in found] == list(range(1, len(found) + 1))
    for number in range(4):
        said = [e for e in found if e["metadata"]["agent_id"] == f"dying-{number}"]
        assert all(entry["data"]["text"] == "x" * 9000 for entry in said)
        assert len(said) in range(100)


READS = """
import os, sys
from pathlib import Path
from ksi.actors.reading import reader_of
reader = reader_of("sessions", Path(sys.argv[1])).reader
reader.read(lambda tables, meta: print("reading", flush=True) or os.kill(os.getpid(), 9))
"""


def test_readers_that_were_killed_hold_nothing_back(system: System) -> None:
    """A reader has a slot, of which there are 4,096, and keeps what it reads from being reused."""
    killed = [spawn(READS, system) for _ in range(4)]
    for process in killed:
        assert process.wait(30) == -signal.SIGKILL
        end(process)
    slots = open_reader(next((system.var / "db" / "sessions").glob("*/view"))).lmdb

    dead = [f" {process.pid} " for process in killed]
    until(lambda: not any(pid in slots.readers() for pid in dead))


def test_a_client_that_never_acknowledges_is_busy_beyond_its_window(system: System) -> None:
    for owner in OWNERS:
        with Stranger(system.var, "hoarder", owner) as peer:
            commands = [[number, "no:such", b""] for number in range(1, WINDOW_COMMANDS_MAX + 9)]
            peer.send(COMMANDS, commands)
            codes: list[str] = []
            while "busy" not in codes:
                kind, answers = peer.receive()
                assert kind == REPLIES
                codes += [answer[2][0] for answer in answers]
            assert codes.index("busy") == WINDOW_COMMANDS_MAX


def test_one_who_asks_for_too_much_is_answered_in_parts_and_others_meanwhile(
    system: System, peer: Stranger
) -> None:
    """Each of these pages takes the owner tens of milliseconds; together they hung it."""
    with system.client("witness") as witness:
        session = witness.ask("session:create")["session_id"]
        large = {"text": "x" * 900_000}
        for _ in range(40):
            witness.tell("session:append", session_id=session, event="n", data=large)
        witness.tell("session:append", session_id=session, event="last")
        witness.flush(30.0)
        page = pack({"session_id": session, "after": 40})
        peer.send(QUERIES, [[number, "session:history", page] for number in range(1, 65)])
        slowest_s = 0.0
        for _ in range(10):
            began_s = time.monotonic()
            witness.ask("session:create")
            slowest_s = max(slowest_s, time.monotonic() - began_s)

    assert slowest_s < 1.0
    assert peer.receive()[0] == ANSWERS


def test_subscribers_that_left_without_a_word_are_forgotten(system: System) -> None:
    """Else their patterns would be compared with each announcement for ever."""
    stat = run_directory(system.var) / "sessions.stat"
    before = until(lambda: (now := read_stat(stat)) and now.mailbox == 0 and now)
    with Stranger(system.var, "leaver-2") as peer:
        for _ in range(20):
            gone = peer.connected(peer.certificate.public, peer.certificate.secret)
            patterns = [[number, f"session.gone-{number}.>", 1] for number in range(1, 51)]
            gone.send(peer.frame(SUBSCRIBE, patterns))
            assert len(unpack(gone.recv())[4]) == 50
            gone.close(0)
        assert peer.is_served()

    # What is sent to them to find that out counts as dropped.
    until(lambda: (now := read_stat(stat)) and now.replies_dropped >= before.replies_dropped + 20)


# Several at once, and the order of numbers


def test_frames_of_one_instance_over_two_connections_are_carried_out_once(
    system: System, peer: Stranger
) -> None:
    session = unpack(peer.ask(COMMANDS, [CREATE])[1][0][1])["session_id"]
    body = pack({"session_id": session, "event": "n"})
    notes = [[number, "session:append", body] for number in range(2, 12)]
    second = peer.connected(peer.certificate.public, peer.certificate.secret)
    second.send(peer.frame(HELLO, []))
    second.recv()
    with paused(system):
        peer.send(COMMANDS, notes[:6], acked=1)
        second.send(peer.frame(COMMANDS, notes, acked=1, again=True))
        peer.send(COMMANDS, notes[2:4], acked=1, again=True)

    until(lambda: len(entries(system, session)) >= 10)
    assert unpack(second.recv())[1] == REPLIES
    second.close(0)
    assert peer.receive()[0] in (REPLIES, RESEND_FROM)
    assert len(entries(system, session)) == 10


def test_a_goodbye_right_behind_commands_comes_after_them(system: System, peer: Stranger) -> None:
    session = unpack(peer.ask(COMMANDS, [CREATE])[1][0][1])["session_id"]
    body = pack({"session_id": session, "event": "n"})
    with paused(system):
        peer.send(COMMANDS, [[n, "session:append", body] for n in range(2, 12)], acked=1)
        peer.send(GOODBYE, [], acked=1)

    assert {peer.receive()[0], peer.receive()[0]} == {REPLIES, FAREWELL}
    until(lambda: not rows(system, "sessions", "ksi.clients", ("stranger", peer.instance.hex())))
    assert len(entries(system, session)) == 10


def test_what_is_repeated_before_a_goodbye_is_not_carried_out_after_it(
    system: System, peer: Stranger
) -> None:
    """An owner that was slow finds repeats of several batches, and a goodbye behind them."""
    session = unpack(peer.ask(COMMANDS, [CREATE])[1][0][1])["session_id"]
    body = pack({"session_id": session, "event": "n"})
    notes = [[n, "session:append", body] for n in range(2, 2 + BATCH_COMMANDS_MAX)]
    peer.ask(COMMANDS, notes, acked=1)
    with paused(system):
        for _ in range(20):
            peer.send(COMMANDS, notes, acked=1, again=True)
        peer.send(GOODBYE, [], acked=1)

    until(lambda: peer.receive()[0] == FAREWELL)
    with system.client("witness") as witness:
        witness.ask("session:create")  # Behind all of it.
    assert len(entries(system, session)) == len(notes)
    until(lambda: not rows(system, "sessions", "ksi.clients", ("stranger", peer.instance.hex())))


def test_a_request_id_with_another_body_gets_the_first_reply(system: System) -> None:
    with system.client("stranger") as one, system.client("stranger") as two:
        first = one.ask("session:create", title="one", request_id="same")
        second = two.ask("session:create", title="two", request_id="same")
        with system.client("witness") as other:
            third = other.ask("session:create", title="three", request_id="same")

    assert first == second
    assert third["session_id"] != first["session_id"]


def test_a_refusal_among_others_undoes_nothing_of_them(system: System) -> None:
    with system.client("stranger") as client:
        session = client.ask("session:create")["session_id"]
        with paused(system):
            for n in range(100):
                where = session if n % 7 else "nowhere"
                client.tell("session:append", session_id=where, event="n", data={"n": n})
        with pytest.raises(ExceptionGroup) as refused:
            client.flush()

    assert len(refused.value.exceptions) == 15
    assert [e["data"]["n"] for e in entries(system, session)] == [n for n in range(100) if n % 7]


def test_no_client_of_ours_can_be_told_to_crash_by_a_refusal(system: System) -> None:
    """Every code of the wire is an error a caller can catch."""
    with Client("stranger", var=system.var) as client:
        for operation in ("no:such", "session:heartbeat", "agent:report"):
            with pytest.raises(KsiError):
                client.ask(operation, agent_id="x")
