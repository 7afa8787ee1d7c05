"""Moments and spans of time, as people and programs write them.

A span is a number with a unit: `300ms`, `5s`, `10m`, `2h`, `1d`, `1w`. A moment is one of

- a number, or its digits: seconds since the epoch;
- a span: so long before now;
- an ISO 8601 date, `2026-05-04`: its beginning in UTC, as all days are here;
- an ISO 8601 time with its zone: `2026-05-04T09:00:00Z`, `2026-05-04 11:00+02:00`.

A time of day without a zone is refused: it is another moment on every machine. Nothing here looks
at a clock: `now` is given, or else spans are refused as moments. Fields of operations that take a
moment are of the type `Moment` in `message.py`.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, NamedTuple

from ksi.transport.errors import Invalid

DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
MOMENT_MAX: Final = 253_402_300_800.0  # The end of the calendar, in seconds since the epoch.
_UNITS: Final = {
    "": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0,
}  # fmt: skip
_SPAN: Final = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|d|w|)", re.ASCII)
_HINT: Final = "10m, 2h, 2026-05-04, 2026-05-04T09:00:00Z, or seconds since the epoch"
_DAY_S: Final = 86_400.0
_MICROSECONDS: Final = 6  # What times are kept with; a double of today has no room for more.


class TimeRange(NamedTuple):
    """From `since` up to but without `until`, in seconds since the epoch; None: without a bound."""

    since: float | None
    until: float | None

    def holds(self, at: float) -> bool:
        """Return whether a time is within."""
        return (self.since is None or at >= self.since) and (self.until is None or at < self.until)


def span_s(text: str) -> float | None:
    """Return a span in seconds, digits alone being seconds; None if `text` is no span."""
    found = _SPAN.fullmatch(text.strip())
    return None if found is None else float(found[1]) * _UNITS[found[2]]


def moment(value: float | str, *, now: float | None = None, what: str = "time") -> float:
    """Return a moment in seconds since the epoch.

    Args:
        now: what a span is counted back from; None: a span is no moment here.
        what: names the value in a refusal.

    Raises:
        Invalid: it is none of the forms of a moment, or beyond the calendar.
    """
    at = _parsed(value.strip(), now) if isinstance(value, str) else float(value)
    if at is None or not math.isfinite(at) or not 0 <= at < MOMENT_MAX:
        shown = repr(value)[:100]
        raise Invalid(f"{what}: {shown} is no time with its zone", hint=_HINT)
    return round(at, _MICROSECONDS)


def time_range(
    since: float | str | None, until: float | str | None, *, now: float | None = None
) -> TimeRange:
    """Return the range between two moments, either of them open.

    Raises:
        Invalid: one of them is no moment, or they are in the wrong order.
    """
    begin = None if since is None else moment(since, now=now, what="since")
    end = None if until is None else moment(until, now=now, what="until")
    if begin is not None and end is not None and begin > end:
        raise Invalid(f"since {since!r} is later than until {until!r}")
    return TimeRange(begin, end)


def iso(at: float) -> str:
    """Return a moment as ISO 8601 in UTC, to the microsecond: it sorts as text."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def day_of(at: float) -> str:
    """Return the day of a moment, in UTC: `2026-05-04`."""
    return _day(at // _DAY_S)


@lru_cache(64)  # Whoever asks, asks for the same few.
def _day(number: float) -> str:
    return datetime.fromtimestamp(number * _DAY_S, UTC).strftime("%Y-%m-%d")


def whole_ms(time_s: float) -> int:
    """Return owner time in whole milliseconds, as keys of tables have it."""
    return int(time_s * 1000)


def due_ms(time_s: float, after_s: float) -> int:
    """Return the same of so long after a moment, so that nothing is due too early."""
    return math.ceil((time_s + after_s) * 1000)


def _parsed(text: str, now: float | None) -> float | None:
    seconds = span_s(text)
    if seconds is not None:
        is_number = text[-1].isdigit()
        if is_number:
            return seconds
        return None if now is None else max(0.0, now - seconds)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    if time.tzinfo is None:
        is_day = DAY.fullmatch(text) is not None
        return time.replace(tzinfo=UTC).timestamp() if is_day else None
    return time.timestamp()
