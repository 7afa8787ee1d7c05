"""`ksi dev`: run the system, and run it on fresh code whenever the code has changed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json
from ksi.console.start import pair
from ksi.transport.errors import Conflict, KsiError
from ksi.transport.remote import require_here

if TYPE_CHECKING:
    from ksi.actors.supervision.standby import Standby

PACKAGES: Final = ("actors", "storage", "transport")  # what the processes of a system are made of
SUFFIX: Final = "-dev"
STEP_MS: Final = 20  # A change is taken up when nothing has followed it for so long ...
GROUP_MS: Final = 400  # ... or things have gone on changing for so long.
LOOK_MS: Final = 500  # How often it is looked whether the system still runs.

Sources = Mapping[Path, tuple[int, int]]
Tell = Callable[..., None]


@command("dev")
@click.option(
    "--set",
    "flags",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting, above all others; `ksi config` lists them.",
)
@click.pass_obj
def dev(options: Options, flags: tuple[str, ...]) -> None:
    """Run the system until Ctrl-C, and anew on fresh code whenever a source file changes.

    Code that cannot be loaded is not taken up: what ran before goes on serving. Clients wait for
    the restart and lose nothing. The state is kept apart from that of other runs, beside the
    runtime directory: for `var` it is `var-dev`.
    """
    from watchfiles import PythonFilter, watch

    require_here(options.var, "ksi dev")
    var = development_var(options.var)
    _keep_compiled(var)
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: done.set())
    roots = [Path(root) for name in PACKAGES for root in import_module(f"ksi.{name}").__path__]
    tell = _as_json if options.json else _in_words
    tell("watching", var=str(var), roots=[str(root) for root in roots])
    development = Development(var, dict(map(pair, flags)), roots, tell)
    try:
        development.look()
        for _ in watch(
            *roots,
            watch_filter=PythonFilter(),
            debounce=GROUP_MS,
            step=STEP_MS,
            rust_timeout=LOOK_MS,
            yield_on_timeout=True,
            stop_event=done,
        ):
            development.look()
    finally:
        development.stop()


def development_var(var: Path) -> Path:
    """Return the directory for development beside `var`; one that is such a directory stays."""
    var = var.resolve()
    return var if var.name.endswith(SUFFIX) else var.with_name(var.name + SUFFIX)


class Development:
    """A system on `var` that is replaced when what lies below `roots` has changed."""

    def __init__(self, var: Path, flags: Mapping[str, str], roots: list[Path], tell: Tell) -> None:
        self._var = var
        self._flags = flags
        self._roots = roots
        self._tell = tell
        self._seen: Sources = {}
        self._serving: Standby | None = None

    def look(self) -> None:
        """Take up sources that have changed since the last look; notice a system that has ended.

        Raises:
            Conflict: somebody else runs on this directory.
        """
        if self._serving is not None and self._serving.ended() is not None:
            self._tell("ended", exit_code=self._serving.ended())
            self._serving = None
        found = _sources(self._roots)
        if found != self._seen:
            changed = {path for path, _ in found.items() ^ self._seen.items()}
            first, self._seen = not self._seen, found
            if not first:
                self._tell("changed", files=sorted(map(str, changed)))
                for path in changed:
                    _forget_compiled(path)
            self._take_up()

    def stop(self) -> None:
        """Stop the system in order."""
        if self._serving is not None:
            self._serving.stop()
            self._serving = None

    def _take_up(self) -> None:
        """Replace the system by one of the code as it is now, if that can be loaded."""
        from ksi.actors.supervision.standby import Standby

        begun_s = monotonic()
        try:
            fresh = Standby(self._var, self._flags)
        except KsiError as error:
            self._tell("refused", text=error.text, serving=self._serving is not None)
            return
        self.stop()
        try:
            silent_s = fresh.start(lambda _line: None)
        except Conflict:
            raise
        except KsiError as error:
            self._tell("failed", text=error.text, hint=error.hint)
            return
        self._serving = fresh
        spent_s = round(monotonic() - begun_s, 3)
        self._tell("ready", pid=fresh.pid, seconds=spent_s, started_s=round(silent_s, 3))


def _sources(roots: list[Path]) -> Sources:
    """Return what tells one state of the source files from another."""
    found = {}
    for path in (path for root in roots for path in root.rglob("*.py")):
        try:
            stat = path.stat()
        except FileNotFoundError:  # an editor is just replacing it
            continue
        found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


def _keep_compiled(var: Path) -> None:
    """Have this process and those it starts keep below `var` what Python makes of sources, whatever
    the environment says. To make it anew takes longer than all else between an edit and an answer.
    """
    directory = var / "cache" / "bytecode"
    with suppress(OSError):  # Whoever starts the system finds out, and says it better.
        for each in (var, directory.parent, directory):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(directory)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _forget_compiled(path: Path) -> None:
    """Remove what Python keeps of a source: it would not see a change of a second or less."""
    with suppress(OSError):
        Path(cache_from_source(str(path))).unlink()


def _as_json(event: str, **fields: Any) -> None:
    show_json("dev", {"event": event, **fields})


def _in_words(event: str, **fields: Any) -> None:
    print(WORDS[event](fields), file=sys.stderr, flush=True)


WORDS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "watching": lambda said: f"development on {said['var']} (KSI_VAR for others); Ctrl-C stops",
    "changed": lambda said: "changed: " + ", ".join(Path(path).name for path in said["files"]),
    "refused": lambda said: (
        f"  not taken up: {said['text']}\n  "
        + ("the code before goes on serving" if said["serving"] else "nothing runs until it loads")
    ),
    "failed": lambda said: f"  it does not start: {said['text']}\n  {said['hint'] or ''}",
    "ended": lambda said: f"the system has ended, exit {said['exit_code']}: waiting for a change",
    "ready": lambda said: f"  ready in {said['seconds']:.2f} s, supervisor {said['pid']}",
}
