"""What a line of a conversation says, and how conversations are read.

Three forms of lines are known:

    {"type": "human", "content": …, "timestamp": …}     of the Claude command line; its answers
    {"type": "claude", "result": …, "timestamp": …}     have no `result` where they failed
    {"ksi": {"timestamp": …, …}, "response": …}         of KSI's response logs, beside lines of the
                                                        types `user` and `feedback`
    {"event": …, "data": {…}, "timestamp": …}           the documented one, that of our sessions

What a line says depends on that line alone, so whoever reads it, and however often, comes to the
same.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from ksi.actors.reading import OwnerReader, log_directory, reader_of
from ksi.actors.supervision.reports import read_follower
from ksi.storage.conversations import (
    SESSION,
    ConversationsReader,
    Said,
    Unreadable,
    match_of,
    preview_of,
    terms_of,
)
from ksi.transport.errors import Invalid, KsiError
from ksi.transport.identity import run_directory
from ksi.transport.limits import CONTENT_BYTES_MAX, FRAME_BYTES_MAX
from ksi.transport.moments import moment, time_range

PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX * 3 // 4  # One page of messages, with room for its header.
SENDER_CHARS_MAX: Final = 128
KIND_CHARS_MAX: Final = 128
_PEOPLE: Final = frozenset({"human", "user", "feedback"})
# Where what is said stands, in this order, if an entry has a text of its own.
_TEXTS: Final = ("text", "content", "prompt", "result", "response", "message")
_decode: Final = msgspec.json.Decoder().decode


def cache_path(var: Path) -> Path:
    """Return where the cache of conversations is."""
    return var / "cache" / "conversations.db"


def said(line: bytes) -> Said:
    """Return what a line says.

    Raises:
        Unreadable: it is of no known form.
    """
    try:
        return _read(*_entry(line))
    except RecursionError:
        raise Unreadable("it is nested too deep") from None


def _read(entry: dict[str, Any], kind: str) -> Said:
    if kind == "ksi":
        about = entry["ksi"]
        sender = about.get("agent_id") or about.get("provider") or "assistant"
        return _said(about.get("timestamp"), sender, "response", _spoken(entry["response"]))
    if kind == "event":
        metadata, data = entry.get("metadata"), entry["data"]
        metadata = metadata if isinstance(metadata, dict) else {}
        sender = metadata.get("agent_id") or data.get("agent_id") or "unknown"
        words = "\n".join(_strings(data))
        return _said(entry["timestamp"], sender, entry["event"], words, metadata.get("seq"))
    if kind in _PEOPLE:
        words = "\n".join(_strings(entry.get("content")))
        return _said(entry["timestamp"], kind, kind, words)
    outcome = entry.get("subtype") or ("error" if entry.get("is_error") else "success")
    words = "\n".join(_strings(entry.get("result", entry.get("content"))))
    return _said(entry["timestamp"], kind, str(outcome), words)


def content_of(line: bytes) -> str:
    """Return what a line says as it is shown. Raises as `said`."""
    entry, kind = _entry(line)
    if kind == "ksi":
        return _spoken(entry["response"])
    if kind != "event":
        return "\n".join(_strings(entry.get("content") if kind in _PEOPLE else entry.get("result")))
    data = entry["data"]
    for name in _TEXTS:
        if isinstance(data.get(name), str):
            return str(data[name])
    return msgspec.json.encode(data).decode() if data else ""


def _entry(line: bytes) -> tuple[dict[str, Any], str]:
    """Return a line and which of the known forms it is of."""
    try:
        entry = _decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON: {error}"[:300]) from None
    if not isinstance(entry, dict):
        raise Unreadable("it is no JSON object")
    if isinstance(entry.get("ksi"), dict) and "response" in entry:
        return entry, "ksi"
    if "timestamp" not in entry:
        raise Unreadable("it has no timestamp")
    if isinstance(entry.get("event"), str) and isinstance(entry.get("data"), dict):
        return entry, "event"
    kind = entry.get("type")
    if kind == "claude" or kind in _PEOPLE:
        return entry, str(kind)
    raise Unreadable(f"it is of no known form, type {kind!r}"[:300])


def _said(at: Any, sender: Any, kind: str, words: str, number: Any = None) -> Said:
    return Said(
        _time(at),
        str(sender)[:SENDER_CHARS_MAX],
        kind[:KIND_CHARS_MAX],
        words,
        number if isinstance(number, int) else None,
    )


def _time(at: Any) -> float:
    """Return a time of a log. One without a zone is taken for UTC: so it was meant."""
    if isinstance(at, bool) or not isinstance(at, int | float | str):
        raise Unreadable("it has no timestamp")
    try:
        return moment(at)
    except (Invalid, OverflowError):
        with suppress(Invalid, OverflowError):
            return moment(f"{at}Z")
    raise Unreadable(f"its timestamp {str(at)[:100]!r} is no time")


def _spoken(response: Any) -> str:
    """Return what a provider answered, whatever it wraps around that."""
    if isinstance(response, dict):
        choices = response.get("choices")
        if isinstance(choices, list):
            return "\n".join(
                text
                for choice in choices
                if isinstance(choice, dict)
                for text in _strings(choice.get("message") or choice.get("text"), "content")
            )
        for name in ("result", "content", "text", "message"):
            if name in response:
                return "\n".join(_strings(response[name], "text"))
        return ""
    return "\n".join(_strings(response))


def _strings(value: Any, only: str | None = None) -> list[str]:
    """Return every text in a value; of maps, with `only`, what stands under that name."""
    if isinstance(value, str):
        return [value]
    found: list[str] = []
    if isinstance(value, list):
        for each in value:
            found += _strings(each, only)
    elif isinstance(value, dict):
        for name, each in value.items():
            if only is None or name == only:
                found += _strings(each)
    return found


class ConversationsView:
    """The conversations of one var: see `ksi.actors.owner.Conversations`."""

    def __init__(self, var: Path) -> None:
        self._var = var
        self._reader = ConversationsReader(cache_path(var))
        self._logs = log_directory(var)
        self._sessions: OwnerReader | None = None

    def find(
        self, *, since: Any = None, until: Any = None, age_s: float | None = None, **wanted: Any
    ) -> tuple[list[dict[str, Any]], int]:
        """Return conversations, and how many there are in all. Takes what the reader does.

        `age_s`: only those in which something was said within this time.
        """
        now = time.time()
        between = time_range(since, until, now=now)
        if age_s is not None:
            between = between._replace(since=max(0.0, now - age_s))
        found, total = self._reader.find(since=between.since, until=between.until, **wanted)
        return [self._shown(each) for each in found], total

    def named(self, session_id: str, file_path: str | None) -> list[dict[str, Any]]:
        """Return the conversations that an id may mean."""
        if file_path == self._path(SESSION + session_id):
            file_path = SESSION + session_id
        return [self._shown(each) for each in self._reader.named(session_id, file_path)]

    def messages(self, path: str, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return messages in the order of their lines, as many as fit into an answer."""
        found: list[dict[str, Any]] = []
        room = PAGE_BYTES_MAX
        for line, place, size, at, sender, kind in self._reader.messages(path, offset, limit):
            text = self._text(path, place, size)
            content = None if text is None else text[:CONTENT_BYTES_MAX]
            room -= 3 * len(content or "") + 200  # At the most: characters take up to four bytes.
            if room < 0 and found:
                break
            found.append(
                {
                    "line_number": line,
                    "byte_offset": place,
                    "timestamp": at,
                    "sender": sender,
                    "type": kind,
                    "content": content,
                    "is_cut": text is not None and len(text) > CONTENT_BYTES_MAX,
                }
            )
        return found

    def search(
        self,
        query: str,
        *,
        search_in: list[str],
        since: Any,
        until: Any,
        **wanted: Any,
    ) -> dict[str, Any]:
        """Return the conversations with the most matches, and where these are.

        Raises:
            Invalid: there is no word in the query.
        """
        terms = terms_of(query)
        between = time_range(since, until, now=time.time())
        results, matches, conversations, total = self._reader.search(
            match_of(terms, search_in),
            since=between.since,
            until=between.until,
            **wanted,
        )
        shown = {each["path"]: {**self._shown(each), "matches": []} for each in results}
        for path, line, place, size, at, sender, kind in matches:
            if path not in shown:
                continue
            shown[path]["matches"].append(
                {
                    "line_number": line,
                    "byte_offset": place,
                    "timestamp": at,
                    "sender": sender,
                    "type": kind,
                    "content_preview": preview_of(self._words(path, place, size), terms),
                }
            )
        return {
            "conversations": conversations,
            "matches": total,
            "results": list(shown.values()),
        }

    def problems(self, *, file_path: str | None, **wanted: Any) -> list[dict[str, Any]]:
        """Return the lines and files that cannot be read, and why not."""
        found = self._reader.problems(path=file_path, **wanted)
        return [{**each, "file_path": self._path(each["path"])} for each in found]

    def counts(self) -> dict[str, Any]:
        """Return how much there is in all."""
        return self._reader.counts()

    def state(self) -> dict[str, Any]:
        """Return what the cache has come to, and what the follower says of itself."""
        rebuilt, imported = self._reader.orders()
        return {
            "rebuilt": rebuilt,
            "imports": imported,
            **read_follower(run_directory(self._var), "conversations"),
        }

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        is_session = row["path"].startswith(SESSION)
        has_said = bool(row["messages"])
        return {
            **row,
            "file_path": self._path(row["path"]),
            "origin": "session" if is_session else "import",
            "message_count": row["messages"],
            "first_timestamp": row["first_at"] if has_said else None,
            "last_timestamp": row["last_at"] if has_said else None,
        }

    def _path(self, path: str) -> str:
        if path.startswith(SESSION):
            return f"{os.path.realpath(self._logs)}/{path.removeprefix(SESSION)}.jsonl"
        return path

    def _text(self, path: str, offset: int, size: int) -> str | None:
        """Return what a line says; None if it is not there any more."""
        try:
            return content_of(self._line(path, offset, size))
        except (OSError, KsiError, Unreadable):
            return None

    def _words(self, path: str, offset: int, size: int) -> str:
        try:
            return said(self._line(path, offset, size)).words
        except (OSError, KsiError, Unreadable):
            return ""

    def _line(self, path: str, offset: int, size: int) -> bytes:
        if path.startswith(SESSION):
            if self._sessions is None:
                self._sessions = reader_of("sessions", self._var)
            session_id = path.removeprefix(SESSION)
            return self._sessions.reader.log(session_id, offset, offset + size)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)
