"""A whole system in a directory of its own, for tests: real processes, real sockets, real files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ksi.actors.supervisor import start_background
from ksi.transport import Client
from ksi.transport.identity import run_directory


class System:
    """A running supervisor and its owners on `var`."""

    def __init__(self, var: Path, **flags: Any) -> None:
        self.var = var
        self._flags = flags
        self.start()

    def start(self) -> None:
        start_background(self.var, self._flags)

    def children(self) -> dict[str, Any]:
        path = run_directory(self.var) / "children.json"
        return {each["name"]: each for each in json.loads(path.read_text())["children"]}

    def pid_of(self, name: str) -> int | None:
        """Return the process of a child that runs now."""
        pid: int | None = self.children()[name]["pid"]
        return pid

    def client(self, name: str, **more: Any) -> Client:
        return Client(name, var=self.var, **more)
