"""The remarks of a plan, one sentence each."""

from collections import Counter, defaultdict
from statistics import fmean

from rq_compile.planning.budget import enough_for
from rq_compile.planning.metrics import excess_removed
from rq_compile.planning.problem import Problem, held_wider
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.planning.skew import EVEN, skew_of, spread, steadiness
from rq_compile.planning.targets import TARGETS
from rq_compile.quantization.formats import BLOCKS


def remarks(problem: Problem, layers: list[LayerPlan]) -> list[str]:
    said = [_stored(problem), _gain(problem, layers), _padding(problem, layers)]
    said += [_held_wider(problem), _constants(layers), _format_mix(layers), _ranks(problem, layers), _unreached(layers)]
    said += [_skew(problem)]
    return [sentence for sentence in said if sentence]


def _stored(problem: Problem) -> str:
    """How a quantized checkpoint stores the experts, and how many bytes keep them without loss."""
    names = sorted({name for layer in problem.layers for name in layer.calibration.stored_as or ()})
    if not names:
        return ""
    lossless = enough_for(sum(layer.experts * int(layer.size[0]) for layer in problem.layers), problem.bytes_before)
    said = (
        f"The checkpoint stores its experts as {', '.join(names)} in {problem.bytes_before / 1e6:.4g} MB; {problem.dtype} holds "
        f"them without loss, in {lossless:g} times the bytes."
    )
    return f"{said} {_one_block(problem)}".rstrip()


def _one_block(problem: Problem) -> str:
    """The cost of having one block for all formats in a layer, if int8 needs the short block of the checkpoint."""
    geometries = [layer.calibration.geometry for layer in problem.layers]
    wider = [geometry.model_copy(update={"block": BLOCKS[0]}) for geometry in geometries]
    here, there = (
        enough_for(sum(geometry.experts * geometry.expert_bytes("int4") for geometry in some), problem.bytes_before)
        for some in (geometries, wider)
    )
    if problem.dtype != "int8" or there >= here:
        return ""
    block = min(geometry.block for geometry in geometries)
    return (
        f"A layer has one block size for int8 and int4, here {block}: int4 takes {here:g} times the bytes, or {there:g} times "
        f"with calibrate --block {BLOCKS[0]}, but int8 would then round a second time."
    )


def _skew(problem: Problem) -> str:
    """Whether replication can help on the target, by the loads of the calibration."""
    skews = [skew_of(layer.calibration) for layer in problem.layers]
    if all(one.gini == 0 for one in skews):
        return ""  # no text was run
    if problem.cost.busiest == "nothing":
        can = f"Replication cannot help on {problem.cost.target} with one rank, which does not wait for any expert"
    elif fmean(one.lis for one in skews) < EVEN:
        can = "Replication cannot help: the load is even"
    else:
        can = f"Replication can help on {problem.cost.target}, which waits for the busiest {problem.cost.busiest}"
    return "; ".join(filter(None, (f"{can}: {spread(skews)}", steadiness(skews)))) + "."


def _gain(problem: Problem, layers: list[LayerPlan]) -> str:
    """The gain of the plan on its target, or why there is none."""
    target = problem.cost.target
    replicas = sum(len(layer.slots) - layer.geometry.experts for layer in layers)
    batch, token = (_ratio(layers, name) for name in ("step_time", "token_time"))
    time = f"the predicted time relative to the unplanned model is {batch} for a batch and {token} for one token"
    if problem.cost.busiest == "nothing":
        why = f"On {target} with one rank, a replica is an alias that saves no time"
        if replicas:
            stored, of_slots = sum(layer.stored_bytes for layer in layers), sum(layer.predicted.bytes_after for layer in layers)
            return (
                f"{why}; this plan has {replicas} nevertheless. Equal copies share their weights: the engine stores "
                f"{stored / 1e6:.2f} MB for slots of {of_slots / 1e6:.2f} MB."
            )
        if not problem.whole and all(slot.format == problem.dtype for layer in layers for slot in layer.slots):
            return (
                f"{why}, and --memory {problem.memory:g} holds every expert as it is, so this plan changes nothing: give less "
                "--memory for a smaller engine that reads fewer bytes, or --target batched or --ranks to balance the load."
            )
        return f"{why}, so no expert is copied and the memory is spent on bits; {time}."
    before, after = _imbalance(problem, layers)
    removed = excess_removed(before, after)
    what = "The busiest rank's load over the mean" if problem.cost.busiest == "rank" else "LIS"
    if before <= 1.0 or removed <= 0:
        return f"{what} was {before:.3f} and is {after:.3f}: on {target}, this plan does not improve the balance; {time}."
    return f"{what} falls from {before:.3f} to {after:.3f}, {100 * removed:.1f} % of the excess; {time}."


