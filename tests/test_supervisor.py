"""The supervisor with real processes: it starts, restarts, gives up, stops, and leaves nobody.

Each test starts a supervisor of its own on a var of its own and stops it; its children are those
of `supervised.py`.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import psutil
import pytest

import ksi.actors.supervision.system  # noqa: F401 - declares what the supervisor can be asked
from ksi.actors import log
from ksi.actors.config import Config
from ksi.actors.stat import read_stat
from ksi.actors.supervision import launch, lock, reports
from ksi.actors.supervision.system import ChildStatus, Phase
from ksi.actors.supervision.tree import specs
from ksi.console.facts import look
from ksi.transport import Client
from ksi.transport.errors import (
    Conflict,
    Draining,
    Forbidden,
    Internal,
    Invalid,
    KsiError,
    NotFound,
)
from ksi.transport.identity import run_directory

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
PATIENCE_S = 10.0  # For anything to come about; a test that waits this long has failed.


def until(what: Callable[[], T | None], wait_s: float = PATIENCE_S) -> T:
    """Return the first true value of `what`."""
    deadline_s = time.monotonic() + wait_s
    while not (value := what()):
        assert time.monotonic() < deadline_s, f"it did not come about in {wait_s} s"
        time.sleep(0.005)  # This is what polls conditions.
    return value


def is_past(moment: float) -> bool:
    return time.time() > moment


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class System:
    """A supervisor in the background, on a var of its own."""

    def __init__(self, var: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.var = var
        self._patch = monkeypatch
        self.pid = 0
        self.pidfd = -1
        self.progress: list[dict[str, Any]] = []
        monkeypatch.setenv("PYTHONPATH", str(HERE))

    def describe(
        self,
        *children: dict[str, Any],
        strategy: str = "one_for_one",
        by_phase: bool = False,
    ) -> None:
        described = {"strategy": strategy, "by_phase": by_phase, "children": list(children)}
        self._patch.setenv("SUPERVISED", json.dumps(described))

    def start(
        self,
        *children: dict[str, Any],
        strategy: str = "one_for_one",
        by_phase: bool = False,
        **flags: Any,
    ) -> None:
        """Start it; flags are settings of the section `supervisor`."""
        self.describe(*children, strategy=strategy, by_phase=by_phase)
        settings = {f"supervisor.{key}": value for key, value in flags.items()}
        ready = launch.start_background(
            self.var,
            settings,
            self.progress.append,
            tree="supervised:tree",
            modules=("structlog", "zmq"),
        )
        self.pid = ready["pid"]
        self.pidfd = os.pidfd_open(self.pid)

    def child(self, name: str) -> ChildStatus:
        children = reports.read_children(run_directory(self.var))
        assert children is not None
        return next(child for child in children.children if child.name == name)

    def pid_of(self, name: str) -> int:
        pid = self.child(name).pid
        assert pid is not None
        return pid

    def until_child(self, name: str, holds: Callable[[ChildStatus], bool]) -> ChildStatus:
        def found() -> ChildStatus | None:
            return child if holds(child := self.child(name)) else None

        return until(found)

    def until_again(self, name: str, starts: int) -> ChildStatus:
        """Wait until the child runs for the `starts`th time."""
        return self.until_child(
            name, lambda child: child.starts == starts and child.state == "RUNNING"
        )

    def trace(self) -> list[tuple[str, str]]:
        """Return what the children have said: word and name."""
        try:
            lines = (self.var / "trace").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(word, name) for word, name, _pid, _time in map(str.split, lines)]

    def told(self) -> list[tuple[str, Any]]:
        """Return what the child `registry` was told: operation and fields."""
        words = [word.split("|") for word, _name in self.trace() if "|" in word]
        return [(operation, json.loads(fields)) for operation, fields in words]

    def processes(self) -> list[int]:
        """Return the supervisor, its servers and all below them."""
        return [self.pid, *(p.pid for p in psutil.Process(self.pid).children(recursive=True))]

    def ended(self, wait_s: float = PATIENCE_S) -> bool:
        return bool(select.select([self.pidfd], [], [], wait_s)[0])

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        assert self.ended()

    def said(self) -> str:
        return (log.directory(self.var) / "supervisor.jsonl").read_text()

    def operator(self) -> Client:
        return Client("op", var=self.var, role="operator")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    system = System(tmp_path / "var", monkeypatch)
    yield system
    if system.pidfd >= 0:
        with contextlib.suppress(ProcessLookupError):
            system.signal(signal.SIGKILL)
        assert system.ended()
        os.close(system.pidfd)


EXITS = {"normally": signal.SIGUSR1, "abnormally": signal.SIGUSR2, "by_a_signal": signal.SIGKILL}


def child_that_exits(system: System, restart: str, how: str) -> ChildStatus:
    """Return what has become of a child, and see that its neighbour was left alone."""
    system.start({"name": "other"}, {"name": "it", "restart": restart})
    other, first = system.pid_of("other"), system.pid_of("it")
    os.kill(first, EXITS[how])
    after = system.until_child(
        "it",
        lambda child: child.state == "STOPPED" or (child.state == "RUNNING" and child.pid != first),
    )
    assert not is_alive(first)
    assert system.pid_of("other") == other
    return after


def assert_restarted(child: ChildStatus) -> None:
    assert (child.state, child.starts, child.restarts) == ("RUNNING", 2, 1)


def assert_stopped(child: ChildStatus) -> None:
    assert (child.state, child.pid, child.starts, child.restarts) == ("STOPPED", None, 1, 0)


def test_permanent_child_that_exits_normally_is_restarted(system: System) -> None:
    child = child_that_exits(system, "permanent", "normally")
    assert_restarted(child)
    assert child.last_exit == "exit 0"


def test_permanent_child_that_exits_abnormally_is_restarted(system: System) -> None:
    child = child_that_exits(system, "permanent", "abnormally")
    assert_restarted(child)
    assert child.last_exit == "exit 3"


def test_permanent_child_that_exits_by_a_signal_is_restarted(system: System) -> None:
    child = child_that_exits(system, "permanent", "by_a_signal")
    assert_restarted(child)
    assert child.last_exit == "signal 9 (SIGKILL)"


def test_transient_child_that_exits_normally_is_not_restarted(system: System) -> None:
    assert_stopped(child_that_exits(system, "transient", "normally"))


def test_transient_child_that_exits_abnormally_is_restarted(system: System) -> None:
    assert_restarted(child_that_exits(system, "transient", "abnormally"))


def test_transient_child_that_exits_by_a_signal_is_restarted(system: System) -> None:
    assert_restarted(child_that_exits(system, "transient", "by_a_signal"))


def test_temporary_child_that_exits_normally_is_not_restarted(system: System) -> None:
    assert_stopped(child_that_exits(system, "temporary", "normally"))


def test_temporary_child_that_exits_abnormally_is_not_restarted(system: System) -> None:
    assert_stopped(child_that_exits(system, "temporary", "abnormally"))


def test_temporary_child_that_exits_by_a_signal_is_not_restarted(system: System) -> None:
    assert_stopped(child_that_exits(system, "temporary", "by_a_signal"))


def test_children_start_in_order_each_when_the_one_before_is_ready(system: System) -> None:
    system.start({"name": "a", "role": "slow"}, {"name": "b", "role": "slow"}, {"name": "c"})

    order = ["a", "b", "c"]
    assert system.trace() == [(word, name) for name in order for word in ("start", "ready")]
    assert [line["child"] for line in system.progress] == order


PHASED = (
    {"name": "a", "role": "gated", "phase": "infrastructure"},
    {"name": "b", "role": "gated", "phase": "owners"},
    {"name": "c", "role": "gated", "phase": "context"},
)


def test_the_phase_is_that_of_the_first_child_that_does_not_answer(system: System) -> None:
    def is_in(phase: str) -> bool:
        return look(system.var).phase == phase

    with ThreadPoolExecutor() as pool:
        starting = pool.submit(system.start, *PHASED)
        try:
            for child in PHASED:
                until(partial(is_in, child["phase"]))
                problems = look(system.var).problems()
                assert not any(" does not run " in problem for problem in problems)
                (system.var / f"{child['name']}.go").touch()
        finally:  # or the start would wait for them
            for child in PHASED:
                (system.var / f"{child['name']}.go").touch()
        starting.result()

    assert [(line["child"], line["phase"]) for line in system.progress] == [
        (child["name"], child["phase"]) for child in PHASED
    ]
    until(lambda: is_in("ready"))
    (system.var / "c.go").unlink()
    os.kill(system.pid_of("c"), signal.SIGKILL)
    until(lambda: is_in("context"))
    (system.var / "c.go").touch()
    until(lambda: is_in("ready"))
    system.stop()
    assert look(system.var).phase is None


def test_where_the_tree_goes_by_phase_those_of_one_start_and_stop_together(
    system: System,
) -> None:
    together = ({"name": "b", "role": "gated"}, {"name": "c", "role": "gated"})
    children = (
        {"name": "a", "phase": "infrastructure"},
        *together,
        {"name": "d", "phase": "context"},
    )
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(system.start, *children, by_phase=True)
        try:
            until(lambda: {("start", "b"), ("start", "c")} <= set(system.trace()))
            assert system.trace()[:2] == [("start", "a"), ("ready", "a")]
            (system.var / "c.go").touch()
            until(lambda: ("ready", "c") in system.trace())
            assert ("start", "d") not in system.trace()
        finally:
            for name in ("b", "c"):
                (system.var / f"{name}.go").touch()
        starting.result()
    system.stop()

    words = system.trace()
    assert words.index(("ready", "b")) < words.index(("start", "d"))
    stops = [name for word, name in words if word == "stop"]
    assert (stops[0], {*stops[1:3]}, stops[3]) == ("d", {"b", "c"}, "a")


def test_the_phases_of_the_system_follow_one_another(tmp_path: Path) -> None:
    phases = [spec.phase for spec in specs(tmp_path, Config())]

    assert sorted(phases, key=get_args(Phase).index) == phases
    assert {*phases, "ready"} == {*get_args(Phase)}


def test_an_owner_is_ready_when_it_answers_not_when_it_says_so(system: System) -> None:
    system.start({"name": "registry", "role": "answering"}, {"name": "b"})

    words = system.trace()
    assert words.index(("hello", "registry")) < words.index(("start", "b"))


def test_children_stop_in_reverse_order_each_when_the_one_behind_is_gone(system: System) -> None:
    system.start({"name": "a"}, {"name": "b"}, {"name": "c"})
    system.stop()

    stops = [name for word, name in system.trace() if word == "stop"]
    assert stops == ["c", "b", "a"]
    assert [system.child(name).state for name in stops] == ["STOPPED"] * 3


def test_a_start_that_fails_says_why_and_leaves_nothing(system: System) -> None:
    with pytest.raises(Internal, match="b ended before it was ready") as failed:
        system.start({"name": "a"}, {"name": "b", "role": "broken"}, {"name": "c"})

    assert "the disk is on fire" in (failed.value.hint or "")
    until(lambda: lock.holder(system.var) is None)
    assert [name for word, name in system.trace() if word == "start"] == ["a"]
    assert ("stop", "a") in system.trace()
    ended = reports.read_exit(run_directory(system.var))
    assert ended is not None
    assert (ended.exit_code, "before it was ready" in ended.reason) == (1, True)


def test_after_a_start_that_failed_the_next_may_begin_at_once(system: System) -> None:
    with pytest.raises(Internal, match="ended before it was ready"):
        system.start(
            {"name": "a", "role": "stubborn"}, {"name": "b", "role": "broken"}, shutdown_s=0.7
        )
    assert lock.holder(system.var) is None
    system.start({"name": "a"})


def test_a_child_that_is_never_ready_fails_the_start(system: System) -> None:
    with pytest.raises(Internal, match=r"a ended before it was ready \(killed: not ready for"):
        system.start({"name": "a", "role": "silent"}, start_s=0.5)


def test_a_start_that_is_stopped_says_so(system: System) -> None:
    def stop_when_begun() -> None:
        until(lambda: ("start", "b") in system.trace())
        holder = lock.holder(system.var)
        assert holder is not None
        os.kill(holder.pid, signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop_when_begun)
        with pytest.raises(Draining, match="stopped while starting: SIGTERM"):
            system.start({"name": "a"}, {"name": "b", "role": "silent"}, shutdown_s=0.2)
        stopping.result()
    assert lock.holder(system.var) is None
    assert ("stop", "a") in system.trace()


def test_a_temporary_directory_too_deep_for_sockets_keeps_nothing_from_starting(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path.joinpath("d" * 60, "e" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(deep))
    system.start({"name": "a"})
    with system.operator() as client:
        said = ["sh", "-c", "echo $TMPDIR"]
        client.ask("child:start", {"name": "worker", "argv": said, "restart": "temporary"})
    assert until(lambda: log.output(system.var, "worker").read_text()) == f"{deep}\n"


def test_a_run_directory_elsewhere_goes_with_an_orderly_stop_or_with_its_var(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", session := tempfile.mkdtemp())
    deep = tmp_path / ("d" * 100)
    first, second = System(deep / "first", monkeypatch), System(deep / "second", monkeypatch)
    first.start({"name": "a"})
    second.start({"name": "a"})
    assert len(os.listdir(session)) == 2
    first.stop()
    second.signal(signal.SIGKILL)
    assert second.ended()
    assert os.listdir(session) == [run_directory(second.var).name]
    shutil.rmtree(second.var)
    first.start({"name": "a"})
    shutil.rmtree(first.var)  # It lives on, and its directory with it.
    second.start({"name": "a"})
    assert len(os.listdir(session)) == 2
    first.signal(signal.SIGKILL)
    second.stop()
    assert first.ended()
    shutil.rmtree(session)


def test_settings_that_are_wrong_are_refused_before_anything_starts(system: System) -> None:
    with pytest.raises(Invalid, match="there is no setting"):
        system.start({"name": "a"}, intensty=3)
    assert system.trace() == []


def test_a_var_that_cannot_be_a_directory_is_refused(system: System) -> None:
    system.var.write_text("a file")

    with pytest.raises(Invalid, match="cannot be used"):
        system.start({"name": "a"})


def test_a_newer_format_is_refused_and_left_untouched(system: System) -> None:
    system.var.mkdir()
    (system.var / "FORMAT").write_text("ksi 999\n")

    with pytest.raises(KsiError, match="format 999"):
        system.start({"name": "a"})
    assert [path.name for path in system.var.iterdir()] == ["FORMAT"]


def test_more_restarts_than_the_intensity_stop_everything_with_the_reason(system: System) -> None:
    system.start({"name": "a"}, {"name": "b", "role": "fading"}, intensity=3, backoff_first_s=0.01)
    os.kill(system.pid_of("b"), signal.SIGKILL)

    assert system.ended()
    ended = reports.read_exit(run_directory(system.var))
    assert ended is not None
    assert ended.exit_code == 1
    assert ended.reason == "b ended again (exit 1): more than 3 restarts in 10 s"
    assert system.child("b").state == "FATAL"
    assert system.child("b").restarts == 3
    assert ("stop", "a") in system.trace()
    assert ended.reason in system.said()


def test_the_intensity_is_that_of_all_children_together(system: System) -> None:
    system.start({"name": "a"}, {"name": "b"}, intensity=2)
    for starts, name in ((2, "a"), (2, "b")):
        os.kill(system.pid_of(name), signal.SIGKILL)
        system.until_again(name, starts)
    os.kill(system.pid_of("a"), signal.SIGKILL)

    assert system.ended()


def test_restarts_that_are_far_apart_do_not_add_up(system: System) -> None:
    system.start({"name": "a"}, intensity=1, period_s=0.3)
    for starts in (2, 3, 4):
        os.kill(system.pid_of("a"), signal.SIGKILL)
        again = system.until_again("a", starts)
        until(partial(is_past, again.since + 0.4))

    assert not system.ended(0)


def test_the_first_restart_comes_at_once_and_the_next_waits(system: System) -> None:
    system.start({"name": "a"}, backoff_first_s=0.6)
    os.kill(system.pid_of("a"), signal.SIGKILL)
    began_s = time.monotonic()
    system.until_again("a", 2)
    first_s = time.monotonic() - began_s
    os.kill(system.pid_of("a"), signal.SIGKILL)
    began_s = time.monotonic()
    system.until_child("a", lambda child: child.state == "BACKOFF")
    system.until_again("a", 3)

    assert first_s < 0.3
    assert time.monotonic() - began_s >= 0.3


def test_with_rest_for_one_the_children_behind_are_restarted_in_order(system: System) -> None:
    system.start(
        {"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "d"}, strategy="rest_for_one"
    )
    a, before = system.pid_of("a"), len(system.trace())
    os.kill(system.pid_of("b"), signal.SIGKILL)
    for name in ("b", "c", "d"):
        system.until_again(name, 2)

    stops, starts = [("stop", "d"), ("stop", "c")], ["b", "c", "d"]
    again = [(word, name) for name in starts for word in ("start", "ready")]
    assert system.trace()[before:] == stops + again
    assert system.pid_of("a") == a
    assert [system.child(name).restarts for name in starts] == [1, 0, 0]


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGALRM, "no turn for"), (signal.SIGSTOP, "no turn for")]
)
def test_a_child_that_hangs_is_killed_and_restarted(
    system: System, number: int, words: str
) -> None:
    system.start({"name": "a"}, hung_turn_s=0.3, hung_commit_s=30)
    os.kill(system.pid_of("a"), number)

    again = system.until_again("a", 2)
    assert again.last_exit is not None
    assert again.last_exit.startswith("killed: no turn for")
    assert again.restarts == 1


def test_a_child_in_a_commit_is_given_longer(system: System) -> None:
    system.start({"name": "a"}, hung_turn_s=0.3, hung_commit_s=1.5)
    began_s = time.monotonic()
    os.kill(system.pid_of("a"), signal.SIGPROF)

    again = system.until_again("a", 2)
    assert time.monotonic() - began_s >= 1.5
    assert again.last_exit is not None
    assert again.last_exit.startswith("killed: in a commit for")


def turned_s(system: System) -> float:
    stat = read_stat(run_directory(system.var) / "supervisor.stat")
    assert stat is not None
    return stat.turn_monotonic


def test_a_supervisor_that_was_stopped_itself_does_not_take_its_children_for_hung(
    system: System,
) -> None:
    system.start({"name": "a"}, hung_turn_s=0.5)
    child = system.pid_of("a")
    for pid in (system.pid, child):
        os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    until(lambda: time.monotonic() > stopped_s + 2.2)
    went_on_s = time.monotonic()
    system.signal(signal.SIGCONT)
    until(lambda: turned_s(system) > went_on_s)
    os.kill(child, signal.SIGCONT)
    until(lambda: time.monotonic() > went_on_s + 1.2)

    assert (system.child("a").pid, system.child("a").starts) == (child, 1)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_kill_of_the_supervisor_leaves_nobody_a_second_later(
    system: System, stopped: bool
) -> None:
    system.start({"name": "a"}, {"name": "b", "role": "stubborn"})
    with system.operator() as client:
        client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})
        client.ask(
            "child:start", {"name": "trap", "argv": ["sh", "-c", "trap '' TERM; exec sleep 60"]}
        )
    everybody = system.processes()
    assert len(everybody) >= 6
    if stopped:
        os.kill(system.pid_of("a"), signal.SIGSTOP)
        os.kill(system.pid_of("worker"), signal.SIGSTOP)
    system.signal(signal.SIGKILL)

    # Its threads may be going yet when the first of them has gone, and with them its lock.
    until(lambda: not any(map(is_alive, everybody)) and not lock.holder(system.var), wait_s=1.0)


def test_a_death_of_the_fork_server_takes_its_children_and_all_come_back(system: System) -> None:
    system.start({"name": "a"}, {"name": "b"})
    server = psutil.Process(system.pid_of("a")).ppid()
    os.kill(server, signal.SIGKILL)

    for name in ("a", "b"):
        system.until_again(name, 2)
    assert psutil.Process(system.pid_of("a")).ppid() != server
    system.signal(signal.SIGKILL)
    pids = [system.pid_of(name) for name in ("a", "b")]
    until(lambda: not any(map(is_alive, pids)), wait_s=1.0)


def test_a_supervisor_starts_its_fork_server_itself_and_nothing_else(system: System) -> None:
    system.start({"name": "a"})
    server = psutil.Process(system.pid_of("a")).ppid()

    assert [child.pid for child in psutil.Process(system.pid).children()] == [server]


def test_a_child_that_was_forked_ahead_takes_the_place_of_another_and_is_no_loss(
    system: System,
) -> None:
    system.start({"name": "a"})
    server = psutil.Process(psutil.Process(system.pid_of("a")).ppid())

    def spare() -> psutil.Process | None:
        known = system.pid_of("a")
        return next((each for each in server.children() if each.pid != known), None)

    ahead = until(spare).pid
    os.kill(system.pid_of("a"), signal.SIGKILL)
    system.until_again("a", 2)
    assert system.pid_of("a") == ahead
    lost = until(spare)
    lost.kill()
    until(lambda: not is_alive(lost.pid))
    os.kill(ahead, signal.SIGKILL)
    system.until_again("a", 3)
    assert system.pid_of("a") not in (ahead, lost.pid)


def test_a_second_start_is_refused_at_once_and_names_the_holder(system: System) -> None:
    system.start({"name": "a"})
    began_s = time.monotonic()
    with pytest.raises(Conflict, match=f"in use by supervisor pid {system.pid} ") as refused:
        lock.hold(system.var)
    assert time.monotonic() - began_s < 0.3

    with pytest.raises(Conflict, match=f"pid {system.pid} "):
        launch.start_background(system.var, tree="supervised:tree", modules=())
    assert refused.value.details["pid"] == system.pid
    assert abs(refused.value.details["since"] - time.time()) < 60
    assert system.child("a").state == "RUNNING"


def test_the_holder_is_known_while_it_lives_even_stopped_and_only_then(system: System) -> None:
    assert lock.holder(system.var) is None
    system.start({"name": "a"})
    system.signal(signal.SIGSTOP)
    holder = lock.holder(system.var)
    system.signal(signal.SIGCONT)
    assert holder is not None
    assert holder.pid == system.pid

    system.stop()
    assert lock.holder(system.var) is None


def test_a_lock_that_is_only_looked_at_does_not_refuse_a_start(tmp_path: Path) -> None:
    os.close(lock.hold(tmp_path))
    looking = os.open(tmp_path / "run" / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(2.5 * lock.PAUSE_S, os.close, (looking,))
    timer.start()

    os.close(lock.hold(tmp_path))
    timer.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_in_order(system: System, number: int) -> None:
    system.start({"name": "a"}, {"name": "b"})
    system.signal(number)

    assert system.ended()
    assert [name for word, name in system.trace() if word == "stop"] == ["b", "a"]
    assert reports.read_exit(run_directory(system.var)) is None
    assert '"exit_code": 0' in system.said()


def test_a_child_that_does_not_stop_is_killed_after_its_time(system: System) -> None:
    system.start({"name": "a"}, {"name": "b", "role": "stubborn"}, shutdown_s=0.4)
    began_s = time.monotonic()
    system.stop()

    assert 0.4 <= time.monotonic() - began_s < 2.0
    assert system.child("b").last_exit == "signal 9 (SIGKILL)"
    assert system.child("a").last_exit == "exit 0"


def test_a_stopped_child_does_not_keep_the_system_from_stopping(system: System) -> None:
    system.start({"name": "a"}, shutdown_s=0.3)
    os.kill(system.pid_of("a"), signal.SIGSTOP)

    system.stop()


def test_a_second_signal_hurries(system: System) -> None:
    system.start(
        {"name": "a", "role": "stubborn"}, {"name": "b", "role": "stubborn"}, shutdown_s=60
    )
    system.signal(signal.SIGTERM)
    until(lambda: "stopping" in system.said())
    began_s = time.monotonic()
    system.signal(signal.SIGINT)

    assert system.ended()
    assert time.monotonic() - began_s < 2.0


def test_a_hangup_takes_up_settings_and_leaves_children_running(system: System) -> None:
    system.start({"name": "a", "role": "stubborn"})
    child = system.pid_of("a")
    (system.var / "ksi.toml").write_text("[supervisor]\nshutdown_s = 0.2\n")
    system.signal(signal.SIGHUP)
    until(lambda: "settings reloaded" in system.said())

    assert system.pid_of("a") == child
    began_s = time.monotonic()
    system.stop()
    assert time.monotonic() - began_s < 2.0


def test_hangups_leave_no_files_open(system: System) -> None:
    system.start({"name": "a"})

    def hang_up(times: int) -> int:
        """Return how many files the supervisor has open after so many hangups in all."""
        system.signal(signal.SIGHUP)
        until(lambda: system.said().count("settings reloaded") == times)
        return psutil.Process(system.pid).num_fds()

    first = hang_up(1)
    assert [hang_up(times) for times in range(2, 6)] == [first] * 4


def test_a_hangup_with_settings_that_are_wrong_changes_nothing(system: System) -> None:
    system.start({"name": "a"})
    (system.var / "ksi.toml").write_text("[supervisor]\nshutdwn_s = 0.2\n")
    system.signal(signal.SIGHUP)

    until(lambda: "the settings are as before" in system.said())
    assert system.child("a").state == "RUNNING"


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(system: System) -> None:
    system.start({"name": "a"})
    path = log.directory(system.var) / "supervisor.jsonl"
    path.rename(path.with_suffix(".old"))
    os.kill(system.pid_of("a"), signal.SIGKILL)
    system.until_again("a", 2)

    assert '"BACKOFF"' in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_agent_gets_its_identity_its_var_and_a_place_of_its_own(
    system: System, tmp_path: Path
) -> None:
    system.start({"name": "a"})
    code = (
        "import json, os; print(json.dumps({'env': dict(os.environ), 'cwd': os.getcwd(),"
        " 'fds': sorted(os.listdir('/proc/self/fd'), key=int), 'umask': os.umask(0),"
        " 'leads': os.getsid(0) == os.getpid(),"
        " 'status': open('/proc/self/status').read()}))"
    )
    with system.operator() as client:
        fields = {
            "name": "worker",
            "argv": ["python", "-c", code],
            "env": {"COLOR": "blue", "KSI_VAR": "elsewhere"},
            "cwd": str(tmp_path),
            "identity": "alice",
            "restart": "temporary",
        }
        client.ask("child:start", fields)
    said = json.loads(until(log.output(system.var, "worker").read_text))

    assert said["env"]["KSI_AGENT"] == "alice"
    assert said["env"]["KSI_VAR"] == str(system.var)
    assert said["env"]["COLOR"] == "blue"
    assert said["env"]["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert (said["cwd"], said["umask"], said["leads"]) == (str(tmp_path), 0o077, True)
    assert said["fds"] == ["0", "1", "2", "3"]  # 3 is the listing itself
    masks = dict(line.split(":\t") for line in said["status"].splitlines() if "Sig" in line)
    python_ignores = {signal.SIGPIPE, signal.SIGXFSZ}
    ignored = {number for number in range(1, 32) if int(masks["SigIgn"], 16) >> number - 1 & 1}
    assert (int(masks["SigBlk"], 16), ignored) == (0, python_ignores)
    assert log.output(system.var, "worker").stat().st_mode & 0o777 == 0o600


def test_an_agent_that_fails_too_often_is_fatal_alone(system: System) -> None:
    system.start({"name": "a"}, agent_intensity=2, backoff_first_s=0.01)
    with system.operator() as client:
        client.ask("child:start", {"name": "worker", "argv": ["false"]})
        worker = system.until_child("worker", lambda child: child.state == "FATAL")
        assert (worker.restarts, worker.last_exit) == (2, "exit 1")

        status = client.ask("system:status")
        assert {child["name"]: child["state"] for child in status["children"]} == {
            "a": "RUNNING",
            "worker": "FATAL",
        }
        client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})
        assert system.child("worker").state == "RUNNING"


def test_an_agent_that_cannot_be_run_is_refused_with_the_reason(system: System) -> None:
    system.start({"name": "a"})
    with system.operator() as client:
        for argv, words in ((["no-such-program"], "No such file"), (["/tmp"], "Permission denied")):
            with pytest.raises(Invalid, match=words):
                client.ask("child:start", {"name": "worker", "argv": argv})
        with pytest.raises(Conflict, match="name of an owner"):
            client.ask("child:start", {"name": "a", "argv": ["sleep", "1"]})
        client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})
        with pytest.raises(Conflict, match="RUNNING already"):
            client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})
        with pytest.raises(NotFound, match="no child 'wrker'") as refused:
            client.ask("child:stop", {"name": "wrker"})
        assert refused.value.hint == "did you mean worker?"


@pytest.mark.parametrize("force", [False, True])
def test_an_agent_that_is_stopped_takes_along_what_it_has_started(
    system: System, force: bool
) -> None:
    system.start({"name": "a"})
    with system.operator() as client:
        shell = ["sh", "-c", "sleep 60 & sleep 60"]
        pid = client.ask("child:start", {"name": "worker", "argv": shell})["pid"]
        family = until(
            lambda: (
                [p.pid for p in psutil.Process(pid).children()][1:]
                and [pid, *(p.pid for p in psutil.Process(pid).children())]
            )
        )
        client.ask("child:stop", {"name": "worker", "force": force})

        until(lambda: not any(map(is_alive, family)))
        until(lambda: len(client.ask("system:status")["children"]) == 1)


def test_the_registry_is_told_what_becomes_of_agents(system: System) -> None:
    system.start({"name": "registry", "role": "answering"}, agent_intensity=1)

    until(lambda: system.told() == [("agent:muster", {"running": []})])
    with system.operator() as client:
        pid = client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})["pid"]
        os.kill(pid, signal.SIGKILL)
        again = system.until_again("worker", 2).pid
        os.kill(again or 0, signal.SIGKILL)
        system.until_child("worker", lambda child: child.state == "FATAL")
        for name, words in (("worker", "nowhere"), ("other", "nowhere")):
            with pytest.raises(Invalid):
                client.ask("child:start", {"name": name, "argv": [words]})
        with pytest.raises(Invalid, match="env"):
            client.ask("child:start", {"name": "odd", "argv": ["sleep"], "env": {"a-b": ""}})
        with pytest.raises(Conflict, match="name of an owner"):
            client.ask("child:start", {"name": "registry", "argv": ["sleep"]})
        with pytest.raises(NotFound):
            client.ask("child:stop", {"name": "unknown"})
        client.ask("child:start", {"name": "last", "argv": ["sleep", "60"]})
        client.ask("child:stop", {"name": "last"})
        until(
            lambda: (
                system.told()[-1][1]["agent_id"] == "last"
                and system.told()[-1][1]["state"] == "exited"
            )
        )

    def of(name: str) -> list[tuple[Any, ...]]:
        keys = ("state", "pid", "exit", "again")
        return [
            tuple(fields[key] for key in keys)
            for operation, fields in system.told()
            if operation == "agent:report" and fields["agent_id"] == name
        ]

    killed, missing = "signal_9_(SIGKILL)", "agent_other_cannot_be_started:_nowhere:_No_such_file"
    assert of("worker")[:4] == [
        ("started", pid, None, False),
        ("exited", None, killed, True),
        ("started", again, killed, False),
        ("failed", None, killed, False),
    ]
    assert [(fate, words.startswith(missing)) for fate, _, words, _ in of("other")] == [
        ("failed", True)
    ]
    assert [fate for fate, *_ in of("odd")] == [fate for fate, *_ in of("registry")] == ["failed"]
    assert of("unknown") == [("exited", None, None, False)]
    assert of("last")[-1] == ("exited", None, "signal_15_(SIGTERM)", False)


def test_what_the_registry_missed_while_it_was_down_it_is_told_when_it_is_back(
    system: System,
) -> None:
    system.start({"name": "registry", "role": "answering"})
    with system.operator() as client:
        os.kill(system.pid_of("registry"), signal.SIGSTOP)
        pid = client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})["pid"]
        os.kill(system.pid_of("registry"), signal.SIGKILL)
        system.until_again("registry", 2)

    until(
        lambda: (
            [
                fields["pid"]
                for operation, fields in system.told()
                if operation == "agent:report" and fields["state"] == "started"
            ]
            == [pid]
        )
    )


def test_a_registry_that_was_restored_is_told_again_which_agents_run(system: System) -> None:
    system.start({"name": "registry", "role": "answering"})
    with system.operator() as client:
        client.ask("child:start", {"name": "worker", "argv": ["sleep", "60"]})
        until(lambda: len(system.told()) == 2)
        (system.var / "registry.store").write_text("second")
        os.kill(system.pid_of("registry"), signal.SIGKILL)
        system.until_again("registry", 2)
        client.ask("child:start", {"name": "next", "argv": ["sleep", "60"]})

    until(
        lambda: any(
            operation == "agent:muster" and "worker" in fields["running"]
            for operation, fields in system.told()
        )
    )


def test_one_child_is_restarted_in_order_on_request(system: System) -> None:
    system.start({"name": "a"}, {"name": "b"}, intensity=0)
    first = system.pid_of("a")
    with system.operator() as client:
        assert client.ask("system:restart", owner="a") == {"name": "a", "pid": first}
        again = system.until_again("a", 2)

    assert ("stop", "a") in system.trace()
    assert (again.restarts, again.last_exit) == (0, "exit 0")
    assert system.child("b").starts == 1


def test_the_system_is_stopped_by_request_and_only_by_an_operator(system: System) -> None:
    system.start({"name": "a"})
    with Client("alice", var=system.var) as alice:
        assert alice.ask("system:status")["pid"] == system.pid
        for operation, fields in (
            ("system:stop", {}),
            ("system:restart", {"owner": "a"}),
            ("child:start", {"name": "x", "argv": ["sleep", "1"]}),
        ):
            with pytest.raises(Forbidden):
                alice.ask(operation, fields)
    with system.operator() as client:
        assert client.ask("system:stop") == {"name": "supervisor", "pid": system.pid}

    assert system.ended()
    assert ("stop", "a") in system.trace()


def test_in_the_foreground_it_is_the_process_that_was_started(system: System) -> None:
    system.describe({"name": "a"})
    code = "import sys; from pathlib import Path\n"
    code += "from ksi.actors.supervision.launch import run_foreground\n"
    code += "run_foreground(Path(sys.argv[1]), tree='supervised:tree', modules=['structlog'])"
    with subprocess.Popen(
        [sys.executable, "-c", code, system.var], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        holder = lock.holder(system.var)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0

    assert lines[0].startswith("a ")
    assert f"supervisor pid {process.pid}" in lines[1]
    assert holder is not None
    assert holder.pid == process.pid


def test_the_exit_code_says_that_it_gave_up(system: System) -> None:
    system.describe({"name": "a", "role": "broken"})
    code = "import sys; from pathlib import Path\n"
    code += "from ksi.actors.supervision.launch import run_foreground\n"
    code += "run_foreground(Path(sys.argv[1]), tree='supervised:tree', modules=['structlog'])"
    ran = subprocess.run(
        [sys.executable, "-c", code, system.var], stderr=subprocess.PIPE, text=True, check=False
    )

    assert ran.returncode == 1
    assert "ksi: internal: a ended before it was ready (exit 1)" in ran.stderr
    assert "the disk is on fire" in ran.stderr


def test_an_idle_supervisor_rests(system: System) -> None:
    system.start({"name": "a"}, {"name": "b"})
    process = psutil.Process(system.pid)

    def spent_s() -> float:
        return process.cpu_times().user + process.cpu_times().system

    before_s, began_s = spent_s(), time.monotonic()
    until(lambda: time.monotonic() > began_s + 1.0)
    assert spent_s() - before_s < 0.1


def test_the_fork_server_has_one_thread_and_children_share_nothing_with_the_supervisor(
    system: System,
) -> None:
    system.start({"name": "a"})
    child = psutil.Process(system.pid_of("a"))
    server = child.parent()
    assert server is not None
    assert server.num_threads() == 1

    def opened(pid: int) -> set[str]:
        paths = set()
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed just now
                paths.add(os.readlink(f"/proc/{pid}/fd/{number}"))
        return paths

    shared = opened(system.pid) & opened(child.pid)
    assert not [path for path in shared if path.startswith(str(system.var))]
    assert os.getsid(child.pid) == child.pid
