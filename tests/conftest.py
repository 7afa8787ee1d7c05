"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mutants
import pytest
from left_behind import Left, left_behind
from system import System

mutants.apply()


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A running system of its own."""
    running = System(tmp_path / "var")
    yield running
    running.end()


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
