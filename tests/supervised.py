"""Children for tests of the supervisor, small and obedient.

What they are is in the variable `SUPERVISED`: `{"strategy": …, "children": [{"name": …}, …]}`,
each with the fields of a child spec and `"role"`, a function below. They say what they do in
`var/trace`, and obey signals: SIGUSR1 ends them with exit 0, SIGUSR2 with exit 3, SIGALRM makes
them hang, SIGPROF makes them hang in a commit.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import zmq

import ksi.actors.supervision.system  # noqa: F401 - declares what the supervisor can be asked
from ksi.actors.config import Config
from ksi.actors.stat import StatWriter
from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.child import Kind as ChildKind
from ksi.actors.supervision.tree import Tree
from ksi.transport import wire
from ksi.transport.identity import KeyRing, endpoint, run_directory
from ksi.transport.mailbox import Mailbox
from ksi.transport.wire import Kind


def tree() -> Tree:
    described = json.loads(os.environ["SUPERVISED"])

    def specs(var: Path, settings: Config) -> tuple[ChildSpec, ...]:
        limits = {
            "start_s": settings.supervisor.start_s,
            "shutdown_s": settings.supervisor.shutdown_s,
        }
        return tuple(_spec(var, limits | child) for child in described["children"])

    by_phase = described.get("by_phase", False)
    return Tree(specs, described.get("strategy", "one_for_one"), by_phase=by_phase)


def _spec(var: Path, child: dict[str, Any]) -> ChildSpec:
    role = child.pop("role", "steady")
    kind: ChildKind = "owner" if role == "answering" else "follower"
    arguments = (child["name"], str(var))
    return ChildSpec(kind=kind, function=f"supervised:{role}", arguments=arguments, **child)


class Obedient:
    """The loop of a child: turns, and what its signals ask for."""

    def __init__(self, name: str, var: str) -> None:
        self.name, self.var = name, Path(var)
        self.ending: int | None = None
        self.hanging = ""
        signal.signal(signal.SIGTERM, lambda *_: self.end(0))
        signal.signal(signal.SIGUSR1, lambda *_: self.end(0))
        signal.signal(signal.SIGUSR2, lambda *_: self.end(3))
        signal.signal(signal.SIGALRM, lambda *_: self.hang("turn"))
        signal.signal(signal.SIGPROF, lambda *_: self.hang("commit"))
        self.stat = StatWriter(run_directory(self.var) / f"{name}.stat")
        self.say("start")

    def say(self, what: str) -> None:
        line = f"{what} {self.name} {os.getpid()} {time.monotonic()}\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        trace = os.open(self.var / "trace", flags, 0o600)
        os.write(trace, line.encode())
        os.close(trace)

    def end(self, code: int) -> None:
        self.ending = code

    def hang(self, how: str) -> None:
        self.hanging = how

    def turn(self) -> None:
        if self.hanging == "commit":
            self.stat.committing(time.monotonic())
        while self.hanging:
            time.sleep(1)  # This is how it hangs.
        self.stat.end_turn(time.monotonic())

    def run(self, wait: Any = time.sleep) -> NoReturn:
        self.stat.state = "running"
        self.say("ready")
        while self.ending is None:
            self.turn()
            wait(0.02)
        self.say("stop")
        sys.exit(self.ending)


def steady(name: str, var: str) -> None:
    """Run until told otherwise."""
    Obedient(name, var).run()


def slow(name: str, var: str) -> None:
    """Take a while to be ready."""
    child = Obedient(name, var)
    time.sleep(0.3)  # This is how it is slow.
    child.run()


def gated(name: str, var: str) -> None:
    """Be ready when `var/<name>.go` is there."""
    child = Obedient(name, var)
    while not (child.var / f"{name}.go").exists() and child.ending is None:
        child.stat.end_turn(time.monotonic())
        time.sleep(0.005)  # A poll: until the gate opens.
    child.run()


def silent(name: str, var: str) -> None:
    """Never be ready."""
    Obedient(name, var)
    time.sleep(60)  # until it is ended


def broken(_name: str, _var: str) -> None:
    """Fail at once, with words."""
    raise OSError("the disk is on fire")


def fading(name: str, var: str) -> None:
    """Be ready the first time, fail at once every further time."""
    if (Path(var) / f"{name}.once").exists():
        raise OSError("not again")
    (Path(var) / f"{name}.once").touch()
    steady(name, var)


def stubborn(name: str, var: str) -> None:
    """Ignore SIGTERM."""
    child = Obedient(name, var)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child.run()


def answering(name: str, var: str) -> None:
    """Be an owner as far as the supervisor goes, but answer only a while after saying `running`.

    What it is commanded goes into the trace: the operation and its fields as JSON, joined by `|`.
    Its store is what `var/<name>.store` says, if there is one.
    """
    child = Obedient(name, var)
    child.stat.state = "running"
    child.stat.end_turn(time.monotonic())
    time.sleep(0.2)  # This is the while.
    said = Path(var) / f"{name}.store"
    store = said.read_text() if said.exists() else "first"
    keys = KeyRing(Path(var))
    certificate = keys.load(name)
    assert certificate is not None
    mailbox = Mailbox(zmq.Context(), endpoint(Path(var), name), certificate, keys)

    def answer(payload: bytes) -> tuple[Kind, list[Any]]:
        frame = msgspec.msgpack.decode(payload, type=wire.Frame)
        if frame.kind == Kind.HELLO:
            child.say("hello")
            return Kind.WELCOME, [wire.Welcome(name, os.getpid(), 1, 1, 1, 1)]
        answers = []
        for request in msgspec.convert(frame.items, list[wire.Request]):
            fields = msgspec.json.encode(msgspec.msgpack.decode(request.body)).decode()
            child.say(f"{request.operation}|{fields}".replace(" ", "_"))
            answers.append(wire.Answer(request.number, msgspec.msgpack.encode({})))
        return Kind.REPLIES, answers

    def serve(_s: float) -> None:
        mailbox.timeout_s = 0.02
        for letter in getattr(mailbox.get().message, "letters", ()):
            kind, items = answer(letter.payload)
            frame = wire.OwnerFrame(wire.VERSION, kind, store, 0, items)
            mailbox.send(letter.route, wire.encode(frame))

    child.run(serve)
