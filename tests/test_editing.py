"""Compositions written, changed, forked and merged: decided without a process, over a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ksi.actors.composing import SUFFIXES, hash_of, read_metadata, split
from ksi.actors.declarations.editing import EditSettled, GetSource, Source, Sources
from ksi.actors.owner import Compositions, Query, Reply, Sender
from ksi.actors.owners import editing
from ksi.actors.owners.library import OWNER
from ksi.actors.testing import Asked, OneComposition, Twin
from ksi.storage import shared
from ksi.transport.errors import Busy, Conflict, Invalid, KsiError, NotFound

BASE = b"""---
name: base
type: core
version: 1.0.0  # as it began
tags: [one]
metadata:
  level: 1
---

# Base
"""


class Folder(OneComposition):
    """Compositions in a folder, each known by its path and its id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.doing: dict[str, Any] = {}

    def named(self, name: str, kind: str | None) -> list[dict[str, Any]]:
        paths = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.*")]
        wanted = (name, name.rpartition(".")[0] or name)
        return [{"file_path": path} for path in paths if path.rpartition(".")[0] in wanted]

    def source(self, path: str) -> bytes | None:
        return shared.read(self.folder, path, 1 << 20)

    def state(self) -> dict[str, Any]:
        return {"edits": self.doing}


class Editor(Twin):
    """The library over a folder; `settle` is its follower, and a tick."""

    def __init__(self, folder: Path) -> None:
        super().__init__(OWNER)
        self.folder = folder
        self.view = Folder(folder)
        self.caches[Compositions] = self.view
        self.facts = self.fact

    def fact(self, query: Query[Any]) -> Reply | KsiError:
        fields = {name: getattr(query, name) for name in query.__struct_fields__}
        name = "composition:source" if "names" in fields else "composition:edits"
        try:
            found: Reply = self.read(name, **{k: v for k, v in fields.items() if v is not None})
        except KsiError as refusal:
            return refusal
        return found

    def settle(self) -> None:
        for path, edit in self.edits():
            try:
                content = None if edit.content is None else edit.content.encode()
                shared.replace(self.folder, path, content, edit.base)
            except shared.Differs as differs:
                done: dict[str, Any] = {"state": "refused", "reason": str(differs)}
            else:
                done = {"state": "written", "reason": None}
            self.view.doing[path] = {"number": edit.number, **done}
        self.run([], tick=True)

    def edits(self) -> list[Any]:
        return list(self.store.tables["edits"].range())

    def edit(self, operation: str, **fields: Any) -> Any:
        """Carry out an edit to its end."""
        edited = self.ask("alice", f"composition:{operation}", **fields)
        self.settle()
        return edited

    def put(self, path: str, content: bytes) -> str:
        """Write a file by hand."""
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        return hash_of(content)

    def said(self, path: str) -> dict[str, Any]:
        return read_metadata(path, (self.folder / path).read_bytes())

    def files(self) -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)


@pytest.fixture
def twin(tmp_path: Path) -> Editor:
    return Editor(tmp_path)


def choose(chance: random.Random) -> Asked:
    who = Sender(chance.choice(("alice", "bob")), "agent")
    name = chance.choice((f"n{chance.randrange(1 << 30)}", "../x"))  # None waits for another.
    composition = {"name": name, "type": "core", "n": chance.randrange(3)}
    request = {"request_id": chance.choice((None, None, "r1"))}
    choices: list[tuple[str, dict[str, Any]]] = [
        ("create", {"name": name, "type": "core", "content": "text", **request}),
        ("create", {"prompt": "Do {{it}}."}),
        ("create", {"name": name, "content": composition}),
        ("save", {"composition": composition, "overwrite": chance.random() < 0.5}),
        ("save", {"composition": {"type": "core"}, "path": name}),
        ("update", {"name": name, "updates": {"n": chance.randrange(3), "tags": None}}),
        ("update", {"name": name, "file_hash": "0" * 64}),
        ("fork", {"parent": name, "name": f"{name}_of", "reason": "why"}),
        ("merge", {"source": "fork", "target": name, "strategy": "full"}),
        ("delete", {"name": name}),
        ("delete_component", {"name": name}),
        ("source", {"names": ["known"], "target": name}),
        ("edits", {}),
    ]
    operation, fields = chance.choice(choices)
    given = {key: value for key, value in fields.items() if value is not None}
    return Asked(who, f"composition:{operation}", given)


def folder_of_forks(query: Query[Any]) -> Reply | None:
    """Return the sources of a folder where each of two names is a fork of the second."""
    if not isinstance(query, GetSource):
        return None
    lineage = {"parent": "".join(query.names[-1:])}
    about = {"name": "known", "type": "core", "metadata": {"lineage": lineage}}
    content = f"---\n{json.dumps(about)}\n---\ntext\n"
    known = {"file_hash": hash_of(content.encode()), "content": content}
    sources = [Source(file_path=f"{name}.md", **known) for name in query.names]
    target = None
    if query.target is not None:
        path = query.target if query.target.endswith(SUFFIXES) else f"{query.target}.md"
        target = Source(file_path=path, file_hash=None, content=None)
    return Sources(sources=sources, target=target)


