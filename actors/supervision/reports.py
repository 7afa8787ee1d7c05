"""What processes leave in the run directory for others to read, whatever becomes of them.

`children.json`: the supervisor's children, on each change. `supervisor.exit`: why it gave up, until
the next start. `index.json`, `compositions.json` and `conversations.json`: what the followers of
these caches do. `checkpoint.json`: the last checkpoint that failed. Replaced in one step, never
synced: they live as long as a run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from ksi.actors.supervision.system import SystemStatus

CHILDREN: Final = "children.json"
EXIT: Final = "supervisor.exit"
CHECKPOINT: Final = "checkpoint.json"


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a supervisor ended that did not end in order. `at`: seconds since the epoch."""

    at: float
    exit_code: int
    reason: str


def write_children(run: Path, status: SystemStatus) -> None:
    """Publish the state of all children.

    Raises:
        OSError: it cannot be written.
    """
    _replace(run / CHILDREN, {"schema": "ksi.children/1", **msgspec.to_builtins(status)})


def read_children(run: Path) -> SystemStatus | None:
    """Return the children as they were published last, or None. Compare `pid` before use."""
    try:
        return msgspec.json.decode((run / CHILDREN).read_bytes(), type=SystemStatus)
    except (OSError, ValueError):
        return None


def write_exit(run: Path, exit_code: int, reason: str) -> None:
    """Say why the supervisor ends.

    Raises:
        OSError: it cannot be written.
    """
    content = {"at": time.time(), "exit_code": exit_code, "reason": reason}
    _replace(run / EXIT, {"schema": "ksi.exit/1", **content})


def read_exit(run: Path) -> Exit | None:
    """Return why the last supervisor ended, or None if it ended in order or was killed."""
    try:
        return msgspec.json.decode((run / EXIT).read_bytes(), type=Exit)
    except (OSError, ValueError):
        return None


def clear_exit(run: Path) -> None:
    """Forget how the last supervisor ended."""
    (run / EXIT).unlink(missing_ok=True)


def write_follower(run: Path, name: str, told: dict[str, Any]) -> None:
    """Say what the follower that keeps the cache `name` does.

    Raises:
        OSError: it cannot be written.
    """
    _replace(run / f"{name}.json", {"schema": f"ksi.{name}.follower/1", **told})


def read_follower(run: Path, name: str) -> dict[str, Any]:
    """Return what the follower of a cache said last of what it does; nothing if it never did."""
    try:
        told: dict[str, Any] = json.loads((run / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return told


class FailedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was not made, and why. `at`: seconds since the epoch."""

    id: str
    at: float
    reason: str


def write_checkpoint(run: Path, checkpoint_id: str, reason: str) -> None:
    """Say why a checkpoint was not made.

    Raises:
        OSError: it cannot be written.
    """
    content = {"id": checkpoint_id, "at": time.time(), "reason": reason}
    _replace(run / CHECKPOINT, {"schema": "ksi.checkpoint.failed/1", **content})


def read_checkpoint(run: Path) -> FailedCheckpoint | None:
    """Return the last checkpoint that failed, if one did."""
    try:
        return msgspec.json.decode((run / CHECKPOINT).read_bytes(), type=FailedCheckpoint)
    except (OSError, ValueError):
        return None


def _replace(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content))
    fresh.replace(path)
