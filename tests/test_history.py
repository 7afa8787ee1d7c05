"""The judge of storms, judged: it says of small histories what trying all orders says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

from history import Operation, violations

FOREVER = float("inf")


def can_be(history: Sequence[Operation], log: Sequence[str]) -> bool:
    """Try every order of what happened: is there one that fits times, numbers and the log?"""
    happened = [each for each in history if each.token is None or each.token in log]
    if any(each.returned_s < FOREVER for each in history if each not in happened):
        return False
    if sorted(each.token for each in happened if each.token is not None) != sorted(log):
        return False
    return any(fits(order, log) for order in permutations(happened))


def fits(order: Sequence[Operation], log: Sequence[str]) -> bool:
    length = 0
    for at, each in enumerate(order):
        if any(later.returned_s < each.invoked_s for later in order[at + 1 :]):
            return False
        if each.token is not None:
            if log[length] != each.token:
                return False
            length += 1
        if each.returned_s < FOREVER and each.number != length:
            return False
    return True


def drawn(chance: random.Random) -> tuple[list[Operation], list[str]]:
    """Draw a log, a history that fits it, and now and then something wrong with it."""
    log, history, now_s = [], [], 0.0
    for number in range(chance.randint(1, 5)):
        now_s += chance.random()
        token = None if chance.random() < 0.4 else f"t{number}"
        if token is not None:
            log.append(token)
        length, early_s, late_s = len(log), chance.random(), chance.random()
        returned_s = FOREVER if token and chance.random() < 0.1 else now_s + late_s
        history.append(Operation("s", token, length, now_s - early_s, returned_s))
    if chance.random() < 0.5:
        at = chance.randrange(len(history))
        wrong = history[at]
        match chance.choice("nloid"):
            case "n":
                history[at] = wrong._replace(number=wrong.number + chance.choice((-1, 1)))
            case "l" if log:
                log.pop(chance.randrange(len(log)))
            case "o" if len(log) > 1:
                log[0], log[-1] = log[-1], log[0]
            case "i":
                history[at] = wrong._replace(returned_s=FOREVER)
            case "d" if log:
                log.append(log[0])
    return history, log


def test_it_agrees_with_trying_every_order() -> None:
    chance = random.Random(4)
    bad = 0
    for _ in range(2000):
        history, log = drawn(chance)
        found = list(violations(history, {"s": log}))
        assert bool(found) != can_be(history, log), (history, log, found)
        bad += bool(found)
    assert 200 < bad < 1800, "one half or the other was hardly tried"


def test_sessions_are_told_apart_and_what_nobody_appended_is_found() -> None:
    fine = Operation("a", "t", 1, 0.0, 1.0)
    assert list(violations([fine], {"a": ["t"], "b": []})) == []
    assert list(violations([fine], {"b": ["t"]})) == [
        "b: nobody appended t", "a: t was acknowledged and is lost",
    ]  # fmt: skip
