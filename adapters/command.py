"""The provider `command`: any program that reads a prompt and prints an answer.

The program is called anew for each grant, without a shell. Words of its command line may hold
`{model}`, `{system}`, `{prompt}` and `{session}`, the session that the program itself keeps; words
in brackets are left out where what they hold is not known:

    claude -p --output-format json [--model {model}] [--resume {session}]

The prompt is its standard input unless `{prompt}` stands among the words; with `stdin` "json" it is
the whole grant as one JSON object, with the `history` of the session. It prints

- what the Claude command line prints with `--output-format json` or `stream-json`; or
- one JSON object with `response`, and `model`, `session`, `usage` if it has them; or
- text, which is the answer as it stands.

Cancelled, it is told to end (SIGTERM to its process group), and killed when it does not.

Source: Claude Code, "Run Claude Code programmatically": result messages of `claude -p`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ksi.actors.declarations.spending import Usage
from ksi.adapters.providers import Failed, Grant, Past, Settings, Talk, kind_of_words
from ksi.transport.errors import Invalid
from ksi.transport.limits import OUTPUT_BYTES_MAX

END_S: Final = 2.0  # From SIGTERM to SIGKILL.
READ_BYTES: Final = 64 << 10
SAID_CHARS_MAX: Final = 500  # Of what a program says of its failure.
FIELDS: Final = ("model", "system", "prompt", "session")
_PR_SET_PDEATHSIG: Final = 1
_LOST_SESSION: Final = "No conversation found"


class Command:
    """Answers with a program.

    Raises:
        Invalid: there is no command line, it has a field that nobody knows, or no such program.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.offers or "command"
        self._model = settings.model
        self._stdin = settings.stdin
        try:
            self._words = shlex.split(settings.command or "")
        except ValueError as error:
            raise Invalid(f"the command line {settings.command!r} is none: {error}") from None
        if not self._words:
            raise Invalid(
                "provider command needs a command line",
                hint="ksi worker --provider command --command 'claude -p --output-format json'",
            )
        for word in self._words:
            try:
                word.format(**dict.fromkeys(FIELDS, ""))
            except (KeyError, IndexError, ValueError):
                known = " ".join(f"{{{each}}}" for each in FIELDS)
                text = f"{word!r} has a field that is none of {known}"
                raise Invalid(text, hint="a brace that stands for itself is doubled: {{") from None
        if shutil.which(self._words[0], path=settings.environment.get("PATH")) is None:
            raise Invalid(f"provider command finds no program {self._words[0]!r}")

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        asks_session = any("{session}" in word for word in self._words)
        wants_past = asks_session or self._stdin == "json"
        past = await talk.past() if wants_past else Past([])
        try:
            return await self._answer(grant, talk, past)
        except Failed as failed:
            if past.provider_session is None or _LOST_SESSION not in str(failed):
                raise
        return await self._answer(grant, talk, Past(past.turns))  # The program has forgotten it.

    async def _answer(self, grant: Grant, talk: Talk, past: Past) -> dict[str, Any]:
        known = {
            "model": grant.model or self._model,
            "system": grant.options.get("system"),
            "prompt": grant.prompt,
            "session": past.provider_session,
        }
        for name in ("model", "session"):
            if (known[name] or "").startswith("-"):
                raise Failed("invalid_request", f"the {name} {known[name]!r} is an option")
        words = list(filled(self._words, known))
        ours = {"KSI_REQUEST": grant.request_id, "KSI_SESSION": grant.session_id}
        try:
            process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE, env={**os.environ, **ours},
                start_new_session=True, preexec_fn=_die_with_us,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise Failed("invalid_request", f"{words[0]} cannot be run: {error}") from None
        try:
            said, complaints, _ = await asyncio.gather(
                _read(process.stdout, talk), _read(process.stderr, None),
                _write(process.stdin, self._input(grant, past)),
            )  # fmt: skip
            code = await process.wait()
        finally:
            await _end(process)
        try:
            return answer_of(said.decode(errors="replace"))
        except Failed as failed:
            if code == 0:
                raise
            last = complaints.decode(errors="replace").strip()[-SAID_CHARS_MAX:]
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            kind = failed.kind if failed.kind != "provider_error" else kind_of_words(last)
            text = f"{words[0]} ended with {how}: {last or failed}"
            raise Failed(kind, text, usage=failed.usage) from None

    def _input(self, grant: Grant, past: Past) -> bytes:
        if self._stdin == "json":
            history = [turn._asdict() for turn in past.turns]
            return msgspec.json.encode({**msgspec.structs.asdict(grant), "history": history})
        if any("{prompt}" in word for word in self._words):
            return b""
        if past.provider_session is None and past.turns:
            return _retold(past, grant.prompt).encode()
        return grant.prompt.encode()


def _retold(past: Past, prompt: str) -> str:
    """Return the prompt behind what was said, for a program that does not know it."""
    said = "\n\n".join(f"User: {turn.prompt}\n\nAssistant: {turn.response}" for turn in past.turns)
    return f"This is our conversation so far:\n\n{said}\n\nNow:\n\n{prompt}"


