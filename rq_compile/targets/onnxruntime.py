"""The ONNX Runtime engine: graph, weights file, tokenizer and manifest, which appear together or not at all."""

import hashlib
import shutil
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from rq_compile import __version__
from rq_compile.architectures.model import Model
from rq_compile.architectures.rope import recomputed_beyond
from rq_compile.calibration.statistics import Statistics
from rq_compile.errors import UserError
from rq_compile.estimates import check_space, engine_estimate
from rq_compile.export.export import Exported, export_graph
from rq_compile.files import sha256, write_document, written_beside
from rq_compile.outputs import check_outputs
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import FLOAT_FORMATS
from rq_compile.rewrite.dense_gemms import dense_gemms
from rq_compile.rewrite.experts_to_slots import offsets_name
from rq_compile.rewrite.logits_to_keep import with_default
from rq_compile.rewrite.rewrite import rewrite, rewrite_to_moe_layers
from rq_compile.rewrite.weights import Section
from rq_compile.standalone.decoding import LAST
from rq_compile.targets.engine_outputs import onnx_outputs
from rq_compile.targets.library import CPU_LIBRARY, CUDA_LIBRARY, OP_SET_VERSION, OpLibrary
from rq_compile.targets.licences import declared_licence, licence_texts
from rq_compile.targets.links import hard_linked, has_hard_links, link_names, linked_sentence
from rq_compile.targets.manifest import DenseFormat, EngineFile, Lowering, Manifest
from rq_compile.targets.partial_file import Job, Say, resumable
from rq_compile.targets.preflight import preflight
from rq_compile.targets.streamed import StreamedExpert, dense_weights, stored_weights
from rq_compile.targets.tensorrt.narrow import HALVES
from rq_compile.targets.vocabulary import remarks, vocabulary
from rq_compile.targets.weights_file import Progress, WeightsFile, locate, write_weights

LIBRARIES: dict[Lowering, OpLibrary] = {"native": CPU_LIBRARY, "cuda": CUDA_LIBRARY}


