"""Serving the Model Context Protocol: on stdin and stdout, or over HTTP on loopback.

On loopback whoever runs on this machine can connect, so HTTP asks for a token that is made from the
secret key of the identity: who may read that may be that agent anyway, and it goes with the key.
"""

from __future__ import annotations

import hashlib
import hmac
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import uvicorn
from mcp.server import NotificationOptions
from mcp.server.stdio import stdio_server
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ksi.adapters.mcp import ToolServer
from ksi.transport.errors import Forbidden
from ksi.transport.identity import KeyRing
from ksi.transport.limits import FRAME_BYTES_MAX

HOST: Final = "127.0.0.1"
# What an argument of the greatest size takes as JSON, and more: it is refused in our own words.
BODY_BYTES_MAX: Final = 4 * FRAME_BYTES_MAX
_BACKLOG: Final = 128
_SHUTDOWN_S: Final = 1  # What open streams get to end in: they have no end of their own.


async def serve_stdio(tools: ToolServer) -> None:
    """Serve one client on stdin and stdout, until it closes stdin."""
    server = tools.server
    async with stdio_server() as (read, write):
        options = server.create_initialization_options(NotificationOptions())
        await server.run(read, write, options)


async def serve_http(
    tools: ToolServer, port: int, secret: str | None, ready: Callable[[str], None]
) -> None:
    """Serve any number of clients on loopback, until SIGTERM or SIGINT.

    Args:
        port: 0 for a free one.
        secret: the token to ask for; None: none.
        ready: is told the address, once clients are heard there.

    Raises:
        OSError: the port is taken.
    """
    app: ASGIApp = tools.server.streamable_http_app(host=HOST, max_request_body_size=BODY_BYTES_MAX)
    if secret is not None:
        app = TokenRequired(app, secret)
    with socket.create_server((HOST, port), backlog=_BACKLOG) as listening:
        ready(f"http://{HOST}:{listening.getsockname()[1]}/mcp")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # uvicorn raises what has ended it once more.
        settings = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S
        )
        await uvicorn.Server(settings).serve(sockets=[listening])


def token(var: Path, name: str) -> str:
    """Return the token of an identity: the same for as long as it has this key.

    Raises:
        Forbidden: this directory does not hold its secret key.
    """
    certificate = KeyRing(var).load(name)
    if certificate is None or certificate.secret is None:
        raise Forbidden(f"{var} does not hold the key of {name}", hint="ksi agents enroll NAME")
    return hmac.new(certificate.secret, b"ksi mcp serve --http", hashlib.sha256).hexdigest()


class TokenRequired:
    """Refuses requests that do not carry the token."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and not self._admits(scope):
            text = "ksi: forbidden: send the header `Authorization: Bearer TOKEN`; ksi mcp token"
            refused = PlainTextResponse(text, 401, {"WWW-Authenticate": "Bearer"})
            await refused(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), self._expected)
