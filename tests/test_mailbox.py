"""The mailbox: a pykka inbox over an authenticated ROUTER socket, and the client's end of it."""

from __future__ import annotations

import configparser
import contextlib
import ctypes
import errno
import logging
import os
import queue
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pykka
import pytest
import zmq
from pykka._envelope import Envelope
from pykka.messages import _ActorStop

from ksi.transport.identity import (
    Certificate,
    Identity,
    KeyRing,
    bell_endpoint,
    endpoint,
    make_run_directory,
)
from ksi.transport.limits import (
    BATCH_BYTES_MAX,
    BELL_S,
    FRAME_BYTES_MAX,
    LETTERS_MAX,
    REPLY_FRAMES_MAX,
    REQUEST_FRAMES_MAX,
)
from ksi.transport.mailbox import (
    Change,
    Letter,
    Mailbox,
    Post,
    connect,
    listen,
    read_monitor,
)

Socket = zmq.Socket[bytes]
PATIENCE_S: Final = 10.0  # A test that waits longer has failed.
PATIENCE_MS: Final = 10_000


class Peer:
    """A client's sockets."""

    def __init__(self, context: zmq.Context[Socket], address: str, server: bytes, key: Certificate):
        self.certificate = key
        self.dealer, self.monitor = connect(context, address, server, key)
        self.changes: list[Change] = []

    def has_been(self, change: Change) -> Callable[[], bool]:
        def look() -> bool:
            self.changes += read_monitor(self.monitor)
            return change in self.changes

        return look

    def close(self) -> None:
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(0)


class Place:
    """One owner's mailbox and everything around it, driven by the test itself."""

    def __init__(self, var: Path) -> None:
        self.var = var
        self.keys = KeyRing(var)
        self.owner = self.keys.enroll("sessions", "owner")
        make_run_directory(var)
        self.address = endpoint(var, "sessions")
        self.server_context = zmq.Context()
        self.context = zmq.Context()
        self.mailbox = self.open(self.server_context)
        self.peers: list[Peer] = []

    def open(self, context: zmq.Context[Socket]) -> Mailbox:
        return Mailbox(
            context, self.address, self.owner, KeyRing(self.var), tcp="tcp://127.0.0.1:0"
        )

    def over(self, transport: str) -> str:
        return self.address if transport == "ipc" else str(self.mailbox.tcp_endpoint)

    def peer(self, key: Certificate, address: str | None = None) -> Peer:
        peer = Peer(self.context, address or self.address, self.owner.public, key)
        self.peers.append(peer)
        return peer

    def known(self, name: str, transport: str = "ipc") -> Peer:
        """Return an enrolled client whose connection is up."""
        peer = self.peer(self.keys.enroll(name), self.over(transport))
        assert self.letters_until(peer.has_been("up")) == []
        return peer

    def letters_until(self, done: Callable[[], bool]) -> list[Letter]:
        """Run the mailbox until `done`; return the letters that came."""
        letters: list[Letter] = []
        give_up_s = time.monotonic() + PATIENCE_S
        self.mailbox.timeout_s = 0.005
        while not done():
            assert time.monotonic() < give_up_s, f"never happened; letters: {letters}"
            letters += self.mailbox.get().message.letters
        return letters

    def next_letters(self, count: int) -> list[Letter]:
        letters: list[Letter] = []
        give_up_s = time.monotonic() + PATIENCE_S
        self.mailbox.timeout_s = 0.1
        while len(letters) < count:
            assert time.monotonic() < give_up_s, f"only {len(letters)} letters came"
            letters += self.mailbox.get().message.letters
        return letters

    def serves(self, name: str = "witness", transport: str = "ipc") -> bool:
        """Whether a client that comes now is answered, and nobody else is heard."""
        peer = self.known(name, transport)
        peer.dealer.send(b"hello")
        (letter,) = self.next_letters(1)
        assert self.mailbox.sender_of(letter.sender) == (name, "agent")
        assert self.mailbox.send(letter.route, b"welcome")
        return peer.dealer.poll(PATIENCE_MS) != 0 and peer.dealer.recv() == b"welcome"

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.mailbox.close()
        self.context.destroy(linger=0)
        assert ends(self.server_context)


def ends(context: zmq.Context[Socket]) -> bool:
    """Whether all sockets of the context have been closed, so that it can end."""
    ending = threading.Thread(target=context.term, daemon=True)
    ending.start()
    ending.join(PATIENCE_S)
    return not ending.is_alive()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


def bare(place: Place, key: Certificate, transport: str = "ipc", **options: Any) -> Socket:
    """Return a client's socket with options that `connect` would not give it."""
    dealer = place.context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.curve_serverkey = place.owner.public
    dealer.curve_publickey, dealer.curve_secretkey = key.public, key.secret or b""
    for name, value in options.items():
        setattr(dealer, name, value)
    dealer.connect(place.over(transport))
    return dealer


def stranger() -> Certificate:
    return Certificate("stranger", "agent", *zmq.curve_keypair())


