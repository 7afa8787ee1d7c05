"""The state: entities, relationships, values, queues, and who is told what has changed."""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import msgspec
import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.actors import entities
from ksi.actors.owner import Sender
from ksi.actors.owners import queues, state
from ksi.actors.owners.state import OWNER
from ksi.actors.queries import cursor_of
from ksi.actors.subscriptions import matches
from ksi.actors.testing import Asked, Twin, check_owner
from ksi.transport.errors import Conflict, Invalid, NotFound, Quota, TooLarge
from ksi.transport.message import encode

OPERATOR = Sender("op", "operator")
IDS = ("a", "b", "c", "config/x", "ns:k")
TYPES = ("task", "agent", "value")
RELATIONS = ("observes", "spawned")
VALUES: tuple[Any, ...] = (
    0, 1, -1, 1.0, 0.5, 1e300, -0.0, 2**64 - 1, -(2**63), True, False, None, "", "1", "grün \0 😀",
    [], [1, None, {"x": [1e-300]}], {}, {"nested": {"deep": [True, 1.5]}}, "x" * 300,
)  # fmt: skip
NAMES = ("n", "status", "größe", "properties.n")


def draw_properties(chance: random.Random) -> dict[str, Any]:
    return {chance.choice(NAMES): chance.choice(VALUES) for _ in range(chance.randrange(4))}


def draw_where(chance: random.Random) -> dict[str, Any]:
    """Draw a condition, some of them none."""
    name, value = chance.choice((*NAMES, "id", "revision")), chance.choice(VALUES)
    operator = chance.choice(("$gt", "$lte", "$ne", "$prefix", "$exists", "$in", "$nope"))
    choices: list[dict[str, Any]] = [
        *[{}] * 3,
        *[{name: value}] * 2,
        {name: {operator: value}},
        {name: {"$in": [value, 1]}},
        {"$or": [{name: value}, {"status": "1"}]},
        {"$not": {name: {"$exists": chance.random() < 0.5}}},
    ]
    return chance.choice(choices)


