"""`ksi start`: start the supervisor and all owners, and wait until each answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json


@command("start")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the terminal; Ctrl-C stops.")
@click.option(
    "--set",
    "flags",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting, above all others; `ksi config` lists them.",
)
@click.option(
    "--config",
    "settings",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Another settings file than ksi.toml in the runtime directory.",
)
@click.option(
    "--worker",
    "lines",
    multiple=True,
    metavar="PROVIDER",
    help="Run a worker, too: local, or with options, 'openai --model M --slots 4'.",
)
@click.pass_obj
def start(
    options: Options,
    foreground: bool,
    flags: tuple[str, ...],
    settings: Path | None,
    lines: tuple[str, ...],
) -> None:
    """Start the system and return when every owner answers.

    With `--worker`, where it runs already, only the worker is started.
    """
    from ksi.actors.supervision.launch import run_foreground
    from ksi.actors.supervision.lock import holder
    from ksi.console.worker import require_fit, spawn

    if foreground and lines:
        raise click.UsageError("--worker needs a system in the background: leave --foreground out")
    wanted = [require_fit(line) for line in lines]
    pairs = dict(map(pair, flags))
    if foreground:
        run_foreground(options.var, pairs, settings=settings)
    held = holder(options.var) if lines else None
    if held is None:
        started = start_and_tell(options, pairs, settings)
    else:
        started = {"ready": True, "pid": held.pid, "seconds": 0.0, "children": []}
    for name, words in wanted:
        spawn(options, name, words)
        print(f"  {name} takes part", file=sys.stderr, flush=True)
    started |= {"workers": [name for name, _ in wanted]} if wanted else {}
    if options.json:
        show_json("start", started)
    else:
        print(f"ready in {started['seconds']:.2f} s, supervisor {started['pid']}")


def start_and_tell(
    options: Options, flags: dict[str, str], settings: Path | None = None
) -> dict[str, Any]:
    """Start in the background, with a line on standard error for each child that is ready."""
    from ksi.actors.supervision.launch import start_background

    children = []

    def tell(line: dict[str, Any]) -> None:
        children.append(line)
        pid, phase = line["pid"], line["phase"]
        print(f"  {line['child']:<12} ready  pid {pid}  {phase}", file=sys.stderr, flush=True)

    started = start_background(options.var, flags, tell, settings=settings)
    return {**started, "children": children}


def pair(text: str) -> tuple[str, str]:
    """Return key and value of a word `KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set takes KEY=VALUE, not {text!r}")
    return key, value
