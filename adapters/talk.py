"""What a provider learns of a session and tells its requester, while it works on a grant.

A grant may come before the session's history has the answer that it follows: outcomes reach the
owner of sessions on their own way. So the past is read once that answer is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any, Final

from ksi.adapters.providers import Failed, Grant, Past, Turn
from ksi.transport import AsyncClient
from ksi.transport.errors import KsiError
from ksi.transport.limits import HISTORY_BYTES_MAX, HISTORY_TURNS_MAX, TEXT_CHARS_MAX

TOKENS_S: Final = 0.1  # How often those who listen see more of an answer.
TOLD_S: Final = 1.0  # How long an answer is held up where nobody passes it on.
RECORDED_S: Final = 10.0  # How long the record of a request may take: its owner may be restarting.
LOOK_S: Final = 0.02
WINDOW: Final = 64  # Entries read at once; large ones are half a megabyte.
ENTRIES_MAX: Final = 4096  # How far back prompts are looked for that waited long for answers ...
READ_BYTES_MAX: Final = 16 << 20  # ... or so many bytes.
REQUEST: Final = "completion:request"
RESULT: Final = "completion:result"
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
                await self._client.ask("worker:tokens", fields, timeout_s=TOLD_S)

    def _named(self, **more: Any) -> dict[str, Any]:
        return {"request_id": self._grant.request_id, "attempt": self._grant.attempt, **more}

    async def past(self, bytes_max: int = HISTORY_BYTES_MAX) -> Past:
        until_s = time.monotonic() + RECORDED_S
        while True:
            entries = await self._entries(self._grant.session_id)
            if self._is_complete(entries):
                before = await self._with_parents(entries)
                return self._past(before, bytes_max, own=len(entries))
            if time.monotonic() > until_s:
                raise Failed("temporary_failure", "the session has no record of what came before")
            await asyncio.sleep(LOOK_S)  # Its owner is told in its own time.

    def _is_complete(self, entries: list[dict[str, Any]]) -> bool:
        """Whether the answer that the grant follows is there; its own request always is."""
        follows = self._grant.follows
        said = ((each["event"], each.get("correlation_id")) for each in reversed(entries))
        return follows is None or (RESULT, follows) in said

    async def _entries(self, session_id: str, at: int | None = None) -> list[dict[str, Any]]:
        """Return the newest entries of a session, or those up to one: as many as it takes."""
        upto = {} if at is None else {"at": at}
        entries, first, size = await self._window(session_id, upto)
        while first > 1 and not _enough(entries) and len(entries) < ENTRIES_MAX:
            if size > READ_BYTES_MAX:
                break
            after = max(0, first - 1 - WINDOW)
            earlier = {**upto, "after": after, "limit": first - 1 - after}
            window, first, more = await self._window(session_id, earlier)
            entries, size = window + entries, size + more
            await asyncio.sleep(0)  # Others of this worker want to go on, too.
        return entries

    async def _window(
        self, session_id: str, where: dict[str, int]
    ) -> tuple[list[dict[str, Any]], int, int]:
        """Return entries, the number of the first, and about how many bytes they say."""
        wanted: dict[str, Any] = {"limit": WINDOW, **where, "session_id": session_id}
        page = await self._client.read("session:history", wanted)
        entries: list[dict[str, Any]] = list(page["entries"])
        first, last = page["first_seq"], page["first_seq"] + wanted["limit"] - 1
        while page["next"] is not None and page["next"] < last:  # Large ones come in pages.
            left = {**wanted, "after": page["next"], "limit": last - page["next"]}
            page = await self._client.read("session:history", left)
            entries += page["entries"]
        size = sum(len(str(each["data"])) for each in entries)
        return entries, first, size

    async def _with_parents(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the entries of a fork behind those of its parent, up to where it was forked."""
        for _ in range(PARENTS_MAX):
            first = entries[0] if entries else {}
            if first.get("event") != "session:fork" or len(entries) >= ENTRIES_MAX:
                break
            parent, at = first["data"]["parent"], first["data"]["seq"]
            try:
                before = await self._entries(parent, at)
            except KsiError:  # Archived or gone: what is here has to do.
                break
            entries = [*before, *entries[1:]]
        return entries

    def _past(self, entries: list[dict[str, Any]], bytes_max: int, own: int) -> Past:
        """Return the turns that fit, and the provider's session if it knows all of them."""
        prompts = _prompts(entries)
        turns: deque[Turn] = deque()
        provider_session = None
        room = bytes_max
        for back, entry in enumerate(reversed(entries)):
            data, prompt = entry["data"], prompts.get(entry.get("correlation_id"))
            response = data.get("response")
            if entry["event"] != RESULT or not isinstance(response, str) or prompt is None:
                continue
            if not turns and back < own and data.get("provider") == self._provider:
                provider_session = data.get("provider_session")
            room -= len(prompt.encode()) + len(response.encode())
            if room < 0 or len(turns) == HISTORY_TURNS_MAX:
                break
            turns.appendleft(Turn(prompt, response))
        return Past(list(turns), provider_session if isinstance(provider_session, str) else None)


def _prompts(entries: list[dict[str, Any]]) -> dict[Any, str]:
    """Return the prompts of requests by their ids."""
    return {
        each.get("correlation_id"): prompt
        for each in entries
        if each["event"] == REQUEST and isinstance(prompt := each["data"].get("prompt"), str)
    }


def _enough(entries: list[dict[str, Any]]) -> bool:
    """Whether more entries would add no turn: all there may be are here, with their prompts."""
    prompts = _prompts(entries)
    answered = [each.get("correlation_id") for each in entries if each["event"] == RESULT]
    return len(answered) >= HISTORY_TURNS_MAX and all(each in prompts for each in answered)
