"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mutants
import pytest
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