def draw_change(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Draw a change, as it is alone or in a transaction."""
    entity_id, kind = chance.choice(IDS), chance.choice(TYPES)
    properties = draw_properties(chance)
    guard = {"revision": chance.choice((0, 1, 5))} if chance.random() < 0.1 else {}
    ends = {"from_id": chance.choice(("a", "b")), "to_id": chance.choice(IDS[:3])}
    related = {**ends, "relation_type": chance.choice(RELATIONS)}
    given = {"id": entity_id} if chance.random() < 0.8 else {}
    key = {"key": chance.choice(("config/x", "k", "a")), **chance.choice(({}, {"namespace": "ns"}))}
    upsert = {"upsert": chance.random() < 0.3}
    choices: list[tuple[str, dict[str, Any]]] = [
        ("state:entity:create", {"type": kind, "properties": properties, **given, **upsert}),
        ("state:entity:update", {"id": entity_id, "properties": properties, **guard}),
        ("state:relationship:create", {**related, "metadata": properties, **upsert}),
        ("state:relationship:delete", related),
        ("state:set", {**key, "value": chance.choice(VALUES), **guard}),
    ]
    if chance.random() < 0.15:
        how = {"relationships": chance.choice(("cascade", "refuse"))}
        choices = [
            ("state:entity:delete", {"id": entity_id, **how, **guard}),
            ("state:delete", key),
        ]
        return chance.choice(choices)
    return chance.choice(choices)


def choose(chance: random.Random) -> Asked:
    """Draw what a few agents keep, relate, look for and hand over."""
    who = Sender(chance.choice(("alice", "bob")), "agent")
    operation, fields = draw_change(chance)
    queue = {"namespace": "jobs", "key": chance.choice(("k1", "k2"))}
    request = {"request_id": chance.choice((None, None, "r1"))}
    ttl = {"ttl_seconds": chance.choice((None, 0, 1.0, 5, 60))}
    steps = [draw_change(chance) for _ in range(chance.randint(1, 4))]
    transaction = {"steps": [{"operation": name, "data": data} for name, data in steps]}
    entities = [{"type": "task", "properties": draw_properties(chance)}, {"id": "a"}, 7]
    expect = {"expect": {"a": chance.choice((0, 3))}} if chance.random() < 0.2 else {}
    find = {
        "type": chance.choice((None, *TYPES)),
        "where": draw_where(chance),
        "order_by": chance.choice(("created_at desc", "n", "n desc", "-id", "revision", "; drop")),
        "limit": chance.choice((1, 3, 100)),
        "include": chance.choice(([], ["properties", "relationships"])),
    }
    ends = {"from": chance.choice((None, "a")), "to": chance.choice((None, "b"))}
    choices: list[Asked] = [
        *[Asked(who, operation, {**fields, **request})] * 8,
        *[Asked(who, "state:transaction", {**transaction, **expect, **request})] * 2,
        Asked(who, "state:entity:bulk_create", {
            "entities": entities, "atomic": chance.random() < 0.3, "upsert": chance.random() < 0.3,
        }),
        *[Asked(who, "async_state:push", {**queue, "data": chance.choice(VALUES), **ttl})] * 3,
        Asked(who, "async_state:pop", {**queue, "count": chance.randint(1, 3), **request}),
        Asked(who, "state:entity:get", {"id": chance.choice(IDS), "include": ["relationships"]}),
        *[Asked(who, "state:entity:query", find)] * 2,
        Asked(who, "state:relationship:query", {**ends, "limit": 2}),
        Asked(who, "state:graph:traverse", {
            "from_id": "a", "depth": 3, "direction": chance.choice(("outgoing", "both")),
            "include_entities": chance.random() < 0.5,
        }),
        Asked(who, "state:aggregate:count", {
            "target": chance.choice(("entities", "relationships")), "where": draw_where(chance),
            "group_by": chance.choice((None, "n", "type", "relation_type")),
        }),
        Asked(who, "state:get", {"key": "k"}),
        Asked(who, "state:list", {"prefix": "k", "limit": 1}),
        Asked(who, "state:changes", {"after": chance.choice((None, 0, 3)), "prefix": "config/"}),
        Asked(who, "async_state:get_queue", {**queue, "limit": 2}),
        Asked(who, "async_state:list_queues", {"limit": 1}),
    ]  # fmt: skip
    if chance.random() < 0.03:
        return Asked(who, "async_state:delete", queue)
    if chance.random() < 0.03:
        return Asked(who, "async_state:expire_queue", {**queue, **ttl})
    return chance.choice(choices)


def test_the_state_keeps_the_promises_of_every_owner() -> None:
    check_owner(OWNER, choose, seeds=range(40))


@pytest.fixture
def twin() -> Twin:
    return Twin(OWNER)


def create(twin: Twin, entity_id: str | None = None, kind: str = "task", **properties: Any) -> Any:
    given = {} if entity_id is None else {"id": entity_id}
    return twin.ask("alice", "state:entity:create", type=kind, properties=properties, **given)


def relate(twin: Twin, from_id: str, to_id: str, kind: str = "observes", **fields: Any) -> Any:
    ends = {"from_id": from_id, "to_id": to_id, "relation_type": kind}
    return twin.ask("alice", "state:relationship:create", **ends, **fields)


def properties_of(twin: Twin, entity_id: str) -> Any:
    return twin.read("state:entity:get", id=entity_id).properties


def rows_left(twin: Twin) -> list[str]:
    """Return the tables of the state that are not empty, but for what is kept of changes."""
    kept = ("changes", "totals")
    rows = twin.store.rows()
    return [name for name in rows if rows[name] and "." not in name and name not in kept]


def pages(twin: Twin, operation: str, rows: str, **fields: Any) -> list[Any]:
    """Return the rows of all pages."""
    found: list[Any] = []
    while True:
        page = twin.read(operation, **fields)
        found += getattr(page, rows)
        if page.next is None:
            return found
        assert page.next != fields.get("after"), "it goes nowhere"
        fields["after"] = page.next


def ids(twin: Twin, **fields: Any) -> list[str]:
    return [each.id for each in pages(twin, "state:entity:query", "entities", **fields)]


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1e300, -1e300, 5e-324, -0.0, 0.1])
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
NAME = st.text(min_size=1, max_size=10).filter(lambda name: "\0" not in name)


# Entities.


@given(st.dictionaries(NAME, PLAIN, max_size=5), PLAIN)
@settings(max_examples=60, deadline=None)
def test_values_come_back_as_they_went_to_the_bit(properties: dict[str, Any], value: Any) -> None:
    twin = Twin(OWNER)
    create(twin, "e", **properties)
    twin.ask("alice", "state:set", key="k", value=value)
    twin.ask("alice", "async_state:push", namespace="n", key="q", data=value)
    (item,) = twin.ask("alice", "async_state:pop", namespace="n", key="q").items
    exact = msgspec.msgpack.encode
    assert exact(properties_of(twin, "e")) == exact(properties)
    assert exact(twin.read("state:get", key="k").value) == exact(value)
    assert exact(item.data) == exact(value)
    (found,) = twin.read("state:entity:query", type="task").entities
    assert exact(found.properties) == exact(properties)


def test_get_and_query_say_the_same_of_an_entity_times_as_numbers_and_in_words(twin: Twin) -> None:
    made = create(twin, "e", n=1)
    twin.now += 1.5
    twin.ask("bob", "state:entity:update", id="e", properties={"n": 2})
    got = twin.read("state:entity:get", id="e", include=["properties", "relationships"])
    (found,) = twin.read(
        "state:entity:query", type="task", include=["properties", "relationships"]
    ).entities
    assert got == found
    assert (got.created_at, got.updated_at) == (made.created_at, made.created_at + 1.5)
    for at, iso in ((got.created_at, got.created_at_iso), (got.updated_at, got.updated_at_iso)):
        assert datetime.fromisoformat(iso).timestamp() == at


def test_an_entity_without_an_id_gets_one_of_its_type_that_is_free(twin: Twin) -> None:
    made = [create(twin).id for _ in range(50)]
    assert len(set(made)) == 50
    assert all(re.fullmatch(r"task_[0-9a-f]{8}", each) for each in made)


def test_null_removes_a_property_in_an_update_unless_it_is_kept(twin: Twin) -> None:
    create(twin, "e", a=None, b=1, c=2)
    assert properties_of(twin, "e") == {"a": None, "b": 1, "c": 2}
    twin.ask("bob", "state:entity:update", id="e", properties={"b": None, "gone": None, "d": 3})
    assert properties_of(twin, "e") == {"a": None, "c": 2, "d": 3}
    twin.ask("bob", "state:entity:update", id="e", properties={"c": None}, keep_null=True)
    assert properties_of(twin, "e") == {"a": None, "c": None, "d": 3}


@pytest.mark.parametrize("kind", ["task", "agent"])
def test_what_exists_is_a_conflict_and_with_upsert_replaced_type_and_all(
    twin: Twin, kind: str
) -> None:
    made = create(twin, "e", old=1)
    with pytest.raises(Conflict, match="already, of the type task") as refused:
        create(twin, "e", kind=kind, new=2)
    assert refused.value.details["revision"] == made.revision
    fields = {"id": "e", "type": kind, "properties": {"new": 2}, "upsert": True}
    changed = twin.ask("bob", "state:entity:create", **fields)
    assert (changed.type, changed.created_at) == (kind, made.created_at)
    assert properties_of(twin, "e") == {"new": 2}
    assert ids(twin, type=kind, where={"new": 2}) == ["e"]
    assert ids(twin, where={"old": 1}) == []
    counts = twin.read("state:aggregate:count", group_by="type").groups
    assert [(each.value, each.count) for each in counts] == [(kind, 1)]


def test_deleting_leaves_no_row_behind(twin: Twin) -> None:
    for each in "abc":
        create(twin, each, n=1, text="x", nested={"a": 1})
        twin.ask("bob", "state:entity:update", id=each, properties={"n": 2, "text": None, "m": 3})
    for ends in ("ab", "ba", "bb", "bc"):
        relate(twin, *ends)
    deleted = twin.ask("bob", "state:entity:delete", id="b")
    assert deleted.relationships == 4
    assert twin.read("state:relationship:query").relationships == []
    for each in "ac":
        twin.ask("bob", "state:entity:delete", id=each, relationships="refuse")
    assert rows_left(twin) == []


def test_deleting_what_is_related_is_refused_where_that_is_asked_for(twin: Twin) -> None:
    create(twin, "a"), create(twin, "b")
    relate(twin, "a", "b")
    for each in "ab":
        with pytest.raises(Conflict, match="has relationships"):
            twin.ask("bob", "state:entity:delete", id=each, relationships="refuse")
    twin.ask("bob", "state:relationship:delete", from_id="a", to_id="b", relation_type="observes")
    twin.ask("bob", "state:entity:delete", id="a", relationships="refuse")


def test_more_relationships_than_one_record_holds_are_not_deleted_at_once(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "CASCADE_MAX", 2)
    for each in "abcd":
        create(twin, each)
    for each in "bcd":
        relate(twin, "a", each)
    with pytest.raises(Quota, match="more than 2"):
        twin.ask("bob", "state:entity:delete", id="a")
    twin.ask("bob", "state:entity:delete", id="d")
    twin.ask("bob", "state:entity:delete", id="a")


@pytest.mark.parametrize(
    ("properties", "refusal"),
    [
        ({"": 1}, Invalid),
        ({"a\0b": 1}, Invalid),
        ({"ü" * 65: 1}, Invalid),
        ({str(n): n for n in range(257)}, TooLarge),
        ({"text": "x" * (256 << 10)}, TooLarge),
    ],
)
def test_properties_that_cannot_be_kept_are_refused(
    twin: Twin, properties: dict[str, Any], refusal: type[Exception]
) -> None:
    with pytest.raises(refusal, match=r"\$\.properties"):
        create(twin, **properties)
    assert rows_left(twin) == []


def test_types_are_few(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "TYPES_MAX", 2)
    for kind in ("one", "two"):
        create(twin, kind=kind)
    with pytest.raises(Quota, match="2 types"):
        create(twin, kind="three")
    create(twin, kind="two")


def test_of_ten_thousand_entities_the_bad_one_is_named_and_the_others_are_there(
    twin: Twin,
) -> None:
    entities: list[Any] = [{"id": f"e{n}", "type": "task"} for n in range(10_000)]
    entities[5000] = {"id": "e5000", "type": "no type"}
    before = len(twin.store.journal)
    reply = twin.ask("alice", "state:entity:bulk_create", entities=entities)
    assert (reply.total, reply.success, reply.failed) == (10_000, 9999, 1)
    assert [n for n, each in enumerate(reply.results) if each.error] == [5000]
    assert reply.results[5000].error.code == "invalid"
    assert "entities[5000]" in reply.results[5000].error.text
    assert reply.results[4999].id == "e4999"
    assert len(twin.store.journal) == before + 1
    assert twin.read("state:aggregate:count").count == 9999


def test_many_entities_are_all_created_or_none_if_that_is_asked_for(twin: Twin) -> None:
    entities = [{"id": "a", "type": "task"}, {"id": "a", "type": "task"}]
    with pytest.raises(Conflict, match=r"\$\.entities\[1\]"):
        twin.ask("alice", "state:entity:bulk_create", entities=entities, atomic=True)
    assert rows_left(twin) == []
    assert twin.ask("alice", "state:entity:bulk_create", entities=entities).failed == 1


# Queries.


def canonical(value: Any) -> Any:
    """Return what is equal exactly where values are the same: typed, numbers by what they are."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, int | float):
        return ("number", value)
    if isinstance(value, list):
        return ("list", [canonical(each) for each in value])
    if isinstance(value, dict):
        return ("map", {name: canonical(each) for name, each in value.items()})
    return (type(value).__name__, value)


NOTHING = object()
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": lambda a, b: a > b, "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b, "$lte": lambda a, b: a <= b,
}  # fmt: skip


