"""The library of a running system: compositions and conversations, found as they are on disk."""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from system import System
from test_events import Logger
from trouble import kill, paused, until

from ksi.actors.composing import hash_of
from ksi.actors.declarations.editing import Edit
from ksi.actors.followers import composed, conversed
from ksi.actors.followers.library import (
    READ_BYTES,
    CompositionsFollower,
    ConversationsFollower,
    read_on,
)
from ksi.actors.followers.watching import TTL_S, Roots, signature_of
from ksi.console.main import main
from ksi.storage import shared
from ksi.storage.compositions import CompositionsReader
from ksi.storage.conversations import ConversationsReader, ConversationsWriter
from ksi.transport import Client
from ksi.transport.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    NotRunning,
    StaleEpoch,
)

CORPORA = Path(os.environ.get("KSI_CORPORA", "corpora"))  # of logs and compositions
KILLS = 5
WORDS = ["lease", "epoch", "journal", "mailbox", "owner", "fork", "cursor", "checkpoint"]


class Library:
    """The library of a system, as tests look at it."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "compositions"
        self.logs = place / "logs"
        self.folder.mkdir()
        self.logs.mkdir()
        self.system = System(place / "var", (), **{"compositions.folder": str(self.folder)})
        self.operator = self.system.client("operator", role="operator")
        self.read = self.operator.read
        self.ask = self.operator.ask
        self.compositions = CompositionsReader(composed.cache_path(self.system.var))
        self.conversations = ConversationsReader(conversed.cache_path(self.system.var))
        until(lambda: self.read("composition:status")["state"] == "following")
        self.import_(self.logs)

    def import_(self, path: Path, operation: str = "conversation:import") -> None:
        """Import a path, and wait until that is done."""
        number = self.ask(operation, path=str(path))["number"]
        until(lambda: self.read("conversation:status")["imported"] >= number)

    def rebuild(self, what: str) -> None:
        number = self.ask(f"{what}:rebuild_index")["number"]
        until(lambda: self.read(f"{what}:status")["rebuilt"] >= number)

    def write(self, file: str, text: str = "", /, **metadata: Any) -> Path:
        """Write a composition."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
        fresh = path.with_suffix(".fresh")
        fresh.write_text(f"---\n{front}---\n{text}" if file.endswith(".md") else front)
        fresh.rename(path)
        return path

    def ids(self, **filters: Any) -> list[str]:
        """Return the ids of the compositions for which filters hold, page by page."""
        found: list[str] = []
        after = None
        while True:
            page = self.read("composition:list", limit=7, after=after, **filters)
            found += [each["id"] for each in page["compositions"]]
            if (after := page["next"]) is None:
                return found

    def problems(self, **more: Any) -> dict[str, str]:
        listed = self.read("composition:problems", limit=1000, **more)["problems"]
        return {each["file_path"]: each["reason"] for each in listed}

    def log(self, name: str, *lines: Any) -> Path:
        """Append lines to a log: texts as they are, others as JSON."""
        path = self.logs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for line in lines:
                file.write(line if isinstance(line, str) else json.dumps(line) + "\n")
        return path

    def finds(self, query: str, times: int) -> bool:
        return len(self.found(query)) == times

    def found(self, query: str, **more: Any) -> list[tuple[str, int]]:
        """Return where words were said: conversation and line."""
        results = self.read("conversation:search", query=query, limit=100, **more)["results"]
        return [(each["session_id"], m["line_number"]) for each in results for m in each["matches"]]

    def require_places(self, query: str) -> None:
        found = self.read("conversation:search", query=query, limit=100)
        require_places(found, query.strip('"'))

    def close(self) -> None:
        self.operator.close()
        self.system.end()


def require_places(found: dict[str, Any], word: str) -> None:
    """Check that each match is the line its file has at its offset."""
    for each in found["results"]:
        for match in each["matches"]:
            with open(each["file_path"], "rb") as file:
                before = file.read(match["byte_offset"])
                said = conversed.said(file.readline())
            assert before.count(b"\n") + 1 == match["line_number"]
            assert said.timestamp == match["timestamp"]
            assert word.lower() in said.words.lower()


def human(text: str, at: float = 1_750_000_000.0) -> dict[str, Any]:
    return {"type": "human", "content": text, "timestamp": at}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    found = Library(tmp_path_factory.mktemp("library"))
    yield found
    found.close()


