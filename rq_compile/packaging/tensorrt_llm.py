"""TensorRT-LLM: a load balancer's file, which starts from the placement and keeps it, and the options that name the file.

The format is ``MoeLoadBalancerConfig`` of ``tensorrt_llm``, as documented in ``examples/wide_ep`` of its repository: layers by
their number in the model, slots in consecutive blocks of ``num_slots / ep_size`` per rank, 0 layer updates.
"""

import shlex
from pathlib import Path

import yaml

from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_placement

OPTIONS, BALANCER = "llm_api_options.yaml", "moe_load_balancer.yaml"


def package(source: Path, output: Path, extra_layers: int = 0) -> Package:
    """``extra_layers``: see ``read_placement``.

    Raises:
        UserError: see ``read_placement`` and ``folder_written_beside``.
    """
    placement = read_placement(source, extra_layers)
    balancer = {
        "num_slots": placement.slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(zip(placement.index, placement.by_layer(), strict=True)),
    }
    with folder_written_beside(output) as folder:
        (folder / BALANCER).write_text(
            yaml.safe_dump(balancer, sort_keys=False, default_flow_style=None, width=2**20), encoding="utf-8"
        )
        (folder / OPTIONS).write_text(yaml.safe_dump({"moe_config": {"load_balancer": f"./{BALANCER}"}}), encoding="utf-8")
    ranks = str(placement.ranks)
    serve = ["trtllm-serve", placement.model, "--tp_size", ranks, "--ep_size", ranks, "--extra_llm_api_options", OPTIONS]
    return Package(
        destination="tensorrt-llm",
        folder=str(output),
        files=[OPTIONS, BALANCER],
        run=[f"cd {shlex.quote(str(output))} && {shlex.join(serve)}"],
        remarks=placement.remarks,
    )