def filled(words: list[str], known: dict[str, str | None]) -> Iterator[str]:
    """Yield the words with their fields; a group in brackets only if all it names is known."""
    group: list[str] = []
    depth = 0
    for word in words:
        depth += word.startswith("[")
        group.append(word)
        if depth and not word.endswith("]"):
            continue
        named = [name for name in FIELDS for each in group if f"{{{name}}}" in each]
        if depth:
            group = [each.removeprefix("[").removesuffix("]") for each in group]
        if not depth or all(known[name] for name in named):
            yield from (
                each.format(**{name: value or "" for name, value in known.items()})
                for each in group
            )
        group, depth = [], 0
    yield from group


def _die_with_us() -> None:
    """Have the kernel end the program when its worker does. Source: prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


async def _write(stdin: asyncio.StreamWriter | None, content: bytes) -> None:
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # It reads no further.
        stdin.write(content)
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()


async def _read(stream: asyncio.StreamReader | None, talk: Talk | None) -> bytes:
    """Read to the end; let the requester see what is text as it comes."""
    assert stream is not None
    said = bytearray()
    told = 0
    while chunk := await stream.read(READ_BYTES):
        said += chunk
        if len(said) > OUTPUT_BYTES_MAX:
            words = f"the program has printed more than {OUTPUT_BYTES_MAX} bytes"
            raise Failed("invalid_request", words)
        whole = said.rfind(b"\n") + 1
        if talk is not None and whole > told:
            lines, told = bytes(said[told:whole]).decode(errors="replace"), whole
            if (text := _shown(lines)) and not said.startswith(b"["):
                await talk.tokens(text)
    return bytes(said)


def _shown(lines: str) -> str:
    """Return what people are shown of some lines of output: text, or what the model says."""
    shown = ""
    for line in lines.splitlines(keepends=True):
        if not line.startswith("{"):
            shown += line
            continue
        with contextlib.suppress(msgspec.DecodeError, TypeError, KeyError, AttributeError):
            message = msgspec.json.decode(line)
            if message.get("type") == "assistant":
                shown += "".join(
                    part["text"] for part in message["message"]["content"] if "text" in part
                )
    return shown


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the program and its process group, if it has not ended, and let go of its pipes."""
    try:
        if process.returncode is None:
            await _told_to_end(process)
    finally:
        # There is no public name for it, and what was not read to its end stays open otherwise.
        transport: asyncio.SubprocessTransport = process._transport  # type: ignore[attr-defined]
        transport.close()


async def _told_to_end(process: asyncio.subprocess.Process) -> None:
    waiting = asyncio.ensure_future(process.wait())
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        done, _ = await asyncio.wait({waiting}, timeout=END_S)
        if done:
            return


def answer_of(text: str) -> dict[str, Any]:
    """Return the result that a program has printed."""
    said = text.strip()
    if not said:
        raise Failed("provider_error", "the program has printed nothing")
    if not said.startswith(("{", "[")):
        return {"response": said, "model": "command"}
    last = said if said.startswith("[") else said.splitlines()[-1]
    for whole in (said, last):
        try:
            message = msgspec.json.decode(whole)
            break
        except msgspec.DecodeError:
            continue
    else:
        raise Failed("provider_error", "the output of the program ends within a JSON value")
    if isinstance(message, list):
        message = message[-1] if message else None
    if not isinstance(message, dict):
        raise Failed("provider_error", "the program has printed JSON, but no object")
    if "response" in message:
        return _own(message)
    return _claude(message)


def _own(message: dict[str, Any]) -> dict[str, Any]:
    try:
        usage = msgspec.convert(message.get("usage"), Usage | None)
    except msgspec.ValidationError as error:
        raise Failed("provider_error", f"usage: {error}") from None
    result = {"response": message["response"], "model": message.get("model") or "command"}
    session = message.get("session")
    return {**result, "usage": usage} | ({"provider_session": session} if session else {})


def _claude(message: dict[str, Any]) -> dict[str, Any]:
    """Return the result in a message of type `result` of the Claude command line."""
    usage = _claude_usage(message)
    response = message.get("result")
    if message.get("is_error") or not isinstance(response, str):
        words = response if isinstance(response, str) else str(message.get("subtype"))
        if not isinstance(response, str) and "subtype" not in message:
            words = "the program has printed a JSON object without a result"
        kind = "invalid_request" if words == "error_max_turns" else kind_of_words(words)
        raise Failed(kind, words, usage=usage)
    models = message.get("modelUsage")
    model = ", ".join(map(str, models)) if isinstance(models, dict) and models else "claude"
    result = {"response": response, "model": model, "usage": usage}
    session = message.get("session_id")
    kept = {"provider_session": session} if isinstance(session, str) and session else {}
    return {**result, **kept}


def _claude_usage(message: dict[str, Any]) -> Usage | None:
    """Return what it took. What came from a cache is part of the input, as with others."""
    said, cost = message.get("usage"), message.get("total_cost_usd")
    if not isinstance(said, dict):
        return None

    def count(name: str) -> int:
        value = said.get(name)
        return value if isinstance(value, int) and 0 <= value < 1 << 40 else 0

    cached = count("cache_read_input_tokens")
    fresh = count("input_tokens") + count("cache_creation_input_tokens")
    return Usage(
        input_tokens=fresh + cached,
        output_tokens=count("output_tokens"),
        cached_tokens=cached,
        cost_usd=cost if isinstance(cost, int | float) and 0 <= cost < 1e9 else None,
    )
