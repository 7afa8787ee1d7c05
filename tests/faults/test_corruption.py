"""A bit that has flipped on the disk is reported, or is where nothing is: it is never served.

LMDB does not check its own pages, so a flipped bit in one may also end the process that reads it;
an owner that ends so has its view built anew.
"""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from crashing import in_child
from left_behind import Left, history_in, project
from system import System
from trouble import entries, living, until

from ksi.actors.checkpoints import root_of
from ksi.actors.commit import table_specs
from ksi.actors.followers.indexed import Verification
from ksi.actors.owners import load
from ksi.actors.reading import reader_of
from ksi.actors.supervision.supervisor import FAULTS
from ksi.storage import checkpoints
from ksi.storage.environment import open_copy
from ksi.storage.errors import Corrupt
from ksi.storage.examination import check_rows, examine
from ksi.transport.errors import NotRunning

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")  # LMDB's are the same.
REPORTED = 3  # What a child that looks ends with where it is told of damage.


def view(left: Left) -> Any:
    """Return the number of the last command, and every row of every table.

    As `ksi doctor` does: who only reads the rows that are there does not miss those that a damaged
    page hides.
    """
    examined = examine(left.var / "db" / "sessions")
    if examined is None or examined.environment is None:
        raise Corrupt("the view cannot be read")
    if damaged := check_rows(examined.environment, table_specs(load("sessions")))[1]:
        raise Corrupt(damaged[0])
    tables = reader_of("sessions", left.var).reader
    return tables.read(
        lambda tables, meta: (meta.seq, {name: [*tables[name].range()] for name in tables})
    )


def journal(left: Left) -> Any:
    reader = reader_of("sessions", left.var)
    whole = reader.journal()
    return [*whole.read(whole.start(), reader.committed().position)]


def verified_checkpoints(left: Left) -> Any:
    root = root_of(left.var)
    return [bool(checkpoints.verify(root / name)) for name in checkpoints.names(root)]


def files(left: Left) -> Any:
    """As `ksi index verify` and `ksi doctor` do: who only reads a line does not check it."""
    verification = Verification(left.var)
    while verification.turn():
        pass
    if verification.found:
        raise Corrupt(verification.found[0])
    return verification.rows


WHERE: dict[str, tuple[str, Callable[[Left], Any]]] = {
    "view": ("db/sessions/*/view/data.mdb", view),
    "journal": ("db/sessions/*/*.log", journal),
    "checkpoints": ("checkpoints/*/**/*.*", verified_checkpoints),
    "archive": ("archive/sessions/*.zst", lambda left: history_in(left.var)),
    "session files": ("logs/responses/sessions/*.jsonl", files),
}


def seen(left: Left, look: Callable[[Left], Any]) -> str | None:
    """Return what a child sees; None if it is told of damage, or ended by it."""
    told = left.var.parent / "seen"
    told.write_text("nothing: it was killed")

    def child() -> None:
        try:
            told.write_text(repr(look(left)))
        except (Corrupt, NotRunning, lmdb.Error):  # What cannot be opened says so, with the reason.
            os._exit(REPORTED)

    ended = in_child(child)
    return None if ended == REPORTED or ended in FAULTS else f"{ended}: {told.read_text()}"


