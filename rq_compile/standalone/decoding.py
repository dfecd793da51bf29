"""Decoding with an engine's KV cache, one sequence at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import is_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

    from .prefix_cache import PrefixCache

# Value of the input ``logits_to_keep``: the number of last tokens of each row for which logits are computed.
LAST, ALL = 1, 0
KEPT = np.array([LAST], np.int64)
# Tokens for which a cache that grows in place has room at first.
LEAST_ROOM = 256


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
    cache, step = manifest["cache"], Step(session, manifest["cache"])
    chunk, beyond = manifest.get("prefill_chunk"), manifest.get("recomputed_beyond")
    start, known = (0, []) if prefix_cache is None else prefix_cache.longest(prompt)
    sequence, room = list(prompt), 0
    past, in_place = known or no_past(cache), all(map(grows_in_place, cache))
    try:
        while True:
            end = min(len(sequence), start + chunk) if chunk else len(sequence)
            if end > room:
                room = max(2 * len(sequence), LEAST_ROOM)  # of the whole prompt: memory without tokens takes no pages
                past = with_room(cache, past, start, room)
                mask, positions = np.ones((1, room), np.int64), np.arange(room, dtype=np.int64)[None]
            present = past if in_place else cache_after(cache, past, end)
            logits = step(np.array([sequence[start:end]], np.int64), mask[:, :end], positions[:, start:end], past, present)
            past, start = present, end
            if start < len(sequence):
                continue
            sequence.append(choose(logits[0]))
            yield sequence[-1]
            if start == beyond:
                past, start = with_room(cache, no_past(cache), 0, room), 0
    finally:
        if prefix_cache is not None:
            prefix_cache.keep(sequence[:start], with_room(cache, past, start, start))


def no_past(cache: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The cache of one sequence before its first token: no keys and values, and states of zeros."""
    return [np.zeros(shape_of(tensor, 1, 0), np.float32) for tensor in cache]


def with_room(cache: Sequence[Mapping[str, Any]], arrays: Sequence[np.ndarray], tokens: int, room: int) -> list[np.ndarray]:
    """``arrays``, which hold ``tokens`` tokens of one sequence, with room for ``room`` tokens where they can grow in place."""
    held = list(arrays)
    for number, tensor in enumerate(cache):
        if grows_in_place(tensor):
            by_token = axes(tensor)[1]
            held[number] = np.empty(shape_of(tensor, 1, room), np.float32)
            first_columns(held[number], by_token, tokens)[...] = first_columns(arrays[number], by_token, tokens)
    return held


