"""Observation: shown once what was asked for, the rest counted, and the observed never wait."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from system import System
from test_events import NOON, log
from test_events import choose as choose_of_the_log
from trouble import kill, paused, until

from ksi.actors.declarations.events import GetNewest, Newest
from ksi.actors.declarations.observation import BREAKER_S, Count, Counted, FindDue
from ksi.actors.followers.recorded import EventLogView
from ksi.actors.owner import EventLog, Query, Reply, Sender
from ksi.actors.owners import pushing
from ksi.actors.owners.events import OWNER
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.console.observe import _observed, replayed
from ksi.transport.errors import Busy, Forbidden, Invalid, NotFound, Quota, Unavailable
from ksi.transport.message import CATALOGUE

ALICE = Sender("alice", "agent")


class Observed(Twin):
    """The owner of observations over an event log in files, which the test writes."""

    def __init__(self, var: Path) -> None:
        super().__init__(OWNER)
        self.var = var
        self.log_view = EventLogView(var)
        self.caches[EventLog] = self.log_view
        self.facts = self.fact

    def fact(self, query: Query[Any]) -> Reply:
        if isinstance(query, GetNewest):
            return Newest(n=self.log_view.newest())
        if isinstance(query, FindDue):
            due: Reply = self.read("observation:due")
            return due
        found: Reply = self.read("observation:count", **{
            name: value for name in query.__struct_fields__
            if (value := getattr(query, name)) is not None
        })  # fmt: skip
        return found

    def happens(self, *events: dict[str, Any]) -> None:
        log(self.var, [{"agents": ["target"], **event} for event in events]).close()

    def begin(self, **fields: Any) -> dict[str, str]:
        asked = {"target": "target", "subscription_id": "eye", **fields}
        return {
            "subscription_id": self.ask("watcher", "observation:subscribe", **asked).subscription_id
        }

    def shown(self, place: Mapping[str, str], limit: int = 1000) -> list[int]:
        """Take all that is shown now, and acknowledge it."""
        found: list[int] = []
        while True:
            page = self.read("observation:next", **place, limit=limit)
            found += [event["n"] for event in page.events]
            self.ask("watcher", "observation:ack", **place, upto=page.upto)
            if not page.more:
                return found

    def pushed(self) -> list[int]:
        """Let a tick pass, and return what was sent by now: numbers of events."""
        self.pass_time(0.25)
        assert not self.errors
        return [message["n"] for message in self.messages()]

    def messages(self) -> list[dict[str, Any]]:
        sent: list[Any] = [
            CATALOGUE[operation].decode(body) for _, _, operation, body in self.sends
        ]
        return [each.message for each in sent]

    def counts(self) -> tuple[int, int, int, int]:
        (row,) = self.read("observation:list").subscriptions
        return row.shown, row.sampled_out, row.rate_limited, row.missed


@pytest.fixture
def twin(tmp_path: Path) -> Observed:
    return Observed(tmp_path)


def choose(chance: random.Random) -> Asked:
    who = Sender(chance.choice(("alice", "bob")), "agent")
    who = Sender("op", "operator") if chance.random() < 0.2 else who
    place = {"subscription_id": chance.choice(("o1", "o2", "o3"))}
    target = {"target": chance.choice(("carol", "dave"))}
    limits = {"rate_limit": {"max_events": 2}, "sampling_rate": 0.5, "exclude": ["a:*"]}
    choices: list[tuple[str, dict[str, Any]]] = [
        ("observation:subscribe", {**place, **target, "after": chance.randrange(3)}),
        ("observation:subscribe", {**place, **target, "filter": limits, "breaker_s": 60.0}),
        ("observation:subscribe", target),
        ("observation:unsubscribe", place),
        ("observation:unsubscribe", target),
        ("observation:ack", {**place, "upto": chance.randrange(9)}),
        ("observation:subscribe", {**place, **target, "push": True}),
        ("observation:list", target),
        ("observation:due", {}),
        ("observation:next", place),
        ("observation:count", place),
        ("observation:query", target),
        ("observation:query_history", {"include_data": False}),
        ("observation:analyze_patterns", {"analysis_type": "sequence"}),
        ("observation:replay", target),
        ("observation:analyze", {**target, "analysis_type": "errors"}),
    ]
    operation, fields = chance.choice(choices)
    return Asked(who, operation, fields)


def test_the_owner_of_the_log_and_of_observations_passes_the_conformance_kit() -> None:
    check_owner(OWNER, lambda chance: chance.choice((choose, choose_of_the_log))(chance))


def test_an_observer_is_shown_what_his_target_does_from_now_on_and_each_event_once(
    twin: Observed,
) -> None:
    twin.happens({}, {})
    place = twin.begin(events=["session:*"])
    twin.happens({}, {"agents": ["other"]}, {"event": "agent:status"}, {"agents": ["x", "target"]})
    assert twin.shown(place) == [3, 6]
    assert twin.shown(place) == []
    twin.happens(*[{}] * 25)
    assert twin.shown(place, limit=7) == list(range(7, 32))
    assert twin.counts() == (27, 0, 0, 0)


def test_a_target_may_be_a_pattern(twin: Observed) -> None:
    place = twin.begin(target="work*")
    twin.happens({"agents": ["worker1"]}, {"agents": ["boss"]}, {"agents": ["boss", "work"]})
    assert twin.shown(place) == [1, 3]


def test_excluded_is_stronger_than_wanted(twin: Observed) -> None:
    place = twin.begin(events=["session:*"], filter={"exclude": ["session:joined"]})
    twin.happens({"event": "session:joined"}, {"event": "session:appended"})
    assert twin.shown(place) == [2]
    assert twin.counts() == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("match", "shown"),
    [
        ({"field": "status", "value": "failed"}, [1]),
        ({"field": "data.status", "value": "failed"}, [1]),
        ({"field": "size", "value": 5, "operator": "gt"}, [2]),
        ({"field": "size", "value": 5, "operator": "lt"}, [1]),
        ({"field": "size", "value": True}, []),
        ({"field": "is_new", "value": 1}, []),
        ({"field": "is_new", "value": True}, [3]),
        ({"field": "text", "value": "hill", "operator": "contains"}, [2]),
        ({"field": "tags", "value": "b", "operator": "contains"}, [3]),
        ({"field": "status", "pattern": "f*d"}, [1]),
        ({"field": "agents", "value": "target", "operator": "contains"}, [1, 2, 3]),
        ({"field": "nowhere.at.all", "value": None}, []),
        ({"field": "text", "value": 3, "operator": "gt"}, []),
    ],
)
def test_content_is_matched_by_type_and_operator(
    twin: Observed, match: dict[str, Any], shown: list[int]
) -> None:
    place = twin.begin(filter={"content_match": match})
    twin.happens(
        {"data": {"status": "failed", "size": 1}},
        {"data": {"size": 6, "text": "over the hills " * 1000}},
        {"data": {"is_new": True, "tags": ["a", "b"]}},
    )
    assert twin.shown(place) == shown


def test_of_a_rate_limit_of_ten_a_second_ten_are_shown_and_the_rest_is_counted(
    twin: Observed,
) -> None:
    place = twin.begin(filter={"rate_limit": {"max_events": 10, "window_seconds": 1.0}})
    twin.happens(*({"timestamp": NOON + n / 100} for n in range(100)))
    assert twin.shown(place, limit=3) == list(range(1, 11))
    assert twin.counts() == (10, 0, 90, 0)
    twin.happens(*({"timestamp": NOON + 1 + n / 100} for n in range(100)))
    assert twin.shown(place) == list(range(101, 111))
    assert twin.counts() == (20, 0, 180, 0)


def test_a_sample_is_the_same_whoever_asks_and_what_is_not_in_it_is_counted(
    twin: Observed,
) -> None:
    place = twin.begin(filter={"sampling_rate": 0.25})
    twin.happens(*[{}] * 400)
    before = [event["n"] for event in twin.read("observation:next", **place, limit=1000).events]
    assert twin.shown(place, limit=11) == before
    shown, sampled_out, _, _ = twin.counts()
    assert (shown, sampled_out) == (len(before), 400 - len(before))
    assert 60 < shown < 140


def test_what_was_acknowledged_twice_is_counted_once(twin: Observed) -> None:
    place = twin.begin()
    twin.happens({}, {}, {})
    for upto in (2, 2, 1, 3, 99):
        twin.ask("watcher", "observation:ack", **place, upto=upto)
    assert twin.counts() == (3, 0, 0, 0)


def test_an_acknowledgement_whose_counts_are_of_another_place_comes_again(twin: Observed) -> None:
    place = twin.begin()
    twin.happens({}, {})
    stale: Any = twin.fact(Count(subscription_id="eye", upto=1))
    assert isinstance(stale, Counted)
    twin.ask("watcher", "observation:ack", **place, upto=1)
    twin.facts = lambda _query: stale
    with pytest.raises(Busy):
        twin.ask("watcher", "observation:ack", **place, upto=2)


def test_the_breaker_of_a_hung_observer_opens_and_what_he_misses_is_counted(
    twin: Observed,
) -> None:
    place = twin.begin()
    twin.happens({}, {})
    assert twin.shown(place) == [1, 2]
    for _ in range(4):  # A sign of life is enough.
        twin.pass_time(BREAKER_S / 2)
        twin.ask("watcher", "observation:ack", **place, upto=2)
    twin.happens(*[{}] * 1500)
    twin.pass_time(BREAKER_S + 1)
    page = twin.read("observation:next", **place)
    assert (page.events, page.breaker) == ([], "open")
    twin.ask("watcher", "observation:ack", **place, upto=page.upto)
    assert twin.counts() == (2, 0, 0, 1500)
    twin.happens({})
    assert twin.shown(place) == [1503]


def test_whoever_observes_again_under_his_id_keeps_place_and_counts(twin: Observed) -> None:
    place = twin.begin()
    twin.happens({}, {})
    twin.shown(place)
    twin.happens({}, {"event": "agent:status"})
    again = twin.begin(events=["agent:*"])
    assert twin.shown(again) == [4]
    assert twin.counts() == (3, 0, 0, 0)


def test_nobody_changes_or_ends_the_observation_of_another(twin: Observed) -> None:
    place = twin.begin()
    for operation, more in (
        ("observation:subscribe", {"target": "target"}),
        ("observation:ack", {"upto": 1}),
        ("observation:unsubscribe", {}),
    ):
        with pytest.raises(Forbidden):
            twin.ask(ALICE, operation, **place, **more)
    with pytest.raises(NotFound):
        twin.ask(ALICE, "observation:unsubscribe", target="target")
    for operation in ("observation:subscribe", "observation:unsubscribe"):
        with pytest.raises(Forbidden):
            twin.ask(ALICE, operation, observer="watcher", target="target")
    twin.ask("watcher", "observation:unsubscribe", observer="watcher", target="target")
    assert twin.read("observation:list").subscriptions == []
    twin.begin(observer="watcher")
    operator = Sender("op", "operator")
    twin.ask(operator, "observation:unsubscribe", observer="watcher", target="target")
    assert twin.read("observation:list").subscriptions == []


def test_what_is_pushed_comes_by_itself_each_once_and_in_order_and_is_counted(
    twin: Observed,
) -> None:
    place = twin.begin(push=True, events=["session:*"], filter={"rate_limit": {"max_events": 10}})
    assert twin.pushed() == []
    twin.happens(*({"timestamp": NOON + n / 1000, "data": {"k": n}} for n in range(250)))
    assert twin.pushed() == list(range(1, 11))
    twin.restart()
    twin.happens({"agents": ["other"]}, {"event": "agent:status"}, {"timestamp": NOON + 9})
    assert twin.pushed() == twin.pushed() == [*range(1, 11), 253]
    assert twin.counts() == (11, 0, 240, 0)
    first = twin.messages()[0]
    assert (first["event"], first["original_event"]) == ("observe:end", "session:appended")
    assert (first["source"], first["observer"]) == ("target", "watcher")
    assert (first["original_data"]["k"], first["timestamp"]) == (0, NOON)
    assert twin.read("observation:next", **place).events == []


def test_no_more_is_pushed_than_may_be_unread_and_the_rest_waits_for_who_reads(
    twin: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "UNREAD_MAX", 10)
    monkeypatch.setattr(pushing, "TOLD_EVENTS_MAX", 7)
    place = twin.begin(push=True)
    twin.happens(*[{}] * 25)
    assert twin.pushed() == list(range(1, 8))
    assert twin.pushed() == twin.pushed() == list(range(1, 11))
    twin.ask("watcher", "observation:ack", **place, upto=9)
    assert twin.pushed() == list(range(1, 11)), "one is unread"
    for upto in (10, 17, 20):
        twin.ask("watcher", "observation:ack", **place, upto=upto)
        twin.pushed()
    assert twin.pushed() == list(range(1, 26))
    assert twin.counts() == (25, 0, 0, 0)


def test_who_does_not_read_what_is_pushed_has_his_breaker_opened_and_who_has_nothing_has_not(
    twin: Observed,
) -> None:
    place = twin.begin(push=True)
    twin.pass_time(10 * BREAKER_S)
    twin.happens({})
    assert twin.pushed() == [1]
    twin.pass_time(BREAKER_S / 2)
    twin.happens({})
    assert twin.pushed() == [1, 2]
    twin.pass_time(BREAKER_S / 2)
    twin.happens(*[{}] * 30)
    assert twin.pushed() == [1, 2]
    (row,) = twin.read("observation:list").subscriptions
    assert (row.breaker, row.unread) == ("open", 2)
    twin.ask("watcher", "observation:ack", **place, upto=2)
    assert twin.counts() == (2, 0, 0, 30)
    twin.happens({})
    assert twin.pushed() == [1, 2, 33]


def test_a_push_that_finds_no_room_is_counted_as_missed_and_opens_the_breaker(
    twin: Observed,
) -> None:
    twin.begin(push=True)
    twin.refuses = lambda message: Quota("full") if message.message["n"] == 2 else None
    twin.happens({}, {}, {})
    assert twin.pushed() == [1, 2, 3]
    (row,) = twin.read("observation:list").subscriptions
    assert (row.shown, row.missed, row.breaker) == (2, 1, "open")
    twin.happens({})
    assert twin.pushed() == [1, 2, 3]


def test_that_somebody_is_told_of_something_is_not_told_to_him_again(twin: Observed) -> None:
    twin.begin(push=True, target="*")
    told = {"event": "message:kept", "agents": ["watcher"]}
    twin.happens(told, {**told, "agents": ["bob"]}, {"event": "message:acknowledged", **told})
    assert twin.pushed() == [2]


def test_what_is_too_large_to_be_pushed_is_cut_and_said_to_be(twin: Observed) -> None:
    twin.begin(push=True, filter={"content_match": {"field": "text", "pattern": "x*"}})
    twin.happens({"data": {"text": "x" * 20_000}}, {"data": {"text": "x" * 9000}})
    assert twin.pushed() == [1, 2]
    large, small = twin.messages()
    assert (large["original_data"], large["is_cut"]) == ({}, True)
    assert small["original_data"] == {"text": "x" * 9000}


def test_a_replay_is_oldest_first_marked_and_in_its_time(twin: Observed) -> None:
    twin.happens(*({"timestamp": NOON + n * 2.0} for n in range(2500)), {"agents": ["other"]})
    now = [0.0]
    at: list[float] = []
    found = []

    def read(_owner: str, operation: str, **fields: Any) -> dict[str, Any]:
        page = twin.read(operation, **fields)
        return {"events": page.events, "begin": page.begin, "next": page.next}

    def wait(seconds: float) -> None:
        now[0] += seconds

    before = twin.store.rows()
    for event in replayed(read, {"target": "target", "speed": 10.0}, lambda: now[0], wait):
        found.append(event)
        at.append(now[0])
    assert [event["n"] for event in found] == list(range(1, 2501))
    assert all(event["replay"] is True for event in found)
    assert at == pytest.approx([n * 0.2 for n in range(2500)])
    assert twin.store.rows() == before
    assert twin.log_view.newest() == 2501


def test_history_is_asked_without_a_subscription(twin: Observed) -> None:
    twin.happens({}, {"event": "agent:status"}, {"agents": ["other"]})
    fields = {"target": "target", "exclude": ["agent:*"]}
    assert [event["n"] for event in twin.read("observation:query", **fields).events] == [1]
    page = twin.read("observation:query", target="target", reverse=True, limit=1)
    assert ([event["n"] for event in page.events], page.next) == ([2], 2)


def test_history_is_asked_of_all_agents_and_without_what_events_hold(twin: Observed) -> None:
    twin.happens({"data": {"a": 1}}, {"event": "agent:status", "agents": ["other"]})
    ask = partial(twin.read, "observation:query_history")
    assert [event["n"] for event in ask().events] == [1, 2]
    assert [event["n"] for event in ask(event_name="agent:*").events] == [2]
    assert [event["n"] for event in ask(target="target", events=["*:*"]).events] == [1]
    (event,) = ask(target="target", include_data=False).events
    assert "data" not in event
    assert (event["n"], event["agents"]) == (1, ["target"])
    assert ask(target="target").events == twin.read("observation:query", target="target").events


def test_what_is_excluded_takes_no_room_in_a_page(twin: Observed) -> None:
    twin.happens(*({"event": name} for name in ("a:x", "b:x", "a:x", "b:x", "b:x", "a:x")))
    fields = {"target": "target", "exclude": ["a:*"], "limit": 2}
    page = twin.read("observation:query", **fields, offset=1)
    assert [event["n"] for event in page.events] == [4, 5]


def test_times_and_targets_are_taken_in_the_forms_they_had(twin: Observed) -> None:
    twin.happens(*({"timestamp": NOON + n} for n in range(9)), {"agents": ["other"]})
    within = {"start": "2026-05-04T12:00:02Z", "end": NOON + 5}
    for operation in ("observation:query", "observation:replay"):
        found = twin.read(operation, target="target", time_range=within)
        assert [event["n"] for event in found.events] == [3, 4, 5]
    assert twin.read("observation:analyze", target="target", time_range=within).events == 3
    older = {"originator_id": "target", "since": NOON + 2, "limit": 2}
    found = twin.read("observation:replay", filter=older, event_patterns=["session:*"])
    assert [event["n"] for event in found.events] == [3, 4]
    for wrong in ({"start": NOON, "by": "day"}, [NOON, NOON + 1]):
        with pytest.raises(Invalid):
            twin.read("observation:query", target="target", time_range=wrong)


def test_an_analysis_counts_finds_failures_and_times_completions(twin: Observed) -> None:
    def completion(name: str, at: float, n: int, **data: Any) -> dict[str, Any]:
        event = {"event": f"completion:{name}", "timestamp": NOON + at, "data": data}
        return {**event, "correlation_id": f"r{n}"}

    twin.happens(
        completion("queued", 0.0, 1),
        completion("queued", 0.0, 2),
        completion("granted", 1.0, 1),
        completion("ended", 4.0, 1, status="completed"),
        completion("granted", 4.0, 2),
        completion("requeued", 5.0, 2, lapsed=True, reason="gone"),
        completion("granted", 5.0, 2),
        completion("ended", 6.0, 2, status="failed", reason="no answer"),
        completion("queued", 8.0, 3),
    )

    def analysed(kind: str) -> Any:
        return twin.read("observation:analyze", target="target", analysis_type=kind).found

    assert analysed("frequency")["by_event"]["completion:queued"] == 3
    assert analysed("frequency")["per_s"] == 9 / 8
    errors = analysed("errors")
    assert (errors["count"], errors["newest"][-1]["reason"]) == (2, "no answer")
    times = analysed("performance")
    assert times["ran_s"] == {"count": 2, "mean": 2.0, "p50": 3.0, "p95": 3.0, "max": 3.0}
    assert (times["waited_s"]["max"], times["open"]) == (5.0, 1)


def test_an_analysis_finds_what_agents_do_in_a_row(twin: Observed) -> None:
    def did(agent: str, *names: str, at: float = 0.0) -> list[dict[str, Any]]:
        return [
            {"agents": [agent, "target"], "event": name, "timestamp": NOON + at + n}
            for n, name in enumerate(names)
        ]

    twin.happens(*did("a", "x:1", "x:2", "x:1", "x:2"), *did("b", "x:2", "y:3", at=4.0))
    twin.happens(*did("a", "x:2", at=90.0))
    fields = {"event_patterns": ["x:*"], "analysis_type": "sequence"}
    found = twin.read("observation:analyze_patterns", **fields)
    assert (found.target, found.events) == (None, 6)
    assert found.found["pairs"] == [
        {"events": ["x:1", "x:2"], "count": 2}, {"events": ["x:2", "x:1"], "count": 1},
    ]  # fmt: skip
    assert found.found["triples"][0] == {"events": ["x:1", "x:2", "x:1"], "count": 1}
    of_one = {"filter": {"originator_id": "b", "since": NOON}, "analysis_type": "frequency"}
    found = twin.read("observation:analyze_patterns", **of_one)
    assert found.found["by_event"] == {"x:2": 1, "y:3": 1}
    same = twin.read("observation:analyze", target="b", since=NOON)
    assert same == found
    with pytest.raises(Invalid):
        twin.read("observation:analyze_patterns", analysis_type="sequence", limit=9)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("observation") / "var")
    yield running
    running.end()


def test_an_observation_survives_kills_of_all_it_stands_on(system: System) -> None:
    with system.client("target") as target, system.client("watcher") as watcher:
        target.ask("session:create", session_id="seen")
        place = watcher.ask("observation:subscribe", target="target", events=["session:appended"])
        place = {"subscription_id": place["subscription_id"]}
        seen: list[int] = []
        for n in range(4):
            for _ in range(20):
                target.tell("session:append", session_id="seen", event="note")
            target.flush(20.0)
            if n % 2:
                kill(system, "events")
            wanted = 20 * (n + 1)
            following = _observed(watcher.read, watcher.ask, place, wanted - len(seen))
            seen += [event["data"]["seq"] for event in following]
        assert seen == list(range(1, 81))
        shown = watcher.ask("observation:list", observer="watcher")["subscriptions"][0]
        assert (shown["shown"], shown["missed"]) == (80, 0)


def test_what_is_pushed_is_in_the_inbox_once_whatever_is_killed(system: System) -> None:
    with system.client("pushed") as pushed, system.client("eye") as eye:
        pushed.ask("session:create", session_id="told")
        eye.ask("agent:register")
        asked = {"target": "pushed", "events": ["session:appended"], "push": True}
        place = {"subscription_id": eye.ask("observation:subscribe", asked)["subscription_id"]}
        got: list[int] = []
        with eye.inbox() as inbox:
            for n in range(4):
                for _ in range(10):
                    pushed.tell("session:append", session_id="told", event="note")
                pushed.flush(20.0)
                kill(system, ("events", "bus")[n % 2])
                while len(got) < 10 * (n + 1):
                    delivery = inbox.next(timeout_s=20.0)
                    assert delivery.sender == "events"
                    got.append(delivery.message["original_data"]["seq"])
                    delivery.ack()
                last = {"upto": delivery.message["n"], "timeout_s": 20.0}
                eye.ask("observation:ack", **place, **last)
        assert got == list(range(1, 41))
        shown = eye.ask("observation:list", observer="eye")["subscriptions"][0]
        assert (shown["shown"], shown["missed"], shown["unread"]) == (40, 0, 0)


def test_a_hung_observer_and_a_hung_owner_of_the_log_hold_up_nobody(system: System) -> None:
    with system.client("busy") as busy, system.client("hung") as hung:
        busy.ask("session:create", session_id="on")
        place = hung.ask("observation:subscribe", target="busy", subscription_id="hung")
        with paused(system, "events"):
            for n in range(50):
                assert busy.ask("session:append", session_id="on", event="note")["seq"] == n + 1
            with pytest.raises(Unavailable):
                hung.ask("observation:ack", subscription_id="hung", upto=1, timeout_s=0.2)
        page = until(
            lambda: (
                found
                if len((found := hung.read("observation:next", subscription_id="hung"))["events"])
                >= 50
                else None
            )
        )
        assert page["breaker"] == place["breaker"] == "closed"
