"""All owners in one process, on a clock that is drawn, over a network that loses, repeats and
reorders, and with processes that end at any time: seeded simulation.

Hosts, commit loops, outboxes and windows are the real ones. Each step lets one small thing happen:
a frame arrives, is lost or comes twice; an owner takes a turn, and may be killed before or behind
its commit, or before its answers leave; a client asks; a worker looks for grants; time passes. In
the end, when nothing goes wrong any more, all must come to rest, and what happened must be what
everybody was told. The seed is in the name of the test that fails.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from hosted import bound, events_in, follow, host_of
from workers import require_one_at_a_time

from ksi.actors import host as host_module
from ksi.actors import outbox as outbox_module
from ksi.actors.declarations.completion import GetGrants
from ksi.actors.outbox import Outbox
from ksi.actors.owners import OWNERS, load, load_all
from ksi.actors.testing import START, Twin
from ksi.transport.errors import KsiError
from ksi.transport.limits import TICK_S
from ksi.transport.mailbox import Letter, Post
from ksi.transport.message import CATALOGUE, encode, operation_of
from ksi.transport.window import Window

load_all()
AGENTS, WORKERS = 3, 2
STEPS = 600
LEASE_S = 5.0


class Killed(BaseException):
    """The process of an owner ends here."""


class Link:
    """A connection from somebody to an owner: frames on their way, in both directions.

    Stands in for the socket at the near end, and for the monitor of it.
    """

    def __init__(self, world: World, name: str, role: str, owner: str) -> None:
        self.world, self.name, self.role, self.owner = world, name, role, owner
        self.there: list[bytes] = []
        self.back: list[bytes] = []
        self.changes = ["up"]
        self.route = f"{name}>{owner}/{len(world.links)}".encode()
        world.links[self.route] = self

    def send(self, frame: bytes, _flags: int = 0) -> None:
        self.there.append(frame)

    def recv(self, _flags: int = 0) -> bytes:
        if not self.back:
            raise zmq.Again
        return self.back.pop(0)

    def read_changes(self) -> list[str]:
        changes, self.changes = self.changes, []
        return changes

    def breaks(self) -> None:
        """Both ends lose what is on its way, and are told."""
        arrived = self.world.processes[self.owner].come  # and not yet read: of a socket that ends
        arrived[:] = [each for each in arrived if each[0] != self.route]
        self.there.clear()
        self.back.clear()
        self.changes += ["down", "up"]

    def arrive(self) -> None:
        """The next frame to the owner arrives."""
        if self.there:
            self.world.processes[self.owner].come.append((self.route, self.there.pop(0)))


class Process:
    """An owner in its host; it can be killed, and is another one then."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.twin = Twin(load(name), world.chance.randrange(1 << 30))
        self.begin()

    def begin(self) -> None:
        """Start anew, with what is committed."""
        self.come: list[tuple[bytes, bytes]] = []
        self.is_silent = False
        self.twin.facts = self.world.fact
        self.outbox = Outbox(f"store of {self.name}", self._connect, self)
        self.host = host_of(self.twin, self, self.outbox, self)
        self.timeout_s, self.gone = 0.0, False
        for (owner, number), row in [*self.twin.store.tables["ksi.outbox"].range()]:
            self.host._push(owner, number, row.operation, row.body, again=True)

    def _connect(self, other: str) -> Any:
        link = Link(self.world, self.name, "owner", other)
        return link, link

    def sender_of(self, key: str) -> tuple[str, str]:
        link = self.world.links[key.encode()]
        return link.name, link.role

    def send(self, route: bytes, frame: bytes) -> bool:
        if route in self.world.links and not self.is_silent:
            self.world.links[route].back.append(frame)
        return route in self.world.links

    def ring(self) -> None: ...
    def watch(self, *_: Any) -> None: ...
    def warning(self, *_words: Any, **_fields: Any) -> None: ...

    def exception(self, event: str, **fields: Any) -> None:
        raise AssertionError(f"{event}: {fields}")

    def turn(self, dies: str = "") -> None:
        """Take what has come; be killed `before` or `behind` the commit, or before `answers`."""
        come, self.come = self.come, []
        letters = [Letter(route, route.decode(), frame, self.world.now_s) for route, frame in come]
        store, commit = self.twin.store, self.twin.store.commit

        def killed(*arguments: Any) -> None:
            if dies == "behind":
                commit(*arguments)
            raise Killed

        if dies in ("before", "behind"):
            store.commit = killed  # type: ignore[method-assign, assignment]  # for one turn
        self.is_silent = dies == "answers"
        try:
            self.host._turn(Post(letters))
        except Killed:
            pass
        finally:
            store.__dict__.pop("commit", None)
        if dies:
            self.kill()

    def kill(self) -> None:
        for link in self.world.links.values():
            if self.name in (link.owner, link.role == "owner" and link.name):
                link.breaks()
        self.world.links = {
            route: link
            for route, link in self.world.links.items()
            if not (link.role == "owner" and link.name == self.name)
        }
        if self.world.chance.random() < 0.3:
            self.twin.store.abort()
            self.twin = self.twin.recovered()
        else:
            self.twin.restart()
        self.begin()


