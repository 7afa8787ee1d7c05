"""Typed messages and their declarations.

An operation is declared once, as a message class under `@operation(...)`. From that declaration
come validation, `ksi help`, `ksi discover`, JSON Schema, `docs/operations.md` and typed replies.
A command changes state, a query is a pure function of one read transaction, a signal is passed on.

On the wire a body is a MessagePack map of the fields. Values that a field leaves open (`Any`) are
checked to be plain: what JSON, MessagePack and every reader can hold alike.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    TypeVar,
    get_args,
    get_type_hints,
)

import msgspec

from ksi.transport.errors import Forbidden, Invalid, KsiError, TooLarge, UnknownOperation
from ksi.transport.limits import (
    BODY_BYTES_MAX,
    ID_PATTERN,
    ITEMS_MAX,
    NESTING_MAX,
    TEXT_CHARS_MAX,
)

R = TypeVar("R")
M = TypeVar("M", bound="type[Message]")

Id = Annotated[str, msgspec.Meta(pattern=ID_PATTERN, description="an id")]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]
Moment = Annotated[  # `moments.py` reads it
    float | str,
    msgspec.Meta(description="seconds since the epoch, an ISO date or time, or so long ago: 10m"),
]
Plain = dict[str, Any]  # free-form fields: str keys, JSON values, checked by `require_plain`

Role = Literal["operator", "agent", "worker", "owner"]
ANYONE: Final[frozenset[Role]] = frozenset(get_args(Role))
PEOPLE: Final[frozenset[Role]] = frozenset({"operator", "agent", "worker"})
OPERATOR: Final[frozenset[Role]] = frozenset({"operator"})
OWNER: Final[frozenset[Role]] = frozenset({"owner"})
_MAY_ASK_OF_ANY: Final = OPERATOR | OWNER


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is asked: fields are keyword-only, unknown ones are refused.

    Attributes:
        older: names that are taken beside those of fields: `start_time` for `since`. One with a dot
            is in a map: `time_range.start`.
        instead: names that are not taken, though some may look for them, and what to do instead.
    """

    older: ClassVar[Mapping[str, str]] = MappingProxyType({})
    instead: ClassVar[Mapping[str, str]] = MappingProxyType({})


class Command(Message, Generic[R], frozen=True, kw_only=True):
    """Asks an owner to change state; `R` is the type of its reply."""


class Signal(Command[R], frozen=True, kw_only=True):
    """Asks an owner to pass something on: numbered and sent like a command, kept nowhere.

    Its reply means: accepted. The owner reads it with the fields whose values are left open still
    encoded, and may choose to treat it as a command.
    """


