"""The owner `registry` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/registry.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.owner import (
    Command,
    Event,
    Keyed,
    Query,
    Reply,
    Table,
    Tables,
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
from ksi.transport.message import OPERATOR, Id, Message, Plain, Role, Text, operation
from ksi.transport.message import OWNER as OWNERS_ONLY

CAPABILITIES_MAX: Final = 64  # Index rows that one registration writes.
LAUNCH_BYTES_MAX: Final = 128 << 10  # A command line with its environment, as in Linux.
SELECTED_MAX: Final = 1000  # Agents one terminate or restart acts on.
PAGE_AGENTS_MAX: Final = 1000  # Agents in one reply.
Status = Literal[
    "starting",
    "active",
    "suspect",
    "lost",
    "stopping",
    "exited",
    "failed",
    "terminated",
    "unregistered",
]
SPAWNERS: Final[frozenset[Role]] = frozenset({"operator", "agent"})
Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}$(?!\n)")]
Capabilities = Annotated[list[Word], msgspec.Meta(max_length=CAPABILITIES_MAX)]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400.0)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
Epoch = Annotated[int, msgspec.Meta(ge=1)]
Pid = Annotated[int, msgspec.Meta(ge=1)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_AGENTS_MAX)]
Argument = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*$", max_length=LAUNCH_BYTES_MAX)]
Variable = Annotated[str, msgspec.Meta(pattern=r"^[^\x00=]+$", max_length=128)]
RestartType = Literal["permanent", "transient", "temporary"]
Part = Literal["identity", "metadata", "command"]


class Registration(Reply, frozen=True, kw_only=True):
    """The agent is registered. Send `epoch` with beats: a later registration then ends them."""

    agent_id: str
    epoch: int
    lease_s: float | None
    status: Status
    registered_at: float


class Presence(Reply, frozen=True, kw_only=True):
    """How the agent stands now."""

    agent_id: str
    epoch: int
    status: Status


class Selected(Reply, frozen=True, kw_only=True):
    """What was done, or with `dry_run` what would be. `more`: others match too, ask again.

    `skipped` says of agents that were named why nothing is done about them.
    """

    agent_ids: list[str]
    skipped: dict[str, str]
    more: bool
    dry_run: bool


class AgentView(Reply, frozen=True, kw_only=True):
    """One agent: times in seconds since the epoch. `exit`: how its last process ended."""

    agent_id: str
    status: Status
    kind: str
    capabilities: list[str]
    epoch: int
    lease_s: float | None
    registered_at: float
    seen_at: float
    changed_at: float
    supervised: bool
    spawned_by: str | None
    pid: int | None
    exit: str | None


class AgentDetails(AgentView, frozen=True, kw_only=True):
    """One agent with the parts that were asked for; of the environment only the names."""

    identity: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    command: dict[str, Any] | None = None


class AgentPage(Reply, frozen=True, kw_only=True):
    """Agents in the order of their ids; `next` continues, None at the end."""

    agents: list[AgentView]
    next: str | None


class IdentityView(Reply, frozen=True, kw_only=True):
    """What is known of an agent for good. `revision` counts the changes."""

    agent_id: str
    identity: dict[str, Any]
    revision: int
    created_at: float
    updated_at: float


class IdentityPage(Reply, frozen=True, kw_only=True):
    """Identities by agent id; `next` continues, None at the end."""

    identities: dict[str, IdentityView]
    next: str | None


@operation(
    "agent:register",
    owner="registry",
    refuses=(Forbidden, Quota, TooLarge),
    example={"kind": "researcher", "capabilities": ["search", "summarize"], "lease_s": 10},
)
class Register(Command[Registration], frozen=True, kw_only=True):
    """Register the sender, or for an operator `agent_id`, as a process that is alive.

    Registering again is what a new process does: it takes the place of the former one. What a
    spawned agent leaves out is as it was spawned. With `lease_s` it has to beat.
    """

    agent_id: Id | None = None
    kind: Word | None = None
    capabilities: Capabilities | None = None
    lease_s: LeaseSeconds | None = None
    pid: Pid | None = None
    metadata: Plain | None = None


@operation(
    "agent:unregister",
    owner="registry",
    refuses=(Forbidden, NotFound, StaleEpoch),
    example={"agent_id": "alice"},
)
class Unregister(Command[Presence], frozen=True, kw_only=True):
    """The sender, or for an operator `agent_id`, leaves."""

    agent_id: Id | None = None
    epoch: Epoch | None = None


@operation(
    "agent:heartbeat",
    owner="registry",
    refuses=(Forbidden, NotFound, StaleEpoch),
    example={"agent_id": "alice"},
)
class Beat(Command[Presence], frozen=True, kw_only=True):
    """The sender, or for an operator `agent_id`, is alive: its leases run from now."""

    agent_id: Id | None = None
    epoch: Epoch | None = None


@operation(
    "agent:spawn",
    owner="registry",
    roles=SPAWNERS,
    far_roles=OPERATOR,
    refuses=(Conflict, Forbidden, Quota, TooLarge),
    example={"agent_id": "scout", "argv": ["claude", "-p", "look around"], "restart": "transient"},
)
class Spawn(Command[Registration], frozen=True, kw_only=True):
    """Have the supervisor run a command line as an agent.

    It finds its identity in `KSI_AGENT` and the var directory in `KSI_VAR`. `restart` says what
    becomes of it when it ends by itself: permanent starts again, transient only after a failure.
    """

    argv: Annotated[list[Argument], msgspec.Meta(min_length=1, max_length=256)]
    agent_id: Id | None = None
    env: Annotated[dict[Variable, Argument], msgspec.Meta(max_length=256)] = {}
    cwd: Text | None = None
    restart: RestartType = "transient"
    kind: Word = "agent"
    capabilities: Capabilities = []
    lease_s: LeaseSeconds | None = None
    metadata: Plain = {}
    dry_run: bool = False
    request_id: Id | None = None


class Selection(Command[Selected], frozen=True, kw_only=True):
    """Which agents: all that are given must hold. `pattern` as in the shell: `*` and `?`."""

    agent_id: Id | None = None
    agent_ids: Annotated[list[Id], msgspec.Meta(max_length=SELECTED_MAX)] | None = None
    pattern: Pattern | None = None
    kind: Word | None = None
    older_than_s: Seconds | None = None
    all: bool = False
    force: bool = False
    dry_run: bool = False
    request_id: Id | None = None


@operation(
    "agent:terminate",
    owner="registry",
    roles=SPAWNERS,
    far_roles=OPERATOR,
    refuses=(Forbidden, Invalid, NotFound),
    example={"pattern": "scout-*", "dry_run": True},
)
class Terminate(Selection, frozen=True, kw_only=True):
    """End agents: by `agent_id`, `agent_ids`, `pattern`, `kind`, `older_than_s`, or `all`.

    The processes of supervised ones are stopped, with `force` at once. An agent may end itself
    and those it has spawned, an operator all.
    """


@operation(
    "agent:restart",
    owner="registry",
    roles=SPAWNERS,
    far_roles=OPERATOR,
    refuses=(Forbidden, Invalid, NotFound),
    example={"agent_id": "scout"},
)
class Restart(Selection, frozen=True, kw_only=True):
    """Start supervised agents anew, with the command lines they were spawned with.

    Selected as in `agent:terminate`; one that has ended is started again if it is named.
    """


@operation(
    "agent:create_identity",
    owner="registry",
    refuses=(Conflict, Forbidden, Quota, TooLarge),
    example={"agent_id": "alice", "identity": {"display_name": "Alice", "role": "analyst"}},
)
class CreateIdentity(Command[IdentityView], frozen=True, kw_only=True):
    """Keep for good who an agent is. An agent does so for itself and for those it has spawned."""

    identity: Plain
    agent_id: Id | None = None
    request_id: Id | None = None


@operation(
    "agent:update_identity",
    owner="registry",
    refuses=(Conflict, Forbidden, NotFound, TooLarge),
    example={"agent_id": "alice", "updates": {"role": "lead"}},
)
class UpdateIdentity(Command[IdentityView], frozen=True, kw_only=True):
    """Change fields of an identity: those in `updates`; null removes one.

    With `revision` only if the identity has that revision still.
    """

    updates: Plain
    agent_id: Id | None = None
    revision: Epoch | None = None
    request_id: Id | None = None


@operation(
    "agent:remove_identity",
    owner="registry",
    refuses=(Forbidden, NotFound),
    example={"agent_id": "alice"},
)
class RemoveIdentity(Command[IdentityView], frozen=True, kw_only=True):
    """Remove an identity and return what it was."""

    agent_id: Id | None = None
    request_id: Id | None = None


@operation(
    "agent:report",
    owner="registry",
    roles=OWNERS_ONLY,
    example={"agent_id": "scout", "state": "exited", "pid": 4242, "exit": "exit code 1"},
)
class Report(Command[None], frozen=True, kw_only=True):
    """What has become of the process of a supervised agent. Sent by the supervisor.

    `exited` with `again`: it will start another. `failed`: it could not start it or gave it up.
    """

    agent_id: Id
    state: Literal["started", "exited", "failed"]
    pid: Pid | None = None
    exit: Text | None = None
    again: bool = False


@operation("agent:muster", owner="registry", roles=OWNERS_ONLY, example={"running": ["scout"]})
class Muster(Command[None], frozen=True, kw_only=True):
    """A supervisor has begun: of all supervised agents it runs these and no others.

    Permanent ones among the others are started again. Sent by the supervisor.
    """

    running: Annotated[list[Id], msgspec.Meta(max_length=10_000)] = []


@operation("agent:list", owner="registry", example={"status": "active", "limit": 10})
class ListAgents(Query[AgentPage], frozen=True, kw_only=True):
    """List agents; those that have gone only with `include_gone` or if `status` asks for them."""

    status: Status | None = None
    kind: Word | None = None
    capability: Word | None = None
    pattern: Pattern | None = None
    spawned_by: Id | None = None
    include_gone: bool = False
    limit: Limit = 100
    after: Id | None = None


@operation(
    "agent:info",
    owner="registry",
    refuses=(NotFound,),
    example={"agent_id": "alice", "include": ["identity"]},
)
class Describe(Query[AgentDetails], frozen=True, kw_only=True):
    """Return one agent, with its identity, its metadata or its command line if asked for."""

    agent_id: Id
    include: Annotated[list[Part], msgspec.Meta(max_length=16)] = []


@operation(
    "agent:discover_peers",
    owner="registry",
    example={"capabilities": ["search"], "exclude": ["alice"]},
)
class DiscoverPeers(Query[AgentPage], frozen=True, kw_only=True):
    """Find active agents that have all of `capabilities` and are of one of `kinds`.

    With `status` those that are in one of these states instead.
    """

    capabilities: Capabilities = []
    kinds: Annotated[list[Word], msgspec.Meta(max_length=64)] = []
    exclude: Annotated[list[Id], msgspec.Meta(max_length=1000)] = []
    status: Annotated[list[Status], msgspec.Meta(max_length=16)] = []
    limit: Limit = 100
    after: Id | None = None


@operation("agent:list_identities", owner="registry", example={"pattern": "a*"})
class ListIdentities(Query[IdentityPage], frozen=True, kw_only=True):
    """List identities, all or those whose agent ids match; `var/state/agent_identities.json`."""

    pattern: Pattern | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    after: Id | None = None


class ChildStart(Message, frozen=True, kw_only=True):
    """`child:start` of the supervisor."""

    name: str
    argv: list[str]
    env: dict[str, str]
    cwd: str | None
    restart: RestartType
    identity: str


class ChildStop(Message, frozen=True, kw_only=True):
    """`child:stop` of the supervisor."""

    name: str
    force: bool


class SessionHeartbeat(Message, frozen=True, kw_only=True):
    """`session:heartbeat` of the sessions."""

    agent_id: str


class Launch(msgspec.Struct, frozen=True, array_like=True):
    """The command line of a supervised agent."""

    argv: list[str]
    env: dict[str, str]
    cwd: str | None
    restart: RestartType


class AgentRegistered(Event, frozen=True, array_like=True, tag="registered"):
    agent_id: str
    epoch: int
    kind: str
    capabilities: list[str]
    lease_s: float | None
    pid: int | None
    metadata: dict[str, Any]
    by: str
    now: float
    time_s: float


class AgentSpawned(Event, frozen=True, array_like=True, tag="spawned"):
    agent_id: str
    epoch: int
    kind: str
    capabilities: list[str]
    lease_s: float | None
    metadata: dict[str, Any]
    launch: Launch
    by: str
    now: float
    time_s: float


class AgentSeen(Event, frozen=True, array_like=True, tag="seen"):
    agent_id: str
    now: float
    time_s: float


class StatusChanged(Event, frozen=True, array_like=True, tag="status"):
    agent_id: str
    status: Status
    then: Status
    pid: int | None
    exit: str | None
    by: str
    now: float
    time_s: float


class AgentUnregistered(Event, frozen=True, array_like=True, tag="unregistered"):
    agent_id: str
    by: str
    now: float
    time_s: float


class AgentForgotten(Event, frozen=True, array_like=True, tag="forgotten"):
    agent_id: str


class IdentitySet(Event, frozen=True, array_like=True, tag="identity"):
    agent_id: str
    identity: dict[str, Any]
    revision: int
    now: float


class IdentityRemoved(Event, frozen=True, array_like=True, tag="identity_removed"):
    agent_id: str


class Agent(msgspec.Struct, frozen=True, array_like=True):
    """The row of an agent. What each beat changes is in `Pulse`."""

    status: Status
    then: Status  # what a stopping one becomes when its process has ended
    epoch: int
    kind: str
    capabilities: list[str]
    lease_s: float | None
    registered_at: float
    changed_at: float
    supervised: bool
    spawned_by: str | None
    pid: int | None
    exit: str | None
    gone_ms: int  # owner time at which it left, its key in `gone`; 0: it is here


class Pulse(msgspec.Struct, frozen=True, array_like=True):
    """When an agent was heard of last."""

    seen_at: float
    seen_s: float
    due_ms: int  # its key in `deadlines`; 0: it has none


class Details(msgspec.Struct, frozen=True, array_like=True):
    """What is seldom read and may be long."""

    metadata: dict[str, Any]
    launch: Launch | None


class Identity(msgspec.Struct, frozen=True, array_like=True):
    identity: dict[str, Any]
    revision: int
    created_at: float
    updated_at: float


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """The last epoch that was given out."""

    epoch: int


class RegistryTables(Tables):
    agents: Table[Agent]
    pulses: Table[Pulse]
    details: Table[Details]
    identities: Table[Identity]
    capable: Annotated[Table[bytes], Keyed(str, str)]  # capability, agent: those that are here
    deadlines: Annotated[Table[bytes], Keyed(int, str)]  # ms of owner time, agent
    gone: Annotated[Table[bytes], Keyed(int, str)]  # likewise, the longest gone first
    epochs: Table[Drawn]  # one row, under "last"