@pytest.fixture
def compositions(library: Library) -> Library:
    """The library with an empty folder."""
    for path in sorted(library.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    until(lambda: library.ids() == [] and library.problems() == {})
    return library


def test_every_file_is_a_composition_or_reported_with_its_reason(compositions: Library) -> None:
    library = compositions
    library.write("core/base.md", "text", name="base", component_type="core")
    library.write("plain.yaml", name="plain", type="profile")
    library.write("nameless.md", type="core")
    library.write("typeless.md", name="typeless")
    (library.folder / "prose.md").write_text("# Prose\n")
    (library.folder / "broken.yml").write_text("name: [\n")
    (library.folder / "link.md").symlink_to(library.folder / "core/base.md")
    library.write("README.md", name="readme", type="core")
    library.write("_archive/tests/old.md", name="old", type="core")
    library.write(".hidden/h.md", name="hidden", type="core")
    (library.folder / "notes.txt").write_text("no composition by its name")

    until(lambda: len(library.ids()) == 2 and len(library.problems()) == 7)
    assert library.ids() == ["core/base", "plain"]
    assert library.problems(state="rejected") == {
        "broken.yml": "its YAML is malformed, line 2: expected the node content, but found "
        "'<stream end>'",
        "link.md": "it is a link, which is not followed",
        "nameless.md": "it has no name",
        "prose.md": "it has no front matter",
        "typeless.md": "it has no type",
    }
    assert set(library.problems(state="excluded")) == {"README.md", "_archive/tests/old.md"}
    status = library.read("composition:status")
    assert (status["indexed"], status["rejected"], status["excluded"]) == (2, 5, 2)
    assert status["types"] == {"core": 1, "profile": 1}


def test_filters_by_type_tag_capability_and_metadata_really_filter(compositions: Library) -> None:
    library, chance = compositions, random.Random(7)
    made: dict[str, dict[str, Any]] = {}
    for n in range(40):
        fields: dict[str, Any] = {
            "name": f"name_{n % 5}",
            "type": chance.choice(("core", "agent")),
            "tags": chance.sample(["a", "b", "c"], chance.randrange(3)),
            "capabilities": chance.sample(["x", "y"], chance.randrange(2)),
            "level": chance.choice((1, "1", 1.5, True, None)),
        }
        if n % 2:  # Some keep it all below `metadata`.
            fields = {
                **{key: fields[key] for key in ("name", "type")},
                "metadata": {key: fields[key] for key in ("tags", "capabilities", "level")},
            }
        made[f"f{n:02}"] = fields
        library.write(f"f{n:02}.md", **fields)
    until(lambda: len(library.ids()) == 40)

    def level(fields: dict[str, Any], key: str) -> Any:
        return fields.get("metadata", fields).get(key)

    def same(one: Any, other: Any) -> bool:
        return type(one) is type(other) and one == other

    cases: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
        ({"type": "core"}, lambda f: f["type"] == "core"),
        ({"type": "all"}, lambda f: True),
        ({"component_type": "agent"}, lambda f: f["type"] == "agent"),
        ({"name": "NAME_3"}, lambda f: f["name"] == "name_3"),
        ({"name": "%"}, lambda f: False),
        ({"tags": ["a"]}, lambda f: "a" in level(f, "tags")),
        ({"tags": ["a", "b"]}, lambda f: {"a", "b"} <= set(level(f, "tags"))),
        ({"capabilities": ["x"]}, lambda f: "x" in level(f, "capabilities")),
        ({"metadata_filter": {"level": 1}}, lambda f: same(level(f, "level"), 1)),
        ({"metadata_filter": {"level": "1"}}, lambda f: same(level(f, "level"), "1")),
        ({"metadata_filter": {"level": None}}, lambda f: level(f, "level") is None),
        (
            {"metadata_filter": {"level": [1.5, True]}},
            lambda f: same(level(f, "level"), 1.5) or level(f, "level") is True,
        ),
        ({"metadata_filter": {"metadata.level": "1"}},
         lambda f: "metadata" in f and same(level(f, "level"), "1")),
        ({"metadata_filter": {"level') OR 1=1 --": 1}}, lambda f: False),
        ({"type": "core", "tags": ["c"], "name": "name_1"},
         lambda f: f["type"] == "core" and "c" in level(f, "tags") and f["name"] == "name_1"),
    ]  # fmt: skip
    for filters, holds in cases:
        wanted = [key for key, fields in made.items() if holds(fields)]
        assert library.ids(**filters) == wanted, filters
    rows = library.read("composition:discover", include_metadata=True, limit=40)["compositions"]
    assert {each["id"]: each["metadata"] for each in rows} == made


def test_an_edit_is_seen_and_only_that_file_is_parsed_again(compositions: Library) -> None:
    library = compositions
    unseen = partial(paused, library.system, "library")  # Else a file may be seen half written.

    def parsed() -> int:
        return int(library.read("composition:status")["parsed"])

    kill(library.system, "library")
    until(lambda: parsed() == 0)  # It counts from its start, and tells of it after the rows.
    with unseen():
        for n in range(20):
            library.write(f"f{n}.md", name=f"n{n}", type="core")
    until(lambda: len(library.ids()) == 20 and parsed() == 20)
    assert library.read("composition:status")["watched"]

    with unseen():
        library.write("f3.md", name="edited", type="core")
    until(lambda: library.ids(name="edited") == ["f3"])
    same = library.folder / "f4.md"
    times = same.stat()
    with unseen():
        with same.open("r+") as file:  # as long as it was, and as old
            file.write(same.read_text().replace("n4", "m4"))
        os.utime(same, ns=(times.st_atime_ns, times.st_mtime_ns))
    until(lambda: library.ids(name="m4") == ["f4"])
    fresh = library.folder / "fresh.tmp"
    fresh.write_text((library.folder / "f5.md").read_text().replace("n5", "renamed"))
    fresh.rename(library.folder / "f5.md")  # as editors save
    until(lambda: library.ids(name="renamed") == ["f5"])
    until(lambda: parsed() == 23)
    (library.folder / "f6.md").touch()
    with unseen():
        (library.folder / "f7.md").unlink()
        library.write("f7.md", name="again", type="core")
    until(lambda: library.ids(name="again") == ["f7"])
    until(lambda: parsed() >= 24)
    assert parsed() == 24, "what has not changed is not parsed"
    (library.folder / "f8.md").unlink()
    until(lambda: len(library.ids()) == 19)
    kill(library.system, "library")
    library.write("f9.md", name="meanwhile", type="core")
    until(lambda: library.ids(name="meanwhile") == ["f9"])
    until(lambda: parsed() == 1)


