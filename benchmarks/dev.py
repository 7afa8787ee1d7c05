"""`ksi dev`: from a saved edit to the first answer of fresh code, many times in a row.

A copy of the sources is edited, and a client asks until what it is answered shows the edit. The
other side is a bare interpreter that imports the same engines and ends.

    python -m benchmarks.dev
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.measuring import Options, Report, Target, measuring, ratios, say, spread
from benchmarks.start_stop import import_engines
from ksi.transport import Client

TARGET: Final = Target("≤", 1, "s")
EDITS: Final = 20
ROOT: Final = Path(__file__).resolve().parent.parent
FOLDERS: Final = ("actors", "adapters", "console", "storage", "transport")
KSI: Final = (sys.executable, "-P", "-m", "ksi.console")
PREFIX: Final = 'f"sess_{'


@contextmanager
def developing(place: Path) -> Iterator[Path]:
    """Run `ksi dev` on a copy of the sources; yields its runtime directory."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, place / "code" / "ksi" / folder)
    process = subprocess.Popen(
        [*KSI, "dev", "--json", "--var", str(place / "var")],
        env={**os.environ, "PYTHONPATH": str(place / "code")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert any(b'"ready"' in line for line in process.stdout), "ksi dev has ended"
        yield place / "var-dev"
    finally:
        process.terminate()
        process.communicate()


def edit_and_ask(client: Client, path: Path, original: str, number: int) -> float:
    """Save an edit; return the seconds until an answer shows it."""
    prefix = f"edit{number}_"
    begun_s = time.perf_counter()
    path.write_text(original.replace(PREFIX, f'f"{prefix}{{'))
    while not client.ask("session:create", timeout_s=60.0)["session_id"].startswith(prefix):
        time.sleep(0.001)  # It shares two cores with what it times.
    return time.perf_counter() - begun_s


def measure(options: Options, report: Report) -> None:
    edits = 2 if options.quick else EDITS
    taken_s, bare_s = [], []
    with developing(options.directory) as var, Client("bench", var=var) as client:
        path = options.directory / "code" / "ksi" / "actors" / "owners" / "sessions.py"
        original = path.read_text()
        client.ask("session:create", timeout_s=60.0)
        for number in range(edits):
            say(f"edit {number + 1} of {edits}")
            bare_s.append(import_engines())
            taken_s.append(edit_and_ask(client, path, original, number))
    report.add(
        "edit to first answer, s",
        f"{spread(taken_s):.2f}",
        f"{spread(bare_s):.3f}",
        ratio=ratios(taken_s, bare_s),
        target=TARGET,
        value=spread(taken_s).median,
    )
    report.add("the slowest of them, s", f"{max(taken_s):.2f}", target=TARGET, value=max(taken_s))


def main() -> None:
    with measuring(__doc__) as options:
        report = Report("ksi dev; the other side: python that imports the engines")
        measure(options, report)
        report.show()


if __name__ == "__main__":
    main()
