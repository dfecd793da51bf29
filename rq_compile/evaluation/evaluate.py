"""Compare an engine with the transformers reference on held-out text, window by window, without keeping logits."""

import math
from collections.abc import Callable
from itertools import islice

import numpy as np

from rq_compile.errors import UserError
from rq_compile.evaluation.balance import balance
from rq_compile.evaluation.divergence import Divergence
from rq_compile.evaluation.schema import Evaluation, LayerBalance, TextEvaluation
from rq_compile.evaluation.windows import Windows
from rq_compile.planning.schema import Plan
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.language_model import LanguageModel

Loads = dict[str, np.ndarray]


def evaluate(
    engine: Engine,
    reference: LanguageModel,
    texts: list[Windows],
    *,
    reference_name: str,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of both sides, top-1 agreement, mean KL, and LIS before and after, for each text and over all texts.

    The ranks of an engine share the batches of each text, and all get the result.

    An encoder-decoder model reads the first half of a window and predicts the second. An engine that does not count the rows of
    its slots gets no LIS.

    Raises:
        UserError: the engine was not compiled from the reference (their vocabularies differ).
    """
    plan = engine.manifest.plan
    total_tokens = sum(text.ids.size for text in texts)
    done, ranks = 0, engine.ranks
    all_divergence, all_loads = Divergence(), _no_loads(engine)
    results = []
    for text in texts:
        divergence, loads = Divergence(), _no_loads(engine)
        batches = text.batches(engine.manifest.vocabulary)
        while together := list(islice(batches, ranks.size if ranks else 1)):
            own = together[engine.rank] if engine.rank < len(together) else together[0][:0]
            _compare(engine, reference, own, divergence, loads)
            done += sum(batch.size for batch in together)
            if progress is not None:
                progress(done, total_tokens)
        if ranks:
            divergence = Divergence.sum(ranks.gather(divergence))
        results.append(_summary(text.name, text.ids.size, divergence, _balance(plan, loads)))
        all_divergence.merge(divergence)
        for layer, rows in loads.items():
            all_loads[layer] += rows
    return Evaluation(
        engine=engine.path.name,
        reference=reference_name,
        sequence_length=max(text.ids.shape[1] for text in texts),
        texts=results,
        total=_summary("all", total_tokens, all_divergence, _balance(plan, all_loads)),
        expert_bytes_before=plan.bytes_before,
        expert_bytes_after=engine.manifest.expert_bytes,
    )


def _no_loads(engine: Engine) -> Loads:
    layers = engine.manifest.plan.layers if engine.counts_rows else []
    return {layer.name: np.zeros(len(layer.slots), np.int64) for layer in layers}


def _balance(plan: Plan, loads: Loads) -> list[LayerBalance]:
    return balance(plan, loads) if loads else []


def _compare(engine: Engine, reference: LanguageModel, batch: np.ndarray, divergence: Divergence, loads: Loads) -> None:
    decoder: np.ndarray | None = None
    inputs, targets = batch, batch[:, 1:]
    if engine.encoder_decoder:
        inputs, targets = np.split(batch, [batch.shape[1] // 2], axis=1)
        start = np.full((len(batch), 1), engine.decoder_start or 0, np.int64)
        decoder = np.concatenate([start, targets[:, :-1]], axis=1)
    if engine.counts_rows:
        ours, rows = engine.counted_logits(inputs, decoder_input_ids=decoder)
    else:
        ours, rows = engine.logits(inputs, decoder_input_ids=decoder), {}
    for layer, counts in rows.items():
        loads[layer] += counts
    if not batch.size:
        return  # the batches of the other ranks
    theirs = reference.logits(inputs, decoder_input_ids=decoder)
    if ours.shape[-1] != theirs.shape[-1]:
        raise UserError(
            f"the engine has a vocabulary of {ours.shape[-1]}, but the reference has one of {theirs.shape[-1]}; "
            "give --reference the checkpoint the engine was compiled from",
            2,
        )
    for window in range(len(batch)):  # one window at a time keeps the float64 copies small
        positions = targets.shape[1]
        divergence.add(theirs[window, :positions], ours[window, :positions], targets[window])


def _summary(name: str, tokens: int, divergence: Divergence, layers: list[LayerBalance]) -> TextEvaluation:
    return TextEvaluation(
        name=name,
        tokens=tokens,
        predictions=divergence.predictions,
        perplexity_reference=_finite(divergence.perplexity_reference),
        perplexity_engine=_finite(divergence.perplexity_engine),
        agreement=divergence.agreement,
        kl=_finite(divergence.kl),
        layers=layers,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
