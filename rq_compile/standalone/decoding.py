"""Decoding with an engine's KV cache, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

    from .prefix_cache import PrefixCache

# Value of the input ``logits_to_keep``: the number of last tokens of each row for which logits are computed.
LAST, ALL = 1, 0


def open_session(
    engine: Path, manifest: Mapping[str, Any], op_library: Path, threads: int = 0, spin: int | None = None
) -> onnxruntime.InferenceSession:
    """A session of the engine on ``threads`` CPU threads; 0 means ONNX Runtime's default. ``op_library``: the library's path.

    ``spin``: microseconds for which a thread without work keeps its processor; default: ONNX Runtime's, which has no limit for
    some milliseconds. Releases of ONNX Runtime that lack the setting ignore it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # ONNX Runtime warns of inputs with a default
    options.intra_op_num_threads = threads
    # Otherwise ONNX Runtime keeps a plan of the memory for every combination of shapes that it has seen.
    options.enable_mem_pattern = False
    if spin is not None:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
    if manifest["lowering"] == "batched":
        # Otherwise, constant folding would keep fp32 copies of the 16-bit weights.
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "65536")
    if manifest["op_library"] is not None:
        options.register_custom_ops_library(str(op_library))
    return onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])


def inputs_of(session: onnxruntime.InferenceSession) -> set[str]:
    """The names of all inputs, including those with a default."""
    return {tensor.name for tensor in (*session.get_inputs(), *session.get_overridable_initializers())}


def until_end(tokens: Iterator[int], most: int, ends: Collection[int]) -> Iterator[int]:
    """Up to ``most`` of ``tokens``, up to but without the first token that is in ``ends``."""
    for _, token in zip(range(most), tokens, strict=False):
        if token in ends:
            return
        yield token


def most_likely(logits: np.ndarray) -> int:
    return int(logits.argmax())


def decode(
    session: onnxruntime.InferenceSession,
    manifest: Mapping[str, Any],
    prompt: Sequence[int],
    choose: Callable[[np.ndarray], int] = most_likely,
    prefix_cache: PrefixCache | None = None,
) -> Iterator[int]:
    """Yield the token after ``prompt`` that ``choose`` takes by its logits ``[vocabulary]``, then the next one, without end.

    ``manifest``: the engine's manifest as parsed JSON. A prompt longer than its ``prefill_chunk`` runs in pieces of that many
    tokens, so that attention scores and activations do not grow with the square of its length. Logits are computed only for the
    last token. When the sequence first exceeds ``recomputed_beyond``, its cache is dropped and the whole sequence runs again.

    ``prefix_cache``: where the cache of the prompt's first tokens is looked up, and that of the sequence is kept at the end.
    """
    inputs, cache = inputs_of(session), manifest["cache"]
    outputs = ["logits", *(tensor["present"] for tensor in cache)]
    sizes = {"batch": 1, "past": 0}
    empty = {tensor["past"]: np.zeros([sizes.get(size, size) for size in tensor["shape"]], np.float32) for tensor in cache}
    chunk, beyond = manifest.get("prefill_chunk"), manifest.get("recomputed_beyond")
    sequence, past, start = list(prompt), empty, 0
    if prefix_cache is not None:
        start, known = prefix_cache.longest(prompt)
        past = dict(zip(empty, known, strict=True)) if known else empty
    try:
        while True:
            end = min(len(sequence), start + chunk) if chunk else len(sequence)
            feeds = {
                "input_ids": np.asarray([sequence[start:end]], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(start, end, dtype=np.int64)[None],
                "logits_to_keep": np.array([LAST], np.int64),
                **past,
            }
            logits, *present = session.run(outputs, {name: value for name, value in feeds.items() if name in inputs})
            past, start = dict(zip(empty, present, strict=True)), end
            if start < len(sequence):
                continue
            sequence.append(choose(logits[0, -1]))
            yield sequence[-1]
            if start == beyond:
                past, start = empty, 0
    finally:
        if prefix_cache is not None:
            prefix_cache.keep(sequence[:start], list(past.values()))
