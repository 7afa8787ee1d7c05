"""`ksi status`: how the system is, from outside. It asks nobody and so always answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import Options, command
from ksi.console.show import duration, show_json, show_table, size
from ksi.transport.remote import require_here

if TYPE_CHECKING:
    from ksi.console.facts import Child, System

EXIT_DEGRADED: Final = 1
EXIT_NOT_RUNNING: Final = 3


@command("status")
@click.pass_obj
def status(options: Options) -> int:
    """Show the health of the system, and what to type about it.

    Exit codes: 0 healthy, 1 degraded, 3 not running. It answers with an owner hung, and from disk
    with everything dead.
    """
    from ksi.console.facts import look

    require_here(options.var, "ksi status")
    system = look(options.var)
    problems = system.problems("ksi" + options.words())
    if options.json:
        show_json("status", as_fields(system, problems))
    else:
        _print(system, problems)
    if system.supervisor is None:
        return EXIT_NOT_RUNNING
    return EXIT_DEGRADED if problems else 0


def as_fields(system: System, problems: list[str]) -> dict[str, Any]:
    """Return the object of `ksi status --json`."""
    supervisor = system.supervisor
    return {
        "healthy": supervisor is not None and not problems,
        "offline": supervisor is None,
        "phase": system.phase,
        "var": str(system.var.absolute()),
        "supervisor": {
            "pid": supervisor and supervisor.pid,
            "uptime_s": supervisor and round(time.time() - supervisor.since, 3),
        },
        "owners": [
            {**_child_fields(child), "tcp": system.tcp.get(child.name)}
            for child in system.of("owner")
        ],
        "followers": [_child_fields(child) for child in system.of("follower")],
        "children": [_agent_fields(child) for child in system.of("agent")],
        "sessions": system.counts["sessions"],
        "agents": system.counts["agents"],
        "queue": {name: system.counts[name] for name in ("waiting", "active", "workers")},
        "state": {name: system.counts[name] for name in ("entities", "queued")},
        "checkpoint": _checkpoint_fields(system),
        "disk": {"free_bytes": system.free_bytes, "total_bytes": system.disk_bytes},
        "problems": problems,
    }


def _child_fields(child: Child) -> dict[str, Any]:
    now, last = child.stat, child.last_stat
    return {
        "name": child.name,
        "state": child.state,
        "pid": child.pid,
        "uptime_s": None if child.uptime_s is None else round(child.uptime_s, 3),
        "mailbox": now and now.mailbox,
        "mailbox_peak": now and now.mailbox_peak,
        "oldest_ms": now and now.oldest_ms,
        "commands": now and now.commands,
        "queries": now and now.queries,
        "commits": now and now.commits,
        "syncs": now and now.syncs,
        "refusals": now and now.refusals,
        "internal_errors": now and now.internal_errors,
        "replies_dropped": now and now.replies_dropped,
        "commands_per_s": now and now.commands_per_s,
        "p99_ms": now and now.p99_ms,
        "restarts": child.restarts,
        "epoch": (last and last.epoch) or None,
        "last_exit": child.last_exit,
        "journal_seq": last and last.journal_seq,
        "db_bytes": child.db_bytes,
        "store_id": last and last.store_id,
        "hung": child.hung,
    }


def _checkpoint_fields(system: System) -> dict[str, Any]:
    """Return what there is to restore from: the newest checkpoint, and whether the last failed."""
    found = system.checkpoints
    newest = found.checkpoints[0] if found.checkpoints else None
    return {
        "id": newest and newest.id,
        "created_at": newest and newest.created_at,
        "reason": newest and newest.reason,
        "count": len(found.checkpoints),
        "failed": found.failed,
    }


def _agent_fields(child: Child) -> dict[str, Any]:
    return {
        "name": child.name,
        "state": child.state,
        "pid": child.pid,
        "restarts": child.restarts,
        "last_exit": child.last_exit,
        "since": child.since,
    }


def _print(system: System, problems: list[str]) -> None:
    supervisor = system.supervisor
    if supervisor is None:
        print(f"KSI is not running   var {system.var}")
    else:
        health = "degraded" if problems else "healthy"
        up = duration(time.time() - supervisor.since)
        phase = "" if system.phase == "ready" else f"   phase {system.phase}"
        print(f"KSI {health}{phase}   up {up}   supervisor {supervisor.pid}   var {system.var}")
    headers = (
        "OWNER", "STATE", "PID", "UP", "MAILBOX", "PEAK", "OLDEST", "CMD/S", "P99", "RESTARTS",
        "EPOCH", "SEQ", "SIZE",
    )  # fmt: skip
    show_table(headers, map(_row, [*system.of("owner"), *system.of("follower")]))
    if system.of("agent"):
        print()
        rows = [(c.name, c.state, c.pid, c.restarts, c.last_exit) for c in system.of("agent")]
        show_table(("PROGRAM", "STATE", "PID", "RESTARTS", "LAST EXIT"), rows)
    counts = [f"{name} {'-' if many is None else many}" for name, many in system.counts.items()]
    if system.disk_bytes:
        counts.append(f"disk {100 * system.free_bytes // system.disk_bytes}% free")
    made = system.checkpoints.checkpoints
    age = f"{duration(time.time() - made[0].created_at)} old" if made else "-"
    counts.append(f"checkpoint {age}")
    print("\n" + " | ".join(counts))
    if system.tcp:
        ports = ", ".join(f"{name} {at.removeprefix('tcp://')}" for name, at in system.tcp.items())
        print(f"over tcp: {ports}")
    if problems:
        print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}:")
        for problem in problems:
            print(f"  {problem}")


def _row(child: Child) -> tuple[Any, ...]:
    now, last = child.stat, child.last_stat
    return (
        child.name,
        child.state,
        child.pid,
        duration(child.uptime_s),
        now and now.mailbox,
        now and now.mailbox_peak,
        duration(now.oldest_ms / 1000) if now and now.mailbox else None,
        now and f"{now.commands_per_s:.0f}",
        now and f"{now.p99_ms:.1f}ms",
        child.restarts,
        (last and last.epoch) or None,
        last and last.journal_seq,
        size(child.db_bytes),
    )
