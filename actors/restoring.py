"""Restoring a checkpoint: every owner gets a new store that begins with its state in the cut.

Nothing is overwritten: former stores stay where they are, and session files that are longer than
they were then are kept aside in `archive/before-restore-<id>/` first. Readers and clients are told
by the id of the store, which is another. What an earlier restore kept aside comes back with a
checkpoint that knows of it.

It is done under the lock of the var directory, with no owner running. `db/RESTORING` stands from
its first step to its last: while it is there nothing starts, and the same restore goes on where it
was cut short. What is as the checkpoint has it already is left alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final
from zlib import crc32

import msgspec

from ksi.actors import config
from ksi.actors.checkpoints import RESTORING, root_of
from ksi.actors.commit import bind, table_specs
from ksi.actors.owner import Interrupted
from ksi.actors.owners import completion
from ksi.actors.owners.requests import Open, open_in
from ksi.actors.reading import archive_directory, log_directory
from ksi.actors.supervision import lock
from ksi.storage import checkpoints
from ksi.storage.archive import Archive
from ksi.storage.atomic import make_directory, sync_directory, write_atomically
from ksi.storage.checkpoints import LATEST, Checkpoint, File
from ksi.storage.errors import Corrupt
from ksi.storage.files import log_name
from ksi.storage.format import mark_format
from ksi.storage.snapshots import read_copy
from ksi.storage.store import is_as_restored, restore
from ksi.transport.errors import Conflict, NotFound

_PIECE_BYTES: Final = 1 << 20


class _Begun(msgspec.Struct, frozen=True):
    """What `RESTORING` says: which checkpoint, and where files are kept aside."""

    id: str
    aside: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore will do.

    Attributes:
        damaged: newer checkpoints that were passed over, each with the reason.
        owners: those that get a new store.
        unchanged: those whose store is what the checkpoint has.
        shortened: session files that are longer than in the checkpoint.
        removed: session files it does not know. Like those, they are kept in `aside`.
        returned: session files that lack bytes the checkpoint knows of, which an earlier restore
            kept aside.
        missing: session files that lack bytes which are nowhere; they stay as they are.
        queued: how many requests wait in each session: they will go on doing so, in their order.
        interrupted: requests that were running; the `rule` says what becomes of them: they wait
            again in their place, or end as failed with the reason `daemon_restart`, once.
    """

    id: str
    created_at: float
    damaged: dict[str, str]
    owners: dict[str, int]
    unchanged: list[str]
    shortened: list[str]
    removed: list[str]
    returned: list[str]
    missing: list[str]
    aside: str
    queued: dict[str, int]
    interrupted: list[str]
    rule: Interrupted

    @property
    def is_nothing(self) -> bool:
        """Whether all is as the checkpoint has it."""
        return not (self.owners or self.shortened or self.removed or self.returned)


def plan(var: Path, checkpoint_id: str = LATEST) -> Plan:
    """Return what restoring a checkpoint would do; change nothing.

    Raises:
        NotFound: there is no such checkpoint.
        Corrupt: it is damaged; of `latest`: all there are.
        Conflict: another restore was cut short and has to be ended first.
    """
    root = root_of(var)
    begun = _begun(var)
    if begun is not None and checkpoint_id == LATEST:
        checkpoint_id = begun.id
    if begun is not None and checkpoint_id != begun.id:
        raise _cut_short(begun.id)
    found, damaged = _good(root, checkpoint_id)
    aside = begun.aside if begun else _free_name(var, found.id)
    as_it_is = {
        owner
        for owner, manifest in found.owners.items()
        if is_as_restored(var / "db" / owner, manifest)
    }
    files = {file.key: file for file in checkpoints.read_files(root / found.id)}
    present = dict(_present(log_directory(var)))
    archive = Archive(archive_directory(var))
    lacking = [
        file
        for key, file in files.items()
        if present.get(key, 0) < file.size and (archive.size(key) or 0) < file.size
    ]
    returned = {file.key for file in lacking if _kept(var, file)}
    waits = Open({}, []) if "completion" in as_it_is else _open_in(root / found.id)
    return Plan(
        id=found.id,
        created_at=found.created_at,
        damaged=damaged,
        owners={name: each.seq for name, each in found.owners.items() if name not in as_it_is},
        unchanged=sorted(as_it_is),
        shortened=sorted(k for k, size in present.items() if k in files and size > files[k].size),
        removed=sorted(present.keys() - files.keys()),
        returned=sorted(returned),
        missing=sorted(file.key for file in lacking if file.key not in returned),
        aside=aside,
        queued=waits.waiting,
        interrupted=waits.active,
        rule=config.load(var).config.checkpoint.interrupted,
    )


def run(var: Path, checkpoint_id: str = LATEST) -> Plan:
    """Restore a checkpoint and return what was done.

    Raises:
        Conflict: a supervisor runs on `var`. As `plan` otherwise.
    """
    if not checkpoints.names(root_of(var)):
        raise _none()
    held = lock.hold(var)
    try:
        mark_format(var)
        planned = plan(var, checkpoint_id)
        if not planned.is_nothing or _begun(var) is not None:
            _carry_out(var, planned)
        return planned
    finally:
        os.close(held)


