"""`bounds`, a part of `completion`, in its forms: events and tables.

What it does: `actors/owners/bounds.py`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ksi.actors.owner import Event, Keyed, Table, Tables


class BoundSet(Event, frozen=True, array_like=True, tag="bound"):
    """With neither bound, `calls` 0 being none, the provider has none any more."""

    provider: str
    limit: int | None
    calls: int
    period: str


class Rested(Event, frozen=True, array_like=True, tag="rested"):
    """A provider wants to be left alone until then, in owner time."""

    provider: str
    until_ms: int


class Bound(msgspec.Struct, frozen=True, array_like=True):
    """How many grants a provider may have at a time and in a period, and how many it has.

    `number` was given last to a row of `calls`.
    """

    limit: int | None = None
    calls: int = 0
    period: str = ""
    active: int = 0
    called: int = 0
    number: int = 0
    rests_until_ms: int = 0


class BoundTables(Tables):
    bounds: Table[Bound]  # by provider
    calls: Annotated[Table[bytes], Keyed(str, int, int)]  # provider, ms of owner time, number
