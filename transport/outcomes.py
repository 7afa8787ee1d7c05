"""Waiting for the outcome of a completion: what both clients share.

An announcement says that a request may have ended; `completion:status` says whether it has. So an
announcement that is lost, with a connection or an owner, costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ksi.transport.errors import Unavailable
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


def still_open(request_id: str, timeout_s: float) -> Unavailable:
    """Return what to raise for a request that has not ended in time: it goes on."""
    hint = f"ksi ask completion:status --request-id {request_id}"
    return Unavailable(f"{request_id} has not ended in {timeout_s:g} s; it goes on", hint=hint)
