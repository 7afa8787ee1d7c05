"""`ksi start` until all owners answer, cold and warm, and `ksi stop`: wall time of the commands.

Cold is the first start on a new var directory with the files of Python and of all packages evicted
from the page cache, as far as no other process uses them. The other side is a bare interpreter that
imports the same engines and ends.

    python -m benchmarks.start_stop
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.measuring import Options, Report, Target, ksi, measuring, ratios, say, spread
from ksi.transport import Client

TARGET: Final = Target("≤", 1, "s")
ENGINES: Final = "import lmdb, msgspec, psutil, pykka, structlog, zmq"


def python_files() -> Iterator[Path]:
    """Yield the files of Python and all installed packages, and our own."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    roots.add(str(Path(__file__).resolve().parent.parent / "actors"))
    roots.add(str(Path(__file__).resolve().parent.parent / "transport"))
    for root in roots:
        for pattern in ("*.py", "*.pyc", "*.so*"):
            yield from Path(root).rglob(pattern)
    yield Path(sys.executable).resolve()


def evict(options: Options) -> None:
    """Drop those files from the page cache, as far as nobody uses them."""
    if options.quick:
        return
    for path in python_files():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def import_engines() -> float:
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", ENGINES], check=True)
    return time.perf_counter() - begun_s


def start_and_stop(var: Path) -> tuple[float, float]:
    """Start a system, see that its owners answer, stop it; return what both took, in seconds."""
    started, start_s = ksi(var, "start")
    assert {child["child"] for child in started["children"]} >= {"registry", "sessions"}, started
    with Client("bench", var=var) as client:
        assert client.ask("session:list")["sessions"] == []
        assert client.ask("agent:list")["agents"] == []
    stopped, stop_s = ksi(var, "stop")
    assert stopped["stopped"], stopped
    return start_s, stop_s


def measure(options: Options, report: Report) -> None:
    cold: list[tuple[float, float, float]] = []
    warm: list[tuple[float, float, float]] = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        var = options.directory / f"var-{number}"
        evict(options)
        bare_s = import_engines()
        evict(options)
        cold.append((bare_s, *start_and_stop(var)))
        warm.append((import_engines(), *start_and_stop(var)))
    for name, taken_s in (("cold, new var", cold), ("warm, same var", warm)):
        bare, start, stop = zip(*taken_s, strict=True)
        report.add(
            f"start, {name}, s",
            f"{spread(start):.2f}",
            f"{spread(bare):.3f}",
            ratio=ratios(start, bare),
            target=TARGET,
            value=spread(start).median,
        )
        report.add(
            f"stop, {name}, s", f"{spread(stop):.2f}", target=TARGET, value=spread(stop).median
        )


def main() -> None:
    with measuring(__doc__) as options:
        report = Report("ksi start and ksi stop; the other side: python that imports the engines")
        measure(options, report)
        report.show()


if __name__ == "__main__":
    main()
