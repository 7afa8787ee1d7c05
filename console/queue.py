"""`ksi queue`: the completion queue: what waits, runs and has ended, and who works on it."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click

from ksi.console.options import DURATION, Options, group
from ksi.console.show import clean, duration, instant, print_json, show_json, show_table
from ksi.transport.limits import ASK_TIMEOUT_S, DEAD_MAX

STATUSES: Final = ("queued", "active", "finished", "dead")
TEXT_CHARS: Final = 60  # Of a reason in a table.


@group("queue", invoke_without_command=True)
@click.pass_context
def queue(ctx: click.Context) -> None:
    """Look at requests, workers and providers of the completion queue; cancel and retry."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_requests)


@queue.command("list")
@click.option("--status", type=click.Choice(STATUSES), help="Only these. [active, then queued]")
@click.option("--session", "session_id", metavar="SESSION", help="Only those of one session.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.pass_obj
def list_requests(
    options: Options, status: str | None = None, session_id: str | None = None, limit: int = 100
) -> None:
    """List requests: those that run, by worker, and those that wait, in order. Sends no message."""
    from ksi.console.reads import Reads

    reads = Reads(options.var)
    totals = reads("completion", "completion:list", limit=1)
    workers = reads("completion", "worker:list")["workers"]
    if session_id is not None:
        lane = reads("completion", "completion:session_status", session_id=session_id, limit=limit)
        found = [lane["active"]] if lane["active"] else []
        found, more = found + lane["next"], lane["waiting"] > len(lane["next"])
    else:
        found, more = [], False
        pages = reads.pages("completion", "completion:list", "requests", limit)
        for each in ("active", "queued") if status is None else (status,):
            page, beyond = pages(status=each)
            found, more = found + page, more or beyond
    counts = {name: totals[name] for name in ("waiting", "active", "finished", "limit")}
    if options.json:
        show_json("queue", {**counts, "workers": workers, "requests": found, "more": more})
        return
    print(
        f"{counts['active']} of {counts['limit']} active | {counts['waiting']} waiting | "
        f"{counts['finished']} finished | {len(workers)} workers with "
        f"{sum(each['slots'] - each['used'] for each in workers)} slots free"
    )
    headers = (
        "REQUEST",
        "SESSION",
        "STATUS",
        "PRIORITY",
        "FROM",
        "WORKER",
        "ATTEMPT",
        "AGE",
        "WHY",
    )
    show_table(headers, map(_row, found))
    if more:
        print(f"there are more: --limit {limit * 10}", file=sys.stderr)


def _row(request: dict[str, Any]) -> tuple[Any, ...]:
    return (
        request["request_id"],
        request["session_id"],
        request["status"],
        request["priority"],
        request["requester"],
        request["worker"] or (request["requires"] and f"needs {request['requires']}"),
        request["attempt"] or None,
        duration(time.time() - (request["granted_at"] or request["queued_at"])),
        request["reason"] and request["reason"][:TEXT_CHARS],
    )


@queue.command("show")
@click.argument("request_id")
@click.pass_obj
def show(options: Options, request_id: str) -> None:
    """Show one request, with its result. Sends no message."""
    from ksi.console.reads import Reads

    request = Reads(options.var)("completion", "completion:status", request_id=request_id)
    if options.json:
        show_json("queue.show", request)
        return
    for name, value in request.items():
        shown = instant(value) if name.endswith("_at") else value
        print(f"{name:<12} {clean(str(shown)) if shown not in (None, '') else '-'}")


@queue.command("cancel")
@click.argument("request_id")
@click.option("--reason", default="", help="Why, for whoever waits for it.")
@click.option("--timeout", type=DURATION, default=ASK_TIMEOUT_S, help="How long to wait. [5s]")
@click.pass_obj
def cancel(options: Options, request_id: str, reason: str, timeout: float) -> None:
    """Cancel a request that waits or runs. Its session goes on with the next."""
    options.require_running()
    with options.client() as client:
        fields = {"request_id": request_id, "reason": reason}
        reply = client.ask("completion:cancel", fields, timeout_s=timeout)
    if options.json:
        show_json("queue.cancel", reply)
    else:
        print(f"{request_id} is cancelled")


@queue.command("retry")
@click.argument("request_ids", nargs=-1, metavar="[REQUEST_ID]...")
@click.option("--all", "every", is_flag=True, help="All that have failed for good.")
@click.option(
    "--timeout", type=DURATION, default=ASK_TIMEOUT_S, help="How long to wait for each. [5s]"
)
@click.pass_obj
def retry(options: Options, request_ids: tuple[str, ...], every: bool, timeout: float) -> None:
    """Ask once more what has failed for good: each as another request of the same requester."""
    if bool(request_ids) == every:
        raise click.UsageError("name requests, or say --all")
    options.require_running()
    again = {}
    with options.client() as client:
        if every:
            from ksi.console.reads import Reads

            pages = Reads(options.var).pages("completion", "completion:list", "requests", DEAD_MAX)
            request_ids = tuple(each["request_id"] for each in pages(status="dead")[0])
        for request_id in request_ids:
            reply = client.ask("completion:retry", request_id=request_id, timeout_s=timeout)
            again[request_id] = reply["request_id"]
            if not options.json:
                print(f"{request_id} is asked once more as {reply['request_id']}")
    if options.json:
        show_json("queue.retry", {"retried": again})


@queue.command("usage")
@click.option("--agent", "agent_id", metavar="NAME", help="Only what NAME has asked for.")
@click.option("--model", help="Only of one model.")
@click.option("--last", type=DURATION, metavar="TIME", help="Only lately: 24h. [a month]")
@click.pass_obj
def usage(options: Options, agent_id: str | None, model: str | None, last: float | None) -> None:
    """Show how many tokens were taken, by agent and model, and what providers say they cost."""
    from ksi.console.reads import Reads

    since = 0.0 if last is None else max(0.0, time.time() - last)
    wanted = {"agent_id": agent_id, "model": model, "since": since, "limit": 1000}
    page = Reads(options.var)("completion", "completion:token_usage", **wanted)
    if options.json:
        show_json("queue.usage", page)
        return
    rows = [(*each.values(),) for each in page["usage"]]
    show_table(("AGENT", "MODEL", "ATTEMPTS", "INPUT", "OUTPUT", "CACHED", "USD"), rows)
    print(
        f"{page['input_tokens']} tokens in | {page['output_tokens']} out | "
        f"{page['cost_usd']:.4f} USD"
    )


@queue.command("providers")
@click.pass_obj
def providers(options: Options) -> None:
    """Show who offers what, how requests have fared with it, and what cannot answer."""
    from ksi.console.reads import Reads

    page = Reads(options.var)("completion", "completion:provider_status")
    if options.json:
        show_json("queue.providers", page)
        return
    rows = [
        (
            each["provider"],
            each["workers"],
            f"{each['used']}/{each['slots']}",
            each["completed"],
            each["failed"],
            each["retried"],
            " ".join(str(bound) for bound in (each["limit"], each["rate"]) if bound is not None)
            or None,
            (each["unfit"] or each["reason"] or "")[:TEXT_CHARS] or None,
        )
        for each in page["providers"]
    ]
    headers = ("PROVIDER", "WORKERS", "SLOTS", "COMPLETED", "FAILED", "RETRIED", "LIMIT", "WHY")
    show_table(headers, rows)


@queue.command("watch")
@click.option("--requester", metavar="NAME", help="Only what NAME has asked for.")
@click.pass_obj
def watch(options: Options, requester: str | None) -> None:
    """Print what happens to requests until Ctrl-C; with `--json` one object a line.

    What was missed, because it came faster than it was printed, is counted.
    """
    options.require_running()
    pattern = f"completion.{requester}.>" if requester else "completion.>"
    with options.client() as client, client.subscribe(pattern) as news:
        print(f"watching {pattern}", file=sys.stderr, flush=True)
        for delivery in news:
            if delivery.gap:
                print(f"{delivery.gap} were missed", file=sys.stderr, flush=True)
            if not delivery.topic:
                continue
            what = delivery.topic.rpartition(".")[2]
            if what == "tokens":
                continue
            if options.json:
                print_json({"topic": delivery.topic, "what": what, **delivery.message})
            else:
                _print(what, delivery.message)


def _print(what: str, message: dict[str, Any]) -> None:
    words = [instant(time.time()), message["request_id"], message["session_id"], what]
    if message.get("worker"):
        words.append(f"to {message['worker']}")
    if message.get("attempt", 0) > 1:
        words.append(f"attempt {message['attempt']}")
    if message.get("reason"):
        words.append(f"({message['reason']})")
    print(clean("  ".join(map(str, words))), flush=True)
