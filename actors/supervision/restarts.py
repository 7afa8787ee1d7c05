"""When a child that has ended is started again. Pure functions: no clock, no randomness, no I/O.

Three questions, each answered by one function, in the words and by the rules of OTP:

1. Is it restarted at all? `is_restarted`: restart type x kind of exit.
2. Has there been too much of it? `add_restart`: more than `restarts_max` restarts within
   `period_s` and the supervisor gives up (escalates).
3. How soon? `backoff_s`: the first time at once, then ever later, so that a child that cannot
   start does not eat the machine while it fails. This one is not OTP's, which restarts at once.

Times are of the monotonic clock: a clock that is set must neither forgive nor condemn.

Source: Erlang/OTP `supervisor.erl`; `sup_princ`, "Tuning the intensity and period".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Restart = Literal["permanent", "transient", "temporary"]
Strategy = Literal["one_for_one", "rest_for_one"]
ExitKind = Literal["normal", "abnormal"]


@dataclass(frozen=True, slots=True)
class Intensity:
    """At most `restarts_max` restarts within any `period_s` seconds.

    Burst and rate in one: 5 in 10 s admits five crashes at once and one in two seconds for ever.
    Never give two levels of supervisors the same large numbers: they multiply.
    """

    restarts_max: int = 5
    period_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """The second restart in a period waits `first_s`, each further one twice as long as before."""

    first_s: float = 0.05
    max_s: float = 2.0


_RESTARTED: Final[dict[tuple[Restart, ExitKind], bool]] = {
    ("permanent", "normal"): True,
    ("permanent", "abnormal"): True,
    ("transient", "normal"): False,
    ("transient", "abnormal"): True,
    ("temporary", "normal"): False,
    ("temporary", "abnormal"): False,
}


def exit_kind(code: int | None) -> ExitKind:
    """Return the kind of an exit code: 0 is normal; others, signals and unknown are abnormal."""
    return "normal" if code == 0 else "abnormal"


def is_restarted(restart: Restart, code: int | None) -> bool:
    """Return whether a child of this restart type is started again after this exit code."""
    return _RESTARTED[restart, exit_kind(code)]


def add_restart(
    restarts: tuple[float, ...], now_s: float, intensity: Intensity
) -> tuple[tuple[float, ...], bool]:
    """Add a restart at `now_s` to earlier ones, newest first.

    Returns:
        The restarts within the period, and whether they are still few enough.
    """
    recent = (now_s, *within(restarts, now_s, intensity.period_s))
    return recent, len(recent) <= intensity.restarts_max


def within(restarts: tuple[float, ...], now_s: float, period_s: float) -> tuple[float, ...]:
    """Return those of `restarts` (newest first) that are at most `period_s` old."""
    return tuple(restart_s for restart_s in restarts if restart_s >= now_s - period_s)


def backoff_s(count: int, drawn: float, backoff: Backoff) -> float:
    """Return how long to wait before the `count`th restart of a child in its period, from 1 up.

    `drawn` in [0, 1) spreads the wait over its upper half, so that children that fell together
    do not come back together.
    """
    if count <= 1:
        return 0.0
    doublings = min(count - 2, 62)
    whole_s: float = min(backoff.max_s, backoff.first_s * 2**doublings)
    return whole_s * (0.5 + drawn / 2)


def exit_words(code: int | None) -> str:
    """Return an exit code as people read it: `exit 3`, `signal 9 (SIGKILL)`."""
    if code is None:
        return "exit unknown"
    if code >= 0:
        return f"exit {code}"
    import signal

    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
