"""What a process keeps to itself once it has started. Nearly all of it is pages of the fork server
that it has written to, and so copied: the fewer it writes to, the less it takes."""

from __future__ import annotations

import ctypes
import gc
from typing import Any, Final

_trim: Final[Any] = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not


def settle() -> None:
    """Take all there is for what stays: the collector passes it by, and free pages go back.

    Nothing is collected first: that would leave holes, which are filled in one page each.
    Source: `gc.freeze` in the documentation of Python, malloc_trim(3).
    """
    gc.freeze()
    if _trim is not None:
        _trim(0)
