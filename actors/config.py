"""Configuration: `ksi.toml`, typed, with the origin of every value.

Precedence: flags > `KSI_SECTION__KEY` in the environment > the file > the defaults. The file is
`<var>/ksi.toml`, or the one `KSI_CONFIG` names. An unknown key or a value of the wrong type or
range is refused with its place and, for a key, the nearest that exists. Nothing is guessed and
nothing ignored.

The declarations below are the only list of keys: validation, the commented default file
(`ksi config --defaults`) and the origins come from them.
"""

from __future__ import annotations

import difflib
import os
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import msgspec

from ksi.actors.log import Level
from ksi.actors.owner import Interrupted
from ksi.transport.errors import Invalid
from ksi.transport.limits import HUNG_COMMIT_S, HUNG_TURN_S, SNAPSHOT_JOURNAL_BYTES

FILE_NAME: Final = "ksi.toml"
FILE_VARIABLE: Final = "KSI_CONFIG"  # names another file
FILE_BYTES_MAX: Final = 1 << 20  # A configuration larger than this is another file.


def _key(reason: str, danger: str, unit: str, ge: float, le: float) -> msgspec.Meta:
    return msgspec.Meta(ge=ge, le=le, extra={"unit": unit, "reason": reason, "danger": danger})


def _seconds(reason: str, danger: str, ge: float = 0.0, le: float = 3600.0) -> msgspec.Meta:
    return _key(reason, danger, "seconds", ge, le)


# fmt: off
class SupervisorSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When children are restarted, and when they are taken for dead."""

    intensity: Annotated[int, _key(
        "with more restarts of owners than this within period_s the supervisor gives up: it stops "
        "everything, says why and exits 1",
        "0 gives up at the first crash; a large number hides a crash loop",
        "restarts", 0, 1_000_000,
    )] = 5
    period_s: Annotated[float, _seconds(
        "the sliding window of intensity: 5 in 10 s is a burst of five, or one in two seconds",
        "a short one never gives up on a child that takes longer than that to crash",
        0.1, 86_400,
    )] = 10.0
    agent_intensity: Annotated[int, _key(
        "the same for each supervised agent, which then is FATAL while everything else goes on",
        "a crash loop of an agent that calls a paid model costs money",
        "restarts", 0, 1_000_000,
    )] = 5
    agent_period_s: Annotated[float, _seconds(
        "the sliding window of agent_intensity", "as period_s", 0.1, 86_400,
    )] = 60.0
    backoff_first_s: Annotated[float, _seconds(
        "the first restart in a period comes at once, the second after this, then ever doubled",
        "0 restarts as fast as the machine can",
    )] = 0.05
    backoff_max_s: Annotated[float, _seconds(
        "the longest wait before a restart", "the clients of an owner wait as long",
    )] = 2.0
    start_s: Annotated[float, _seconds(
        "a child that is neither ready nor has a turn for this long is killed",
        "shorter than the replay of a journal, and its owner never comes up",
        0.1,
    )] = 60.0
    shutdown_s: Annotated[float, _seconds(
        "how long a child may take to stop after SIGTERM; then it is killed",
        "0 kills at once: nothing acknowledged is lost, but the next start has to replay",
    )] = 5.0
    hung_turn_s: Annotated[float, _seconds(
        "an owner without a turn of its loop for this long is killed and restarted",
        "below 1 s a busy machine looks like a hung owner",
        0.2, 86_400,
    )] = HUNG_TURN_S
    hung_commit_s: Annotated[float, _seconds(
        "the same while it commits: a slow disk is no hung owner",
        "killing an owner does not make its disk faster",
        0.2, 86_400,
    )] = HUNG_COMMIT_S


class TransportSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where owners listen for other machines. Taken up when the system is started."""

    tcp_host: Annotated[str, msgspec.Meta(max_length=255, extra={
        "reason": "an IP address or an interface of this machine, 0.0.0.0 for all; empty: no tcp",
        "danger": "only enrolled keys are let in, but who has one of role agent or operator can "
        "run programs on this machine (agent:spawn); a worker cannot",
        "unit": "address",
    })] = ""
    tcp_port: Annotated[int, _key(
        "the first port: each owner has one, in the order of `ksi status`, and keeps it",
        "keys that were carried to other machines name it; from 32768 on the kernel gives ports "
        "away to others",
        "port", 1, 65_000,
    )] = 7340


class CheckpointSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When checkpoints are made beside those of each orderly stop."""

    every_s: Annotated[float, _seconds(
        "one is made when the last is this old and something has changed; 0: never by time",
        "only what a checkpoint holds can be restored when files of var/db are lost",
        0.0, 31 * 86_400,
    )] = 3600.0
    journal_bytes: Annotated[int, _key(
        "one is made when the journals have grown by this much: what a start after a crash of the "
        "machine has to replay, and what journals take on the disk",
        "a small one makes checkpoints all the time",
        "bytes", 16 << 20, SNAPSHOT_JOURNAL_BYTES,
    )] = SNAPSHOT_JOURNAL_BYTES
    keep: Annotated[int, _key(
        "so many whole ones are kept, the newest",
        "with 1 there is nothing to fall back to when it is damaged",
        "checkpoints", 1, 10_000,
    )] = 5
    former_s: Annotated[float, _seconds(
        "stores that a restore has replaced, and views that recovery has set aside, are removed "
        "when nothing was written to them for this long and no checkpoint is of them",
        "what came after the checkpoint that was restored is then only in archive/before-restore-*",
        0.0, 366 * 86_400,
    )] = 7 * 86_400.0
    interrupted: Annotated[Interrupted, msgspec.Meta(extra={
        "reason": "what becomes of requests that were running in a checkpoint that is restored: "
        "they wait again in their place, or end as failed with the reason daemon_restart",
        "danger": "retry calls the model again for what may have been answered since",
        "unit": "retry or fail",
    })] = "retry"


class CompositionsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where compositions are. Taken up when the library is started."""

    folder: Annotated[str, msgspec.Meta(min_length=1, max_length=4096, extra={
        "reason": "the folder whose YAML and Markdown files are indexed; a path below var, unless "
        "it begins with /",
        "danger": "all of its files can be read by every agent",
        "unit": "path",
    })] = "lib/compositions"
    exclude: Annotated[str, msgspec.Meta(max_length=4096, extra={
        "reason": "files whose path holds one of these words are left out; hidden ones are, too",
        "danger": "empty, and examples that are malformed on purpose are reported",
        "unit": "words",
    })] = "_archive/tests/ README .git/"


class EventsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The event log in var/logs/events. Taken up when the system is started."""

    keep_days: Annotated[int, _key(
        "days older than this are compressed into the archive, whole ones, in UTC",
        "queries do not find what is in the archive: ksi archive restore has a day back",
        "days", 1, 1000,
    )] = 30
    archive_days: Annotated[int, _key(
        "days older than this are removed from the archive",
        "what is removed is gone: sessions keep what was said, journals what is, nothing what was",
        "days", 1, 100_000,
    )] = 365


class LogSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operational log in var/logs/ksi."""

    level: Annotated[Level, msgspec.Meta(extra={
        "reason": "info is a line for each start, restart and stop",
        "danger": "debug writes a line a batch: megabytes a minute under load",
        "unit": "debug, info, warning or error",
    })] = "info"
# fmt: on


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of one var directory."""

    supervisor: SupervisorSection = SupervisorSection()
    transport: TransportSection = TransportSection()
    checkpoint: CheckpointSection = CheckpointSection()
    compositions: CompositionsSection = CompositionsSection()
    events: EventsSection = EventsSection()
    log: LogSection = LogSection()


Origin = str  # "default", "file <path>", "environment KSI_…" or "flag"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for each `section.key` where its value came from."""

    config: Config
    origin: Mapping[str, Origin]


