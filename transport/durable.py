"""What waits for a subscriber that has a name: deliveries that are acknowledged.

The bus keeps the messages; its announcements only say that there is something to fetch. So what a
connection loses is fetched all the same, and nothing depends on credit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from ksi.transport.link import Delivery

LOOK_S: Final = 1.0  # How often is looked without having been told: the bus may have restarted.
INBOX: Final = "inbox"


class DurableDelivery(Delivery, frozen=True, kw_only=True):
    """A message that waits until it is acknowledged; `redelivered`: it was handed out before.

    An answer to it is sent with `in_reply_to=delivery.message_id`.
    """

    message_id: int
    in_reply_to: int | None
    settle: Callable[[], Any]

    def ack(self) -> Any:
        """Settle it: it does not come again. With `AsyncClient` to be awaited."""
        return self.settle()


def bell_of(agent_id: str, durable: str) -> str:
    """Return the topic under which the bus says that something waits."""
    return f"message.{agent_id}.{durable}"


class Place:
    """How far one reader has come in what waits under a name.

    Numbers are those of one store: after a restore, reading begins anew.

    Attributes:
        page: what was handed out and is not taken yet.
        look: whether something may wait that was not fetched.
    """

    def __init__(self, agent_id: str, durable: str) -> None:
        self.page: deque[DurableDelivery] = deque()
        self.look = True
        self._question = {"agent_id": agent_id, "durable": durable}
        self._after = 0
        self._store = ""

    def question(self) -> dict[str, Any]:
        """Return the fields of the `message:waiting` to ask next."""
        return {**self._question, "after": self._after}

    def upto(self, page: dict[str, Any], store: str) -> int | None:
        """Return the number up to which a page, the answer of `store`, is to be handed out."""
        former, self._store = self._store, store
        if former not in ("", store) and self._after:
            self.begin_anew()
            return None
        if page["messages"]:
            return int(page["messages"][-1]["message_id"])
        self.look = page["next"] is not None
        return None

    def hand_out(
        self, page: dict[str, Any], redelivered: int, settle: Callable[[int, str], Any]
    ) -> None:
        """Take in a page; `settle` is called with the number of a message and its store."""
        for message in page["messages"]:
            self._after = number = message["message_id"]
            done = partial(settle, number, self._store)
            self.page.append(delivery_of(message, redelivered, done))
        self.look = page["next"] is not None

    def begin_anew(self) -> None:
        """What waits is another store's: look at all of it."""
        self._after = 0
        self.look = True


def delivery_of(
    message: dict[str, Any], redelivered: int, settle: Callable[[], Any]
) -> DurableDelivery:
    """Return a message of a page of `message:waiting`; up to `redelivered` it is a repeat."""
    number = message["message_id"]
    return DurableDelivery(
        topic=message["topic"],
        sender=message["sender"],
        seq=number,
        gap=0,
        body=msgspec.msgpack.encode(message["message"]),
        redelivered=number <= redelivered,
        message_id=number,
        in_reply_to=message["in_reply_to"],
        settle=settle,
    )
