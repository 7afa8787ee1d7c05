"""`ksi demo` as people run it, and that its proofs can fail."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ksi.actors.owners import OWNERS
from ksi.console import demo_proof as prove
from ksi.console.demo_agent import Acked, Told
from ksi.console.demo_play import AGENTS, Play, from_logs, shipped
from ksi.transport.errors import NotFound

DEMO = (sys.executable, "-P", "-m", "ksi.console", "demo")


def environment(place: Path) -> dict[str, str]:
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("KSI_")}
    return {**inherited, "TMPDIR": str(place)}


def test_the_demo_proves_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        DEMO, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "All of it held" in done.stdout
    assert "KSI healthy" in done.stdout or "KSI degraded" in done.stdout
    assert done.stdout.count("  yes  ") == 11
    assert done.stderr.count("kill -9") == 2
    assert list(tmp_path.iterdir()) == []


def test_the_demo_plays_logs_and_says_it_as_one_object(tmp_path: Path) -> None:
    logs, place = tmp_path / "logs", tmp_path / "place"
    place.mkdir()
    write_logs(logs)
    done = subprocess.run(
        [*DEMO, "--input", str(logs), "--json"], env=environment(place), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["schema"] == "ksi.demo/1"
    assert said["ok"]
    assert (said["sessions"], said["turns"], said["skipped_lines"]) == (2, 4, 3)
    assert said["acknowledged"] == said["stored"] > said["turns"]
    assert said["status"]["owners"][1]["restarts"] == 1
    assert {proof["kept"] for proof in said["proofs"]} == {True}
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        DEMO, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        first = [line for _, line in zip(range(len(OWNERS) + 3), process.stderr, strict=False)]
        pids = [int(line.split()[-1]) for line in first if " pid " in line]
        process.send_signal(number)
        process.wait(30)

    assert process.returncode == 128 + number
    assert len(pids) == len(OWNERS) + 1
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether a process is there, a moment after it was told to go."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)  # A poll with an end.
    return True


def write_logs(logs: Path) -> None:
    """Two logs with a human and a claude line each, and three lines that are neither."""
    logs.mkdir()
    for number in range(2):
        human = {"timestamp": "2026-01-01T00:00:00Z", "type": "human", "content": f"why {number}?"}
        claude = {"type": "claude", "subtype": "success", "result": "because", "usage": {"n": 1}}
        lines = [json.dumps(human), json.dumps(claude)]
        (logs / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    broken = ['{"type": "system"}', '{"type": "human", "content": "\\ud83d"}', "{"]
    (logs / "broken.jsonl").write_text("\n".join(broken))


# The plays


def test_the_transcript_has_four_agents_and_shows_every_pattern_it_speaks_of() -> None:
    play = shipped()
    turns = [turn for scene in play.scenes for turn in scene.turns]

    assert play.turns == len(turns) == 40
    assert {turn.agent for turn in turns} == set(AGENTS)
    declared = {turn.data.get("pattern") for turn in turns}
    assert {"peer_discovery", "team_formation", "role_assumption"} <= declared
    assert sum("role_transition" in turn.data.get("context", {}) for turn in turns) == 3


def test_a_directory_without_logs_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"event": "x"}\n')
    with pytest.raises(NotFound):
        from_logs(tmp_path)


# The proofs: right on what happened, wrong on what must not happen


def performed(play: Play) -> tuple[list[Acked], dict[str, list[dict[str, Any]]]]:
    """Return what agents would be told of a perfect play with two notes each, and its files."""
    acked, at_s = [], 0.0
    said = [(scene.session_id, turn.agent, turn.event, turn.data)
            for scene in play.scenes for turn in scene.turns]  # fmt: skip
    said += [(name, agent, "note", {"n": n}) for agent, name in play.notes.items() for n in (1, 2)]
    files: dict[str, list[dict[str, Any]]] = {}
    for session_id, agent, event, data in said:
        lines = files.setdefault(session_id, [])
        seq, at_s = len(lines) + 1, at_s + 1
        metadata = {"agent_id": agent, "seq": seq}
        lines.append({"event": event, "data": data, "metadata": metadata})
        acked.append(Acked(session_id, seq, agent, event, data, at_s, at_s + 0.5))
    return acked, files


def held(play: Play, acked: list[Acked], files: dict[str, Any]) -> list[bool]:
    proofs = [
        prove.all_stored(acked, files),
        prove.exactly_once(acked, files),
        prove.order_kept(play, acked, files),
    ]
    return [proof.kept for proof in proofs]


def test_a_perfect_play_holds() -> None:
    play = shipped()
    acked, files = performed(play)
    assert held(play, acked, files) == [True, True, True]
    assert prove.survived(acked, 10.0, 0.01).kept


def lose(lines: list[Any]) -> None:
    lines.pop()


def double(lines: list[Any]) -> None:
    again = copy.deepcopy(lines[-1])
    again["metadata"]["seq"] += 1
    lines.append(again)


def swap(lines: list[Any]) -> None:
    first, second = lines[0], lines[1]
    first["metadata"]["seq"], second["metadata"]["seq"] = 2, 1
    lines[0], lines[1] = second, first


def alter(lines: list[Any]) -> None:
    lines[0]["data"] = {}


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lose, [False, False, False]),
        (double, [True, False, False]),
        (swap, [False, True, False]),
        (alter, [False, True, False]),
    ],
)
@pytest.mark.parametrize("where", ["scene", "notes"])
def test_harm_done_to_a_file_is_seen(
    harm: Callable[[list[Any]], None], expected: list[bool], where: str
) -> None:
    play = shipped()
    acked, files = performed(play)
    files = copy.deepcopy(files)
    harm(files[play.scenes[1].session_id if where == "scene" else play.notes["ben"]])

    assert held(play, acked, files) == expected


def test_a_kill_before_or_after_everything_proves_nothing() -> None:
    acked, _ = performed(shipped())
    assert not prove.survived(acked, 0.0, 0.01).kept
    assert not prove.survived(acked, 1e9, 0.01).kept


def test_messages_that_nobody_speaks_of_are_seen() -> None:
    play = shipped()
    told = [Told(play.turns, 0, {}, []), Told(play.turns - 2, 2, {}, [])]
    assert prove.heard(play, told).kept

    told[1] = Told(play.turns - 2, 1, {}, [])
    assert not prove.heard(play, told).kept


def at_the_desk() -> tuple[Told, list[dict[str, Any]]]:
    """Return what an agent is told of three requests, and what stands in the file of the desk."""
    prompts = {f"ada_{n}": f"{n}?" for n in (1, 2, 3)}
    outcomes = [
        {
            "request_id": request_id,
            "granted_at": float(at),
            "finished_at": at + 1.0,
            "attempt": 2 if request_id == "ada_2" else 1,
            "result": {"response": prompt},
        }
        for at, (request_id, prompt) in enumerate(prompts.items())
    ]
    desk = [
        {"event": f"completion:{event}", "correlation_id": request_id}
        for request_id in prompts
        for event in ("request", "result")
    ]
    return Told(0, 0, prompts, outcomes), desk


def test_requests_that_are_answered_one_by_one_hold() -> None:
    told, desk = at_the_desk()
    assert prove.answered([told], desk, "ada_2").kept


@pytest.mark.parametrize(
    "harm",
    [
        lambda told, desk: told.outcomes[0].update(finished_at=1.5),
        lambda told, desk: told.outcomes[1].update(attempt=1),
        lambda told, desk: told.outcomes[2].update(result=None),
        lambda told, desk: told.outcomes[2].update(result={"response": "1?"}),
        lambda told, desk: desk.pop(),
        lambda told, desk: desk.append(desk[-1]),
        lambda told, desk: told.outcomes.clear(),
    ],
)
def test_two_at_once_or_an_answer_too_many_or_too_few_is_seen(
    harm: Callable[[Told, list[Any]], None],
) -> None:
    told, desk = at_the_desk()
    harm(told, desk)
    assert not prove.answered([told], desk, "ada_2").kept


def test_an_index_that_differs_from_the_files_is_seen() -> None:
    files: dict[str, list[dict[str, Any]]] = {"s": [{}, {}]}
    assert prove.indexed({"rows": 2, "differences": 0}, files).kept
    assert not prove.indexed({"rows": 1, "differences": 0}, files).kept
    assert not prove.indexed({"rows": 2, "differences": 1}, files).kept
    assert not prove.indexed({"rows": 0, "differences": 0}, {}).kept


def test_a_torn_last_line_is_not_taken_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "sess_1.jsonl").write_text('{"event": "no')
    with pytest.raises(ValueError, match="not whole"):
        prove.stored(tmp_path)
