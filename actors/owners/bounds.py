"""How many requests a provider may be granted at a time and in a period, by all its workers.

A part of the owner of completions, with rows of its own. Grants are counted where they are made, so
neither the number of workers nor a restart of any of them matters. A grant counts towards a rate
for its period and `BEGIN_S` more: in no period a worker begins more calls than were granted, if it
begins each within that time.

A provider that wants to be left alone is granted nothing for that long, by any worker.

Source: "KSI State Management Analysis" 4: concurrency and rate limits. The log of a sliding window:
a bucket of tokens would let through nearly twice as many in the worst period.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Final

import msgspec

from ksi.actors.declarations.bounds import Bound, BoundSet, BoundTables, Rested
from ksi.actors.owner import Event
from ksi.transport.errors import Quota
from ksi.transport.limits import ACTIVE_MAX, PROVIDERS_MAX
from ksi.transport.moments import whole_ms

BEGIN_S: Final = 0.25  # From a grant to the call, at a worker that is not stopped.
PERIOD_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Room:
    """How many more grants each provider may have, while they are drawn in one decision."""

    def __init__(self, tables: BoundTables, time_s: float) -> None:
        self._tables = tables
        self._now_ms = whole_ms(time_s)
        self._left: dict[str, int] = {}

    def has(self, provider: str) -> bool:
        """Return whether a provider may be granted one more."""
        if provider not in self._left:
            self._left[provider] = self._counted(provider)
        return self._left[provider] > 0

    def take(self, provider: str) -> None:
        self._left[provider] -= 1

    def _counted(self, provider: str) -> int:
        bound = self._tables.bounds.get(provider)
        if bound is None:
            return ACTIVE_MAX
        if bound.rests_until_ms > self._now_ms:
            return 0
        left = ACTIVE_MAX if bound.limit is None else bound.limit - bound.active
        if bound.calls:
            over = len(_over(provider, bound, self._tables, self._now_ms))
            left = min(left, bound.calls - bound.called + over)
        return left


def _over(
    provider: str, bound: Bound, tables: BoundTables, now_ms: int
) -> list[tuple[str, int, int]]:
    """Return the keys of grants that count no more towards the rate."""
    before_ms = now_ms - whole_ms(PERIOD_S[bound.period] + BEGIN_S)
    keys = (key for key, _row in tables.calls.range(prefix=(provider,)))
    return list(takewhile(lambda key: key[1] < before_ms, keys))


def set_bound(provider: str, limit: int | None, rate: str | None, tables: BoundTables) -> BoundSet:
    """Return the event that sets or removes the bounds of a provider."""
    if tables.bounds.get(provider) is None and tables.bounds.count() >= PROVIDERS_MAX:
        raise Quota(f"there are {PROVIDERS_MAX} bounds", limit=PROVIDERS_MAX)
    calls, _, period = (rate or "0/").partition("/")
    return BoundSet(provider, limit, int(calls), period)


def rested(provider: str, time_s: float, rest_s: float, tables: BoundTables) -> tuple[Event, ...]:
    """Return the event of a provider that wants to be left alone."""
    known = tables.bounds.get(provider)
    until_ms = whole_ms(time_s + rest_s)
    if until_ms <= (known.rests_until_ms if known else whole_ms(time_s)):
        return ()
    if known is None and tables.bounds.count() >= PROVIDERS_MAX:
        return ()
    return (Rested(provider, until_ms),)


def apply_bound(event: BoundSet, active: int, tables: BoundTables) -> None:
    """Set bounds; `active` grants are of that provider now. A rate counts from when it is set."""
    for key, _row in list(tables.calls.range(prefix=(event.provider,))):
        tables.calls.delete(key)
    if event.limit is None and not event.calls:
        tables.bounds.delete(event.provider)
        return
    bound = Bound(event.limit, event.calls, event.period, active)
    tables.bounds.put(event.provider, bound)


def apply_rested(event: Rested, active: int, tables: BoundTables) -> None:
    bound = tables.bounds.get(event.provider) or Bound(active=active)
    resting = msgspec.structs.replace(bound, rests_until_ms=event.until_ms)
    tables.bounds.put(event.provider, resting)


def apply_granted(provider: str, time_s: float, tables: BoundTables) -> None:
    bound = tables.bounds.get(provider)
    if bound is None:
        return
    called, number, now_ms = bound.called, bound.number, whole_ms(time_s)
    if bound.calls:
        over = _over(provider, bound, tables, now_ms)
        for key in over:
            tables.calls.delete(key)
        number += 1
        called += 1 - len(over)
        tables.calls.put((provider, now_ms, number), b"")
    counted = msgspec.structs.replace(bound, active=bound.active + 1, called=called, number=number)
    tables.bounds.put(provider, counted)


def apply_released(provider: str, tables: BoundTables) -> None:
    bound = tables.bounds.get(provider)
    if bound is not None:
        tables.bounds.put(provider, msgspec.structs.replace(bound, active=bound.active - 1))


def rate_of(bound: Bound) -> str | None:
    """Return a rate as it was set."""
    return f"{bound.calls}/{bound.period}" if bound.calls else None
