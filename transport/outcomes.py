"""Waiting for the outcome of a completion: what both clients share.

An announcement says that a request may have ended; `completion:status` says whether it has. So an
announcement that is lost, with a connection or an owner, costs time and nothing else.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

from ksi.transport.errors import Unanswered, Unavailable
from ksi.transport.link import Delivery

RECHECK_S: Final = 1.0  # How long a lost announcement may go unnoticed.
_FINAL: Final = frozenset({"completed", "failed", "cancelled"})
_ENDS: Final = frozenset({"result", "failed", "cancelled", ""})  # "" tells of a gap


def topic(requester: str, request_id: str) -> str:
    """Return the pattern of what is announced of a request."""
    return f"completion.{requester}.{request_id}.*"


def has_ended(status: Mapping[str, Any]) -> bool:
    """Whether a reply to `completion:status` is an outcome."""
    return status["status"] in _FINAL


def may_have_ended(delivery: Delivery) -> bool:
    """Whether there is reason to ask again."""
    return delivery.gap > 0 or delivery.topic.rpartition(".")[2] in _ENDS


def fresh_id() -> str:
    """Return an id for a request: known before it is submitted, it can be listened for."""
    return f"req_{uuid.uuid4()}"


def hear(delivery: Delivery, on_tokens: Callable[[int, str], None] | None) -> None:
    """Pass on what a delivery says of an answer that grows."""
    if on_tokens is not None and delivery.topic.endswith(".tokens"):
        on_tokens(delivery.message["start"], delivery.message["text"])


def require_completed(status: dict[str, Any]) -> dict[str, Any]:
    """Return an outcome, or raise it as `Unanswered`."""
    if status["status"] == "completed":
        return status
    request_id = status["request_id"]
    raise Unanswered(
        f"request {request_id} is {status['status']}: {status['reason']}",
        hint=f"ksi queue show {request_id}"
        + ("; ksi queue retry asks it once more" if status["status"] == "failed" else ""),
        **{name: status[name] for name in ("request_id", "session_id", "status", "kind")},
    )


def still_open(request_id: str, timeout_s: float) -> Unavailable:
    """Return what to raise for a request that has not ended in time: it goes on."""
    hint = f"ksi ask completion:status --request-id {request_id}"
    return Unavailable(f"{request_id} has not ended in {timeout_s:g} s; it goes on", hint=hint)
