"""The provider `openai`: OpenAI, and whatever speaks its protocol (vLLM, Ollama, llama.cpp, ...).

A base URL other than OpenAI's own needs no key. Answers are streamed; what they took is what the
server says in the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import openai

from ksi.actors.declarations.spending import Usage
from ksi.adapters.providers import (
    Failed,
    Grant,
    Options,
    Settings,
    Talk,
    broken,
    key,
    kind_of_status,
    messages_of,
    model_of,
    options_of,
    retry_after_s,
    without,
)
from ksi.transport.limits import HISTORY_BYTES_MAX

KEY_VARIABLE: Final = "OPENAI_API_KEY"
URL_VARIABLE: Final = "OPENAI_BASE_URL"
NOTHING: Final = Options()
NO_KEY: Final = "none"  # What a server that asks for no key is sent, since something has to be.


class OpenAi:
    """Answers by the protocol of OpenAI's chat completions.

    Raises:
        Invalid: there is no key.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.offers or "openai"
        self._settings = settings
        self._url = settings.base_url or settings.environment.get(URL_VARIABLE) or None
        optional = self._url is not None and settings.key_file is None
        if optional and not settings.environment.get(KEY_VARIABLE):
            self._key = NO_KEY
        else:
            self._key = key(settings, self.name, KEY_VARIABLE)

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        client = openai.AsyncOpenAI(
            api_key=self._key, base_url=self._url, timeout=grant.run_s, max_retries=0
        )
        async with client:
            return await streamed(client, grant, talk, self._settings, secret=self._key)


async def streamed(
    client: Any,
    grant: Grant,
    talk: Talk,
    settings: Settings,
    *,
    secret: str,
    bytes_max: int = HISTORY_BYTES_MAX,
    usual: Options = NOTHING,
) -> dict[str, Any]:
    """Return the answer of a server, with its tokens told as they come.

    `usual` is what it is asked where the request says nothing; `secret` is kept out of errors.
    """
    options, model = options_of(grant), model_of(grant, settings)
    messages = await messages_of(grant, talk, options, bytes_max)
    with failures(secret):
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **{**usual.given(), **options.given()},
        )
        return await gathered(stream, talk, model)


async def gathered(stream: Any, talk: Talk, model: str) -> dict[str, Any]:
    """Return the answer that comes in pieces, with what it took."""
    said: list[str] = []
    usage, finish = None, None
    async for chunk in stream:
        model = chunk.model or model
        usage = usage_of(getattr(chunk, "usage", None)) or usage
        for choice in chunk.choices[:1]:
            finish = choice.finish_reason or finish
            if choice.delta.content:
                said.append(choice.delta.content)
                await talk.tokens(choice.delta.content)
    result = {"response": "".join(said), "model": model, "usage": usage}
    if finish is None:
        raise Failed("network_error", "the answer broke off", usage=usage)
    return {**result, "finish_reason": finish}


def usage_of(said: Any) -> Usage | None:
    """Return what a server says that an answer took."""
    if said is None:
        return None
    cached = getattr(getattr(said, "prompt_tokens_details", None), "cached_tokens", None)
    return Usage(
        input_tokens=said.prompt_tokens or 0,
        output_tokens=said.completion_tokens or 0,
        cached_tokens=cached or 0,
    )


@contextlib.contextmanager
def failures(*secrets: str) -> Iterator[None]:
    """Turn what the library raises into kinds of failure."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise Failed("timeout", without(str(error), *secrets)) from None
    except openai.APIStatusError as error:
        words = without(str(error), *secrets)
        # LiteLLM keeps them beside a response that it has made itself.
        headers = getattr(error, "litellm_response_headers", None) or error.response.headers
        after_s = retry_after_s(headers.get("retry-after"))
        raise Failed(kind_of_status(error.status_code), words, retry_after_s=after_s) from None
    except openai.APIConnectionError as error:
        words = without(f"{error} {error.__cause__ or ''}".strip(), *secrets)
        raise Failed("network_error", words) from None
    except Failed:
        raise
    except Exception as error:
        raise broken(error, *secrets) from error
