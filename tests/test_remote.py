"""Clients on another machine: over tcp, without the files of the system.

The other machine is played by a directory that was carried: all it shares with the system is the
loopback interface.
"""

from __future__ import annotations

import asyncio
import json
import random
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from system import System
from trouble import WAIT_S, entries, kill, kill_all, paused, until

from ksi.actors.declarations.sessions import Get
from ksi.actors.supervision.lock import holder
from ksi.console.main import main
from ksi.transport import AsyncClient, Client
from ksi.transport.caller import _FAR_ALONE_S
from ksi.transport.errors import (
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    KsiError,
    NotFound,
    NotRunning,
    Unavailable,
    UnknownOperation,
)
from ksi.transport.identity import Certificate, Directory, KeyRing
from ksi.transport.limits import ASK_TIMEOUT_S
from ksi.transport.mailbox import require_free
from ksi.transport.remote import is_remote

PORTS = 16  # more than there are owners


def free_ports(host: str = "127.0.0.1") -> int:
    """Return the first of a row of ports that nobody uses, below those the kernel gives away."""
    while True:
        first = random.randrange(12_000, 30_000)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with ExitStack() as opened, suppress(OSError):
            for port in range(first, first + PORTS):
                opened.enter_context(closing(socket.socket(family))).bind((host, port))
            return first


def listening(var: Path, host: str = "127.0.0.1", **flags: Any) -> System:
    """Return a running system that listens on tcp."""
    where: dict[str, Any] = {
        "transport.tcp_host": host,
        "transport.tcp_port": free_ports(host.strip("*") or ""),
    }
    return System(var, (), **where | flags)


def carried(system: System, to: Path, name: str = "alice", *more: str) -> Path:
    """Enrol `name` and return the directory to carry."""
    assert main(["--var", str(system.var), "agents", "enroll", name, "--to", str(to), *more]) == 0
    return to


def note(client: Client, session_id: str, n: int = 0, **more: Any) -> dict[str, Any]:
    return client.ask("session:append", session_id=session_id, event="n", data={"n": n}, **more)


