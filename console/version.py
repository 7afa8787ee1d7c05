"""`ksi version`: which KSI this is."""

from __future__ import annotations

import sys
from typing import Final

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json

VERSION: Final = "0.1.0"  # setup.cfg takes it from here: to look it up in metadata costs 12 ms


@command("version")
@click.pass_obj
def version(options: Options) -> None:
    """Print the version of KSI."""
    python = ".".join(map(str, sys.version_info[:3]))
    if options.json:
        from ksi.transport.wire import VERSION as PROTOCOL

        show_json("version", {"version": VERSION, "python": python, "protocol": PROTOCOL})
    else:
        print(f"ksi {VERSION} (Python {python})")