def load(
    var: Path,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> Loaded:
    """Return the settings of `var`.

    Args:
        flags: `section.key` to value; a text is read as the key's type.
        environment: instead of `os.environ`.
        path: the file; it must exist, as one named by `KSI_CONFIG` must.

    Raises:
        Invalid: an unknown key, an illegal value, or a file that is no TOML.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    origin = dict.fromkeys(_declared(), "default")
    if path is None and FILE_VARIABLE in environment:
        path = Path(environment[FILE_VARIABLE])
    file = path or var / FILE_NAME
    sources = (
        (_from_file(file, required=path is not None), f"file {file}"),
        (_from_environment(environment), "environment"),
        (dict(flags or {}), "flag"),
    )
    for found, source in sources:
        for key, value in found.items():
            place = f"{source} {_variable(key)}" if source == "environment" else source
            values[key] = _checked(key, value, place)
            origin[key] = place
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return Loaded(msgspec.convert(nested, Config), origin)


def warm() -> None:
    """Work out the types of settings: the fork server does it once for all who load them."""
    shown(msgspec.convert({}, Config))


def as_environment(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return flags as variables, so that children see the settings their supervisor was given."""
    return {_variable(key): str(value) for key, value in flags.items()}


def shown(config: Config) -> dict[str, Any]:
    """Return `section.key` to value, in the order of declaration."""
    return {
        key: getattr(getattr(config, section), name)
        for key in _declared()
        for section, _, name in [key.partition(".")]
    }


def defaults_text() -> str:
    """Return the default `ksi.toml`: every key commented out, with unit, reason and danger."""
    lines = [
        "# KSI settings. Every key is shown with its default.",
        "# Precedence: flags > KSI_SECTION__KEY > this file > defaults; `ksi config --origin` says",
        "# where a value came from.",
    ]
    for section, struct in _sections():
        lines += ["", f"[{section}]  # {_first_line(struct)}"]
        for field in msgspec.structs.fields(struct):
            extra = _meta(field.type).extra or {}
            lines += ["", *_comment(extra["reason"]), f"# unit: {extra['unit']}"]
            lines += _comment(f"careful: {extra['danger']}")
            lines.append(f"# {field.name} = {_toml(field.default)}")
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[msgspec.Struct]]]:
    for field in msgspec.structs.fields(Config):
        yield field.name, field.type


@cache
def _declared() -> Mapping[str, Any]:
    """Return `section.key` to its annotated type."""
    return {
        f"{section}.{name}": hint
        for section, struct in _sections()
        for name, hint in get_type_hints(struct, include_extras=True).items()
    }


def _checked(key: str, value: Any, place: str) -> Any:
    declared = _declared()
    if key not in declared:
        near = difflib.get_close_matches(key, declared, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "ksi config --defaults lists all keys"
        raise Invalid(f"{place}: there is no setting {key!r}"[:500], hint=hint)
    try:
        return msgspec.convert(value, declared[key], strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        text = f"{place}: {key} = {value!r}: {error}"
        raise Invalid(text[:500], hint="ksi config --defaults says what is legal") from None


def _from_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if required:
            raise Invalid(f"there is no configuration file {path}") from None
        return {}
    except OSError as error:
        raise Invalid(f"the configuration {path} cannot be read: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise Invalid(f"the configuration {path} has {len(content)} bytes")
    try:
        parsed = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"the configuration {path} is no TOML: {error}") from None
    flat: dict[str, Any] = {}
    for section, keys in parsed.items():
        if isinstance(keys, dict):
            flat |= {f"{section}.{name}": value for name, value in keys.items()}
            if not keys and section not in dict(_sections()):
                flat[section] = keys
        else:
            flat[section] = keys
    return flat


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings among the variables: `KSI_` names with two underscores inside."""
    return {
        name.removeprefix("KSI_").lower().replace("__", ".", 1): value
        for name, value in environment.items()
        if name.startswith("KSI_") and "__" in name
    }


def _variable(key: str) -> str:
    return "KSI_" + key.replace(".", "__").upper()


def _meta(annotated: Any) -> msgspec.Meta:
    assert get_origin(annotated) is Annotated
    meta = get_args(annotated)[1]
    assert isinstance(meta, msgspec.Meta)
    return meta


def _first_line(struct: type) -> str:
    return (struct.__doc__ or "").strip().splitlines()[0]


def _comment(words: str) -> list[str]:
    return textwrap.wrap(words, 96, initial_indent="# ", subsequent_indent="#   ")


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
