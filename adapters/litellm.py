"""The provider `litellm`: what LiteLLM can reach, by its names of models (`mistral/small`).

Keys are those that LiteLLM looks for in the environment. It is a large package and once was
tampered with where it is published: its version is pinned, and it is imported in a worker process
only.
"""

from __future__ import annotations

import os
from typing import Any

from ksi.adapters.openai import failures, gathered
from ksi.adapters.providers import (
    Grant,
    Settings,
    Talk,
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


class LiteLlm:
    """Answers by way of LiteLLM.

    Raises:
        Invalid: the model that was named needs a key that is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.offers or "litellm"
        self._settings = settings
        self._key = None
        if settings.key_file is not None:
            self._key = key(settings, self.name, "")
        elif settings.model is not None and settings.base_url is None:
            missing = litellm.validate_environment(settings.model)["missing_keys"]
            if missing:
                text = f"provider {self.name} needs {', '.join(missing)} for {settings.model}"
                raise Invalid(text, hint=f"export {missing[0]}=..., or ksi worker --key-file FILE")

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        options, model = options_of(grant), model_of(grant, self._settings)
        messages = await messages_of(grant, talk, options)
        more = {"api_base": self._settings.base_url, "api_key": self._key}
        with failures(self._key or "\0"):
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
            return await gathered(stream, talk, model)
