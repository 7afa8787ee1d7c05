"""Compositions put together: each part once, values in their places, nothing carried out."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.actors import rendering
from ksi.actors.rendering import Part, Rendered, holds, render
from ksi.transport.errors import Conflict, NotFound, Quota

Parts = dict[str, tuple[str, dict[str, Any]]]


def rendered(parts: Parts, name: str = "it", **values: Any) -> Rendered:
    def find(wanted: str) -> Part:
        if wanted not in parts:
            raise NotFound(f"there is no composition {wanted}")
        text, metadata = parts[wanted]
        return Part(wanted, metadata, text)

    return render(find(name), values, find)


def test_a_parent_comes_before_and_what_is_mixed_in_behind_each_once() -> None:
    parts: Parts = {
        "it": ("I", {"extends": "parent", "mixins": ["m", "n"], "dependencies": ["d", "m"]}),
        "parent": ("P", {"extends": "grand", "mixins": ["n"], "level": 1, "tags": ["p"]}),
        "grand": ("G", {"level": 0, "from": "grand"}),
        "m": ("M", {"dependencies": ["d"]}),
        "n": ("N", {}),
        "d": ("D", {"level": 9}),
    }
    found = rendered(parts)
    assert found.text == "G\n\nP\n\nN\n\nI\n\nM\n\nD"
    assert found.parts == ["it", "parent", "grand", "n", "m", "d"]
    assert (found.metadata["level"], found.metadata["from"]) == (1, "grand")
    assert found.metadata["mixins"] == ["m", "n"]


def test_a_parent_comes_where_its_place_is_and_an_empty_place_is_left_empty() -> None:
    base = "{{base_content}}"
    parts: Parts = {"it": (f"a {base} z", {"extends": "p"}), "p": (f"P{base}", {})}
    assert rendered(parts).text == "a P z"


def test_what_is_given_is_stronger_than_a_default_and_the_outer_default_than_the_inner() -> None:
    parts: Parts = {
        "it": ("{{a}} {{b}} {{c}} {{d}}", {"mixins": ["m"], "variables": {
            "a": {"type": "string", "default": "A"}, "b": "B", "d": {"default": None}}}),
        "m": ("{{a}}{{c}}", {"variables": {"a": "inner", "c": {"default": "C"}}}),
    }  # fmt: skip
    found = rendered(parts, b="given")
    assert found.text == "A given C {{d}}\n\nAC"
    assert found.missing == ["d"]


def test_values_are_put_in_as_they_are_and_not_looked_at_again() -> None:
    text = "{{user.name}} {{items.1}} {{items.9}} {{none|there}} {{ n }} {{yes}} {{map}} {{x|}}."
    values: dict[str, Any] = {
        "user": {"name": "{{n}}"},
        "items": ["a", "ü"],
        "n": 1.5,
        "yes": True,
        "map": {"k": 1},
    }
    found = rendered({"it": (text, {})}, **values)
    assert found.text == '{{n}} ü {{items.9}} there 1.5 true {"k": 1} .'
    assert found.missing == ["items.9"]


def test_nothing_in_a_composition_is_carried_out() -> None:
    text = "{{len(items)}} {{__import__('os').getcwd()}} {{a.__class__}} {{$}} {{}}"
    found = rendered({"it": (text, {})}, items=[1], a="x")
    assert found.text == text
    assert len(found.missing) == 5


def test_a_name_may_depend_on_values_and_a_mixin_on_a_condition() -> None:
    parts: Parts = {
        "it": ("I", {"mixins": ["in_{{lang}}"], "conditions": [
            {"condition": "level == 'high' and n > 3", "mixins": ["strict"]},
            {"condition": "{{level}} == 'low'", "mixins": ["lax"]}]}),
        "in_de": ("DE", {}), "strict": ("S", {}), "lax": ("L", {}),
    }  # fmt: skip
    assert rendered(parts, lang="de", level="high", n=4).text == "I\n\nDE\n\nS"
    assert rendered(parts, lang="de", level="low", n=4).text == "I\n\nDE\n\nL"
    with pytest.raises(NotFound, match="in_fr"):
        rendered(parts, lang="fr")


def test_a_profile_is_made_of_its_components_whose_conditions_hold() -> None:
    components = [
        {"name": "config", "inline": {"role": "x"}},
        {"name": "prompt", "template": "Find {{it}}.\n", "vars": {"it": "all"}},
        {"name": "other", "source": "o"},
        {"name": "same", "composition": "o"},
        {"name": "if", "template": "IF", "condition": "n > 1"},
        {"name": "not", "template": "NOT", "conditions": {"none_of": ["n > 1"]}},
        {"name": "any", "template": "ANY", "conditions": {"any_of": ["n == 1", "n == 2"]}},
        {"name": "all", "template": "ALL", "conditions": {"all_of": ["n > 1", "n > 2"]}},
    ]
    parts: Parts = {"it": ("", {"components": components, "mixins": ["m"]}), "o": ("O", {})}
    parts["m"] = ("M", {})
    assert rendered(parts, n=2).text == "Find all.\n\nO\n\nIF\n\nANY\n\nM"
    assert rendered(parts, n=0, it="it").text == "Find it.\n\nO\n\nNOT\n\nM"


@pytest.mark.parametrize(
    ("condition", "is_so"),
    [
        ("level == 'high'", True),
        ("level != 'high'", False),
        ("{{level}} == 'high'", True),
        ("level in ['low', 'high']", True),
        ("level not in ('low',)", True),
        ("n > 2 and not off", True),
        ("n < 2 or user.is_admin", True),
        ("0 < n <= 3", True),
        ("n == -3", False),
        ("n > 'text'", False),
        ("unknown", False),
        ("unknown.deep == None", True),
        ("level", True),
    ],
)
def test_a_condition_compares_values(condition: str, is_so: bool) -> None:
    values = {"level": "high", "n": 3, "off": False, "user": {"is_admin": True}}
    assert holds(condition, values) is is_so


@pytest.mark.parametrize(
    "condition",
    ["", "len(level) > 1", "__import__('os')", "level.upper()", "[x for x in level]", "level[0]",
     "1 + 1", "level is None", "f'{level}'", "lambda: 1", "level ==", "x" * 501, "(" * 400,
     "(level := 'x')", "b'x'", "..."],
)  # fmt: skip
def test_a_condition_that_is_more_than_that_is_refused_and_never_carried_out(
    condition: str,
) -> None:
    with pytest.raises(Conflict, match="is not understood"):
        holds(condition, {"level": "high"})


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"extends": "it"}, "contains itself: it -> it"),
        ({"mixins": ["m"]}, "contains itself: it -> m -> it"),
        ({"mixins": "m"}, "mixins that are no list"),
        ({"mixins": [{"m": 1}]}, "names a composition by"),
        ({"variables": ["a"]}, "variables that are no mapping"),
        ({"conditions": ["x"]}, "a condition that is no mapping"),
        ({"components": ["x"]}, "a component that is no mapping"),
    ],
)
def test_what_contains_itself_or_is_not_understood_is_refused(
    metadata: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Conflict, match=reason):
        rendered({"it": ("I", metadata), "m": ("M", {"dependencies": ["it"]})})


def test_what_gets_too_long_or_is_made_of_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Quota, match="longer"):
        rendered({"it": ("{{a}}" * 1000, {})}, a="x" * 1000)
    chain: Parts = {f"c{n}": ("C", {"extends": f"c{n + 1}"}) for n in range(200)}
    with pytest.raises(Quota, match="more than 100"):
        rendered(chain, "c0")
    monkeypatch.setattr(rendering, "RENDERED_BYTES_MAX", 10)
    with pytest.raises(Quota, match="longer"):
        rendered({"it": ("12345", {"mixins": ["m"]}), "m": ("1234567", {})})
