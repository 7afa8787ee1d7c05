"""Lanes: the queue of each session, which request stands first in it, and whether that is ready.

A part of the owner of completions, of what events do to its rows. A lane is read, changed and put
back; with it goes the one row by which a session takes part where grants are drawn.
"""

from __future__ import annotations

import msgspec

from ksi.actors.declarations.completion import CompletionTables, Head, Lane, Request, Waiting
from ksi.actors.owners import requests


def enter(tables: CompletionTables, request_id: str, request: Request, lane: Lane) -> Lane:
    """Put a request into the queue of its session."""
    key = (request.session_id, request.rank, request.number)
    deferred = request.due_ms > 0
    tables.queue.put(key, Waiting(request_id, request.requires))
    head = Head(
        request.rank, request.number, request_id, request.requires, request.recorded, deferred
    )
    if lane.head is not None and (lane.head.rank, lane.head.number) < key[1:]:
        head = lane.head
    return msgspec.structs.replace(lane, waiting=lane.waiting + 1, head=head)


def leave(tables: CompletionTables, request_id: str, request: Request, lane: Lane) -> Lane:
    """Take a request out of the queue of its session."""
    tables.queue.delete((request.session_id, request.rank, request.number))
    if request.due_ms:
        tables.deferred.delete((request.due_ms, request_id))
    head = lane.head
    if head is not None and head.request_id == request_id:
        head = None
        if lane.waiting > 1:
            (_, rank, number), first = next(tables.queue.range(prefix=(request.session_id,)))
            then = requests.known(tables, first.request_id)
            head = Head(
                rank, number, first.request_id, first.requires, then.recorded, then.due_ms > 0
            )
    return msgspec.structs.replace(lane, waiting=lane.waiting - 1, head=head)


def put(tables: CompletionTables, session_id: str, before: Lane, after: Lane) -> None:
    """Set the lane of a session, and whether its head is ready."""
    was, now = _ready_of(before), _ready_of(after)
    if was != now:
        if was is not None:
            tables.ready.delete((was.requires, was.rank, was.number))
        if now is not None:
            tables.ready.put((now.requires, now.rank, now.number), now)
    if after.waiting or after.active:
        tables.lanes.put(session_id, after)
        return
    tables.lanes.delete(session_id)
    if after.closed:
        tables.closing.delete(session_id)


def _ready_of(lane: Lane) -> Head | None:
    head = lane.head
    if lane.active or head is None or not head.recorded or head.deferred:
        return None
    return head
