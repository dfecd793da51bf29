"""Weights that a session maps from a file are marked for huge pages before they are read; the pages do not change results."""

from pathlib import Path

import pytest
from op_nodes import python_with

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

MAPPED = """
import sys
from pathlib import Path
import numpy as np, onnx, onnxruntime
from onnx import TensorProto, helper
from rq_compile.engine.library import library_path

columns, panels = 1024, int(sys.argv[2])
folder, random = Path(sys.argv[1]), np.random.default_rng(0)
shape = [1, panels, columns // 4, 64]
random.integers(0, 256, shape, np.uint8).tofile(folder / "weights")
packed = TensorProto(name="int8_packed", data_type=TensorProto.UINT8, dims=shape, data_location=TensorProto.EXTERNAL)
packed.external_data.add(key="location", value="weights")
scales = onnx.numpy_helper.from_array(np.ones((1, panels, columns // 128, 16), np.float32), "int8_scales")
inputs = ["x", "int8_packed", "int8_scales"]
node = helper.make_node("DenseGemm", inputs, ["y"], domain="rq.moe", formats=[1], activation_bits=8)
node.attribute.append(helper.make_attribute("outputs", 16 * panels))  # make_node has an argument of the same name
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
graph = helper.make_graph([node], "test", values[:1], values[1:], [packed, scales])
imports = [helper.make_opsetid("", 17), helper.make_opsetid("rq.moe", 2)]
onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), folder / "model.onnx")
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(library_path()))
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
x = random.standard_normal((3, columns), np.float32)
all_rows = session.run(None, {"x": x})[0]
for rows in (1, 2, 3):  # now the pages of the weights are known, and the order of reading depends on them
    assert session.run(None, {"x": x[:rows]})[0].tobytes() == all_rows[:rows].tobytes()
mapping, marked = "", False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if "-" in line.split()[0]:
        mapping = line
    elif line.startswith("VmFlags:") and mapping.endswith("/weights"):
        marked |= " hg" in line
print(marked)
"""


@pytest.mark.skipif(not THP.is_file(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize(("panels", "marked"), [(512, True), (64, False)])  # 8 MiB, and less than one huge page
def test_mapped_weights(tmp_path: Path, panels: int, marked: bool) -> None:
    result = python_with(None, "-c", MAPPED, str(tmp_path), str(panels))
    assert result.stdout.split() == [str(marked)], result.stderr