STOPPING_CLIENT = """
import sys, zmq
from pathlib import Path
from ksi.transport.identity import KeyRing
from ksi.transport.mailbox import connect
context = zmq.Context()
owner, alice = (KeyRing(Path(sys.argv[1])).load(name) for name in ("sessions", "alice"))
dealer, monitor = connect(context, sys.argv[2], owner.public, alice)
monitor.poll()
dealer.send(b"hello")
sys.stdin.read()
"""


@contextlib.contextmanager
def stopped_client(place: Place, transport: str = "ipc") -> Iterator[Letter]:
    """A client process that has sent a letter and then stopped for good."""
    place.keys.enroll("alice")
    command = [sys.executable, "-c", STOPPING_CLIENT, str(place.var), place.over(transport)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as client:
        try:
            (letter,) = place.next_letters(1)
            os.kill(client.pid, signal.SIGSTOP)
            os.waitpid(client.pid, os.WUNTRACED)
            yield letter
        finally:
            client.kill()


def in_a_moment(call: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(0.05, call)
    timer.start()
    return timer


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# Who gets in


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_an_enrolled_client_is_known_by_its_key(place: Place, transport: str) -> None:
    alice = place.known("alice", transport)
    before_s = time.monotonic()
    alice.dealer.send(b"question")

    (letter,) = place.next_letters(1)
    assert letter.payload == b"question"
    assert letter.sender == alice.certificate.user_id
    assert place.mailbox.sender_of(letter.sender) == ("alice", "agent")
    assert before_s <= letter.arrived_s <= time.monotonic()
    assert place.mailbox.send(letter.route, b"answer")
    assert alice.dealer.poll(PATIENCE_MS)
    assert alice.dealer.recv() == b"answer"


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_key_that_is_not_enrolled_is_denied(place: Place, transport: str) -> None:
    eve = place.peer(stranger(), place.over(transport))

    assert place.letters_until(eve.has_been("denied")) == []
    with pytest.raises(zmq.Again):
        eve.dealer.send(b"let me in", zmq.DONTWAIT)
    assert place.serves(transport=transport)
    assert "up" not in eve.changes


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_client_without_a_key_gets_nothing_in(place: Place, transport: str) -> None:
    with place.context.socket(zmq.DEALER) as nobody:
        nobody.linger = 0
        monitor = nobody.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        nobody.connect(place.over(transport))
        nobody.send(b"let me in")

        assert place.letters_until(lambda: monitor.poll(0) != 0) == []
        assert place.serves(transport=transport)
        nobody.disable_monitor()
        monitor.close()


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_key_that_is_revoked_while_connected_is_nobody_from_then_on(
    place: Place, transport: str
) -> None:
    alice = place.known("alice", transport)
    alice.dealer.send(b"one")
    (letter,) = place.next_letters(1)
    assert place.mailbox.sender_of(letter.sender) == ("alice", "agent")

    place.keys.remove("alice")
    alice.dealer.send(b"two")

    (letter,) = place.next_letters(1)
    assert letter.sender == alice.certificate.user_id
    assert place.mailbox.sender_of(letter.sender) is None
    again = place.peer(alice.certificate, place.over(transport))
    assert place.letters_until(again.has_been("denied")) == []


def test_a_client_that_takes_another_for_the_owner_gets_no_connection(place: Place) -> None:
    alice = place.keys.enroll("alice")
    peer = Peer(place.context, place.address, stranger().public, alice)
    place.peers.append(peer)

    assert place.letters_until(peer.has_been("down")) == []
    assert "up" not in peer.changes


def test_who_was_denied_gets_in_with_a_new_connection_once_enrolled(place: Place) -> None:
    alice = place.keys.enroll("alice")
    file = place.keys.directory / f"{alice.user_id}.key"
    enrolment = file.read_bytes()
    place.keys.remove("alice")
    early = place.peer(alice)
    place.letters_until(early.has_been("denied"))
    file.write_bytes(enrolment)
    file.chmod(0o600)

    late = place.peer(alice)
    assert place.letters_until(late.has_been("up")) == []
    assert place.serves()
    early.has_been("up")()
    assert "up" not in early.changes


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_claimed_routing_id_is_no_identity(place: Place, transport: str) -> None:
    alice = place.known("alice", transport)
    alice.dealer.send(b"from alice")
    (true,) = place.next_letters(1)
    for claim in (b"alice", alice.certificate.user_id.encode(), bytes.fromhex(true.sender)):
        eve = place.known(f"eve-{len(place.peers)}", transport)
        with bare(place, eve.certificate, transport, routing_id=claim) as dealer:
            dealer.send(b"from alice")
            (forged,) = place.next_letters(1)
        assert forged.route == claim
        assert forged.sender == eve.certificate.user_id


def test_routes_cannot_be_foreseen(place: Place) -> None:
    """A peer that claims the route of who comes next ends the process: ZeroMQ asserts it is free.

    Routes are counted up from a random number; here it is drawn from the same seed twice.
    """

    def first_route() -> bytes:
        place.mailbox.close()
        context: zmq.Context[Socket] = zmq.Context()
        context.socket(zmq.PAIR).close()  # The context seeds with the time when it is first used.
        ctypes.CDLL(None).srand(5)
        place.mailbox = place.open(context)
        peer = place.known("early")
        peer.dealer.send(b"hello")
        (letter,) = place.next_letters(1)
        place.peers.pop().close()
        place.mailbox.close()
        context.term()
        return letter.route

    assert first_route() != first_route()


def test_a_claimed_route_shuts_out_its_claimant_alone(place: Place) -> None:
    alice, eve = place.known("alice"), place.known("eve")
    alice.dealer.send(b"one")
    (letter,) = place.next_letters(1)
    with bare(place, eve.certificate, routing_id=letter.route) as squatter:
        squatter.send(b"mine")
        assert place.serves()
        alice.dealer.send(b"two")
        (second,) = place.next_letters(1)
        assert (second.route, second.payload) == (letter.route, b"two")
        assert place.mailbox.send(letter.route, b"answer")
        assert alice.dealer.poll(PATIENCE_MS)
        assert alice.dealer.recv() == b"answer"
        assert not squatter.poll(0)


def test_whoever_claims_the_route_of_another_does_not_get_its_answers(place: Place) -> None:
    eve_key, sockets = place.keys.enroll("eve"), []
    for key in (place.keys.enroll("alice"), eve_key):
        dealer = bare(place, key, routing_id=b"same")
        dealer.send(key.name.encode())
        sockets.append(dealer)
        if key is not eve_key:
            (letter,) = place.next_letters(1)
    assert place.serves()  # by now eve's connection has been dealt with, too

    assert place.mailbox.send(letter.route, b"secret")
    alice, eve = sockets
    assert alice.poll(PATIENCE_MS)
    assert alice.recv() == b"secret"
    assert not eve.poll(0)
    alice.close()
    eve.close()


def test_nobody_gets_in_while_there_is_no_one_to_ask(place: Place) -> None:
    place.mailbox._poller.unregister(place.mailbox._zap)
    place.mailbox._zap.close(0)
    alice = place.peer(place.keys.enroll("alice"))

    assert place.letters_until(alice.has_been("down")) == []
    assert "up" not in alice.changes


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ([b"1.0", b"7", b"ksi", b"", b"", b"CURVE", b"k" * 32], b"400"),
        ([b"1.0", b"7", b"other", b"", b"", b"CURVE", b"k" * 32], b"500"),
        ([b"1.0", b"7", b"ksi", b"", b"", b"NULL"], b"500"),
        ([b"1.0", b"7", b"ksi", b"", b"", b"PLAIN", b"user", b"password"], b"500"),
        ([b"1.0", b"7", b"ksi", b"", b"", b"CURVE", b"short"], b"500"),
        ([b"1.0", b"7", b"ksi", b"", b"", b"CURVE", b"k" * 32, b"more"], b"500"),
        ([b"2.0", b"7", b"ksi", b"", b"", b"CURVE", b"k" * 32], b"500"),
        ([b"1.0", b"7"], b"500"),
    ],
)
def test_a_malformed_question_who_may_come_in_is_answered(
    place: Place, request_: list[bytes], status: bytes
) -> None:
    with place.server_context.socket(zmq.REQ) as asking:
        asking.linger = 0
        asking.connect("inproc://zeromq.zap.01")
        asking.send_multipart(request_)
        place.letters_until(lambda: asking.poll(0) != 0)
        answer = asking.recv_multipart()

    assert (answer[0], answer[1], answer[2]) == (b"1.0", b"7", status)
    assert answer[4] == b""
    assert place.serves()