def expected(where: dict[str, Any], properties: dict[str, Any]) -> bool:
    """Return whether a condition holds, as plain Python has it."""
    for name, wanted in where.items():
        if name == "$or":
            holds = any(expected(each, properties) for each in wanted)
        elif name == "$not":
            holds = not expected(wanted, properties)
        else:
            value = properties.get(name, NOTHING)
            operators = (
                wanted if isinstance(wanted, dict) and "$" in str(wanted) else {"$eq": wanted}
            )
            holds = all(compared(value, operator, each) for operator, each in operators.items())
        if not holds:
            return False
    return True


def compared(value: Any, operator: str, operand: Any) -> bool:
    if operator in ("$ne", "$nin"):
        return not compared(value, {"$ne": "$eq", "$nin": "$in"}[operator], operand)
    if operator == "$exists":
        return bool((value is not NOTHING) == operand)
    if value is NOTHING:
        return False
    if operator == "$in":
        return any(canonical(value) == canonical(each) for each in operand)
    if operator == "$eq":
        return bool(canonical(value) == canonical(operand))
    if operator == "$prefix":
        return isinstance(value, str) and value.startswith(operand)
    if operator == "$contains":
        if isinstance(value, str):
            return isinstance(operand, str) and operand in value
        return isinstance(value, list) and any(
            canonical(each) == canonical(operand) for each in value
        )
    return canonical(value)[0] == canonical(operand)[0] and COMPARE[operator](value, operand)


def ordered(value: Any) -> tuple[Any, ...]:
    """Return where a value stands among others of all types; those that are no single one last."""
    kind = canonical(value)[0] if value is not NOTHING else ""
    rank = {"NoneType": 0, "boolean": 1, "number": 2, "str": 3}.get(kind, 9)
    return (rank, value if rank in (1, 2, 3) else 0)


VALUE = st.sampled_from(
    [0, 1, 2, 1.0, 1.5, -3, 2**53, 2**53 + 1, 1e300, True, False, None, "", "1", "a", "ab", "b\0",
     [1], [1.0, "a"], {"k": 1}]
)  # fmt: skip
CONDITION = st.one_of(
    VALUE.filter(lambda value: not isinstance(value, dict)),
    st.builds(
        lambda operator, value: {operator: value},
        st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
        st.sampled_from([0, 1, 1.5, 2**53, "", "a"]),
    ),
    st.builds(lambda value: {"$ne": value}, VALUE),
    st.builds(lambda values: {"$in": values}, st.lists(VALUE, max_size=3)),
    st.builds(lambda values: {"$nin": values}, st.lists(VALUE, max_size=3)),
    st.builds(lambda yes: {"$exists": yes}, st.booleans()),
    st.builds(lambda text: {"$prefix": text}, st.sampled_from(["", "a", "b\0"])),
    st.builds(lambda value: {"$contains": value}, st.sampled_from([1, "a", "b"])),
    st.just({"$gte": 1, "$lt": 2}),
)
SOME = st.sampled_from(["p", "q"])
WHERE = st.recursive(
    st.dictionaries(SOME, CONDITION, max_size=2),
    lambda inner: st.one_of(
        st.builds(lambda each: {"$or": each}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda each: {"$not": each}, inner),
        st.builds(lambda each, name, cond: {**each, name: cond}, inner, SOME, CONDITION),
    ),
    max_leaves=3,
)
THINGS = st.lists(
    st.tuples(st.sampled_from(["x", "y"]), st.dictionaries(SOME, VALUE, max_size=2)), max_size=12
)


