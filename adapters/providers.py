"""Providers: what answers a prompt. A worker runs one or more of them.

A provider has a name, which its worker offers and a request may require, and answers one grant at a
time as often as its worker has slots. What it raises fails the attempt: `Failed` says of which kind
that is, and so whether another is to follow. When it is cancelled, the grant is over: it must end
soon, and leave nothing running.

Each is built from `Settings` by name. What needs an extra imports it in a worker process only: a
missing extra, key or model is refused when it is built. Keys come from the environment or a file;
they are never part of a message, a log or an error.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Protocol, runtime_checkable

import msgspec

from ksi.actors.declarations.completion import PASSING, GrantView, Kind
from ksi.actors.declarations.spending import Usage
from ksi.transport.errors import Invalid
from ksi.transport.limits import HISTORY_BYTES_MAX, HISTORY_TURNS_MAX

KEY_BYTES_MAX: Final = 4096  # A file that holds more is no key.
WORDS_MAX: Final = 1000  # Characters of what a provider says of its failure.


Grant = GrantView  # What a provider is given to do.


class Turn(NamedTuple):
    """One prompt of a session and the answer to it."""

    prompt: str
    response: str


class Past(NamedTuple):
    """What was said in a session before: its turns, and the session the provider itself keeps."""

    turns: list[Turn]
    provider_session: str | None = None


class Talk(Protocol):
    """The way of a provider to the session and to the requester, while it works on a grant."""

    async def say(self, progress: dict[str, Any]) -> None:
        """Tell the requester how it gets on; kept until the attempt ends."""

    async def tokens(self, text: str) -> None:
        """Let the requester see the answer grow by `text`."""

    async def past(self, bytes_max: int = HISTORY_BYTES_MAX) -> Past:
        """Return what was said in this session before, the newest turns as far as they fit."""


class Provider(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """What a request requires to come here."""

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        """Return the result: `response`, `model`, and what else is to be recorded.

        `usage`, a `Usage`, is what it took. `provider_session` names the session that the provider
        itself keeps; the next grant of this session finds it in `talk.past`.
        """


@runtime_checkable
class Opened(Protocol):
    """A provider with something to make ready that takes time."""

    def open(self) -> None:
        """Make it ready; called once, before the worker takes part. Raises what `build` raises."""


class Failed(Exception):
    """An attempt has failed. Of a kind that may pass, it is tried again."""

    def __init__(
        self,
        kind: Kind,
        words: str,
        *,
        retry_after_s: float | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(words[:WORDS_MAX])
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.usage = usage

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may come to more."""
        return self.kind in PASSING


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request may ask of a model: `completion:async` takes it as `options`.

    `history` is how many turns of the session the model is told at the most.
    """

    system: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    stop: list[str] | None = None
    seed: int | None = None
    history: Annotated[int, msgspec.Meta(ge=0, le=HISTORY_TURNS_MAX)] = HISTORY_TURNS_MAX

    def given(self) -> dict[str, Any]:
        """Return what models know under these names, as far as it was said."""
        names = ("max_tokens", "temperature", "top_p", "stop", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with, for all providers; each takes what it knows.

    `environment` is where keys and addresses are looked for.
    """

    offers: str | None = None
    model: str | None = None
    base_url: str | None = None
    key_file: Path | None = None
    command: str | None = None
    stdin: str = "text"
    model_file: Path | None = None
    slots: int = 1
    environment: Mapping[str, str] = os.environ


