"""What an ONNX Runtime engine cannot take is refused here, before any export, with layer, value and way out."""

from pathlib import Path
from typing import get_args

from rq_compile.architectures.geometry import Activation
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan, Plan, Target
from rq_compile.quantization.formats import FORMATS, Format
from rq_compile.targets.kernel_sizes import check_kernel_sizes
from rq_compile.targets.manifest import Lowering

ACTIVATIONS: dict[Lowering, tuple[Activation, ...]] = dict.fromkeys(get_args(Lowering), get_args(Activation))
TARGET_FORMATS: dict[Lowering, tuple[Format, ...]] = dict.fromkeys(get_args(Lowering), FORMATS)
# Every lowering executes the slots of a plan made for another; what the plan was made for only decides what it gains.
TARGETS: tuple[Target, ...] = ("cpu", "batched", "cuda")
# Every lowering counts rows and indexes a slot's weights in int32.
LARGEST_MATRIX = 2**31 - 1


def check_same_model(plan: Plan, model: Model, path: Path) -> None:
    """``path`` holds the plan.

    Raises:
        UserError: the plan was made for other weights.
    """
    if plan.fingerprint != model.fingerprint:
        raise UserError(
            f"{path} was made for {plan.model} ({plan.fingerprint[:12]}), not for {model.path} "
            f"({model.fingerprint[:12]}); calibrate and plan this model",
            2,
        )


def preflight(model: Model, plan: Plan, lowering: Lowering) -> None:
    """Check that ``plan`` belongs to ``model`` and that ``lowering`` can take all of it.

    Raises:
        UserError: the first thing that does not fit, named with its layer and value.
    """
    if plan.target not in TARGETS:
        known = f"{', '.join(TARGETS[:-1])} or {TARGETS[-1]}"
        raise UserError(f"the plan is for target {plan.target}, but ONNX engines are for {known}; re-run rq-compile plan", 2)
    planned = {layer.name: layer for layer in plan.layers}
    for layer in model.layers:
        if layer.name in planned:
            _same_experts(model, layer, planned[layer.name])
    if plan.fingerprint != model.fingerprint:
        raise UserError(
            f"the plan was made for {plan.model} ({plan.fingerprint[:12]}), not for {model.name} "
            f"({model.fingerprint[:12]}); re-run rq-compile plan on a calibration of {model.name}",
            2,
        )
    missing = [layer.name for layer in model.layers if layer.name not in planned]
    unknown = sorted(planned.keys() - {layer.name for layer in model.layers})
    if missing:
        raise UserError(f"the plan has no layer {missing[0]} of {model.name}; re-run rq-compile plan", 2)
    if unknown:
        raise UserError(f"{model.name} has no MoE layer {unknown[0]} of the plan; re-run rq-compile plan", 2)
    for layer_plan in plan.layers:
        _supported(layer_plan, lowering)


def _same_experts(model: Model, layer: MoeLayer, plan: LayerPlan) -> None:
    experts = layer.geometry.experts
    for slot in plan.slots:
        if slot.expert >= experts:
            raise UserError(
                f"layer {layer.index} of the plan places expert {slot.expert}, but {model.name} has {experts} experts "
                f"(0-{experts - 1}); re-run rq-compile plan",
                2,
            )
    different = [(k, v) for k, v in layer.geometry if k != "block" and getattr(plan.geometry, k) != v]
    if different:
        field, expected = different[0]
        raise UserError(
            f"layer {layer.index} of the plan has {field} {getattr(plan.geometry, field)}, but {model.name} has {expected}; "
            "re-run rq-compile plan",
            2,
        )


def _supported(plan: LayerPlan, lowering: Lowering) -> None:
    geometry = plan.geometry
    if geometry.activation not in ACTIVATIONS[lowering]:
        raise UserError(
            f"layer {plan.index} uses activation {geometry.activation}, which {lowering} lacks; use another --lowering", 2
        )
    if lowering == "cuda":
        check_kernel_sizes(plan, "compile with --lowering native")
    for slot in plan.slots:
        if slot.format not in TARGET_FORMATS[lowering]:
            raise UserError(
                f"layer {plan.index} stores expert {slot.expert} in {slot.format}, which {lowering} lacks; plan without it", 2
            )
    if not 1 <= geometry.top_k <= geometry.experts:
        raise UserError(f"layer {plan.index} chooses {geometry.top_k} of {geometry.experts} experts; correct the config", 2)
    if geometry.up_rows * geometry.hidden > LARGEST_MATRIX:
        raise UserError(
            f"layer {plan.index} has experts of {geometry.up_rows} x {geometry.hidden} weights, above {LARGEST_MATRIX}; "
            "compile a model with smaller experts",
            2,
        )
