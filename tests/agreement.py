"""Whether all that says what was said says the same: files, view, journal and index."""

from __future__ import annotations

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from unittest import mock

from system import System
from trouble import until

from ksi.actors.followers.indexed import Verification, index_directory
from ksi.actors.reading import reader_of
from ksi.storage import sqlite
from ksi.storage.index import IndexReader

PATIENCE_S = 300.0  # To build an index of a million entries again, on a machine that is busy.
FILES_S = 5.0  # The promise is one second on a machine that has time for it.


def _holds(path: Path, size: int) -> bool:
    return path.stat().st_size >= size


def require_agreement(system: System) -> None:
    """Check that the session files are what the journal says, and as long as the view says, and
    that the index is what the files say."""
    reader = reader_of("sessions", system.var)
    journal = reader.journal()
    committed = reader.committed()
    logs: dict[str, bytearray] = {}
    for batch in journal.read(journal.start(), committed.position):
        for key, offset, content in reader.lines_of(batch):
            log = logs.setdefault(key, bytearray())
            assert offset == len(log), f"a line of {key} is not where the one before ended"
            log += content
    sizes = {key: size for key, size in reader.logs("", 1 << 20)[1].items() if size}
    assert sizes == {key: len(log) for key, log in logs.items()}
    for key, log in logs.items():
        path = system.file(key)
        until(partial(_holds, path, len(log)), FILES_S)
        assert path.read_bytes() == log, f"{path.name} is not what the journal says"
    require_index(system)


def tokens_of(var: Path) -> dict[str, list[str]]:
    """Return the tokens in each session file; fails unless entries are numbered 1, 2, 3."""
    tokens: dict[str, list[str]] = {}
    for path in (var / "logs/responses/sessions").glob("*.jsonl"):
        content = path.read_bytes()
        assert content.endswith(b"\n") or not content
        lines = [json.loads(line) for line in content.splitlines()]
        numbers = [line["metadata"]["seq"] for line in lines]
        assert numbers == list(range(1, len(lines) + 1)), path.name
        tokens[path.stem] = [line["data"]["token"] for line in lines]
    return tokens


def require_index(system: System) -> None:
    """Check that the index says what the files say, and the same when it is built again."""
    reader = IndexReader(index_directory(system.var))
    with system.client("operator", role="operator") as operator:

        def has_caught_up(rebuilt: int = 0) -> bool:
            now = operator.ask("index:status")
            following = now["state"] == "following" and now["behind_bytes"] == 0
            return bool(following and now["rebuilt"] >= rebuilt)

        until(has_caught_up, PATIENCE_S)
        followed = digest(reader)
        verification = Verification(system.var)
        while verification.turn():
            pass
        report = verification.report()
        assert (report["differences"], report["found"]) == (0, [])
        number = operator.ask("index:rebuild")["number"]
        until(lambda: has_caught_up(number), PATIENCE_S)
    assert digest(reader) == followed


def digest(reader: IndexReader) -> str:
    """Return a checksum of everything in the index, however long that takes to read."""
    checksum = sha256()
    with mock.patch.object(sqlite, "INDEX_QUERY_S_MAX", PATIENCE_S):
        for each in reader.dump():
            checksum.update(each.encode() + b"\n")
    return checksum.hexdigest()
