"""What a file says of a composition, and why some say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksi.actors.followers.composed import Rejected, hash_of, parse, read_file, read_metadata, split
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
