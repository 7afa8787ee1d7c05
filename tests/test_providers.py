"""Providers: what they make of what a program or a server says, and what they leave behind."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from model_server import Model, serving
from trouble import until

from ksi.actors.declarations.spending import Usage
from ksi.adapters import providers
from ksi.adapters.command import filled
from ksi.adapters.providers import (
    Failed,
    Grant,
    Past,
    Settings,
    Turn,
    build,
    kind_of_status,
    kind_of_words,
)
from ksi.transport.errors import Invalid
from ksi.transport.limits import HISTORY_BYTES_MAX, OUTPUT_BYTES_MAX

PROGRAM = f"{sys.executable} {Path(__file__).with_name('printing.py')}"
SECRET = "sk-very-secret-4711"


class Heard:
    """A talk that keeps what it is told."""

    def __init__(self, *turns: Turn, session: str | None = None) -> None:
        self._past = Past(list(turns), session)
        self.text = ""
        self.pieces = 0

    async def say(self, progress: dict[str, Any]) -> None:
        pass

    async def tokens(self, text: str) -> None:
        self.text += text
        self.pieces += 1

    async def past(self, bytes_max: int = HISTORY_BYTES_MAX) -> Past:
        return self._past


def grant(prompt: str, **more: Any) -> Grant:
    usual: dict[str, Any] = {
        "request_id": "r1", "attempt": 1, "session_id": "s1", "requester": "alice", "model": None,
        "data": {}, "options": {}, "requires": None, "run_s": 10.0,
    }  # fmt: skip
    return Grant(**{**usual, "prompt": prompt, **more})


def answer(
    name: str, prompt: str, heard: Heard | None = None, settings: Any = (), **more: Any
) -> dict[str, Any]:
    provider = build(name, Settings(**dict(settings)))
    return asyncio.run(provider.complete(grant(prompt, **more), heard or Heard()))


def failure(name: str, prompt: str, settings: Any = (), **more: Any) -> Failed:
    with pytest.raises(Failed) as failed:
        answer(name, prompt, settings=settings, **more)
    return failed.value


# Programs.


def program(words: str = "", **more: Any) -> dict[str, Any]:
    return {"command": f"{PROGRAM} {words}", **more}


TOOK = Usage(input_tokens=51772, output_tokens=182, cached_tokens=35238, cost_usd=0.0763)


@pytest.mark.parametrize(
    ("prompt", "response", "model", "usage"),
    [
        ("text", "Just words.\nAnd more.", "command", None),
        ("stream", "Streamed.", "claude-sonnet-4", TOOK),
        ("verbose", "One of many.", "claude-sonnet-4", TOOK),
        ("own", "Mine.", "m", Usage(input_tokens=3)),
        ("hi", "new any hi", "claude-sonnet-4", TOOK),
    ],
)
def test_what_a_program_prints_is_understood(
    prompt: str, response: str, model: str, usage: Usage | None
) -> None:
    result = answer("command", prompt, settings=program())
    assert (result["response"], result["model"]) == (response, model)
    assert result.get("usage") == usage


@pytest.mark.parametrize(
    ("prompt", "kind", "words"),
    [
        ("half", "provider_error", "ends within a JSON value"),
        ("empty", "provider_error", "printed nothing"),
        ("limit", "api_rate_limit", "429"),
        ("key", "authentication", "Invalid API key"),
        ("turns", "invalid_request", "error_max_turns"),
        ("crash", "provider_error", "signal 11"),
        ("exit", "provider_error", "exit code 1: something is wrong here"),
        ("strange", "provider_error", "without a result"),
        ("much", "invalid_request", f"more than {OUTPUT_BYTES_MAX} bytes"),
    ],
)
def test_what_goes_wrong_with_a_program_is_said_and_of_a_kind(
    prompt: str, kind: str, words: str
) -> None:
    failed = failure("command", prompt, program())
    assert (failed.kind, words in str(failed)) == (kind, True), failed


def test_a_programs_own_session_is_resumed_and_when_it_is_lost_the_past_is_told() -> None:
    settings = program("[--resume {session}] [--model {model}]")
    first = answer("command", "one", settings=settings)
    assert first["provider_session"] == "p2"
    turn = Turn("one", "new any one")
    resumed = answer("command", "two", Heard(turn, session="p2"), settings, model="opus")
    assert resumed["response"] == "p2 opus two"
    lost = answer("command", "three", Heard(turn, session="lost"), settings)
    assert lost["response"].startswith("new any This is our conversation so far")
    assert "new any one" in lost["response"]


def test_a_model_cannot_be_an_option_of_the_program() -> None:
    failed = failure("command", "hi", program("[--model {model}]"), model="--do-anything")
    assert (failed.kind, "is an option" in str(failed)) == ("invalid_request", True)


def test_a_program_may_read_all_there_is_as_json() -> None:
    reader = (
        "import json, sys; g = json.load(sys.stdin); print(*g['history'][0].values(), g['prompt'])"
    )
    settings = {"command": f'{sys.executable} -c "{reader}"', "stdin": "json"}
    result = answer("command", "now", Heard(Turn("then", "yes")), settings)
    assert result["response"] == "then yes now"


def test_text_is_heard_while_it_is_printed() -> None:
    heard = Heard()
    answer("command", "stream", heard, program())
    assert heard.text == "Streamed."


@pytest.mark.parametrize("prompt", ["hang", "stubborn"])
def test_a_program_that_is_cancelled_has_ended_soon(tmp_path: Path, prompt: str) -> None:
    noted = tmp_path / "pid"

    async def check() -> None:
        provider = build("command", Settings(**program()))
        task = asyncio.create_task(provider.complete(grant(f"{prompt}:{noted}"), Heard()))
        while not (noted.exists() and noted.read_text()):
            await asyncio.sleep(0.01)  # It goes on in this very loop.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begun_s = time.monotonic()
    asyncio.run(check())
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    assert time.monotonic() - begun_s < 15


def test_words_of_a_command_line_are_filled_and_groups_left_out() -> None:
    words = ["p", "[--model", "{model}]", "[-r={session}]", "-x", "{prompt}"]
    known = {"model": None, "session": "s 1", "prompt": "a 'b'", "system": None}
    assert list(filled(words, known)) == ["p", "-r=s 1", "-x", "a 'b'"]
    assert list(filled(words, {**known, "model": "m", "session": ""})) == [
        "p", "--model", "m", "-x", "a 'b'",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (None, "needs a command line"),
        ("no-such-program-here -p", "finds no program 'no-such-program-here'"),
        (f"{sys.executable} {{nonsense}}", "has a field that is none of"),
        ("'unbalanced", "is none"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_at_once(
    command: str | None, words: str
) -> None:
    with pytest.raises(Invalid, match=words):
        build("command", Settings(command=command))


# Servers.


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as url:
        yield url


def named(name: str, model: str) -> str:
    """Return a model as this provider calls it."""
    return f"openai/{model}" if name == "litellm" else model


def server(name: str, url: str, **more: Any) -> dict[str, Any]:
    return {
        "base_url": url if name == "anthropic" else f"{url}/v1", "model": named(name, "m1"),
        "environment": {"OPENAI_API_KEY": SECRET, "ANTHROPIC_API_KEY": SECRET}, **more,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a key where LiteLLM looks for it, whatever a provider is built with."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


# It uses what the library beneath it would rather have used otherwise.
DEPRECATED = pytest.mark.filterwarnings("ignore::DeprecationWarning:litellm")
LITELLM = pytest.param("litellm", marks=[pytest.mark.extra, DEPRECATED])
EACH = pytest.mark.parametrize("name", ["openai", "anthropic", LITELLM])


@pytest.mark.extra
def test_litellm_is_told_its_key_by_a_file_or_the_environment_and_says_which_is_missing(
    url: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"base_url": f"{url}/v1", "model": "openai/m1", "environment": {}}
    with pytest.raises(Invalid, match="holds no key"):
        build("litellm", Settings(**settings, key_file=Path(__file__)))
    with pytest.raises(Invalid, match="MISTRAL_API_KEY"):
        build("litellm", Settings(model="mistral/mistral-small-latest"))
    (tmp_path / "key").write_text(SECRET + "\n")
    settings["key_file"] = tmp_path / "key"
    assert answer("litellm", "hi", settings=settings)["response"] == "you said hi "
    assert SECRET in Model.keys[-1]
    assert SECRET not in str(failure("litellm", "401", settings))


@EACH
def test_a_server_answers_in_pieces_and_says_what_it_took(url: str, name: str) -> None:
    heard = Heard(Turn("before", "was that"))
    options = {"system": "be brief", "max_tokens": 30, "temperature": 0.5, "stop": ["x"]}
    result = answer(name, "hello you", heard, server(name, url), options=options)
    assert result["response"] == heard.text == "you said hello you "
    assert (result["model"], heard.pieces) == ("m1", 4)
    assert result["usage"] in (
        Usage(input_tokens=21, output_tokens=7, cached_tokens=8 if name == "anthropic" else 5),
    )
    body = Model.asked[-1]
    said = [each["content"] for each in body["messages"] if each["role"] != "system"]
    assert said == ["before", "was that", "hello you"]
    assert (body["max_tokens"], body["temperature"]) == (30, 0.5)
    assert "be brief" in str(body)


@EACH
def test_a_model_is_told_no_more_turns_than_the_request_wants(url: str, name: str) -> None:
    heard = Heard(*(Turn(f"p{n}", f"r{n}") for n in range(5)))
    model = named(name, "m2")
    answer(name, "now", heard, server(name, url), options={"history": 2}, model=model)
    said = [each["content"] for each in Model.asked[-1]["messages"]]
    assert said == ["p3", "r3", "p4", "r4", "now"]
    assert Model.asked[-1]["model"] == "m2"
    answer(name, "now", heard, server(name, url), options={"history": 0})
    assert len(Model.asked[-1]["messages"]) == 1


@EACH
@pytest.mark.parametrize(
    ("prompt", "kind", "after_s"),
    [
        ("429", "api_rate_limit", 0.4),
        ("401", "authentication", None),
        ("400", "invalid_request", None),
        ("500", "provider_error", None),
        ("529", "provider_error", None),
        ("408", "timeout", None),
    ],
)
def test_what_a_server_refuses_is_of_a_kind_and_the_key_is_not_in_its_words(
    url: str, name: str, prompt: str, kind: str, after_s: float | None
) -> None:
    failed = failure(name, prompt, server(name, url))
    assert (failed.kind, failed.retry_after_s) == (kind, after_s)
    assert SECRET in Model.keys[-1]
    assert SECRET not in str(failed)


@EACH
def test_a_model_that_does_not_exist_fails_for_good(url: str, name: str) -> None:
    failed = failure(name, "hi", server(name, url), model=named(name, "missing"))
    assert (failed.kind, failed.may_pass) == ("model_not_found", False)
    nameless = failure(name, "hi", server(name, url, model=None))
    assert (nameless.kind, "no model is named" in str(nameless)) == ("invalid_request", True)


@EACH
def test_a_server_that_hangs_breaks_off_or_is_not_there_fails_in_a_way_that_may_pass(
    url: str, name: str
) -> None:
    assert failure(name, "hang", server(name, url), run_s=0.3).kind == "timeout"
    cut = failure(name, "cut", server(name, url))
    assert (cut.may_pass, cut.kind in ("network_error", "provider_error")) == (True, True), cut
    nobody = failure(name, "hi", server(name, "http://127.0.0.1:9"))
    assert nobody.kind == "network_error"


@EACH
def test_a_call_that_is_cancelled_is_hung_up(url: str, name: str) -> None:
    async def check() -> None:
        provider = build(name, Settings(**server(name, url)))
        asked = len(Model.asked)
        Model.left.clear()
        task = asyncio.create_task(provider.complete(grant("hang"), Heard()))
        while len(Model.asked) == asked:
            await asyncio.sleep(0.01)  # It goes on in this very loop.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(check())
    until(Model.left.is_set)


@EACH
@pytest.mark.parametrize("options", [{"temperatur": 1}, {"max_tokens": 0}, {"system": 3}])
def test_options_that_no_model_knows_fail_the_request(
    url: str, name: str, options: dict[str, Any]
) -> None:
    failed = failure(name, "hi", server(name, url), options=options)
    assert (failed.kind, "options" in str(failed)) == ("invalid_request", True)


# What is missing.


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_without_a_key_there_is_no_provider(name: str, tmp_path: Path) -> None:
    variable = f"{name.upper()}_API_KEY"
    with pytest.raises(Invalid, match=f"needs a key, and the variable {variable} is not set"):
        build(name, Settings(environment={}))
    for content in ("", "two words", "\x00", "line\nline"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(Invalid, match="holds no key") as refused:
            build(name, Settings(environment={}, key_file=tmp_path / "key"))
        assert not content or content not in str(refused.value)
    with pytest.raises(Invalid, match="cannot be read"):
        build(name, Settings(environment={}, key_file=tmp_path / "none"))
    (tmp_path / "key").write_text(SECRET + "\n")
    assert build(name, Settings(environment={}, key_file=tmp_path / "key")).name == name


def test_a_server_of_ones_own_needs_no_key(url: str) -> None:
    settings = server("openai", url, environment={})
    assert answer("openai", "hi", settings=settings)["response"] == "you said hi "


@pytest.mark.parametrize("name", ["openai", "anthropic", "litellm", "local"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda _package: None)
    with pytest.raises(Invalid, match=f"needs the extra '{name}'") as refused:
        build(name, Settings())
    assert refused.value.hint == f'pip install "ksi[{name}]"'


def test_a_provider_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(Invalid) as refused:
        build("gpt", Settings())
    assert "openai" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("API Error: 529 Overloaded", "provider_error"),
        ("error 404: model m1 not found", "model_not_found"),
        ("You've hit your limit · resets 7pm", "api_rate_limit"),
        ("Claude usage limit reached", "api_rate_limit"),
        ("Credit balance is too low", "authentication"),
        ("Request timed out.", "timeout"),
        ("connect ECONNREFUSED", "network_error"),
        ("Prompt is too long", "invalid_request"),
        ("What?", "provider_error"),
    ],
)
def test_words_of_programs_are_taken_for_what_they_mean(words: str, kind: str) -> None:
    assert kind_of_words(words) == kind


def test_every_status_has_a_kind() -> None:
    kinds = {status: kind_of_status(status) for status in range(400, 600)}
    assert (kinds[418], kinds[599]) == ("invalid_request", "provider_error")


# A real model, where one is installed.


@pytest.fixture(scope="module")
def local() -> Any:
    provider: Any = build("local", Settings())
    provider.open()
    return provider


@pytest.mark.extra
def test_a_local_model_answers_with_true_counts_and_stops_when_it_is_cancelled(local: Any) -> None:
    async def check() -> None:
        short = {"max_tokens": 12, "temperature": 0.0}
        heard = Heard()
        result = await local.complete(grant("Say hello.", options=short), heard)
        assert result["response"] == heard.text != ""
        assert 20 < result["usage"].input_tokens < 60
        assert 1 <= result["usage"].output_tokens <= 12
        told = await local.complete(
            grant("And?", options=short), Heard(Turn("Say hello.", result["response"]))
        )
        assert told["usage"].input_tokens > result["usage"].input_tokens
        endless = grant("Write a long story.", options={"max_tokens": 4000})
        task = asyncio.create_task(local.complete(endless, long := Heard()))
        while long.pieces < 3:
            await asyncio.sleep(0.01)  # It goes on in this very loop.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = await asyncio.wait_for(local.complete(grant("Hi", options=short), Heard()), 10)
        assert again["response"]
        with pytest.raises(Failed, match="not gpt-4") as failed:
            await local.complete(grant("Hi", model="gpt-4"), Heard())
        assert failed.value.kind == "model_not_found"
        with pytest.raises(Failed) as failed:
            await local.complete(grant("word " * 6000, options=short), Heard())
        assert failed.value.kind == "invalid_request"

    asyncio.run(check())


@pytest.mark.extra
def test_a_model_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no model file"):
        build("local", Settings(model_file=tmp_path / "none.gguf"))
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + bytes(200))
    provider: Any = build("local", Settings(model_file=tmp_path / "odd.gguf"))
    with pytest.raises(Invalid, match="cannot be loaded"):
        provider.open()


def test_settings_say_nothing_of_keys_in_a_message() -> None:
    assert "environment" not in msgspec.to_builtins(grant("x"))
