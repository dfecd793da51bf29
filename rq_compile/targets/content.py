"""What an engine consists of, before its weights are computed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rq_compile.architectures.model import Model
from rq_compile.calibration.statistics import Statistics
from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.engine.manifest import CacheTensor
from rq_compile.engine.paths import graph_of_rank, weights_of
from rq_compile.export.exported import Exported
from rq_compile.lowerings import Lowering
from rq_compile.lowerings.lowering import Lowered
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.cache_lengths import caches_in_place
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.slot_weights import Source
from rq_compile.rewrite.weights import Piece, Section
from rq_compile.targets.shared_pieces import SharedPieces
from rq_compile.targets.streamed import StreamedExpert, dense_weights, stored_weights
from rq_compile.targets.workers import Workers


@dataclass(frozen=True)
class Content:
    """``lowered``: the engine's graph, or one for each rank if ``of_ranks``. Non-expert weights are in ``dense``, are ``aliases``
    of one of these, or ``linked``."""

    lowered: list[Lowered]
    of_ranks: bool
    dense: list[Section]
    aliases: dict[str, str]
    linked: dict[str, StoredTensor]

    def graphs(self, stem: Path) -> dict[Path, Lowered]:
        if not self.of_ranks:
            return {stem: self.lowered[0]}
        return {graph_of_rank(stem, rank): lowered for rank, lowered in enumerate(self.lowered)}

    def weights_files(self, stem: Path) -> dict[Path, list[Section]]:
        """What is in each file: the experts of a graph beside it, and the non-expert weights in the first file."""
        files = {weights_of(stem): list(self.dense)}
        for path, lowered in self.graphs(stem).items():
            files.setdefault(weights_of(path), []).extend(lowered.experts)
        return files

    @property
    def dense_bytes(self) -> int:
        return sum(section.bytes for section in self.dense)

    def cache(self, exported: list[CacheTensor]) -> list[CacheTensor]:
        """The tensors of the cache in the graphs, which are those of the graph that was ``exported``."""
        in_place = caches_in_place(self.lowered[0].model)
        return [tensor.model_copy(update={"in_place": tensor.past in in_place}) for tensor in exported]


@dataclass(frozen=True)
class Draft:
    """An engine whose graph may not be exported yet. The weights of its experts are known already.

    ``statistics``: those that its weights are rounded by; ``outputs``: those with the outputs of constant experts.
    """

    model: Model
    plan: Plan
    lowering: Lowering
    statistics: Statistics | None
    outputs: Statistics | None
    link_weights: bool

    @cached_property
    def pieces(self) -> SharedPieces:
        """The pieces of all weights that are known."""
        pieces = SharedPieces()
        for sections in self._experts:
            pieces.know(pieces_of(sections.values()))
        return pieces

    @contextmanager
    def workers(self, threads: int, *, at_once: bool) -> Iterator[Workers]:
        """On the first process: ``threads - 1`` of its threads and those of the other processes, which compute the experts'
        weights ``at_once`` or when these are added."""
        workers = Workers(self.model.largest_layer_bytes)
        for sections in reversed(self._experts if at_once else []):
            workers.add(pieces_of(sections.values()))
        with self.pieces.on_others(workers, threads):
            for _ in range(threads - 1):
                workers.start()
            yield workers

    def content(self, exported: Exported) -> Content:
        """
        Raises:
            UserError: the layers of the plan and of the graph differ.
        """
        of_dense = stored_weights(self.model, exported.parameters, self.plan, self.statistics)
        graphs = self.lowering.graphs(exported.model, self.plan, self._source, of_dense)
        lowered = [_with_sections(graph, sections) for graph, sections in zip(graphs, self._experts, strict=True)]
        graph = lowered[0].model.graph
        dense, aliases, linked = dense_weights(self.model, graph, exported.parameters, link=self.link_weights)
        dense += lowered[0].matrices
        self.pieces.know(pieces_of(dense))
        return Content(lowered, self.lowering.of_ranks, dense, aliases, linked)

    @cached_property
    def _source(self) -> Source:
        layers = {layer.name: layer for layer in self.model.layers}
        return lambda layer, expert: StreamedExpert(self.model, layers[layer], expert, self.statistics, self.outputs)

    @cached_property
    def _experts(self) -> list[dict[str, Section]]:
        """The sections of each graph, by name."""
        lowerings = self.lowering.of_processes(self.plan)
        sections = (lowering.expert_sections(self.plan.layers, self._source) for lowering in lowerings)
        return [{section.name: section for section in of_graph} for of_graph in sections]


def _with_sections(lowered: Lowered, known: dict[str, Section]) -> Lowered:
    """``lowered`` with the sections that were known before it, whose pieces may be computed already."""
    experts = [known.get(section.name, section) for section in lowered.experts]
    same = [section.weights for section in experts] == [section.weights for section in lowered.experts]
    ensures("lower", same, "the weights of expert_sections")
    return replace(lowered, experts=experts)


def pieces_of(sections: Iterable[Section]) -> list[Piece]:
    return [piece for section in sections for piece in section.pieces]
