"""An agent follows what is announced of all sessions: `ksi start`, then run this.

Announcements come after the commit and may be missed by a reader that is too slow or away: `gap`
says how many. What an announcement is about is read in place, so nothing is lost by that.
"""

import asyncio

from ksi.transport import AsyncClient


async def follow(name: str, upto: str) -> None:
    """Print what is announced until `upto` has been."""
    async with AsyncClient(name) as client, await client.subscribe("session.>") as news:
        ready.set()
        async for delivery in news:
            what = delivery.topic.rsplit(".", 1)[-1]
            print(f"{name}: {what} by {delivery.sender}: {delivery.message}")
            if delivery.gap:
                print(f"{name}: missed {delivery.gap} before this one")
            if what == upto:
                break


async def work(name: str) -> None:
    """Create a session, write to it, close it."""
    await ready.wait()
    async with AsyncClient(name) as client:
        session_id = (await client.ask("session:create", title="followed"))["session_id"]
        notes = [
            client.ask("session:append", session_id=session_id, event="note", data={"n": n})
            for n in range(3)
        ]
        await asyncio.gather(*notes)  # one frame, one commit
        await client.ask("session:close", session_id=session_id)


async def main() -> None:
    """Let one agent work and another follow."""
    await asyncio.gather(follow("bob", upto="closed"), work("alice"))


ready = asyncio.Event()

if __name__ == "__main__":
    asyncio.run(main())
