"""When checkpoints are made, and the process that makes one: a child of the supervisor like others.

One is made in the end, when all owners have stopped in order; by hand; when `every_s` have passed
since the last; and when the journals have grown by `journal_bytes`, which bounds what a crash of
the machine makes an owner replay. One at a time: a stop ends the one that is being made.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ksi.actors.config import CheckpointSection
from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.forkserver import Running
from ksi.actors.supervision.reports import write_checkpoint
from ksi.actors.supervision.restarts import exit_words
from ksi.storage import checkpoints
from ksi.storage.journal import START, bytes_after
from ksi.transport.errors import Conflict, KsiError

LOOK_S: Final = 5.0  # How often is looked whether one is due.
LAST_S_MAX: Final = 600.0  # The last one: gigabytes on a slow disk. Beyond it, it hangs.
RETRY_S: Final = 60.0  # After one that failed.
NAME: Final = "checkpoint"

Spawn = Callable[[ChildSpec, Callable[[], None]], Running]


class Checkpoints:
    """The checkpoints of one var. Driven by the supervisor's turns; waits for nothing.

    Args:
        spawn: starts a child, and has a function called when it has ended.
        forget: ends that.
    """

    def __init__(
        self,
        var: Path,
        run: Path,
        spawn: Spawn,
        forget: Callable[[Running], None],
        log: Any,
    ) -> None:
        self._var = var
        self._run = run
        self._root = var / "checkpoints"
        self._spawn = spawn
        self._forget = forget
        self._log = log
        self._running: Running | None = None
        self._id = ""
        self._last_taken = False
        self._looked_s = time.monotonic()
        self._not_before_s = 0.0
        self._begun_at = time.time()

    def create(self, reason: str, settings: CheckpointSection) -> str:
        """Begin to make a checkpoint and return its id; when it is made, it is listed.

        Raises:
            Conflict: one is being made.
            OSError, KsiError: no process can be started.
        """
        if self._running is not None:
            raise Conflict(f"the checkpoint {self._id} is being made", id=self._id)
        now = datetime.now(UTC)
        self._id = f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}Z"
        spec = ChildSpec(
            name=NAME,
            kind="follower",
            function="ksi.actors.checkpoints:run_checkpoint",
            arguments=(
                str(self._var),
                self._id,
                reason,
                str(settings.keep),
                str(settings.former_s),
            ),
            restart="temporary",
        )
        self._running = self._spawn(spec, self._has_ended)
        self._not_before_s = time.monotonic() + RETRY_S
        return self._id

    @property
    def making(self) -> str | None:
        """The id of the one that is being made."""
        return self._id if self._running is not None else None

    def turn(self, settings: CheckpointSection, now_s: float) -> None:
        """Begin one if it is due."""
        if self._running is not None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        if now_s < self._not_before_s:
            return
        try:
            reason = self._due(settings)
        except (OSError, KsiError) as error:  # Files were removed by hand, say.
            self._log.error("whether a checkpoint is due cannot be seen", error=str(error))
            return
        if reason is not None:
            self._begin(reason, settings)

    def is_last_taken(self, settings: CheckpointSection) -> bool:
        """Make the last one, of owners that have stopped; return whether that is over.

        Whoever is in a hurry waits for it, too; one that takes longer than any disk is ended.
        """
        if not self._last_taken and self._running is None:
            self._last_taken = True
            self._begin("stop", settings)
        elif self._running is not None and time.monotonic() - self._running.started_s > LAST_S_MAX:
            self.end()
        return self._running is None

    def end(self) -> None:
        """End the one that is being made: what it has collected is left for the next to remove."""
        if self._running is not None:
            self._running.signal(signal.SIGKILL)

    def _begin(self, reason: str, settings: CheckpointSection) -> None:
        try:
            self.create(reason, settings)
        except (OSError, KsiError) as error:
            self._log.error("no checkpoint can be made", error=str(error))

    def _due(self, settings: CheckpointSection) -> str | None:
        """Return why a checkpoint is due, or None."""
        newest = next(iter(checkpoints.whole(self._root)), None)
        made_at = newest.created_at if newest else self._begun_at
        grown_bytes = 0
        for directory in (self._var / "db").glob("*/CURRENT"):
            owner = directory.parent
            store = owner / directory.read_text().strip()
            known = newest.owners.get(owner.name) if newest else None
            after = known.position if known and known.store == store.name else START
            grown_bytes += bytes_after(store, after)
        if grown_bytes >= settings.journal_bytes:
            return "journal"
        if settings.every_s and time.time() - made_at >= settings.every_s and grown_bytes:
            return "time"
        return None

    def _has_ended(self) -> None:
        running, self._running = self._running, None
        assert running is not None
        self._forget(running)
        code = running.ended()
        if code == 0:
            self._log.info("checkpoint", checkpoint=self._id)
            self._not_before_s = 0.0
            return
        self._log.error("no checkpoint was made", checkpoint=self._id, last_exit=exit_words(code))
        if code != 1:  # Else it has said why.
            try:
                write_checkpoint(self._run, self._id, exit_words(code))
            except OSError as error:
                self._log.error("that cannot be published", error=str(error))
