"""vLLM-Ascend: the expert map of its static EPLB.

``expert_file_to_tensor`` (``vllm_ascend/eplb/core/eplb_utils.py``) uses the n-th entry of ``layer_list`` for the n-th MoE layer;
dense layers are not counted. This is the EPLB of Model Runner V1; Model Runner V2 has vLLM's own (vllm-ascend #13410), which
reads no map.
"""

import json
import shlex
from pathlib import Path

from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_placement

FILE = "expert_map.json"


def package(source: Path, output: Path, extra_layers: int = 0) -> Package:
    """``extra_layers``: see ``read_placement``.

    Raises:
        UserError: see ``read_placement`` and ``folder_written_beside``.
    """
    placement = read_placement(source, extra_layers)
    layers = [
        {
            "layer_id": number,
            "device_count": placement.ranks,
            "device_list": [{"device_id": rank, "device_expert": held} for rank, held in enumerate(layer.tolist())],
        }
        for number, layer in enumerate(placement.experts)
    ]
    with folder_written_beside(output) as folder:
        (folder / FILE).write_text(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n", encoding="utf-8")
    serve = ["vllm", "serve", placement.model, "--tensor-parallel-size", str(placement.ranks), "--enable-expert-parallel"]
    serve += ["--additional-config", json.dumps({"eplb_config": {"expert_map_path": str(output / FILE)}})]
    return Package(
        destination="vllm-ascend",
        folder=str(output),
        files=[FILE],
        run=[shlex.join(serve)],
        remarks=[
            *placement.remarks,
            "vLLM-Ascend reads this map only with its Model Runner V1; Model Runner V2 uses vLLM's balancer, which reads no map",
        ],
    )
