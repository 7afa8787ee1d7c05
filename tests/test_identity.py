"""Keys, names, roles and the places where processes find each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth

from ksi.actors.owners import OWNERS
from ksi.transport.errors import Forbidden, Invalid, NotRunning
from ksi.transport.identity import (
    RESERVED,
    Address,
    Certificate,
    Directory,
    KeyRing,
    bell_endpoint,
    endpoint,
    hold_run_directory,
    make_run_directory,
    remove_run_directory,
    run_directory,
    sweep_run_directories,
)
from ksi.transport.limits import SOCKET_PATH_BYTES_MAX

BAD_NAMES = ["", ".hidden", "../alice", "a/b", "-x", "alice\n", "al ice", "ä", "x" * 129, "a\0b"]


@pytest.fixture
def var(tmp_path: Path) -> Path:
    return tmp_path / "var"


@pytest.fixture
def keys(var: Path) -> KeyRing:
    return KeyRing(var)


def public_file(keys: KeyRing, certificate: Certificate) -> Path:
    return keys.directory / f"{certificate.user_id}.key"


def secret_file(keys: KeyRing, name: str) -> Path:
    return keys.directory / f"{name}.key_secret"


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


# Enrolment


def test_enrolling_makes_a_key_pair_that_works(keys: KeyRing) -> None:
    alice = keys.enroll("alice")

    assert alice.secret is not None
    assert zmq.curve_public(alice.secret) == alice.public
    assert keys.of_public(alice.public) == keys.of_public(alice.user_id) == ("alice", "agent")
    assert keys.load("alice") == alice
    assert keys.names() == ["alice"]


def test_zeromq_reads_the_files_that_enrolling_writes(keys: KeyRing) -> None:
    alice = keys.enroll("alice")

    assert zmq.auth.load_certificate(secret_file(keys, "alice")) == (alice.public, alice.secret)
    assert zmq.auth.load_certificate(public_file(keys, alice)) == (alice.public, None)


def test_nobody_else_can_read_the_keys(keys: KeyRing) -> None:
    former = os.umask(0)
    try:
        alice = keys.enroll("alice")
    finally:
        os.umask(former)

    assert mode(keys.directory) == 0o700
    assert mode(secret_file(keys, "alice")) == mode(public_file(keys, alice)) == 0o600


def test_enrolling_again_returns_the_same_pair_in_its_role(var: Path, keys: KeyRing) -> None:
    cli = keys.enroll("cli", "operator")

    assert KeyRing(var).enroll("cli", "agent") == cli
    assert cli.role == "operator"


def test_enrolling_leaves_nothing_but_the_two_files(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    keys.enroll("alice")

    names = {path.name for path in keys.directory.iterdir()}
    assert names == {"alice.key_secret", f"{alice.user_id}.key"}


def test_threads_that_enrol_one_name_at_once_get_one_pair(var: Path) -> None:
    barrier = threading.Barrier(8)

    def enroll(name: str) -> Certificate:
        barrier.wait()
        return KeyRing(var).enroll(name)

    with ThreadPoolExecutor(8) as pool:
        for name in ("a", "b", "c", "d", "e"):
            assert len(set(pool.map(enroll, [name] * 8))) == 1

    assert len(list((var / "keys").glob("*.key"))) == 5
    assert len(list((var / "keys").iterdir())) == 10


def test_processes_that_enrol_one_name_at_once_get_one_pair(var: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ksi.transport.identity import KeyRing\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(KeyRing(Path(sys.argv[1])).enroll('alice').public.decode())"
    )
    command = [sys.executable, "-c", program, str(var)]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(5)]
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.readline()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    keys = {racer.communicate(timeout=10)[0].strip() for racer in racers}

    assert [racer.returncode for racer in racers] == [0] * 5
    assert len(keys) == 1
    assert len(list((var / "keys").iterdir())) == 2


def test_an_enrolment_that_was_cut_short_can_be_made_again(keys: KeyRing) -> None:
    half = keys.enroll("alice")
    secret_file(keys, "alice").unlink()  # as if the process had died before it linked the secret

    whole = keys.enroll("alice")

    assert whole != half
    assert keys.load("alice") == whole


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_id_cannot_be_a_name(var: Path, keys: KeyRing, name: str) -> None:
    for attempt in (keys.enroll, keys.load):
        with pytest.raises(Invalid):
            attempt(name)

    assert not var.exists()


def test_there_is_no_role_beside_the_four(var: Path, keys: KeyRing) -> None:
    no_role: Any = "root"
    with pytest.raises(Invalid, match="root"):
        keys.enroll("alice", no_role)

    assert not var.exists()


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_the_name_of_an_owner_is_for_owners_only(keys: KeyRing, name: str) -> None:
    for role in ("agent", "worker", "operator"):
        with pytest.raises(Forbidden):
            keys.enroll(name, role)

    assert keys.enroll(name, "owner").role == "owner"
    with pytest.raises(Forbidden):
        keys.enroll(name, "agent")


def test_owners_and_the_supervisor_have_reserved_names() -> None:
    assert {*OWNERS, "supervisor"} <= RESERVED


def test_the_public_file_says_which_role_a_name_has(var: Path, keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    path = public_file(keys, alice)
    path.write_text(path.read_text().replace('"agent"', '"operator"'))

    assert keys.enroll("alice") == alice._replace(role="operator")
    assert KeyRing(var).of_public(alice.public) == ("alice", "operator")


# Revocation


def test_a_key_that_is_removed_is_revoked_until_the_name_is_forgotten(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    keys.remove("alice")

    assert keys.of_public(alice.public) is None
    assert keys.names() == []
    for attempt in (keys.enroll, keys.load):
        with pytest.raises(Forbidden, match="revoked") as refusal:
            attempt("alice")
        assert refusal.value.hint is not None
        assert "ksi agents enroll alice" in refusal.value.hint

    keys.forget("alice")
    again = keys.enroll("alice")
    assert again.public != alice.public
    assert keys.of_public(alice.public) is None
    assert keys.of_public(again.public) == ("alice", "agent")


def test_removing_one_leaves_the_others(keys: KeyRing) -> None:
    keys.enroll("alice")
    bob = keys.enroll("bob")
    keys.remove("alice")
    keys.remove("nobody")

    assert keys.enrolled() == [bob._replace(secret=None)]


def test_every_change_is_seen_at_once_by_other_key_rings(var: Path, keys: KeyRing) -> None:
    other = KeyRing(var)
    for number in range(40):
        certificate = keys.enroll(f"agent-{number}")
        assert other.of_public(certificate.public) == (f"agent-{number}", "agent")
        keys.remove(f"agent-{number}")
        assert other.of_public(certificate.public) is None


def test_a_change_within_the_same_tick_of_the_file_clock_is_seen(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    now_ns = time.time_ns() + 10**12  # a tick that lasts
    os.utime(keys.directory, ns=(now_ns, now_ns))
    assert keys.of_public(alice.public) == ("alice", "agent")
    public_file(keys, alice).unlink()
    os.utime(keys.directory, ns=(now_ns, now_ns))

    assert keys.of_public(alice.public) is None


def test_a_lookup_does_not_ask_the_disk_until_it_is_refreshed(var: Path, keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    other = KeyRing(var)
    other.refresh()
    assert other.lookup(alice.user_id) == ("alice", "agent")
    keys.remove("alice")

    assert other.lookup(alice.user_id) == ("alice", "agent")
    other.refresh()
    assert other.lookup(alice.user_id) is None


def test_what_is_known_is_forgotten_when_the_directory_has_changed(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    os.utime(keys.directory, ns=(10**18, 10**18))
    assert keys.of_public(alice.public) == ("alice", "agent")
    public_file(keys, alice).write_text("")  # in place: the directory does not change

    assert keys.of_public(alice.public) == ("alice", "agent")
    os.utime(keys.directory, ns=(10**18, 10**18 + 1))
    assert keys.of_public(alice.public) is None


def test_a_key_ring_of_nothing_knows_nobody(keys: KeyRing) -> None:
    assert keys.of_public("0" * 64) is None
    assert keys.of_public("../" * 20) is None
    assert keys.names() == []
    assert keys.load("alice") is None
    keys.forget("alice")


# What is in the files


def test_no_text_shows_a_secret(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    assert alice.secret is not None
    shown = [repr(alice), str(alice), f"{alice}", repr([alice])]
    path = secret_file(keys, "alice")
    whole = path.read_text()
    for damage in ("public-key", "role", "name"):
        path.write_text(whole.replace(damage, "x"))
        with pytest.raises(Invalid) as error:
            keys.load("alice")
        shown += [repr(error.value), str(error.value), str(error.value.to_wire())]

    assert not [text for text in shown if alice.secret.decode() in text]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("public-key", "lost-key"),
        ('name = "alice"', 'name = "bob"'),
        ('role = "agent"', 'role = "king"'),
        ("secret-key", "other-key"),
    ],
)
def test_a_damaged_secret_file_is_refused(keys: KeyRing, old: str, new: str) -> None:
    keys.enroll("alice")
    path = secret_file(keys, "alice")
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(Invalid, match="key pair of alice"):
        keys.load("alice")


def test_a_secret_that_does_not_belong_to_its_public_key_is_refused(keys: KeyRing) -> None:
    alice, bob = keys.enroll("alice"), keys.enroll("bob")
    assert alice.secret is not None
    assert bob.secret is not None
    path = secret_file(keys, "alice")
    path.write_text(path.read_text().replace(alice.secret.decode(), bob.secret.decode()))

    with pytest.raises(Invalid):
        keys.load("alice")


def test_a_secret_file_that_others_can_read_is_refused(keys: KeyRing) -> None:
    keys.enroll("alice")
    secret_file(keys, "alice").chmod(0o640)

    with pytest.raises(Forbidden) as refusal:
        keys.load("alice")
    assert "chmod 600" in str(refusal.value.hint)


def test_a_public_key_counts_only_under_its_own_file_name(keys: KeyRing) -> None:
    alice, bob = keys.enroll("alice"), keys.enroll("bob")
    public_file(keys, bob).write_text(public_file(keys, alice).read_text())

    assert keys.of_public(bob.public) is None
    assert keys.names() == ["alice"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"alice"', '"sessions"'),
        ('"alice"', '"../alice"'),
        ('"agent"', '"root"'),
        ("public-key", "private-key"),
    ],
)
def test_a_public_file_that_could_not_be_written_by_enrolling_enrols_nobody(
    keys: KeyRing, old: str, new: str
) -> None:
    alice = keys.enroll("alice")
    path = public_file(keys, alice)
    path.write_text(path.read_text().replace(old, new))

    assert keys.of_public(alice.public) is None


def test_a_public_file_that_others_can_write_enrols_nobody(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    public_file(keys, alice).chmod(0o666)

    assert keys.of_public(alice.public) is None


def test_symbolic_links_are_not_followed(tmp_path: Path, keys: KeyRing) -> None:
    alice, bob = keys.enroll("alice"), keys.enroll("bob")
    for path in (public_file(keys, alice), secret_file(keys, "bob")):
        elsewhere = tmp_path / path.name
        path.rename(elsewhere)
        path.symlink_to(elsewhere)

    assert keys.of_public(alice.public) is None
    with pytest.raises(Forbidden, match="symbolic link"):
        keys.load("bob")
    assert keys.of_public(bob.public) == ("bob", "agent")


def test_a_key_directory_that_is_a_symbolic_link_is_refused(var: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir(0o700)
    var.mkdir()
    (var / "keys").symlink_to(real)

    with pytest.raises(Forbidden, match="not a directory"):
        KeyRing(var)


def test_a_key_directory_that_is_open_to_others_is_refused(var: Path, keys: KeyRing) -> None:
    keys.enroll("alice")
    keys.directory.chmod(0o750)

    with pytest.raises(Forbidden) as refusal:
        KeyRing(var)
    assert "chmod 700" in str(refusal.value.hint)
    with pytest.raises(Forbidden):
        keys.enroll("bob")


def test_a_fifo_in_the_key_directory_stops_nobody(keys: KeyRing) -> None:
    alice = keys.enroll("alice")
    public_file(keys, alice).unlink()
    os.mkfifo(public_file(keys, alice), 0o600)

    assert keys.of_public(alice.public) is None


# The run directory


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A login session's directory whose path is short enough for sockets."""
    directory = Path(f"/tmp/ksi-test-{os.getpid()}")
    directory.mkdir(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A var directory whose path leaves no room for socket names."""
    return tmp_path / ("d" * 60) / "var"


def test_sockets_live_in_var_run_where_they_fit(var: Path) -> None:
    assert run_directory(var) == var / "run"
    assert not var.exists()
    assert make_run_directory(var) == var / "run"
    assert mode(var / "run") == 0o700
    assert endpoint(var, "sessions") == f"ipc://{var}/run/sessions"
    assert bell_endpoint(var, "sessions") == f"ipc://{var}/run/sessions.bell"


def test_a_relative_var_and_one_through_a_link_are_the_same_place(
    var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    var.mkdir()
    (var.parent / "link").symlink_to(var)
    monkeypatch.chdir(var.parent)

    assert run_directory(Path("var")) == run_directory(var.parent / "link") == var / "run"


def test_a_long_path_falls_back_to_the_session_directory(session: Path, deep: Path) -> None:
    directory = make_run_directory(deep)

    assert directory.parent == session
    assert mode(directory) == 0o700
    assert run_directory(deep) == directory


def test_every_name_fits_into_a_socket_address_at_any_depth(session: Path, tmp_path: Path) -> None:
    context = zmq.Context()
    with context, context.socket(zmq.PUB) as socket:
        for length in range(1, 60, 4):
            var = tmp_path / ("d" * length)
            make_run_directory(var)
            address = bell_endpoint(var, "n" * 19)
            assert len(address.removeprefix("ipc://")) <= SOCKET_PATH_BYTES_MAX
            socket.bind(address)
            socket.unbind(address)
    with pytest.raises(Invalid):
        endpoint(tmp_path, "n" * 20)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_id_names_no_socket(var: Path, name: str) -> None:
    with pytest.raises(Invalid):
        endpoint(var, name)


def test_processes_with_another_environment_find_the_same_run_directory(
    session: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_run_directory(deep)
    monkeypatch.delenv("XDG_RUNTIME_DIR")

    assert run_directory(deep) == directory
    assert make_run_directory(deep) == directory


def test_two_long_paths_do_not_share_a_run_directory(session: Path, deep: Path) -> None:
    assert make_run_directory(deep) != make_run_directory(deep.with_name("other"))


@pytest.mark.parametrize("session", [None, "", "run", "/nonexistent", "TOO_LONG"])
def test_without_a_usable_session_directory_it_falls_back_to_tmp(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: str | None
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    if session is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", session.replace("TOO_LONG", str(long)))

    assert str(run_directory(deep)).startswith(f"/tmp/ksi-{os.geteuid()}-")


def test_a_session_that_has_ended_is_replaced(
    session: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run_directory(deep)
    gone = session / "gone" / "ksi-12345678"
    (deep / "run" / "elsewhere").write_text(f"{gone}\n")

    assert run_directory(deep) == gone
    assert make_run_directory(deep).parent == session
    assert run_directory(deep).parent == session


def test_the_short_run_directory_is_removed_and_nothing_else(
    session: Path, deep: Path, var: Path
) -> None:
    short = make_run_directory(deep)
    (short / "sessions.stat").touch()
    remove_run_directory(deep)
    assert not short.exists()
    assert make_run_directory(deep) == short
    (short / "var").unlink()
    (short / "var").symlink_to(session)  # It belongs to somebody else.
    remove_run_directory(deep)
    assert short.exists()
    remove_run_directory(var)
    usual = make_run_directory(var)
    remove_run_directory(var)
    assert usual.exists()


def test_short_run_directories_are_swept_when_they_are_ours_dead_and_without_their_var(
    session: Path, deep: Path
) -> None:
    kept = make_run_directory(deep)
    gone, live, open_to_all = (
        make_run_directory(deep.with_name(name)) for name in ("gone", "live", "open")
    )
    for name in ("gone", "live", "open"):
        shutil.rmtree(deep.with_name(name))
    open_to_all.chmod(0o755)
    (strange := session / "ksi-strange").mkdir(0o700)
    (linked := session / "ksi-linked").symlink_to(gone)
    held = hold_run_directory(live)
    sweep_run_directories(session)
    assert not gone.exists()
    assert all(each.exists() for each in (kept, live, open_to_all, strange))
    assert linked.is_symlink()
    os.close(held)
    sweep_run_directories(session)
    assert not live.exists()


def test_a_run_directory_that_is_not_ours_alone_is_refused(var: Path, tmp_path: Path) -> None:
    make_run_directory(var)
    (var / "run").chmod(0o755)
    with pytest.raises(Forbidden, match="open to other users"):
        run_directory(var)
    (var / "run").rmdir()
    (var / "run").symlink_to(tmp_path)

    for attempt in (run_directory, make_run_directory, Directory.read):
        with pytest.raises(Forbidden, match="not a directory"):
            attempt(var)


def test_the_record_of_the_short_directory_is_only_believed_where_it_is_ours(
    session: Path, deep: Path
) -> None:
    make_run_directory(deep)
    (deep / "run").chmod(0o770)

    for attempt in (run_directory, make_run_directory):
        with pytest.raises(Forbidden, match="open to other users"):
            attempt(deep)


def test_a_short_directory_that_someone_made_before_us_is_refused(
    session: Path, deep: Path
) -> None:
    short = run_directory(deep)
    short.mkdir(0o777)
    short.chmod(0o777)

    for attempt in (run_directory, make_run_directory):
        with pytest.raises(Forbidden):
            attempt(deep)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(var: Path, keys: KeyRing) -> None:
    keys.enroll("alice")
    make_run_directory(var)
    for directory in (var / "run", var / "keys"):
        os.chown(directory, 65_534, -1)

    with pytest.raises(Forbidden, match="belongs to user 65534"):
        run_directory(var)
    with pytest.raises(Forbidden, match="belongs to user 65534"):
        KeyRing(var)


# The directory of owners


DIRECTORY = Directory(
    commands={"session:append": "sessions"},
    queries={"session:history": "sessions"},
    domains={"session": "sessions"},
    owners={"sessions": Address("ipc:///x/run/sessions", "k" * 40)},
)


def test_a_directory_is_read_as_it_was_written(var: Path) -> None:
    DIRECTORY.write(var)

    assert Directory.read(var) == DIRECTORY
    assert mode(var / "run" / "endpoints.json") == 0o600


def test_without_a_directory_nothing_runs_and_the_hint_says_how_to_start(var: Path) -> None:
    with pytest.raises(NotRunning) as error:
        Directory.read(var)
    assert error.value.hint == "ksi start"
    assert not var.exists()

    DIRECTORY.write(var)
    Directory.remove(var)
    Directory.remove(var)
    with pytest.raises(NotRunning):
        Directory.read(var)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"commands": 1}', "\0"])
def test_a_directory_that_makes_no_sense_is_no_running_system(var: Path, text: str) -> None:
    DIRECTORY.write(var)
    (var / "run" / "endpoints.json").write_text(text)

    with pytest.raises(NotRunning, match="unreadable"):
        Directory.read(var)


def test_a_reader_sees_the_former_directory_or_the_new_one(var: Path) -> None:
    grown = Directory({f"a:{n}": "sessions" for n in range(3000)}, {}, {}, {})
    DIRECTORY.write(var)
    done = threading.Event()

    def write() -> None:
        for _ in range(30):
            grown.write(var)
            DIRECTORY.write(var)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set() and not writing.done():
            assert Directory.read(var) in (DIRECTORY, grown)
        writing.result()
