"""Weights that a session maps from a file are marked for huge pages before they are read."""

from pathlib import Path

import pytest
from op_nodes import python_with

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

MAPPED = """
import sys
from pathlib import Path
import numpy as np, onnx, onnxruntime
from onnx import TensorProto, helper
from rq_compile.targets.library import library_path

columns, panels = 1024, int(sys.argv[2])
folder = Path(sys.argv[1])
shape = [1, panels, columns, 16]
np.ones(shape, np.float32).tofile(folder / "weights")
tensor = TensorProto(name="float_weights", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
tensor.external_data.add(key="location", value="weights")
node = helper.make_node("DenseGemm", ["x", "float_weights"], ["y"], domain="rq.moe", formats=[0])
node.attribute.append(helper.make_attribute("outputs", 16 * panels))
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
graph = helper.make_graph([node], "test", values[:1], values[1:], [tensor])
imports = [helper.make_opsetid("", 17), helper.make_opsetid("rq.moe", 1)]
onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), folder / "model.onnx")
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(library_path()))
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
assert (session.run(None, {"x": np.ones((1, columns), np.float32)})[0] == columns).all()
mapping, marked = "", False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if "-" in line.split()[0]:
        mapping = line
    elif line.startswith("VmFlags:") and mapping.endswith("/weights"):
        marked |= " hg" in line
print(marked)
"""


@pytest.mark.skipif(not THP.is_file(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize(("panels", "marked"), [(128, True), (8, False)])  # 8 MiB, and less than one huge page
def test_mapped_weights(tmp_path: Path, panels: int, marked: bool) -> None:
    result = python_with(None, "-c", MAPPED, str(tmp_path), str(panels))
    assert result.stdout.split() == [str(marked)], result.stderr
