"""`ksi subscribe PATTERN`: print what is announced, as it comes."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ksi.console.options import DURATION, Options, command
from ksi.console.show import clean, print_json

if TYPE_CHECKING:
    from ksi.transport.link import Delivery


@command(
    "subscribe",
    epilog="""\b
Examples:
  ksi subscribe 'news.*'
  ksi subscribe 'session.>' --json
  ksi subscribe 'jobs.>' --durable worker --count 1""",
)
@click.argument("pattern")
@click.option("--durable", metavar="NAME", help="What comes while nobody reads is kept.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many.")
@click.option("--timeout", type=DURATION, help="End when nothing comes for so long.")
@click.pass_obj
def subscribe(
    options: Options, pattern: str, durable: str | None, count: int | None, timeout: float | None
) -> None:
    """Print what is announced under topics that match PATTERN: `*` a word, `>` the rest.

    What begins with `session`, `agent`, `completion`, `worker`, `message`, `conversation`,
    `composition`, `state` or `async_state` its owner announces, anything else is published on the
    bus. With `--durable` each message is acknowledged once it is printed. With `--json`, one JSON
    object a line.
    """
    options.require_running()
    with options.client() as client:
        news: Any = (
            client.subscribe(pattern)
            if durable is None
            else client.subscribe(pattern, durable=durable)
        )
        print(f"listening to {pattern} as {client.name}", file=sys.stderr, flush=True)
        try:
            while count is None or count > 0:
                delivery = news.next(timeout)
                _show(options, delivery)
                if durable is not None:
                    delivery.ack()
                if delivery.topic and count is not None:
                    count -= 1
        except TimeoutError:
            return


def _show(options: Options, delivery: Delivery) -> None:
    if options.json:
        print_json(
            {
                "topic": delivery.topic,
                "sender": delivery.sender,
                "seq": delivery.seq,
                "gap": delivery.gap,
                "redelivered": delivery.redelivered,
                "message": delivery.message,
            }
        )
    else:
        if delivery.gap:
            print(f"missed {delivery.gap} messages", file=sys.stderr)
        if delivery.topic:
            mark = " (again)" if delivery.redelivered else ""
            at = time.strftime("%H:%M:%S")
            print(clean(f"{at} {delivery.topic} {delivery.sender}{mark}: "), end="")
            print_json(delivery.message)
    sys.stdout.flush()
