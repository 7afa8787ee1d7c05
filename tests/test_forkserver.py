from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import HOOK
from trouble import until

from ksi.actors import log
from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.forkserver import ANSWER_S_MAX, ForkServer, Running

HERE = Path(__file__).parent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    server = ForkServer(["forked:hook"])
    yield server
    server.end()


def spawned(server: ForkServer, var: Path, function: str, *arguments: str) -> Running:
    spec = ChildSpec(name="a", kind="follower", function=function, arguments=arguments)
    return server.spawn(spec, var, {"KSI_TOLD": "so"})


def ended(running: Running) -> int | None:
    assert select.select([running.pidfd], [], [], 10)[0]
    return running.ended()


def said(var: Path) -> str:
    return log.output(var, "a").read_text()


def test_a_child_has_its_environment_its_output_and_a_session_of_its_own(
    server: ForkServer, tmp_path: Path
) -> None:
    assert ended(spawned(server, tmp_path, "forked:show", "KSI_TOLD")) == 0
    assert said(tmp_path) == f"so {0o077} True\n"


@pytest.mark.parametrize(
    ("function", "argument", "code", "last"),
    [
        ("sys:exit", "what for", 1, "what for"),
        ("builtins:int", "x", 1, "ValueError: invalid literal for int() with base 10: 'x'"),
        ("os:abort", None, -signal.SIGABRT, None),
        ("nowhere:none", None, 1, "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_what_a_child_ends_with_is_its_code_and_why_is_in_its_output(
    server: ForkServer, tmp_path: Path, function: str, argument: str | None, code: int,
    last: str | None,
) -> None:  # fmt: skip
    arguments = () if argument is None else (argument,)
    assert ended(spawned(server, tmp_path, function, *arguments)) == code
    if last is not None:
        assert said(tmp_path).splitlines()[-1] == last
    assert ended(spawned(server, tmp_path, "builtins:print", "next")) == 0


def test_an_order_may_be_longer_than_what_a_socket_holds(
    server: ForkServer, tmp_path: Path
) -> None:
    word = "𝄞" * (128 << 10)
    assert ended(spawned(server, tmp_path, "builtins:print", word)) == 0
    assert said(tmp_path) == word + "\n"


def test_no_child_does_what_modules_ask_for_at_forks_but_it_may_itself(
    server: ForkServer, tmp_path: Path
) -> None:
    assert ended(spawned(server, tmp_path, "builtins:print", "alone")) == 0
    assert said(tmp_path) == "alone\n"
    assert ended(spawned(server, tmp_path, "forked:fork")) == 0
    assert said(tmp_path) == f"alone\n{HOOK}\n"


def test_a_server_that_was_killed_takes_its_children_and_the_next_child_has_another(
    server: ForkServer, tmp_path: Path
) -> None:
    first = spawned(server, tmp_path, "forked:wait")
    server.keep_spare(None)
    os.kill(first.server.pid, signal.SIGKILL)
    until(lambda: " (python) Z " in Path(f"/proc/{first.server.pid}/stat").read_text())
    second = spawned(server, tmp_path, "builtins:print", "here")

    assert ended(first) is None
    assert second.server is not first.server
    assert ended(second) == 0
    assert said(tmp_path) == "here\n"


def test_a_server_that_does_not_answer_is_ended_with_its_children_and_the_next_child_has_another(
    server: ForkServer, tmp_path: Path
) -> None:
    first = spawned(server, tmp_path, "forked:wait")
    assert first.server._channel.gettimeout() == ANSWER_S_MAX
    first.server._channel.settimeout(0.2)
    os.kill(first.server.pid, signal.SIGSTOP)
    second = spawned(server, tmp_path, "builtins:print", "here")

    assert ended(first) is None
    assert second.server is not first.server
    assert ended(second) == 0
    assert said(tmp_path) == "here\n"


def test_a_spare_becomes_the_next_child(server: ForkServer, tmp_path: Path) -> None:
    first = spawned(server, tmp_path, "forked:wait")
    server.keep_spare(first.pid)
    children = Path(f"/proc/{first.server.pid}/task/{first.server.pid}/children")
    assert len(until(lambda: children.read_text().split())) == 2
    spare = ({*map(int, children.read_text().split())} - {first.pid}).pop()

    assert spawned(server, tmp_path, "forked:wait").pid == spare


def test_a_fork_that_the_system_refuses_is_an_error_and_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    server = ForkServer(["forked:refuse"])
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
            spawned(server, tmp_path, "forked:wait")
    assert server.fault() is None
    server.end()


def test_what_keeps_the_server_from_loading_is_told_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer(["json", "wrong", "nowhere"])
    fault = server.fault()
    server.end()
    assert fault == f"{tmp_path}/wrong.py:1: ZeroDivisionError: division by zero"


def test_whoever_ends_the_server_ends_all_children(server: ForkServer, tmp_path: Path) -> None:
    running = spawned(server, tmp_path, "forked:wait")
    server.keep_spare(None)
    began_s = time.monotonic()
    server.end()
    assert select.select([running.pidfd], [], [], 10)[0]
    assert time.monotonic() - began_s < 5
    assert running.ended() is None
