"""Tools: declared operations in the form in which models use them.

The name, the words and the JSON Schema of a tool come from the declaration of its operation, so
there is nothing to keep in step. A *full* definition says everything; a *thin* one only that the
tool is there, for a conversation that was told once: a name, a few words, and a schema that takes
any arguments, so that strict clients call it all the same. `ksi_describe_tool` gives the full one.

Source: KSI's `mcp/dynamic_server.py`: `ksi_{event_with_underscores}`, full at first, thin after.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from ksi.transport.errors import UnknownOperation
from ksi.transport.limits import OUTCOME_TIMEOUT_S, TOOLS_MAX
from ksi.transport.message import Id, Message, Operation, Role, Text, unknown

THIN_WORDS: Final = 4  # What is left of the words of a tool: as much as reminds of it.
OURS: Final = frozenset({"mcp:introduce", "mcp:use"})  # What the adapter asks, and no model.
WAIT_S: Final = 60.0  # What a model waits for a completion where it does not say.


class DescribeTool(Message, frozen=True, kw_only=True):
    """Describe a tool in full: what it does, its arguments and its result."""

    tool: Text


class AwaitCompletion(Message, frozen=True, kw_only=True):
    """Wait until a completion has ended, and return what `completion:status` says of it.

    Where it has not ended in time it goes on: call this again.
    """

    request_id: Id
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=OUTCOME_TIMEOUT_S)] = WAIT_S


class SettleCall(Message, frozen=True, kw_only=True):
    """Find out what became of a call that ended as `unavailable`, by the ticket it gave."""

    ticket: Text


class Tool(NamedTuple):
    """One tool; those without an operation are served by the adapter itself."""

    name: str
    doc: str
    message: type[Message]
    reply: Any
    reads: bool
    operation: Operation | None = None


DESCRIBE: Final = Tool("ksi_describe_tool", DescribeTool.__doc__ or "", DescribeTool, None, True)
AWAIT: Final = Tool(
    "ksi_completion_wait", AwaitCompletion.__doc__ or "", AwaitCompletion, None, True
)
SETTLE: Final = Tool("ksi_settle", SettleCall.__doc__ or "", SettleCall, None, True)


class Catalogue:
    """The tools that one role may use, of the operations that match one of the patterns.

    Attributes:
        tools: by name, in order.
        full, thin: their definitions, as `tools/list` has them.
        digest: of the full definitions; another one means that something has changed.
    """

    def __init__(
        self, operations: Iterable[Operation], role: Role, patterns: Iterable[str] = ("*",)
    ) -> None:
        patterns = tuple(patterns)
        found = [
            _tool(each)
            for each in operations
            if role in each.roles
            and each.name not in OURS
            and each.same_as is None
            and any(fnmatchcase(each.name, pattern) for pattern in patterns)
        ]
        found.append(DESCRIBE)
        if any(not each.reads for each in found):
            found.append(SETTLE)
        if any(each.name == "ksi_completion_status" for each in found):
            found.append(AWAIT)
        self.tools: Mapping[str, Tool] = {each.name: each for each in sorted(found)}
        assert len(self.tools) == len(found) <= TOOLS_MAX
        self.full = {name: _definition(tool) for name, tool in self.tools.items()}
        self.thin = {name: _reminder(tool) for name, tool in self.tools.items()}
        self.thin[DESCRIBE.name] = self.full[DESCRIBE.name]
        said = msgspec.json.encode(self.full, order="deterministic")
        self.digest = hashlib.sha256(said).hexdigest()

    def __getitem__(self, name: str) -> Tool:
        """Return a tool, by its name or that of its operation.

        Raises:
            UnknownOperation: there is none; the hint names the nearest.
        """
        tool = self.tools.get(name) or self.tools.get(tool_name(name))
        if tool is None:
            nearest = unknown(name, self.tools).hint if name else None
            raise UnknownOperation(f"there is no tool {name!r}"[:200], hint=nearest)
        return tool

    def has(self, operation: str) -> bool:
        """Whether an operation is one of the tools."""
        return tool_name(operation) in self.tools

    def arguments(self, tool: Tool, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a call: where text can be none of the values, it is JSON."""
        declared = self.full[tool.name]["inputSchema"]["properties"]
        return {
            name: _parsed(value)
            if isinstance(value, str) and not _takes_text(declared.get(name, {}))
            else value
            for name, value in given.items()
        }


def tool_name(operation: str) -> str:
    """Return the name of the tool for an operation."""
    return "ksi_" + operation.replace(":", "_")


def _tool(operation: Operation) -> Tool:
    reads = operation.kind == "query"
    name, doc = tool_name(operation.name), operation.doc
    return Tool(name, doc, operation.message, operation.reply, reads, operation)


def _definition(tool: Tool) -> dict[str, Any]:
    takes = _schema(tool.message)
    if tool.operation is not None and tool.operation.example:
        takes["examples"] = [dict(tool.operation.example)]
    defined = {
        "name": tool.name,
        "title": tool.name if tool.operation is None else tool.operation.name,
        "description": inspect.cleandoc(tool.doc),
        "inputSchema": takes,
        "annotations": {"readOnlyHint": tool.reads, "openWorldHint": False},
    }
    if tool.reply not in (None, type(None)):
        defined["outputSchema"] = _schema(tool.reply)
    return defined


def _reminder(tool: Tool) -> dict[str, Any]:
    words = tool.doc.split()[:THIN_WORDS]
    description = " ".join(words).rstrip(",.:;")
    return {"name": tool.name, "description": description, "inputSchema": {"type": "object"}}


def _schema(message: Any) -> dict[str, Any]:
    """Return the JSON Schema of a message, its root the object itself, as the protocol wants it.

    Its words are those of the tool. Ids lose the part of their pattern that not every reader of
    schemas knows, and that only tells of line ends.
    """
    encoded = msgspec.json.encode(msgspec.json.schema(message)).replace(rb"(?!\n)", b"")
    schema: dict[str, Any] = msgspec.json.decode(encoded.replace(rb"(?!\\n)", b""))
    definitions = schema.pop("$defs")
    name = schema.pop("$ref").rpartition("/")[2]
    root: dict[str, Any] = definitions[name]
    root = {key: value for key, value in root.items() if key not in ("title", "description")}
    if f'"#/$defs/{name}"'.encode() not in msgspec.json.encode(definitions):
        del definitions[name]
    return {**root, "$defs": definitions} if definitions else root


def _takes_text(declared: Mapping[str, Any]) -> bool:
    """Whether a text is one of the values that a schema admits, as far as it says."""
    if "anyOf" in declared:
        return any(_takes_text(each) for each in declared["anyOf"])
    if "$ref" in declared:
        return False  # a message
    if "enum" in declared:
        return any(isinstance(value, str) for value in declared["enum"])
    return bool(declared.get("type", "string") == "string")


def _parsed(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text  # Its owner says what is wrong with it.