def compile_engine(
    model: Model,
    plan: Plan,
    output: Path,
    lowering: Lowering = "native",
    statistics: Statistics | None = None,
    exported: Exported | None = None,
    activation_bits: int = 32,
    dense_format: DenseFormat = "stored",
    progress: Progress | None = None,
    threads: int | None = None,
    fresh: bool = False,
    link_weights: bool = False,
    say: Say = lambda text: None,
) -> Manifest:
    """Write ``output`` (``.onnx``), ``output.data``, and ``<stem>.tokenizer.json``, ``<stem>.json`` and the licence texts of the
    checkpoint (``<stem>.LICENSE``) beside them.

    Weights are streamed: a projection of an expert or a dense tensor at a time on each of ``threads`` threads (by default one for
    each core), and never more of them than take the memory of the largest layer. The output does not depend on ``threads``. An
    interrupted compilation goes on where it was, see ``partial_file``, unless ``fresh``. ``link_weights``: see ``links``.

    ``statistics`` are those of the calibration, by which a plan with the quantizer "gptq" has its weights rounded; ``exported``
    is the checkpoint's graph, for who compiles several plans of one. ``activation_bits``: see ``rewrite``; ``dense_format``: see
    ``dense_gemms``, which only the native lowering has. The lowering "cuda" computes experts in 16 bit (bf16 if the checkpoint
    is, else fp16) between two casts, and all else in fp32. ``progress(done, total)`` counts the bytes of the weights; ``say``
    takes a sentence for the user.

    Raises:
        UserError: the plan does not fit the checkpoint or the lowering, or the output cannot be written.
    """
    data, tokenizer, document = Path(f"{output}.data"), output.with_suffix(".tokenizer.json"), output.with_suffix(".json")
    texts = {output.with_suffix(f".{path.name}"): path for path in licence_texts(model.path)}
    check_outputs(onnx_outputs(output, model.path, link_weights=link_weights))
    link_weights = link_weights and has_hard_links(output.parent)
    layers = {layer.name: layer for layer in model.layers}
    preflight(model, plan, lowering)
    if plan.quantizer == "gptq" and statistics is None:
        raise UserError(
            "the plan rounds weights by activation statistics (gptq), but has none; calibrate again, or with --quantizer nearest",
            2,
        )
    estimate = engine_estimate(model, output, lowering, plan=plan, dense_format=dense_format, link_weights=link_weights)
    check_space(output, estimate.output_bytes)
    tokens = vocabulary(model)

    exported = exported or export_graph(model)

    moments = statistics if plan.quantizer == "gptq" else None
    source = lambda layer, expert: StreamedExpert(model, layers[layer], expert, moments)  # noqa: E731
    graph, matrices = exported.model, list[Section]()
    if lowering == "native":
        stored = stored_weights(model, exported.parameters)
        graph, matrices = dense_gemms(graph, dense_format, stored, activation_bits)
    if lowering == "cuda":
        half = "bf16" if model.dtype == "bf16" else "fp16"
        graph, experts, replaced = rewrite_to_moe_layers(graph, plan, source, HALVES[half])
        activation_bits = 16
        floats = [slot.format for layer in plan.layers for slot in layer.slots if slot.format in FLOAT_FORMATS]
        replaced[f"float slots kept in {half}"] = sum(format != half for format in floats)
    else:
        graph, experts, replaced = rewrite(graph, plan, source, lowering, activation_bits=activation_bits)
    dense, aliases, linked = dense_weights(model, graph.graph, exported.parameters, link=link_weights)
    dense += matrices
    job: Job = {
        "tool": f"rq-compile {__version__}",
        "checkpoint": model.fingerprint,
        # The fingerprint samples a tensor's ends; a shard that was repaired in its middle must not be taken for the old one.
        "version of the shards": model.version,
        "plan": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
        "activation statistics": moments.sha256 if moments else None,
        "lowering": lowering,
        "dense format": dense_format,
        "linked weights": len(linked),
    }

    # Left in reverse order: the manifest, by which an engine is loaded, is the last to appear.
    with ExitStack() as stack:
        document_part = stack.enter_context(written_beside(document))
        copied = None
        if model.has_tokenizer:
            tokenizer_part = stack.enter_context(written_beside(tokenizer))
            tokenizer_part.write_text(model.tokenizer.to_str(), encoding="utf-8")
            copied = _engine_file(tokenizer, tokenizer_part)
        replaced |= remarks(model)
        licences = []
        for text, path in texts.items():
            text_part = stack.enter_context(written_beside(text))
            shutil.copyfile(path, text_part)
            licences.append(_engine_file(text, text_part))
        links = link_names(linked, output)
        for shard, link in links.items():
            stack.enter_context(hard_linked(shard, link))
        if link_weights:
            say(linked_sentence(linked.values(), sum(section.bytes for section in dense), model.dtype))
        graph_part = stack.enter_context(written_beside(output))
        journal = stack.enter_context(resumable(data, job, fresh=fresh, say=say))
        began = monotonic()
        sections = [*dense, *experts]
        written = write_weights(
            sections, journal.file, progress, threads=threads, memory=model.largest_layer_bytes, journal=journal
        )
        say(_throughput(written, monotonic() - began))
        starts = written.starts | {alias: written.starts[name] for alias, name in aliases.items()}
        elsewhere = {name: (links[tensor.file].name, tensor.offset) for name, tensor in linked.items()}
        locate(graph, starts, data.name, elsewhere)
        graph_part.write_bytes(with_default(graph, LAST).SerializeToString(deterministic=True))
        replaced["equal tensors written once"] = len(aliases)
        replaced["ranks of the plan put on one device"] = plan.ranks if plan.ranks > 1 else 0
        manifest = Manifest(
            tool=f"rq-compile {__version__}",
            target="cuda" if lowering == "cuda" else "cpu",
            lowering=lowering,
            graph=_engine_file(output, graph_part),
            weights=EngineFile(name=data.name, sha256=written.sha256, bytes=written.bytes),
            linked=[_engine_file(link, shard) for shard, link in links.items()],
            tokenizer=copied,
            licences=licences,
            licence=declared_licence(model.path),
            op_library=OP_SET_VERSION if lowering in LIBRARIES else None,
            op_library_name=LIBRARIES.get(lowering),
            provider="CUDAExecutionProvider" if lowering == "cuda" else "CPUExecutionProvider",
            activation_bits=activation_bits,
            dense_format=dense_format if lowering == "native" else "fp32",
            opset=exported.opset,
            encoder_decoder=exported.encoder_decoder,
            cache=exported.cache,
            recomputed_beyond=recomputed_beyond(model.config),
            slot_offsets={layer.name: offsets_name(layer.name) for layer in plan.layers if lowering != "cuda"},
            dense_bytes=sum(section.bytes for section in dense),
            expert_bytes=sum(section.bytes for section in experts),
            replaced={reason: count for reason, count in replaced.items() if count},
            remarks=list(model.remarks),
            plan=plan,
            **tokens,
        )
        write_document(manifest, document_part)
    return manifest


def _throughput(written: WeightsFile, seconds: float) -> str:
    new = (written.bytes - written.resumed) / 1e9
    return f"wrote {new:.3g} GB of weights in {seconds:.3g} s, {new / seconds:.3g} GB/s"


def _engine_file(final: Path, part: Path) -> EngineFile:
    return EngineFile(name=final.name, sha256=sha256(part), bytes=part.stat().st_size)
