"""From a command to a running supervisor, in the foreground or the background.

    console ── start_background ──▶ python -c main ── forks, the first one ends ──▶ supervisor
        ◀── one JSON line a child that is ready, then {"ready": …} or {"error": …} ──┘

The supervisor is an interpreter of its own whose `__main__` is empty (see `forkserver.py`). `main`
takes the lock before it binds, opens or starts anything, and starts the fork server before its own
imports, so that both load at the same time. Whatever keeps it from starting is said in one error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

from ksi.actors import lock, log, tree_names
from ksi.transport.errors import Internal, Invalid, KsiError, from_wire

Progress = Callable[[Mapping[str, Any]], None]
