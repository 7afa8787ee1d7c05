"""Refusals and errors: one class for each conclusion a caller should draw.

A *conclusive* refusal is the outcome of its command: it is stored and repeated to a retry.
A *transient* one says that nothing happened and that the same command may be sent again.
Every class carries a stable `code`, the exit code of the `ksi` command, and on each instance
a text (what was attempted), a hint (what to do next) and details as plain values.
"""

from __future__ import annotations

from typing import Any, ClassVar

BY_CODE: dict[str, type[KsiError]] = {}


class KsiError(Exception):
    """Base of all errors a KSI caller sees; never raised itself."""

    code: ClassVar[str] = "error"
    conclusive: ClassVar[bool] = True
    exit_code: ClassVar[int] = 1
    retry_s: ClassVar[float] = 0.02  # Until a transient one is tried again, if it names no time.

    def __init__(self, text: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(text)
        self.text = text
        self.hint = hint
        self.details = details

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.code not in BY_CODE, f"two errors with the code {cls.code}"
        BY_CODE[cls.code] = cls

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (from_wire, (self.to_wire(),))

    def to_wire(self) -> list[Any]:
        """Return `[code, text, hint, details]`, the form an error has in every reply."""
        return [self.code, self.text, self.hint, self.details]


def from_wire(wire: list[Any]) -> KsiError:
    """Build the error that `to_wire` described; an unknown code becomes `internal`."""
    code, text, hint, details = wire
    known = BY_CODE.get(code, Internal)
    return known(text, hint=hint, **details)


class Invalid(KsiError):
    """A field is missing, mistyped or out of bounds; the text names its path."""

    code = "invalid"
    exit_code = 2


class UnknownOperation(KsiError):
    """No operation has this name; the hint names the nearest that does."""

    code = "unknown_operation"
    exit_code = 2


class Forbidden(KsiError):
    """The role of this identity may not do this, or its key is not enrolled."""

    code = "forbidden"
    exit_code = 5


class NotOwner(KsiError):
    """Someone else writes this session; the details name the owner and the epoch."""

    code = "not_owner"
    exit_code = 5


class StaleEpoch(KsiError):
    """The epoch sent is a former one; the details name the present one."""

    code = "stale_epoch"
    exit_code = 5


class Conflict(KsiError):
    """It exists already, is closed, or has another revision; the details name what is there."""

    code = "conflict"
    exit_code = 5


class NotFound(KsiError):
    """What was looked for does not exist."""

    code = "not_found"
    exit_code = 6


class TooLarge(KsiError):
    """A value is over a limit; the details name limit and size."""

    code = "too_large"
    exit_code = 2


class Quota(KsiError):
    """One more would be over a limit; the details name it."""

    code = "quota"
    exit_code = 2


class Expired(KsiError):
    """Its time ran out before it was executed; it was not executed and never will be."""

    code = "expired"
    exit_code = 4


class Internal(KsiError):
    """A defect of ours: this command alone was undone, and the owner's log has the traceback."""

    code = "internal"


class Busy(KsiError):
    """The mailbox is full; nothing was changed."""

    code = "busy"
    conclusive = False
    exit_code = 75


class Draining(KsiError):
    """The owner is stopping; nothing was changed."""

    code = "draining"
    conclusive = False
    exit_code = 75


class StorageFull(KsiError):
    """There is no room for the journal or in the map; nothing was changed, reads go on."""

    code = "storage_full"
    conclusive = False
    exit_code = 75
    retry_s = 0.25  # Nobody tells when there is room again, and it is not soon.


class Restored(KsiError):
    """The store was restored from a checkpoint: what was unsettled is lost, start anew."""

    code = "restored"


class Unanswered(KsiError):
    """A completion has failed or was cancelled; the details are its outcome."""

    code = "unanswered"


class Evicted(KsiError):
    """The owner has forgotten this client; whether the command happened is unknown."""

    code = "evicted"


class Unavailable(KsiError):
    """No answer by the deadline: it may or may not have happened.

    `ticket` is what `client.settle(ticket)` takes to find out.
    """

    code = "unavailable"
    exit_code = 4
    ticket: Any = None


class NotRunning(KsiError):
    """No supervisor runs on this var directory."""

    code = "not_running"
    exit_code = 3
