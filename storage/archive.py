"""The archive of logs: each a file `<key>.jsonl.zst`, compressed, whole and known to be good.

A log is compressed under another name, synced, read back and compared with what it was made of, and
only then renamed; so one that has its name was good, and its checksum tells whether it still is.
`zstd -dc` shows it to people.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from ksi.storage.atomic import make_directory, sync_directory
from ksi.storage.errors import Corrupt

_SUFFIX: Final = ".jsonl.zst"
_LEVEL: Final = 6  # A tenth of its size for JSON, at some 100 MB/s.
_CHUNK_BYTES: Final = 1 << 20
_COMPRESSED_BYTES: Final = 16 << 10  # Of text that becomes some 200 KB.
_HEADER_BYTES: Final = 18  # At most, of a frame.


class Archive:
    """The archive in one directory; whoever writes it is the only process that does."""

    def __init__(self, directory: Path) -> None:
        """Nothing is opened or made yet."""
        self._directory = directory

    def path(self, key: str) -> Path:
        """Return where the log `key` is, or would be. The key is that of a log."""
        return self._directory / f"{key}{_SUFFIX}"

    def size(self, key: str) -> int | None:
        """Return how long the log is that is archived; None where none is, or none that is whole.

        This is what its header says: `chunks` tells whether the rest is good.
        """
        try:
            with _opened(self.path(key)) as file:
                header = file.read(_HEADER_BYTES)
        except FileNotFoundError:
            return None
        import zstandard  # Only now: most logs are not archived.

        try:
            return int(zstandard.frame_content_size(header))
        except zstandard.ZstdError:
            return None

    def store(self, key: str, log: Path, size: int, alive: Callable[[], None]) -> None:
        """Archive the file `log`, which is `size` bytes long. Durable after `sync`.

        Calls `alive` now and then.

        Raises:
            Corrupt: it is not that long, or does not read back as it was; there is no archive then.
            OSError: there is none either.
        """
        import zstandard

        make_directory(self._directory)
        temporary = self._directory / f".{key}.tmp"
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with (
                _opened(log) as source,
                os.fdopen(os.open(temporary, flags, 0o600), "wb") as target,
            ):
                with compressor.stream_writer(target, size=size, closefd=False) as writer:
                    while content := source.read(_CHUNK_BYTES):
                        writer.write(content)
                        alive()
                target.flush()
                os.fsync(target.fileno())
            with _opened(log) as source:
                for content in _decompressed(temporary):
                    if source.read(len(content)) != content:
                        raise Corrupt(f"the archive of {log} does not read back as it was")
                    alive()
                if source.read(1):
                    raise Corrupt(f"the archive of {log} ends early")
            temporary.rename(self.path(key))
        except zstandard.ZstdError as error:
            raise Corrupt(f"{log} is not {size} bytes long: {error}", file=str(log)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def sync(self) -> None:
        """Make durable which logs are in it."""
        sync_directory(self._directory)

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the log, piece by piece.

        Raises:
            FileNotFoundError: it is not in the archive.
            Corrupt: its file is damaged.
        """
        return _decompressed(self.path(key))

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) of a log as far as there are any; None if it is not there.

        Raises:
            Corrupt: its file is damaged.
        """
        found, offset = bytearray(), 0
        try:
            for content in self.chunks(key):
                if offset + len(content) > start:
                    found += content[max(0, start - offset) : stop - offset]
                offset += len(content)
                if offset >= stop:
                    break
        except FileNotFoundError:
            return None
        return bytes(found)

    def logs(self) -> Iterator[str]:
        """Yield what is in it, in no order."""
        with suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.endswith(_SUFFIX):
                    yield entry.name.removesuffix(_SUFFIX)

    def remove(self, key: str) -> None:
        """Remove a log from it; fine if it is not there."""
        self.path(key).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process was still making."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._directory):
                if entry.name.startswith("."):
                    os.unlink(entry.path)


def _decompressed(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        import zstandard

        try:
            frame = zstandard.ZstdDecompressor().decompressobj()
            while not frame.eof and (content := file.read(_COMPRESSED_BYTES)):
                yield frame.decompress(content)
        except zstandard.ZstdError as error:
            raise _damaged(path, str(error)) from error
        if not frame.eof:  # Its checksum, the last of it, has not been met.
            raise _damaged(path, "it ends early")


def _damaged(path: Path, why: str) -> Corrupt:
    hint = "put back an intact copy of it"
    return Corrupt(f"{path} is damaged: {why}", hint=hint, file=str(path))


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