@given(
    THINGS, WHERE, st.sampled_from(["p", "q", "created_at", "updated_at", "id"]), st.booleans(),
    st.sampled_from([None, "x"]), st.sampled_from([1, 2, 100]), st.sampled_from([1, 3, 10_000]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_a_query_finds_what_plain_python_finds_in_its_order_on_pages_of_any_size(
    things: list[tuple[str, dict[str, Any]]],
    where: dict[str, Any],
    name: str,
    descending: bool,
    kind: str | None,
    limit: int,
    scan: int,
) -> None:
    twin = Twin(OWNER)
    for number, (each, properties) in enumerate(things):
        twin.now += 1
        create(twin, f"e{number:02}", kind=each, **properties)
    found = [
        (number, properties)
        for number, (each, properties) in enumerate(things)
        if kind in (None, each) and expected(where, properties)
    ]
    if name in ("p", "q"):
        single = [each for each in found if ordered(each[1].get(name, NOTHING))[0] < 9]
        rest = [each for each in found if each not in single]
        single.sort(key=lambda each: (ordered(each[1][name]), each[0]), reverse=descending)
        found = single + (rest[::-1] if descending else rest)
    elif descending:
        found.reverse()
    order_by = f"{name} desc" if descending else name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "SCAN_ROWS_MAX", scan)
        # What no table has the order of is sorted: that needs all of it.
        patch.setattr(entities, "SCAN_ROWS_MAX", scan if name in ("p", "q", "created_at") else 99)
        got = ids(twin, type=kind, where=where, order_by=order_by, limit=limit)
        groups = pages_of_counts(twin, type=kind, where=where, group_by=name)
    assert got == [f"e{number:02}" for number, _ in found]
    assert groups[0] == len(found)
    if name in ("p", "q"):
        values = [canonical(each[1][name]) for each in found if name in each[1]]
        assert groups[1] == len(found) - len(values)
        assert sum(groups[2].values()) == len(values)
        for value, count in groups[2].items():
            assert values.count(canonical(msgspec.json.decode(value))) == count


def pages_of_counts(twin: Twin, **fields: Any) -> tuple[int, int, dict[bytes, int]]:
    """Return what all pages of a count add up to: all, those without, and by value."""
    count = without = 0
    groups: dict[bytes, int] = {}
    while True:
        page = twin.read("state:aggregate:count", **fields)
        count, without = count + page.count, without + page.without
        for each in page.groups or ():
            whole = isinstance(each.value, float) and each.value.is_integer()
            key = msgspec.json.encode(int(each.value) if whole else each.value)
            groups[key] = groups.get(key, 0) + each.count
        if page.next is None:
            return count, without, groups
        fields["after"] = page.next


def test_pages_neither_repeat_nor_leave_out_what_stays_while_others_write(twin: Twin) -> None:
    chance = random.Random(1)
    for number in range(60):
        create(twin, f"stays{number}", n=number % 7, kept=True)
    for order_by in ("created_at desc", "created_at", "n", "n desc", "id", "updated_at"):
        seen: list[str] = []
        fields: dict[str, Any] = {"type": "task", "order_by": order_by, "limit": 7}
        while True:
            page = twin.read("state:entity:query", **fields)
            seen += [each.id for each in page.entities]
            if page.next is None:
                break
            fields["after"] = page.next
            made = create(twin, n=chance.randrange(7)).id
            twin.ask("bob", "state:entity:update", id=made, properties={"n": chance.randrange(7)})
            if chance.random() < 0.5:
                twin.ask("bob", "state:entity:delete", id=made)
        stayed = [each for each in seen if each.startswith("stays")]
        assert sorted(stayed) == sorted(f"stays{number}" for number in range(60))


@pytest.mark.parametrize(
    "order_by",
    ["n; DROP TABLE x", "n desc, m", "", "a b", "(select 1)", "n\n", "-", "\0", "字" * 120],
)
def test_an_order_that_is_none_is_refused(twin: Twin, order_by: str) -> None:
    create(twin, n=1)
    with pytest.raises(Invalid, match="order_by"):
        twin.read("state:entity:query", type="task", order_by=order_by)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"a": {"$near": 1}}, r"no operator '\$near' - at `\$.where.a`"),
        ({"$nor": []}, "no operator"),
        ({"$or": {}}, r"\$or takes a list"),
        ({"$and": [1]}, "a condition is a map"),
        ({"a": {"$gt": None}}, "only numbers and texts"),
        ({"a": {"$gt": True}}, "only numbers and texts"),
        ({"a": {"$in": 1}}, "a list of values"),
        ({"a": {"$exists": 1}}, "true or false"),
        ({"a": {"$prefix": 1}}, "takes a text"),
        ({"a": {"$gt": 1, "b": 2}}, "no operator 'b'"),
        ({"$or": [{"a": 1}] * 257}, "more than 256"),
    ],
)
def test_a_condition_that_is_none_is_refused_with_its_place(
    twin: Twin, where: dict[str, Any], said: str
) -> None:
    for operation in ("state:entity:query", "state:aggregate:count"):
        with pytest.raises(Invalid, match=said):
            twin.read(operation, where=where)


BAD_CURSORS = [
    cursor_of(place, "created_at desc")
    for place in ((), (False, ""), (False, "", -1), (False, "", 2**64 - 1), (0, "", 1),
                  (True, "a\0", 1), (False, "", "1"))
]  # fmt: skip


@pytest.mark.parametrize("after", ["x", "AAAA", "kw", "😀", *BAD_CURSORS])
def test_a_cursor_that_is_none_or_of_another_order_is_refused(twin: Twin, after: str) -> None:
    for _ in range(3):
        create(twin, n=1)
    with pytest.raises(Invalid, match="after"):
        twin.read("state:entity:query", after=after)
    cursor = twin.read("state:entity:query", order_by="n", limit=1).next
    with pytest.raises(Invalid, match="of the order 'n'"):
        twin.read("state:entity:query", order_by="n desc", after=cursor)


