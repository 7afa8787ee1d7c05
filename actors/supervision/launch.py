"""From a command to a running supervisor, in the foreground or the background.

    console ── start_background ──▶ python -c main ── forks, the first one ends ──▶ supervisor
        ◀── a JSON line for each child that is ready, then {"ready": …} or {"error": …} ──┘

The supervisor is an interpreter of its own, so that nothing is loaded that it does not need. `main`
takes the lock before it binds, opens or starts anything, and starts the fork server before its own
imports, so that both load at the same time. Whatever keeps it from starting ends in one error.

One that stands by (`standby.py`) loads everything first, says `{"loaded": true}`, and goes on when
its standard input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ksi.actors import log
from ksi.actors.supervision import lock
from ksi.transport.errors import Internal, Invalid, KsiError, from_wire
from ksi.transport.remote import require_here

if TYPE_CHECKING:
    from ksi.actors import config
    from ksi.actors.supervision.forkserver import ForkServer
    from ksi.actors.supervision.tree import Tree
    from ksi.transport.identity import Directory, KeyRing

Progress = Callable[[Mapping[str, Any]], None]

TREE: Final = "ksi.actors.supervision.tree:tree"
MODULES: Final = (
    "ksi.actors.process:warm",
    "ksi.actors.followers.files",
    "ksi.actors.followers.indexing",
    "ksi.actors.followers.recording",
    "ksi.actors.followers.library",
    "ksi.actors.checkpoints",
    "ksi.actors.log:engine",
)  # what children need

_MAIN: Final = "from ksi.actors.supervision.launch import main; main()"


def start_background(
    var: Path,
    flags: Mapping[str, Any] | None = None,
    on_progress: Callable[[dict[str, Any]], None] = lambda _line: None,
    *,
    settings: Path | None = None,
    tree: str = TREE,
    modules: Sequence[str] = MODULES,
) -> dict[str, Any]:
    """Start a supervisor that outlives this process; return when all its children are ready.

    Args:
        flags: settings, `section.key` to value, above all others.
        on_progress: called for each that is ready with `{"child": its name, "phase": …, "pid": …,
            "seconds": …}`.
        settings: a file instead of `<var>/ksi.toml`.

    Returns:
        `{"ready": True, "pid": of the supervisor, "seconds": what it took}`.

    Raises:
        Conflict: `var` is held by another supervisor; the text names it.
        KsiError: why it could not start. Nothing is left running.
    """
    begun_s = time.monotonic()
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    try:
        command = command_line(var, flags, settings, tree, modules, progress=theirs)
        null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=[null], setsid=True)
    finally:
        os.close(theirs)
    with os.fdopen(ours) as lines:
        for line in map(json.loads, lines):
            if "child" in line:
                on_progress(line)
                continue
            os.waitpid(pid, 0)
            if "error" in line:
                for _ in lines:  # Until the supervisor has ended, and whoever starts again may.
                    pass
                raise raised(line["error"])
            return {**line, "seconds": round(time.monotonic() - begun_s, 3)}
    os.waitpid(pid, 0)
    raise Internal(
        "the supervisor ended while it started",
        hint=log.last_words(log.output(var, "supervisor")) or "ksi start --foreground shows more",
    )


def raised(error: list[Any]) -> KsiError:
    """Return what a supervisor that could not start has said of it."""
    import ksi.storage.errors  # noqa: F401 - so that its classes are known

    return from_wire(error)


def run_foreground(
    var: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    settings: Path | None = None,
    tree: str = TREE,
    modules: Sequence[str] = MODULES,
) -> NoReturn:
    """Become the supervisor: this process, its pid and its terminal; never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = command_line(var, flags, settings, tree, modules)
    os.execv(command[0], command)


def command_line(
    var: Path,
    flags: Mapping[str, Any] | None,
    settings: Path | None = None,
    tree: str = TREE,
    modules: Sequence[str] = MODULES,
    *,
    progress: int | None = None,
    parent: int | None = None,
) -> list[str]:
    """Return the command line of a supervisor.

    Args:
        progress: a descriptor it tells how far it is; None: its standard error.
        parent: the process it stands by for and ends with; None: nobody.
    """
    order = {
        "var": os.path.realpath(var),
        "flags": dict(flags or {}),
        "settings": None if settings is None else os.path.abspath(settings),
        "tree": tree,
        "modules": list(modules),
        "progress": progress,
        "parent": parent,
    }
    # -P: what lies in the current directory is not imported by mistake.
    return [sys.executable, "-P", "-c", _MAIN, json.dumps(order)]


