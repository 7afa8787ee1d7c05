"""Errors of ours as the Model Context Protocol has them: with the same code, hint and details."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mcp import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, CallToolResult, TextContent

from ksi.transport.errors import Invalid, KsiError, NotFound

_ASKED_WRONGLY: Final = (Invalid.exit_code, NotFound.exit_code)


def protocol_error(error: KsiError, **more: Any) -> MCPError:
    """Return an error of the protocol: what was asked for is not there, or cannot be said so."""
    code = INVALID_PARAMS if error.exit_code in _ASKED_WRONGLY else INTERNAL_ERROR
    return MCPError(code, f"{error.code}: {error.text}", {**_said(error), **more})


def refused(error: KsiError, *, hint: str | None, details: Mapping[str, Any]) -> CallToolResult:
    """Return the result of a call that was refused, for a model to read and to do better."""
    text = f"{error.code}: {error.text}" + (f"\n{hint}" if hint else "")
    said = {**_said(error), "hint": hint, "details": dict(details)}
    return CallToolResult(content=[TextContent(text=text)], structured_content=said, is_error=True)


def _said(error: KsiError) -> dict[str, Any]:
    return {
        "code": error.code, "text": error.text, "hint": error.hint, "details": error.details
    }  # fmt: skip
