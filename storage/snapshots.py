"""Snapshots: a committed state of one store, whole or absent, and known to be good.

A snapshot is a directory of two files: `data.mdb`, a compacted copy of the LMDB view as of one
read transaction, and `manifest.json`, which says what it is of and the SHA-256 of the copy. It is
made in a temporary directory, synced, opened, every row checked, and only then renamed into place;
so a snapshot that has its name was good, and its checksum tells whether it still is.

LMDB's own copy does not sync, refuses an existing file and must never be replaced by a copy of the
file by hand: that one may be torn, and reading it drops LMDB's locks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb
import msgspec

from ksi.storage.atomic import sync_directory, write_atomically
from ksi.storage.environment import open_copy
from ksi.storage.errors import Corrupt, reading
from ksi.storage.journal import Position
from ksi.storage.tables import Instant, ReadTable, RowCodec, TableSpec

T = TypeVar("T")

MANIFEST_FORMAT: Final = 1


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot holds.

    Attributes:
        store: id of the store it was taken of.
        seq: last sequence number it includes.
        segment: with `offset`, the place in the journal that follows it.
        time_s: owner time then, in seconds.
        rows: how many rows each table has.
        sha256: of `data.mdb`, in hex, which is `data_bytes` long.
    """

    format: int = MANIFEST_FORMAT
    store: str
    seq: int
    segment: int
    offset: int
    time_s: float
    rows: dict[str, int]
    sha256: str
    data_bytes: int

    @property
    def position(self) -> Position:
        return Position(self.segment, self.offset)


class Frozen:
    """One committed state of a store, held by a read transaction until it is saved.

    Pages it refers to are not reused meanwhile: save it soon, or `release` it.
    """

    def __init__(
        self,
        environment: lmdb.Environment,
        store: str,
        describe: Callable[[lmdb.Transaction[bytes]], tuple[int, Position, float]],
    ) -> None:
        """`describe` returns sequence number, position and owner time as of a transaction."""
        self._environment = environment
        self._store = store
        self._describe = describe
        self._txn = environment.begin()

    def save(self, path: Path) -> Manifest:
        """Make the snapshot `path`, durably, and release the state. May run in another thread.

        Raises:
            Corrupt: a row does not match its checksum; there is no snapshot then.
            OSError, lmdb.Error: there is none either.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            described = self._describe(self._txn)
            self.copy(temporary)
            manifest = seal(temporary, self._store, *described)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            self.release()
        sync_directory(path.parent)
        return manifest

    def copy(self, path: Path) -> None:
        """Copy the state to a new directory, durably, and release it. May run in another thread.

        Costs no time of the interpreter: the thread beside it is not held up. `seal` makes it a
        snapshot.

        Raises:
            OSError, lmdb.Error: it may be there in part.
        """
        try:
            path.mkdir(mode=0o700)
            self._environment.copy(str(path), compact=True, txn=self._txn)
        finally:
            self.release()
        data = path / "data.mdb"
        data.chmod(0o600)
        with open(data, "rb") as file:
            os.fsync(file.fileno())

    def release(self) -> None:
        """Let the state go."""
        self._txn.abort()


def seal(path: Path, store: str, seq: int, position: Position, time_s: float) -> Manifest:
    """Check every row of a synced copy of this state, and write its manifest, durably.

    Raises:
        Corrupt: a row does not match its checksum; there is no manifest then.
    """
    rows = check_rows(path)
    digest, data_bytes = _hash(path / "data.mdb")
    manifest = Manifest(
        store=store,
        seq=seq,
        segment=position.segment,
        offset=position.offset,
        time_s=time_s,
        rows=rows,
        sha256=digest,
        data_bytes=data_bytes,
    )
    write_manifest(path, manifest)
    return manifest


def is_whole(path: Path, manifest: Manifest) -> bool:
    """Return whether the data of a snapshot are those its manifest was written for."""
    try:
        with reading(f"snapshot {path}", path / "data.mdb"):
            return _hash(path / "data.mdb") == (manifest.sha256, manifest.data_bytes)
    except Corrupt:
        return False


def read_copy(
    path: Path,
    specs: Mapping[str, TableSpec],
    read: Callable[[Mapping[str, ReadTable[Any]]], T],
) -> T:
    """Return `read(tables)` of the copy in the directory `path`.

    Raises:
        Corrupt: it is damaged, or lacks a table.
    """
    environment = open_copy(path)
    try:
        instant = Instant()
        tables = {
            name: ReadTable[Any](
                name, spec, environment.open_db(name.encode(), create=False), instant
            )
            for name, spec in specs.items()
        }
        with environment.begin() as txn:
            instant.txn = txn
            return read(tables)
    except lmdb.Error as error:
        raise Corrupt(f"snapshot {path}: {error}", file=str(path)) from error
    finally:
        environment.close()


def check_rows(path: Path) -> dict[str, int]:
    """Read every row of the copy in the directory `path`; return how many each table has.

    Raises:
        Corrupt: a row does not match its checksum, or the file is damaged.
    """
    environment = open_copy(path)
    try:
        with environment.begin() as txn:
            names = [bytes(name).decode() for name in environment.dbs(txn)]
        return {name: _check_table(environment, name) for name in names}
    except (lmdb.Error, UnicodeDecodeError) as error:
        raise Corrupt(f"snapshot {path}: {error}", file=str(path)) from error
    finally:
        environment.close()


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a snapshot.

    Raises:
        Corrupt: there is none, or it cannot be read.
    """
    with reading(f"snapshot {path}", path / "manifest.json"):
        manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    if manifest.format != MANIFEST_FORMAT:
        raise Corrupt(f"snapshot {path} is of format {manifest.format}, not {MANIFEST_FORMAT}")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into the directory of a snapshot, durably."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    write_atomically(path / "manifest.json", content)


