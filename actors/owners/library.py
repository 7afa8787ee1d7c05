"""Library: what others have written down, to be found again, and whose turn it is to go on.

Owns which logs are imported, the orders to make its caches again, and the locks on conversations.
What can be asked is in two files: `compositions.py` and `conversations.py`; what is written into
the folder of compositions, in `editing.py`.

The caches themselves are derived: two followers in the same process
(`actors/followers/library.py`) write them from files and from the journal of the sessions, and
carry the orders out. Queries read those databases, in any process.

- An order, or an import, is on disk when it is acknowledged; the status says when it was carried
  out.
- Compositions are edited, and the files stay the truth: `editing.py`.
- A conversation is locked for one request of one agent at a time. Each lock has an epoch above all
  before it; whoever says a former one is refused.
- Requests that find it locked wait in the order in which they came, and get it when it is released,
  has expired (in owner time), or the conversation has forked.

Source: "KSI State Management Analysis", 7. Conversation Service and 8. Composition Index.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ksi.actors.declarations.compositions import RebuildCompositions
from ksi.actors.declarations.conversations import (
    Forget,
    Import,
    ImportChanged,
    Order,
    OrderGiven,
    RebuildConversations,
)
from ksi.actors.declarations.editing import CompositionEdited, EditSettled
from ksi.actors.declarations.library import (
    LibraryTables,
)
from ksi.actors.declarations.locks import (
    ForkDetected,
    LockForgotten,
    LockFreed,
    LockGranted,
    LockLeft,
    LockQueued,
    LockRenewed,
)
from ksi.actors.owner import (
    Announcement,
    Decision,
    Given,
    Owner,
    Query,
    Reply,
    Sender,
    Tick,
)
from ksi.actors.owners import compositions, conversations, editing, locks


class Library(Owner[LibraryTables]):
    """The owner of imports, orders and locks, and of the queries to the caches."""

    name = "library"
    tables = LibraryTables
    domains = ("conversation", "composition")
    events = (
        OrderGiven
        | ImportChanged
        | LockGranted
        | LockQueued
        | LockLeft
        | LockRenewed
        | LockFreed
        | LockForgotten
        | ForkDetected
        | CompositionEdited
        | EditSettled
    )

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        return editing.fact(command)

    def decide(self, command: Any, sender: Sender, tables: LibraryTables, given: Given) -> Decision:
        match command:
            case RebuildCompositions():
                return conversations.order("compositions", sender, tables.orders, given)
            case RebuildConversations():
                return conversations.order("conversations", sender, tables.orders, given)
            case Import():
                return conversations.import_log(command, sender, tables, given)
            case Forget():
                return conversations.forget_log(command, sender, tables, given)
            case Tick():
                freed = locks.tick(tables, given).events
                return Decision((*freed, *editing.settled(tables, given)))
            case _:
                decision = editing.decide(command, sender, tables, given)
                if decision is None:
                    decision = locks.decide(command, sender, tables, given)
                return decision

    def apply(self, event: Any, tables: LibraryTables) -> None:
        match event:
            case OrderGiven():
                tables.orders.put(event.kind, Order(event.number, event.by, event.now))
            case ImportChanged():
                conversations.import_changed(event, tables)
            case CompositionEdited() | EditSettled():
                editing.apply(event, tables)
            case _:
                locks.apply(event, tables)

    def answer(self, query: Any, tables: LibraryTables) -> Reply:
        ordered = conversations.number_of(tables.orders, "compositions")
        reply = compositions.answer(query, tables.compositions, ordered)
        if reply is None:
            reply = conversations.answer(query, tables)
        if reply is None:
            reply = editing.answer(query, tables)
        if reply is None:
            reply = locks.answer(query, tables)
        return reply

    def announce(self, event: Any) -> Iterable[Announcement]:
        if isinstance(event, EditSettled):
            return editing.announce(event)
        return locks.announce(event)


OWNER = Library()
