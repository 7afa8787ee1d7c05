"""A query by `ask` against a raw pyzmq DEALER/ROUTER echo that carries frames of the same sizes.

The echo does nothing but return bytes: no identity, no decoding, no state. It is shown over ipc and
over ipc with CURVE, which is what every connection of ours is.

    python -m benchmarks.ask
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from pathlib import Path
from typing import Any, Final

import zmq

from benchmarks.measuring import (
    Options,
    Report,
    System,
    Target,
    measuring,
    percentile,
    ratios,
    say,
    spread,
    timed,
)
from ksi.actors.declarations.sessions import Get
from ksi.transport import AsyncClient, Client, wire
from ksi.transport.message import encode
from ksi.transport.window import Window
from ksi.transport.wire import Kind

ASKS: Final = 1000  # a round of each side
TARGET: Final = Target("≤", 1.3)


def serve(endpoint: str, reply_bytes: int, secret: bytes | None) -> None:
    """Answer every frame with `reply_bytes` bytes, until killed."""
    router = zmq.Context().socket(zmq.ROUTER)
    if secret is not None:
        router.curve_server = True
        router.curve_secretkey = secret
    router.bind(endpoint)
    reply = b"x" * reply_bytes
    while True:
        route, _request = router.recv_multipart()
        router.send_multipart((route, reply))


class Echo:
    """A raw echo in a process of its own, and a DEALER to it."""

    def __init__(self, directory: Path, sizes: tuple[int, int], *, curve: bool) -> None:
        request_bytes, self.reply_bytes = sizes
        self._request = b"x" * request_bytes
        endpoint = f"ipc://{directory}/echo-{curve}"
        self._dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.RCVTIMEO, 5000)
        secret = None
        if curve:
            server_public, secret = zmq.curve_keypair()
            public, own_secret = zmq.curve_keypair()
            self._dealer.setsockopt(zmq.CURVE_SERVERKEY, server_public)
            self._dealer.setsockopt(zmq.CURVE_PUBLICKEY, public)
            self._dealer.setsockopt(zmq.CURVE_SECRETKEY, own_secret)
        self._dealer.connect(endpoint)
        context = multiprocessing.get_context("spawn")
        self._server = context.Process(
            target=serve, args=(endpoint, self.reply_bytes, secret), daemon=True
        )
        self._server.start()
        while True:  # until it is there
            self._dealer.send(self._request)
            if self._dealer.poll(100):
                break
        while self._dealer.poll(100):
            self._dealer.recv()

    def ask(self) -> bytes:
        self._dealer.send(self._request)
        return self._dealer.recv()

    def right(self, reply: bytes) -> bool:
        return len(reply) == self.reply_bytes

    def close(self) -> None:
        self._server.kill()
        self._server.join()
        self._dealer.close()


def frame_bytes(session_id: str, reply: dict[str, Any], store_id: str) -> tuple[int, int]:
    """Return the sizes of the frames of one ask: the request's and the answer's."""
    window = Window()
    window.store = store_id
    window.add_query("session:get", encode({"session_id": session_id}), time.monotonic() + 5)
    (request,) = window.frames(time.monotonic())
    answer = wire.Answer(1, encode(reply))
    return len(request), len(
        wire.encode(wire.OwnerFrame(wire.VERSION, Kind.ANSWERS, store_id, 0, [answer]))
    )


async def timed_async(client: AsyncClient, session_id: str, times: int) -> list[float]:
    taken_s = []
    for _ in range(times):
        begun_s = time.perf_counter()
        reply = await client.ask("session:get", session_id=session_id)
        taken_s.append(time.perf_counter() - begun_s)
        assert reply["session_id"] == session_id, reply
    return taken_s


def compare(options: Options, system: System, report: Report) -> None:
    asks = options.more.asks
    with system.client() as client, asyncio.Runner() as runner:
        session_id = client.ask("session:create")["session_id"]
        sizes = frame_bytes(
            session_id,
            client.ask("session:get", session_id=session_id),
            system.stat().store_id,
        )
        say(f"frames of {sizes[0]} and {sizes[1]} bytes")
        echoes = [Echo(options.directory, sizes, curve=curve) for curve in (False, True)]
        async_client = system.async_client("bench-async")
        measured: dict[str, list[list[float]]] = {}
        for number in range(options.rounds + 1):
            say(f"round {number} of {options.rounds}")
            taken_s = {
                "raw": timed(echoes[0].ask, asks, echoes[0].right),
                "raw CURVE": timed(echoes[1].ask, asks, echoes[1].right),
                **ask_all(client, session_id, asks),
                "AsyncClient.ask": runner.run(timed_async(async_client, session_id, asks)),
            }
            if number:  # the first is for warming up
                for side, latencies_s in taken_s.items():
                    measured.setdefault(side, []).append(latencies_s)
        runner.run(async_client.close())
        for echo in echoes:
            echo.close()
    add_rows(report, measured)


def ask_all(client: Client, session_id: str, asks: int) -> dict[str, list[float]]:
    query = Get(session_id=session_id)
    return {
        "Client.ask": timed(
            lambda: client.ask("session:get", session_id=session_id),
            asks,
            lambda reply: reply["session_id"] == session_id,
        ),
        "Client.ask, typed": timed(
            lambda: client.ask(query), asks, lambda reply: reply.session_id == session_id
        ),
    }


def add_rows(report: Report, measured: dict[str, list[list[float]]]) -> None:
    def us(side: str, part: float) -> list[float]:
        return [percentile(latencies_s, part) * 1e6 for latencies_s in measured[side]]

    shown = [("raw echo over CURVE", "raw CURVE", "p50", 0.5)]
    for side in ("Client.ask", "Client.ask, typed", "AsyncClient.ask"):
        shown += [(side, side, "p50", 0.5), (side, side, "p99", 0.99)]
    for what, side, name, part in shown:
        report.add(
            f"{what}, {name} us",
            f"{spread(us(side, part)):.0f}",
            f"{spread(us('raw', part)):.0f}",
            ratio=ratios(us(side, part), us("raw", part)),
            target=TARGET if (side, name) == ("Client.ask", "p50") else None,
        )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--asks", type=int, default=ASKS, help="a round of one side")


def main() -> None:
    with measuring(__doc__, arguments) as options:
        if options.quick:
            options.more.asks = 50
        report = Report(
            "a query by ask (session:get); the other side: a raw DEALER/ROUTER echo over ipc"
        )
        with System(options.directory / "var") as system:
            compare(options, system, report)
        report.show()


if __name__ == "__main__":
    main()
