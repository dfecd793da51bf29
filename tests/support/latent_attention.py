"""Nodes of LatentAttention to run in ONNX Runtime, random inputs for them, and their expected results in float64.

Run as a program, it checks some cases with the instruction set of RQ_MOE_ISA.
"""

from dataclasses import dataclass, replace
from typing import Any

import cache_attention
import numpy as np
import onnxruntime
from cache_attention import causal
from onnx import TensorProto, helper
from op_nodes import ONNX_TYPES, Weights, pack

from rq_compile.engine import library

INPUTS = ("query", "latent", "position", "past_latent", "past_position", "mask", "sinks")
CACHES = ("latent", "position")


@dataclass(frozen=True)
class Case:
    """Inputs of one call. The caches may have room for more columns than the mask. ``weights``: kv_b."""

    heads: int
    nope: int
    value: int
    scale: float
    query: np.ndarray
    latent: np.ndarray
    position: np.ndarray
    past_latent: np.ndarray
    past_position: np.ndarray
    mask: np.ndarray
    weights: Weights
    sinks: np.ndarray | None = None

    @property
    def total(self) -> int:
        return self.mask.shape[3]

    @property
    def length(self) -> int:
        return max(self.past_latent.shape[2], self.total)

    def feeds(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in INPUTS if getattr(self, name) is not None}

    def operands(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.weights.inputs.items() if array is not None}


def random_case(
    rng: np.random.Generator,
    mask: np.ndarray,
    heads: int = 4,
    nope: int = 16,
    rope: int = 8,
    value: int = 16,
    rank: int = 24,
    *,
    sequences: int | None = None,
    steps: int | None = None,
    length: int = 0,
    sinks: bool = False,
    format: int = 0,
    float_type: Any = np.float32,
) -> Case:
    """Whatever no row reads, also beyond the mask, is NaN. A ``length`` of 0 is a cache without room. ``format``: a group."""
    caches = cache_attention.random_case(
        rng, mask, 1, 1, rank, rope or 1, sequences=sequences, steps=steps, length=length, sinks=False
    )
    batch, steps, _ = caches.key.shape
    weights = pack(rng, [format], heads * (nope + value), rank, float_type)
    # Of any format: keys and values about as large as the latents.
    query = rng.normal(size=(batch, steps, heads * (nope + rope))).astype(np.float32) * np.float32(2 / weights.exact.std())
    return Case(
        heads, nope, value, 0.3 * (nope + rope) ** -0.5 / rank**0.5, query, caches.key, caches.value[..., :rope], caches.past_key,
        caches.past_value[..., :rope], mask, weights, rng.normal(size=heads).astype(np.float32) if sinks else None,
    )  # fmt: skip


def session_of(case: Case, threads: int = 1) -> onnxruntime.InferenceSession:
    operands = case.operands()
    names = [name if name != "sinks" or case.sinks is not None else "" for name in INPUTS]
    node = helper.make_node(
        "LatentAttention", [*names, *operands], ["y", "present_latent", "present_position"], domain="rq.moe",
        num_heads=case.heads, qk_nope_head_dim=case.nope, v_head_dim=case.value, scale=case.scale, formats=case.weights.formats,
    )  # fmt: skip
    kinds = dict.fromkeys(INPUTS, TensorProto.FLOAT) | {"mask": TensorProto.BOOL}
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info(name, kinds[name], [None] * array.ndim) for name, array in case.feeds().items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
        [helper.make_tensor(n, ONNX_TYPES[a.dtype], a.shape, a.tobytes(), raw=True) for n, a in operands.items()],
    )
    return cache_attention.opened(graph, threads)


def attend(case: Case, threads: int = 1) -> list[np.ndarray]:
    return session_of(case, threads).run(None, case.feeds())


def attend_in_place(case: Case, threads: int = 1) -> list[np.ndarray]:
    return cache_attention.run_in_place(session_of(case, threads), case.feeds())


def expanded(case: Case) -> cache_attention.Case:
    """The same attention over keys and values of every head, in float64."""
    exact = case.weights.exact[0].reshape(case.heads, case.nope + case.value, -1)

    def keys_and_values(latents: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By head, from ``[batch, tokens, columns]``."""
        both = np.einsum("btr,hnr->bhtn", latents.astype(np.float64), exact)
        shared = np.broadcast_to(positions[:, None], (len(both), case.heads, *positions.shape[1:]))
        return np.concatenate([both[..., : case.nope], shared], axis=3), both[..., case.nope :]

    def by_token(by_head: np.ndarray) -> np.ndarray:
        return by_head.transpose(0, 2, 1, 3).reshape(len(by_head), by_head.shape[2], by_head.shape[1] * by_head.shape[3])

    past = keys_and_values(case.past_latent[:, 0], case.past_position[:, 0])
    key, value = map(by_token, keys_and_values(case.latent, case.position))
    return cache_attention.Case(case.heads, case.heads, case.scale, case.query, key, value, *past, case.mask, case.sinks)


def check(case: Case, outputs: list[np.ndarray]) -> None:
    y, *caches = outputs
    expected = cache_attention.reference(expanded(case))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max(initial=0))
    for cache, name in zip(caches, CACHES, strict=True):
        past, fresh = getattr(case, f"past_{name}"), getattr(case, name)
        present = np.concatenate([past[:, :, : case.total - fresh.shape[1]], fresh[:, None]], axis=2)
        assert cache.shape == (*present.shape[:2], case.length, present.shape[3])
        np.testing.assert_array_equal(cache[:, :, : case.total], present)


def last_alone(case: Case, padding: int) -> Case:
    """The last sequence without the first columns of the past, which nothing reads."""
    names = ("query", "latent", "position", "past_latent", "past_position", "mask")
    last: dict[str, Any] = {name: getattr(case, name)[-1:] for name in names}
    last |= {name: last[name][:, :, padding:] for name in ("past_latent", "past_position")}
    return replace(case, **(last | {"mask": last["mask"][..., padding:]}))


def main() -> None:
    rng = np.random.default_rng(5)
    for steps, total in ((1, 700), (2, 90), (19, 90), (80, 80)):
        for number, (heads, nope, rope, value, rank) in enumerate(((4, 32, 16, 32, 64), (3, 5, 3, 7, 21), (20, 16, 8, 16, 24))):
            padded = np.concatenate([causal(steps, total), causal(steps, total, 3), causal(steps, total, 0, 7)])
            padded[1, 0, :, 20:31] = False
            for format in range(number, len(library.FORMAT_GROUPS), 3):  # each with one of the sizes: this also runs in qemu
                case = random_case(rng, padded, heads, nope, rope, value, rank, sinks=True, length=total + 10, format=format)
                check(case, attend(case))


if __name__ == "__main__":
    main()
