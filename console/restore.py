"""`ksi restore`: start again from a checkpoint. Nothing is overwritten."""

from __future__ import annotations

import sys
from typing import Final

import click
import msgspec

from ksi.console.options import Options, command
from ksi.console.show import instant, show_json
from ksi.transport.remote import require_here

SHOWN: Final = 5  # Sessions named; --json names all.


@command("restore")
@click.argument("checkpoint_id", metavar="[ID]", default="latest")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.pass_obj
def restore(options: Options, checkpoint_id: str, dry_run: bool) -> None:
    """Give every owner a new store with its state in a checkpoint, by default the newest good one.

    The system has to be stopped. Former stores stay, and session files that are longer than in the
    checkpoint are kept in `archive/before-restore-<id>/` first. Clients are told `restored`.
    """
    from ksi.actors import restoring

    require_here(options.var, "ksi restore")
    done = (restoring.plan if dry_run else restoring.run)(options.var, checkpoint_id)
    for name, why in done.damaged.items():
        print(f"{name} is damaged and was passed over: {why}", file=sys.stderr)
    if options.json:
        shown = {**msgspec.to_builtins(done), "dry_run": dry_run, "changed": not done.is_nothing}
        show_json("restore", shown)
        return
    would = "would be " if dry_run else ""
    print(f"checkpoint {done.id} of {instant(done.created_at)}")
    for owner, seq in done.owners.items():
        print(f"  {owner:<12} {would}restored, up to number {seq}")
    for owner in done.unchanged:
        print(f"  {owner:<12} is as the checkpoint has it")
    aside = len(done.shortened) + len(done.removed)
    if aside:
        print(f"  {aside} session files {would}kept in archive/{done.aside}")
    if done.returned:
        print(f"  {len(done.returned)} session files {would}taken back: a restore kept them aside")
    if done.missing:
        print(f"  {len(done.missing)} session files lack what the checkpoint knows of")
    if done.queued:
        print(f"  {sum(done.queued.values())} requests wait on, in order: {_some(done.queued)}")
    if done.interrupted:
        fate = "wait again" if done.rule == "retry" else "fail with the reason daemon_restart"
        print(f"  {len(done.interrupted)} were running and will {fate} at the next start")
    if not dry_run:
        print(f"  ksi{options.words()} start", file=sys.stderr)


def _some(waiting: dict[str, int]) -> str:
    """Return the first sessions in which requests wait, in words."""
    shown = [f"{session_id} {count}" for session_id, count in [*waiting.items()][:SHOWN]]
    return ", ".join(shown) + (", ..." if len(waiting) > SHOWN else "")
