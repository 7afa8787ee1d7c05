"""Servers of the Model Context Protocol under trouble: killed and paused owners, bad input."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from system import System
from toolservers import Raw, over_http, within
from trouble import entries, kill, paused, paused_supervisor

from ksi.adapters.serving import token
from ksi.console import main as console
from ksi.transport.limits import BODY_BYTES_MAX


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("mcp") / "var")
    yield running
    running.end()


@pytest.fixture(scope="module")
def raw(system: System) -> Iterator[Raw]:
    """A server on pipes, with a session `raw` of its agent."""
    server = Raw(system.var, "--conversation", "raw")
    server.call("ksi_session_create", session_id="raw")
    yield server
    server.kill()


# Owners.


def test_an_owner_killed_under_a_session_costs_it_nothing(system: System, raw: Raw) -> None:
    for n in range(3):
        said = raw.call("ksi_session_append", session_id="raw", event="note", data={"n": n})
        assert said["structuredContent"]["seq"] == n + 1
        kill(system)
    assert [each["data"]["n"] for each in entries(system, "raw")] == [0, 1, 2]


def test_an_owner_killed_under_clients_over_http_loses_and_doubles_nothing(system: System) -> None:
    async def run(url: str) -> list[int]:
        bearer = {"Authorization": f"Bearer {token(system.var, 'alice')}"}
        async with (
            create_mcp_http_client(headers=bearer) as http,
            Client(streamable_http_client(url, http_client=http)) as client,
        ):
            await client.call_tool("ksi_session_create", {"session_id": "http"})

            async def append(n: int) -> int:
                fields = {"session_id": "http", "event": "note", "data": {"n": n}}
                said = await client.call_tool("ksi_session_append", fields)
                seq: int = said.structured_content["seq"]
                return seq

            appending = [asyncio.create_task(append(n)) for n in range(40)]
            await asyncio.sleep(0)  # They begin.
            await asyncio.to_thread(kill, system)
            return await asyncio.gather(*appending)

    with over_http(system.var) as url:
        assert sorted(asyncio.run(run(url))) == list(range(1, 41))
    assert sorted(each["data"]["n"] for each in entries(system, "http")) == list(range(40))


def test_queries_are_answered_with_their_owner_dead(system: System, raw: Raw) -> None:
    with paused_supervisor(system):
        kill(system)
        found = raw.call("ksi_session_get", session_id="raw")["structuredContent"]
        assert found["owner"] == "alice"
        read = json.loads(raw.ask("resources/read", uri="ksi://session/raw"))
        assert read["result"]["contents"]


def test_a_call_that_is_not_answered_gives_a_ticket_that_settles_it(system: System) -> None:
    async def run() -> None:
        async with within(system, name="settler", call_s=0.2) as client:
            await client.call_tool("ksi_session_create", {"session_id": "settled"})
            fields = {"session_id": "settled", "event": "note"}
            with paused(system):
                late = await client.call_tool("ksi_session_append", fields)
                said = late.structured_content
                assert (late.is_error, said["code"]) == (True, "unavailable")
                ticket = {"ticket": said["details"]["ticket"]}
                assert ticket["ticket"] in said["hint"]
                still = await client.call_tool("ksi_settle", ticket)
                assert still.structured_content["details"] == ticket
            while (settled := await client.call_tool("ksi_settle", ticket)).is_error:
                pass
            assert settled.structured_content["seq"] == 1
            unknown = await client.call_tool("ksi_settle", {"ticket": "none"})
            assert unknown.structured_content["code"] == "not_found"

    asyncio.run(run())
    assert len(entries(system, "settled")) == 1


def test_a_call_its_client_gives_up_leaves_the_server_well(system: System) -> None:
    async def run() -> None:
        async with within(system, name="hasty") as client:
            await client.call_tool("ksi_session_create", {"session_id": "hasty"})
            fields = {"session_id": "hasty", "event": "note"}
            with paused(system):
                calling = asyncio.create_task(client.call_tool("ksi_session_append", fields))
                await asyncio.sleep(0.05)  # It may be on its way or not: both have to end well.
                calling.cancel()
            said = await client.call_tool("ksi_session_append", fields)
            assert said.structured_content["seq"] in (1, 2)

    asyncio.run(run())


def test_a_killed_owner_of_tool_sessions_still_knows_them_and_a_paused_one_costs_a_full_list(
    system: System,
) -> None:
    async def bare(client: Client) -> bool:
        tools = (await client.list_tools(cache_mode="refresh")).tools
        return any("properties" not in each.input_schema for each in tools)

    async def run() -> None:
        async with within(system, conversation="trouble") as client:
            assert not await bare(client)
            assert await bare(client)
            with paused(system, "mcp"):
                assert not await bare(client)
                began_s = time.monotonic()
                called = await client.call_tool("ksi_session_list")
                assert not called.is_error
                assert time.monotonic() - began_s < 1.0  # It does not wait to be counted.
            kill(system, "mcp")
            assert await bare(client)

    asyncio.run(run())


def test_a_server_stands_before_the_system_does_and_while_it_is_away(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    server = Raw(tmp_path / "var")
    try:
        said = server.call("ksi_session_create", session_id="s")
        assert said["structuredContent"]["code"] == "not_running"
        assert said["structuredContent"]["hint"] == "ksi start"
        assert json.loads(server.ask("tools/list"))["result"]["tools"]
        system = System(tmp_path / "var")
        try:
            created = server.call("ksi_session_create", session_id="s")
            assert created["structuredContent"]["owner"] == "alice"
        finally:
            system.stop()
        said = server.call("ksi_session_append", session_id="s", event="note")
        assert said["structuredContent"]["code"] == "not_running"
        found = server.call("ksi_session_get", session_id="s")
        assert found["structuredContent"]["owner"] == "alice"
        assert server.end() == 0
    finally:
        server.kill()


# Bad input.


def test_lines_that_are_no_messages_harm_nobody(raw: Raw) -> None:
    for line in (
        b"", b"nonsense", b"{", b"[]", b"null", b'{"jsonrpc": "2.0"}', b"\xff\xfe", b"{" * 10_000,
        b'{"jsonrpc": "2.0", "id": 9999, "method": "nonsense/list"}',
        b'{"jsonrpc": "2.0", "id": {}, "method": "tools/list"}',
        b'{"jsonrpc": "2.0", "method": "notifications/nonsense", "params": 1}',
    ):  # fmt: skip
        raw.say(line)
    assert raw.call("ksi_session_get", session_id="raw")["structuredContent"]["owner"] == "alice"


@pytest.mark.parametrize(
    "wrong",
    [
        '{"n": NaN}', '{"n": 1e999}', '{"n": 123456789012345678901234567890}', '"\\ud800"',
        '{"n": "\\ud800"}', "[" * 200 + "]" * 200, '{"n": ' + "[" * 100 + "]" * 100 + "}", "1",
        "null", '"{"', '"[]"',
    ],
)  # fmt: skip
def test_values_no_store_can_hold_are_refused_and_change_nothing(raw: Raw, wrong: str) -> None:
    before = raw.call("ksi_session_get", session_id="raw")["structuredContent"]["seq"]
    raw.say(
        b'{"jsonrpc": "2.0", "id": 5000, "method": "tools/call", "params": {"name": '
        b'"ksi_session_append", "arguments": {"session_id": "raw", "event": "note", "data": '
        + wrong.encode()
        + b"}}}"
    )
    after = raw.call("ksi_session_get", session_id="raw")["structuredContent"]["seq"]
    assert after == before


def test_an_argument_over_the_limit_is_refused_by_name(raw: Raw) -> None:
    for size in (BODY_BYTES_MAX + 1, 8 * BODY_BYTES_MAX):
        data = {"text": "x" * size}
        said = raw.call("ksi_session_append", session_id="raw", event="note", data=data)
        assert said["isError"]
        assert said["structuredContent"]["code"] == "too_large"
        assert said["structuredContent"]["details"]["limit_bytes"] == BODY_BYTES_MAX


def test_without_the_package_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    for words in (["serve"], ["token"]):
        assert console.main(["--var", str(tmp_path), "mcp", *words]) == 1
        said = capsys.readouterr().err
        assert said == "ksi: failed: ksi mcp needs the package mcp\n  pip install 'ksi[mcp]'\n"
