"""Writes a Qwen3-MoE checkpoint for onnxruntime-genai, in int4 or int8: its own builder, to which this adds the MoE layers.

The builder has Qwen3 and the MoE layers of Qwen3.5, but not Qwen3-MoE, which is one with the other and without shared experts.
Weights are rounded in blocks of 32, its default; the head is int8. Prompts compute the logits of the last token only.

    python benchmarks/runtimes/build_onnxruntime_genai.py CHECKPOINT FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

from onnxruntime_genai.models import builder
from onnxruntime_genai.models.builders.qwen import Qwen3Model, Qwen35MoETextModel
from transformers import Qwen3MoeConfig

OPTIONS = {
    4: ["prune_lm_head=true", "moe_quant_type=int4", "matmul_mixed_precision=last_matmul:int8"],
    8: ["prune_lm_head=true", "moe_quant_type=int8"],
}


class Qwen3MoeModel(Qwen3Model):
    get_moe_module = Qwen35MoETextModel.get_moe_module
    make_moe_preprocessing = Qwen35MoETextModel.make_moe_preprocessing
    make_moe_router = Qwen35MoETextModel.make_moe_router

    def __init__(self, config: Qwen3MoeConfig, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.moe_attrs |= {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "normalize_routing_weights": config.norm_topk_prob,
        }
        self.moe_intermediate_size = config.moe_intermediate_size

    def make_moe_subgraph(self, layer_id: int, moe: Any, root_input: str) -> None:
        names = self.make_moe_expert_names(layer_id)
        name = f"/model/layers.{layer_id}/moe/{self.moe_attrs['op_type']}"
        self.make_moe_op(
            name,
            root_input=root_input,
            router_probs=f"/model/layers.{layer_id}/moe/router/Reshape/output_0",
            weight1=names["gate_up_weight"],
            scales1=names["gate_up_scales"],
            bias1=names["gate_up_bias"],
            weight2=names["down_weight"],
            scales2=names["down_scales"],
            bias2=names["down_bias"],
        )
        self.layernorm_attrs["skip_input"] = f"{name}/output_0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=OPTIONS, default=4)
    arguments = parser.parse_args()
    builder.Qwen3Model = Qwen3MoeModel
    paths = "", str(arguments.checkpoint), str(arguments.folder), f"int{arguments.bits}", "cpu", str(arguments.folder / "cache")
    options = builder.parse_extra_options(*paths, OPTIONS[arguments.bits])
    options["hf_details"]["hf_config"].architectures = ["Qwen3ForCausalLM"]  # by which the builder chooses its class
    builder.create_model(*paths, **options)


if __name__ == "__main__":
    main()
