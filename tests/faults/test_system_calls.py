"""Every system call of what writes to disk is the last of its process, or fails, once.

After each blow nothing acknowledged may be missing, what is whole stays whole, and the same work
done again must come to its end.
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections import Counter
from functools import partial

import pytest
from crashing import in_child
from left_behind import WORK, Left
from tracing import KILL, hit_at_each

HOW = {"killed": KILL, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
BLOWS = 4  # of each kind, at calls that are drawn; in the soak there are as many as calls


def hit_all(left: Left, what: str, how: str, blows: int) -> None:
    act, require, again = WORK[what]
    left.put_back()
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    hits = hit_at_each(partial(act, left), left.var, HOW[how], random.Random(seed), runs=blows)
    dealt: Counter[str] = Counter()
    for step, name, ended in hits:
        try:
            assert ended != -signal.SIGALRM, "it hangs"
            require(left, is_done=False)
            assert in_child(partial(again, left)) == 0
            require(left, is_done=True)
        except BaseException:
            print(f"{what}: {how} at call {step}, {name}; it ended with {ended}")
            raise
        if step:
            dealt[name] += 1
        left.put_back()
    print(f"{what}: {how} at {dealt.total()} calls: {dict(dealt)}")
    assert dealt.total() >= min(blows, 20) - 2  # A thread may make one sooner or later.


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WORK)
def test_whatever_call_is_hit_nothing_is_lost_and_the_work_can_be_done_again(
    left: Left, what: str, how: str
) -> None:
    hit_all(left, what, how, BLOWS)


@pytest.mark.soak
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WORK)
def test_every_call_is_hit_and_nothing_is_lost(left: Left, what: str, how: str) -> None:
    hit_all(left, what, how, 1 << 20)
