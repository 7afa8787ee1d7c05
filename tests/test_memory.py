"""What a process keeps to itself once it has started."""

import ctypes
import subprocess
import sys

import pytest

SETTLED = """
import gc
from pathlib import Path
from ksi.actors.memory import settle

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [bytearray(1000) for _ in range(20_000)]
del blocks[:-1]  # The last holds what lies before it in its place.
before = resident()
settle()
assert before - resident() > 15_000_000, (before, resident())
assert gc.get_freeze_count() > len(gc.get_objects())
"""

# What pyzmq does when an option of a socket is set.
WARMED = """
from typing import Generic
from ksi.actors.process import warm

warm()
assert "__annotations__" in vars(Generic)
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not this C library")
def test_who_settles_gives_free_pages_back_and_its_collector_passes_by_what_is_there() -> None:
    run(SETTLED)


def test_no_owner_is_the_first_to_look_at_what_changes_all_messages() -> None:
    run(WARMED)
