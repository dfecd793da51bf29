"""The shape of one MoE layer's experts in canonical layout, which is the same for every family."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rq_compile.bounds import MOST_EXPERTS, Size
from rq_compile.files import Document
from rq_compile.quantization.formats import SLOT_FORMATS, Block, Format

Activation = Literal["swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "relu", "gelu", "limited_swiglu", "relu2"]
MOST_BYTES = 2**50  # of a layer's experts
GATED: frozenset[Activation] = frozenset({"swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "limited_swiglu"})


class ExpertGeometry(Document):
    """One MoE layer in canonical layout.

    Per expert: ``up`` is ``[F, hidden]`` where ``F = 2 * intermediate`` for a gated activation (the gate's rows first,
    then the up-projection's) and ``intermediate`` otherwise; ``down`` is ``[hidden, intermediate]``; with ``bias`` also
    ``up_bias [F]`` and ``down_bias [hidden]`` in fp32.

    Activations: ``swiglu``: ``silu(gate) * up``; ``geglu``: ``gelu(gate) * up`` with the exact (erf) gelu;
    ``geglu_tanh``: with the tanh approximation; ``clamped_swiglu`` (GPT-OSS): ``g = min(gate, limit)``,
    ``u = clamp(up, -limit, limit)``, ``(u + 1) * g * sigmoid(alpha * g)``; ``limited_swiglu`` (DeepSeek-V4): ``silu(g) * u``
    with the same ``g`` and ``u``; ``relu``, ``gelu`` (erf) and ``relu2`` (``relu`` squared): not gated.

    ``block``: the maximum number of weights of a row that share a scale in quantized experts. It is chosen, not read from the
    checkpoint.
    """

    experts: int = Field(ge=1, le=MOST_EXPERTS)
    top_k: int = Field(ge=1, le=MOST_EXPERTS)
    hidden: Size
    intermediate: Size
    activation: Activation
    bias: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    block: Block = 128

    @model_validator(mode="after")
    def can_be_chosen_and_stored(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        if self.experts * self.expert_bytes("fp32") > MOST_BYTES:
            raise ValueError(f"{self.experts} experts of {self.expert_bytes('fp32')} bytes are more than 2^50 bytes")
        return self

    @property
    def up_rows(self) -> int:
        return self.intermediate * (2 if self.activation in GATED else 1)

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert, including biases."""
        return self.hidden * (self.up_rows + self.intermediate) + (self.up_rows + self.hidden if self.bias else 0)

    def expert_bytes(self, format: Format) -> int:
        """Bytes of one expert in ``format``, including scales, padding and fp32 biases."""
        return SLOT_FORMATS[format].expert_bytes(self.hidden, self.intermediate, self.up_rows, self.bias_bytes, self.block)

    @property
    def bias_bytes(self) -> int:
        return 4 * (self.up_rows + self.hidden) if self.bias else 0
