"""Which run of the machine this is: what was not synced survives a process, not a boot."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def this_boot() -> str:
    """Return the kernel's id of this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
