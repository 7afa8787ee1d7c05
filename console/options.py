"""What every sub-command takes: `--var`, `--as` and `--json`, before it or after it."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.transport.errors import Invalid, NotRunning
from ksi.transport.moments import moment, span_s
from ksi.transport.remote import is_remote

if TYPE_CHECKING:
    from ksi.transport.client import Client

OPERATOR: Final = "operator"  # who speaks unless --as or KSI_AGENT says otherwise


def _usual_var() -> Path:
    return Path(os.environ.get("KSI_VAR") or "var").absolute()


class Failed(click.ClickException):
    """What was asked was tried and has failed: the text says how, the hint what to type next."""

    def __init__(self, text: str, *, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass(slots=True)
class Options:
    """The common options of one call."""

    var: Path = field(default_factory=_usual_var)
    identity: str | None = field(default_factory=lambda: os.environ.get("KSI_AGENT") or None)
    json: bool = False

    def client(self) -> Client:
        """Return a client of this identity; the role of the default one is operator.

        From another machine the default is the only name whose key was carried there.

        Raises:
            NotRunning: nothing has ever run on this var.
        """
        from ksi.transport.client import Client

        if self.identity is None and not is_remote(self.var):
            return Client(OPERATOR, var=self.var, role="operator")
        return Client(self.identity, var=self.var)

    def require_running(self) -> None:
        """Raise `NotRunning` unless a supervisor holds the var directory.

        From another machine only a connection can tell.
        """
        from ksi.actors.supervision.lock import holder

        if not is_remote(self.var) and holder(self.var) is None:
            raise NotRunning(f"no supervisor runs on {self.var}", hint=f"ksi{self.words()} start")

    def words(self) -> str:
        """Return what must stand after `ksi` for a command line to mean the same directory."""
        from shlex import quote

        return "" if self.var == _usual_var() else f" --var {quote(str(self.var))}"


class Duration(click.ParamType[float]):
    """Seconds, or a number with a unit: 5, 300ms, 5s, 10m, 2h, 1d."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float):
            return value
        seconds = span_s(str(value))
        if seconds is None:
            self.fail(f"{value!r} is no duration (300ms, 5s, 10m, 2h, 1d)", param, ctx)
        return seconds


class Moment(click.ParamType[float]):
    """Seconds since the epoch; as text so long ago, or an ISO date or time."""

    name = "moment"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            return moment(value, now=time.time())
        except Invalid as refusal:
            self.fail(f"{value!r} is no time ({refusal.hint})", param, ctx)


DURATION: Final = Duration()
MOMENT: Final = Moment()
SINCE: Final = "Only the latest: 30s, 5m, 2h, 1d; or from a date or time on."


def _keep(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if isinstance(value, Path):
            value = value.absolute()  # What we say of it must hold in any directory.
        if value:  # only if given here: it may have been given before the sub-command
            setattr(ctx.ensure_object(Options), name, value)

    return keep


def _common() -> list[click.Parameter]:
    return [
        click.Option(
            ["--var"],
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            expose_value=False,
            callback=_keep("var"),
            help="The runtime directory. [KSI_VAR, or ./var]",
        ),
        click.Option(
            ["--as", "identity"],
            metavar="NAME",
            expose_value=False,
            callback=_keep("identity"),
            help="Who speaks. [KSI_AGENT, or the operator]",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_keep("json"),
            help="Print one JSON object.",
        ),
    ]


class Command(click.Command):
    """A sub-command with the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common()


class Group(click.Group):
    """A sub-command of sub-commands, with the common options."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise self.unknown(ctx, args[0])
        return super().resolve_command(ctx, args)

    def unknown(self, ctx: click.Context, name: str) -> Exception:
        """Return the error for a sub-command that does not exist; it names the nearest."""
        return click.UsageError(
            f"there is no {ctx.command_path} {name}{nearest(name, self.list_commands(ctx))}", ctx
        )


def confirm(what: str, *, yes: bool) -> None:
    """Ask before something final; without a terminal, `--yes` must say it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"to {what} is final: say --yes")
    click.confirm(f"{what}, for good?", abort=True, err=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean X?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def command(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a sub-command."""
    return click.command(name, cls=Command, **_with_help(attributes))


def group(
    name: str, *, cls: type[Group] = Group, **attributes: Any
) -> Callable[[Callable[..., Any]], Group]:
    """Make a function a group of sub-commands."""
    return click.group(name, cls=cls, **_with_help(attributes))


def _with_help(attributes: dict[str, Any]) -> dict[str, Any]:
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    return attributes | {"context_settings": settings | attributes.get("context_settings", {})}
