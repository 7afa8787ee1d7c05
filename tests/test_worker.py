"""Workers and providers: what is answered, what fails and with which words, what is stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from system import System

from ksi.adapters.providers import PROVIDERS, Echo, Grant, Provider, Say
from ksi.adapters.worker import Worker
from ksi.console.worker import PROVIDER_NAMES
from ksi.transport import AsyncClient
from ksi.transport.errors import Invalid


class Obliging:
    """Answers with what the prompt names."""

    name = "obliging"
    cancelled = 0

    async def complete(self, grant: Grant, say: Say) -> Any:
        match grant.prompt:
            case "raise":
                raise RuntimeError("no model today")
            case "large":
                return {"response": "x" * 600_000}
            case "odd":
                return {"response": float("nan")}
            case "object":
                return {"response": object()}
            case "none":
                return None
            case "wait":
                await say({"tokens": 1})
                try:
                    await asyncio.sleep(60)  # until it is cancelled
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
        return {"response": "well", "model": "obliging"}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("worker") / "var")
    yield running
    running.end()


@contextlib.asynccontextmanager
async def serving(system: System, *providers: Provider, **more: Any) -> AsyncIterator[AsyncClient]:
    """Run a worker beside a requester that has a session `s`."""
    worker = Worker("own", providers, var=system.var, **{"lease_s": 1.0, **more})
    running = asyncio.create_task(worker.run())
    async with AsyncClient("alice", var=system.var) as alice:
        with contextlib.suppress(Exception):
            await alice.ask("session:create", session_id="s")
        yield alice
    worker.stop()
    await asyncio.wait_for(running, 20)


async def outcome(alice: AsyncClient, prompt: str, **more: Any) -> dict[str, Any]:
    accepted = await alice.ask("completion:async", session_id="s", prompt=prompt, **more)
    return await alice.outcome(accepted["request_id"], timeout_s=10)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("raise", "RuntimeError: no model today"),
        ("large", "the result is"),
        ("odd", "is not a number JSON can hold"),
        ("object", "cannot be encoded"),
        ("none", "Expected `object`"),
    ],
)
def test_what_a_provider_cannot_answer_fails_with_words_and_its_worker_goes_on(
    system: System, prompt: str, words: str
) -> None:
    async def check() -> None:
        async with serving(system, Obliging()) as alice:
            failed = await outcome(alice, prompt)
            assert failed["status"] == "failed"
            assert words in failed["reason"]
            assert (await outcome(alice, "well"))["result"]["response"] == "well"

    asyncio.run(check())


def test_a_request_goes_to_the_provider_it_requires_and_else_to_the_first(system: System) -> None:
    async def check() -> None:
        async with serving(system, Obliging(), Echo()) as alice:
            models = [
                (await outcome(alice, "hi", requires=name))["result"]["model"]
                for name in ("echo", "obliging", None)
            ]
        assert models == ["echo", "obliging", "obliging"]

    asyncio.run(check())


def test_a_provider_is_cancelled_when_its_grant_is_over(system: System) -> None:
    async def check() -> None:
        provider = Obliging()
        async with serving(system, provider) as alice:
            slow = await outcome(alice, "wait", run_s=0.3)
            assert slow["reason"] == "it took longer than 0.3 s"
            accepted = await alice.ask("completion:async", session_id="s", prompt="wait")
            request_id = accepted["request_id"]
            while (await alice.read("completion:status", request_id=request_id))[
                "progress"
            ] is None:
                await asyncio.sleep(0.01)  # The worker runs in this very loop.
            await alice.ask("completion:cancel", request_id=request_id)
            assert (await outcome(alice, "well"))["status"] == "completed"
        assert provider.cancelled == 2

    asyncio.run(check())


def test_one_worker_answers_as_many_sessions_at_a_time_as_it_has_slots(system: System) -> None:
    async def check() -> None:
        async with serving(system, Echo(), slots=3) as alice:
            for n in range(3):
                await alice.ask("session:create", session_id=f"beside-{n}")
            accepted = [
                await alice.ask(
                    "completion:async",
                    session_id=f"beside-{n}",
                    prompt="x",
                    options={"delay_s": 0.3},
                )
                for n in range(3)
            ]
            ends = [await alice.outcome(each["request_id"]) for each in accepted]
        granted = max(each["granted_at"] for each in ends)
        assert granted < min(each["finished_at"] for each in ends)

    asyncio.run(check())


def test_an_echo_says_that_it_is_one_and_takes_no_nonsense(system: System) -> None:
    async def check() -> None:
        async with serving(system, Echo()) as alice:
            echo = await outcome(alice, "hello")
            assert echo["result"] == {"response": "hello", "model": "echo", "provider": "echo"}
            for delay_s in (-1, "long", 1e9):
                assert (await outcome(alice, "x", options={"delay_s": delay_s}))[
                    "status"
                ] == "failed"

    asyncio.run(check())


def test_a_worker_without_a_provider_is_none_and_the_console_knows_all(system: System) -> None:
    with pytest.raises(Invalid):
        Worker("none", [], var=system.var)
    assert set(PROVIDER_NAMES) == set(PROVIDERS)
