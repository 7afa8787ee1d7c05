"""The owner `state` in its forms: what it is told and answers, what happens, what it keeps.

What it does: `actors/owners/state.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ksi.actors.declarations.registry import Word
from ksi.actors.owner import (
    Command,
    Event,
    Query,
    Reply,
)
from ksi.transport.errors import Conflict, Invalid, NotFound, Quota, TooLarge
from ksi.transport.limits import ITEMS_MAX, TEXT_CHARS_MAX
from ksi.transport.message import Id, Plain, operation

STEPS_MAX: Final = 1000  # Changes in one transaction: the others wait for it.
PAGE_ROWS_MAX: Final = 1000  # Entities, relationships or changes in one reply.
DEPTH_MAX: Final = 32  # Steps of a walk: it is bounded by what it reaches, too.
TypeName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]{0,63}$(?!\n)")]
Revision = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=PAGE_ROWS_MAX)]
Cursor = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_CHARS_MAX)]
OrderBy = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Part = Literal["properties", "relationships"]
Parts = Annotated[list[Part], msgspec.Meta(max_length=2)]
Changing = Literal[
    "state:entity:create",
    "state:entity:update",
    "state:entity:delete",
    "state:relationship:create",
    "state:relationship:delete",
    "state:set",
    "state:delete",
]


class Changed(Reply, frozen=True, kw_only=True):
    """The entity as it is now but for its properties; `revision` names this change."""

    id: str
    type: str
    revision: int
    created_at: float
    created_at_iso: str
    updated_at: float
    updated_at_iso: str


class RelationshipView(Reply, frozen=True, kw_only=True):
    """One relationship. `revision` is that of the change that made it."""

    from_id: str
    to_id: str
    relation_type: str
    metadata: dict[str, Any]
    revision: int
    created_at: float
    created_at_iso: str


class EntityView(Changed, frozen=True, kw_only=True, omit_defaults=True):
    """One entity with the parts that were asked for.

    Of relationships, from it and to it, the first hundred; `more_relationships`: there are others.
    """

    properties: dict[str, Any] | None = None
    relationships: list[RelationshipView] | None = None
    more_relationships: bool = False


class Deleted(Reply, frozen=True, kw_only=True):
    """It is gone, and so many relationships with it. `revision` names the last of the changes."""

    id: str
    revision: int
    relationships: int


class EntityPage(Reply, frozen=True, kw_only=True):
    """Entities in the order asked for, as of `revision`; `next` continues, None at the end."""

    entities: list[EntityView]
    count: int
    revision: int
    next: str | None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why something was refused; of very many only the code is said."""

    code: str
    text: str


class CreateResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one of many: its id and revision, or why it was refused."""

    id: str | None = None
    revision: int | None = None
    error: Failure | None = None


class BulkCreated(Reply, frozen=True, kw_only=True):
    """What became of each, in the order in which they were given."""

    results: list[CreateResult]
    total: int
    success: int
    failed: int


class RelationshipPage(Reply, frozen=True, kw_only=True):
    """Relationships in the order of their ends; `next` continues, None at the end."""

    relationships: list[RelationshipView]
    count: int
    next: str | None


class Related(Reply, frozen=True, kw_only=True):
    """Which relationship has changed; `revision` names this change."""

    from_id: str
    to_id: str
    relation_type: str
    revision: int


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """One relationship a walk has gone along."""

    from_id: str
    to_id: str
    relation_type: str


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entity a walk has reached, after `depth` steps at the least."""

    id: str
    depth: int
    entity: EntityView | None = None


class Graph(Reply, frozen=True, kw_only=True):
    """What a walk has reached, nearest first. `truncated`: there is more than one reply holds."""

    root: str
    nodes: list[Node]
    edges: list[Edge]
    node_count: int
    edge_count: int
    truncated: bool


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """How many have a value."""

    value: Any
    count: int


class Count(Reply, frozen=True, kw_only=True):
    """How many there are, and by value, most first; `without`: that many have no such value.

    With `next` it is only a part: ask again with it, and add up.
    """

    count: int
    groups: list[Group] | None
    without: int
    next: str | None


class ValueView(Reply, frozen=True, kw_only=True):
    """What is set under a key."""

    namespace: str | None
    key: str
    value: Any
    metadata: dict[str, Any]
    revision: int
    created_at: float
    created_at_iso: str
    updated_at: float
    updated_at_iso: str


