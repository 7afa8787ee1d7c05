"""Whether a history of appends and reads can be that of one log a session: linearizability.

An append tells its number and a read how far the log goes, so the only possible order is known and
no search is needed: sort by it, and nothing may come after what it had ended before. Sessions are
independent of each other, and each is checked alone.

Source: Herlihy and Wing, "Linearizability" (1990); the split by session is P-compositionality, as
in Porcupine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple


class Operation(NamedTuple):
    """What a client did and when, by the monotonic clock of the machine.

    Attributes:
        token: of the entry that was appended; None: a read.
        number: the entry's, or that of the last one a read saw.
        returned_s: infinite if it was never answered: it may have happened or not.
    """

    session: str
    token: str | None
    number: int
    invoked_s: float
    returned_s: float


def violations(history: Iterable[Operation], logs: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield what is wrong with a history, given the tokens each session holds in the end."""
    by_session: dict[str, list[Operation]] = {session: [] for session in logs}
    for each in history:
        by_session.setdefault(each.session, []).append(each)
    for session, operations in by_session.items():
        for found in _violations(operations, logs.get(session, ())):
            yield f"{session}: {found}"


def _violations(operations: Sequence[Operation], log: Sequence[str]) -> Iterator[str]:
    place = {token: number for number, token in enumerate(log, 1)}
    if len(place) != len(log):
        yield "an entry is there twice"
    asked = {each.token for each in operations if each.token is not None}
    yield from (f"nobody appended {token}" for token in place.keys() - asked)
    points: list[tuple[float, Operation]] = []
    for each in operations:
        if each.token is None:
            if each.returned_s == float("inf"):
                continue
            if not 0 <= each.number <= len(log):
                yield f"a read saw {each.number} entries, and there are {len(log)}"
            points.append((each.number + 0.5, each))
        elif each.token in place:
            points.append((place[each.token], each))
            if each.returned_s < float("inf") and each.number != place[each.token]:
                yield f"{each.token} is entry {place[each.token]}, and {each.number} was told"
        elif each.returned_s < float("inf"):
            yield f"{each.token} was acknowledged and is lost"
    yield from _out_of_order(points)


def _out_of_order(points: list[tuple[float, Operation]]) -> Iterator[str]:
    """Yield what had ended before something began that its place says came earlier."""
    points.sort(key=lambda point: point[0])
    latest_s = 0.0  # when the last of all at earlier places was invoked
    for _place, group in groupby(points, key=lambda point: point[0]):
        same = [each for _, each in group]
        yield from (
            f"{each.token or 'a read'} at {each.number} had ended before an earlier one began"
            for each in same
            if each.returned_s < latest_s
        )
        latest_s = max(latest_s, *(each.invoked_s for each in same))
