"""One connection of a client: what becomes of what could not be sent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ksi.transport.link import CROWDED_S, Link


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    """A link to an owner that is gone, which it has not been told yet."""
    context = zmq.Context()
    dealer, peer = context.socket(zmq.DEALER), context.socket(zmq.PAIR)
    dealer.immediate = True
    dealer.connect(f"ipc://{tmp_path}/nobody")
    peer.bind("inproc://monitor")
    monitor = context.socket(zmq.PAIR)
    monitor.connect("inproc://monitor")
    link = Link("sessions", dealer, monitor)
    link.up = True
    yield link
    context.destroy(linger=0)


def test_an_owner_that_takes_nothing_in_is_given_time(link: Link) -> None:
    link.window.add_command("session:append", b"", None)
    link.flush(1.0)

    assert not link.due(1.0 + CROWDED_S / 2)
    assert link.due(1.0 + CROWDED_S)


def test_its_successor_gets_what_waits_at_once(link: Link) -> None:
    link.window.add_command("session:append", b"", None)
    link.flush(1.0)

    link._changed("down", 1.01, [])
    link._changed("up", 1.02, [])
    assert link.due(1.02)
