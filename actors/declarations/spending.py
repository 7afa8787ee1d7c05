"""`spending`, a part of `completion`, in its forms: messages, events, tables.

What it does: `actors/owners/spending.py`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ksi.actors.owner import Command, Event, Keyed, Query, Reply, Table, Tables
from ksi.transport.errors import Invalid, Quota
from ksi.transport.message import OPERATOR, Id, Text, operation

PAGE_MAX: Final = 1000  # Rows in one reply.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Holder = Literal["agent", "session"]


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an attempt took. `cached_tokens` are those of the input that came from a cache.

    `cost_usd` is what its provider says it cost; most say nothing.
    """

    input_tokens: Count = 0
    output_tokens: Count = 0
    cached_tokens: Count = 0
    cost_usd: Dollars | None = None


class UsageView(Reply, frozen=True, kw_only=True):
    """What one agent has taken of one model; `attempts` that said what they took."""

    agent_id: str
    model: str
    attempts: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cost_usd: float


class UsagePage(Reply, frozen=True, kw_only=True):
    """What was taken, by agent and model, and the sum over all of them; `more` are not shown."""

    usage: list[UsageView]
    input_tokens: int
    output_tokens: int
    cost_usd: float
    more: bool


class BudgetView(Reply, frozen=True, kw_only=True):
    """What an agent or a session may take, None for any amount, and what it has taken."""

    agent_id: str | None
    session_id: str | None
    tokens: int | None
    cost_usd: float | None
    taken_tokens: int
    taken_usd: float
    set_at: float


class BudgetPage(Reply, frozen=True, kw_only=True):
    """Budgets: those of agents, then those of sessions, by name."""

    budgets: list[BudgetView]


@operation(
    "completion:budget",
    owner="completion",
    roles=OPERATOR,
    refuses=(Invalid, Quota),
    example={"agent_id": "alice", "tokens": 1_000_000},
)
class SetBudget(Command[BudgetPage], frozen=True, kw_only=True):
    """Bound the tokens, the cost in US dollars, or both, that an agent or a session may take.

    Counting starts with the first budget, and anew with `restart`. With neither bound the budget
    goes, and the reply is empty.
    """

    agent_id: Id | None = None
    session_id: Id | None = None
    tokens: Count | None = None
    cost_usd: Dollars | None = None
    restart: bool = False


@operation("completion:budgets", owner="completion", example={"agent_id": "alice"})
class ListBudgets(Query[BudgetPage], frozen=True, kw_only=True):
    """List budgets: all, or those of an agent or a session."""

    agent_id: Id | None = None
    session_id: Id | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 100


@operation("completion:token_usage", owner="completion", example={"agent_id": "alice"})
class GetTokenUsage(Query[UsagePage], frozen=True, kw_only=True):
    """Sum up what was taken, by agent and model: since a time in seconds since the epoch.

    Sums are kept by the hour, for a month.
    """

    agent_id: Id | None = None
    model: Text | None = None
    since: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = 100


class Taken(Event, frozen=True, array_like=True, tag="taken"):
    agent_id: str
    session_id: str
    model: str
    usage: Usage
    now: float


class BudgetSet(Event, frozen=True, array_like=True, tag="budget"):
    holder: Holder
    name: str
    tokens: int | None
    cost_usd: float | None
    restart: bool
    now: float


class UsageForgotten(Event, frozen=True, array_like=True, tag="usage_forgotten"):
    hour: int
    agent_id: str
    model: str


class Sum(msgspec.Struct, frozen=True, array_like=True):
    attempts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0

    def plus(self, more: Usage | Sum) -> Sum:
        """Return this and what one more attempt, or another sum, took."""
        return Sum(
            self.attempts + (more.attempts if isinstance(more, Sum) else 1),
            self.input_tokens + more.input_tokens,
            self.output_tokens + more.output_tokens,
            self.cached_tokens + more.cached_tokens,
            self.cost_usd + (more.cost_usd or 0.0),
        )


class Budget(msgspec.Struct, frozen=True, array_like=True):
    tokens: int | None
    cost_usd: float | None
    set_at: float
    taken_tokens: int = 0
    taken_usd: float = 0.0


class SpendingTables(Tables):
    usage: Annotated[Table[Sum], Keyed(int, str, str)]  # hour since the epoch, agent, model
    budgets: Annotated[Table[Budget], Keyed(str, str)]  # agent or session, name