def noted(system: System, session_id: str) -> list[int]:
    return [entry["data"]["n"] for entry in entries(system, session_id)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = listening(tmp_path_factory.mktemp("remote") / "var")
    yield running
    running.end()


@pytest.fixture
def afar(system: System, tmp_path: Path) -> Path:
    """A directory that was carried to another machine with the key of alice."""
    return carried(system, tmp_path / "afar")


@pytest.fixture
def alice(afar: Path) -> Iterator[Client]:
    with Client("alice", var=afar) as client:
        yield client


@pytest.fixture
def session(alice: Client) -> str:
    return str(alice.ask("session:create")["session_id"])


class Wire:
    """A stretch of network between a client and one port: it can be cut, and swallow all."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.swallows = False
        self.holds = False
        self.late: list[tuple[socket.socket, bytes]] = []  # held back, and where it is to go
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._nears: set[socket.socket] = set()
        self._cut = self._lets_go = self._ended = False
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def cut(self) -> None:
        """End all connections, whatever is under way on them."""
        self._cut = True
        until(lambda: not self._cut)

    def let_go(self) -> None:
        """End the connections of which something is held back, but for the owner: it goes on
        to wait for what is late."""
        self.holds, self._lets_go = False, True
        until(lambda: not self._lets_go)

    def arrive(self) -> None:
        """Let what was held back arrive, and wait until the owner has answered it."""
        for far, content in self.late:
            far.sendall(content)
        for far in {far for far, _ in self.late}:
            assert select.select([far], [], [], WAIT_S)[0]
            far.close()

    def close(self) -> None:
        self._ended = True
        self._thread.join()

    def _carry(self) -> None:
        while not self._ended:
            ready, _, _ = select.select([self._listener, *self._pairs], [], [], 0.01)
            if self._cut:
                self._close_all()
                self._cut = False
                continue
            if self._lets_go:
                for far in {far for far, _ in self.late}:
                    near = self._pairs.pop(far)
                    del self._pairs[near]
                    near.close()
                self._lets_go = False
                continue
            for each in ready:
                if each is self._listener:
                    self._connect()
                elif each in self._pairs:
                    self._pass_on(each)
        self._close_all()
        self._listener.close()

    def _connect(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._to)
        except OSError:
            near.close()
        else:
            self._pairs |= {near: far, far: near}
            self._nears.add(near)

    def _pass_on(self, source: socket.socket) -> None:
        target = self._pairs[source]
        try:
            content = source.recv(65_536)
            if content and self.holds and source in self._nears:
                self.late.append((target, content))
            elif content and not self.swallows:
                target.sendall(content)
        except OSError:
            content = b""
        if not content:
            del self._pairs[source], self._pairs[target]
            source.close()
            target.close()

    def _close_all(self) -> None:
        for each in self._pairs:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            each.close()
        self._pairs.clear()


@pytest.fixture
def wire(system: System, afar: Path) -> Iterator[Wire]:
    """The way from `afar` to the sessions owner."""
    place = Directory.read(afar).owners["sessions"]
    port = int(place.endpoint.rpartition(":")[2])
    stretch = Wire(port)
    path = afar / "remote.json"
    path.write_text(path.read_text().replace(f":{port}", f":{stretch.port}"))
    yield stretch
    stretch.close()


# What is carried


def test_what_is_carried_is_one_key_and_the_addresses_and_nothing_else(
    system: System, afar: Path
) -> None:
    ring, places = KeyRing(afar), Directory.read(afar).owners
    files = {path.relative_to(afar).as_posix() for path in afar.rglob("*") if path.is_file()}
    alice = ring.load("alice")

    assert alice == KeyRing(system.var).load("alice")
    assert alice is not None
    assert files == {"remote.json", "keys/alice.key_secret", f"keys/{alice.user_id}.key"}
    assert all(stat.S_IMODE((afar / name).stat().st_mode) == 0o600 for name in files)
    assert stat.S_IMODE(afar.stat().st_mode) == stat.S_IMODE((afar / "keys").stat().st_mode)
    assert stat.S_IMODE(afar.stat().st_mode) == 0o700
    assert {"registry", "sessions"} <= set(places)
    assert "supervisor" not in places
    here = Directory.read(system.var).owners
    assert all(places[name].endpoint == here[name].tcp for name in places)
    assert all(places[name].key == here[name].key for name in places)


def test_one_directory_takes_several_keys_and_a_newer_one_in_place_of_a_former(
    system: System, afar: Path
) -> None:
    former = KeyRing(afar).load("alice")
    carried(system, afar, "bob")
    carried(system, afar, "alice", "--renew")

    assert KeyRing(afar).names() == ["alice", "bob"]
    assert KeyRing(afar).load("alice") != former
    with pytest.raises(Invalid, match="alice, bob: say whose"):
        Client(var=afar)
    assert main(["ask", "session:create", "--var", str(afar), "--as", "bob"]) == 0
    for name in ("alice", "bob"):
        with Client(name, var=afar) as client:
            assert client.ask("session:create")["owner"] == name


def test_a_key_can_only_be_carried_where_it_overwrites_nothing(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enroll = ["--var", str(system.var), "agents", "enroll", "carl", "--to"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main([*enroll, str(tmp_path / "mine")]) == Conflict.exit_code
    assert main([*enroll, str(system.var)]) == Conflict.exit_code

    other = listening(tmp_path / "other")
    try:
        carried(other, tmp_path / "theirs")
    finally:
        other.end()
    before = (tmp_path / "theirs" / "remote.json").read_text()
    assert main([*enroll, str(tmp_path / "theirs")]) == Conflict.exit_code
    assert (tmp_path / "theirs" / "remote.json").read_text() == before
    assert [*(tmp_path / "mine").iterdir()] == [tmp_path / "mine" / "thesis.txt"]
    assert "carl" not in KeyRing(system.var).names()
    assert capsys.readouterr().err.count("ksi: conflict: ") == 3


def test_a_system_without_tcp_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = System(tmp_path / "var")
    try:
        enroll = ["--var", str(local.var), "agents", "enroll", "alice", "--to", str(tmp_path / "d")]
        assert main(enroll) == Invalid.exit_code
        assert "transport.tcp_host" in capsys.readouterr().err
        assert not (tmp_path / "d").exists()
        assert "alice" not in KeyRing(local.var).names()
    finally:
        local.end()
    assert main(enroll) == NotRunning.exit_code


def test_a_system_on_all_addresses_must_be_told_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_to_all = listening(tmp_path / "var", "*")
    try:
        enroll = ["--var", str(open_to_all.var), "agents", "enroll", "alice"]
        assert main([*enroll, "--to", str(tmp_path / "d")]) == Invalid.exit_code
        assert "--host" in capsys.readouterr().err
        assert main([*enroll, "--host", "localhost"]) == 2  # says nothing without --to
        for host in ("tcp://x", "a b", "x:1", "\n"):
            assert main([*enroll, "--to", str(tmp_path / "d"), "--host", host]) == 2
        assert not (tmp_path / "d").exists()
        afar = carried(open_to_all, tmp_path / "d", "alice", "--host", "localhost")
        with Client(var=afar) as alice:
            assert alice.ask("session:create")["owner"] == "alice"
    finally:
        open_to_all.end()


def test_over_ipv6_it_is_the_same(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    system = listening(tmp_path / "var", "::1")
    try:
        with Client(var=carried(system, tmp_path / "afar")) as alice:
            assert alice.ask("session:create")["owner"] == "alice"
    finally:
        system.end()


# What works from there


def test_from_afar_one_asks_tells_subscribes_and_settles_as_from_here(
    system: System, alice: Client, session: str
) -> None:
    with alice.subscribe("session.>") as news:
        assert note(alice, session, 1)["seq"] == 1
        for n in range(2, 50):
            alice.tell("session:append", session_id=session, event="n", data={"n": n})
        alice.flush()
        heard = [news.next(timeout_s=WAIT_S) for _ in range(49)]

    assert noted(system, session) == list(range(1, 50))
    assert {each.sender for each in heard} == {"alice"}
    assert [each.gap for each in heard] == [0] * 49
    with system.client("bob") as bob, pytest.raises(KsiError, match="written by alice"):
        note(bob, session)


def test_the_only_key_that_was_carried_says_who_one_is(afar: Path) -> None:
    with Client(var=afar) as client:
        assert client.name == "alice"
        assert client.ask("session:create")["owner"] == "alice"


def test_many_callers_share_frames_over_tcp_too(system: System, afar: Path) -> None:
    async def run() -> str:
        async with AsyncClient("alice", var=afar) as alice:
            session = (await alice.ask("session:create"))["session_id"]
            async with await alice.subscribe(f"session.{session}.>") as news:
                asks = [
                    alice.ask("session:append", session_id=session, event="n", data={"n": n})
                    for n in range(500)
                ]
                assert [ack["seq"] for ack in await asyncio.gather(*asks)] == list(range(1, 501))
                assert (await news.next(WAIT_S)).message["seq"] == 1
            page = await alice.read("session:history", session_id=session, limit=1000)
            assert len(page["entries"]) == 500
            with pytest.raises(Invalid, match="is a command"):
                await alice.read("session:create")
            return str(session)

    assert noted(system, asyncio.run(run())) == list(range(500))


def test_what_a_lost_connection_delivers_late_is_not_carried_out_again(
    system: System, afar: Path, wire: Wire
) -> None:
    with Client("alice", var=afar) as alice:
        session = str(alice.ask("session:create")["session_id"])
        note(alice, session, 1)
        wire.holds = True
        alice.tell("session:append", session_id=session, event="n", data={"n": 2})
        until(lambda: wire.late)
        wire.let_go()
        alice.flush(WAIT_S)  # over another connection
    wire.arrive()
    assert noted(system, session) == [1, 2]


def test_a_read_from_afar_is_what_a_read_here_is(
    system: System, alice: Client, session: str
) -> None:
    alice.ask("agent:register", agent_id="alice", capabilities=["zebra"])
    for n in range(3):
        note(alice, session, n)
    reads: dict[str, dict[str, Any]] = {
        "session:get": {"session_id": session},
        "session:history": {"session_id": session, "after": 1},
        "session:participants": {"session_id": session},
        "session:list": {"owner": "alice"},
        "agent:discover_peers": {"capabilities": ["zebra"]},
        "agent:info": {"agent_id": "alice"},
    }
    with system.client("alice") as here:
        for query, fields in reads.items():
            assert alice.read(query, fields) == here.read(query, fields), query
        assert alice.read(Get(session_id=session)) == here.read(Get(session_id=session))


@pytest.mark.parametrize(
    ("query", "fields", "refusal"),
    [
        ("session:get", {"session_id": "none"}, NotFound),
        ("session:get", {"session_id": 7}, Invalid),
        ("session:get", {"sesion_id": "none"}, Invalid),
        ("session:got", {}, UnknownOperation),
        ("session:create", {}, Invalid),
    ],
)
def test_a_read_is_refused_from_afar_as_it_is_here(
    system: System, alice: Client, query: str, fields: dict[str, Any], refusal: type[KsiError]
) -> None:
    with system.client("alice") as here:
        for client in (here, alice):
            with pytest.raises(refusal):
                client.read(query, fields)


def test_the_console_works_with_a_carried_directory(
    system: System, afar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ksi = ["--var", str(afar), "--json"]
    asked = ["session:append", "--session-id", "from-afar", "--event", "n", "--data", '{"n": 1}']
    assert main(["ask", "session:create", "--session-id", "from-afar", *ksi]) == 0
    assert main(["send", *asked, *ksi]) == 0
    capsys.readouterr()
    assert main(["read", "session:history", "--session-id", "from-afar", *ksi]) == 0
    there = json.loads(capsys.readouterr().out)
    ksi[1] = str(system.var)
    assert main(["read", "session:history", "--session-id", "from-afar", *ksi]) == 0
    assert json.loads(capsys.readouterr().out) == there
    assert there["entries"][0]["metadata"]["agent_id"] == "alice"
    ksi[1] = str(afar)
    assert main(["sessions", "list", *ksi]) == 0
    assert "from-afar" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["start"], ["stop"], ["restart"], ["status"], ["ps"], ["logs"], ["config"],
        ["agents", "enroll", "bob"], ["agents", "remove", "alice", "--yes"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_needs_the_machine_of_the_system_says_so_in_a_sentence(
    afar: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(afar.rglob("*"))

    assert main([*words, "--var", str(afar)]) == Invalid.exit_code
    assert "works on the machine of the system only" in capsys.readouterr().err
    assert sorted(afar.rglob("*")) == before


def test_the_supervisor_does_not_listen_for_other_machines(alice: Client) -> None:
    for ask in (alice.ask, alice.read):
        with pytest.raises(Forbidden, match="supervisor does not listen"):
            ask("system:status")


def test_status_says_where_owners_listen(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Directory.read(system.var).owners
    main(["--var", str(system.var), "status", "--json"])
    owners = json.loads(capsys.readouterr().out)["owners"]
    assert {each["name"]: each["tcp"] for each in owners} == {
        each["name"]: here[each["name"]].tcp for each in owners
    }
    main(["--var", str(system.var), "status"])
    assert f"sessions {here['sessions'].tcp.removeprefix('tcp://')}" in capsys.readouterr().out


# Keys


def test_without_a_key_nobody_becomes_anybody(system: System, afar: Path) -> None:
    with pytest.raises(Forbidden, match="no key of bob"):
        Client("bob", var=afar)
    assert KeyRing(afar).names() == ["alice"]


@pytest.mark.parametrize("damage", ["", "{", '{"owners": 7}'])
def test_a_directory_damaged_on_its_way_says_how_to_get_another(afar: Path, damage: str) -> None:
    (afar / "remote.json").write_text(damage)

    with Client("alice", var=afar) as alice, pytest.raises(Invalid, match="unreadable") as told:
        alice.ask("session:create")
    assert "ksi agents enroll" in str(told.value.hint)


def test_a_key_that_others_may_read_is_not_used(afar: Path) -> None:
    (afar / "keys" / "alice.key_secret").chmod(0o644)

    with pytest.raises(Forbidden, match="open to other users"):
        Client("alice", var=afar)


def test_a_key_that_was_never_enrolled_is_turned_away(afar: Path) -> None:
    KeyRing(afar).carry(Certificate("bob", "operator", *zmq.curve_keypair()))
    with Client("bob", var=afar) as bob:
        for _ in range(2):
            with pytest.raises(Forbidden, match="does not admit this key"):
                bob.ask("session:create")


def test_a_role_is_what_the_system_says_and_not_what_was_carried(
    system: System, afar: Path
) -> None:
    carried(system, afar, "will", "--role", "worker")
    will = KeyRing(afar).load("will")
    assert will is not None
    KeyRing(afar).carry(will._replace(role="operator"))

    with Client("will", var=afar) as alleged, pytest.raises(Forbidden, match="will is worker"):
        alleged.ask("agent:spawn", agent_id="x", argv=["true"])


def test_over_a_network_only_operators_start_and_end_processes(
    system: System, afar: Path, alice: Client
) -> None:
    spawn: dict[str, Any] = {"agent_id": "scout", "argv": ["true"], "dry_run": True}
    for operation, fields in (
        ("agent:spawn", spawn),
        ("agent:restart", {"agent_id": "alice"}),
        ("agent:terminate", {"agent_id": "alice"}),
    ):
        with pytest.raises(Forbidden, match="for operator over a network, and alice is agent"):
            alice.ask(operation, fields)
    carried(system, afar, "op", "--role", "operator")
    with Client("op", var=afar) as operator, system.client("alice") as here:
        for client in (operator, here):
            assert client.ask("agent:spawn", spawn)["agent_id"] == "scout"


def test_a_revoked_key_is_out_at_once_and_a_new_one_is_let_in(
    system: System, afar: Path, alice: Client, session: str
) -> None:
    with alice.subscribe("session.>") as news:
        KeyRing(system.var).remove("alice")
        with pytest.raises(Forbidden, match="not enrolled any more"):
            note(alice, session)
        kill(system)  # whatever connects anew is asked for its key
        until(lambda: alice._caller.links == {})
        with pytest.raises(Forbidden):
            news.next(timeout_s=WAIT_S)
        with pytest.raises(Forbidden, match="does not admit this key"):
            note(alice, session)
    with Client("alice", var=afar) as again, pytest.raises(Forbidden):
        again.read("session:get", session_id=session)

    with Client("alice", var=carried(system, afar)) as renewed:
        assert note(renewed, session, 7)["seq"] == 1
    assert noted(system, session) == [7]


def test_an_owner_with_another_key_is_not_believed(system: System, afar: Path) -> None:
    places = Directory.read(afar).owners
    wrong, right = places["registry"].endpoint, places["sessions"].endpoint
    path = afar / "remote.json"
    path.write_text(path.read_text().replace(right, wrong))
    begun_s = time.monotonic()
    with Client("alice", var=afar) as alice, pytest.raises(NotRunning, match=wrong):
        alice.ask("session:create", timeout_s=60.0)
    assert time.monotonic() - begun_s < 30.0


# Trouble


def test_nothing_is_lost_when_owners_are_killed_under_a_client_over_tcp(
    system: System, afar: Path
) -> None:
    ports = {name: each.tcp for name, each in Directory.read(system.var).owners.items()}

    async def run() -> tuple[str, dict[int, int]]:
        acknowledged: dict[int, int] = {}
        over = False
        async with AsyncClient("alice", var=afar) as alice:
            session = (await alice.ask("session:create"))["session_id"]

            async def speak(first: int) -> None:
                for n in range(first, 1_000_000, 8):
                    reply = await alice.ask(
                        "session:append", session_id=session, event="n", data={"n": n},
                        timeout_s=30.0,
                    )  # fmt: skip
                    acknowledged[reply["seq"]] = n
                    if over:
                        return

            speakers = [asyncio.create_task(speak(first)) for first in range(8)]
            for _ in range(10):
                before = len(acknowledged)
                while len(acknowledged) < before + 40:
                    await asyncio.sleep(0.005)  # The speakers go on meanwhile.
                await asyncio.to_thread(kill, system)
            over = True
            await asyncio.gather(*speakers)
        return session, acknowledged

    session, acknowledged = asyncio.run(run())
    assert sorted(acknowledged) == list(range(1, len(acknowledged) + 1))
    assert noted(system, session) == [acknowledged[seq] for seq in sorted(acknowledged)]
    assert {name: each.tcp for name, each in Directory.read(system.var).owners.items()} == ports


def test_nothing_is_lost_or_doubled_by_a_network_that_cuts_connections(
    system: System, afar: Path, wire: Wire
) -> None:
    with Client("alice", var=afar) as alice:
        session = alice.ask("session:create")["session_id"]
        with alice.subscribe(f"session.{session}.>") as news:
            for n in range(300):
                alice.tell("session:append", session_id=session, event="n", data={"n": n})
                if n % 30 == 29:
                    wire.cut()
            alice.flush(30.0)
            with suppress(TimeoutError):
                while True:  # more than was read, so that some were missed
                    news.next(0.2)
            note(alice, session, 300)
            assert news.next(WAIT_S).message["seq"] == 301
    assert noted(system, session) == list(range(301))


def test_a_network_that_swallows_everything_leaves_a_ticket_that_settles(
    system: System, afar: Path, wire: Wire
) -> None:
    with Client("alice", var=afar) as alice:
        session = alice.ask("session:create")["session_id"]
        wire.swallows = True
        with pytest.raises(Unavailable, match="may or may not") as silence:
            note(alice, session, timeout_s=0.5)
        with pytest.raises(Unavailable, match="tcp://"):
            alice.ask("session:get", session_id=session, timeout_s=0.5)
        with Client("alice", var=afar) as fresh, pytest.raises(Unavailable, match="tcp://"):
            fresh.ask("session:get", session_id=session, timeout_s=0.5)
        wire.swallows = False
        wire.cut()
        assert silence.value.ticket is not None
        with pytest.raises(Expired):  # what was swallowed has not happened, and never will
            alice.settle(silence.value.ticket, timeout_s=WAIT_S)
        assert note(alice, session, 1)["seq"] == 1


def test_a_paused_owner_is_unavailable_from_afar_and_not_gone(
    system: System, alice: Client, session: str
) -> None:
    with paused(system), pytest.raises(Unavailable):
        alice.ask("session:get", session_id=session, timeout_s=0.3)
    assert alice.read("session:get", session_id=session)["seq"] == 0


def test_a_system_that_does_not_run_is_told_from_one_that_is_slow_and_comes_back(
    system: System, afar: Path
) -> None:
    with Client("alice", var=afar) as alice:
        session = alice.ask("session:create")["session_id"]
        kill_all(system)
        begun_s = time.monotonic()
        with pytest.raises(NotRunning, match="the system is not running"):
            alice.read("session:get", session_id=session)
        assert time.monotonic() - begun_s < ASK_TIMEOUT_S
        assert time.monotonic() - begun_s > _FAR_ALONE_S
        alice.tell("session:append", session_id=session, event="n", data={"n": 5})
        system.start()
        alice.flush(WAIT_S)
    assert noted(system, session) == [5]


def test_who_comes_while_nothing_runs_is_told_so(system: System, afar: Path) -> None:
    async def run() -> None:
        async with AsyncClient("alice", var=afar) as alice:
            with pytest.raises(NotRunning, match="tcp://"):
                await alice.ask("session:list", timeout_s=60.0)

    kill_all(system)
    try:
        asyncio.run(run())
    finally:
        system.start()


def test_a_client_at_rest_goes_on_hearing_of_attempts_to_connect(
    system: System, alice: Client, session: str
) -> None:
    kill_all(system)
    try:
        link = alice._caller.links["sessions"]
        until(lambda: link.failures > 8)
    finally:
        system.start()
    until(lambda: link.up)
    assert link.failures == 0


# Starting


def is_untouched(var: Path) -> bool:
    """Whether nothing runs on `var`, and nothing says that something does."""
    return holder(var) is None and not (var / "run" / "endpoints.json").exists()


def test_a_port_that_is_taken_is_named_and_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = free_ports()
    words = ["--var", str(tmp_path / "var"), "start", "--set", "transport.tcp_host=127.0.0.1"]
    words += ["--set", f"transport.tcp_port={first}"]
    with socket.create_server(("127.0.0.1", first + 1)):
        assert main(words) == Conflict.exit_code
    told = capsys.readouterr().err
    assert f"ksi: conflict: tcp://127.0.0.1:{first + 1} is taken" in told
    assert "ready" not in told
    until(lambda: is_untouched(tmp_path / "var"))  # its last words come before its end
    assert not list((tmp_path / "var").glob("db/*"))

    assert main(words) == 0  # the port is free again, and so is all that was tried
    assert main(["--var", str(tmp_path / "var"), "stop"]) == 0


@pytest.mark.parametrize("host", ["10.254.254.254", "no such host", "256.0.0.1", ":", "tcp://x"])
def test_a_host_that_is_none_of_this_machine_is_named_and_nothing_starts(
    tmp_path: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--var", str(tmp_path), "start", "--set", f"transport.tcp_host={host}"]

    assert main(words) == Invalid.exit_code
    told = capsys.readouterr().err
    assert host.strip(":") in told
    assert "transport.tcp_host" in told
    until(lambda: is_untouched(tmp_path))


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_refused_as_a_setting(
    tmp_path: Path, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--var", str(tmp_path), "start", "--set", f"transport.tcp_port={port}"]

    assert main(words) == Invalid.exit_code
    assert "transport.tcp_port" in capsys.readouterr().err
    until(lambda: is_untouched(tmp_path))


def test_what_is_found_free_is_free_for_its_owner() -> None:
    first = free_ports()
    wanted = {str(n): f"tcp://127.0.0.1:{first + n}" for n in range(PORTS)}
    for _ in range(20):
        assert require_free(wanted) == wanted
    assert require_free({"a": f"tcp://*:{first}"}) == {"a": f"tcp://0.0.0.0:{first}"}
    assert require_free({}) == {}


def test_a_var_directory_is_not_remote_and_a_carried_one_is(system: System, afar: Path) -> None:
    assert not is_remote(system.var)
    assert is_remote(afar)