def cache_after(cache: Sequence[Mapping[str, Any]], past: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Arrays for the cache of one sequence of ``tokens`` tokens: those of ``past`` that grow in place, and new ones."""
    return [
        array if grows_in_place(tensor) else np.empty(shape_of(tensor, 1, tokens), np.float32)
        for tensor, array in zip(cache, past, strict=True)
    ]


def first_columns(array: np.ndarray, by_token: int | None, count: int) -> np.ndarray:
    """The first ``count`` columns of a cache, a view; all of a state, whose ``by_token`` is None."""
    if by_token is None:
        return array
    return np.moveaxis(np.moveaxis(array, by_token, 0)[:count], 0, by_token)


def grows_in_place(tensor: Mapping[str, Any]) -> bool:
    """Whether a tensor of the cache may have room for further tokens, so that a step can write the new ones into it."""
    return bool(tensor.get("in_place"))


def axes(tensor: Mapping[str, Any]) -> tuple[int, int | None]:
    """The axis of the rows, and that of the tokens; None for a state of a fixed size."""
    shape = tensor["shape"]
    return shape.index("batch"), shape.index("past") if "past" in shape else None


def shape_of(tensor: Mapping[str, Any], rows: int, columns: int) -> list[int]:
    sizes = {"batch": rows, "past": columns}
    return [sizes.get(size, size) for size in tensor["shape"]]


class Step:
    """One step of an engine, with a cache in arrays that the caller provides."""

    def __init__(self, session: onnxruntime.InferenceSession, cache: Sequence[Mapping[str, Any]]) -> None:
        """``cache``: the tensors of the cache, as in an engine's manifest."""
        self._session, self._cache, self._inputs = session, cache, inputs_of(session)
        (self._vocabulary,) = (output.shape[-1] for output in session.get_outputs() if output.name == "logits")
        # Those of a prompt, and of sequences that take their steps together.
        self._bindings: list[_Binding] = []

    def __call__(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Sequence[np.ndarray], present: Sequence[np.ndarray]
    ) -> np.ndarray:
        """See ``step_model.Steps.step``."""
        # Arrays are bound by their addresses, so copies of what is not contiguous have to last until the end of the step.
        before = past if past is present else [np.ascontiguousarray(array) for array in past]
        binding = self._binding(ids.shape, before, present)
        binding.ids[...], binding.positions[...] = ids, positions
        binding.take_anew("attention_mask", mask)
        self._session.run_with_iobinding(binding.bound)
        return binding.logits[:, -1]

    def _binding(self, shape: tuple[int, ...], past: Sequence[np.ndarray], present: Sequence[np.ndarray]) -> _Binding:
        """A binding of this cache to steps with ids of this shape. A cache that grows in place is bound once for many of them."""
        arrays = past if past is present else [*past, *present]
        for binding in self._bindings:
            if binding.fits(shape, arrays):
                break
        else:
            if not all(array.flags.c_contiguous for array in present):
                raise ValueError("an array for the cache after the step is not contiguous")
            kept = LAST if "logits_to_keep" in self._inputs else shape[1]
            binding = _Binding(self._session.io_binding(), self._inputs, shape, (shape[0], kept, self._vocabulary))
            binding.take_cache(self._cache, past, present)
            binding.hold(arrays)
        if not self._bindings or self._bindings[0] is not binding:
            self._bindings = [binding, *(other for other in self._bindings if other is not binding)][:2]
        return binding


class _Binding:
    """What a step reads and writes. ``ids``, ``positions`` and ``logits`` stay where they are from step to step."""

    def __init__(
        self, bound: onnxruntime.IOBinding, inputs: Collection[str], shape: tuple[int, ...], logits: tuple[int, ...]
    ) -> None:
        """``shape``: that of the ids. ``logits``: that of the logits."""
        self.bound, self._inputs = bound, inputs
        self.ids, self.positions, self.logits = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(logits, np.float32)
        self._arrays: list[weakref.ref[np.ndarray]] = []
        for name, array in {"input_ids": self.ids, "position_ids": self.positions, "logits_to_keep": KEPT}.items():
            self.take(name, array)
        self._give("logits", self.logits)

    def fits(self, shape: tuple[int, ...], arrays: Sequence[np.ndarray]) -> bool:
        """Whether this is the binding of ``arrays`` to steps with ids of this shape, see ``hold``."""
        return (
            self.ids.shape == shape
            and len(self._arrays) == len(arrays)
            and all(map(is_, [held() for held in self._arrays], arrays))
        )

    def hold(self, arrays: Sequence[np.ndarray]) -> None:
        """Remember the arrays of the cache: those before and those after the step, or, if it grows in place, the only ones."""
        self._arrays = [weakref.ref(array) for array in arrays]

    def take_cache(self, cache: Sequence[Mapping[str, Any]], past: Sequence[np.ndarray], present: Sequence[np.ndarray]) -> None:
        for tensor, before, after in zip(cache, past, present, strict=True):
            self.take(tensor["past"], before)
            self._give(tensor["present"], after)

    def take(self, name: str, array: np.ndarray) -> None:
        """Let ``array`` be the input ``name``, if there is one. It must last until the end of the step."""
        if name in self._inputs:
            self.bound.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def take_anew(self, name: str, array: np.ndarray) -> None:
        """Let ``array``, or a copy if it is not contiguous, be the input ``name``, if there is one; it is kept until the next."""
        if name in self._inputs:
            self.bound.bind_cpu_input(name, np.ascontiguousarray(array))

    def _give(self, name: str, array: np.ndarray) -> None:
        self.bound.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
