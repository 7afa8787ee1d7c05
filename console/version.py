"""`ksi version`: which KSI this is."""

from __future__ import annotations

import sys
from importlib import metadata

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json


@command("version")
@click.pass_obj
def version(options: Options) -> None:
    """Print the version of KSI."""
    ours, python = metadata.version("ksi"), ".".join(map(str, sys.version_info[:3]))
    if options.json:
        from ksi.transport.wire import VERSION

        show_json("version", {"version": ours, "python": python, "protocol": VERSION})
    else:
        print(f"ksi {ours} (Python {python})")