class Keys(Reply, frozen=True, kw_only=True):
    """Keys in their order, each with its revision; `next` continues, None at the end."""

    keys: dict[str, int]
    count: int
    next: str | None


class Committed(Reply, frozen=True, kw_only=True):
    """All steps have happened; `results` are their replies, `revision` names the last change."""

    revision: int
    results: list[dict[str, Any]]


class ChangeView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One change of an entity, or of a relationship that begins at it.

    `properties` are all of them where it was created or set anew, else those that have changed.
    """

    revision: int
    what: str
    id: str
    type: str
    at: float
    by: str
    properties: dict[str, Any] | None = None
    removed: list[str] | None = None
    to_id: str | None = None
    relation_type: str | None = None
    metadata: dict[str, Any] | None = None


class Changes(Reply, frozen=True, kw_only=True):
    """Changes in order. `revision` is how far was looked: the `after` of what follows.

    `more`: there is more already. Otherwise an announcement under `topic` says that there is.
    """

    changes: list[ChangeView]
    revision: int
    more: bool
    topic: str


@operation(
    "state:entity:create",
    owner="state",
    refuses=(Invalid, Conflict, Quota, TooLarge),
    example={"id": "agent_1", "type": "agent", "properties": {"role": "analyst"}},
)
class CreateEntity(Command[Changed], frozen=True, kw_only=True):
    """Create an entity, with an id of your own or one that is made up from its type.

    If there is one already it is a conflict; with `upsert` that one gets this type and these
    properties in place of its own.
    """

    type: TypeName
    id: Word | None = None
    properties: Plain = {}
    upsert: bool = False
    request_id: Id | None = None


@operation(
    "state:entity:update",
    owner="state",
    refuses=(Invalid, NotFound, Conflict, TooLarge),
    example={"id": "agent_1", "properties": {"role": "lead", "draft": None}},
)
class UpdateEntity(Command[Changed], frozen=True, kw_only=True):
    """Change properties of an entity: null removes one, or with `keep_null` is its value.

    With `revision` only if the entity has that revision still.
    """

    id: Word
    properties: Plain
    keep_null: bool = False
    revision: Revision | None = None
    request_id: Id | None = None


@operation(
    "state:entity:delete",
    owner="state",
    refuses=(NotFound, Conflict, Quota),
    example={"id": "agent_1", "relationships": "refuse"},
)
class DeleteEntity(Command[Deleted], frozen=True, kw_only=True):
    """Delete an entity, with its relationships; or not if it has any, with `refuse`.

    With `revision` only if the entity has that revision still.
    """

    id: Word
    relationships: Literal["cascade", "refuse"] = "cascade"
    revision: Revision | None = None
    request_id: Id | None = None


@operation(
    "state:entity:bulk_create",
    owner="state",
    refuses=(Invalid, Conflict, Quota, TooLarge),
    example={"entities": [{"type": "task", "properties": {"n": 1}}, {"type": "task"}]},
)
class BulkCreate(Command[BulkCreated], frozen=True, kw_only=True):
    """Create many entities in one commit: each as by `state:entity:create`, or with a reason not.

    With `atomic` all or none: the first that is refused refuses them all.
    """

    entities: Annotated[list[Any], msgspec.Meta(min_length=1, max_length=ITEMS_MAX)]
    upsert: bool = False
    atomic: bool = False
    request_id: Id | None = None


@operation(
    "state:relationship:create",
    owner="state",
    refuses=(Invalid, NotFound, Conflict, Quota, TooLarge),
    example={"from_id": "agent_1", "to_id": "agent_2", "relation_type": "observes"},
)
class CreateRelationship(Command[Related], frozen=True, kw_only=True):
    """Relate two entities that exist. `from`, `to` and `type` are other names of the fields.

    If they are related so already it is a conflict; with `upsert` that gets this metadata.
    """

    from_id: Word | None = None
    to_id: Word | None = None
    relation_type: TypeName | None = None
    metadata: Plain = {}
    upsert: bool = False
    request_id: Id | None = None
    from_: Word | None = msgspec.field(name="from", default=None)
    to: Word | None = None
    type: TypeName | None = None


@operation(
    "state:relationship:delete",
    owner="state",
    refuses=(Invalid, NotFound),
    example={"from_id": "agent_1", "to_id": "agent_2", "relation_type": "observes"},
)
class DeleteRelationship(Command[Related], frozen=True, kw_only=True):
    """Delete a relationship. `from`, `to` and `type` are other names of the fields."""

    from_id: Word | None = None
    to_id: Word | None = None
    relation_type: TypeName | None = None
    request_id: Id | None = None
    from_: Word | None = msgspec.field(name="from", default=None)
    to: Word | None = None
    type: TypeName | None = None


@operation(
    "state:set",
    owner="state",
    refuses=(Invalid, Conflict, Quota, TooLarge),
    example={"key": "config/model", "value": {"name": "opus", "temperature": 0.7}},
)
class SetValue(Command[Changed], frozen=True, kw_only=True):
    """Set a value under a key: the entity `KEY`, or `NAMESPACE:KEY`, of the type `value`.

    With `revision` only if what is there has that revision still; 0: only if nothing is there.
    """

    key: Word
    value: Any
    namespace: Word | None = None
    metadata: Plain = {}
    revision: Revision | None = None
    request_id: Id | None = None


@operation(
    "state:delete", owner="state", refuses=(Invalid, NotFound, Conflict, Quota),
    example={"key": "config/model"},
)  # fmt: skip
class DeleteValue(Command[Deleted], frozen=True, kw_only=True):
    """Delete what is set under a key. With `revision` only if it has that revision still."""

    key: Word
    namespace: Word | None = None
    revision: Revision | None = None
    request_id: Id | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One change of a transaction: an operation, and its fields."""

    operation: Changing
    data: dict[str, Any]


