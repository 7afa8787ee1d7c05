"""What `ksi demo` proves from files alone: what agents were told against what is on disk.

Each check returns what was seen, in words, and whether it is what was promised.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ksi.console.demo_agent import Acked, Told
from ksi.console.demo_play import Play, entries

Stored = Mapping[str, Sequence[Mapping[str, Any]]]  # the lines of each session file, in order


class Proof(NamedTuple):
    """One promise, whether it was kept, and what was seen."""

    promise: str
    kept: bool
    seen: str


def stored(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of all session files, as any reader of JSON Lines would.

    Raises:
        ValueError: a line is no JSON, or the last one is not whole.
    """
    found = {}
    for path in sorted(directory.glob("*.jsonl")):
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            raise ValueError(f"the last line of {path.name} is not whole")
        found[path.stem] = [json.loads(line) for line in content.splitlines()]
    return found


def all_stored(acked: Iterable[Acked], files: Stored) -> Proof:
    """Every acknowledged entry stands in its file, in the place its reply named."""
    count, missing = 0, []
    for each in acked:
        count += 1
        lines = files.get(each.session_id, ())
        line = lines[each.seq - 1] if each.seq <= len(lines) else None
        if line is None or _said(line) != (each.agent, each.event, each.data):
            missing.append(f"entry {each.seq} of {each.session_id}")
    seen = f"{count} acknowledged, {count - len(missing)} of them in the session files"
    return Proof("acknowledged = stored", not missing and count > 0, _with(seen, missing))


def exactly_once(acked: Sequence[Acked], files: Stored) -> Proof:
    """No line that nobody was told of, none twice, and numbers 1, 2, 3 ... in every file."""
    told = Counter((each.session_id, each.seq) for each in acked)
    numbers = {name: [line["metadata"]["seq"] for line in lines] for name, lines in files.items()}
    wrong = [f"{seq} of {name} twice" for (name, seq), count in told.items() if count > 1]
    wrong += [
        f"{name} is numbered otherwise"
        for name, found in numbers.items()
        if found != list(range(1, len(found) + 1))
    ]
    lines = sum(map(len, files.values()))
    seen = f"{lines} lines in {len(files)} files for {len(told)} acknowledgements"
    return Proof("exactly once", not wrong and lines == len(told), _with(seen, wrong))


def order_kept(play: Play, acked: Iterable[Acked], files: Stored) -> Proof:
    """Every scene reads as it was played, and every agent's notes as it wrote them."""
    wrong = [
        scene.title
        for scene in play.scenes
        if [_said(line) for line in files.get(scene.session_id, ())] != entries(scene.turns)
    ]
    notes: dict[str, list[int]] = {name: [] for name in play.notes.values()}
    for each in acked:
        if each.session_id in notes:
            notes[each.session_id].append(each.data["n"])
    for name, told in notes.items():
        if [line["data"].get("n") for line in files.get(name, ())] != told:
            wrong.append(name)
    seen = f"{play.turns} turns in {len(play.scenes)} sessions as they were played"
    return Proof("order kept", not wrong, _with(seen, wrong))


def heard(play: Play, told: Iterable[Told]) -> Proof:
    """Every turn that was called out over the bus reached everybody, or was counted as missed."""
    heard, missed, expected = 0, 0, 0
    for each in told:
        heard += each.heard
        missed += each.missed
        expected += play.turns
    seen = f"{heard} of {expected} messages heard, {missed} known to be missed"
    return Proof("the bus loses nothing silently", heard + missed == expected and heard > 0, seen)


def answered(told: Iterable[Told], desk: Sequence[Mapping[str, Any]], missed: str) -> Proof:
    """One request at a time, each answered once: also the one whose worker was killed over it.

    Args:
        desk: the lines of the file of the session where they were queued.
        missed: the id of the request that the killed worker held.
    """
    outcomes, wrong = [], []
    for each in told:
        outcomes += each.outcomes
        wrong += [
            f"the answer to {outcome['request_id']}"
            for outcome in each.outcomes
            if (outcome["result"] or {}).get("response") != each.prompts[outcome["request_id"]]
        ]
    outcomes.sort(key=lambda outcome: outcome["granted_at"] or 0.0)
    wrong += [
        f"{before['request_id']} and {after['request_id']} ran at once"
        for before, after in pairwise(outcomes)
        if after["granted_at"] < before["finished_at"]
    ]
    lines = Counter((line["event"], line["correlation_id"]) for line in desk)
    for outcome in outcomes:
        for event in ("completion:request", "completion:result"):
            if lines[event, outcome["request_id"]] != 1:
                wrong.append(f"the {event} of {outcome['request_id']} in the file")
    again = [outcome for outcome in outcomes if outcome["request_id"] == missed]
    if not again or again[0]["attempt"] < 2:
        wrong.append(f"{missed} after its worker was killed")
    seen = (
        f"{len(outcomes)} requests on one session, one at a time, each with one result; "
        f"{missed} lost its worker (kill -9) and was answered by another"
    )
    return Proof(
        "nothing is asked twice",
        not wrong and len(desk) == 2 * len(outcomes) > 0,
        _with(seen, wrong),
    )


def indexed(report: Mapping[str, Any], files: Stored) -> Proof:
    """Every line has its row, and every row leads to its line."""
    lines = sum(map(len, files.values()))
    seen = f"{report['rows']} rows for {lines} lines, {report['differences']} differences"
    return Proof(
        "the index is the files", report["rows"] == lines > 0 and not report["differences"], seen
    )


def survived(acked: Sequence[Acked], killed_s: float, recovered_s: float) -> Proof:
    """The kill came in the middle: entries were acknowledged before it and after it."""
    before = sum(each.acked_s < killed_s for each in acked)
    longest_s = max((each.acked_s - each.asked_s for each in acked), default=0.0)
    seen = (
        f"{recovered_s * 1e3:.1f} ms to the next reply; {before} entries before it, "
        f"{len(acked) - before} after; no agent waited longer than {longest_s * 1e3:.0f} ms"
    )
    return Proof("kill -9 is survived", 0 < before < len(acked), seen)


def _said(line: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    return line["metadata"]["agent_id"], line["event"], line["data"]


def _with(seen: str, wrong: Sequence[str]) -> str:
    """Add the first of what is wrong."""
    return f"{seen}; not so: {wrong[0]}, {len(wrong)} in all" if wrong else seen
