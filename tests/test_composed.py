"""What a file says of a composition, and why some say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.actors.composing import (
    Rejected,
    changed,
    hash_of,
    path_of,
    read_metadata,
    split,
    written,
)
from ksi.actors.followers.composed import parse, read_file
from ksi.storage.cache import as_json
from ksi.storage.compositions import facets_of
from ksi.transport.limits import COMPOSITION_BYTES_MAX

WHOLE = b"""---
component_type: core
name: base
version: 1.10
created: 2025-07-01
tags: [one, two]
metadata:
  capabilities: [flying]
  level: 3.0
---

# Base

It says `---` further down.
---
more
"""


def test_markdown_says_of_itself_what_its_front_matter_holds() -> None:
    found = parse("core/base.md", WHOLE)

    assert (found.name, found.component_type, found.version) == ("base", "core", "1.1")
    metadata = json.loads(found.metadata)
    assert metadata["created"] == "2025-07-01"
    assert {("tags", '"one"'), ("tags", '"two"'), ("capabilities", '"flying"')} <= found.facets
    assert ("metadata.level", "3") in found.facets
    assert split("core/base.md", WHOLE)[1].startswith("# Base")
    assert split("core/base.md", WHOLE)[1].endswith("---\nmore")


def test_plain_yaml_is_a_composition_as_a_whole() -> None:
    found = parse("a.yaml", b"name: a\ntype: profile\nyes: no\n")
    assert (found.name, found.component_type) == ("a", "profile")
    assert json.loads(found.metadata) == {"name": "a", "type": "profile", "yes": "no"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.md", b"# A\n", "it has no front matter"),
        ("a.md", b"", "it has no front matter"),
        ("a.md", b"---\nname: a\ntype: b\n", "its front matter has no end"),
        ("a.md", b"---\ntype: b\n---\n", "it has no name"),
        ("a.md", b"---\nname: a\n---\n", "it has no type"),
        ("a.md", b"---\ntitle: a\n---\n", "it has no name and no type"),
        ("a.md", b"---\n- a\n---\n", "no mapping"),
        ("a.md", b"---\nname: [\n---\n", "its YAML is malformed, line 2"),
        ("a.yaml", b"name: a\nname: b\n", "its YAML is malformed, line 2: found duplicate key"),
        ("a.yaml", b"name: \xff\n", "it is no UTF-8: byte 6"),
        ("a.yaml", b"name: a\ntype: b\nn: .nan\n", "nan is no number"),
        ("a.yaml", b"name: a\ntype: b\nn: !!python/object:os.system {}\n", "its YAML is malformed"),
        ("a.yaml", b"name: a\ntype: b\n? [1, 2]\n: 3\n", "a key of the type"),
        ("a.yaml", b"name: a\n--- \nname: b\n", "its YAML is malformed"),
        ("a.yaml", b"name: a\ntype: b\nn: " + b"[" * 40 + b"]" * 40, "nested deeper than 32"),
    ],
    ids=lambda each: str(each)[:30],
)  # fmt: skip
def test_what_is_no_composition_is_rejected_with_the_reason(
    name: str, content: bytes, reason: str
) -> None:
    with pytest.raises(Rejected) as rejected:
        parse(name, content)
    assert reason in str(rejected.value)


def test_aliases_that_stand_for_ever_more_are_rejected_before_they_fill_the_memory() -> None:
    lines = ["name: a", "type: b", "l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        lines.append(f"l{n}: &l{n} [{', '.join(10 * [f'*l{n - 1}'])}]")
    with pytest.raises(Rejected, match="more than 10000 values"):
        read_metadata("a.yaml", "\n".join(lines).encode())


def test_a_link_and_a_file_that_is_too_large_are_not_read(tmp_path: Path) -> None:
    whole, link, large = (tmp_path / name for name in ("whole.md", "link.md", "large.md"))
    whole.write_bytes(WHOLE)
    link.symlink_to(whole)
    large.write_bytes(b"x" * (COMPOSITION_BYTES_MAX + 1))

    assert hash_of(read_file(whole)) == hash_of(WHOLE)
    with pytest.raises(Rejected, match="a link"):
        read_file(link)
    with pytest.raises(Rejected, match="over"):
        read_file(large)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.md")


def test_values_can_be_found_as_they_are_and_not_as_their_text() -> None:
    found = facets_of({"a": {"b": [1, "1", True, None, 2.0]}})
    assert found == {("a.b", "1"), ("a.b", '"1"'), ("a.b", "true"), ("a.b", "null"), ("a.b", "2")}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["2025-07-01", "1.10", "yes", "~", "a\nb", " a\n  b \n", "{{x}}", "#"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@given(
    st.dictionaries(st.text(max_size=8), PLAIN, max_size=4),
    st.dictionaries(st.text(max_size=8), PLAIN, max_size=4),
    st.sampled_from(["a.md", "a.yaml"]),
    st.sampled_from(["", "text", "---\nmore\n---", "\tx  \n\n y"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_says_what_was_meant_and_so_does_what_is_changed(
    one: dict[str, Any], other: dict[str, Any], path: str, text: str
) -> None:
    one, other = ({"name": "n", "type": "core", **each} for each in (one, other))
    try:
        content = written(path, one, text)
        again = changed(path, content, other, None)
    except Rejected:  # It has no name any more, or the like.
        assert not (one["name"] and one["type"] and other["name"] and other["type"])
        return
    shown = text.strip("\n") if path == "a.md" else ""
    for found, meant in ((content, one), (again, other)):
        assert as_json(read_metadata(path, found)) == as_json(meant)
        assert split(path, found)[1] == shown


def test_what_is_not_changed_stays_as_it_was_written_by_hand() -> None:
    content = b"""---
# Who it is.
name: base   # short
type: "core"
tags: [one,  two]
metadata:
  level: 3 # high
  1: one
---

# Base
"""
    meant = read_metadata("base.md", content)
    meant["metadata"] |= {"level": 4, "note": "a\nb"}
    del meant["tags"]
    found = changed("base.md", content, meant, None).decode()
    assert found == (
        '---\n# Who it is.\nname: base   # short\ntype: "core"\nmetadata:\n  level: 4 # high\n'
        "  1: one\n  note: |-\n    a\n    b\n---\n\n# Base\n"
    )
    assert changed("base.md", found.encode(), meant, "new").endswith(b"---\n\nnew\n")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../x", "/etc/x", "a//b", ".hidden", "a/.git/x", "a\0b", "a\n", "x" * 201,
     "a/" * 201, "", "a/", "C:x", "a\\b"],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_or_hides_is_none(name: str) -> None:
    with pytest.raises(Rejected, match="is no path"):
        path_of(name if "/" in name else f"a/{name}", "core", ".md")


def test_a_new_composition_goes_where_its_type_is_unless_it_says_where() -> None:
    assert path_of("x", "profile", ".yaml") == "profiles/x.yaml"
    assert path_of("x", "core", ".md") == "components/core/x.md"
    assert path_of("a/b/x", "core", ".md") == "a/b/x.md"
    assert path_of("x", "core", ".md", "a/b/y.md") == "a/b/x.md"
    assert path_of("x", "core", ".md", "y.md") == "x.md"
    assert path_of("größe/ü 1.yml", "core", ".md") == "größe/ü 1.yml"
