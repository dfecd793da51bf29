"""Continue a text with the engine in this folder: python generate.py "Once upon a time".

It needs onnxruntime, and tokenizers to read and write text: with --ids the prompt and the answer are token ids.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def load(engine: Path, manifest: dict, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open the engine to run on ``threads`` threads; 0: as many as ONNX Runtime likes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if manifest["lowering"] == "batched":
        # Else constant folding would keep fp32 copies of the 16-bit weights.
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "65536")
    if manifest["op_library"] is not None:
        options.register_custom_ops_library(str(HERE / "librq_moe.so"))
    return onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])


def generate(session: onnxruntime.InferenceSession, manifest: dict, prompt: list[int], tokens: int) -> Iterator[int]:
    """Yield up to ``tokens`` greedy tokens after ``prompt``, until the end of the text."""
    cache = manifest["cache"]
    inputs = {tensor.name for tensor in session.get_inputs()}
    outputs = ["logits", *(tensor["present"] for tensor in cache)]
    sizes = {"batch": 1, "past": 0}
    empty = {tensor["past"]: np.zeros([sizes.get(size, size) for size in tensor["shape"]], np.float32) for tensor in cache}
    beyond = manifest.get("recomputed_beyond")
    ids, past, start = np.array([prompt], np.int64), empty, 0
    for _ in range(tokens):
        if beyond is not None and start <= beyond < ids.shape[1]:
            past, start = empty, 0  # the model's positions are other ones from here on: its cache is of no use
        feeds = {
            "input_ids": ids[:, start:],
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(start, ids.shape[1], dtype=np.int64)[None],
            **past,
        }
        logits, *present = session.run(outputs, {name: value for name, value in feeds.items() if name in inputs})
        past = {tensor["past"]: value for tensor, value in zip(cache, present, strict=True)}
        token = int(logits[0, -1].argmax())
        if token in manifest["end_of_text"]:
            return
        yield token
        start, ids = ids.shape[1], np.append(ids, [[token]], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with the engine in this folder.")
    parser.add_argument("prompt", nargs="+", help="the text, or token ids with --ids")
    parser.add_argument("--ids", action="store_true", help="read and write token ids instead of text")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate at most (32)")
    arguments = parser.parse_args()

    engine = next(HERE.glob("*.onnx"))
    manifest = json.loads(engine.with_suffix(".json").read_text())
    session = load(engine, manifest)
    if arguments.ids:
        for token in generate(session, manifest, [int(token) for token in arguments.prompt], arguments.tokens):
            print(token, flush=True)
        return

    if manifest["tokenizer"] is None:
        parser.error("the engine has no tokenizer; give token ids with --ids")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HERE / manifest["tokenizer"]["name"]))
    prompt = tokenizer.encode(" ".join(arguments.prompt)).ids
    print(tokenizer.decode(list(generate(session, manifest, prompt, arguments.tokens))))


if __name__ == "__main__":
    main()
