"""The pages in `docs/` speak of what is there. (`operations.md` and the README have tests of their
own.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
FOLDERS = "actors|adapters|benchmarks|bin|console|docs|examples|storage|tests|transport"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_a_page_names_is_there(page: Path) -> None:
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text()))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_a_page_names_is_there(page: Path) -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()))
    gone = [
        f"{path}::{name}"
        for path, name in sorted(named)
        if not re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M)
    ]
    assert gone == []


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_is_half_a_page_of_four_parts(page: Path) -> None:
    text = page.read_text()
    number = page.name[:4]

    assert text.startswith(f"# {number}. ")
    parts = re.findall(r"^\*\*(\w+)\.\*\* ", text, re.M)
    assert parts == ["Context", "Decision", "Consequences", "Rejected"]
    assert len(text.splitlines()) <= 26


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_the_glossary_is_in_order_and_says_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = [word.split(",")[0] for word in re.findall(r"^\| \*\*(.+?)\*\*", text, re.M)]
    assert len(words) > 40
    assert len(words) == len(set(words))
    assert words == sorted(words)
