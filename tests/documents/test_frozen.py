"""Files of every version of every schema can be read, schemas change only with their version, and plans do not change
unnoticed."""

import json
from pathlib import Path
from typing import Any

import pytest
from frozen_files import FROZEN, HASHES, cases, made, plan_path, schema_hash

from rq_compile.errors import UserError
from rq_compile.files import read_document, write_document
from rq_compile.schemas import DOCUMENTS
from rq_compile.versions import Versioned

pytestmark = pytest.mark.quick

EXAMPLES = sorted(FROZEN.glob("*.v*.json"))


def example(path: Path) -> tuple[type[Versioned], int]:
    kind, version, *_ = path.name.split(".")
    return DOCUMENTS[kind], int(version[1:])


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_changed_schema_has_a_new_version(kind: str) -> None:
    version = str(DOCUMENTS[kind].current_version())
    pinned = json.loads(HASHES.read_text())[kind]
    assert pinned.get(version) == schema_hash(kind), (
        f"the schema of {kind} changed: raise its schema_version with an upgrade (rq_compile/versions.py), unless this "
        "version was never released; then run make schema frozen"
    )


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_there_is_a_file_of_every_version(kind: str) -> None:
    versions = {version for document, version in map(example, EXAMPLES) if document is DOCUMENTS[kind]}
    assert versions == set(range(1, DOCUMENTS[kind].current_version() + 1))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_files_of_every_version_are_read_or_refused_with_a_way_out(path: Path, tmp_path: Path) -> None:
    kind, version = example(path)
    assert json.loads(path.read_text()).get("schema_version", 1) == version
    if any(step not in kind.upgrades for step in range(version, kind.current_version())):
        with pytest.raises(UserError, match=f"schema version {version} can no longer be read; write it again with rq-compile"):
            read_document(kind, path)
        return
    document: Any = read_document(kind, path)
    assert document.schema_version == kind.current_version()
    write_document(document, tmp_path / "again.json")
    assert read_document(kind, tmp_path / "again.json") == document


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_newer_version_is_refused(path: Path, tmp_path: Path) -> None:
    kind, _ = example(path)
    newer = kind.current_version() + 1
    spoilt = tmp_path / "newer.json"
    spoilt.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": newer, "key_of_tomorrow": 1}))
    with pytest.raises(UserError, match=f"schema version {newer} is that of a newer rq-compile, .* update rq-compile"):
        read_document(kind, spoilt)


def test_a_plan_in_a_manifest_is_upgraded_on_its_own() -> None:
    manifest = json.loads((FROZEN / "engine.v1.json").read_text())
    assert manifest["plan"]["schema_version"] == 1
    read: Any = DOCUMENTS["engine"].model_validate(manifest)
    assert read.plan.schema_version == DOCUMENTS["plan"].current_version()


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: ".".join(map(str, case)))
def test_plans_are_the_same_byte_for_byte(case: tuple, tmp_path: Path) -> None:
    write_document(made(*case), tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == plan_path(*case).read_text(), "look at the change, then run make frozen"
