"""Refuses what an ONNX Runtime engine does not support, before any export, with layer, value and way out."""

from collections.abc import Iterator
from pathlib import Path

from rq_compile.architectures.dense_modules import dense_modules
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.architectures.ties import remarks_on_ties
from rq_compile.architectures.without_engine import check_engine
from rq_compile.errors import UserError
from rq_compile.lowerings import LOWERINGS, Lowering, lowering_of
from rq_compile.planning.remarks import lost_with_lowering
from rq_compile.planning.schema import LayerPlan, Plan

# Every lowering counts rows and indexes a slot's weights in int32.
LARGEST_MATRIX = 2**31 - 1
# Experts that take so many times the bytes of the plan are worth a remark.
NOTICEABLE = 1.05


def check_same_model(plan: Plan, model: Model, path: Path) -> None:
    """Check that ``plan``, read from ``path``, is for ``model``.

    Raises:
        UserError: the plan was made for other weights.
    """
    if plan.fingerprint != model.fingerprint:
        raise UserError(
            f"{path} was made for {plan.model} ({plan.fingerprint[:12]}), not for {model.path} "
            f"({model.fingerprint[:12]}); calibrate and plan this model",
            2,
        )


def remarks_before(model: Model, plan: Plan, lowering: Lowering) -> Iterator[str]:
    """What a user should know before a compilation: experts that tie, and what the plan loses with this lowering."""
    yield from remarks_on_ties(model)
    if plan.predicted_engine_bytes and lowering.dense_format == "fp32":
        yield (
            f"The plan's {plan.predicted_engine_bytes / 1e6:.4g} MB are those of an engine of --lowering native: --lowering "
            f"{lowering.name} holds the non-expert weights that are not rounded in fp32, so its weights file is larger."
        )
    if wider := held_in_more_bits(plan, lowering):
        yield wider
    if lost := lost_with_lowering(plan, lowering.name, batched=lowering.is_batched(), of_ranks=lowering.of_ranks):
        yield lost


def held_in_more_bits(plan: Plan, lowering: Lowering, option: str = "", keeps: str = "--lowering native") -> str:
    """Which slots ``lowering`` stores in more bits than the plan, and the bytes of all experts then. Empty if there are none.

    ``option`` chose the lowering, by default ``--lowering``, and with ``keeps`` the slots take the plan's bytes.
    """
    wider = lowering.held_differently(plan)
    size = sum(weight.bytes for layer in plan.layers for weight in lowering.expert_weights(layer)) if wider else 0
    if size <= plan.bytes_after * NOTICEABLE:
        return ""
    told = ", ".join(f"{count} {slots}" for slots, count in wider.items())
    return (
        f"With {option or f'--lowering {lowering.name}'}, there are {told}: the experts take {size / 1e6:.4g} MB, not the plan's "
        f"{plan.bytes_after / 1e6:.4g} MB, which {keeps} keeps."
    )


def preflight(model: Model, plan: Plan, lowering: Lowering | str) -> None:
    """Check that ``plan`` is for ONNX Runtime, that it belongs to ``model`` and that ``lowering`` can take all of it.

    Raises:
        UserError: the first thing that does not fit, named with its layer and value.
    """
    # Every lowering can execute the slots of any plan; the target only decides how much the plan gains.
    *others, last = dict.fromkeys(kind.planned_for for kind in LOWERINGS.values())
    if plan.target not in (*others, last):
        known = f"{', '.join(others)} or {last}"
        raise UserError(f"the plan is for target {plan.target}, but ONNX engines are for {known}; re-run rq-compile plan", 2)
    check_plan(model, plan, lowering_of(lowering))


def check_plan(model: Model, plan: Plan, lowering: Lowering) -> None:
    """``preflight`` for a plan of any target.

    Raises:
        UserError: the first thing that does not fit, named with its layer and value.
    """
    check_engine(model)
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
    _check_dense(model, plan, lowering)


def _check_dense(model: Model, plan: Plan, lowering: Lowering) -> None:
    """
    Raises:
        UserError: the model does not have the non-expert matrices of the plan, or the lowering cannot run a format of them.
    """
    known = {matrix: model.shape(matrix) for module in dense_modules(model) for matrix in module.matrices}
    for module in plan.dense:
        for matrix in module.matrices:
            if known.get(matrix.name) != (matrix.rows, matrix.columns):
                raise UserError(
                    f"{model.name} has no non-expert matrix {matrix.name} of {matrix.rows} x {matrix.columns}, as the plan says; "
                    "re-run rq-compile plan",
                    2,
                )
        if module.format != "stored" and not lowering.rounds_dense:
            raise UserError(
                f"the plan rounds {module.name} to {module.format}, but --lowering {lowering.name} does not round non-expert "
                "weights; use --lowering native, or plan with --memory instead of --engine-bytes",
                2,
            )


def check_dense_format(plan: Plan, dense_format: str | None) -> None:
    """``dense_format``: what the user asks for, if anything.

    Raises:
        UserError: the plan already decides the formats of non-expert weights.
    """
    if plan.dense and dense_format is not None:
        raise UserError(
            f"--dense-format {dense_format} contradicts the plan, which chooses the formats of non-expert weights; leave it out, "
            "or plan with --memory instead of --engine-bytes",
            2,
        )


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
    if geometry.activation in lowering.lacks_activations:
        raise UserError(
            f"layer {plan.index} has activation {geometry.activation}, which {lowering.name} lacks; use another --lowering", 2
        )
    lowering.check_layer(plan)
    for slot in plan.slots:
        if slot.format not in lowering.formats:
            raise UserError(
                f"layer {plan.index} stores expert {slot.expert} in {slot.format}, which {lowering.name} lacks; plan without it",
                2,
            )
    if not 1 <= geometry.top_k <= geometry.experts:
        raise UserError(f"layer {plan.index} chooses {geometry.top_k} of {geometry.experts} experts; correct the config", 2)
    if geometry.up_rows * geometry.hidden > LARGEST_MATRIX:
        raise UserError(
            f"layer {plan.index} has experts of {geometry.up_rows} x {geometry.hidden} weights, above {LARGEST_MATRIX}; "
            "compile a model with smaller experts",
            2,
        )
