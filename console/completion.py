"""`ksi completion SHELL`: the script that makes a shell complete `ksi` words."""

from __future__ import annotations

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json


@command(
    "completion",
    epilog="""\b
Examples:
  ksi completion bash > ~/.local/share/bash-completion/completions/ksi
  ksi completion zsh > "${fpath[1]}/_ksi"
  ksi completion fish > ~/.config/fish/completions/ksi.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: sub-commands, operations and their fields."""
    from click.shell_completion import get_completion_class

    options: Options = ctx.obj
    of_shell = get_completion_class(shell)
    assert of_shell is not None
    root = ctx.find_root().command
    script = of_shell(root, {}, "ksi", "_KSI_COMPLETE").source()
    if options.json:
        show_json("completion", {"shell": shell, "script": script})
    else:
        print(script)
