"""A test that stays green on its mutant is no test: each is run on the mutant it has to find."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import HERE, MUTANTS, VARIABLE, Mutant

ROOT = HERE.parent
FAILED = 1  # pytest: tests were run and some failed; not: none was found, or it could not start
MUTANT_S_MAX = 300.0
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
QUICK = [name for name, mutant in MUTANTS.items() if not mutant.is_slow]
SLOW = [name for name, mutant in MUTANTS.items() if mutant.is_slow]


def promises() -> dict[str, tuple[list[str], list[str]]]:
    """Return the tests and the mutants of each promise on the page."""
    rows = re.findall(r"^\| (P\d+) \| (.*) \| (.*) \| (.*)\|$", RELIABILITY, re.M)
    return {
        number: (re.findall(r"`(.+?)`", tests), re.findall(r"`(.+?)`", mutants))
        for number, _promise, tests, mutants in rows
    }


def test_every_promise_on_the_page_has_tests_that_are_there() -> None:
    found = promises()
    assert list(found) == [f"P{number}" for number in range(1, 15)]
    for number, (tests, _mutants) in found.items():
        assert tests, f"{number} has no test"
        for test in tests:
            path, _, name = test.partition("::")
            assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{number}: there is no {test}"


def test_every_mutant_is_on_the_page_with_a_test_that_finds_it() -> None:
    rows = promises().values()
    assert sorted(name for _, mutants in rows for name in mutants) == sorted(MUTANTS)
    for tests, mutants in rows:
        for name in mutants:
            assert MUTANTS[name].test.split("[")[0] in tests


@pytest.mark.parametrize("name", QUICK)
def test_a_mutant_is_found_by_the_test_of_the_promise_it_breaks(name: str, tmp_path: Path) -> None:
    require_found(name, MUTANTS[name], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", SLOW)
def test_a_mutant_is_found_by_the_storm_it_breaks(name: str, tmp_path: Path) -> None:
    require_found(name, MUTANTS[name], tmp_path)


def require_found(name: str, mutant: Mutant, tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*words, "--basetemp", str(tmp_path / "there"), mutant.test],
        cwd=ROOT,
        env={**os.environ, VARIABLE: name, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
        timeout=MUTANT_S_MAX,
    )
    assert done.returncode == FAILED, f"the suite is blind to {name}: {done.stdout[-2000:]}"
    assert re.search(mutant.words, done.stdout), done.stdout[-3000:]
