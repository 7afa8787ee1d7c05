"""The `ksi` command: finds the sub-command, and turns errors into words and exit codes.

Sub-commands live in one file each and are imported when they are used, and they import what costs
time where they use it: a shell waits for every millisecond of it.

Exit codes: 0 fine; 1 failed, or `status`: degraded; 2 usage; 3 not running; 4 no answer;
5 conflict; 6 not found; 75 try later; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import click

from ksi.console.__main__ import EXIT_INTERRUPTED
from ksi.console.options import Failed, Group, Options, group
from ksi.transport.errors import KsiError

SUBCOMMANDS: Final = (
    "start", "stop", "restart", "dev", "status", "ps", "logs", "events", "observe",
    "ask", "read", "send", "subscribe", "discover", "help",
    "agents", "sessions", "state", "queue", "worker", "index", "archive", "mcp",
    "conversations", "import", "compositions",
    "checkpoint", "restore",
    "config", "doctor", "completion", "demo", "version",
)  # fmt: skip
ALIASES: Final = {"agent": "agents", "session": "sessions"}
PLACES: Final = {"import": "imports"}  # What Python has another use for.

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_READER: Final = 141  # 128 + SIGPIPE

# What to type next, where the error itself does not say it.
HINTS: Final = {
    "not_running": "ksi start",
    "unavailable": "ksi status shows whether its owner runs",
    "busy": "nothing was changed: try again",
    "draining": "nothing was changed: try again",
    "storage_full": "nothing was changed: make room, then try again; ksi status shows how much",
    "invalid": "ksi help explains operations and sub-commands",
    "forbidden": "ksi help OPERATION says who may; --as NAME says who you are",
    "not_owner": "ksi sessions show SESSION names who writes it",
    "stale_epoch": "ksi sessions show SESSION names the present epoch",
    "not_found": "ksi sessions list, ksi agents list",
    "internal": "ksi logs --level error",
}


class Subcommands(Group):
    """The sub-commands by name, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in SUBCOMMANDS:
            return None
        place = PLACES.get(name, name)
        found: click.Command = getattr(import_module(f"ksi.console.{place}"), place)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would call it a failure.
            return _unread()


@group(
    "ksi",
    cls=Subcommands,
    epilog="""\b
Examples:
  ksi start
  ksi ask session:create --session-id plan
  ksi ask session:append --session-id plan --event note --data '{"text": "hi"}'
  ksi read session:history --session-id plan
  ksi status
  ksi stop""",
)
def ksi() -> None:
    """The state system under a group of LLM agents: one owner, one mailbox, one writer.

    A command changes state and its reply means: it is on disk. A read sends no message.
    `ksi help` explains sub-commands, `ksi discover` lists the operations that `ask`, `read` and
    `send` take, and `ksi help OPERATION` explains one.
    """


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Prints every error, raises none."""
    words = sys.argv[1:] if words is None else words
    options = Options(json="--json" in words)  # now: what stands before it may be in error
    if "_KSI_COMPLETE" in os.environ:
        import_module("ksi.console.completion")  # bash needs ours, not click's
    try:
        code = ksi.main(words, prog_name="ksi", standalone_mode=False, obj=options)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KsiError as error:
        return _report(options, error.exit_code, error.code, error.text, error.hint, error.details)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "ksi"
        return _report(options, EXIT_USAGE, "usage", error.format_message(), f"{path} --help")
    except Failed as error:
        return _report(options, EXIT_FAILED, "failed", error.message, error.hint)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _unread()
    except OSError as error:
        return _report(options, EXIT_FAILED, "failed", str(error), None)
    except Exception as error:
        if os.environ.get("KSI_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}"
        hint = "this is a defect of ksi; KSI_DEBUG=1 shows where"
        return _report(options, EXIT_FAILED, "internal", text, hint)


def _unread() -> int:
    """Say nothing more: whoever read our output has seen enough. Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_NO_READER


def _report(
    options: Options,
    exit_code: int,
    code: str,
    text: str,
    hint: str | None,
    details: dict[str, Any] | None = None,
) -> int:
    hint = hint or HINTS.get(code) or "ksi --help"
    sys.stdout.flush()
    print(f"ksi: {code}: {text}\n  {hint}", file=sys.stderr)
    if options.json:
        from ksi.console.show import show_json

        fields = {"code": code, "text": text, "hint": hint, "details": details or {}}
        show_json("error", fields)
    return exit_code
