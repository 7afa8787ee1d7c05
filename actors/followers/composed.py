"""What a file says of a composition, and how compositions are read.

A composition is a YAML file, or Markdown with YAML between two lines `---` at its beginning, that
gives itself a `name` and a `component_type` (or `type`). What a file is to the cache depends on the
file alone, so whoever looks at it, and however often, comes to the same.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec

from ksi.actors.supervision.reports import read_follower
from ksi.storage.cache import as_json
from ksi.storage.compositions import Composition, CompositionsReader, facets_of
from ksi.transport.identity import run_directory
from ksi.transport.limits import COMPOSITION_BYTES_MAX, ITEMS_MAX, NESTING_MAX

SUFFIXES: Final = (".yaml", ".yml", ".md")
FENCE: Final = "---"


class Rejected(Exception):
    """A file is no composition; the text says why."""


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


def hash_of(content: bytes) -> str:
    """Return what tells one content from another."""
    return sha256(content).hexdigest()


def parse(path: str, content: bytes) -> Composition:
    """Return what the file at `path` says.

    Raises:
        Rejected: it is no composition.
    """
    metadata = read_metadata(path, content)
    kind = metadata.get("component_type") or metadata.get("type")
    missing = [
        word for word, value in (("name", metadata.get("name")), ("type", kind)) if not value
    ]
    if missing:
        raise Rejected(f"it has no {' and no '.join(missing)}")
    inner = metadata.get("metadata")
    strategy = inner.get("loading_strategy") if isinstance(inner, Mapping) else None
    return Composition(
        name=str(metadata["name"]),
        component_type=str(kind),
        version=_text(metadata.get("version")),
        description=_text(metadata.get("description")),
        author=_text(metadata.get("author")),
        extends=_text(metadata.get("extends")),
        loading_strategy=_text(metadata.get("loading_strategy") or strategy),
        metadata=as_json(metadata),
        facets=facets_of(metadata),
    )


def read_metadata(path: str, content: bytes) -> dict[str, Any]:
    """Return what a file says of itself, as plain values. Raises as `parse`."""
    source, _body, first_line = split(path, content)
    loaded = _load(source, first_line)
    if not isinstance(loaded, Mapping):
        raise Rejected("what it says of itself is no mapping of names to values")
    budget = iter(range(ITEMS_MAX))
    plain: dict[str, Any] = _plain(loaded, budget, 0)
    return plain


def split(path: str, content: bytes) -> tuple[str, str, int]:
    """Return the YAML of a file, the text behind it, and the line the YAML begins at.

    Raises:
        Rejected: it is no text, or has no front matter.
    """
    try:
        text = content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Rejected(f"it is no UTF-8: byte {error.start}") from None
    if not path.endswith(".md"):
        return text, "", 1
    lines = text.split("\n")
    if lines[0].rstrip() != FENCE:
        raise Rejected("it has no front matter")
    for number, line in enumerate(lines[1:], 1):
        if line.rstrip() == FENCE:
            return "\n".join(lines[1:number]), "\n".join(lines[number + 1 :]).strip("\n"), 2
    raise Rejected("its front matter has no end")


def _load(source: str, first_line: int) -> Any:
    from ruamel.yaml import YAML  # Only now: most systems have no compositions.
    from ruamel.yaml.error import MarkedYAMLError

    try:
        return YAML(typ="safe", pure=True).load(source)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + first_line}"
        raise Rejected(f"its YAML is malformed{where}: {error.problem or error.context}") from None
    except Exception as error:  # What a parser raises at odd input must not stop the others.
        raise Rejected(f"its YAML is malformed: {str(error)[:200]}") from None


def _plain(value: Any, budget: Iterator[int], depth: int) -> Any:
    """Return a value as JSON can hold it. `budget` bounds how many there may be: an alias repeats
    what it stands for."""
    if next(budget, None) is None:
        raise Rejected(f"it has more than {ITEMS_MAX} values")
    if depth > NESTING_MAX:
        raise Rejected(f"it is nested deeper than {NESTING_MAX}")
    match value:
        case None | bool() | int():
            return value
        case str():
            return _whole(value)
        case float():
            if not math.isfinite(value):
                raise Rejected(f"{value} is no number JSON can hold")
            return value
        case datetime.date():
            return value.isoformat()
        case Mapping():
            return {_key(key): _plain(each, budget, depth + 1) for key, each in value.items()}
        case list() | tuple() | set():
            return [_plain(each, budget, depth + 1) for each in value]
        case _:
            raise Rejected(f"it holds a value of the type {type(value).__name__}")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return _whole(key)
    if isinstance(key, datetime.date):
        return key.isoformat()
    if key is None or isinstance(key, bool | int | float):
        return as_json(key)
    raise Rejected(f"it has a key of the type {type(key).__name__}")


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected("it holds half of a character") from None
    return text


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