def test_a_folder_that_is_moved_in_or_out_takes_its_files_with_it(compositions: Library) -> None:
    library = compositions
    outside = library.folder.with_name("outside")
    library.write("in/deep/a.md", name="a", type="core")
    library.write("in/b.md", name="b", type="core")
    until(lambda: library.ids() == ["in/b", "in/deep/a"])
    (library.folder / "in").rename(outside)
    until(lambda: library.ids() == [])
    outside.rename(library.folder / "back")
    until(lambda: library.ids() == ["back/b", "back/deep/a"])


def test_readers_never_see_an_empty_index_during_a_rebuild(compositions: Library) -> None:
    library = compositions
    for n in range(30):
        library.write(f"f{n:02}.md", name=f"n{n}", type="core")
    until(lambda: len(library.ids()) == 30)
    before = list(library.compositions.dump())
    counts: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            counts.add(len(library.compositions.find(limit=100)))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(3):
            library.rebuild("composition")
    finally:
        ended.set()
        looking.join()
    assert counts == {30}
    assert list(library.compositions.dump()) == before


def test_a_composition_is_found_by_path_id_or_name_and_read_from_its_file(
    compositions: Library,
) -> None:
    library = compositions
    library.write("components/core/base.md", "the text", name="base", type="core")
    library.write("components/other/twin.md", name="twin", type="core")
    library.write("twin.yaml", name="twin", type="agent")
    until(lambda: len(library.ids()) == 3)

    for name in ("components/core/base.md", "components/core/base", "core/base", "base"):
        found = library.operator.ask("composition:get", name=name)
        assert (found["id"], found["content"]) == ("components/core/base", "the text")
        assert found["metadata"] == {"name": "base", "type": "core"}
    library.write("x/thing.md", name="many", type="core")
    library.write("thing.md", name="many", type="core")
    until(lambda: len(library.ids(name="many")) == 2)
    with pytest.raises(Conflict) as refused:
        library.read("composition:get", name="many")
    assert refused.value.details == {"file_paths": ["thing.md", "x/thing.md"]}
    with pytest.raises(NotFound):
        library.read("composition:get", name="../secret")


def test_what_agents_write_is_in_the_folder_and_indexed_at_once_and_no_edit_by_hand_is_lost(
    compositions: Library,
) -> None:
    library = compositions
    with library.system.client("author") as author, author.subscribe("composition.*") as news:
        made = author.ask("composition:create", name="core/base", type="core", content="One.")
        assert news.next(timeout_s=10).message["number"] == made["number"]
        found = author.read("composition:get", name="core/base")
        assert (found["content"], found["file_hash"]) == ("One.", made["file_hash"])
        by_hand = library.write("core/base.md", "By hand.", name="base", type="core")
        with pytest.raises(Conflict, match="somebody else has changed it"):
            author.ask("composition:update", name="core/base", file_hash=made["file_hash"])
        fork = {"parent": "core/base", "name": "terse", "reason": "shorter"}
        author.ask("composition:fork", {**fork, "content": "Two."})
        assert news.next(timeout_s=10).message["file_path"] == "core/terse.md"
        merge = {"source": "core/terse", "target": "core/base", "strategy": "full"}
        until(lambda: library.read("composition:get", name="core/base")["content"] == "By hand.")
        author.ask("composition:merge", merge)
        assert news.next(timeout_s=10).topic == "composition.written"
        assert "Two." in by_hand.read_text()
        author.ask("composition:delete", name="core/terse")
        assert news.next(timeout_s=10).topic == "composition.deleted"
        assert library.ids() == ["core/base"]
        (library.folder / "away").symlink_to(library.system.var)
        for path in ("away/x.md", "README.md"):
            with pytest.raises(Conflict):
                author.ask("composition:create", name=path, type="core", content="Out.")
    assert library.read("composition:edits")["edits"] == []


def test_edits_survive_kills_and_are_each_carried_out(compositions: Library) -> None:
    """Nothing of them is left beside the files."""
    library = compositions
    with library.system.client("author") as author:
        for n in range(12):
            edit = {"composition": {"name": f"n{n}", "type": "core"}, "path": f"storm/n{n}.yaml"}
            author.ask("composition:save", **edit, timeout_s=20.0)
            if n % 3 == 0:
                kill(library.system, "library")
        until(lambda: len(library.ids(name="storm")) == 12, 20.0)
        until(lambda: library.read("composition:edits")["edits"] == [])
        assert sorted(path.name for path in (library.folder / "storm").iterdir()) == sorted(
            f"n{n}.yaml" for n in range(12)
        )
        author.ask("composition:delete", name="storm/n3", timeout_s=20.0)
        kill(library.system, "library")
        until(lambda: not (library.folder / "storm/n3.yaml").exists())


def test_an_edit_waits_for_room_is_written_then_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "name: x\ntype: core\n"
    edit = Edit(1, content, hash_of(content.encode()), None, "alice", 0.0)
    follower: Any = CompositionsFollower(tmp_path, Logger())
    follower._orders = Rows([("a/x.yaml", edit)])
    follower._look = lambda *_args, **_kinds: None
    path = tmp_path / "lib/compositions/a/x.yaml"

    def full(_fd: int, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shared, "write_all", full)
        for _ in range(2):
            follower._edit(None)
            (told,) = follower._more()["edits"].values()
            assert (told["state"], "No space" in told["reason"]) == ("waiting", True)
            assert not path.exists()
    for _ in range(2):
        follower._edit(None)
        assert follower._more()["edits"]["a/x.yaml"]["state"] == "written"
    assert path.read_text() == content
    path.unlink()
    follower._edit(None)
    assert not path.exists(), "who has removed it since wants it removed"
    follower._orders = Rows([])
    follower._edit(None)
    assert follower._more()["edits"] == {}