def require_none_begun(var: Path) -> None:
    """Raise `Conflict` if a restore of `var` was cut short: its owners do not fit together."""
    begun = _begun(var)
    if begun is not None:
        raise _cut_short(begun.id)


def _carry_out(var: Path, planned: Plan) -> None:
    root = root_of(var)
    make_directory(var / "db")
    mark = var / "db" / RESTORING
    write_atomically(mark, msgspec.json.encode(_Begun(planned.id, planned.aside)))
    files = {file.key: file for file in checkpoints.read_files(root / planned.id)}
    directory = log_directory(var)
    changed = [*planned.shortened, *planned.removed, *planned.returned]
    if changed:
        make_directory(directory)
        _keep(directory, changed, var / "archive" / planned.aside)
        for key in planned.shortened:
            path = directory / log_name(key)
            _put(path, path, files[key].size)
        for key in planned.returned:
            kept = _kept(var, files[key])
            if kept:
                _put(kept, directory / log_name(key), files[key].size)
        for key in planned.removed:
            (directory / log_name(key)).unlink()
        sync_directory(directory)
    for owner in planned.owners:
        restore(var / "db" / owner, root / planned.id / owner)
    mark.unlink()
    sync_directory(mark.parent)


def _keep(directory: Path, keys: list[str], aside: Path) -> None:
    """Keep files aside as they are, durably: only then may anything happen to them."""
    make_directory(aside)
    for key in keys:
        # We did, and were cut short; or there is no file yet.
        with suppress(FileExistsError, FileNotFoundError):
            os.link(directory / log_name(key), aside / log_name(key))
    sync_directory(aside)


def _kept(var: Path, file: File) -> Path | None:
    """Return a file that an earlier restore kept aside and that begins with what `file` was."""
    for aside in sorted((var / "archive").glob("before-restore-*")):
        path = aside / log_name(file.key)
        with suppress(FileNotFoundError):
            if path.stat().st_size >= file.size and _crc(path, file.size) == file.crc:
                return path
    return None


def _crc(path: Path, size: int) -> int:
    crc = 0
    with open(path, "rb") as content:
        while piece := content.read(min(_PIECE_BYTES, size)):
            crc, size = crc32(piece, crc), size - len(piece)
    return crc


def _put(source: Path, target: Path, size: int) -> None:
    """Let the first bytes of a file, which is kept aside, take the place of `target`."""
    temporary = target.with_name(f".{target.name}.tmp")
    with open(source, "rb") as whole, open(temporary, "wb") as short:
        shutil.copyfileobj(whole, short)
        short.truncate(size)
        short.flush()
        os.fchmod(short.fileno(), 0o600)
        os.fsync(short.fileno())
    os.rename(temporary, target)


def _good(root: Path, checkpoint_id: str) -> tuple[Checkpoint, dict[str, str]]:
    """Return the checkpoint to restore, and newer ones that are damaged, with the reasons."""
    if checkpoint_id != LATEST:
        return checkpoints.verify(root / checkpoint_id), {}
    damaged: dict[str, str] = {}
    for name in _newest_first(root):
        try:
            return checkpoints.verify(root / name), damaged
        except Corrupt as error:
            damaged[name] = error.text
    if damaged:
        raise Corrupt(f"all {len(damaged)} checkpoints are damaged", hint="ksi checkpoint verify")
    raise _none()


def _newest_first(root: Path) -> list[str]:
    """Return the ids of all there are to restore, and of damaged ones that are newer.

    One whose manifest is damaged does not say its number: its id tells its time.
    """
    readable = [each.id for each in checkpoints.whole(root)]
    newest = readable[0] if readable else ""
    damaged = [name for name in checkpoints.names(root) if name not in readable and name > newest]
    return [*reversed(damaged), *readable]


def _open_in(checkpoint: Path) -> Open:
    """Return the requests that are open in a checkpoint."""
    owner = completion.OWNER
    return read_copy(
        checkpoint / owner.name,
        table_specs(owner),
        lambda tables: open_in(bind(owner.tables, tables)),
    )


def _present(directory: Path) -> Iterator[tuple[str, int]]:
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        for each in found:
            if each.name.endswith(".jsonl") and each.is_file(follow_symlinks=False):
                yield each.name.removesuffix(".jsonl"), each.stat().st_size


def _free_name(var: Path, checkpoint_id: str) -> str:
    """Return a name in the archive that nothing has yet."""
    name, count = f"before-restore-{checkpoint_id}", 1
    while (var / "archive" / name).exists():
        count += 1
        name = f"before-restore-{checkpoint_id}-{count}"
    return name


def _begun(var: Path) -> _Begun | None:
    try:
        return msgspec.json.decode((var / "db" / RESTORING).read_bytes(), type=_Begun)
    except FileNotFoundError:
        return None


def _none() -> NotFound:
    return NotFound("there is no checkpoint to restore", hint="ksi checkpoint create makes one")


def _cut_short(checkpoint_id: str) -> Conflict:
    return Conflict(
        f"a restore of the checkpoint {checkpoint_id} was cut short",
        hint=f"ksi restore {checkpoint_id} ends it",
        id=checkpoint_id,
    )