@operation(
    "state:transaction",
    owner="state",
    refuses=(Invalid, NotFound, Conflict, Quota, TooLarge),
    example={
        "steps": [
            {"operation": "state:set", "data": {"key": "a", "value": 1}},
            {"operation": "state:entity:create", "data": {"type": "task", "id": "t1"}},
        ],
        "expect": {"t1": 0},
    },
)
class Transact(Command[Committed], frozen=True, kw_only=True):
    """Do several changes, all of them or none. A refusal says which step it is of.

    `expect` names entities that must have these revisions before; 0: that there is none.
    """

    steps: Annotated[list[Step], msgspec.Meta(min_length=1, max_length=STEPS_MAX)]
    expect: Annotated[dict[Word, Revision], msgspec.Meta(max_length=STEPS_MAX)] = {}
    request_id: Id | None = None


@operation(
    "state:entity:get",
    owner="state",
    refuses=(NotFound,),
    example={"id": "agent_1", "include": ["properties", "relationships"]},
)
class GetEntity(Query[EntityView], frozen=True, kw_only=True):
    """Return one entity."""

    id: Word
    include: Parts = msgspec.field(default_factory=lambda: ["properties"])


@operation(
    "state:entity:query",
    owner="state",
    refuses=(Invalid, Quota),
    example={"type": "task", "where": {"priority": {"$gte": 3}}, "order_by": "priority desc"},
)
class QueryEntities(Query[EntityPage], frozen=True, kw_only=True):
    """Find entities of a type of which `where` holds: `{"name": value, "other": {"$gt": 1}}`.

    Operators: $eq $ne $gt $gte $lt $lte $in $nin $exists $prefix $contains, and $and $or $not.
    Names are of properties; `id`, `type`, `created_at`, `updated_at` and `revision` are the
    entity's own, and `properties.NAME` is always a property. What has no single value under the
    name in `order_by` comes last. A page may be short or empty and still have a `next`.
    """

    type: TypeName | None = None
    where: Plain = {}
    include: Parts = msgspec.field(default_factory=lambda: ["properties"])
    order_by: OrderBy = "created_at desc"
    limit: Limit = 100
    after: Cursor | None = None


@operation(
    "state:relationship:query",
    owner="state",
    refuses=(Invalid,),
    example={"from_id": "agent_1", "relation_type": "observes"},
)
class QueryRelationships(Query[RelationshipPage], frozen=True, kw_only=True):
    """Find relationships by their ends and type; what is not given may be anything."""

    from_id: Word | None = None
    to_id: Word | None = None
    relation_type: TypeName | None = None
    limit: Limit = 100
    after: Cursor | None = None
    from_: Word | None = msgspec.field(name="from", default=None)
    to: Word | None = None
    type: TypeName | None = None