class Rows:
    """A reader of edits, and of nothing else."""

    def __init__(self, edits: list[tuple[str, Edit]]) -> None:
        self._edits = edits

    def read(self, look: Callable[[Any, None], Any]) -> Any:
        return look({"edits": self}, None)

    def range(self) -> list[tuple[str, Edit]]:
        return self._edits


def test_a_cache_that_is_deleted_or_damaged_is_made_again(library: Library) -> None:
    library.write("kept.md", name="kept", type="core")
    library.log("kept.jsonl", human("keep this safe"))
    until(lambda: library.ids(name="kept") == ["kept"] and library.found("keep safe"))
    for path, works in (
        (composed.cache_path(library.system.var), lambda: library.ids(name="kept") == ["kept"]),
        (conversed.cache_path(library.system.var), lambda: bool(library.found("keep safe"))),
    ):
        path.unlink()
        until(path.exists)
        until(works)
    library.system.stop()
    path = conversed.cache_path(library.system.var)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xde\xad" * 4096)
    library.system.start()
    until(lambda: _works(lambda: bool(library.found("keep safe"))))


def _works(true: Callable[[], bool]) -> bool:
    try:
        return true()
    except Exception:  # It is damaged until somebody has noticed.
        return False


def test_all_three_line_forms_are_indexed_and_bad_lines_are_told_with_file_and_line(
    library: Library,
) -> None:
    at = 1_750_000_000.0
    path = library.log(
        "forms/mixed.jsonl",
        human("zanzibar one"),
        "{this is no JSON\n",
        {"type": "claude", "subtype": "success", "result": "zanzibar two", "timestamp": at + 1},
        {"type": "claude", "subtype": "error_during_execution", "timestamp": at + 2},
        "\n",
        {"ksi": {"provider": "p", "timestamp": at + 3}, "response": {"result": "zanzibar three"}},
        {"type": "summary", "timestamp": at},
        {"event": "note", "data": {"text": "zanzibar four"}, "timestamp": at + 4},
    )
    (library.logs / "forms" / "latest.jsonl").symlink_to("mixed.jsonl")

    until(lambda: len(library.found("zanzibar")) == 4)
    assert library.found("zanzibar") == [("mixed", n) for n in (1, 3, 6, 8)]
    library.require_places("zanzibar")

    def told() -> list[tuple[str, int, str]]:
        return [
            (Path(each["file_path"]).name, each["line_number"], each["reason"])
            for each in library.read("conversation:problems", limit=1000)["problems"]
            if "/forms/" in each["file_path"]
        ]

    until(lambda: len(told()) >= 3)
    problems = told()
    assert [(file, line) for file, line, _ in problems] == [
        ("latest.jsonl", 0), ("mixed.jsonl", 2), ("mixed.jsonl", 7),
    ]  # fmt: skip
    assert "a link" in problems[0][2]
    assert "no JSON" in problems[1][2]
    (row,) = (
        each
        for each in library.read("conversation:list", limit=1000)["conversations"]
        if each["session_id"] == "mixed"
    )
    assert (row["message_count"], row["bad_lines"], row["origin"]) == (5, 2, "import")
    assert row["participants"] == ["claude", "human", "p", "unknown"]
    assert (row["first_timestamp"], row["last_timestamp"]) == (at, at + 4)
    assert row["file_path"] == str(path)


def test_what_is_wrong_with_a_file_is_told_while_it_is_looked_at_again(tmp_path: Path) -> None:
    link, place = tmp_path / "link.jsonl", tmp_path / "conversations.db"
    link.symlink_to("elsewhere")
    ConversationsWriter(place, "logs", conversed.said, making=True).close()
    writer = ConversationsWriter(place, "logs", conversed.said)
    follower: Any = ConversationsFollower(tmp_path, Logger())
    follower._imported = Roots(files=frozenset({link}))
    told: list[int] = []

    def look(_sql: str = "") -> None:
        told.append(ConversationsReader(place).counts()["unread_files"])

    list(follower._examine(writer, link, is_told=True))
    writer._database.set_trace_callback(look)
    list(follower._examine(writer, link, is_told=True))
    look()
    writer.abandon()
    follower.close()
    assert len(told) > 2
    assert set(told) == {1}


@pytest.mark.parametrize("is_replaced", [False, True], ids=["deleted", "replaced"])
def test_a_cache_that_goes_while_it_is_settled_is_noticed_at_the_next_look(
    tmp_path: Path, is_replaced: bool
) -> None:
    place, other = tmp_path / "conversations.db", tmp_path / "other"
    ConversationsWriter(place, "logs", conversed.said, making=True).close()
    writer = ConversationsWriter(place, "logs", conversed.said)
    other.write_bytes(b"no database")

    def go(sql: str) -> None:
        if "checkpoint" in sql:
            other.rename(place) if is_replaced else place.unlink()
            writer._database.set_trace_callback(None)

    writer.report("/a.jsonl", 1, "it is torn")
    writer._database.set_trace_callback(go)
    assert writer.settle() is None
    assert writer.settle() == f"{place.name} was {'replaced' if is_replaced else 'deleted'}"
    writer.abandon()