class Peer:
    """A client with a window to each owner it asks."""

    def __init__(self, world: World, name: str, role: str) -> None:
        self.world, self.name, self.role = world, name, role
        self.windows: dict[str, tuple[Window, Link]] = {}
        self.settled: dict[str, Any] = {}  # by token: the reply or the refusal

    def ask(self, token: str, operation: str, **fields: Any) -> None:
        owner = CATALOGUE[operation].owner
        if owner not in self.windows:
            instance = self.world.chance.randbytes(16)
            self.windows[owner] = (
                Window(instance), Link(self.world, self.name, self.role, owner),
            )  # fmt: skip
        window = self.windows[owner][0]
        if not window.full():
            window.add_command(operation, encode(fields), None).future = token

    def turn(self) -> None:
        """Send and receive what can be."""
        for window, link in self.windows.values():
            for change in link.read_changes():
                if change == "up":
                    window.lost()
            while link.back:
                for pending, body, error in window.receive(link.back.pop(0), self.world.now_s):
                    assert pending.future not in self.settled, f"{pending.future} is settled twice"
                    self.settled[pending.future] = error or msgspec.msgpack.decode(body or b"")
            link.there += window.frames(self.world.now_s)

    def waits(self) -> bool:
        return any(window.waiting() for window, _ in self.windows.values())


class Agent(Peer):
    """Says things in its session, and asks for completions in any."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"agent-{number}", "agent")
        self.session = f"s{number}"
        self.count = 0
        self.ask("create", "session:create", session_id=self.session, admission="open")

    def act(self) -> None:
        self.count += 1
        token = f"{self.name}/{self.count}"
        match self.world.chance.choice("aaaccr"):
            case "a":
                entry = {"event": "note", "data": {"token": token}}
                self.ask(token, "session:append", session_id=self.session, **entry)
            case "c":
                session = f"s{self.world.chance.randrange(AGENTS)}"
                where = {"session_id": session, "prompt": "x", "run_s": 60.0}
                request_id = token.replace("/", ".")
                self.ask(token, "completion:async", request_id=request_id, **where)
            case _:
                self.ask(token, "agent:register", agent_id=self.name)


class Worker(Peer):
    """Reports what it is granted: at once, late, or never before its lease has lapsed."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"worker-{number}", "worker")
        self.count = 0
        self.known: set[tuple[str, int]] = set()

    def act(self, sleeps: float = 0.3) -> None:
        self.count += 1
        registered = [each for key, each in self.settled.items() if key.startswith("register")]
        epoch = registered[-1].get("epoch") if registered else None
        last = self.settled.get(f"renew-{self.count - 1}")
        if epoch is None or isinstance(last, KsiError):
            self.ask(f"register-{self.count}", "worker:register", lease_s=LEASE_S, slots=2)
            return
        self.ask(f"renew-{self.count}", "worker:renew", epoch=epoch)
        if self.world.chance.random() < sleeps:
            return
        for grant in self.world.answer("completion", GetGrants(worker=self.name)).grants:
            name = grant.request_id, grant.attempt
            if name not in self.known:
                self.known.add(name)
                done = {"result": {"response": "y"}, "attempt": grant.attempt}
                token = f"report {grant.request_id} {grant.attempt}"
                self.ask(token, "worker:report", request_id=grant.request_id, **done)


