"""The host as a process of its own, without a supervisor."""

import subprocess
import sys
import time
from pathlib import Path

from ksi.actors.stat import read_stat
from ksi.transport.identity import Address, Directory, KeyRing, endpoint, make_run_directory

PATIENCE_S = 10.0  # A test that waits longer has failed.
LATE = """
import sys
from ksi.actors import host, process
host.TICK_S = 3600.0  # Nothing lets time pass while the test looks.
process.run_owner("registry", sys.argv[1])
"""


def test_an_owner_says_that_it_runs_before_anything_happens(tmp_path: Path) -> None:
    path = make_run_directory(tmp_path) / "registry.stat"
    key = KeyRing(tmp_path).enroll("registry", "owner").public.decode()
    place = Address(endpoint(tmp_path, "registry"), key)
    Directory({}, {}, {}, {"registry": place}).write(tmp_path)
    owner = subprocess.Popen([sys.executable, "-P", "-c", LATE, str(tmp_path)])
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while (stat := read_stat(path)) is None or stat.state != "running":
            assert owner.poll() is None
            assert time.monotonic() < deadline_s, stat
            time.sleep(0.005)  # A poll with a deadline.
        assert stat.store_id
    finally:
        owner.terminate()
        assert owner.wait(PATIENCE_S) == 0
