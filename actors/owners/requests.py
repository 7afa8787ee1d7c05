"""Requests, as they are told of: one, those of a session, pages of them, and how providers fare.

A part of the owner of completions that only reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec

from ksi.actors.declarations.bounds import Bound
from ksi.actors.declarations.completion import (
    FINAL,
    PAGE_REQUESTS_MAX,
    CompletionTables,
    GetGrants,
    GetProviderStatus,
    GetRetryStatus,
    GetSessionStatus,
    Grants,
    GrantView,
    Lane,
    ListRequests,
    Provider,
    ProviderPage,
    ProviderView,
    Request,
    RequestPage,
    RequestView,
    RetryPage,
    SessionQueue,
    Totals,
)
from ksi.actors.declarations.workers import ANYTHING, Worker
from ksi.actors.owners import bounds
from ksi.transport.errors import NotFound
from ksi.transport.limits import FRAME_BYTES_MAX

PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX * 3 // 4  # What grants in one reply may say.
_NUMBER: Final = re.compile("[0-9]{1,18}")


def known(tables: CompletionTables, request_id: str) -> Request:
    request = tables.requests.get(request_id)
    if request is None:
        raise NotFound(
            f"there is no request {request_id}, or its outcome is not kept any more",
            hint="the session's file has it; ksi queue list",
            request_id=request_id,
        )
    return request


def totals(tables: CompletionTables) -> Totals:
    return tables.totals.get("all") or Totals()


def view(request_id: str, request: Request) -> RequestView:
    return RequestView(
        request_id=request_id,
        session_id=request.session_id,
        requester=request.requester,
        status=request.status,
        priority=request.priority,
        requires=required(request),
        attempt=request.attempt,
        worker=request.worker or None,
        queued_at=request.queued_at,
        granted_at=request.granted_at,
        finished_at=request.finished_at,
        reason=request.reason,
        kind=request.kind or None,
        failures=request.failures,
        attempts_max=request.attempts_max,
        retry_at=request.retry_at,
        retried_as=request.retried_as or None,
        retry_of=request.retry_of or None,
    )


def required(request: Request) -> str | None:
    return None if request.requires == ANYTHING else request.requires


def status(request_id: str, tables: CompletionTables) -> RequestView:
    request = known(tables, request_id)
    found = view(request_id, request)
    if request.status in FINAL:
        outcome = tables.outcomes.get(request_id)
        return msgspec.structs.replace(found, result=outcome.result if outcome else None)
    grant = tables.grants.get((request.worker, request_id)) if request.worker else None
    return msgspec.structs.replace(found, progress=grant.progress if grant else None)


def grants(query: GetGrants, tables: CompletionTables) -> Grants:
    held = tables.grants.range(prefix=(query.worker,))
    named = None if query.request_ids is None else {*query.request_ids}
    found: list[GrantView] = []
    room = PAGE_BYTES_MAX
    for (_, request_id), grant in held:
        if named is not None and request_id not in named:
            continue
        request, prompt = known(tables, request_id), tables.prompts.get(request_id)
        assert prompt is not None
        room -= request.size
        if room < 0 and found:
            return Grants(worker=query.worker, grants=found, more=True)
        shown = GrantView(
            request_id=request_id,
            attempt=grant.attempt,
            session_id=request.session_id,
            requester=request.requester,
            prompt=prompt.prompt,
            model=prompt.model,
            data=prompt.data,
            options=prompt.options,
            requires=required(request),
            run_s=request.run_s,
            follows=grant.follows or None,
        )
        found.append(shown)
    return Grants(worker=query.worker, grants=found, more=False)


def session_status(query: GetSessionStatus, tables: CompletionTables) -> SessionQueue:
    lane = tables.lanes.get(query.session_id) or Lane()
    rows = islice(tables.queue.range(prefix=(query.session_id,)), query.limit)
    return SessionQueue(
        session_id=query.session_id,
        waiting=lane.waiting,
        active=view(lane.active, known(tables, lane.active)) if lane.active else None,
        next=[view(each.request_id, known(tables, each.request_id)) for _, each in rows],
    )


def listed(query: ListRequests, tables: CompletionTables) -> RequestPage:
    rows: Iterator[tuple[Any, str]]
    if query.status == "queued":
        start = _place(query.after, str, int, int)
        rows = ((key, each.request_id) for key, each in tables.queue.range(start))
    elif query.status == "active":
        start = _place(query.after, str, str)
        rows = ((key, key[1]) for key, _ in tables.grants.range(start))
    else:
        stop = _place(query.after, int, str)
        table = tables.dead if query.status == "dead" else tables.finished
        rows = ((k, k[1]) for k, _ in table.range((), stop or None, reverse=True))
    found: list[RequestView] = []
    following: str | None = None
    for key, request_id in rows:
        place = "/".join(map(str, key))
        if place == query.after:
            continue
        if len(found) == query.limit:
            break
        following = place
        found.append(view(request_id, known(tables, request_id)))
    else:
        following = None
    sums = totals(tables)
    return RequestPage(
        requests=found,
        waiting=sums.waiting,
        active=sums.active,
        finished=tables.finished.count(),
        limit=sums.limit,
        next=following,
    )


def retry_status(query: GetRetryStatus, tables: CompletionTables) -> RetryPage:
    rows = islice(tables.deferred.range(), query.limit)
    return RetryPage(
        requests=[view(each, known(tables, each)) for (_, each), _row in rows],
        waiting=tables.deferred.count(),
        dead=tables.dead.count(),
    )


def provider_status(query: GetProviderStatus, tables: CompletionTables) -> ProviderPage:
    offered: dict[str, list[Worker]] = {}
    for _, worker in tables.workers.range():
        for name in worker.capabilities:
            offered.setdefault(name, []).append(worker)
    rows, bound = dict(tables.providers.range()), dict(tables.bounds.range())
    names = sorted({*offered, *rows, *bound}) if query.provider is None else [query.provider]
    found = []
    for name in names[:PAGE_REQUESTS_MAX]:
        row, workers = rows.get(name) or Provider(), offered.get(name, [])
        bounded = bound.get(name) or Bound()
        shown = ProviderView(
            provider=name,
            workers=len(workers),
            slots=sum(each.slots for each in workers),
            used=sum(each.used for each in workers),
            completed=row.completed,
            failed=row.failed,
            retried=row.retried,
            completed_at=row.completed_at,
            failed_at=row.failed_at,
            kind=row.kind or None,
            reason=row.reason or None,
            unfit=row.unfit or None,
            limit=bounded.limit,
            rate=bounds.rate_of(bounded),
        )
        found.append(shown)
    return ProviderPage(providers=found)


class Open(NamedTuple):
    """What is open in a state: how many wait, by session, and the requests that run."""

    waiting: dict[str, int]
    active: list[str]


def open_in(tables: CompletionTables) -> Open:
    """Return what is open, for whoever is told what a restore would do."""
    lanes = dict(tables.lanes.range())
    return Open(
        {session_id: lane.waiting for session_id, lane in lanes.items() if lane.waiting},
        [lane.active for lane in lanes.values() if lane.active],
    )


def _place(after: str | None, *kinds: type) -> Any:
    """Return the key a cursor names, or the beginning for one that names none."""
    parts = (after or "").split("/")
    if len(parts) != len(kinds):
        return ()
    keyed = list(zip(kinds, parts, strict=True))
    if not all(kind is str or _NUMBER.fullmatch(part) for kind, part in keyed):
        return ()
    return tuple(kind(part) for kind, part in keyed)
