"""`ksi ps`: the processes of the system, and what they take from the machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from ksi.console.options import Options, command
from ksi.console.show import duration, show_json, show_table, size
from ksi.transport.remote import require_here

if TYPE_CHECKING:
    import psutil


@command("ps")
@click.pass_obj
def ps(options: Options) -> None:
    """List the processes of the system: CPU (of their whole life), memory, files, threads."""
    import psutil

    from ksi.console.facts import look

    require_here(options.var, "ksi ps")
    options.require_running()
    system = look(options.var)
    assert system.supervisor is not None
    names = {child.pid: (child.name, child.kind) for child in system.children}
    names[system.supervisor.pid] = ("supervisor", "supervisor")
    root = psutil.Process(system.supervisor.pid)
    found = [
        fields
        for process in [root, *root.children(recursive=True)]
        if (fields := _fields(process, *names.get(process.pid, (None, "other"))))
    ]
    if options.json:
        show_json("ps", {"processes": found})
        return
    rows = [
        (
            each["pid"],
            each["name"],
            each["kind"],
            f"{each['cpu_percent']:.1f}%",
            size(each["rss_bytes"]),
            size(each["pss_bytes"]),
            each["files"],
            each["threads"],
            duration(each["uptime_s"]),
            each["command"][:60],
        )
        for each in found
    ]
    headers = ("PID", "NAME", "KIND", "CPU", "RSS", "PSS", "FILES", "THREADS", "UP", "COMMAND")
    show_table(headers, rows)


def _fields(process: psutil.Process, name: str | None, kind: str) -> dict[str, Any] | None:
    """Return what `ksi ps` tells of a process, or None if it has just ended."""
    import psutil

    try:
        with process.oneshot():
            uptime_s = max(time.time() - process.create_time(), 0.001)
            spent = process.cpu_times()
            words = process.cmdline()
            memory = process.memory_full_info()
            return {
                "pid": process.pid,
                "name": name or _role(words) or process.name(),
                "kind": kind,
                "cpu_percent": round(100 * (spent.user + spent.system) / uptime_s, 1),
                "rss_bytes": memory.rss,
                "pss_bytes": memory.pss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "uptime_s": round(uptime_s, 3),
                "command": " ".join(words),
            }
    except psutil.Error:
        return None


def _role(words: list[str]) -> str | None:
    """Return what a process of the supervisor's own is for, by its command line."""
    return "fork server" if "forking import serve" in " ".join(words) else None
