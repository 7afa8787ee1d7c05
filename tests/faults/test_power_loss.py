"""What a power cut may leave: nothing that was acknowledged is lost, and every state opens.

The whole life of a store, and the work of owners and followers, run once with each of their system
calls noted, those of LMDB and SQLite among them. Then the disk is put together as a cut at any
point might leave it (`disk.py`), and recovered as after a restart of the machine.
`KSI_SEED=... bin/test tests/faults` repeats the choices.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from crashing import in_child
from disk import SAID, Event, Recording, disk_after
from left_behind import WORK, Left
from small_store import add, leave, open_store, state_of
from tracing import run

from ksi.storage import journal as storage_journal
from ksi.storage import prewrite
from ksi.storage.journal import MAGIC
from ksi.storage.store import read_current

STATES, MANY_STATES = 300, 7000


def seeded() -> random.Random:
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    return random.Random(seed)


def cuts(events: list[Event], since: int, chance: random.Random, states: int) -> Iterator[int]:
    """Yield after how many events the power is cut: any, and rather where it is being written,
    records of a journal above all."""
    written = [(at, event) for at, event in enumerate(events, 1) if event[0] == "write"]
    written = [(at, event) for at, event in written if at > since and any(event[3])]
    records = [at for at, event in written if event[3].startswith(MAGIC)] or [since]
    for _ in range(states):
        anywhere, writing = chance.randint(since, len(events)), chance.choice(written)[0]
        yield chance.choice([anywhere, writing, *chance.choices(records, k=2)])


def use_a_store(owner: Path) -> None:
    """Create, fill, kill, close and recover a store, as in its whole life."""
    for boot_id, ended in (
        ("one", leave),
        ("one", lambda store: store.close()),
        ("one", leave),
        ("two", leave),
        ("two", lambda store: store.close()),
        ("three", leave),
    ):
        store = open_store(owner, boot_id=boot_id, segment_bytes=2500)
        for number in range(6):
            add(store, "a", "b" * (number + 1), f"{boot_id}-{number}", *"cdefghi"[:number])
            (owner / SAID).write_text(str(store.meta.seq))
        ended(store)
        store._lmdb.close()  # Within one process, what the death of another would do.


def use_and_cut(in_memory: Path, states: int) -> None:
    chance = seeded()
    owner, cut = in_memory / "owner", in_memory / "cut"
    owner.mkdir()
    recording = Recording(owner)
    assert run(partial(use_a_store, owner), owner, lambda _: 0, recording.watch) == 0
    events, torn = recording.events, 0
    for until in cuts(events, 0, chance, states):
        said = disk_after(events[:until], chance, cut)
        existed = read_current(cut) is not None
        before = sum(path.stat().st_size for path in cut.glob("*/*.log"))

        store = open_store(cut, boot_id="after the cut", segment_bytes=2500)
        state = state_of(store)
        assert store.meta.seq >= max(said, default=0), f"lost with the cut after event {until}"
        assert existed or not said
        torn += sum(path.stat().st_size for path in cut.glob("*/*.log")) != before
        add(store, "z")
        assert len(state_of(store)) == len(state | {"z": []})
        store.close()
        shutil.rmtree(cut)
    print(f"{states} states of {len(events)} events, {torn} with a torn record")
    assert torn > states // 100, "hardly any record was torn: this run has proved little"


def write_ahead_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have zeros written ahead of a journal that is small."""
    monkeypatch.setattr(storage_journal, "PREWRITE_FROM_BYTES", 0)
    monkeypatch.setattr(prewrite, "PREWRITE_BYTES", 2000)
    monkeypatch.setattr(prewrite, "_ZEROS", bytes(700))


def test_nothing_acknowledged_is_lost_in_any_state_a_power_cut_leaves(in_memory: Path) -> None:
    use_and_cut(in_memory, STATES)


def test_nothing_acknowledged_is_lost_where_zeros_are_written_ahead(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ahead_often(monkeypatch)
    use_and_cut(in_memory, STATES)


@pytest.mark.soak
@pytest.mark.parametrize("zeros_ahead", [False, True])
def test_nothing_acknowledged_is_lost_in_very_many_states_a_power_cut_leaves(
    zeros_ahead: bool, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if zeros_ahead:
        write_ahead_often(monkeypatch)
    use_and_cut(in_memory, MANY_STATES)


def restart_the_machine() -> None:
    """Give the machine another boot id, as far as this process knows."""
    for module in [*sys.modules.values()]:
        if module.__name__.startswith("ksi.") and hasattr(module, "this_boot"):
            setattr(module, "this_boot", lambda: "after the cut")  # noqa: B010 - a type has no such name


def work_and_cut(left: Left, what: str, states: int) -> None:
    """Do some work, cut the power at many points of it, and do it again from what is left."""
    chance = seeded()
    act, require, again = WORK[what]
    left.put_back()
    recording = Recording(left.var)
    assert run(partial(act, left), left.var, lambda _: 0, recording.watch) == 0
    events = recording.events

    def recover() -> None:
        restart_the_machine()
        left.open_all()
        require(left, is_done=False)
        again(left)
        require(left, is_done=True)

    for until in cuts(events, recording.since, chance, states):
        shutil.rmtree(left.var)
        said = disk_after(events[:until], chance, left.var)
        left.marks.write_text("".join(f"{number}\n" for number in said))
        (left.var / "run").mkdir(exist_ok=True)
        assert in_child(recover) == 0, f"after event {until} of {len(events)}"
    print(f"{what}: {states} states of {len(events) - recording.since} events")


@pytest.mark.parametrize("what", WORK)
def test_whatever_is_done_when_the_power_is_cut_can_be_done_again(left: Left, what: str) -> None:
    work_and_cut(left, what, 15)


@pytest.mark.soak
@pytest.mark.parametrize("what", WORK)
def test_whatever_is_done_when_the_power_is_cut_very_often_can_be_done_again(
    left: Left, what: str
) -> None:
    work_and_cut(left, what, 1200)
