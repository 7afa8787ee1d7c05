"""A worker for one's own model: `ksi start`, then run this.

A provider is a class with a name and `complete`. The worker registers it, takes the grants of
requests that require it, keeps its lease alive and reports: what is left to write is the model.
Here the worker and two agents share one process; they would be three, anywhere on this machine.
"""

import asyncio
from typing import Any

from ksi.adapters.providers import Grant, Talk
from ksi.adapters.worker import Worker
from ksi.transport import AsyncClient


class Backwards:
    """The model: it says everything backwards, and refuses to say nothing."""

    name = "backwards"

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        """Answer one prompt; what is raised here fails the request with these words."""
        if not grant.prompt:
            raise ValueError("there is nothing to say")
        await talk.say({"words": len(grant.prompt.split())})
        response = await asyncio.to_thread(lambda: grant.prompt[::-1])  # a model that blocks
        return {"response": response, "model": "backwards-1"}


async def talk(name: str, session_id: str, *prompts: str) -> None:
    """Queue some requests and print what becomes of them. A session answers one at a time."""
    async with AsyncClient(name) as agent:
        for prompt in prompts:
            fields = {"session_id": session_id, "prompt": prompt, "requires": "backwards"}
            accepted = await agent.ask("completion:async", fields)
            outcome = await agent.outcome(accepted["request_id"])
            print(f"{name}: {outcome['status']}", outcome["result"] or outcome["reason"])


async def main() -> None:
    """Run the worker while two agents talk to the model on one session; read their session."""
    worker = Worker("own-model", [Backwards()], slots=2)
    running = asyncio.create_task(worker.run())
    async with AsyncClient("alice") as alice:
        session_id = (await alice.ask("session:create", title="backwards"))["session_id"]
        await asyncio.gather(
            talk("bob", session_id, "desserts", "drawer"), talk("carol", session_id, "live", "")
        )
        page = await alice.read("session:history", session_id=session_id)
        print(f"{len(page['entries'])} entries in {session_id}")
    worker.stop()
    await running
    print("the worker has left")


if __name__ == "__main__":
    asyncio.run(main())
