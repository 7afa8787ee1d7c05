"""A server that speaks OpenAI's chat completions and Anthropic's messages, as tests want it to.

What it does is what the last prompt says: `429`, `hang`, `cut`, `slow`, `wait`, `once`; else it
repeats it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

BUSY_S: Final = 0.1


class Model(BaseHTTPRequestHandler):
    """One request. `asked` is what bodies came, `left` how many callers went away.

    `go` lets an answer go on that waits behind its first piece.
    `busy` counts calls that take a while, `busiest` is how many there were of them at a time.
    """

    asked: ClassVar[list[dict[str, Any]]] = []
    keys: ClassVar[list[str]] = []
    left = threading.Event()
    go = threading.Event()
    counting = threading.Lock()
    busy = busiest = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        key = self.headers.get("x-api-key") or self.headers.get("authorization") or ""
        self.keys.append(key)
        prompt = body["messages"][-1]["content"]
        if prompt.isdecimal():
            self.refuse(int(prompt), key)
        elif prompt == "once" and self.is_first(body):
            self.refuse(500, key)
        elif body["model"] == "missing":
            self.refuse(404, key)
        elif self.path == "/v1/chat/completions":
            self.stream(openai_events(body, prompt), prompt)
        elif self.path == "/v1/messages":
            self.stream(anthropic_events(body, prompt), prompt)

    def is_first(self, body: dict[str, Any]) -> bool:
        """Whether this is asked for the first time since something else was."""
        return len(self.asked) < 2 or self.asked[-2]["messages"] != body["messages"]

    def refuse(self, status: int, key: str) -> None:
        kind = {"type": "error", "message": f"no: {status}, key {key.split()[-1]}"}
        said = json.dumps({"type": "error", "error": kind}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        if status == 429:
            self.send_header("retry-after", "0.4")
        self.end_headers()
        self.wfile.write(said)

    def stream(self, events: list[str], prompt: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        if prompt == "hang":
            self.wait_for_the_end()
            return
        if prompt == "slow":
            self.take_a_while()
        for event in events[: len(events) // 2] if prompt == "cut" else events:
            self.wfile.write(event.encode())
            if prompt == "wait":
                self.go.wait(20)
        self.close_connection = True

    def take_a_while(self) -> None:
        """Be busy, so that others would have the time to call as well."""
        with self.counting:
            Model.busy += 1
            Model.busiest = max(Model.busiest, Model.busy)
        time.sleep(BUSY_S)  # It is what is counted.
        with self.counting:
            Model.busy -= 1

    def wait_for_the_end(self) -> None:
        """Say nothing until the caller is gone."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(20)
            self.connection.recv(1)
        self.left.set()


def pieces(prompt: str) -> list[str]:
    if prompt == "empty":
        return [""]
    return [word + " " for word in f"you said {prompt}".split()]


def openai_events(body: dict[str, Any], prompt: str) -> list[str]:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": each}, "finish_reason": None}]}
        for each in pieces(prompt)
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 21, "completion_tokens": 7, "total_tokens": 28}
    chunks.append(
        {"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 5}}}
    )
    said = [f"data: {json.dumps({**head, **each})}\n\n" for each in chunks]
    return [*said, "data: [DONE]\n\n"]


def anthropic_events(body: dict[str, Any], prompt: str) -> list[str]:
    usage = {"input_tokens": 11, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 8}
    message = {
        "id": "m1", "type": "message", "role": "assistant", "model": body["model"], "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {**usage, "output_tokens": 1},
    }  # fmt: skip
    block = {"type": "text", "text": ""}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": e}}
            for e in pieces(prompt)
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 7},
        },
        {"type": "message_stop"},
    ]
    return [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events]


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Run the server; yield where it listens."""
    Model.asked.clear()
    Model.keys.clear()
    Model.left.clear()
    Model.busiest = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
