"""A team forms, changes roles and finishes: `ksi start`, then run this.

The lead calls all who can write, gives each a role, swaps the roles for the second draft, and
dissolves the team. The session keeps who had which role when.
"""

import asyncio

from ksi.transport import AsyncClient

MEMBERS = ("ada", "ben")


async def member(name: str) -> None:
    """Do what the team's channel says until the team is done."""
    async with AsyncClient(name) as client, await client.inbox() as inbox:
        await client.ask("agent:register", capabilities=["write"])
        joined.release()
        call = await inbox.next()
        async with await client.subscribe(f"team.{call.message['session_id']}.>") as team:
            await call.ack()
            joined.release()
            async for delivery in team:
                if delivery.topic.endswith("done"):
                    break
                role = delivery.message["roles"][name]
                work = {**call.message, "event": "work", "data": {"role": role}}
                await client.ask("session:contribute", work)
                worked.release()


async def lead(name: str) -> None:
    """Form the team, have two drafts made, and finish."""
    async with AsyncClient(name) as client:
        session_id = (await client.ask("session:create", pattern="team"))["session_id"]
        await asyncio.gather(*(joined.acquire() for _ in MEMBERS))  # all can be called
        call = {"session_id": session_id}
        called = await client.ask("agent:broadcast", message=call, capabilities=["write"])
        print(f"{name}: the team is {', '.join(called['agents'])}")
        await asyncio.gather(*(joined.acquire() for _ in MEMBERS))  # all listen
        for roles in (("author", "critic"), ("critic", "author")):
            news = {"roles": dict(zip(MEMBERS, roles, strict=True))}
            await client.ask("message:publish", topic=f"team.{session_id}.roles", message=news)
            await asyncio.gather(*(worked.acquire() for _ in MEMBERS))
        await client.ask("message:publish", topic=f"team.{session_id}.done", message={})
        who = await client.ask("session:participants", session_id=session_id)
        for each in who["participants"][:2]:
            print(f"{each['agent_id']}: {' then '.join(r['role'] for r in each['roles'])}")


async def main() -> None:
    """Let them work."""
    await asyncio.gather(lead("lea"), *map(member, MEMBERS))


joined, worked = asyncio.Semaphore(0), asyncio.Semaphore(0)

if __name__ == "__main__":
    asyncio.run(main())
