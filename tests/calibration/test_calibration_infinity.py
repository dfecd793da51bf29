"""An error is infinite if a format cannot hold a weight. It is null in the file, as JSON has no infinity."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import numpy as np
from calibrated import TEXTS, with_tensor
from click.testing import Result

from rq_compile.calibration.schema import Calibration
from rq_compile.files import read_document
from rq_compile.schemas import schema


def strictly(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_null_in_the_file_and_infinite_once_read(model: Path, tmp_path: Path, rq_compile: Callable[..., Result]) -> None:
    def beyond_fp16(weights: np.ndarray) -> np.ndarray:
        weights[3, 4] = 70000
        return weights

    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    changed = with_tensor(model, tmp_path / "model", name, beyond_fp16)
    text, output = tmp_path / "text.txt", tmp_path / "calibration.json"
    text.write_text(TEXTS["first.txt"])
    result = rq_compile("calibrate", changed.path, "--text", text, "-o", output, "--quantizer", "nearest", "--json", "-q")
    assert result.exit_code == 0, result.stderr
    document = strictly(output.read_text())
    assert document == strictly(result.stdout)
    jsonschema.validate(document, json.loads(schema("calibration")))
    assert [error is None for error in document["layers"][1]["error"]["fp16"]] == [expert == 5 for expert in range(8)]
    read = read_document(Calibration, output)
    assert read.layers[1].error["fp16"][5] == math.inf
    assert all(math.isfinite(error) for error in read.layers[1].error["bf16"])
    # As it was written before.
    output.write_text(output.read_text().replace("null", "Infinity", 1).replace('"statistics": Infinity', '"statistics": null'))
    assert read_document(Calibration, output) == read
    assert rq_compile("plan", output, "-o", tmp_path / "plan.json").exit_code == 0
