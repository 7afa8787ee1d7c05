"""`ksi config`: the settings in force, and where each comes from."""

from __future__ import annotations

from pathlib import Path

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json, show_table
from ksi.transport.remote import require_here


@command("config")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--defaults", is_flag=True, help="Print the default ksi.toml, every key explained.")
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Another settings file than ksi.toml in the runtime directory.",
)
@click.pass_obj
def config(options: Options, origin: bool, defaults: bool, path: Path | None) -> None:
    """Print the settings in force: flags > KSI_SECTION__KEY > ksi.toml > defaults."""
    from ksi.actors import config as settings

    if defaults:
        text = settings.defaults_text()
        if options.json:
            show_json("config", {"defaults": text})
        else:
            print(text, end="")
        return
    require_here(options.var, "ksi config")
    loaded = settings.load(options.var, path=path)
    values = settings.shown(loaded.config)
    if options.json:
        found = {key: {"value": values[key], "origin": loaded.origin[key]} for key in values}
        show_json("config", {"settings": found})
    elif origin:
        show_table(
            ("KEY", "VALUE", "ORIGIN"), ((k, v, loaded.origin[k]) for k, v in values.items())
        )
    else:
        for key, value in values.items():
            print(f"{key} = {value}")
