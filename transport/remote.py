"""Directories that stand for a system on another machine.

`ksi agents enroll NAME --to DIR` makes one, to be carried there: it holds a key and the addresses
of the owners, and is used like a var directory. What needs the files or processes of the system
does not work with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ksi.transport.errors import Invalid

REMOTE_NAME: Final = "remote.json"  # has the form of `run/endpoints.json`


def is_remote(var: Path) -> bool:
    """Whether `var` stands for a system on another machine."""
    return (var / REMOTE_NAME).exists()


def require_here(var: Path, what: str) -> None:
    """Raise `Invalid` where `var` stands for a system on another machine."""
    if is_remote(var):
        raise Invalid(
            f"{what} works on the machine of the system only: {var} stands for one elsewhere",
            hint="ksi ask, send and read work from here",
        )
