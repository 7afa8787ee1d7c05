"""Queries answered in place: from what is on disk, without a key, a message or a running system.

Where the disk is on another machine, its owners are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ksi.actors.owners import OWNERS, load
from ksi.actors.reading import reader_of
from ksi.transport.errors import Invalid
from ksi.transport.message import CATALOGUE, encode
from ksi.transport.remote import is_remote, require_here

if TYPE_CHECKING:
    from ksi.actors.reading import OwnerReader
    from ksi.transport.client import Client

PAGE: Final = 1000  # Rows a query returns at most.


class Reads:
    """Answers queries on one var directory; on another machine, as `identity`."""

    def __init__(self, var: Path, identity: str | None = None) -> None:
        self._var = var
        self._identity = identity
        self._client: Client | None = None
        self._readers: dict[str, OwnerReader] = {}

    def __call__(self, owner: str, query: str, /, **fields: Any) -> dict[str, Any]:
        """Return the reply to `query` of `owner`, as plain values.

        Raises:
            Invalid: the fields are not those of the query.
            NotRunning: nothing has ever run on this var.
            KsiError: the refusal of the query.
        """
        if is_remote(self._var):
            return self._ask(query, fields)
        self._require_kept(owner, query)
        reader = self._readers.get(owner)
        if reader is None:
            reader = self._readers[owner] = reader_of(load(owner), self._var)
        message: Any = CATALOGUE[query].decode(encode(fields))
        reply: dict[str, Any] = msgspec.to_builtins(reader.answer(message))
        return reply

    def past(self, at: str, owner: str, query: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to `query` from the state as it was `at` a number or a time.

        Raises: as a call of this, and as `actors.past.as_of`.
        """
        from ksi.actors.past import as_of

        require_here(self._var, "ksi read --at")
        self._require_kept(owner, query)
        message: Any = CATALOGUE[query].decode(encode(fields))
        with as_of(load(owner), self._var, int(at) if at.isdecimal() else at) as answer:
            reply: dict[str, Any] = msgspec.to_builtins(answer(message))
        return reply

    def _require_kept(self, owner: str, query: str) -> None:
        if owner not in OWNERS:
            text = f"{query} is a query of the {owner}, which keeps nothing on disk"
            raise Invalid(text, hint=f"ksi ask {query}")

    def _ask(self, query: str, fields: dict[str, Any]) -> dict[str, Any]:
        from ksi.transport.client import Client

        if self._client is None:
            self._client = Client(self._identity, var=self._var)
        return self._client.ask(query, fields)

    def pages(
        self, owner: str, query: str, rows: str, limit: int
    ) -> Callable[..., tuple[list[Any], bool]]:
        """Return a function that reads up to `limit` rows, and says whether there are more."""

        def read(**fields: Any) -> tuple[list[Any], bool]:
            found: list[Any] = []
            while len(found) < limit:
                page = self(owner, query, **fields, limit=min(limit - len(found), PAGE))
                found += page[rows]
                if page["next"] is None:
                    return found, False
                fields["after"] = page["next"]
            return found, True

        return read