def test_a_new_line_is_found_at_once(library: Library) -> None:
    """In an imported log and in a session, far below the minute that is only a ceiling."""
    library.log("growing.jsonl", human("quokka 0"))
    with library.system.client("quokka") as agent:
        agent.ask("session:create", session_id="quokkas")
        begun_s = time.monotonic()
        for n in range(1, 6):
            library.log("growing.jsonl", human(f"quokka {n}"))
            agent.ask(
                "session:append", session_id="quokkas", event="note", data={"text": f"quokka {n}"}
            )
            query = f'"quokka {n}"'
            until(partial(library.finds, query, 2))
        assert time.monotonic() - begun_s < TTL_S
    assert library.found("quokka", session_id="growing") == [("growing", n) for n in range(1, 7)]
    assert library.found("quokka", sender="quokka") == [("quokkas", n) for n in range(1, 6)]
    assert library.found("quokka", search_in=["sender"]) == [("quokkas", n) for n in range(1, 6)]


def test_a_log_that_was_written_again_is_read_again(library: Library) -> None:
    path = library.log("rewritten.jsonl", human("okapi one"), human("okapi two"))
    until(lambda: len(library.found("okapi")) == 2)
    path.write_text(path.read_text().replace("okapi one", "gerenuk!!"))  # as long as it was
    until(lambda: library.found("gerenuk") == [("rewritten", 1)])
    assert library.found("okapi") == [("rewritten", 2)]
    path.write_text(json.dumps(human("okapi")) + "\n")
    until(lambda: library.found("gerenuk") == [] and library.found("okapi") == [("rewritten", 1)])
    path.unlink()
    until(lambda: library.found("okapi") == [])


def test_a_line_without_its_end_waits_for_it_unless_it_is_whole(library: Library) -> None:
    line = json.dumps(human("narwhal"))
    library.log("torn.jsonl", line + "\n", line[:20])
    until(
        lambda: library.read("conversation:problems", file_path=str(library.logs / "torn.jsonl"))[
            "problems"
        ]
    )
    assert library.found("narwhal") == [("torn", 1)]
    library.log("torn.jsonl", line[20:])
    until(lambda: library.found("narwhal") == [("torn", 1), ("torn", 2)])
    library.log("torn.jsonl", "\n", line + "\n")
    until(lambda: library.found("narwhal") == [("torn", n) for n in (1, 2, 3)])
    assert (
        library.read("conversation:problems", file_path=str(library.logs / "torn.jsonl"))[
            "problems"
        ]
        == []
    )
    library.require_places("narwhal")


def test_a_search_finds_what_a_scan_of_the_files_finds(library: Library) -> None:
    chance = random.Random(11)
    said: dict[tuple[str, int], list[str]] = {}
    for n in range(12):
        for line in range(1, 30):
            words = chance.choices(WORDS, k=chance.randrange(1, 6))
            said[f"scan{n}", line] = words
            library.log(f"scan/scan{n}.jsonl", human(" ".join(["aardvark", *words]).title()))
    until(
        lambda: library.read("conversation:search", query="aardvark")["total_matches"] == len(said)
    )

    for query in ("lease", "lease epoch", '"journal mailbox"', "CURSOR fork", "check*", "leas"):
        found = library.read("conversation:search", query=f"aardvark {query}", limit=100)
        wanted = sorted(place for place, words in said.items() if holds(query, words))
        by_file: dict[str, int] = {}
        for name, _line in wanted:
            by_file[name] = by_file.get(name, 0) + 1
        assert found["total_matches"] == len(wanted), query
        assert {each["session_id"]: each["match_count"] for each in found["results"]} == by_file
        counts = [each["match_count"] for each in found["results"]]
        assert counts == sorted(counts, reverse=True)
        for each in found["results"]:
            lines = [line for name, line in wanted if name == each["session_id"]]
            assert [match["line_number"] for match in each["matches"]] == lines[:10]
            assert all("aardvark" in m["content_preview"].lower() for m in each["matches"])
    library.require_places("aardvark")
    first = library.read("conversation:search", query="aardvark", limit=5)
    second = library.read("conversation:search", query="aardvark", limit=100, offset=first["next"])
    assert len(first["results"] + second["results"]) == first["total_conversations"] == 12
    with pytest.raises(Invalid):
        library.read("conversation:search", query="?")


def holds(query: str, words: list[str]) -> bool:
    text = f" {' '.join(words)} "
    for phrase, word in re.findall(r'"([^"]*)"|(\S+)', query.lower()):
        term = phrase or word
        if (f" {term[:-1]}" if term.endswith("*") else f" {term} ") not in text:
            return False
    return True


