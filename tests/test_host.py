"""The host as a process of its own, without a supervisor."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from ksi.actors.stat import Stat, read_stat
from ksi.transport import wire
from ksi.transport.identity import Address, Directory, KeyRing, endpoint, make_run_directory
from ksi.transport.mailbox import connect, read_monitor

PATIENCE_S = 10.0  # A test that waits longer has failed.
LATE = """
import sys
from ksi.actors import host, process
host.TICK_S = 3600.0  # Nothing lets time pass while the test looks.
process.run_owner("registry", sys.argv[1])
"""


GATED = """
import sys, time
from pathlib import Path
from ksi.actors import process
open_store = process.open_store
def gated(*arguments, **more):
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.005)  # A poll: until the gate opens.
    return open_store(*arguments, **more)
process.open_store = gated
process.run_owner("registry", sys.argv[1])
"""


@contextmanager
def owner(code: str, var: Path) -> Iterator[Callable[[], Stat | None]]:
    """Run the registry by this code; yields what reads its word of itself."""
    path = make_run_directory(var) / "registry.stat"
    key = KeyRing(var).enroll("registry", "owner").public.decode()
    place = Address(endpoint(var, "registry"), key)
    Directory({}, {}, {}, {"registry": place}).write(var)
    process = subprocess.Popen([sys.executable, "-P", "-c", code, str(var)])

    def stat() -> Stat | None:
        assert process.poll() is None
        return read_stat(path)

    try:
        yield stat
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)  # A poll with a deadline.


def test_an_owner_says_that_it_runs_before_anything_happens(tmp_path: Path) -> None:
    with owner(LATE, tmp_path) as stat:
        until(lambda: (now := stat()) is not None and now.state == "running")
        assert (now := stat()) is not None
        assert now.store_id


def test_who_connects_while_the_store_is_opened_is_answered_once_it_is_open(tmp_path: Path) -> None:
    path, context = tmp_path / "run" / "registry", zmq.Context[zmq.Socket[bytes]]()
    with owner(GATED, tmp_path) as stat, context:
        until(path.exists)
        key = Directory.read(tmp_path).owners["registry"].key
        certificate = KeyRing(tmp_path).enroll("alice")
        dealer, monitor = connect(context, f"ipc://{path}", key.encode(), certificate)
        with dealer, monitor:
            assert monitor.poll(200) == 0, "who is not open yet has admitted somebody"
            assert (now := stat()) is not None
            assert now.state == "starting"
            (tmp_path / "go").touch()
            until(lambda: "up" in read_monitor(monitor))
            dealer.send(
                wire.encode(
                    wire.Frame(wire.VERSION, wire.Kind.HELLO, "", 0, b"i" * 16, 0, False, [])
                )
            )
            assert dealer.poll(int(PATIENCE_S * 1000))
            dealer.disable_monitor()
