"""What a provider learns of a session and tells its requester, while it works on a grant.

A grant may come before the session's history has what came before it: requests and outcomes reach
the owner of sessions on their own way, in their order. So the past is read once the grant's own
request is in it, and the answer that it follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any, Final

from ksi.adapters.providers import Failed, Grant, Past, Turn
from ksi.transport import AsyncClient
from ksi.transport.errors import KsiError, NotFound
from ksi.transport.limits import HISTORY_BYTES_MAX, HISTORY_TURNS_MAX, TEXT_CHARS_MAX

TOKENS_S: Final = 0.1  # How often those who listen see more of an answer.
RECORDED_S: Final = 10.0  # How long the record of a request may take: its owner may be restarting.
LOOK_S: Final = 0.02
ENTRIES_MAX: Final = 4 * HISTORY_TURNS_MAX  # The newest; turns before them are not told.
PARENTS_MAX: Final = 8  # Forks of forks.


class SessionTalk:
    """The talk about one grant; `provider` is whose sessions are looked for in the past."""

    def __init__(self, client: AsyncClient, grant: Grant, provider: str) -> None:
        self._client = client
        self._grant = grant
        self._provider = provider
        self._unsaid = ""
        self._start = 0
        self._told_s = 0.0

    async def say(self, progress: dict[str, Any]) -> None:
        with contextlib.suppress(KsiError):  # It may be over: whoever cancels us says so.
            await self._client.ask("worker:progress", self._named(progress=progress))

    async def tokens(self, text: str) -> None:
        self._unsaid += text
        if time.monotonic() < self._told_s + TOKENS_S:
            return
        self._told_s = time.monotonic()
        while self._unsaid:
            said, self._unsaid = self._unsaid[:TEXT_CHARS_MAX], self._unsaid[TEXT_CHARS_MAX:]
            fields = self._named(start=self._start, text=said)
            self._start += len(said)
            with contextlib.suppress(KsiError):
                await self._client.ask("worker:tokens", fields)

    def _named(self, **more: Any) -> dict[str, Any]:
        return {"request_id": self._grant.request_id, "attempt": self._grant.attempt, **more}

    async def past(self, bytes_max: int = HISTORY_BYTES_MAX) -> Past:
        until_s = time.monotonic() + RECORDED_S
        while True:
            with contextlib.suppress(NotFound):
                entries = await self._entries(self._grant.session_id)
                if self._is_recorded(entries):
                    before = await self._with_parents(entries)
                    return self._turns(before, bytes_max, own=len(entries))
            if time.monotonic() > until_s:
                raise Failed("temporary_failure", "the session has no record of what came before")
            await asyncio.sleep(LOOK_S)

    def _is_recorded(self, entries: list[dict[str, Any]]) -> bool:
        said = {(each["event"], each.get("correlation_id")) for each in entries}
        follows = self._grant.follows
        waited = follows is None or ("completion:result", follows) in said
        # Many others may have been queued since: then it is further back than we look.
        ours = ("completion:request", self._grant.request_id) in said
        return waited and (ours or len(entries) >= ENTRIES_MAX)

    async def _entries(self, session_id: str, at: int | None = None) -> list[dict[str, Any]]:
        """Return the newest entries of a session, or those up to one."""
        newest: dict[str, Any] = {"session_id": session_id, "limit": ENTRIES_MAX}
        if at is not None:
            newest["at"] = at
        page = await self._client.read("session:history", newest)
        entries: list[dict[str, Any]] = list(page["entries"])
        while page["next"] is not None and len(entries) < ENTRIES_MAX:
            page = await self._client.read("session:history", {**newest, "after": page["next"]})
            entries += page["entries"]
        return entries

    async def _with_parents(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the entries of a fork behind those of its parent, up to where it was forked."""
        for _ in range(PARENTS_MAX):
            first = entries[0] if entries else {}
            if first.get("event") != "session:fork" or len(entries) >= ENTRIES_MAX:
                break
            parent, at = first["data"]["parent"], first["data"]["seq"]
            with contextlib.suppress(KsiError):  # Archived or gone: what is here has to do.
                entries = [*await self._entries(parent, at), *entries[1:]]
                continue
            break
        return entries

    def _turns(self, entries: list[dict[str, Any]], bytes_max: int, own: int) -> Past:
        prompts = {
            each.get("correlation_id"): each["data"].get("prompt")
            for each in entries
            if each["event"] == "completion:request"
        }
        turns: deque[Turn] = deque()
        provider_session = None
        room = bytes_max
        for back, entry in enumerate(reversed(entries)):
            data = entry["data"]
            if entry["event"] != "completion:result":
                continue
            prompt, response = prompts.get(entry.get("correlation_id")), data.get("response")
            if not isinstance(prompt, str) or not isinstance(response, str):
                continue
            if not turns and back < own and data.get("provider") == self._provider:
                provider_session = data.get("provider_session")  # It knows all up to here.
            room -= len(prompt.encode()) + len(response.encode())
            if room < 0 or len(turns) == HISTORY_TURNS_MAX:
                break
            turns.appendleft(Turn(prompt, response))
        return Past(list(turns), provider_session if isinstance(provider_session, str) else None)
