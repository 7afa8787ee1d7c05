"""A bit that has flipped on the disk is reported, or is where nothing is: it is never served."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crashing import in_child
from left_behind import SESSIONS, Left, history_in, left_behind, project

from ksi.actors.checkpoints import root_of
from ksi.actors.followers.indexed import Verification
from ksi.actors.reading import reader_of
from ksi.storage import checkpoints
from ksi.storage.errors import Corrupt

RIGHT, REPORTED = 0, 3  # What a child that looks ends with; anything else is a wrong value served.


@pytest.fixture(scope="module")
def left() -> Iterator[Left]:
    with left_behind() as found:
        yield found


def reported(look: Callable[[], None]) -> None:
    try:
        look()
    except Corrupt:
        os._exit(REPORTED)


def look_at_view(left: Left) -> None:
    assert history_in(left.var) == left.said


def look_at_journal(left: Left) -> None:
    reader = reader_of("sessions", left.var)
    journal = reader.journal()
    logs: dict[str, bytes] = {}
    for batch in journal.read(journal.start(), reader.committed().position):
        for key, _offset, content in reader.lines_of(batch):
            logs[key] = logs.get(key, b"") + content
    counts = {key: content.count(b"\n") for key, content in logs.items()}
    assert counts == {key: len(left.said[key]) for key in SESSIONS}


def look_at_checkpoints(left: Left) -> None:
    root = root_of(left.var)
    for name in checkpoints.names(root):
        checkpoints.verify(root / name)


def look_at_files(left: Left) -> None:
    """As `ksi index verify` and `ksi doctor` do: who only reads a line does not check it."""
    verification = Verification(left.var)
    while verification.turn():
        pass
    if verification.found:
        raise Corrupt(verification.found[0])


WHERE = {
    "view": ("db/sessions/*/view/data.mdb", look_at_view),
    "journal": ("db/sessions/*/*.log", look_at_journal),
    "checkpoints": ("checkpoints/*/**/*.*", look_at_checkpoints),
    "archive": ("archive/sessions/*.zst", look_at_view),
    "session files": ("logs/responses/sessions/*.jsonl", look_at_files),
}


def flip_bits(left: Left, where: str, flips: int) -> None:
    """Flip a bit of a file, look, and flip it back; again and again."""
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    pattern, look = WHERE[where]
    left.put_back()
    if where == "archive":
        assert in_child(lambda: project(left)) == 0
    found: Counter[int] = Counter()
    for _ in range(flips):
        path = chance.choice([each for each in sorted(left.var.glob(pattern)) if has_bytes(each)])
        at, bit = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
        flip(path, at, bit)
        ended = in_child(lambda: reported(lambda: look(left)))
        assert ended in (RIGHT, REPORTED), f"bit {bit} of byte {at} of {path} was served: {ended}"
        found[ended] += 1
        flip(path, at, bit)
    assert in_child(lambda: look(left)) == RIGHT
    print(f"{where}: {flips} bits flipped, {found[REPORTED]} reported, the rest was nowhere")
    assert found[REPORTED] > 0


def has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b", 0) as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


@pytest.mark.parametrize("where", WHERE)
def test_a_flipped_bit_is_reported_or_harmless(left: Left, where: str) -> None:
    flip_bits(left, where, 40)


@pytest.mark.soak
@pytest.mark.parametrize("where", WHERE)
def test_very_many_flipped_bits_are_reported_or_harmless(left: Left, where: str) -> None:
    flip_bits(left, where, 1000)
