"""What a process keeps to itself once it has started."""

import ctypes
import platform
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

# Three of a family: one writes to every other page, the next copies those before it is asked to.
COPIED = """
import mmap, os, resource, signal
from ksi.actors.memory import copy_as

PAGES = 400
memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)

def write(first, what):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for page in range(first, PAGES, 2):
        memory[page * mmap.PAGESIZE] = what
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

write(0, 1), write(1, 1)
ready, tell = os.pipe()
first = os.fork()
if first == 0:
    write(0, 2)
    os.write(tell, b"!")
    signal.pause()
os.read(ready, 1)
second = os.fork()
if second == 0:
    copy_as(first)
    assert set(memory[::mmap.PAGESIZE]) == {1}, "a copy is of what was there"
    assert write(0, 3) < PAGES // 8 < PAGES // 4 < write(1, 3)
    copy_as(0x7FFFFFFF)  # Whoever has ended meanwhile.
    os._exit(0)
status = os.waitpid(second, 0)[1]
os.kill(first, signal.SIGKILL)
os.waitpid(first, 0)
assert status == 0
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


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (5, 14), reason="not by this kernel"
)
def test_what_another_of_the_same_fork_server_has_written_to_is_copied_ahead() -> None:
    run(COPIED)
