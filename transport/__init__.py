"""Messages and how they travel. Agents start here: `from ksi.transport import Client`.

`message` declares operations, `wire` frames them, `mailbox` is an owner's end of the wire and
`client` everybody else's. `window` is the part of delivery that knows no sockets.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksi.transport.aclient import AsyncClient
    from ksi.transport.client import Client
    from ksi.transport.link import Delivery

__all__ = ["AsyncClient", "Client", "Delivery"]


def __getattr__(name: str) -> Any:
    # Late, so that an owner's declarations can be read without loading ZeroMQ.
    if name == "Client":
        from ksi.transport.client import Client

        return Client
    if name == "AsyncClient":
        from ksi.transport.aclient import AsyncClient

        return AsyncClient
    if name == "Delivery":
        from ksi.transport.link import Delivery

        return Delivery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
