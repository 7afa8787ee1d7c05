"""Grants as they are drawn: which request goes to which worker next.

A part of the owner of completions that only reads. It looks at heads of queues and free workers
alone: the cost depends on neither how many requests wait nor how many sessions there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice

from ksi.actors.declarations.completion import CompletionTables, Granted
from ksi.actors.declarations.workers import ANYTHING
from ksi.actors.owner import Given
from ksi.actors.owners import bounds, requests
from ksi.transport.limits import ACTIVE_MAX


def drawn(tables: CompletionTables, given: Given) -> Iterator[Granted]:
    """Yield a grant for every free slot that a request at the head of its session can take.

    The best of the ready first. A grant makes nothing ready and frees nobody, so what changes while
    they are drawn is only how many slots are left.
    """
    totals = requests.totals(tables)
    room = totals.limit - totals.active
    if room <= 0:
        return
    taken: dict[str, int] = {}  # slots, by worker
    lines = {each: tables.ready.range(prefix=(each,)) for each in _in_demand(tables)}
    heads = {each: next(line) for each, line in lines.items()}
    bearable = bounds.Room(tables, given.time_s)
    offers = {each: _Offer(tables, each, taken, bearable) for each in lines}
    while heads and room:
        required = min(heads, key=lambda each: heads[each][0][1:])
        found = offers[required].take()
        if found is None:
            del heads[required]
            continue
        worker, provider = found
        room -= 1
        request_id = heads[required][1].request_id
        request = requests.known(tables, request_id)
        yield Granted(
            request_id,
            request.session_id,
            request.requester,
            worker,
            request.attempt + 1,
            given.now,
            given.time_s,
            provider,
        )
        head = next(lines[required], None)
        if head is None:
            del heads[required]
        else:
            heads[required] = head


def _in_demand(tables: CompletionTables) -> Iterator[str]:
    """Yield what is both required and offered, by leaping from one to the other."""
    at = ""
    while True:
        required = next((key[0] for key, _ in tables.ready.range((at,))), None)
        if required is None:
            return
        offered = next((key[0] for key, _ in tables.free.range((required,))), None)
        if offered is None:
            return
        if offered == required:
            yield required
            at = required + "\x01"
        else:
            at = offered


class _Offer:
    """The workers that offer one thing, the least busy first, as far as providers bear more."""

    def __init__(
        self, tables: CompletionTables, offered: str, taken: dict[str, int], bearable: bounds.Room
    ) -> None:
        self._workers = tables.workers
        self._offered = offered
        self._taken = taken
        self._bearable = bearable
        rows = islice(tables.free.range(prefix=(offered,)), ACTIVE_MAX)
        free = [(used, name) for (_, used, name), _row in rows]
        self._free: list[tuple[int, str]] = free  # in order, and so a heap

    def take(self) -> tuple[str, str] | None:
        """Take a slot of the least busy worker: it, and what will answer; None if none is left."""
        while self._free:
            used, name = self._free[0]
            worker = self._workers.get(name)
            assert worker is not None
            provider = self._offered
            if provider == ANYTHING and worker.capabilities:
                provider = worker.capabilities[0]
            now_used = worker.used + self._taken.get(name, 0)
            if now_used >= worker.slots or not self._bearable.has(provider):
                heapq.heappop(self._free)
            elif now_used > used:
                heapq.heapreplace(self._free, (now_used, name))
            else:
                self._taken[name] = self._taken.get(name, 0) + 1
                self._bearable.take(provider)
                return name, provider
        return None
