"""The JSON schemas in docs/schema: they match the code, and real files match them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rq_compile.schemas import DOCUMENTS, schema, write

pytestmark = pytest.mark.quick

COMMITTED = Path(__file__).parents[2] / "docs" / "schema"
FILES = {"calibration": "calibration.json", "plan": "plan.json", "engine": "model.json"}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_committed_schemas_are_those_of_the_code(kind: str) -> None:
    assert (COMMITTED / f"{kind}.schema.json").read_text() == schema(kind), "run make schema and commit what it writes"


def test_writing(tmp_path: Path) -> None:
    write(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in COMMITTED.iterdir()}


@pytest.fixture(params=FILES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def validator(kind: str) -> jsonschema.Draft202012Validator:
    made = json.loads(schema(kind))
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.fixture
def document(kind: str, stages: Path) -> dict[str, Any]:
    return json.loads((stages / FILES[kind]).read_text())


def test_real_files_follow_them(validator: jsonschema.Draft202012Validator, document: dict[str, Any]) -> None:
    validator.validate(document)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.update(more=1),
        lambda document: document.update(schema_version=99),
        lambda document: document.update(kind="something"),
        lambda document: document.pop("tool"),
        lambda document: document.get("plan", document).update(layers=[]),
        lambda document: document.get("plan", document)["layers"][0].update(more=1),
        lambda document: document.get("plan", document)["layers"][0]["geometry"].update(experts="eight"),
    ],
)
def test_they_refuse_what_the_code_refuses(
    validator: jsonschema.Draft202012Validator, document: dict[str, Any], kind: str, spoil: Callable[[dict[str, Any]], object]
) -> None:
    spoilt = copy.deepcopy(document)
    spoil(spoilt)
    assert not validator.is_valid(spoilt)
    with pytest.raises(ValueError, match="validation error"):
        DOCUMENTS[kind].model_validate_json(json.dumps(spoilt))
