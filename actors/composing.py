"""The text of a composition: what it says of itself, how it is written, and how it is changed.

A composition is a YAML file, or Markdown with YAML between two lines `---` at its beginning. All is
pure: the same text and the same changes give the same text. What was changed by hand stays as it
is where nothing of it is changed, comments too; and what is written is read again before it is
handed out, so that it says what was meant.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, Final

from ksi.transport.limits import COMPOSITION_BYTES_MAX, ITEMS_MAX, NESTING_MAX

SUFFIXES: Final = (".yaml", ".yml", ".md")
FENCE: Final = "---"
PATH_BYTES_MAX: Final = 400  # Below the folder: a key of LMDB has room for 511.
PART_BYTES_MAX: Final = 200  # Of one name in it: 255 are allowed, and one beside it is made of it.
_PATH: Final = re.compile(r"(?:\w[\w. -]*/)*\w[\w. -]*")
# What YAML takes for the end of a line, or may not hold.
_UNSAFE: Final = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
# Where KSI put new ones that were not told where; others go into a folder of their type.
_FOLDERS: Final = {
    "profile": "profiles", "orchestration": "orchestrations", "prompt": "prompts",
    "component": "components", "pattern": "patterns",
}  # fmt: skip


class Rejected(Exception):
    """A text is no composition, or a path none of one; the text says why."""


def hash_of(content: bytes) -> str:
    """Return what tells one content from another."""
    return sha256(content).hexdigest()


def path_of(name: str, kind: str, suffix: str, beside: str | None = None) -> str:
    """Return where a composition is to be: the name where that is a path, a place beside another,
    or one in the folder of its type.

    Raises:
        Rejected: that is no path of a composition below the folder.
    """
    path = name
    if "/" not in name:
        folder = _FOLDERS.get(kind, f"components/{kind}")
        if beside is not None:
            folder = beside.rpartition("/")[0]
        path = f"{folder}/{name}".removeprefix("/")
    if not path.endswith(SUFFIXES):
        path += suffix
    require_path(path)
    return path


def require_path(path: str) -> None:
    """Raise `Rejected` unless a path is one of a composition: it stays below the folder, and none
    of it is hidden.
    """
    parts = path.split("/")
    is_short = len(path.encode()) <= PATH_BYTES_MAX
    if not (
        is_short
        and _PATH.fullmatch(path)
        and path.endswith(SUFFIXES)
        and all(len(part.encode()) <= PART_BYTES_MAX for part in parts)
    ):
        raise Rejected(
            f"{path[:100]!r} is no path of a composition: names of letters, digits and `_.- `, "
            f"between single `/`, none of them hidden, and one of {' '.join(SUFFIXES)} at the end"
        )


def written(path: str, metadata: Mapping[str, Any], text: str = "") -> bytes:
    """Return the content of a file that says `metadata` of itself, and has `text` behind that.

    Raises:
        Rejected: that cannot be written, or is no composition.
    """
    return _anew(path, metadata, f"\n{text}\n" if text else "")


def changed(path: str, content: bytes, metadata: Mapping[str, Any], text: str | None) -> bytes:
    """Return a content that says `metadata` in place of what it said, and has `text` behind it, or
    what it had. Comments and order stay as far as they can.

    Raises:
        Rejected: that cannot be written, or is no composition.
    """
    source, body, _line = _parts(path, content)
    if text is not None:
        body = f"\n{text}\n"
    try:
        loaded = _round_trip().load(source)
        _bring(loaded, metadata)
        return _joined(path, _dumped(loaded), body, metadata)
    except Exception:  # Whatever was odd in it is no more if it is written anew.
        return _anew(path, metadata, body)


def require_composition(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name and the type that a composition gives itself, or raise `Rejected`."""
    name, kind = metadata.get("name"), metadata.get("component_type") or metadata.get("type")
    missing = [word for word, value in (("name", name), ("type", kind)) if not value]
    if missing:
        raise Rejected(f"it has no {' and no '.join(missing)}")
    return str(name), str(kind)


def _anew(path: str, metadata: Mapping[str, Any], body: str) -> bytes:
    try:
        return _joined(path, _dumped(_blocks(metadata)), body, metadata)
    except Rejected:  # JSON is YAML, too, and can hold texts that look like nothing else.
        flow = json.dumps(metadata, ensure_ascii=False, indent=2)
        flow = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", flow)
        return _joined(path, f"{flow}\n", body, metadata)


def _joined(path: str, source: str, body: str, metadata: Mapping[str, Any]) -> bytes:
    text = f"{FENCE}\n{source}{FENCE}\n{body}" if path.endswith(".md") else source
    content = text.encode()
    if len(content) > COMPOSITION_BYTES_MAX:
        raise Rejected(f"it is over {COMPOSITION_BYTES_MAX} bytes")
    require_composition(metadata)
    if _sorted_json(read_metadata(path, content)) != _sorted_json(metadata):
        raise Rejected("what it says of itself cannot be written as YAML")
    return content


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
    source, body, first_line = _parts(path, content)
    return source, body.strip("\n"), first_line


def _parts(path: str, content: bytes) -> tuple[str, str, int]:
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
            return "\n".join(lines[1:number]), "\n".join(lines[number + 1 :]), 2
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
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if key is None or isinstance(key, bool | int | float):
        return json.dumps(key)
    raise Rejected(f"it has a key of the type {type(key).__name__}")


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected("it holds half of a character") from None
    return text


def _round_trip() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(pure=True)
    yaml.preserve_quotes = True
    yaml.width = 1 << 20
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _dumped(value: Any) -> str:
    stream = io.StringIO()
    _round_trip().dump(value, stream)
    return stream.getvalue()


def _blocks(value: Any) -> Any:
    """Return a value whose texts of several lines are written as such."""
    if isinstance(value, Mapping):
        return {key: _blocks(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_blocks(each) for each in value]
    if isinstance(value, str) and "\n" in value:
        from ruamel.yaml.scalarstring import LiteralScalarString

        return LiteralScalarString(value)
    return value


def _bring(loaded: Any, wanted: Mapping[str, Any]) -> None:
    """Make a loaded mapping say what is wanted; what it says already stays as it is."""
    keys = {_key(key): key for key in loaded}
    for name in keys.keys() - wanted.keys():
        del loaded[keys[name]]
    for name, value in wanted.items():
        known = loaded.get(keys.get(name, name)) if name in keys else None
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            _bring(known, value)
        elif name not in keys or not _is_same(known, value):
            loaded[keys.get(name, name)] = _blocks(value)


def _is_same(known: Any, value: Any) -> bool:
    try:
        return _sorted_json(_plain(known, iter(range(ITEMS_MAX)), 0)) == _sorted_json(value)
    except Rejected:
        return False


def _sorted_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
