"""`ksi completion SHELL`: the script that makes a shell complete `ksi` words."""

from __future__ import annotations

import os

import click
from click.shell_completion import BashComplete, add_completion_class, get_completion_class
from click.shell_completion import CompletionItem as Item
from click.shell_completion import split_arg_string as split

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
    options: Options = ctx.obj
    of_shell = get_completion_class(shell)
    assert of_shell is not None
    root = ctx.find_root().command
    script = of_shell(root, {}, "ksi", "_KSI_COMPLETE").source()
    if options.json:
        show_json("completion", {"shell": shell, "script": script})
    else:
        print(script)


class OfBash(BashComplete):
    """Bash takes a colon for the end of a word, and operations have colons.

    So we look at the line ourselves, and answer with what bash takes for the last word of it.
    """

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' reply
    reply=$(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" KSI_BREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1")
    COMPREPLY=($reply)
    [[ ${COMPREPLY[0]} == */ ]] && compopt -o nospace
    return 0
}
complete -o default -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split(line)
        begun = words.pop() if words and not line[-1:].isspace() else ""
        self._prefix = len(begun.rpartition(":")[0]) + 1 if ":" in begun else 0
        return words[1:], begun

    def format_completion(self, item: Item) -> str:
        breaks = ":" in os.environ.get("KSI_BREAKS", ":")
        return str(item.value)[self._prefix if breaks else 0 :]


add_completion_class(OfBash)