def lost_with_lowering(plan: Plan, lowering: str, *, batched: bool, of_ranks: bool) -> str:
    """What a plan loses if it is compiled with a ``lowering`` that waits for something else than the plan's target. Empty if it
    loses nothing. ``batched``: whether the lowering is batched; ``of_ranks``: whether each rank of the plan is a process."""
    if plan.ranks > 1 and not of_ranks:
        return (
            f"The plan balances {plan.ranks} ranks, but --lowering {lowering} puts all slots on one device, where balanced ranks "
            "save no time; compile it to a folder with --lowering ranks, or plan without --ranks."
        )
    if of_ranks or TARGETS[plan.target].batched == batched:
        return ""
    replicas = sum(len(layer.slots) - layer.geometry.experts for layer in plan.layers)
    if batched:
        balance = sum(layer.predicted.strict_lis_after for layer in plan.layers) / len(plan.layers)
        return (
            f"The plan is for {plan.target}, which does not wait for busy experts, so its slots are not balanced: with "
            f"--lowering batched, the busiest has {balance:.2f} times the mean load; plan with --target batched to balance them."
        )
    if not replicas:
        return ""
    error = sum(layer.predicted.error for layer in plan.layers) / len(plan.layers)
    return (
        f"The plan is for {plan.target}, but with --lowering {lowering} its {_count(replicas, 'replica')} share the weights of "
        f"their originals and save no time; the formats that make room for them still cost accuracy (predicted error {error:.1e} "
        "of a layer's output): plan with --target cpu to spend the memory on bits, or compile with --lowering batched."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _ratio(layers: list[LayerPlan], name: str) -> str:
    before, after = (sum(_known(getattr(layer.predicted, f"{name}_{when}")) for layer in layers) for when in ("before", "after"))
    return f"{after / before:.2f}"


def _padding(problem: Problem, layers: list[LayerPlan]) -> str:
    """The padding of a batch that the capacity classes save by themselves, and that the plan saves."""
    if problem.cost.busiest != "slot":
        return ""
    one_before, one_after, before, after = (
        sum(_known(getattr(layer.predicted, name)) for layer in layers) / len(layers)
        for name in ("strict_lis_before", "strict_lis_after", "padded_work_before", "padded_work_after")
    )
    return (
        f"A batch computes {before:.2f} rows per useful row without this plan and {after:.2f} with it, in lanes of several "
        f"widths; with lanes of one width it would be {one_before:.2f} and {one_after:.2f}."
    )


def _imbalance(problem: Problem, layers: list[LayerPlan]) -> tuple[float, float]:
    """The imbalance that the target waits for, before and after, as means over the layers."""
    predictions = [layer.predicted for layer in layers]
    if problem.cost.busiest == "rank":
        pairs = [(_known(p.rank_imbalance_before), _known(p.rank_imbalance_after)) for p in predictions]
    else:
        pairs = [(p.lis_before, p.lis_after) for p in predictions]
    return sum(before for before, _ in pairs) / len(pairs), sum(after for _, after in pairs) / len(pairs)


def _known(value: float | None) -> float:
    assert value is not None, "predictions of this planner are complete"
    return value


def _held_wider(problem: Problem) -> str:
    """Which measured formats a plan does not use, because its engines would store them in more bits."""
    target, layer = problem.cost.target, problem.layers[0].calibration
    unused = [format for format in held_wider(target) if format in layer.error]
    return f"Engines for {target} store {' and '.join(unused)} as int4, so the plan does not use them." if unused else ""


def _constants(layers: list[LayerPlan]) -> str:
    count = sum(len(layer.constant_experts) for layer in layers)
    if not count:
        return ""
    share = fmean(sum(slot.load or 0 for slot in layer.slots if not slot.computed) for layer in layers)
    return (
        f"{count} experts are replaced by their mean outputs on the calibration text (constant): they compute nothing, and "
        f"{100 * share:.2g} % of the choices fall on them."
    )


def _format_mix(layers: list[LayerPlan]) -> str:
    mixed = 0
    for layer in layers:
        formats = defaultdict(set)
        for slot in layer.slots:
            formats[slot.expert].add(slot.format)
        mixed += sum(len(held) > 1 for held in formats.values())
    if not mixed:
        return ""
    return f"Copies of {mixed} experts differ in format, so an answer can depend on the other sequences in its batch."


def _ranks(problem: Problem, layers: list[LayerPlan]) -> str:
    if problem.ranks == 1:
        return ""
    held = [Counter(slot.rank for slot in layer.slots) for layer in layers]
    counts = {count[rank] for count in held for rank in range(problem.ranks)}
    if len(counts) > 1:
        return (
            f"Ranks hold {min(counts)} to {max(counts)} slots of a layer, but serving systems need the same number everywhere: "
            f"choose --ranks that divide the experts, or more --memory, for {_even(problem)} slots."
        )
    size = [
        sum(layer.geometry.expert_bytes(slot.format) for layer in layers for slot in layer.slots if slot.rank == rank)
        for rank in range(problem.ranks)
    ]
    return f"The fullest rank holds {max(size) / 1e6:.2f} MB of experts, the mean rank {sum(size) / len(size) / 1e6:.2f} MB."


def _even(problem: Problem) -> int:
    """The fewest slots of a layer that fill all ranks equally."""
    return max(-(-layer.experts // problem.ranks) * problem.ranks for layer in problem.layers)


def _unreached(layers: list[LayerPlan]) -> str:
    count, experts = sum(len(layer.unreached) for layer in layers), sum(layer.geometry.experts for layer in layers)
    return f"No calibration token reached {count} of the {experts} experts; each keeps a slot." if count else ""
