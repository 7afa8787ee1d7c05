"""Recovery: what a store found on disk is worth, and what is done about it.

The journal is the truth and is synced before anybody is told; the view is not synced at all. After
a process died, or after a clean close, the kernel still has (or the disk got) every page of the
view, and replay goes on from there. After the machine crashed, pages of the view may be missing
anywhere in it, so it is set aside, whatever it looks like.

`TABLE` has one row for each case, and each combination of findings meets exactly one row:

A  The view can be trusted and the journal reaches its position: go on from it.
B  The view can be trusted, but the journal ends before its position or lacks its segment. What was
   acknowledged is missing from the journal, so somebody has removed or restored files by hand:
   refuse, change nothing.
C  The machine went down, there is a snapshot and the journal goes on from it: install it.
D  The machine went down, there is no such snapshot, but the journal is whole from its first
   record: start empty.
E  As D, but the journal's beginning has been dropped: refuse, change nothing.
F  The machine stayed up, yet the view is damaged or gone (a bad disk, a bad hand): as C.
G  As F without a snapshot, the journal whole: as D.
H  As F, the journal's beginning dropped: as E.

Source: the recovery table of TigerBeetle's journal, with named fields.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple


class Mark(Enum):
    """What the STATE file says."""

    CLEAN = "closed in order"
    SAME_BOOT = "in use since this boot of the machine"
    OTHER_BOOT = "in use when the machine went down, or unknown"


class View(Enum):
    """The LMDB view."""

    JOINED = "opens, and the journal reaches its position"
    SEVERED = "opens, but the journal does not reach its position"
    DAMAGED = "does not open, its position is unreadable, or it lacks some though closed in order"
    MISSING = "is not there"


class Snapshot(Enum):
    """The newest snapshot of this store."""

    JOINED = "there is one, and the journal goes on from its position"
    NONE = "there is none that the journal goes on from"


class Start(Enum):
    """The beginning of the journal."""

    WHOLE = "the first record ever is there"
    DROPPED = "the first segments have been dropped"


class Decision(Enum):
    """What to do before the journal is replayed."""

    TRUST = "replay onto the view"
    INSTALL = "set the view aside, install the snapshot, replay onto it"
    REBUILD = "set the view aside, replay onto an empty one"
    REFUSE = "change nothing and say so"


class Case(NamedTuple):
    """A row of the table: sets of findings it is for, what is decided, and why."""

    letter: str
    marks: frozenset[Mark]
    views: frozenset[View]
    snapshots: frozenset[Snapshot]
    starts: frozenset[Start]
    decision: Decision
    why: str

    def meets(self, mark: Mark, view: View, snapshot: Snapshot, start: Start) -> bool:
        return (
            mark in self.marks
            and view in self.views
            and snapshot in self.snapshots
            and start in self.starts
        )


_UP: Final = frozenset({Mark.CLEAN, Mark.SAME_BOOT})
_DOWN: Final = frozenset({Mark.OTHER_BOOT})
_JOINED: Final = frozenset({View.JOINED})
_SEVERED: Final = frozenset({View.SEVERED})
_WORTHLESS: Final = frozenset({View.DAMAGED, View.MISSING})
_ANY_VIEW: Final = frozenset(View)
_USABLE: Final = frozenset({Snapshot.JOINED})
_NONE: Final = frozenset({Snapshot.NONE})
_ANY_SNAPSHOT: Final = frozenset(Snapshot)
_WHOLE: Final = frozenset({Start.WHOLE})
_DROPPED: Final = frozenset({Start.DROPPED})
_ANY_START: Final = frozenset(Start)

_REMOVED: Final = "its journal ends before what its view holds: files were removed by hand"
_CRASHED: Final = "it was in use when the machine went down"
_DAMAGED: Final = "its view is damaged or gone"
_NOTHING: Final = ", no snapshot fits, and the beginning of its journal has been dropped"

TABLE: Final = (
    Case("A", _UP, _JOINED, _ANY_SNAPSHOT, _ANY_START, Decision.TRUST, "it can be trusted"),
    Case("B", _UP, _SEVERED, _ANY_SNAPSHOT, _ANY_START, Decision.REFUSE, _REMOVED),
    Case("C", _DOWN, _ANY_VIEW, _USABLE, _ANY_START, Decision.INSTALL, _CRASHED),
    Case("D", _DOWN, _ANY_VIEW, _NONE, _WHOLE, Decision.REBUILD, _CRASHED),
    Case("E", _DOWN, _ANY_VIEW, _NONE, _DROPPED, Decision.REFUSE, _CRASHED + _NOTHING),
    Case("F", _UP, _WORTHLESS, _USABLE, _ANY_START, Decision.INSTALL, _DAMAGED),
    Case("G", _UP, _WORTHLESS, _NONE, _WHOLE, Decision.REBUILD, _DAMAGED),
    Case("H", _UP, _WORTHLESS, _NONE, _DROPPED, Decision.REFUSE, _DAMAGED + _NOTHING),
)


def decide(mark: Mark, view: View, snapshot: Snapshot, start: Start) -> Case:
    """Return the one row for these findings."""
    (case,) = [each for each in TABLE if each.meets(mark, view, snapshot, start)]
    return case
