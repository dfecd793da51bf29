"""The ONNX Runtime engine: graphs, weights files, tokenizer and manifest, which appear together or not at all."""

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
from rq_compile.engine.appearing import Appearing
from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.engine.manifest import EngineFile, Manifest, RankFiles
from rq_compile.engine.paths import manifest_path, stem_of, weights_of
from rq_compile.errors import UserError
from rq_compile.estimates import check_space
from rq_compile.export.exported import Exported
from rq_compile.files import folder_made, sha256, write_document, written_beside
from rq_compile.lowerings import Lowering, lowering_of
from rq_compile.outputs import check_outputs
from rq_compile.planning.schema import Plan
from rq_compile.processes import world
from rq_compile.rewrite.experts_to_slots import offsets_name
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.weights import Section
from rq_compile.targets.content import Content, Draft, pieces_of
from rq_compile.targets.engine_estimate import engine_estimate
from rq_compile.targets.engine_outputs import onnx_outputs
from rq_compile.targets.licences import declared_licence, licence_texts
from rq_compile.targets.links import hard_linked, has_hard_links, link_names, linked_sentence
from rq_compile.targets.partial_file import Job, Say, has_begun, resumable
from rq_compile.targets.preflight import preflight
from rq_compile.targets.streamed import mean_outputs_for
from rq_compile.targets.vocabulary import has_chat, remarks, vocabulary
from rq_compile.targets.weights_file import Progress, WeightsFile, layout, locate, threads_here, write_weights
from rq_compile.targets.workers import Workers

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
    ``<stem>.json`` and the licence texts of the checkpoint (``<stem>.LICENSE``). With the lowering ``ranks``, ``output`` is a
    folder: see ``engine.paths``.

    Weights are streamed: each thread computes one projection of an expert or one dense tensor at a time, and together they take
    at most the memory of the largest layer. All threads but one begin with the experts while the graph is exported. Several
    processes (see ``processes``) share the computation, the first one exports and writes, and all return the manifest.

    ``lowering``: an object of ``lowerings``, or the name of one with its default options. ``statistics``: those of the
    calibration, with which the weights of plans with the quantizer "gptq" are rounded, and which have the outputs of constant
    experts. ``exported``: the checkpoint's graph; pass
    it to compile several plans of one checkpoint without exporting again. ``link_weights``: see ``links``.

    Raises:
        UserError: the plan does not fit the checkpoint or the lowering, or the output cannot be written.
    """
    lowering = lowering_of(lowering).for_checkpoint(model.dtype)
    check_outputs(onnx_outputs(output, model.path, link_weights=link_weights, ranks=plan.ranks if lowering.of_ranks else 0))
    stem = stem_of(output)
    link_weights = link_weights and has_hard_links(output.parent)
    preflight(model, plan, lowering)
    outputs = mean_outputs_for(plan, statistics)
    statistics = _needed(statistics, plan)
    check_space(stem, engine_estimate(model, output, lowering, plan=plan, link_weights=link_weights).output_bytes)
    tokens = vocabulary(model)
    draft = Draft(model, plan, lowering, statistics, outputs, link_weights)
    threads = threads_here(writing.threads)
    if world().rank > 0:
        with draft.pieces.for_first(threads):
            draft.content(world().from_first(cast("Exported", None)))
        return world().from_first(cast("Manifest", None))

    # The contexts end in reverse order, so that the manifest, by which an engine is loaded, appears last.
    with ExitStack() as stack:
        # What an earlier run has written is known only with the graph.
        at_once = writing.fresh or not has_begun(weights_of(stem))
        workers = stack.enter_context(draft.workers(threads, at_once=at_once))
        exported = world().from_first(exported or export_graph(model))
        content = draft.content(exported)
        if at_once:
            workers.add(pieces_of(content.dense))  # which come first in the file
        workers.start()
        job: Job = {
            "tool": TOOL,
            "checkpoint": model.fingerprint,
            # The fingerprint samples only the ends of tensors. A shard that was repaired in its middle must count as another one.
            "version of the shards": model.version,
            "plan": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
            "activation statistics": used.sha256 if (used := statistics or outputs) else None,
            "lowering": lowering.name,
            "dense format": lowering.dense_format,
            "linked weights": len(content.linked),
        }
        if lowering.of_ranks:
            stack.enter_context(folder_made(output))
        appearing = stack.enter_context(Appearing(stem))
        document = stack.enter_context(written_beside(manifest_path(output)))
        files = _copies(stack, model, stem)
        links = link_names(content.linked, stem)
        for shard, link in links.items():
            stack.enter_context(hard_linked(shard, link))
            files.linked.append(_engine_file(link, shard))
        if link_weights:
            writing.say(linked_sentence(content.linked.values(), content.dense_bytes, model.dtype))
        parts = {path: stack.enter_context(written_beside(path)) for path in content.graphs(stem)}
        written = _write_weights(stack, content.weights_files(stem), job, writing, workers)
        shared = written[weights_of(stem)]
        starts = shared.starts | {alias: shared.starts[name] for alias, name in content.aliases.items()}
        elsewhere = {name: (weights_of(stem).name, start) for name, start in starts.items()}
        elsewhere |= {name: (links[tensor.file].name, tensor.offset) for name, tensor in content.linked.items()}
        graphs: list[EngineFile] = []
        for path, lowered in content.graphs(stem).items():
            own = written[weights_of(path)]
            locate(lowered.model, own.starts, weights_of(path).name, elsewhere)
            parts[path].write_bytes(lowered.model.SerializeToString(deterministic=True))
            graphs.append(_engine_file(path, parts[path]))
        weights = {path.name: file.described(path) for path, file in written.items()}
        of_ranks = [RankFiles(graph=graph, weights=weights[weights_of(Path(graph.name)).name]) for graph in graphs]
        manifest = Manifest(
            tool=TOOL,
            target=lowering.device,
            lowering=lowering.name,
            graph=graphs[0],
            weights=weights[weights_of(stem).name],
            ranks=of_ranks if lowering.of_ranks else [],
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
            cache=content.cache(exported.cache),
            recomputed_beyond=recomputed_beyond(model.config),
            slot_offsets={layer.name: offsets_name(layer.name) for layer in plan.layers} if lowering.counts_rows else {},
            dense_bytes=content.dense_bytes,
            expert_bytes=sum(section.bytes for lowered in content.lowered for section in lowered.experts),
            replaced=_replaced(model, plan, content),
            remarks=list(model.remarks),
            plan=plan,
            **tokens,
        )
        write_document(manifest, document)
        appearing.begin([manifest_path(output).name, *(file.name for file in manifest.files)])
    return world().from_first(manifest)


def export_graph(model: Model) -> Exported:
    """The checkpoint's graph. The exporter is imported only here: that takes a good part of a second, in which other processes
    compute already."""
    from rq_compile.export import export

    return export.export_graph(model)


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


def _copies(stack: ExitStack, model: Model, stem: Path) -> _Copies:
    """The tokenizer, the chat template and the licence texts, which appear when ``stack`` ends."""
    copies = _Copies()
    if model.has_tokenizer:
        tokenizer = stem.with_suffix(".tokenizer.json")
        part = stack.enter_context(written_beside(tokenizer))
        part.write_text(model.tokenizer.to_str(), encoding="utf-8")
        copies.tokenizer = _engine_file(tokenizer, part)
    if has_chat(model):
        template = stem.with_suffix(".chat_template.jinja")
        part = stack.enter_context(written_beside(template))
        part.write_text(model.chat_template or "", encoding="utf-8", newline="")
        copies.chat_template = _engine_file(template, part)
    for path in licence_texts(model.path):
        text = stem.with_suffix(f".{path.name}")
        part = stack.enter_context(written_beside(text))
        shutil.copyfile(path, part)
        copies.licences.append(_engine_file(text, part))
    return copies


def _write_weights(
    stack: ExitStack, files: dict[Path, list[Section]], job: Job, writing: Writing, workers: Workers
) -> dict[Path, WeightsFile]:
    began, before, written = monotonic(), 0, {}
    total = sum(layout(sections).bytes for sections in files.values())
    for path, sections in files.items():
        journal = stack.enter_context(resumable(path, job, fresh=writing.fresh, say=writing.say))
        progress = _shifted(writing.progress, before, total)
        written[path] = write_weights(sections, journal.file, progress, journal=journal, workers=workers)
        before += written[path].bytes
    new, seconds = sum(file.bytes - file.resumed for file in written.values()) / 1e9, monotonic() - began
    writing.say(f"wrote {new:.3g} GB of weights in {seconds:.3g} s, {new / seconds:.3g} GB/s")
    return written


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """``progress`` over several files, for a file that begins when ``before`` bytes are written."""
    return progress and (lambda done, _: progress(before + done, total))


def _replaced(model: Model, plan: Plan, content: Content) -> dict[str, int]:
    lowered = content.lowered[0]
    counts = lowered.replaced | remarks(model)
    counts["equal tensors written once"] = len(content.aliases)
    counts["ranks of the plan put on one device"] = plan.ranks if plan.ranks > 1 and not content.of_ranks else 0
    return counts_of(lowered.reports) | {reason: count for reason, count in counts.items() if count}


def _engine_file(final: Path, part: Path) -> EngineFile:
    return EngineFile(name=final.name, sha256=sha256(part), bytes=part.stat().st_size)
