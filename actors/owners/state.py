"""The state: what agents keep for themselves and for each other, by name.

Owns entities with properties, typed relationships between them, values under keys, and queues.

- Every change has the next *revision*, one count for all. An entity carries that of its last
  change, so a command may ask for it to be still that one; 0 means: if there is none yet.
- Values are kept as they came, to the bit; null is a value. In an update it removes a property.
- A relationship is between two entities that exist. Deleting one of them deletes its
  relationships first, or is refused, as the command says.
- A key is an entity of the type `value`, so all that is true of entities is true of it.
- A transaction is changes in order, each deciding on what those before it have led to: all of
  them happen, in one commit, or none.
- The last changes are kept in order. Whoever watches asks for those behind the revision it has
  seen, and is told by announcements when to ask: it misses none and sees none twice.
- Queues are in a file of their own: `queues.py`.

Single values are in an index by type, name and value: a query looks at what its condition leaves
of that, not at all there is, and at a bounded number of rows in any case.

Source: "KSI State Management Analysis" 1, relational state; revisions and watching as in etcd.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from ksi.actors import entities
from ksi.actors.declarations.queues import (
    DeleteQueue,
    ExpireQueue,
    Item,
    ItemPushed,
    ItemsTaken,
    Pop,
    Push,
    Queue,
    QueueDeleted,
    QueueTimed,
)
from ksi.actors.declarations.state import (
    BulkCreate,
    BulkCreated,
    Change,
    Changed,
    Changes,
    ChangeView,
    Committed,
    Count,
    CountThem,
    CreateEntity,
    CreateRelationship,
    CreateResult,
    Deleted,
    DeleteEntity,
    DeleteRelationship,
    DeleteValue,
    Edge,
    EntityCreated,
    EntityDeleted,
    EntityPage,
    EntityReplaced,
    EntityUpdated,
    EntityView,
    Failure,
    GetEntity,
    GetValue,
    Graph,
    Group,
    Keys,
    ListChanges,
    ListKeys,
    Node,
    Part,
    QueryEntities,
    QueryRelationships,
    Related,
    Relation,
    RelationshipCreated,
    RelationshipDeleted,
    RelationshipPage,
    RelationshipView,
    SetValue,
    Totals,
    Transact,
    Traverse,
    UpdateEntity,
    ValueView,
)
from ksi.actors.entities import (
    BY_CREATION,
    SCAN_BYTES_MAX,
    SCAN_ROWS_MAX,
    Entity,
    EntityTables,
    Number,
    count_one,
)
from ksi.actors.entities import decode_properties as _decode
from ksi.actors.owner import (
    Announcement,
    Decision,
    Event,
    Given,
    Keyed,
    Owner,
    Reply,
    Sender,
    Table,
    Tick,
)
from ksi.actors.owners import queues
from ksi.actors.owners.queues import totals_of
from ksi.actors.queries import (
    MISSING,
    NAME_BYTES_MAX,
    Order,
    Place,
    Record,
    beyond,
    cursor_of,
    order,
    order_text,
    place_of,
    where,
)
from ksi.transport.errors import Conflict, Invalid, KsiError, NotFound, Quota, TooLarge
from ksi.transport.limits import FRAME_BYTES_MAX
from ksi.transport.message import encode

ENTITY_BYTES_MAX: Final = 256 << 10  # Properties of one entity: some of them fit into a frame.
PROPERTIES_MAX: Final = 256  # Of one entity: each may be a row of the index.
TYPES_MAX: Final = 1000  # Types of entities: what has no type given looks through all of them.
CASCADE_MAX: Final = 10_000  # Relationships deleted with their entity ...
CHANGED_MAX: Final = 20_000  # ... and changes of one command: they are one record of the journal.
TOLD_MAX: Final = 100  # Refusals of one bulk that are told in words: its reply is one frame.
CHANGES_MAX: Final = 100_000  # Changes kept for those who watch: an hour of thirty a second.
CHANGES_BYTES_MAX: Final = 64 << 20  # The same, for large values.
PAGE_BYTES_MAX: Final = FRAME_BYTES_MAX // 2  # Of what is in one reply.
RELATED_MAX: Final = 100  # Relationships shown with an entity; there is a query for more.
RELATED_BYTES_MAX: Final = 64 << 10  # The same, for large metadata.
WALKED_MAX: Final = 5000  # Entities that a walk along relationships reaches: one reply.
GROUPS_MAX: Final = 1000  # Groups in one reply.

VALUE: Final = "value"  # the type of what is set under a key


class StateTables(EntityTables):
    outgoing: Annotated[Table[Relation], Keyed(str, str, str, cache_rows=1024)]  # from, type, to
    incoming: Annotated[Table[bytes], Keyed(str, str, str)]  # to, type, from
    relation_types: Table[Number]
    changes: Annotated[Table[Change], Keyed(int, cache_rows=64)]  # revision
    queues: Annotated[Table[Queue], Keyed(str, str)]  # namespace, key
    items: Annotated[Table[Item], Keyed(str, str, int, cache_rows=64)]  # namespace, key, number
    deadlines: Annotated[Table[bytes], Keyed(int, str, str, int)]  # ms, namespace, key, number
    totals: Table[Totals]  # "all"


class State(Owner[StateTables]):
    """The owner of entities, relationships, values and queues."""

    name = "state"
    tables = StateTables
    domains = ("state", "async_state")
    events = (
        EntityUpdated
        | EntityCreated
        | EntityReplaced
        | EntityDeleted
        | RelationshipCreated
        | RelationshipDeleted
        | ItemPushed
        | ItemsTaken
        | QueueDeleted
        | QueueTimed
    )

    def decide(self, command: Any, sender: Sender, tables: StateTables, given: Given) -> Decision:
        match command:
            case Tick():
                return queues.tick(tables, given)
            case Push() | Pop() | DeleteQueue() | ExpireQueue():
                return queues.decide(command, sender, tables, given)
        draft = _Draft(sender, tables, given)
        match command:
            case BulkCreate():
                reply: Reply = _bulk_create(command, draft)
            case Transact():
                reply = _transact(command, draft)
            case _:
                reply = _change(command, draft)
        return Decision(tuple(draft.events), reply)

    def apply(self, event: Any, tables: StateTables) -> None:
        match event:
            case EntityUpdated():
                _entity_updated(event, tables)
            case EntityCreated():
                _entity_created(event, tables)
            case EntityReplaced():
                _entity_replaced(event, tables)
            case EntityDeleted():
                _entity_deleted(event, tables)
            case RelationshipCreated():
                _relationship_created(event, tables)
            case RelationshipDeleted():
                _relationship_deleted(event, tables)
            case _:
                queues.apply(event, tables)

    def answer(self, query: Any, tables: StateTables) -> Reply:
        match query:
            case GetEntity():
                return _view(query.id, _known(query.id, tables), query.include, tables)
            case GetValue():
                return _get_value(query, tables)
            case QueryEntities():
                return _query(query, tables)
            case ListKeys():
                return _list_keys(query, tables)
            case QueryRelationships():
                return _query_relationships(query, tables)
            case Traverse():
                return _traverse(query, tables)
            case CountThem():
                return _count(query, tables)
            case ListChanges():
                return _list_changes(query, tables)
            case _:
                return queues.answer(query, tables)

    def announce(self, event: Any) -> Iterable[Announcement]:
        match event:
            case RelationshipCreated() | RelationshipDeleted():
                what = "related" if type(event) is RelationshipCreated else "unrelated"
                yield _told(event.from_id, what, event)
            case EntityCreated() | EntityReplaced():
                yield _told(event.id, "set" if type(event) is EntityReplaced else "created", event)
            case EntityUpdated() | EntityDeleted():
                what = "updated" if type(event) is EntityUpdated else "deleted"
                yield _told(event.id, what, event)
            case ItemPushed():
                told = {"namespace": event.namespace, "key": event.key, "number": event.number}
                topic = f"async_state.{_words(event.namespace)}.{_words(event.key)}.pushed"
                yield Announcement(topic, told, event.by)


OWNER = State()

_Triple = tuple[str, str, str]  # from, type, to: as the table `outgoing` is ordered
_decode_any: Final = msgspec.msgpack.Decoder().decode
_encode_alike: Final = msgspec.msgpack.Encoder(order="deterministic").encode


class _Draft:
    """Changes that are being decided: the tables as they will be, and the events that lead there.

    Whoever refuses does so before it adds: what was added before stays good.
    """

    def __init__(self, sender: Sender, tables: StateTables, given: Given) -> None:
        self.events: list[Event] = []
        self.now = given.now
        self.by = sender.name
        self.revision = totals_of(tables).revision
        self._ids = given.ids
        self._tables = tables
        self._entities: dict[str, Entity | None] = {}
        self._relations: dict[_Triple, Relation | None] = {}
        self._types: set[str] = set()

    def find(self, entity_id: str) -> Entity | None:
        """Return an entity, or None."""
        if entity_id in self._entities:
            return self._entities[entity_id]
        return self._tables.entities.get(entity_id)

    def require(self, entity_id: str) -> Entity:
        """Return an entity; refuse if there is none."""
        return _there(entity_id, self.find(entity_id))

    def relation(self, triple: _Triple) -> Relation | None:
        """Return a relationship, or None."""
        if triple in self._relations:
            return self._relations[triple]
        return self._tables.outgoing.get(triple)

    def relations_of(self, entity_id: str) -> list[_Triple]:
        """Return the relationships from and to an entity, no more than one beyond the limit."""
        found = islice(_touching(entity_id, self._tables), CASCADE_MAX + 1 + len(self._relations))
        every = dict.fromkeys(triple for triple in found if self.relation(triple) is not None)
        for triple, relation in self._relations.items():
            if relation is not None and entity_id in (triple[0], triple[2]):
                every[triple] = None
        return list(every)

    def fresh_id(self, kind: str) -> str:
        """Return an id that no entity has."""
        while True:
            entity_id = f"{kind}_{next(self._ids)[:8]}"
            if self.find(entity_id) is None:
                return entity_id

    def put(self, entity_id: str, kind: str, properties: bytes, known: Entity | None) -> Entity:
        """Add that an entity has this type and these properties, whatever it had before."""
        self._require_room_for_type(kind)
        revision = self._next()
        make = EntityCreated if known is None else EntityReplaced
        self.events.append(make(entity_id, kind, properties, revision, self.now, self.by))
        serial, at = (revision, self.now) if known is None else (known.serial, known.created_at)
        return self._set(entity_id, Entity(kind, properties, serial, revision, at, self.now))

    def update(
        self, entity_id: str, known: Entity, changed: bytes, removed: list[str], properties: bytes
    ) -> Entity:
        """Add that some properties of an entity have changed, which makes them `properties`."""
        revision = self._next()
        self.events.append(
            EntityUpdated(entity_id, known.type, changed, removed, revision, self.now, self.by)
        )
        entity = Entity(known.type, properties, known.serial, revision, known.created_at, self.now)
        return self._set(entity_id, entity)

    def delete(self, entity_id: str, known: Entity) -> None:
        """Add that an entity is gone. Its relationships must be."""
        self.events.append(EntityDeleted(entity_id, known.type, self._next(), self.now, self.by))
        self._entities[entity_id] = None

    def relate(self, triple: _Triple, kind: str, metadata: bytes) -> None:
        """Add that two entities are related."""
        source, relation_type, target = triple
        revision = self._next()
        self.events.append(
            RelationshipCreated(
                source, target, relation_type, kind, metadata, revision, self.now, self.by
            )
        )
        self._relations[triple] = Relation(metadata, revision, self.now)

    def unrelate(self, triple: _Triple) -> None:
        """Add that two entities are related so no longer."""
        source, relation_type, target = triple
        kind = self.require(source).type
        revision = self._next()
        self.events.append(
            RelationshipDeleted(source, target, relation_type, kind, revision, self.now, self.by)
        )
        self._relations[triple] = None

    def _set(self, entity_id: str, entity: Entity) -> Entity:
        self._entities[entity_id] = entity
        return entity

    def _next(self) -> int:
        if len(self.events) >= CHANGED_MAX:
            raise Quota(f"these are more than {CHANGED_MAX} changes", limit=CHANGED_MAX)
        self.revision += 1
        return self.revision

    def _require_room_for_type(self, kind: str) -> None:
        if kind in self._types or self._tables.types.get(kind) is not None:
            return
        if self._tables.types.count() + len(self._types) >= TYPES_MAX:
            raise Quota(
                f"there are {TYPES_MAX} types of entities",
                hint="a type says what something is, the id which one",
                limit=TYPES_MAX,
            )
        self._types.add(kind)


def _change(command: Any, draft: _Draft) -> Reply:
    match command:
        case CreateEntity():
            return _create(command, draft)
        case UpdateEntity():
            return _update(command, draft)
        case DeleteEntity():
            cascade = command.relationships == "cascade"
            return _delete(command.id, command.revision, draft, cascade=cascade)
        case CreateRelationship():
            return _relate(command, draft)
        case DeleteRelationship():
            return _unrelate(command, draft)
        case SetValue():
            return _set_value(command, draft)
        case DeleteValue():
            entity_id = _key_id(command)
            _require_value(entity_id, draft.require(entity_id))
            return _delete(entity_id, command.revision, draft)
        case _:
            raise TypeError(command)


def _create(command: CreateEntity, draft: _Draft) -> Changed:
    properties = _packed(command.properties)
    entity_id = command.id or draft.fresh_id(command.type)
    known = draft.find(entity_id)
    if known is not None and not command.upsert:
        raise Conflict(
            f"there is an entity {entity_id} already, of the type {known.type}",
            hint="with upsert it gets this type and these properties",
            id=entity_id,
            type=known.type,
            revision=known.revision,
        )
    return _changed(entity_id, draft.put(entity_id, command.type, properties, known))


def _update(command: UpdateEntity, draft: _Draft) -> Changed:
    known = draft.require(command.id)
    _require_revision(command.id, known, command.revision)
    properties = _decode(known.properties)
    changed = {
        name: value
        for name, value in command.properties.items()
        if value is not None or command.keep_null
    }
    removed = [name for name in command.properties.keys() - changed.keys() if name in properties]
    properties.update(changed)
    for name in removed:
        del properties[name]
    packed = _packed(properties)
    if not changed and not removed:
        return _changed(command.id, known)
    entity = draft.update(command.id, known, encode(changed), sorted(removed), packed)
    return _changed(command.id, entity)


def _delete(
    entity_id: str, revision: int | None, draft: _Draft, *, cascade: bool = True
) -> Deleted:
    known = draft.require(entity_id)
    _require_revision(entity_id, known, revision)
    related = draft.relations_of(entity_id)
    if related and not cascade:
        raise Conflict(
            f"{entity_id} has relationships: {len(related)} or more"[:200],
            hint="delete them, or with relationships=cascade all at once",
            relationships=len(related),
        )
    if len(related) > CASCADE_MAX:
        raise Quota(
            f"{entity_id} has more than {CASCADE_MAX} relationships",
            hint="delete some of them before: ksi help state:relationship:delete",
            limit=CASCADE_MAX,
        )
    for triple in related:
        draft.unrelate(triple)
    draft.delete(entity_id, known)
    return Deleted(id=entity_id, revision=draft.revision, relationships=len(related))


def _relate(command: CreateRelationship, draft: _Draft) -> Related:
    triple = _triple(command)
    metadata = _packed(command.metadata, "$.metadata")
    kind = draft.require(triple[0]).type
    draft.require(triple[2])
    if draft.relation(triple) is not None and not command.upsert:
        raise Conflict(
            f"{triple[0]} {triple[1]} {triple[2]} already",
            hint="with upsert it gets this metadata",
        )
    draft.relate(triple, kind, metadata)
    return _related(triple, draft.revision)


def _unrelate(command: DeleteRelationship, draft: _Draft) -> Related:
    triple = _triple(command)
    source, relation_type, target = triple
    if draft.relation(triple) is None:
        raise NotFound(
            f"there is no relationship {source} {relation_type} {target}",
            hint=f"ksi read state:relationship:query --from-id {source}",
        )
    draft.unrelate(triple)
    return _related(triple, draft.revision)


def _related(triple: _Triple, revision: int) -> Related:
    source, relation_type, target = triple
    return Related(from_id=source, to_id=target, relation_type=relation_type, revision=revision)


def _set_value(command: SetValue, draft: _Draft) -> Changed:
    entity_id = _key_id(command)
    properties = {"value": command.value}
    if command.metadata:
        properties["metadata"] = command.metadata
    packed = _packed(properties, "$.value")
    known = draft.find(entity_id)
    if known is not None:
        _require_value(entity_id, known)
    _require_revision(entity_id, known, command.revision)
    return _changed(entity_id, draft.put(entity_id, VALUE, packed, known))


def _bulk_create(command: BulkCreate, draft: _Draft) -> BulkCreated:
    results: list[CreateResult] = []
    failed = 0
    for position, fields in enumerate(command.entities):
        try:
            each = _converted(fields, CreateEntity, f"$.entities[{position}]")
            if command.upsert:
                each = msgspec.structs.replace(each, upsert=True)
            made = _create(each, draft)
            results.append(CreateResult(id=made.id, revision=made.revision))
        except KsiError as refusal:
            if command.atomic:
                raise _of_part(refusal, f"$.entities[{position}]") from None
            failed += 1
            text = refusal.text[:500] if failed <= TOLD_MAX else ""
            results.append(CreateResult(error=Failure(code=refusal.code, text=text)))
    total = len(results)
    return BulkCreated(results=results, total=total, success=total - failed, failed=failed)


def _transact(command: Transact, draft: _Draft) -> Committed:
    for entity_id, revision in command.expect.items():
        _require_revision(entity_id, draft.find(entity_id), revision)
    results: list[dict[str, Any]] = []
    for position, step in enumerate(command.steps):
        path = f"$.steps[{position}]"
        try:
            reply = _change(_converted(step.data, _STEPS[step.operation], path), draft)
        except KsiError as refusal:
            raise _of_part(refusal, path) from None
        results.append(msgspec.to_builtins(reply))
    return Committed(revision=draft.revision, results=results)


_STEPS: Final[dict[str, type[Any]]] = {
    "state:entity:create": CreateEntity,
    "state:entity:update": UpdateEntity,
    "state:entity:delete": DeleteEntity,
    "state:relationship:create": CreateRelationship,
    "state:relationship:delete": DeleteRelationship,
    "state:set": SetValue,
    "state:delete": DeleteValue,
}


def _converted(fields: Any, kind: type[Any], path: str) -> Any:
    """Return a command that is part of another; its open fields were checked with that one."""
    try:
        part = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise Invalid(f"{error} of `{path}`"[:1000]) from None
    if part.request_id is not None:
        raise Invalid(f"a request_id is of the whole command - at `$.request_id` of `{path}`")
    return part


def _of_part(refusal: KsiError, path: str) -> KsiError:
    """Return a refusal that says of which part it is."""
    return type(refusal)(
        f"{path}: {refusal.text}", hint=refusal.hint, **{**refusal.details, "path": path}
    )


def _triple(command: CreateRelationship | DeleteRelationship) -> _Triple:
    """Return which relationship is meant, by either names of the fields."""
    source = command.from_id or command.from_
    target = command.to_id or command.to
    relation_type = command.relation_type or command.type
    if source is None or target is None or relation_type is None:
        missing = "from_id" if source is None else "to_id" if target is None else "relation_type"
        raise Invalid(
            f"Object missing required field `{missing}`", hint="from_id, to_id, relation_type"
        )
    return source, relation_type, target


def _key_id(command: SetValue | DeleteValue | GetValue) -> str:
    """Return the id of the entity that a key is."""
    return _joined(command.namespace, command.key)


def _joined(namespace: str | None, key: str) -> str:
    entity_id = key if namespace is None else f"{namespace}:{key}"
    if len(entity_id) > 128:
        raise Invalid(f"namespace and key have {len(entity_id)} characters, 128 are the most")
    return entity_id


def _packed(properties: dict[str, Any], path: str = "$.properties") -> bytes:
    """Return properties as they are kept; refuse what tables cannot hold."""
    if len(properties) > PROPERTIES_MAX:
        raise TooLarge(
            f"{len(properties)} are over the limit of {PROPERTIES_MAX} - at `{path}`",
            hint="put some of them into one",
            limit=PROPERTIES_MAX,
        )
    for name in properties:
        if not 0 < len(name.encode()) <= NAME_BYTES_MAX or "\0" in name:
            raise Invalid(
                f"a name has 1 to {NAME_BYTES_MAX} bytes and no NUL, not {name[:100]!r} "
                f"- at `{path}`"
            )
    packed = encode(properties)
    if len(packed) > ENTITY_BYTES_MAX:
        raise TooLarge(
            f"{len(packed)} bytes are over the limit of {ENTITY_BYTES_MAX} - at `{path}`",
            size_bytes=len(packed),
            limit_bytes=ENTITY_BYTES_MAX,
        )
    return packed


def _there(entity_id: str, known: Entity | None) -> Entity:
    if known is None:
        raise NotFound(
            f"there is no entity {entity_id}", hint="ksi read state:entity:query", id=entity_id
        )
    return known


def _known(entity_id: str, tables: StateTables) -> Entity:
    return _there(entity_id, tables.entities.get(entity_id))


def _require_revision(entity_id: str, known: Entity | None, revision: int | None) -> None:
    present = 0 if known is None else known.revision
    if revision is not None and revision != present:
        what = f"has the revision {present}" if present else "is not there"
        raise Conflict(
            f"{entity_id} {what}, not {revision}" if revision else f"{entity_id} {what}",
            hint="read it again, and decide again",
            id=entity_id,
            revision=present,
        )


def _require_value(entity_id: str, known: Entity) -> None:
    if known.type != VALUE:
        raise Conflict(
            f"{entity_id} is an entity of the type {known.type}, not a key",
            hint="ksi help state:entity:update",
            type=known.type,
        )


def _entity_created(event: EntityCreated, tables: StateTables) -> None:
    revision = event.revision
    entity = Entity(event.kind, event.properties, revision, revision, event.now, event.now)
    entities.put(event.id, entity, tables)
    change = Change("created", event.id, event.kind, event.now, event.by, event.properties)
    _note(change, revision, tables, more_entities=1)


def _entity_replaced(event: EntityReplaced, tables: StateTables) -> None:
    _put_changed(event.id, event.kind, event.properties, event, tables)
    change = Change("set", event.id, event.kind, event.now, event.by, event.properties)
    _note(change, event.revision, tables)


def _entity_updated(event: EntityUpdated, tables: StateTables) -> None:
    properties = _decode(_known(event.id, tables).properties)
    properties.update(_decode(event.changed))
    for name in event.removed:
        del properties[name]
    _put_changed(event.id, event.kind, encode(properties), event, tables)
    change = Change(
        "updated", event.id, event.kind, event.now, event.by, event.changed, event.removed
    )
    _note(change, event.revision, tables)


def _put_changed(
    entity_id: str,
    kind: str,
    properties: bytes,
    event: EntityReplaced | EntityUpdated,
    tables: StateTables,
) -> None:
    known = _known(entity_id, tables)
    entity = Entity(kind, properties, known.serial, event.revision, known.created_at, event.now)
    entities.put(entity_id, entity, tables)


def _entity_deleted(event: EntityDeleted, tables: StateTables) -> None:
    entities.remove(event.id, tables)
    change = Change("deleted", event.id, event.kind, event.now, event.by)
    _note(change, event.revision, tables, more_entities=-1)


def _relationship_created(event: RelationshipCreated, tables: StateTables) -> None:
    source, relation_type, target = event.from_id, event.relation_type, event.to_id
    triple = (source, relation_type, target)
    more = int(tables.outgoing.get(triple) is None)
    tables.outgoing.put(triple, Relation(event.metadata, event.revision, event.now))
    tables.incoming.put((target, relation_type, source), b"")
    count_one(tables.relation_types, relation_type, more)
    change = Change(
        "related", source, event.kind, event.now, event.by, event.metadata, [], target,
        relation_type,
    )  # fmt: skip
    _note(change, event.revision, tables, more_relationships=more)


def _relationship_deleted(event: RelationshipDeleted, tables: StateTables) -> None:
    source, relation_type, target = event.from_id, event.relation_type, event.to_id
    tables.outgoing.delete((source, relation_type, target))
    tables.incoming.delete((target, relation_type, source))
    count_one(tables.relation_types, relation_type, -1)
    change = Change(
        "unrelated", source, event.kind, event.now, event.by, None, [], target, relation_type
    )
    _note(change, event.revision, tables, more_relationships=-1)


def _note(
    change: Change,
    revision: int,
    tables: StateTables,
    more_entities: int = 0,
    more_relationships: int = 0,
) -> None:
    """Keep a change for those who watch, and let go of the oldest beyond the bounds."""
    tables.changes.put((revision,), change)
    was = totals_of(tables)
    first, size_bytes = was.first, was.change_bytes + _bytes_of(change)
    while revision - first >= CHANGES_MAX or size_bytes > CHANGES_BYTES_MAX:
        oldest = tables.changes.get((first,))
        assert oldest is not None
        size_bytes -= _bytes_of(oldest)
        tables.changes.delete((first,))
        first += 1
    changed = Totals(
        revision,
        was.entities + more_entities,
        was.relationships + more_relationships,
        first,
        size_bytes,
        was.items,
        was.item_bytes,
    )
    tables.totals.put("all", changed)


def _bytes_of(change: Change) -> int:
    return 128 + len(change.body or b"") + sum(map(len, change.removed))


def _words(name: str) -> str:
    """Return an id as words of a topic: what is between `.`, `/` and `:`."""
    words = name.replace("/", ".").replace(":", ".").split(".")
    return ".".join(word for word in words if word)


def _told(entity_id: str, what: str, event: Any) -> Announcement:
    told = {"id": entity_id, "type": event.kind, "revision": event.revision}
    return Announcement(f"state.{_words(entity_id)}.{what}", told, event.by)


def _topic(query: ListChanges) -> str:
    """Return under which topics the changes that a query is about are announced."""
    if query.id is not None:
        return f"state.{_words(query.id)}.*"
    whole = max((query.prefix or "").rfind(mark) for mark in "./:")
    words = _words((query.prefix or "")[: whole + 1])
    return f"state.{words}.>" if words else "state.>"


_TRIPLE_NAMES: Final = ("from_id", "relation_type", "to_id")  # as in a triple


def _get_value(query: GetValue, tables: StateTables) -> ValueView:
    entity_id = _key_id(query)
    known = tables.entities.get(entity_id)
    if known is None or known.type != VALUE:
        raise NotFound(f"nothing is set under {entity_id}", hint="ksi state list", key=entity_id)
    properties = _decode(known.properties)
    return ValueView(
        namespace=query.namespace,
        key=query.key,
        value=properties.get("value"),
        metadata=properties.get("metadata") or {},
        revision=known.revision,
        **_times(known),
    )


def _list_keys(query: ListKeys, tables: StateTables) -> Keys:
    before = "" if query.namespace is None else f"{query.namespace}:"
    prefix = before + (query.prefix or "")
    start = before + query.after + "\0" if query.after else prefix
    found: dict[str, int] = {}
    looked, last = 0, ""
    for entity_id, entity in tables.entities.range(start, prefix=prefix):
        key = entity_id[len(before) :]
        wanted = query.pattern is None or fnmatchcase(key, query.pattern)
        if entity.type == VALUE and wanted:
            if len(found) == query.limit:
                return Keys(keys=found, count=len(found), next=last)
            found[key] = entity.revision
        looked, last = looked + 1, key
        if looked == SCAN_ROWS_MAX:
            return Keys(keys=found, count=len(found), next=last)
    return Keys(keys=found, count=len(found), next=None)


def _query(query: QueryEntities, tables: StateTables) -> EntityPage:
    by = order(query.order_by)
    condition = where(query.where)
    after = None
    if query.after is not None:
        after = Place(*place_of(query.after, str(by), bool, str, int))
    page: list[EntityView] = []
    room, left, last = PAGE_BYTES_MAX, SCAN_BYTES_MAX, after
    placed = entities.select(query.type, condition, by, after, tables)
    for looked, (place, entity_id) in enumerate(placed):
        if looked == SCAN_ROWS_MAX or left < 0:
            return _page(page, by, last, tables)
        found = entities.find(entity_id, tables)
        left -= len(found.entity.properties)
        if condition.holds(found.value) and found.place(by) == place:
            view = _view(found.id, found.entity, query.include, tables, found.properties)
            room -= len(encode(view))
            if len(page) == query.limit or (room < 0 and page):
                return _page(page, by, last, tables)
            page.append(view)
        last = place
    return _page(page, by, None, tables)


def _page(
    entities: list[EntityView], by: Order, last: Place | None, tables: StateTables
) -> EntityPage:
    return EntityPage(
        entities=entities,
        count=len(entities),
        revision=totals_of(tables).revision,
        next=None if last is None else cursor_of(last, str(by)),
    )


def _view(
    entity_id: str,
    entity: Entity,
    include: list[Part],
    tables: StateTables,
    properties: dict[str, Any] | None = None,
) -> EntityView:
    related, more = None, False
    if "relationships" in include:
        related, more = _shown_relationships(entity_id, tables)
    if "properties" not in include:
        properties = None
    elif properties is None:
        properties = _decode(entity.properties)
    return EntityView(
        id=entity_id,
        type=entity.type,
        revision=entity.revision,
        properties=properties,
        relationships=related,
        more_relationships=more,
        **_times(entity),
    )


def _changed(entity_id: str, entity: Entity) -> Changed:
    return Changed(id=entity_id, type=entity.type, revision=entity.revision, **_times(entity))


def _times(entity: Entity) -> dict[str, Any]:
    return {
        "created_at": entity.created_at,
        "created_at_iso": _iso(entity.created_at),
        "updated_at": entity.updated_at,
        "updated_at_iso": _iso(entity.updated_at),
    }


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")


def _shown_relationships(
    entity_id: str, tables: StateTables
) -> tuple[list[RelationshipView], bool]:
    """Return the first relationships of an entity, and whether there are more."""
    shown: list[RelationshipView] = []
    room = RELATED_BYTES_MAX
    for triple in _touching(entity_id, tables):
        relation = tables.outgoing.get(triple)
        assert relation is not None
        room -= len(relation.metadata)
        if len(shown) == RELATED_MAX or (room < 0 and shown):
            return shown, True
        shown.append(_relationship_view(triple, relation))
    return shown, False


def _touching(entity_id: str, tables: StateTables) -> Iterator[_Triple]:
    """Yield the relationships from an entity, then those to it from others."""
    for triple, _ in tables.outgoing.range(prefix=(entity_id,)):
        yield triple
    for (target, relation_type, source), _ in tables.incoming.range(prefix=(entity_id,)):
        if source != entity_id:
            yield source, relation_type, target


def _relationship_view(triple: _Triple, relation: Relation) -> RelationshipView:
    return RelationshipView(
        from_id=triple[0],
        relation_type=triple[1],
        to_id=triple[2],
        metadata=_decode(relation.metadata),
        revision=relation.revision,
        created_at=relation.created_at,
        created_at_iso=_iso(relation.created_at),
    )


def _query_relationships(query: QueryRelationships, tables: StateTables) -> RelationshipPage:
    source, target = query.from_id or query.from_, query.to_id or query.to
    relation_type = query.relation_type or query.type
    found: list[RelationshipView] = []
    room, last = PAGE_BYTES_MAX, None
    for looked, triple in enumerate(_triples(source, target, relation_type, query.after, tables)):
        if looked == SCAN_ROWS_MAX:
            break
        if (target or triple[2]) == triple[2] and (relation_type or triple[1]) == triple[1]:
            relation = tables.outgoing.get(triple)
            assert relation is not None
            room -= len(relation.metadata)
            if len(found) == query.limit or (room < 0 and found):
                break
            found.append(_relationship_view(triple, relation))
        last = triple
    else:
        last = None
    after = None if last is None else cursor_of(last, _end(source, target))
    return RelationshipPage(relationships=found, count=len(found), next=after)


def _end(source: str | None, target: str | None) -> str:
    return "to" if source is None and target is not None else "from"


def _triples(
    source: str | None,
    target: str | None,
    relation_type: str | None,
    after: str | None,
    tables: StateTables,
) -> Iterator[_Triple]:
    """Yield relationships from one entity, else to one, else all, beyond a cursor."""
    end = _end(source, target)
    last = () if after is None else place_of(after, end, str, str, str)
    reverse = end == "to"
    start = beyond(tuple(reversed(last)) if reverse else last)
    one = target if reverse else source
    prefix = () if one is None else (one,) if relation_type is None else (one, relation_type)
    if not reverse:
        return (triple for triple, _ in tables.outgoing.range(start, prefix=prefix))
    rows = tables.incoming.range(start, prefix=prefix)
    return ((begin, kind, to) for (to, kind, begin), _ in rows)


def _traverse(query: Traverse, tables: StateTables) -> Graph:
    """Walk breadth first, so that each entity is met on a shortest way."""
    depths = {query.from_id: 0}
    entities = {query.from_id: _known(query.from_id, tables)}
    edges: dict[_Triple, None] = {}
    room = PAGE_BYTES_MAX - _node_bytes(query.from_id, entities[query.from_id], query)
    waiting = deque([query.from_id])
    truncated = False
    while waiting and not truncated:
        here = waiting.popleft()
        if depths[here] == query.depth:
            break
        for triple, there in _neighbours(here, query, tables):
            if triple in edges:
                continue
            room -= sum(map(len, triple)) + 64
            if there not in depths:
                entities[there] = _known(there, tables)
                room -= _node_bytes(there, entities[there], query)
            if room < 0 or (there not in depths and len(depths) == WALKED_MAX):
                truncated = True
                break
            if there not in depths:
                depths[there] = depths[here] + 1
                waiting.append(there)
            edges[triple] = None
    include: list[Part] = ["properties"]
    nodes = [
        Node(
            id=entity_id,
            depth=depth,
            entity=_view(entity_id, entities[entity_id], include, tables)
            if query.include_entities
            else None,
        )
        for entity_id, depth in depths.items()
    ]
    return Graph(
        root=query.from_id,
        nodes=nodes,
        edges=[Edge(from_id=a, relation_type=kind, to_id=b) for a, kind, b in edges],
        node_count=len(nodes),
        edge_count=len(edges),
        truncated=truncated,
    )


def _node_bytes(entity_id: str, entity: Entity, query: Traverse) -> int:
    return len(entity_id) + (256 + len(entity.properties) if query.include_entities else 32)


def _neighbours(
    entity_id: str, query: Traverse, tables: StateTables
) -> Iterator[tuple[_Triple, str]]:
    """Yield the relationships a walk may go along from here, each with where it leads."""
    prefixes: list[tuple[str, ...]] = [(entity_id, kind) for kind in dict.fromkeys(query.types)]
    for prefix in prefixes or [(entity_id,)]:
        if query.direction != "incoming":
            for triple, _ in tables.outgoing.range(prefix=prefix):
                yield triple, triple[2]
        if query.direction != "outgoing":
            for (target, kind, source), _ in tables.incoming.range(prefix=prefix):
                yield (source, kind, target), source


def _count(query: CountThem, tables: StateTables) -> Count:
    """Count, from what is counted already where that is all, else from the rows."""
    if query.group_by is not None:
        order(query.group_by)  # It is a name, too.
    of_entities = query.target == "entities"
    counted = tables.types if of_entities else tables.relation_types
    if not query.where and query.group_by in (None, "type" if of_entities else "relation_type"):
        groups = [
            Group(value=kind, count=number.count)
            for kind, number in counted.range()
            if query.type in (None, kind)
        ]
        total = sum(group.count for group in groups)
        return _counts(query, total, groups, 0, None)
    records = _entity_records if of_entities else _relation_records
    return _counted(query, records(query, tables))


class _Counted(NamedTuple):
    """A record to be counted: where it stands, its size, and its values if it is asked for."""

    place: tuple[Any, ...] | None  # None: it is among a few that are counted at once
    size_bytes: int
    value_of: Record | None


def _counted(query: CountThem, records: Iterator[_Counted]) -> Count:
    """Count records by the value of a name."""
    condition = where(query.where)
    count = without = 0
    groups: dict[bytes, Group] = {}
    room, left, last = PAGE_BYTES_MAX, SCAN_BYTES_MAX, None
    for looked, record in enumerate(records):
        if (looked == SCAN_ROWS_MAX or left < 0) and last is not None:
            break
        if left < 0:
            raise Quota(f"{SCAN_BYTES_MAX} bytes or more to count at once", hint="narrow it")
        left, last = left - record.size_bytes, record.place
        if record.value_of is None or not condition.holds(record.value_of):
            continue
        count += 1
        value = MISSING if query.group_by is None else record.value_of(query.group_by)
        if value is MISSING:
            without += 1
            continue
        key = _group_key(value)
        known = groups.get(key)
        room -= 0 if known else len(key)
        if room < 0 or len(groups) + (known is None) > GROUPS_MAX:
            raise Quota(
                f"there are more than {GROUPS_MAX} values of {query.group_by}, or large ones",
                hint="narrow it with where",
                limit=GROUPS_MAX,
            )
        groups[key] = Group(value=value, count=1 if known is None else known.count + 1)
    else:
        last = None
    return _counts(query, count, list(groups.values()), without, last)


def _counts(query: CountThem, count: int, groups: list[Group], without: int, last: Any) -> Count:
    groups.sort(key=lambda group: -group.count)
    return Count(
        count=count,
        groups=None if query.group_by is None else groups,
        without=0 if query.group_by is None else without,
        next=None if last is None else cursor_of(last, query.target),
    )


def _group_key(value: Any) -> bytes:
    """Return the same for what is the same, and what is different for what is not."""
    if type(value) is str or (text := order_text(value)) is None:
        return _encode_alike(value)
    return text.encode()


def _entity_records(query: CountThem, tables: StateTables) -> Iterator[_Counted]:
    types = entities.types_of(query.type, tables)
    narrowed = entities.among(where(query.where), types, tables)
    if narrowed is not None:
        for entity_id in narrowed:
            found = entities.find(entity_id, tables)
            yield _Counted(None, len(found.entity.properties), found.value)
        return
    last = None if query.after is None else place_of(query.after, query.target, int)
    after = None if last is None else Place(False, "", *last)
    for place, entity_id in entities.created(types, after, order(BY_CREATION), tables):
        found = entities.find(entity_id, tables)
        yield _Counted((place.serial,), len(found.entity.properties), found.value)


def _relation_records(query: CountThem, tables: StateTables) -> Iterator[_Counted]:
    last = () if query.after is None else place_of(query.after, query.target, str, str, str)
    for triple, relation in tables.outgoing.range(beyond(last)):
        is_asked_for = query.type in (None, triple[1])
        value_of = partial(_relation_value, triple, relation) if is_asked_for else None
        yield _Counted(triple, len(relation.metadata), value_of)


def _relation_value(triple: _Triple, relation: Relation, name: str) -> Any:
    """Return what a condition on relationships calls `name`, or MISSING."""
    if name in _TRIPLE_NAMES:
        return triple[_TRIPLE_NAMES.index(name)]
    if name in ("created_at", "revision"):
        return getattr(relation, name)
    return _decode(relation.metadata).get(name.removeprefix("metadata."), MISSING)


def _list_changes(query: ListChanges, tables: StateTables) -> Changes:
    totals = totals_of(tables)
    after = totals.revision if query.after is None else query.after
    if after > totals.revision:
        raise Conflict(
            f"there is no revision {after} yet, the last is {totals.revision}",
            hint="the store was restored to what it was before: read again, and watch from there",
            revision=totals.revision,
        )
    if after < totals.first - 1:
        raise NotFound(
            f"changes behind {after} are not kept any more, the oldest is {totals.first}",
            hint="read again, and watch from the revision of what you read",
            first=totals.first,
        )
    found: list[ChangeView] = []
    room, looked = PAGE_BYTES_MAX, after
    for (revision,), change in tables.changes.range((after + 1,)):
        if revision - after > SCAN_ROWS_MAX:
            break
        if (query.id or change.id) == change.id and change.id.startswith(query.prefix or ""):
            room -= _bytes_of(change)
            if len(found) == query.limit or (room < 0 and found):
                break
            found.append(_change_view(revision, change))
        looked = revision
    return Changes(
        changes=found, revision=looked, more=looked < totals.revision, topic=_topic(query)
    )


def _change_view(revision: int, change: Change) -> ChangeView:
    body = None if change.body is None else _decode(change.body)
    of_relation = change.relation_type is not None
    return ChangeView(
        revision=revision,
        what=change.what,
        id=change.id,
        type=change.type,
        at=change.at,
        by=change.by,
        properties=None if of_relation else body,
        removed=change.removed or None,
        to_id=change.to_id,
        relation_type=change.relation_type,
        metadata=body if of_relation else None,
    )
