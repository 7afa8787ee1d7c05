"""`ksi observe`: what an agent does, as it happens, as it was, and in numbers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.events import show_event
from ksi.console.options import DURATION, MOMENT, SINCE, Options, group
from ksi.console.show import show_json, show_table

if TYPE_CHECKING:
    from ksi.console.reads import Reads

FOLLOW_S: Final = 0.1  # How often it looks: a read is microseconds and sends no message.
ALIVE_S: Final = 5.0  # How often it says that it still looks: the breaker stays closed.
PAGE: Final = 1000  # Events read at once.

_match = click.option(
    "--match", "events", metavar="PATTERN", multiple=True,
    help="Only events with such a name: 'completion:*'. More than one: any of them.",
)  # fmt: skip
_since = click.option("--since", type=MOMENT, help=SINCE)
_until = click.option("--until", type=MOMENT, help="Only what was before: 10m, a date or a time.")


@group("observe")
def observe() -> None:
    """Observe agents: follow one, replay what it has done, analyse it."""


@observe.command("list")
@click.option("--observer", metavar="NAME", help="Only those of NAME.")
@click.pass_obj
def list_observations(options: Options, observer: str | None) -> None:
    """List who observes whom, and what was not shown to him. Sends no message."""
    fields = {} if observer is None else {"observer": observer}
    found = _reads(options)("events", "observation:list", **fields)["subscriptions"]
    if options.json:
        show_json("observe", {"subscriptions": found})
        return
    names = ("subscription_id", "observer", "target", "shown", "sampled_out", "rate_limited",
             "missed", "breaker")  # fmt: skip
    rows = ([each[name] for name in names] for each in found)
    headers = ("SUBSCRIPTION", "OBSERVER", "TARGET", "SHOWN", "SAMPLED", "LIMITED", "MISSED")
    show_table((*headers, "BREAKER"), rows)


@observe.command("follow")
@click.argument("target")
@_match
@click.option("--exclude", metavar="PATTERN", multiple=True, help="But none with such a name.")
@click.option("--sample", type=click.FloatRange(0.0, 1.0, min_open=True), help="A part: 0.1.")
@click.option("--rate", type=click.IntRange(min=1), help="At most so many ...")
@click.option("--window", type=DURATION, default=1.0, help="... in this time. [1s]")
@click.option("--name", metavar="ID", help="Keep the place under this name; go on from there.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many.")
@click.pass_obj
def follow(
    options: Options,
    /,
    target: str,
    events: tuple[str, ...],
    exclude: tuple[str, ...],
    sample: float | None,
    rate: int | None,
    window: float,
    name: str | None,
    count: int | None,
) -> None:
    """Print what TARGET, an agent or a pattern, does from now on. With `--json`, one a line."""
    options.require_running()
    wanted: dict[str, Any] = {"exclude": list(exclude)}
    if sample is not None:
        wanted["sampling_rate"] = sample
    if rate is not None:
        wanted["rate_limit"] = {"max_events": rate, "window_seconds": window}
    fields = {"target": target, "events": list(events), "filter": wanted}
    with options.client() as client:
        begun = client.ask("observation:subscribe", fields | _named(name))
        place = {"subscription_id": begun["subscription_id"]}
        print(f"observing {target} as {client.name}", file=sys.stderr, flush=True)
        try:
            for event in _observed(client.read, client.ask, place, count):
                show_event(options, event)
        finally:
            if name is None:
                client.ask("observation:unsubscribe", place)


def _named(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"subscription_id": name}


def _observed(
    read: Callable[..., Any], ask: Callable[..., Any], place: dict[str, Any], count: int | None
) -> Iterator[dict[str, Any]]:
    """Yield what is shown, acknowledging it when it was taken, until there were `count`."""
    told_s = time.monotonic()
    while True:
        limit = PAGE if count is None else min(PAGE, count)
        page = read("observation:next", {**place, "limit": limit})
        yield from page["events"]
        now_s = time.monotonic()
        if page["events"] or page["breaker"] == "open" or now_s - told_s >= ALIVE_S:
            ask("observation:ack", {**place, "upto": page["upto"]})
            told_s = now_s
        if count is not None:
            count -= len(page["events"])
            if count <= 0:
                return
        if not page["more"]:
            time.sleep(FOLLOW_S)  # Reads cost its owner nothing.


@observe.command("replay")
@click.argument("target")
@_match
@_since
@_until
@click.option("--speed", type=click.FloatRange(0.0, 1e6, min_open=True), default=1.0,
              show_default=True, help="So many times as fast as it happened.")  # fmt: skip
@click.pass_obj
def replay(
    options: Options,
    /,
    target: str,
    events: tuple[str, ...],
    since: float | None,
    until: float | None,
    speed: float,
) -> None:
    """Print what TARGET has done, the oldest first, in its time. Nothing happens again."""
    fields: dict[str, Any] = {"target": target, "events": list(events), "speed": speed}
    times = {"since": since, "until": until}
    fields |= {name: at for name, at in times.items() if at is not None}
    for event in replayed(_reads(options), fields):
        show_event(options, event)


def replayed(
    read: Callable[..., dict[str, Any]],
    fields: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """Yield the events of a replay, each when it is due."""
    begun_s = clock()
    more = True
    while more:
        page = read("events", "observation:replay", **fields, limit=PAGE)
        for event in page["events"]:
            left_s = begun_s + event["due_s"] - clock()
            if left_s > 0:
                wait(left_s)
            yield event
        fields = {**fields, "after": page["next"]}
        if page["begin"] is not None:
            fields["begin"] = page["begin"]
        more = page["next"] is not None


@observe.command("analyze")
@click.argument("target")
@click.option(
    "--type", "analysis_type",
    type=click.Choice(["frequency", "sequence", "errors", "performance"]),
    default="frequency", show_default=True,
)  # fmt: skip
@_since
@_until
@click.pass_obj
def analyze(
    options: Options, /, target: str, analysis_type: str, since: float | None, until: float | None
) -> None:
    """Say how often TARGET does what, what after what, what has failed, or how long it takes."""
    times = {"since": since, "until": until}
    given = {name: at for name, at in times.items() if at is not None}
    fields = {"target": target, "analysis_type": analysis_type, **given}
    found = _reads(options)("events", "observation:analyze", **fields)
    if options.json:
        show_json("observe.analyze", found)
    else:
        print(f"{found['events']} events of {target}")
        print(json.dumps(found["found"], indent=2))
        if found["next"] is not None:
            print("  that is not all: name a shorter time with --since", file=sys.stderr)


def _reads(options: Options) -> Reads:
    from ksi.console.reads import Reads

    return Reads(options.var, options.identity)