@pytest.mark.parametrize("name", ["a\0b", "properties.\0", "x" * 600, "字" * 120])
def test_a_name_nothing_can_have_is_refused_in_a_condition(twin: Twin, name: str) -> None:
    create(twin, n=1)
    for where in ({name: 1}, {"$not": {name: {"$gt": 1}}}, {"$and": [{"n": 1}, {name: "x"}]}):
        with pytest.raises(Invalid, match="a name has 128 bytes at most"):
            twin.read("state:entity:query", type="task", where=where)


def test_names_are_of_properties_but_for_the_entitys_own(twin: Twin) -> None:
    properties: dict[str, Any] = {"id": "other", "n": 1, "properties.n": 2}
    create(twin, "e", **properties)
    assert ids(twin, where={"id": "e"}) == ["e"]
    assert ids(twin, where={"id": "other"}) == []
    assert ids(twin, where={"properties.id": "other"}) == ["e"]
    assert ids(twin, where={"properties.n": 1, "properties.properties.n": 2}) == ["e"]
    assert ids(twin, where={"revision": 1, "type": {"$prefix": "t"}}) == ["e"]


def test_an_order_no_table_has_is_refused_where_there_are_too_many_to_sort(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entities, "SCAN_ROWS_MAX", 3)
    for number in range(4):
        create(twin, n=number)
    with pytest.raises(Quota, match="4 entities are too many to order by updated_at"):
        twin.read("state:entity:query", order_by="updated_at")
    assert len(ids(twin, order_by="updated_at", where={"n": {"$gt": 1}})) == 2


