"""The owner `library` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/library.py`.
"""

from __future__ import annotations

from typing import Annotated

from ksi.actors.declarations.conversations import (
    ImportRow,
    Order,
)
from ksi.actors.declarations.editing import Edit
from ksi.actors.declarations.locks import (
    Count,
    ForkRow,
    Held,
    Lock,
    Parent,
    Waiter,
)
from ksi.actors.owner import (
    Compositions,
    Conversations,
    Keyed,
    Table,
    Tables,
)


class LibraryTables(Tables):
    orders: Table[Order]  # by kind
    edits: Annotated[Table[Edit], Keyed(str, cache_rows=8)]  # by path
    imports: Table[ImportRow]  # by the hash of their path
    locks: Table[Lock]  # by conversation
    waiting: Annotated[Table[Waiter], Keyed(str, int)]  # by conversation and ticket
    requests: Annotated[Table[Held], Keyed(str, str)]  # by agent and request
    due: Annotated[Table[bytes], Keyed(int, str)]  # by owner time in ms and conversation
    forks: Annotated[Table[ForkRow], Keyed(str, str)]  # by parent and child
    parents: Table[Parent]  # by child
    counters: Table[Count]
    compositions: Compositions
    conversations: Conversations
