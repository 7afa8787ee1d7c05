"""Servers of the Model Context Protocol for tests: in this process, on pipes, and over HTTP."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters
from system import System

from ksi.adapters.mcp import ToolServer
from ksi.adapters.tools import Catalogue
from ksi.console.declared import catalogue
from ksi.transport import AsyncClient
from ksi.transport.message import Role

WAIT_S = 20.0


def words(var: Path, *more: str, name: str = "alice") -> list[str]:
    """Return the command line of a server."""
    common = ["-P", "-m", "ksi.console", "--var", str(var), "--as", name]
    return [sys.executable, *common, "mcp", "serve", *more]


@cache
def tools_of(role: Role = "agent", *patterns: str) -> Catalogue:
    return Catalogue(catalogue().values(), role, patterns or ("*",))


@asynccontextmanager
async def within(
    system: System,
    *,
    name: str = "alice",
    role: Role = "agent",
    mode: str = "auto",
    patterns: Sequence[str] = (),
    **more: Any,
) -> AsyncIterator[Client]:
    """A client of a server in this process."""
    async with AsyncClient(name, var=system.var, role=role) as client:
        server = ToolServer(client, tools_of(role, *patterns), **more)
        async with Client(server.server, mode=mode) as found:
            yield found
        await server.close()


@asynccontextmanager
async def on_pipes(var: Path, *more: str, mode: str = "auto") -> AsyncIterator[Client]:
    """A client of a server in a process of its own, on stdin and stdout."""
    command, *arguments = words(var, *more)
    async with Client(StdioServerParameters(command=command, args=arguments), mode=mode) as found:
        yield found


@contextmanager
def over_http(var: Path, *more: str, name: str = "alice") -> Iterator[str]:
    """Serve over HTTP in a process of its own; yield where."""
    command = [*words(var, "--http", "0", "--json", *more, name=name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            assert process.wait(WAIT_S) == 0


class Raw:
    """A client that says what it likes: a server on pipes, line by line."""

    def __init__(self, var: Path, *more: str) -> None:
        self.process = subprocess.Popen(
            words(var, *more), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._number = 0
        self._heard = b""
        client = {"name": "raw", "version": "1"}
        self.ask("initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo=client)
        self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def say(self, message: dict[str, Any] | bytes) -> None:
        """Send a message, or a line that is none."""
        assert self.process.stdin is not None
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def hear(self) -> bytes:
        """Return the next line."""
        assert self.process.stdout is not None
        while b"\n" not in self._heard:  # Several may come at once.
            assert select.select([self.process.stdout], [], [], WAIT_S)[0], "it says nothing"
            heard = os.read(self.process.stdout.fileno(), 1 << 16)
            assert heard, "it has ended"
            self._heard += heard
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def ask(self, method: str, **params: Any) -> bytes:
        """Return the line that answers a request."""
        self._number += 1
        asked = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        self.say(asked)
        while True:
            line = self.hear()
            if json.loads(line).get("id") == self._number:
                return line

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Return the result of a call, or the error."""
        said = json.loads(self.ask("tools/call", name=tool, arguments=arguments))
        found: dict[str, Any] = said.get("result") or said["error"]
        return found

    def end(self) -> int:
        """Close its stdin and return how it has ended."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
            return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """Kill it, if it lives. Harmless twice."""
        if self.process.returncode is None:
            with self.process:
                self.process.kill()