def test_conversations_are_listed_read_exported_and_counted(library: Library) -> None:
    with library.system.client("ibex") as ibex:
        ibex.ask("session:create", session_id="ibexes")
        for n in range(25):
            ibex.tell(
                "session:append",
                session_id="ibexes",
                event="note",
                data={"text": f"ibex {n}\nsecond"},
            )
        ibex.flush(10.0)
    until(lambda: len(library.found("ibex 24")) == 1)
    newest = library.read("conversation:list", limit=1)
    assert newest["conversations"][0]["session_id"] == "ibexes"
    assert newest["next"] == 1
    listed = library.read("conversation:list", limit=1000, sort_by="message_count", reverse=False)
    counts = [each["message_count"] for each in listed["conversations"]]
    assert counts == sorted(counts)
    assert len(counts) == listed["total"]
    old = library.read("conversation:list", end_date="2025-12-31", start_date=0)
    assert "ibexes" not in [each["session_id"] for each in old["conversations"]]
    active = library.read("conversation:active", max_age_hours=1)["active_sessions"]
    assert "ibexes" in [each["session_id"] for each in active]
    assert "mixed" not in [each["session_id"] for each in active]

    first = library.ask("conversation:get", session_id="ibexes", limit=10)
    rest = library.read("conversation:get", session_id="ibexes", offset=first["next"])
    messages = first["messages"] + rest["messages"]
    assert [each["content"] for each in messages] == [f"ibex {n}\nsecond" for n in range(25)]
    assert {(each["sender"], each["type"]) for each in messages} == {("ibex", "note")}
    assert rest["next"] is None
    for format_ in ("markdown", "json"):
        text, offset = "", 0
        while offset is not None:
            part = library.read(
                "conversation:export", session_id="ibexes", format=format_, limit=7, offset=offset
            )
            text, offset = text + part["content"], part["next"]
        if format_ == "json":
            exported = json.loads(text)["messages"]
            assert [each["content"] for each in exported] == [m["content"] for m in messages]
        else:
            assert all(f"- ibex (note)\n\nibex {n}\nsecond\n\n---\n" in text for n in range(25))
    stats = library.read("conversation:stats")
    assert stats["total_conversations"] == listed["total"]
    assert stats["total_messages"] == sum(counts)
    with pytest.raises(NotFound):
        library.read("conversation:get", session_id="../ibexes")


def test_two_logs_of_one_name_are_told_apart_by_their_file(library: Library) -> None:
    one = library.log("a/same.jsonl", human("one"))
    library.log("b/same.jsonl", human("two"))
    until(lambda: _twice(library, "same"))
    with pytest.raises(Conflict) as refused:
        library.read("conversation:get", session_id="same")
    assert len(refused.value.details["file_paths"]) == 2
    found = library.read("conversation:get", session_id="same", file_path=str(one))
    assert [each["content"] for each in found["messages"]] == ["one"]


def _twice(library: Library, name: str) -> bool:
    listed = library.read("conversation:list", limit=1000)["conversations"]
    return [each["session_id"] for each in listed].count(name) == 2


def test_an_archived_session_is_found_and_read_as_before(library: Library) -> None:
    with library.system.client("pangolin") as agent:
        agent.ask("session:create", session_id="away")
        agent.ask("session:append", session_id="away", event="note", data={"text": "pangolin"})
        agent.ask("session:close", session_id="away")
    until(lambda: library.found("pangolin"))
    library.ask("session:archive", session_ids=["away"])
    until(lambda: not library.system.file("away").exists())
    library.rebuild("conversation")
    (each,) = library.read("conversation:search", query="pangolin")["results"]
    assert each["matches"][0]["content_preview"].startswith("pangolin")


def test_what_is_forgotten_is_gone_and_a_single_file_can_be_imported(library: Library) -> None:
    other = library.logs.with_name("other")
    other.mkdir()
    path = other / "single.log"
    path.write_text(json.dumps(human("wombat")) + "\n")
    (other / "beside.jsonl").write_text(json.dumps(human("wombat")) + "\n")
    library.import_(path)
    assert library.found("wombat") == [("single", 1)]
    with path.open("a") as file:
        file.write(json.dumps(human("wombat")) + "\n")
    until(lambda: len(library.found("wombat")) == 2)
    listed = [each["path"] for each in library.read("conversation:imports")["imports"]]
    assert listed == sorted([str(library.logs), str(path)])
    library.import_(path, "conversation:forget")
    assert library.found("wombat") == []
    with pytest.raises(NotFound):
        library.ask("conversation:forget", path=str(path))


