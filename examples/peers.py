"""Two peers find each other by capability and talk: `ksi start`, then run this.

The one who asks does not know a name: it asks who can search, sends a message and waits for the
answer. What is sent waits in the inbox of the other until that one has dealt with it.
"""

import asyncio

from ksi.transport import AsyncClient

FACTS = {"capital of France": "Paris", "capital of Peru": "Lima"}


async def answer(name: str, questions: int) -> None:
    """Offer to search, and answer what comes."""
    async with AsyncClient(name) as client, await client.inbox() as inbox:
        await client.ask("agent:register", capabilities=["search"])
        ready.set()
        for _ in range(questions):
            delivery = await inbox.next()
            found = FACTS.get(delivery.message["find"], "nothing")
            print(f"{name}: {delivery.sender} looks for the {delivery.message['find']}")
            await client.ask(
                "agent:send_message",
                to_agent=delivery.sender,
                message={"found": found},
                in_reply_to=delivery.message_id,
            )
            await delivery.ack()  # only now: if this process dies before, it comes again


async def ask(name: str) -> None:
    """Find somebody who can search, and ask."""
    await ready.wait()
    async with AsyncClient(name) as client:
        peers = await client.ask("agent:discover_peers", capabilities=["search"])
        peer = peers["agents"][0]["agent_id"]
        print(f"{name}: {peer} can search")
        for thing in FACTS:
            reply = await client.request(peer, {"find": thing})
            print(f"{name}: {reply.sender} found {reply.message['found']}")


async def main() -> None:
    """Let both talk."""
    await asyncio.gather(answer("librarian", len(FACTS)), ask("curious"))


ready = asyncio.Event()

if __name__ == "__main__":
    asyncio.run(main())
