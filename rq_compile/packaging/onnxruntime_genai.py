"""An engine for onnxruntime-genai: a folder with a ``genai_config.json`` with which its own generate loop runs the engine."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from rq_compile.engine.library import library_path
from rq_compile.engine.manifest import CacheTensor, EngineFile, Manifest
from rq_compile.engine.paths import manifest_path
from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside, sha256, write_document
from rq_compile.lowerings import LOWERINGS
from rq_compile.packaging.edge import OP_LIBRARY, cache_remarks, library_remark, licence_remark
from rq_compile.packaging.package import Package
from rq_compile.runtime.files import read_cpu_manifest, verify
from rq_compile.standalone.decoding import ALL
from rq_compile.standalone.text import open_tokenizer

CONFIG = "genai_config.json"
# The names under which onnxruntime-genai looks for a tokenizer.
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADD_SPECIAL = 'add_special_tokens="true"'


def package(source: Path, output: Path, context_length: int | None = None) -> Package:
    """Write the engine with its manifest, its op library, ``genai_config.json`` and the tokenizer's files.

    A sequence, including its prompt, has at most ``context_length`` tokens, by default the model's context length. The same
    engine and op library give the same bytes.

    Raises:
        UserError: ``source`` is not a complete engine, is damaged, does not state its context length although none is given,
            cannot be run by onnxruntime-genai (see ``check_runnable``), or its manifest has the name of another file of the
            package; or see ``folder_written_beside``.
    """
    manifest = read_cpu_manifest(source)
    check_runnable(source, manifest)
    if (place := manifest_path(source).name) in (CONFIG, TOKENIZER, TOKENIZER_CONFIG):
        raise UserError(
            f"{place} would be both the manifest of {source} and a file of onnxruntime-genai; compile to another name", 2
        )
    length = context_length or manifest.context_length
    if length is None:
        raise UserError(f"{source} does not state the context length of its model; give --context-length", 2)
    verify(source, manifest)
    settings = tokenizer_settings(source, manifest)

    with folder_written_beside(output) as folder:
        for file in manifest.files:
            shutil.copyfile(source.parent / file.name, folder / (TOKENIZER if file == manifest.tokenizer else file.name))
        if manifest.tokenizer is not None:  # so that the folder can still be verified, timed and evaluated
            manifest = manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update={"name": TOKENIZER})})
        manifest = manifest.model_copy(update={"graph": with_all_logits(folder / source.name)})
        if manifest.op_library is not None:
            shutil.copyfile(library_path(), folder / OP_LIBRARY)
        if settings is not None:
            write_json(settings, folder / TOKENIZER_CONFIG)
        write_document(manifest, manifest_path(folder / source.name))
        write_json(config(manifest, length), folder / CONFIG)
        files = sorted(path.name for path in folder.iterdir())

    return Package(
        destination="onnxruntime-genai",
        folder=str(output),
        files=files,
        run=[f"python -c {shlex.quote(example(output, settings))}"],
        remarks=[
            library_remark(manifest),
            f"a sequence has at most {length} tokens",
            *tokenizer_remarks(settings),
            *cache_remarks(manifest),
            licence_remark(manifest),
        ],
    )


def with_all_logits(graph: Path) -> EngineFile:
    """Let the graph compute the logits of all tokens. onnxruntime-genai allocates memory for all, and itself selects those of the
    last token of each sequence before the padding."""
    import onnx

    from rq_compile.rewrite.logits_to_keep import fixed
    from rq_compile.rewrite.rewrite import exported, imported

    rewritten = imported(onnx.load(graph, load_external_data=False))
    fixed(rewritten, ALL)
    graph.write_bytes(exported(rewritten).SerializeToString(deterministic=True))
    return EngineFile(name=graph.name, sha256=sha256(graph), bytes=graph.stat().st_size)


def check_runnable(source: Path, manifest: Manifest) -> None:
    """
    Raises:
        UserError: the engine is an encoder-decoder, has no end-of-text token, or has a cache with tensors of different shapes.
    """
    if manifest.encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder, which onnxruntime-genai only runs for Whisper; package a decoder", 2)
    if not manifest.end_of_text:
        raise UserError(f"{source} has no end-of-text token, which onnxruntime-genai requires; set eos_token_id in the model", 2)
    states = [tensor.past for tensor in manifest.cache if len(tensor.shape) != 4 or tensor.shape[2] != "past"]
    if states:
        raise UserError(
            f"{source} has a cache of states ({states[0]}), which onnxruntime-genai's decoder has no names for; use --for edge", 2
        )
    shapes = {heads_and_dimension(tensor) for tensor in manifest.cache}
    if len(shapes) > 1:
        told = " and ".join(f"{heads} x {dimension}" for heads, dimension in sorted(shapes))
        raise UserError(
            f"{source} has cache tensors of {told} (heads x dimension), as latent attention does, but onnxruntime-genai gives "
            "them all one shape; use --for edge",
            2,
        )


def heads_and_dimension(tensor: CacheTensor) -> tuple[int, int]:
    """Heads and dimension of keys or values, ``[batch, heads, past, dimension]``."""
    _, heads, _, dimension = tensor.shape
    assert isinstance(heads, int)
    assert isinstance(dimension, int)
    return heads, dimension


def config(manifest: Manifest, context_length: int) -> dict[str, Any]:
    """The content of ``genai_config.json``. onnxruntime-genai uses model type ``decoder`` for graphs that it did not build
    itself."""
    keys, values = manifest.cache[::2], manifest.cache[1::2]
    heads, dimension = heads_and_dimension(keys[0])
    options: dict[str, Any] = {"provider_options": []}
    if manifest.op_library is not None:
        options["custom_ops_library"] = OP_LIBRARY
    options |= LOWERINGS[manifest.lowering].session_options
    decoder = {
        "filename": manifest.graph.name,
        "session_options": options,
        "num_hidden_layers": len(keys),
        "num_key_value_heads": heads,
        "head_size": dimension,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": numbered(keys, "past"),
            "past_value_names": numbered(values, "past"),
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": numbered(keys, "present"),
            "present_value_names": numbered(values, "present"),
        },
    }
    model = {
        "type": "decoder",
        "vocab_size": manifest.vocabulary,
        "context_length": context_length,
        "eos_token_id": manifest.end_of_text,
        "pad_token_id": manifest.end_of_text[0],
        "decoder": decoder,
    }
    # Not shared: with other lowerings, the graph returns a longer cache. It was not tried with caches that grow in place.
    return {"model": model, "search": {"max_length": context_length, "do_sample": False, "past_present_share_buffer": False}}


def numbered(tensors: list[CacheTensor], side: str) -> str:
    """The pattern of the tensors' names: ``past_key_values.%d.key``."""
    pattern: str = getattr(tensors[0], side).replace(".0.", ".%d.")
    assert [getattr(tensor, side) for tensor in tensors] == [pattern % number for number in range(len(tensors))]
    return pattern


