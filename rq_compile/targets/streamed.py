"""The weights of an engine, streamed from the checkpoint: each is read at its turn and not kept."""

from dataclasses import dataclass

import numpy as np
import onnx

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.statistics import Statistics
from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.export.exported import Parameter
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import PlannedDense
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.quantization.source_numbers import SourceNumbers
from rq_compile.rewrite.constant_experts import no_mean_output
from rq_compile.rewrite.dense_gemms import DenseWeights
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, external_name, external_tensors
from rq_compile.targets.links import linkable


@dataclass(frozen=True)
class StreamedExpert:
    """Like ``ExpertWeights``, but every matrix, bias, moment and mean output is read again whenever it is accessed. Moments are
    those of ``statistics``, and mean outputs those of ``outputs``."""

    model: Model
    layer: MoeLayer
    expert: int
    statistics: Statistics | None
    outputs: Statistics | None = None

    @property
    def up(self) -> np.ndarray:
        return self.model.matrix(self.layer, self.expert, "up")

    @property
    def down(self) -> np.ndarray:
        return self.model.matrix(self.layer, self.expert, "down")

    @property
    def up_numbers(self) -> SourceNumbers | None:
        return self.model.source_numbers(self.layer, self.expert, "up")

    @property
    def down_numbers(self) -> SourceNumbers | None:
        return self.model.source_numbers(self.layer, self.expert, "down")

    @property
    def up_bias(self) -> np.ndarray | None:
        return self.model.bias(self.layer, self.expert, "up")

    @property
    def down_bias(self) -> np.ndarray | None:
        return self.model.bias(self.layer, self.expert, "down")

    @property
    def up_moment(self) -> SecondMoment | None:
        return self.statistics.input_moment(self.layer.name) if self.statistics else None

    @property
    def down_moment(self) -> SecondMoment | None:
        return self.statistics.intermediate_moment(self.layer.name, self.expert) if self.statistics else None

    @property
    def mean_output(self) -> np.ndarray | None:
        return self.outputs.mean_output(self.layer.name, self.expert) if self.outputs else None


def mean_outputs_for(plan: Plan, statistics: Statistics | None) -> Statistics | None:
    """``statistics`` if the plan has constant experts.

    Raises:
        UserError: they do not have the mean outputs of such an expert.
    """
    constant = [layer for layer in plan.layers if layer.constant_experts]
    for layer in constant:
        if statistics is None or not statistics.has_outputs(layer.name):
            raise no_mean_output(layer, layer.constant_experts[0])
    return statistics if constant else None


def dense_weights(
    model: Model, graph: onnx.GraphProto, parameters: dict[str, Parameter], *, link: bool = False
) -> tuple[list[Section], dict[str, str], dict[str, StoredTensor]]:
    """The non-expert weights that the graph refers to, in the graph's dtype, with a section for each.

    Weights that are the same tensor of the checkpoint in the same layout (tied embeddings) are written once. The second result
    maps each other name to the weight that is written. With ``link``, weights that can be linked are not written at all; the
    third result maps them to their tensors.
    """
    sections: list[Section] = []
    aliases: dict[str, str] = {}
    linked: dict[str, StoredTensor] = {}
    seen: dict[tuple[str, bool, np.dtype], str] = {}
    for tensor in external_tensors(graph):
        name = external_name(tensor)
        if name in parameters:
            parameter = parameters[name]
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            weight, stored_as = ExternalWeight(name, dtype, tuple(tensor.dims)), model.stored(parameter.name)
            same = seen.setdefault((model.tensor(parameter.name), parameter.transposed, dtype), name)
            if link and stored_as and linkable(weight, stored_as, transposed=parameter.transposed):
                linked[name] = stored_as
            elif same == name:
                sections.append(_dense(model, weight, parameter))
            else:
                aliases[name] = same
    return sections, aliases, linked


def stored_weights(model: Model, parameters: dict[str, Parameter], plan: Plan, statistics: Statistics | None) -> DenseWeights:
    """The checkpoint's tensors for ``parameters``, by initializer, and what ``plan`` and ``statistics`` say of them."""
    # A tied weight has one name in the graph, but as a table and as a matrix it may have two formats.
    planned = {
        (model.tensor(matrix.name), module.kind == "embedding"): (module.format, matrix.moment)
        for module in plan.dense
        for matrix in module.matrices
    }

    def dtype_of(name: str) -> np.dtype:
        return model.dtype_of(parameters[name].name)

    def format_of(name: str, table: bool) -> PlannedDense | None:
        format, _ = planned.get((model.tensor(parameters[name].name), table), (None, None))
        return format

    def moment(name: str) -> SecondMoment | None:
        _, of_input = planned.get((model.tensor(parameters[name].name), False), (None, None))
        return SecondMoment(statistics.tensor(of_input)) if statistics and of_input else None

    return DenseWeights(dtype_of, lambda name: parameters[name].read(model), format_of, moment, bool(planned))


def _dense(model: Model, weight: ExternalWeight, parameter: Parameter) -> Section:
    # Read in the checkpoint's dtype, and written in the graph's.
    memory = model.source_bytes(parameter.name) + weight.bytes
    return Section(weight.name, (weight,), (Piece((weight,), lambda: (parameter.read(model),), memory),))
