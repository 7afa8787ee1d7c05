"""What the agents of `ksi demo` say: the transcript that KSI ships, or real logs.

A play has scenes, one after another; a scene is a session, and its turns are said one by one. Who
speaks first owns the session, all others contribute.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from ksi.transport.errors import NotFound

AGENTS: Final = {  # and what each says it can do
    "ada": ("coordination",),
    "ben": ("statistics", "time_series"),
    "cleo": ("writing", "summary"),
    "dev": ("review", "reproduction"),
}
FILES_MAX: Final = 500  # Of a directory of logs: more than that is no demonstration.
LINE_BYTES_MAX: Final = 256 << 10  # Longer lines of a log are skipped; a frame could not hold some.
PLAY_S: Final = 2.0  # How long the turns take all together: the load lasts as long.
PACE_S_MAX: Final = 0.05


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is said."""

    agent: str
    event: str
    data: dict[str, Any]
    correlation_id: str | None = None


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """One session and what is said in it."""

    session_id: str
    title: str
    turns: list[Turn]

    @property
    def owner(self) -> str:
        """Who creates the session."""
        return self.turns[0].agent


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """All scenes in order, how long one thinks before a turn, and where notes go meanwhile.

    Attributes:
        notes: the session each agent fills as fast as it can until the play is over: the load.
        skipped: lines of the logs that could not be read.
    """

    scenes: list[Scene]
    pace_s: float
    notes: dict[str, str]
    desk: str
    skipped: int = 0

    @property
    def turns(self) -> int:
        """How many turns there are in all."""
        return sum(len(scene.turns) for scene in self.scenes)


def shipped() -> Play:
    """Return the play from the transcript that is part of this package."""
    text = resources.files("ksi.console").joinpath("demo_transcript.jsonl").read_text()
    scenes: dict[str, list[Turn]] = {}
    for line in map(json.loads, text.splitlines()):
        scenes.setdefault(line.pop("scene"), []).append(msgspec.convert(line, Turn))
    return _play([_scene(title, turns) for title, turns in scenes.items()], 0)


def from_logs(directory: Path) -> Play:
    """Return a play from logs: files of lines of type `human` and `claude`, a scene a file.

    The first agent of a file speaks for the human, the next one for the model.

    Raises:
        NotFound: no file in it has such lines.
    """
    scenes, skipped = [], 0
    for number, path in enumerate(sorted(directory.glob("*.jsonl"))[:FILES_MAX]):
        turns = []
        for line in _lines(path):
            turn = None if line is None else _turn(line, number)
            if turn is None:
                skipped += 1
            else:
                turns.append(turn)
        if turns:
            scenes.append(_scene(path.stem[:100], turns))
    if not scenes:
        raise NotFound(
            f"there are no lines of type human or claude in {directory}/*.jsonl",
            hint="ksi demo without --input plays a transcript of its own",
        )
    return _play(scenes, skipped)


def _play(scenes: list[Scene], skipped: int) -> Play:
    pace_s = min(PACE_S_MAX, PLAY_S / sum(len(scene.turns) for scene in scenes))
    notes = {agent: f"notes_{agent}_{uuid.uuid4()}" for agent in AGENTS}
    desk = f"desk_{uuid.uuid4()}"
    return Play(scenes=scenes, pace_s=pace_s, notes=notes, desk=desk, skipped=skipped)


def _scene(title: str, turns: list[Turn]) -> Scene:
    return Scene(session_id=f"sess_{uuid.uuid4()}", title=title, turns=turns)


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of a file; None for a line that is none."""
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES_MAX):
            try:
                content = json.loads(line, parse_constant=_refuse)
                json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError):
                content = None
            yield content if isinstance(content, dict) else None


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _turn(line: dict[str, Any], number: int) -> Turn | None:
    """Return what a line of a log says; None if it is of another type."""
    kind = line.pop("type", None)
    if kind not in ("human", "claude"):
        return None
    speaker = number if kind == "human" else number + 1
    return Turn(agent=list(AGENTS)[speaker % len(AGENTS)], event=kind, data=line)


def entries(turns: Iterable[Turn]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return turns as they must stand in a session file: who, event, data."""
    return [(turn.agent, turn.event, turn.data) for turn in turns]