class Query(Message, Generic[R], frozen=True, kw_only=True):
    """Asks what is; answered from one committed state, by the owner or in place."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Base of replies. Unknown fields are ignored, so that old clients read new owners."""


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of events: what has happened, in the order of its fields. Stored for good.

    A subclass sets `tag=`; a new field goes last and has a default.
    """


@dataclass(frozen=True, slots=True)
class Operation:
    """One declared operation."""

    name: str
    owner: str
    kind: Literal["command", "signal", "query"]
    message: type[Message]
    reply: Any
    roles: frozenset[Role]
    far_roles: frozenset[Role]  # those over a network
    own: str | None  # the field that has to name its sender, where that is no operator or owner
    refuses: tuple[type[KsiError], ...]
    example: Mapping[str, Any]
    open_fields: tuple[str, ...]  # those whose values are left open, or may be a NaN
    decoder: msgspec.msgpack.Decoder[Any] = field(repr=False)
    signal: type[msgspec.Struct] | None  # a signal as it is read, its open fields still encoded
    header: msgspec.msgpack.Decoder[Any] | None = field(repr=False)
    same_as: str | None = None  # the operation that it is another name of

    @property
    def changes(self) -> bool:
        """Whether it is numbered and carried out in order: a command or a signal."""
        return self.kind != "query"

    @property
    def doc(self) -> str:
        """The docstring of the message, as `ksi help` prints it."""
        return (self.message.__doc__ or "").strip()

    def require_role(self, name: str, role: Role, *, far: bool = False) -> None:
        """Raise `Forbidden` unless `name` may ask this in its role; `far`: over a network."""
        if role not in (self.far_roles if far else self.roles):
            who = " and ".join(sorted(self.far_roles if far else self.roles))
            where = " over a network" if far and role in self.roles else ""
            raise Forbidden(f"{self.name} is for {who}{where}, and {name} is {role}")

    def require_own(self, message: Message, name: str, role: Role) -> None:
        """Raise `Forbidden` if `message` is about what is for another than `name` alone."""
        if self.own is None or role in _MAY_ASK_OF_ANY:
            return
        whose = getattr(message, self.own)
        if whose != name:
            raise Forbidden(
                f"what {self.name} returns of {whose} is for {whose} and operators, not for {name}",
                hint=f"{self.own} {name}",
            )

    def decode(self, body: bytes | memoryview) -> Message:
        """Return the validated message of a body; raise `Invalid` with the path of the field."""
        message: Message = self._decode(self.decoder, body)
        for name in self.open_fields:
            value = getattr(message, name)
            if (
                type(value) is not dict
                or len(value) > ITEMS_MAX
                or not _SCALARS.issuperset(map(type, value.values()))
            ):
                require_plain(value, f"$.{name}", self.name)
        return message

    def decode_header(self, body: bytes | memoryview) -> Any:
        """Return a signal with its open fields as `msgspec.Raw`; raise `Invalid` likewise."""
        return self._decode(self.header, body)

    def _decode(self, decoder: Any, body: bytes | memoryview) -> Any:
        try:
            return decoder.decode(body)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            fields = self._fields(body)
            if self._renamed(fields):
                return self._decode(decoder, encode(fields))
            hints = (hint for name, hint in self.message.instead.items() if name in fields)
            text = f"{self.name}: {_plain_words(error)}"
            raise Invalid(text, hint=next(hints, self.hint)) from None
        except (RecursionError, UnicodeDecodeError, ValueError) as error:
            raise Invalid(f"{self.name}: unreadable body: {error}", hint=self.hint) from None

    def _fields(self, body: bytes | memoryview) -> dict[Any, Any]:
        """Return the fields of a body that was refused, where some may go by other names."""
        fields: Any = {}
        if self.message.older or self.message.instead:
            with suppress(msgspec.MsgspecError, ValueError, TypeError, RecursionError):
                fields = msgspec.msgpack.decode(body)
        return fields if type(fields) is dict else {}

    def _renamed(self, fields: dict[Any, Any]) -> bool:
        """Give fields with older names those of today; return whether there were any."""
        found = False
        for name, today in self.message.older.items():
            outer, _, key = name.rpartition(".")
            within = fields.get(outer) if outer else fields
            if type(within) is not dict or key not in within:
                continue
            if today in fields:
                text = f"{self.name}: {name} is another name of {today}, and both are given"
                raise Invalid(text, hint=self.hint)
            fields[today] = within.pop(key)
            if outer and not within:
                del fields[outer]
            found = True
        return found

    @property
    def hint(self) -> str:
        return f"ksi help {self.name}"


CATALOGUE: dict[str, Operation] = {}
_BY_MESSAGE: dict[type[Message], Operation] = {}


def operation(
    name: str,
    *,
    owner: str,
    roles: frozenset[Role] = PEOPLE,
    far_roles: frozenset[Role] | None = None,
    own: str | None = None,
    refuses: tuple[type[KsiError], ...] = (),
    example: Mapping[str, Any] | None = None,
    also: tuple[str, ...] = (),
) -> Callable[[M], M]:
    """Declare the decorated message class as the operation `name` of `owner`.

    Args:
        roles: who may ask it; far_roles: who of them over a network, if not all.
        own: of a query, the field that has to be the sender's name: what it returns is for that
            agent, and for operators and owners.
        also: other names of it.
    """

    def declare(message: M) -> M:
        twice = CATALOGUE.keys() & {name, *also}
        assert not twice, f"{twice} are declared twice"
        assert own is None or (issubclass(message, Query) and own in message.__struct_fields__)
        signal = _header_of(message) if issubclass(message, Signal) else None
        declared = Operation(
            name=name,
            owner=owner,
            kind=_kind_of(message),
            message=message,
            reply=_reply_type(message),
            roles=roles,
            far_roles=roles if far_roles is None else far_roles,
            own=own,
            refuses=refuses,
            example=example or {},
            open_fields=_open_fields(message),
            decoder=msgspec.msgpack.Decoder(message, ext_hook=_refuse_extension),
            signal=signal,
            header=None if signal is None else msgspec.msgpack.Decoder(signal),
        )
        CATALOGUE[name] = _BY_MESSAGE[message] = declared
        CATALOGUE.update({each: replace(declared, name=each, same_as=name) for each in also})
        return message

    return declare


def operation_of(message: Message) -> Operation:
    """Return the declaration of a message object."""
    return _BY_MESSAGE[type(message)]


def unknown(name: str, known: Any) -> UnknownOperation:
    """Return the refusal of an operation name that is not in `known`, naming the nearest."""
    near = difflib.get_close_matches(name[:128], list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "ksi discover lists all operations"
    return UnknownOperation(f"there is no operation {name!r}"[:200], hint=hint)


def not_taken(name: str, owner: str, kind: Literal["command", "query"]) -> KsiError:
    """Return the refusal of a request for `name` that `owner` does not take as a `kind`."""
    declared = CATALOGUE.get(name)
    if declared is None:
        return unknown(name, [each.name for each in CATALOGUE.values() if each.owner == owner])
    if declared.owner != owner:
        text = f"{owner} has no operation {name}"
        return UnknownOperation(text, hint=f"send it to {declared.owner}")
    frame = "COMMANDS, with a number of its own" if declared.changes else "QUERIES"
    return Invalid(f"{name} is a {declared.kind}, not a {kind}", hint=f"send it in {frame}")


def encode(fields: Any) -> bytes:
    """Return the MessagePack body of a message or a dict of fields.

    Raises:
        Invalid: a value has no MessagePack form (a lone surrogate, an integer over 64 bits, ...).
        TooLarge: the body is over `BODY_BYTES_MAX`.
    """
    try:
        body = msgspec.msgpack.encode(fields)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Invalid(f"the message cannot be encoded: {error}") from None
    if len(body) > BODY_BYTES_MAX:
        raise TooLarge(
            f"a message of {len(body)} bytes is over the limit of {BODY_BYTES_MAX}",
            size_bytes=len(body),
            limit_bytes=BODY_BYTES_MAX,
        )
    return body


_SCALARS: Final = frozenset({str, int, bool, type(None)})


def require_plain(value: Any, path: str, what: str, depth: int = 1) -> None:
    """Raise `Invalid` unless `value` can be held by JSON and MessagePack alike.

    Plain are str, bool, None, integers of 64 bits, finite floats, and lists and str-keyed dicts
    of them, `NESTING_MAX` deep and `ITEMS_MAX` long at the most.
    """
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is float:
        if not math.isfinite(value):
            raise Invalid(f"{what}: {value} is not a number JSON can hold - at `{path[:200]}`")
        return
    if kind is not dict and kind is not list:
        raise Invalid(f"{what}: a {kind.__name__} is not a plain value - at `{path[:200]}`")
    if depth > NESTING_MAX:
        raise Invalid(f"{what}: nested deeper than {NESTING_MAX} - at `{path[:200]}`")
    if len(value) > ITEMS_MAX:
        raise TooLarge(
            f"{what}: {len(value)} entries are over the limit of {ITEMS_MAX} - at `{path[:200]}`",
            size=len(value),
            limit=ITEMS_MAX,
        )
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                shown = repr(key)[:200]
                raise Invalid(f"{what}: the key {shown} is no string - at `{path[:200]}`")
            if type(item) not in _SCALARS:
                require_plain(item, f"{path}.{key}", what, depth + 1)
    else:
        for position, item in enumerate(value):
            if type(item) not in _SCALARS:
                require_plain(item, f"{path}[{position}]", what, depth + 1)


def _refuse_extension(code: int, _payload: memoryview) -> Any:
    raise ValueError(f"extension type {code} is not part of this protocol")


def _kind_of(message: type[Message]) -> Literal["command", "signal", "query"]:
    if issubclass(message, Signal):
        return "signal"
    return "command" if issubclass(message, Command) else "query"


def _header_of(message: type[Message]) -> type[msgspec.Struct]:
    """Return a class of the same fields that leaves the open ones encoded."""
    left = _open_fields(message)
    fields = [
        (
            each.name,
            msgspec.Raw if each.name in left else each.type,
            msgspec.field(default=each.default),
        )
        for each in msgspec.structs.fields(message)
    ]
    return msgspec.defstruct(
        f"{message.__name__}Header", fields, frozen=True, kw_only=True, forbid_unknown_fields=True
    )


def _reply_type(message: type[Message]) -> Any:
    for base in getattr(message, "__orig_bases__", ()):
        arguments = get_args(base)
        if arguments:
            return arguments[0]
    raise AssertionError(f"{message.__name__} does not say what it replies")


def _open_fields(message: type[Message]) -> tuple[str, ...]:
    """Return the fields whose type leaves values open (`Any`) or that may hold a NaN."""
    hints = get_type_hints(message)
    return tuple(
        name
        for name in message.__struct_fields__
        if "typing.Any" in (shown := repr(hints[name])) or "float" in shown
    )


def _plain_words(error: Exception) -> str:
    text = str(error)
    if "matching regex" in text:
        text = text.replace(f"`str` matching regex {ID_PATTERN!r}", "an id ([A-Za-z0-9._-], 1-128)")
    return text[:1000]
