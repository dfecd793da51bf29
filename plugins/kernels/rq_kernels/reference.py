"""Random layers with their decoded weights, and the expected results of the kernels, in float64. Plain torch, on the CPU."""

import math
from dataclasses import dataclass

import torch

from rq_kernels.activations import GATED
from rq_kernels.formats import GROUPS
from rq_kernels.launch import Layer, Projection

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)  # the values of float4_e2m1 without a sign


@dataclass(frozen=True)
class Example:
    """A layer on some device, and its weights ``up [S, F, hidden]`` and ``down [S, hidden, intermediate]`` in float64 on the
    CPU."""

    layer: Layer
    up: torch.Tensor
    down: torch.Tensor


def example(
    random: torch.Generator,
    formats: list[int],
    hidden: int,
    intermediate: int,
    activation: str,
    *,
    replicas: list[list[int]] | None = None,
    block: int = 128,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> Example:
    """Slots in ``formats``, each with its own weights. By default, ``replicas`` gives every slot its own expert."""
    F = intermediate * (2 if activation in GATED else 1)
    up, exact_up = projection(random, formats, F, hidden, block, bias, dtype, device)
    down, exact_down = projection(random, formats, hidden, intermediate, block, bias, dtype, device)
    table = torch.tensor(replicas or [[slot] for slot in range(len(formats))], dtype=torch.int32, device=device)
    kinds = torch.tensor(formats, dtype=torch.int32, device=device)
    return Example(Layer(hidden, intermediate, activation, kinds, table, up, down), exact_up, exact_down)


def projection(
    random: torch.Generator, formats: list[int], N: int, K: int, block: int, bias: bool, dtype: torch.dtype, device: str
) -> tuple[Projection, torch.Tensor]:
    """Random packed weights of each slot, in a random order inside each group, and the same weights in float64 ``[S, N, K]``."""
    blocks, slots = -(-K // block), len(formats)
    groups: dict[int, list[tuple[torch.Tensor, ...]]] = {code: [] for code in range(len(GROUPS))}
    index, exact = [0] * slots, [torch.empty(0)] * slots
    for slot in torch.randperm(slots, generator=random).tolist():
        format, bits = formats[slot], GROUPS[formats[slot]].bits
        index[slot] = len(groups[format])
        if not bits:
            weights = (torch.randn(N, K, generator=random) / math.sqrt(K)).to(dtype)
            groups[format].append((weights,))
            exact[slot] = weights.double()
            continue
        q = torch.randint(1 if bits == 8 else 0, 1 << bits, (N, blocks * block), generator=random, dtype=torch.uint8)
        if not GROUPS[format].integers:
            q = torch.where(q % 128 == 127, 0, q)  # NaN
            numbers = q.view(torch.float8_e4m3fn).double()
            scales = (0.5 + torch.rand(N, blocks, generator=random)) / (128 * math.sqrt(K))
            values = scales.double()
        elif GROUPS[format].exponents:
            numbers = torch.cat([E2M1, -E2M1])[q.long()]
            scales = torch.randint(116, 124, (N, blocks), generator=random, dtype=torch.uint8)
            values = torch.exp2(scales.double() - 127)
        else:
            zero = 1 << (bits - 1)
            numbers = q.double() - zero
            scales = (0.5 + torch.rand(N, blocks, generator=random)) / (zero * math.sqrt(K))
            values = scales.double()
        exact[slot] = (numbers * values.repeat_interleave(block, 1))[:, :K]
        groups[format].append((packed(q, bits, block), scales))

    stacked = {
        name: torch.stack(parts).to(device)
        for code, group in enumerate(GROUPS)
        for name, parts in zip(group.tensors, zip(*groups[code], strict=True), strict=False)  # none without slots
    }
    biases = torch.randn(slots, N, generator=random) if bias else None
    places = torch.tensor(index, dtype=torch.int32, device=device)
    held = Projection(places, stacked, biases.to(device) if biases is not None else None, block)
    return held, torch.stack(exact)


def packed(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """uint8 ``[N, K * bits / 8]`` from ``codes [N, K]``, as docs/kernels.md describes it."""
    if bits != 3:
        return torch.stack([codes[:, place :: 8 // bits] << place * bits for place in range(8 // bits)]).sum(0, dtype=torch.uint8)
    eights = codes.int().reshape(len(codes), -1, block // 8, 8)
    words = torch.stack([eights[..., place] << place * bits for place in range(8)]).sum(0)
    lower = torch.stack([words & 255, words >> 8 & 255], -1).flatten(2)
    return torch.cat([lower, words >> 16], -1).reshape(len(codes), -1).to(torch.uint8)


def routed_slots(ids: torch.Tensor, replicas: torch.Tensor) -> torch.Tensor:
    """The slot of every pair, i64 [pairs], computed one by one in order; -1 for an id outside the table."""
    arrivals: dict[int, int] = {}
    slots = []
    table = [[slot for slot in row if slot >= 0] for row in replicas.tolist()]
    for id in ids.reshape(-1).tolist():
        if not 0 <= id < len(table):
            slots.append(-1)
            continue
        j = arrivals.get(id, 0)
        arrivals[id] = j + 1
        slots.append(table[id][j % len(table[id])])
    return torch.tensor(slots, dtype=torch.int64)


def grouped(slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` and ``offsets`` i32 as from Dispatch, for the slot of every pair."""
    rows = torch.cat([(slots == slot).nonzero()[:, 0] for slot in range(count)])
    counted = torch.stack([(slots == slot).sum() for slot in range(count)])
    return rows.int(), torch.cat([torch.zeros(1, dtype=torch.int64), counted.cumsum(0)]).int()


def activated(z: torch.Tensor, name: str, alpha: float, limit: float) -> torch.Tensor:
    gelu = torch.nn.functional.gelu
    if name not in GATED:
        return {"none": z, "relu": z.relu(), "gelu": gelu(z), "relu2": z.relu().square()}[name]
    gate, linear = z.chunk(2, -1)
    if name == "clamped_swiglu":
        gate = gate.clamp(max=limit)
        return (linear.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)
    if name == "limited_swiglu":
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(gate) * linear.clamp(-limit, limit)
    if name == "swiglu":
        return gate * torch.sigmoid(gate) * linear
    return gelu(gate, approximate="tanh" if name == "geglu_tanh" else "none") * linear


def up(x: torch.Tensor, slots: torch.Tensor, held: Example) -> torch.Tensor:
    """float64 ``[pairs, intermediate]``, by pair; 0 for a pair without a slot."""
    x = x.double().repeat_interleave(len(slots) // len(x), 0) if len(x) else x.double()
    layer = held.layer
    return activated(_products(x, slots, held.up, layer.up), layer.activation, layer.alpha, layer.limit)


def down(middle: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, held: Example) -> torch.Tensor:
    """float64 ``[pairs, hidden]`` from ``middle [pairs, intermediate]``, both by pair, weighted by ``gates``."""
    return _products(middle.double(), slots, held.down, held.layer.down) * gates.double().reshape(-1, 1)


def moe_layer(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, held: Example) -> torch.Tensor:
    """float64 ``[T, hidden]``."""
    slots = routed_slots(ids, held.layer.replicas)
    outputs = down(up(x, slots, held), slots, gates, held)
    outputs[slots < 0] = 0
    return outputs.reshape(*ids.shape, outputs.shape[1]).sum(1)


def _products(x: torch.Tensor, slots: torch.Tensor, exact: torch.Tensor, held: Projection) -> torch.Tensor:
    out = torch.zeros(len(x), exact.shape[1], dtype=torch.float64)
    for slot in slots.unique().tolist():
        if slot >= 0:
            mine = slots == slot
            bias = held.bias[slot].double().cpu() if held.bias is not None else 0
            out[mine] = x[mine] @ exact[slot].T + bias
    return out
