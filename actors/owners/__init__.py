"""One file an owner, all alike: what it owns, its messages, its tables, decide, apply, answer."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Final

from ksi.actors.owner import Owner

# In the order they start.
OWNERS: Final = (
    "registry", "sessions", "completion", "bus", "state", "mcp", "index", "library", "events",
)  # fmt: skip


@cache
def load(name: str) -> Owner[Any]:
    """Return the owner `name`; importing it declares its operations."""
    owner: Owner[Any] = import_module(f"ksi.actors.owners.{name}").OWNER
    return owner


def load_all() -> dict[str, Owner[Any]]:
    """Return all owners by name, in the order they start."""
    return {name: load(name) for name in OWNERS}
