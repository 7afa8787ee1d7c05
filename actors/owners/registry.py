"""The registry: who exists, who is alive, and which agents the system runs.

Owns agents and their identities. What a process runs is the supervisor's; the registry decides
that it should, remembers its command line, and asks for it through the outbox.

- An agent speaks for itself: it registers, beats and leaves under the identity of its key. An
  operator may do so for others. An agent ends or restarts itself and those it has spawned.
- Each registration draws the next epoch, one counter for all: an epoch names one process for good,
  also when an agent was forgotten in between. A beat that carries a former one is refused.
- With `lease_s` an agent that is silent for that long becomes suspect, after twice that lost; each
  happens once and is announced once. A beat makes it active again. Time is owner time.
- A supervised agent is `starting` until it is heard of and `stopping` until it has ended. If the
  supervisor says nothing for `REPORT_S`, it is taken to have ended.
- Agents that have gone are kept for a while, the longest gone are forgotten first. Identities stay
  until they are removed.

Source: "KSI State Management Analysis" 3, agent service: operations, selectors, identities.
Suspect, then lost: lease-based failure detection with one grace period.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, Final

import msgspec

from ksi.actors.declarations.registry import (
    LAUNCH_BYTES_MAX,
    SELECTED_MAX,
    Agent,
    AgentDetails,
    AgentForgotten,
    AgentPage,
    AgentRegistered,
    AgentSeen,
    AgentSpawned,
    AgentUnregistered,
    AgentView,
    Beat,
    ChildStart,
    ChildStop,
    CreateIdentity,
    Describe,
    Details,
    DiscoverPeers,
    Drawn,
    Identity,
    IdentityPage,
    IdentityRemoved,
    IdentitySet,
    IdentityView,
    Launch,
    ListAgents,
    ListIdentities,
    Muster,
    Presence,
    Pulse,
    Register,
    Registration,
    RegistryTables,
    RemoveIdentity,
    Report,
    Restart,
    Selected,
    Selection,
    SessionHeartbeat,
    Spawn,
    Status,
    StatusChanged,
    Terminate,
    Unregister,
    UpdateIdentity,
)
from ksi.actors.owner import (
    Announcement,
    Decision,
    Event,
    Given,
    Owner,
    Reply,
    Send,
    Sender,
    Tick,
)
from ksi.transport.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Quota,
    StaleEpoch,
    TooLarge,
)
from ksi.transport.limits import BATCH_BYTES_MAX
from ksi.transport.message import encode
from ksi.transport.moments import due_ms, whole_ms

AGENTS_MAX: Final = 100_000  # Agents that are here: what `list` and selectors may have to walk.
GONE_MAX: Final = 1000  # Agents that have left: kept for those who look why, then forgotten.
IDENTITIES_MAX: Final = 100_000  # They are kept for good, so somebody has to remove some.
PLAIN_BYTES_MAX: Final = 16 << 10  # An identity, or the metadata of an agent: pages list many.
SENDS_BYTES_MAX: Final = BATCH_BYTES_MAX  # Command lines in one decision: it is one record.
DUE_MAX: Final = 256  # Deadlines looked at in one tick, and agents forgotten in one.
SCAN_ROWS_MAX: Final = 10_000  # Rows one query looks at before it returns with a cursor.
REPORT_S: Final = 60.0  # The supervisor starts and stops in less, or has forgotten the agent.
GONE: Final = frozenset({"exited", "failed", "terminated", "unregistered"})


class Registry(Owner[RegistryTables]):
    """The owner of all agents and identities."""

    name = "registry"
    tables = RegistryTables
    domains = ("agent",)
    routine = (AgentSeen,)
    private = ("launch",)
    events = (
        AgentSeen
        | AgentRegistered
        | AgentSpawned
        | StatusChanged
        | AgentUnregistered
        | AgentForgotten
        | IdentitySet
        | IdentityRemoved
    )

    def decide(
        self, command: Any, sender: Sender, tables: RegistryTables, given: Given
    ) -> Decision:
        match command:
            case Beat():
                return _beat(command, sender, tables, given)
            case Tick():
                return _tick(tables, given)
            case Register():
                return _register(command, sender, tables, given)
            case Unregister():
                return _unregister(command, sender, tables, given)
            case Spawn():
                return _spawn(command, sender, tables, given)
            case Terminate():
                return _terminate(command, sender, tables, given)
            case Restart():
                return _restart(command, sender, tables, given)
            case Report():
                return _report(command, sender, tables, given)
            case Muster():
                return _muster(command, sender, tables, given)
            case CreateIdentity():
                return _create_identity(command, sender, tables, given)
            case UpdateIdentity():
                return _update_identity(command, sender, tables, given)
            case RemoveIdentity():
                return _remove_identity(command, sender, tables)
            case _:
                raise TypeError(command)

    def apply(self, event: Any, tables: RegistryTables) -> None:
        match event:
            case AgentSeen():
                _agent_seen(event, tables)
            case AgentRegistered():
                _agent_registered(event, tables)
            case AgentSpawned():
                _agent_spawned(event, tables)
            case StatusChanged():
                _status_changed(event, tables)
            case AgentUnregistered():
                _agent_unregistered(event, tables)
            case AgentForgotten():
                _agent_forgotten(event, tables)
            case IdentitySet():
                _identity_set(event, tables)
            case IdentityRemoved():
                tables.identities.delete(event.agent_id)
            case _:
                raise TypeError(event)

    def answer(self, query: Any, tables: RegistryTables) -> Reply:
        match query:
            case Describe():
                return _describe(query, tables)
            case ListAgents():
                return _list(query, tables)
            case DiscoverPeers():
                return _discover(query, tables)
            case ListIdentities():
                return _list_identities(query, tables)
            case _:
                raise TypeError(query)

    def announce(self, event: Any) -> Iterable[Announcement]:
        match event:
            case AgentRegistered():
                told = {"epoch": event.epoch, "kind": event.kind}
                return (_told(event.agent_id, "registered", event.by, **told),)
            case AgentSpawned():
                return (_told(event.agent_id, "state", event.by, status="starting"),)
            case AgentUnregistered():
                return (_told(event.agent_id, "unregistered", event.by),)
            case StatusChanged(status="suspect" | "lost" | "active"):
                return (_told(event.agent_id, event.status, event.by),)
            case StatusChanged():
                told = {"status": event.status, "pid": event.pid, "exit": event.exit}
                return (_told(event.agent_id, "state", event.by, **told),)
            case _:
                return ()


OWNER = Registry()


def _beat(command: Beat, sender: Sender, tables: RegistryTables, given: Given) -> Decision:
    agent_id = _speaks_for(command.agent_id, sender)
    agent = _present(tables, agent_id, command.epoch)
    event: Event = AgentSeen(agent_id, given.now, given.time_s)
    status = agent.status
    if status not in ("active", "stopping"):
        event, status = _changed(agent_id, agent, "active", sender.name, given), "active"
    reply = Presence(agent_id=agent_id, epoch=agent.epoch, status=status)
    beat = SessionHeartbeat(agent_id=agent_id)
    told = Send("sessions", "session:heartbeat", beat, unless_waiting=True)
    return Decision((event,), reply, (told,))


def _tick(tables: RegistryTables, given: Given) -> Decision:
    """Let what is overdue happen, and forget the longest gone: a bounded number of each."""
    events: list[Event] = []
    sends: list[Send] = []
    overdue = tables.deadlines.range((0,), (whole_ms(given.time_s) + 1,))
    for (_, agent_id), _row in islice(overdue, DUE_MAX):
        agent = _known(tables, agent_id)
        if agent.status == "active":
            events.append(_changed(agent_id, agent, "suspect", "", given))
        elif agent.status == "suspect":
            events.append(_changed(agent_id, agent, "lost", "", given))
        else:
            status: Status = "failed" if agent.status == "starting" else agent.then
            why = f"nothing was heard of it for {REPORT_S:g} s"
            events.append(_ended(agent_id, agent, status, why, "", given))
            if status == "starting":
                sends += _launch(agent_id, tables)
    surplus = max(0, tables.gone.count() - GONE_MAX)
    for (_, agent_id), _row in islice(tables.gone.range(), min(surplus, DUE_MAX)):
        events.append(AgentForgotten(agent_id))
    return Decision(tuple(events), None, tuple(sends))


def _register(command: Register, sender: Sender, tables: RegistryTables, given: Given) -> Decision:
    agent_id = _speaks_for(command.agent_id, sender)
    agent = tables.agents.get(agent_id)
    _require_room(agent, tables)
    kind, lease_s, pid = command.kind, command.lease_s, command.pid
    capabilities, metadata = command.capabilities, command.metadata
    if agent is not None and agent.supervised and agent.status not in GONE:
        kind, lease_s = kind or agent.kind, lease_s or agent.lease_s
        pid = agent.pid or pid  # what the supervisor says goes before what the process says
        capabilities = agent.capabilities if capabilities is None else capabilities
        metadata = _details(tables, agent_id).metadata if metadata is None else metadata
    _require_small(metadata or {}, "the metadata")
    epoch = _next_epoch(tables)
    event = AgentRegistered(
        agent_id,
        epoch,
        kind or "agent",
        sorted({*(capabilities or ())}),
        lease_s,
        pid,
        metadata or {},
        sender.name,
        given.now,
        given.time_s,
    )
    reply = Registration(
        agent_id=agent_id,
        epoch=epoch,
        lease_s=event.lease_s,
        status=_status_of_registered(agent),
        registered_at=given.now,
    )
    return Decision((event,), reply)


def _unregister(
    command: Unregister, sender: Sender, tables: RegistryTables, given: Given
) -> Decision:
    agent_id = _speaks_for(command.agent_id, sender)
    agent = _present(tables, agent_id, command.epoch)
    event = AgentUnregistered(agent_id, sender.name, given.now, given.time_s)
    status = _status_of_unregistered(agent)
    return Decision((event,), Presence(agent_id=agent_id, epoch=agent.epoch, status=status))


def _spawn(command: Spawn, sender: Sender, tables: RegistryTables, given: Given) -> Decision:
    agent_id = command.agent_id or f"agent_{next(given.ids)}"
    agent = tables.agents.get(agent_id)
    if agent is not None and agent.status not in GONE:
        raise Conflict(
            f"agent {agent_id} is {agent.status} already",
            hint=f"choose another agent_id, or: ksi ask agent:restart --agent-id {agent_id}",
            status=agent.status,
            epoch=agent.epoch,
        )
    if agent is not None or tables.identities.get(agent_id) is not None:
        _require_authority(sender, agent_id, agent, "spawn")
    _require_room(agent, tables)
    launch = Launch(command.argv, command.env, command.cwd, command.restart)
    size = _size(launch)
    if size > LAUNCH_BYTES_MAX:
        raise TooLarge(
            f"a command line of {size} bytes is over the limit of {LAUNCH_BYTES_MAX}",
            size_bytes=size,
            limit_bytes=LAUNCH_BYTES_MAX,
        )
    _require_small(command.metadata, "the metadata")
    epoch = _next_epoch(tables)
    reply = Registration(
        agent_id=agent_id,
        epoch=epoch,
        lease_s=command.lease_s,
        status="starting",
        registered_at=given.now,
    )
    if command.dry_run:
        return Decision((), reply)
    event = AgentSpawned(
        agent_id,
        epoch,
        command.kind,
        sorted({*command.capabilities}),
        command.lease_s,
        command.metadata,
        launch,
        sender.name,
        given.now,
        given.time_s,
    )
    return Decision((event,), reply, (_child_start(agent_id, launch),))


def _terminate(
    command: Terminate, sender: Sender, tables: RegistryTables, given: Given
) -> Decision:
    found, skipped, more = _select(command, sender, tables, given)
    events: list[Event] = []
    sends: list[Send] = []
    for agent_id, agent in found:
        if agent.status in GONE:
            skipped[agent_id] = f"is {agent.status} already"
        elif agent.supervised:
            events.append(_stopping(agent_id, agent, "terminated", sender, given))
            sends.append(_child_stop(agent_id, command.force))
        else:
            events.append(_ended(agent_id, agent, "terminated", None, sender.name, given))
    return _selected(command, events, sends, skipped, more)


def _restart(command: Restart, sender: Sender, tables: RegistryTables, given: Given) -> Decision:
    found, skipped, more = _select(command, sender, tables, given)
    events: list[Event] = []
    sends: list[Send] = []
    room = SENDS_BYTES_MAX
    for agent_id, agent in found:
        launch = _details(tables, agent_id).launch
        if launch is None:
            skipped[agent_id] = "is not supervised"
        elif agent.status in GONE:
            room -= _size(launch)
            if room < 0:
                more = True
                break
            events.append(_ended(agent_id, agent, "starting", agent.exit, sender.name, given))
            sends.append(_child_start(agent_id, launch))
        else:
            events.append(_stopping(agent_id, agent, "starting", sender, given))
            sends.append(_child_stop(agent_id, command.force))
    return _selected(command, events, sends, skipped, more)


def _selected(
    command: Selection,
    events: list[Event],
    sends: list[Send],
    skipped: dict[str, str],
    more: bool,
) -> Decision:
    agent_ids = [event.agent_id for event in events if isinstance(event, StatusChanged)]
    reply = Selected(agent_ids=agent_ids, skipped=skipped, more=more, dry_run=command.dry_run)
    if command.dry_run:
        return Decision((), reply)
    return Decision(tuple(events), reply, tuple(sends))


def _select(
    command: Selection, sender: Sender, tables: RegistryTables, given: Given
) -> tuple[list[tuple[str, Agent]], dict[str, str], bool]:
    """Return the agents a selection means, why named ones are not among them, and if there are
    more. Without names it means agents that are here and that the sender has authority over.
    """
    named = list(command.agent_ids or ())
    if command.agent_id is not None:
        named.append(command.agent_id)
    criteria = (command.pattern, command.kind, command.older_than_s)
    if not named and not command.all and criteria == (None, None, None):
        raise Invalid(
            "it does not say which agents",
            hint="give agent_id, agent_ids, pattern, kind, older_than_s or all",
        )
    candidates: Iterable[tuple[str, Agent]] = tables.agents.range()
    if named:
        candidates = [(agent_id, _known(tables, agent_id)) for agent_id in dict.fromkeys(named)]
        for agent_id, agent in candidates:
            _require_authority(sender, agent_id, agent, "end or restart")
    found: list[tuple[str, Agent]] = []
    skipped: dict[str, str] = {}
    for agent_id, agent in candidates:
        if not _meets(command, agent_id, agent, given):
            if named:
                skipped[agent_id] = "is not what was asked for"
        elif named or (agent.status not in GONE and _has_authority(sender, agent_id, agent)):
            if len(found) == SELECTED_MAX:
                return found, skipped, True
            found.append((agent_id, agent))
    return found, skipped, False


def _meets(command: Selection, agent_id: str, agent: Agent, given: Given) -> bool:
    return (
        (command.pattern is None or fnmatchcase(agent_id, command.pattern))
        and command.kind in (None, agent.kind)
        and (
            command.older_than_s is None or given.now - agent.registered_at >= command.older_than_s
        )
    )


def _report(command: Report, sender: Sender, tables: RegistryTables, given: Given) -> Decision:
    agent_id = command.agent_id
    agent = tables.agents.get(agent_id)
    if agent is None:  # a child that was started by somebody else
        return Decision()
    if command.state == "started":
        status: Status = "stopping" if agent.status == "stopping" else "active"
        if (status, command.pid) == (agent.status, agent.pid):
            return Decision()
        changed = _changed(agent_id, agent, status, sender.name, given)
        return Decision((msgspec.structs.replace(changed, pid=command.pid),))
    if agent.status in GONE or (command.again and agent.status == "stopping"):
        return Decision()  # the latter crossed our `child:stop`, whose outcome is yet to come
    if command.state == "failed":
        status = "failed"
    elif command.again:
        status = "starting"
    else:
        status = agent.then
    event = _ended(agent_id, agent, status, command.exit, sender.name, given)
    begins = status == "starting" and not command.again
    return Decision((event,), None, _launch(agent_id, tables) if begins else ())


def _muster(command: Muster, sender: Sender, tables: RegistryTables, given: Given) -> Decision:
    events: list[Event] = []
    sends: list[Send] = []
    running = frozenset(command.running)
    room = SENDS_BYTES_MAX
    for agent_id, agent in tables.agents.range():
        if not agent.supervised or agent.status in GONE or agent_id in running:
            continue
        status: Status = agent.then
        launch = _details(tables, agent_id).launch
        if launch is not None:
            if launch.restart == "permanent" and agent.status != "stopping":
                status = "starting"
            if status == "starting":
                room -= _size(launch)
                if room < 0:
                    status = "failed"
                else:
                    sends.append(_child_start(agent_id, launch))
        why = "the supervisor ended"
        events.append(_ended(agent_id, agent, status, why, sender.name, given))
    return Decision(tuple(events), None, tuple(sends))


def _create_identity(
    command: CreateIdentity, sender: Sender, tables: RegistryTables, given: Given
) -> Decision:
    agent_id = command.agent_id or sender.name
    _require_authority(sender, agent_id, tables.agents.get(agent_id), "name")
    known = tables.identities.get(agent_id)
    if known is not None:
        raise Conflict(
            f"agent {agent_id} has an identity already",
            hint="agent:update_identity changes it",
            revision=known.revision,
        )
    if tables.identities.count() >= IDENTITIES_MAX:
        raise Quota(f"there are {IDENTITIES_MAX} identities", limit=IDENTITIES_MAX)
    _require_small(command.identity, "the identity")
    return _set_identity(agent_id, command.identity, Identity({}, 0, given.now, given.now), given)


def _update_identity(
    command: UpdateIdentity, sender: Sender, tables: RegistryTables, given: Given
) -> Decision:
    agent_id = command.agent_id or sender.name
    _require_authority(sender, agent_id, tables.agents.get(agent_id), "rename")
    known = _named(tables, agent_id)
    if command.revision is not None and command.revision != known.revision:
        raise Conflict(
            f"the identity of {agent_id} has revision {known.revision}, not {command.revision}",
            hint="read it again and decide",
            revision=known.revision,
        )
    merged = {**known.identity, **command.updates}
    identity = {key: value for key, value in merged.items() if value is not None}
    _require_small(identity, "the identity")
    return _set_identity(agent_id, identity, known, given)


def _set_identity(
    agent_id: str, identity: dict[str, Any], known: Identity, given: Given
) -> Decision:
    event = IdentitySet(agent_id, identity, known.revision + 1, given.now)
    changed = Identity(identity, event.revision, known.created_at, given.now)
    return Decision((event,), _identity_view(agent_id, changed))


def _remove_identity(command: RemoveIdentity, sender: Sender, tables: RegistryTables) -> Decision:
    agent_id = command.agent_id or sender.name
    _require_authority(sender, agent_id, tables.agents.get(agent_id), "unname")
    known = _named(tables, agent_id)
    return Decision((IdentityRemoved(agent_id),), _identity_view(agent_id, known))


def _speaks_for(agent_id: str | None, sender: Sender) -> str:
    """Return whom a command is about: the sender, or for an operator whom it names."""
    if agent_id is None or agent_id == sender.name:
        return sender.name
    if sender.role != "operator":
        raise Forbidden(
            f"{sender.name} may not speak for {agent_id}", hint="leave agent_id out: it is you"
        )
    return agent_id


def _has_authority(sender: Sender, agent_id: str, agent: Agent | None) -> bool:
    """Whether the sender is the agent, has spawned it, or is an operator."""
    return (
        sender.role == "operator"
        or sender.name == agent_id
        or (agent is not None and agent.spawned_by == sender.name)
    )


def _require_authority(sender: Sender, agent_id: str, agent: Agent | None, to_do: str) -> None:
    if not _has_authority(sender, agent_id, agent):
        raise Forbidden(
            f"{sender.name} may not {to_do} {agent_id}, which it has not spawned",
            hint="ask an operator, or the agent itself",
            spawned_by=agent.spawned_by if agent else None,
        )


def _require_room(agent: Agent | None, tables: RegistryTables) -> None:
    """Raise `Quota` if one more agent would be too many."""
    if (agent is None or agent.gone_ms) and (
        tables.agents.count() - tables.gone.count() >= AGENTS_MAX
    ):
        raise Quota(f"there are {AGENTS_MAX} agents", limit=AGENTS_MAX)


def _require_small(value: dict[str, Any], what: str) -> None:
    size = len(encode(value))
    if size > PLAIN_BYTES_MAX:
        raise TooLarge(
            f"{what} has {size} bytes, over the limit of {PLAIN_BYTES_MAX}",
            size_bytes=size,
            limit_bytes=PLAIN_BYTES_MAX,
        )


def _known(tables: RegistryTables, agent_id: str) -> Agent:
    agent = tables.agents.get(agent_id)
    if agent is None:
        raise NotFound(f"there is no agent {agent_id}", hint="ksi agents list", agent_id=agent_id)
    return agent


def _present(tables: RegistryTables, agent_id: str, epoch: int | None) -> Agent:
    """Return an agent that is here, in this epoch if one is given."""
    agent = _known(tables, agent_id)
    if agent.status in GONE:
        raise NotFound(
            f"agent {agent_id} is {agent.status}", hint="register again", status=agent.status
        )
    if epoch is not None and epoch != agent.epoch:
        raise StaleEpoch(
            f"agent {agent_id} is in epoch {agent.epoch}, not {epoch}",
            hint="another process has registered under this name; stop, or register again",
            epoch=agent.epoch,
        )
    return agent


def _named(tables: RegistryTables, agent_id: str) -> Identity:
    known = tables.identities.get(agent_id)
    if known is None:
        raise NotFound(
            f"agent {agent_id} has no identity", hint="agent:create_identity", agent_id=agent_id
        )
    return known


def _details(tables: RegistryTables, agent_id: str) -> Details:
    return tables.details.get(agent_id) or Details({}, None)


def _next_epoch(tables: RegistryTables) -> int:
    drawn = tables.epochs.get("last")
    return 1 if drawn is None else drawn.epoch + 1


def _size(launch: Launch) -> int:
    return len(encode(launch))


def _launch(agent_id: str, tables: RegistryTables) -> tuple[Send, ...]:
    launch = _details(tables, agent_id).launch
    return () if launch is None else (_child_start(agent_id, launch),)


def _child_start(agent_id: str, launch: Launch) -> Send:
    command = ChildStart(
        name=agent_id,
        argv=launch.argv,
        env=launch.env,
        cwd=launch.cwd,
        restart=launch.restart,
        identity=agent_id,
    )
    return Send("supervisor", "child:start", command)


def _child_stop(agent_id: str, force: bool) -> Send:
    return Send("supervisor", "child:stop", ChildStop(name=agent_id, force=force))


def _changed(agent_id: str, agent: Agent, status: Status, by: str, given: Given) -> StatusChanged:
    """Return the event of another status; the process stays as it is."""
    return StatusChanged(
        agent_id, status, agent.then, agent.pid, agent.exit, by, given.now, given.time_s
    )


def _stopping(
    agent_id: str, agent: Agent, then: Status, sender: Sender, given: Given
) -> StatusChanged:
    """Return the event of a process being asked to end."""
    changed = _changed(agent_id, agent, "stopping", sender.name, given)
    return msgspec.structs.replace(changed, then=then)


def _ended(
    agent_id: str, agent: Agent, status: Status, why: str | None, by: str, given: Given
) -> StatusChanged:
    """Return the event of an agent without a process."""
    return StatusChanged(agent_id, status, "exited", None, why, by, given.now, given.time_s)


def _status_of_registered(agent: Agent | None) -> Status:
    """Return `active`, unless a process registers that is being stopped."""
    return "stopping" if agent is not None and agent.status == "stopping" else "active"


def _status_of_unregistered(agent: Agent) -> Status:
    """Return `unregistered`; the process of a supervised one has yet to end."""
    return "stopping" if agent.supervised else "unregistered"


def _agent_seen(event: AgentSeen, tables: RegistryTables) -> None:
    agent = _known(tables, event.agent_id)
    _put_pulse(event.agent_id, agent, event.now, event.time_s, event.time_s, tables)


def _agent_registered(event: AgentRegistered, tables: RegistryTables) -> None:
    former = tables.agents.get(event.agent_id)
    supervised = former is not None and former.supervised and former.status not in GONE
    agent = Agent(
        _status_of_registered(former),
        former.then if former is not None and supervised else "exited",
        event.epoch,
        event.kind,
        event.capabilities,
        event.lease_s,
        event.now,
        event.now,
        supervised,
        former.spawned_by if former is not None and supervised else None,
        event.pid,
        former.exit if former is not None else None,
        0,
    )
    launch = _details(tables, event.agent_id).launch if supervised else None
    tables.details.put(event.agent_id, Details(event.metadata, launch))
    tables.epochs.put("last", Drawn(event.epoch))
    _put(event.agent_id, former, agent, tables)
    _put_pulse(event.agent_id, agent, event.now, event.time_s, event.time_s, tables)


def _agent_spawned(event: AgentSpawned, tables: RegistryTables) -> None:
    former = tables.agents.get(event.agent_id)
    agent = Agent(
        "starting",
        "exited",
        event.epoch,
        event.kind,
        event.capabilities,
        event.lease_s,
        event.now,
        event.now,
        True,
        event.by,
        None,
        None,
        0,
    )
    tables.details.put(event.agent_id, Details(event.metadata, event.launch))
    tables.epochs.put("last", Drawn(event.epoch))
    _put(event.agent_id, former, agent, tables)
    _put_pulse(event.agent_id, agent, event.now, event.time_s, event.time_s, tables)


def _status_changed(event: StatusChanged, tables: RegistryTables) -> None:
    former = _known(tables, event.agent_id)
    agent = msgspec.structs.replace(
        former,
        status=event.status,
        then=event.then,
        pid=event.pid,
        exit=event.exit,
        changed_at=event.now,
        # A lost one that nobody runs is as good as gone; a beat brings it back.
        gone_ms=whole_ms(event.time_s) + 1 if _is_gone(event.status, former.supervised) else 0,
    )
    _put(event.agent_id, former, agent, tables)
    pulse = tables.pulses.get(event.agent_id)
    assert pulse is not None
    seen_at, seen_s = pulse.seen_at, pulse.seen_s
    if event.status == "active":
        seen_at, seen_s = event.now, event.time_s
    _put_pulse(event.agent_id, agent, seen_at, seen_s, event.time_s, tables)


def _agent_unregistered(event: AgentUnregistered, tables: RegistryTables) -> None:
    agent = _known(tables, event.agent_id)
    changed = StatusChanged(
        event.agent_id,
        _status_of_unregistered(agent),
        agent.then,
        agent.pid,
        agent.exit,
        event.by,
        event.now,
        event.time_s,
    )
    _status_changed(changed, tables)


def _agent_forgotten(event: AgentForgotten, tables: RegistryTables) -> None:
    agent = _known(tables, event.agent_id)
    tables.gone.delete((agent.gone_ms, event.agent_id))
    tables.agents.delete(event.agent_id)
    tables.pulses.delete(event.agent_id)
    tables.details.delete(event.agent_id)


def _identity_set(event: IdentitySet, tables: RegistryTables) -> None:
    known = tables.identities.get(event.agent_id)
    created_at = event.now if known is None else known.created_at
    identity = Identity(event.identity, event.revision, created_at, event.now)
    tables.identities.put(event.agent_id, identity)


def _is_gone(status: Status, supervised: bool) -> bool:
    return status in GONE or (status == "lost" and not supervised)


def _put(agent_id: str, former: Agent | None, agent: Agent, tables: RegistryTables) -> None:
    """Put the row and keep `capable` and `gone` in step with it."""
    listed = former.capabilities if former is not None and not former.gone_ms else []
    wanted = [] if agent.gone_ms else agent.capabilities
    for capability in listed:
        if capability not in wanted:
            tables.capable.delete((capability, agent_id))
    for capability in wanted:
        if capability not in listed:
            tables.capable.put((capability, agent_id), b"")
    if former is not None and former.gone_ms:
        tables.gone.delete((former.gone_ms, agent_id))
    if agent.gone_ms:
        tables.gone.put((agent.gone_ms, agent_id), b"")
    tables.agents.put(agent_id, agent)


def _put_pulse(
    agent_id: str,
    agent: Agent,
    seen_at: float,
    seen_s: float,
    time_s: float,
    tables: RegistryTables,
) -> None:
    """Put when the agent was heard of, and keep `deadlines` in step with it."""
    former = tables.pulses.get(agent_id)
    until_ms = _until_ms(agent, seen_s, time_s)
    if former is not None and former.due_ms and former.due_ms != until_ms:
        tables.deadlines.delete((former.due_ms, agent_id))
    if until_ms:
        tables.deadlines.put((until_ms, agent_id), b"")
    tables.pulses.put(agent_id, Pulse(seen_at, seen_s, until_ms))


def _until_ms(agent: Agent, seen_s: float, time_s: float) -> int:
    """Return when an agent in this state becomes something else by itself; 0: never."""
    if agent.status in ("starting", "stopping") and agent.supervised:
        return whole_ms(time_s + REPORT_S) + 1
    if agent.lease_s is not None and agent.status == "active":
        return due_ms(seen_s, agent.lease_s)
    if agent.lease_s is not None and agent.status == "suspect":
        return due_ms(seen_s, 2 * agent.lease_s)
    return 0


def _view(agent_id: str, agent: Agent, tables: RegistryTables) -> AgentView:
    return AgentView(**_shown(agent_id, agent, tables))


def _shown(agent_id: str, agent: Agent, tables: RegistryTables) -> dict[str, Any]:
    pulse = tables.pulses.get(agent_id)
    return {
        "agent_id": agent_id,
        "status": agent.status,
        "kind": agent.kind,
        "capabilities": agent.capabilities,
        "epoch": agent.epoch,
        "lease_s": agent.lease_s,
        "registered_at": agent.registered_at,
        "seen_at": pulse.seen_at if pulse else agent.registered_at,
        "changed_at": agent.changed_at,
        "supervised": agent.supervised,
        "spawned_by": agent.spawned_by,
        "pid": agent.pid,
        "exit": agent.exit,
    }


def _describe(query: Describe, tables: RegistryTables) -> AgentDetails:
    agent_id = query.agent_id
    shown = _shown(agent_id, _known(tables, agent_id), tables)
    identity = tables.identities.get(agent_id)
    if "identity" in query.include and identity is not None:
        shown["identity"] = identity.identity
    details = _details(tables, agent_id)
    if "metadata" in query.include:
        shown["metadata"] = details.metadata
    if "command" in query.include and details.launch is not None:
        launch = details.launch
        shown["command"] = {
            "argv": launch.argv,
            "env": sorted(launch.env),
            "cwd": launch.cwd,
            "restart": launch.restart,
        }
    return AgentDetails(**shown)


def _list(query: ListAgents, tables: RegistryTables) -> AgentPage:
    def matches(agent_id: str, agent: Agent) -> bool:
        return (
            (query.status == agent.status if query.status else _shows(query, agent))
            and query.kind in (None, agent.kind)
            and query.spawned_by in (None, agent.spawned_by)
            and (query.capability is None or query.capability in agent.capabilities)
            and (query.pattern is None or fnmatchcase(agent_id, query.pattern))
        )

    gone = query.include_gone or query.status in GONE or query.status == "lost"
    capability = None if gone else query.capability  # the index has those that are here
    return _page(_ids(capability, query.after, tables), matches, query.limit, tables)


def _shows(query: ListAgents, agent: Agent) -> bool:
    return query.include_gone or agent.status not in GONE


def _discover(query: DiscoverPeers, tables: RegistryTables) -> AgentPage:
    needed, exclude = frozenset(query.capabilities), frozenset(query.exclude)
    states = frozenset(query.status or ("active",))

    def matches(agent_id: str, agent: Agent) -> bool:
        return (
            agent.status in states
            and needed.issubset(agent.capabilities)
            and (not query.kinds or agent.kind in query.kinds)
            and agent_id not in exclude
        )

    here = not any(_is_gone(status, False) for status in states)
    capability = query.capabilities[0] if needed and here else None
    return _page(_ids(capability, query.after, tables), matches, query.limit, tables)


def _ids(capability: str | None, after: str | None, tables: RegistryTables) -> Iterator[str]:
    """Yield agent ids beyond `after` in order: all, or those that have a capability."""
    start = f"{after}\x01" if after else ""  # no id holds a character this low
    if capability is None:
        return (agent_id for agent_id, _ in tables.agents.range(start))
    rows = tables.capable.range((capability, start), prefix=(capability,))
    return (agent_id for (_, agent_id), _ in rows)


def _page(agent_ids: Iterator[str], matches: Any, limit: int, tables: RegistryTables) -> AgentPage:
    found: list[AgentView] = []
    last = None
    for looked, agent_id in enumerate(agent_ids):
        if len(found) == limit or looked == SCAN_ROWS_MAX:
            return AgentPage(agents=found, next=last)
        last = agent_id
        agent = _known(tables, agent_id)
        if matches(agent_id, agent):
            found.append(_view(agent_id, agent, tables))
    return AgentPage(agents=found, next=None)


def _list_identities(query: ListIdentities, tables: RegistryTables) -> IdentityPage:
    found: dict[str, IdentityView] = {}
    start = f"{query.after}\x01" if query.after else ""
    for agent_id, identity in tables.identities.range(start):
        if query.pattern is None or fnmatchcase(agent_id, query.pattern):
            if len(found) == query.limit:
                return IdentityPage(identities=found, next=[*found][-1])
            found[agent_id] = _identity_view(agent_id, identity)
    return IdentityPage(identities=found, next=None)


def _identity_view(agent_id: str, identity: Identity) -> IdentityView:
    return IdentityView(
        agent_id=agent_id,
        identity=identity.identity,
        revision=identity.revision,
        created_at=identity.created_at,
        updated_at=identity.updated_at,
    )


def _told(agent_id: str, what: str, by: str, **message: Any) -> Announcement:
    return Announcement(f"agent.{agent_id}.{what}", {"agent_id": agent_id, **message}, by)
