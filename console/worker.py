"""`ksi worker`: answer requests of the completion queue with a provider."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import DURATION, Failed, Options, command
from ksi.console.show import show_json
from ksi.transport.errors import Conflict, Invalid, KsiError
from ksi.transport.limits import ASK_TIMEOUT_S, ID_PATTERN, RATE_PATTERN, SLOTS_MAX, WORKER_LEASE_S

if TYPE_CHECKING:
    from ksi.adapters.providers import Provider

# as in `ksi.adapters.providers`, which takes long to import
PROVIDER_NAMES: Final = ("anthropic", "command", "echo", "litellm", "local", "openai")
GRACE: Final = "4s"  # To finish in, under the supervisor: less than it waits before it kills.
READY_S: Final = 30.0  # What a supervised worker gets to load its model in.
LOOK_S: Final = 0.05
_PERIOD_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Rate(click.ParamType[float]):
    """How often: 5/s, 60/m, 1000/h. Its value is in calls a second."""

    name = "rate"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float):
            return value
        if re.match(RATE_PATTERN, str(value)) is None:
            self.fail(f"{value!r} is no rate (5/s, 60/m, 1000/h)", param, ctx)
        calls, _, period = str(value).partition("/")
        return int(calls) / _PERIOD_S[period]


@command("worker")
@click.option(
    "--provider", "names", multiple=True, required=True, type=click.Choice(PROVIDER_NAMES),
    help="What answers; requests that require it come here.",
)  # fmt: skip
@click.option("--offers", metavar="WORD", help="What requests require instead of its name.")
@click.option(
    "--slots", type=click.IntRange(1, SLOTS_MAX), default=1, show_default=True,
    help="How many requests at a time.",
)  # fmt: skip
@click.option(
    "--rate", type=Rate(), help="How often this worker calls a provider at the most: 60/m."
)
@click.option("--model", help="Which model answers where a request names none.")
@click.option("--base-url", help="Where a server listens that speaks the provider's protocol.")
@click.option(
    "--key-file", type=click.Path(path_type=Path), help="Holds the key. [the environment]"
)
@click.option("--command", "program", help="The command line of the provider `command`.")
@click.option(
    "--stdin", type=click.Choice(("text", "json")), default="text", show_default=True,
    help="What that program reads: the prompt, or all as JSON.",
)  # fmt: skip
@click.option(
    "--model-file", type=click.Path(path_type=Path), help="A GGUF file for the provider `local`."
)
@click.option(
    "--lease", type=DURATION, default=WORKER_LEASE_S,
    help="After this long in silence its requests go to others. [15s]",
)  # fmt: skip
@click.option("--grace", type=DURATION, default=30.0, help="To finish in, once stopped. [30s]")
@click.pass_obj
def worker(
    options: Options,
    /,
    names: tuple[str, ...],
    slots: int,
    rate: float | None,
    lease: float,
    grace: float,
    **settings: Any,
) -> None:
    """Run a worker until Ctrl-C or SIGTERM.

    Its name is that of `--as`, or its first provider's: there can be one worker of a name. Stopped,
    it finishes what it holds; stopped again, it hands it back. docs/completions.md shows how to
    plug in what.
    """
    import asyncio
    import math
    import signal

    from ksi.adapters.worker import Worker

    options.require_running()
    names = tuple(dict.fromkeys(names))
    name = options.identity or f"worker-{settings['offers'] or names[0]}"

    async def serve() -> None:
        providers = build(names, slots=slots, **settings)
        running = Worker(
            name, providers, var=options.var, slots=slots, rate_per_s=rate or math.inf,
            lease_s=lease, grace_s=grace,
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, running.stop)
        print(f"{name} answers with {', '.join(names)}", file=sys.stderr, flush=True)
        await running.run()

    try:
        asyncio.run(serve())
    except Invalid as unfit:
        _tell(options, name, settings["offers"] or names[0], unfit)
        raise
    if options.json:
        show_json("worker", {"worker": name, "providers": names})


def build(names: tuple[str, ...], *, program: str | None, **more: Any) -> list[Provider]:
    """Return the providers a worker is asked for; raise `Invalid` where one cannot answer."""
    from ksi.adapters.providers import Settings
    from ksi.adapters.providers import build as build_one

    if more["offers"] is not None and (len(names) > 1 or not re.match(ID_PATTERN, more["offers"])):
        raise Invalid("--offers takes one word, for one provider", hint="start a worker for each")
    settings = Settings(command=program, **more)
    return [build_one(each, settings) for each in names]


def _tell(options: Options, name: str, provider: str, unfit: Invalid) -> None:
    """Let the owner of completions know, so that whoever requires the provider is told."""
    from ksi.transport.client import Client

    reason = unfit.text[:1000]
    try:
        with Client(name, var=options.var, role="worker") as client:
            client.ask("worker:unfit", provider=provider, reason=reason, timeout_s=ASK_TIMEOUT_S)
    except KsiError as error:
        print(f"ksi: that could not be reported: {error}", file=sys.stderr, flush=True)


def require_fit(line: str) -> tuple[str, list[str]]:
    """Return the name and the words of the worker in `ksi start --worker "PROVIDER ..."`.

    Raises:
        Invalid: it cannot answer; the text says what is missing. UsageError for a wrong option.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise click.UsageError(f"--worker {line!r}: {error}") from None
    words = ["--provider", *words]
    context = worker.make_context("--worker", list(words), resilient_parsing=False)
    given = dict(context.params)
    for name in ("rate", "lease", "grace"):
        del given[name]
    names = given.pop("names")
    build(names, **given)
    return f"worker-{given['offers'] or names[0]}", words


def spawn(options: Options, name: str, words: list[str]) -> None:
    """Have the supervisor run a worker; return when it takes part.

    Raises:
        Failed: it does not.
    """
    # Its environment is that of the system: what is passed on here would be stored.
    argv = [sys.executable, "-P", "-m", "ksi.console", "worker", "--grace", GRACE, *words]
    with options.client() as client:
        with contextlib.suppress(Conflict):  # It runs already.
            client.ask(
                "agent:spawn", agent_id=name, argv=argv, cwd=str(Path.cwd()), kind="worker",
                restart="transient",
            )  # fmt: skip
        until_s = time.monotonic() + READY_S
        while True:
            found = client.read("worker:list")["workers"]
            if any(each["worker"] == name for each in found):
                return
            agent = client.read("agent:info", agent_id=name)
            if agent["status"] in ("failed", "exited", "terminated") or time.monotonic() > until_s:
                raise Failed(
                    f"{name} does not take part: it is {agent['status']}, {agent.get('exit')}",
                    hint=f"ksi{options.words()} logs {name}",
                )
            time.sleep(LOOK_S)  # It loads, or has only just begun.