def main() -> NoReturn:
    """Be the supervisor that `sys.argv[1]` describes, until it is stopped."""
    order = json.loads(sys.argv[1])
    descriptor = order["progress"]
    if descriptor is not None and order["parent"] is None and os.fork():
        os._exit(0)  # who started us need not reap us
    progress = _told_on_terminal if descriptor is None else _told_to(descriptor)
    var = Path(order["var"])
    code = 1
    try:
        server = _stand_by(order, progress) if order["parent"] is not None else None
        code = _run(var, order, progress, server)
    except KsiError as error:
        code = error.exit_code
        progress({"error": error.to_wire()})
    except OSError as error:
        code = Invalid.exit_code
        text = f"{error.filename or var} cannot be used: {error.strerror or error}"
        progress({"error": Invalid(text, hint="ksi --var DIR names another").to_wire()})
    except Exception as error:
        text = f"the supervisor could not start: {error!r}"[:1000]
        progress({"error": Internal(text, hint=f"see {log.output(var, 'supervisor')}").to_wire()})
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # All it was for has ended in order; to take down an interpreter takes 50 ms.


def _stand_by(order: Mapping[str, Any], progress: Progress) -> ForkServer:
    """Load what a supervisor and its children need; return its fork server when told to go on.

    Raises:
        Invalid: something cannot be loaded; the text says what and where.
    """
    from ksi.actors.supervision.forking import die_with, load, where

    die_with(order["parent"])
    from ksi.actors.supervision.forkserver import ForkServer

    server = ForkServer([*order["modules"], order["tree"]])
    server.start()  # it loads while we do
    try:
        for place in (order["tree"], "ksi.actors.supervision.supervisor", "ksi.actors.log:engine"):
            load(place)
        fault = server.fault()
    except Exception as error:
        fault = where(error)
    if fault is not None:
        raise Invalid(fault)
    progress({"loaded": True})
    sys.stdin.read()
    return server


def _run(var: Path, order: Mapping[str, Any], progress: Progress, server: ForkServer | None) -> int:
    from ksi.storage.format import check_format, mark_format

    require_here(var, "ksi start")
    os.umask(0o077)
    check_format(var)  # a newer one is not touched, not even its lock
    held = lock.hold(var)
    mark_format(var)
    if (var / "db" / "RESTORING").exists():
        from ksi.actors.restoring import require_none_begun

        os.close(held)  # Whoever is told may end it at once.
        require_none_begun(var)
        held = lock.hold(var)  # It was ended just now.
    if order["progress"] is not None:
        log.make_directory(var)
        output = log.output(var, "supervisor")
        log.trim(output)
        log.redirect(output)

    if server is None:
        from ksi.actors.supervision.forkserver import ForkServer

        server = ForkServer([*order["modules"], order["tree"]])  # the tree names all owners
        server.start()

    from ksi.actors import config

    path = order["settings"] and Path(order["settings"])

    def load() -> config.Loaded:
        return config.load(var, order["flags"], path=path)

    load()
    module, _, function = order["tree"].partition(":")
    tree = getattr(import_module(module), function)()
    environment = config.as_environment(order["flags"])
    if path is not None:
        environment[config.FILE_VARIABLE] = str(path)
    code = _supervise(var, tree, server, load, environment, progress)
    server.end()
    os.close(held)
    return code


