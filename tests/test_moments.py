"""Moments and spans of time, as they are written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.transport.errors import Invalid
from ksi.transport.moments import TimeRange, day_of, iso, moment, span_s, time_range

NOW = 1_777_885_200.0  # 2026-05-04T09:00:00Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300ms", 0.3),
        ("5s", 5.0),
        ("5", 5.0),
        ("1.5h", 5400.0),
        ("10m", 600.0),
        ("1d", 86_400.0),
        ("2w", 1_209_600.0),
        ("", None),
        ("m", None),
        ("-5s", None),
        ("5 m", None),
        ("5y", None),
        ("\u0665s", None),
        ("1e3", None),
    ],
)
def test_a_span_is_a_number_with_a_unit(text: str, seconds: float | None) -> None:
    assert span_s(text) == seconds


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (NOW, NOW),
        (0, 0.0),
        ("1777885200", NOW),
        ("1777885200.25", NOW + 0.25),
        ("10m", NOW - 600),
        (" 2h ", NOW - 7200),
        ("2026-05-04", NOW - 9 * 3600),
        ("2026-05-04T09:00:00Z", NOW),
        ("2026-05-04 11:00+02:00", NOW),
        ("2026-05-04T09:00:00.000001Z", NOW + 0.000001),
        ("9999w", 0.0),
    ],
)
def test_a_moment_is_a_number_a_span_before_now_a_date_or_a_time(
    value: float | str, at: float
) -> None:
    assert moment(value, now=NOW) == at


@pytest.mark.parametrize(
    "value",
    [
        "", "soon", "2026-05-04T09:00", "2026-05-04 09:00:00", "20260504T09", "2026-13-01",
        "2026-W19", "0001-01-01T00:00:00+23:59", "-1", -1, float("nan"), float("inf"), 1e300,
        "999999999999", "1e300",
    ],
)  # fmt: skip
def test_what_is_no_moment_is_refused_in_words(value: float | str) -> None:
    with pytest.raises(Invalid, match="since") as refused:
        moment(value, now=NOW, what="since")
    assert refused.value.hint


def test_a_span_is_no_moment_where_nobody_knows_what_time_it_is() -> None:
    with pytest.raises(Invalid):
        moment("10m")
    assert moment("2026-05-04T09:00:00Z") == NOW


def test_a_range_holds_its_beginning_and_not_its_end() -> None:
    found = time_range("10m", NOW, now=NOW)

    assert found == TimeRange(NOW - 600, NOW)
    assert found.holds(NOW - 600)
    assert not found.holds(NOW - 600.000001)
    assert found.holds(NOW - 0.000001)
    assert not found.holds(NOW)
    assert time_range(None, None).holds(0.0)


def test_a_range_whose_ends_are_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(Invalid, match="later"):
        time_range("5m", "10m", now=NOW)


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1)))
def test_a_moment_shown_as_text_is_the_same_moment_and_sorts(time: datetime) -> None:
    at = time.replace(tzinfo=UTC).timestamp()

    assert moment(iso(at)) == round(at, 6)
    assert moment(day_of(at)) <= at < moment(day_of(at)) + 86_400
    assert iso(at) < iso((time + timedelta(seconds=1)).replace(tzinfo=UTC).timestamp())
