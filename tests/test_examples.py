"""The programs in `examples/` and the blocks of the README run as they stand, on a real system."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from system import System

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()

# What each must have printed, in this order.
PRINTED = {
    "follow": [r"bob: created by alice", r"'seq': 1}", r"'seq': 3}", r"bob: closed by alice"],
    "handover": [
        r"alice owns it in epoch 1",
        r"bob owns it in epoch 2",
        r"stale_epoch: .* is in epoch 2, not 1",
        r"not_owner: .* written by bob \(epoch 2\), not by alice",
        r"bob wrote entry 3",
    ],
    "history": [
        r"history: \['completion:request', 'completion:request', 'completion:result'\]",
        r"pending: \['req_2'\]",
        r"with bob: 3",
        r"bob was: \['analyst'\]",
        r"the line: {'response': 'It is.', 'role': 'analyst'}",
    ],
    "own_model": [
        r"completed {'response': 'stressed', 'model': 'backwards-1', 'provider': 'backwards'}",
        r"8 entries in sess_",
        r"the worker has left",
    ],
    "peers": [
        r"curious: librarian can search",
        r"librarian: curious looks for the capital of France",
        r"curious: librarian found Paris",
        r"curious: librarian found Lima",
    ],
    "read_while_stopped": [
        r"asked: unavailable: ",
        r"read: \['one', 'two', 'three'\]",
        r"asked again: 3 entries",
    ],
    "team": [r"lea: the team is ada, ben", r"ada: author then critic", r"ben: critic then author"],
    "two_processes": [r"reader: writer noted {'n': 1}", r"{'n': 5}", r"both done: \[0, 0\]"],
}


@pytest.fixture(scope="module")
def var(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    system = System(tmp_path_factory.mktemp("examples") / "var")
    yield system.var
    system.end()


def run(command: list[str], var: Path, cwd: Path) -> str:
    """Run a command as its reader would: `ksi` on the path, the runtime directory named."""
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("KSI_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, "PATH": path, "KSI_VAR": str(var)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_expected_to_print_something() -> None:
    assert {path.stem for path in EXAMPLES} == set(PRINTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, var: Path, tmp_path: Path) -> None:
    printed = run([sys.executable, "-P", str(path)], var, tmp_path)

    assert re.search(".*".join(PRINTED[path.stem]), printed, re.S), printed
    assert len(path.read_text().splitlines()) < 60


def block(language: str) -> str:
    """Return the one block of the README in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    return str(found)


def test_the_python_of_the_readme_prints_what_its_comments_say(var: Path, tmp_path: Path) -> None:
    printed = run([sys.executable, "-P", "-c", block("python")], var, tmp_path).splitlines()

    assert printed[0] == "1"
    assert printed[1].endswith("is written by alice (epoch 1), not by bob")
    assert re.fullmatch(r"session\.sess_.+\.transferred", printed[2])
    assert printed[3] == "['hello', 'and hello']"


def test_the_shell_of_the_readme_runs_from_start_to_stop(tmp_path: Path) -> None:
    printed = run(["sh", "-eu", "-c", block("sh")], tmp_path / "var", tmp_path)

    for expected in ('"seq": 1', '"text": "hello"', "session:append", "KSI healthy", "stopped in"):
        assert expected in printed


def test_the_readme_is_a_page_or_two_and_names_only_what_is_there() -> None:
    assert len(README.splitlines()) <= 120
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|LICENSE)`", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
