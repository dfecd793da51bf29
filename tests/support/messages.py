"""The rules for a message to the user: one sentence that names a thing, a value and an action.

As a plugin of pytest it checks every ``UserError`` that the package raises while tests run: the test that provokes a message
which breaks a rule fails.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rq_compile as package
from rq_compile.errors import UserError

PACKAGE = Path(package.__file__).parent
VALUE = "'x'"
# A way out begins with one of these words; the part before a comma may name the case that it is for ("for .plan use ...").
ACTIONS = re.compile(
    r"\b(add|allow|build|calibrate|check|choose|compile|convert|copy|correct|dequantize|download|end|free|git|give|inspect|install|"
    r"keep|leave|look|make|move|name|package|plan|put|quantize|raise|re-run|record|remove|rename|repair|run|save|say|see|set|shorten|split|"
    r"start|take|update|use|wait|write)\b"
)
# An incomplete or damaged copy: only in this case, another copy helps.
BAD_COPY = re.compile(r"truncated|damaged|incomplete|is not a safetensors file|cannot be read")

# Exceptions of this package, whose texts follow these rules.
OWN = {"UserError", "BuildError", "ContractError", "SamplingError"}

# Place where it was raised -> its text, for the messages that have not been checked yet.
said: dict[str, str] = {}


def faults(message: str) -> list[str]:
    """The faults of ``message``, as shown to a user; empty if there are none."""
    problem, _, way_out = message.partition("; ")
    found = {
        "more than one line": "\n" in message,
        "ends in a full stop": re.search(r"\S\.$", message) is not None,
        "two sentences": re.search(r"\w\. [A-Z]", message) is not None,
        "names no action": not problem or not (way_out.startswith("did you mean") or ACTIONS.search(way_out)),
        "a fresh copy would not help": "download" in way_out and not BAD_COPY.search(problem),
        "'is no' for 'is not a'": re.search(r"(?<!there )\b(is|are) no [a-z]", message) is not None,
        "for who": re.search(r"\bfor who\b", message) is not None,
    }
    return [fault for fault, there in found.items() if there]


def template_faults(text: str) -> list[str]:
    """``faults`` of a message in the source, whose values are inserted or written out (a number, an option, a file)."""
    valued = re.search(rf"{VALUE}|\d|['\"]|--\w|\w\.\w|NaN", text)
    return faults(text) + ([] if valued else ["names no value"])


def templates() -> Iterator[tuple[str, str]]:
    """Every message in the source: its place, and its text with ``VALUE`` for inserted values."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UserError" and node.args:
                text = template(node.args[0])
                if text is not None:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def whole_quotes() -> Iterator[str]:
    """Places where a message contains a caught exception directly, rather than its ``errors.reason``; our own exceptions are
    allowed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for handler in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(handler, ast.ExceptHandler) and handler.name and not OWN & _names(handler.type):
                for call in ast.walk(handler):
                    if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "UserError":
                        values = [node.value for node in ast.walk(call) if isinstance(node, ast.FormattedValue)]
                        if any(isinstance(value, ast.Name) and value.id == handler.name for value in values):
                            yield f"{path.relative_to(PACKAGE)}:{call.lineno}"


def _names(types: ast.expr | None) -> set[str]:
    return {node.id if isinstance(node, ast.Name) else getattr(node, "attr", "") for node in ast.walk(types)} if types else set()


def template(message: ast.expr) -> str | None:
    """The text, or None if the message is made elsewhere."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if not isinstance(message, ast.JoinedStr):
        return None
    pieces = [piece.value if isinstance(piece, ast.Constant) else VALUE for piece in message.values]
    text = "".join(map(str, pieces))
    # If the beginning of a way out is inserted, it is checked when tests raise the message.
    return None if f"; {VALUE}" in text else text


def pytest_configure(config: pytest.Config) -> None:
    plain = UserError.__init__

    def recorded(self: UserError, message: str, exit_status: int = 1) -> None:
        plain(self, message, exit_status)
        caller = sys._getframe(1)
        if Path(caller.f_code.co_filename).is_relative_to(PACKAGE):
            said[f"{Path(caller.f_code.co_filename).relative_to(PACKAGE)}:{caller.f_lineno}: {message}"] = message

    UserError.__init__ = recorded  # type: ignore[method-assign]


def new_faults() -> list[str]:
    """The faults of the messages in ``said``, which is empty afterwards."""
    wrong = [f"{place}: {found}" for place, text in said.items() if (found := faults(text))]
    said.clear()
    return wrong


@pytest.fixture(autouse=True)
def _messages_follow_the_rules() -> Iterator[None]:
    yield
    assert new_faults() == []
