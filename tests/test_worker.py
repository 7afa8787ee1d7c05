"""Workers and providers: what is answered, what fails and with which words, what is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import click
import pytest
from system import System

from ksi.actors.declarations.spending import Usage
from ksi.adapters.providers import PROVIDERS, Echo, Failed, Grant, Provider, Talk
from ksi.adapters.worker import Pace, Worker
from ksi.console.worker import PROVIDER_NAMES, require_fit
from ksi.transport import AsyncClient
from ksi.transport.errors import Invalid, Unanswered, Unavailable


class Obliging:
    """Answers with what the prompt names."""

    name = "obliging"
    cancelled = 0

    async def complete(self, grant: Grant, talk: Talk) -> Any:
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
                await talk.say({"tokens": 1})
                try:
                    await asyncio.sleep(60)  # until it is cancelled
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
        return {"response": "well", "model": "obliging"}


class Speaking:
    """Answers word by word."""

    name = "speaking"

    async def complete(self, grant: Grant, talk: Talk) -> Any:
        for word in ("one", " two", " three"):
            await talk.tokens(word)
            await asyncio.sleep(0.12)  # longer than tokens are held back
        return {"response": "one two three", "model": "speaking"}


class Flaky:
    """Fails twice in a way that may pass; each attempt takes more."""

    name = "flaky"
    calls = 0

    async def complete(self, grant: Grant, talk: Talk) -> Any:
        self.calls += 1
        usage = Usage(output_tokens=self.calls)
        if self.calls < 3:
            raise Failed("provider_error", "not yet", usage=usage)
        return {"response": "now", "model": "flaky", "usage": usage}


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
        ("none", "has returned NoneType, no result"),
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
            slow = await outcome(alice, "wait", run_s=0.3, attempts_max=1)
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


def test_an_answer_is_waited_for_and_a_failure_raised(system: System) -> None:
    async def check() -> None:
        async with serving(system, Obliging(), Speaking()) as alice:
            heard: list[tuple[int, str]] = []
            answered = await alice.complete(
                "s", "say", requires="speaking", on_tokens=lambda *piece: heard.append(piece)
            )
            assert answered["result"]["response"] == "one two three"
            assert heard[0] == (0, "one")
            assert "".join(text for _, text in heard) in "one two three"
            with pytest.raises(Unanswered, match="no model today") as failed:
                await alice.complete("s", "raise")
            assert failed.value.details["status"] == "failed"
            with pytest.raises(Unavailable, match="it goes on"):
                await alice.complete("s", "wait", timeout_s=0.3, request_id="slow")
            await alice.ask("completion:cancel", request_id="slow")

    asyncio.run(check())


def test_what_a_provider_says_of_its_failure_decides_whether_it_is_asked_again(
    system: System,
) -> None:
    async def check() -> None:
        flaky = Flaky()
        async with serving(system, flaky) as alice:
            answered = await alice.complete("s", "x", retry_s=0.1)
            assert (answered["attempt"], answered["failures"]) == (3, 2)
            assert answered["result"]["usage"]["output_tokens"] == 3
            taken = await alice.read("completion:token_usage", model="flaky")
            assert taken["output_tokens"] == 1 + 2 + 3
        assert flaky.calls == 3

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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "'nonsense' is not one of"),
        ("echo --slots 0", "0 is not in the range"),
        ("echo --rate often", "is no rate"),
        ("echo 'unbalanced", "No closing quotation"),
        ("echo --unknown 3", "No such option"),
        ("command --command no-such-program", "finds no program 'no-such-program'"),
        ("command", "needs a command line"),
        ("echo --offers 'two words'", "--offers takes one word"),
        ("openai --key-file no-such-file", "cannot be read"),
    ],
)
def test_a_worker_that_cannot_answer_is_refused_before_it_is_started(line: str, words: str) -> None:
    with pytest.raises((Invalid, click.UsageError)) as refused:
        require_fit(line)
    shown = refused.value
    assert words in (shown.format_message() if isinstance(shown, click.UsageError) else str(shown))


def test_the_name_of_a_supervised_worker_says_what_it_offers() -> None:
    assert require_fit("echo --offers parrot --slots 2") == (
        "worker-parrot",
        ["--provider", "echo", "--offers", "parrot", "--slots", "2"],
    )


def test_a_worker_calls_a_provider_evenly() -> None:
    async def check() -> float:
        pace = Pace(20.0)
        begun_s = time.monotonic()
        await asyncio.gather(pace.turn(), pace.turn(), pace.turn())
        return time.monotonic() - begun_s

    assert asyncio.run(check()) >= 0.1