@operation(
    "state:graph:traverse",
    owner="state",
    refuses=(NotFound,),
    example={"from_id": "agent_1", "direction": "outgoing", "types": ["observes"], "depth": 2},
)
class Traverse(Query[Graph], frozen=True, kw_only=True):
    """Walk along relationships, of these types or all, up to `depth` steps; each entity once.

    The edges are those that begin, in the direction of the walk, less than `depth` steps away.
    """

    from_id: Word
    direction: Literal["outgoing", "incoming", "both"] = "outgoing"
    types: Annotated[list[TypeName], msgspec.Meta(max_length=64)] = []
    depth: Annotated[int, msgspec.Meta(ge=1, le=DEPTH_MAX)] = 1
    include_entities: bool = False


@operation(
    "state:aggregate:count",
    owner="state",
    refuses=(Invalid, Quota),
    example={"target": "entities", "type": "task", "group_by": "status"},
)
class CountThem(Query[Count], frozen=True, kw_only=True):
    """Count entities or relationships of which `where` holds, in all or by the value of a name.

    Names of a relationship are `from_id`, `to_id`, `relation_type`, `revision`, `created_at` and
    those in its metadata; those of an entity are as in `state:entity:query`.
    """

    target: Literal["entities", "relationships"] = "entities"
    type: TypeName | None = None
    where: Plain = {}
    group_by: OrderBy | None = None
    after: Cursor | None = None


@operation("state:get", owner="state", refuses=(Invalid, NotFound), example={"key": "config/model"})
class GetValue(Query[ValueView], frozen=True, kw_only=True):
    """Return what is set under a key."""

    key: Word
    namespace: Word | None = None


@operation("state:list", owner="state", refuses=(Invalid,), example={"prefix": "config/"})
class ListKeys(Query[Keys], frozen=True, kw_only=True):
    """List keys that begin with `prefix` and match `pattern`: `*` and `?` as in the shell."""

    namespace: Word | None = None
    prefix: Word | None = None
    pattern: Pattern | None = None
    limit: Limit = 100
    after: Word | None = None


@operation(
    "state:changes",
    owner="state",
    refuses=(NotFound, Conflict, Invalid),
    example={"prefix": "config/", "after": 12},
)
class ListChanges(Query[Changes], frozen=True, kw_only=True):
    """Return changes behind a revision: of all, of one `id`, or of ids that begin with `prefix`.

    Without `after` none: then `revision` is the last there is, from which to watch.
    """

    id: Word | None = None
    prefix: Word | None = None
    after: Revision | None = None
    limit: Limit = 100


class EntityCreated(Event, frozen=True, array_like=True, tag="created"):
    id: str
    kind: str
    properties: bytes
    revision: int
    now: float
    by: str


class EntityReplaced(Event, frozen=True, array_like=True, tag="replaced"):
    id: str
    kind: str
    properties: bytes
    revision: int
    now: float
    by: str


class EntityUpdated(Event, frozen=True, array_like=True, tag="updated"):
    id: str
    kind: str
    changed: bytes
    removed: list[str]
    revision: int
    now: float
    by: str


class EntityDeleted(Event, frozen=True, array_like=True, tag="deleted"):
    id: str
    kind: str
    revision: int
    now: float
    by: str


class RelationshipCreated(Event, frozen=True, array_like=True, tag="related"):
    from_id: str
    to_id: str
    relation_type: str
    kind: str  # of the entity it begins at
    metadata: bytes
    revision: int
    now: float
    by: str


class RelationshipDeleted(Event, frozen=True, array_like=True, tag="unrelated"):
    from_id: str
    to_id: str
    relation_type: str
    kind: str
    revision: int
    now: float
    by: str


class Relation(msgspec.Struct, frozen=True, array_like=True):
    metadata: bytes
    revision: int
    created_at: float


class Change(msgspec.Struct, frozen=True, array_like=True):
    what: str
    id: str
    type: str
    at: float
    by: str
    body: bytes | None = None  # properties, or the metadata of a relationship
    removed: list[str] = []
    to_id: str | None = None
    relation_type: str | None = None


class Totals(msgspec.Struct, frozen=True, array_like=True):
    revision: int = 0
    entities: int = 0
    relationships: int = 0
    first: int = 1  # the oldest change that is kept
    change_bytes: int = 0
    items: int = 0
    item_bytes: int = 0
