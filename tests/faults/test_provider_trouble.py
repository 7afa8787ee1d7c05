"""Providers in trouble, with real workers: what fails, hangs, is killed, and what is said then."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from model_server import Model, serving
from system import System
from trouble import entries, kill, kill_all, until
from workers import WorkerProcess, happened, registered, state, working

from ksi.actors.declarations.completion import Granted
from ksi.transport import Client
from ksi.transport.errors import NotFound, TooLarge, Unanswered

PROGRAM = f"{sys.executable} {Path(__file__).parents[1] / 'printing.py'}"
COMMAND = ("--provider", "command", "--command", PROGRAM)
KSI = [sys.executable, "-P", "-m", "ksi.console"]
SECRET = "sk-never-to-be-seen-4711"
SOON: dict[str, Any] = {"retry_s": 0.1}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("providers") / "var")
    yield running
    running.end()


@pytest.fixture(scope="module")
def model(system: System) -> Iterator[str]:
    """A worker that asks a server, for as long as it is wanted; yields what it offers."""
    with serving() as url:
        words = ("--provider", "openai", "--base-url", f"{url}/v1", "--model", "m1")
        env = {"OPENAI_API_KEY": SECRET}
        with working(system, "asking", slots=4, lease="15s", provider=words, env=env):
            yield "openai"


@pytest.fixture
def session_id(alice: Client) -> str:
    return str(alice.ask("session:create")["session_id"])


def has_asked(times: int) -> bool:
    """Whether the model was called so often."""
    return len(Model.asked) >= times


def submit(client: Client, session_id: str, prompt: str, **more: Any) -> str:
    fields = {"session_id": session_id, "prompt": prompt, **more}
    return str(client.ask("completion:async", fields)["request_id"])


def test_an_answer_is_waited_for_seen_growing_counted_and_recorded(
    system: System, alice: Client, session_id: str, model: str
) -> None:
    heard: list[tuple[int, str]] = []
    outcome = alice.complete(
        session_id, "hello", requires=model, on_tokens=lambda *piece: heard.append(piece)
    )
    assert outcome["result"]["response"] == "you said hello "
    took = {"input_tokens": 21, "output_tokens": 7, "cached_tokens": 5, "cost_usd": None}
    assert outcome["result"]["usage"] == took
    assert heard[0] == (0, "you ")
    usage = alice.read("completion:token_usage", agent_id="alice", model="m1")
    assert usage["output_tokens"] >= 7
    until(lambda: len(entries(system, session_id)) == 2)
    said = entries(system, session_id)[1]["data"]
    assert (said["model"], said["provider"], said["usage"]) == ("m1", "openai", took)


def test_on_a_terminal_an_answer_is_seen_growing_and_the_outcome_is_the_output(
    system: System, session_id: str, model: str
) -> None:
    line = [*KSI, "--var", str(system.var), "ask", "completion:async", "--session-id", session_id]
    ours, theirs = pty.openpty()
    Model.go.clear()
    with subprocess.Popen(
        [*line, "--prompt", "wait", "--requires", model, "--wait"],
        stdout=subprocess.PIPE, stderr=theirs,
    ) as asking:  # fmt: skip
        os.close(theirs)
        shown = os.read(ours, 4096)
        assert shown == b"you ", "before there is an answer"
        Model.go.set()
        while not shown.endswith(b"\n"):
            shown += os.read(ours, 4096)
        printed, _ = asking.communicate(timeout=20)
    os.close(ours)
    assert shown.decode().splitlines() == ["you said wait "]
    assert json.loads(printed)["result"]["response"] == "you said wait "


def test_the_conversation_goes_on_also_behind_requests_that_waited_and_over_a_restart(
    system: System, alice: Client, session_id: str, model: str
) -> None:
    waiting = [submit(alice, session_id, f"p{n}", requires=model) for n in range(70)]
    for each in waiting:
        assert alice.outcome(each)["status"] == "completed"
    told = [each["content"] for each in Model.asked[-1]["messages"]]
    said = [[f"p{n}", f"you said p{n} "] for n in range(69)]  # More than are read at once.
    assert told == [*[text for turn in said for text in turn], "p69"]
    kill_all(system)
    system.start()
    with system.client("alice") as again:
        until(lambda: "asking" in registered(again))
        again.complete(session_id, "p70", requires=model)
    told = [each["content"] for each in Model.asked[-1]["messages"]]
    assert told[-3:] == ["p69", "you said p69 ", "p70"]


def test_a_fork_is_told_what_was_said_before_it(alice: Client, session_id: str, model: str) -> None:
    alice.complete(session_id, "one", requires=model)
    until(lambda: alice.read("session:get", session_id=session_id)["seq"] == 2)
    fork = alice.ask("session:fork", session_id=session_id)["session_id"]
    alice.complete(session_id, "not in the fork", requires=model)
    alice.complete(fork, "two", requires=model)
    told = [each["content"] for each in Model.asked[-1]["messages"]]
    assert told == ["one", "you said one ", "two"]


@pytest.mark.parametrize(
    ("prompt", "kind"), [("500", "provider_error"), ("empty", "provider_error"), ("cut", None)]
)
def test_what_may_pass_is_tried_three_times_and_its_session_goes_on(
    alice: Client, session_id: str, model: str, prompt: str, kind: str | None
) -> None:
    begun = len(Model.asked)
    with pytest.raises(Unanswered) as failed:
        alice.complete(session_id, prompt, requires=model, **SOON)
    assert failed.value.details["kind"] in (
        (kind,) if kind else ("network_error", "provider_error")
    )
    assert len(Model.asked) - begun == 3
    outcome = alice.read("completion:status", request_id=failed.value.details["request_id"])
    assert (outcome["attempt"], outcome["failures"]) == (3, 2)
    assert alice.complete(session_id, "go on", requires=model)["status"] == "completed"


def test_one_that_is_told_to_slow_down_waits_as_long_as_it_was_told(
    alice: Client, session_id: str, model: str
) -> None:
    request_id = submit(alice, session_id, "429", requires=model, attempts_max=2, **SOON)
    until(lambda: alice.read("completion:status", request_id=request_id)["failures"])
    waiting = alice.read("completion:status", request_id=request_id)
    assert (waiting["kind"], waiting["status"]) == ("api_rate_limit", "queued")
    outcome = alice.outcome(request_id)
    assert outcome["finished_at"] - outcome["queued_at"] > 0.4
    assert SECRET not in outcome["reason"]


def test_a_dead_letter_is_retried_by_command(
    system: System, alice: Client, session_id: str, model: str
) -> None:
    with pytest.raises(Unanswered, match="failed") as failed:
        alice.complete(session_id, "401", requires=model)
    request_id = failed.value.details["request_id"]

    def ksi(*words: str) -> subprocess.CompletedProcess[str]:
        line = [*KSI, "--var", str(system.var), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)

    assert request_id in ksi("queue", "list", "--status", "dead").stdout
    done = ksi("queue", "retry", request_id)
    assert f"{request_id} is asked once more as req_" in done.stdout, done.stderr
    again = done.stdout.split()[-1]
    assert alice.outcome(again)["retry_of"] == request_id
    assert ksi("queue", "retry", request_id).returncode == 5
    assert ksi("queue", "retry").returncode == 2
    assert "openai" in ksi("queue", "providers").stdout
    assert "m1" in ksi("queue", "usage", "--last", "1h").stdout


def test_a_key_is_nowhere_but_where_it_was_given(
    system: System, alice: Client, session_id: str, model: str
) -> None:
    alice.complete(session_id, "hi", requires=model)
    assert SECRET in Model.keys[-1]
    kept = [path for path in system.var.rglob("*") if path.is_file() and path.suffix != ".stat"]
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []


def test_a_provider_that_hangs_is_given_up_in_time_and_the_next_attempt_may_succeed(
    alice: Client, session_id: str, model: str
) -> None:
    hung = submit(alice, session_id, "hang", requires=model, run_s=0.4, attempts_max=2, **SOON)
    outcome = alice.outcome(hung, timeout_s=20)
    assert (outcome["status"], outcome["kind"], outcome["attempt"]) == ("failed", "timeout", 2)
    assert alice.complete(session_id, "go on", requires=model)["status"] == "completed"


def test_cancelling_ends_the_call_and_frees_the_session_though_the_program_takes_its_time(
    system: System, alice: Client, session_id: str, tmp_path: Path
) -> None:
    noted = tmp_path / "pid"
    with working(system, "printing", provider=COMMAND, slots=2):
        running = submit(alice, session_id, f"stubborn:{noted}", requires="command")
        behind = submit(alice, session_id, "text", requires="command")
        pid = int(until(lambda: noted.exists() and noted.read_text()))
        alice.ask("completion:cancel", request_id=running)
        assert alice.outcome(behind, timeout_s=10)["status"] == "completed"
        until(lambda: not psutil.pid_exists(pid))


def test_a_worker_that_is_killed_takes_its_program_along_and_costs_one_attempt(
    system: System, alice: Client, session_id: str, tmp_path: Path
) -> None:
    noted = tmp_path / "pid"
    with working(system, "doomed", provider=COMMAND) as [doomed]:
        request_id = submit(alice, session_id, f"hang:{noted}", requires="command")
        pid = int(until(lambda: noted.exists() and noted.read_text()))
        noted.unlink()
        doomed.kill()
        until(lambda: not psutil.pid_exists(pid))
        with working(system, "heir", provider=COMMAND):
            until(lambda: state(alice, request_id) == "active" and noted.exists())
            held = alice.read("completion:status", request_id=request_id)
            assert (held["attempt"], held["failures"], held["worker"]) == (2, 0, "heir")
            alice.ask("completion:cancel", request_id=request_id)


@pytest.mark.parametrize("prompt", ["half", "crash"])
def test_a_program_that_goes_wrong_is_called_again(
    system: System, alice: Client, session_id: str, prompt: str
) -> None:
    with working(system, "trying", provider=COMMAND):
        request_id = submit(alice, session_id, prompt, requires="command", attempts_max=2, **SOON)
        outcome = alice.outcome(request_id, timeout_s=20)
    assert (outcome["status"], outcome["attempt"]) == ("failed", 2)
    assert outcome["kind"] == "provider_error"


def test_the_owner_killed_while_a_request_waits_for_its_next_attempt_goes_on_waiting(
    system: System, alice: Client, session_id: str, model: str
) -> None:
    request_id = submit(alice, session_id, "500", requires=model, attempts_max=2, retry_s=0.6)
    until(lambda: alice.read("completion:retry_status")["waiting"])
    kill(system, "completion")
    outcome = alice.outcome(request_id, timeout_s=20)
    assert (outcome["status"], outcome["attempt"]) == ("failed", 2)


def test_a_session_closed_or_transferred_while_its_request_waits_for_its_next_attempt(
    alice: Client, model: str
) -> None:
    closed, moved = (alice.ask("session:create")["session_id"] for _ in range(2))
    first, second = (
        submit(alice, each, "500", requires=model, attempts_max=2, retry_s=1.0)
        for each in (closed, moved)
    )
    until(lambda: alice.read("completion:retry_status")["waiting"] == 2)
    alice.ask("session:close", session_id=closed)
    alice.ask("session:transfer", session_id=moved, to_agent="bob")
    assert alice.outcome(first, timeout_s=10)["status"] == "cancelled"
    assert alice.outcome(second, timeout_s=20)["attempt"] == 2


def test_a_prompt_of_ten_megabytes_is_refused_and_one_of_half_a_megabyte_answered(
    alice: Client, session_id: str, model: str
) -> None:
    with pytest.raises(TooLarge):
        submit(alice, session_id, "x" * 10_000_000)
    large = alice.complete(session_id, "x" * 400_000, requires=model)
    assert len(large["result"]["response"]) > 400_000


def test_a_model_that_does_not_exist_fails_at_once_and_says_so(
    alice: Client, session_id: str, model: str
) -> None:
    with pytest.raises(Unanswered) as failed:
        alice.complete(session_id, "hi", requires=model, model="missing")
    assert failed.value.details["kind"] == "model_not_found"


def test_a_missing_key_is_said_by_the_worker_and_to_whoever_submits(
    system: System, alice: Client, session_id: str
) -> None:
    words = ("--provider", "openai", "--offers", "keyless")
    worker = WorkerProcess(system.var, "keyless", provider=words, env={"OPENAI_API_KEY": ""})
    code, said = worker.ended(60.0)
    assert (code, "OPENAI_API_KEY is not set" in said) == (2, True), said
    with pytest.raises(NotFound, match="OPENAI_API_KEY is not set"):
        submit(alice, session_id, "hi", requires="keyless")
    with working(system, "keyed", provider=words, env={"OPENAI_API_KEY": SECRET}, slots=1):
        waiting = submit(alice, session_id, "hi", requires="keyless", attempts_max=1)
        alice.ask("completion:cancel", request_id=waiting)


def test_three_workers_give_a_provider_no_more_than_it_bears_though_the_owner_is_killed(
    system: System, alice: Client
) -> None:
    def bear(**bound: Any) -> None:
        with system.client("operator", role="operator") as operator:
            operator.ask("completion:limit", provider="shared", **bound)

    bear(limit=2, rate="6/s")
    ids = [alice.ask("session:create")["session_id"] for _ in range(13)]
    words = ("--provider", "openai", "--offers", "shared", "--model", "m1", "--base-url")
    with serving() as url:
        settings = {"slots": 8, "lease": "15s", "provider": (*words, f"{url}/v1")}
        with working(system, "a", "b", "c", **settings):
            asked = [submit(alice, each, "slow", requires="shared") for each in ids]
            for _ in range(2):
                until(partial(has_asked, len(Model.asked) + 3), 30.0)
                kill(system, "completion")
            ends = [alice.outcome(each, timeout_s=60) for each in asked]
    assert {each["status"] for each in ends} == {"completed"}
    assert 1 <= Model.busiest <= 2
    events = [each for each in happened(system.var) if isinstance(each, Granted)]
    granted = [each.now for each in events if each.provider == "shared"]
    assert len(granted) >= len(ids)
    assert min(b - a for a, b in zip(granted, granted[6:], strict=False)) >= 1.0
    bear()


def test_a_rate_is_kept_and_calls_come_evenly(system: System, alice: Client) -> None:
    ids = [alice.ask("session:create")["session_id"] for _ in range(5)]
    words = ("--provider", "echo", "--offers", "slowly", "--rate", "5/s")
    with working(system, "even", slots=5, provider=words):
        asked = [submit(alice, each, "x", requires="slowly") for each in ids]
        ends = sorted(alice.outcome(each)["finished_at"] for each in asked)
    assert ends[-1] - ends[0] > 0.7


def test_a_requester_that_comes_back_hears_the_end_of_a_request_that_was_retried(
    system: System, session_id: str, model: str
) -> None:
    with system.client("passing") as passing:
        request_id = submit(passing, session_id, "500", requires=model, retry_s=0.3)
    found: list[Any] = []
    with system.client("passing") as back:
        waiting = threading.Thread(target=lambda: found.append(back.outcome(request_id)))
        waiting.start()
        kill(system, "completion")
        waiting.join(20)
    assert [each["failures"] for each in found] == [2]


@pytest.mark.parametrize("restarted", ["the requester", "completion", "sessions", "bus"])
def test_progress_and_every_end_are_pushed_to_a_requester_whatever_was_restarted(
    system: System, restarted: str
) -> None:
    def hear(news: Any, ann: Client) -> None:
        ids = [ann.ask("session:create")["session_id"] for _ in range(3)]
        echoed = submit(ann, ids[0], "x", requires="push", options={"delay_s": 0.1})
        failed = submit(ann, ids[1], "x", requires="push", options={"delay_s": -1})
        ended = submit(ann, ids[2], "x", requires="nobody")
        ann.ask("completion:cancel", request_id=ended)
        missing = {(echoed, "progress"), (echoed, "result")}
        missing |= {(failed, "failed"), (ended, "cancelled")}
        while missing:
            missing.discard(tuple(news.next(10.0).topic.split(".")[2:]))

    words = ("--provider", "echo", "--offers", "push")
    with working(system, "pushing", slots=2, provider=words):
        with system.client("ann") as ann, ann.subscribe("completion.ann.>") as news:
            hear(news, ann)
            if restarted != "the requester":
                kill(system, restarted)
                hear(news, ann)
        with system.client("ann") as ann, ann.subscribe("completion.ann.>") as news:
            hear(news, ann)


@pytest.mark.parametrize("point", ["accepted", "granted", "under way", "to be retried", "ended"])
def test_the_owner_killed_at_any_point_costs_neither_the_request_nor_its_only_answer(
    system: System, alice: Client, session_id: str, model: str, point: str
) -> None:
    reached: dict[str, Callable[[dict[str, Any]], bool]] = {
        "accepted": lambda _: True,
        "granted": lambda status: status["attempt"] == 1,
        "under way": lambda _: len(Model.asked) > begun,
        "to be retried": lambda status: status["failures"] == 1,
        "ended": lambda status: status["status"] == "completed",
    }
    begun = len(Model.asked)
    prompt = "once" if point == "to be retried" else "slow"
    request_id = submit(alice, session_id, prompt, requires=model, **SOON)
    until(lambda: reached[point](alice.read("completion:status", request_id=request_id)))
    kill(system, "completion")
    outcome = alice.outcome(request_id, timeout_s=20)
    assert outcome["status"] == "completed"
    assert outcome["attempt"] == len(Model.asked) - begun == (1 + (prompt == "once"))
    until(lambda: len(entries(system, session_id)) == 2)
    alice.complete(session_id, "go on", requires=model)
    said = [each["event"] for each in entries(system, session_id)]
    assert said[:3] == ["completion:request", "completion:result", "completion:request"]


def test_a_supervised_worker_is_started_by_command_killed_and_back_again(
    system: System, alice: Client, session_id: str
) -> None:
    def ksi(*words: str) -> subprocess.CompletedProcess[str]:
        line = [*KSI, "--var", str(system.var), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    done = ksi("start", "--worker", "echo --offers parrot --slots 2 --lease 1s")
    assert done.returncode == 0, done.stderr
    assert "worker-parrot takes part" in done.stderr
    waited = ksi(
        "ask", "completion:async", "--session-id", session_id, "--prompt", "hi", "--requires",
        "parrot", "--wait",
    )  # fmt: skip
    assert '"response": "hi"' in waited.stdout, waited.stderr
    epoch = registered(alice)["worker-parrot"]["epoch"]
    os.kill(alice.read("agent:info", agent_id="worker-parrot")["pid"], signal.SIGKILL)
    until(lambda: registered(alice).get("worker-parrot", {}).get("epoch", 0) > epoch)
    failed = ksi(
        "ask", "completion:async", "--session-id", session_id, "--prompt", "x", "--requires",
        "parrot", "--options", '{"delay_s": -1}', "--wait",
    )  # fmt: skip
    assert (failed.returncode, "unanswered" in failed.stderr) == (1, True)
    assert '"kind": "invalid_request"' in failed.stdout
    with system.client("operator", role="operator") as operator:
        operator.ask("agent:terminate", agent_id="worker-parrot")
    until(lambda: "worker-parrot" not in registered(alice))
    unheard = ksi(
        "ask", "completion:async", "--session-id", session_id, "--prompt", "x", "--requires",
        "nobody", "--wait", "--timeout", "200ms",
    )  # fmt: skip
    assert unheard.returncode == 4
    assert "start --worker 'PROVIDER --offers nobody'" in unheard.stderr