def test_a_question_that_does_not_even_say_its_number_is_dropped(place: Place) -> None:
    with place.server_context.socket(zmq.DEALER) as asking:
        asking.linger = 0
        asking.connect("inproc://zeromq.zap.01")
        for parts in ([b""], [b"", b"1.0"], [b"x"], [b"x"] * 20):
            asking.send_multipart(parts)
        assert place.serves()
        assert not asking.poll(0)


def test_whoever_does_not_prove_a_key_in_time_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.transport.mailbox.HANDSHAKE_MS", 50)
    place = Place(tmp_path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(PATIENCE_S)
        silent.connect(place.address.removeprefix("ipc://"))
        while silent.recv(1000):
            pass  # the greeting of ZeroMQ

    place.close()


class Unreadable(KeyRing):
    """Keys that cannot be read, once: no descriptor is free, say."""

    failed = False

    def of_public(self, key: str | bytes) -> Identity | None:
        if not self.failed:
            self.failed = True
            raise OSError(errno.EMFILE, "too many open files")
        return super().of_public(key)


def test_while_the_keys_cannot_be_read_nobody_is_denied_but_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.transport.mailbox.HANDSHAKE_MS", 50)
    place = Place(tmp_path)
    place.mailbox._keys = Unreadable(tmp_path)
    alice = place.known("alice")

    assert alice.changes == ["down", "up"]
    place.close()


def test_over_tcp_a_peer_that_has_fallen_silent_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.transport.mailbox.HEARTBEAT_MS", 50)
    monkeypatch.setattr("ksi.transport.mailbox.HEARTBEAT_MS_MAX", 100)
    place = Place(tmp_path)
    with stopped_client(place, "tcp"):
        with place.mailbox._router.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            assert monitor.poll(PATIENCE_MS)
        place.mailbox._router.disable_monitor()
    place.close()


# What comes in


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_raw_bytes_leave_it_serving(place: Place, transport: str) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(48)
    raw = [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, b"\xff" * 100_000, greeting, b"", b"\xff"]
    raw.append(greeting + b"\x04\xff" + b"\x05HELLO" * 50)
    for content in raw:
        if transport == "ipc":
            knock = socket.socket(socket.AF_UNIX)
            knock.connect(place.address.removeprefix("ipc://"))
        else:
            host, port = place.over("tcp").removeprefix("tcp://").split(":")
            knock = socket.create_connection((host, int(port)))
        with knock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                knock.sendall(content)
            assert place.serves(f"witness-{len(place.peers)}", transport)


@pytest.mark.parametrize(
    "parts", [[b"", b"x"], [b"a", b"b", b"c"], [b""] * 1000, [b"", b"", b"x" * 100_000]]
)
def test_a_message_of_several_frames_is_dropped_whole(place: Place, parts: list[bytes]) -> None:
    alice = place.known("alice")
    alice.dealer.send(b"before")
    for _ in range(3):
        alice.dealer.send_multipart(parts)
    alice.dealer.send(b"after")

    assert [letter.payload for letter in place.next_letters(2)] == [b"before", b"after"]
    assert place.serves()


def test_a_frame_over_the_limit_ends_its_connection_and_no_other(place: Place) -> None:
    alice, bob = place.known("alice"), place.known("bob")
    alice.dealer.send(bytes(FRAME_BYTES_MAX + 1))
    place.letters_until(alice.has_been("down"))
    bob.dealer.send(bytes(FRAME_BYTES_MAX - 64))

    (letter,) = place.next_letters(1)
    assert letter.sender == bob.certificate.user_id
    assert "down" not in bob.changes


def test_an_empty_frame_is_a_letter(place: Place) -> None:
    place.known("alice").dealer.send(b"")

    assert place.next_letters(1)[0].payload == b""


def test_all_that_waits_comes_at_once_in_the_order_of_each_sender(place: Place) -> None:
    alice, bob = place.known("alice"), place.known("bob")
    for number in range(20):
        for peer in (alice, bob):
            peer.dealer.send(b"%d" % number)
    assert place.mailbox._router.poll(PATIENCE_MS)
    letters = place.next_letters(40)

    for peer in (alice, bob):
        sent = [each.payload for each in letters if each.sender == peer.certificate.user_id]
        assert sent == [b"%d" % number for number in range(20)]


def test_one_post_is_bounded_by_count(place: Place) -> None:
    alice = place.known("alice")

    def send() -> None:
        for _ in range(4 * LETTERS_MAX):
            alice.dealer.send(b"x")

    pool = ThreadPoolExecutor(1)
    sending = pool.submit(send)  # which alone uses the client's socket meanwhile
    sizes: list[int] = []
    while sum(sizes) < 4 * LETTERS_MAX:
        sizes.append(len(place.mailbox.get().message.letters))

    assert max(sizes) <= LETTERS_MAX
    assert len([size for size in sizes if size]) < LETTERS_MAX  # they did come in groups
    sending.result()
    pool.shutdown()


def test_one_post_is_bounded_by_bytes(place: Place) -> None:
    size = FRAME_BYTES_MAX // 2
    dealer = bare(place, place.keys.enroll("alice"), sndhwm=1)
    dealer.send(b"")
    place.next_letters(1)
    # With room for one, a frame is accepted when those before it have left for the mailbox.
    for _ in range(3 * BATCH_BYTES_MAX // size):
        dealer.send(bytes(size))
    sizes = [len(place.mailbox.get().message.letters)]
    dealer.close()

    assert sizes == [BATCH_BYTES_MAX // size]


def test_a_client_that_is_not_heard_must_wait(place: Place) -> None:
    dealer = bare(place, place.keys.enroll("alice"), sndhwm=1)
    dealer.send(b"")
    place.next_letters(1)
    sent = 0
    while dealer.poll(200, zmq.POLLOUT):
        dealer.send(bytes(64 << 10), zmq.DONTWAIT)
        sent += 1
    dealer.close()

    assert REQUEST_FRAMES_MAX // 2 < sent <= REQUEST_FRAMES_MAX + 32  # and what the kernel holds


# What goes out


def test_sending_to_whoever_is_not_there_says_so(place: Place) -> None:
    alice = place.known("alice")
    alice.dealer.send(b"hello")
    (letter,) = place.next_letters(1)
    assert not place.mailbox.send(b"nobody", b"answer")
    assert place.mailbox.gone
    assert not place.mailbox.send(b"", b"answer")

    place.peers.remove(alice)
    alice.close()
    place.letters_until(lambda: not place.mailbox.send(letter.route, b"answer"))
    assert place.serves()


def test_a_client_that_stops_reading_costs_its_queue_and_nobody_waits(place: Place) -> None:
    frame, sent = bytes(64 << 10), 0
    with stopped_client(place) as letter:
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started_s = time.monotonic()
        for _ in range(2000):
            sent += place.mailbox.send(letter.route, frame)
        took_s = time.monotonic() - started_s
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb

        assert REPLY_FRAMES_MAX <= sent <= REPLY_FRAMES_MAX + 32  # and what the kernel holds
        assert grown_kb < 4 * REPLY_FRAMES_MAX * 64
        assert took_s < 1.0
        assert not place.mailbox.gone
        assert place.serves()


# Waiting and waking


def test_a_post_without_letters_comes_when_the_time_is_over(place: Place) -> None:
    place.mailbox.timeout_s = 0.05
    started_s = time.monotonic()
    envelope = place.mailbox.get()
    waited_s = time.monotonic() - started_s

    assert envelope.message == Post([])
    assert envelope.reply_to is None
    assert 0.05 <= waited_s < 0.5


def test_a_timeout_of_nothing_does_not_wait(place: Place) -> None:
    place.mailbox.timeout_s = 0.0
    started_s = time.monotonic()
    for _ in range(100):
        assert place.mailbox.get().message == Post([])

    assert time.monotonic() - started_s < 0.5


def test_an_envelope_from_another_thread_wakes_it(place: Place) -> None:
    mine = Envelope("mine")
    place.mailbox.timeout_s = PATIENCE_S
    timer = in_a_moment(lambda: place.mailbox.put(mine))
    started_s = time.monotonic()

    assert place.mailbox.get() is mine
    assert time.monotonic() - started_s < PATIENCE_S / 2
    timer.join()
    place.mailbox.timeout_s = 0.05
    started_s = time.monotonic()
    assert place.mailbox.get().message == Post([])
    assert time.monotonic() - started_s >= 0.05  # it wakes once


def test_envelopes_of_this_process_come_before_letters_and_in_order(place: Place) -> None:
    place.known("alice").dealer.send(b"letter")
    assert place.mailbox._router.poll(PATIENCE_MS)
    mine = [Envelope(number) for number in range(3)]
    for envelope in mine:
        place.mailbox.put(envelope)

    assert not place.mailbox.empty()
    assert [place.mailbox.get() for _ in mine] == mine
    assert place.mailbox.empty()
    assert [letter.payload for letter in place.next_letters(1)] == [b"letter"]


def test_more_envelopes_than_the_pipe_holds_bytes_all_come(place: Place) -> None:
    mine = Envelope("mine")
    for _ in range(70_000):
        place.mailbox.put(mine)
    for _ in range(70_000):
        assert place.mailbox.get() is mine

    place.mailbox.timeout_s = 0.0
    assert place.mailbox.get().message == Post([])


def test_a_signal_wakes_it_at_once(place: Place) -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        place.mailbox.wake_on_signals()
        place.mailbox.timeout_s = PATIENCE_S
        timer = in_a_moment(lambda: os.kill(os.getpid(), signal.SIGTERM))
        started_s = time.monotonic()
        assert place.mailbox.get().message == Post([])
        waited_s = time.monotonic() - started_s
        timer.join()
    finally:
        signal.signal(signal.SIGTERM, former)

    assert seen == [signal.SIGTERM]
    assert waited_s < PATIENCE_S / 2
    place.mailbox.timeout_s = 0.05
    started_s = time.monotonic()
    place.mailbox.get()
    assert time.monotonic() - started_s >= 0.05  # it wakes once


def test_the_last_replies_go_out_after_closing_and_nobody_waits_for_who_does_not_read(
    place: Place,
) -> None:
    eve = place.known("eve")
    eve.dealer.send(b"ask")
    key = place.keys.enroll("alice")
    alice = place.context.socket(zmq.DEALER)  # Without `immediate`, which drops what is not read.
    alice.curve_serverkey, alice.curve_publickey = place.owner.public, key.public
    alice.curve_secretkey = key.secret or b""
    alice.connect(place.address)
    alice.send(b"ask")
    for letter in place.next_letters(2):
        for _ in range(16):
            assert place.mailbox.send(letter.route, bytes(1 << 16))
    closed_s = time.monotonic()
    place.mailbox.close()
    ending = threading.Thread(target=place.server_context.term)
    ending.start()

    assert all(alice.poll(PATIENCE_MS) and len(alice.recv()) == 1 << 16 for _ in range(16))
    alice.close(0)
    ending.join(PATIENCE_S)
    assert not ending.is_alive()
    assert time.monotonic() - closed_s < PATIENCE_S / 2


def test_signals_are_left_alone_after_closing(place: Place) -> None:
    place.mailbox.wake_on_signals()
    place.mailbox.close()

    assert signal.set_wakeup_fd(-1) == -1


# Watching


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_what_is_watched_is_looked_after_before_an_empty_post(
    place: Place, pipe: tuple[int, int]
) -> None:
    read: list[bytes] = []
    place.mailbox.watch(pipe[0], lambda: read.append(os.read(pipe[0], 10)))
    place.mailbox.timeout_s = PATIENCE_S
    timer = in_a_moment(lambda: os.write(pipe[1], b"x"))

    assert place.mailbox.get().message == Post([])
    assert read == [b"x"]
    timer.join()


def test_what_is_unwatched_is_looked_after_no_longer(place: Place, pipe: tuple[int, int]) -> None:
    place.mailbox.watch(pipe[0], lambda: pytest.fail("was called"))
    place.mailbox.unwatch(pipe[0])
    place.mailbox.unwatch(pipe[0])
    os.write(pipe[1], b"x")
    place.mailbox.timeout_s = 0.02

    assert place.mailbox.get().message == Post([])


def test_a_socket_can_be_watched(place: Place) -> None:
    with place.context.socket(zmq.PAIR) as one, place.context.socket(zmq.PAIR) as other:
        one.bind("inproc://pair")
        other.connect("inproc://pair")
        read: list[bytes] = []
        place.mailbox.watch(one, lambda: read.append(one.recv()))
        other.send(b"x")
        other.send(b"y")
        place.letters_until(lambda: len(read) == 2)
        place.mailbox.unwatch(one)

    assert read == [b"x", b"y"]


def test_an_error_while_looking_after_something_is_logged_and_no_more(
    place: Place, pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("no use")

    place.mailbox.watch(pipe[0], fail)
    os.write(pipe[1], b"x")

    assert place.mailbox.get().message == Post([])
    assert "no use" in caplog.text
    assert place.serves()  # although it fails again and again


def test_looking_after_one_may_end_the_watch_over_another(
    place: Place, pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    others = os.pipe()
    calls: list[int] = []
    for source, other in ((pipe[0], others[0]), (others[0], pipe[0])):

        def look(source: int = source, other: int = other) -> None:
            calls.append(source)
            place.mailbox.unwatch(source)
            place.mailbox.unwatch(other)

        place.mailbox.watch(source, look)
    os.write(pipe[1], b"x")
    os.write(others[1], b"x")

    assert place.mailbox.get().message == Post([])
    assert len(calls) == 1
    assert caplog.text == ""
    for end in others:
        os.close(end)


def test_what_was_looked_after_is_told_also_when_an_envelope_came_with_it(
    place: Place, pipe: tuple[int, int]
) -> None:
    mine = Envelope("mine")

    def look() -> None:
        os.read(pipe[0], 10)
        place.mailbox._local.append(mine)  # put by a thread whose call has woken us already

    place.mailbox.watch(pipe[0], look)
    os.write(pipe[1], b"x")
    place.mailbox.timeout_s = PATIENCE_S
    started_s = time.monotonic()

    assert place.mailbox.get() is mine
    assert place.mailbox.get().message == Post([])
    assert time.monotonic() - started_s < PATIENCE_S / 2


class Failing(KeyRing):
    """Keys that fail in a way nobody thought of, once."""

    failed = False

    def refresh(self) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("nobody thought of this")
        super().refresh()


def test_an_error_nobody_thought_of_is_logged_and_it_goes_on(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    alice = place.known("alice")
    place.mailbox._keys = Failing(place.var)
    alice.dealer.send(b"lost")
    assert place.mailbox._router.poll(PATIENCE_MS)

    assert place.mailbox.get().message == Post([])
    assert "nobody thought of this" in caplog.text
    assert place.serves()


def test_it_finds_its_place_again_after_an_interruption_within_a_letter(
    place: Place, pipe: tuple[int, int]
) -> None:
    def interrupt() -> None:
        place.mailbox.unwatch(pipe[0])
        raise KeyboardInterrupt

    alice = place.known("alice")
    alice.dealer.send(b"lost")
    alice.dealer.send(b"kept")
    assert place.mailbox._router.poll(PATIENCE_MS)
    place.mailbox._router.recv()  # the route of a letter; the interruption comes before the rest
    place.mailbox.watch(pipe[0], interrupt)
    os.write(pipe[1], b"x")

    assert isinstance(place.mailbox.get().message, _ActorStop)
    assert [letter.payload for letter in place.next_letters(1)] == [b"kept"]


# The doorbell


def rings(bell: Socket) -> int:
    count = 0
    while bell.poll(0):
        assert bell.recv() == b""
        count += 1
    return count


@pytest.fixture
def bell(place: Place) -> Iterator[Socket]:
    """A listener that hears the bell already, and every ring of it."""
    with place.context.socket(zmq.SUB) as bell:
        bell.subscribe(b"")
        bell.connect(bell_endpoint(place.var, "sessions"))

        def heard() -> bool:
            place.mailbox.ring()
            return bell.poll(1) != 0

        place.letters_until(heard)
        place.mailbox.timeout_s = 3 * BELL_S
        place.mailbox.get()
        place.mailbox.get()
        while bell.poll(20):
            bell.recv()
        yield bell


def test_a_follower_hears_the_bell(place: Place) -> None:
    with listen(place.context, bell_endpoint(place.var, "sessions")) as bell:

        def heard() -> bool:
            place.mailbox.ring()
            return bell.poll(1) != 0

        place.letters_until(heard)
        assert bell.recv() == b""


def test_many_rings_are_few_and_the_last_is_heard_in_time(place: Place, bell: Socket) -> None:
    started_s = time.monotonic()
    for _ in range(1000):
        place.mailbox.ring()
    took_s = time.monotonic() - started_s
    assert bell.poll(PATIENCE_MS)
    assert 1 <= rings(bell) <= took_s / BELL_S + 2
    place.mailbox.ring()
    place.mailbox.timeout_s = PATIENCE_S

    def wait_for_the_last() -> bool:
        heard = bell.poll(PATIENCE_MS // 2) != 0
        place.mailbox.put(Envelope("enough"))
        return heard

    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(wait_for_the_last)
        assert place.mailbox.get().message == "enough"
        assert heard.result()


def test_rings_that_nobody_reads_do_not_add_up(place: Place, bell: Socket) -> None:
    with listen(place.context, bell_endpoint(place.var, "sessions")) as late:

        def heard() -> bool:
            place.mailbox.ring()
            return late.poll(1) != 0

        place.letters_until(heard)
        for _ in range(8):
            place.mailbox.timeout_s = 2 * BELL_S
            place.mailbox.ring()
            place.mailbox.get()
            assert bell.poll(PATIENCE_MS)
            assert bell.recv() == b""

        assert 1 <= rings(late) <= 2  # ZeroMQ may hold one beside the newest


# Opening and closing


def test_the_sockets_are_for_us_alone(tmp_path: Path) -> None:
    former = os.umask(0)
    place = Place(tmp_path)
    try:
        assert os.umask(0) == 0
        for name in ("sessions", "sessions.bell"):
            found = (tmp_path / "run" / name).lstat()
            assert stat.S_ISSOCK(found.st_mode)
            assert found.st_mode & 0o777 & ~0o700 == 0
    finally:
        place.close()
        os.umask(former)


def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    before = open_files()
    place = Place(tmp_path)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"sessions", "sessions.bell"}
    place.mailbox.close()
    assert list((tmp_path / "run").iterdir()) == []
    place.close()

    assert open_files() == before


def test_what_is_left_of_a_killed_owner_is_replaced(tmp_path: Path) -> None:
    run = make_run_directory(tmp_path)
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(run / "sessions"))
    (run / "sessions.bell").write_text("")
    place = Place(tmp_path)

    assert place.serves()
    place.close()


def test_a_successor_is_reached_although_its_predecessor_ends_later(place: Place) -> None:
    alice = place.known("alice")
    former_context = place.server_context
    place.mailbox.close()
    place.server_context = zmq.Context()
    place.mailbox = place.open(place.server_context)
    assert ends(former_context)

    place.letters_until(alice.has_been("down"))
    place.letters_until(lambda: alice.has_been("up")() and alice.changes.count("up") == 2)
    assert place.serves()


def test_after_closing_only_envelopes_of_this_process_are_served(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    alice = place.known("alice")
    alice.dealer.send(b"hello")
    (letter,) = place.next_letters(1)
    mine = Envelope("mine")
    place.mailbox.put(mine)
    place.mailbox.close()
    place.mailbox.close()
    place.mailbox.put(mine)

    assert not place.mailbox.empty()
    assert place.mailbox.get() is mine
    assert place.mailbox.get() is mine
    assert place.mailbox.empty()
    assert place.mailbox.get().message == Post([])
    assert not place.mailbox.send(letter.route, b"late")
    assert caplog.text == ""


def test_an_address_that_cannot_be_bound_leaves_nothing_open(tmp_path: Path) -> None:
    keys = KeyRing(tmp_path)
    owner = keys.enroll("sessions", "owner")
    context = zmq.Context()
    before = open_files()

    with pytest.raises(zmq.ZMQError):
        Mailbox(context, f"ipc://{tmp_path}/missing/sessions", owner, keys)
    make_run_directory(tmp_path)
    with pytest.raises(zmq.ZMQError):
        Mailbox(context, endpoint(tmp_path, "sessions"), owner, keys, tcp="tcp://256.0.0.1:x")
    assert ends(context)
    assert open_files() <= before
    assert list((tmp_path / "run").iterdir()) == []


def test_what_is_sent_before_the_connection_is_up_is_not_swallowed(place: Place) -> None:
    alice = place.peer(place.keys.enroll("alice"))

    with pytest.raises(zmq.Again):
        alice.dealer.send(b"too early", zmq.DONTWAIT)
    assert place.letters_until(alice.has_been("up")) == []


def test_a_client_needs_no_pykka() -> None:
    program = "import sys, ksi.transport.mailbox; sys.exit('pykka' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes() -> None:
    program = (
        "import resource as r; from ksi.transport.mailbox import raise_file_limit\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 512))\n"
        "print(raise_file_limit(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)

    assert done.stdout.split() == ["512", "512", "512"]


# As the inbox of an actor


class Echo(pykka.ThreadingActor):
    """Answers letters; its loop runs in the thread that starts it."""

    def __init__(self, mailbox: Mailbox, started: queue.Queue[pykka.ActorRef[Any]]) -> None:
        self._mailbox = mailbox
        super().__init__()
        self._started = started
        self.posts = 0
        self.thread = threading.current_thread()
        self.busy, self.release = threading.Event(), threading.Event()
        self.thrice = threading.Event()

    def _create_actor_inbox(self) -> Any:  # type: ignore[override]  # static in pykka
        return self._mailbox

    def _start_actor_loop(self) -> None:
        self._actor_loop()

    def on_start(self) -> None:
        self._started.put(self.actor_ref)

    def on_receive(self, message: Any) -> Any:
        if isinstance(message, Post):
            self.posts += 1
            if self.posts == 3:
                self.thrice.set()
            for letter in message.letters:
                self._mailbox.send(letter.route, letter.payload)
            return None
        if message == "fail":
            raise ValueError("as asked")
        if message == "wait":
            self.busy.set()
            assert self.release.wait(PATIENCE_S)
        return threading.current_thread() is self.thread, message

    def count(self) -> int:
        return self.posts


def run_echo(place: Place, script: Callable[[pykka.ActorRef[Any]], Any]) -> Any:
    """Run the actor in this thread, and `script` in another until it has stopped the actor."""
    started: queue.Queue[pykka.ActorRef[Any]] = queue.Queue()

    def play() -> Any:
        ref = started.get(timeout=PATIENCE_S)
        try:
            return script(ref)
        finally:
            if ref.is_alive():
                ref.stop(block=False)

    with ThreadPoolExecutor(1) as pool:
        playing = pool.submit(play)
        place.mailbox.timeout_s = 0.05
        ref = Echo.start(place.mailbox, started)
        assert not ref.is_alive()
        return playing.result(PATIENCE_S)


def test_the_actor_answers_its_own_process_and_clients_from_one_thread(place: Place) -> None:
    alice = place.known("alice")

    def script(ref: pykka.ActorRef[Any]) -> None:
        for number in range(20):
            alice.dealer.send(b"%d" % number)
            assert ref.ask(number, timeout=PATIENCE_S) == (True, number)
            assert alice.dealer.poll(PATIENCE_MS)
            assert alice.dealer.recv() == b"%d" % number
        ref.tell("no answer")
        posts = ref.proxy().count().get(timeout=PATIENCE_S)
        assert posts >= 1
        ref.stop(timeout=PATIENCE_S)

    run_echo(place, script)


def test_a_failed_ask_is_told_and_the_actor_goes_on(place: Place) -> None:
    def script(ref: pykka.ActorRef[Any]) -> Any:
        with pytest.raises(ValueError, match="as asked"):
            ref.ask("fail", timeout=PATIENCE_S)
        return ref.ask("well", timeout=PATIENCE_S)

    assert run_echo(place, script) == (True, "well")


def test_time_passes_for_the_actor_also_when_nothing_comes(place: Place) -> None:
    def script(ref: pykka.ActorRef[Any]) -> Any:
        return ref.proxy().thrice.get(timeout=PATIENCE_S).wait(PATIENCE_S)

    assert run_echo(place, script) is True


def test_what_is_left_when_the_actor_stops_is_answered(place: Place) -> None:
    def script(ref: pykka.ActorRef[Any]) -> None:
        proxy = ref.proxy()
        busy, release = proxy.busy.get(), proxy.release.get()
        working = ref.ask("wait", block=False)
        assert busy.wait(PATIENCE_S)
        stopping = ref.stop(block=False)
        late = [ref.ask("late", block=False) for _ in range(3)]
        release.set()

        assert working.get(timeout=PATIENCE_S) == (True, "wait")
        assert stopping.get(timeout=PATIENCE_S) is True
        for future in late:
            with pytest.raises(pykka.ActorDeadError):
                future.get(timeout=PATIENCE_S)
        with pytest.raises(pykka.ActorDeadError):
            ref.ask("too late", timeout=PATIENCE_S)

    run_echo(place, script)
    assert place.mailbox.empty()


def test_letters_that_wait_when_the_actor_stops_do_not_keep_it(place: Place) -> None:
    alice = place.known("alice")

    def script(ref: pykka.ActorRef[Any]) -> None:
        proxy = ref.proxy()
        busy, release = proxy.busy.get(), proxy.release.get()
        ref.tell("wait")
        assert busy.wait(PATIENCE_S)
        ref.stop(block=False)
        alice.dealer.send(b"letter")
        release.set()

    run_echo(place, script)
    assert [letter.payload for letter in place.next_letters(1)] == [b"letter"]


def test_an_interrupt_without_a_handler_stops_the_actor(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        place.mailbox.wake_on_signals()
        place.mailbox.timeout_s = PATIENCE_S
        started: queue.Queue[pykka.ActorRef[Any]] = queue.Queue()

        def interrupt() -> None:
            started.get(timeout=PATIENCE_S)  # Before that it would be the test that is interrupted.
            in_a_moment(lambda: os.kill(os.getpid(), signal.SIGINT)).join()

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        ref = Echo.start(place.mailbox, started)
        interrupter.join()
    finally:
        signal.signal(signal.SIGINT, former)

    assert not ref.is_alive()
    assert "KeyboardInterrupt" in caplog.text


def test_pykka_is_pinned_to_the_version_whose_private_parts_are_used() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    required = setup["options"]["install_requires"].split()

    assert "pykka>=4.5,<4.6" in required
    assert version("pykka").startswith("4.5.")
    for name in ("_create_actor_inbox", "_start_actor_loop", "_actor_loop"):
        assert callable(getattr(pykka.ThreadingActor, name))
