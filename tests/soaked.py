"""What slow proofs reached, written into docs/reliability.md: a row for the last run of each."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent
REPORT: Final = ROOT / "docs" / "reliability.md"
HEAD: Final = "| slow proof | reached | seconds | on |\n|---|---|---|---|\n"
_TABLE: Final = re.compile(re.escape(HEAD) + r"((?:\|.*\n)*)")


class Reached(NamedTuple):
    """What a test printed, or how it failed, and how long it took."""

    said: str
    spent_s: float


def reached(outcome: str, printed: str, spent_s: float) -> Reached:
    """Return what a test reached: its own words, where it passed."""
    said = [line for line in printed.splitlines() if not line.startswith("KSI_SEED=")]
    words = "; ".join(said).replace("|", "/") if outcome == "passed" else f"**{outcome}**"
    return Reached(words or outcome, spent_s)


def rewritten(text: str, found: Mapping[str, Reached], on: str) -> str:
    """Return a report with the rows of `found` in it, in place of former ones of these tests."""
    table = _TABLE.search(text)
    assert table, f"no table of slow proofs: {HEAD}"
    rows = {row.split("`")[1]: row for row in table[1].splitlines()}
    for name, each in found.items():
        rows[name] = f"| `{name}` | {each.said} | {each.spent_s:.0f} | {on} |"
    body = "".join(f"{rows[name]}\n" for name in sorted(rows))
    return text[: table.start(1)] + body + text[table.end(1) :]


def write(found: Mapping[str, Reached]) -> None:
    """Write what was reached today, by the code of this commit, into the report."""
    on = f"{date.today().isoformat()} {_commit()}".strip()
    REPORT.write_text(rewritten(REPORT.read_text(), found, on))


def _commit() -> str:
    asked: Sequence[str] = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
