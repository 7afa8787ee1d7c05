"""Child specs refuse what no child can be started from, and name the field."""

from typing import Any

import pytest

from ksi.actors.supervision.child import ARGUMENTS_MAX, ChildSpec
from ksi.transport.errors import Invalid

OWNER: dict[str, Any] = {"name": "sessions", "kind": "owner", "function": "ksi.actors.process:run"}
AGENT: dict[str, Any] = {"name": "alice", "kind": "agent", "arguments": ("sleep", "1")}


def test_an_owner_and_an_agent_are_described_by_a_few_fields() -> None:
    owner, agent = ChildSpec(**OWNER), ChildSpec(**AGENT)

    assert (owner.restart, owner.shutdown_s) == ("permanent", 5.0)
    assert (agent.cwd, agent.identity, dict(agent.env)) == (None, None, {})


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ChildSpec(**OWNER).name = "other"  # type: ignore[misc]  # it is frozen


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "../x"),
        ("name", "a" * 129),
        ("name", "a\n"),
        ("name", None),
        ("kind", "daemon"),
        ("phase", "later"),
        ("restart", "always"),
        ("start_s", -1),
        ("start_s", float("nan")),
        ("shutdown_s", -0.1),
        ("shutdown_s", 1e9),
        ("shutdown_s", "5"),
        ("function", ""),
        ("function", "no_colon"),
        ("function", "a:b:c"),
        ("arguments", ["a list"]),
        ("arguments", (1,)),
        ("arguments", ("nul\0",)),
        ("arguments", ("\ud800",)),
        ("arguments", ("x",) * (ARGUMENTS_MAX + 1)),
        ("env", {"A=B": "x"}),
        ("env", {"A": "x\0y"}),
        ("env", {"A": 1}),
        ("env", {"A": "x" * (1 << 20)}),
        ("cwd", "a\0b"),
        ("identity", "a/b"),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(Invalid, match=f": {field} must be "):
        ChildSpec(**{**OWNER, field: value})


@pytest.mark.parametrize("arguments", [(), ("",)])
def test_an_agent_without_a_program_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(Invalid, match="arguments must be a program"):
        ChildSpec(**{**AGENT, "arguments": arguments})


def test_an_agent_runs_a_program_not_a_function() -> None:
    with pytest.raises(Invalid, match="function must be absent"):
        ChildSpec(**AGENT, function="os:abort")