def flip_bits(left: Left, where: str, flips: int) -> None:
    """Flip a bit of a file, look, and flip it back; again and again."""
    seed = int(os.environ.get("KSI_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"KSI_SEED={seed}")
    chance = random.Random(seed)
    pattern, look = WHERE[where]
    left.put_back()
    if where == "archive":
        assert in_child(lambda: project(left)) == 0
    right, reported = seen(left, look), 0
    assert right is not None
    assert right.startswith("0: "), right
    for _ in range(flips):
        path = chance.choice([each for each in sorted(left.var.glob(pattern)) if has_bytes(each)])
        at, bit = place_in(path, chance), 1 << chance.randrange(8)
        flip(path, at, bit)
        found = seen(left, look)
        assert found in (right, None), f"bit {bit} of byte {at} of {path}: {found}"[:1000]
        reported += found is None
        flip(path, at, bit)
    assert seen(left, look) == right
    print(f"{where}: {flips} bits flipped, {reported} reported, the rest changed nothing")
    assert reported > 0 or flips < 100, "none was where something is"


def has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def place_in(path: Path, chance: random.Random) -> int:
    """Draw a byte of a file, rather one that is not zero."""
    content = path.read_bytes()
    at = chance.randrange(len(content))
    for _ in range(20):
        if content[at]:
            break
        at = chance.randrange(len(content))
    return at


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b", 0) as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def root_places(path: Path) -> list[int]:
    """Return where the newest state in an LMDB file names the pages at which its tables begin.

    Source: mdb.c of LMDB 0.9, MDB_meta, MDB_page, MDB_node, MDB_db, on 64 bits.
    """
    content = path.read_bytes()
    states = (struct.unpack_from("<Q8xQ", content, page + 128) for page in (0, PAGE_BYTES))
    root = max(states, key=lambda state: state[1])[0] * PAGE_BYTES
    flags, below = struct.unpack_from("<HH", content, root + 10)
    assert flags & 0x02, "the list of tables is more than a page"
    places = []
    for (node,) in struct.iter_unpack("<H", content[root + 16 : root + below]):
        size, kind, key_bytes = struct.unpack_from("<I2H", content, root + node)
        assert (size, kind) == (48, 2), "this is no table"
        places.append(root + node + 8 + key_bytes + 40)
    return places


@pytest.mark.parametrize("where", WHERE)
def test_a_flipped_bit_is_reported_or_harmless(left: Left, where: str) -> None:
    flip_bits(left, where, 12)


@pytest.mark.soak
@pytest.mark.parametrize("where", WHERE)
def test_very_many_flipped_bits_are_reported_or_harmless(left: Left, where: str) -> None:
    flip_bits(left, where, 1000)


def compact(path: Path) -> None:
    """Leave nothing in an LMDB file but its newest state: former ones are its own, too (0032)."""
    copy = path.parent / "compact"
    copy.mkdir()
    environment = open_copy(path.parent)
    environment.copy(str(copy), compact=True)
    environment.close()
    (copy / path.name).replace(path)
    copy.rmdir()


def test_a_table_that_begins_at_another_page_is_not_shown(left: Left) -> None:
    left.put_back()
    (path,) = left.var.glob(WHERE["view"][0])
    assert in_child(lambda: compact(path)) == 0
    right = seen(left, view)
    places = root_places(path)
    assert len(places) > 10
    reported = 0
    for at in places:
        for bit in (1 << number for number in range(6)):
            flip(path, at, bit)
            found = seen(left, view)
            flip(path, at, bit)
            assert found in (right, None), f"bit {bit} of byte {at} of {path}: {found}"[:1000]
            reported += found is None
    assert reported > len(places)


def test_an_owner_that_faults_has_its_view_built_anew_and_nothing_is_lost(system: System) -> None:
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="s")
        alice.ask("session:append", session_id="s", event="n", data={})
        views = list((system.var / "db" / "sessions").glob("*/view"))
        assert len(views) == 1
        before = views[0].stat().st_ino
        os.kill(living(system), signal.SIGKILL)
        until(lambda: system.pid_of("sessions"))
        alice.ask("session:append", session_id="s", event="n", data={})
        assert views[0].stat().st_ino == before
        os.kill(living(system), signal.SIGSEGV)
        alice.ask("session:append", session_id="s", event="n", data={}, timeout_s=30.0)
    assert views[0].stat().st_ino != before
    assert list(views[0].parent.glob("view.untrusted-*"))
    assert [entry["metadata"]["seq"] for entry in entries(system, "s")] == [1, 2, 3]