def install(snapshot: Path, view: Path) -> Manifest:
    """Copy a snapshot to a fresh LMDB directory `view`, checked and durable.

    Raises:
        Corrupt: the snapshot is not what its manifest says; `view` does not exist then.
    """
    manifest = read_manifest(snapshot)
    temporary = view.with_name(f".{view.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    try:
        shutil.copyfile(snapshot / "data.mdb", temporary / "data.mdb")
        (temporary / "data.mdb").chmod(0o600)
        if _sync_and_hash(temporary / "data.mdb") != (manifest.sha256, manifest.data_bytes):
            raise Corrupt(
                f"snapshot {snapshot}: data.mdb does not match the manifest",
                hint="use an older one",
                file=str(snapshot / "data.mdb"),
            )
        sync_directory(temporary)
        os.rename(temporary, view)
    except FileNotFoundError as error:
        raise Corrupt(f"snapshot {snapshot}: {error}", file=str(snapshot)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(view.parent)
    return manifest


def newest_good(
    paths: Iterable[Path], store: str, goes_on: Callable[[int, Position], bool]
) -> tuple[Path, Manifest] | None:
    """Return the newest of the snapshots `paths` that can be used, or None.

    That is one of this store, whose data match the manifest, and from whose position the journal
    goes on, as `goes_on(seq, position)` tells.
    """
    found = []
    for path in paths:
        try:
            manifest = read_manifest(path)
        except Corrupt:
            continue
        if manifest.store == store and goes_on(manifest.seq, manifest.position):
            found.append((path, manifest))
    found.sort(key=lambda each: each[1].seq, reverse=True)
    for path, manifest in found:
        if is_whole(path, manifest):
            return path, manifest
    return None


def _check_table(environment: lmdb.Environment, name: str) -> int:
    database = environment.open_db(name.encode(), create=False)
    intact = RowCodec(name, bytes).intact
    count = 0
    with environment.begin() as txn:
        for key, value in txn.cursor(database):
            if not intact(key, value):
                raise Corrupt(
                    f"a row of the table {name} does not match its checksum: {key!r}"[:500],
                    table=name,
                    key=repr(key),
                )
            count += 1
    return count


def _sync_and_hash(path: Path) -> tuple[str, int]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _hash(path: Path) -> tuple[str, int]:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