class World:
    """All there is, and the clock: monotonic, owner and wall time are drawn together."""

    def __init__(self, seed: int, patched: pytest.MonkeyPatch) -> None:
        self.chance = random.Random(seed)
        self.now_s = 100.0
        self.links: dict[bytes, Link] = {}
        clock = SimpleNamespace(monotonic=lambda: self.now_s, time=lambda: START + self.now_s)
        patched.setattr(host_module, "time", clock)
        patched.setattr(outbox_module, "read_monitor", lambda link: link.read_changes())
        self.processes: dict[str, Process] = {}
        for name in OWNERS:
            self.processes[name] = Process(self, name)
        self.agents = [Agent(self, number) for number in range(AGENTS)]
        self.workers = [Worker(self, number) for number in range(WORKERS)]
        self.peers: list[Peer] = [*self.agents, *self.workers]
        self.happened: Counter[str] = Counter()

    def answer(self, owner: str, query: Any) -> Any:
        twin = self.processes[owner].twin
        follow(twin)
        return twin.owner.answer(query, bound(twin))

    def fact(self, query: Any) -> Any:
        """Answer from the state of another owner, as it is now."""
        try:
            return self.answer(operation_of(query).owner, query)
        except KsiError as error:
            return error

    def step(self) -> None:
        chance = self.chance
        what = chance.choice("aaawwppppnnnnnnnnttttttttkkddbbxxs")
        self.happened[what] += 1
        process = self.processes[chance.choice(OWNERS)]
        match what:
            case "a":
                chance.choice(self.agents).act()
            case "w":
                chance.choice(self.workers).act()
            case "p":
                chance.choice(self.peers).turn()
            case "n":
                for link in [*self.links.values()]:
                    link.arrive()
            case "t":
                process.turn()
            case "k":
                process.kill()
            case "d":
                process.turn(chance.choice(("before", "behind", "answers")))
            case "b":
                chance.choice([*self.links.values()]).breaks()
            case "x":
                self.disturb(chance.choice([*self.links.values()]))
            case _:
                self.now_s += chance.choice((0.01, TICK_S, 1.0, LEASE_S))

    def disturb(self, link: Link) -> None:
        """Lose a frame silently, repeat it, or let it overtake."""
        way = self.chance.choice((link.there, link.back))
        if not way:
            return
        at = self.chance.randrange(len(way))
        match self.chance.choice("lrro"):
            case "l":
                way.pop(at)
            case "r":
                way.insert(self.chance.randint(at, len(way)), way[at])
            case _:
                way.insert(self.chance.randrange(len(way)), way.pop(at))

    def come_to_rest(self) -> None:
        """Let nothing go wrong any more: all that was asked must be settled, and nothing waits."""
        for link in self.links.values():
            link.changes.append("up")
        for _ in range(3000):
            self.now_s += TICK_S
            for worker in self.workers:
                if not worker.waits():
                    worker.act(sleeps=0.0)
            for peer in self.peers:
                peer.turn()
            for _ in range(4):
                for link in [*self.links.values()]:
                    link.arrive()
            for process in self.processes.values():
                process.turn()
            if not any(self.unrest()):
                return
        raise AssertionError(f"no rest: {[*self.unrest()]}")

    def unrest(self) -> Iterator[str]:
        """Yield what is still under way."""
        yield from (f"{agent.name} waits" for agent in self.agents if agent.waits())
        for name, process in self.processes.items():
            if process.twin.store.tables["ksi.outbox"].count():
                yield f"the outbox of {name}"
        completion = self.processes["completion"].twin.store.tables
        for key, row in completion["requests"].range():
            if row.status in ("queued", "active"):
                yield f"{key} is {row.status}"


def require_as_told(world: World) -> None:
    """Check that what everybody was told is what happened, once and in order."""
    twins = {name: process.twin for name, process in world.processes.items()}
    for name, twin in twins.items():
        assert twin.errors == []
        replayed, live = twin.recovered().store.rows(), twin.store.rows()
        for rows in (replayed, live):  # Replay does not see what was acknowledged.
            rows["ksi.clients"] = dict.fromkeys(rows["ksi.clients"], b"")
        assert replayed == live, f"the journal of {name} gives another state"
        follow(twin)
    completed = require_one_at_a_time([*events_in(twins["completion"])])
    logs = {
        session: [msgspec.json.decode(line) for line in content.splitlines()]
        for session, content in twins["sessions"].log.content.items()
    }
    told = Counter(
        (each["event"], each["correlation_id"])
        for entries in logs.values()
        for each in entries
        if each["event"] != "note"
    )
    expected = [
        (f"completion:{what}", each) for what in ("request", "result") for each in completed
    ]
    requests = twins["completion"].store.tables["requests"].range()
    for given_up in (key for key, row in requests if row.status == "failed"):
        expected += [("completion:request", given_up), ("completion:failed", given_up)]
    assert told == Counter(expected)
    for agent in world.agents:
        entries = logs[agent.session]
        numbers = [each["metadata"]["seq"] for each in entries]
        assert numbers == list(range(1, len(entries) + 1))
        said = [each["data"]["token"] for each in entries if each["event"] == "note"]
        noted = [
            token
            for token, reply in agent.settled.items()
            if not isinstance(reply, KsiError) and "seq" in reply
        ]
        assert said == sorted(noted, key=lambda token: int(token.split("/")[1]))
        for token in noted:
            assert entries[agent.settled[token]["seq"] - 1]["data"]["token"] == token


def simulate(seed: int, patched: pytest.MonkeyPatch) -> World:
    world = World(seed, patched)
    for _ in range(STEPS):
        world.step()
    world.come_to_rest()
    require_as_told(world)
    return world


@pytest.mark.parametrize("seed", range(12))
def test_all_owners_together_do_what_everybody_was_told(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = simulate(seed, monkeypatch)
    assert sum(len(agent.settled) for agent in world.agents) > 10


@pytest.mark.soak
def test_two_thousand_worlds_do_what_everybody_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: Counter[str] = Counter()
    settled = 0
    for seed in range(1000, 3000):
        try:
            world = simulate(seed, monkeypatch)
        except BaseException:
            print(f"the seed is {seed}")
            raise
        happened += world.happened
        settled += sum(len(peer.settled) for peer in world.peers)
    kills = happened["k"] + happened["d"]
    print(f"2000 worlds of {STEPS} steps: {settled} commands settled, {kills} owners killed")
