"""Effectively once, in order, whatever happens between a client and an owner: seeded simulation.

The real window, the real commit loop and an owner in memory; the network, the processes' ends and
time are drawn from a seed, which is in the name of the test that fails.
"""

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from ksi.actors.commit import Work
from ksi.actors.delivery import EVICTED, GOODBYE, Record
from ksi.actors.owner import Sender
from ksi.actors.owners.sessions import OWNER
from ksi.actors.testing import Twin
from ksi.transport import wire
from ksi.transport.errors import Evicted, Expired, KsiError, NotFound, StorageFull
from ksi.transport.message import encode
from ksi.transport.window import Pending, Window
from ksi.transport.wire import Kind

CLIENTS = 3
STEPS = 250
SESSION = "s"


class Client:
    """A client instance and its connection: frames on their way there and back."""

    def __init__(self, number: int) -> None:
        self.sender = Sender(f"client-{number}", "agent")
        self.window = Window(bytes([number]) * 16)
        self.there: list[bytes] = []
        self.back: list[bytes] = []
        self.issued: list[str] = []  # tokens, in the order of their commands
        self.outcomes: dict[str, dict[str, Any] | KsiError] = {}

    def ask(self, session_id: str, deadline_s: float | None) -> None:
        token = f"{self.sender.name}/{len(self.issued)}"
        self.issued.append(token)
        fields = {"session_id": session_id, "event": "note", "data": {"token": token}}
        pending = self.window.add_command("session:contribute", encode(fields), deadline_s)
        pending.future = token

    def receive(self, frame: bytes, now_s: float) -> None:
        for pending, body, error in self.window.receive(frame, now_s):
            self._settle(pending, error or msgspec.msgpack.decode(body or b""))

    def _settle(self, pending: Pending, outcome: Any) -> None:
        assert pending.future not in self.outcomes, f"{pending.future} is settled twice"
        self.outcomes[pending.future] = outcome


