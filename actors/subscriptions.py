"""What owners push to clients, bounded by credit: a slow reader costs neither memory nor silence.

A subscriber grants credit: how many deliveries it may have been sent in total. What comes beyond
it is counted, not kept; the next delivery carries the count as its `gap`, and if none comes, the
next grant of credit is answered with a delivery that has no topic and only the gap.

Patterns are words between dots; `*` stands for one word, `>` for one or more at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import msgspec

from ksi.actors.owner import Announcement
from ksi.transport import wire
from ksi.transport.errors import Invalid, KsiError, Quota
from ksi.transport.limits import CREDIT_MAX, SUBSCRIPTIONS_MAX

Deliveries = dict[bytes, list[wire.Delivery]]


class _Subscription:
    __slots__ = ("credit", "gap", "number", "pattern", "sent", "seq")

    def __init__(self, asked: wire.Subscribe) -> None:
        self.number = asked.number
        self.pattern = tuple(asked.pattern.split("."))
        self.credit = min(asked.credit, CREDIT_MAX)
        self.sent = 0
        self.seq = 0
        self.gap = 0

    def deliver(self, topic: str, sender: str, body: bytes) -> wire.Delivery | None:
        self.seq += 1
        if self.sent >= self.credit:
            self.gap += 1
            return None
        self.sent += 1
        gap, self.gap = self.gap, 0
        return wire.Delivery(self.number, topic, sender, self.seq, gap, body)


class Subscriptions:
    """The subscriptions of all connections of one owner."""

    def __init__(self) -> None:
        self._by_route: dict[bytes, dict[int, _Subscription]] = {}
        self._keys: dict[bytes, str] = {}

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
        if not all(asked.pattern.split(".")) or len(asked.pattern) > 512:
            return Invalid(f"{asked.pattern[:100]!r} is no pattern: words between single dots")
        held = self._by_route.setdefault(route, {})
        self._keys[route] = key
        if len(held) >= SUBSCRIPTIONS_MAX and asked.number not in held:
            return Quota(f"{SUBSCRIPTIONS_MAX} subscriptions a connection", limit=SUBSCRIPTIONS_MAX)
        held[asked.number] = _Subscription(asked)
        return None

    def remove(self, route: bytes, number: int) -> None:
        """End a subscription; unknown ones are ignored."""
        held = self._by_route.get(route)
        if held is not None:
            held.pop(number, None)
            if not held:
                self.drop(route)

    def drop(self, route: bytes) -> None:
        """The connection is gone."""
        self._by_route.pop(route, None)
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
        subscription.sent += 1
        return {route: [wire.Delivery(number, "", "", subscription.seq, gap, b"")]}

    def missed(self, route: bytes, deliveries: Iterable[wire.Delivery]) -> None:
        """These could not be sent: they count as missed, and no longer against the credit."""
        held = self._by_route.get(route, {})
        for delivery in deliveries:
            subscription = held.get(delivery.number)
            if subscription is not None:
                subscription.sent -= 1
                subscription.gap += delivery.gap + bool(delivery.topic)

    def deliver(self, announcements: Iterable[Announcement]) -> Deliveries:
        """Return what each connection is to be sent; each message is encoded once."""
        deliveries: Deliveries = {}
        for announcement in announcements:
            words = tuple(announcement.topic.split("."))
            body: bytes | None = None
            for route, held in self._by_route.items():
                for subscription in held.values():
                    if not matches(subscription.pattern, words):
                        continue
                    if body is None:
                        body = msgspec.msgpack.encode(announcement.message)
                    sent = subscription.deliver(announcement.topic, announcement.sender, body)
                    if sent is not None:
                        deliveries.setdefault(route, []).append(sent)
        return deliveries


@lru_cache(maxsize=65_536)
def matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    """Whether a topic of these words falls under the pattern."""
    for position, word in enumerate(pattern):
        if word == ">":
            return len(words) > position
        if position >= len(words) or word not in ("*", words[position]):
            return False
    return len(pattern) == len(words)
