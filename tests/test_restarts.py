"""The rules of restarting, as OTP has them, over all inputs that matter."""

import random

import pytest

from ksi.actors.supervision.restarts import (
    Backoff,
    Intensity,
    Restart,
    add_restart,
    backoff_s,
    exit_kind,
    exit_words,
    is_restarted,
)


@pytest.mark.parametrize(
    ("restart", "code", "restarted"),
    [
        ("permanent", 0, True),
        ("permanent", 1, True),
        ("permanent", -9, True),
        ("permanent", None, True),
        ("transient", 0, False),
        ("transient", 1, True),
        ("transient", -9, True),
        ("transient", -15, True),
        ("transient", None, True),
        ("temporary", 0, False),
        ("temporary", 1, False),
        ("temporary", -9, False),
        ("temporary", None, False),
    ],
)
def test_restart_type_and_kind_of_exit_decide(
    restart: Restart, code: int | None, restarted: bool
) -> None:
    assert is_restarted(restart, code) is restarted


def test_only_exit_code_zero_is_normal() -> None:
    assert [
        code for code in (0, 1, 127, 255, -1, -9, -15, None) if exit_kind(code) == "normal"
    ] == [0]


def test_as_many_restarts_as_the_intensity_are_few_and_one_more_is_too_many() -> None:
    restarts: tuple[float, ...] = ()
    verdicts = []
    for now_s in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        restarts, few = add_restart(restarts, now_s, Intensity(5, 10.0))
        verdicts.append(few)

    assert verdicts == [True] * 5 + [False]
    assert restarts == (5.0, 4.0, 3.0, 2.0, 1.0, 0.0)


def test_the_window_slides_and_its_border_is_within() -> None:
    restarts, few = add_restart((1.0, 0.5, 0.0), 10.5, Intensity(3, 10.0))

    assert restarts == (10.5, 1.0, 0.5)
    assert few


def test_an_intensity_of_none_gives_up_at_the_first_restart() -> None:
    assert add_restart((), 1.0, Intensity(0, 10.0)) == ((1.0,), False)


@pytest.mark.parametrize("seed", range(20))
def test_the_window_agrees_with_counting_by_hand(seed: int) -> None:
    chance = random.Random(seed)
    intensity = Intensity(chance.randrange(6), chance.uniform(0.1, 5.0))
    times: list[float] = []
    restarts: tuple[float, ...] = ()
    now_s = 0.0
    for _ in range(200):
        now_s += chance.expovariate(2.0)
        times.append(now_s)
        restarts, few = add_restart(restarts, now_s, intensity)

        counted = sum(now_s - intensity.period_s <= each for each in times)
        assert (len(restarts), few) == (counted, counted <= intensity.restarts_max)


def test_the_first_restart_comes_at_once_and_further_ones_ever_later_up_to_the_bound() -> None:
    backoff = Backoff(first_s=0.05, max_s=2.0)

    longest = [backoff_s(count, 1.0, backoff) for count in range(1, 10)]
    assert longest == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert backoff_s(10_000, 1.0, backoff) == 2.0


def test_chance_spreads_a_wait_over_its_upper_half() -> None:
    backoff = Backoff(first_s=1.0, max_s=8.0)

    waits = [backoff_s(4, random.Random(seed).random(), backoff) for seed in range(200)]
    assert all(2.0 <= wait_s < 4.0 for wait_s in waits)
    assert max(waits) - min(waits) > 1.5


def test_exit_codes_are_said_in_words() -> None:
    words = [exit_words(code) for code in (0, 3, -9, -200, None)]

    assert words == ["exit 0", "exit 3", "signal 9 (SIGKILL)", "signal 200", "exit unknown"]
