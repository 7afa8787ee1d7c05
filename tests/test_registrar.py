"""What the registry cannot be told yet is kept within bounds, and the latest of it is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from ksi.actors.supervision.registrar import Registrar
from ksi.transport.identity import KeyRing
from ksi.transport.limits import WINDOW_COMMANDS_MAX
from ksi.transport.mailbox import connect


@pytest.fixture
def registrar(tmp_path: Path) -> Iterator[Registrar]:
    """A registrar whose registry is nowhere."""
    context: zmq.Context[Any] = zmq.Context()
    certificate = KeyRing(tmp_path).enroll("supervisor", "owner")
    sockets = connect(context, f"ipc://{tmp_path}/registry", certificate.public, certificate)
    registrar = Registrar(*sockets, lambda: [], None)
    yield registrar
    registrar.close()
    context.term()


def test_reports_beyond_the_window_are_the_latest_of_each_agent(registrar: Registrar) -> None:
    for number in range(5 * WINDOW_COMMANDS_MAX):
        agent_id = f"agent-{number % 7}"
        registrar.report(agent_id, "started", pid=number, exit=None, again=False)
        registrar.turn(float(number))

    waiting = registrar._waiting
    assert len(registrar._link.window.commands) == WINDOW_COMMANDS_MAX
    assert sorted(waiting) == [f"agent-{number}" for number in range(7)]
    last = range(5 * WINDOW_COMMANDS_MAX - 7, 5 * WINDOW_COMMANDS_MAX)
    assert sorted(fields["pid"] for fields in waiting.values()) == list(last)


def test_the_first_it_tells_is_the_muster(registrar: Registrar) -> None:
    registrar.report("alice", "started", pid=1, exit=None, again=False)

    told = [pending.operation for pending in registrar._link.window.commands.values()]
    assert told == ["agent:muster", "agent:report"]
