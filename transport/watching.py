"""Following what changes in the state: how far one watcher has come.

The state keeps its last changes in order; its announcements only say that there are more. So what a
connection loses is fetched all the same, and what was fetched is never fetched again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from ksi.transport.errors import Restored


class Watched:
    """How far one watcher has come in the changes of the state.

    Attributes:
        page: changes that were fetched and are not taken yet.
        look: whether there may be some that were not fetched.
        store: the store of the state that the revisions are of.
    """

    def __init__(self, wanted: Mapping[str, Any], revision: int, store: str) -> None:
        self.page: deque[dict[str, Any]] = deque()
        self.look = True
        self.store = store
        self._wanted = wanted
        self._revision = revision

    @property
    def revision(self) -> int:
        """All that is watched and has changed up to here was taken."""
        return self.page[0]["revision"] - 1 if self.page else self._revision

    def question(self) -> dict[str, Any]:
        """Return the fields of the `state:changes` to ask next."""
        return {**self._wanted, "after": self._revision}

    def take_in(self, page: Mapping[str, Any], store: str) -> None:
        """Take in a page, the answer of `store`.

        Raises:
            Restored: its revisions are not those of before.
        """
        require_store(self.store, store)
        self.page.extend(page["changes"])
        self._revision, self.look = page["revision"], page["more"]


def require_store(expected: str, store: str) -> None:
    """Raise `Restored` unless the state has answered from the store that was expected."""
    if expected != store:
        raise Restored(
            "the state was restored meanwhile: its revisions are others now",
            hint="read it, and watch from the revision of what you read",
            store=store,
        )
