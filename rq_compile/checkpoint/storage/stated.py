"""What a checkpoint states about its quantization: in config.json, or in hf_quant_config.json beside it.

The format of a weight follows from its tensors. The statements are checked against them, and decide where tensors look alike.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
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
        if not self._groups or self._ignored.rank(module) in (NAMED, MATCHED):
            return {}
        found = [(rank, weights) for targets, weights in self._groups if (rank := targets.rank(module)) is not None]
        weights = min(found, key=lambda match: match[0])[1] if found else None
        return weights if isinstance(weights, dict) else {}

    @cached_property
    def _ignored(self) -> "Targets":
        return Targets.of(self.settings.get("ignore"))

    @cached_property
    def _groups(self) -> list[tuple["Targets", Any]]:
        groups = self.settings.get("config_groups")
        given = groups.values() if isinstance(groups, dict) else ()
        return [(Targets.of(group.get("targets")), group.get("weights")) for group in given if isinstance(group, dict)]


NAMED, MATCHED, OF_CLASS = range(3)  # how a target selects a module; the first has the highest priority


@dataclass(frozen=True)
class Targets:
    """A list of compressed-tensors' targets: modules by name, patterns ("re:...") of their names, and classes."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, stated: Any) -> "Targets":
        """Read the targets that a config states; entries that are not targets are ignored."""
        targets = [item for item in stated if isinstance(item, str)] if isinstance(stated, list) else []
        patterns = []
        for target in targets:
            if target.startswith("re:"):
                with suppress(re.error):
                    patterns.append(re.compile(target.removeprefix("re:")))
        return cls(frozenset(targets), tuple(patterns))

    def rank(self, module: str) -> int | None:
        """``NAMED``, ``MATCHED`` or ``OF_CLASS``, or None if no target selects the linear layer ``module``."""
        if module in self.names:
            return NAMED
        if any(pattern.match(module) for pattern in self.patterns):
            return MATCHED
        return OF_CLASS if "Linear" in self.names else None


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