def test_a_thousand_times_more_entities_do_not_make_a_query_look_at_more_rows() -> None:
    """Counted, not timed: rows of tables that were read."""
    looked = []
    for count in (10, 10_000):
        twin = Twin(OWNER)
        for start in range(0, count, 10_000):
            many = [
                {"type": "task", "properties": {"n": n, "part": n // 5}}
                for n in range(start, min(count, start + 10_000))
            ]
            twin.ask("alice", "state:entity:bulk_create", entities=many)
        reads = [0]
        table = twin.store.tables["entities"]
        table.get = counted(table.get, reads)
        for fields in (
            {"where": {"part": 1}, "order_by": "n desc"},
            {"where": {"n": {"$gte": 3, "$lt": 6}, "part": {"$gte": 0}}, "order_by": "id"},
            {"order_by": "n", "limit": 5},
            {"order_by": "created_at desc", "limit": 5},
        ):
            assert twin.read("state:entity:query", **fields).count >= 3
        looked.append(reads[0])
    assert looked[0] == looked[1]


def counted(get: Callable[[Any], Any], reads: list[int]) -> Callable[[Any], Any]:
    def wrapped(key: Any) -> Any:
        reads[0] += 1
        return get(key)

    return wrapped


# Relationships.


def test_a_relationship_to_or_from_nobody_is_refused(twin: Twin) -> None:
    create(twin, "a")
    for ends in (("a", "ghost"), ("ghost", "a")):
        with pytest.raises(NotFound, match="no entity ghost"):
            relate(twin, *ends)
    assert twin.read("state:aggregate:count", target="relationships").count == 0


def test_the_names_of_fields_that_were_used_for_relationships_are_all_good(twin: Twin) -> None:
    create(twin, "a"), create(twin, "b")
    ends = {"from": "a", "to": "b", "type": "observes"}
    made = twin.ask("alice", "state:relationship:create", **ends, metadata={"since": 1.5})
    assert (made.from_id, made.to_id, made.relation_type) == ("a", "b", "observes")
    (found,) = twin.read("state:relationship:query", **ends).relationships
    assert (found.from_id, found.metadata, found.revision) == ("a", {"since": 1.5}, made.revision)
    twin.ask("alice", "state:relationship:delete", **ends)
    with pytest.raises(NotFound):
        twin.ask("alice", "state:relationship:delete", **ends)
    with pytest.raises(Invalid, match="`to_id`"):
        twin.ask("alice", "state:relationship:create", **{"from": "a", "type": "observes"})


def test_a_relationship_that_exists_is_a_conflict_and_with_upsert_gets_the_metadata(
    twin: Twin,
) -> None:
    create(twin, "a"), create(twin, "b")
    relate(twin, "a", "b")
    with pytest.raises(Conflict, match="a observes b already"):
        relate(twin, "a", "b")
    relate(twin, "a", "b", metadata={"n": 1}, upsert=True)
    assert twin.read("state:relationship:query").relationships[0].metadata == {"n": 1}
    assert twin.read("state:aggregate:count", target="relationships").count == 1


NODES = st.sampled_from("abcdefgh")
EDGES = st.lists(st.tuples(NODES, NODES, st.sampled_from(["r", "s"])), max_size=20)


@given(
    EDGES, st.sampled_from(["outgoing", "incoming", "both"]),
    st.sampled_from([[], ["r"], ["r", "s", "r"]]), st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_walk_reaches_what_networkx_reaches_and_goes_along_the_same_edges(
    edges: list[tuple[str, str, str]], direction: str, types: list[str], depth: int
) -> None:
    twin = Twin(OWNER)
    graph = networkx.MultiDiGraph()
    for each in "abcdefgh":
        create(twin, each)
        graph.add_node(each)
    for source, target, kind in edges:
        relate(twin, source, target, kind, upsert=True)
        if not types or kind in types:
            graph.add_edge(source, target, key=kind)
    found = twin.read(
        "state:graph:traverse", from_id="a", direction=direction, types=types, depth=depth
    )
    walked = {
        "outgoing": graph, "incoming": graph.reverse(), "both": graph.to_undirected(as_view=True),
    }[direction]  # fmt: skip
    depths = networkx.single_source_shortest_path_length(walked, "a", cutoff=depth)
    assert {each.id: each.depth for each in found.nodes} == depths
    begins = {"outgoing": (0,), "incoming": (1,), "both": (0, 1)}[direction]
    along = {
        edge
        for edge in graph.edges(keys=True)
        if any(depths.get(edge[at], depth) < depth for at in begins)
    }
    got = [(each.from_id, each.to_id, each.relation_type) for each in found.edges]
    assert set(got) == along
    assert (found.node_count, found.edge_count) == (
        len(depths),
        len(got) == len(along) and len(got),
    )
    assert not found.truncated

    count = twin.read("state:aggregate:count", target="relationships", group_by="relation_type")
    kinds = Counter(kind for _, _, kind in dict.fromkeys(edges))
    assert {each.value: each.count for each in count.groups} == dict(kinds)


def test_a_walk_that_reaches_too_much_says_so(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    create(twin, "hub")
    for number in range(5):
        create(twin, f"n{number}", text="x" * 100)
        relate(twin, "hub", f"n{number}")
    monkeypatch.setattr(state, "WALKED_MAX", 3)
    found = twin.read("state:graph:traverse", from_id="hub")
    assert (found.node_count, found.edge_count, found.truncated) == (3, 2, True)
    monkeypatch.setattr(state, "WALKED_MAX", 100)
    monkeypatch.setattr(state, "PAGE_BYTES_MAX", 1000)
    found = twin.read("state:graph:traverse", from_id="hub", include_entities=True)
    assert found.truncated
    assert found.nodes[-1].entity.properties == {"text": "x" * 100}


@given(st.lists(st.tuples(NODES, NODES, st.sampled_from(["r", "s"]), st.integers(0, 2))))
@settings(max_examples=40, deadline=None)
def test_relationships_are_found_and_counted_as_plain_python_does(
    edges: list[tuple[str, str, str, int]],
) -> None:
    twin = Twin(OWNER)
    for each in "abcdefgh":
        create(twin, each)
    kept = {}
    for source, target, kind, n in edges:
        relate(twin, source, target, kind, upsert=True, metadata={"n": n} if n else {})
        kept[source, target, kind] = n
    for fields in ({}, {"from_id": "a"}, {"to_id": "a"}, {"from_id": "a", "to_id": "b"},
                   {"relation_type": "r"}, {"to_id": "b", "relation_type": "s"}):  # fmt: skip
        found = pages(twin, "state:relationship:query", "relationships", **fields, limit=2)
        got = [(each.from_id, each.to_id, each.relation_type) for each in found]
        assert len(got) == len(set(got))
        names = ("from_id", "to_id", "relation_type")
        wanted = [
            edge for edge in kept
            if all(fields.get(name, part) == part for name, part in zip(names, edge, strict=True))
        ]  # fmt: skip
        assert sorted(got) == sorted(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "SCAN_ROWS_MAX", 2)
        many = {"target": "relationships", "type": "r", "where": {"to_id": {"$ne": "a"}}}
        count, without, groups = pages_of_counts(twin, **many, group_by="n")
    numbers = [n for (_, target, kind), n in kept.items() if kind == "r" and target != "a"]
    assert (count, without) == (len(numbers), numbers.count(0))
    assert groups == {b"%d" % n: numbers.count(n) for n in set(numbers) - {0}}


# Values, revisions and transactions.


def test_a_value_is_set_listed_and_deleted_under_its_key(twin: Twin) -> None:
    ask = partial(twin.ask, "alice")
    for number in range(5):
        ask("state:set", key=f"config/k{number}", value=number)
    ask("state:set", key="x", namespace="ns", value=None, metadata={"by": "me"})
    create(twin, "config/entity")
    listed = twin.read("state:list", prefix="config/", limit=3)
    assert list(listed.keys) == ["config/k0", "config/k1", "config/k2"]
    assert list(twin.read("state:list", prefix="config/", after=listed.next).keys) == [
        "config/k3", "config/k4",
    ]  # fmt: skip
    assert list(twin.read("state:list", pattern="*3").keys) == ["config/k3"]
    assert list(twin.read("state:list", namespace="ns").keys) == ["x"]
    got = twin.read("state:get", key="x", namespace="ns")
    assert (got.key, got.value, got.metadata) == ("x", None, {"by": "me"})
    ask("state:delete", key="x", namespace="ns")
    with pytest.raises(NotFound):
        twin.read("state:get", key="x", namespace="ns")


def test_a_key_and_an_entity_of_the_same_id_do_not_take_each_others_place(twin: Twin) -> None:
    create(twin, "e", n=1)
    for operation, fields in (("state:set", {"value": 1}), ("state:delete", {})):
        with pytest.raises(Conflict, match="of the type task, not a key"):
            twin.ask("alice", operation, key="e", **fields)
    with pytest.raises(NotFound):
        twin.read("state:get", key="e")
    with pytest.raises(Invalid, match="128"):
        twin.ask("alice", "state:set", key="k" * 100, namespace="n" * 28, value=1)


def test_a_command_for_a_former_revision_is_a_conflict_that_names_the_present_one(
    twin: Twin,
) -> None:
    first = create(twin, "e", n=1).revision
    second = twin.ask(
        "bob", "state:entity:update", id="e", properties={"n": 2}, revision=first
    ).revision
    assert second > first
    for operation, fields in (
        ("state:entity:update", {"id": "e", "properties": {"n": 3}}),
        ("state:entity:delete", {"id": "e"}),
    ):
        with pytest.raises(Conflict, match=f"has the revision {second}, not {first}") as refused:
            twin.ask("bob", operation, **fields, revision=first)
        assert refused.value.details["revision"] == second
    assert properties_of(twin, "e") == {"n": 2}
    only_new = {"key": "k", "value": 1, "revision": 0}
    made = twin.ask("bob", "state:set", **only_new)
    with pytest.raises(Conflict, match="has the revision"):
        twin.ask("bob", "state:set", **only_new)
    with pytest.raises(Conflict, match="is not there"):
        twin.ask("bob", "state:set", key="other", value=1, revision=7)
    twin.ask("bob", "state:delete", key="k", revision=made.revision)


def step(operation: str, **data: Any) -> dict[str, Any]:
    return {"operation": f"state:{operation}", "data": data}


def test_the_steps_of_a_transaction_build_on_each_other_in_one_commit(twin: Twin) -> None:
    create(twin, "old")
    relate(twin, "old", "old")
    before = len(twin.store.journal)
    reply = twin.ask(
        "alice", "state:transaction", expect={"new": 0, "old": 1},
        steps=[
            step("entity:create", id="new", type="task", properties={"n": 1}),
            step("relationship:create", from_id="old", to_id="new", relation_type="has"),
            step("entity:update", id="new", properties={"n": 2, "m": 3}),
            step("entity:update", id="new", properties={"m": None}),
            step("set", key="k", value=[1]),
            step("set", key="k", value=[2]),
            step("entity:delete", id="old"),
        ],
    )  # fmt: skip
    assert len(twin.store.journal) == before + 1
    assert reply.results[-1]["relationships"] == 2
    assert properties_of(twin, "new") == {"n": 2}
    assert twin.read("state:get", key="k").value == [2]
    assert twin.read("state:relationship:query").relationships == []
    last = twin.read("state:changes").revision
    assert reply.revision == last


@pytest.mark.parametrize(
    ("bad", "refusal"),
    [
        (step("relationship:create", from_id="new", to_id="ghost", relation_type="has"), NotFound),
        (step("entity:create", id="new", type="task"), Conflict),
        (step("entity:update", id="new"), Invalid),
        (step("set", key="x", value=1, request_id="r"), Invalid),
        (step("set", key="new", value=1), Conflict),
        (step("entity:delete", id="new", relationships="refuse", revision=1), Conflict),
    ],
)
def test_of_a_transaction_with_a_step_that_is_refused_nothing_happens(
    twin: Twin, bad: dict[str, Any], refusal: type[Exception]
) -> None:
    steps = [step("set", key="k", value=1), step("entity:create", id="new", type="task"), bad]
    with pytest.raises(refusal, match=r"\$\.steps\[2\]"):
        twin.ask("alice", "state:transaction", steps=steps)
    assert rows_left(twin) == []
    with pytest.raises(Conflict, match="k is not there"):
        twin.ask("alice", "state:transaction", steps=steps[:2], expect={"k": 9})
    assert rows_left(twin) == []


# Watching.


def test_from_any_revision_the_changes_of_a_prefix_come_once_each_in_order(twin: Twin) -> None:
    chance = random.Random(3)
    for _ in range(300):
        operation, fields = draw_change(chance)
        with contextlib.suppress(Conflict, NotFound, Invalid):
            twin.ask("alice", operation, **fields)
    every = changes(twin, 0)
    assert [each.revision for each in every] == [*range(1, every[-1].revision + 1)]
    assert every[-1].revision > 100
    for fields in ({"prefix": "config/"}, {"prefix": "c"}, {"id": "a"}):
        wanted = [each for each in every if each.id == fields.get("id", each.id)]
        wanted = [each for each in wanted if each.id.startswith(fields.get("prefix", ""))]
        for after in (0, 17, every[-1].revision):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(state, "SCAN_ROWS_MAX", 10)
                got = changes(twin, after, limit=3, **fields)
            assert got == [each for each in wanted if each.revision > after]


def changes(twin: Twin, after: int, **fields: Any) -> list[Any]:
    found: list[Any] = []
    while True:
        page = twin.read("state:changes", after=after, **fields)
        found, after = found + page.changes, page.revision
        if not page.more:
            return found


def test_whoever_follows_the_changes_of_an_entity_knows_what_it_is(twin: Twin) -> None:
    chance = random.Random(5)
    for _ in range(200):
        operation, fields = draw_change(chance)
        with contextlib.suppress(Conflict, NotFound, Invalid):
            twin.ask("alice", operation, **fields)
    known: dict[str, Any] = {}
    for change in changes(twin, 0):
        if change.what in ("created", "set"):
            known[change.id] = change.properties
        elif change.what == "updated":
            known[change.id] = {
                name: value
                for name, value in {**known[change.id], **change.properties}.items()
                if name not in (change.removed or ())
            }
        elif change.what == "deleted":
            del known[change.id]
    assert known == {each: properties_of(twin, each) for each in ids(twin)}


def test_changes_that_are_not_kept_any_more_or_not_made_yet_are_refused(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "CHANGES_MAX", 5)
    for number in range(9):
        twin.ask("alice", "state:set", key="k", value=number)
    assert [each.revision for each in changes(twin, 4)] == [5, 6, 7, 8, 9]
    with pytest.raises(NotFound, match="the oldest is 5"):
        twin.read("state:changes", after=3)
    with pytest.raises(Conflict, match="no revision 10 yet"):
        twin.read("state:changes", after=10)
    monkeypatch.setattr(state, "CHANGES_BYTES_MAX", 600)
    twin.ask("alice", "state:set", key="k", value="x" * 400)
    assert [each.revision for each in changes(twin, 9)] == [10]
    assert twin.store.rows()["changes"].keys() == {(10,)}


@pytest.mark.parametrize(
    ("fields", "heard"),
    [
        ({}, 6),
        ({"prefix": "config/"}, 3),
        ({"prefix": "config/llm"}, 3),
        ({"prefix": "config/llm/"}, 2),
        ({"prefix": "conf"}, 6),
        ({"id": "config/llm/model"}, 1),
        ({"id": "a.b"}, 1),
        ({"prefix": "a."}, 1),
    ],
)
def test_every_change_is_announced_where_whoever_watches_is_told_to_listen(
    twin: Twin, fields: dict[str, Any], heard: int
) -> None:
    pattern = tuple(twin.read("state:changes", **fields).topic.split("."))
    for key in ("config/llm/model", "config/llm/size", "config/x", "a.b", "other", "ns:key"):
        twin.ask("alice", "state:set", key=key, value=1)
    found = [said for said in twin.told if matches(pattern, tuple(said.topic.split(".")))]
    assert len(found) == heard
    wanted = changes(twin, 0, **fields)
    said_of = [said.message["revision"] for said in found if isinstance(said.message, dict)]
    assert {each.revision for each in wanted} <= {*said_of}
    assert all(said.sender == "alice" for said in found)


# Queues.


def push(twin: Twin, data: Any, **fields: Any) -> Any:
    return twin.ask("alice", "async_state:push", namespace="n", key="q", data=data, **fields)


def pop(twin: Twin, count: int = 1) -> list[Any]:
    reply = twin.ask("bob", "async_state:pop", namespace="n", key="q", count=count)
    return [each.data for each in reply.items]


def test_a_queue_hands_out_in_order_and_once(twin: Twin) -> None:
    assert [push(twin, n).size for n in range(5)] == [1, 2, 3, 4, 5]
    peeked = twin.read("async_state:get_queue", namespace="n", key="q", limit=2)
    assert [each.data for each in peeked.items] == [0, 1]
    assert [each.pushed_by for each in peeked.items] == ["alice"] * 2
    rest = twin.read("async_state:get_queue", namespace="n", key="q", after=peeked.next)
    assert [each.data for each in rest.items] == [2, 3, 4]
    assert (pop(twin, 2), pop(twin), pop(twin, 9), pop(twin)) == ([0, 1], [2], [3, 4], [])
    assert rows_left(twin) == []


@pytest.mark.parametrize("ttl_s", [0.5, 60.0, 3600.0])
def test_what_is_in_a_queue_lapses_a_second_around_its_time_also_after_a_restart(
    twin: Twin, ttl_s: float
) -> None:
    push(twin, "kept", ttl_seconds=None)
    push(twin, "lapses", ttl_seconds=ttl_s)
    push(twin, "later", ttl_seconds=ttl_s + 30)
    twin = twin.recovered()
    twin.pass_time(ttl_s - 0.3)
    assert twin.read("async_state:get_queue", namespace="n", key="q").size == 3
    twin = twin.recovered()
    twin.pass_time(0.6)
    assert twin.read("async_state:get_queue", namespace="n", key="q").size == 2
    assert pop(twin, 5) == ["kept", "later"]
    assert rows_left(twin) == []


def test_what_has_lapsed_is_not_handed_out_before_the_tick_that_drops_it(twin: Twin) -> None:
    push(twin, 1, ttl_seconds=1.0)
    push(twin, 2, ttl_seconds=9.0)
    twin.time_s += 1.01
    assert pop(twin, 5) == [2]
    assert rows_left(twin) == []


def test_the_time_of_what_waits_can_be_set_anew_and_much_lapses_at_once(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "LAPSED_MAX", 4)
    for number in range(20):
        push(twin, number, ttl_seconds=None if number % 2 else 5.0)
    reply = twin.ask("alice", "async_state:expire_queue", namespace="n", key="q", ttl_seconds=10.0)
    assert reply.items == 20
    twin.pass_time(9.5)
    assert twin.read("async_state:list_queues").queues[0].size == 20
    twin.pass_time(1.0)
    assert rows_left(twin) == []


def test_a_deleted_queue_leaves_no_row_behind(twin: Twin) -> None:
    for number in range(3):
        push(twin, number)
    delete = {"namespace": "n", "key": "q"}
    assert twin.ask("bob", "async_state:delete", **delete).items == 3
    assert twin.ask("bob", "async_state:delete", **delete).items == 0
    assert rows_left(twin) == []


def test_queues_are_listed_page_by_page(twin: Twin) -> None:
    for namespace in ("a", "b"):
        for key in ("x", "y"):
            twin.ask("alice", "async_state:push", namespace=namespace, key=key, data="1234")
    found = pages(twin, "async_state:list_queues", "queues", limit=1)
    assert [(each.namespace, each.key, each.size, each.bytes) for each in found] == [
        ("a", "x", 1, 5), ("a", "y", 1, 5), ("b", "x", 1, 5), ("b", "y", 1, 5),
    ]  # fmt: skip
    assert len(twin.read("async_state:list_queues", namespace="b").queues) == 2


def test_a_full_queue_refuses_and_says_so(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "QUEUE_ITEMS_MAX", 2)
    push(twin, 1), push(twin, 2)
    with pytest.raises(Quota, match="n:q has 2 items"):
        push(twin, 3)
    monkeypatch.setattr(queues, "QUEUED_MAX", 2)
    with pytest.raises(Quota, match="all queues"):
        twin.ask("alice", "async_state:push", namespace="n", key="other", data=1)
    with pytest.raises(TooLarge, match="data"):
        push(twin, "x" * (256 << 10))
    assert pop(twin, 3) == [1, 2]


# Bounds.


def test_no_reply_outgrows_its_frame(twin: Twin) -> None:
    large = {"text": "x" * (200 << 10)}
    for number in range(8):
        create(twin, f"e{number}", n=number, **large)
    for number in range(1, 8):
        relate(twin, "e0", f"e{number}", metadata=large)
    both = ["properties", "relationships"]
    for operation, fields in (
        ("state:entity:query", {"include": both}),
        ("state:entity:query", {"include": both, "where": {"n": {"$gte": 0}}}),
        ("state:entity:get", {"id": "e0", "include": both}),
        ("state:graph:traverse", {"from_id": "e0", "include_entities": True}),
        ("state:relationship:query", {"from_id": "e0"}),
        ("state:changes", {"after": 0}),
    ):
        encode(twin.read(operation, **fields))  # It refuses what is larger than a frame.
    assert twin.read("state:entity:get", id="e0", include=both).more_relationships
    found = pages(twin, "state:entity:query", "entities", include=both)
    assert [each.id for each in found] == [f"e{number}" for number in range(7, -1, -1)]
    assert len(pages(twin, "state:relationship:query", "relationships")) == 7
    for number, letter in enumerate("yz"):
        twin.ask(
            "alice", "state:entity:update", id=f"e{number}",
            properties={"text": letter * (200 << 10)},
        )  # fmt: skip
    with pytest.raises(Quota, match="large ones"):
        twin.read("state:aggregate:count", group_by="text")


def test_a_reply_to_ten_thousand_that_fail_or_get_long_ids_fits_a_frame(twin: Twin) -> None:
    kind = "t" * 64
    for many in ([{"type": kind}] * 10_000, [{"type": kind, "id": ""}] * 10_000):
        reply = twin.ask("alice", "state:entity:bulk_create", entities=many)
        assert reply.total == 10_000
        encode(reply)


def test_a_query_looks_at_a_bounded_number_of_bytes_and_goes_on_from_there(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        create(twin, f"e{number:02}", n=number, text="x" * 1000)
    for module in (state, entities):
        monkeypatch.setattr(module, "SCAN_BYTES_MAX", 5000)
    assert twin.read("state:entity:query", where={"$not": {"n": 1}}).count == 5
    assert len(ids(twin, where={"$not": {"n": 1}})) == 19
    assert pages_of_counts(twin, where={"$not": {"n": 1}})[0] == 19
    with pytest.raises(Quota, match="too many to order by id"):
        ids(twin, order_by="id")
    with pytest.raises(Quota, match="5000 bytes"):
        twin.read("state:aggregate:count", where={"n": {"$gte": 0}})


def test_the_changes_of_one_command_are_bounded(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "CHANGED_MAX", 3)
    steps = [step("set", key=f"k{number}", value=1) for number in range(4)]
    with pytest.raises(Quota, match="more than 3 changes"):
        twin.ask("alice", "state:transaction", steps=steps)
    assert rows_left(twin) == []
