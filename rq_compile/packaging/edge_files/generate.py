"""Continue a text with the engine in this folder: python generate.py "Once upon a time".

It needs onnxruntime, and also tokenizers to read and write text. With --ids, the prompt and the answer are token ids.
"""

import argparse
import json
import sys
from pathlib import Path

# This file may be a link in a folder of links, as in download caches, or a link from elsewhere into this folder.
FOLDERS = (Path(__file__).absolute().parent, Path(__file__).resolve().parent)
HERE = next((folder for folder in FOLDERS if any(folder.glob("*.onnx"))), FOLDERS[0])
sys.path.insert(0, str(HERE))  # the modules beside this one, from any working directory
sys.dont_write_bytecode = True  # do not write to this folder

from decoding import decode, open_session, until_end  # noqa: E402
from limits import session_threads  # noqa: E402
from sampling import Sampler, SamplingError, sampling_params  # noqa: E402

NUMBERS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with the engine in this folder.")
    parser.add_argument("prompt", nargs="+", help="the text, or token ids with --ids")
    parser.add_argument("--ids", action="store_true", help="read and write token ids instead of text")
    parser.add_argument("--tokens", type=int, default=32, help="maximum number of tokens to generate (32)")
    sampling = parser.add_argument_group("how tokens are chosen", "By default, as the model's generation_config.json says.")
    for name, kind in NUMBERS.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, help="as in vLLM's SamplingParams")
    sampling.add_argument("--stop", action="append", help="end before this text; repeatable")
    arguments = parser.parse_args()

    engine = next(HERE.glob("*.onnx"))
    manifest = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
    if arguments.ids:
        try:
            prompt = [int(token) for token in arguments.prompt]
        except ValueError:
            parser.error("--ids takes whole numbers")
    else:
        if manifest["tokenizer"] is None:
            parser.error("the engine has no tokenizer; give token ids with --ids")
        from text import TextStream, argument_text, open_tokenizer

        tokenizer = open_tokenizer(HERE / manifest["tokenizer"]["name"])
        try:
            prompt = tokenizer.encode(argument_text(" ".join(arguments.prompt))).ids
        except ValueError:
            parser.error("the prompt is not UTF-8 text")
    if not prompt:
        parser.error("the prompt is empty; give at least one token to continue")
    if not 0 <= min(prompt) <= max(prompt) < manifest["vocabulary"]:
        parser.error(f"the prompt has a token outside the vocabulary (0-{manifest['vocabulary'] - 1})")

    if arguments.ids and arguments.stop:
        parser.error("--stop has no effect with --ids; leave one of the two out")
    try:
        given = {name: getattr(arguments, name) for name in (*NUMBERS, "stop")}
        params = sampling_params(given, manifest["sampling"])
    except SamplingError as error:
        parser.error(str(error))
    sampler = Sampler(params, prompt)
    session = open_session(engine, manifest, HERE / "librq_moe.so", session_threads())
    tokens = decode(session, manifest, prompt, lambda logits: sampler.choose(logits).token)
    tokens = until_end(tokens, arguments.tokens, params.ends(manifest["end_of_text"]))
    if arguments.ids:
        for token in tokens:
            print(token, flush=True)
        return
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    stream = TextStream(tokenizer, stop=params.stop)
    for token in tokens:
        print(stream.push(token), end="", flush=True)
        if stream.stopped is not None:
            break
    print(stream.end())


if __name__ == "__main__":
    main()