def tokenizer_settings(source: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The content of ``tokenizer_config.json``; None for tokenizers other than byte-pair encoding, which need their own class."""
    if manifest.tokenizer is None:
        return None
    path = source.parent / manifest.tokenizer.name
    if json.loads(path.read_bytes())["model"]["type"] != "BPE":
        return None
    # onnxruntime-genai does not read the tokens around a text, only whether a beginning-of-text token precedes it.
    start = open_tokenizer(path).encode("").tokens
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(start),
        **({"bos_token": start[0]} if start else {}),
    }


def tokenizer_remarks(settings: dict[str, Any] | None) -> list[str]:
    if settings is None:
        return ["onnxruntime-genai cannot read this engine's tokenizer: use token ids as input and output"]
    if settings["add_bos_token"]:
        token = settings["bos_token"]
        return [f"Tokenizer.encode puts {token} before a text only after update_options({ADD_SPECIAL}), as in the line to run"]
    return []


def example(folder: Path, settings: dict[str, Any] | None) -> str:
    """A Python program that continues a text, or token ids if the tokenizer cannot be read."""
    lines = ["import onnxruntime_genai as og", f"m = og.Model({str(folder)!r})", "p = og.GeneratorParams(m)"]
    lines += ["p.set_search_options(max_length=32)", "g = og.Generator(m, p)"]
    prompt, shown = "[1, 2, 3]", "g.get_sequence(0)"
    if settings is not None:
        prompt, shown = 't.encode("Once upon a time")', "t.decode(g.get_sequence(0))"
        lines += ["t = og.Tokenizer(m)", *([f"t.update_options({ADD_SPECIAL})"] if settings["add_bos_token"] else [])]
    lines += [f"g.append_tokens({prompt})", "[g.generate_next_token() for _ in iter(g.is_done, True)]", f"print({shown})"]
    return "; ".join(lines)


def write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
