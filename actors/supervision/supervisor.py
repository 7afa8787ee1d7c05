"""The supervisor: a process that starts, watches, restarts and stops other processes, its children.

It has no state that outlives it. Its children end with it, however it ends, and what they own is
on disk: so whatever goes wrong here, starting again is right.

Principles, in the words and by the rules of OTP:

- *Children start in order*, each when the one before is ready, and stop in reverse; where the tree
  goes `by_phase`, those of a phase together. While the system comes up, a child that ends before
  it is ready fails the start as a whole.
- *A child that ends by itself* is restarted by its restart type (`restarts.py`): `one_for_one`
  alone, `rest_for_one` with all that started after it. The first time at once, then with backoff.
- *Too many restarts escalate.* More than `intensity` in `period_s` and the supervisor stops all
  children and itself, exits 1 and says why. Each supervised agent sits under an intensity of its
  own: an agent that cannot live becomes FATAL alone, owners and other agents go on.
- *A child that hangs has ended*: no turn for `hung_turn_s`, or `hung_commit_s` in a commit, by its
  stat file. It is killed, and the rule for ended children applies.
- *Ended means ended*: a child is stopped by SIGTERM, after `shutdown_s` by SIGKILL, and nothing
  takes its place before the kernel says that it is gone.

It is an actor: its inbox is a mailbox, its loop runs in the main thread, and nothing in it waits.
A turn takes in what has happened (children that ended, requests, signals, time), then `_advance`
compares what each child should be with what it is and takes the next steps, in order.

Files it writes for others to read, also when it hangs or is gone: `run/children.json` on each
change, `run/supervisor.stat` each turn, `run/supervisor.exit` when it gives up.

Source: Erlang/OTP `supervisor.erl` and `sup_princ`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import pykka
import zmq

from ksi.actors import config, log
from ksi.actors.memory import settle
from ksi.actors.owner import Sender
from ksi.actors.stat import StatWriter, read_stat
from ksi.actors.supervision import checkpointed, reports
from ksi.actors.supervision.checkpointing import Checkpoints
from ksi.actors.supervision.child import ChildSpec
from ksi.actors.supervision.children import Child, next_to_start, next_to_stop, phase_of, rest_of
from ksi.actors.supervision.desk import STORE, Desk
from ksi.actors.supervision.forkserver import ForkServer, Running
from ksi.actors.supervision.probe import Probe
from ksi.actors.supervision.registrar import REGISTRY, Fate, Registrar
from ksi.actors.supervision.restarts import (
    Backoff,
    Intensity,
    add_restart,
    backoff_s,
    exit_words,
    is_restarted,
    within,
)
from ksi.actors.supervision.system import (
    ChildStatus,
    CreateCheckpoint,
    DevAction,
    DevCheckpoint,
    DevCheckpoints,
    DevRestore,
    Done,
    ListCheckpoints,
    Making,
    PruneCheckpoints,
    Pruned,
    RestartChild,
    ShowCheckpoint,
    StartChild,
    State,
    Status,
    Stop,
    StopChild,
    SystemStatus,
    VerifyCheckpoint,
)
from ksi.actors.supervision.tree import Tree
from ksi.storage.errors import Corrupt
from ksi.storage.store import distrust_view
from ksi.transport import wire
from ksi.transport.errors import (
    Conflict,
    Draining,
    Internal,
    KsiError,
    NotFound,
    Quota,
)
from ksi.transport.mailbox import Letter, Mailbox, Post
from ksi.transport.message import Message, Reply

NAME: Final = "supervisor"
AGENTS_MAX: Final = 1024  # Supervised at once: four descriptors and some memory each.
LOOK_S: Final = 0.5  # How often children are looked at for hanging, if nothing else happens.
READY_LOOK_S: Final = 0.002  # How often a starting child is asked whether it is ready ...
# ... and how often when it takes long, or nobody waits for us to know: its clients need that core.
READY_LOOK_S_MAX: Final = 0.02
# How memory that is not what it should be ends a process.
FAULTS: Final = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE}
HURRY_S: Final = 0.5  # What children may still take to stop after the second signal.
EXIT_GAVE_UP: Final = 1
EXIT_DEFECT: Final = 70  # EX_SOFTWARE: a turn of the supervisor itself failed

Progress = Callable[[Mapping[str, Any]], None]
Sockets = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]  # a connection and its monitor


class Supervisor(pykka.ThreadingActor):
    """The actor. `Supervisor.start(...)` runs its loop here and returns when all is stopped.

    Args:
        var, run: the directory it holds, and where what lives as long as a run goes.
        mailbox: its inbox; it closes it.
        server: forks its children.
        connect: makes a connection to an owner, by name.
        load: reads the settings, now and on SIGHUP.
        tree: its own children, in the order of their start.
        environment: set for every child on top of the supervisor's own.
        progress: told each child that becomes ready, and in the end that all are, or why not.
        on_exit: told the exit code in the end: 0, or 1 when it gave up.
    """

    def __init__(
        self,
        *,
        var: Path,
        run: Path,
        mailbox: Mailbox,
        server: ForkServer,
        connect: Callable[[str], Sockets],
        load: Callable[[], config.Loaded],
        tree: Tree,
        environment: Mapping[str, str],
        progress: Progress,
        on_exit: Callable[[int], None],
    ) -> None:
        self._mailbox = mailbox
        super().__init__()
        self._config = settings = load().config
        self._on_exit = on_exit
        self._exit_code = 0
        self._var = var
        self._run = run
        self._server = server
        self._connect = connect
        self._load = load
        self._settings = settings.supervisor
        self._tree = tree
        self._environment = environment
        self._progress = progress
        self._log = log.configure(var, NAME, settings.log.level)
        self._desk = Desk(NAME, self._carry, self._log)
        self._stat = StatWriter(run / f"{NAME}.stat")
        self._own = [Child(spec) for spec in tree.specs(var, settings)]
        self._agents: dict[str, Child] = {}
        self._registrar: Registrar | None = None
        self._checkpoints: Checkpoints | None = None
        if tree.has_checkpoints:
            self._checkpoints = Checkpoints(var, run, self._spawn_beside, self._unwatch, self._log)
        self._restarts: tuple[float, ...] = ()  # of all its own children, newest first
        self._shared: list[object] = []  # what several of them have ended of, counted in there once
        self._ended: list[Child] = []
        self._signals: list[int] = []
        self._up = False  # all its own children have been ready
        self._stopping = False
        self._hurry_s: float | None = None  # when what is left is killed
        self._changed = True
        self._started_at = time.time()
        self._started_s = self._looked_s = time.monotonic()

    # pykka: the inbox is the mailbox and the loop runs in the thread that starts the actor.

    def _create_actor_inbox(self) -> Any:  # type: ignore[override]  # static in pykka
        return self._mailbox

    def _start_actor_loop(self) -> None:
        self._actor_loop()

    def on_start(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        self._mailbox.wake_on_signals()
        self._mailbox.timeout_s = 0.0
        if any(child.name == REGISTRY for child in self._own):
            sockets = self._connect(REGISTRY)
            self._registrar = Registrar(*sockets, self._running_agents, self._log)
            for socket in self._registrar.sockets:
                self._mailbox.watch(socket, lambda: None)  # a turn is all it takes

    def on_receive(self, message: Any) -> None:
        """One turn. A defect in it ends the process at once; the kernel ends the children."""
        try:
            self._turn(message)
        except BaseException as error:
            self._log.exception("a turn of the supervisor failed")
            with contextlib.suppress(OSError):
                reports.write_exit(self._run, EXIT_DEFECT, f"a defect: {error!r}"[:1000])
            os._exit(EXIT_DEFECT)

    def on_stop(self) -> None:
        if self._registrar is not None:
            for socket in self._registrar.sockets:
                self._mailbox.unwatch(socket)
            self._registrar.close()
        self._mailbox.close()
        self._stat.close()
        self._on_exit(self._exit_code)

    def _turn(self, post: Post) -> None:
        now_s = time.monotonic()
        self._stat.begin_turn(now_s)
        while self._signals:
            self._signalled(self._signals.pop(0))
        while self._ended:
            self._has_ended(self._ended.pop(0), now_s)
        answers = [answer for letter in post.letters for answer in self._answers(letter)]
        self._look(now_s)
        self._advance(now_s)
        if self._changed:
            self._publish()
        if self._registrar is not None:
            self._registrar.turn(now_s)
        for route, frame in answers:  # now: whoever is answered finds it published
            self._stat.replies_dropped += not self._mailbox.send(route, frame)
        self._stat.state = "draining" if self._stopping else "running"
        self._stat.end_turn(time.monotonic())
        self._mailbox.timeout_s = self._rest_s(time.monotonic())

    # What has happened.

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reload()
        elif self._stopping:
            self._log.warning("asked to stop again: in a hurry now")
            self._hurry_s = time.monotonic() + HURRY_S
        else:
            self._stop_all(signal.Signals(number).name)

    def _reload(self) -> None:
        """Take up new settings. Children keep running and read theirs when they next start."""
        try:
            settings = self._load().config
            self._log = log.configure(self._var, NAME, settings.log.level)
        except (KsiError, OSError) as error:
            hint = getattr(error, "hint", None)
            self._log.error("the settings are as before", error=str(error), hint=hint)
            return
        self._config, self._settings = settings, settings.supervisor
        fresh = {spec.name: spec for spec in self._tree.specs(self._var, settings)}
        for child in self._own:
            child.spec = fresh.get(child.name, child.spec)
        self._log.info("settings reloaded")

    def _has_ended(self, child: Child, now_s: float) -> None:
        """A child's process is gone: see to what follows."""
        running, child.running = child.running, None
        if running is None:
            return
        self._mailbox.unwatch(running.pidfd)
        code = running.ended()
        shared = running.server if code is None else None  # It took its children with it.
        if child.probe is not None:
            child.probe.close()
            child.probe = None
        child.last_exit = f"killed: {child.hung}" if child.hung else exit_words(code)
        if code in FAULTS and not child.is_agent:
            with contextlib.suppress(Corrupt, OSError):
                distrust_view(self._var / "db" / child.name)
        child.hung = child.kill_s = None
        self._is_down(child, code, now_s, shared)

    def _is_down(self, child: Child, code: int | None, now_s: float, shared: object) -> None:
        """A child has no process (any more), as was asked for or by itself.

        `shared`: what others may have ended of, too, as of the end of their fork server, or None.
        """
        if child.leaves:
            child.renew = False
            self._set(child, "STOPPED")
        elif not (self._up or child.was_ready or child.is_agent):
            self._set(child, "STOPPED")
            self._give_up(
                f"{child.name} ended before it was ready ({child.last_exit})",
                hint=log.last_words(log.output(self._var, child.name)),
            )
        else:
            self._restart(child, code, now_s, shared)

    def _restart(self, child: Child, code: int | None, now_s: float, shared: object) -> None:
        """Restart a child that has ended by itself, or not: by its type and the intensity."""
        if not is_restarted(child.spec.restart, code):
            child.wanted = False
            self._set(child, "STOPPED")
            return
        intensity = self._intensity(child)
        child.restarts, few = add_restart(child.restarts, now_s, intensity)
        if not child.is_agent:
            few = self._add_restart(shared, now_s, intensity) and few
        if not few:
            child.wanted = False
            self._set(child, "FATAL")
            if not child.is_agent:
                self._give_up(
                    f"{child.name} ended again ({child.last_exit}): more than "
                    f"{intensity.restarts_max} restarts in {intensity.period_s:g} s"
                )
            return
        child.restarts_total += 1
        backoff = Backoff(self._settings.backoff_first_s, self._settings.backoff_max_s)
        child.due_s = now_s + backoff_s(len(child.restarts), random.random(), backoff)
        self._set(child, "BACKOFF")
        if not child.is_agent and self._tree.strategy == "rest_for_one":
            for later in rest_of(self._own, child):
                later.renew = later.running is not None

    def _add_restart(self, shared: object, now_s: float, intensity: Intensity) -> bool:
        """Add a restart to those of all its own children, which are under one intensity together;
        return whether they are few enough. What is shared counts once."""
        if not within(self._restarts, now_s, intensity.period_s):
            self._shared.clear()
        if shared in self._shared:
            return True
        if shared is not None:
            self._shared.append(shared)
        self._restarts, few = add_restart(self._restarts, now_s, intensity)
        return few

    def _intensity(self, child: Child) -> Intensity:
        settings = self._settings
        if child.is_agent:
            return Intensity(settings.agent_intensity, settings.agent_period_s)
        return Intensity(settings.intensity, settings.period_s)

    def _look(self, now_s: float) -> None:
        """Find children that have become ready, or that hang."""
        for child in self._own:
            if (
                child.probe is not None
                and child.running is not None
                and child.probe.is_ready(child.running.pid)
            ):
                self._is_ready(child)
        late = now_s - self._looked_s > 4 * LOOK_S  # we were stopped: perhaps they were, too
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        for child in self._own:
            if child.running is not None and child.kill_s is None and not late:
                child.hung = self._hung(child, child.running, now_s)
                if child.hung is not None:
                    self._log.error("killed a hung child", child=child.name, hung=child.hung)
                    child.running.signal(signal.SIGKILL)
        for child in self._all():
            log.trim(log.output(self._var, child.name))

    def _hung(self, child: Child, running: Running, now_s: float) -> str | None:
        """Return how a child hangs, in words, or None."""
        stat = read_stat(self._run / f"{child.name}.stat")
        if stat is not None and stat.pid != running.pid:
            stat = None  # of its predecessor
        if child.state == "STARTING":
            turned_s = max(running.started_s, stat.turn_monotonic if stat else 0.0)
            silent_s = now_s - turned_s
            return f"not ready for {silent_s:.1f} s" if silent_s > child.spec.start_s else None
        if stat is None:
            return None
        settings = self._settings
        return stat.hung(
            now_s, turn_s_max=settings.hung_turn_s, commit_s_max=settings.hung_commit_s
        )

    def _is_ready(self, child: Child) -> None:
        assert child.probe is not None
        assert child.running is not None
        child.probe.close()
        child.probe = None
        child.was_ready = True
        self._set(child, "RUNNING")
        if self._up:
            return
        spent_s = round(time.monotonic() - child.running.started_s, 4)
        told = {"phase": child.spec.phase, "pid": child.running.pid, "seconds": spent_s}
        self._progress({"child": child.name, **told})
        if all(each.state == "RUNNING" for each in self._own):
            self._up = True
            spent_s = round(time.monotonic() - self._started_s, 4)
            settle()
            self._progress({"ready": True, "pid": os.getpid(), "seconds": spent_s})

    # What is to be done: the next steps from what each child is to what it should be.

    def _advance(self, now_s: float) -> None:
        self._stop_next(now_s)
        self._start_next(now_s)
        if self._up and not self._stopping:
            if self._checkpoints is not None:
                self._checkpoints.turn(self._config.checkpoint, now_s)
            if all(child.state == "RUNNING" for child in self._own):
                self._server.keep_spare(self._newest())
        if (
            self._stopping
            and not any(child.running for child in self._all())
            and self._has_last_checkpoint()
        ):
            self._log.info("stopped", exit_code=self._exit_code)
            self.stop()

    def _newest(self) -> int | None:
        """Return the process of its own that was started last: it has done little but start.

        Of the plain owners: what one with followers has touched besides is not worth its memory.
        """
        plain = [child.running for child in self._own if child.spec.phase == "owners"]
        running = [each for each in plain if each is not None]
        return max(running, key=lambda each: each.started_s).pid if running else None

    def _has_last_checkpoint(self) -> bool:
        """Whether nothing is to be done for the checkpoint of an orderly stop, or not any more."""
        if self._checkpoints is None:
            return True
        if not self._up or self._exit_code:
            return self._checkpoints.making is None
        return self._checkpoints.is_last_taken(self._config.checkpoint)

    def _stop_next(self, now_s: float) -> None:
        """Stop what has to stop: agents together and before owners, owners one by one."""
        agents = [child for child in self._agents.values() if child.running and child.leaves]
        if self._hurry_s is not None:
            own = [child for child in self._own if child.running]
        else:
            by_phase = self._tree.by_phase
            own = [] if agents and self._stopping else next_to_stop(self._own, by_phase=by_phase)
        for child in (*agents, *own):
            self._stop_child(child, now_s)

    def _stop_child(self, child: Child, now_s: float) -> None:
        assert child.running is not None
        if child.kill_s is None:
            child.kill_s = now_s + child.spec.shutdown_s
            child.running.signal(signal.SIGTERM)
        if self._hurry_s is not None:
            child.kill_s = min(child.kill_s, self._hurry_s)
        if now_s >= child.kill_s:
            child.running.signal(signal.SIGKILL)
            child.kill_s = now_s + LOOK_S  # again, should it need to be

    def _start_next(self, now_s: float) -> None:
        for child in self._startable():
            if now_s >= child.due_s:
                self._start_child(child, now_s)

    def _startable(self) -> list[Child]:
        """Return what may start, each when it is due."""
        if self._stopping:
            return []
        agents = [child for child in self._agents.values() if child.wanted and not child.running]
        tree = self._tree
        own = next_to_start(self._own, tree.strategy, up=self._up, by_phase=tree.by_phase)
        return [*own, *agents]

    def _start_child(self, child: Child, now_s: float) -> None:
        """Start a process; that it cannot be started counts as an end of it."""
        try:
            self._spawn(child)
        except (OSError, KsiError) as error:
            child.last_exit = f"not started: {error}"
            self._is_down(child, None, now_s, shared=str(error))  # None starts for want of it.

    def _spawn(self, child: Child) -> None:
        spec = child.spec
        if spec.kind == "owner":
            (self._run / spec.name).unlink(missing_ok=True)  # it is there again when it listens
        running = self._server.spawn(spec, self._var, self._environment_of(spec))
        child.running = running
        child.starts += 1
        self._mailbox.watch(running.pidfd, lambda: self._ended.append(child))
        if spec.kind == "agent":
            self._set(child, "RUNNING")
        else:
            connect = functools.partial(self._connect, spec.name)
            child.probe = Probe(
                self._run / f"{spec.name}.stat", connect if spec.kind == "owner" else None
            )
            self._set(child, "STARTING")

    def _spawn_beside(self, spec: ChildSpec, has_ended: Callable[[], None]) -> Running:
        """Start a child that is none of the tree's: it does one thing and ends."""
        running = self._server.spawn(spec, self._var, self._environment_of(spec))
        self._mailbox.watch(running.pidfd, has_ended)
        return running

    def _unwatch(self, running: Running) -> None:
        self._mailbox.unwatch(running.pidfd)

    def _environment_of(self, spec: ChildSpec) -> dict[str, str]:
        environment = {**self._environment, **spec.env, "KSI_VAR": str(self._var)}
        if spec.kind == "agent":
            environment["KSI_AGENT"] = spec.identity or spec.name
            path = environment.get("PATH", os.environ.get("PATH", os.defpath))
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
        return environment

    def _stop_all(self, why: str) -> None:
        """Begin to stop; `_advance` does it."""
        if self._stopping:
            return
        self._log.info("stopping", why=why)
        self._stopping = True
        if not self._up and self._exit_code == 0:
            self._progress({"error": Draining(f"stopped while starting: {why}").to_wire()})
        if self._checkpoints is not None:
            self._checkpoints.end()
        for child in self._all():
            child.wanted = child.renew = False
            if child.running is None and child.state not in ("STOPPED", "FATAL"):
                self._set(child, "STOPPED")

    def _give_up(self, why: str, *, hint: str | None = None) -> None:
        """Escalate: stop everything, exit 1, and leave the reason where it is found."""
        if self._stopping:
            return
        self._exit_code = EXIT_GAVE_UP
        self._log.error("gave up", why=why)
        with contextlib.suppress(OSError):
            reports.write_exit(self._run, EXIT_GAVE_UP, f"{why}; {hint}" if hint else why)
        if not self._up:
            self._progress({"error": Internal(why, hint=hint).to_wire()})
        self._stop_all("gave up")

    # What it is asked.

    def _answers(self, letter: Letter) -> Iterator[tuple[bytes, bytes]]:
        """Take a letter in; yield where each answer to it goes, and its frame."""
        identity = self._mailbox.sender_of(letter.sender)
        sender = None if identity is None else Sender(*identity)
        for kind, items in self._desk.take(letter.payload, sender, letter.arrived_s):
            frame = wire.OwnerFrame(wire.VERSION, kind, STORE, 0, items)
            yield letter.route, wire.encode(frame)

    def _carry(self, message: Message, _sender: Sender) -> Reply:
        """Do what a message asks, or refuse."""
        match message:
            case Status():
                return self._status()
            case Stop():
                self._stop_all("system:stop")
                return Done(name=NAME, pid=os.getpid())
            case RestartChild(owner=name):
                return self._renew(_find(self._all(), name))
            case StartChild():
                return self._start_agent(message)
            case StopChild(name=name, force=force):
                return self._stop_agent(name, force)
        if self._checkpoints is not None:
            return self._about_checkpoints(message, self._checkpoints)
        raise AssertionError(message)

    def _about_checkpoints(self, message: Message, made: Checkpoints) -> Reply:
        match message:
            case CreateCheckpoint():
                self._require_open()
                return Making(id=made.create("hand", self._config.checkpoint))
            case DevCheckpoint(action=action):
                return self._dev_checkpoint(action, made)
            case DevRestore(id=checkpoint_id):
                raise Conflict(
                    "nothing is restored while the system runs",
                    hint=f"ksi stop; ksi restore {checkpoint_id}; ksi start",
                )
            case VerifyCheckpoint(id=checkpoint_id):
                return checkpointed.verified(self._var, checkpoint_id)
            case ListCheckpoints():
                return checkpointed.listed(self._var, self._run, made.making)
            case ShowCheckpoint(id=checkpoint_id):
                return checkpointed.find(self._var, checkpoint_id)
            case PruneCheckpoints(keep=keep):
                self._require_open()
                return Pruned(removed=checkpointed.prune(self._var, keep))
        raise AssertionError(message)

    def _dev_checkpoint(self, action: DevAction, made: Checkpoints) -> DevCheckpoints:
        begun = None
        if action == "create":
            self._require_open()
            begun = made.create("hand", self._config.checkpoint)
        elif action != "status":
            raise Conflict(
                f"dev:checkpoint has no {action} any more: requests are kept where they wait",
                hint="completion:list, completion:status, completion:cancel",
            )
        found = checkpointed.listed(self._var, self._run, made.making)
        newest = next((each.id for each in found.checkpoints), None)
        return DevCheckpoints(**msgspec.structs.asdict(found), id=begun or newest)

    def _status(self) -> SystemStatus:
        return SystemStatus(
            pid=os.getpid(),
            started_at=self._started_at,
            stopping=self._stopping,
            phase=phase_of(self._own),
            children=[child.status() for child in self._all()],
        )

    def _renew(self, child: Child) -> Done:
        self._require_open()
        child.wanted = True
        child.renew = child.running is not None
        child.due_s = 0.0
        return Done(name=child.name, pid=child.pid)

    def _start_agent(self, message: StartChild) -> ChildStatus:
        self._require_open()
        known = self._agents.get(message.name)
        if known is not None and (known.running or known.wanted):
            self._report(known)  # whoever asks does not know
            text = f"{message.name} is {known.state} already"
            raise Conflict(text, state=known.state, pid=known.pid)
        try:
            return self._begin_agent(message, known)
        except (KsiError, OSError) as error:  # Whoever asked for it waits for news of it.
            why = error.text if isinstance(error, KsiError) else f"not started: {error}"
            self._tell(message.name, "failed", exit=why)
            raise

    def _begin_agent(self, message: StartChild, known: Child | None) -> ChildStatus:
        if any(child.name == message.name for child in self._own):
            raise Conflict(f"{message.name} is the name of an owner", hint="choose another name")
        if known is None and len(self._agents) >= AGENTS_MAX:
            raise Quota(f"{AGENTS_MAX} agents are supervised already", limit=AGENTS_MAX)
        spec = ChildSpec(
            name=message.name,
            kind="agent",
            arguments=tuple(message.argv),
            restart=message.restart,
            shutdown_s=message.shutdown_s,
            env=message.env,
            cwd=message.cwd,
            identity=message.identity,
        )
        child = Child(spec)
        self._spawn(child)
        self._agents[message.name] = child
        return child.status()

    def _stop_agent(self, name: str, force: bool) -> Done:
        if name not in self._agents:
            self._tell(name, "exited")  # whoever asks does not know
        child = _find(self._agents.values(), name)
        child.wanted = child.renew = False
        if child.running is None:
            self._set(child, "STOPPED")
        elif force:
            child.kill_s = 0.0
        return Done(name=child.name, pid=child.pid)

    def _require_open(self) -> None:
        if self._stopping:
            raise Draining("the system is stopping")

    # What others are told.

    def _set(self, child: Child, state: State) -> None:
        """Enter a state; log it, publish it, report it."""
        child.state = state
        child.since = time.time()
        self._changed = True
        say = self._log.info if state in ("STARTING", "RUNNING", "STOPPED") else self._log.warning
        say(
            "child",
            child=child.name,
            state=state,
            child_pid=child.pid,
            last_exit=child.last_exit,
            restarts=child.restarts_total,
        )
        if child.is_agent:
            self._report(child)
            if state == "STOPPED":
                self._agents.pop(child.name, None)

    def _report(self, child: Child) -> None:
        """Tell the registry what has become of a supervised agent."""
        fates: dict[State, Fate] = {"RUNNING": "started", "FATAL": "failed"}
        fate = fates.get(child.state, "exited")
        again = child.state == "BACKOFF"
        self._tell(child.name, fate, pid=child.pid, exit=child.last_exit, again=again)

    def _tell(
        self,
        agent_id: str,
        fate: Fate,
        *,
        pid: int | None = None,
        exit: str | None = None,
        again: bool = False,
    ) -> None:
        if self._registrar is not None and not self._stopping:
            self._registrar.report(agent_id, fate, pid=pid, exit=exit, again=again)

    def _publish(self) -> None:
        """Write `run/children.json`: `ksi status` reads it, whatever has become of us."""
        self._changed = False
        try:
            reports.write_children(self._run, self._status())
        except OSError as error:
            self._changed = True  # It is tried again in the next turn.
            self._log.error("the children cannot be published", error=str(error))

    def _rest_s(self, now_s: float) -> float:
        """Return how long nothing is to be done unless something happens."""
        due_s = [self._looked_s + LOOK_S]
        due_s += [child.due_s for child in self._startable()]
        due_s += [child.kill_s for child in self._all() if child.kill_s is not None]
        for child in self._own:
            if child.probe is not None and child.running is not None:
                later = self._up or now_s - child.running.started_s > 1.0
                due_s.append(now_s + (READY_LOOK_S_MAX if later else READY_LOOK_S))
        return max(0.0, min(due_s) - now_s)

    def _running_agents(self) -> list[str]:
        return [child.name for child in self._agents.values() if child.wanted]

    def _all(self) -> list[Child]:
        return [*self._own, *self._agents.values()]


def _find(children: Iterable[Child], name: str) -> Child:
    by_name = {child.name: child for child in children}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, n=1)
    hint = f"did you mean {near[0]}?" if near else "ksi status lists them"
    raise NotFound(f"the supervisor has no child {name!r} of this kind"[:300], hint=hint)
