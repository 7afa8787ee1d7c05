"""One agent of `ksi demo`, a process of its own: it waits for its turns and says them.

It registers, waits for its peers, and knows whose turn it is by reading the session in place; no
message asks for that. What it has said it calls out over the bus, and counts what the others call.
It queues requests on a session that all share, the desk, and waits for their outcomes at the end.
Between its turns it fills a session of notes. What was acknowledged it writes down, entry by entry:
the proof compares that with the files.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from ksi.console.demo_play import AGENTS, Play, Scene
from ksi.transport import Client
from ksi.transport.client import Subscription
from ksi.transport.errors import NotFound

ASK_S: Final = 20.0  # Longer than any restart: what is asked here must be answered.
NOTE_PAUSE_S: Final = 0.001  # Four agents that never rest would measure each other.
LOOK_S: Final = 0.005
SAID: Final = "demo.said"  # the topic under which they call out what they have said
KILLED: Final = "demo.killed"  # the key that is set once the owner was killed and is back
REQUESTS: Final = 4  # that each queues at the desk
REQUEST_S: Final = 0.05  # what it takes to answer one


class Acked(msgspec.Struct, frozen=True, array_like=True):
    """One entry that was acknowledged; the times are of the monotonic clock."""

    session_id: str
    seq: int
    agent: str
    event: str
    data: dict[str, Any]
    asked_s: float
    acked_s: float


class Told(msgspec.Struct, frozen=True):
    """What one agent was told by others: over the bus, and by those who answer at the desk.

    Attributes:
        heard, missed: turns that were called out, and of how many it was only told the number.
        prompts: what it asked at the desk, by the id of the request.
        outcomes: what became of it, as `completion:status` says.
    """

    heard: int
    missed: int
    prompts: dict[str, str]
    outcomes: list[dict[str, Any]]


class Agent:
    """Plays the part of one name."""

    def __init__(self, client: Client, play: Play, out: IO[bytes]) -> None:
        self._client = client
        self._play = play
        self._out = out
        self._notes = play.notes[client.name]
        self._noted = 0

    def run(self) -> Told:
        """Play until the last turn of the last scene has been said, by whomever, and the owner of
        the sessions was killed."""
        with self._client.subscribe(SAID) as calls:
            self._meet()
            prompts = self._queue()
            self._play_all()
            heard, missed = self._count_calls(calls)
        outcomes = [self._client.outcome(each, timeout_s=ASK_S) for each in prompts]
        return Told(heard, missed, prompts, outcomes)

    def _play_all(self) -> None:
        parent = os.getppid()
        self._client.ask("session:create", session_id=self._notes, admission="closed")

        def go_on() -> None:
            if os.getppid() != parent:
                sys.exit("the demo has ended")
            self._note()

        for scene in self._play.scenes:
            said, seen_s = -1, 0.0
            while (count := self._count(scene)) < len(scene.turns):
                if count != said:
                    said, seen_s = count, time.monotonic()
                mine = scene.turns[count].agent == self._client.name
                if mine and time.monotonic() - seen_s >= self._play.pace_s:
                    self._say(scene, count)
                else:
                    go_on()
        while not self._has_seen_the_kill():  # It comes in the middle, however late that is.
            go_on()

    def _has_seen_the_kill(self) -> bool:
        with suppress(NotFound):
            return bool(self._client.read("state:get", key=KILLED)["value"])
        return False

    def _meet(self) -> None:
        """Register, and wait until all the others have."""
        me = self._client.name
        can = list(AGENTS[me])
        self._client.ask("agent:register", kind="player", capabilities=can, pid=os.getpid())
        found = 0
        while found < len(AGENTS) - 1:
            peers = self._client.read("agent:discover_peers", kinds=["player"], exclude=[me])
            found = len(peers["agents"])
            time.sleep(LOOK_S)  # A poll: a read, no message.

    def _queue(self) -> dict[str, str]:
        """Queue requests at the desk; return what they ask, by their ids."""
        me = self._client.name
        prompts = {f"{me}_{n}": f"{me} asks for the {n}. time" for n in range(1, REQUESTS + 1)}
        for request_id, prompt in prompts.items():
            self._client.ask(
                "completion:async",
                session_id=self._play.desk,
                request_id=request_id,
                prompt=prompt,
                requires="echo",
                options={"delay_s": REQUEST_S},
                timeout_s=ASK_S,
            )
        return prompts

    def _count_calls(self, calls: Subscription) -> tuple[int, int]:
        """Return how many turns were called out, and of how many only the number came."""
        heard = missed = 0
        until_s = time.monotonic() + ASK_S
        while heard + missed < self._play.turns and (left_s := until_s - time.monotonic()) > 0:
            with suppress(TimeoutError):
                call = calls.next(left_s)
                heard += call.topic == SAID
                missed += call.gap
        return heard, missed

    def _count(self, scene: Scene) -> int:
        """Return how many turns of a scene have been said."""
        try:
            count: int = self._client.read("session:get", session_id=scene.session_id)["seq"]
        except NotFound:
            return 0
        return count

    def _say(self, scene: Scene, number: int) -> None:
        turn = scene.turns[number]
        verb = "session:contribute"
        if scene.owner == self._client.name:
            verb = "session:append"
            if number == 0:
                self._client.ask(
                    "session:create",
                    session_id=scene.session_id,
                    title=scene.title,
                    timeout_s=ASK_S,
                )
        self._ask(verb, scene.session_id, turn.event, turn.data, turn.correlation_id)
        call = {"scene": scene.title, "number": number + 1}
        self._client.tell("message:publish", topic=SAID, message=call)

    def _note(self) -> None:
        self._noted += 1
        self._ask("session:append", self._notes, "note", {"n": self._noted}, None)
        time.sleep(NOTE_PAUSE_S)  # As in life: an agent thinks.

    def _ask(
        self, verb: str, session_id: str, event: str, data: dict[str, Any], correlation: str | None
    ) -> None:
        fields = {"session_id": session_id, "event": event, "data": data}
        asked_s = time.monotonic()
        reply = self._client.ask(verb, fields, correlation_id=correlation, timeout_s=ASK_S)
        acked_s = time.monotonic()
        acked = Acked(session_id, reply["seq"], self._client.name, event, data, asked_s, acked_s)
        self._out.write(msgspec.json.encode(acked) + b"\n")


def main() -> None:
    """Be the agent `argv[1]` on the var directory `argv[2]`: play `argv[3]`, note in `argv[4]`
    what was acknowledged, and in `argv[5]` what was told."""
    name, var, play, out, told = sys.argv[1:]
    with Client(name, var=var) as client, open(out, "wb") as file:
        agent = Agent(client, msgspec.json.decode(Path(play).read_bytes(), type=Play), file)
        Path(told).write_bytes(msgspec.json.encode(agent.run()))


if __name__ == "__main__":
    main()
