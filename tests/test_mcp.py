"""The Model Context Protocol: declared operations as tools, by the client of the official SDK."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from mcp import MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ResourceUpdated
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.types import TextContent, TextResourceContents
from system import System
from toolservers import Raw, on_pipes, over_http, tools_of, within

from ksi.adapters import mcp as adapter
from ksi.adapters.providers import Echo
from ksi.adapters.serving import token
from ksi.adapters.tools import AWAIT, DESCRIBE, OURS, SETTLE, Catalogue
from ksi.adapters.worker import Worker
from ksi.console import main as console
from ksi.console.declared import catalogue
from ksi.transport.errors import Forbidden, UnknownOperation
from ksi.transport.identity import KeyRing
from ksi.transport.message import Role

ERAS = ("auto", "legacy")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("mcp") / "var")
    with running.client("alice") as alice:
        for name in ("plan", "other"):
            alice.ask("session:create", session_id=name)
        for n in range(3):
            alice.ask("session:append", session_id="plan", event="note", data={"n": n})
        alice.ask("agent:register")
    yield running
    running.end()


# The catalogue.


@pytest.mark.parametrize("role", ["agent", "worker", "operator"])
def test_what_a_role_may_use_is_a_tool_and_nothing_else(role: Any) -> None:
    tools = tools_of(role).tools
    used = {each.operation.name for each in tools.values() if each.operation is not None}
    ours = {name: each for name, each in catalogue().items() if each.same_as is None}
    may = {name for name, each in ours.items() if role in each.roles}
    assert used == may - OURS
    assert {each.name for each in tools.values() if each.operation is None} == {
        DESCRIBE.name, SETTLE.name, AWAIT.name
    }  # fmt: skip


def test_names_and_schemas_are_what_any_client_takes() -> None:
    for name, full in tools_of("operator").full.items():
        assert re.fullmatch(r"ksi_[a-z_]{1,40}", name), name
        for schema in (full["inputSchema"], full.get("outputSchema", {"type": "object"})):
            assert schema["type"] == "object", name
            jsonschema.Draft202012Validator.check_schema(schema)
            assert "(?" not in json.dumps(schema), f"{name}: not every engine knows this pattern"
        assert full["description"]


def test_the_example_of_an_operation_is_right_by_its_schema() -> None:
    for full in tools_of("operator").full.values():
        for example in full["inputSchema"].get("examples", []):
            jsonschema.validate(example, full["inputSchema"])


def test_a_thin_catalogue_is_under_a_tenth_of_the_full_one_and_takes_any_arguments() -> None:
    roles: tuple[Role, ...] = ("agent", "worker", "operator")
    for role in roles:
        tools = tools_of(role)
        sizes = [len(json.dumps([*each.values()])) for each in (tools.full, tools.thin)]
        assert sizes[1] < sizes[0] / 10, role
        for name, thin in tools.thin.items():
            assert len(thin["description"].split()) >= 1 or name == DESCRIBE.name
            jsonschema.validate({"anything": 1}, {"type": thin["inputSchema"]["type"]})


def test_the_digest_tells_catalogues_apart_and_is_the_same_in_any_process() -> None:
    one = tools_of()
    assert one.digest == Catalogue(catalogue().values(), "agent").digest
    assert one.digest != tools_of("operator").digest
    assert one.digest != tools_of("agent", "session:*").digest
    fewer = [each for name, each in catalogue().items() if name != "session:fork"]
    assert one.digest != Catalogue(fewer, "agent").digest


def test_patterns_leave_the_tools_that_match_one_and_those_that_explain_them() -> None:
    tools = tools_of("agent", "session:get", "session:li*")
    assert list(tools.tools) == [DESCRIBE.name, "ksi_session_get", "ksi_session_list"]


def test_an_unknown_tool_names_the_nearest() -> None:
    with pytest.raises(UnknownOperation) as raised:
        tools_of()["ksi_session_apend"]
    assert raised.value.hint == "did you mean ksi_session_append?"
    assert tools_of()["session:append"].name == "ksi_session_append"


def test_text_where_text_cannot_be_meant_is_read_as_json() -> None:
    tools = tools_of()
    append = tools["ksi_session_append"]
    given = {"session_id": "7", "event": "{}", "data": '{"a": [1]}', "epoch": "3", "odd": "1"}
    assert tools.arguments(append, given) == {
        "session_id": "7", "event": "{}", "data": {"a": [1]}, "epoch": 3, "odd": "1"
    }  # fmt: skip
    assert tools.arguments(append, {"data": "{"}) == {"data": "{"}


# Tools.


@pytest.mark.parametrize("era", ERAS)
def test_a_client_on_pipes_appends_and_reads_as_the_agent_of_its_server(
    system: System, era: str
) -> None:
    name = f"on-pipes-{era}"

    async def run() -> None:
        async with on_pipes(system.var, mode=era) as client:
            assert client.server_info is not None
            assert client.server_info.name == "ksi"
            assert "you are the agent alice" in (client.instructions or "")
            created = await client.call_tool("ksi_session_create", {"session_id": name})
            assert created.structured_content["owner"] == "alice"
            fields = {"session_id": name, "event": "note", "data": {"text": "ü"}}
            said = await client.call_tool("ksi_session_append", fields)
            assert said.structured_content["seq"] == 1
            assert not said.is_error
            (text,) = said.content
            assert isinstance(text, TextContent)
            assert json.loads(text.text) == said.structured_content
            page = await client.call_tool("ksi_session_history", {"session_id": name})
            assert page.structured_content["entries"][0]["data"] == {"text": "ü"}

    asyncio.run(run())
    with system.client("bob") as bob:
        assert bob.read("session:get", session_id=name)["owner"] == "alice"


def test_results_are_what_their_schemas_say(system: System) -> None:
    """The client of the SDK compares each result with the schema of its tool."""

    async def run() -> None:
        async with within(system) as client:
            listed = (await client.list_tools()).tools
            called = 0
            for tool in listed:
                wanted = set(tool.input_schema.get("required", []))
                if not (tool.annotations and tool.annotations.read_only_hint):
                    continue
                if not wanted <= {"session_id", "agent_id"} or "checkpoint" in tool.name:
                    continue
                fields = {"session_id": "plan", "agent_id": "alice"}
                asked = {key: value for key, value in fields.items() if key in wanted}
                result = await client.call_tool(tool.name, asked)
                assert not result.is_error, (tool.name, result.content)
                called += 1
            assert called > 15

    asyncio.run(run())


def test_a_refusal_is_a_result_with_code_text_hint_and_details(system: System) -> None:
    async def run() -> None:
        async with within(system, name="bob") as client:
            fields = {"session_id": "plan", "event": "note"}
            refused = await client.call_tool("ksi_session_append", fields)
            assert refused.is_error
            said = refused.structured_content
            assert (said["code"], said["details"]["owner"]) == ("not_owner", "alice")
            (text,) = refused.content
            assert isinstance(text, TextContent)
            assert text.text.startswith("not_owner: ")
            assert said["hint"] in text.text

            missing = await client.call_tool("ksi_session_append", {"event": "note"})
            assert missing.structured_content["code"] == "invalid"
            assert "`session_id`" in missing.structured_content["text"]
            assert "ksi_describe_tool" in missing.structured_content["hint"]
            for wrong in ({"event": 1}, {"data": [1]}, {"surplus": 1}, {"session_id": "../etc"}):
                result = await client.call_tool("ksi_session_append", {**fields, **wrong})
                assert result.structured_content["code"] == "invalid", wrong
            for tool in ("ksi_session_get", "ksi_session_history"):
                result = await client.call_tool(tool, {"session_id": "none"})
                assert result.structured_content["code"] == "not_found"

    asyncio.run(run())


def test_what_a_role_or_a_pattern_leaves_out_is_unknown(system: System) -> None:
    async def run() -> None:
        async with within(system, patterns=["session:*"]) as client:
            for name in ("ksi_system_stop", "ksi_agent_list", "nonsense", ""):
                with pytest.raises(MCPError) as raised:
                    await client.call_tool(name, {})
                assert raised.value.error.code == -32602
                assert raised.value.error.data["code"] == "unknown_operation"
            uris = [each.uri for each in (await client.list_resources()).resources]
            assert all(uri.startswith("ksi://session/") for uri in uris)
            with pytest.raises(MCPError):
                await client.read_resource("ksi://agent/alice")

    asyncio.run(run())


def test_whoever_waits_for_a_completion_hears_that_it_goes_on_and_then_its_outcome(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "LOOK_S", 0.02)
    heard: list[float] = []

    async def progress(
        progress: float, total: float | None = None, message: str | None = None
    ) -> None:
        heard.append(progress)

    async def run() -> None:
        async with within(system) as client:
            asked = {"session_id": "plan", "prompt": "hello"}
            queued = await client.call_tool("ksi_completion_async", asked)
            request = {"request_id": queued.structured_content["request_id"]}
            still = await client.call_tool("ksi_completion_wait", {**request, "timeout_s": 0.1})
            assert still.structured_content["code"] == "unavailable"
            waiting = asyncio.create_task(
                client.call_tool("ksi_completion_wait", request, progress_callback=progress)
            )
            while len(heard) < 2:
                await asyncio.sleep(0.01)  # A poll: the test has a time limit.
            worker = Worker("echo", [Echo()], var=system.var)
            running = asyncio.create_task(worker.run())
            outcome = (await waiting).structured_content
            assert (outcome["status"], outcome["result"]["response"]) == ("completed", "hello")
            worker.stop()
            await running
            unknown = await client.call_tool("ksi_completion_wait", {"request_id": "none"})
            assert unknown.structured_content["code"] == "not_found"

    asyncio.run(run())


# Resources.


def test_sessions_and_agents_are_resources_in_pages(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.adapters.resources.PAGE", 1)

    async def run() -> list[str]:
        found, cursor = [], None
        async with within(system) as client:
            while True:
                page = await client.list_resources(cursor=cursor)
                found += [each.uri for each in page.resources]
                cursor = page.next_cursor
                if cursor is None:
                    break
            with pytest.raises(MCPError):
                await client.list_resources(cursor="nowhere")
        return found

    found = asyncio.run(run())
    assert len(found) == len(set(found))
    assert {"ksi://session/plan", "ksi://session/other", "ksi://agent/alice"} <= set(found)


def test_a_resource_is_what_its_operation_answers(system: System) -> None:
    async def run() -> None:
        async with within(system) as client:

            async def read(uri: str) -> Any:
                (content,) = (await client.read_resource(uri)).contents
                assert content.mime_type == "application/json"
                assert isinstance(content, TextResourceContents)
                return json.loads(content.text)

            page = await read("ksi://session/plan?after=1&limit=1")
            assert [each["data"] for each in page["entries"]] == [{"n": 1}]
            assert (await read("ksi://session/plan"))["seq"] >= 3
            assert (await read("ksi://agent/alice"))["agent_id"] == "alice"
            described = await client.call_tool(DESCRIBE.name, {"tool": "session:append"})
            assert await read("ksi://tool/ksi_session_append") == described.structured_content
            templates = (await client.list_resource_templates()).resource_templates
            assert {each.name for each in templates} == {"session", "agent", "tool"}

    asyncio.run(run())


@pytest.mark.parametrize(
    "uri",
    [
        "ksi://session/none", "ksi://agent/none", "ksi://tool/none", "ksi://session", "ksi://",
        "file:///etc/passwd", "ksi://session/../../etc", "ksi://session/%2e%2e", "ksi://owner/x",
        "ksi://session/plan?limit=x", "ksi://session/plan?nonsense=1",
        "ksi://[", "plan", "ksi://session/plan#1",
    ],
)  # fmt: skip
def test_what_is_no_resource_is_an_error_that_names_it(system: System, uri: str) -> None:
    async def run() -> None:
        async with within(system) as client:
            with pytest.raises(MCPError) as raised:
                await client.read_resource(uri)
            error = raised.value.error
            assert error.code == -32602
            assert error.data["uri"] == uri
            assert error.data["code"] in ("not_found", "invalid", "unknown_operation")

    asyncio.run(run())


def test_who_listens_is_told_when_a_session_has_changed(system: System) -> None:
    async def run() -> None:
        async with within(system) as client:
            uri = "ksi://session/other"
            fields = {"session_id": "other", "event": "note"}
            async with client.listen(resource_subscriptions=[uri]) as changes:
                for _ in range(2):
                    await client.call_tool("ksi_session_append", {**fields, "session_id": "plan"})
                    await client.call_tool("ksi_session_append", fields)
                    told = await asyncio.wait_for(anext(changes), 10)
                    assert told == ResourceUpdated(uri)
            for wrong in ("ksi://tool/ksi_session_get", "ksi://nobody/x", "ksi://session/a b"):
                with pytest.raises(MCPError) as raised:
                    async with client.listen(resource_subscriptions=[wrong]):
                        pass
                assert raised.value.error.data["uri"] == wrong

    asyncio.run(run())


# What a conversation knows.


def is_thin(answer: bytes) -> bool:
    tools = json.loads(answer)["result"]["tools"]
    assert len(tools) > 50
    bare = [each for each in tools if "properties" not in each["inputSchema"]]
    assert len(bare) in (0, len(tools) - 1)  # but `ksi_describe_tool`
    return bool(bare)


def test_the_second_list_is_under_a_tenth_of_the_first_also_after_restarts(
    system: System,
) -> None:
    server = Raw(system.var, "--conversation", "restarts")
    first, second = server.ask("tools/list"), server.ask("tools/list")
    assert (is_thin(first), is_thin(second)) == (False, True)
    assert len(second) < len(first) / 10
    server.kill()
    server = Raw(system.var, "--conversation", "restarts")
    again = json.loads(server.ask("tools/list"))
    assert again["result"]["tools"] == json.loads(second)["result"]["tools"]
    system.stop()
    system.start()
    assert is_thin(server.ask("tools/list"))
    assert server.call("ksi_session_get", session_id="plan")["structuredContent"]["owner"]
    assert server.end() == 0


def test_another_catalogue_and_other_permissions_make_the_list_full_again(system: System) -> None:
    async def listed(**more: Any) -> bool:
        async with within(system, name="changing", conversation="c", **more) as client:
            tools = (await client.list_tools()).tools
            return all("properties" in each.input_schema for each in tools)

    assert asyncio.run(listed())
    assert not asyncio.run(listed())
    assert asyncio.run(listed(patterns=["session:*"]))
    assert not asyncio.run(listed(patterns=["session:*"]))
    KeyRing(system.var).forget("changing")
    assert asyncio.run(listed(role="worker", patterns=["session:*"]))
    assert not asyncio.run(listed(role="worker", patterns=["session:*"]))


def test_a_thin_entry_is_resolved_to_the_full_one(system: System) -> None:
    async def run() -> None:
        async with within(system, conversation="resolved") as client:
            full = await client.list_tools()
            thin = await client.list_tools(cache_mode="refresh")
            assert [each.name for each in thin.tools] == [each.name for each in full.tools]
            for tool in full.tools:
                said = await client.call_tool(DESCRIBE.name, {"tool": tool.name})
                whole = tool.model_dump(by_alias=True, exclude_none=True, mode="json")
                assert said.structured_content == whole
            described = await client.call_tool(DESCRIBE.name, {"tool": "nonsense"})
            assert described.structured_content["code"] == "unknown_operation"
            called = await client.call_tool("ksi_session_get", {"session_id": "plan"})
            assert called.structured_content["owner"] == "alice"

    asyncio.run(run())


def test_a_cleared_conversation_is_told_everything_again_and_its_uses_are_counted(
    system: System,
) -> None:
    async def run() -> None:
        async with within(system, name="clara", conversation="cleared") as client:
            await client.list_tools()
            for _ in range(2):
                await client.call_tool("ksi_session_list")
            while True:
                status = await client.call_tool("ksi_mcp_status", {"agent_id": "clara"})
                (one,) = status.structured_content["sessions"]
                if one["uses"].get("ksi_session_list") == 2:
                    break
            assert (one["conversation_id"], one["listed"], one["role"]) == ("cleared", 1, "agent")
            cleared = await client.call_tool("ksi_mcp_clear_sessions", {})
            assert cleared.structured_content == {"cleared": 1}
            again = await client.list_tools(cache_mode="refresh")
            assert all("properties" in each.input_schema for each in again.tools)

    asyncio.run(run())


@pytest.mark.parametrize("era", ERAS)
def test_without_a_conversation_every_list_is_full_and_says_how_long_it_holds(
    system: System, era: str
) -> None:
    async def run() -> None:
        async with within(system, name="eve", mode=era) as client:
            for _ in range(2):
                listed = await client.list_tools(cache_mode="refresh")
                assert all("properties" in each.input_schema for each in listed.tools)
                if era != "legacy":
                    assert (listed.ttl_ms, listed.cache_scope) == (300_000, "private")
            status = await client.call_tool("ksi_mcp_status", {"agent_id": "eve"})
            assert status.structured_content["sessions"] == []

    asyncio.run(run())


def test_a_conversation_whose_name_is_none_is_refused(system: System) -> None:
    async def run() -> None:
        async with within(system, conversation="../c") as client:
            with pytest.raises(MCPError) as raised:
                await client.list_tools()
            assert raised.value.error.data["code"] == "invalid"

    asyncio.run(run())


# HTTP.


def test_over_http_a_token_admits_and_headers_name_the_conversation_and_claim_nothing(
    system: System,
) -> None:
    async def tools(url: str, **headers: str) -> list[Any]:
        from mcp import Client

        async with create_mcp_http_client(headers=headers) as http:
            transport = streamable_http_client(url, http_client=http)
            async with Client(transport, mode=mode) as client:
                listed = (await client.list_tools()).tools
                called = await client.call_tool("ksi_session_get", {"session_id": "plan"})
                assert called.structured_content["owner"] == "alice"
                return listed

    bearer = {"Authorization": f"Bearer {token(system.var, 'alice')}"}
    with over_http(system.var) as url:
        for mode in ERAS:
            talk = {"X-KSI-Conversation-ID": f"http-{mode}", "X-KSI-Agent-ID": "alice"}
            sizes = [len(str(asyncio.run(tools(url, **bearer, **talk)))) for _ in range(2)]
            assert sizes[1] < sizes[0] / 3  # With what pydantic writes for what is not there.
            with pytest.raises(BaseExceptionGroup) as raised:
                asyncio.run(tools(url, **bearer, **{"X-KSI-Agent-ID": "bob"}))
            assert raised.group_contains(MCPError, match="speaks for alice, not for bob")
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic ü"}):
            assert status_of(url, **wrong) == 401
        assert status_of(url, **bearer, Host="evil.example") == 421
        assert status_of(url, **bearer, Origin="http://evil.example") == 403
        assert status_of(url, b"x" * (5 << 20), **bearer) == 413
        assert status_of(url, b"{", **bearer) == 400


def status_of(url: str, body: bytes = b"{}", /, **headers: str) -> int:
    """Return how a server answers to what is posted to it."""
    import http.client
    from urllib.parse import urlsplit

    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    usual = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    encoded = {name: value.encode() for name, value in {**usual, **headers}.items()}
    try:
        connection.request("POST", "/mcp", body, encoded)
        return connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):
        return 413  # It has answered before it was told all.
    finally:
        connection.close()


def test_the_token_is_that_of_the_key_and_goes_with_it(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        assert console.main(["--var", str(system.var), "--as", "tess", "mcp", "token", *words]) == 0
        return capsys.readouterr().out.strip()

    first = printed()
    assert first == token(system.var, "tess") == json.loads(printed("--json"))["token"]
    assert first != token(system.var, "alice")
    KeyRing(system.var).forget("tess")
    with pytest.raises(Forbidden):
        token(system.var, "tess")
    assert printed() != first
