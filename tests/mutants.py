"""Mutants: the system with one promise broken, to see that the test of that promise fails.

The variable `KSI_MUTANT` names one. It is applied in the process of the tests (`conftest.py`) and,
by the fork server, in every owner and follower of a system that a test starts (`system.py`). The
product knows nothing of it: each mutant replaces a function from outside.

`MUTANTS` says of each the test that has to fail, and words of why it fails; `test_mutants.py` runs
them all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

VARIABLE: Final = "KSI_MUTANT"
HERE: Final = Path(__file__).parent


class Mutant(NamedTuple):
    """One broken promise: what breaks it, the test that has to fail, and a pattern of its words."""

    apply: Callable[[], None]
    test: str
    words: str
    is_slow: bool = False


def modules() -> tuple[str, ...]:
    """Return what the fork server of a system has to load beside what children need."""
    return ("mutants:apply",) if os.environ.get(VARIABLE) else ()


def apply() -> None:
    """Break what the variable names, if anything, in this process."""
    name = os.environ.get(VARIABLE)
    if name:
        MUTANTS[name].apply()


def reply_before_commit() -> None:
    """Answers leave while their batch is not on disk yet."""
    from ksi.actors.commit import CommitLoop
    from ksi.actors.host import Host

    carry_out, commit = Host._carry_out, CommitLoop._commit

    def knowing_its_host(self: Any, *arguments: Any) -> None:
        self._loop.say = self._send_all
        carry_out(self, *arguments)

    def committing_late(self: Any, *arguments: Any) -> None:
        if hasattr(self, "say"):
            self.say([*self._outcome.answers])
            self._outcome.answers.clear()
            time.sleep(0.005)
        commit(self, *arguments)

    Host._carry_out = knowing_its_host
    CommitLoop._commit = committing_late


def journal_not_synced() -> None:
    """A record is written and never synced."""
    from ksi.storage import journal

    class Unsynced:
        def __getattr__(self, name: str) -> Any:
            return (lambda _fd: None) if name == "fdatasync" else getattr(os, name)

    journal.os = Unsynced()


def view_trusted_after_a_crash() -> None:
    """A view that was in use when the machine went down is taken for one of this boot."""
    from ksi.storage import store
    from ksi.storage.recovery import Mark

    real = store.read_mark

    def trusting(directory: Path, boot_id: str) -> Mark:
        mark = real(directory, boot_id)
        return Mark.SAME_BOOT if mark is Mark.OTHER_BOOT else mark

    store.read_mark = trusting


def no_duplicate_check() -> None:
    """A command that was carried out is carried out again when it comes again."""
    from ksi.actors.commit import CommitLoop

    real = CommitLoop._carry_out

    def forgetful(self: Any, work: Any, *arguments: Any) -> Any:
        client = self.delivery.client(work.sender.name, work.instance)
        if work.acked < work.request.number <= client.last:
            client.last = work.request.number - 1
        return real(self, work, *arguments)

    CommitLoop._carry_out = forgetful


def request_ids_forgotten() -> None:
    """The id a caller gave a command is kept, and never looked up."""
    from ksi.actors import commit

    commit._has_request_id = lambda _operation: False


def stale_reads() -> None:
    """An owner answers a query again with what it has answered within two seconds."""
    from ksi.actors.host import Host
    from ksi.transport import wire

    real = Host._answer_one
    answered: dict[bytes, tuple[float, wire.Answer]] = {}

    def remembering(self: Any, work: Any, tables: Any) -> wire.Answer:
        now_s = time.monotonic()
        known = answered.get(work.request.body)
        if known is None or now_s - known[0] > 2.0:
            known = answered[work.request.body] = now_s, real(self, work, tables)
        return wire.Answer(work.request.number, known[1].body, known[1].error)

    Host._answer_one = remembering


def bodies_unchecked() -> None:
    """What is no message of the protocol is taken for the fault of the owner."""
    from ksi.transport import message
    from ksi.transport.errors import Invalid

    real = message.Operation._decode

    def trusting(self: Any, decoder: Any, body: Any) -> Any:
        try:
            return real(self, decoder, body)
        except Invalid as refusal:
            raise ValueError(refusal.text) from refusal

    message.Operation._decode = trusting


def sender_believed() -> None:
    """Who speaks is who the body says."""
    from ksi.actors.commit import CommitLoop
    from ksi.actors.owner import Sender

    real = CommitLoop._apply

    def believing(self: Any, command: Any, sender: Any, given: Any) -> Any:
        data = getattr(command, "data", None)
        if isinstance(data, dict) and "sender" in data:
            sender = Sender(data["sender"], sender.role)
        return real(self, command, sender, given)

    CommitLoop._apply = believing


def view_before_journal() -> None:
    """Readers see a batch before it is on disk."""
    from ksi.storage.store import Store

    real = Store.commit

    def early(self: Any, payload: bytes, records: int, extra: bytes, time_s: float) -> Any:
        self.commit_view()
        self.begin()
        return real(self, payload, records, extra, time_s)

    Store.commit = early


def mailbox_without_bound() -> None:
    """A client that reads nothing is kept everything for."""
    from ksi.transport import mailbox

    mailbox.REPLY_FRAMES_MAX = mailbox.REQUEST_FRAMES_MAX = 0


def epoch_unchecked() -> None:
    """Whoever was the owner of a session once goes on writing."""
    from ksi.actors.owners import sessions

    real = sessions._open
    sessions._writable = lambda tables, session_id, _sender, _epoch: real(tables, session_id)


def attempt_unchecked() -> None:
    """What a worker reports counts, whoever has the grant now."""
    from ksi.actors.owners import completion

    real = completion._held

    def lenient(tables: Any, request_id: str, _attempt: int, sender: Any) -> Any:
        request = tables.requests.get(request_id)
        if request is None or request.status != "active":
            return real(tables, request_id, _attempt, sender)
        return request

    completion._held = lenient


def projection_without_offset() -> None:
    """Session files are appended to, wherever a line belongs."""
    from ksi.storage.files import LogWriter

    real = LogWriter.write

    def appending(self: Any, key: str, offset: int, content: bytes) -> None:
        real(self, key, self.size(key), content)

    LogWriter.write = appending


def cut_ignored() -> None:
    """Owners make their cut when they are told of it, not when a message behind it comes."""
    import msgspec

    from ksi.actors import host
    from ksi.transport import wire

    decode = msgspec.msgpack.Decoder(wire.CommandsFrame).decode
    host._decode_requests = lambda payload: msgspec.structs.replace(decode(payload), cut=0)


def prune_before_publish() -> None:
    """Room is made for a checkpoint before it is whole."""
    from ksi.storage import checkpoints

    real = checkpoints.write_files

    def eager(made: Path, files: Any) -> Any:
        checkpoints.prune(made.parent, 4)
        return real(made, files)

    checkpoints.write_files = eager


def checksums_unread() -> None:
    """A damaged row is believed."""
    from ksi.storage.tables import CRC_BYTES, RowCodec

    RowCodec.decode = lambda self, _key, value: self.unpack(value[:-CRC_BYTES])


def newer_format_read() -> None:
    """What a newer version has written is taken for ours."""
    from ksi.storage import format

    format.FORMAT = 1000


def full_disk_believed() -> None:
    """A batch the disk had no room for is taken for written."""
    from ksi.storage.journal import Journal

    Journal._undo = lambda _self, _error: None


def orphans_allowed() -> None:
    """Children are not bound to the life of the supervisor."""
    from ksi.actors.supervision import forking

    forking.die_with = lambda _parent: None


FAULTS: Final = "tests/faults/"
STORM: Final = FAULTS + "test_kill_storm.py::test_two_hundred_kills_lose_double_and_reorder_nothing"
WORLDS: Final = (
    "tests/simulation/test_system.py::test_all_owners_together_do_what_everybody_was_told"
)
POWER: Final = (
    FAULTS + "test_power_loss.py::test_nothing_acknowledged_is_lost_in_any_state_a_power_cut_leaves"
)
CALLS: Final = FAULTS + "test_system_calls.py::test_every_call_is_hit_and_nothing_is_lost"
MUTANTS: Final = {
    "reply-before-commit": Mutant(
        reply_before_commit, STORM, "is lost|was told|returncode", is_slow=True
    ),
    "journal-not-synced": Mutant(
        journal_not_synced, POWER, "lost with the cut|Corrupt|number"
    ),
    "view-trusted-after-a-crash": Mutant(
        view_trusted_after_a_crash, POWER, "Error|Corrupt|SIGBUS"
    ),
    "no-duplicate-check": Mutant(
        no_duplicate_check,
        "tests/simulation/test_delivery.py::"
        "test_commands_happen_once_and_in_order_over_a_network_that_loses_repeats_and_reorders",
        "happened more than once",
    ),
    "no-duplicate-check-between-owners": Mutant(no_duplicate_check, WORLDS, "assert"),
    "request-ids-forgotten": Mutant(
        request_ids_forgotten,
        FAULTS + "test_zombies.py::"
        "test_clients_that_are_killed_and_start_again_have_no_command_carried_out_twice",
        "one was doubled",
        is_slow=True,
    ),
    "stale-reads": Mutant(stale_reads, STORM, "had ended before an earlier one", is_slow=True),
    "epoch-unchecked": Mutant(
        epoch_unchecked,
        FAULTS + "test_zombies.py::"
        "test_writers_that_were_paused_are_refused_once_another_owns_their_sessions",
        "a former owner has written|it was not refused",
        is_slow=True,
    ),
    "attempt-unchecked": Mutant(
        attempt_unchecked,
        "tests/test_completion.py::"
        "test_a_report_is_taken_once_and_from_the_holder_of_the_grant_only",
        "DID NOT RAISE|Error",
    ),
    "orphans-allowed": Mutant(
        orphans_allowed,
        FAULTS + "test_supervisor_kills.py::"
        "test_a_killed_supervisor_leaves_nobody_and_loses_nothing",
        "these are still there",
        is_slow=True,
    ),
    "cut-ignored": Mutant(
        cut_ignored,
        FAULTS + "test_checkpoints.py::"
        "test_a_cut_that_owners_hear_of_one_after_the_other_is_one_cut",
        "an effect without its cause",
    ),
    "prune-before-publish": Mutant(
        prune_before_publish, CALLS + "[checkpoint and prune-killed]", r"len\(whole\) >= KEEP",
        is_slow=True,
    ),
    "projection-without-offset": Mutant(
        projection_without_offset, CALLS + "[projection and archive-killed]", "assert",
        is_slow=True,
    ),
    "bodies-unchecked": Mutant(
        bodies_unchecked,
        FAULTS + "test_fuzz.py::test_no_frame_is_too_strange_for_any_owner",
        "failed",
    ),
    "sender-believed": Mutant(
        sender_believed,
        FAULTS + "test_bad_input.py::"
        "test_the_sender_is_the_key_and_what_the_body_claims_is_data",
        "is written by stranger|NotOwner",
        is_slow=True,
    ),
    "mailbox-without-bound": Mutant(
        mailbox_without_bound,
        FAULTS + "test_bad_input.py::"
        "test_clients_that_stop_reading_cost_their_queues_and_nobody_waits_for_them",
        "grown_mb|assert",
        is_slow=True,
    ),
    "full-disk-believed": Mutant(
        full_disk_believed, CALLS + "[commit-ENOSPC]", "assert", is_slow=True
    ),
    "checksums-unread": Mutant(
        checksums_unread,
        "tests/test_reader.py::test_a_damaged_row_is_reported_and_reading_goes_on",
        "DID NOT RAISE|Error",
    ),
    "newer-format-read": Mutant(
        newer_format_read,
        "tests/test_format.py::test_a_newer_format_is_refused_and_nothing_is_touched",
        "DID NOT RAISE",
    ),
    "view-before-journal": Mutant(
        view_before_journal, CALLS + "[commit-killed]", "assert", is_slow=True
    ),
}  # fmt: skip
