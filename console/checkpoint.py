"""`ksi checkpoint`: the states of all owners that are kept whole, to start from again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ksi.console.options import DURATION, Failed, Options, group
from ksi.console.show import instant, show_json, show_table, size

if TYPE_CHECKING:
    from ksi.actors.supervision.system import CheckpointList

CREATE_S: Final = 30.0  # A system of gigabytes takes longer; it goes on without us.
LOOK_S: Final = 0.01  # How often is looked whether one is made.
EXIT_DAMAGED: Final = 1  # `verify` found a checkpoint that is not what it was.


@group("checkpoint", invoke_without_command=True)
@click.pass_context
def checkpoint(ctx: click.Context) -> None:
    """Make, list and verify checkpoints: one consistent state of all owners each."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_checkpoints)


@checkpoint.command("create")
@click.option("--timeout", type=DURATION, default=CREATE_S, help="How long to wait. [30s]")
@click.pass_obj
def create(options: Options, timeout: float) -> None:
    """Make a checkpoint while everything runs, and wait until it is whole."""
    options.require_running()
    begun_s = time.monotonic()
    with options.client() as client:
        checkpoint_id = client.ask("checkpoint:create")["id"]
        while True:
            now = client.ask("checkpoint:list")
            if now["making"] != checkpoint_id:  # Whole, and another may be asked for.
                break
            if time.monotonic() - begun_s > timeout:
                text = f"the checkpoint {checkpoint_id} is not whole after {timeout:g} s"
                raise Failed(text, hint=f"ksi{options.words()} checkpoint list")
            time.sleep(LOOK_S)  # A poll that ends.
    made = [each for each in now["checkpoints"] if each["id"] == checkpoint_id]
    if not made:
        why = now["failed"] if now["failed_id"] == checkpoint_id else "it ended"
        raise Failed(f"no checkpoint was made: {why}", hint=f"ksi{options.words()} logs checkpoint")
    seconds = round(time.monotonic() - begun_s, 3)
    if options.json:
        show_json("checkpoint", {**made[0], "seconds": seconds})
    else:
        print(f"{checkpoint_id} in {seconds:.2f} s, {size(made[0]['data_bytes'])}")


@checkpoint.command("list")
@click.pass_obj
def list_checkpoints(options: Options) -> None:
    """List the whole checkpoints, the newest first. Sends no message."""
    found = _listed(options)
    if options.json:
        show_json("checkpoint.list", msgspec.to_builtins(found))
        return
    rows = (
        (
            each.id,
            instant(each.created_at),
            each.reason,
            sum(owner.seq for owner in each.owners),
            each.files,
            size(each.data_bytes),
        )
        for each in found.checkpoints
    )
    show_table(("CHECKPOINT", "AT", "REASON", "RECORDS", "SESSION FILES", "SIZE"), rows)
    if found.failed is not None:
        click.echo(f"{found.failed_id} failed: {found.failed}", err=True)


@checkpoint.command("show")
@click.argument("checkpoint_id", metavar="[ID]", default="latest")
@click.pass_obj
def show(options: Options, checkpoint_id: str) -> None:
    """Show what a checkpoint holds of each owner, by default the newest. Sends no message."""
    from ksi.actors.supervision.checkpointed import find

    found = find(options.var, checkpoint_id)
    if options.json:
        show_json("checkpoint", msgspec.to_builtins(found))
        return
    print(f"{found.id}, number {found.number}, {instant(found.created_at)}, {found.reason}")
    print(f"{found.files} session files with {size(found.files_bytes)}\n")
    rows = (
        (each.owner, each.store_id, each.seq, each.segment, each.offset, size(each.data_bytes))
        for each in found.owners
    )
    show_table(("OWNER", "STORE", "SEQ", "SEGMENT", "OFFSET", "SIZE"), rows)


@checkpoint.command("verify")
@click.argument("checkpoint_id", metavar="[ID]", required=False)
@click.pass_obj
def verify(options: Options, checkpoint_id: str | None) -> int:
    """Read all of a checkpoint, or of every one, and compare checksums. Exit 1 if damaged."""
    from ksi.actors.supervision.checkpointed import find
    from ksi.actors.supervision.checkpointed import verify as compare
    from ksi.transport.errors import KsiError, NotFound

    if checkpoint_id is None:
        wanted = [each.id for each in _listed(options).checkpoints]
    else:
        wanted = [find(options.var, checkpoint_id).id]
    found: list[dict[str, Any]] = []
    for each in wanted:
        try:
            compare(options.var, each)
        except NotFound:
            continue  # It has just been replaced by a newer one.
        except KsiError as error:
            found.append({"id": each, "good": False, "reason": error.text})
        else:
            found.append({"id": each, "good": True, "reason": None})
    if options.json:
        show_json("checkpoint.verify", {"checkpoints": found})
    else:
        for one in found:
            print(f"{one['id']}  {'good' if one['good'] else one['reason']}")
    return 0 if all(one["good"] for one in found) else EXIT_DAMAGED


@checkpoint.command("prune")
@click.option("--keep", type=click.IntRange(min=1), default=5, show_default=True)
@click.pass_obj
def prune(options: Options, keep: int) -> None:
    """Remove all but the newest whole checkpoints."""
    from ksi.actors.supervision.checkpointed import prune as remove
    from ksi.actors.supervision.lock import holder
    from ksi.transport.remote import is_remote

    if is_remote(options.var) or holder(options.var) is not None:
        with options.client() as client:
            removed = client.ask("checkpoint:prune", keep=keep)["removed"]
    else:
        removed = remove(options.var, keep)
    if options.json:
        show_json("checkpoint.prune", {"removed": removed})
    else:
        print(f"{len(removed)} removed" + "".join(f"\n  {each}" for each in removed))


def _listed(options: Options) -> CheckpointList:
    from ksi.actors.supervision.checkpointed import listed
    from ksi.transport.remote import require_here

    require_here(options.var, "ksi checkpoint")
    return listed(options.var, options.var / "run")
