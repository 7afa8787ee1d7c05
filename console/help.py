"""`ksi help [OPERATION | SUB-COMMAND]`: explains one, from its declaration."""

from __future__ import annotations

import click

from ksi.console.options import Options, command
from ksi.console.show import show_json, show_table
from ksi.transport.message import Operation


def _names(ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    from ksi.console.declared import catalogue

    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    known = [*root.command.list_commands(root), *catalogue()]
    return [name for name in known if name.startswith(begun)]


@command("help")
@click.argument("name", required=False, shell_complete=_names)
@click.pass_context
def help(ctx: click.Context, name: str | None) -> None:
    """Explain an operation, or a sub-command of ksi."""
    options: Options = ctx.obj
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    if name is None or ":" not in name:
        explained = root.command if name is None else root.command.get_command(root, name)
        if explained is not None:
            inner = root if name is None else click.Context(explained, root, name, obj=options)
            _show_subcommand(options, inner)
            return
    from ksi.console.declared import catalogue, declaration
    from ksi.transport.message import unknown

    operations = catalogue()
    found = operations.get(name or "")
    if found is None:
        raise unknown(name or "", [*operations, *root.command.list_commands(root)])
    if options.json:
        show_json("help", declaration(found))
    else:
        _show_operation(found)


def _show_subcommand(options: Options, ctx: click.Context) -> None:
    text = ctx.get_help()
    if options.json:
        show_json("help", {"command": ctx.command_path, "text": text})
    else:
        print(text)


def _show_operation(operation: Operation) -> None:
    from ksi.console import declared as words

    who = words.audience(operation)
    print(f"{operation.name}: a {operation.kind} of {operation.owner}, for {who}\n")
    if operation.same_as is not None:
        print(f"{words.summary(operation)}\n")
    print(operation.doc.replace("\n    ", "\n"))
    fields = [
        (
            words.flag(each.encode_name),
            words.default_words(each) or "required",
            words.type_words(each.type),
        )
        for each in words.fields_of(operation)
    ]
    if fields:
        print()
        show_table(("FIELD", "DEFAULT", "TYPE"), fields)
    if older := words.older_words(operation):
        print(f"\nAlso taken: {older}.")
    print()
    show_table(("REPLY", "TYPE"), words.reply_rows(operation))
    print()
    show_table(("REFUSES", "MEANS"), words.refusals(operation).items())
    print(f"\nExample:\n  {words.example(operation)}")
