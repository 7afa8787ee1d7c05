"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mutants
import pytest
import soaked
from left_behind import Left, left_behind
from system import System

from ksi.transport import Client

mutants.apply()
# A shell that runs tests in the background has it ignored, in all that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
_reached: dict[str, soaked.Reached] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what a slow proof reached; with workers, the process that started them hears of all."""
    if report.when == "call" and "soak" in report.keywords:
        said = soaked.reached(report.outcome, report.capstdout, report.duration)
        _reached[report.nodeid] = said


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, in the process that has heard of all."""
    is_first = not hasattr(session.config, "workerinput")
    if _reached and is_first and mutants.VARIABLE not in os.environ:
        soaked.write(_reached)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A running system of its own."""
    running = System(tmp_path / "var")
    yield running
    running.end()


@pytest.fixture
def alice(system: System) -> Iterator[Client]:
    """An agent of that system, or of the one that the module shares."""
    with system.client("alice") as client:
        yield client


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory where syncs cost nothing; to the death of a process it makes no difference."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, prefix="ksi-test-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def left() -> Iterator[Left]:
    """What a system that was killed has left to be done. Whoever uses it puts it back first."""
    with left_behind() as found:
        yield found