class Echo:
    """Says what was said, and that it is an echo. `options.delay_s` makes it take that long."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.name = (settings and settings.offers) or "echo"

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        delay_s = grant.options.get("delay_s", 0)
        if not isinstance(delay_s, int | float) or not 0 <= delay_s <= grant.run_s:
            words = f"options.delay_s must be 0 to {grant.run_s:g}, not {delay_s!r}"
            raise Failed("invalid_request", words)
        if delay_s:
            await talk.say({"delay_s": delay_s})
            await asyncio.sleep(delay_s)  # as it was asked to
        return {"response": grant.prompt, "model": "echo"}


# Where each is, and the packages it needs: those of the extra of its name.
PROVIDERS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "anthropic": ("ksi.adapters.anthropic:Anthropic", ("anthropic",)),
    "command": ("ksi.adapters.command:Command", ()),
    "echo": ("ksi.adapters.providers:Echo", ()),
    "litellm": ("ksi.adapters.litellm:LiteLlm", ("litellm", "openai")),
    "local": ("ksi.adapters.local:Local", ("xllamacpp", "openai")),
    "openai": ("ksi.adapters.openai:OpenAi", ("openai",)),
}


def build(name: str, settings: Settings) -> Provider:
    """Return a provider that can answer.

    Raises:
        Invalid: there is none of this name, or its extra, its key, its model or its program is
            missing; the text says which.
    """
    if name not in PROVIDERS:
        raise Invalid(f"there is no provider {name!r}", hint=f"one of {', '.join(PROVIDERS)}")
    place, packages = PROVIDERS[name]
    if not all(map(find_spec, packages)):
        raise Invalid(
            f"provider {name} needs the extra {name!r}, which is not installed",
            hint=f'pip install "ksi[{name}]"',
        )
    module, _, kind = place.partition(":")
    made: Callable[[Settings], Provider] = getattr(import_module(module), kind)
    return made(settings)


def key(settings: Settings, provider: str, variable: str) -> str:
    """Return the key of a provider, from the file that was named or from the environment.

    Raises:
        Invalid: there is none.
    """
    if settings.key_file is not None:
        try:
            with settings.key_file.open(encoding="utf-8") as file:
                found = file.read(KEY_BYTES_MAX).strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            text = f"the key of provider {provider} cannot be read: {settings.key_file}: {why}"
            raise Invalid(text) from None
    else:
        found = settings.environment.get(variable, "").strip()
    if not found or not found.isprintable() or len(found.split()) != 1:
        where = settings.key_file or f"the variable {variable}"
        what = "holds no key" if found or settings.key_file else "is not set"
        raise Invalid(
            f"provider {provider} needs a key, and {where} {what}",
            hint=f"export {variable}=..., or ksi worker --key-file FILE",
        )
    return found


def options_of(grant: Grant) -> Options:
    """Return what a request asks of a model; what is unknown or out of bounds fails it."""
    try:
        return msgspec.convert(grant.options, Options)
    except msgspec.ValidationError as error:
        raise Failed("invalid_request", f"options: {error}") from None


def model_of(grant: Grant, settings: Settings) -> str:
    """Return the model that is to answer."""
    model = grant.model or settings.model
    if model is None:
        words = "no model is named, and the worker has none: model=..., or ksi worker --model"
        raise Failed("invalid_request", words)
    return model


async def messages_of(
    grant: Grant, talk: Talk, options: Options, bytes_max: int = HISTORY_BYTES_MAX
) -> list[dict[str, str]]:
    """Return the session so far and the prompt, as most models take it."""
    past = await talk.past(bytes_max) if options.history else Past([])
    said = [{"role": "system", "content": options.system}] if options.system else []
    for turn in past.turns[-options.history :] if options.history else ():
        said += [
            {"role": "user", "content": turn.prompt},
            {"role": "assistant", "content": turn.response},
        ]
    return [*said, {"role": "user", "content": grant.prompt}]


_BY_STATUS: Final[dict[int, Kind]] = {
    400: "invalid_request", 401: "authentication", 402: "authentication", 403: "authentication",
    404: "model_not_found", 408: "timeout", 409: "temporary_failure", 413: "invalid_request",
    422: "invalid_request", 425: "temporary_failure", 429: "api_rate_limit",
}  # fmt: skip
_BY_WORDS: Final[tuple[tuple[str, Kind], ...]] = (
    (r"rate.?limit|usage limit|hit your limit|too many requests", "api_rate_limit"),
    (r"api key|/login|unauthori[sz]ed|authenticat|credit balance|forbidden", "authentication"),
    (r"model.{0,80}(not found|not exist|may not exist)|not_found_error", "model_not_found"),
    (r"too long|invalid_request", "invalid_request"),
    (r"timed? ?out", "timeout"),
    (r"connection|network|unreachable|ECONN", "network_error"),
)


def kind_of_status(status: int) -> Kind:
    """Return what an HTTP status means for a request."""
    return _BY_STATUS.get(status, "provider_error" if status >= 500 else "invalid_request")


def kind_of_words(words: str) -> Kind:
    """Return what words mean that a program says of its failure: a status in them, or a phrase."""
    status = re.search(r"\b(?:error|status|code)\b\D{0,10}\b([45]\d\d)\b", words, re.IGNORECASE)
    if status is not None:
        return kind_of_status(int(status[1]))
    for pattern, kind in _BY_WORDS:
        if re.search(pattern, words, re.IGNORECASE | re.DOTALL):
            return kind
    return "provider_error"


def without(words: str, *secrets: str) -> str:
    """Return words with nothing in them that is secret."""
    for secret in secrets:
        words = words.replace(secret, "***")
    return words


def broken(error: Exception, *secrets: str) -> Failed:
    """Return what an error means that a library lets through in the middle of an answer.

    Libraries use one HTTP client or another, which name their errors alike, and may wrap them.
    """
    names = {kind.__name__ for each in _behind(error) for kind in type(each).__mro__}
    words = without(f"{type(error).__name__}: {error}", *secrets)
    if "TimeoutException" in names:
        return Failed("timeout", words)
    if "TransportError" in names:
        return Failed("network_error", words)
    return Failed("provider_error", words)


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def retry_after_s(header: str | None) -> float | None:
    """Return how long a server wants to be left alone; a date is not understood."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e9 else None
