"""The ONNX Runtime engine: graph, weights file, tokenizer and manifest, which appear together or not at all."""

import hashlib
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import cast

from rq_compile import __version__
from rq_compile.architectures.model import Model
from rq_compile.architectures.rope import recomputed_beyond
from rq_compile.calibration.statistics import Statistics
from rq_compile.checkpoint.chat_template import special_tokens
from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.engine.appearing import Appearing
from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.engine.manifest import EngineFile, Manifest
from rq_compile.errors import UserError
from rq_compile.estimates import check_space
from rq_compile.export.export import Exported, export_graph
from rq_compile.files import sha256, write_document, written_beside
from rq_compile.lowerings import Lowering, lowering_of
from rq_compile.lowerings.lowering import Lowered
from rq_compile.outputs import check_outputs
from rq_compile.planning.schema import Plan
from rq_compile.processes import world
from rq_compile.rewrite.experts_to_slots import offsets_name
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.weights import Section
from rq_compile.targets.engine_estimate import engine_estimate
from rq_compile.targets.engine_outputs import onnx_outputs
from rq_compile.targets.licences import declared_licence, licence_texts
from rq_compile.targets.links import hard_linked, has_hard_links, link_names, linked_sentence
from rq_compile.targets.partial_file import Job, Say, resumable
from rq_compile.targets.preflight import preflight
from rq_compile.targets.streamed import StreamedExpert, dense_weights, stored_weights
from rq_compile.targets.vocabulary import has_chat, remarks, vocabulary
from rq_compile.targets.weights_file import Progress, WeightsFile, compute_weights, locate, write_weights

TOOL = f"rq-compile {__version__}"


@dataclass(frozen=True)
class Writing:
    """How the weights are written. The bytes of the engine do not depend on it.

    ``threads``: number of threads that compute the weights, by default one per core. An interrupted compilation is resumed, see
    ``partial_file``, unless ``fresh``. ``progress(done, total)`` counts bytes of weights. ``say`` takes a sentence for the user.
    """

    threads: int | None = None
    fresh: bool = False
    progress: Progress | None = None
    say: Say = lambda text: None


def compile_engine(
    model: Model,
    plan: Plan,
    output: Path,
    lowering: Lowering | str = "native",
    statistics: Statistics | None = None,
    exported: Exported | None = None,
    *,
    link_weights: bool = False,
    writing: Writing = Writing(),
) -> Manifest:
    """Write ``output`` (``.onnx``) and, beside it, ``output.data``, ``<stem>.tokenizer.json``, ``<stem>.chat_template.jinja``,
    ``<stem>.json`` and the licence texts of the checkpoint (``<stem>.LICENSE``).

    Weights are streamed: each thread computes one projection of an expert or one dense tensor at a time, and together they take
    at most the memory of the largest layer. Several processes (see ``processes``) share the computation, the first one writes,
    and all return the manifest.

    ``lowering``: an object of ``lowerings``, or the name of one with its default options. ``statistics``: those of the
    calibration, with which the weights of plans with the quantizer "gptq" are rounded. ``exported``: the checkpoint's graph; pass
    it to compile several plans of one checkpoint without exporting again. ``link_weights``: see ``links``.

    Raises:
        UserError: the plan does not fit the checkpoint or the lowering, or the output cannot be written.
    """
    lowering = lowering_of(lowering).for_checkpoint(model.dtype)
    check_outputs(onnx_outputs(output, model.path, link_weights=link_weights))
    link_weights = link_weights and has_hard_links(output.parent)
    preflight(model, plan, lowering)
    statistics = _needed(statistics, plan)
    check_space(output, engine_estimate(model, output, lowering, plan=plan, link_weights=link_weights).output_bytes)
    tokens = vocabulary(model)
    exported = exported or export_graph(model)
    content = _content(model, plan, lowering, statistics, exported, link_weights)
    job: Job = {
        "tool": TOOL,
        "checkpoint": model.fingerprint,
        # The fingerprint samples only the ends of tensors. A shard that was repaired in its middle must count as another one.
        "version of the shards": model.version,
        "plan": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
        "activation statistics": statistics.sha256 if statistics else None,
        "lowering": lowering.name,
        "dense format": lowering.dense_format,
        "linked weights": len(content.linked),
    }

    if world().rank > 0:
        compute_weights(content.sections, threads=writing.threads, memory=model.largest_layer_bytes)
        return world().from_first(cast("Manifest", None))

    # The contexts end in reverse order, so that the manifest, by which an engine is loaded, appears last.
    with ExitStack() as stack:
        appearing = stack.enter_context(Appearing(output))
        document = stack.enter_context(written_beside(output.with_suffix(".json")))
        files = _copies(stack, model, output)
        links = link_names(content.linked, output)
        for shard, link in links.items():
            stack.enter_context(hard_linked(shard, link))
            files.linked.append(_engine_file(link, shard))
        if link_weights:
            writing.say(linked_sentence(content.linked.values(), content.dense_bytes, model.dtype))
        graph = stack.enter_context(written_beside(output))
        written = _write_weights(stack, model, content, Path(f"{output}.data"), job, writing)
        starts = written.starts | {alias: written.starts[name] for alias, name in content.aliases.items()}
        elsewhere = {name: (links[tensor.file].name, tensor.offset) for name, tensor in content.linked.items()}
        locate(content.lowered.model, starts, f"{output.name}.data", elsewhere)
        graph.write_bytes(content.lowered.model.SerializeToString(deterministic=True))
        manifest = Manifest(
            tool=TOOL,
            target=lowering.device,
            lowering=lowering.name,
            graph=_engine_file(output, graph),
            weights=EngineFile(name=f"{output.name}.data", sha256=written.sha256, bytes=written.bytes),
            linked=files.linked,
            tokenizer=files.tokenizer,
            chat_template=files.chat_template,
            special_tokens=special_tokens(model.path) if files.chat_template else {},
            licences=files.licences,
            licence=declared_licence(model.path),
            op_library=OP_SET_VERSION if lowering.library else None,
            op_library_name=lowering.library,
            provider=lowering.provider,
            activation_bits=lowering.activation_bits,
            dense_format=lowering.dense_format,
            opset=exported.opset,
            encoder_decoder=exported.encoder_decoder,
            cache=exported.cache,
            recomputed_beyond=recomputed_beyond(model.config),
            slot_offsets={layer.name: offsets_name(layer.name) for layer in plan.layers} if lowering.counts_rows else {},
            dense_bytes=content.dense_bytes,
            expert_bytes=sum(section.bytes for section in content.lowered.experts),
            replaced=_replaced(model, plan, content),
            remarks=list(model.remarks),
            plan=plan,
            **tokens,
        )
        write_document(manifest, document)
        appearing.begin([output.with_suffix(".json").name, *(file.name for file in manifest.files)])
    return world().from_first(manifest)


