"""What a file says of a composition, and how compositions are read.

A composition is a YAML file, or Markdown with YAML between two lines `---` at its beginning, that
gives itself a `name` and a `component_type` (or `type`). What a file is to the cache depends on the
file alone, so whoever looks at it, and however often, comes to the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from ksi.actors.composing import Rejected, read_metadata, require_composition, split
from ksi.actors.supervision.reports import read_follower
from ksi.storage import shared
from ksi.storage.cache import as_json
from ksi.storage.compositions import Composition, CompositionsReader, facets_of
from ksi.transport.errors import Busy, Conflict
from ksi.transport.identity import run_directory
from ksi.transport.limits import COMPOSITION_BYTES_MAX

RETRY_S: Final = 0.5  # Until it is worth asking again.


def cache_path(var: Path) -> Path:
    """Return where the cache of compositions is."""
    return var / "cache" / "compositions.db"


def exclusion_of(path: str, exclude: tuple[str, ...]) -> str | None:
    """Return why a file is not to be looked into, by its path below the folder."""
    for part in exclude:
        if part in path:
            return f"excluded: {part!r} is in its path"
    return None


def read_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: it is gone.
        Rejected: it is a link, too large, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise Rejected("it is a link, which is not followed") from None
        raise Rejected(f"it cannot be read: {error.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        content = file.read(COMPOSITION_BYTES_MAX + 1)
    if len(content) > COMPOSITION_BYTES_MAX:
        raise Rejected(f"it is over {COMPOSITION_BYTES_MAX} bytes")
    return content


def parse(path: str, content: bytes) -> Composition:
    """Return what the file at `path` says.

    Raises:
        Rejected: it is no composition.
    """
    metadata = read_metadata(path, content)
    name, kind = require_composition(metadata)
    inner = metadata.get("metadata")
    strategy = inner.get("loading_strategy") if isinstance(inner, Mapping) else None
    return Composition(
        name=name,
        component_type=kind,
        version=_text(metadata.get("version")),
        description=_text(metadata.get("description")),
        author=_text(metadata.get("author")),
        extends=_text(metadata.get("extends")),
        loading_strategy=_text(metadata.get("loading_strategy") or strategy),
        metadata=as_json(metadata),
        facets=facets_of(metadata),
    )


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return as_json(value)


class CompositionsView:
    """The compositions of one var: see `ksi.actors.owner.Compositions`."""

    def __init__(self, var: Path) -> None:
        self._var = var
        self._reader = CompositionsReader(cache_path(var))

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return compositions in the order of their paths. Takes what the reader does."""
        facets: dict[str, list[list[str]]] = {}
        for key, groups in (wanted.pop("facets", None) or {}).items():
            facets[key] = [[as_json(value) for value in group] for group in groups]
        rows = self._reader.find(facets=facets, **wanted)
        return [_shown(row) for row in rows]

    def named(self, name: str, kind: str | None) -> list[dict[str, Any]]:
        """Return the compositions that a name may mean; one alone with its content."""
        found = [_shown(row) for row in self._reader.named(name, kind)]
        if len(found) == 1:
            found[0]["content"] = self._content(found[0]["file_path"])
        return found

    def source(self, path: str) -> bytes | None:
        """Return the file at a path as it is in the folder now; None if there is none.

        Raises:
            Conflict: something else is there, or it would be no composition there.
            Busy: it cannot be read now, or there is no cache yet.
        """
        made_of = self._reader.made_of()
        if made_of is None:
            raise Busy("the cache of compositions is not made yet", retry_after_s=RETRY_S)
        about = msgspec.json.decode(made_of)
        if why := exclusion_of(path, about["exclude"]):
            raise Conflict(f"{path} would be no composition: {why}")
        try:
            content = shared.read(Path(about["folder"]), path, COMPOSITION_BYTES_MAX + 1)
        except shared.Differs as differs:
            raise Conflict(f"{path}: {differs}") from None
        except OSError as error:
            raise Busy(f"{path} cannot be read: {error.strerror}", retry_after_s=RETRY_S) from None
        if content is not None and len(content) > COMPOSITION_BYTES_MAX:
            raise Conflict(f"{path} is over {COMPOSITION_BYTES_MAX} bytes")
        return content

    def problems(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the files that are no compositions, and why not."""
        return self._reader.problems(**wanted)

    def state(self) -> dict[str, Any]:
        """Return how many there are, and what the follower says of itself."""
        return {
            **self._reader.counts(),
            "folder": self._folder(),
            "rebuilt": self._reader.rebuilt(),
            **read_follower(run_directory(self._var), "compositions"),
        }

    def _folder(self) -> str | None:
        made_of = self._reader.made_of()
        return None if made_of is None else msgspec.json.decode(made_of)["folder"]

    def _content(self, path: str) -> str | None:
        """Return the text of a composition; None if the file is not what it was any more."""
        folder = self._folder()
        try:
            _source, body, _line = split(path, read_file(Path(folder or "") / path))
        except (OSError, Rejected):
            return None
        return body


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    metadata = msgspec.json.decode(row["metadata"])
    inner = metadata.get("metadata")
    labels = {}
    for label in ("tags", "capabilities"):
        value = metadata.get(label)
        if value is None and isinstance(inner, Mapping):
            value = inner.get(label)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        labels[label] = [each if isinstance(each, str) else as_json(each) for each in listed]
    return {**row, **labels, "file_path": row["path"], "metadata": metadata}
