"""The provider `litellm`: what LiteLLM can reach, by its names of models (`mistral/small`).

Keys are those that LiteLLM looks for in the environment. It is a large package and once was
tampered with where it is published: its version is pinned, and it is imported in a worker process
only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ksi.adapters.openai import failures, gathered
from ksi.adapters.providers import (
    Failed,
    Grant,
    Settings,
    Talk,
    broken,
    key,
    messages_of,
    model_of,
    options_of,
)
from ksi.transport.errors import Invalid

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # Else it fetches one when imported.
import litellm

litellm.suppress_debug_info = True
litellm.telemetry = False

SECRET_CHARS_MIN: Final = 8  # What is shorter is a switch, not a key.
# A status of 500, though there may have been none: the connection failed, or the answer broke off.
_VAGUE: Final = (litellm.exceptions.InternalServerError, litellm.exceptions.MidStreamFallbackError)


class LiteLlm:
    """Answers by way of LiteLLM.

    Raises:
        Invalid: the model that was named needs a key that is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.offers or "litellm"
        self._settings = settings
        self._key = None
        self._secrets = list(secrets_of(settings.environment))
        if settings.key_file is not None:
            self._key = key(settings, self.name, "")
            self._secrets.append(self._key)
        elif settings.model is not None and settings.base_url is None:
            missing = litellm.validate_environment(settings.model)["missing_keys"]
            if missing:
                text = f"provider {self.name} needs {', '.join(missing)} for {settings.model}"
                raise Invalid(text, hint=f"export {missing[0]}=..., or ksi worker --key-file FILE")

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        options, model = options_of(grant), model_of(grant, self._settings)
        messages = await messages_of(grant, talk, options)
        more = {"api_base": self._settings.base_url, "api_key": self._key}
        with failures(*self._secrets):
            try:
                stream = await litellm.acompletion(
                    model=model,
                    messages=messages,
                    stream=True,
                    stream_options={"include_usage": True},
                    timeout=grant.run_s,
                    num_retries=0,
                    **{name: value for name, value in more.items() if value},
                    **options.given(),
                )
                result = await gathered(stream, talk, model)
            except _VAGUE as error:
                raise broken(error, *self._secrets) from error
        if stream.received_finish_reason is None and stream.intermittent_finish_reason is None:
            # What it hands out says "stop" all the same.
            raise Failed("network_error", "the answer broke off", usage=result["usage"])
        return result


def secrets_of(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what may be a key: LiteLLM takes one or another, and errors may repeat it."""
    for name, value in environment.items():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(value) >= SECRET_CHARS_MIN:
            yield value
