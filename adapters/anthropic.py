"""The provider `anthropic`: Claude by Anthropic's own protocol. Answers are streamed."""

from __future__ import annotations

from typing import Any, Final

import anthropic

from ksi.actors.declarations.spending import Usage
from ksi.adapters.providers import (
    Failed,
    Grant,
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

KEY_VARIABLE: Final = "ANTHROPIC_API_KEY"
URL_VARIABLE: Final = "ANTHROPIC_BASE_URL"
TOKENS_USUAL: Final = 4096  # The protocol wants a bound; this is a long answer.


class Anthropic:
    """Answers by Anthropic's messages.

    Raises:
        Invalid: there is no key.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.offers or "anthropic"
        self._settings = settings
        self._url = settings.base_url or settings.environment.get(URL_VARIABLE) or None
        self._key = key(settings, self.name, KEY_VARIABLE)

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        client = anthropic.AsyncAnthropic(
            api_key=self._key, base_url=self._url, timeout=grant.run_s, max_retries=0
        )
        try:
            async with client:
                return await self._streamed(client, grant, talk)
        except anthropic.APITimeoutError as error:
            raise Failed("timeout", str(error)) from None
        except anthropic.APIStatusError as error:
            words = without(str(error), self._key)
            after_s = retry_after_s(error.response.headers.get("retry-after"))
            raise Failed(kind_of_status(error.status_code), words, retry_after_s=after_s) from None
        except anthropic.APIConnectionError as error:
            raise Failed("network_error", f"{error} {error.__cause__ or ''}".strip()) from None
        except Failed:
            raise
        except Exception as error:
            raise broken(error, self._key) from error

    async def _streamed(
        self, client: anthropic.AsyncAnthropic, grant: Grant, talk: Talk
    ) -> dict[str, Any]:
        options, model = options_of(grant), model_of(grant, self._settings)
        said = options.given()
        if "stop" in said:
            said["stop_sequences"] = said.pop("stop")
        said.pop("seed", None)  # They take none, and these of some models only.
        more = {name: said.pop(name) for name in ("temperature", "top_p") if name in said}
        if options.system:
            said["system"] = options.system
        messages = await messages_of(grant, talk, options)
        fields: dict[str, Any] = {"max_tokens": TOKENS_USUAL, **said, "model": model}
        fields["messages"] = [each for each in messages if each["role"] != "system"]
        async with client.messages.stream(**fields, extra_body=more or None) as stream:
            async for text in stream.text_stream:
                await talk.tokens(text)
            final = await stream.get_final_message()
        if final.stop_reason is None:
            raise Failed("network_error", "the answer broke off", usage=_usage_of(final.usage))
        return {
            "response": "".join(part.text for part in final.content if part.type == "text"),
            "model": final.model,
            "finish_reason": final.stop_reason,
            "usage": _usage_of(final.usage),
        }


def _usage_of(said: Any) -> Usage:
    """Return what it took. What came from a cache is part of the input, as with others."""
    cached = said.cache_read_input_tokens or 0
    return Usage(
        input_tokens=said.input_tokens + (said.cache_creation_input_tokens or 0) + cached,
        output_tokens=said.output_tokens,
        cached_tokens=cached,
    )
