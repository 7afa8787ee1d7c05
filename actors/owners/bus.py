"""The bus: what agents say to each other, and what is kept for those who are away.

Owns durable subscriptions and inboxes, and the messages that wait in them. What nobody has asked to
be kept is passed on to whoever listens now, and forgotten.

- A published message whose topic no durable subscription wants is relayed: not decoded, not
  written. Any other is kept once, and waits in each that wants it until its agent acknowledges it.
- An inbox is the durable subscription an agent has without asking: direct messages, broadcasts and
  tasks wait there. They reach nobody else.
- Messages are numbered in one order for all; whoever acknowledges names the number.
- What an agent was handed before, and has not acknowledged, is marked when it comes again.
- A subscription that is full refuses the message, so its sender knows: nothing is lost in silence.

Source: "KSI: Comprehensive State Management Analysis", 10; durable consumers as in NATS JetStream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final

import msgspec

from ksi.actors.declarations.bus import (
    Acknowledge,
    Acknowledged,
    Broadcast,
    BusTables,
    Durable,
    Durables,
    DurableView,
    GetStats,
    Handed,
    HandedOut,
    Kept,
    KeptMessage,
    Last,
    ListDurables,
    ListWaiting,
    Message,
    Publish,
    Published,
    Receive,
    RouteTask,
    SendMessage,
    Sent,
    SentToMany,
    Stats,
    Subscribe,
    Subscribed,
    Unsubscribe,
    Unsubscribed,
    Waiting,
    Wanted,
)
from ksi.actors.declarations.registry import (
    AgentPage,
    Describe,
    DiscoverPeers,
    Status,
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
from ksi.transport.errors import Conflict, Forbidden, Invalid, NotFound, Quota
from ksi.transport.limits import FRAME_BYTES_MAX, PATTERN_CHARS_MAX
from ksi.transport.message import encode

DURABLES_MAX: Final = 1000  # Durable patterns in all: a new topic is compared with each.
DURABLES_OF_AGENT_MAX: Final = 64  # Of one agent, so that one does not take them all.
WAITING_MAX: Final = 10_000  # Messages waiting in one subscription: a day of an absent agent.
WAITING_BYTES_MAX: Final = 64 << 20  # The same, for large messages.
RECEIVERS_MAX: Final = 1000  # Agents one broadcast reaches: rows of one decision.
PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX // 2  # The same, for large messages.
SCAN_ROWS_MAX: Final = 10_000  # Rows one query looks at.
TOPICS_REMEMBERED: Final = 4096  # Topics of which is known who wants them kept.

INBOX: Final = "inbox"
# First words of topics that are announced by an owner, or hold what is for one agent alone.
RESERVED: Final = frozenset(
    {
        "session",
        "agent",
        "message",
        "completion",
        "conversation",
        "composition",
        "worker",
        "index",
        "state",
        "async_state",
        INBOX,
        "direct",
        "broadcast",
        "task",
    }
)


class Bus(Owner[BusTables]):
    """The owner of messages that wait."""

    name = "bus"
    tables = BusTables
    domains = ("message",)
    private = ("body",)
    events = Kept | Acknowledged | HandedOut | Subscribed | Unsubscribed

    def fact(self, command: Any, sender: Sender) -> Query[Any] | None:
        match command:
            case SendMessage():
                return Describe(agent_id=command.to_agent)
            case Broadcast():
                return _peers(command, sender, command.status)
            case RouteTask():
                return _peers(command, sender, [])
            case _:
                return None

    def relay(self, signal: Any, sender: Sender, tables: BusTables) -> Announcement | None:
        if _receivers(_wanted(tables), signal.topic):
            return None
        _require_map(signal.message)
        return Announcement(signal.topic, signal.message, sender.name)

    def decide(self, command: Any, sender: Sender, tables: BusTables, given: Given) -> Decision:
        match command:
            case Publish():
                return _publish(command, sender, tables, given)
            case Acknowledge():
                return _acknowledge(command, sender, tables)
            case Receive():
                return _receive(command, sender, tables)
            case SendMessage():
                return _send_message(command, sender, tables, given)
            case Broadcast():
                return _broadcast(command, sender, tables, given)
            case RouteTask():
                return _route_task(command, sender, tables, given)
            case Subscribe():
                return _subscribe(command, sender, tables, given)
            case Unsubscribe():
                return _unsubscribe(command, sender, tables)
            case Tick():
                return Decision()
            case _:
                raise TypeError(command)

    def apply(self, event: Any, tables: BusTables) -> None:
        match event:
            case Kept():
                _kept(event, tables)
            case Acknowledged():
                _acknowledged(event.agent_id, event.durable, event.numbers, tables)
            case HandedOut():
                key = (event.agent_id, event.durable)
                tables.durables.put(key, _with(tables, *key, handed=event.upto))
            case Subscribed():
                _subscribed(event, tables)
            case Unsubscribed():
                _unsubscribed(event, tables)
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: BusTables) -> Reply:
        match query:
            case ListWaiting():
                return _waiting(query, tables)
            case ListDurables():
                return _list(query, tables)
            case GetStats():
                return Stats(
                    subscriptions=tables.durables.count(),
                    messages=tables.messages.count(),
                    waiting=tables.waiting.count(),
                    message_id=_last(tables),
                )
            case _:
                raise TypeError(query)

    def announce(self, event: Any) -> Iterable[Announcement]:
        if type(event) is not Kept:
            return
        if event.topic.partition(".")[0] not in RESERVED:
            yield Announcement(event.topic, msgspec.Raw(event.body), event.sender)
        bell = {"message_id": event.number, "in_reply_to": event.in_reply_to}
        for agent_id, durable in event.receivers:
            yield Announcement(f"message.{agent_id}.{durable}", bell, event.sender)


OWNER = Bus()


def _publish(command: Publish, sender: Sender, tables: BusTables, given: Given) -> Decision:
    receivers = _receivers(_wanted(tables), command.topic)
    body = encode(command.message)
    for receiver in receivers:
        why = _full(receiver, len(body), tables)
        if why is not None:
            raise Quota(
                f"nothing is kept of {command.topic}: {why}",
                hint=f"{receiver[0]} has to read, or an operator: ksi help message:unsubscribe",
                agent_id=receiver[0],
                durable=receiver[1],
                limit=WAITING_MAX,
            )
    kept = _keep(command.topic, body, receivers, None, sender, tables, given)
    return Decision((kept,), Published(message_id=kept.number, kept_for=len(receivers)))


def _send_message(
    command: SendMessage, sender: Sender, tables: BusTables, given: Given
) -> Decision:
    to_agent = command.to_agent
    if isinstance(given.fact, NotFound) and tables.durables.get((to_agent, INBOX)) is None:
        raise NotFound(
            f"there is no agent {to_agent}, and never was",
            hint=f"it registers first: ksi --as {to_agent} ask agent:register",
            agent_id=to_agent,
        )
    body = encode(command.message)
    why = _full((to_agent, INBOX), len(body), tables)
    if why is not None:
        raise _no_room(to_agent, why)
    receivers = ((to_agent, INBOX),)
    kept = _keep("direct", body, receivers, command.in_reply_to, sender, tables, given)
    return Decision((kept,), Sent(message_id=kept.number, to_agent=to_agent))


def _broadcast(command: Broadcast, sender: Sender, tables: BusTables, given: Given) -> Decision:
    found, more = _found(given)
    if more:
        raise Quota(f"more than {RECEIVERS_MAX} agents match", hint="name more capabilities")
    body = encode(command.message)
    skipped = {
        agent_id: why
        for agent_id in found
        if (why := _full((agent_id, INBOX), len(body), tables)) is not None
    }
    agents = [agent_id for agent_id in found if agent_id not in skipped]
    if not agents:
        return Decision((), SentToMany(message_id=None, agents=[], skipped=skipped))
    receivers = tuple((agent_id, INBOX) for agent_id in agents)
    kept = _keep("broadcast", body, receivers, None, sender, tables, given)
    return Decision((kept,), SentToMany(message_id=kept.number, agents=agents, skipped=skipped))


def _route_task(command: RouteTask, sender: Sender, tables: BusTables, given: Given) -> Decision:
    found, _more = _found(given)
    if not found:
        raise NotFound(
            f"no active agent has {', '.join(command.capabilities)}",
            hint="ksi agents list shows who is here",
            capabilities=command.capabilities,
        )
    body = encode(command.message)
    to_agent = min(found, key=lambda agent_id: (_load(agent_id, tables), agent_id))
    why = _full((to_agent, INBOX), len(body), tables)
    if why is not None:
        raise _no_room(to_agent, why)
    kept = _keep("task", body, ((to_agent, INBOX),), None, sender, tables, given)
    return Decision((kept,), Sent(message_id=kept.number, to_agent=to_agent))


def _subscribe(command: Subscribe, sender: Sender, tables: BusTables, given: Given) -> Decision:
    agent_id, durable, pattern = sender.name, command.durable, command.pattern
    if (durable == INBOX) != (pattern == INBOX):
        raise Invalid("the durable subscription `inbox` has the pattern `inbox`, and no other has")
    known = tables.durables.get((agent_id, durable))
    if known is not None:
        if known.pattern != pattern:
            raise Conflict(
                f"the subscription {durable} of {agent_id} is for {known.pattern}",
                hint="take another name, or end it: ksi help message:unsubscribe",
                pattern=known.pattern,
            )
        return Decision((), _view((agent_id, durable), known))
    if durable != INBOX:
        _require_pattern(pattern)
        _require_room_for_pattern(agent_id, tables)
    subscribed = Subscribed(agent_id, durable, pattern, given.now)
    view = _view((agent_id, durable), Durable(pattern, given.now, 0, 0, _last(tables)))
    return Decision((subscribed,), view)


def _unsubscribe(command: Unsubscribe, sender: Sender, tables: BusTables) -> Decision:
    agent_id = command.agent_id or sender.name
    if agent_id != sender.name and sender.role != "operator":
        raise Forbidden(f"a subscription of {agent_id} is ended by {agent_id} or an operator")
    _known(tables, agent_id, command.durable)
    return Decision((Unsubscribed(agent_id, command.durable),))


def _receive(command: Receive, sender: Sender, tables: BusTables) -> Decision:
    known = _known(tables, sender.name, command.durable)
    reply = Handed(redelivered=known.handed)
    upto = min(command.upto, _last(tables))
    if upto <= known.handed:
        return Decision((), reply)
    return Decision((HandedOut(sender.name, command.durable, upto),), reply)


def _acknowledge(command: Acknowledge, sender: Sender, tables: BusTables) -> Decision:
    _known(tables, sender.name, command.durable)
    numbers = [
        number
        for number in dict.fromkeys(command.message_ids)
        if tables.waiting.get((sender.name, command.durable, number)) is not None
    ]
    if not numbers:
        return Decision()
    return Decision((Acknowledged(sender.name, command.durable, numbers),))


def _keep(
    topic: str,
    body: bytes,
    receivers: Iterable[tuple[str, str]],
    in_reply_to: int | None,
    sender: Sender,
    tables: BusTables,
    given: Given,
) -> Kept:
    number = _last(tables) + 1
    return Kept(number, topic, sender.name, body, list(receivers), in_reply_to, given.now)


def _peers(command: Broadcast | RouteTask, sender: Sender, status: list[Status]) -> DiscoverPeers:
    return DiscoverPeers(
        capabilities=command.capabilities,
        kinds=command.kinds,
        exclude=[*command.exclude, sender.name],
        status=status,
        limit=RECEIVERS_MAX,
    )


def _found(given: Given) -> tuple[list[str], bool]:
    """Return who was found, and whether there are more."""
    if not isinstance(given.fact, AgentPage):
        return [], False
    return [agent.agent_id for agent in given.fact.agents], given.fact.next is not None


def _known(tables: BusTables, agent_id: str, durable: str) -> Durable:
    known = tables.durables.get((agent_id, durable))
    if known is None:
        raise NotFound(
            f"{agent_id} has no durable subscription {durable}",
            hint="ksi read message:subscriptions",
            agent_id=agent_id,
            durable=durable,
        )
    return known


def _last(tables: BusTables) -> int:
    last = tables.last.get("number")
    return 0 if last is None else last.number


def _load(agent_id: str, tables: BusTables) -> int:
    inbox = tables.durables.get((agent_id, INBOX))
    return 0 if inbox is None else inbox.waiting


def _full(receiver: tuple[str, str], size_bytes: int, tables: BusTables) -> str | None:
    """Return why a message does not fit into a subscription; None if it does."""
    known = tables.durables.get(receiver)
    if known is None or (
        known.waiting < WAITING_MAX and known.waiting_bytes + size_bytes <= WAITING_BYTES_MAX
    ):
        return None
    agent_id, durable = receiver
    return f"{known.waiting} messages wait in {durable} of {agent_id}, and it does not read"


def _no_room(to_agent: str, why: str) -> Quota:
    return Quota(why, hint=f"{to_agent} has to read", agent_id=to_agent, limit=WAITING_MAX)


_NOTHING_WANTED: Final = Wanted(())


def _wanted(tables: BusTables) -> Wanted:
    return tables.wanted.get("all") or _NOTHING_WANTED


@lru_cache(maxsize=TOPICS_REMEMBERED)
def _receivers(wanted: Wanted, topic: str) -> tuple[tuple[str, str], ...]:
    """Return the durable subscriptions that want a topic; refuse what is none."""
    words = topic.split(".")
    if len(topic) > PATTERN_CHARS_MAX or not all(map(_is_word, words)):
        raise Invalid(f"{topic[:100]!r} is no topic: words between single dots", hint="news.today")
    if words[0] in RESERVED:
        raise Invalid(
            f"topics that begin with {words[0]} are announced by their owner",
            hint="begin with another word; ksi help agent:send_message reaches one agent",
        )
    return tuple(
        (agent_id, durable)
        for agent_id, durable, pattern in wanted.durables
        if _matches(pattern.split("."), words)
    )


def _is_word(word: str) -> bool:
    return word.isprintable() and bool(word) and not any(mark in word for mark in "*> ")


def _matches(pattern: list[str], words: list[str]) -> bool:
    for position, word in enumerate(pattern):
        if word == ">":
            return len(words) > position
        if position >= len(words) or word not in ("*", words[position]):
            return False
    return len(pattern) == len(words)


def _require_pattern(pattern: str) -> None:
    words = pattern.split(".")
    for word in (*words[:-1], "x" if words[-1] == ">" else words[-1]):
        if word != "*" and not _is_word(word):
            raise Invalid(
                f"{pattern[:100]!r} is no pattern: words between single dots, `*` for one word, "
                "`>` for the rest",
                hint="news.>",
            )
    if words[0] in RESERVED:
        raise Invalid(f"what begins with {words[0]} is not kept", hint="subscribe without a name")


def _require_room_for_pattern(agent_id: str, tables: BusTables) -> None:
    wanted = _wanted(tables).durables
    if len(wanted) >= DURABLES_MAX:
        raise Quota(f"there are {DURABLES_MAX} durable subscriptions", limit=DURABLES_MAX)
    if sum(each[0] == agent_id for each in wanted) >= DURABLES_OF_AGENT_MAX:
        raise Quota(
            f"{agent_id} has {DURABLES_OF_AGENT_MAX} durable subscriptions",
            limit=DURABLES_OF_AGENT_MAX,
        )


def _require_map(message: Any) -> None:
    """Refuse a message that is no map, by its first byte: it is passed on as it is."""
    first = bytes(message)[0]
    if not (0x80 <= first <= 0x8F or first in (0xDE, 0xDF)):
        raise Invalid("message:publish: Expected `object` - at `$.message`")


def _with(tables: BusTables, agent_id: str, durable: str, **changed: Any) -> Durable:
    return msgspec.structs.replace(_known(tables, agent_id, durable), **changed)


def _kept(event: Kept, tables: BusTables) -> None:
    if (event.sender, INBOX) not in event.receivers and event.topic == "direct":
        _open_inbox(event.sender, event.now, tables)  # An answer must have a place to go to.
    size_bytes = len(event.body)
    for key in event.receivers:
        agent_id, durable = key
        if durable == INBOX:
            _open_inbox(agent_id, event.now, tables)
        known = _known(tables, agent_id, durable)
        changed = Durable(
            known.pattern,
            known.created_at,
            known.waiting + 1,
            known.waiting_bytes + size_bytes,
            known.handed,
        )
        tables.durables.put(key, changed)
        tables.waiting.put((agent_id, durable, event.number), b"")
    places = len(event.receivers)
    message = Message(event.topic, event.sender, event.body, event.in_reply_to, event.now, places)
    tables.messages.put((event.number,), message)
    tables.last.put("number", Last(event.number))


def _open_inbox(agent_id: str, now: float, tables: BusTables) -> None:
    if tables.durables.get((agent_id, INBOX)) is None:
        tables.durables.put((agent_id, INBOX), Durable(INBOX, now, 0, 0, 0))


def _acknowledged(agent_id: str, durable: str, numbers: list[int], tables: BusTables) -> None:
    size_bytes = 0
    for number in numbers:
        tables.waiting.delete((agent_id, durable, number))
        message = tables.messages.get((number,))
        assert message is not None
        size_bytes += len(message.body)
        if message.places == 1:
            tables.messages.delete((number,))
        else:
            left = msgspec.structs.replace(message, places=message.places - 1)
            tables.messages.put((number,), left)
    known = _known(tables, agent_id, durable)
    changed = _with(
        tables,
        agent_id,
        durable,
        waiting=known.waiting - len(numbers),
        waiting_bytes=known.waiting_bytes - size_bytes,
    )
    tables.durables.put((agent_id, durable), changed)


def _subscribed(event: Subscribed, tables: BusTables) -> None:
    key = (event.agent_id, event.durable)
    tables.durables.put(key, Durable(event.pattern, event.now, 0, 0, _last(tables)))
    if event.durable != INBOX:
        tables.wanted.put("all", Wanted((*_wanted(tables).durables, (*key, event.pattern))))


def _unsubscribed(event: Unsubscribed, tables: BusTables) -> None:
    key = (event.agent_id, event.durable)
    numbers = [number for (_, _, number), _ in tables.waiting.range(prefix=key)]
    _acknowledged(*key, numbers, tables)
    tables.durables.delete(key)
    left = tuple(each for each in _wanted(tables).durables if each[:2] != key)
    tables.wanted.put("all", Wanted(left))


def _view(key: tuple[str, str], known: Durable) -> DurableView:
    return DurableView(
        agent_id=key[0],
        durable=key[1],
        pattern=known.pattern,
        created_at=known.created_at,
        waiting=known.waiting,
        waiting_bytes=known.waiting_bytes,
        handed=known.handed,
    )


def _waiting(query: ListWaiting, tables: BusTables) -> Waiting:
    _known(tables, query.agent_id, query.durable)
    found: list[KeptMessage] = []
    room, last = PAGE_BYTES_MAX, query.after
    for looked, number in enumerate(_numbers(query, tables)):
        message = tables.messages.get((number,))
        assert message is not None
        if query.in_reply_to in (None, message.in_reply_to):
            room -= len(message.body)
            if len(found) == query.limit or (room < 0 and found):
                return Waiting(messages=found, next=last)
            found.append(_shown(number, message))
        last = number
        if looked == SCAN_ROWS_MAX:
            return Waiting(messages=found, next=last)
    return Waiting(messages=found, next=None)


def _numbers(query: ListWaiting, tables: BusTables) -> Iterator[int]:
    key = (query.agent_id, query.durable)
    rows = tables.waiting.range((*key, query.after + 1), prefix=key)
    return (number for (_, _, number), _ in rows)


def _shown(number: int, message: Message) -> KeptMessage:
    return KeptMessage(
        message_id=number,
        topic=message.topic,
        sender=message.sender,
        message=msgspec.msgpack.decode(message.body),
        sent_at=message.at,
        in_reply_to=message.in_reply_to,
    )


def _list(query: ListDurables, tables: BusTables) -> Durables:
    prefix = () if query.agent_id is None else (query.agent_id,)
    views: list[DurableView] = []
    agent_id, _, durable = (query.after or "").partition("/")
    start = (agent_id, f"{durable}\x01") if query.after else ()  # No id holds a character this low.
    last = None
    for key, known in tables.durables.range(start, prefix=prefix):
        if len(views) == query.limit:
            return Durables(subscriptions=views, next=last)
        last = "/".join(key)
        views.append(_view(key, known))
    return Durables(subscriptions=views, next=None)
