"""What storage concludes when the disk does not hold what it should.

Neither of the first two is a refusal of a command: an owner that meets one stops and says so.
`StorageFull` (from `ksi.transport.errors`) is the third: nothing was changed, try again later.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

from ksi.transport.errors import KsiError

# A file that is not there, or not a file, or whose blocks cannot be read.
_DAMAGE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN})


class Corrupt(KsiError):
    """What is on disk is not what was written; it was neither used nor changed.

    The text names the file and the place, the hint what to do.
    """

    code: ClassVar[str] = "corrupt"
    conclusive: ClassVar[bool] = False


class NewerFormat(KsiError):
    """A newer version of KSI has written here; nothing was touched."""

    code: ClassVar[str] = "newer_format"
    conclusive: ClassVar[bool] = False


class UnknownOutcome(Exception):
    """A sync or commit failed: the batch may be on disk or not.

    Only recovery can tell. End the process without a reply and open the store in a new one; what
    a failed sync left in the page cache is not to be trusted (fsyncgate).
    """


@contextmanager
def reading(what: str, path: Path) -> Iterator[None]:
    """Turn it into `Corrupt` if a file that is read is missing, damaged or not of its form.

    Another `OSError` passes: that a process has no descriptor left says nothing about the file.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGE:
            raise
        raise Corrupt(f"{what}: {error}", file=str(path)) from error
