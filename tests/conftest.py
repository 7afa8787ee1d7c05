"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from system import System


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A running system of its own."""
    running = System(tmp_path / "var")
    yield running
    running.end()
