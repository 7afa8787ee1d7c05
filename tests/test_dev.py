"""`ksi dev` on a copy of the sources that the tests edit: real processes, real files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from trouble import until

from ksi.actors.supervision.lock import holder
from ksi.console.dev import development_var
from ksi.transport import Client

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDERS: Final = ("actors", "adapters", "console", "storage", "transport")
PREFIX: Final = 'f"sess_{'  # of the ids of sessions: what an edit changes for all to see


class Dev:
    """A running `ksi dev` and its sources."""

    def __init__(self, place: Path) -> None:
        self.sources = place / "code" / "ksi"
        self.var = place / "var-dev"
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, self.sources / folder)
        self.place = place
        self.edited = self.sources / "actors" / "owners" / "sessions.py"
        self.original = self.edited.read_text()
        self.process = self.run()

    def run(self) -> subprocess.Popen[str]:
        """Start `ksi dev` beside the directory `var`."""
        usual = {name: value for name, value in os.environ.items() if not name.startswith("KSI_")}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "ksi.console", "dev", "--json"],
            env={**usual, "KSI_VAR": "var", "PYTHONPATH": str(self.place / "code")},
            cwd=self.place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self, event: str) -> dict[str, Any]:
        """Return the next event of this name that it tells."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said: dict[str, Any] = json.loads(line)
            assert said["schema"] == "ksi.dev/1"
            if said["event"] == event:
                return said
        raise AssertionError(self.process.stderr and self.process.stderr.read())

    def edit(self, prefix: str) -> None:
        """Have sessions get ids with this prefix, as an editor saves a file."""
        fresh = self.edited.with_suffix(".new")
        fresh.write_text(self.original.replace(PREFIX, f'f"{prefix}_{{'))
        fresh.replace(self.edited)

    def client(self, name: str) -> Client:
        return Client(name, var=self.var)

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Dev]:
    dev = Dev(tmp_path)
    try:
        yield dev
    finally:
        dev.end()


class Writer(threading.Thread):
    """Appends to a session of its own for as long as it is told to, one entry after another."""

    def __init__(self, dev: Dev) -> None:
        super().__init__()
        self.done = threading.Event()
        self.seqs: list[int] = []
        self._dev = dev

    def has_written(self, count: int) -> bool:
        return len(self.seqs) >= count

    def run(self) -> None:
        with self._dev.client("writer") as client:
            client.ask("session:create", session_id="written")
            while not self.done.is_set():
                ack = client.ask(
                    "session:append", session_id="written", event="note", timeout_s=30.0
                )
                self.seqs.append(ack["seq"])
                time.sleep(0.001)  # It shares two cores with what it watches.


@contextlib.contextmanager
def writing(dev: Dev) -> Iterator[Writer]:
    writer = Writer(dev)
    writer.start()
    try:
        yield writer
    finally:
        writer.done.set()
        writer.join()


@pytest.mark.parametrize("edits", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_each_of_many_edits_in_a_row_is_answered_by_fresh_code_and_clients_lose_nothing(
    dev: Dev, edits: int
) -> None:
    pids, spent_s = [dev.said("ready")["pid"]], list[float]()
    with dev.client("asking") as client, writing(dev) as writer:
        client.ask("session:create", session_id="asked")
        for number in range(edits):
            client.ask("completion:async", session_id="asked", prompt="x", request_id=f"r{number}")
            before = len(writer.seqs)
            began_s = time.monotonic()
            dev.edit(f"edit{number}")
            pids.append(dev.said("ready")["pid"])
            made = client.ask("session:create", timeout_s=30.0)["session_id"]
            spent_s.append(time.monotonic() - began_s)
            assert made.startswith(f"edit{number}_")
            until(partial(writer.has_written, before + 2))
        queued = client.read("completion:list")["requests"]
    slowest_s, median_s = max(spent_s), sorted(spent_s)[edits // 2]
    print(f"{edits} edits, fresh code answered after {median_s:.2f} s, {slowest_s:.2f} at most")

    assert len(set(pids)) == edits + 1
    assert writer.seqs == [*range(1, len(writer.seqs) + 1)]
    assert [each["request_id"] for each in queued] == [f"r{number}" for number in range(edits)]


@pytest.mark.parametrize(
    ("line", "why"), [("def broken(:", "SyntaxError"), ("no_such_name", "NameError")]
)
def test_code_that_cannot_be_loaded_is_told_with_its_place_and_the_old_code_goes_on(
    dev: Dev, line: str, why: str
) -> None:
    ready = dev.said("ready")
    broken = dev.sources / "storage" / "journal.py"
    whole = broken.read_text()
    broken.write_text(f"{whole}\n{line}\n")
    refused = dev.said("refused")

    place = f"{broken}:{len(whole.splitlines()) + 2}: {why}"
    assert refused["text"].startswith(place)
    assert refused["serving"] is True
    held = holder(dev.var)
    assert held is not None
    assert held.pid == ready["pid"]
    with dev.client("asking") as client:
        assert client.ask("session:create")["session_id"].startswith("sess_")
    broken.write_text(whole)
    assert dev.said("ready")["pid"] != ready["pid"]


def test_the_state_of_development_is_its_own(dev: Dev) -> None:
    dev.said("ready")

    assert (dev.var / "FORMAT").exists()
    assert not (dev.place / "var").exists()
    assert development_var(dev.place / "var") == dev.var == development_var(dev.var)


def test_nothing_of_it_outlives_its_parent_however_that_ends(dev: Dev) -> None:
    supervisor = psutil.Process(dev.said("ready")["pid"])
    everybody = [supervisor, *supervisor.children(recursive=True)]
    dev.process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(everybody, timeout=10)

    assert alive == []
    assert len(everybody) > 5


def test_it_stops_the_system_in_order_when_it_is_told_to_end(dev: Dev) -> None:
    dev.said("ready")
    dev.process.send_signal(signal.SIGINT)

    assert dev.process.wait(20) == 0
    assert holder(dev.var) is None
    words = (dev.var / "logs" / "ksi" / "supervisor.jsonl").read_text().splitlines()[-1]
    assert json.loads(words)["event"] == "stopped"


def test_a_system_that_has_ended_by_itself_is_told_of_and_runs_again_after_a_change(
    dev: Dev,
) -> None:
    os.kill(dev.said("ready")["pid"], signal.SIGKILL)
    assert dev.said("ended")["exit_code"] == -signal.SIGKILL
    dev.edit("again")
    dev.said("ready")

    with dev.client("asking") as client:
        assert client.ask("session:create")["session_id"].startswith("again_")


def test_a_directory_is_developed_on_by_one_at_a_time(dev: Dev) -> None:
    dev.said("ready")
    out, err = (second := dev.run()).communicate(timeout=20)

    assert second.returncode == 5
    assert err.startswith("ksi: conflict: ")
    assert "ready" not in [json.loads(line).get("event") for line in out.splitlines()]
