"""JSON schemas of the files between the stages, written by ``python -m rq_compile.schemas docs/schema``."""

import json
import sys
from pathlib import Path

from rq_compile.calibration.schema import Calibration
from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation
from rq_compile.planning.schema import Plan
from rq_compile.planning.sweep import Sweep
from rq_compile.targets.tensorrt.manifest import TensorRTManifest
from rq_compile.versions import Versioned

DOCUMENTS: dict[str, type[Versioned]] = {
    "calibration": Calibration,
    "plan": Plan,
    "sweep": Sweep,
    "engine": Manifest,
    "tensorrt-engine": TensorRTManifest,
    "evaluation": Evaluation,
    "bench": Bench,
}


def schema(kind: str) -> str:
    """The JSON schema (draft 2020-12) of files of ``kind``, as the text of a file."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **DOCUMENTS[kind].model_json_schema()}
    return json.dumps(made, indent=1) + "\n"


def write(folder: Path) -> None:
    """Write ``<kind>.schema.json`` of every kind into ``folder``."""
    for kind in DOCUMENTS:
        (folder / f"{kind}.schema.json").write_text(schema(kind), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