def test_what_is_created_goes_where_its_type_is_with_what_it_says_of_itself(twin: Editor) -> None:
    made = twin.edit("create", name="finder", role="finder", tools=["web"], prompt="Find {{it}}.")
    assert (made.id, made.file_path) == ("profiles/finder", "profiles/finder.yaml")
    said = twin.said("profiles/finder.yaml")
    assert said["components"] == [
        {"name": "agent_config", "inline": {
            "role": "finder", "model": "sonnet", "capabilities": [], "tools": ["web"]}},
        {"name": "prompt", "template": "Find {{it}}."},
    ]  # fmt: skip
    assert (said["name"], said["type"], said["author"]) == ("finder", "profile", "alice")
    assert said["metadata"]["parent_agent"] == "alice"

    twin.edit("create", name="a/b/teller", type="core", content="Tell.\n\nAll.")
    assert split("x.md", (twin.folder / "a/b/teller.md").read_bytes())[1] == "Tell.\n\nAll."
    assert twin.said("a/b/teller.md")["name"] == "teller"
    whole = {"name": "whole", "type": "prompt", "level": 1e300}
    twin.edit("create", name="whole", type="prompt", content=whole)
    assert twin.said("prompts/whole.yaml") == whole
    named = twin.edit("create", type="profile")
    assert named.name.startswith("dynamic_")
    assert len(twin.files()) == 4
    assert twin.edits() == []


def test_what_is_there_is_replaced_only_as_it_is_or_where_that_is_said(twin: Editor) -> None:
    first = twin.put("core/base.md", BASE)
    save = {"composition": {"name": "base", "type": "core"}, "path": "core/base.md"}
    with pytest.raises(Conflict, match="exists already") as refused:
        twin.edit("save", **save)
    assert refused.value.details["file_hash"] == first
    second = twin.edit("save", **save, content="new", file_hash=first).file_hash
    with pytest.raises(Conflict, match="somebody else has changed it") as refused:
        twin.edit("save", **save, file_hash=first)
    assert refused.value.details["file_hash"] == second
    with pytest.raises(Conflict, match="is not there"):
        twin.edit("save", composition=save["composition"], path="core/x.md", file_hash=first)
    twin.edit("save", **save, overwrite=True)
    assert twin.said("core/base.md") == save["composition"]


def test_an_edit_by_hand_in_between_is_never_overwritten_and_told(twin: Editor) -> None:
    """The decision was about the file as it was; the follower finds another."""
    twin.put("core/base.md", BASE)
    twin.ask("alice", "composition:update", name="core/base", updates={"version": "2"})
    twin.ask("alice", "composition:create", name="core/new", type="core", content="mine")
    by_hand = BASE.replace(b"level: 1", b"level: 9")
    twin.put("core/base.md", by_hand)
    twin.put("core/new.md", BASE)
    twin.settle()
    assert (twin.folder / "core/base.md").read_bytes() == by_hand
    assert (twin.folder / "core/new.md").read_bytes() == BASE
    told = {each.topic: each.message for each in twin.told if "composition" in each.topic}
    assert list(told) == ["composition.refused"]
    assert sum(each.topic == "composition.refused" for each in twin.told) == 2
    assert twin.edits() == []
    twin.edit("update", name="core/base", updates={"version": "2"})
    assert twin.said("core/base.md")["metadata"] == {"level": 9}
    assert twin.told[-1].topic == "composition.written"


