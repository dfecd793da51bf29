"""Says in one sentence what is wrong with a document."""

import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rq_compile.errors import printable

LONGEST = 60  # characters of a value that a sentence shows


def violation(error: ValidationError) -> str:
    """The first violation: its place, the value there, and what is expected."""
    first = error.errors(include_url=False)[0]
    return printable(_sentence(first, ".".join(map(str, first["loc"]))))


def _sentence(first: ErrorDetails, where: str) -> str:
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return f"it is not JSON ({message.removeprefix('Invalid JSON: ')})"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return f"{where} is not a key of this document"
    if kind in ("value_error", "assertion_error"):
        told = message.removeprefix("Value error, ")
        return f"{where}: {told}" if where else told
    return f"{where or 'it'} is {_shown(first['input'])}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