def _supervise(
    var: Path,
    tree: Tree,
    server: ForkServer,
    load: Callable[[], config.Loaded],
    environment: Mapping[str, str],
    progress: Progress,
) -> int:
    """Supervise `tree` on `var`, whose lock the caller holds, and return the exit code.

    Raises:
        KsiError: the settings or a key cannot be used.
        OSError: the run directory cannot be used.
    """
    import zmq

    from ksi.actors.supervision import reports
    from ksi.actors.supervision.supervisor import EXIT_DEFECT, NAME, Supervisor
    from ksi.transport.identity import (
        Directory,
        KeyRing,
        remove_run_directory,
    )
    from ksi.transport.mailbox import Mailbox, connect, raise_file_limit

    run, in_use = _held_run_directory(var)
    reports.clear_exit(run)
    keys = KeyRing(var)
    certificate = keys.enroll(NAME, "owner")
    directory = _directory(var, tree, load().config, keys)
    raise_file_limit()
    context = zmq.Context()
    mailbox = Mailbox(context, directory.owners[NAME].endpoint, certificate, keys)
    directory.write(var)

    def connect_to(name: str) -> Any:
        place = directory.owners[name]
        return connect(context, place.endpoint, place.key.encode(), certificate)

    codes: list[int] = []
    Supervisor.start(
        var=var,
        run=run,
        mailbox=mailbox,
        server=server,
        connect=connect_to,
        load=load,
        tree=tree,
        environment=environment,
        progress=progress,
        on_exit=codes.append,
    )
    context.term()
    Directory.remove(var)
    if codes == [0]:  # Else it says why not.
        remove_run_directory(var)
    os.close(in_use)
    return codes[0] if codes else EXIT_DEFECT


def _directory(var: Path, tree: Tree, settings: config.Config, keys: KeyRing) -> Directory:
    """Return who owns what and where; enrols those who have no key.

    Raises:
        Conflict, Invalid: an owner could not listen where the settings say. Before anything runs:
            it would end again and again.
    """
    from ksi.actors.supervision.supervisor import NAME
    from ksi.transport.identity import Address, Directory, endpoint
    from ksi.transport.mailbox import require_free
    from ksi.transport.message import CATALOGUE

    names = [spec.name for spec in tree.specs(var, settings) if spec.kind == "owner"]
    publics = {name: keys.enroll(name, "owner").public for name in (NAME, *names)}
    tcp = require_free(_tcp_endpoints(settings.transport, names))
    return Directory(
        commands={each.name: each.owner for each in CATALOGUE.values() if each.changes},
        queries={each.name: each.owner for each in CATALOGUE.values() if not each.changes},
        domains=dict(tree.domains),
        owners={
            name: Address(endpoint(var, name), key.decode(), tcp.get(name, ""))
            for name, key in publics.items()
        },
    )


def _held_run_directory(var: Path) -> tuple[Path, int]:
    """Return the run directory and the descriptor that holds it; sweep where it is elsewhere."""
    from ksi.transport.identity import (
        hold_run_directory,
        make_run_directory,
        sweep_run_directories,
    )

    run = make_run_directory(var)
    held = hold_run_directory(run)
    if run.parent != var:
        sweep_run_directories(run.parent)
    return run, held


def _tcp_endpoints(transport: config.TransportSection, owners: Sequence[str]) -> dict[str, str]:
    """Return where owners listen for other machines. The supervisor does not."""
    from ksi.transport.identity import tcp_endpoint

    if not transport.tcp_host:
        return {}
    first = transport.tcp_port
    return {name: tcp_endpoint(transport.tcp_host, first + n) for n, name in enumerate(owners)}


def _told_to(descriptor: int) -> Progress:
    """Return what writes lines to a pipe and closes it when all are ready.

    Behind an error it stays open as long as this process lives: who reads it waits for that.
    """
    os.set_inheritable(descriptor, False)
    pipe = os.fdopen(descriptor, "w")

    def tell(line: Mapping[str, Any]) -> None:
        if pipe.closed:
            return
        with contextlib.suppress(OSError):  # nobody reads any more: go on without
            pipe.write(json.dumps(line) + "\n")
            pipe.flush()
        if "ready" in line:
            with contextlib.suppress(OSError):
                pipe.close()

    return tell


def _told_on_terminal(line: Mapping[str, Any]) -> None:
    if "child" in line:
        pid, spent_s, phase = line["pid"], line["seconds"], line["phase"]
        text = f"{line['child']:<12} ready  pid {pid}  {spent_s:.3f} s  {phase}"
    elif "ready" in line:
        text = f"ready in {line['seconds']:.3f} s, supervisor pid {line['pid']}; Ctrl-C stops"
    else:
        code, words, hint, _details = line["error"]
        text = f"ksi: {code}: {words}" + (f"\n     {hint}" if hint else "")
    print(text, file=sys.stderr, flush=True)
