"""What waits for a subscriber that has a name: deliveries that are acknowledged.

The bus keeps the messages; its announcements only say that there is something to fetch. So what a
connection loses is fetched all the same, and nothing depends on credit.
"""

from __future__ import annotations

from collections.abc import Callable
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
