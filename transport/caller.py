"""What both clients share: who speaks, where to, and what is sent.

Nothing here waits. An operation is named, or given as a typed message; from the name comes the
owner that is asked. `ask("session:append", session_id=..., ...)` and `ask(Append(...))` send the
same bytes; the first returns a dict, the second the typed reply.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import msgspec
import zmq

from ksi.transport.errors import (
    Forbidden,
    Invalid,
    KsiError,
    NotRunning,
    Restored,
    Unavailable,
)
from ksi.transport.identity import Certificate, Directory, KeyRing
from ksi.transport.limits import WINDOW_COMMANDS_MAX
from ksi.transport.link import Link
from ksi.transport.mailbox import connect
from ksi.transport.message import (
    CATALOGUE,
    Message,
    Operation,
    Query,
    Role,
    encode,
    operation_of,
    unknown,
)
from ksi.transport.remote import is_remote, require_here
from ksi.transport.window import Cut, Pending

if TYPE_CHECKING:
    from ksi.actors.reading import OwnerReader

# Commands that carry the epoch this client has learnt, and the replies that teach it.
_FENCED: Final = frozenset(
    {"session:append", "session:append_many", "session:transfer", "session:close"}
)
_TEACHING: Final = frozenset(
    {"session:create", "session:fork", "session:claim", "session:transfer"}
)
_EPOCHS_MAX: Final = 100_000  # Sessions whose epoch a client remembers; the oldest go first.
_ALONE_S: Final = 1.0  # No supervisor for this long, and none is waited for: a restart is shorter.
_FAR_ALONE_S: Final = 3.0  # The same where only failed attempts to connect tell of it.
_FAILURES: Final = 2  # That many in a row: one is what remains of a connection that has ended.

_decode = msgspec.msgpack.decode


class Ticket(NamedTuple):
    """Names a command whose outcome is unknown, for `settle`."""

    owner: str
    instance: bytes
    number: int


class Known(NamedTuple):
    """What became of a command nobody waited for."""

    operation: str
    body: bytes | None
    error: KsiError | None


class Prepared(NamedTuple):
    """One request ready to go."""

    operation: str
    owner: str
    is_command: bool
    body: bytes
    reply_type: Any  # None: a dict


def default_var() -> Path:
    """Return the runtime directory: `KSI_VAR`, or `./var`."""
    return Path(os.environ.get("KSI_VAR") or "var")


def is_held(var: Path) -> bool:
    """Whether a supervisor holds this var directory. Waits for nobody."""
    try:
        lock = os.open(var / "run" / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class Caller:
    """An identity in a var directory, and its links to owners."""

    def __init__(
        self, name: str | None = None, *, var: str | Path | None = None, role: Role = "agent"
    ) -> None:
        self.var = Path(var) if var is not None else default_var()
        if not self.var.is_dir():
            raise NotRunning(f"there is no directory {self.var}", hint="ksi start")
        self.remote = is_remote(self.var)
        self.certificate = self._carried(name) if self.remote else self._enrolled(name, role)
        self.name = self.certificate.name
        self.links: dict[str, Link] = {}
        self._cut = Cut()
        self._epochs: dict[str, int] = {}
        self._readers: dict[str, OwnerReader] = {}
        self._unclaimed: dict[Ticket, Known] = {}

    @cached_property
    def directory(self) -> Directory:
        """Where owners are found. Raises `NotRunning` while there is no supervisor."""
        return Directory.read(self.var)

    def prepare(
        self, what: str | Message, fields: Mapping[str, Any] | None, named: dict[str, Any]
    ) -> Prepared:
        """Return the request for an operation or message.

        Raises:
            UnknownOperation, Invalid, TooLarge: nothing was sent.
        """
        if isinstance(what, Message):
            declared = operation_of(what)
            if declared.name in _FENCED and getattr(what, "epoch", 0) is None:
                epoch = self._epochs.get(getattr(what, "session_id", ""))
                what = msgspec.structs.replace(what, epoch=epoch)
            changes = declared.changes
            return Prepared(declared.name, declared.owner, changes, encode(what), declared.reply)
        owner = self.directory.commands.get(what)
        is_command = owner is not None
        if owner is None:
            owner = self.directory.queries.get(what)
            if owner is None:
                raise unknown(what, [*self.directory.commands, *self.directory.queries])
        if fields is not None:
            named = {**fields, **named}
        if what in _FENCED and "epoch" not in named:
            session_id = named.get("session_id")
            epoch = self._epochs.get(session_id) if isinstance(session_id, str) else None
            if epoch is not None:
                named["epoch"] = epoch
        return Prepared(what, owner, is_command, encode(named), None)

    def prepare_command(
        self, what: str | Message, fields: Mapping[str, Any] | None, named: dict[str, Any]
    ) -> Prepared:
        """Return the request for a command. Raises `Invalid` for a query, else as `prepare`."""
        prepared = self.prepare(what, fields, named)
        if not prepared.is_command:
            text = f"{prepared.operation} is a query: without its answer it does nothing"
            raise Invalid(text, hint=f"ask or read it: client.read({prepared.operation!r}, ...)")
        return prepared

    def deadline_s(self, timeout_s: float) -> float:
        """Return when `timeout_s` from now is over. Raises `Invalid` if that is no time."""
        deadline_s = time.monotonic() + timeout_s
        if not math.isfinite(deadline_s):
            raise Invalid(f"timeout_s must be a number of seconds, not {timeout_s}")
        return deadline_s

    def is_alone(self, link: Link, now_s: float) -> bool:
        """Whether the owner is gone and nobody is there to start it, for a while now."""
        if self._is_there(link):
            link.alone_s = None
            return False
        if link.alone_s is None:
            link.alone_s = now_s
        return now_s - link.alone_s >= (_FAR_ALONE_S if self.remote else _ALONE_S)

    def link(self, owner: str) -> Link:
        """Return the link to an owner, made if there is none."""
        link = self.links.get(owner)
        if link is None:
            place = self.directory.owners.get(owner)
            if place is None and self.remote:
                text = f"the {owner} does not listen for other machines"
                raise Forbidden(text, hint="ask it on the machine of the system")
            if place is None:
                raise NotRunning(f"{owner} is no part of this system", hint="ksi status")
            sockets = connect(
                zmq.Context.instance(), place.endpoint, place.key.encode(), self.certificate
            )
            link = self.links[owner] = Link(owner, *sockets, self._cut)
        return link

    def store_of(self, owner: str) -> str:
        """Return the id of the store that an owner has last answered from; "" if none has yet."""
        link = self.links.get(owner)
        return "" if link is None else link.window.store

    def require_store(self, owner: str, store: str) -> None:
        """Raise `Restored` unless the owner has last answered from this store."""
        if self.store_of(owner) != store:
            raise Restored(
                f"the store of the {owner} was restored meanwhile: its numbers have begun anew",
                hint="read the state; what is not settled comes again",
            )

    def owner_of_topic(self, pattern: str) -> str:
        """Return who announces topics under `pattern`: by its first word, else the bus."""
        return self.directory.domains.get(pattern.split(".", 1)[0], "bus")

    def add(self, prepared: Prepared, link: Link, deadline_s: float | None) -> Pending:
        """Put a request into the link's window; ask `link.window.full()` first."""
        window = link.window
        add = window.add_command if prepared.is_command else window.add_query
        return add(prepared.operation, prepared.body, deadline_s)

    def reply(self, prepared: Prepared, body: bytes | None) -> Any:
        """Return the decoded reply; learn the epoch it may carry."""
        if prepared.reply_type is None:
            reply = _decode(body) if body else {}
            if prepared.operation in _TEACHING:
                self._learn(reply["session_id"], reply["epoch"])
            return reply
        if prepared.reply_type is type(None):
            return None
        typed = _decode(body or b"\x80", type=prepared.reply_type)
        if prepared.operation in _TEACHING:
            self._learn(typed.session_id, typed.epoch)
        return typed

    def late(self, link: Link, pending: Pending) -> KsiError:
        """The caller of `pending` waits no longer: return what to tell it; its number goes on."""
        pending.future = None
        pending.deadline_s = 0.0
        if pending.refused is not None:
            # Nothing has happened, and nothing will: it goes again with no time left.
            return pending.refused
        if link.window.queries.get(pending.number) is pending:
            link.window.drop_query(pending.number)
            ticket = None
        else:
            ticket = Ticket(link.owner, link.window.instance, pending.number)
        if ticket is None or not pending.sent:
            error = self.no_answer(link, pending.operation)
        else:
            error = Unavailable(
                f"{link.owner} did not answer {pending.operation} in time; "
                "it may or may not have happened",
                hint="client.settle(error.ticket) finds out",
                owner=link.owner,
            )
        if isinstance(error, Unavailable):
            error.ticket = ticket
        return error

    def no_answer(self, link: Link, what: str) -> KsiError:
        """Return what to tell who asked for something that has not happened."""
        text = f"{link.owner} did not answer {what} in time"
        if not self.remote:
            if self._is_there(link):
                return Unavailable(text, hint="ksi status", owner=link.owner)
            return NotRunning(f"no supervisor runs on {self.var}", hint="ksi start")
        address = self.directory.owners[link.owner].endpoint
        if self._is_there(link):
            text, hint = f"{text} at {address}", "ksi status, on the machine of the system"
            return Unavailable(text, hint=hint, owner=link.owner)
        text = f"the system is not running: nobody who has the key of {link.owner} is at {address}"
        return NotRunning(text, hint="on its machine, ksi start, or enrol --to once more")

    def keep(
        self, link: Link, pending: Pending, body: bytes | None, error: KsiError | None
    ) -> None:
        """Keep an outcome nobody waits for, in case `settle` asks for it."""
        ticket = Ticket(link.owner, link.window.instance, pending.number)
        self._unclaimed[ticket] = Known(pending.operation, body, error)
        while len(self._unclaimed) > WINDOW_COMMANDS_MAX:
            del self._unclaimed[next(iter(self._unclaimed))]

    def outcome_of(self, ticket: Ticket) -> Known | Pending | None:
        """Return what is known of a ticket: its outcome, its pending command, or nothing."""
        known = self._unclaimed.pop(ticket, None)
        if known is not None:
            return known
        link = self.links.get(ticket.owner)
        if link is None or link.window.instance != ticket.instance:
            return None
        return link.window.commands.get(ticket.number)

    def require_query(self, what: str | Message) -> None:
        """Raise `Invalid` if `what` is a command."""
        name = what if isinstance(what, str) else operation_of(what).name
        if name in self.directory.commands:
            raise Invalid(f"{name} is a command", hint=f"ask it: client.ask({name!r}, ...)")

    def read_local(
        self, what: str | Message, fields: Mapping[str, Any] | None, named: dict[str, Any]
    ) -> Any:
        """Run a query here, on the owner's committed state. No message is sent."""
        declared, query = self._query(what, fields, named)
        reply = self._reader(declared.owner).answer(query)
        return reply if query is what else msgspec.to_builtins(reply)

    def read_past(
        self,
        at: int | str,
        what: str | Message,
        fields: Mapping[str, Any] | None,
        named: dict[str, Any],
    ) -> Any:
        """Run a query here, on the owner's state as it was. No message is sent."""
        from ksi.actors.past import as_of

        require_here(self.var, "reading a past state")
        declared, query = self._query(what, fields, named)
        with as_of(self._reader(declared.owner).owner, self.var, at) as answer:
            reply = answer(query)
        return reply if query is what else msgspec.to_builtins(reply)

    def _query(
        self, what: str | Message, fields: Mapping[str, Any] | None, named: dict[str, Any]
    ) -> tuple[Operation, Query[Any]]:
        """Return a query and its declaration; one that is given is the very same."""
        if isinstance(what, Message):
            declared = operation_of(what)
        else:
            declared = CATALOGUE.get(what) or self._declared(what)
        if declared.changes:
            name = declared.name
            raise Invalid(f"{name} is a {declared.kind}", hint=f"ask it: client.ask({name!r}, ...)")
        if isinstance(what, Message):
            self._require_may_read(declared, what)
            return declared, cast("Query[Any]", what)
        if fields is not None:
            named = {**fields, **named}
        try:
            query = cast("Query[Any]", msgspec.convert(named, declared.message))
        except msgspec.ValidationError:  # A field may go by another name; the owner takes it, too.
            query = cast("Query[Any]", declared.decode(encode(named)))
        self._require_may_read(declared, query)
        return declared, query

    def _require_may_read(self, declared: Operation, query: Message) -> None:
        """Refuse what the owner would refuse. A courtesy: who reads here can read the files."""
        declared.require_role(self.name, self.certificate.role)
        declared.require_own(query, self.name, self.certificate.role)

    def _enrolled(self, name: str | None, role: Role) -> Certificate:
        name = name or os.environ.get("KSI_AGENT")
        if not name:
            raise Invalid("a client needs a name", hint="Client('alice'), or set KSI_AGENT")
        try:
            return KeyRing(self.var).enroll(name, role)
        except OSError as error:
            text = f"{name} cannot be enrolled in {self.var}: {error.strerror or error}"
            raise Forbidden(text, hint="use another --var, or have its owner enrol it") from error

    def _carried(self, name: str | None) -> Certificate:
        """Return the key of `name`, or the only one that is there."""
        ring = KeyRing(self.var)
        names = ring.names()
        name = name or os.environ.get("KSI_AGENT") or (names[0] if len(names) == 1 else None)
        if name is None:
            held = f"the keys of {', '.join(names)}: say whose" if names else "no key"
            raise Invalid(f"{self.var} holds {held}", hint="Client('alice'), or set KSI_AGENT")
        certificate = ring.load(name)
        if certificate is None:
            hint = f"on the machine of the system: ksi agents enroll {name} --to DIR"
            raise Forbidden(f"{self.var} holds no key of {name}", hint=hint)
        return certificate

    def _is_there(self, link: Link) -> bool:
        """Whether there is a system at the other end, for all that can be seen from here."""
        return link.up or (link.failures < _FAILURES if self.remote else is_held(self.var))

    def _declared(self, operation: str) -> Operation:
        """Return a declaration that is not loaded yet."""
        from ksi.actors.owners import load_all

        load_all()
        declared = CATALOGUE.get(operation)
        if declared is None:
            raise unknown(operation, CATALOGUE)
        return declared

    def _reader(self, owner: str) -> OwnerReader:
        reader = self._readers.get(owner)
        if reader is None:
            from ksi.actors.reading import reader_of  # the one place where a client reads the disk

            reader = self._readers[owner] = reader_of(owner, self.var)
        return reader

    def drop(self, link: Link) -> None:
        """Close a link that was denied: ZeroMQ would go on asking. The next request opens one."""
        link.close()
        self.links.pop(link.owner, None)

    def unanswered(self) -> int:
        """Return how many commands are on their way that somebody still cares for."""
        return sum(
            pending.future is not None
            for link in self.links.values()
            for pending in link.window.commands.values()
        )

    def settled(self, ticket: Ticket, known: Known) -> dict[str, Any]:
        """Return the reply of a settled command, or raise its refusal."""
        if known.error is not None:
            raise known.error
        reply: dict[str, Any] = self.reply(
            Prepared(known.operation, ticket.owner, True, b"", None), known.body
        )
        return reply

    def close_links(self) -> None:
        for link in self.links.values():
            link.close()
        self.links.clear()

    def _learn(self, session_id: str, epoch: int) -> None:
        self._epochs[session_id] = epoch
        if len(self._epochs) > _EPOCHS_MAX:
            del self._epochs[next(iter(self._epochs))]