def test_the_shell_imports_lists_searches_and_exports(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each sub-command, for people and as JSON."""
    log = library.log("shell.jsonl", human("axolotl \x1b[31m in the shell"), "no line\n")
    library.write("shell.md", "its text", name="shell", type="core", tags=["axolotl"])
    until(lambda: library.found("axolotl") and library.ids(tags=["axolotl"]))

    def shell(*words: str) -> str:
        code = main([*words, "--var", str(library.system.var)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    assert "logs are imported" in shell("import", str(library.logs))
    assert json.loads(shell("import", str(library.logs), "--json"))["done"]
    assert str(library.logs) in shell("import", "--list")
    assert main(["import", "/nowhere", "--var", str(library.system.var)]) == 6
    sessions = str(library.system.file("x").parent)
    assert main(["import", sessions, "--var", str(library.system.var)]) == 2
    capsys.readouterr()
    assert f"{log}:1: " in shell("conversations", "search", "axolotl")
    found = json.loads(shell("conversations", "search", "axolotl", "--json"))
    assert found["results"][0]["session_id"] == "shell"
    assert "axolotl \\x1b[31m in the shell" in shell("conversations", "get", "shell")
    assert "shell" in shell("conversations", "list", "--limit", "1000")
    assert shell("conversations", "export", "shell").startswith("# Conversation shell")
    exported = json.loads(shell("conversations", "export", "shell", "--format", "json"))
    assert exported["messages"][0]["line_number"] == 1
    assert f"{log}:2: it is no JSON" in shell("conversations", "problems")
    assert "total_messages" in shell("conversations", "stats")
    assert "following" in shell("conversations", "status")
    assert "HOLDER" in shell("conversations", "locks")
    assert "done in" in shell("conversations", "rebuild")
    assert shell("compositions", "list", "--tag", "axolotl").split("\n")[1].startswith("shell")
    assert "shell" in shell("compositions", "list", "--where", "name=shell")
    assert "its text" in shell("compositions", "show", "shell")
    library.write("over.md", "{{a}} {{b}}", name="over", type="core", extends="shell")
    until(lambda: library.ids(name="over"))
    assert shell("compositions", "render", "over", "--set", "a=1") == "its text\n\n1 {{b}}\n"
    assert "REASON" in shell("compositions", "problems")
    assert "following" in shell("compositions", "status")
    assert "done in" in shell("compositions", "rebuild")


def test_what_is_imported_again_is_looked_at_at_once(library: Library) -> None:
    begun_s = time.monotonic()
    for _ in range(2):
        library.import_(library.logs)
    assert time.monotonic() - begun_s < TTL_S / 6, "it has waited until all is looked at anyway"


def test_a_large_log_is_read_once_whatever_comes_up_meanwhile(
    library: Library, tmp_path: Path
) -> None:
    """It is imported again, grows, and is put off for something else that is imported."""
    path = tmp_path / "large.jsonl"
    line = json.dumps(human("a heap of albatrosses " * 8)) + "\n"
    path.write_text(line * 40_000)
    cache = f"file:{conversed.cache_path(library.system.var)}?mode=ro"

    def gone() -> int:
        with closing(sqlite3.connect(cache, uri=True)) as database:
            return int(database.execute("SELECT gone FROM counters").fetchone()[0])

    def matches() -> int:
        found = library.read("conversation:search", query="albatrosses", session_id="large")
        return int(found["total_matches"])

    begun = gone()
    library.ask("conversation:import", path=str(tmp_path))
    for n in range(12):
        time.sleep(0.05)  # Some of it is read between two disturbances.
        with path.open("a") as log:
            log.write(line)
        if n % 3 == 0:
            number = library.ask("conversation:import", path=str(tmp_path / f"{n}.jsonl"))["number"]
    until(lambda: library.read("conversation:status")["imported"] >= number, 30.0)
    until(lambda: matches() >= 40_012)
    assert matches() == 40_012
    assert gone() == begun
    library.require_places("albatrosses")


@pytest.mark.parametrize("is_ended", [False, True], ids=["a block more", "to its end"])
def test_of_two_that_read_a_log_the_first_leaves_it_to_the_other(
    tmp_path: Path, is_ended: bool
) -> None:
    path, place = tmp_path / "large.jsonl", tmp_path / "conversations.db"
    line = json.dumps(human("a heap of albatrosses " * 8)) + "\n"
    lines = 4 * READ_BYTES // len(line)
    path.write_text(line * lines)
    ConversationsWriter(place, "logs", conversed.said, making=True).close()
    writer = ConversationsWriter(place, "logs", conversed.said)

    def begin() -> Iterator[None]:
        signature = signature_of(path)
        assert signature is not None
        steps = read_on(writer, path, signature)
        next(steps)
        return steps

    def taken() -> tuple[int, int, int]:
        file = writer.file(str(path))
        assert file is not None
        return file.id, file.lines, file.size_bytes

    former = begin()
    number, of_a_block, _ = taken()
    latter = begin()
    assert taken()[:2] == (number, 2 * of_a_block), "it was begun anew"
    if is_ended:
        assert len(list(latter)) > 1
    before = taken()
    assert list(former) == []
    assert taken() == before
    list(latter)
    assert taken() == (number, lines, path.stat().st_size)
    writer.abandon()


def test_only_an_operator_imports_and_orders(library: Library) -> None:
    with library.system.client("alice") as alice:
        for operation in ("conversation:rebuild_index", "composition:rebuild_index"):
            with pytest.raises(Forbidden):
                alice.ask(operation)
        with pytest.raises(Forbidden):
            alice.ask("conversation:import", path="/etc")


def test_after_kills_the_cache_is_the_one_that_is_made_from_the_files(library: Library) -> None:
    """The library is killed while sessions and logs grow: nothing is missed, nothing is twice."""
    chance = random.Random(int(os.environ.get("KSI_SEED") or 5))
    said = 0
    with library.system.client("storm") as storm:
        storm.ask("session:create", session_id="storm")
        for n in range(KILLS):
            for _ in range(30):
                said += 1
                storm.tell(
                    "session:append", session_id="storm", event="n", data={"t": "gale force"}
                )
                library.log(f"storm{n % 3}.jsonl", human("gale force"))
            if n % 4 == 1:
                library.ask("conversation:rebuild_index")
            time.sleep(chance.uniform(0.0, 0.1))  # It dies at a moment that is drawn.
            kill(library.system, "library")
        storm.flush(20.0)
    until(lambda: _total(library) == 2 * said, 30.0)
    incremental = list(library.conversations.dump())
    library.rebuild("conversation")
    assert list(library.conversations.dump()) == incremental
    assert _total(library) == 2 * said
    library.require_places('"gale force"')


def _total(library: Library) -> int:
    try:
        return int(library.read("conversation:search", query='"gale force"')["total_matches"])
    except NotRunning:
        return -1


def test_queries_are_answered_in_place_with_the_library_stopped(library: Library) -> None:
    library.log("placed.jsonl", human("dugong"))
    until(lambda: library.found("dugong"))
    with paused(library.system, "library"):
        assert library.found("dugong") == [("placed", 1)]
        assert library.read("conversation:get", session_id="placed")["total"] == 1


def test_locks_survive_a_kill_and_a_silent_holder_is_fenced_off(library: Library) -> None:
    """The next in the queue has a higher epoch, and what the former holder writes is refused."""
    lock: dict[str, Any] = {"conversation_id": "shared", "request_id": "r"}
    with library.system.client("silent") as silent, library.system.client("eager") as eager:
        silent.ask("session:create", session_id="shared")
        former = silent.ask("conversation:acquire_lock", ttl_s=2.0, **lock)["epoch"]
        entry: dict[str, Any] = {"session_id": "shared", "event": "note"}
        silent.ask("session:append", lock_epoch=former, **entry)
        assert eager.ask("conversation:acquire_lock", **lock)["position"] == 1
        kill(library.system, "library")
        with eager.subscribe("conversation.shared.*") as news:
            given = news.next(timeout_s=10)
            while given.topic != "conversation.shared.lock_transferred":
                given = news.next(timeout_s=10)
        now = eager.read("conversation:lock_status", conversation_id="shared")
        assert (now["holder"], now["state"]) == ("eager", "locked")
        assert now["epoch"] > former
        with pytest.raises(StaleEpoch) as refused:
            silent.ask("session:append", lock_epoch=former, **entry)
        assert refused.value.details == {"owner": "eager", "epoch": now["epoch"]}
        eager.ask("session:contribute", lock_epoch=now["epoch"], **entry)
        eager.ask("conversation:release_lock", request_id="r")


@pytest.mark.extra
@pytest.mark.skipif(not CORPORA.is_dir(), reason="KSI_CORPORA names no logs and compositions")
def test_real_logs_are_indexed_and_searched_completely(tmp_path: Path) -> None:
    logs = sorted((CORPORA / "claude-logs").glob("*.jsonl"))
    system = System(tmp_path / "var", ())
    try:
        with system.client("operator", role="operator") as operator:
            (path,) = {each.parent for each in logs}
            number = operator.ask("conversation:import", path=str(path))["number"]
            until(lambda: operator.read("conversation:status")["imported"] >= number)
            stats = operator.read("conversation:stats")
            assert (stats["total_conversations"], stats["bad_lines"]) == (len(logs), 0)
            assert stats["total_messages"] == sum(len(p.read_text().splitlines()) for p in logs)
            for word in ("consciousness", "the", "emergence"):
                begun_s = time.perf_counter()
                found = operator.read("conversation:search", query=word, limit=100)
                print(f"{word}: {1000 * (time.perf_counter() - begun_s):.1f} ms")
                holding = {p.stem for p in logs if re.search(rf"\b{word}\b", spoken(p))}
                assert found["total_conversations"] == len(holding) > 0
                assert {each["session_id"] for each in found["results"]} <= holding
                require_places(found, word)
    finally:
        system.end()


@pytest.mark.extra
@pytest.mark.skipif(not CORPORA.is_dir(), reason="KSI_CORPORA names no logs and compositions")
@pytest.mark.parametrize("exclude", ["_archive/tests/ README", ""])
def test_real_compositions_are_indexed_or_reported_and_put_together(
    tmp_path: Path, exclude: str
) -> None:
    folder = CORPORA / "compositions"
    settings = {"compositions.folder": str(folder), "compositions.exclude": exclude}
    system = System(tmp_path / "var", (), **settings)
    try:
        with system.client("operator", role="operator") as operator:
            until(lambda: operator.read("composition:status")["state"] == "following")
            found = operator.read("composition:list", limit=1000)["compositions"]
            told = operator.read("composition:problems", limit=1000)["problems"]
            paths = {each["file_path"]: "indexed" for each in found}
            paths |= {each["file_path"]: each["state"] for each in told}
            assert paths == {path: judged(folder / path, exclude) for path in all_below(folder)}
            malformed = [each["file_path"] for each in told if "malformed" in each["reason"]]
            named = ["invalid_frontmatter.md", "malformed_yaml_test.md"]
            assert sorted(Path(path).name for path in malformed) == ([] if exclude else named)
            for each in found:
                require_rendered(operator, each["file_path"])
            begun_s = time.perf_counter()
            operator.read("composition:list", tags=["core"], limit=1000)
            print(f"{len(found)} indexed; by tag {1000 * (time.perf_counter() - begun_s):.1f} ms")
    finally:
        system.end()


def all_below(folder: Path) -> list[str]:
    found = (path for suffix in ("md", "yaml", "yml") for path in folder.rglob(f"*.{suffix}"))
    return [path.relative_to(folder).as_posix() for path in found]


def judged(path: Path, exclude: str) -> str:
    """Return what a file is by the rules of KSI, read in another way."""
    if any(word in str(path) for word in exclude.split()):
        return "excluded"
    text = path.read_text()
    front = text
    if path.suffix == ".md":
        fenced = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        if fenced is None:
            return "rejected"
        front = fenced[1]
    try:
        YAML(typ="safe", pure=True).load(front)
    except YAMLError:
        return "rejected"
    has_name = re.search(r"^name:[ \t]*\S", front, re.MULTILINE)
    has_type = re.search(r"^(component_)?type:[ \t]*\S", front, re.MULTILINE)
    return "indexed" if has_name and has_type else "rejected"


def require_rendered(client: Client, path: str) -> None:
    """Check that a composition is put together, or it is said what of it is not there."""
    try:
        rendered = client.read("composition:render", name=path)
    except NotFound as missing:
        print(f"{path}: {missing}")
    else:
        assert rendered["parts"][0] == path.rpartition(".")[0]


def spoken(path: Path) -> str:
    """Return what was said in a log, by another way."""
    entries = map(json.loads, path.read_text().splitlines())
    return "\n".join(str(each.get("content") or each.get("result")) for each in entries).lower()
