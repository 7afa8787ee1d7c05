"""What a line of a conversation says: three known forms, and why others say nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ksi.actors.followers.conversed import content_of, said
from ksi.storage.conversations import Unreadable, match_of, preview_of, terms_of
from ksi.transport.errors import Invalid

AT = "2025-06-20T15:28:16.117343Z"
SECONDS = 1750433296.117343


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "sender", "kind", "words"),
    [
        (line(type="human", content="ask", timestamp=AT), "human", "human", "ask"),
        (line(type="user", content="ask", timestamp=AT), "user", "user", "ask"),
        (
            line(type="claude", subtype="success", result="told", timestamp=AT),
            "claude", "success", "told",
        ),
        (
            line(type="claude", subtype="error_during_execution", timestamp=AT),
            "claude", "error_during_execution", "",
        ),
        (
            line(ksi={"provider": "p", "timestamp": AT}, response={"result": "told", "id": "x"}),
            "p", "response", "told",
        ),
        (
            line(
                ksi={"provider": "p", "agent_id": "a", "timestamp": SECONDS},
                response={"choices": [{"message": {"role": "assistant", "content": "told"}}]},
            ),
            "a", "response", "told",
        ),
        (
            line(
                ksi={"provider": "p", "timestamp": AT},
                response={"content": [{"type": "text", "text": "told"}]},
            ),
            "p", "response", "told",
        ),
        (
            line(event="note", data={"text": "hi", "to": ["bob"]}, timestamp=SECONDS,
                 metadata={"agent_id": "a", "seq": 7}),
            "a", "note", "hi\nbob",
        ),
        (
            line(event="note", data={"agent_id": "b"}, timestamp=str(SECONDS)),
            "b", "note", "b",
        ),
        (
            line(event="note", data={}, timestamp="2025-06-20T15:28:16.117343"),
            "unknown", "note", "",
        ),
    ],
)  # fmt: skip
def test_the_three_known_forms_are_read(content: bytes, sender: str, kind: str, words: str) -> None:
    found = said(content)
    assert (found.timestamp, found.sender, found.kind, found.words) == (
        SECONDS, sender, kind, words,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"../other.jsonl", "it is no JSON"),
        (b"[1]", "it is no JSON object"),
        (b'{"a": 1}', "it has no timestamp"),
        (b"\xff\xfe", "it is no JSON"),
        (line(timestamp=AT, type="summary"), "no known form, type 'summary'"),
        (line(timestamp="soon", type="human"), "its timestamp 'soon' is no time"),
        (line(timestamp=True, type="human"), "it has no timestamp"),
        (line(timestamp=-1, event="e", data={}), "is no time"),
        (line(ksi={}, response="x"), "it has no timestamp"),
        (b"[" * 100_000, "it is no JSON"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_line_of_no_known_form_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable) as unreadable:
        said(content)
    assert reason in str(unreadable.value)


def test_an_entry_is_shown_as_its_text_or_as_its_data() -> None:
    assert content_of(line(event="e", data={"prompt": "p", "n": 1}, timestamp=1)) == "p"
    assert json.loads(content_of(line(event="e", data={"n": 1}, timestamp=1))) == {"n": 1}
    assert content_of(line(type="claude", timestamp=1)) == ""


def test_a_query_is_words_and_phrases() -> None:
    assert terms_of('lease "owner time" epoch*') == ["lease", "owner time", "epoch*"]
    assert match_of(["a", 'b"c', "d*"], ["content"]) == '{content} : ("a" AND "b""c" AND "d"*)'
    with pytest.raises(Invalid, match="no word"):
        terms_of('"" !!!')


def test_a_preview_shows_what_was_found() -> None:
    text = "x " * 300 + "needle" + " y" * 300
    preview = preview_of(text, ["NEEDLE*"])
    assert "needle" in preview
    assert preview.startswith("...")
    assert preview.endswith("...")
    assert preview_of("short", ["none"]) == "short"
