"""`ksi worker`: answer requests of the completion queue with a provider."""

from __future__ import annotations

import sys
from typing import Final

import click

from ksi.console.options import DURATION, Options, command
from ksi.console.show import show_json
from ksi.transport.limits import SLOTS_MAX, WORKER_LEASE_S

PROVIDER_NAMES: Final = ("echo",)  # as in `ksi.adapters.providers`, which takes long to import


@command("worker")
@click.option(
    "--provider", "names", multiple=True, required=True, type=click.Choice(PROVIDER_NAMES),
    help="What answers; requests that require it come here.",
)  # fmt: skip
@click.option(
    "--slots", type=click.IntRange(1, SLOTS_MAX), default=1, show_default=True,
    help="How many requests at a time.",
)  # fmt: skip
@click.option(
    "--lease", type=DURATION, default=WORKER_LEASE_S,
    help="After this long in silence its requests go to others. [15s]",
)  # fmt: skip
@click.option("--grace", type=DURATION, default=30.0, help="To finish in, once stopped. [30s]")
@click.pass_obj
def worker(
    options: Options, names: tuple[str, ...], slots: int, lease: float, grace: float
) -> None:
    """Run a worker until Ctrl-C or SIGTERM.

    Its name is that of `--as`, or its first provider's: there can be one worker of a name. Stopped,
    it finishes what it holds; stopped again, it hands it back.
    """
    import asyncio
    import signal

    from ksi.adapters.providers import PROVIDERS
    from ksi.adapters.worker import Worker

    options.require_running()

    async def serve(name: str) -> None:
        providers = [PROVIDERS[each]() for each in dict.fromkeys(names)]
        running = Worker(
            name, providers, var=options.var, slots=slots, lease_s=lease, grace_s=grace
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, running.stop)
        print(f"{name} answers with {', '.join(names)}", file=sys.stderr, flush=True)
        await running.run()

    name = options.identity or f"worker-{names[0]}"
    asyncio.run(serve(name))
    if options.json:
        show_json("worker", {"worker": name, "providers": names})
