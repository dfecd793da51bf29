"""The contents of tests/frozen: ``python tests/support/frozen_files.py`` rewrites the files that follow from the code."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from rq_compile.calibration.schema import Calibration
from rq_compile.files import read_document, write_document
from rq_compile.planning.plan import POLICIES, make_plan
from rq_compile.planning.schema import Plan, Target
from rq_compile.schemas import DOCUMENTS

FROZEN = Path(__file__).parents[1] / "frozen"
HASHES = FROZEN / "schemas.json"
PLANS = FROZEN / "plans"
MEMORY = {"optimal": 0.7, "eplb": 1.5}
ON_RANKS: tuple[Target, ...] = ("cuda", "batched")


def schema_hash(kind: str) -> str:
    """The hash of the part of a schema that matters to programs, without descriptions and titles."""
    text = json.dumps(_without_words(DOCUMENTS[kind].model_json_schema()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_words(schema: Any, names: bool = False) -> Any:
    """``names``: the keys of ``schema`` are those of a document, or of definitions."""
    if isinstance(schema, list):
        return [_without_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_words(value, names=not names and key in ("properties", "$defs"))
        for key, value in schema.items()
        if names or key not in ("description", "title")
    }


def cases() -> Iterator[tuple[str, Target, int]]:
    """Policy, target and ranks of every plan."""
    for policy in POLICIES:
        for target in get_args(Target):
            yield policy, target, 1
        for target in ON_RANKS:
            yield policy, target, 2


def plan_path(policy: str, target: str, ranks: int) -> Path:
    return PLANS / f"{policy}.{target}.{ranks}.json"


def made(policy: str, target: str, ranks: int) -> Plan:
    """The version of rq-compile is removed: plans change only with the planner."""
    calibration = read_document(Calibration, PLANS / "calibration.json")
    plan = make_plan(calibration, policy=policy, memory=MEMORY.get(policy, 1.0), ranks=ranks, target=target)
    return plan.model_copy(update={"tool": "rq-compile"})


def write() -> None:
    known = json.loads(HASHES.read_text()) if HASHES.is_file() else {}
    for kind, document in DOCUMENTS.items():
        known.setdefault(kind, {})[str(document.current_version())] = schema_hash(kind)
    HASHES.write_text(json.dumps(known, indent=1) + "\n")
    for case in cases():
        write_document(made(*case), plan_path(*case))


if __name__ == "__main__":
    write()
