"""The owner `editing` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/editing.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec

from ksi.actors.owner import Command, Event, Query, Reply
from ksi.transport.errors import Busy, Conflict, Invalid, NotFound
from ksi.transport.limits import COMPOSITION_BYTES_MAX
from ksi.transport.message import Id, Plain, Text, operation

NAMES_MAX: Final = 100  # Of one list in a composition.
Names = Annotated[list[Text], msgspec.Meta(max_length=NAMES_MAX)]
Content = Annotated[str, msgspec.Meta(max_length=COMPOSITION_BYTES_MAX)]
FileHash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Strategy = Literal["full", "selective", "metadata_only"]
Doing = Literal["waiting", "written", "refused"]
_AUTHOR: Final = {"agent_id": "leave it out: whoever asks is who it is"}


class Edited(Reply, frozen=True, kw_only=True):
    """The edit is on disk, and soon in the folder: `composition:edits` shows it until then.

    `file_hash` is that of the file as it will be; None: it is removed.
    """

    id: str
    name: str
    file_path: str
    file_hash: str | None
    number: int


class Source(Reply, frozen=True, kw_only=True):
    """A file as it is in the folder now; no hash and no content: there is none."""

    file_path: str
    file_hash: str | None
    content: str | None


class Sources(Reply, frozen=True, kw_only=True):
    """The files that were asked for, and the one at the place of `target`."""

    sources: list[Source]
    target: Source | None


class EditView(Reply, frozen=True, kw_only=True):
    """An edit that is not settled. `waiting`: for the reason in `reason`, if there is one."""

    file_path: str
    number: int
    by: str
    at: float
    state: Doing
    reason: str | None


class Edits(Reply, frozen=True, kw_only=True):
    """Edits that are not settled, by path."""

    edits: list[EditView]


@operation(
    "composition:source",
    owner="library",
    refuses=(NotFound, Conflict, Invalid, Busy),
    example={"names": ["core/base_agent"]},
)
class GetSource(Query[Sources], frozen=True, kw_only=True):
    """Return files of compositions whole, with the hashes that an edit may name.

    `target` is a path, or a name beside the first of `names`: what is there, if anything.
    """

    names: Annotated[list[Text], msgspec.Meta(max_length=2)] = []
    target: Text | None = None


@operation("composition:edits", owner="library", refuses=(Busy,))
class GetEdits(Query[Edits], frozen=True, kw_only=True):
    """List the edits that are accepted and not known yet to be in the folder."""


@operation(
    "composition:create",
    owner="library",
    refuses=(Invalid, Conflict, Busy),
    example={
        "name": "researcher",
        "type": "profile",
        "role": "researcher",
        "capabilities": ["search"],
        "prompt": "Find out about {{topic}}.",
    },
)
class CreateComposition(Command[Edited], frozen=True, kw_only=True):
    """Write a new composition: Markdown where `content` is a text, else YAML.

    `name` may be a path below the folder; otherwise the file is where those of its type are, and
    without a name it gets one. `config`, or `role`, `model`, `capabilities` and `tools`, becomes
    the component `agent_config` of a profile, `prompt` its component `prompt`. A map as `content`
    is the whole composition. `overwrite` as in `composition:save`.
    """

    instead: ClassVar = _AUTHOR

    name: Text | None = None
    type: Text = "profile"
    content: Content | Plain | None = None
    description: Text | None = None
    author: Text | None = None
    extends: Text | None = None
    mixins: Names = []
    components: Annotated[list[Plain], msgspec.Meta(max_length=NAMES_MAX)] = []
    variables: Plain = {}
    metadata: Plain = {}
    config: Plain = {}
    role: Text | None = None
    model: Text | None = None
    capabilities: Names = []
    tools: Names = []
    prompt: Content | None = None
    overwrite: bool = False
    request_id: Id | None = None


@operation(
    "composition:save",
    owner="library",
    refuses=(Invalid, Conflict, Busy),
    example={"composition": {"name": "base", "type": "core"}, "content": "You are {{role}}."},
)
class SaveComposition(Command[Edited], frozen=True, kw_only=True):
    """Write a composition: what it says of itself, and in Markdown the text behind that.

    It goes to `path`, or where its name and type say. A file that is there is replaced only with
    `overwrite`, or where it still has the `file_hash` that is named; and in any case only as it is
    now: who edits it meanwhile is not overwritten, the edit is refused.
    """

    composition: Plain
    content: Content | None = None
    path: Text | None = None
    overwrite: bool = False
    file_hash: FileHash | None = None
    request_id: Id | None = None


@operation(
    "composition:update",
    owner="library",
    refuses=(Invalid, Conflict, NotFound, Busy),
    example={"name": "core/base", "updates": {"version": "1.1.0", "metadata": {"level": 2}}},
)
class UpdateComposition(Command[Edited], frozen=True, kw_only=True):
    """Change what a composition says of itself; null removes it. Comments in the file stay.

    `metadata` is merged into what is there, unless `merge_metadata` is false. `content` replaces
    the text behind it.
    """

    name: Text
    type: Text | None = None
    updates: Plain = {}
    merge_metadata: bool = True
    content: Content | None = None
    file_hash: FileHash | None = None
    request_id: Id | None = None


@operation(
    "composition:fork",
    owner="library",
    refuses=(Invalid, Conflict, NotFound, Busy),
    example={"parent": "core/base", "name": "base_terse", "reason": "shorter answers"},
)
class ForkComposition(Command[Edited], frozen=True, kw_only=True):
    """Write a variant of a composition beside it, or where `name` says, with a link to its parent.

    `modifications` are as the updates of `composition:update`.
    """

    instead: ClassVar = _AUTHOR

    parent: Text
    name: Text
    reason: Text
    modifications: Plain = {}
    content: Content | None = None
    author: Text | None = None
    request_id: Id | None = None


@operation(
    "composition:merge",
    owner="library",
    refuses=(Invalid, Conflict, NotFound, Busy),
    example={"source": "base_terse", "target": "core/base", "strategy": "full"},
)
class MergeComposition(Command[Edited], frozen=True, kw_only=True):
    """Take what a fork has become into its parent, which keeps a record of it.

    `full`: all of the fork but its name, metadata together. `selective`: the fields that
    `improvements` names, `content` being the text. `metadata_only`: `learnings` and `performance`.
    """

    source: Text
    target: Text
    strategy: Strategy
    improvements: Names = []
    validation_results: Plain = {}
    file_hash: FileHash | None = None
    request_id: Id | None = None


@operation(
    "composition:delete",
    owner="library",
    refuses=(Invalid, Conflict, NotFound, Busy),
    example={"name": "base_terse"},
    also=("composition:delete_component",),
)
class DeleteComposition(Command[Edited], frozen=True, kw_only=True):
    """Remove the file of a composition, as it is now or as its `file_hash` says."""

    name: Text
    type: Text | None = None
    file_hash: FileHash | None = None
    request_id: Id | None = None


class CompositionEdited(Event, frozen=True, array_like=True, tag="composition_edited"):
    file_path: str
    content: str | None
    file_hash: str | None
    base: str | None
    number: int
    by: str
    now: float


class EditSettled(Event, frozen=True, array_like=True, tag="edit_settled"):
    """The file is in the folder as it was to be; or it is not, and `reason` says why."""

    file_path: str
    file_hash: str | None
    number: int
    by: str
    reason: str | None


class Edit(msgspec.Struct, frozen=True, array_like=True):
    """What a file is to be: `content`, or gone, if it still is what has the hash `base`."""

    number: int
    content: str | None
    file_hash: str | None
    base: str | None
    by: str
    at: float