class World:
    """Clients, an owner, and all that can go wrong between them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.owner = Twin(OWNER, seed)
        self.owner.ask(Sender("op", "operator"), "session:create", session_id=SESSION)
        self.clients = [Client(number) for number in range(CLIENTS)]
        self.mailbox: list[Work] = []
        self.now_s = 0.0

    def flush(self, client: Client) -> None:
        client.there += client.window.frames(self.now_s)

    def arrive(self, client: Client, frame: bytes) -> None:
        """A frame arrives at the owner: its requests wait in the mailbox."""
        decoded = msgspec.msgpack.decode(frame, type=wire.CommandsFrame)
        for request in decoded.items:
            left_ms = request.remaining_ms
            expires_s = None if left_ms is None else self.now_s + left_ms / 1000
            route = client.sender.name.encode()
            how = (decoded.instance, decoded.acked, decoded.again, request, expires_s)
            self.mailbox.append(Work(route, client.sender, *how))

    def turn(self, *, ours: list[Record[Any]] | None = None, answers_arrive: bool = True) -> None:
        """The owner carries out a batch and answers, one frame a connection and kind."""
        count = self.chance.randint(1, 8)
        batch, self.mailbox = self.mailbox[:count], self.mailbox[count:]
        self.owner.time_s = self.now_s
        frames: dict[tuple[bytes, Kind], list[Any]] = {}
        for route, kind, answer in self.owner.run(batch, ours or []).answers:
            frames.setdefault((route, kind), []).append(answer)
        for (route, kind), items in frames.items():
            (client,) = (each for each in self.clients if each.sender.name.encode() == route)
            if answers_arrive:
                client.back.append(wire.encode(wire.OwnerFrame(1, kind, "store", 0, items)))

    def kill(self) -> None:
        """The owner dies; another takes its place, from the journal or from its tables."""
        self.mailbox.clear()
        if self.chance.random() < 0.5:
            self.owner = self.owner.recovered()
        else:
            self.owner.restart()

    def ask(self, client: Client) -> None:
        session_id = SESSION if self.chance.random() < 0.9 else "ghost"
        left_s = self.chance.choice((None, None, None, 0.0, 0.3, 2.0))
        client.ask(session_id, None if left_s is None else self.now_s + left_s)

    def common_step(self, client: Client) -> None:
        """One of the things that happen in any world."""
        match self.chance.choice("aaafftttkdsp"):
            case "a":
                self.ask(client)
            case "f":
                self.flush(client)
            case "t":
                self.turn()
            case "k":
                self.kill()
            case "d":  # it dies after the commit and before the answers
                self.turn(answers_arrive=False)
                self.kill()
            case "s":
                self.owner.store.fails = StorageFull("no room")
                self.turn()
                self.owner.store.fails = None
            case "p":
                self.now_s += self.chance.choice((0.001, 0.02, 0.5))

    def unordered_step(self, client: Client) -> None:
        """A network that loses, repeats and reorders frames, and says nothing."""
        way = self.chance.choice((client.there, client.back))
        if way:
            at = self.chance.choice((0, 0, self.chance.randrange(len(way))))
            fate = self.chance.random()
            frame = way[at] if fate < 0.1 else way.pop(at)
            if fate < 0.85:
                self.deliver(client, way, frame)
        if self.chance.random() < 0.05:
            client.window.lost()

    def connected_step(self, client: Client) -> None:
        """A connection as ZeroMQ has it: in order, and when it breaks, both ends lose frames."""
        way = self.chance.choice((client.there, client.back))
        if self.chance.random() < 0.05:
            client.there.clear()
            client.back = client.back[: self.chance.randint(0, 2)]  # received, and not yet read
            client.window.lost()
        elif way:
            self.deliver(client, way, way.pop(0))

    def deliver(self, client: Client, way: list[bytes], frame: bytes) -> None:
        if way is client.there:
            self.arrive(client, frame)
        else:
            client.receive(frame, self.now_s)

    def settle(self) -> None:
        """Let nothing go wrong any more: after one more reconnect all must be settled."""
        for client in self.clients:
            client.window.lost()
        for _ in range(STEPS):
            self.now_s += 0.1
            for client in self.clients:
                for way in (client.back, client.there):
                    while way:
                        self.deliver(client, way, way.pop(0))
                self.flush(client)
            while self.mailbox:
                self.turn()
            if not any(client.window.waiting() for client in self.clients):
                return
        waiting = {each.sender.name: [*each.window.commands] for each in self.clients}
        raise AssertionError(f"never answered: {waiting}")

    def said(self) -> list[str]:
        """Return the tokens in the session, in order."""
        content = self.owner.log.content.get(SESSION, b"")
        lines = [msgspec.json.decode(line) for line in content.splitlines()]
        return [line["data"]["token"] for line in lines]


def require_effectively_once(world: World) -> None:
    """Check that what was answered is what happened, once, in the order it was asked."""
    said = world.said()
    repeated = [token for token, count in Counter(said).items() if count > 1]
    assert not repeated, f"happened more than once: {repeated}"
    for client in world.clients:
        assert client.outcomes.keys() == {*client.issued}
        happened = [token for token in said if token in client.outcomes]
        assert happened == [token for token in client.issued if token in {*happened}]
        for token, outcome in client.outcomes.items():
            if isinstance(outcome, dict):
                assert said[outcome["seq"] - 1] == token
            elif isinstance(outcome, Evicted):
                continue  # whether it happened is not known
            else:
                assert isinstance(outcome, NotFound | Expired)
                assert token not in happened, f"refused and yet it happened: {token}"


@pytest.mark.parametrize("seed", range(150))
def test_commands_happen_once_and_in_order_over_a_network_that_loses_repeats_and_reorders(
    seed: int,
) -> None:
    world = World(seed)
    for _ in range(STEPS):
        client = world.chance.choice(world.clients)
        world.chance.choice((world.common_step, world.unordered_step))(client)
    world.settle()
    require_effectively_once(world)
    done = sum(len(client.outcomes) for client in world.clients)
    assert done > 0
    goodbyes = [
        Record[Any](client.sender.name, client.window.instance, 0, GOODBYE, b"", [], [])
        for client in world.clients
    ]
    world.turn(ours=goodbyes)
    rows = world.owner.store.tables["ksi.clients"]
    assert [key[0] for key, _ in rows.range()] == ["op"]


@pytest.mark.parametrize("seed", range(150))
def test_a_client_that_was_forgotten_never_has_a_command_carried_out_twice(seed: int) -> None:
    world = World(seed)
    for _ in range(STEPS):
        client = world.chance.choice(world.clients)
        world.chance.choice((world.common_step, world.connected_step))(client)
        if world.chance.random() < 0.02:
            record = Record[Any](
                client.sender.name, client.window.instance, 0, EVICTED, b"", [], []
            )
            world.turn(ours=[record])
    world.settle()
    require_effectively_once(world)
