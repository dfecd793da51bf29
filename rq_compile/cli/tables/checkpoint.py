"""What was found in a checkpoint, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from rq_compile.cli.tables.layout import facts, megabytes, table

if TYPE_CHECKING:
    from rq_compile.inspection import CheckpointFound, LayerFound


def checkpoint_tables(found: CheckpointFound) -> list[RenderableType]:
    """What is known about the checkpoint and, if it cannot be compiled, the reason."""
    dtypes = ", ".join(f"{dtype} {megabytes(size)}" for dtype, size in found.dtypes.items())
    rows = {
        "family": found.model_type,
        "fingerprint": found.fingerprint[:12],
        "tensors": f"{found.tensors} in {found.files} file{'s' * (found.files > 1)}: {dtypes}",
        "quantization": found.storage,
        "storage formats": ", ".join(f"{format} {megabytes(size)}" for format, size in found.formats.items()),
        "compiles": "yes" if found.compiles else f"no: {found.why_not}",
    }
    made = []
    if found.layers:
        rows |= {
            "weights": f"{found.parameters:,}, {found.active_parameters:,} active; experts {megabytes(found.expert_bytes or 0)}",
            "tied": ", ".join(f"{weight} = {other}" for weight, other in found.tied.items()) or "nothing",
            "left out": _listed(found.unused),
            "context": f"{found.context_length or 'unstated'}, vocabulary {found.vocabulary}",
            "end of text": ", ".join(map(str, found.end_of_text or ())) or "none",
        }
        layers = table("MoE layers", "layer", "experts", "top-k", "hidden", "intermediate", "activation", "stored", "MB")
        for same in _runs(found.layers):
            first, last = same[0], same[-1]
            layers.add_row(
                str(first.index) if first is last else f"{first.index}-{last.index}",
                *map(str, (first.experts, first.top_k, first.hidden, first.intermediate, first.activation, first.stored)),
                f"{first.bytes / 1e6:.2f}",
            )
        made = [layers]
    rows["tokenizer"] = "tokenizer.json" if found.tokenizer else "no tokenizer.json"
    rows["remarks"] = "; ".join(found.remarks) or "none"
    return [facts(f"checkpoint {found.name}", **rows), *made]


def _runs(layers: list[LayerFound]) -> list[list[LayerFound]]:
    """Groups of neighbouring layers that differ only in their number."""
    alike = lambda layer: layer.model_dump(exclude={"index", "name"})  # noqa: E731
    runs: list[list[LayerFound]] = []
    for layer in layers:
        if runs and runs[-1][-1].index + 1 == layer.index and alike(runs[-1][-1]) == alike(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _listed(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more tensors" if len(names) > shown else "") or "nothing"
