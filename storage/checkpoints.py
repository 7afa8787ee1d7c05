"""Checkpoints: one consistent state of all owners, whole or absent.

    var/checkpoints/<id>/manifest.json       what it holds
    var/checkpoints/<id>/files.jsonl         of each session file: [key, bytes, crc32]
    var/checkpoints/<id>/<owner>/            a snapshot (`storage/snapshots.py`)
    var/checkpoints/.making-<number>/        one that is being made

Whatever has a name without a dot is whole: it was synced, hashed and verified before it was
renamed. One that is removed is renamed first. So a kill at any moment leaves nothing half.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from ksi.storage.atomic import sync_directory, write_atomically
from ksi.storage.errors import Corrupt, reading
from ksi.storage.snapshots import Manifest, check_rows, is_whole, read_manifest
from ksi.transport.errors import NotFound

CHECKPOINT_FORMAT: Final = 1
FILES: Final = "files.jsonl"
MANIFEST: Final = "manifest.json"
LATEST: Final = "latest"


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds.

    Attributes:
        number: of the cut; a later checkpoint has a higher one.
        created_at: seconds since the epoch.
        reason: why it was made: stop, time, journal or hand.
        owners: the manifest of each owner's snapshot, with its place in the journal.
        files: how many session files it knows length and CRC of; they have `files_bytes` in all.
        files_sha256: of the list of them.
    """

    format: int = CHECKPOINT_FORMAT
    id: str
    number: int
    created_at: float
    reason: str
    owners: dict[str, Manifest]
    files: int
    files_bytes: int
    files_sha256: str

    @property
    def data_bytes(self) -> int:
        return sum(each.data_bytes for each in self.owners.values())


class File(msgspec.Struct, array_like=True, frozen=True):
    """A session file at the time of a checkpoint: its first `size` bytes have this CRC.

    `crc` is None where they were not all there.
    """

    key: str
    size: int
    crc: int | None


def making(root: Path, number: int) -> Path:
    """Return where the checkpoint of a number is being made."""
    return root / f".making-{number}"


def whole(root: Path) -> list[Checkpoint]:
    """Return the checkpoints in the directory `root`, the newest first.

    Those that cannot be read are left out; whether the others' data are good, `verify` tells.
    """
    found = []
    for name in names(root):
        with suppress(Corrupt, NotFound):  # NotFound: removed just now.
            found.append(read(root / name))
    return sorted(found, key=lambda each: (each.number, each.id), reverse=True)


def names(root: Path) -> list[str]:
    """Return the ids of the checkpoints in the directory `root`, in order."""
    try:
        return sorted(each for each in os.listdir(root) if not each.startswith("."))
    except FileNotFoundError:
        return []


def read(path: Path) -> Checkpoint:
    """Return the manifest of a checkpoint.

    Raises:
        NotFound: there is no such checkpoint.
        Corrupt: it cannot be read.
    """
    if not path.is_dir():
        raise NotFound(f"there is no checkpoint {path.name}", hint="ksi checkpoint list")
    with reading(f"checkpoint {path}", path / MANIFEST):
        found = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Checkpoint)
    if found.format != CHECKPOINT_FORMAT or found.id != path.name:
        raise Corrupt(f"checkpoint {path} is of format {found.format} and says it is {found.id}")
    return found


def verify(path: Path) -> Checkpoint:
    """Read all of a checkpoint and compare it with its checksums.

    Raises:
        NotFound: there is no such checkpoint.
        Corrupt: it is not what it was.
    """
    found = read(path)
    for owner, manifest in found.owners.items():
        if read_manifest(path / owner) != manifest or not is_whole(path / owner, manifest):
            raise Corrupt(
                f"checkpoint {path.name}: the snapshot of {owner} is not what it was",
                hint="use an older one: ksi checkpoint list",
                file=str(path / owner),
            )
        if check_rows(path / owner) != manifest.rows:
            raise Corrupt(f"checkpoint {path.name}: {owner} lacks rows", file=str(path / owner))
    if _hash(path / FILES) != found.files_sha256:
        raise Corrupt(f"checkpoint {path.name}: {FILES} is not what it was", file=str(path))
    return found


def read_files(path: Path) -> Iterator[File]:
    """Yield what a checkpoint says of session files.

    Raises:
        Corrupt: it cannot be read.
    """
    with reading(f"checkpoint {path}", path / FILES), open(path / FILES, "rb") as lines:
        for line in lines:
            yield msgspec.json.decode(line, type=File)


def write_files(path: Path, files: Iterable[File]) -> tuple[int, int, str]:
    """Write the list of session files, durably; return how many, their bytes, and its SHA-256."""
    count = total_bytes = 0
    digest = hashlib.sha256()
    with open(path / FILES, "xb") as lines:
        for file in files:
            line = msgspec.json.encode(file) + b"\n"
            digest.update(line)
            lines.write(line)
            count += 1
            total_bytes += file.size
        lines.flush()
        os.fsync(lines.fileno())
    return count, total_bytes, digest.hexdigest()


def publish(made: Path, root: Path, checkpoint: Checkpoint) -> None:
    """Give the checkpoint in the directory `made` its manifest and its name, durably."""
    content = msgspec.json.format(msgspec.json.encode(checkpoint), indent=2) + b"\n"
    write_atomically(made / MANIFEST, content)
    os.rename(made, root / checkpoint.id)
    sync_directory(root)


def prune(root: Path, keep: int) -> list[str]:
    """Remove all but the newest `keep` whole checkpoints; return the ids of those removed.

    One that is not whole counts for none and goes, too, unless there is nothing else.
    """
    found = whole(root)
    kept = [each.id for each in found if _looks_whole(root / each.id, each)][:keep]
    if not kept:
        return []
    gone = [name for name in names(root) if name not in kept]
    for name in gone:
        os.rename(root / name, root / f".gone-{name}")
    if gone:
        sync_directory(root)  # Else a power cut might leave the name, and not all that is in it.
    for name in gone:
        shutil.rmtree(root / f".gone-{name}", ignore_errors=True)
    return gone


def sweep(root: Path) -> None:
    """Remove what was being made or removed when its process ended."""
    for name in os.listdir(root):
        if name.startswith("."):
            shutil.rmtree(root / name, ignore_errors=True)


def _looks_whole(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether its files have the size they should have: `verify` takes as long as reading them."""
    try:
        return all(
            (path / owner / "data.mdb").stat().st_size == manifest.data_bytes
            for owner, manifest in checkpoint.owners.items()
        )
    except OSError:
        return False


def _hash(path: Path) -> str:
    with reading(str(path), path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
