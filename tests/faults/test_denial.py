"""What is known to end or to fill a process that listens with ZeroMQ, done to an owner.

The owner goes on, or is back by itself; what was acknowledged is there; and others are served.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq
from system import System
from trouble import Stranger, entries, living, rss_mb, until

from ksi.transport.identity import KeyRing, endpoint

GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00"
MECHANISMS = (b"CURVE", b"NULL", b"PLAIN", b"GSSAPI", b"\xff" * 20)


@pytest.fixture
def session(system: System) -> Iterator[str]:
    """A session with an acknowledged entry, which is there afterwards, and can be gone on with."""
    with system.client("witness") as witness:
        session = str(witness.ask("session:create")["session_id"])
        witness.ask("session:append", session_id=session, event="acknowledged")
        yield session
        witness.ask("session:append", session_id=session, event="afterwards", timeout_s=20.0)
    assert [each["event"] for each in entries(system, session)] == ["acknowledged", "afterwards"]


def raw(system: System) -> socket.socket:
    """Return a connection to the owner of sessions that speaks no ZeroMQ."""
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(5.0)
    try:
        connected.connect(endpoint(system.var, "sessions").removeprefix("ipc://"))
    except OSError:
        connected.close()
        raise
    return connected


def test_an_owner_that_runs_out_of_descriptors_is_back(system: System, session: str) -> None:
    """A listener of ZeroMQ on a socket file aborts the process when `accept` has none left."""
    pid = living(system)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
    with ExitStack() as held:
        for _ in range(60):
            with contextlib.suppress(OSError):
                held.enter_context(raw(system)).send(GREETING)
        with system.client("other") as other:
            assert other.ask("session:create", timeout_s=20.0)


def test_a_peer_that_claims_the_route_of_another_ends_nobody(system: System, session: str) -> None:
    """ZeroMQ asserts that the next route it makes is free: a guess that is right aborts."""
    pid = living(system)
    keys = KeyRing(system.var).enroll("squatter")
    with Stranger(system.var, "stranger") as stranger, ExitStack() as held:
        assert stranger.is_served()
        context: zmq.Context[zmq.Socket[bytes]] = held.enter_context(zmq.Context())
        for guess in [*range(64), *(random.randrange(1 << 32) for _ in range(64))]:
            dealer = held.enter_context(context.socket(zmq.DEALER))
            dealer.linger = 0
            dealer.curve_serverkey = stranger.place.key.encode()
            dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
            dealer.routing_id = b"\0" + guess.to_bytes(4, "big")
            dealer.connect(stranger.place.endpoint)
        for number in range(20):
            with Stranger(system.var, f"stranger-{number % 4}") as another:
                assert another.is_served()
    assert living(system) == pid


def test_a_message_without_end_fills_nobody(system: System, session: str) -> None:
    """Neither the limit of a frame nor that of a queue bounds how many parts a message has."""
    pid = living(system)
    before_mb = rss_mb(pid)
    part = b"\x03" + (4000).to_bytes(8, "big") + b"x" * 4000  # long, and more to come
    sent = 0
    for mechanism in MECHANISMS:
        with raw(system) as connected, contextlib.suppress(OSError):
            connected.send(GREETING + mechanism.ljust(20, b"\0") + b"\0" * 32)
            until_s = time.monotonic() + 1.0
            while time.monotonic() < until_s and sent < 100 << 20:
                sent += connected.send(part * 16)
    assert rss_mb(pid) - before_mb < 50
    assert living(system) == pid


def connect_with_noise(system: System, connections: int) -> None:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    pid = living(system)
    with ExitStack() as held:
        for number in range(connections):
            connected = held.enter_context(raw(system))
            start = GREETING + chance.choice(MECHANISMS).ljust(20, b"\0") + b"\0" * 32
            noise = bytearray(start + chance.randbytes(chance.randrange(300)))
            for _ in range(chance.randrange(3)):
                noise[chance.randrange(len(noise))] = chance.randrange(256)
            with contextlib.suppress(OSError):
                connected.send(noise[: chance.randrange(len(noise))])
            if number % 100 == 99:
                held.pop_all().close()
                with Stranger(system.var, "stranger") as stranger:
                    assert stranger.is_served()
    assert living(system) == pid
    until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 100)
    print(f"{connections} connections full of noise, the owner is the same")


def test_connections_full_of_noise_end_nobody(system: System, session: str) -> None:
    connect_with_noise(system, 300)


@pytest.mark.soak
def test_ten_thousand_connections_full_of_noise_end_nobody(system: System, session: str) -> None:
    connect_with_noise(system, 10_000)
