"""The checkpoints of a var directory, as they are shown to people: from its files alone."""

from __future__ import annotations

from pathlib import Path

from ksi.actors.supervision.reports import read_checkpoint
from ksi.actors.supervision.system import (
    CheckpointList,
    CheckpointStatus,
    SnapshotStatus,
    Verified,
)
from ksi.storage import checkpoints
from ksi.storage.errors import Corrupt
from ksi.transport.errors import NotFound, TooLarge
from ksi.transport.limits import VERIFY_BYTES_MAX


def listed(var: Path, run: Path, making: str | None = None) -> CheckpointList:
    """Return the checkpoints of `var`, the newest first."""
    found = checkpoints.whole(var / "checkpoints")
    failed = read_checkpoint(run)
    if failed is not None and found and failed.at < found[0].created_at:
        failed = None  # One that was made since then tells more.
    return CheckpointList(
        checkpoints=[_status(each) for each in found],
        making=making,
        failed_id=failed.id if failed else None,
        failed=failed.reason if failed else None,
    )


def find(var: Path, checkpoint_id: str | None) -> CheckpointStatus:
    """Return a checkpoint; None or `latest` is the newest.

    Raises:
        NotFound: there is none.
        Corrupt: it cannot be read.
    """
    root = var / "checkpoints"
    if checkpoint_id not in (None, checkpoints.LATEST):
        return _status(checkpoints.read(root / str(checkpoint_id)))
    found = checkpoints.whole(root)
    if not found:
        raise NotFound("there is no checkpoint yet", hint="ksi checkpoint create")
    return _status(found[0])


def verify(var: Path, checkpoint_id: str) -> None:
    """Read all of a checkpoint and compare it with its checksums.

    Raises:
        NotFound: there is none.
        Corrupt: it is not what it was.
    """
    checkpoints.verify(var / "checkpoints" / checkpoint_id)


def verified(var: Path, checkpoint_id: str | None) -> Verified:
    """Verify a checkpoint that is small enough for the supervisor to wait for.

    Raises:
        NotFound: there is none.
        TooLarge: it is not; verify it in a process of its own.
    """
    name = checkpoint_id or checkpoints.LATEST
    try:
        found = find(var, checkpoint_id)
        name = found.id
        if found.data_bytes > VERIFY_BYTES_MAX:
            raise TooLarge(
                f"checkpoint {found.id} has {found.data_bytes} bytes: too many to wait for",
                hint=f"ksi checkpoint verify {found.id}",
                limit_bytes=VERIFY_BYTES_MAX,
            )
        verify(var, found.id)
    except Corrupt as error:
        return Verified(id=name, good=False, reason=error.text)
    return Verified(id=name, good=True, reason=None)


def prune(var: Path, keep: int) -> list[str]:
    """Remove all but the newest `keep` whole checkpoints; return the ids of those removed."""
    return checkpoints.prune(var / "checkpoints", keep)


def _status(made: checkpoints.Checkpoint) -> CheckpointStatus:
    return CheckpointStatus(
        id=made.id,
        number=made.number,
        created_at=made.created_at,
        reason=made.reason,
        data_bytes=made.data_bytes,
        files=made.files,
        files_bytes=made.files_bytes,
        owners=[
            SnapshotStatus(
                owner=owner,
                store_id=each.store,
                seq=each.seq,
                segment=each.segment,
                offset=each.offset,
                data_bytes=each.data_bytes,
            )
            for owner, each in made.owners.items()
        ],
    )