@dataclass(frozen=True)
class _Content:
    """The engine before its weights are read. Non-expert weights are in ``dense``, are ``aliases`` of one of these, or
    ``linked``."""

    lowered: Lowered
    dense: list[Section]
    aliases: dict[str, str]
    linked: dict[str, StoredTensor]

    @property
    def sections(self) -> list[Section]:
        return [*self.dense, *self.lowered.experts]

    @property
    def dense_bytes(self) -> int:
        return sum(section.bytes for section in self.dense)


@dataclass
class _Copies:
    """Files that are copied from the checkpoint to the engine."""

    tokenizer: EngineFile | None = None
    chat_template: EngineFile | None = None
    licences: list[EngineFile] = field(default_factory=list)
    linked: list[EngineFile] = field(default_factory=list)


def _needed(statistics: Statistics | None, plan: Plan) -> Statistics | None:
    """``statistics`` if the plan's quantizer needs them."""
    if plan.quantizer != "gptq":
        return None
    if statistics is None:
        raise UserError(
            "the plan rounds weights by activation statistics (gptq), but has none; calibrate again, or with --quantizer nearest",
            2,
        )
    return statistics


def _content(
    model: Model, plan: Plan, lowering: Lowering, statistics: Statistics | None, exported: Exported, link_weights: bool
) -> _Content:
    layers = {layer.name: layer for layer in model.layers}
    lowered = lowering.lower(
        exported.model,
        plan,
        lambda layer, expert: StreamedExpert(model, layers[layer], expert, statistics),
        stored_weights(model, exported.parameters),
    )
    dense, aliases, linked = dense_weights(model, lowered.model.graph, exported.parameters, link=link_weights)
    return _Content(lowered, dense + lowered.matrices, aliases, linked)


def _copies(stack: ExitStack, model: Model, output: Path) -> _Copies:
    """The tokenizer, the chat template and the licence texts, which appear when ``stack`` ends."""
    copies = _Copies()
    if model.has_tokenizer:
        tokenizer = output.with_suffix(".tokenizer.json")
        part = stack.enter_context(written_beside(tokenizer))
        part.write_text(model.tokenizer.to_str(), encoding="utf-8")
        copies.tokenizer = _engine_file(tokenizer, part)
    if has_chat(model):
        template = output.with_suffix(".chat_template.jinja")
        part = stack.enter_context(written_beside(template))
        part.write_text(model.chat_template or "", encoding="utf-8", newline="")
        copies.chat_template = _engine_file(template, part)
    for path in licence_texts(model.path):
        text = output.with_suffix(f".{path.name}")
        part = stack.enter_context(written_beside(text))
        shutil.copyfile(path, part)
        copies.licences.append(_engine_file(text, part))
    return copies


def _write_weights(stack: ExitStack, model: Model, content: _Content, data: Path, job: Job, writing: Writing) -> WeightsFile:
    journal = stack.enter_context(resumable(data, job, fresh=writing.fresh, say=writing.say))
    began = monotonic()
    written = write_weights(
        content.sections,
        journal.file,
        writing.progress,
        threads=writing.threads,
        memory=model.largest_layer_bytes,
        journal=journal,
    )
    new, seconds = (written.bytes - written.resumed) / 1e9, monotonic() - began
    writing.say(f"wrote {new:.3g} GB of weights in {seconds:.3g} s, {new / seconds:.3g} GB/s")
    return written


def _replaced(model: Model, plan: Plan, content: _Content) -> dict[str, int]:
    counts = content.lowered.replaced | remarks(model)
    counts["equal tensors written once"] = len(content.aliases)
    counts["ranks of the plan put on one device"] = plan.ranks if plan.ranks > 1 else 0
    return counts_of(content.lowered.reports) | {reason: count for reason, count in counts.items() if count}


def _engine_file(final: Path, part: Path) -> EngineFile:
    return EngineFile(name=final.name, sha256=sha256(part), bytes=part.stat().st_size)
