"""`ksi doctor`: what it finds, what it mends, while the system runs and with everything stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lmdb
import pytest
from system import System
from trouble import until

from ksi.actors.checkup import Check, Checkup
from ksi.console.main import main
from ksi.storage.examination import examine, lock_holder
from ksi.storage.journal import segment_path
from ksi.storage.store import read_current
from ksi.transport import Client
from ksi.transport.errors import KsiError


@pytest.fixture
def said(system: System) -> System:
    """A system in which something was said in two sessions, and the index knows of it."""
    with system.client("alice") as alice:
        for session_id in ("plan", "talk"):
            alice.ask("session:create", session_id=session_id)
            for number in range(20):
                alice.ask("session:append", session_id=session_id, event="note", data={"n": number})
        until(lambda: has_indexed(alice))
    return system


def has_indexed(client: Client) -> bool:
    try:
        return len(client.read("index:query", event_type="note")["entries"]) == 40
    except KsiError:  # There is nothing to read from yet.
        return False


@pytest.fixture
def stopped(said: System) -> System:
    """The same, stopped in order."""
    said.stop()
    return said


def checked(system: System, *, repair: bool = False) -> dict[str, Check]:
    def ask(operation: str, **fields: Any) -> dict[str, Any]:
        with system.client("operator", role="operator") as operator:
            return operator.ask(operation, fields)

    return {each.name: each for each in Checkup(system.var, ask=ask).run(repair=repair)}


def wrong(system: System, *, repair: bool = False) -> dict[str, str]:
    """Return the text of the first finding of each check that found something wrong."""
    checks = checked(system, repair=repair)
    return {name: c.findings[0].text for name, c in checks.items() if c.state == "wrong"}


def store(system: System, owner: str) -> Path:
    found = read_current(system.var / "db" / owner)
    assert found is not None
    return system.var / "db" / owner / found


def test_a_system_that_is_well_is_well_running_stopped_and_killed(said: System) -> None:
    assert wrong(said) == {}
    said.kill("sessions")
    assert wrong(said) == {}
    said.stop()
    assert wrong(said) == {}


def test_a_directory_where_nothing_has_ever_run_is_well_and_stays_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--var", str(tmp_path / "var"), "doctor", "--repair"]) == 0
    assert "nothing has ever run here" in capsys.readouterr().out
    assert not (tmp_path / "var").exists()


def test_the_exit_code_and_the_json_say_whether_something_is_wrong(
    stopped: System, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--var", str(stopped.var), "--json", "doctor"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["healthy"], found["running"]) == ("ksi.doctor/1", True, False)
    (stopped.var / "keys" / "alice.key_secret").chmod(0o644)

    assert main(words) == 1
    found = json.loads(capsys.readouterr().out)
    (check,) = [each for each in found["checks"] if each["state"] != "ok"]
    assert check["name"] == "permissions"
    assert check["findings"][0]["command"].startswith("chmod go= ")
    assert main(["--var", str(stopped.var), "doctor"]) == 1
    assert "wrong     permissions" in capsys.readouterr().out


def test_what_others_could_read_is_closed_to_them(stopped: System) -> None:
    secret = stopped.var / "keys" / "alice.key_secret"
    secret.chmod(0o640)
    (stopped.var / "db").chmod(0o755)
    assert "is open to others (mode 755)" in wrong(stopped)["permissions"]

    assert checked(stopped, repair=True)["permissions"].state == "repaired"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert (stopped.var / "db").stat().st_mode & 0o777 == 0o700
    assert wrong(stopped) == {}


def test_a_link_in_a_private_directory_is_found_and_not_followed(
    stopped: System, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    outside.chmod(0o644)
    (stopped.var / "state" / "link").symlink_to(outside)

    assert wrong(stopped, repair=True)["permissions"].endswith("/state/link is a link")
    assert outside.stat().st_mode & 0o777 == 0o644


def is_left_cut(path: Path, content: bytes) -> bool:
    """Cut a file; return whether it stays so: the follower mends once, when it has started."""
    path.write_bytes(content[:-30])
    time.sleep(0.3)  # What does not happen cannot be polled.
    return path.stat().st_size == len(content) - 30


@pytest.mark.parametrize("running", [True, False])
def test_session_files_that_were_cut_or_added_to_are_mended(said: System, running: bool) -> None:
    was = {name: said.file(name) for name in ("plan", "talk")}
    wait_until_written(said)
    content = {name: path.read_bytes() for name, path in was.items()}
    if not running:
        said.stop()
    until(lambda: is_left_cut(was["plan"], content["plan"]))
    was["talk"].write_bytes(content["talk"] + b'{"torn')
    assert wrong(said)["session files"] == "plan.jsonl is 30 bytes short"

    check = checked(said, repair=True)["session files"]
    assert check.state == "repaired"
    assert [each.text for each in check.findings] == [
        "plan.jsonl is 30 bytes short",
        "talk.jsonl is 6 bytes too long",
    ]
    assert {name: path.read_bytes() for name, path in was.items()} == content
    assert wrong(said) == {}


def test_a_line_that_was_changed_is_found_and_written_again(stopped: System) -> None:
    path = stopped.file("plan")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"n":7', b'"n":8'))
    found = wrong(stopped)
    at = content.index(b'"n":7') + 4
    assert found["session files"] == f"plan.jsonl is not what was said, from byte {at} on"
    assert "plan.jsonl was changed by hand" in found["index"]

    assert checked(stopped, repair=True)["session files"].state == "repaired"
    assert path.read_bytes() == content
    assert wrong(stopped) == {}


def test_a_damaged_record_of_a_journal_is_found(stopped: System) -> None:
    path = segment_path(store(stopped, "sessions"), 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    assert "sessions: journal" in wrong(stopped, repair=True)["journals"]
    assert path.read_bytes() == bytes(content)


def test_a_journal_that_was_cut_by_hand_is_found(stopped: System) -> None:
    path = segment_path(store(stopped, "registry"), 1)
    os.truncate(path, 10)
    assert "cannot be opened: its journal ends before" in wrong(stopped)["stores"]


def test_a_damaged_row_is_found_and_its_view_built_again(stopped: System) -> None:
    view = store(stopped, "sessions") / "view"
    environment = lmdb.open(str(view), max_dbs=32, lib_version=0, map_size=64 << 30)
    with environment.begin(write=True) as txn:
        rows = environment.open_db(b"sessions", txn=txn)
        value = txn.get(b"plan", db=rows) or b""
        txn.put(b"plan", bytes([value[0] ^ 1]) + value[1:], db=rows)
    environment.close()
    assert "table sessions, key b'plan'" in wrong(stopped)["rows"]

    assert checked(stopped, repair=True)["rows"].state == "repaired"
    stopped.start()
    assert wrong(stopped) == {}
    with stopped.client("alice") as alice:
        assert alice.ask("session:append", session_id="plan", event="note", data={})["seq"] == 21


def test_a_table_that_is_gone_is_found_and_the_view_built_again(stopped: System) -> None:
    environment = lmdb.open(
        str(store(stopped, "sessions") / "view"), max_dbs=32, lib_version=0, map_size=64 << 30
    )
    with environment.begin(write=True) as txn:
        txn.drop(environment.open_db(b"sessions", txn=txn))
    environment.close()
    assert "table sessions, which is not there" in wrong(stopped)["rows"]

    assert checked(stopped, repair=True)["rows"].state == "repaired"
    stopped.start()
    assert wrong(stopped) == {}
    with stopped.client("alice") as alice:
        assert alice.ask("session:append", session_id="plan", event="note", data={})["seq"] == 21


def test_a_reader_that_was_killed_is_found_and_its_slot_freed(stopped: System) -> None:
    code = (
        "import sys; from pathlib import Path; from ksi.actors.reading import reader_of;"
        "wait = lambda *_: (print('in', flush=True), input());"
        "reader_of('sessions', Path(sys.argv[1])).reader.read(wait)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(stopped.var)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as reader:  # fmt: skip
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"in\n"
        assert wrong(stopped) == {}
        reader.kill()
    assert wrong(stopped)["readers"] == f"process {reader.pid} was killed while it read sessions"

    assert checked(stopped, repair=True)["readers"].state == "repaired"
    assert wrong(stopped) == {}


def test_an_owner_that_outlived_its_supervisor_is_found(stopped: System) -> None:
    code = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR);"
        "fcntl.flock(fd, fcntl.LOCK_EX); os.pwrite(fd, b'%-20d' % os.getpid(), 0);"
        "print('held', flush=True); input()"
    )
    path = stopped.var / "db" / "sessions" / "lock"
    orphan = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert orphan.stdout is not None
    assert orphan.stdout.readline() == b"held\n"
    assert lock_holder(path.parent) == orphan.pid
    found = wrong(stopped)
    orphan.kill()
    orphan.communicate()
    assert found["locks"] == f"process {orphan.pid} still has the store of sessions open"
    assert lock_holder(path.parent) is None


@pytest.fixture
def crashed(said: System) -> System:
    """A system that was in use when its machine went down."""
    held = checked(said)  # It is well.
    assert all(each.state == "ok" for each in held.values())
    said.stop()
    for owner in ("sessions", "registry"):
        state = store(said, owner) / "STATE"
        state.write_text(json.dumps({"boot_id": "another", "clean": False}))
    return said


def test_after_a_crash_of_the_machine_it_says_what_recovery_will_do(crashed: System) -> None:
    found = checked(crashed)["stores"].findings
    assert [each.text for each in found] == [
        "the store of registry was in use when the machine went down",
        "the store of sessions was in use when the machine went down",
    ]
    examined = examine(crashed.var / "db" / "sessions")
    assert examined is not None
    assert (examined.environment, examined.case.letter) == (None, "D")
    segment_path(store(crashed, "sessions"), 1).rename(segment_path(store(crashed, "sessions"), 2))
    found = checked(crashed)["stores"].findings
    assert found[1].text.startswith("the store of sessions cannot be opened")
    assert found[1].command == "ksi restore latest"


def test_an_index_that_differs_is_built_again(said: System) -> None:
    wait_until_written(said)
    said.kill("index", signal.SIGSTOP)
    try:
        database = next((said.var / "logs" / "index" / "daily").glob("*.db"))
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE ksi_index SET byte_offset = 1 WHERE line_number = 7")
    finally:
        said.kill("index", signal.SIGCONT)
    assert "is not what its row says: byte_offset" in wrong(said)["index"]

    assert checked(said, repair=True)["index"].state == "repaired"
    assert wrong(said) == {}


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_damaged_cache_of_the_library_is_made_again(said: System, is_stopped: bool) -> None:
    cache = said.var / "cache" / "conversations.db"
    with said.client("alice") as alice:
        until(lambda: alice.read("conversation:list")["total"] == 2)
    if is_stopped:
        said.stop()
    else:
        said.kill("library", signal.SIGSTOP)
    with open(cache, "r+b") as file:
        file.seek(100)
        file.write(bytes(4000))
    try:
        assert wrong(said)["library"].startswith("the library's conversations.db is damaged: ")
    finally:
        if not is_stopped:
            said.kill("library", signal.SIGCONT)
    assert checked(said, repair=True)["library"].state == "repaired"
    assert wrong(said) == {}
    if is_stopped:
        said.start()
    with said.client("alice") as alice:
        until(lambda: alice.read("conversation:list")["total"] == 2)


def wait_until_written(system: System) -> None:
    """Return when files and index have what was said."""
    until(system.file("talk").exists)
    until(lambda: Checkup(system.var)._index()[0].startswith("40 rows"))