def test_while_an_edit_is_open_the_next_one_of_its_file_waits(
    twin: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin.put("core/base.md", BASE)
    twin.ask("alice", "composition:update", name="core/base", updates={"n": 1})
    for operation, fields in (
        ("update", {"name": "core/base"}),
        ("delete", {"name": "core/base"}),
        ("fork", {"parent": "core/base", "name": "other", "reason": "why"}),
    ):
        with pytest.raises(Busy, match="just being written"):
            twin.ask("bob", f"composition:{operation}", **fields)
    (path, edit) = twin.edits()[0]
    shared.replace(twin.folder, path, edit.content.encode(), edit.base)
    twin.ask("bob", "composition:update", name="core/base", updates={"m": 2})
    twin.settle()
    assert (twin.said(path)["n"], twin.said(path)["m"]) == (1, 2)
    written = [event.number for event in twin.events if isinstance(event, EditSettled)]
    assert written == [1, 2]
    monkeypatch.setattr(editing, "EDITS_MAX", 1)
    twin.ask("bob", "composition:create", name="core/one", type="core")
    with pytest.raises(Busy, match="wait for the folder"):
        twin.ask("bob", "composition:create", name="core/two", type="core")
    with pytest.raises(Busy, match="just being written"):
        twin.ask("bob", "composition:delete", name="core/one")


def test_an_update_keeps_the_rest_of_the_file_as_it_was(twin: Editor) -> None:
    twin.put("core/base.md", BASE)
    updates = {"version": "1.1.0", "tags": None, "metadata": {"level": None, "by": "bob"}}
    twin.edit("update", name="core/base", updates=updates)
    assert (twin.folder / "core/base.md").read_bytes() == (
        b"---\nname: base\ntype: core\nversion: 1.1.0  # as it began\nmetadata:\n  by: bob\n"
        b"---\n\n# Base\n"
    )
    twin.edit("update", name="core/base", updates={"metadata": {}}, merge_metadata=False)
    assert twin.said("core/base.md")["metadata"] == {}
    twin.edit("update", name="core/base", content="other")
    assert (twin.folder / "core/base.md").read_bytes().endswith(b"---\n\nother\n")
    with pytest.raises(Invalid, match="no name"):
        twin.edit("update", name="core/base", updates={"name": None})


def test_a_fork_knows_its_parent_and_its_gains_are_merged_back(twin: Editor) -> None:
    parent_hash = twin.put("core/base.md", BASE)
    fork = {"parent": "core/base", "reason": "terse", "modifications": {"tags": ["one", "two"]}}
    made = twin.edit("fork", name="terse", **fork)
    assert made.file_path == "core/terse.md"
    said = twin.said("core/terse.md")
    lineage = said["metadata"]["lineage"]
    assert (lineage["parent"], lineage["parent_hash"]) == ("core/base", parent_hash)
    assert (lineage["reason"], lineage["author"]) == ("terse", "alice")
    assert (said["name"], said["tags"], said["metadata"]["level"]) == ("terse", ["one", "two"], 1)
    with pytest.raises(Conflict, match="exists already"):
        twin.edit("fork", name="terse", **fork)
    gains = {"version": "2.0", "metadata": {"level": 5, "learnings": ["short"], "x": 1}}
    twin.edit("update", name="core/terse", updates=gains, content="# Terse")

    merge = {"source": "core/terse", "target": "core/base"}
    twin.edit("merge", **merge, strategy="metadata_only")
    said = twin.said("core/base.md")
    assert (said["version"], said["metadata"]["level"]) == ("1.0.0", 1)
    assert said["metadata"]["learnings"] == ["short"]
    some = ["version", "better words"]
    twin.edit(
        "merge", **merge, strategy="selective", improvements=some, validation_results={"ok": 1}
    )
    said = twin.said("core/base.md")
    assert (said["version"], said["tags"]) == ("2.0", ["one"])
    assert said["metadata"]["merges"][-1]["improvements"] == some
    assert (twin.folder / "core/base.md").read_bytes().endswith(b"# Base\n")
    twin.edit("merge", **merge, strategy="full")
    said = twin.said("core/base.md")
    assert (said["name"], said["tags"], said["metadata"]["level"]) == ("base", ["one", "two"], 5)
    assert "lineage" not in said["metadata"]
    assert [each["strategy"] for each in said["metadata"]["merges"]] == [
        "metadata_only", "selective", "full",
    ]  # fmt: skip
    assert b"# as it began" in (twin.folder / "core/base.md").read_bytes()
    assert (twin.folder / "core/base.md").read_bytes().endswith(b"\n# Terse\n")
    with pytest.raises(Conflict, match="no fork"):
        twin.edit("merge", source="core/base", target="core/terse", strategy="full")


def test_what_is_removed_is_removed_as_it_is(twin: Editor) -> None:
    first = twin.put("core/base.md", BASE)
    with pytest.raises(Conflict, match="changed"):
        twin.edit("delete", name="core/base", file_hash="0" * 64)
    gone = twin.edit("delete", name="core/base", file_hash=first)
    assert (gone.file_hash, twin.files()) == (None, [])
    assert twin.told[-1].topic == "composition.deleted"
    with pytest.raises(NotFound):
        twin.edit("delete", name="core/base")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"composition": {"name": "../x", "type": "core"}}, "is no path"),
        ({"composition": {"name": "x", "type": "../.."}}, "is no path"),
        ({"composition": {"name": "x", "type": "core"}, "path": "/etc/x.md"}, "is no path"),
        ({"composition": {"name": "x", "type": "core"}, "path": ".git/x.md"}, "is no path"),
        ({"composition": {"type": "core"}, "path": "x.md"}, "no name"),
        ({"composition": {"name": "x"}, "path": "x.md"}, "no type"),
        ({"composition": {}}, "no name and no type"),
        ({"composition": {"name": "", "type": "core"}}, "no name"),
        ({"composition": {"name": "x", "type": "core"}, "path": "x.yaml", "content": "y"}, "YAML"),
        ({"composition": {"name": "x", "type": "core", "n": "x" * (520 << 10)}}, "over"),
    ],
)
def test_what_is_no_composition_or_leaves_the_folder_is_refused(
    twin: Editor, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Invalid, match=reason):
        twin.edit("save", **fields)
    twin.put("core/base.md", BASE)
    with pytest.raises(Invalid, match="is no path"):
        twin.edit("fork", parent="core/base", name="../../x", reason="why")
    assert twin.files() == ["core/base.md"]
