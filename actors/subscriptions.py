"""What owners push to clients, bounded by credit: a slow reader costs neither memory nor silence.

A subscriber grants credit: how many messages it may have been sent in total. What comes beyond it
is counted, not kept; the next run of messages carries the count as its `gap`, and if none comes,
the next grant of credit is answered with a run that has no messages and only the gap.

What one turn announces is gathered by pattern and encoded once for all who subscribe to it: a
subscriber costs a head of a few bytes, and one beyond its credit costs three additions.

Patterns are words between dots; `*` stands for one word, `>` for one or more at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from ksi.actors.owner import Announcement
from ksi.transport import wire
from ksi.transport.errors import Invalid, KsiError, Quota
from ksi.transport.limits import CREDIT_MAX, PATTERN_CHARS_MAX, RUN_BYTES_MAX, SUBSCRIPTIONS_MAX

Run = tuple[int, int, int, bytes]  # number, seq, gap, said: as `wire.Run`, that encoded already
Deliveries = dict[bytes, list[Run]]

_TOPICS_MAX: Final = (
    4096  # Topics whose patterns are remembered; found anew, a topic costs 1 us each.
)
_encode = msgspec.msgpack.Encoder().encode
_decode_said = msgspec.msgpack.Decoder(list[wire.Said]).decode
_NOTHING_SAID: Final = _encode([])


class _Chunk:
    """Messages in their order, encoded once for each number of them that is asked for."""

    __slots__ = ("_encoded", "count", "room", "said")

    def __init__(self) -> None:
        self.said: list[wire.Said] = []
        self.count = 0
        self.room = RUN_BYTES_MAX
        self._encoded: dict[int, bytes] = {}

    def add(self, topic: str, sender: str, body: bytes) -> None:
        last = self.said[-1] if self.said else None
        if last is None or last.topic != topic or last.sender != sender:
            last = wire.Said(topic, sender, [])
            self.said.append(last)
        last.bodies.append(body)
        self.count += 1
        self.room -= len(body)

    def first(self, count: int) -> bytes:
        """Return the first `count` messages as they travel."""
        encoded = self._encoded.get(count)
        if encoded is None:
            encoded = self._encoded[count] = _encode(list(self._cut(count)))
        return encoded

    def _cut(self, count: int) -> Iterator[wire.Said]:
        for said in self.said:
            if count <= 0:
                return
            yield wire.Said(said.topic, said.sender, said.bodies[:count])
            count -= len(said.bodies)


class _Subscription:
    __slots__ = ("credit", "gap", "group", "number", "route", "sent", "seq")

    def __init__(self, route: bytes, asked: wire.Subscribe, group: _Group) -> None:
        self.route = route
        self.number = asked.number
        self.group = group
        self.credit = min(asked.credit, CREDIT_MAX)
        self.sent = 0
        self.seq = 0
        self.gap = 0

    def deliver(self, chunk: _Chunk) -> Run | None:
        first_seq = self.seq + 1
        self.seq += chunk.count
        room = min(self.credit - self.sent, chunk.count)
        if room <= 0:
            self.gap += chunk.count
            return None
        gap, self.gap = self.gap, chunk.count - room
        self.sent += room
        return self.number, first_seq, gap, chunk.first(room)


class _Group:
    """All who subscribe to one pattern, and what this turn has for them."""

    __slots__ = ("chunks", "members", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = tuple(pattern.split("."))
        self.members: dict[_Subscription, None] = {}
        self.chunks: list[_Chunk] = []

    def add(self, topic: str, sender: str, body: bytes) -> None:
        if not self.chunks or self.chunks[-1].room < len(body):
            self.chunks.append(_Chunk())
        self.chunks[-1].add(topic, sender, body)


class Subscriptions:
    """The subscriptions of all connections of one owner."""

    def __init__(self) -> None:
        self._by_route: dict[bytes, dict[int, _Subscription]] = {}
        self._keys: dict[bytes, str] = {}
        self._groups: dict[str, _Group] = {}
        self._topics: dict[str, list[_Group]] = {}  # those of the patterns a topic falls under

    def __bool__(self) -> bool:
        return bool(self._by_route)

    def routes(self) -> list[bytes]:
        """Return the connections that have subscriptions."""
        return list(self._by_route)

    def key_of(self, route: bytes) -> str:
        """Return the public key of a connection that has subscriptions."""
        return self._keys[route]

    def add(self, route: bytes, asked: wire.Subscribe, key: str = "") -> KsiError | None:
        """Take up a subscription of the connection of `key`; return why not, if not."""
        if not all(asked.pattern.split(".")) or len(asked.pattern) > PATTERN_CHARS_MAX:
            return Invalid(f"{asked.pattern[:100]!r} is no pattern: words between single dots")
        held = self._by_route.setdefault(route, {})
        self._keys[route] = key
        if len(held) >= SUBSCRIPTIONS_MAX and asked.number not in held:
            return Quota(f"{SUBSCRIPTIONS_MAX} subscriptions a connection", limit=SUBSCRIPTIONS_MAX)
        if asked.number in held:
            self._leave(held.pop(asked.number))
        group = self._groups.get(asked.pattern)
        if group is None:
            group = self._groups[asked.pattern] = _Group(asked.pattern)
            self._topics.clear()
        held[asked.number] = subscription = _Subscription(route, asked, group)
        group.members[subscription] = None
        return None

    def remove(self, route: bytes, number: int) -> None:
        """End a subscription; unknown ones are ignored."""
        held = self._by_route.get(route)
        if held is not None:
            if number in held:
                self._leave(held.pop(number))
            if not held:
                self.drop(route)

    def drop(self, route: bytes) -> None:
        """The connection is gone."""
        for subscription in self._by_route.pop(route, {}).values():
            self._leave(subscription)
        self._keys.pop(route, None)

    def grant(self, route: bytes, number: int, credit: int) -> Deliveries:
        """Raise a subscription's credit; return the notice of a gap nothing else would tell."""
        subscription = self._by_route.get(route, {}).get(number)
        if subscription is None or credit <= subscription.credit:
            return {}
        subscription.credit = min(credit, subscription.sent + CREDIT_MAX)
        if not subscription.gap:
            return {}
        gap, subscription.gap = subscription.gap, 0
        return {route: [(number, subscription.seq, gap, _NOTHING_SAID)]}

    def missed(self, route: bytes, runs: Iterable[Run]) -> None:
        """These could not be sent: they count as missed, and no longer against the credit."""
        held = self._by_route.get(route, {})
        for number, _seq, gap, said in runs:
            subscription = held.get(number)
            if subscription is not None:
                count = sum(len(each.bodies) for each in _decode_said(said))
                subscription.sent -= count
                subscription.gap += gap + count

    def deliver(self, announcements: Iterable[Announcement]) -> Deliveries:
        """Return what each connection is to be sent; each message is encoded once."""
        heard: dict[_Group, None] = {}
        topics = self._topics
        for announcement in announcements:
            topic = announcement.topic
            groups = topics.get(topic)
            if groups is None:
                groups = self._groups_of(topic)
            if groups:
                body = _encode(announcement.message)
                for group in groups:
                    group.add(topic, announcement.sender, body)
                    heard[group] = None
        deliveries: Deliveries = {}
        for group in heard:
            chunks, group.chunks = group.chunks, []
            for subscription in group.members:
                for chunk in chunks:
                    run = subscription.deliver(chunk)
                    if run is not None:
                        deliveries.setdefault(subscription.route, []).append(run)
        return deliveries

    def _groups_of(self, topic: str) -> list[_Group]:
        words = tuple(topic.split("."))
        if len(self._topics) >= _TOPICS_MAX:
            self._topics.clear()
        found = [group for group in self._groups.values() if matches(group.pattern, words)]
        self._topics[topic] = found
        return found

    def _leave(self, subscription: _Subscription) -> None:
        group = subscription.group
        del group.members[subscription]
        if not group.members:
            del self._groups[".".join(group.pattern)]
            self._topics.clear()


def matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    """Whether a topic of these words falls under the pattern."""
    for position, word in enumerate(pattern):
        if word == ">":
            return len(words) > position
        if position >= len(words) or word not in ("*", words[position]):
            return False
    return len(pattern) == len(words)
