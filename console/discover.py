"""`ksi discover [PATTERN]`: the operations there are."""

from __future__ import annotations

from fnmatch import fnmatchcase

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json, show_table


@command("discover")
@click.argument("pattern", default="*")
@click.option("--markdown", is_flag=True, help="Print the page docs/operations.md.")
@click.pass_obj
def discover(options: Options, pattern: str, markdown: bool) -> None:
    """List the operations that match PATTERN: a name, `session:*`, or a word in it."""
    from ksi.console.declared import catalogue, summary
    from ksi.console.page import as_page

    wanted = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
    found = [each for name, each in catalogue().items() if fnmatchcase(name, wanted)]
    if markdown:
        print(as_page({each.name: each for each in found}), end="")
    elif options.json:
        operations = [
            {
                "operation": each.name,
                "kind": each.kind,
                "owner": each.owner,
                "roles": sorted(each.roles),
                "far_roles": sorted(each.far_roles),
                "own": each.own,
                "summary": summary(each),
            }
            for each in found
        ]
        show_json("discover", {"operations": operations})
    else:
        rows = [(each.name, each.kind, each.owner, summary(each)) for each in found]
        show_table(("OPERATION", "KIND", "OWNER", "WHAT IT DOES"), rows)
