"""What a checkpoint states about its quantization: in config.json, or in hf_quant_config.json beside it.

The format of a weight follows from its tensors. The statements are checked against them, and decide where tensors look alike.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq_compile.checkpoint.folder import read_json

MODELOPT_FILE = "hf_quant_config.json"
QUANTIZATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Stated:
    """``settings``: the JSON object; empty if nothing, or something else, is stated. ``file`` and ``key``: the place of the
    statement; None if there is none."""

    settings: dict[str, Any]
    file: Path
    key: str | None = None

    @property
    def method(self) -> str:
        """``quant_method`` in lower case; "" if none is stated."""
        method = self.settings.get("quant_method")
        return method.lower() if isinstance(method, str) and method.isprintable() else ""

    @property
    def named(self) -> str | None:
        """The place of the statement and the method, for a message; None if nothing is stated."""
        return None if self.key is None else f"{self.key}: {self.method or 'unknown'}"

    def text(self, key: str) -> str:
        value = self.settings.get(key)
        return value.lower() if isinstance(value, str) else ""

    def number(self, key: str) -> int | None:
        value = self.settings.get(key)
        return value if type(value) is int else None

    def block(self, module: str) -> tuple[int, int] | None:
        """The stated rows and columns of the blocks that share a scale in weights of ``module``."""
        block = self.settings.get("weight_block_size") or self.weights(module).get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return block[0], block[1]
        return None

    def floats(self, module: str) -> bool | None:
        """Whether the weights of ``module`` are stated to be quantized to floats or to integers; None if nothing is stated."""
        kind = self.weights(module).get("type")
        if kind in ("float", "int"):
            return kind == "float"
        if self.method in ("fp8", "mxfp8", "mxfp4", "fbgemm_fp8"):
            return True
        layers = self.settings.get("quantized_layers")
        layer = layers.get(module) if isinstance(layers, dict) else None
        algorithm = layer.get("quant_algo") if isinstance(layer, dict) else self.settings.get("quant_algo")
        return True if isinstance(algorithm, str) and ("FP8" in algorithm or "FP4" in algorithm) else None

    def weights(self, module: str) -> dict[str, Any]:
        """The settings of compressed-tensors for the weights of ``module``: those of the group whose targets name it. Full names
        come before patterns, and patterns before classes. {} if there is no such group."""
        groups = self.settings.get("config_groups")
        if not isinstance(groups, dict) or any(_matches(module, target) for target in _strings(self.settings.get("ignore"))):
            return {}
        found = [
            (rank, group.get("weights"))
            for group in groups.values()
            if isinstance(group, dict)
            for target in _strings(group.get("targets"))
            if (rank := _rank(module, target)) is not None
        ]
        weights = min(found, key=lambda match: match[0])[1] if found else None
        return weights if isinstance(weights, dict) else {}


def stated_of(folder: Path, config: dict[str, Any]) -> Stated:
    """
    Raises:
        UserError: ModelOpt's file does not hold a JSON object.
    """
    # Multimodal checkpoints hold it at the top level, or beside the text model's sizes.
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION:
            if level.get(key):
                return Stated(level[key] if isinstance(level[key], dict) else {}, folder / "config.json", key)
    file = folder / MODELOPT_FILE
    if not file.exists():
        return Stated({}, folder / "config.json")
    settings = read_json(file).get("quantization")
    return Stated({"quant_method": "modelopt", **(settings if isinstance(settings, dict) else {})}, file, "quantization")


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _rank(module: str, target: str) -> int | None:
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if _matches(module, target) else None
    return 2 if target == "Linear" else None


def _matches(module: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False
