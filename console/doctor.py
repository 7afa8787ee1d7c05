"""`ksi doctor`: whether all that is on disk fits together, and what KSI stands on holds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from ksi.console.options import Options, command
from ksi.console.show import clean, show_json
from ksi.transport.remote import require_here

if TYPE_CHECKING:
    from ksi.actors.checkup import Check

EXIT_WRONG: Final = 1


@command("doctor")
@click.option("--repair", is_flag=True, help="Mend what can be mended without losing anything.")
@click.pass_obj
def doctor(options: Options, repair: bool) -> int:
    """Check what is on disk and what it is on, a line each, with the command to type.

    Compares journals, views, session files and the index with each other. It works while the system
    runs, which goes on meanwhile, and with everything stopped. Exit codes: 0 all is well or was
    repaired, 1 something is wrong.
    """
    from ksi.actors.checkup import Checkup

    require_here(options.var, "ksi doctor")
    checkup = Checkup(options.var, ksi="ksi" + options.words(), ask=_asker(options))
    checks = []
    for check in checkup.run(repair=repair):
        checks.append(check)
        if not options.json:
            _print(check)
    is_well = all(check.state != "wrong" for check in checks)
    if options.json:
        import msgspec

        found = msgspec.to_builtins(checks)
        running = checkup.is_running
        show_json("doctor", {"healthy": is_well, "running": running, "checks": found})
    return 0 if is_well else EXIT_WRONG


def _asker(options: Options) -> Any:
    def ask(operation: str, **fields: Any) -> dict[str, Any]:
        with options.client() as client:
            return client.ask(operation, fields)

    return ask


def _print(check: Check) -> None:
    print(f"{check.state:<9} {check.name:<14} {clean(check.text)}")
    for finding in check.findings:
        done = "repaired: " if finding.repaired else ""
        print(f"  {done}{clean(finding.text)}")
        if not finding.repaired:
            print(f"    {clean(finding.command)}")
    sys.stdout.flush()
