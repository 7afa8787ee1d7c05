"""The report of the slow proofs says what was reached, and keeps what it said of the others."""

from __future__ import annotations

from soaked import HEAD, REPORT, Reached, reached, rewritten

BEFORE = f"# Before\n\n{HEAD}| `a` | 1 of 1 | 2 | then |\n| `c` | 3 | 4 | then |\n\nBehind.\n"


def test_a_row_takes_the_place_of_the_former_one_and_others_stay() -> None:
    after = rewritten(BEFORE, {"b": Reached("all", 7.4), "a": Reached("2 of 2", 3.0)}, "now")
    rows = "| `a` | 2 of 2 | 3 | now |\n| `b` | all | 7 | now |\n| `c` | 3 | 4 | then |\n"
    assert after == f"# Before\n\n{HEAD}{rows}\nBehind.\n"


def test_what_a_test_says_is_its_own_words_or_that_it_failed() -> None:
    assert reached("passed", "KSI_SEED=7\n5 kills\n2|3 lost\n", 1.0).said == "5 kills; 2/3 lost"
    assert reached("passed", "", 1.0).said == "passed"
    assert reached("failed", "5 kills\n", 1.0).said == "**failed**"


def test_the_report_has_a_place_for_them() -> None:
    text = REPORT.read_text()
    assert "| `x` | all | 1 | now |" in rewritten(text, {"x": Reached("all", 1.0)}, "now")
