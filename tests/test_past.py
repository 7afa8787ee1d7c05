"""States as they were: at any number of a journal, at a time, as far back as is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from checkpointing import made
from system import System

from ksi.actors import restoring
from ksi.actors.checkpoints import root_of
from ksi.actors.declarations.sessions import ListSessions
from ksi.actors.reading import reader_of
from ksi.console.main import main
from ksi.transport import Client
from ksi.transport.errors import Conflict, Invalid, NotFound

Then = dict[str, Any]


@pytest.fixture
def system(in_memory: Path) -> Iterator[System]:
    running = System(in_memory / "var")
    yield running
    running.end()


def number(system: System, owner: str) -> int:
    return reader_of(owner, system.var).committed().seq


def state(client: Client, at: int | str | None = None) -> Then:
    """Return what three owners answer, now or as of a number of the sessions' journal."""

    def read(query: str, **fields: Any) -> Any:
        return client.read(query, fields) if at is None else client.read_at(at, query, fields)

    return {"list": read("session:list"), "first": read("session:history", session_id="s0")}


def moments(system: System, client: Client, count: int, first: int = 0) -> dict[int, Then]:
    """Let things happen to sessions; return what was answered after each, by number."""
    seen = {}
    for n in range(first, first + count):
        client.ask("session:create", session_id=f"s{n}", title=f"number {n}")
        client.ask("session:append", session_id="s0", event="n", data={"n": n})
        if n % 3 == 1:
            client.ask("session:close", session_id=f"s{n}")
        with pytest.raises(Conflict):
            client.ask("session:create", session_id="s0")
        seen[number(system, "sessions")] = state(client)
    return seen


def test_a_state_is_read_as_it_was_at_any_number_from_whatever_copy_is_nearest(
    system: System,
) -> None:
    with system.client("alice") as alice:
        seen = moments(system, alice, 4)
        first = made(system)
        seen |= moments(system, alice, 4, 4)
        second = made(system)
        seen |= moments(system, alice, 4, 8)
        assert min(seen) < first.owners["sessions"].seq < second.owners["sessions"].seq < max(seen)

        assert {at: state(alice, at) for at in seen} == seen
        data = root_of(system.var) / second.id / "sessions" / "data.mdb"
        data.write_bytes(b"\0" * data.stat().st_size)
        system.stop()
        assert {at: state(alice, at) for at in seen} == seen
        assert alice.read_at(max(seen), ListSessions()) == alice.read(ListSessions())
        assert alice.read_at(0, "session:list")["sessions"] == []
        with pytest.raises(NotFound):
            alice.read_at(1, "session:get", session_id="s3")
    assert not list(system.var.glob("db/*/.past-*"))


def test_between_two_records_of_one_batch_a_state_is_as_of_the_first(system: System) -> None:
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="s")
        before = number(system, "sessions")
        for _ in range(50):
            alice.tell("session:append", session_id="s", event="n")
        alice.flush()
        seqs = [
            alice.read_at(before + n, "session:get", session_id="s")["seq"] for n in range(0, 51, 7)
        ]
    assert seqs == list(range(0, 51, 7))


def test_a_session_is_forked_from_what_it_was_at_a_time(system: System) -> None:
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="s")
        alice.ask("session:append", session_id="s", event="n", data={"n": 1})
        then = alice.read("session:history", session_id="s")["entries"][0]["timestamp"]
        time.sleep(0.01)  # The next entry has another time.
        alice.ask("session:append", session_id="s", event="n", data={"n": 2})
        forked = alice.ask(
            "session:fork", session_id="s", at=datetime.fromtimestamp(then, UTC).isoformat()
        )
        assert (forked["parent"], forked["parent_seq"]) == ("s", 1)
        now = datetime.now(UTC).isoformat()
        assert alice.ask("session:fork", session_id="s", at=now)["parent_seq"] == 2
        with pytest.raises(Invalid):
            alice.ask("session:fork", session_id="s", at="whenever")


def test_a_state_is_read_as_it_was_at_a_time_of_any_owner(system: System) -> None:
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="s")
        alice.ask("completion:async", session_id="s", prompt="x", request_id="r")
        time.sleep(0.01)  # The clock of batches and ours differ by less.
        then = datetime.now(UTC).isoformat()
        time.sleep(0.01)
        alice.ask("completion:cancel", request_id="r")
        made(system)
        alice.ask("session:create", session_id="later")

        assert alice.read("completion:status", request_id="r")["status"] == "cancelled"
        assert alice.read_at(then, "completion:status", request_id="r")["status"] == "queued"
        assert len(alice.read_at(then, "session:list")["sessions"]) == 1
        assert alice.read_at(then, "agent:list")["agents"] == alice.read("agent:list")["agents"]
        assert alice.read_at("1d", "session:list")["sessions"] == []
        now = datetime.now(UTC).isoformat()
        assert alice.read_at(now, "session:list") == alice.read("session:list")


def test_what_is_not_there_is_refused_and_said_from_where_on_there_is_something(
    system: System,
) -> None:
    with system.client("alice") as alice:
        moments(system, alice, 2)
        checkpoint_id = made(system).id
        last = number(system, "sessions")
        moments(system, alice, 2, 2)
        system.stop()
        restoring.run(system.var, checkpoint_id)
        assert len(alice.read_at(last, "session:list")["sessions"]) == 2
        for at in (last - 1, "1d"):
            with pytest.raises(NotFound, match="kept from") as refused:
                alice.read_at(at, "session:list")
            assert refused.value.details["seq"] == last
        with pytest.raises(NotFound, match=f"there is no number {last + 1}"):
            alice.read_at(last + 1, "session:list")
        with pytest.raises(Invalid, match="has no past"):
            alice.read_at(0, "index:status")
        with pytest.raises(Invalid, match="no time"):
            alice.read_at("yesterday", "session:list")
        with pytest.raises(Invalid, match="is a command"):
            alice.read_at(0, "session:create")


def test_the_command_line_reads_the_past(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    with system.client("alice") as alice:
        seen = moments(system, alice, 2)
    var = ("--var", str(system.var))
    for at, then in seen.items():
        assert main([*var, "read", "session:list", "--at", str(at)]) == 0
        assert json.loads(capsys.readouterr().out) == then["list"]
    words = ("--session-id", "s0", "--at", "1")  # of this operation a field, of its own journal
    assert main([*var, "read", "session:history", *words]) == 0
    assert json.loads(capsys.readouterr().out)["seq"] == 1
    assert main([*var, "read", "session:list", "--at", "999999"]) == NotFound.exit_code
    assert main([*var, "read", "system:status", "--at", "1"]) == Invalid.exit_code
