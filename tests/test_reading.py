"""Reading in place: facts, which an owner is given of another owner's state."""

from system import System

from ksi.actors.declarations.registry import AgentDetails, Describe
from ksi.actors.declarations.sessions import Get, SessionView
from ksi.actors.reading import Facts
from ksi.transport.errors import NotFound


def test_facts_are_answers_of_any_owner_and_their_refusals(system: System) -> None:
    facts = Facts(system.var)
    with system.client("alice") as alice:
        alice.ask("agent:register", agent_id="alice")
        session_id = alice.ask("session:create")["session_id"]

        agent = facts(Describe(agent_id="alice"))
        session = facts(Get(session_id=session_id))
        nobody = facts(Describe(agent_id="nobody"))

    assert isinstance(agent, AgentDetails)
    assert agent.agent_id == "alice"
    assert isinstance(session, SessionView)
    assert session.owner == "alice"
    assert isinstance(nobody, NotFound)


def test_a_state_that_cannot_be_read_is_no_fact(system: System) -> None:
    elsewhere = system.var / "elsewhere"
    elsewhere.mkdir()
    assert Facts(elsewhere)(Describe(agent_id="alice")) is None
