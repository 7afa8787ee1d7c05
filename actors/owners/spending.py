"""What completions take: tokens and money, summed by hour, and the budgets of agents and sessions.

A part of the owner of completions, with rows of its own. What an attempt took is added up whether
it was completed or not. A budget counts from when it was set; what is over it is refused when it is
submitted, and ends without an answer when it would be granted. What runs is not interrupted, so the
last answer may go beyond it.

Source: "KSI State Management Analysis" 4: token tracker.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

from ksi.actors.declarations.spending import (
    Budget,
    BudgetPage,
    BudgetSet,
    BudgetView,
    GetTokenUsage,
    Holder,
    ListBudgets,
    SetBudget,
    SpendingTables,
    Sum,
    Taken,
    Usage,
    UsageForgotten,
    UsagePage,
    UsageView,
)
from ksi.actors.owner import Event
from ksi.transport.errors import Invalid, Quota
from ksi.transport.limits import BUDGETS_MAX, MODEL_CHARS_MAX, USAGE_ROWS_MAX, USAGE_S

HOUR_S: Final = 3600
FORGOTTEN_MAX: Final = 64  # Rows forgotten in one decision.


def taken(
    agent_id: str, session_id: str, model: str | None, usage: Usage | None, now: float
) -> tuple[Event, ...]:
    """Return the event of an attempt that says what it took."""
    if usage is None:
        return ()
    name = (model or "unknown").replace("\0", "")[:MODEL_CHARS_MAX]
    return (Taken(agent_id, session_id, name, usage, now),)


def set_budget(command: SetBudget, tables: SpendingTables, now: float) -> BudgetSet:
    """Return the event that sets or removes a budget."""
    if (command.agent_id is None) == (command.session_id is None):
        raise Invalid("a budget is of an agent_id or of a session_id, one of them")
    holder: Holder = "session" if command.agent_id is None else "agent"
    name = command.agent_id or command.session_id or ""
    if tables.budgets.get((holder, name)) is None and tables.budgets.count() >= BUDGETS_MAX:
        raise Quota(f"there are {BUDGETS_MAX} budgets", limit=BUDGETS_MAX)
    return BudgetSet(holder, name, command.tokens, command.cost_usd, command.restart, now)


def after(event: BudgetSet, tables: SpendingTables) -> Budget | None:
    """Return the budget that this event leads to."""
    if event.tokens is None and event.cost_usd is None:
        return None
    known = tables.budgets.get((event.holder, event.name))
    budget = Budget(event.tokens, event.cost_usd, event.now)
    if known is None or event.restart:
        return budget
    return msgspec.structs.replace(known, tokens=event.tokens, cost_usd=event.cost_usd)


def exhausted(tables: SpendingTables, agent_id: str, session_id: str) -> str | None:
    """Return which budget of a request has nothing left, in words."""
    for holder, name in (("agent", agent_id), ("session", session_id)):
        budget = tables.budgets.get((holder, name))
        if budget is None:
            continue
        if budget.tokens is not None and budget.taken_tokens >= budget.tokens:
            return f"{holder} {name} has taken {budget.taken_tokens} of {budget.tokens} tokens"
        if budget.cost_usd is not None and budget.taken_usd >= budget.cost_usd:
            return f"{holder} {name} has taken {budget.taken_usd:.4f} of {budget.cost_usd:g} USD"
    return None


def require_budget(tables: SpendingTables, agent_id: str, session_id: str) -> None:
    """Refuse what could not be granted."""
    spent = exhausted(tables, agent_id, session_id)
    if spent is not None:
        raise Quota(f"the budget is used up: {spent}", hint="an operator may raise it")


def forgotten(tables: SpendingTables, now: float) -> Iterator[UsageForgotten]:
    """Yield the oldest sums, as far as they are not kept any more: some of them."""
    surplus = tables.usage.count() - USAGE_ROWS_MAX
    before = int((now - USAGE_S) // HOUR_S)
    for (hour, agent_id, model), _sum in islice(tables.usage.range(), FORGOTTEN_MAX):
        if surplus <= 0 and hour >= before:
            return
        surplus -= 1
        yield UsageForgotten(hour, agent_id, model)


def apply_taken(event: Taken, tables: SpendingTables) -> None:
    key = (int(event.now // HOUR_S), event.agent_id, event.model)
    tables.usage.put(key, (tables.usage.get(key) or Sum()).plus(event.usage))
    for place in (("agent", event.agent_id), ("session", event.session_id)):
        budget = tables.budgets.get(place)
        if budget is not None:
            tokens = event.usage.input_tokens + event.usage.output_tokens
            more = msgspec.structs.replace(
                budget,
                taken_tokens=budget.taken_tokens + tokens,
                taken_usd=budget.taken_usd + (event.usage.cost_usd or 0.0),
            )
            tables.budgets.put(place, more)


def apply_budget(event: BudgetSet, tables: SpendingTables) -> None:
    budget = after(event, tables)
    if budget is None:
        tables.budgets.delete((event.holder, event.name))
    else:
        tables.budgets.put((event.holder, event.name), budget)


def token_usage(query: GetTokenUsage, tables: SpendingTables) -> UsagePage:
    """Sum over the hours since a time."""
    sums: dict[tuple[str, str], Sum] = {}
    for (_hour, agent_id, model), each in tables.usage.range((int(query.since // HOUR_S),)):
        if query.agent_id in (None, agent_id) and query.model in (None, model):
            sums[agent_id, model] = sums.get((agent_id, model), Sum()).plus(each)
    total = Sum()
    for each in sums.values():
        total = total.plus(each)
    found = [
        UsageView(agent_id=agent_id, model=model, **msgspec.structs.asdict(each))
        for (agent_id, model), each in sorted(sums.items())[: query.limit]
    ]
    return UsagePage(
        usage=found,
        input_tokens=total.input_tokens,
        output_tokens=total.output_tokens,
        cost_usd=total.cost_usd,
        more=len(sums) > len(found),
    )


def budgets(query: ListBudgets, tables: SpendingTables) -> BudgetPage:
    """List budgets as they stand."""
    wanted = {("agent", query.agent_id), ("session", query.session_id)}
    every = query.agent_id is None and query.session_id is None
    rows = ((key, row) for key, row in tables.budgets.range() if every or key in wanted)
    return BudgetPage(
        budgets=[view(key[0], key[1], row) for key, row in islice(rows, query.limit)],
    )


def view(holder: str, name: str, budget: Budget) -> BudgetView:
    """Return a budget as others see it."""
    return BudgetView(
        agent_id=name if holder == "agent" else None,
        session_id=name if holder == "session" else None,
        **msgspec.structs.asdict(budget),
    )
